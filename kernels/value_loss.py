"""value_loss on the GPU: the loss, its statistics and its gradient from one read.

The same three launches as policy_loss (count, loss, sums). 17 bytes a token in float32: values,
old values, returns and the mask in, the gradient out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aggregate, kl, partials

STATS = tl.constexpr(7)  # columns 0 to 6 are the statistics in their public order
RETURNS, RETURN_SQUARES = tl.constexpr(2), tl.constexpr(3)
RESIDUAL, COUNT = tl.constexpr(5), tl.constexpr(6)
RESIDUAL_SQUARES, LOSS = tl.constexpr(7), tl.constexpr(8)
COLUMNS, PADDED = tl.constexpr(9), tl.constexpr(16)


@triton.jit
def value_loss_kernel(
    values, old_values, returns, mask, normalizer, counts, d_values, sums, B, T,
    clip: tl.float64, AGGREGATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = values.dtype.element_ty
    blocks = tl.cdiv(T, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    i = row * T + t
    inside = t < T
    kept = tl.load(mask + i, mask=inside, other=0) != 0
    V = tl.where(kept, tl.load(values + i, mask=inside, other=0.0), 0.0)
    R = tl.where(kept, tl.load(returns + i, mask=inside, other=0.0), 0.0)
    c = aggregate.coefficient(counts, B, row, normalizer, AGGREGATION, dtype)

    error = V - R
    squared = error * error
    larger = squared
    gradient = error
    clips = tl.zeros((BLOCK,), tl.int1)
    if old_values is not None:
        old = tl.where(kept, tl.load(old_values + i, mask=inside, other=0.0), 0.0)
        reach = tl.full((), clip, dtype)
        clipped = tl.minimum(tl.maximum(V, old - reach), old + reach) - R
        clips = clipped * clipped > squared
        larger = tl.where(clips, clipped * clipped, squared)
        gradient = tl.where(clips, 0.0, error)
    tl.store(d_values + i, tl.where(kept, kl.times(c, gradient), 0.0), mask=inside)

    count = tl.sum(kept.to(dtype))
    R_sum, residual_sum = tl.sum(R), -tl.sum(error)
    partials.put(sums, 0, tl.sum(clips.to(dtype)))
    partials.put(sums, 1, tl.sum(V))
    partials.put(sums, RETURNS, R_sum)
    partials.put(sums, RETURN_SQUARES, partials.squares(R, kept, R_sum, count))
    partials.put(sums, 4, tl.sum(squared))
    partials.put(sums, RESIDUAL, residual_sum)
    partials.put(sums, RESIDUAL_SQUARES, partials.squares(-error, kept, residual_sum, count))
    partials.put(sums, LOSS, kl.times(c, tl.sum(0.5 * larger)))
    partials.put(sums, COUNT, count)


@triton.jit
def value_loss_finish_kernel(sums, programs, loss, stats, ROUNDING: tl.constexpr):
    total = partials.totals(sums, programs, COLUMNS, PADDED)
    count = partials.picked(total, COUNT, PADDED)
    n = tl.maximum(count, 1.0)
    R = partials.picked(total, RETURNS, PADDED) / n
    residual = partials.picked(total, RESIDUAL, PADDED) / n
    R_var = partials.all_squares(sums, programs, COUNT, RETURNS, RETURN_SQUARES, R) / n
    residual_var = partials.all_squares(
        sums, programs, COUNT, RESIDUAL, RESIDUAL_SQUARES, residual
    ) / n  # fmt: skip
    rounding = ROUNDING * R  # a variance of nothing but rounding explains nothing
    varies = R_var > rounding * rounding
    explained = tl.where(varies, 1.0 - residual_var / tl.where(varies, R_var, 1.0), 0.0)
    column = tl.arange(0, PADDED)
    value = tl.where(column == RETURN_SQUARES, R_var, total / n)
    value = tl.where(column == RESIDUAL, explained, value)
    value = tl.where(column == COUNT, count, value)
    tl.store(stats + column, value, mask=column < STATS)
    tl.store(loss, partials.picked(total, LOSS, PADDED))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    clip: float,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats [7], dloss/dvalues [B, T])."""
    d_values = torch.empty_like(values)
    if values.numel() == 0:
        return values.new_zeros(()), values.new_zeros(STATS.value), d_values
    loss, stats = values.new_empty(()), values.new_empty(STATS.value)
    rows, steps = values.shape
    block = min(triton.next_power_of_2(steps), 1024)
    programs = rows * triton.cdiv(steps, block)
    sums = values.new_empty((COLUMNS.value, programs))
    with torch.cuda.device_of(values):
        value_loss_kernel[(programs,)](
            values, old_values, returns, mask, normalizer,
            aggregate.row_counts(mask, aggregation, normalizer), d_values, sums, rows, steps, clip,
            AGGREGATION=aggregation, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
        value_loss_finish_kernel[(1,)](
            sums, programs, loss, stats, ROUNDING=4 * torch.finfo(values.dtype).eps
        )
    return loss, stats, d_values
