"""logits_kl and its gradient on the GPU: the row kernels of linear_token_kl.

Forward: one program a row, one read of each row of logits. As in token_logprobs, every lane walks
its own column of tiles with running maxima and sums of both distributions, and the lanes meet once,
at the end of the row. Backward: one program a (row, block): one read of both, one write.

A forward KL(q ‖ p) is a reverse one with the two tensors in each other's place, so the forward
kernel knows only KL(a ‖ b).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import alignment, tuning
from .exponentials import LOG2_E, log1p, tanh
from .token_logprobs import BACKWARD_CONFIGS, FLOOR, IGNORE_INDEX, SIZES, _capped, _tile


@triton.jit
def _absorb(u, r, scale, top, ref_top, total, ref_total, gap):
    """Add tiles u, r [REPEAT, LANES] to each lane's maxima and its Σ p, Σ q and
    Σ p ((u − top) − (r − ref_top)), with p = e^(u − top) and q = e^(r − ref_top)."""
    new_top = tl.maximum(top, tl.max(u, axis=0))
    new_ref_top = tl.maximum(ref_top, tl.max(r, axis=0))
    total, ref_total, gap = _lower(
        scale, top - new_top, ref_top - new_ref_top, total, ref_total, gap
    )
    d = u - new_top[None, :]
    e = r - new_ref_top[None, :]
    p = tl.exp2(d * scale)
    gap += tl.sum(tl.where(p > 0, p * (d - e), 0.0), axis=0)  # where p is 0, q does not matter
    return (
        new_top,
        new_ref_top,
        total + tl.sum(p, axis=0),
        ref_total + tl.sum(tl.exp2(e * scale), axis=0),
        gap,
    )


@triton.jit
def _lower(scale, down, ref_down, total, ref_total, gap):
    """The sums as they are for maxima that are higher by −down and −ref_down."""
    down = tl.maximum(down, FLOOR)
    ref_down = tl.maximum(ref_down, FLOOR)
    shrink = tl.exp2(down * scale)
    # what was infinite with p > 0 is nothing once p has become 0
    gap = tl.where(shrink > 0, shrink * (gap + total * (down - ref_down)), 0.0)
    return shrink * total, tl.exp2(ref_down * scale) * ref_total, gap


@triton.jit
def _log(total):
    """log of a sum that has e^0 among its terms, or of 0 where all logits are −inf; near 1 only
    log1p keeps the digits."""
    beyond = tl.minimum(tl.maximum(total - 1.0, 0.0), 1.0)
    return tl.where((total > 0.0) & (total < 2.0), log1p(beyond), tl.log(total))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["logits", "ref_logits"])
def logits_kl_kernel(
    logits, ref_logits, labels, per_token, logp, ref_logp, kl, norm, ref_norm, V,
    stride, ref_stride, temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = logp.dtype.element_ty
    TILE: tl.constexpr = REPEAT * LANES
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    logits += row * stride
    ref_logits += row * ref_stride
    label = tl.load(labels + row)
    if label == IGNORE_INDEX:
        zero = tl.full((), 0.0, dtype)
        tl.store(logp + row, zero)
        tl.store(ref_logp + row, zero)
        tl.store(kl + row, zero)
        tl.store(norm + row, zero)
        tl.store(norm + rows + row, zero)
        tl.store(ref_norm + row, zero)
        tl.store(ref_norm + rows + row, zero)
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
    ref_top = tl.full((LANES,), LOWEST, dtype)
    total = tl.zeros((LANES,), dtype)
    ref_total = tl.zeros((LANES,), dtype)
    gap = tl.zeros((LANES,), dtype)
    columns = tl.arange(0, REPEAT)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    base, first = alignment.boundary(logits, VECTOR)
    ref_base, _ = alignment.boundary(ref_logits, VECTOR)
    end = first + V
    last = (end - 1) // TILE * TILE
    for start in range(0, end, tl.maximum(last, TILE)):  # tile 0 and the last: the row's ends
        at = start + columns
        inside = (at >= first) & (at < end)
        touched = alignment.touched(at, end, VECTOR)
        u = _capped(tl.load(base + at, mask=touched, other=0.0).to(dtype), cap)
        r = _capped(tl.load(ref_base + at, mask=touched, other=0.0).to(dtype), cap)
        u, r = tl.where(inside, u, float("-inf")), tl.where(inside, r, float("-inf"))
        top, ref_top, total, ref_total, gap = _absorb(
            u, r, scale, top, ref_top, total, ref_total, gap
        )
    for start in range(TILE, last, TILE):
        u = _capped(tl.load(base + start + columns).to(dtype), cap)
        r = _capped(tl.load(ref_base + start + columns).to(dtype), cap)
        top, ref_top, total, ref_total, gap = _absorb(
            u, r, scale, top, ref_top, total, ref_total, gap
        )

    row_top = tl.max(top, axis=0)
    row_ref_top = tl.max(ref_top, axis=0)
    total, ref_total, gap = _lower(
        scale, top - row_top, ref_top - row_ref_top, total, ref_total, gap
    )
    row_total = tl.sum(total, axis=0)
    log_total = _log(row_total)
    ref_log_total = _log(tl.sum(ref_total, axis=0))
    known = (label >= 0) & (label < V)  # another label is an error that only NaN can report here
    chosen = tl.load(logits + label, mask=known, other=float("nan")).to(dtype)
    ref_chosen = tl.load(ref_logits + label, mask=known, other=float("nan")).to(dtype)
    tl.store(logp + row, (_capped(chosen, cap) - row_top) * inverse - log_total)
    tl.store(ref_logp + row, (_capped(ref_chosen, cap) - row_ref_top) * inverse - ref_log_total)
    tl.store(kl + row, tl.sum(gap, axis=0) / row_total * inverse - (log_total - ref_log_total))
    tl.store(norm + row, row_top * inverse)
    tl.store(norm + rows + row, log_total)
    tl.store(ref_norm + row, row_ref_top * inverse)
    tl.store(ref_norm + rows + row, ref_log_total)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["logits", "ref_logits", "out"])
def logits_kl_backward_kernel(
    grad_logp, grad_kl, logits, ref_logits, labels, norm, ref_norm, kl, per_token, out, rows, V,
    stride, ref_stride, out_stride, temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, REVERSE: tl.constexpr, VECTOR: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = norm.dtype.element_ty
    BLOCK: tl.constexpr = BYTES * 8 // out.dtype.element_ty.primitive_bitwidth
    blocks = tl.num_programs(0) // rows
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    target, first = alignment.boundary(out + row * out_stride, VECTOR)
    end = first + V
    label = tl.load(labels + row)
    g = tl.load(grad_logp + row)
    g_kl = tl.load(grad_kl + row)
    matters = (g != 0) | (g_kl != 0)
    if (label == IGNORE_INDEX) | (matters == 0):
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        alignment.store(target, start, first, end, zeros)
        return

    if per_token is None:
        inverse = 1.0 / tl.full((), temperature, dtype)
    else:
        inverse = 1.0 / tl.load(per_token + row)
    at = start + tl.arange(0, BLOCK)
    touched = alignment.touched(at, end, VECTOR)
    base, _ = alignment.boundary(logits + row * stride, VECTOR)
    ref_base, _ = alignment.boundary(ref_logits + row * ref_stride, VECTOR)
    x = tl.load(base + at, mask=touched, other=0.0).to(dtype)
    y = tl.load(ref_base + at, mask=touched, other=0.0).to(dtype)
    if SOFTCAP:
        cap = tl.full((), softcap, dtype)
        t = tanh(x / cap)
        x = cap * t
        y = _capped(y, cap)
        slope = (1.0 - t * t) * inverse
    else:
        slope = inverse
    log_p = (x * inverse - tl.load(norm + row)) - tl.load(norm + rows + row)
    log_q = (y * inverse - tl.load(ref_norm + row)) - tl.load(ref_norm + rows + row)
    p = tl.exp2(log_p * LOG2_E)
    if REVERSE:
        d_kl = tl.where(p > 0, p * ((log_p - log_q) - tl.load(kl + row)), 0.0)
    else:
        d_kl = p - tl.exp2(log_q * LOG2_E)
    gradient = tl.where(at - first == label, g, 0.0) - p * g
    gradient += tl.where(g_kl != 0, g_kl * d_kl, 0.0)  # an infinite KL that nobody uses: 0 * inf
    alignment.store(target, start, first, end, (gradient * slope).to(out.dtype.element_ty))


def logits_kl(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, ref_logp, kl [1, n], norm, ref_norm [2, 1, n]); all 0 in an ignored row."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, ref_logp, kl = (
        torch.empty(labels.shape, dtype=wide, device=logits.device) for _ in range(3)
    )
    norm, ref_norm = (logp.new_empty((2, *labels.shape)) for _ in range(2))
    if labels.numel() == 0:
        return logp, ref_logp, kl, norm, ref_norm
    own, reference = (logits, logp, norm), (ref_logits, ref_logp, ref_norm)
    (a, a_logp, a_norm), (b, b_logp, b_norm) = (own, reference) if reverse else (reference, own)
    repeat, lanes, warps = _tile(logits.shape[2], logits.element_size())
    with torch.cuda.device_of(logits):
        logits_kl_kernel[(labels.numel(),)](
            a, b, labels.contiguous(), None if per_token is None else per_token.contiguous(),
            a_logp, b_logp, kl, a_norm, b_norm, a.shape[2], a.stride(1), b.stride(1),
            temperature, 0.0 if softcap is None else softcap,
            SOFTCAP=softcap is not None, REPEAT=repeat, LANES=lanes,
            VECTOR=alignment.vector(a, b), num_warps=warps,
        )  # fmt: skip
    return logp, ref_logp, kl, norm, ref_norm


def logits_kl_backward(
    grad_logp: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    ref_norm: Tensor,
    kl: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    reverse: bool,
    out: Tensor,
) -> None:
    """Write dlogits to out, which may be logits itself or, in a dtype of its own, must not overlap
    it. A value is rounded once, to that dtype."""
    if logits.numel() == 0:
        return
    small = (grad_logp, grad_kl, labels, norm, ref_norm, kl, per_token)
    grad_logp, grad_kl, labels, norm, ref_norm, kl, per_token = (
        None if x is None else x.contiguous() for x in small
    )

    def trial() -> Callable[[triton.Config], None]:
        x, target, y, ones, zeros = tuning.scratch(logits, out, norm.dtype)
        return lambda config: _backward(
            config, ones, ones, x, x, y, zeros, zeros, ones, temperature, None, softcap, reverse,
            target,
        )  # fmt: skip

    with torch.cuda.device_of(logits):
        kind = (logits.device, logits.dtype, out.dtype, logits.shape[2], softcap is None, reverse)
        config = tuning.fastest(BACKWARD_CONFIGS, ("logits_kl", *kind), logits.device, trial)
        _backward(
            config, grad_logp, grad_kl, logits, ref_logits, labels, norm, ref_norm, kl, temperature,
            per_token, softcap, reverse, out,
        )  # fmt: skip


def _backward(
    config: triton.Config,
    grad_logp: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    ref_norm: Tensor,
    kl: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    reverse: bool,
    out: Tensor,
) -> None:
    rows, vocab = labels.numel(), logits.shape[2]
    vector = alignment.vector(logits, ref_logits, out)
    block = config.kwargs["BYTES"] // out.element_size()
    logits_kl_backward_kernel[(rows * triton.cdiv(vocab + vector - 1, block),)](
        grad_logp, grad_kl, logits, ref_logits, labels, norm, ref_norm, kl, per_token, out, rows,
        vocab, logits.stride(1), ref_logits.stride(1), out.stride(1), temperature,
        0.0 if softcap is None else softcap, SOFTCAP=softcap is not None, REVERSE=reverse,
        VECTOR=vector, **config.all_kwargs(),
    )  # fmt: skip
