"""Sampling answers, with the log-probs they were sampled at."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_fast import token_logprobs
from rlhf_fast.ops.decoding.thin_linear import MOST_ROWS, thin_linear
from rlhf_fast.ops.support import NO_TOKEN
from rlhf_fast.trainer.data.rows import Prompt, Text
from rlhf_fast.trainer.models.logits import logit_divisor, softcap
from rlhf_fast.trainer.models.packing import Packing, final_hidden, positions
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.models.trunk import trunk_recorder
from rlhf_fast.trainer.rollout.engine import FunctionEngine, ask
from rlhf_fast.trainer.rollout.fused_layers import fused_layers, same_states
from rlhf_fast.trainer.rollout.kv_cache import growing_cache
from rlhf_fast.trainer.rollout.memory import Memory, Way, way_of_decoding
from rlhf_fast.trainer.rollout.protocol import (
    Completions,
    RolloutEngine,
    RolloutFunction,
    Sampling,
)


@dataclass
class Rollout:
    """B prompts padded left to P tokens, each with an answer of at most T tokens."""

    ids: Tensor  # [B, P+T] int64
    attention: Tensor  # [B, P+T] bool, True = a real token of prompt or answer
    # [B, T] bool, True = a token that the policy chose, the stop token included; what tools said
    # between its turns is in `attention` alone
    mask: Tensor
    logp: Tensor  # [B, T] float32: log-probs as sampled, 0 where masked; kept apart from old_logp
    ended: Tensor  # [B] bool: the answer ended by a stop token, not by running into T
    trunk: Tensor | None  # [B, P+T-1, H]: input of the trained layers, when a trunk is shared
    hidden: Tensor | None = None  # [B, T, H]: what the policy's body made of them, when it is exact
    support: Tensor | None = None  # [B, T, K] int32: what each was drawn among; None: every token
    rewards: Tensor | None = None  # [B, T] float32: earned on the way (see Completions)
    episodes: list | None = None  # of several turns: what was said (environment.py); this process's

    @property
    def prompt_length(self) -> int:
        return self.ids.size(1) - self.mask.size(1)

    @property
    def labels(self) -> Tensor:
        """The answers' tokens [B, T]."""
        return self.ids[:, self.prompt_length :]


@torch.no_grad()
def roll_out(
    policy: Policy,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    draws: Tensor,
    engine: RolloutEngine | RolloutFunction | None = None,
) -> Rollout:
    """Prompts [B, P] -> prompts with answers. Without an engine: our own decoding."""
    engine = EmbeddedEngine(policy) if engine is None else engine
    return put_behind(
        policy, ids, mask, sampling, ask(engine, policy.model, ids, mask, sampling, draws)
    )


@torch.no_grad()
def put_behind(
    policy: Policy, ids: Tensor, mask: Tensor, sampling: Sampling, done: Completions
) -> Rollout:
    """Prompts [B, P], padded left, and what follows them, as one."""
    if done.support is None and sampling.truncates:
        warnings.warn(
            "the rollout engine samples among few tokens (top_k, top_p, min_p) and does not "
            "say among which: log-probs, ratios and KL are taken over the whole vocabulary",
            stacklevel=2,
        )
    if done.tokens.size(1) == 0:  # all answers ended at once, and the engine drops the end
        done = Completions(*(F.pad(x, (0, 1)) for x in (done.tokens, done.mask, done.logp)))
    own = done.mask if done.loss_mask is None else done.mask & done.loss_mask
    end = (done.mask.sum(1, keepdim=True) - 1).clamp(min=0)
    last = done.tokens.gather(1, end).squeeze(1)
    stop = torch.tensor(sampling.stop_ids, device=ids.device)
    rollout = Rollout(
        ids=torch.cat([ids, done.tokens.masked_fill(~done.mask, 0)], 1),
        attention=torch.cat([mask, done.mask], 1),
        mask=own,
        logp=done.logp.masked_fill(~own, 0.0),
        ended=torch.isin(last, stop) & own.gather(1, end).squeeze(1),
        trunk=done.trunk,
        hidden=done.hidden,
        support=done.support,
        rewards=done.rewards,
    )
    if policy.trunk_layers and rollout.trunk is None:
        rollout.trunk = run_trunk(policy, rollout)
    return rollout


class EmbeddedEngine(FunctionEngine):
    """Our own decoding, by the policy itself: `sample` below, the engine where none is named."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, sample)

    def draw(self, ids: Tensor, mask: Tensor, sampling: Sampling, draws: Tensor) -> Completions:
        return sample(
            self.policy.model, ids, mask, sampling, draws,
            trunk_layers=self.policy.trunk_layers, keep_hidden=self.policy.exact_decoding,
        )  # fmt: skip


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    draws: Tensor,
    *,
    trunk_layers: int = 0,
    keep_hidden: bool = False,
    way: Way | None = None,
) -> Completions:
    """One answer per prompt, token by token over a KV cache; arguments as in RolloutFunction.

    way: what is kept of the tokens before; None: what is found right for this model (memory.py).

    A draw picks the token at which the cumulated probability passes it, so a row's answer depends
    on its own draws alone: neither the rows beside it nor their number change it.
    """
    base, head = model.base_model, model.get_output_embeddings()
    cap, divisor = softcap(model), logit_divisor(model)
    batch, prompt_length = ids.shape
    steps = sampling.max_new_tokens
    stop = torch.tensor(sampling.stop_ids, device=ids.device)
    way = way_of_decoding(model, sample) if way is None else way
    memory = Memory(model, way, lambda: growing_cache(model, prompt_length + steps))
    fused = fused_layers(model, memory.cache) if way is Way.OURS else None

    tokens = ids.new_zeros(batch, steps)
    answered = torch.zeros_like(tokens, dtype=torch.bool)
    logps = torch.zeros(batch, steps, device=ids.device)
    attention = torch.cat([mask, answered], 1)
    trunk = hidden = None
    sets: list[tuple[Tensor, Tensor]] = []  # of each step: rows, their tokens [rows, K]

    live = torch.arange(batch, device=ids.device)  # rows still being written
    new_ids, new_positions = ids, positions(mask)
    with trunk_recorder(model, trunk_layers) as recorded, thin_products(model):
        for t in range(steps):
            end = prompt_length + t
            if t and fused is not None and len(live) <= MOST_ROWS:
                states, last = fused(new_ids, attention[live, :end], new_positions)
            else:
                out = base(
                    new_ids,
                    position_ids=new_positions,
                    **memory.arguments(attention[live, :end]),
                )
                memory.take(out)
                last = out.last_hidden_state[:, -1]  # [B, H]
            if trunk_layers:
                entered = recorded.pop() if recorded else states[trunk_layers]
                if trunk is None:
                    size = (batch, prompt_length + steps - 1, entered.size(-1))
                    trunk = entered.new_zeros(size)
                trunk[live, end - entered.size(1) : end] = entered

            if keep_hidden:
                if hidden is None:
                    hidden = last.new_zeros(batch, steps, last.size(-1))
                hidden[live, t] = last

            logits = head(last).float()  # [B, V]: this token's only
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            if divisor != 1:
                logits = logits / divisor
            token, logp, among = choose(logits, draws[live, t], sampling)
            if among is not None:
                sets.append((live, among))
            tokens[live, t], logps[live, t] = token, logp
            answered[live, t] = attention[live, end] = True

            going = ~torch.isin(token, stop)
            if not going.all():  # finished rows leave, and cost nothing from here on
                if not going.any():
                    break
                live, token, new_positions = live[going], token[going], new_positions[going]
                memory.keep(going.nonzero().squeeze(1))
            if memory.cache is not None:
                new_ids, new_positions = token[:, None], new_positions[:, -1:] + 1
            else:
                new_ids = torch.cat([ids, tokens[:, : t + 1]], 1)[live]
                new_positions = positions(attention[live, : end + 1])

    length = int(answered.any(0).sum())
    return Completions(
        tokens[:, :length],
        answered[:, :length],
        logps[:, :length],
        None if trunk is None else trunk[:, : prompt_length + length - 1],
        None if hidden is None else hidden[:, :length],
        side_by_side(sets, batch) if sets else None,
    )


def side_by_side(sets: list[tuple[Tensor, Tensor]], batch: int) -> Tensor:
    """(rows, sets [rows, K]) of T steps -> [batch, T, largest K] int32, filled up with −1."""
    most = max(ids.size(1) for _, ids in sets)
    support = torch.full(
        (batch, len(sets), most), NO_TOKEN, dtype=torch.int32, device=sets[0][1].device
    )
    for t, (rows, ids) in enumerate(sets):
        support[rows, t, : ids.size(1)] = ids.int()
    return support


@contextmanager
def thin_products(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, the model's linear layers with the product that is made for few rows: when it
    came, 16 rows of SmolLM2-135M took 65 ms a token in place of 95 (two cores)."""
    on_cpu = model.device.type == "cpu"
    layers = [m for m in model.modules() if on_cpu and type(m) is nn.Linear]
    for layer in layers:
        layer.forward = partial(linear_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def linear_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return thin_linear(x, layer.weight, layer.bias)


def choose(
    logits: Tensor, draw: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [B, V], draw [B] uniform in [0, 1) -> (token [B], its log-prob as sampled [B], the
    tokens it was drawn among [B, K], filled up with −1; None where that is all of them).

    Truncation as transformers' generate does it: top_k, then top_p of what that left, then min_p.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, token_logprobs(logits, token), None
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    if sampling.min_p:
        logits = MinPLogitsWarper(sampling.min_p)(None, logits)
    token, logp = torch.ops.rlhf_fast.draw_tokens(logits.contiguous(), draw.double())
    return token, logp, tokens_left(logits) if sampling.truncates else None


def tokens_left(logits: Tensor) -> Tensor:
    """The tokens of each row of logits [B, V] that are not −inf, likeliest first: [B, K]."""
    left = logits > -torch.inf
    ids = logits.topk(int(left.sum(-1).max())).indices
    return ids.masked_fill(~left.gather(-1, ids), NO_TOKEN)


def decodes_exactly(policy: Policy) -> bool:
    """Whether decoding, token by token over the cache, makes the hidden states that one pass over
    the whole answer makes, to float32's rounding. Then old log-probs and values are taken from the
    rollout's hidden states and need no pass of their own. In bfloat16 they differ by more than a
    small update does: a ratio must compare two policies, not two orders of summation.
    """
    if policy.bf16 or policy.model.dtype != torch.float32:
        return False
    device = policy.model.device
    ids = torch.arange(16, device=device).view(2, 8) % policy.head.weight.size(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    keeping, draws = replace(policy, exact_decoding=True), torch.zeros(2, 6, device=device)
    rollout = roll_out(keeping, ids, mask, Sampling(6, 0.0, []), draws)
    with torch.no_grad():
        whole = answer_hidden(policy.body, rollout, slice(None), packed=policy.packed)
    return same_states(rollout.hidden, whole)


def run_trunk(policy: Policy, rollout: Rollout) -> Tensor:
    """[B, P+T-1, H], for an engine that does not record it."""
    attention, ids = rollout.attention[:, :-1], rollout.ids[:, :-1]
    with trunk_recorder(policy.model, policy.trunk_layers) as recorded:
        final_hidden(policy.model.base_model, attention, packed=policy.packed, input_ids=ids)
    return Packing(attention).unpack(recorded[0]) if policy.packed else recorded[0]


def widen(rollout: Rollout, length: int, sets: int = 0) -> Rollout:
    """The same answers with room for `length` tokens, and for `sets` in what each was drawn among:
    shares of several processes fit together."""
    more = length - rollout.mask.size(1)
    return Rollout(
        ids=F.pad(rollout.ids, (0, more)),
        attention=F.pad(rollout.attention, (0, more)),
        mask=F.pad(rollout.mask, (0, more)),
        logp=F.pad(rollout.logp, (0, more)),
        ended=rollout.ended,
        trunk=None if rollout.trunk is None else F.pad(rollout.trunk, (0, 0, 0, more)),
        hidden=None if rollout.hidden is None else F.pad(rollout.hidden, (0, 0, 0, more)),
        support=None if rollout.support is None else widened(rollout.support, more, sets),
        rewards=None if rollout.rewards is None else F.pad(rollout.rewards, (0, more)),
    )


def widened(support: Tensor, steps: int, sets: int) -> Tensor:
    """The same sets with room for so many more steps, and for sets of so many tokens."""
    return F.pad(support, (0, max(0, sets - support.size(2)), 0, steps), value=NO_TOKEN)


def answer_hidden(
    body: torch.nn.Module,
    rollout: Rollout,
    rows: slice | Tensor,
    *,
    packed: bool = False,
    from_ids: bool = False,
) -> Tensor:
    """Final hidden states [b, T, H] at the positions that *predict* the answers' tokens.

    Token t of an answer is predicted at P-1+t, so the last token itself is never an input. A body
    that does not stand on the shared trunk reads the tokens (`from_ids`).
    """
    given = (
        {"input_ids": rollout.ids[rows, :-1]}
        if from_ids or rollout.trunk is None
        else {"inputs_embeds": rollout.trunk[rows]}
    )
    hidden = final_hidden(body, rollout.attention[rows, :-1], packed=packed, **given)
    return hidden[:, rollout.prompt_length - 1 :]


def decode(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    mask: Tensor,
    prompts: Sequence[Prompt] | None = None,
    *,
    special_tokens: bool = False,
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Answers [B, T] as text, without special tokens: or with them, but for what ends an answer.

    prompts: what they were given to. Behind a prompt that is text, or the assistant's own words, an
        answer is what the two together read more than the prompt alone: tokenizers of Llama 2's
        kind drop a space from what a text begins with, and those that join words by spaces put
        none before the first. An answer that is a message of its own begins a text.
    """
    rows = zip(tokens.tolist(), mask.tolist(), strict=True)
    kept = [[t for t, real in zip(ids, counts, strict=True) if real] for ids, counts in rows]
    if special_tokens:
        ends = {*stop_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
        kept = [[t for t in ids if t not in ends] for ids in kept]
    read = partial(tokenizer.batch_decode, skip_special_tokens=not special_tokens)
    texts = read(kept)
    behind = [i for i, p in enumerate(prompts or ()) if goes_on(p.prompt) and kept[i]]
    if behind:
        before = read([prompts[i].ids for i in behind])
        whole = read([prompts[i].ids + kept[i] for i in behind])
        for i, prompt, text in zip(behind, before, whole, strict=True):
            if text.startswith(prompt):  # else its last characters were changed by what followed
                texts[i] = text[len(prompt) :]
    return texts


def goes_on(prompt: Text) -> bool:
    """Whether the answer goes on in the same text: not as a message of its own."""
    return isinstance(prompt, str) or prompt[-1]["role"] == "assistant"
