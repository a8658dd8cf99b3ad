"""What the passes of a step learn from, and how they are cut into updates and parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.measure import (
    Measured,
)
from rlhf_fast.trainer.rollout.sample import (
    Rollout,
)


@dataclass
class Batch:
    """B answers of at most T tokens, with all that is constant while they are learnt from."""

    rollout: Rollout
    old: Measured  # log-probs and values that the passes begin with
    advantages: Tensor  # [B, T]
    returns: Tensor | None  # [B, T]; None without a critic
    corrections: Tensor | None  # [B, T]: weights of the tokens, for how they were sampled

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True = a token of the answer."""
        return self.rollout.mask


def corrections(rollout: Rollout, old: Measured, config: PPOConfig) -> Tensor | None:
    """min(π_old/π_rollout, tis_cap) [B, T]: truncated importance sampling."""
    if config.tis_cap is None:
        return None
    return (old.logp - rollout.logp).exp().clamp(max=config.tis_cap)


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
    tokens = mask.sum()
    if config.aggregation == "token-mean":
        return tokens, tokens
    if config.aggregation == "token-sum":
        return tokens, torch.full_like(tokens, len(mask) * config.max_new_tokens)
    return tokens, mask.any(-1).sum()
