"""The run's folder: whatever happens while it is written, what was there before stays usable."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run import files, lock
from rlhf_fast.trainer.run import folder as run_module
from rlhf_fast.trainer.run.folder import Run, read_metrics

STEPS = 4


class Killed(BaseException):
    """A kill: no handler of the code's own runs after it, what was on the disk stays there."""


class Counter:
    """A part of the state, as a scheduler is."""

    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.fixture
def make(tmp_path):
    def config(name: str = "run", **options) -> RunConfig:
        defaults = {"model": "m", "data": "d", "resume": True, "save_total_limit": 2}
        return RunConfig(output_dir=str(tmp_path / name), **(defaults | options))

    return config


def start(config: RunConfig):
    weights = {"w": torch.zeros(1000)}
    return Run(config), weights, torch.optim.SGD(weights.values(), lr=0.1), Counter()


def advance(config: RunConfig) -> None:
    """A run whose state after n steps is known: w = 1 + 2 + … + n, count = n."""
    run, weights, optimizer, counter = start(config)
    if run.summary is not None:
        return
    run.begin()
    for step in range(run.restore(weights, optimizer, counter=counter), STEPS):
        weights["w"] += step + 1
        counter.count += 1
        run.log({"step": step + 1, "w": weights["w"][0].item()})
        run.save_checkpoint(step + 1, weights, optimizer, counter=counter)
    run.write("model", lambda folder: (folder.mkdir(), (folder / "w").write_text("10")))
    run.save("summary.json", {"w": weights["w"][0].item()})


def check_finished(config: RunConfig) -> None:
    folder = Path(config.output_dir)
    assert [row["w"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 3, 6, 10]
    assert [p.name for p in Run(config).checkpoints().values()] == ["step_3.pt", "step_4.pt"]
    assert (folder / "model" / "w").read_text() == "10"
    assert Run(config).summary == {"w": 10.0}
    run, weights, optimizer, counter = start(config)
    assert run.restore(weights, optimizer, counter=counter) == 4
    assert (weights["w"] == 10).all() and counter.count == 4


@pytest.mark.long
@pytest.mark.parametrize("overwritten", [False, True])
def test_killed_before_every_single_operation_on_the_disk(make, monkeypatch, overwritten):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # real ones take most of the time
    moments = 0
    for moment in itertools.count():
        config = make(f"run{moment}")
        if overwritten:  # an older, longer run lies there: none of it may come back
            run, weights, optimizer, counter = start(config)
            run.begin()
            run.log({"step": 1, "w": -1.0})
            weights["w"] -= 5
            run.save_checkpoint(9, weights, optimizer, counter=counter)
            run.write("model", lambda folder: (folder.mkdir(), (folder / "w").write_text("-5")))
            config = make(f"run{moment}", resume=False, overwrite=True)
        left = moment

        def counted(function):
            def call(*arguments, **options):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("flush", "remove", "save_tensors"):
                operation = counted(getattr(files, name))
                patch.setattr(files, name, operation)
                patch.setattr(run_module, name, operation)
            patch.setattr(os, "replace", counted(os.replace))
            try:
                advance(config)
                break  # the whole run takes no more operations than that
            except Killed:
                moments += 1
        if overwritten and Run(make(f"run{moment}")).exists:
            metrics = read_metrics(Path(config.output_dir) / "metrics.jsonl")
            if metrics and metrics[0]["w"] == -1.0:  # killed before the old run was deleted
                advance(config)
                check_finished(make(f"run{moment}"))
                continue
        advance(make(f"run{moment}"))
        check_finished(make(f"run{moment}"))
    assert moments > 50
    check_finished(make(f"run{moment}"))


def test_a_folder_is_never_missing_without_a_copy(make, monkeypatch):
    """Between the two renames that replace a folder the old one lies aside, the new is whole."""
    run = Run(make())
    run.begin()
    run.write("model", lambda folder: (folder.mkdir(), (folder / "w").write_text("old")))
    real = os.replace

    def killed_after_its_first(source, target):
        real(source, target)
        if source == run.folder / "model":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed_after_its_first)
        run.write("model", lambda folder: (folder.mkdir(), (folder / "w").write_text("new")))
    assert (run.folder / ".model.old" / "w").read_text() == "old"
    assert (run.folder / ".model.partial" / "w").read_text() == "new"
    run.write("model", lambda folder: (folder.mkdir(), (folder / "w").write_text("newer")))
    assert (run.folder / "model" / "w").read_text() == "newer"
    left = sorted(p.name for p in run.folder.iterdir() if p.name.startswith("."))
    assert left == [".rlhf_fast.json", ".rlhf_fast.lock"]


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("how", ["no room to flush", "no room for a large file"])
def test_full_disk(make, monkeypatch, how):
    config = make()
    run, weights, optimizer, counter = start(config)
    run.begin()
    run.restore(weights, optimizer, counter=counter)
    weights["w"] += 1
    run.log({"step": 1, "w": 1.0})
    run.save_checkpoint(1, weights, optimizer, counter=counter)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights["w"] += 2
    with monkeypatch.context() as patch:
        if how == "no room to flush":
            patch.setattr(os, "fsync", no_room)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        try:
            with pytest.raises(InputError) as error:
                run.save_checkpoint(2, weights, optimizer, counter=counter)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = "No space left on device" if how == "no room to flush" else "File too large"
    assert reason in str(error.value) and "the checkpoint of step 1 is intact" in str(error.value)

    again, weights, optimizer, counter = start(config)
    assert [p.name for p in again.checkpoints().values()] == ["step_1.pt"]
    assert not list((again.folder / "checkpoints").glob(".*"))  # room is given back
    assert again.restore(weights, optimizer, counter=counter) == 1
    assert (weights["w"] == 1).all()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command).returncode:
        pytest.skip("no tmpfs may be mounted here: only the pretended full disks are tried")
    yield disk
    lock.release()
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full(make, small_disk):
    """Whatever is written, what was there stays, and the run goes on once there is room."""
    answers = {"prompt": ["a"], "answer": ["b"], "score": [1.0], "stop_reason": ["stop"]}
    config = make("disk/run")
    run, weights, optimizer, counter = start(config)
    run.begin()
    weights["w"] += 1
    run.log({"step": 1, "w": 1.0})
    run.save_checkpoint(1, weights, optimizer, counter=counter)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "theirs").write_bytes(b"x" * 2**20)
    row = {"step": 2, "w": 3.0, "text": "x" * 2**16}
    for write, name in (
        (lambda: run.save_checkpoint(2, weights, optimizer, counter=counter), "step_2.pt"),
        (lambda: run.save_completions(2, answers), "step_000002.parquet"),
        (lambda: run.log_evaluation(row), "eval.jsonl"),
    ):
        with pytest.raises(InputError, match=f"{name} cannot be written: .*of step 1 is intact"):
            write()
    (small_disk / "theirs").unlink()
    lock.release()
    again, weights, optimizer, counter = start(config)
    again.begin()
    assert again.restore(weights, optimizer, counter=counter) == 1 and (weights["w"] == 1).all()
    again.save_completions(2, answers)
    again.save_checkpoint(2, weights, optimizer, counter=counter)
    assert list(again.checkpoints()) == [1, 2]


def test_full_disk_while_a_model_is_saved(make, tiny_config):
    """safetensors has an error type of its own."""
    from transformers import LlamaForCausalLM

    run = Run(make())
    run.begin()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(InputError, match="model cannot be written: .*nothing was lost"):
            run.write("model", LlamaForCausalLM(tiny_config).save_pretrained)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (run.folder / "model").exists() and not (run.folder / ".model.partial").exists()


def test_full_disk_while_a_tokenizer_is_saved(make, tiny_tokenizer):
    """tokenizers raises a bare Exception; what is no error of a disk keeps its own."""
    run = Run(make())
    run.begin()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match=r"model cannot be written: File too large .os error"):
            run.write(
                "model",
                lambda path: (
                    path.mkdir(),
                    tiny_tokenizer._tokenizer.save(f"{path}/tokenizer.json"),
                ),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (run.folder / "model").exists() and not (run.folder / ".model.partial").exists()
    with pytest.raises(ZeroDivisionError):
        run.write("model", lambda path: 1 / 0)


def killed_at(moment: int, remove):
    """`remove` until so many things have been removed."""
    left = moment

    def killed(path):
        nonlocal left
        if path.exists():
            if left == 0:
                raise Killed
            left -= 1
        remove(path)

    return killed


def test_killed_while_it_overwrites(make, monkeypatch):
    """What is left is the whole old run or none: never its weights without its end."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    moments = 0
    for moment in range(99):
        config = make(f"run{moment}")
        advance(config)
        (Path(config.output_dir) / "checkpoints" / ".step_9.pt.partial").write_text("a kill's")
        overwriting = Run(make(f"run{moment}", resume=False, overwrite=True))
        try:
            with monkeypatch.context() as patch:
                for module in (files, run_module):
                    patch.setattr(module, "remove", killed_at(moment, module.remove))
                overwriting.begin()
            break
        except Killed:
            moments += 1
        left = Run(config)
        assert left.summary == ({"w": 10.0} if left.exists else None)
        advance(config)
        check_finished(config)
        assert left.exists or not list(left.folder.rglob("*.partial"))
    assert moments > 5


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_lost_its_metrics_keeps_its_checkpoints(make, resume):
    advance(make("lost"))
    folder = Path(make("lost").output_dir)
    (folder / "metrics.jsonl").unlink()
    before = sorted(folder.rglob("*.pt"))
    assert before
    with pytest.raises(InputError, match="holds checkpoints and no metrics.jsonl: bring it back"):
        Run(make("lost", resume=resume))
    assert sorted(folder.rglob("*.pt")) == before
    advance(make("lost", resume=False, overwrite=True))
    check_finished(make("lost"))


def test_resume_is_a_switch_and_takes_auto(make):
    assert make(resume="auto").resume is True
    with pytest.raises(InputError, match="resume=later: expected true, false or auto"):
        make(resume="later")


def test_only_one_process_writes(make):
    run = Run(make(), writes=False)
    run.begin()
    run.log({"step": 1})
    run.save("x.json", 1)
    assert not run.folder.exists()


# ------------------------------------------------------------------------- changed on resume


def test_what_changes_and_may_is_told(make, capsys):
    Run(make(resume=False, device="cpu")).begin()
    (Path(make().output_dir) / "metrics.jsonl").touch()
    run = Run(make(device="auto", save_every=7))
    assert run.changed == {
        "resume": (False, True), "device": ("cpu", "auto"), "save_every": (50, 7),
    }  # fmt: skip
    run.begin()
    text = capsys.readouterr().out
    assert text == (
        "going on with device=auto (before: cpu)\ngoing on with save_every=7 (before: 50)\n"
    )
    assert Run(make(device="auto", save_every=7)).changed == {}  # told once


def test_the_optimizers_options_are_those_of_now(make):
    """A checkpoint brings its moments back, not what it was told to do with them."""
    run, weights, _, counter = start(make())
    run.begin()
    weights["w"].requires_grad_()
    weights["w"].grad = torch.ones(1000)
    before = torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.5, betas=(0.5, 0.6))
    before.step()
    run.log({"step": 1})
    run.save_checkpoint(1, weights, before, counter=counter)
    options = {"lr": 0.2, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-3}
    now = torch.optim.AdamW(weights.values(), **options)
    assert start(make())[0].restore(weights, now, counter=counter) == 1
    assert {name: now.param_groups[0][name] for name in options} == options
    torch.testing.assert_close(now.state_dict()["state"], before.state_dict()["state"])


def test_what_would_be_another_run_is_refused(make):
    advance(make())
    with pytest.raises(InputError) as error:
        Run(make(seed=1, data="other"))
    assert "data=other, but the run in output_dir=" in str(error.value)
    assert "began with data=d: set it back, or begin again" in str(error.value)


def test_a_run_cannot_end_before_it_has_come(make):
    advance(make())
    run = Run(make())
    run.check_end(STEPS)
    with pytest.raises(InputError, match="has made 4 steps already, it cannot end after 3"):
        run.check_end(3)
    Run(make("new")).check_end(3)


def test_options_that_came_later_have_their_default(make):
    """A run of an earlier version goes on, unless an option it did not know is used."""
    advance(make())
    file = Path(make().output_dir) / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(x for x in lines if not x.startswith("trainable_layers")))
    assert Run(make()).changed == {}
    with pytest.raises(
        InputError, match="trainable_layers=2, but .* began with trainable_layers=N"
    ):
        Run(make(trainable_layers=2))
    file.unlink()
    with pytest.raises(InputError, match="config.yaml cannot be read: .*No such file"):
        Run(make())


# ------------------------------------------------------------------- files changed by other hands


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "step_4.pt cannot be read: .*zip file.*without the file --resume goes on from"),
        (lambda path: path.write_bytes(b""), "step_4.pt cannot be read: it is empty"),
        (lambda path: torch.save([1], path), "step_4.pt is not a checkpoint of a run"),
        (lambda path: torch.save({"step": 4}, path), "step_4.pt is not a checkpoint of what"),
    ],
    ids=["cut", "empty", "a list", "incomplete"],
)
def test_a_checkpoint_that_cannot_be_used(make, spoil, message):
    advance(make())
    run, weights, optimizer, counter = start(make())
    spoil(run.checkpoints()[4])
    with pytest.raises(InputError, match=message):
        run.restore(weights, optimizer, counter=counter)
    assert weights["w"].sum() == 0
    run.checkpoints()[4].unlink()  # as the message says
    assert run.restore(weights, optimizer, counter=counter) == 3


def test_a_checkpoint_of_another_model(make):
    advance(make())
    run, _, optimizer, counter = start(make())
    for weights in ({"w": torch.zeros(2, 500)}, {"v": torch.zeros(1000)}):
        with pytest.raises(InputError, match="step_4.pt is not a checkpoint .* another model"):
            run.restore(weights, optimizer, counter=counter)


def test_a_file_of_the_users_own_among_the_checkpoints(make):
    advance(make())
    folder = Path(make().output_dir) / "checkpoints"
    shutil.copy(folder / "step_4.pt", folder / "step_best.pt")
    assert list(Run(make()).checkpoints()) == [3, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "", "config.yaml cannot be read: 'NoneType'"),
        ("config.yaml", "- a", "config.yaml cannot be read"),
        ("config.yaml", "a: [\n", "config.yaml cannot be read: while parsing"),
        ("summary.json", "{", "summary.json cannot be read: .*without the file --resume makes it"),
        ("metrics.jsonl", "xyz\n{}\n", "metrics.jsonl, line 1 cannot be read: Expecting value"),
    ],
)
def test_a_file_that_cannot_be_read(make, name, text, message):
    advance(make())
    (Path(make().output_dir) / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        run, weights, optimizer, counter = start(make())
        assert run.summary is None or run.restore(weights, optimizer, counter=counter)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output_dir=.*file/run cannot be made: Not a directory"):
        Run(make("file/run")).begin()


def test_a_checkpoint_without_room_is_not_begun(make, monkeypatch):
    """A full disk would cost others more than it."""
    run, weights, optimizer, counter = start(make())
    run.begin()
    run.save_checkpoint(1, weights, optimizer, counter=counter)
    monkeypatch.setattr(run_module, "save_tensors", lambda *_: pytest.fail("it was begun"))
    size = weights["w"].nbytes
    disk = SimpleNamespace(free=size - 1)
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: disk)
    with pytest.raises(InputError, match="step_2.pt cannot be written: it takes .*step 1 is inta"):
        run.save_checkpoint(2, weights, optimizer, counter=counter)
    disk.free = size
    with pytest.raises(pytest.fail.Exception, match="it was begun"):
        run.save_checkpoint(2, weights, optimizer, counter=counter)


def test_the_only_good_checkpoint_stays(make, monkeypatch, capsys):
    """One that was damaged while it was written takes the place of none."""
    run, weights, optimizer, counter = start(make(save_total_limit=1))
    run.begin()
    run.save_checkpoint(1, weights, optimizer, counter=counter)

    def spoilt(state, path):
        files.save_tensors(state, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_tensors", spoilt)
        run.save_checkpoint(2, weights, optimizer, counter=counter)
    assert [*run.checkpoints()] == [1, 2]
    said = "".join(capsys.readouterr().out.split())
    assert "step_2.ptisdamaged:thosebeforeitarekept" in said
    run.save_checkpoint(3, weights, optimizer, counter=counter)
    assert [*run.checkpoints()] == [3]


def test_the_best_checkpoint_stays(make):
    run, weights, optimizer, counter = start(make(save_total_limit=1))
    run.begin()
    for step in range(1, 5):
        run.best = 2 if step >= 2 else 1
        run.save_checkpoint(step, weights, optimizer, counter=counter)
    assert [*run.checkpoints()] == [2, 4]
