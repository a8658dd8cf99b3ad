"""masked_mean, masked_moments and masked_normalize on the GPU.

Sums take one read (5 bytes a position in float32) and a last small launch; normalizing is one read
and one write, its moments read from the device. Deviations are taken from each program's own mean
and merged, so values far from 0 keep their variance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import partials

EPSILON = tl.constexpr(1e-8)
TOTAL, COUNT, SQUARES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COLUMNS, PADDED = tl.constexpr(3), tl.constexpr(4)
BLOCK = 2048  # positions of one program


@triton.jit
def _kept(values, mask, n, BLOCK: tl.constexpr):
    """Positions [BLOCK], which of them count, and their values. values [n], mask [n] bool."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(mask + i, mask=i < n, other=0) != 0
    return i, kept, tl.where(kept, tl.load(values + i, mask=i < n, other=0.0), 0.0)


@triton.jit
def masked_sums_kernel(values, mask, sums, n, BLOCK: tl.constexpr):
    """values [n]; mask [n] bool; sums [COLUMNS, programs], written."""
    _, kept, x = _kept(values, mask, n, BLOCK)
    total, count = tl.sum(x), tl.sum(kept.to(x.dtype))
    partials.put(sums, TOTAL, total)
    partials.put(sums, COUNT, count)
    partials.put(sums, SQUARES, partials.squares(x, kept, total, count))


@triton.jit
def masked_finish_kernel(sums, programs, mean_out, moments_out):
    """sums [COLUMNS, programs]; written: mean_out [], or, where that is None, moments_out [3]."""
    total = partials.totals(sums, programs, COLUMNS, PADDED)
    count = partials.picked(total, COUNT, PADDED)
    mean = partials.picked(total, TOTAL, PADDED) / tl.maximum(count, 1.0)
    if mean_out is not None:
        tl.store(mean_out, mean)
    else:
        deviation = partials.all_squares(sums, programs, COUNT, TOTAL, SQUARES, mean)
        tl.store(moments_out, count)
        tl.store(moments_out + 1, mean)
        tl.store(moments_out + 2, deviation)


@triton.jit
def masked_normalize_kernel(
    values, mask, moments, out, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """values [n]; mask [n] bool; moments [3]: count, mean, squared deviations; out [n], written."""
    i, kept, x = _kept(values, mask, n, BLOCK)
    mean = tl.load(moments + 1)
    variance = tl.load(moments + 2) / tl.maximum(tl.load(moments) - 1.0, 1.0)
    y = (x - mean) / tl.sqrt(variance + EPSILON)
    if not SHIFT:
        y += mean
    tl.store(out + i, tl.where(kept, y, 0.0), mask=i < n)


def _launch_sums(values: Tensor, mask: Tensor) -> Tensor:
    n = values.numel()
    programs = triton.cdiv(n, BLOCK)
    sums = values.new_empty((COLUMNS.value, programs))
    masked_sums_kernel[(programs,)](values, mask, sums, n, BLOCK=BLOCK)
    return sums


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """0-dim."""
    if values.numel() == 0:
        return values.new_zeros(())
    out = values.new_empty(())
    with torch.cuda.device_of(values):
        sums = _launch_sums(values, mask)
        masked_finish_kernel[(1,)](sums, sums.shape[1], out, None)
    return out


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """[3]: count, mean, sum of squared deviations from the mean."""
    if values.numel() == 0:
        return values.new_zeros(3)
    out = values.new_empty(3)
    with torch.cuda.device_of(values):
        sums = _launch_sums(values, mask)
        masked_finish_kernel[(1,)](sums, sums.shape[1], None, out)
    return out


def masked_normalize(values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    """values' shape; 0 where masked."""
    out, n = torch.empty_like(values), values.numel()
    if n:
        with torch.cuda.device_of(values):
            masked_normalize_kernel[(triton.cdiv(n, BLOCK),)](
                values, mask, moments, out, n, SHIFT=shift_mean, BLOCK=BLOCK
            )
    return out
