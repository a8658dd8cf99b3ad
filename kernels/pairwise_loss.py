"""pairwise_loss on the GPU: one program for 1024 pairs, gradients in the same pass, then the sums.

−log σ(x) is max(−x, 0) + log1p(e^(−|x|)), with a log1p that keeps e^(−|x|) when it is tiny.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import kl, partials
from .exponentials import exp, log1p

STATS, LOSS = tl.constexpr(4), tl.constexpr(4)
COLUMNS, PADDED = tl.constexpr(5), tl.constexpr(8)


@triton.jit
def pairwise_loss_kernel(
    chosen, rejected, margin, d_chosen, d_rejected, sums, n, center_coef: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = chosen.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    w = tl.load(chosen + i, mask=inside, other=0.0)
    lost = tl.load(rejected + i, mask=inside, other=0.0)
    gap = w - lost
    x = gap
    if margin is not None:
        x = gap - tl.load(margin + i, mask=inside, other=0.0)
    tail = exp(-tl.abs(x))
    loss = tl.maximum(-x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(tail)
    share = 1.0 / tl.full((), n, dtype)
    order = -share * tl.where(x > 0, tail, 1.0) / (1.0 + tail)  # −σ(−x) / n
    coef = tl.full((), center_coef, dtype)
    both = w + lost
    center = kl.times(2.0 * coef * share, both)
    tl.store(d_chosen + i, order + center, mask=inside)
    tl.store(d_rejected + i, center - order, mask=inside)
    partials.put(sums, 0, tl.sum((gap > 0).to(dtype)))
    partials.put(sums, 1, tl.sum(gap))
    partials.put(sums, 2, tl.sum(w))
    partials.put(sums, 3, tl.sum(lost))
    partials.put(sums, LOSS, tl.sum(tl.where(inside, loss + kl.times(coef, both * both), 0.0)))


@triton.jit
def pairwise_loss_finish_kernel(sums, programs, n, loss, stats):
    mean = partials.totals(sums, programs, COLUMNS, PADDED) / n
    column = tl.arange(0, PADDED)
    tl.store(stats + column, mean, mask=column < STATS)
    tl.store(loss, partials.picked(mean, LOSS, PADDED))


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats [4], dloss/dchosen [B], dloss/drejected [B])."""
    d_chosen, d_rejected = torch.empty_like(chosen), torch.empty_like(rejected)
    n = chosen.numel()
    if n == 0:
        return chosen.new_zeros(()), chosen.new_zeros(STATS.value), d_chosen, d_rejected
    loss, stats = chosen.new_empty(()), chosen.new_empty(STATS.value)
    block = min(triton.next_power_of_2(n), 1024)
    programs = triton.cdiv(n, block)
    sums = chosen.new_empty((COLUMNS.value, programs))
    with torch.cuda.device_of(chosen):
        pairwise_loss_kernel[(programs,)](
            chosen, rejected, margin, d_chosen, d_rejected, sums, n, center_coef, BLOCK=block
        )
        pairwise_loss_finish_kernel[(1,)](sums, programs, n, loss, stats)
    return loss, stats, d_chosen, d_rejected
