"""What the passes of a step learn from, and how they are cut into updates and parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import RolloutStats, rollout_correction, top_entropy_mask
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.measure import (
    Measured,
)
from rlhf_fast.trainer.rollout.sample import (
    Rollout,
)


class Corrections(NamedTuple):
    """For how the answers were sampled, and for what of them is to steer the policy."""

    weights: Tensor | None  # [B, T]: of the tokens' surrogates; None: 1 each
    mask: Tensor  # [B, T] bool: the answers' tokens that are learnt from
    stats: RolloutStats


@dataclass
class Batch:
    """B answers of at most T tokens, with all that is constant while they are learnt from."""

    rollout: Rollout
    old: Measured  # log-probs and values that the passes begin with
    advantages: Tensor  # [B, T]
    returns: Tensor | None  # [B, T]; None without a critic
    corrections: Corrections
    right: Tensor | None = None  # [B] bool: scored above 0, which positive_nll_coef imitates

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True = a token that is learnt from."""
        return self.corrections.mask


def corrections(rollout: Rollout, old: Measured, config: PPOConfig) -> Corrections:
    """Of the whole batch, which every process has: its statistics are those of all of them."""
    options = config.correction
    weights, mask, stats = rollout_correction(old.logp, rollout.logp, rollout.mask, **options)
    share = config.top_entropy_quantile
    if share < 1:
        weights = weights * top_entropy_mask(old.entropy, mask, share)
    return Corrections(weights if options["mode"] or share < 1 else None, mask, stats)


def minibatches(size: int, config: PPOConfig, generator: torch.Generator) -> list[Tensor]:
    """Rows of every minibatch of a step: each pass covers the batch, in an order of its own."""
    passes = (torch.randperm(size, generator=generator) for _ in range(config.epochs))
    return [rows for order in passes for rows in order.chunk(config.minibatches)]


def parts(rows: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Rows of every forward pass; none where a process has no share of a small minibatch."""
    return rows.split(size or len(rows)) if len(rows) else ()


def counts(mask: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """(tokens of a whole minibatch, what its policy losses are divided by): 0-dim.

    They are those of all micro-batches and processes together, so the parts' gradients add up.
    """
    tokens = mask.sum().clamp(min=1)  # all answers may have been rejected: a loss of 0
    if config.aggregation == "token-mean":
        return tokens, tokens
    if config.aggregation == "token-sum":
        return tokens, torch.full_like(tokens, len(mask) * config.max_new_tokens)
    return tokens, mask.any(-1).sum().clamp(min=1)
