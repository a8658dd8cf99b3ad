"""Nothing is deleted or written over that this program did not write."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from rlhf_fast.trainer import cli
from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run import files, lock
from rlhf_fast.trainer.run.folder import OF_STEPS, RESULTS, Run
from rlhf_fast.trainer.run.plot import plot


@pytest.fixture
def make(tmp_path):
    def config(**options) -> RunConfig:
        defaults = {"model": "m", "data": "d", "output_dir": str(tmp_path / "run")}
        return RunConfig(**(defaults | options))

    yield config
    lock.release()


def begun(config: RunConfig) -> Path:
    """A run of one step, with a model and a checkpoint."""
    run = Run(config)
    run.begin()
    run.log({"step": 1})
    for name in ("model", "adapter"):
        run.write(name, lambda path: (path.mkdir(), (path / "w").write_text("ours")))
    run.write("checkpoints/step_1.pt", lambda path: path.write_text("ours"))
    run.write("plot.png", lambda path: plot([{"step": 1, "objective/kl": 0.1}], path))
    run.save("before.json", {"prompt": []})
    return run.folder


def contents(folder: Path) -> dict[str, bytes]:
    """All but the lock, whose text is another holder's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != lock.NAME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


STEPS = ("checkpoints/step_3.pt", "completions/step_000003.parquet")


@pytest.mark.parametrize("option", ["resume", "overwrite", None])
@pytest.mark.parametrize("name", [*RESULTS, "config.yaml", *STEPS, ".model.old"])
def test_a_folder_without_a_run_of_ours(make, tmp_path, name, option):
    theirs = tmp_path / "run" / name
    if "." in name[1:]:
        theirs.parent.mkdir(parents=True)
        theirs.write_text("theirs")
    elif name not in OF_STEPS:
        theirs.mkdir(parents=True)
        (theirs / "theirs.txt").write_text("theirs")
    else:
        theirs.parent.mkdir(parents=True)
        theirs.write_text("theirs, a file")
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=f"holds .*{name}.*did not write"):
        Run(make(**({option: True} if option else {})))
    assert contents(tmp_path / "run") == before


def test_what_lies_beside_a_run_stays(make, tmp_path):
    for name in ("data.jsonl", "src/main.py", "checkpoints/theirs.txt", ".git/HEAD", "model.txt"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("theirs")
    before = contents(tmp_path / "run")
    begun(make())
    begun(make(overwrite=True))
    assert before.items() <= contents(tmp_path / "run").items()


def test_overwrite_deletes_what_is_ours_also_in_a_copy(make, tmp_path):
    folder = begun(make())
    lock.release()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # with times of its own
    Run(make(overwrite=True, output_dir=str(copy))).begin()
    left = sorted(path.name for path in copy.iterdir())
    assert left == [".rlhf_fast.json", lock.NAME, "checkpoints", "config.yaml"]
    assert not list((copy / "checkpoints").iterdir())


def replaced(path: Path) -> None:
    (path / "w").write_text("mine")


def extended(path: Path) -> None:
    (path / "notes.txt").write_text("mine")


def linked(path: Path) -> None:
    elsewhere = path.parent.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def link_in_it(path: Path) -> None:
    (path / "link").symlink_to(path.parent.parent)


@pytest.mark.parametrize("option", ["resume", "overwrite"])
@pytest.mark.parametrize("change", [replaced, extended, linked, link_in_it])
def test_a_model_that_was_ours(make, change, option):
    folder = begun(make())
    change(folder / "model")
    before = contents(folder.parent)
    with pytest.raises(InputError, match=r"run holds model.*or which were changed since"):
        Run(make(**{option: True}))
    assert contents(folder.parent) == before


def test_put_there_while_a_run_goes_on(make):
    run = Run(make())
    run.begin()
    (run.folder / "model").mkdir()
    (run.folder / "model" / "w").write_text("theirs")
    with pytest.raises(InputError, match="model was put there by another hand .* move it away"):
        run.write("model", lambda path: path.mkdir())
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "step_1.pt").write_text("theirs")
    with pytest.raises(InputError, match="step_1.pt was put there"):
        run.write("checkpoints/step_1.pt", lambda path: path.write_text("ours"))
    run.config.save_total_limit = 1
    for step in (2, 3):
        run.write(f"checkpoints/step_{step}.pt", partial(torch.save, {}))
    run.prune()
    assert sorted(run.checkpoints()) == [1, 3]


def test_a_model_that_is_ours_is_replaced_after_a_kill_on_either_side(make, monkeypatch):
    """Its fingerprint is on the disk before it is in its place."""
    folder = begun(make())

    class Killed(BaseException):
        pass

    def killed(path):
        if path.name.startswith(".model"):
            raise Killed

    run = Run(make(resume=True))
    run.begin()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "flush", killed)
        run.write("model", lambda path: (path.mkdir(), (path / "w").write_text("new")))
    assert (folder / "model" / "w").read_text() == "ours"
    run = Run(make(resume=True))
    run.write("model", lambda path: (path.mkdir(), (path / "w").write_text("newer")))
    assert Run(make(resume=True)).strangers("model") == []


@pytest.mark.parametrize("option", ["model", "data"])
@pytest.mark.parametrize("how", ["as it is", "by a link", "with ..", "inside"])
def test_what_a_run_reads_is_not_deleted(make, tmp_path, option, how):
    """The model of an earlier run in the same folder: --overwrite would delete it."""
    folder = begun(make())
    (tmp_path / "link").symlink_to(folder)
    path = {
        "as it is": folder / "model",
        "by a link": tmp_path / "link" / "model",
        "with ..": folder / ".." / "run" / "model",
        "inside": folder / "model" / "w",
    }[how]
    with pytest.raises(InputError, match=f"^{option}=.* lies where .* puts its own model"):
        Run(make(overwrite=True, **{option: str(path)}))
    assert (folder / "model" / "w").read_text() == "ours"


def test_a_run_of_version_0_1_goes_on_and_is_not_deleted(make):
    folder = begun(make())
    (folder / ".rlhf_fast.json").unlink()  # it had none
    with pytest.raises(InputError, match="holds metrics.jsonl, .*did not write"):
        Run(make(overwrite=True))
    for name in ("model", "adapter"):  # not finished yet
        shutil.rmtree(folder / name)
    Run(make(resume=True)).begin()
    assert (folder / "checkpoints" / "step_1.pt").read_text() == "ours"
    Run(make(resume=True)).write("metrics.jsonl", lambda path: path.write_text(""))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"written": 3}', '{"written": {"model": 3}}'])
def test_a_mark_that_cannot_be_read(make, text):
    folder = begun(make())
    (folder / ".rlhf_fast.json").write_text(text)
    with pytest.raises(InputError, match=r"\.rlhf_fast\.json cannot be read"):
        Run(make(resume=True))


# ----------------------------------------------------------------------------------- the plot


@pytest.fixture
def drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "objective/kl": 0.5}) + "\n")
    return lambda *words: cli.main(["plot", str(tmp_path), *words])


def test_a_plot_is_drawn_over_a_plot_only(drawn, tmp_path, capsys):
    assert drawn() == drawn() == 0
    for output in (tmp_path / "thesis.png", tmp_path / "plot.png"):
        output.unlink(missing_ok=True)
        output.write_bytes(b"\x89PNG somebody else's")
        assert drawn("--output", str(output)) == 2
        assert "is there already and was not written by this" in capsys.readouterr().err
        assert output.read_bytes() == b"\x89PNG somebody else's"
    assert drawn() == 2
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "thesis.png")
    assert drawn("--output", str(link)) == 2 and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link.png", "metrics.jsonl", "plot.png", "thesis.png",
    ]  # fmt: skip
