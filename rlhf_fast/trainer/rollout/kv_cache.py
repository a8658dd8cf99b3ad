"""The KV cache that decoding writes into."""

from __future__ import annotations

import inspect
from typing import Any

from packaging.version import Version
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, __version__
from transformers.cache_utils import DynamicLayer

RENAMED = Version(__version__) >= Version("5.24")


class GrowingLayer(DynamicLayer):
    """A layer of the KV cache with room for all tokens from the start.

    DynamicLayer copies all keys and values for each new token, which is quadratic in the length.
    (SmolLM2-135M on 2 CPU cores, 16 rows of 64 + 64 tokens: 7.7 s against 9.1 s, means of two runs
    of 7.6, 7.8 and 8.4, 9.7; at 8 + 16 tokens no difference.)
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.stored = tuple(
            new.new_empty(*new.shape[:2], self.room, new.size(-1))
            for new in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.size(-2)
        for stored, new in zip(self.stored, (key_states, value_states), strict=True):
            stored[:, :, start : self.length] = new
        self.keys, self.values = (stored[:, :, : self.length] for stored in self.stored)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, indices: Tensor) -> None:
        """Keep these rows. (Every kind of layer has this method, and beams need not be as many.)"""
        self.stored = tuple(stored[indices] for stored in self.stored)


def growing_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """The model's own kind of cache; its plain attention layers have room for `room` tokens."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [
        GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def cache_arguments(base: nn.Module, cache: DynamicCache) -> dict[str, Any]:
    """The arguments that make `base` read and write the cache, by the name that it has for it.

    transformers 5.24 calls it `cache`, and drops the name of all the years before in 5.40; a model
    that brings its own code may keep that one, and a wrapper names neither.
    """
    named = inspect.signature(base.forward).parameters
    new = "cache" in named or ("past_key_values" not in named and RENAMED)
    return {"cache" if new else "past_key_values": cache, "use_cache": True}
