"""A run goes on with what it began with: names say nothing of contents."""

import json
import shutil
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

    def train(steps: int) -> None:
        made.steps = steps
        ppo.train(made)

    train.data, train.rows, train.config = Path(made.data), data, made
    train(1)
    return train


def one_more_row(run, tmp_path):
    run.data.write_text(run.rows + json.dumps({"prompt": "and"}) + "\n")
    return "data has changed"


def another_order(run, tmp_path):
    run.data.write_text("".join(run.rows.splitlines(keepends=True)[::-1]))
    return "data has changed"


def another_model(run, tmp_path):
    change(tmp_path / "policy" / "model.safetensors")
    return "model=.*policy has changed"


def another_judge(run, tmp_path):
    change(tmp_path / "judge" / "model.safetensors")
    return "judge=.*judge has changed"


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [one_more_row, another_order, another_model, another_judge])
def test_what_changed_is_refused_by_name(run, tmp_path, change):
    message = change(run, tmp_path)
    with pytest.raises(InputError, match=f"{message} since the run in .*out began"):
        run(2)
    Path(run.config.output_dir, "contents.json").unlink()  # the way that the message names
    run(2)


def test_what_did_not_change_goes_on(run, capsys):
    run.data.write_text(run.rows.replace('": "', '":  "'))  # the same rows, written otherwise
    run(2)
    assert "changed" not in capsys.readouterr().out


def test_code_that_changed_is_said(run, tmp_path, capsys):
    with open(tmp_path / "my_reward.py", "a") as file:
        file.write("# better\n")
    run(2)
    said = "".join(capsys.readouterr().out.split())
    assert "my_reward.py:share:itscodehaschangedsincetherunbegan" in said


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
