"""examples/arithmetic: the task is what it says, and a miniature of the comparison ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import task

    return task


@pytest.fixture
def compare(task):
    import compare

    return compare


def test_every_question_is_in_one_part(task):
    rows = task.questions()
    asked = [row["prompt"] for part in rows.values() for row in part]
    assert len(asked) == len(set(asked)) == 10_000
    assert len(rows["held_out"]) == 512
    for row in rows["train"][:50]:
        assert eval(row["prompt"][:-1]) == int(row["answer"])


def test_what_is_right(task):
    assert task.right(["1+2="] * 4, ["3", "03", "3+", ""], ["3"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_the_model_reads_what_the_supervised_start_writes(task):
    rows = [{"prompt": "37+58=", "answer": "95"}, {"prompt": "1+2=", "answer": "3"}]
    ids, labels = task.encode(rows)
    tokenizer = task.tokenizer()
    assert tokenizer(rows[0]["prompt"]).input_ids == ids[0, :6].tolist()
    assert tokenizer.decode(labels[1][labels[1] >= 0], skip_special_tokens=True) == "3"
    assert labels[1].tolist() == [-100] * 4 + [labels[1, 4], 1] + [-100] * 3


def test_chance_is_the_share_of_samples_that_are_right(task):
    """A model of no opinion: each token one of 14."""
    import torch

    model = task.new_model(hidden=32, layers=1)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)  # the head, too
    rows = [{"prompt": "37+58=", "answer": "95"}, {"prompt": "1+2=", "answer": "3"}]
    expected = (14**-3 + 14**-2) / 2
    assert task.chance(model, *task.encode(rows)) == pytest.approx(expected, rel=1e-4)


def test_answers_that_dynamic_sampling_left_out_are_counted(compare):
    rows = [{"episode": 4}, {"episode": 8, "rollout/rounds": 2}, {"eval_score": 1.0}]
    assert compare.sampled(rows, 4) == [0, 4, 16]


def test_between_two_evaluations(compare):
    assert compare.at([0, 10, 20], [0.2, 0.4, 0.4], 5) == pytest.approx(0.3)
    assert compare.at([0, 10, 20], [0.2, 0.4, 0.5], 30) == 0.5


@pytest.mark.long
def test_a_miniature(task, compare, tmp_path, monkeypatch, undrawn):
    new, start = task.new_model, task.supervised_start
    monkeypatch.setattr(task, "new_model", lambda: new(hidden=32, layers=1))
    monkeypatch.setattr(task, "supervised_start", lambda model, rows, _: start(model, rows, 0.0))
    monkeypatch.setattr(compare, "NAMES", {k: compare.NAMES[k] for k in ("ppo", "dapo")})
    page = tmp_path / "arithmetic.md"
    page.write_text(f"before {compare.BEGIN} old {compare.END} after")
    compare.main(
        ["--answers", "32", "--seeds", "0", "1", "--runs", str(tmp_path / "runs"),
         "--out", str(tmp_path), "--batch_size", "16", "--eval_every", "1", "--eval_prompts", "8"]
    )  # fmt: skip
    result = json.loads((tmp_path / "arithmetic.json").read_text())
    for run in [*result["runs"]["ppo"], *result["runs"]["dapo"]]:
        assert run["answers"][0] == 0 and run["answers"][-1] >= 32 and run["questions"] == 8
        assert len(run["answers"]) == len(run["right"]) == len(run["updates"])
    assert result["runs"]["ppo"][0]["updates"] == [0, 8, 16]  # 4 passes of 2
    # Untrained answers are all wrong: DAPO looks for others in vain, 10 rounds, and ends.
    assert result["runs"]["dapo"][0]["answers"] == [0, 176]
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after") and "REINFORCE" not in text
    assert "| PPO | 0.0" in text and (tmp_path / "arithmetic.png").stat().st_size > 10_000
