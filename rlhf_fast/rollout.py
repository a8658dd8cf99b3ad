"""Sampling answers, with the log-probs they were sampled at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast import token_logprobs
from rlhf_fast.models import positions, softcap, trunk_recorder


@dataclass
class Rollout:
    """B prompts padded left to P tokens, each with an answer of at most T tokens."""

    ids: Tensor  # [B, P+T] int64
    attention: Tensor  # [B, P+T] bool, True = a real token of prompt or answer
    mask: Tensor  # [B, T] bool, True = a token of the answer, the stop token included
    logp: Tensor  # [B, T] float32: log-probs as sampled, 0 where masked; kept apart from old_logp
    ended: Tensor  # [B] bool: the answer ended by a stop token, not by running into T
    trunk: Tensor | None  # [B, P+T-1, H]: input of the trained layers, when a trunk is shared

    @property
    def prompt_length(self) -> int:
        return self.ids.size(1) - self.mask.size(1)

    @property
    def labels(self) -> Tensor:
        """The answers' tokens [B, T]."""
        return self.ids[:, self.prompt_length :]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    ids: Tensor,  # [B, P], padded left
    mask: Tensor,  # [B, P] bool
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: list[int],
    generator: torch.Generator,
    trunk_layers: int = 0,
) -> Rollout:
    """One answer per prompt, token by token over a KV cache. Temperature 0 takes the likeliest."""
    base, head, cap = model.base_model, model.get_output_embeddings(), softcap(model)
    stop = torch.tensor(stop_ids, device=ids.device)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    attention, cache = mask, None
    tokens, masks, logps = [], [], []

    with trunk_recorder(model, trunk_layers) as recorded:
        new_ids, new_positions = ids, positions(mask)
        for _ in range(max_new_tokens):
            out = base(
                new_ids,
                attention_mask=attention.long(),
                position_ids=new_positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            logits = head(out.last_hidden_state[:, -1]).float()  # [B, V]: this token's only
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                probs = torch.softmax(logits / temperature, -1)
                token = torch.multinomial(probs, 1, generator=generator).squeeze(1)
            # A finished row goes on computing; what it writes is masked.
            token = torch.where(running, token, 0)
            logp = token_logprobs(logits, token, temperature=temperature or 1.0)

            tokens.append(token)
            masks.append(running)
            logps.append(logp.masked_fill(~running, 0.0))
            attention = torch.cat([attention, running[:, None]], 1)
            running = running & ~torch.isin(token, stop)
            if not running.any():
                break
            new_ids, new_positions = token[:, None], positions(attention)[:, -1:]

    return Rollout(
        ids=torch.cat([ids, torch.stack(tokens, 1)], 1),
        attention=attention,
        mask=torch.stack(masks, 1),
        logp=torch.stack(logps, 1),
        ended=~running,
        trunk=torch.cat(recorded, 1) if trunk_layers else None,
    )


def answer_hidden(body: torch.nn.Module, rollout: Rollout, rows: slice | Tensor) -> Tensor:
    """Final hidden states [b, T, H] at the positions that *predict* the answers' tokens.

    Token t of an answer is predicted at P-1+t, so the last token itself is never an input.
    """
    attention = rollout.attention[rows, :-1]
    given = (
        {"input_ids": rollout.ids[rows, :-1]}
        if rollout.trunk is None
        else {"inputs_embeds": rollout.trunk[rows]}
    )
    hidden = body(
        **given,
        attention_mask=attention.long(),
        position_ids=positions(attention),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, rollout.prompt_length - 1 :]


def answers(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """The answers as text, without special tokens."""
    rows = zip(rollout.labels.tolist(), rollout.mask.tolist(), strict=True)
    kept = [[t for t, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)
