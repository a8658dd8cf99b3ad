"""Sums over many programs without atomics: each stores its own, a last small launch adds them.

The order is fixed, so results repeat bit for bit. ``partials`` is [COLUMNS, programs]: one column
for each sum. Second moments merge by each program's own mean (Chan et al. 1979), so a variance
keeps its digits however far the mean is from 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

PROGRAMS_AT_ONCE = tl.constexpr(256)


@triton.jit
def put(partials, column, value):
    """Store this program's share of a sum."""
    tl.store(partials + column * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def squares(x, kept, total, count):
    """Σ (x − own mean)² of one program's kept values, from its Σ x and count. The second term is
    what the rounding of the mean has added to the first."""
    n = tl.maximum(count, 1.0)
    d = tl.where(kept, x - total / n, 0.0)
    off = tl.sum(d)
    return tl.maximum(tl.sum(d * d) - off * (off / n), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def totals(partials, programs, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """The sum of every column, [PADDED]; PADDED is the power of two from COLUMNS up."""
    column = tl.arange(0, PADDED)[:, None]
    lanes = tl.arange(0, PROGRAMS_AT_ONCE)[None, :]
    sums = tl.zeros((PADDED, PROGRAMS_AT_ONCE), partials.dtype.element_ty)
    for start in range(0, programs, PROGRAMS_AT_ONCE):
        i = start + lanes
        inside = (column < COLUMNS) & (i < programs)
        sums += tl.load(partials + column * programs + i, mask=inside, other=0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def picked(sums, column, PADDED: tl.constexpr):
    """One entry of totals()."""
    return tl.sum(tl.where(tl.arange(0, PADDED) == column, sums, 0.0))


@triton.jit
def all_squares(partials, programs, count_column, sum_column, squares_column, mean):
    """Σ (x − mean)² over all programs, mean being the mean over all programs."""
    lanes = tl.arange(0, PROGRAMS_AT_ONCE)
    sums = tl.zeros((PROGRAMS_AT_ONCE,), partials.dtype.element_ty)
    for start in range(0, programs, PROGRAMS_AT_ONCE):
        i = start + lanes
        inside = i < programs
        count = tl.load(partials + count_column * programs + i, mask=inside, other=0.0)
        total = tl.load(partials + sum_column * programs + i, mask=inside, other=0.0)
        own = tl.load(partials + squares_column * programs + i, mask=inside, other=0.0)
        shift = total / tl.maximum(count, 1.0) - mean
        sums += tl.where(count > 0, own + count * shift * shift, 0.0)
    return tl.sum(sums)


@triton.jit
def largest(partials, programs, column):
    """The maximum of one column."""
    lanes = tl.arange(0, PROGRAMS_AT_ONCE)
    top = tl.full((PROGRAMS_AT_ONCE,), float("-inf"), partials.dtype.element_ty)
    for start in range(0, programs, PROGRAMS_AT_ONCE):
        i = start + lanes
        x = tl.load(partials + column * programs + i, mask=i < programs, other=float("-inf"))
        top = tl.maximum(top, x)
    return tl.max(top)
