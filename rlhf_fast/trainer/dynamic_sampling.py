"""Groups whose answers all score the same teach a group's estimator nothing: others take their
place (dynamic sampling: DAPO, arXiv:2503.14476, sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.rows import Prompt
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.measure import (
    Measured,
    gather,
    measure,
    read_answers,
    sample_answers,
    score_all,
)
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.rewards.scorers import Scorer
from rlhf_fast.trainer.rollout.sample import Rollout, RolloutEngine, widen
from rlhf_fast.trainer.run import interrupts


@dataclass
class Sampled:
    """A whole batch of B answers, scored and measured; every process has it."""

    asked: list[Prompt]
    columns: dict[str, Tensor]  # every scorer's scores, each [B]
    rollout: Rollout
    old: Measured
    counts: dict[str, float] = field(default_factory=dict)  # metrics of what was replaced


def without_even_groups(
    sampled: Sampled,
    prompts: list[Prompt],
    policy: Policy,
    reward: Scorer,
    judge: Scorer | None,
    config: PPOConfig,
    workers: Workers,
    generator: torch.Generator,
    engine: RolloutEngine | None,
) -> Sampled:
    """The batch with each group that has no spread of scores replaced, as far as
    dynamic_sampling_rounds further batches go.

    A round samples a whole batch of prompts, so that each process has its equal share. Prompts and
    draws come from the step's generator: a resumed run repeats them.
    """
    groups, rounds, replaced = config.batch_size // config.samples_per_prompt, 0, 0
    while rounds < config.dynamic_sampling_rounds and (bad := even(sampled, config)).any():
        rounds += 1
        order = torch.randperm(len(prompts), generator=generator).tolist()
        asked = [prompts[order[i % len(order)]] for i in range(groups)]
        asked = [prompt for prompt in asked for _ in range(config.samples_per_prompt)]
        further = collect(asked, policy, reward, judge, config, workers, generator, engine)
        good = (~even(further, config)).nonzero().flatten()
        places = bad.nonzero().flatten()[: len(good)]
        chosen = torch.arange(groups)
        chosen[places] = groups + good[: len(places)]
        replaced += len(places)
        sampled = put_together(sampled, further, chosen, config.samples_per_prompt)
    counts = {
        "rollout/rounds": rounds,
        "rollout/groups_replaced": replaced,
        "rollout/groups_without_spread": int(even(sampled, config).sum()),
    }
    return replace(sampled, counts=counts)


def even(sampled: Sampled, config: PPOConfig) -> Tensor:
    """[groups] bool: all answers of the group have the same score, of those that have one."""
    scores = sampled.columns["scores"].cpu().reshape(-1, config.samples_per_prompt)
    lost = scores.isnan()
    low, high = scores.masked_fill(lost, torch.inf), scores.masked_fill(lost, -torch.inf)
    return low.amin(1) >= high.amax(1)


def collect(
    asked: list[Prompt],
    policy: Policy,
    reward: Scorer,
    judge: Scorer | None,
    config: PPOConfig,
    workers: Workers,
    generator: torch.Generator,
    engine: RolloutEngine | None,
) -> Sampled:
    """Answers to a batch of prompts, sampled, scored and measured as the loop does it."""
    mine = workers.share(len(asked))
    try:
        with workers.together():
            rollout = sample_answers(policy, asked, config, generator, share=mine, engine=engine)
        texts = read_answers(policy, rollout, asked[mine], config)
        scored = workers.attempt(score_all, reward, judge, asked[mine], texts)
    except BaseException:
        interrupts.keep_what_was_learnt()
        raise
    columns = {name: torch.cat([part[name] for part in scored]) for name in scored[0]}
    return Sampled(asked, columns, *gather(workers, rollout, measure(policy, rollout, config)))


def put_together(a: Sampled, b: Sampled, chosen: Tensor, size: int) -> Sampled:
    """Groups of `size` answers, chosen [G] among those of a and then of b."""
    prompt = max(a.rollout.prompt_length, b.rollout.prompt_length)
    answer = max(a.rollout.mask.size(1), b.rollout.mask.size(1))
    sets = [x.rollout.support.size(2) for x in (a, b) if x.rollout.support is not None]
    rows = (chosen[:, None] * size + torch.arange(size)).flatten()

    def pick(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.cat([x, y])[rows.to(x.device)]

    fit = partial(fitting, prompt=prompt, answer=answer, sets=max(sets, default=0))
    answers = zip(vars(fit(a.rollout)).items(), vars(fit(b.rollout)).values(), strict=True)
    rollout = Rollout(**{name: pick(x, y) for (name, x), y in answers})
    pad = [
        [None if x is None else F.pad(x, (0, answer - x.size(1))) for x in vars(s.old).values()]
        for s in (a, b)
    ]
    old = Measured(*(pick(x, y) for x, y in zip(*pad, strict=True)))
    columns = {name: pick(x, b.columns[name]) for name, x in a.columns.items()}
    both = a.asked + b.asked
    return Sampled([both[i] for i in rows.tolist()], columns, rollout, old)


def fitting(rollout: Rollout, *, prompt: int, answer: int, sets: int) -> Rollout:
    """The same with room for prompts and answers of so many tokens, and for sets of so many."""
    before = prompt - rollout.prompt_length
    wide = widen(rollout, answer, sets)
    wide.ids = F.pad(wide.ids, (before, 0))
    wide.attention = F.pad(wide.attention, (before, 0))
    wide.trunk = None if wide.trunk is None else F.pad(wide.trunk, (0, 0, before, 0))
    return wide
