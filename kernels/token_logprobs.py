"""token_logprobs and its gradient on the GPU.

Forward: one program a row, one read of the row (N·V elements) and nothing else of that size, 16
bytes at a time wherever the row starts (kernels/alignment.py).
Each program walks the row in tiles of [REPEAT, LANES]; every lane keeps its own running maximum,
sum and sum of p·u, and the lanes meet once, at the end of the row: no shuffle and no barrier inside
the loop, and 1 + 1/REPEAT exponentials an element. (A whole-block maximum would put a barrier into
each tile; one rescaling an element would need two exponentials, which at 16 a clock a
multiprocessor is more than bf16 logits leave time for.) Compiled for sm_90 the loop is 8.3
instructions a bfloat16 logit, 11 with entropy; at 3.35 TB/s a multiprocessor of 132 gets 7.2 logits
a clock and can issue 128: memory is the bound.

Of a tile of the vocabulary it may leave the exponentials, too (ops/linear/exponentials.py): a
second walk over the row, which a cache then holds.

Backward: one program a (row, block): one read, one write, no reduction: ``norm``, the row's
(max z, log Σ e^(z − max)), says all about the row. A row whose incoming gradients are zero writes
zeros without reading; neither does the forward read a row that is ignored.

Fewer than about 132 rows leave multiprocessors idle: one program reads some 23 GB/s, 13 µs for a
row of 151936 bfloat16 logits, alone or with 131 others. Rows cut into pieces would take half, at
the price of another launch, and where the number of rows decided on the cut a row's bits would
depend on its batch; training has thousands of rows. None of it is measured on a GPU yet.

The maximum is subtracted before anything is rounded, so a common offset of the logits costs no
digits. A row's offset is 64-bit: N·V may pass 2^31.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import alignment, tuning
from .exponentials import LOG2_E, log1p, tanh

IGNORE_INDEX = tl.constexpr(-100)
FLOOR = tl.constexpr(-1e30)  # stands for −inf where 0 · −inf would be NaN
FAR = tl.constexpr(16.0)  # by how many powers of 2 what a tile leaves may pass 1
# One binary for all shapes: kernels/alignment.py finds the boundaries of 16 bytes by itself.
SIZES = ["rows", "T", "V", "stride_b", "stride_t", "out_stride_b", "out_stride_t",
         "stride", "ref_stride", "out_stride", "left_stride", "before"]  # fmt: skip


@triton.jit
def _capped(x, softcap):
    return x if softcap is None else softcap * tanh(x / softcap)


@triton.jit
def _with_slope(x, softcap):
    """(capped x, its derivative)."""
    slope = tl.full(x.shape, 1.0, x.dtype)
    if softcap is not None:
        t = tanh(x / softcap)
        x = softcap * t
        slope = 1.0 - t * t
    return x, slope


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


@triton.jit
def _anchored(left, anchors, row, rows, top, before):
    """(anchor, shift) of ``leave_logprobs`` for this tile, whose largest z is top; what it has
    written of the tokens before goes there, too."""
    anchor, shift = tl.load(anchors + row), tl.load(anchors + rows + row)
    tl.debug_barrier()  # every warp has read them before one writes them
    first = (before == 0) | (anchor == float("-inf"))  # in which not all logits are −inf
    above = tl.where(first, 0.0, (top - anchor) * LOG2_E - shift)
    steps = tl.where(above > FAR, tl.floor(above), 0.0)
    if steps > 0.0:
        for start in range(0, before, 1024):
            at = start + tl.arange(0, 1024)
            e = tl.load(left + at, mask=at < before, other=0.0).to(tl.float32)
            e = (e * tl.exp2(-steps)).to(left.dtype.element_ty)
            tl.store(left + at, e, mask=at < before)
    shift = tl.where(first, 0.0, tl.where(steps > 0.0, steps - above, shift))
    anchor = tl.where(first | (steps > 0.0), top, anchor)
    tl.store(anchors + row, anchor)
    tl.store(anchors + rows + row, shift)
    return anchor, shift


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["logits", "left"])
def token_logprobs_kernel(
    logits, labels, per_token, logp, entropy, norm, left, anchors, slopes, T, V, stride_b, stride_t,
    left_stride, before, temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """logits [B, T, V] of strides (stride_b, stride_t, 1); labels [B, T] int64; per_token [B, T] or
    None. Written: logp [B, T], entropy [B, T] (empty without), norm [2, B, T]; and, unless None,
    columns of left [T, ...], from the one that ``before`` others lie before, anchors [2, T] and
    slopes [T], as in ops/linear/exponentials.py."""
    dtype: tl.constexpr = logp.dtype.element_ty
    TILE: tl.constexpr = REPEAT * LANES
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    logits += (row // T) * stride_b + (row % T) * stride_t
    label = tl.load(labels + row)
    if label == IGNORE_INDEX:
        zero = tl.full((), 0.0, dtype)
        tl.store(logp + row, zero)
        tl.store(norm + row, zero)
        tl.store(norm + rows + row, zero)
        if ENTROPY:
            tl.store(entropy + row, zero)
        if left is not None:
            target, first = alignment.boundary(left + row * left_stride + before, VECTOR)
            for start in range(0, first + V, TILE):
                zeros = tl.zeros((TILE,), left.dtype.element_ty)
                alignment.store(target, start, first, first + V, zeros)
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
    base, first = alignment.boundary(logits, VECTOR)
    end = first + V
    last = (end - 1) // TILE * TILE
    for start in range(0, end, tl.maximum(last, TILE)):  # tile 0 and the last: the row's ends
        at = start + columns
        x = tl.load(base + at, mask=alignment.touched(at, end, VECTOR), other=0.0).to(dtype)
        u = tl.where((at >= first) & (at < end), _capped(x, cap), float("-inf"))
        top, total, tilt = _absorb(u, scale, top, total, tilt, ENTROPY)
    for start in range(TILE, last, TILE):
        u = _capped(tl.load(base + start + columns).to(dtype), cap)
        top, total, tilt = _absorb(u, scale, top, total, tilt, ENTROPY)

    row_top = tl.max(top, axis=0)
    down = tl.maximum(top - row_top, FLOOR)
    shrink = tl.exp2(down * scale)
    row_total = tl.sum(shrink * total, axis=0)
    # row_total >= 1, the maximum itself being in it, or 0 where all are −inf. Near 1 only log1p
    # keeps the digits of log p.
    beyond = tl.minimum(tl.maximum(row_total - 1.0, 0.0), 1.0)
    near = (row_total > 0.0) & (row_total < 2.0)
    log_total = tl.where(near, log1p(beyond), tl.log(row_total))
    known = (label >= 0) & (label < V)  # another label is an error that only NaN can report here
    chosen = tl.load(logits + label, mask=known, other=float("nan")).to(dtype)
    tl.store(logp + row, (_capped(chosen, cap) - row_top) * inverse - log_total)
    tl.store(norm + row, row_top * inverse)
    tl.store(norm + rows + row, log_total)
    if ENTROPY:
        row_tilt = tl.sum(shrink * (tilt + total * down), axis=0)
        tl.store(entropy + row, log_total - row_tilt / row_total * inverse)
    if left is not None:
        left += row * left_stride
        z_top = tl.where(row_top == LOWEST, float("-inf"), row_top * inverse)
        anchor, shift = _anchored(left, anchors, row, rows, z_top, before)
        anchor = tl.maximum(anchor, LOWEST)
        target, _ = alignment.boundary(left + before, VECTOR)
        for start in range(0, end, TILE):
            at = start + tl.arange(0, TILE)
            x = tl.load(base + at, mask=alignment.touched(at, end, VECTOR), other=0.0).to(dtype)
            u, slope = _with_slope(x, cap)
            e = tl.exp2((u * inverse - anchor) * LOG2_E - shift)
            e = tl.where(at - first == label, 0.0, -e * slope * inverse)
            alignment.store(target, start, first, end, e.to(left.dtype.element_ty))
        _, of_label = _with_slope(chosen, cap)
        tl.store(slopes + row, of_label * inverse, mask=known)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["logits", "out"])
def token_logprobs_backward_kernel(
    grad_logp, grad_entropy, logits, labels, norm, entropy, per_token, out, rows, T, V,
    stride_b, stride_t, out_stride_b, out_stride_t, temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, VECTOR: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """grad_logp [B, T]; grad_entropy, entropy, per_token [B, T] or None; labels [B, T] int64; norm
    [2, B, T]; logits [B, T, V] of strides (stride_b, stride_t, 1). Written: out [B, T, V] of
    strides (out_stride_b, out_stride_t, 1)."""
    dtype: tl.constexpr = norm.dtype.element_ty
    BLOCK: tl.constexpr = BYTES * 8 // out.dtype.element_ty.primitive_bitwidth
    blocks = tl.num_programs(0) // rows
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    target = out + (row // T) * out_stride_b + (row % T) * out_stride_t
    target, first = alignment.boundary(target, VECTOR)
    end = first + V
    label = tl.load(labels + row)
    g = tl.load(grad_logp + row)
    matters = g != 0
    if grad_entropy is not None:
        g_entropy = tl.load(grad_entropy + row)
        matters = matters | (g_entropy != 0)
    if (label == IGNORE_INDEX) | (matters == 0):
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        alignment.store(target, start, first, end, zeros)
        return

    if per_token is None:
        inverse = 1.0 / tl.full((), temperature, dtype)
    else:
        inverse = 1.0 / tl.load(per_token + row)
    at = start + tl.arange(0, BLOCK)
    base, _ = alignment.boundary(logits + (row // T) * stride_b + (row % T) * stride_t, VECTOR)
    x = tl.load(base + at, mask=alignment.touched(at, end, VECTOR), other=0.0).to(dtype)
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
    gradient = tl.where(at - first == label, g, 0.0) - tl.exp2(log_p * LOG2_E) * pull
    alignment.store(target, start, first, end, (gradient * slope).to(out.dtype.element_ty))


def _tile(vocab: int, element_size: int) -> tuple[int, int, int]:
    """(REPEAT, LANES, num_warps) of the forward: a thread reads 16 bytes at a time, 4 times a tile.

    256 threads × 4 × 16 bytes are 16 KiB in flight a program and two or more programs fit a
    multiprocessor; 3.35 TB/s × 0.7 µs / 132 asks for 18 KiB. Not measured on a GPU yet.
    """
    vector = 16 // element_size
    lanes = min(max(triton.next_power_of_2(vocab), 32 * vector), 256 * vector)
    return (4 if vocab > lanes else 1), lanes, lanes // (32 * vector)


# Of the backward: bytes a program writes, 32, 32, 64 or 16 a thread. The first runs where nothing
# can be timed. Compiled for sm_90 the whole program has, of bfloat16 logits, 34, 34, 28 and 46
# instructions a logit (what begins a program is shared by few), in 48, 48, 95 and 32 registers.
BACKWARD_CONFIGS = [
    triton.Config({"BYTES": size}, num_warps=warps)
    for size, warps in ((8192, 8), (4096, 4), (8192, 4), (4096, 8))
]


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    inplace_backward: bool,
    left: Tensor | None = None,
    anchors: Tensor | None = None,
    slopes: Tensor | None = None,
    before: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [B, T], entropy [B, T] or empty, norm [2, B, T]); all 0 in an ignored row. The other
    arguments are those of ``leave_logprobs``."""
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
            logp, H, norm, left, anchors, slopes, logits.shape[1], logits.shape[2],
            logits.stride(0), logits.stride(1), 0 if left is None else left.stride(0), before,
            temperature, 0.0 if softcap is None else softcap,
            SOFTCAP=softcap is not None, ENTROPY=entropy, REPEAT=repeat, LANES=lanes,
            VECTOR=alignment.vector(logits, *(() if left is None else (left[None, :, before:],))),
            num_warps=warps,
        )  # fmt: skip
    return logp, H, norm


def leave_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    before: int,
    left: Tensor,
    anchors: Tensor,
    slopes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``token_logprobs`` of logits [1, n, size], a tile of the vocabulary that ``before`` tokens
    lie before, and what ``ops.linear.exponentials`` says of the others."""
    return token_logprobs(
        logits, labels, temperature, per_token, softcap, entropy, False, left, anchors, slopes,
        before,
    )  # fmt: skip


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
    """Write dlogits to out, which may be logits itself or, in a dtype of its own, must not overlap
    it. A value is rounded once, to that dtype."""
    if logits.numel() == 0:
        return
    small = (grad_logp, grad_entropy, labels, norm, entropy, per_token)
    grad_logp, grad_entropy, labels, norm, entropy, per_token = (
        None if x is None else x.contiguous() for x in small
    )

    def trial() -> Callable[[triton.Config], None]:
        x, target, y, ones, zeros = tuning.scratch(logits, out, norm.dtype)
        return lambda config: _backward(
            config, ones, ones, x, y, zeros, ones, temperature, None, softcap, target
        )

    with torch.cuda.device_of(logits):
        kind = (logits.device, logits.dtype, out.dtype, logits.shape[2], softcap is None)
        config = tuning.fastest(BACKWARD_CONFIGS, ("token_logprobs", *kind), logits.device, trial)
        _backward(
            config, grad_logp, grad_entropy, logits, labels, norm, entropy, temperature, per_token,
            softcap, out,
        )  # fmt: skip


def _backward(
    config: triton.Config,
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
    rows, vocab = labels.numel(), logits.shape[2]
    vector = alignment.vector(logits, out)
    block = config.kwargs["BYTES"] // out.element_size()
    token_logprobs_backward_kernel[(rows * triton.cdiv(vocab + vector - 1, block),)](
        grad_logp, grad_entropy, logits, labels, norm, entropy, per_token, out, rows,
        logits.shape[1], vocab, logits.stride(0), logits.stride(1), out.stride(0), out.stride(1),
        temperature, 0.0 if softcap is None else softcap,
        SOFTCAP=softcap is not None, VECTOR=vector, **config.all_kwargs(),
    )  # fmt: skip
