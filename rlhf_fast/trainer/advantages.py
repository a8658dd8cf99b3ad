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


def shaped(scores: Tensor, ended: Tensor, lengths: Tensor, config: PPOConfig) -> Tensor:
    """Scores [B] as they are learnt from: clipped, and changed where an answer did not end or came
    near its longest."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_score is not None:
        scores = scores.where(ended, config.missing_eos_score)
    else:
        scores = scores - config.eos_penalty * (~ended).float()
    if config.overlong_cache is not None:  # DAPO, arXiv:2503.14476, eq. 13
        left = (config.max_new_tokens - lengths) / config.overlong_cache
        scores = scores + (left - 1).clamp(-1.0, 0.0)
    return scores


def estimate(
    scores: Tensor,
    old: Measured,
    mask: Tensor,
    beta: float,
    config: PPOConfig,
    learnt: Tensor | None = None,
    baseline: Tensor | None = None,
    kept: Tensor | None = None,
    earned: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(advantages [B, T], returns [B, T], or None without a critic).

    learnt: the tokens of mask that are learnt from, if these are not all; baseline [B]: ReMax's;
    kept [B]: the answers that have a score, if these are not all; earned [B, T]: what an
    environment gave for turns on the way, a part of the scores that belongs to those tokens.
    """
    learnt = mask if learnt is None else learnt
    beta = beta if config.kl_in == "reward" else 0.0
    returns = None
    if config.estimator in GROUPED:
        kl = masked_sum(token_kl(old.logp, old.ref_logp, config.kl_estimator), mask)
        lengths = mask.sum(-1) if config.estimator == "opo" else None
        advantages = of_groups(scores - times(beta, kl), kept, config, config.estimator, lengths)
        advantages = advantages[:, None].expand(mask.shape)
    else:
        if config.estimator == "reinforce_baseline":
            scores = of_groups(scores, kept, config, "dr_grpo")
        elif baseline is not None:
            scores = scores - baseline
        if earned is not None:
            earned = config.weight_of("environment") * earned.masked_fill(~mask, 0.0)
            scores = scores - earned.sum(1)
        rewards = kl_penalized_rewards(
            scores, old.logp, old.ref_logp, mask, beta=beta, estimator=config.kl_estimator
        )
        if earned is not None:
            rewards = rewards + earned
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        if config.estimator == "gae":
            # Returns come before whitening: the critic learns the rewards' own scale.
            advantages, returns = by_critic(rewards, old.values, mask, config)
        else:  # the rewards to go, which are GAE at λ = 1 without values
            zeros = torch.zeros_like(rewards)
            advantages, _ = gae(rewards, zeros, mask, gamma=config.gamma, lam=1.0)
    if config.whitens_advantages:
        advantages = masked_whiten(advantages, learnt)
    return advantages, returns


def of_groups(
    scores: Tensor,
    kept: Tensor | None,
    config: PPOConfig,
    method: str,
    lengths: Tensor | None = None,
) -> Tensor:
    """[B] group advantages, each group without the answers that have no score; one that is left
    alone has nothing to be compared with."""
    size = config.samples_per_prompt
    if kept is None or kept.all():
        return group_advantages(scores, size, method=method, lengths=lengths)
    advantages = torch.zeros_like(scores)
    for group in torch.arange(len(scores), device=scores.device).split(size):
        rows = group[kept[group]]
        if len(rows) > 1:
            others = None if lengths is None else lengths[rows]
            advantages[rows] = group_advantages(
                scores[rows], len(rows), method=method, lengths=others
            )
    return advantages


def by_critic(
    rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each with its own λ (VAPO, arXiv:2504.05118)."""
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    if config.lam_critic is not None:
        _, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam_critic)
    if config.lam_length_alpha is not None:
        lengths = mask.sum(-1)
        for length in set(lengths.tolist()) - {0}:
            rows, lam = lengths == length, max(0.0, 1 - 1 / (config.lam_length_alpha * length))
            advantages[rows], _ = gae(
                rewards[rows], values[rows], mask[rows], gamma=config.gamma, lam=lam
            )
    return advantages, returns
