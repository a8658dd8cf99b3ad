"""VAPO's imitation of right answers (arXiv:2504.05118)."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast import linear_token_logprobs
from rlhf_fast.trainer.batch import Batch
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.models.logits import logit_divisor, softcap
from rlhf_fast.trainer.models.policy import Policy


def positive_nll(
    policy: Policy,
    hidden: Tensor,
    batch: Batch,
    rows: Tensor,
    mask: Tensor,
    minibatch: Tensor,
    config: PPOConfig,
) -> Tensor:
    """positive_nll_coef · Σ −log π of the right answers' tokens / their number in the minibatch.

    hidden [b, T, H], mask [b, T]: of the rows; right answers are those that score above 0. Only
    their tokens go through the head.
    """
    right = batch.right[:, None] & batch.mask
    counted = right[rows] & mask
    logp = linear_token_logprobs(
        hidden, policy.head.weight, batch.rollout.labels[rows].masked_fill(~counted, -100),
        temperature=config.temperature * logit_divisor(policy.model),
        softcap=softcap(policy.model), bias=policy.head.bias,
        support=None if batch.rollout.support is None else batch.rollout.support[rows],
    )  # fmt: skip
    tokens = right[minibatch].sum().clamp(min=1)
    return -config.positive_nll_coef * logp.masked_fill(~counted, 0.0).sum() / tokens
