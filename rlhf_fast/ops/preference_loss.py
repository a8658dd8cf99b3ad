"""preference_loss: DPO, IPO, SimPO and ORPO, from the log-probs of a pair of answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .registry import Op, Sample, register

LOSSES = ("dpo", "ipo", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")


class PreferenceStats(NamedTuple):
    """Means over the pairs; detached 0-dim tensors, 0 for an empty batch."""

    accuracy: Tensor  # share of pairs with chosen > rejected
    chosen: Tensor  # implicit reward of the chosen answer
    rejected: Tensor
    nll: Tensor  # nats a token of the chosen answers


def preference_loss(
    logp: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
) -> tuple[Tensor, PreferenceStats]:
    """Loss of a policy that should prefer one answer of a pair: no reward model, no sampling.

    With s the implicit reward of an answer, from the sum or the mean of its tokens' log-probs, and
    Δ = s(chosen) − s(rejected), the mean over the pairs of

        dpo    −log σ(Δ − margin),  s = β Σ_t (log π − log π_ref)      arXiv:2305.18290, eq. 7
        ipo    (Δ − 1/(2β))²,  s = mean_t (log π − log π_ref)          arXiv:2310.12036, eq. 17
        simpo  −log σ(Δ − margin),  s = β mean_t log π                 arXiv:2405.14734, eq. 6
        orpo   −β log σ(Δ),  s = log(p/(1 − p)), log p = mean_t log π  arXiv:2403.07691, eq. 6

    plus nll_coef times the mean of −log π over the tokens of the chosen answers. With a label
    smoothing of ε, −log σ(x) becomes −(1 − ε) log σ(x) − ε log σ(−x), as if a share of ε of the
    pairs were the wrong way round. IPO's means over tokens are TRL's, confirmed there by IPO's
    authors. A pair of which one answer has no token is left out, and so is one whose Δ is ∞ − ∞:
    two answers that the policy cannot give, or a token that neither policy nor reference can give,
    do not say which is better. A log-prob of NaN stays one. Plain PyTorch on [2B, T] numbers: what
    is fused is the head, in ``linear_token_logprobs``.

    Args:
        logp: [2B, T], log π of the answers' tokens, with gradient: the B chosen answers, then the B
            rejected ones in the same order.
        mask: [2B, T] bool, True = a token of the answer; what is behind it may be NaN.
        ref_logp: [2B, T], those of the frozen reference, a constant; dpo and ipo need it, the
            others have none.
        loss: dpo, ipo, simpo or orpo.
        beta: above 0, for ipo at least 1e-15 in float32. Usual: dpo .1, ipo .1, simpo 2, orpo .1.
        margin: ≥ 0, dpo and simpo (there γ: .5 to 1.6).
        label_smoothing: 0 to .5; share of the pairs that are the wrong way round; dpo, simpo.
        nll_coef: ≥ 0. ORPO's own is 1.

    Returns:
        (loss, PreferenceStats): float32 0-dim (float64 in, float64 out). The statistics, detached:
        accuracy, the share of pairs with s(chosen) > s(rejected); the means of both; nll, the mean
        of −log π over the chosen answers' tokens.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("logp", logp)
    rows, length = logp.shape if logp.dim() == 2 else (0, 0)
    check.shaped("logp", logp, [rows, length], "[2B, T]")
    if rows % 2:
        raise ValueError(f"logp must be [2B, T], chosen and then rejected answers, got {rows} rows")
    check.boolean_mask(mask, "logp", logp)
    check.choice("loss", loss, LOSSES)
    if (ref_logp is None) != (loss in REFERENCE_FREE):
        has = "has no" if loss in REFERENCE_FREE else "needs"
        raise ValueError(f"loss={loss!r} {has} ref_logp")
    if ref_logp is not None:
        check.like("ref_logp", ref_logp, "logp", logp)
    dtype = check.accumulator(logp, ref_logp)
    check.number("beta", beta, above=0.0, dtype=dtype)
    if loss == "ipo" and dtype == torch.float32:  # which holds (1/(2β))²
        check.number("beta", beta, low=1e-15)
    check.number("margin", margin, low=0.0, dtype=dtype)
    check.number("label_smoothing", label_smoothing, low=0.0, high=0.5, dtype=dtype)
    check.number("nll_coef", nll_coef, low=0.0, dtype=dtype)
    for name, value in (("margin", margin), ("label_smoothing", label_smoothing)):
        if value and loss not in ("dpo", "simpo"):
            raise ValueError(f"{name} {value} has no meaning with loss={loss!r}")

    counts = mask.sum(1)
    paired = (counts > 0).view(2, -1).all(0).repeat(2)  # [2B]
    mask = mask & paired[:, None]
    logp = ratio = logp.to(dtype).masked_fill(~mask, 0.0)
    if ref_logp is not None:  # token by token: of two sums the difference would lose digits
        ratio = logp - ref_logp.detach().to(dtype).masked_fill(~mask, 0.0)
    total = ratio.sum(1)
    reward = total * beta if loss in ("dpo", "simpo") else total
    if loss != "dpo":
        reward = reward / counts.clamp(min=1)
    if loss == "orpo":
        reward = log_odds(reward.masked_fill(~paired, -1.0))
    chosen, rejected = reward.view(2, -1).unbind()
    gap = chosen - rejected
    kept = paired[: len(chosen)] & ~(gap.isnan() & without_nan(logp, ref_logp, mask))
    gap = gap.masked_fill(~kept, 0.0)  # before what is not linear, or the gradient would be NaN
    if loss == "ipo":
        each = (gap - 1 / (2 * beta)).square()
    elif loss == "orpo":
        each = -beta * F.logsigmoid(gap)
    else:
        each = -(1 - label_smoothing) * F.logsigmoid(gap - margin)
        if label_smoothing:
            each = each - label_smoothing * F.logsigmoid(margin - gap)
    pairs = kept.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~kept, 0.0).sum() / pairs

    tokens = mask[: len(chosen)] & kept[:, None]
    nll = -logp[: len(chosen)].masked_fill(~tokens, 0.0).sum() / tokens.sum().clamp(min=1)
    result = mean(each)
    if nll_coef:  # 0·∞ is 0 here
        result = result + nll_coef * nll
    columns = (mean((gap > 0).to(dtype)), mean(chosen), mean(rejected), nll)
    return result, PreferenceStats(*(x.detach() for x in columns))


def without_nan(logp: Tensor, ref_logp: Tensor | None, mask: Tensor) -> Tensor:
    """[B] bool, the pairs of [2B, T] log-probs without a NaN where mask counts."""
    nan = logp.isnan() if ref_logp is None else logp.isnan() | ref_logp.isnan()
    return ~(nan & mask).any(1).view(2, -1).any(0)


def log_odds(logp: Tensor) -> Tensor:
    """log(p/(1 − p)) of log p ≤ 0; of a p that rounds to 1 the log-odds nearest to it below."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    near = logp > -math.log(2.0)  # 1 − e^x keeps its digits as −expm1(x) there, as e^x elsewhere
    of_rest = torch.where(
        near,
        torch.log(-torch.expm1(logp.masked_fill(~near, -1.0))),
        torch.log1p(-torch.exp(logp.masked_fill(near, -1.0))),
    )
    return logp - of_rest


def reference(
    logp: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
) -> tuple[Tensor, PreferenceStats]:
    """One pair after another, by the formulas."""
    dtype = check.accumulator(logp, ref_logp)
    size = len(logp) // 2
    losses, rows, tokens = [], [], []
    for i in range(size):
        pair = []
        for row in (i, size + i):
            own = logp[row][mask[row]].to(dtype)
            ratio = own if ref_logp is None else own - ref_logp[row][mask[row]].to(dtype)
            pair.append((own, ratio))
        if any(len(own) == 0 for own, _ in pair):
            continue
        if loss == "dpo":
            chosen, rejected = (beta * ratio.sum() for _, ratio in pair)
        elif loss == "simpo":
            chosen, rejected = (beta * ratio.mean() for _, ratio in pair)
        elif loss == "ipo":
            chosen, rejected = (ratio.mean() for _, ratio in pair)
        else:
            p = [ratio.mean().exp() for _, ratio in pair]
            chosen, rejected = (torch.log(x / (1 - x)) for x in p)
        given = [
            x[row][mask[row]] for x in (logp, ref_logp) if x is not None for row in (i, size + i)
        ]
        if (chosen - rejected).isnan() and not torch.cat(given).isnan().any():
            continue  # ∞ − ∞
        right = torch.sigmoid(chosen - rejected - margin)
        wrong = torch.sigmoid(rejected - chosen + margin)
        if loss == "ipo":
            losses.append((chosen - rejected - 1 / (2 * beta)) ** 2)
        elif loss == "orpo":
            losses.append(-beta * right.log())
        else:
            losses.append(
                -(1 - label_smoothing) * right.log() - label_smoothing * torch.xlogy(1.0, wrong)
            )
        rows.append(torch.stack([(chosen > rejected).to(dtype), chosen, rejected]).detach())
        tokens.append(pair[0][0])
    if not losses:
        zero = logp[:0].to(dtype).sum()
        none = zero.detach()
        return zero, PreferenceStats(none, none, none, none)
    nll = -torch.cat(tokens).mean()
    result = torch.stack(losses).mean() + (nll_coef * nll if nll_coef else 0.0)
    accuracy, chosen, rejected = torch.stack(rows).mean(0).unbind()
    return result, PreferenceStats(accuracy, chosen, rejected, nll.detach())


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def drawn(pairs: int, length: int, loss: str = "dpo", **options: object) -> dict[str, Any]:
        logp, ref_logp = (
            -torch.rand(2 * pairs, length, generator=generator) * 3 - 0.01 for _ in range(2)
        )
        mask = torch.rand(2 * pairs, length, generator=generator) > 0.3
        mask[:, :1] = True
        made = {"logp": logp, "mask": mask, "loss": loss} | options
        return made if loss in REFERENCE_FREE else made | {"ref_logp": ref_logp}

    for loss in LOSSES:
        beta = 2.0 if loss == "simpo" else 0.1
        yield Sample(loss, drawn(5, 7, loss, beta=beta), ("logp",))
    more = {"label_smoothing": 0.1, "margin": 0.5, "nll_coef": 0.3}
    for loss in ("dpo", "simpo"):
        yield Sample(f"{loss}, everything", drawn(4, 6, loss, **more), ("logp",))
    yield Sample("orpo, its own", drawn(3, 9, "orpo", nll_coef=1.0), ("logp",))
    hidden = drawn(3, 6)
    hidden["mask"][4] = False
    for name in ("logp", "ref_logp"):
        hidden[name] = hidden[name].masked_fill(~hidden["mask"], torch.nan)
    yield Sample("an answer of no token, NaN behind the mask", hidden, ("logp",))
    yield Sample("no pairs", drawn(0, 4), ("logp",))
    for loss in LOSSES:
        given = drawn(4, 5, loss, nll_coef=0.5)
        given["logp"][[0, 4], 0] = -torch.inf
        yield Sample(f"{loss}, two impossible answers", given, ("logp",))
    for loss in ("dpo", "ipo"):
        both = drawn(3, 5, loss)
        for name in ("logp", "ref_logp"):
            both[name][1, 0] = -torch.inf
        yield Sample(f"{loss}, a token that neither model can give", both, ("logp",))
    empty = drawn(2, 3, "orpo")
    empty["mask"] = torch.zeros_like(empty["mask"])
    yield Sample("all masked", empty, ("logp",))


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    size = (2 * shape["B"], shape["T"])
    logp, ref_logp = (
        -torch.rand(size, generator=generator, device=device, dtype=torch.float32) for _ in range(2)
    )
    mask = torch.arange(shape["T"], device=device).expand(size) < shape["T"] - 3
    return Sample("bench", {"logp": logp, "mask": mask, "ref_logp": ref_logp}, ("logp",))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    tokens = 2 * shape["B"] * shape["T"]
    return tokens * (4 + 4 + 1), tokens * 4


register(
    Op(
        "preference_loss",
        preference_loss,
        reference,
        (),
        samples,
        workload,
        ({"B": 32, "T": 512},),
        bytes_moved,
    )
)
