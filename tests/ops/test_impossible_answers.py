"""Preference losses where a model gives an answer the log-prob −∞: Δ = ∞ − ∞ says nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops import preference_loss

PAIRS, LENGTH, HIDDEN, VOCAB = 3, 4, 8, 11
LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")


def drawn() -> dict[str, Tensor]:
    """Answers of which those of pair 0 have token 0 once, which no model can give."""
    g = torch.Generator().manual_seed(0)
    rows = 2 * PAIRS
    labels = torch.randint(1, VOCAB, (rows, LENGTH), generator=g)
    labels[[0, PAIRS], 1] = 0
    bias = torch.randn(VOCAB, generator=g, dtype=torch.float64)
    bias[0] = -torch.inf
    made = {"labels": labels, "bias": bias}
    for name in ("hidden", "ref_hidden"):
        made[name] = torch.randn(rows, LENGTH, HIDDEN, generator=g, dtype=torch.float64)
    made["weight"] = torch.randn(VOCAB, HIDDEN, generator=g, dtype=torch.float64)
    return made


def found(loss: str, x: dict[str, Tensor], rows: Tensor) -> list[Tensor]:
    """Loss, statistics and gradients of hidden and weight, of these rows alone."""
    hidden, weight = (x[name].clone().requires_grad_() for name in ("hidden", "weight"))
    labels = x["labels"][rows]
    logp = rf.linear_token_logprobs(hidden[rows], weight, labels, bias=x["bias"])
    ref = rf.linear_token_logprobs(x["ref_hidden"][rows], x["weight"], labels, bias=x["bias"])
    mask = torch.ones_like(labels, dtype=torch.bool)
    if loss == "kto":
        value, stats = rf.kto_loss(logp, mask, ref, rows < PAIRS)
    else:
        ref = None if loss in preference_loss.REFERENCE_FREE else ref
        value, stats = rf.preference_loss(logp, mask, ref, loss=loss, nll_coef=0.5)
    value.backward()
    return [value.detach(), *stats, hidden.grad, weight.grad]


@pytest.mark.parametrize("loss", LOSSES)
def test_what_says_nothing_is_left_out_to_the_weights(loss: str) -> None:
    """Through the fused head: the others learn as if it were not there."""
    x = drawn()
    every = torch.arange(2 * PAIRS)
    all_of_them, others = found(loss, x, every), found(loss, x, every[every % PAIRS > 0])
    assert all_of_them[-2][[0, PAIRS]].eq(0).all() and all_of_them[-1].abs().sum() > 0
    torch.testing.assert_close(all_of_them, others)
    nothing = found(loss, x, torch.tensor([0, PAIRS]))
    assert all(part.eq(0).all() for part in nothing)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_is_not_hidden(loss: str) -> None:
    x = drawn()
    x["hidden"][1, 2] = torch.nan
    assert found(loss, x, torch.arange(2 * PAIRS))[0].isnan()


@pytest.mark.parametrize("loss", LOSSES[:-1])
def test_one_impossible_answer_has_an_order(loss: str) -> None:
    """A worse answer that cannot be given is as it should be, a better one as far from it as can
    be, but for IPO, whose Δ has a target."""
    logp = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]])
    mask, ref = torch.ones(2, 2, dtype=torch.bool), -torch.ones(2, 2)
    ref = None if loss in preference_loss.REFERENCE_FREE else ref
    for impossible, expected in ((1, 0.0), (0, math.inf)):
        x = logp.clone()
        x[impossible, 0] = -torch.inf
        x.requires_grad_()
        value, stats = rf.preference_loss(x, mask, ref, loss=loss)
        assert value.item() == (math.inf if loss == "ipo" else expected)
        assert stats.accuracy.item() == impossible
        (gradient,) = torch.autograd.grad(value, x)
        assert loss == "ipo" or gradient.isfinite().all()
