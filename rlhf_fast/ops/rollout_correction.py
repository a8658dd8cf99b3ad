"""rollout_correction: weights and a mask for answers that were sampled by another program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import check
from .registry import Op, Sample, register
from .token_kl import estimate

MODES = ("truncate", "mask")
LEVELS = ("token", "sequence", "geometric")
REJECTIONS = tuple(f"{how}_{kl}" for how in ("mean", "sum", "max") for kl in ("k1", "k2", "k3"))
MAX_LOG_RATIO = 20.0
NO_MEAN = 1e-8  # weights whose mean is no larger are not divided by it


class RolloutStats(NamedTuple):
    """What ``rollout_correction`` says of a call: 0-dim tensors in the weights' dtype, 0 where no
    token counts. With ``group`` they are of all its ranks together.

    Shares and means are over the counting tokens of the mask that was given, each with the same
    weight. s is π_old/π_rollout at ``level`` (by token where there are no weights), a row's once
    for each of its tokens, before any bound.

    Attributes:
        ratio_mean: of s, no unit; 1 where trainer and rollout agree.
        ratio_max: the largest s, no unit.
        clipfrac: share of the tokens, 0 to 1, whose s is outside [low, high]: clamped or, with
            mode="mask", given the weight 0.
        rejectfrac: share of the tokens, 0 to 1, in rows that reject or veto took out.
        effective_sample_size: (Σw)²/Σw² of the weights w that are returned, in tokens: as many
            equal weights would be as good as these.
        kl_k3: KL(rollout ‖ old) in nats, as the mean of s_t − 1 − log s_t; always by token.
        tokens: how many count.
    """

    ratio_mean: Tensor
    ratio_max: Tensor
    clipfrac: Tensor
    rejectfrac: Tensor
    effective_sample_size: Tensor
    kl_k3: Tensor
    tokens: Tensor


def rollout_correction(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    mode: str | None = "truncate",
    level: str = "token",
    low: float | None = None,
    high: float | None = 2.0,
    reject: str | None = None,
    reject_above: float | None = None,
    veto: float | None = None,
    batch_normalize: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, RolloutStats]:
    """Weights, and what is left to learn from, where rollout and trainer disagree.

    An engine with other kernels or another precision samples from π_rollout, while the trainer
    takes its gradient as if from π_old. Per token, with log s_t = old_logp_t − rollout_logp_t:

        token       s = s_t
        sequence    s = Π s_t            of the row's counting tokens
        geometric   s = (Π s_t)^(1/n)    n: their number

        truncate    w = min(max(s, low), high)          TIS: Yao et al. 2025, "Your Efficient RL
                                                        Framework Secretly Brings You Off-Policy RL"
        mask        w = s where low ≤ s ≤ high, else 0  IcePop, MIS: Ling team, arXiv:2510.18855

    A row is rejected where |stat| > reject_above, stat being the mean, sum or maximum over its
    tokens of an estimate of KL(rollout ‖ old): k1 = −log s_t (max: |k1|), k2 = (log s_t)²/2,
    k3 = s_t − 1 − log s_t; and where any of its s_t < veto. These are verl's ``rollout_rs`` of
    seq_mean_k1 and so on, where a k1 has its one threshold u as reject_above = log u.

    All is in log space, held within ±20 but for the veto. The weights are constants: no gradient
    flows. A token that IcePop leaves has the weight 0 and still counts in a loss's denominator; a
    rejected row leaves the mask and does not.

    Args:
        old_logp: [..., T], nats: by the trainer, before its first update.
        rollout_logp: [..., T], nats: by what sampled, of the same tokens over the same support.
        mask: [..., T] bool, True = counts. Masked positions may hold anything.
        mode: truncate, mask, or None: all weights are 1, and level, low, high and batch_normalize
            say nothing.
        level: token, sequence or geometric.
        low, high: bounds of s, ≥ 0 and above 0; None: no bound. low < high.
        reject: mean_k1, mean_k2, mean_k3, sum_k1, … max_k3, or None; needs reject_above.
        reject_above: nats, above 0.
        veto: above 0, at most 1; 1e-4 is usual.
        batch_normalize: divide the weights by their mean over what is left (over its rows, where
            a row has one weight).
        group: take that mean and all statistics over the ranks of this process group, by two
            all-reduces: every rank must call. None: of this call's tensors, which is right where
            they are the whole batch already.

    Returns:
        (weights, kept, stats): [..., T] float32 (float64 in, float64 out), for
        ``importance_weights``, 0 where not kept; [..., T] bool, the mask without the rejected
        rows; ``RolloutStats``.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("old_logp", old_logp)
    check.at_least_1d("old_logp", old_logp)
    check.like("rollout_logp", rollout_logp, "old_logp", old_logp)
    check.boolean_mask(mask, "old_logp", old_logp)
    dtype = check.accumulator(old_logp, rollout_logp)
    check_options(mode, level, low, high, reject, reject_above, veto, dtype)
    check.flag("batch_normalize", batch_normalize)
    if group is not None:
        check.process_group("group", group)

    log_s = (old_logp.detach().to(dtype) - rollout_logp.detach().to(dtype)).masked_fill(~mask, 0.0)
    counts = mask.sum(-1, keepdim=True)
    kept = mask
    if reject is not None and reject_above is not None:
        stat = row_statistic(log_s, counts, mask, reject)
        kept = kept & (stat <= reject_above)
    if veto is not None:
        # as it is: held within ±20, an impossible token would stay above a veto of 1e-9
        kept = kept & ~(mask & (log_s.exp() < veto)).any(-1, keepdim=True)

    own_weights = mode is None or level == "token"
    ratios = at_level(log_s, counts, "token" if own_weights else level)  # [..., T] or [..., 1]
    units = kept if own_weights else kept.any(-1, keepdim=True)  # what has a weight of its own
    each = torch.ones_like(ratios)
    outside = torch.zeros_like(mask)
    if mode is not None:
        below = ratios < (-torch.inf if low is None else low)
        outside = below | (ratios > (torch.inf if high is None else high))
        each = ratios.masked_fill(outside, 0.0) if mode == "mask" else bounded(ratios, low, high)
    each = each.masked_fill(~units, 0.0)
    weights = each.expand(mask.shape).masked_fill(~kept, 0.0)

    s = ratios.expand(mask.shape).masked_fill(~mask, 0.0)
    k3 = estimate(-held(log_s), "k3")
    parts = (mask, s, outside & mask, mask & ~kept, weights, weights.square(), k3, units, each)
    sums = torch.stack([x.sum().to(dtype) for x in parts])
    largest = torch.cat([s.reshape(-1), s.new_zeros(1)]).amax()
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    tokens, s_sum, clipped, rejected, w, w2, kl, of, total = sums.unbind()
    if batch_normalize and mode is not None:
        mean = total / of.clamp(min=1)
        weights = weights / torch.where(mean > NO_MEAN, mean, 1.0)
    n = tokens.clamp(min=1)
    size = torch.where(w2 > 0, w * (w / torch.where(w2 > 0, w2, 1.0)), 0.0)
    stats = RolloutStats(s_sum / n, largest, clipped / n, rejected / n, size, kl / n, tokens)
    return weights, kept, stats


def check_options(
    mode: str | None,
    level: str,
    low: float | None,
    high: float | None,
    reject: str | None,
    reject_above: float | None,
    veto: float | None,
    dtype: torch.dtype,
) -> None:
    if mode is not None:
        check.choice("mode", mode, MODES)
    check.choice("level", level, LEVELS)
    if low is not None:
        check.number("low", low, low=0.0, dtype=dtype)
    if high is not None:
        check.number("high", high, above=0.0, dtype=dtype)
    if low is not None and high is not None and low >= high:
        raise ValueError(f"low must be below high {high}, got {low}")
    if reject is not None:
        check.choice("reject", reject, REJECTIONS)
    if (reject is None) != (reject_above is None):
        raise ValueError(
            "reject and reject_above need each other, got "
            f"reject={reject!r} and reject_above={reject_above}"
        )
    if reject_above is not None:
        check.number("reject_above", reject_above, above=0.0, dtype=dtype)
    if veto is not None:
        check.number("veto", veto, above=0.0, high=1.0, dtype=dtype)


def held(log_s: Tensor) -> Tensor:
    return log_s.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def bounded(s: Tensor, low: float | None, high: float | None) -> Tensor:
    return s if low is None and high is None else s.clamp(low, high)


def at_level(log_s: Tensor, counts: Tensor, level: str) -> Tensor:
    """s, [..., T] or [..., 1], of log-ratios that are 0 where masked."""
    if level == "token":
        return held(log_s).exp()
    total = log_s.sum(-1, keepdim=True)
    return held(total / counts.clamp(min=1) if level == "geometric" else total).exp()


def row_statistic(log_s: Tensor, counts: Tensor, mask: Tensor, reject: str) -> Tensor:
    """|mean, sum or maximum| [..., 1] of a KL estimate, from log-ratios that are 0 where masked."""
    how, kl = reject.split("_")
    each = estimate(-held(log_s), kl)
    if how == "max":
        return each.abs().amax(-1, keepdim=True) if mask.shape[-1] else each.sum(-1, keepdim=True)
    total = each.sum(-1, keepdim=True)
    return (total / counts.clamp(min=1) if how == "mean" else total).abs()


def reference(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    mode: str | None = "truncate",
    level: str = "token",
    low: float | None = None,
    high: float | None = 2.0,
    reject: str | None = None,
    reject_above: float | None = None,
    veto: float | None = None,
    batch_normalize: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, RolloutStats]:
    """One row after another, by the formulas; of one process."""
    dtype = check.accumulator(old_logp, rollout_logp)
    old, rollout = check.flat(old_logp.detach(), dtype), check.flat(rollout_logp.detach(), dtype)
    weights, kept = torch.zeros_like(old), check.flat(mask).clone()
    bottom, top = low or 0.0, torch.inf if high is None else high
    zero = torch.zeros((), dtype=dtype)
    all_s, all_k3, row_weights = [zero[None][:0]], [zero[None][:0]], [zero[None][:0]]
    outside = rejected = 0
    for row in range(len(old)):
        at = kept[row].nonzero().squeeze(1)
        if not len(at):
            continue
        log_s = old[row, at] - rollout[row, at]
        near = log_s.clamp(-20, 20)
        s = near.exp()
        all_k3.append(s - 1 - near)
        estimates = {"k1": -near, "k2": near**2 / 2, "k3": s - 1 - near}
        out = veto is not None and bool((log_s.exp() < veto).any())
        if reject is not None and reject_above is not None:
            each = estimates[reject[-2:]]
            stat = each.abs().amax() if reject[:3] == "max" else each.sum().abs()
            out = out or bool(stat / (len(at) if reject[:4] == "mean" else 1) > reject_above)
        if mode is not None and level != "token":
            power = len(at) if level == "geometric" else 1
            s = (log_s.sum() / power).clamp(-20, 20).exp().expand(len(at))
        all_s.append(s)
        w = torch.ones_like(s)
        if mode is not None:
            outside += int(((s < bottom) | (s > top)).sum())
            w = s.clamp(bottom, top)
            w = w if mode == "truncate" else torch.where(w == s, s, 0.0)
        if out:
            kept[row] = False
            rejected += len(at)
        else:
            weights[row, at] = w
            row_weights.append(w if level == "token" else w[:1])
    s, k3, each_weight = torch.cat(all_s), torch.cat(all_k3), torch.cat(row_weights)
    total, squares = weights.sum(), weights.square().sum()
    size = total * (total / squares) if bool(squares > 0) else zero
    if batch_normalize and mode is not None and len(each_weight):
        mean = each_weight.sum() / len(each_weight)
        weights = weights / mean if bool(mean > NO_MEAN) else weights
    n = max(len(s), 1)
    clipfrac, rejectfrac, tokens = (zero + x for x in (outside / n, rejected / n, len(s)))
    largest = s.amax() if len(s) else zero
    stats = RolloutStats(s.sum() / n, largest, clipfrac, rejectfrac, size, k3.sum() / n, tokens)
    return weights.reshape(mask.shape), kept.reshape(mask.shape), stats


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def drawn(size: tuple[int, ...], spread: float) -> dict[str, Tensor]:
        old = -3 * torch.rand(size, generator=generator)
        mask = torch.rand(size, generator=generator) < 0.7
        if mask.dim() > 1 and len(mask) > 2:
            mask[1] = False
        rollout = old - spread * torch.randn(size, generator=generator)
        return {
            "old_logp": old.masked_fill(~mask, torch.nan),
            "rollout_logp": rollout.masked_fill(~mask, torch.nan),
            "mask": mask,
        }

    for mode in MODES:
        for level in LEVELS:
            options = {"mode": mode, "level": level, "low": 0.7, "high": 1.5}
            yield Sample(f"{mode} by {level}", drawn((6, 9), 0.4) | options)
    for reject in ("mean_k1", "sum_k2", "max_k3", "max_k1"):
        options = {"mode": None, "reject": reject, "reject_above": 0.2}
        yield Sample(f"reject {reject}", drawn((12, 5), 0.4) | options)
    for level in LEVELS:
        options = {"level": level, "batch_normalize": True, "veto": 0.4}
        yield Sample(f"veto, normalized by {level}", drawn((8, 7), 0.5) | options)
    no_bound = {"high": None, "level": "sequence"}
    yield Sample("no bound, far apart", drawn((3, 40), 9.0) | no_bound)
    impossible = drawn((4, 6), 0.1)
    impossible["old_logp"][0] = -torch.inf
    impossible["rollout_logp"][2] = -torch.inf
    yield Sample("impossible tokens", impossible)
    yield Sample("one row", drawn((11,), 0.4) | {"low": 0.5, "mode": "mask"})
    nothing = {"mask": torch.zeros(2, 3, dtype=torch.bool), "batch_normalize": True}
    yield Sample("all masked", drawn((2, 3), 0.4) | nothing | {"level": "sequence"})
    yield Sample("no rows", drawn((0, 3), 0.4) | {"reject": "max_k3", "reject_above": 1.0})
    yield Sample("no tokens", drawn((2, 0), 0.4) | {"level": "geometric", "veto": 0.1})


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    size = (shape["B"], shape["T"])
    old = -3 * torch.rand(size, generator=generator, device=device)
    noise = torch.randn(size, generator=generator, device=device)
    mask = torch.ones(size, dtype=torch.bool, device=device)
    return Sample("bench", {"old_logp": old, "rollout_logp": old + 0.1 * noise, "mask": mask})


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    return shape["B"] * shape["T"] * (3 * 4 + 2), 0


register(
    Op(
        "rollout_correction",
        rollout_correction,
        reference,
        (),
        samples,
        workload,
        ({"B": 256, "T": 1024},),
        bytes_moved,
    )
)
