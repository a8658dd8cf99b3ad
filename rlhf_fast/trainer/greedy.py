"""ReMax's baseline: what the likeliest answer to a prompt scores (Li et al., arXiv:2310.10505)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.trainer.advantages import shaped
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.rows import Prompt, pad
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.measure import read_answers, score
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.rewards.scorers import Scorer
from rlhf_fast.trainer.rollout.sample import RolloutEngine, Sampling, roll_out


def greedy_scores(
    policy: Policy,
    asked: list[Prompt],
    reward: Scorer,
    config: PPOConfig,
    workers: Workers,
    engine: RolloutEngine | None,
) -> Tensor | None:
    """[B] scores of greedy answers to the prompts, changed as scores are that are learnt from; None
    for other estimators than remax.

    A prompt that follows itself, as in a group, is answered once.
    """
    if config.estimator != "remax":
        return None
    mine = asked[workers.share(len(asked))]
    first = [i for i, prompt in enumerate(mine) if i == 0 or prompt is not mine[i - 1]]
    of = torch.tensor([sum(i <= row for i in first) - 1 for row in range(len(mine))])
    prompts = [mine[i] for i in first]
    device = policy.model.device
    ids, mask = (x.to(device) for x in pad([prompt.ids for prompt in prompts], side="left"))
    draws = torch.zeros(len(prompts), config.max_new_tokens, device=device)
    sampling = Sampling(config.max_new_tokens, 0.0, policy.stop_ids)
    with workers.together(), policy.whole(), policy.precision():
        rollout = roll_out(policy, ids, mask, sampling, draws, engine)
    texts = read_answers(policy, rollout, prompts, config)
    scores = torch.cat(workers.attempt(lambda: score(reward, prompts, texts)[of]))
    ended, lengths = (
        workers.gather(x[of.to(device)]) for x in (rollout.ended, rollout.mask.sum(1))
    )
    return shaped(scores.to(device), ended, lengths, config)
