"""What decoding keeps of the tokens before, in the first way that gives the model's own states.

Families differ: most fill a KV cache that they are given, some only one that they make themselves
(MiniMax), some have none (GPT-1) or none that holds with padding on the left. Names and signatures
do not tell: a model that does not know an argument may swallow it and go on from the last token
alone. So each way is tried, once a model, against passes over whole texts without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.trainer.errors import InputError

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # transformers' names over time
PROMPT, STEPS = 12, 6  # of the trial: longer than the windows of tiny models

_found: WeakKeyDictionary[PreTrainedModel, Way] = WeakKeyDictionary()


class Way(Enum):
    OURS = "a cache that has room for all tokens from the start (kv_cache.py)"
    STATE = "the same, of states that have read the padding: only the prompt's pass gets the mask"
    OWN = "the cache that the model makes at its first pass"
    NONE = "nothing: every token takes a pass over all before it"


class Memory:
    """Of the rows still being written. `cache` is None where there is none yet, or at all."""

    def __init__(self, model: PreTrainedModel, way: Way, make: Callable[[], Any]) -> None:
        self.way, self.name = way, cache_argument(model)
        self.cache = make() if way in (Way.OURS, Way.STATE) else None
        self.passes = 0

    def arguments(self, mask: Tensor) -> dict[str, Any]:
        """Arguments of the next pass; mask [b, t]: the real ones among all tokens up to it."""
        given: dict[str, Any] = {"use_cache": self.way is not Way.NONE}
        if self.cache is not None:
            given[self.name] = self.cache
        if not self.passes or self.way is not Way.STATE:
            given["attention_mask"] = mask.long()
        return given

    def take(self, out: Any) -> None:
        """What a pass has given back."""
        self.passes += 1
        if self.way is Way.OWN:
            self.cache = out[self.name]

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)


def cache_argument(model: PreTrainedModel) -> str | None:
    known = inspect.signature(model.base_model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), None)


def way_of_decoding(model: PreTrainedModel, sample: Callable) -> Way:
    """The first way that is right; InputError where none is. sample: sample.sample, tried here."""
    if model not in _found:
        ways = list(Way) if cache_argument(model) is not None else [Way.NONE]
        right = (way for way in ways if is_right(model, way, sample))
        way = next(right, None)
        kind = type(model).__name__
        if way is None:
            raise InputError(
                f"model={model.name_or_path} ({kind}) gives other states token by token than for a "
                "whole text, with and without a cache: answers cannot be sampled from it"
            )
        _found[model] = way
    return _found[model]


@torch.no_grad()
def is_right(model: PreTrainedModel, way: Way, sample: Callable) -> bool:
    """Whether rows padded on the left, decoded together, have the final hidden states that each has
    alone in one pass; also when a row that has ended leaves the others."""
    from rlhf_fast.trainer.rollout.sample import Sampling

    device, vocabulary = model.device, model.get_input_embeddings().weight.size(0)
    ids = (torch.arange(3 * PROMPT, device=device) * 7 % vocabulary).view(3, PROMPT)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = mask[1, :3] = False
    draws = torch.linspace(0.1, 0.9, 3 * STEPS, device=device).view(STEPS, 3).T.contiguous()

    def decode(*stops: int):
        sampling = Sampling(STEPS, 1.0, list(stops))
        return sample(model, ids, mask, sampling, draws, way=way, keep_hidden=True)

    flash = model.config._attn_implementation == "flash_attention_2"  # has no float32
    exact = not flash and model.dtype == torch.float32
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=flash):
            done = decode()
            # A token that another row has said, and the first has not: that row leaves early.
            stop = [t for t in done.tokens[1:].flatten().tolist() if t not in done.tokens[0]]
            runs = [(done, row) for row in range(3)] + [(decode(*stop[:1]), 0)]
            for run, row in runs:
                text = torch.cat([ids[row][mask[row]], run.tokens[row]])
                whole = model.base_model(text[None], use_cache=False).last_hidden_state[0]
                gap = run.hidden[row] - whole[-STEPS - 1 : -1]
                if not gap.norm() <= (1e-3 if exact else 0.05) * whole[-STEPS - 1 : -1].norm():
                    return False
    except Exception:  # a family's code refuses this way of calling it as it likes
        return False
    return True
