"""16 bytes a load for rows that start anywhere.

A GPU moves 16 bytes at once only to and from multiples of 16, and a row of 50257 bfloat16 logits
starts 2, 4, …, 14 bytes behind one. So the row kernels count their columns from the last such
boundary at or before the row's first element. What they then read before and behind the row lies in
the same 16 bytes as an element of the row: it is memory that exists, and its values are dropped.
Nothing outside the row is ever written.

A gradient may be narrower than its logits: what is 16 bytes of the one is then 32 of the other.

Compiled for sm_90, bfloat16, V = 50257: 4 loads of 16 bytes and 265 instructions for 32 logits a
thread where loads by element are 32 and 302, 76 registers where they take 110. What that is worth
in time is not measured on a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def boundary(row, VECTOR: tl.constexpr):
    """(pointer to the last multiple of VECTOR elements at or before row, elements between)."""
    if VECTOR == 1:
        return row, tl.full((), 0, tl.int32)
    size: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    skipped = (row.to(tl.int64, bitcast=True) // size % VECTOR).to(tl.int32)
    return tl.multiple_of(row - skipped, 16), skipped


@triton.jit
def touched(columns, end, VECTOR: tl.constexpr):
    """Whether the VECTOR columns that a column is among begin before column `end`: one answer for
    all of them, so that they stay one load."""
    return columns // VECTOR * VECTOR < end


@triton.jit
def store(base, start, first, end, values):
    """values to columns start, start + 1, … of [first, end): 16 bytes at a time but in the blocks
    that hold an end of the row."""
    at = start + tl.arange(0, values.shape[0])
    if (start >= first) & (start + values.shape[0] <= end):
        tl.store(base + at, values)
    else:
        tl.store(base + at, values, mask=(at >= first) & (at < end))


def vector(*tensors: Tensor) -> int:
    """Elements in 16 bytes of the narrowest dtype; 1 where the rows of some tensors [B, T, V] lie
    differently, counted in elements."""
    elements = 16 // min(x.element_size() for x in tensors)
    first, *others = (
        [x.data_ptr() // x.element_size(), *(x.stride(d) for d in (0, 1) if x.shape[d] > 1)]
        for x in tensors
    )
    apart = (a - b for other in others for a, b in zip(other, first, strict=True))
    return 1 if any(n % elements for n in apart) else elements
