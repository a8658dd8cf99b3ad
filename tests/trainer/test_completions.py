"""The answers of evaluations as Parquet files and as a tracker's table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.run import completions, lock
from rlhf_fast.trainer.run.folder import Run

ANSWERS = {
    "prompt": ["a | b", [{"role": "user", "content": "ü"}]], "answer": ["<b>*x*</b>\n- y", ""],
    "score": [0.5, -1.0], "kl": [0.1, 0.0], "length": [3, 0], "stop_reason": ["stop", "length"],
}  # fmt: skip
TABLE = completions.table(7, ANSWERS)


def read(folder: Path) -> list[dict]:
    files = str(folder / "completions" / "*.parquet")
    return load_dataset("parquet", data_files=files, split="train").to_list()


def test_what_a_file_has(tmp_path):
    (tmp_path / "completions").mkdir()
    completions.save(7, ANSWERS, tmp_path / completions.name_of(7))
    first, second = read(tmp_path)
    assert first == {
        "step": 7, "prompt": "a | b", "completion": "<b>*x*</b>\n- y", "score": 0.5, "kl": 0.1,
        "length": 3, "stop_reason": "stop",
    }  # fmt: skip
    assert json.loads(second["prompt"]) == ANSWERS["prompt"][1]
    assert list(completions.files(tmp_path)) == [7]


def test_files_of_others_are_no_steps(tmp_path):
    (tmp_path / "completions").mkdir()
    for name in ("step_7.parquet", "step_x.parquet", "step_0000007.parquet", "other.parquet"):
        (tmp_path / "completions" / name).touch()
    assert completions.files(tmp_path) == {}
    (tmp_path / "completions" / "step_1000000.parquet").touch()
    assert list(completions.files(tmp_path)) == [1000000]


def test_before_after_and_the_judge(configured, reward):
    """Of the run's own two evaluations: what before.json and after.json have, and a second one in
    the same folder takes their place."""
    config = configured(steps=1, batch_size=8, epochs=1, judge=reward("negative"))
    ppo.train(config)
    folder = Path(config.output_dir)
    found = read(folder)
    assert [row["step"] for row in found] == [0] * 8 + [1] * 8
    for rows, name in ((found[:8], "before"), (found[8:], "after")):
        kept = json.loads((folder / f"{name}.json").read_text())
        assert [row["completion"] for row in rows] == kept["answer"]
        assert [row["judge"] for row in rows] == kept["judge"]
        for row in rows:  # an answer of all tokens that are allowed was cut off, or ended just then
            assert row["stop_reason"] == "stop" or row["length"] == config.max_new_tokens
    (folder / "completions" / "theirs.parquet").touch()
    config.overwrite = True
    Run(config).begin()
    assert [path.name for path in (folder / "completions").iterdir()] == ["theirs.parquet"]


def test_what_is_after_the_checkpoint_is_made_anew(tmp_path):
    """And so deleted, but for what was not written by the run."""
    run = Run(RunConfig(model="m", data="d", output_dir=str(tmp_path / "run")))
    run.begin()
    for step in (0, 3, 4):
        run.save_completions(step, ANSWERS)
    theirs = run.folder / completions.name_of(5)
    theirs.write_text("theirs")
    run.restore({}, torch.optim.SGD([torch.zeros(1)]))
    assert list(completions.files(run.folder)) == [0, 5]
    lock.release()


class Tracker:
    def __init__(self, name: str) -> None:
        self.name, self.logged = name, []

    def log(self, values, step=None):
        self.logged.append((step, values))


def test_a_tracker_with_tables():
    tracker = Tracker("wandb")
    tracker.log_table = lambda name, columns, data, step: tracker.logged.append((name, step, data))
    completions.log_table(tracker, 7, ANSWERS)
    assert tracker.logged == [
        ("completions", 7, [list(row) for row in zip(*TABLE.values(), strict=True)])
    ]


def test_trackio(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Table=lambda dataframe: dataframe))
    tracker = Tracker("trackio")
    completions.log_table(tracker, 7, ANSWERS)
    ((step, values),) = tracker.logged
    assert step == 7 and values["completions"].to_dict("list") == TABLE


def test_a_tracker_without_tables():
    tracker = Tracker("mlflow")
    completions.log_table(tracker, 7, ANSWERS)
    assert tracker.logged == []


def test_markdown_has_no_markup_of_the_answers():
    tracker = Tracker("tensorboard")
    completions.log_table(tracker, 7, ANSWERS)
    ((step, values),) = tracker.logged
    lines = values["completions"].splitlines()
    assert step == 7 and len(lines) == 4
    assert lines[2] == r"| 7 | a \| b | \<b\>\*x\*\</b\> - y | 0.5 | 0.1 | 3 | stop |"


@pytest.mark.parametrize("rows", [1, 100])
def test_a_table_has_its_first_rows(rows):
    tracker = Tracker("tensorboard")
    completions.log_table(tracker, 0, {name: x[:1] * rows for name, x in ANSWERS.items()})
    shown = tracker.logged[0][1]["completions"].count("\n| 0 | ")
    assert shown == min(rows, completions.SHOWN)
