"""A run goes on with what it began with: names say nothing of contents."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.trainer import ppo, reward
from rlhf_fast.trainer.config import RewardConfig
from rlhf_fast.trainer.errors import InputError


@pytest.fixture
def run(configured, tiny_policy_folder, tiny_reward_folder, tmp_path):
    """run(steps) trains or goes on; its model and reward model are copies of this test's own."""
    shutil.copytree(tiny_policy_folder, tmp_path / "policy")
    shutil.copytree(tiny_reward_folder, tmp_path / "judge")
    config = {"model": str(tmp_path / "policy"), "judge": str(tmp_path / "judge"), "resume": True}
    prompts = [{"prompt": f"the film {word}"} for word in ("is", "was", "not", "a", "very")]
    made = configured("out", prompts=prompts, batch_size=2, minibatches=1, eval_prompts=2, **config)
    data = Path(made.data).read_text()

    def train(steps: int, **options) -> None:
        ppo.train(replace(made, steps=steps, **options))

    train.data, train.rows, train.folder = Path(made.data), data, Path(made.output_dir)
    train(1)
    return train


def test_what_changed_is_refused_by_name(run, tmp_path):
    """Data, and the weights of every model that is named; back again, the run goes on."""
    weights = {name: tmp_path / name / "model.safetensors" for name in ("policy", "judge")}
    turned = run.rows.splitlines(keepends=True)[::-1]
    for name, path, content in (
        ("data", run.data, (run.rows + json.dumps({"prompt": "and"}) + "\n").encode()),
        ("data", run.data, "".join(turned).encode()),
        ("model=.*policy", weights["policy"], flipped(weights["policy"])),
        ("judge=.*judge", weights["judge"], flipped(weights["judge"])),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} has changed since the run in .*out began"):
            run(2)
        path.write_bytes(before)
    run(2)


def test_a_run_that_begins_again_keeps_nothing_of_the_one_before(run, monkeypatch):
    """Killed between its config.yaml and its own digests, it goes on with the data it was given."""

    def killed(self, name, value):
        raise KeyboardInterrupt

    run.data.write_text("".join(run.rows.splitlines(keepends=True)[::-1]))
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_fast.trainer.run.folder.Run.save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(1, resume=False, overwrite=True)
    assert not (run.folder / "contents.json").exists()
    run(1)


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    return bytes(content)


def test_what_may_change(run, tmp_path, capsys):
    """The same rows written otherwise, in silence; a reward's code, with a word; and what the
    message of a refusal offers."""
    run.data.write_text(run.rows.replace('": "', '":  "'))
    with open(tmp_path / "my_reward.py", "a") as file:
        file.write("# better\n")
    run(2)
    said = "".join(capsys.readouterr().out.split())
    assert "my_reward.py:share:itscodehaschangedsincetherunbegan" in said
    assert said.count("changed") == 1
    run.data.write_text(run.rows + json.dumps({"prompt": "and"}) + "\n")
    (run.folder / "contents.json").unlink()
    run(3)


def test_pairs_that_changed_are_refused(tiny_policy_folder, write_jsonl, tmp_path):
    rows = [{"chosen": f"good {w}", "rejected": f"bad {w}"} for w in ("film", "plot", "actor", "a")]
    held_out = write_jsonl(rows[:2], "held_out.jsonl")
    options = {
        "model": tiny_policy_folder, "data": write_jsonl(rows), "eval_data": held_out,
        "output_dir": str(tmp_path / "rm"), "batch_size": 2, "device": "cpu", "resume": True,
    }  # fmt: skip
    reward.train(RewardConfig(**options))
    write_jsonl(rows[2:], "held_out.jsonl")
    with pytest.raises(InputError, match="eval_data has changed"):
        reward.train(RewardConfig(**options, epochs=2))
