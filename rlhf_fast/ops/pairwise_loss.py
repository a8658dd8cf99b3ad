"""pairwise_loss: the reward model's Bradley-Terry loss on preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .registry import Op, Sample, define_kernel, register


class PairwiseStats(NamedTuple):
    """Means over the pairs; detached 0-dim tensors, 0 for an empty batch."""

    accuracy: Tensor  # share of pairs with chosen > rejected
    gap: Tensor  # chosen − rejected
    chosen: Tensor
    rejected: Tensor


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    center_coef: float = 0.0,
) -> tuple[Tensor, PairwiseStats]:
    """Reward-model loss: mean −log σ(chosen − rejected − margin) (+ a centring term).

    ln 2 at a tie, → 0 when the order is right, ≈ the gap when it is wrong; finite at any finite
    gap, 0 where the right answer is infinitely better and inf where the wrong one is.
    InstructGPT, arXiv:2203.02155, eq. 1; margin: Llama 2, arXiv:2307.09288, eq. 2; centring
    center_coef · mean (chosen + rejected)²: Eisenstein et al., arXiv:2312.09244, eq. 2.

    Args:
        chosen, rejected: [...], scores of the preferred and of the other answer, with gradient.
        margin: [...], a constant, or None.
        center_coef: ≥ 0.

    Returns:
        (loss, PairwiseStats): float32 0-dim (float64 in, float64 out). The statistics, detached:
        accuracy, the share of pairs with chosen > rejected, and the means of gap, chosen −
        rejected, of chosen and of rejected; 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("chosen", chosen)
    check.like("rejected", rejected, "chosen", chosen)
    if margin is not None:
        check.like("margin", margin, "chosen", chosen)
    dtype = check.accumulator(chosen, rejected, margin)
    check.number("center_coef", center_coef, low=0.0, dtype=dtype)
    loss, stats, _, _ = KERNEL(
        check.line(chosen, dtype),
        check.line(rejected, dtype),
        None if margin is None else check.line(margin.detach(), dtype),
        float(center_coef),
    )
    return loss, PairwiseStats(*stats.unbind())


def reference(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    center_coef: float = 0.0,
) -> tuple[Tensor, PairwiseStats]:
    dtype = check.accumulator(chosen, rejected, margin)
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    n = max(chosen.numel(), 1)
    gap = chosen - rejected
    shifted = gap if margin is None else gap - margin.to(dtype)
    loss = (-F.logsigmoid(shifted)).sum() / n
    if center_coef:  # 0·∞ is 0 here
        loss = loss + center_coef * ((chosen + rejected) ** 2).sum() / n
    columns = ((gap > 0).to(dtype), gap, chosen, rejected)
    return loss, PairwiseStats(*(x.detach().sum() / n for x in columns))


def _forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats [4], dloss/dchosen [B], dloss/drejected [B])."""
    loss, stats = reference(chosen, rejected, margin, center_coef=center_coef)
    n = max(chosen.numel(), 1)
    gap = chosen - rejected
    order = -torch.sigmoid(-(gap if margin is None else gap - margin)) / n
    center = 2 * center_coef * (chosen + rejected) / n if center_coef else torch.zeros_like(gap)
    return loss, torch.stack(stats), order + center, center - order


def _fake(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = chosen.new_empty(len(PairwiseStats._fields))
    return chosen.new_empty(()), stats, torch.empty_like(chosen), torch.empty_like(chosen)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, d_chosen, d_rejected = output
    ctx.mark_non_differentiable(stats, d_chosen, d_rejected)
    ctx.save_for_backward(d_chosen, d_rejected)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> Any:
    d_chosen, d_rejected = ctx.saved_tensors
    return grad * d_chosen, grad * d_rejected, None, None


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(n: int, scale: float = 1.0, **options: Any) -> dict[str, Any]:
        return {
            "chosen": scale * torch.randn(n, generator=generator),
            "rejected": scale * torch.randn(n, generator=generator),
        } | options

    both = ("chosen", "rejected")
    yield Sample("plain", draw(37), both)
    yield Sample(
        "margin, centring",
        draw(21, margin=torch.rand(21, generator=generator), center_coef=0.01),
        both,
    )
    yield Sample("far apart", draw(16, scale=200.0), both)
    yield Sample("tie", {"chosen": torch.zeros(3), "rejected": torch.zeros(3)}, both)
    yield Sample("one pair", draw(1), both)
    yield Sample("empty", draw(0), both)


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    arguments = {
        "chosen": torch.randn(shape["B"], generator=generator, device=device),
        "rejected": torch.randn(shape["B"], generator=generator, device=device),
    }
    return Sample("bench", arguments, ("chosen", "rejected"))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    return shape["B"] * 4 * 4, shape["B"] * 4 * 4


KERNEL = define_kernel(
    "pairwise_loss(Tensor chosen, Tensor rejected, Tensor? margin, float center_coef) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_fake,
    triton="pairwise_loss:pairwise_loss",
    backward=_autograd,
    setup_context=_setup_context,
)
register(
    Op(
        "pairwise_loss",
        pairwise_loss,
        reference,
        (KERNEL,),
        samples,
        workload,
        ({"B": 512}, {"B": 65536}),
        bytes_moved,
    )
)
