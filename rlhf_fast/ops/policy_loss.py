"""policy_loss: PPO's clipped surrogate, its entropy and KL terms and all its statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aggregate, check, token_kl
from .options import PolicyOptions
from .registry import Op, Sample, define_kernel, register

MAX_LOG_RATIO = 20.0
TINY = 1e-8  # the least ratio of a sequence in vespo; probabilities near 1 in dppo_kl


class PolicyStats(NamedTuple):
    """What ``policy_loss`` and ``linear_policy_loss`` say of a call: detached 0-dim tensors in the
    loss's dtype, 0 where no token counts.

    But for ``surrogate``, ``ratio_max`` and ``tokens``, every field is a mean over the counting
    tokens of this call, each with the same weight whatever ``aggregation``, ``normalizer`` and
    ``importance_weights`` are. The counting tokens are those of the mask; for
    ``linear_policy_loss`` with token ratios and no ``support`` those of them that could matter to
    the loss. Of several calls (micro-batches, processes) the mean is Σ tokens · mean / Σ tokens
    (``ratio_var``: of each call's own mean, so without the spread between calls); the surrogates of
    calls with a global normalizer add up.

    ρ is the ratio π/π_old, of a log-ratio held within ±20: the token's, or with ratio="sequence"
    its row's, counted once for each of the row's tokens; with loss="gmpo" of clipped log-ratios.

    Attributes:
        surrogate: the loss without its entropy and KL terms, aggregated as the loss is,
            ``importance_weights`` and ``normalizer`` included; in units of the advantages.
        entropy: nats; mean over the tokens. 0 where the call was given none.
        ref_kl: nats, the estimate kl_estimator of KL(π ‖ π_ref), with unbiased_kl times ρ; mean
            over the tokens. 0 without ref_logp.
        clipfrac: share of the tokens, 0 to 1, that the clip acted on. ppo: it cut their gradient
            off; cispo: it changed their weight, on either side and whatever the sign of A, as in
            verl (TRL and Liger count only those above, where A > 0); gmpo, dppo: it cut their
            gradient off; reinforce, sapo and vespo: 0.
        dual_clipfrac: share of the tokens, 0 to 1, that dual_clip cut off, or delta where
            A < 0; dppo: whose weight delta held.
        ratio_mean: of ρ, no unit; mean over the tokens.
        ratio_var: of ρ, no unit; population variance over the tokens.
        ratio_max: the largest ρ of a token, no unit.
        old_kl_k1: KL(old ‖ new) in nats, as the mean over the tokens of −log ρ_t; always by token
            and of log-ratios as they are, not held (inf where a log-prob is −inf), as are the next
            two.
        old_kl_k2: the same by the mean of (log ρ_t)² / 2, TRL's approxkl.
        old_kl_k3: the same by the mean of ρ_t − 1 − log ρ_t, by its tangent beyond log-ratios of
            ±20.
        clipfrac_low: the part of clipfrac that is below the lower bound; share of the tokens.
        clipfrac_high: the part that is above the upper bound (ppo: or above delta where A > 0);
            share of the tokens.
        tokens: how many the means are over.
    """

    surrogate: Tensor
    entropy: Tensor
    ref_kl: Tensor
    clipfrac: Tensor
    dual_clipfrac: Tensor
    ratio_mean: Tensor
    ratio_var: Tensor
    ratio_max: Tensor
    old_kl_k1: Tensor
    old_kl_k2: Tensor
    old_kl_k3: Tensor
    clipfrac_low: Tensor
    clipfrac_high: Tensor
    tokens: Tensor


@PolicyOptions.documented
def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logp: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped policy loss with all its statistics, gradient from the same pass.

        ρ_t = exp(logp_t − old_logp_t)
        L_t = −w_t min(ρ_t A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t)
              − entropy_coef·H_t + kl_coef·kl_t

    aggregated over the counting tokens (``rlhf_fast.ops.aggregate``). Schulman et al.,
    arXiv:1707.06347, eq. 7; dual clip: Ye et al., arXiv:1912.09729, eq. 5 (for A < 0 the loss is
    at most −dual_clip·A). The log-ratio is held within ±20; outside it carries no gradient.

    ``ratio="sequence"`` is GSPO (Zheng et al., arXiv:2507.18071, eq. 5-7): every counting token of
    a row has the row's ρ = exp(mean over its counting tokens of logp − old_logp). The gradient is
    the true one, through that mean. Where w·A is the same at all of a row's counting tokens it
    equals that of GSPO-token (eq. 13-14), which verl uses.

    ``ratio="sequence_token"`` is GSPO-token itself (eq. 13): the row's ρ in value, with the
    gradient of the token's own log-ratio; for advantages that differ within a row.

    ``loss`` sets the first term of L_t; sg(·) is a constant to the gradient:

        ppo         −w_t min(ρ_t A_t, clip(ρ_t) A_t)
        cispo       −w_t sg(clip(ρ_t)) A_t logp_t    MiniMax, arXiv:2506.13585, eq. 4-5
        reinforce   −w_t A_t logp_t                  Williams 1992; the ratio is only a statistic
        sapo        −w_t A_t σ(τ(ρ_t − 1))·4/τ       Gao et al., arXiv:2511.20347; τ is
                                                     sapo_tau_pos where A_t > 0, else sapo_tau_neg
        gmpo        −w_t A_t exp(mean of c_t)        Zhao et al., arXiv:2507.20673; c_t is log ρ_t,
                                                     at most clip_high where A_t ≥ 0, else at
                                                     least −clip_low
        vespo       −w_t sg(φ(Π_t ρ_t)) A_t logp_t   arXiv:2602.10693; φ(x) = x^k e^(λ(1 − x)), of
                                                     vespo_k_pos … where A_t ≥ 0, else vespo_k_neg
        dppo_tv     −w_t sg(min(ρ_t, delta)) A_t logp_t where D_t ≤ clip_high or A_t ≤ 0, and
                    D_t ≥ −clip_low or A_t > 0; else 0; D_t = π − π_old. Qi et al.,
                    arXiv:2602.04879
        dppo_kl     the same with the KL of "this token or another", π_old from π, in the place of
                    |D_t|

    With ``delta`` ppo is TRL's two-sided clip (INTELLECT-2, arXiv:2505.07291): min(ρ_t, delta) in
    the place of the ρ_t that is not clipped. Above 1 + clip_high it is a dual clip.
    ``unbiased_kl`` multiplies kl_t by the token's own ρ_t, gradient included (DeepSeek-V3.2,
    arXiv:2512.02556). LUSPO (arXiv:2602.05261) is ratio="sequence" with
    aggregation="seq-mean-token-sum". docs/objectives.md has all of them in one table.

    cispo with ratio="sequence" weights each token's logp by its row's clipped ρ, as TRL does.

    Args:
        logp: [..., T], nats, with gradient.
        old_logp: [..., T], nats, stored when the tokens were sampled; a constant.
        advantages: [..., T]; a constant.
        mask: [..., T] bool, True = counts. Masked positions may hold anything.
        normalizer: above 0: the global count under gradient accumulation or data parallelism, a
            float or a 0-dim tensor (of which 0 gives a loss of 0); None: this call's own count.
        importance_weights: [..., T], w_t on the surrogate; constants.
        entropy: [..., T], nats, with gradient; needed for entropy_coef, else only a statistic.
        ref_logp: [..., T], nats, a constant; needed for kl_coef, else only a statistic.
        **options: the fields of ``PolicyOptions``.

    Returns:
        (loss, PolicyStats): float32 0-dim (float64 in, float64 out), to be minimised.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    importance_weights = under_old_name(importance_weights, options)
    check.floating("logp", logp)
    check.at_least_1d("logp", logp)
    tensors = {"old_logp": old_logp, "advantages": advantages}
    optional = {
        "importance_weights": importance_weights, "entropy": entropy, "ref_logp": ref_logp,
    }  # fmt: skip
    tensors |= {name: x for name, x in optional.items() if x is not None}
    for name, x in tensors.items():
        check.like(name, x, "logp", logp)
    check.boolean_mask(mask, "logp", logp)
    dtype = check.accumulator(logp, *tensors.values())
    chosen, values = checked_options(dtype, options, ref_logp)
    if chosen.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {chosen.entropy_coef} needs entropy, which is None")

    total, stats, _, _ = KERNEL(
        check.flat(logp, dtype),
        check.constant(old_logp, dtype),
        check.constant(advantages, dtype),
        check.flat(mask),
        None if importance_weights is None else check.constant(importance_weights, dtype),
        check.flat(entropy, dtype),
        None if ref_logp is None else check.constant(ref_logp, dtype),
        aggregate.checked(chosen.aggregation, normalizer, mask, dtype),
        *values,
    )
    return total, PolicyStats(*stats.unbind())


def under_old_name(importance_weights: Tensor | None, options: dict[str, Any]) -> Tensor | None:
    """importance_weights, which was called weights in 0.1."""
    if "weights" not in options:
        return importance_weights
    warnings.warn("weights is now importance_weights", DeprecationWarning, stacklevel=3)
    old: Tensor | None = options.pop("weights")
    return old


def checked_options(
    dtype: torch.dtype, options: dict[str, Any], ref_logp: Tensor | None
) -> tuple[PolicyOptions, tuple[Any, ...]]:
    """PolicyOptions.checked, as policy_loss and linear_policy_loss need them."""
    chosen, values = PolicyOptions.checked(dtype, options)
    if chosen.kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef {chosen.kl_coef} needs ref_logp, which is None")
    return chosen, values


def reference(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logp: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    o = PolicyOptions(**options)
    dtype = check.accumulator(logp, old_logp, advantages, importance_weights, entropy, ref_logp)

    def kept(x: Tensor) -> Tensor:
        return x.to(dtype).masked_fill(~mask, 0.0)

    def mean(x: Tensor) -> Tensor:
        return aggregate.masked_means(mask, x)[0].detach()

    def total(x: Tensor) -> Tensor:
        return aggregate.reference(x, mask, o.aggregation, normalizer)

    logp, old_logp, A = kept(logp), kept(old_logp), kept(advantages)
    token_log_ratio = log_ratio = logp - old_logp
    low, high = clipped_tokens(logp, old_logp, A, o)
    if o.loss == "gmpo":
        log_ratio = bounded_log_ratio(log_ratio, A, o)
    if o.ratio != "token":
        log_ratio = row_means(log_ratio, mask)
    if o.ratio == "sequence_token":  # plus 0, which has the token's own gradient
        own = torch.where(logp.isfinite(), logp - logp.detach(), 0.0)
        log_ratio = log_ratio.detach() + own
    rho = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    held = rho if o.delta is None else rho.clamp(max=o.delta)
    bounded = rho.clamp(1 - o.clip_low, 1 + o.clip_high)
    dual = torch.zeros_like(mask)
    if o.loss == "ppo":
        taken = worse(held, bounded, A)
        low, high = (A < 0) & (taken > rho), (A > 0) & (taken < rho)
        if o.dual_clip is not None:
            taken = torch.where(A < 0, taken.clamp(max=o.dual_clip), taken)
        dual = (A < 0) & (taken < rho)
        surrogate = -A * taken
    elif o.loss == "sapo":
        tau = torch.full_like(A, o.sapo_tau_neg).masked_fill(A > 0, o.sapo_tau_pos)
        surrogate = -A * torch.sigmoid(tau * (rho - 1)) * 4 / tau
    elif o.loss == "gmpo":
        surrogate = -A * rho
    else:  # log-probs, weighted by a constant
        weight = torch.ones_like(rho)
        if o.loss == "cispo":
            weight, low, high = bounded, bounded > rho, bounded < rho
        elif o.loss == "vespo":
            weight = gamma_weights(token_log_ratio, A, mask, o)
        elif o.loss != "reinforce":
            dual = (held < rho) & ~(low | high)
            weight = held.masked_fill(low | high, 0.0)
        surrogate = aggregate.times(-A * weight.detach(), logp)
    if importance_weights is not None:
        surrogate = aggregate.times(kept(importance_weights), surrogate)
    zero = torch.zeros_like(rho)
    entropy = zero if entropy is None else kept(entropy)
    kl = zero
    if ref_logp is not None:
        kl = token_kl.estimate(logp - kept(ref_logp), o.kl_estimator)
        if o.unbiased_kl:
            kl = token_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * kl
    stats = PolicyStats(
        surrogate=total(surrogate).detach(),
        entropy=mean(entropy),
        ref_kl=mean(kl),
        clipfrac=mean((low | high).to(dtype)),
        dual_clipfrac=mean(dual.to(dtype)),
        ratio_mean=mean(rho),
        ratio_var=aggregate.masked_variance(mask, rho).detach(),
        ratio_max=kept(rho).amax().detach() if mask.numel() else zero.new_zeros(()),
        old_kl_k1=mean(-token_log_ratio),
        old_kl_k2=mean(0.5 * token_log_ratio**2),
        old_kl_k3=mean(_k3(token_log_ratio)),
        clipfrac_low=mean(low.to(dtype)),
        clipfrac_high=mean(high.to(dtype)),
        tokens=mask.sum().to(dtype),
    )
    loss = surrogate
    if o.entropy_coef:  # 0·∞ is 0 here
        loss = loss - o.entropy_coef * entropy
    if o.kl_coef:
        loss = loss + o.kl_coef * kl
    return total(loss), stats


def _k3(log_ratio: Tensor) -> Tensor:
    """ρ − 1 − log ρ, beyond log-ratios of ±20 as its tangent there, which no ratio overflows."""
    near = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rise = torch.expm1(near)
    return (rise - near) + aggregate.times(rise, log_ratio - near)


def worse(held: Tensor, bounded: Tensor, A: Tensor) -> Tensor:
    """The ratio with the larger loss. Ratios are compared, not their products with A: those are
    rounded apart even where the ratios are the same, inside the clip."""
    return torch.where(A < 0, torch.maximum(held, bounded), torch.minimum(held, bounded))


def sides(cut: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(those of negative advantage, which a lower bound cuts; the others) of the tokens cut."""
    return cut & (A < 0), cut & ~(A < 0)


def bounded_log_ratio(log_ratio: Tensor, A: Tensor, o: PolicyOptions) -> Tensor:
    """gmpo's: bounded on the side that the sign of A names."""
    return torch.where(A < 0, log_ratio.clamp(min=-o.clip_low), log_ratio.clamp(max=o.clip_high))


def clipped_tokens(
    logp: Tensor, old_logp: Tensor, A: Tensor, o: PolicyOptions
) -> tuple[Tensor, Tensor]:
    """(below, above): the tokens without a gradient whatever their row's ratio is, of gmpo and
    dppo."""
    if o.loss == "gmpo":
        log_ratio = logp - old_logp
        return sides(bounded_log_ratio(log_ratio, A, o) != log_ratio, A)
    p, old = logp.exp(), old_logp.exp()
    if o.loss == "dppo_tv":
        return (A <= 0) & (p - old < -o.clip_low), (A > 0) & (p - old > o.clip_high)
    if o.loss == "dppo_kl":  # of the two events: this token, any other
        rest, old_rest = (-torch.expm1(x).clamp(max=0) for x in (logp, old_logp))
        kl = old_rest * ((old_rest + TINY) / (rest + TINY)).log()
        kl = kl + aggregate.times(old, old_logp - logp)
        return (A <= 0) & (kl > o.clip_low) & (p < old), (A > 0) & (kl > o.clip_high) & (p > old)
    return torch.zeros_like(A, dtype=torch.bool), torch.zeros_like(A, dtype=torch.bool)


def gamma_weights(log_ratio: Tensor, A: Tensor, mask: Tensor, o: PolicyOptions) -> Tensor:
    """vespo's weights: e^λ w^k e^(−λw) of the row's w = π/π_old, held within [1e-8, e^20]."""
    k = torch.full_like(A, o.vespo_k_pos).masked_fill(A < 0, o.vespo_k_neg)
    decay = torch.full_like(A, o.vespo_lambda_pos).masked_fill(A < 0, o.vespo_lambda_neg)
    log_w = log_ratio.masked_fill(~mask, 0.0).sum(-1, keepdim=True)
    log_w = log_w.clamp(math.log(TINY), MAX_LOG_RATIO)
    return (decay + k * log_w - decay * log_w.exp()).exp()


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """Each row's mean over its counting tokens, at every token; 0 where none counts."""
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    return (x.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / n).expand_as(x)


def _forward(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    importance_weights: Tensor | None,
    entropy: Tensor | None,
    ref_logp: Tensor | None,
    normalizer: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats [14], dloss/dlogp [B, T], dloss/dentropy [B, T] or empty)."""
    o = PolicyOptions(*options)
    total, stats = reference(
        logp, old_logp, advantages, mask, normalizer=normalizer,
        importance_weights=importance_weights, entropy=entropy, ref_logp=ref_logp, **vars(o),
    )  # fmt: skip
    c = aggregate.coefficients(mask, o.aggregation, normalizer, logp.dtype).unsqueeze(-1)
    A, log_ratio = advantages, logp - old_logp
    token_log_ratio, own_row = log_ratio, o.ratio == "sequence"
    low, high = clipped_tokens(logp, old_logp, A, o)
    if o.loss == "gmpo":
        log_ratio = bounded_log_ratio(log_ratio, A, o)
    if o.ratio != "token":
        log_ratio = row_means(log_ratio, mask)
    rho = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    moves = log_ratio.abs() <= MAX_LOG_RATIO
    held = rho if o.delta is None else rho.clamp(max=o.delta)
    bounded = rho.clamp(1 - o.clip_low, 1 + o.clip_high)
    if o.loss == "ppo":
        taken = worse(held, bounded, A)
        stopped = (A != 0) & ~A.isnan() & ((taken > rho) | (taken < rho))
        if o.dual_clip is not None:
            stopped |= (A < 0) & (rho > o.dual_clip)
        d_logp = (-A * rho).masked_fill(stopped | ~moves, 0.0)
    elif o.loss == "sapo":
        tau = torch.full_like(A, o.sapo_tau_neg).masked_fill(A > 0, o.sapo_tau_pos)
        gate = torch.sigmoid(tau * (rho - 1))
        d_logp = torch.where(moves, -A * rho * 4 * gate * (1 - gate), 0.0)
    elif o.loss == "gmpo":
        d_logp = torch.where(moves, -A * rho, 0.0)
    else:
        own_row, weight = False, torch.ones_like(rho)
        if o.loss == "cispo":
            weight = bounded
        elif o.loss == "vespo":
            weight = gamma_weights(token_log_ratio, A, mask, o)
        elif o.loss != "reinforce":
            weight = held.masked_fill(low | high, 0.0)
        d_logp = -A * weight
    if importance_weights is not None:
        d_logp = aggregate.times(importance_weights, d_logp)
    if own_row:  # each logp moves the ratio of the whole row
        d_logp = row_means(d_logp, mask)
    if o.loss == "gmpo":
        d_logp = d_logp.masked_fill(low | high, 0.0)
    if ref_logp is not None and o.kl_coef:
        d_kl = token_kl.slope(logp - ref_logp, o.kl_estimator)
        if o.unbiased_kl:
            near = token_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            kl = token_kl.estimate(logp - ref_logp, o.kl_estimator)
            d_kl = near.exp() * (d_kl + torch.where(near == token_log_ratio, kl, 0.0))
        d_logp = d_logp + o.kl_coef * d_kl
    d_logp = aggregate.times(c, d_logp).masked_fill(~mask, 0.0)
    if entropy is None:
        return total, torch.stack(stats), d_logp, logp.new_empty(0)
    d_entropy = (-o.entropy_coef * c).expand_as(logp).masked_fill(~mask, 0.0)
    return total, torch.stack(stats), d_logp, d_entropy


def _fake(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    importance_weights: Tensor | None,
    entropy: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_entropy = logp.new_empty(0) if entropy is None else torch.empty_like(logp)
    stats = logp.new_empty(len(PolicyStats._fields))
    return logp.new_empty(()), stats, torch.empty_like(logp), d_entropy


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, d_logp, d_entropy = output
    ctx.mark_non_differentiable(stats, d_logp, d_entropy)
    ctx.save_for_backward(d_logp, d_entropy)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> Any:
    d_logp, d_entropy = ctx.saved_tensors
    nothing = (None,) * (len(ctx.needs_input_grad) - 6)
    entropy = grad * d_entropy if ctx.needs_input_grad[5] else None
    return grad * d_logp, None, None, None, None, entropy, *nothing


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(b: int, t: int, spread: float = 0.3, **options: Any) -> dict[str, Any]:
        logp = -torch.rand(b, t, generator=generator)
        return {
            "logp": logp,
            "old_logp": logp + spread * torch.randn(b, t, generator=generator),
            "advantages": torch.randn(b, t, generator=generator),
            "mask": torch.rand(b, t, generator=generator) > 0.3,
        } | options

    def extra(b: int, t: int) -> dict[str, Any]:
        return {
            "importance_weights": torch.rand(b, t, generator=generator) + 0.5,
            "entropy": torch.rand(b, t, generator=generator),
            "ref_logp": -torch.rand(b, t, generator=generator),
            "entropy_coef": 0.01,
            "kl_coef": 0.1,
        }

    one, both = ("logp",), ("logp", "entropy")
    for mode in aggregate.AGGREGATIONS:
        x = draw(5, 37, aggregation=mode)
        x["mask"][2] = False
        yield Sample(mode, x, one)
        counted = draw(5, 37, aggregation=mode, normalizer=33.5)
        yield Sample(f"{mode}, normalizer", counted, one)
        yield Sample(f"{mode}, everything", draw(6, 21, aggregation=mode) | extra(6, 21), both)
    for estimator in token_kl.ESTIMATORS:
        terms = draw(3, 50, kl_estimator=estimator) | extra(3, 50)
        yield Sample(estimator, terms, both)
    clips = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}
    yield Sample("asymmetric, dual clip", draw(4, 64, spread=1.0, **clips), one)
    yield Sample("ratio beyond the clamp", draw(4, 40, spread=30.0), one)
    yield Sample("ratio beyond the clamp, dual clip", draw(4, 40, spread=30.0, dual_clip=3.0), one)
    for loss in ("cispo", "reinforce", "sapo"):
        name = "ratio beyond the clamp, " + loss
        yield Sample(loss, draw(4, 37, loss=loss), one)
        yield Sample(f"{loss}, everything", draw(6, 21, loss=loss) | extra(6, 21), both)
        yield Sample(name, draw(4, 40, spread=30.0, loss=loss), one)
    cispo: dict[str, Any] = {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.1}
    yield Sample("cispo, clipped above only", draw(5, 33, spread=1.0, **cispo), one)
    below: dict[str, Any] = {
        "loss": "cispo",
        "clip_low": 0.5,
        "clip_high": -0.2,
    }  # a masked ratio of 1 is beyond
    yield Sample("cispo, clipped below 1", draw(5, 33, **below), one)
    yield Sample("cispo, sequence", draw(5, 33, ratio="sequence", **cispo) | extra(5, 33), both)
    for mode in aggregate.AGGREGATIONS:  # a narrow clip: some rows are cut, some are not
        narrow: dict[str, Any] = {"clip_low": 0.01, "clip_high": 0.02, "aggregation": mode}
        x = draw(6, 21, ratio="sequence", **narrow) | extra(6, 21)
        x["mask"][2] = False
        yield Sample(f"sequence, {mode}, everything", x, both)
    yield Sample("sequence", draw(5, 37, ratio="sequence"), one)
    dual = {"ratio": "sequence", "dual_clip": 1.05}
    yield Sample("sequence, dual clip", draw(7, 25, spread=1.0, **dual), one)
    x = draw(4, 40, spread=10.0, ratio="sequence")
    x["logp"] = x["logp"] + torch.tensor([[25.0], [-25.0], [0.0], [1.0]])
    yield Sample("sequence, ratio beyond the clamp", x, one)
    # Of ratios below 1 no statistic is so large that its rounding hides another's error.
    x = draw(4, 40, spread=0.0, ratio="sequence")
    x["logp"] = x["old_logp"] - 80 * torch.rand(4, 40, generator=generator)
    yield Sample("sequence, ratio far below the clamp", x, one)
    one_value = "sequence_token"
    x = draw(6, 21, ratio=one_value, clip_low=0.01, clip_high=0.02) | extra(6, 21)
    yield Sample("sequence_token, everything", x, both)
    x = draw(4, 40, spread=10.0, ratio=one_value, dual_clip=1.2)
    x["logp"] = x["logp"] + torch.tensor([[25.0], [-25.0], [0.5], [1.0]])
    yield Sample("sequence_token, ratio beyond the clamp, dual clip", x, one)
    yield Sample("delta below the clip", draw(4, 64, spread=1.0, delta=1.1, dual_clip=2.0), one)
    for delta in (1.03, 1.5):
        rows: dict[str, Any] = {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.1}
        x = draw(9, 21, 0.01, delta=delta, **rows)
        x["logp"] = x["logp"] + torch.linspace(-0.2, 0.5, 9)[:, None]  # on each side of each bound
        yield Sample(f"sequence, delta {delta}", x, one)
    sapo = draw(4, 64, spread=1.0, loss="sapo", sapo_tau_pos=5.0, sapo_tau_neg=0.3)
    yield Sample("sapo, other temperatures", sapo, one)
    for loss, delta in (("dppo_tv", 1.5), ("dppo_kl", 0.9)):  # a masked ratio of 1 is above
        x = draw(6, 40, spread=1.0, loss=loss, clip_low=0.1, clip_high=0.2, delta=delta)
        x["old_logp"] = x["old_logp"].clamp(max=0)
        x["logp"][:, ::5], x["old_logp"][:, ::7] = 0.0, -30.0  # certain; almost impossible
        yield Sample(f"{loss}, everything", x | extra(6, 40), both)
    x = draw(6, 21, ratio="sequence", loss="gmpo") | extra(6, 21)
    yield Sample("gmpo, everything", x, both)
    x = draw(4, 40, spread=10.0, ratio="sequence", loss="gmpo", clip_low=0.1, clip_high=0.4)
    x["logp"] = x["logp"] + torch.tensor([[25.0], [-25.0], [0.0], [1.0]])
    yield Sample("gmpo, ratio beyond the clamp", x, one)
    x = draw(6, 21, spread=0.1, ratio="sequence", loss="vespo") | extra(6, 21)
    yield Sample("vespo, everything", x, both)
    other = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.0}
    x = draw(4, 40, spread=0.1, ratio="sequence", loss="vespo", vespo_lambda_neg=1.0, **other)
    x["logp"] = x["logp"] + torch.tensor([[25.0], [-25.0], [0.1], [-0.1]])
    yield Sample("vespo, ratio beyond its bounds", x, one)
    x = draw(3, 50, kl_estimator="k3", unbiased_kl=True, ratio="sequence") | extra(3, 50)
    x["old_logp"][:, ::5] += 50.0
    yield Sample("unbiased KL, everything", x, both)
    yield Sample("normalizer tensor", draw(4, 9, normalizer=torch.tensor(12.0)), one)
    yield Sample("1-D", {k: v[0] for k, v in draw(1, 23).items()}, one)
    garbage = draw(3, 30) | extra(3, 30)
    for name in ("logp", "old_logp", "advantages", "importance_weights", "entropy", "ref_logp"):
        garbage[name] = garbage[name].masked_fill(~garbage["mask"], torch.nan)
    yield Sample("NaN behind the mask", garbage, both)
    masked = draw(3, 10)
    masked["mask"][:] = False
    yield Sample("all masked", masked, one)
    yield Sample("no tokens", draw(3, 0), one)
    yield Sample("no rows", draw(0, 3), one)


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    size = (shape["B"], shape["T"])
    logp = -torch.rand(size, generator=generator, device=device)
    noise = torch.randn(size, generator=generator, device=device)
    arguments = {
        "logp": logp,
        "old_logp": logp + 0.1 * noise,
        "advantages": torch.randn(size, generator=generator, device=device),
        "mask": torch.rand(size, generator=generator, device=device) > 0.1,
    }
    return Sample("bench", arguments, ("logp",))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    n = shape["B"] * shape["T"]
    return n * (4 * 4 + 1), 2 * n * 4


KERNEL = define_kernel(
    "policy_loss(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, "
    "Tensor? importance_weights, Tensor? entropy, Tensor? ref_logp, Tensor? normalizer, "
    f"{PolicyOptions.schema()}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_fake,
    triton="policy_loss:policy_loss",
    backward=_autograd,
    setup_context=_setup_context,
)
register(
    Op(
        "policy_loss",
        policy_loss,
        reference,
        (KERNEL,),
        samples,
        workload,
        ({"B": 64, "T": 1024}, {"B": 24, "T": 16}),
        bytes_moved,
    )
)
