"""preference_loss beside TRL's and OpenRLHF's functions: the same values and gradients."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
from frameworks import OPENRLHF, load
from torch import Tensor

import rlhf_fast as rf

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
losses = load("openrlhf.models.loss", OPENRLHF)
cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer

PAIRS, LENGTH = 5, 9
HERE = SimpleNamespace(device=torch.device("cpu"))


def drawn(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """logp and ref_logp [2B, T], mask."""
    g = torch.Generator().manual_seed(0)
    logp, ref_logp = -3 * torch.rand(2, 2 * PAIRS, length, generator=g)
    lengths = torch.randint(1, length + 1, (2 * PAIRS, 1), generator=g)
    return logp, ref_logp, torch.arange(length) < lengths


def summed(logp: Tensor, mask: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
    """[B] of the chosen and of the rejected answers."""
    total = (logp * mask).sum(1)
    chosen, rejected = (total / mask.sum(1) if mean else total).chunk(2)
    return chosen, rejected


def same(theirs, ours, logp: Tensor) -> None:
    found = []
    for function in (theirs, ours):
        x = logp.clone().requires_grad_()
        loss = function(x)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_openrlhfs(smoothing: float) -> None:
    logp, ref_logp, mask = drawn()
    their = losses.DPOLoss(0.3, label_smoothing=smoothing)
    same(
        lambda x: their(*summed(x, mask), *summed(ref_logp, mask))[0],
        lambda x: rf.preference_loss(x, mask, ref_logp, beta=0.3, label_smoothing=smoothing)[0],
        logp,
    )


def test_ipo_is_openrlhfs_where_sum_and_mean_are_one() -> None:
    logp, ref_logp, mask = drawn(length=1)
    their = losses.DPOLoss(0.3, ipo=True)
    same(
        lambda x: their(*summed(x, mask), *summed(ref_logp, mask))[0],
        lambda x: rf.preference_loss(x, mask, ref_logp, loss="ipo", beta=0.3)[0],
        logp,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_is_trls(smoothing: float) -> None:
    """Whose margin is γ/β on log-probs."""
    logp, _, mask = drawn()
    options = {"alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.5, "beta": 2.0}
    them = SimpleNamespace(label_smoothing=smoothing, accelerator=HERE, **options)
    more = {"loss": "simpo", "beta": 2.0, "margin": 0.5, "label_smoothing": smoothing}
    same(
        lambda x: cpo.cpo_loss(them, *summed(x, mask, mean=True))[0].mean(),
        lambda x: rf.preference_loss(x, mask, **more)[0],
        logp,
    )


def test_orpo_is_trls() -> None:
    """Its loss is the likelihood's minus what this function returns."""
    logp, _, mask = drawn()
    them = SimpleNamespace(beta=0.25, accelerator=HERE)

    def theirs(x: Tensor) -> Tensor:
        nll = -(x * mask)[:PAIRS].sum() / mask[:PAIRS].sum()
        return nll - orpo.odds_ratio_loss(them, *summed(x, mask, mean=True))[0].mean()

    same(
        theirs,
        lambda x: rf.preference_loss(x, mask, loss="orpo", beta=0.25, nll_coef=1.0)[0],
        logp,
    )


def test_kto_by_hand() -> None:
    """As TRL's KTOTrainer writes it: 1 − σ(β (r − kl)) and 1 − σ(β (kl − r))."""
    logp, ref_logp = (
        torch.tensor([[-1.0, -2.0], [-3.0, 9.0]]),
        torch.tensor([[-2.0, -2.5], [-1, 9]]),
    )
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = rf.kto_loss(
        logp, mask, ref_logp, torch.tensor([True, False]), kl=0.5, beta=0.4,
        desirable_weight=2.0, undesirable_weight=3.0,
    )  # fmt: skip

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    good, bad = 1 - sigmoid(0.4 * (1.5 - 0.5)), 1 - sigmoid(0.4 * (0.5 + 2.0))
    assert loss.item() == pytest.approx((2 * good + 3 * bad) / 2)
    assert [x.item() for x in stats] == pytest.approx([0.4 * 1.5, 0.4 * -2.0])


def test_odds_of_what_is_almost_certain() -> None:
    """1 − p keeps its digits at either end, and a p of 1 has no infinite odds."""
    x = torch.tensor([[-1e-6], [-40.0], [0.0], [-1.0]])
    mask = torch.ones_like(x, dtype=torch.bool)
    loss, stats = rf.preference_loss(x.requires_grad_(), mask, loss="orpo", beta=0.1)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    first = rf.preference_loss(x[[0, 1]].detach(), mask[:2], loss="orpo")[1]
    assert first.chosen.item() == pytest.approx(-math.log(1e-6), rel=1e-5)
    assert first.rejected.item() == pytest.approx(-40.0, rel=1e-6)
    assert stats.accuracy == 0.0
