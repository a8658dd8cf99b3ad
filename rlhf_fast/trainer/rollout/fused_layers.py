"""Decoding steps of the Llama family on a CPU: a layer is one op in place of some 90 small ones.

SmolLM2-135M on two cores, 1, 16 and 64 rows of 8 + 24 tokens: 26, 40 and 142 ms a token, by its own
modules in the same run 41, 55 and 175. (Reading the weights takes 16 ms, the products of 16 rows
22 to 24.)
"""

from __future__ import annotations

from itertools import chain
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlhf_fast.ops.decoding.decoder_layer import KERNEL
from rlhf_fast.trainer.rollout.kv_cache import GrowingLayer, growing_cache
from rlhf_fast.trainer.rollout.memory import cache_argument

_agree: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # what `agrees` has found


class FusedLayers:
    """A model's layers for one new token a row, over its cache of GrowingLayers."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache) -> None:
        """AttributeError for a model that is not built of Llama's parts alone."""
        self.base, self.cache, self.layers = model.base_model, cache, []
        for layer in self.base.layers:
            a, m = layer.self_attn, layer.mlp
            norms = layer.input_layernorm, layer.post_attention_layernorm
            linear = a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj
            modules = norms[0], *linear[:4], norms[1], *linear[4:]
            weights = [module.weight for module in modules]
            biases = [getattr(module, "bias", None) for module in modules]
            own = {x for x in [*weights, *biases] if x is not None}
            if own != set(layer.parameters()) or any(type(x) is not nn.Linear for x in linear):
                raise AttributeError("has parts of its own: a norm of queries, adapters")
            scalars = norms[0].variance_epsilon, norms[1].variance_epsilon, a.scaling
            self.layers.append((weights, biases, scalars))

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[list[Tensor], Tensor]:
        """New tokens [B, 1], their mask [B, t] (True = a token to attend to) and positions [B, 1]
        -> what enters each layer, [B, 1, H] each, and the final hidden states [B, H]."""
        embedded = self.base.embed_tokens(ids)
        cos, sin = (x[:, 0] for x in self.base.rotary_emb(embedded, position_ids=positions))
        states = [embedded]
        for (weights, biases, scalars), cached in zip(self.layers, self.cache.layers, strict=True):
            cached.length += 1
            hidden = torch.ops.rlhf_fast.decoder_layer(
                states[-1][:, 0], weights, biases, *cached.stored, mask, cos, sin, *scalars
            )
            states.append(hidden[:, None])
        return states[:-1], self.base.norm(states[-1])[:, 0]


def fused_layers(model: PreTrainedModel, cache: DynamicCache) -> FusedLayers | None:
    """None where the model's own modules have to do it: another device, type or architecture,
    adapters, hooks, a sliding window."""
    if (
        KERNEL.implementation(model.device.type) != "C++"
        or model.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or any(type(layer) is not GrowingLayer for layer in cache.layers)
        or any(m._forward_hooks or m._forward_pre_hooks for m in model.base_model.modules())
    ):
        return None
    try:
        fused = FusedLayers(model, cache)
    except AttributeError:
        return None
    given = chain.from_iterable([*weights, *biases] for weights, biases, _ in fused.layers)
    if any(x is not None and (x.dtype != torch.float32 or not x.is_contiguous()) for x in given):
        return None
    if model not in _agree:
        _agree[model] = agrees(model)
    return fused if _agree[model] else None


@torch.no_grad()
def agrees(model: PreTrainedModel) -> bool:
    """Whether one step gives the hidden states that the model's own modules give.

    Names of parts do not say what a model does with them (Granite multiplies what a layer adds,
    SmolLM3 leaves out some rotations), and some do another thing far from the start.
    """
    base, device = model.base_model, model.device
    far = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 9) - 1
    ids = torch.arange(10, device=device).view(2, 5) % base.get_input_embeddings().weight.size(0)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[1, :2] = False
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, far]], device=device)
    cache = growing_cache(model, 5)

    def step(tokens: slice) -> Tensor:
        return base(
            ids[:, tokens], attention_mask=mask[:, : tokens.stop].long(),
            position_ids=positions[:, tokens], use_cache=True, **{cache_argument(model): cache},
        ).last_hidden_state  # fmt: skip

    step(slice(0, 4))
    own = step(slice(4, 5))[:, -1]
    for layer in cache.layers:
        layer.length -= 1
    some = torch.linspace(-4, 4, 9, device=device)  # small weights hardly tell SiLU from GELU
    try:
        _, fused = FusedLayers(model, cache)(ids[:, 4:], mask, positions[:, 4:])
        silu = all(torch.allclose(x.mlp.act_fn(some), F.silu(some)) for x in base.layers)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # Llama's names, other insides
        return False
    return silu and same_states(fused, own)


def same_states(states: Tensor, own: Tensor) -> bool:
    """Whether hidden states [..., H] are the same to float32's rounding, which thirty layers let
    grow to 5e-6 of a state's length. (Of single elements it says little: beside one of 44, small
    ones were off by 4e-4 in a model where decoding was the more exact of the two.)"""
    return bool(((states - own).norm(dim=-1) <= 1e-4 * own.norm(dim=-1)).all())
