"""What a step learns from: answers, their scores, the log-probs and values they began with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_fast import linear_token_logprobs
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.rows import Prompt, pad
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.models.logits import logit_divisor, softcap
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.rewards.scorers import Scorer
from rlhf_fast.trainer.rollout.sample import (
    EmbeddedEngine,
    Rollout,
    RolloutEngine,
    Sampling,
    answer_hidden,
    decode,
    roll_out,
    widen,
)


@dataclass
class Measured:
    """What is said of the answers' tokens, each [B, T], by the weights that sampled them."""

    logp: Tensor
    entropy: Tensor  # nats
    ref_logp: Tensor
    values: Tensor | None  # None without a critic


def sample_answers(
    policy: Policy,
    batch: list[Prompt],
    config: PPOConfig,
    generator: torch.Generator,
    *,
    share: slice = slice(None),
    engine: RolloutEngine | None = None,
) -> Rollout:
    """Answers to this process's share of the batch.

    The randomness is drawn for the whole batch on the CPU: it is the same for any device and any
    number of processes.
    """
    ids, mask = pad([prompt.ids for prompt in batch], side="left")
    draws = torch.rand(len(batch), config.max_new_tokens, generator=generator)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, policy.stop_ids, config.top_k, config.top_p,
        config.min_p,
    )  # fmt: skip
    ids, mask, draws = (x[share].to(policy.model.device) for x in (ids, mask, draws))
    if batch[0].environment is not None:
        from rlhf_fast.trainer.rollout.environment import play  # it stands on this package

        engine = EmbeddedEngine(policy) if engine is None else engine
        with policy.whole(), policy.precision():
            return play(
                policy, engine, batch[share], sampling, draws,
                max_turns=config.max_turns, who=f"environment={config.environment}",
            )  # fmt: skip
    with policy.whole(), policy.precision():
        return roll_out(policy, ids, mask, sampling, draws, engine)


def read_answers(
    policy: Policy, rollout: Rollout, batch: list[Prompt], config: PPOConfig
) -> list[str]:
    """The answers as rewards read them; batch: the prompts of the rollout's rows."""
    if rollout.episodes is not None:
        return rollout.episodes
    return decode(
        policy.tokenizer, rollout.labels, rollout.mask, batch,
        special_tokens=config.keep_special_tokens, stop_ids=policy.stop_ids,
    )  # fmt: skip


def score(scorer: Scorer, batch: list[Prompt], texts: list[str]) -> Tensor:
    columns = {name: [p.columns[name] for p in batch] for name in batch[0].columns}
    return scorer([p.prompt for p in batch], texts, columns)


def score_all(
    reward: Scorer, judge: Scorer | None, batch: list[Prompt], texts: list[str]
) -> dict[str, Tensor]:
    """{"scores", "scores/<name>" of each of several rewards, "judge"}, each [B]."""
    columns = {"scores": score(reward, batch, texts)}
    columns |= {f"scores/{name}": part for name, part in reward.components.items()}
    return columns if judge is None else columns | {"judge": score(judge, batch, texts)}


def without_lost(rollout: Rollout, scores: Tensor, baseline: Tensor | None) -> tuple:
    """(rollout, kept [B] bool): an answer whose score was lost, or its baseline's, has no token
    left that counts."""
    kept = ~scores.isnan().to(rollout.mask.device)
    if baseline is not None:
        kept &= ~baseline.isnan()
    if kept.all():
        return rollout, kept
    return replace(rollout, mask=rollout.mask & kept[:, None]), kept


@torch.no_grad()
def measure(policy: Policy, rollout: Rollout, config: PPOConfig) -> Measured:
    """Log-probs, entropies and values under the present weights; the reference's log-probs.

    With bypass the policy is asked for nothing that its sampling has said: log-probs are the
    engine's, and −log π of the tokens stands for their entropy, of which it is a sample.
    """
    columns = []
    shared_critic = policy.value_head is not None and policy.value_body is None
    for rows in slices(len(rollout.ids), config.micro_batch_size):
        with policy.precision():
            if rollout.hidden is not None:
                # decoding has been there: saves a forward pass of three (12 % of a step)
                hidden = rollout.hidden[rows]
            elif shared_critic or not config.bypass:
                hidden = answer_hidden(policy.body, rollout, rows, packed=policy.packed)
            else:
                hidden = None
            if config.bypass:
                logp, entropy = rollout.logp[rows], -rollout.logp[rows]
            else:
                logp, entropy = logprobs(policy, hidden, policy.head, rollout, rows, config)
            values = predict_values(policy, hidden, rollout, rows)
            with policy.reference() as body:
                hidden = answer_hidden(body, rollout, rows, packed=policy.packed)
            ref_logp, _ = logprobs(policy, hidden, policy.reference_head, rollout, rows, config)
        columns.append((logp, entropy, ref_logp, *([] if values is None else [values])))
    logp, entropy, ref_logp, *values = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return Measured(logp, entropy, ref_logp, values[0] if values else None)


def logprobs(
    policy: Policy,
    hidden: Tensor,
    head: torch.nn.Module,
    rollout: Rollout,
    rows: Tensor | slice,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) [b, T] of the answers' tokens, among those that each was drawn from; no
    [b, T, V] tensor is ever held."""
    labels = rollout.labels[rows].masked_fill(~rollout.mask[rows], -100)
    return linear_token_logprobs(
        hidden, head.weight, labels, bias=head.bias, softcap=softcap(policy.model),
        temperature=config.temperature * logit_divisor(policy.model), entropy=True,
        support=None if rollout.support is None else rollout.support[rows],
    )  # fmt: skip


def predict_values(
    policy: Policy, hidden: Tensor, rollout: Rollout, rows: Tensor | slice
) -> Tensor | None:
    """[b, T] float32: the head on the policy's hidden states, or on those of a critic of its own.

    V(s_t) sits where a_t is predicted, as its log-prob does.
    """
    if policy.value_head is None:
        return None
    if policy.value_body is not None:
        hidden = answer_hidden(
            policy.value_body, rollout, rows, packed=policy.packed, from_ids=True
        )
    return policy.value_head(hidden).squeeze(-1).float()


def slices(size: int, step: int | None) -> Iterator[slice]:
    step = step or size
    return (slice(at, at + step) for at in range(0, size, step))


def gather(workers: Workers, rollout: Rollout, measured: Measured) -> tuple[Rollout, Measured]:
    """Every process's share of the batch, put together in each of them."""
    # What was measured on them is all that is needed.
    rollout = replace(rollout, hidden=None, episodes=None)
    if workers.size == 1:
        return rollout, measured
    length = workers.largest(rollout.mask.size(1))
    more = length - rollout.mask.size(1)
    sets = 0 if rollout.support is None else workers.largest(rollout.support.size(2))
    whole = {
        name: None if x is None else workers.gather(x)
        for name, x in vars(widen(rollout, length, sets)).items()
    }
    columns = {
        name: None if x is None else workers.gather(torch.nn.functional.pad(x, (0, more)))
        for name, x in vars(measured).items()
    }
    return Rollout(**whole), Measured(**columns)
