"""Statistics of parts are those of the whole, whatever the parts are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.metrics import SPREAD, Means, with_variance

CPU = torch.device("cpu")


def test_means_of_unequal_parts():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 100.0])
    means = Means(("x", "y"), CPU)
    for part in x.split([1, 4]):
        means.add({"x": part.mean()}, len(part))
    means.add({"x": torch.tensor(torch.nan)}, 0)  # of nothing
    other = Means(("y",), CPU)
    other.add({"y": 3.0}, 2)
    means.merge(other)
    assert means["x"].item() == pytest.approx(x.mean().item())
    assert means.known() == pytest.approx({"x": 23.0, "y": 3.0})
    assert Means(("x",), CPU)["x"].isnan() and Means(("x",), CPU).known() == {}


def test_the_variance_of_parts_with_other_means():
    ratios = torch.tensor([0.5, 0.7, 1.9, 2.0, 2.1, 0.999])
    means = Means(("val/ratio", SPREAD), CPU)
    for part in ratios.split([2, 3, 1]):
        mean = part.mean()
        spread = part.var(correction=0) + (mean - 1) ** 2
        means.add({"val/ratio": mean, SPREAD: spread}, len(part))
    assert with_variance(means.known())[SPREAD] == pytest.approx(
        ratios.var(correction=0).item(), rel=1e-5
    )


def rows(config) -> list[dict]:
    ppo.train(config)
    return [json.loads(x) for x in (Path(config.output_dir) / "metrics.jsonl").open()]


def test_statistics_do_not_depend_on_micro_batches(configured, monkeypatch):
    """GRPO at beta 0: even groups leave the loss, other ones in each micro-batch."""
    calls = iter(range(1000))

    def advantages(scores, group, **_):
        x = torch.zeros_like(scores)
        if next(calls) % 2 == 0:  # of every second step no answer has an advantage
            x[:3] = torch.tensor([1.0, -1.0, 0.5])
        return x

    monkeypatch.setattr(ppo, "group_advantages", advantages)
    found = []
    for micro in (8, 3, 1):
        calls = iter(range(1000))
        found.append(
            rows(
                configured(
                    f"m{micro}", steps=2, batch_size=8, samples_per_prompt=4, estimator="grpo",
                    beta=0.0, epochs=2, minibatches=2, micro_batch_size=micro, learning_rate=1e-9,
                )
            )
        )  # fmt: skip
    for others in found[1:]:
        for row, other in zip(found[0], others, strict=True):
            for name, number in row.items():
                if name.startswith(("policy/", "val/", "loss")):
                    assert other[name] == pytest.approx(number, rel=1e-4, abs=1e-6), name
    still = found[0][1]
    entropy = still["objective/entropy"] / still["val/answer_tokens"]
    assert still["val/ratio"] == 1 and still["policy/approxkl_avg"] == 0
    assert still["policy/entropy_avg"] == pytest.approx(entropy, rel=1e-3)


@pytest.mark.parametrize(
    "option", [{"temperature": 1e-46}, {"beta": 1e-40}, {"clip_high": 1e40}, {"value_coef": 1e39}]
)
def test_options_that_float32_cannot_hold_are_one_line(configured, option):
    (name,) = option
    with pytest.raises(InputError, match=f"{name}=.*float32"):
        configured(**option)
