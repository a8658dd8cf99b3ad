"""support_logits and its gradients on the GPU: a program for a row's tokens, or for a token's rows.

Of the head it reads the rows of the tokens that are there, once forward and once for the gradient
of hidden: NKH elements each time, 2NKH bytes in bfloat16. The gradient of the weight is made token
by token: its entries, sorted, lie side by side, and the program of the first of them
adds them up, so nothing is added atomically and the same bits come every time. Not measured on a
GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def support_logits_kernel(
    hidden, weight, bias, ids, out, K, H, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """hidden [N, H], weight [V, H], bias [V] or None, ids [N, K]; out [N, K], written.

    A program has TOKENS tokens of one row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    id = tl.load(ids + row * K + k, mask=k < K, other=-1)
    there = id >= 0
    total = tl.zeros((TOKENS,), dtype=out.dtype.element_ty)
    for start in range(0, H, BLOCK):
        h = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + row * H + h, mask=h < H, other=0.0).to(total.dtype)
        inside = there[:, None] & (h < H)[None, :]
        w = tl.load(weight + id[:, None] * H + h[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.where(inside, w.to(total.dtype) * x[None, :], 0.0), axis=1)
    if bias is not None:
        total += tl.load(bias + id, mask=there, other=0.0).to(total.dtype)
    tl.store(out + row * K + k, tl.where(there, total, float("-inf")), mask=k < K)


@triton.jit
def support_hidden_kernel(
    grad, weight, ids, d_hidden, K, H, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """grad, ids [N, K], weight [V, H]; d_hidden [N, H], written.

    A program has BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=grad.dtype.element_ty)
    for start in range(0, K, TOKENS):
        k = start + tl.arange(0, TOKENS)
        id = tl.load(ids + row * K + k, mask=k < K, other=-1)
        g = tl.load(grad + row * K + k, mask=k < K, other=0.0)
        matters = (id >= 0) & (g != 0)
        inside = matters[:, None] & (h < H)[None, :]
        w = tl.load(weight + id[:, None] * H + h[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.where(inside, g[:, None] * w.to(total.dtype), 0.0), axis=0)
    tl.store(d_hidden + row * H + h, total.to(d_hidden.dtype.element_ty), mask=h < H)


@triton.jit
def support_tokens_kernel(
    grad, hidden, tokens, order, rows, d_weight, d_bias, H, n, BLOCK: tl.constexpr
):
    """grad [N, K], hidden [N, H]; tokens, order, rows [n]: the entries of ids, sorted, where in
    [N, K] each stood, and in which row. Written: of d_weight [V, H] and d_bias [V], either of which may be None, the
    rows of tokens that are there.

    A program has an entry and BLOCK columns, and something to do if its token has none before."""
    first = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + first)
    before = tl.load(tokens + first - 1, mask=first > 0, other=-1)
    if (token >= 0) & (token != before):
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=grad.dtype.element_ty)
        of_bias = tl.zeros((), dtype=grad.dtype.element_ty)
        entry = first
        same = token
        while same == token:
            g = tl.load(grad + tl.load(order + entry))
            if g != 0:
                x = tl.load(hidden + tl.load(rows + entry) * H + h, mask=h < H, other=0.0)
                total += g * x.to(total.dtype)
                of_bias += g
            entry += 1
            same = tl.load(tokens + entry, mask=entry < n, other=-1)
        if d_weight is not None:
            tl.store(d_weight + token * H + h, total.to(d_weight.dtype.element_ty), mask=h < H)
        if d_bias is not None:
            if tl.program_id(1) == 0:
                tl.store(d_bias + token, of_bias.to(d_bias.dtype.element_ty))


TOKENS, BLOCK = 16, 128
COLUMNS = 512  # of a token's program


def support_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """[N, K] float32 (float64 for float64 inputs)."""
    rows, most = ids.shape
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = hidden.new_empty(ids.shape, dtype=wide)
    if out.numel():
        with torch.cuda.device_of(hidden):
            support_logits_kernel[(rows, triton.cdiv(most, TOKENS))](
                hidden, weight, bias, ids, out, most, hidden.shape[1], TOKENS=TOKENS, BLOCK=BLOCK
            )
    return out


def support_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Written: d_hidden, d_weight, d_bias, each unless it is None."""
    (rows, most), width = ids.shape, hidden.shape[1]
    with torch.cuda.device_of(hidden):
        if d_hidden is not None and rows:
            support_hidden_kernel[(rows, triton.cdiv(width, BLOCK))](
                grad, weight, ids, d_hidden, most, width, TOKENS=TOKENS, BLOCK=BLOCK
            )
        for x in (d_weight, d_bias):
            if x is not None:
                x.zero_()
        if (d_weight is not None or d_bias is not None) and ids.numel():
            tokens, order = ids.reshape(-1).sort(stable=True)
            columns = triton.cdiv(width, COLUMNS) if d_weight is not None else 1
            support_tokens_kernel[(ids.numel(), columns)](
                grad, hidden, tokens, order, order // most, d_weight, d_bias, width, ids.numel(),
                BLOCK=COLUMNS,
            )  # fmt: skip
