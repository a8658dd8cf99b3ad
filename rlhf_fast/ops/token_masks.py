"""Which tokens keep their policy gradient, where that is decided over a whole batch.

Each function gives a mask for the surrogate alone: as ``importance_weights`` (``.float()``, times
others that there are) the tokens that it leaves out keep their entropy and KL terms and their place
in the count, as in TRL.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import check
from .policy_loss import row_means


def top_entropy_mask(
    entropy: Tensor, mask: Tensor, share: float, *, all_entropies: Tensor | None = None
) -> Tensor:
    """The counting tokens whose entropy is in the top share of the batch.

    Those of at least the (1 − share)-quantile, which lies between two entropies in proportion, as
    TRL's ``top_entropy_quantile``. Wang et al., arXiv:2506.01939, eq. 5, who recommend 0.2.

    The quantile is of what is given. Where the batch lies in several calls or processes, the caller
    gathers the entropies of all its counting tokens (``torch.distributed.all_gather_object``, or
    padded with a number that is taken out again) and gives them as ``all_entropies``. Plain
    PyTorch; how many there are is read on the host, a sync on a GPU.

    Args:
        entropy: [..., T], nats; a constant.
        mask: [..., T] bool, True = counts. Masked positions may hold anything.
        share: 0 to 1. 1: every counting token; 0: those of the largest entropy.
        all_entropies: [N], nats, of the whole batch's counting tokens; None: this call's own.

    Returns:
        [..., T] bool, False where masked.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("entropy", entropy)
    check.boolean_mask(mask, "entropy", entropy)
    if all_entropies is None:
        all_entropies = entropy[mask]
    check.floating("all_entropies", all_entropies)
    dtype = check.accumulator(entropy, all_entropies)
    check.number("share", share, low=0.0, high=1.0, dtype=dtype)
    check.shaped("all_entropies", all_entropies, [all_entropies.numel()], "[N]")
    check.same_device("all_entropies", all_entropies, "entropy", entropy)
    n = all_entropies.numel()
    if n == 0:
        return torch.zeros_like(mask)
    place = (1 - share) * (n - 1)
    below, above = (
        all_entropies.detach().to(dtype).kthvalue(k + 1).values
        for k in (math.floor(place), math.ceil(place))
    )
    return mask & (entropy.detach().to(dtype) >= torch.lerp(below, above, place % 1))


def off_policy_mask(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """Off-policy sequence masking: without the negative advantages of rows that have moved away.

    A counting token of A < 0 is left out where its row's mean of old_logp − logp is above the
    threshold. DeepSeek-V3.2, arXiv:2512.02556, eq. 9; TRL's ``off_policy_mask_threshold``. Each
    row is decided by itself: nothing is to be gathered.

    Args:
        logp: [..., T], nats, of the policy that learns; a constant here.
        old_logp: [..., T], nats, as the tokens were sampled: the rollout engine's where they are
            known, so that its mismatch counts.
        advantages: [..., T].
        mask: [..., T] bool, True = counts. Masked positions may hold anything.
        threshold: nats a token, at least 0.

    Returns:
        [..., T] bool, False where masked.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("logp", logp)
    check.at_least_1d("logp", logp)
    check.like("old_logp", old_logp, "logp", logp)
    check.like("advantages", advantages, "logp", logp)
    check.boolean_mask(mask, "logp", logp)
    dtype = check.accumulator(logp, old_logp)
    check.number("threshold", threshold, low=0.0, dtype=dtype)
    moved = row_means(old_logp.detach().to(dtype) - logp.detach().to(dtype), mask)
    return mask & ((advantages >= 0) | (moved <= threshold))


def covariance_mask(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clip-Cov: without a few of the tokens whose update would cost the most entropy.

    (A − mean A)·(log π − mean log π), means over the counting tokens, is what a token adds to the
    covariance that entropy falls by. Of those strictly between low and high that PPO's clip leaves
    a gradient, max(1, ⌊share · counting tokens⌋) are drawn and left out. Cui et al.,
    arXiv:2505.22617, eq. 11; verl's ``clip_cov``. Plain PyTorch; how many there are is read on the
    host, a sync on a GPU. Means and draws are of what is given: a batch in several calls draws in
    each.

    Args:
        logp: [..., T], nats, of the policy that learns; a constant here.
        old_logp: [..., T], nats, of the policy that the ratio is taken to.
        advantages: [..., T].
        mask: [..., T] bool, True = counts. Masked positions may hold anything.
        share: of the counting tokens, above 0.
        low, high: bounds of the covariance; low must be below high.
        clip_low, clip_high: the loss's own, ≥ 0: what it clips is not drawn.
        generator: on the tensors' device; None: torch's own.

    Returns:
        [..., T] bool, False where masked.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("logp", logp)
    check.at_least_1d("logp", logp)
    check.like("old_logp", old_logp, "logp", logp)
    check.like("advantages", advantages, "logp", logp)
    check.boolean_mask(mask, "logp", logp)
    dtype = check.accumulator(logp, old_logp)
    check.number("share", share, above=0.0, high=1.0, dtype=dtype)
    check.number("low", low, dtype=dtype)
    check.number("high", high, above=low, dtype=dtype)
    check.number("clip_low", clip_low, low=0.0, dtype=dtype)
    check.number("clip_high", clip_high, low=0.0, dtype=dtype)
    at = mask.nonzero(as_tuple=True)
    new, old, gain = (x.detach()[at].to(dtype) for x in (logp, old_logp, advantages))
    ratio = (new - old).exp()
    clipped = torch.where(gain > 0, ratio > 1 + clip_high, ratio < 1 - clip_low) & (gain != 0)
    added = (gain - gain.mean()) * (new - new.mean())
    candidates = ((added > low) & (added < high) & ~clipped).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=generator, device=logp.device)
    drawn = candidates[order[: max(1, int(share * len(new)))]]
    kept = torch.ones_like(clipped)
    kept[drawn] = False
    return torch.zeros_like(mask).index_put(at, kept)
