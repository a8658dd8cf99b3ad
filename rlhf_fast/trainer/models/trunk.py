"""A model cut in two: the top layers that train, the trunk below that stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.trainer.errors import InputError


def top_slice(base: PreTrainedModel, layers: int, name: str) -> nn.Module:
    """The same model with only its top layers: shares every weight, takes `inputs_embeds`."""
    found = getattr(base, "layers", None)
    if not isinstance(found, nn.ModuleList) or not hasattr(base, "norm"):
        raise InputError(
            f"trainable_layers={layers}: model={name} ({type(base).__name__}) is not built as "
            "layers and a final norm; leave trainable_layers unset to train the whole model"
        )
    if layers > len(found):
        raise InputError(f"trainable_layers={layers}: model={name} has {len(found)} layers")
    top = shallow_copy(base)
    top.layers = found[len(found) - layers :]
    top.config = copy.deepcopy(base.config)
    top.config.num_hidden_layers = layers
    if getattr(top.config, "layer_types", None):
        top.config.layer_types = base.config.layer_types[-layers:]
    return top


def frozen_copy(top: nn.Module) -> nn.Module:
    """The reference's own copy of what trains; the rest stays shared."""
    reference = shallow_copy(top)
    reference.layers = copy.deepcopy(top.layers).requires_grad_(False)
    reference.norm = copy.deepcopy(top.norm).requires_grad_(False)
    return reference


def shallow_copy(module: nn.Module) -> nn.Module:
    new = copy.copy(module)
    new._modules = dict(module._modules)  # copy.copy shares this dict: replacing a child would too
    return new


@contextmanager
def trunk_recorder(model: PreTrainedModel, trunk_layers: int) -> Iterator[list[Tensor]]:
    """Collects what enters the lowest trained layer, one [B, tokens, H] for every forward pass."""
    recorded: list[Tensor] = []
    if not trunk_layers:
        yield recorded
        return
    layer = model.base_model.layers[trunk_layers]
    handle = layer.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
    try:
        yield recorded
    finally:
        handle.remove()
