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


@pytest.fixture
def flaky(configured, tmp_path):
    """flaky(**options) -> a config whose reward fails for answers that end in "film"."""
    (tmp_path / "flaky.py").write_text(FLAKY)
    return lambda **options: configured(reward=f"{tmp_path / 'flaky.py'}:flaky", **options)


def metrics(config) -> list[dict]:
    """Without what depends on the clock."""
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "perf/" not in k and k != "eps"} for row in rows]


@pytest.mark.parametrize("estimator", ["gae", "grpo", "remax"])
def test_a_run_goes_on_without_them(flaky, capsys, estimator):
    config = flaky(samples_per_prompt=4, estimator=estimator, steps=2, epochs=1)
    ppo.train(config)
    lost = [row["rollout/answers_lost"] for row in metrics(config)]
    said = " ".join(capsys.readouterr().out.split())
    assert 0 < sum(lost) and max(lost) < 16 and "answers, which are left out" in said
    assert all(v == v for row in metrics(config) for v in row.values())  # no NaN
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert all(row["perf/reward_flaky_seconds"] > 0 for row in rows)


def test_resumed_it_ends_with_the_same_numbers(flaky):
    options = {"samples_per_prompt": 4, "estimator": "grpo", "epochs": 1, "eval_prompts": 2}
    whole = flaky(steps=2, **options)
    ppo.train(whole)
    half = replace(whole, output_dir=whole.output_dir + "_half", steps=1)
    ppo.train(half)
    ppo.train(replace(half, steps=2, resume=True))
    assert metrics(half) == metrics(whole)
    assert sum(row["rollout/answers_lost"] for row in metrics(whole)) > 0


def test_what_a_lost_answer_says_changes_nothing(flaky, monkeypatch):
    """None of its tokens counts in what is learnt from."""
    learnt = []

    def seen(policy, batch, *rest):
        learnt.append(batch)
        return {"loss": 0.0}

    monkeypatch.setattr(ppo, "learn", seen)
    ppo.train(flaky(steps=1, missing_eos_penalty=1.0))
    (batch,) = learnt
    gone = ~batch.mask.any(1)
    assert 0 < gone.sum() < 16
    assert torch.isfinite(batch.advantages).all() and (batch.advantages[gone] == 0).all()
    assert (batch.rollout.mask.any(1) == ~gone).all()
