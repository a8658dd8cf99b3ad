"""token_logprobs and its gradient on the GPU.

Forward: one program a row, one read of the row (N·V elements) and nothing else of that size.
Each program walks the row in tiles of [REPEAT, LANES]; every lane keeps its own running maximum,
sum and sum of p·u, and the lanes meet once, at the end of the row: no shuffle and no barrier inside
the loop, and 1 + 1/REPEAT exponentials an element. (A whole-block maximum would put a barrier into
each tile; one rescaling an element would need two exponentials, which at 16 a clock a
multiprocessor is more than bf16 logits leave time for.)

Backward: one program a (row, block): one read, one write, no reduction: ``norm``, the row's
(max z, log Σ e^(z − max)), says all about the row. A row whose incoming gradients are zero writes
zeros without reading; neither does the forward read a row that is ignored.

The maximum is subtracted before anything is rounded, so a common offset of the logits costs no
digits. A row's offset is 64-bit: N·V may pass 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponentials import LOG2_E, log1p, tanh

IGNORE_INDEX = tl.constexpr(-100)
FLOOR = tl.constexpr(-1e30)  # stands for −inf where 0 · −inf would be NaN


@triton.jit
def _capped(x, softcap):
    return x if softcap is None else softcap * tanh(x / softcap)


@triton.jit
def _absorb(u, scale, top, total, tilt, ENTROPY: tl.constexpr):
    """Add a tile u [REPEAT, LANES] to each lane's (max u, Σ p, Σ p (u − max)), p = e^(u − max)."""
    new_top = tl.maximum(top, tl.max(u, axis=0))
    down = tl.maximum(top - new_top, FLOOR)
    shrink = tl.exp2(down * scale)
    d = u - new_top[None, :]
    if ENTROPY:
        d = tl.maximum(d, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(d * scale)
    if ENTROPY:
        tilt = shrink * (tilt + total * down) + tl.sum(p * d, axis=0)
    total = shrink * total + tl.sum(p, axis=0)
    return new_top, total, tilt


@triton.jit(do_not_specialize=["T"])
def token_logprobs_kernel(
    logits, labels, per_token, logp, entropy, norm, T, V, stride_b, stride_t,
    temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = logp.dtype.element_ty
    TILE: tl.constexpr = REPEAT * LANES
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    base = logits + (row // T) * stride_b + (row % T) * stride_t
    label = tl.load(labels + row)
    if label == IGNORE_INDEX:
        zero = tl.full((), 0.0, dtype)
        tl.store(logp + row, zero)
        tl.store(norm + row, zero)
        tl.store(norm + rows + row, zero)
        if ENTROPY:
            tl.store(entropy + row, zero)
        return

    if per_token is None:
        inverse = 1.0 / tl.full((), temperature, dtype)
    else:
        inverse = 1.0 / tl.load(per_token + row)
    cap = tl.full((), softcap, dtype) if SOFTCAP else None
    scale = inverse * LOG2_E
    # the lowest finite number: −inf − top is then −inf, never NaN
    LOWEST: tl.constexpr = (
        -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    )
    top = tl.full((LANES,), LOWEST, dtype)
    total = tl.zeros((LANES,), dtype)
    tilt = tl.zeros((LANES,), dtype)
    columns = tl.arange(0, REPEAT)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = V // TILE * TILE
    for start in range(0, whole, TILE):
        u = _capped(tl.load(base + start + columns).to(dtype), cap)
        top, total, tilt = _absorb(u, scale, top, total, tilt, ENTROPY)
    if whole < V:
        inside = whole + columns < V
        u = tl.load(base + whole + columns, mask=inside, other=0.0).to(dtype)
        u = tl.where(inside, _capped(u, cap), float("-inf"))
        top, total, tilt = _absorb(u, scale, top, total, tilt, ENTROPY)

    row_top = tl.max(top, axis=0)
    down = tl.maximum(top - row_top, FLOOR)
    shrink = tl.exp2(down * scale)
    row_total = tl.sum(shrink * total, axis=0)
    # row_total >= 1: the maximum itself is in it. Near 1 only log1p keeps the digits of log p.
    beyond = tl.minimum(tl.maximum(row_total - 1.0, 0.0), 1.0)
    log_total = tl.where(row_total < 2.0, log1p(beyond), tl.log(row_total))
    known = (label >= 0) & (label < V)  # another label is an error that only NaN can report here
    chosen = tl.load(base + label, mask=known, other=float("nan")).to(dtype)
    tl.store(logp + row, (_capped(chosen, cap) - row_top) * inverse - log_total)
    tl.store(norm + row, row_top * inverse)
    tl.store(norm + rows + row, log_total)
    if ENTROPY:
        row_tilt = tl.sum(shrink * (tilt + total * down), axis=0)
        tl.store(entropy + row, log_total - row_tilt / row_total * inverse)


@triton.jit(do_not_specialize=["rows", "T"])
def token_logprobs_backward_kernel(
    grad_logp, grad_entropy, logits, labels, norm, entropy, per_token, out, rows, T, V,
    stride_b, stride_t, out_stride_b, out_stride_t, temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = norm.dtype.element_ty
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    target = out + (row // T) * out_stride_b + (row % T) * out_stride_t + columns
    label = tl.load(labels + row)
    g = tl.load(grad_logp + row)
    matters = g != 0
    if grad_entropy is not None:
        g_entropy = tl.load(grad_entropy + row)
        matters = matters | (g_entropy != 0)
    if (label == IGNORE_INDEX) | (matters == 0):
        tl.store(target, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)
        return

    if per_token is None:
        inverse = 1.0 / tl.full((), temperature, dtype)
    else:
        inverse = 1.0 / tl.load(per_token + row)
    x = tl.load(
        logits + (row // T) * stride_b + (row % T) * stride_t + columns, mask=inside, other=0.0
    ).to(dtype)
    if SOFTCAP:
        cap = tl.full((), softcap, dtype)
        t = tanh(x / cap)
        z = cap * t * inverse
        slope = (1.0 - t * t) * inverse
    else:
        z = x * inverse
        slope = inverse
    log_p = (z - tl.load(norm + row)) - tl.load(norm + rows + row)
    pull = g
    if grad_entropy is not None:
        log_p = tl.maximum(log_p, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        pull = g + g_entropy * (log_p + tl.load(entropy + row))
    gradient = tl.where(columns == label, g, 0.0) - tl.exp2(log_p * LOG2_E) * pull
    tl.store(target, (gradient * slope).to(out.dtype.element_ty), mask=inside)


def _tile(vocab: int, element_size: int) -> tuple[int, int, int]:
    """(REPEAT, LANES, num_warps) of the forward: a thread reads 16 bytes at a time, 4 times a tile.

    256 threads × 4 × 16 bytes are 16 KiB in flight a program and two or more programs fit a
    multiprocessor; 3.35 TB/s × 0.7 µs / 132 asks for 18 KiB. Not measured on a GPU yet.
    """
    vector = 16 // element_size
    lanes = min(triton.next_power_of_2(vocab), 256 * vector)
    return (4 if vocab > lanes else 1), lanes, max(1, lanes // (32 * vector))


def _block(vocab: int, element_size: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of the backward: one 16-byte read and write a thread, 256 threads.

    Eight such programs fill a multiprocessor and keep 32 KiB in flight. With two reads a thread,
    float16 rows that are not 16-byte aligned spill. Not measured on a GPU yet.
    """
    block = min(triton.next_power_of_2(vocab), 4096 // element_size)
    return block, max(1, block * element_size // 512)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [B, T], entropy [B, T] or empty, norm [2, B, T]); all 0 in an ignored row."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp = torch.empty(labels.shape, dtype=wide, device=logits.device)
    norm = logp.new_empty((2, *labels.shape))
    H = torch.empty_like(logp) if entropy else logp.new_empty(0)
    if logp.numel() == 0:
        return logp, H, norm
    repeat, lanes, warps = _tile(logits.shape[2], logits.element_size())
    with torch.cuda.device_of(logits):
        token_logprobs_kernel[(logp.numel(),)](
            logits, labels.contiguous(), None if per_token is None else per_token.contiguous(),
            logp, H, norm, logits.shape[1], logits.shape[2], logits.stride(0), logits.stride(1),
            temperature, 0.0 if softcap is None else softcap,
            SOFTCAP=softcap is not None, ENTROPY=entropy, REPEAT=repeat, LANES=lanes,
            num_warps=warps,
        )  # fmt: skip
    return logp, H, norm


def token_logprobs_backward(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    entropy: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Write dlogits to out, which may be logits itself."""
    if logits.numel() == 0:
        return
    vocab = logits.shape[2]
    block, warps = _block(vocab, logits.element_size())
    small = (grad_logp, grad_entropy, labels, norm, entropy, per_token)
    grad_logp, grad_entropy, labels, norm, entropy, per_token = (
        None if x is None else x.contiguous() for x in small
    )
    with torch.cuda.device_of(logits):
        token_logprobs_backward_kernel[(labels.numel() * triton.cdiv(vocab, block),)](
            grad_logp, grad_entropy, logits, labels, norm, entropy, per_token, out,
            labels.numel(), logits.shape[1], vocab, logits.stride(0), logits.stride(1),
            out.stride(0), out.stride(1), temperature, 0.0 if softcap is None else softcap,
            SOFTCAP=softcap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
