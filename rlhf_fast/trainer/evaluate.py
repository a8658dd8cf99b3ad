"""Held-out prompts, answered before and after training."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from statistics import fmean

import torch
from transformers import set_seed

from rlhf_fast import (
    token_kl,
)
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.rows import Prompt
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.measure import (
    measure,
    read_answers,
    sample_answers,
    score_all,
    slices,
)
from rlhf_fast.trainer.metrics import masked_sum
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.rewards.scorers import Scorer


def evaluate(
    policy: Policy,
    prompts: list[Prompt],
    reward: Scorer,
    judge: Scorer | None,
    config: PPOConfig,
    workers: Workers,
) -> dict[str, list]:
    """Answers to held-out prompts with score, judge's score, KL, length in tokens and why they end
    (stop: by a stop token; length: at max_new_tokens); the same draws each time, and our own
    decoding, so that they can be compared whatever the rollout engine is.

    Every process does the same, since the model may be sharded over all; the main one's scores
    count.
    """
    result: dict[str, list] = defaultdict(list)
    set_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    for rows in slices(len(prompts), config.batch_size):
        batch = prompts[rows]
        with workers.together():
            rollout = sample_answers(policy, batch, config, generator)
        texts = read_answers(policy, rollout, batch, config)
        measured = measure(policy, rollout, config)
        result["prompt"] += [prompt.prompt for prompt in batch]
        result["answer"] += [str(text) for text in texts]
        scored = workers.main_only(partial(score_all, reward, judge, batch, texts))
        result["score"] += scored["scores"].tolist()
        if judge is not None:
            result["judge"] += scored["judge"].tolist()
        kl = token_kl(measured.logp, measured.ref_logp, "k1")
        result["kl"] += masked_sum(kl, rollout.mask).tolist()
        result["length"] += rollout.mask.sum(-1).tolist()
        result["stop_reason"] += ["stop" if ended else "length" for ended in rollout.ended.tolist()]
    return dict(result)


def summarise(before: dict, after: dict) -> dict[str, float]:
    summary = {"score_before": mean_of(before["score"]), "score_after": mean_of(after["score"])}
    summary["score_rise"] = summary["score_after"] - summary["score_before"]
    if "judge" in before:
        summary["judge_before"] = mean_of(before["judge"])
        summary["judge_after"] = mean_of(after["judge"])
    return summary | {"kl": fmean(after["kl"])}


def mean_of(scores: list[float]) -> float:
    """Without those that were lost."""
    return fmean([score for score in scores if not math.isnan(score)] or [math.nan])
