"""kto_loss: answers that are good or bad by themselves, without a pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import check
from .registry import Op, Sample, register


class KTOStats(NamedTuple):
    """Means; detached 0-dim tensors, 0 where there is nothing to take them of."""

    desirable: Tensor  # implicit reward of the desirable answers, nats × β
    undesirable: Tensor


def kto_loss(
    logp: Tensor,
    mask: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, KTOStats]:
    """Kahneman-Tversky optimisation: mean λ (1 − v) over the answers.

    With r = Σ_t (log π − log π_ref) and the KL from the reference z as the point that gains and
    losses are seen from (arXiv:2402.01306, eq. 8):

        v = σ(β (r − max(z, 0)))  λ = desirable_weight    of a desirable answer
        v = σ(β (max(z, 0) − r))  λ = undesirable_weight  of an undesirable one

    z is a constant. The paper (sec. 4.1) estimates it as the mean of r over answers to *other*
    prompts of the batch (all processes' together); with kl = 0 the loss stays one of classifying.
    An answer without tokens is left out, and so is one of which r − z is ∞ − ∞: with a token that
    neither policy nor reference can give. A log-prob of NaN stays one.

    Args:
        logp: [B, T], log π of the answers' tokens, with gradient.
        mask: [B, T] bool, True = a token of the answer; what is behind it may be NaN.
        ref_logp: [B, T], those of the frozen reference, a constant.
        desirable: [B] bool, True = a good answer.
        kl: z, a number or a 0-dim tensor, nats an answer.
        beta: above 0; .1 is usual.
        desirable_weight, undesirable_weight: λ, ≥ 0. The paper (sec. 4.2) keeps the sum over the
            good answers 1 to 4/3 times that over the bad ones.

    Returns:
        (loss, KTOStats): float32 0-dim (float64 in, float64 out). The statistics, detached: means
        of β r over the desirable and over the undesirable answers; 0 without any.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("logp", logp)
    rows, length = logp.shape if logp.dim() == 2 else (0, 0)
    check.shaped("logp", logp, [rows, length], "[B, T]")
    check.boolean_mask(mask, "logp", logp)
    check.like("ref_logp", ref_logp, "logp", logp)
    check.tensor("desirable", desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {check.describe(desirable)}")
    check.shaped("desirable", desirable, [rows], "[B], one for each row of logp")
    check.same_device("desirable", desirable, "logp", logp)
    dtype = check.accumulator(logp, ref_logp)
    if isinstance(kl, Tensor):
        check.floating("kl", kl)
        check.shaped("kl", kl, [], "a number or a 0-dim tensor")
        check.same_device("kl", kl, "logp", logp)
        if check.values_can_be_read(kl) and bool(kl.isnan()):
            raise ValueError("kl must be a number, got nan")
        point: float | Tensor = kl.detach().to(dtype).clamp(min=0.0)
    else:
        check.number("kl", kl, dtype=dtype)
        point = max(kl, 0.0)
    check.number("beta", beta, above=0.0, dtype=dtype)
    check.number("desirable_weight", desirable_weight, low=0.0, dtype=dtype)
    check.number("undesirable_weight", undesirable_weight, low=0.0, dtype=dtype)

    # Token by token: of two sums the difference would lose digits.
    ratio = (logp.to(dtype) - ref_logp.detach().to(dtype)).masked_fill(~mask, 0.0).sum(1)
    kept = mask.any(1)
    sign, weight = (
        torch.where(desirable, good, bad).to(dtype)
        for good, bad in ((1.0, -1.0), (float(desirable_weight), float(undesirable_weight)))
    )
    gain = beta * sign * (ratio - point)
    nan = ((logp.isnan() | ref_logp.isnan()) & mask).any(1)
    kept = kept & (~gain.isnan() | nan)
    gain = gain.masked_fill(~kept, 0.0)  # before what is not linear, or the gradient would be NaN
    each = (weight * torch.sigmoid(-gain)).masked_fill(~kept, 0.0)  # 1 − σ(x) is σ(−x)

    def mean(x: Tensor, of: Tensor) -> Tensor:
        return x.masked_fill(~of, 0.0).sum().detach() / of.sum().clamp(min=1)

    reward = beta * ratio
    stats = KTOStats(mean(reward, kept & desirable), mean(reward, kept & ~desirable))
    return each.sum() / kept.sum().clamp(min=1), stats


def reference(
    logp: Tensor,
    mask: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, KTOStats]:
    """One answer after another, by the formula."""
    dtype = check.accumulator(logp, ref_logp)
    zero = logp[:0].to(dtype).sum()
    losses: list[Tensor] = []
    rewards: dict[bool, list[Tensor]] = {True: [], False: []}
    for own, ref, counts, good in zip(logp, ref_logp, mask, desirable.tolist(), strict=True):
        if not counts.any():
            continue
        ratio = (own[counts].to(dtype) - ref[counts].to(dtype)).sum()
        point = max(float(kl), 0.0)
        if (ratio - point).isnan() and not (own[counts].isnan() | ref[counts].isnan()).any():
            continue  # ∞ − ∞
        value = torch.sigmoid(beta * (ratio - point if good else point - ratio))
        losses.append((desirable_weight if good else undesirable_weight) * (1 - value))
        rewards[good].append(beta * ratio.detach())
    means = (torch.stack(x).mean() if x else zero.detach() for x in rewards.values())
    return torch.stack(losses).mean() if losses else zero, KTOStats(*means)


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def drawn(rows: int, length: int, **options: object) -> dict[str, Any]:
        logp, ref_logp = (-torch.rand(rows, length, generator=generator) * 3 for _ in range(2))
        mask = torch.rand(rows, length, generator=generator) > 0.3
        mask[:, :1] = True
        desirable = torch.arange(rows) % 3 > 0
        made = {"logp": logp, "mask": mask, "ref_logp": ref_logp, "desirable": desirable}
        return made | options

    yield Sample("kto", drawn(5, 7), ("logp",))
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3}
    yield Sample("everything", drawn(6, 5, kl=1.25, **weights), ("logp",))
    yield Sample("kl of a tensor", drawn(4, 6, kl=torch.tensor(0.7)), ("logp",))
    yield Sample("kl below 0", drawn(4, 6, kl=torch.tensor(-0.7)), ("logp",))
    hidden = drawn(4, 6)
    hidden["mask"][2] = False
    for name in ("logp", "ref_logp"):
        hidden[name] = hidden[name].masked_fill(~hidden["mask"], torch.nan)
    yield Sample("an answer of no token, NaN behind the mask", hidden, ("logp",))
    both = drawn(4, 5)
    for name in ("logp", "ref_logp"):
        both[name][1, 0] = -torch.inf
    both["logp"][2, 0] = -torch.inf
    yield Sample("impossible tokens, one of them for both models", both, ("logp",))
    alone = drawn(3, 4)
    alone["desirable"] = torch.ones(3, dtype=torch.bool)
    yield Sample("good answers alone", alone, ("logp",))
    yield Sample("no answers", drawn(0, 4), ("logp",))


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    size = (shape["B"], shape["T"])
    logp, ref_logp = (
        -torch.rand(size, generator=generator, device=device, dtype=torch.float32) for _ in range(2)
    )
    mask = torch.arange(shape["T"], device=device).expand(size) < shape["T"] - 3
    desirable = torch.arange(shape["B"], device=device) % 2 == 0
    made = {"logp": logp, "mask": mask, "ref_logp": ref_logp, "desirable": desirable}
    return Sample("bench", made, ("logp",))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    tokens = shape["B"] * shape["T"]
    return tokens * (4 + 4 + 1), tokens * 4


register(
    Op(
        "kto_loss",
        kto_loss,
        reference,
        (),
        samples,
        workload,
        ({"B": 64, "T": 512},),
        bytes_moved,
    )
)
