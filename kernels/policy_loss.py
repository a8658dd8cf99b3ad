"""policy_loss on the GPU: the loss, all its statistics and its gradients from one read.

One program a (row, 1024 tokens): it reads each input once, writes the gradients, already multiplied
by the row's coefficient, and stores 14 partial sums; a last launch of one program adds those.
Together with the count of the mask (kernels/aggregate.py) that is three launches where eager
PyTorch makes dozens, and 17 bytes a token in float32 without the optional terms. A sequence ratio
takes one launch and one read more, for the row's mean log-ratio and the slope of its surrogates.

The sums of ratio − 1 and log-ratio keep their digits near ratio 1, where training is: nothing there
is a difference of nearly equal numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aggregate, kl, partials
from .exponentials import exp, expm1, expm1_minus_x, reduced

MAX_LOG_RATIO = tl.constexpr(20.0)
TINY = tl.constexpr(1e-8)  # rlhf_fast/ops/policy_loss.py

STATS = tl.constexpr(14)  # columns 0 to 13 are the statistics in their public order
RATIO, SQUARES, MAXIMUM = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
COUNT, TOTAL = tl.constexpr(13), tl.constexpr(14)
COLUMNS, PADDED = tl.constexpr(15), tl.constexpr(16)


@triton.jit
def bounded_log_ratio(log_ratio, A, clip_low, clip_high):
    """gmpo's: on the side that the sign of A names."""
    low = tl.maximum(log_ratio, -clip_low, propagate_nan=tl.PropagateNan.ALL)
    high = tl.minimum(log_ratio, clip_high, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(A < 0, low, high)


@triton.jit
def gamma_weight(log_w, k, decay):
    """vespo's e^decay w^k e^(−decay·w)."""
    log_w = kl.clamped(log_w, -18.420680743952367, MAX_LOG_RATIO)  # log TINY
    return exp(decay + k * log_w - decay * exp(log_w))


@triton.jit
def sequence_kernel(
    logp, old_logp, advantages, mask, importance_weights, sequences, B, T,
    clip_low: tl.float64, clip_high: tl.float64, dual_clip: tl.float64, delta: tl.float64,
    k_pos: tl.float64, lambda_pos: tl.float64, k_neg: tl.float64, lambda_neg: tl.float64,
    DUAL: tl.constexpr, DELTA: tl.constexpr, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row: its mean log-ratio, and what its tokens take from it where A ≥ 0 and A < 0:
    vespo's weights; else, both times, the slope of its ppo or gmpo surrogates in each logp.

    The ratio is one number, so only the sign of A decides which tokens are cut: the slope needs
    no more than the sums of w·A over either sign.

    logp, old_logp, advantages, importance_weights (or None) [B, T]; mask [B, T] bool. Written:
    sequences [3, B].
    """
    dtype: tl.constexpr = logp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    log_ratios = tl.zeros((BLOCK,), dtype)
    good, bad, counts = log_ratios, log_ratios, log_ratios
    for start in range(0, T, BLOCK):
        i = row * T + start + lanes
        inside = start + lanes < T
        kept = tl.load(mask + i, mask=inside, other=0) != 0
        A = tl.where(kept, tl.load(advantages + i, mask=inside, other=0.0), 0.0)
        weighted = A
        if importance_weights is not None:
            w = tl.where(kept, tl.load(importance_weights + i, mask=inside, other=0.0), 0.0)
            weighted = kl.times(w, A)
        difference = tl.load(logp + i, mask=inside, other=0.0)
        difference -= tl.load(old_logp + i, mask=inside, other=0.0)
        difference = tl.where(kept, difference, 0.0)
        if LOSS == "gmpo":
            low, high = tl.full((), clip_low, dtype), tl.full((), clip_high, dtype)
            difference = bounded_log_ratio(difference, A, low, high)
        log_ratios += difference
        good += tl.where(A < 0, 0.0, weighted)
        bad += tl.where(A < 0, weighted, 0.0)
        counts += kept.to(dtype)
    n = tl.maximum(tl.sum(counts), 1.0)
    mean = tl.sum(log_ratios) / n
    ratio = exp(kl.clamped(mean, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    tl.store(sequences + row, mean)
    if LOSS == "vespo":
        log_w = tl.sum(log_ratios)
        at_good = gamma_weight(log_w, tl.full((), k_pos, dtype), tl.full((), lambda_pos, dtype))
        at_bad = gamma_weight(log_w, tl.full((), k_neg, dtype), tl.full((), lambda_neg, dtype))
    else:
        flowing = tl.sum(good) + tl.sum(bad)
        if LOSS == "ppo":
            above = ratio > tl.full((), 1 + clip_high, dtype)
            stopped = ratio < tl.full((), 1 - clip_low, dtype)
            if DUAL:
                stopped = stopped | (ratio > tl.full((), dual_clip, dtype))
            if DELTA:
                held = ratio > tl.full((), delta, dtype)
                stopped = stopped | (above & held)
                above = above | held
            flowing = tl.where(above, 0.0, tl.sum(good)) + tl.where(stopped, 0.0, tl.sum(bad))
        at_good = tl.where(tl.abs(mean) <= MAX_LOG_RATIO, -ratio * flowing / n, 0.0)
        at_bad = at_good
    tl.store(sequences + B + row, at_good)
    tl.store(sequences + 2 * B + row, at_bad)


@triton.jit
def policy_loss_kernel(
    logp, old_logp, advantages, mask, importance_weights, entropy, ref_logp, normalizer, counts,
    sequences, d_logp, d_entropy, sums, B, T,
    clip_low: tl.float64, clip_high: tl.float64, dual_clip: tl.float64, delta: tl.float64,
    entropy_coef: tl.float64, kl_coef: tl.float64, tau_pos: tl.float64, tau_neg: tl.float64,
    DUAL: tl.constexpr, DELTA: tl.constexpr, KL_GRADIENT: tl.constexpr, UNBIASED: tl.constexpr,
    ESTIMATOR: tl.constexpr, AGGREGATION: tl.constexpr, RATIO_OF: tl.constexpr, LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """logp, old_logp, advantages [B, T] and importance_weights, entropy, ref_logp [B, T] or None;
    mask [B, T] bool; normalizer [] or None; counts [B] int32 or None; sequences [3, B] or None.
    Written: d_logp [B, T], d_entropy [B, T] (empty without entropy), sums [COLUMNS, programs]."""
    dtype: tl.constexpr = logp.dtype.element_ty
    blocks = tl.cdiv(T, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    i = row * T + t
    inside = t < T
    kept = tl.load(mask + i, mask=inside, other=0) != 0
    lp = tl.where(kept, tl.load(logp + i, mask=inside, other=0.0), 0.0)
    old = tl.where(kept, tl.load(old_logp + i, mask=inside, other=0.0), 0.0)
    A = tl.where(kept, tl.load(advantages + i, mask=inside, other=0.0), 0.0)
    c = aggregate.coefficient(counts, B, row, normalizer, AGGREGATION, dtype)

    low, high = tl.full((), clip_low, dtype), tl.full((), clip_high, dtype)
    floor, ceiling = tl.full((), 1 - clip_low, dtype), tl.full((), 1 + clip_high, dtype)
    difference = lp - old
    token_log_ratio = kl.clamped(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio, moves = token_log_ratio, tl.abs(difference) <= MAX_LOG_RATIO
    if sequences is not None:
        mean = tl.where(kept, tl.load(sequences + row), 0.0)
        log_ratio = kl.clamped(mean, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        moves = tl.abs(mean) <= MAX_LOG_RATIO
    s, q = reduced(log_ratio)
    ratio = s + s * q
    excess = (s - 1.0) + s * q  # ratio − 1
    bounded = kl.clamped(ratio, floor, ceiling)
    held = ratio
    if DELTA:
        held = tl.minimum(ratio, tl.full((), delta, dtype), propagate_nan=tl.PropagateNan.ALL)
    lower, upper, dual = tl.zeros_like(kept), tl.zeros_like(kept), tl.zeros_like(kept)
    if LOSS == "ppo":
        whole, clipped, unclipped = -A * ratio, -A * bounded, -A * held
        surrogate = tl.where(clipped > unclipped, clipped, unclipped)
        lower, upper = (surrogate > whole) & (A < 0), (surrogate > whole) & (A >= 0)
        if DUAL:
            bound = -A * tl.full((), dual_clip, dtype)
            surrogate = tl.where((A < 0) & (surrogate > bound), bound, surrogate)
        dual = surrogate < whole
        gradient = tl.where(moves & ((lower | upper | dual) == 0), whole, 0.0)
    elif LOSS == "sapo":
        tau = tl.where(A > 0, tl.full((), tau_pos, dtype), tl.full((), tau_neg, dtype))
        x = tau * excess
        tail = exp(-tl.abs(x))  # sigmoid by what cannot overflow
        both = 1.0 / (1.0 + tail)
        surrogate = -A * tl.where(x > 0, both, tail * both) * 4.0 / tau
        gradient = -A * ratio * 4.0 * tail * both * both
        gradient = tl.where(moves, gradient, 0.0)
    elif LOSS == "gmpo":
        cut = bounded_log_ratio(difference, A, low, high) != difference
        lower, upper = cut & (A < 0), cut & (A >= 0)
        surrogate = -A * ratio
        gradient = surrogate  # of its row, below
    else:  # log-probs, weighted by a constant
        if LOSS == "cispo":
            lower, upper = kept & (ratio < floor), kept & (ratio > ceiling)
            weight = bounded
        elif LOSS == "vespo":
            weight = tl.where(A < 0, tl.load(sequences + 2 * B + row), tl.load(sequences + B + row))
        elif LOSS == "reinforce":
            weight = tl.full(lp.shape, 1.0, dtype)
        else:
            p, old_p = exp(lp), exp(old)
            up, down = p - old_p, old_p - p
            if LOSS == "dppo_kl":
                rest, old_rest = tl.maximum(-expm1(lp), 0.0), tl.maximum(-expm1(old), 0.0)
                divergence = old_rest * tl.log((old_rest + TINY) / (rest + TINY))
                divergence += kl.times(old_p, -difference)
                up, down = tl.where(up > 0, divergence, 0.0), tl.where(down > 0, divergence, 0.0)
            lower, upper = (A <= 0) & (down > low), (A > 0) & (up > high)
            weight = tl.where(lower | upper, 0.0, held)
            dual = kept & (held < ratio) & ((lower | upper) == 0)
        gradient = -A * weight
        surrogate = kl.times(gradient, lp)
    if importance_weights is not None:
        w = tl.where(kept, tl.load(importance_weights + i, mask=inside, other=0.0), 0.0)
        surrogate = kl.times(w, surrogate)
        gradient = kl.times(w, gradient)
    if RATIO_OF == "sequence" and (LOSS == "ppo" or LOSS == "gmpo"):
        gradient = tl.where(kept, tl.load(sequences + B + row), 0.0)
    if LOSS == "gmpo":
        gradient = tl.where(lower | upper, 0.0, gradient)
    loss = surrogate
    if entropy is not None:
        H = tl.where(kept, tl.load(entropy + i, mask=inside, other=0.0), 0.0)
        coef = tl.full((), entropy_coef, dtype)
        loss -= kl.times(coef, H)
        tl.store(d_entropy + i, tl.where(kept, -coef * c, 0.0), mask=inside)
        partials.put(sums, 1, tl.sum(H))
    else:
        partials.put(sums, 1, 0.0)
    if ref_logp is not None:
        ref = tl.where(kept, tl.load(ref_logp + i, mask=inside, other=0.0), 0.0)
        ref_kl, slope = kl.estimate(lp - ref, ESTIMATOR), kl.slope(lp - ref, ESTIMATOR)
        if UNBIASED:
            token_ratio = exp(token_log_ratio)
            near = tl.abs(difference) <= MAX_LOG_RATIO
            slope = token_ratio * (slope + tl.where(near, ref_kl, 0.0))
            ref_kl = token_ratio * ref_kl
        if KL_GRADIENT:
            coef = tl.full((), kl_coef, dtype)
            loss += coef * ref_kl
            gradient += coef * slope
        partials.put(sums, 2, tl.sum(tl.where(kept, ref_kl, 0.0)))
    else:
        partials.put(sums, 2, 0.0)
    tl.store(d_logp + i, tl.where(kept, kl.times(c, gradient), 0.0), mask=inside)

    count = tl.sum(kept.to(dtype))
    ratio_sum = tl.sum(tl.where(kept, excess, 0.0))
    partials.put(sums, 0, kl.times(c, tl.sum(tl.where(kept, surrogate, 0.0))))
    partials.put(sums, 3, tl.sum((lower | upper).to(dtype)))
    partials.put(sums, 4, tl.sum(dual.to(dtype)))
    partials.put(sums, RATIO, ratio_sum)
    partials.put(sums, SQUARES, partials.squares(excess, kept, ratio_sum, count))
    partials.put(sums, MAXIMUM, tl.max(tl.where(kept, ratio, 0.0)))
    partials.put(sums, 8, -tl.sum(difference))  # the clamp is for the exponential
    partials.put(sums, 9, tl.sum(0.5 * difference * difference))
    beyond = kl.times(expm1(token_log_ratio), difference - token_log_ratio)  # by the tangent there
    partials.put(sums, 10, tl.sum(expm1_minus_x(token_log_ratio) + beyond))
    partials.put(sums, 11, tl.sum(lower.to(dtype)))
    partials.put(sums, 12, tl.sum(upper.to(dtype)))
    partials.put(sums, TOTAL, kl.times(c, tl.sum(tl.where(kept, loss, 0.0))))
    partials.put(sums, COUNT, count)


@triton.jit
def policy_loss_finish_kernel(sums, programs, loss, stats):
    """sums [COLUMNS, programs]; written: loss [], stats [STATS]."""
    total = partials.totals(sums, programs, COLUMNS, PADDED)
    count = partials.picked(total, COUNT, PADDED)
    n = tl.maximum(count, 1.0)
    excess = partials.picked(total, RATIO, PADDED) / n
    spread = partials.all_squares(sums, programs, COUNT, RATIO, SQUARES, excess)
    column = tl.arange(0, PADDED)
    value = total / n
    value = tl.where(column == 0, total, value)
    value = tl.where(column == RATIO, tl.where(count > 0, 1.0 + excess, 0.0), value)
    value = tl.where(column == SQUARES, spread / n, value)
    value = tl.where(column == COUNT, count, value)
    value = tl.where(column == MAXIMUM, partials.largest(sums, programs, MAXIMUM), value)
    tl.store(stats + column, value, mask=column < STATS)
    tl.store(loss, partials.picked(total, TOTAL, PADDED))


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    importance_weights: Tensor | None,
    entropy: Tensor | None,
    ref_logp: Tensor | None,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    aggregation: str,
    ratio: str,
    loss: str,
    sapo_tau_pos: float,
    sapo_tau_neg: float,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
    delta: float | None,
    unbiased_kl: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats [14], dloss/dlogp [B, T], dloss/dentropy [B, T] or empty)."""
    d_logp = torch.empty_like(logp)
    d_entropy = logp.new_empty(0) if entropy is None else torch.empty_like(logp)
    if logp.numel() == 0:
        return logp.new_zeros(()), logp.new_zeros(STATS.value), d_logp, d_entropy
    total, stats = logp.new_empty(()), logp.new_empty(STATS.value)
    rows, steps = logp.shape
    block = min(triton.next_power_of_2(steps), 1024)
    programs = rows * triton.cdiv(steps, block)
    sums = logp.new_empty((COLUMNS.value, programs))
    clips = (clip_low, clip_high, dual_clip or 0.0, delta or 0.0)
    launch = {
        "BLOCK": block, "num_warps": max(1, block // 256), "LOSS": loss,
        "DUAL": dual_clip is not None, "DELTA": delta is not None,
    }  # fmt: skip
    with torch.cuda.device_of(logp):
        sequences = None
        if ratio != "token":
            sequences = logp.new_empty((3, rows))
            sequence_kernel[(rows,)](
                logp,
                old_logp,
                advantages,
                mask,
                importance_weights,
                sequences,
                rows,
                steps,
                *clips,
                vespo_k_pos,
                vespo_lambda_pos,
                vespo_k_neg,
                vespo_lambda_neg,
                **launch,
            )
        counts = aggregate.row_counts(mask, aggregation, normalizer)
        policy_loss_kernel[(programs,)](
            logp, old_logp, advantages, mask, importance_weights, entropy, ref_logp, normalizer,
            counts, sequences, d_logp, d_entropy, sums, rows, steps, *clips, entropy_coef, kl_coef,
            sapo_tau_pos, sapo_tau_neg, KL_GRADIENT=kl_coef != 0, UNBIASED=unbiased_kl,
            ESTIMATOR=kl_estimator, AGGREGATION=aggregation, RATIO_OF=ratio, **launch,
        )  # fmt: skip
        policy_loss_finish_kernel[(1,)](sums, programs, total, stats)
    return total, stats, d_logp, d_entropy
