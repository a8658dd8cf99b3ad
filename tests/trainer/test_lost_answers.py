"""Answers without a score leave the batch: the others are learnt from as if they were alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_fast import group_advantages
from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.advantages import of_groups
from rlhf_fast.trainer.config import GROUPED
from rlhf_fast.trainer.run.folder import read_metrics

FLAKY = """
def share(text):
    return text.split().count("good") / max(1, len(text.split()))

async def judge(text):
    if text.endswith("film"):
        raise ConnectionError("no route")
    return share(text)

def flaky(prompts, completions, **columns):
    return [judge(c) for c in completions]
"""


@pytest.mark.parametrize("method", GROUPED)
def test_a_group_goes_on_without_them(configured, method):
    scores, lengths = torch.randn(8), torch.arange(8) + 3
    kept = torch.tensor([1, 1, 0, 1, 1, 0, 0, 0]).bool()
    config = configured(batch_size=8, samples_per_prompt=4, estimator=method)
    lengths = lengths if method == "opo" else None
    came = of_groups(scores.masked_fill(~kept, 7e5), kept, config, method, lengths)
    rows = torch.tensor([0, 1, 3])
    three = group_advantages(
        scores[rows], 3, method=method, lengths=None if lengths is None else lengths[rows]
    )
    torch.testing.assert_close(came[rows], three)
    assert (came[4:] == 0).all() and came[2] == 0


@pytest.mark.parametrize("estimator", ["gae", "grpo", "remax"])
def test_a_run_goes_on_without_them_and_resumes_to_the_same(
    configured, tmp_path, capsys, estimator
):
    (tmp_path / "flaky.py").write_text(FLAKY)
    options = {"samples_per_prompt": 4, "estimator": estimator, "save_every": 2, "epochs": 1}
    config = configured(reward=f"{tmp_path / 'flaky.py'}:flaky", **options)
    ppo.train(config)
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    lost = [row["rollout/answers_lost"] for row in rows]
    assert (
        0 < sum(lost)
        and max(lost) < 16
        and "answers, which are left out" in "".join(capsys.readouterr().out.replace("\n", " "))
    )
    assert all(row["perf/reward_flaky_seconds"] > 0 for row in rows)
    numbers = [{k: v for k, v in row.items() if "perf/" not in k and k != "eps"} for row in rows]
    assert all(v == v for row in numbers for v in row.values())  # no NaN

    half = replace(config, output_dir=config.output_dir + "_half", steps=2)
    ppo.train(half)
    ppo.train(replace(half, steps=4, resume=True))
    again = read_metrics(Path(half.output_dir) / "metrics.jsonl")
    again = [{k: v for k, v in row.items() if "perf/" not in k and k != "eps"} for row in again]
    assert again == numbers


def test_what_a_lost_answer_says_changes_nothing(configured, tmp_path, monkeypatch):
    """Its tokens have no gradient: with another score behind it, the update is the same."""
    learnt = []

    def seen(policy, batch, *rest):
        learnt.append(batch)
        return {"loss": 0.0}

    (tmp_path / "flaky.py").write_text(FLAKY)
    monkeypatch.setattr(ppo, "learn", seen)
    ppo.train(configured(reward=f"{tmp_path / 'flaky.py'}:flaky", steps=1, missing_eos_penalty=1.0))
    (batch,) = learnt
    gone = ~batch.mask.any(1)
    assert 0 < gone.sum() < 16
    assert torch.isfinite(batch.advantages).all() and (batch.advantages[gone] == 0).all()
    assert (batch.rollout.mask.any(1) == ~gone).all()
