"""Groups without a spread of scores are replaced, within a bound, and the same ones on resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import STARTS

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.run.folder import read_metrics

ONLY_LONG = """
def some(prompts, completions, **columns):
    # answers to short prompts all score the same; those to "is the plot" never do
    return [float(i) if "plot" in p else 0.0 for i, p in enumerate(prompts)]
"""


@pytest.fixture
def begun(configured, tmp_path):
    def make(output: str, **options):
        (tmp_path / "some.py").write_text(ONLY_LONG)
        # prompts of 1 to 7 tokens: a batch's longest is not that of another
        prompts = [{"prompt": p} for p in [*STARTS * 4, "the film was not very bad and"]]
        sampled = {"estimator": "grpo", "samples_per_prompt": 2, "batch_size": 8, "steps": 2}
        return configured(
            output, prompts=prompts, reward=f"{tmp_path / 'some.py'}:some", eval_prompts=1,
            epochs=1, minibatches=1,
            save_every=1, **(sampled | options),
        )  # fmt: skip

    return make


def metrics(config) -> list[dict[str, float]]:
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    times = ("perf/", "eps")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


@pytest.mark.parametrize("options", [{}, {"trainable_layers": 1, "top_k": 4, "estimator": "opo"}])
def test_even_groups_are_replaced(begun, monkeypatch, options):
    batches, real = [], ppo.learn

    def record(policy, batch, *more):
        batches.append((batch, policy))
        return real(policy, batch, *more)

    monkeypatch.setattr(ppo, "learn", record)
    config = begun("out", dynamic_sampling_rounds=20, **options)
    ppo.train(config)
    rows = metrics(config)
    assert all(row["rollout/groups_without_spread"] == 0 for row in rows)
    assert any(1 < row["rollout/rounds"] < 20 for row in rows)
    assert all(0 < row["rollout/groups_replaced"] <= 4 * row["rollout/rounds"] for row in rows)
    for batch, policy in batches:
        r = batch.rollout
        assert (batch.advantages.abs() > 0.1).all()
        for ids, attention in zip(r.ids, r.attention, strict=True):
            prompt = ids[: r.prompt_length][attention[: r.prompt_length]]
            assert "plot" in policy.tokenizer.decode(prompt)
        # what was put together fits: log-probs measured under these weights are the rollout's
        gap = (r.logp - batch.old.logp)[r.mask]
        assert gap.abs().max() < 1e-4
    assert all(row["val/ratio"] == pytest.approx(1, abs=1e-5) for row in rows[:1])


def test_the_rounds_are_bounded_and_counted(begun, reward):
    config = replace(begun("out", steps=1, dynamic_sampling_rounds=2), reward=[reward("three")])
    ppo.train(config)
    (row,) = metrics(config)
    counted = ("rounds", "groups_replaced", "groups_without_spread")
    assert [row[f"rollout/{name}"] for name in counted] == [2, 0, 4]
    assert row["grad_norm"] is not None and row["skipped_updates"] == 0


def test_a_continued_run_replaces_the_same(begun):
    whole, broken = (begun(name, dynamic_sampling_rounds=3) for name in ("whole", "broken"))
    ppo.train(whole)
    ppo.train(replace(broken, steps=1))
    (Path(broken.output_dir) / "summary.json").unlink(missing_ok=True)
    ppo.train(replace(broken, resume=True))
    assert metrics(broken) == metrics(whole)
    weights = [
        torch.load(Path(c.output_dir) / "checkpoints" / "step_2.pt", weights_only=True)["weights"]
        for c in (whole, broken)
    ]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
