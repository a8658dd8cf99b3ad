"""The coefficient c_b of a row under the four aggregations, for the loss kernels.

The global count has to be known before any gradient can be written, so a first small launch counts
each row's mask (1 byte a token, where the loss itself moves 17) and every program of the loss adds
up the B counts for itself; they are a few cache lines. Where the coefficient does not depend on
counts (a given normalizer, token-sum) there is no such launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_counts_kernel(mask, counts, T, BLOCK: tl.constexpr):
    """mask [B, T] bool; counts [B] int32, written."""
    row = tl.program_id(0)
    base = row.to(tl.int64) * T
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, T, BLOCK):
        kept = tl.load(mask + base + start + lanes, mask=start + lanes < T, other=0)
        total += (kept != 0).to(tl.int32)
    tl.store(counts + row, tl.sum(total))


def row_counts(mask: Tensor, aggregation: str, normalizer: Tensor | None) -> Tensor | None:
    """Counting tokens of each row, int32 [B]; None where the coefficient needs none."""
    given = normalizer is not None or aggregation == "token-sum"
    if given and aggregation != "seq-mean-token-mean":
        return None
    rows, steps = mask.shape
    counts = torch.empty(rows, dtype=torch.int32, device=mask.device)
    row_counts_kernel[(rows,)](mask, counts, steps, BLOCK=min(triton.next_power_of_2(steps), 2048))
    return counts


@triton.jit
def coefficient(counts, rows, row, normalizer, AGGREGATION: tl.constexpr, dtype: tl.constexpr):
    """c_b of one row; 0 where its divisor is 0. counts [B] int32 or None, normalizer [] or None."""
    LANES: tl.constexpr = 256
    if normalizer is not None:
        divisor = tl.load(normalizer).to(dtype)
    elif AGGREGATION == "token-sum":
        divisor = tl.full((), 1.0, dtype)
    else:
        total = tl.zeros((LANES,), tl.int64)
        for start in range(0, rows, LANES):
            i = start + tl.arange(0, LANES)
            count = tl.load(counts + i, mask=i < rows, other=0)
            if AGGREGATION == "token-mean":
                total += count
            else:
                total += (count > 0).to(tl.int64)
        divisor = tl.sum(total).to(dtype)
    if AGGREGATION == "seq-mean-token-mean":
        divisor = divisor * tl.load(counts + row).to(dtype)
    return tl.where(divisor > 0, 1.0 / tl.where(divisor > 0, divisor, 1.0), 0.0)
