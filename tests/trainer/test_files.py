"""What is on the disk when: bytes before the name, everything before summary.json."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rlhf_fast.trainer import ppo, reward
from rlhf_fast.trainer.config import RewardConfig, RunConfig
from rlhf_fast.trainer.run import files
from rlhf_fast.trainer.run.folder import Run


@pytest.fixture
def operations(monkeypatch) -> list[tuple[str, str]]:
    """("flushed", path) and ("renamed", path of before), in the order in which they happen."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append(("flushed", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(before, after) -> None:
        done.append(("renamed", str(before)))
        replace(before, after)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no names of open files here")
@pytest.mark.parametrize(
    "parts", [[""], ["/a", "/inside/b", "/inside", ""]], ids=["file", "folder"]
)
def test_a_name_is_given_to_bytes_that_are_on_the_disk(parts, operations, tmp_path):
    """Else a power cut may leave the new name with nothing under it, and the old file gone."""
    with files.replacing(tmp_path / "result") as partial:
        for part in parts:
            path = Path(f"{partial}{part}")
            if part != "" or len(parts) == 1:
                path.parent.mkdir(exist_ok=True, parents=True)
                if part != "/inside":
                    path.write_text("bytes")
    at = operations.index(("renamed", str(partial)))
    before, after = operations[:at], operations[at + 1 :]
    assert {("flushed", f"{partial}{part}") for part in parts} <= set(before)
    assert ("flushed", str(tmp_path)) in after  # the name itself


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no names of open files here")
def test_metrics_are_on_the_disk_before_their_checkpoint(operations, tmp_path):
    run = Run(RunConfig(model="m", data="d", output_dir=str(tmp_path / "run")))
    run.begin()
    run.log({"step": 1, "x": 1.0})
    weights = {"w": torch.ones(2)}
    run.save_checkpoint(1, weights, torch.optim.AdamW(weights.values()))
    flushed = operations.index(("flushed", str(run.metrics)))
    (checkpoint,) = [i for i, (what, path) in enumerate(operations)
                     if what == "renamed" and "step_1" in path]  # fmt: skip
    assert flushed < checkpoint


@pytest.fixture
def written(monkeypatch) -> list[str]:
    names: list[str] = []
    write = Run.write
    monkeypatch.setattr(
        Run, "write", lambda run, name, *rest: names.append(name) or write(run, name, *rest)
    )
    return names


def test_the_summary_comes_last(configured, tiny_policy_folder, write_jsonl, tmp_path, written):
    """It says that the run is finished: one killed before it must be gone on with."""
    summary = ppo.train(configured(steps=1))
    assert summary and written[-1] == "summary.json"
    assert {"model", "plot.png", "before.json", "after.json"} <= set(written[:-1])
    written.clear()
    pairs = [{"prompt": "the film", "chosen": " good", "rejected": " bad"}] * 12
    reward.train(
        RewardConfig(
            model=tiny_policy_folder, data=write_jsonl(pairs, "pairs.jsonl"), batch_size=4,
            eval_pairs=4, output_dir=str(tmp_path / "reward"), device="cpu",
        )
    )  # fmt: skip
    assert written[-1] == "summary.json" and "model" in written[:-1]
