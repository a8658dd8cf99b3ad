"""From scores and the KL they cost to advantages and returns."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import (
    gae,
    group_advantages,
    kl_penalized_rewards,
    masked_whiten,
    token_kl,
)
from rlhf_fast.trainer.config import GROUPED, PPOConfig
from rlhf_fast.trainer.measure import (
    Measured,
)
from rlhf_fast.trainer.metrics import masked_sum, times


def shaped(scores: Tensor, ended: Tensor, config: PPOConfig) -> Tensor:
    """Scores [B] as they are learnt from: clipped, and changed where an answer did not end."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_score is not None:
        return scores.where(ended, config.missing_eos_score)
    return scores - config.eos_penalty * (~ended).float()


def estimate(
    scores: Tensor,
    old: Measured,
    mask: Tensor,
    beta: float,
    config: PPOConfig,
    learnt: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(advantages [B, T], returns [B, T], or None without a critic). learnt: the tokens of mask
    that are learnt from, if these are not all."""
    learnt = mask if learnt is None else learnt
    beta = beta if config.kl_in == "reward" else 0.0
    returns = None
    if config.estimator in GROUPED:
        kl = masked_sum(token_kl(old.logp, old.ref_logp, config.kl_estimator), mask)
        advantages = group_advantages(
            scores - times(beta, kl), config.samples_per_prompt, method=config.estimator
        )
        advantages = advantages[:, None].expand(mask.shape)
    else:
        rewards = kl_penalized_rewards(
            scores, old.logp, old.ref_logp, mask, beta=beta, estimator=config.kl_estimator
        )
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        if config.estimator == "gae":
            # Returns come before whitening: the critic learns the rewards' own scale.
            advantages, returns = gae(rewards, old.values, mask, gamma=config.gamma, lam=config.lam)
        else:  # reinforce: the rewards to go, which are GAE at λ = 1 without values
            zeros = torch.zeros_like(rewards)
            advantages, _ = gae(rewards, zeros, mask, gamma=config.gamma, lam=1.0)
    if config.whitens_advantages:
        advantages = masked_whiten(advantages, learnt)
    return advantages, returns
