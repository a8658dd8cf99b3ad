"""FSDP2: each process holds a shard of every weight, and gathers a layer just before it runs.

Asked for by accelerate's config (`distributed_type: FSDP`, `fsdp_version: 2`), whose wrap policy,
precision and `fsdp_reshard_after_forward` are followed. Policy, critic and reference are sharded,
after each process has read them whole. The trainer still sees bodies that map tokens to hidden
states, a head with a weight, and gradients that are sums over the processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from rlhf_fast.trainer.config import PPOConfig, RunConfig
from rlhf_fast.trainer.errors import InputError


class Sharder:
    """Shards modules, in place, over all processes."""

    def __init__(self, plugin: FullyShardedDataParallelPlugin, device: torch.device) -> None:
        self.plugin = plugin
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.precision = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        # A Linear returns a view, which must not be written to; nothing here does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def body_with_head(self, body: nn.Module, base: nn.Module, head: nn.Module) -> Sharded:
        """One group for what the head and the body's embedding may share.

        base: the whole model where the body is only its top layers; else the body.
        """
        self.layers(base, head.weight)
        root = Sharded(body, base, head, self.plugin.reshard_after_forward)
        self.unit(root, reshard_after_forward=False)
        return root

    def body(self, body: nn.Module) -> None:
        self.layers(body, None)
        self.unit(body, reshard_after_forward=self.plugin.reshard_after_forward)

    def layers(self, body: nn.Module, shared: Tensor | None) -> None:
        wrapped = self.wrapped(body)
        for module in reversed(list(body.modules())[1:]):  # the inner ones first
            if wrapped(module) and not any(p is shared for p in module.parameters()):
                if self.plugin.activation_checkpointing:
                    module.forward = partial(
                        checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
                    )
                self.unit(module, reshard_after_forward=self.plugin.reshard_after_forward)

    def wrapped(self, body: nn.Module) -> Callable[[nn.Module], bool]:
        """Which modules are gathered by themselves."""
        policy = self.plugin.auto_wrap_policy
        if policy is transformer_auto_wrap_policy:
            names = set(self.plugin.transformer_cls_names_to_wrap or body._no_split_modules)
            if names.isdisjoint(type(module).__name__ for module in body.modules()):
                raise InputError(
                    f"fsdp_transformer_layer_cls_to_wrap={','.join(names)}: "
                    f"{type(body).__name__} has no such layer"
                )
            return lambda module: type(module).__name__ in names
        if policy is size_based_auto_wrap_policy:
            return lambda module: (
                not isinstance(module, nn.ModuleList)
                and (sum(p.numel() for p in module.parameters()) > self.plugin.min_num_params)
            )
        return lambda module: False

    def unit(self, module: nn.Module, *, reshard_after_forward: bool) -> None:
        fully_shard(
            module,
            mesh=self.mesh,
            mp_policy=self.precision,
            reshard_after_forward=reshard_after_forward,
            # Embedding and head of a policy whose frozen layers the reference shares.
            ignored_params={p for p in module.parameters() if isinstance(p, DTensor)},
        )
        # Every loss is divided by the count of the whole minibatch already: gradients are summed.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to divide by 1


class Sharded(nn.Module):
    """A body as FSDP's root, together with its head.

    The root's own weights stay whole after its forward pass: it is then that the fused loss reads
    the head's, as a plain tensor, whose gradient is scattered along with the others.
    """

    def __init__(self, body: nn.Module, base: nn.Module, head: nn.Module, reshard: bool) -> None:
        super().__init__()
        self.body, self.base, self.head, self.reshard_layers = body, base, head, reshard

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights gathered, for as long as answers are sampled.

        Gathered layer by layer, they would be sent once for every token, and a process whose
        answers have ended would have to go on as long as the others. So they are gathered once a
        rollout, and each process stops when it likes; the price is one whole policy in memory.
        """
        self.drop_whole()  # what a forward pass left whole may be older than the shards
        for unit in self.units():
            unit.unshard()
        self.set_reshard_after_forward(False)
        try:
            yield
        finally:
            self.drop_whole()
            self.set_reshard_after_forward(self.reshard_layers)
            self.set_reshard_after_forward(False, recurse=False)

    def drop_whole(self) -> None:
        for unit in self.units():
            unit.reshard()

    def units(self) -> list[FSDPModule]:
        return [module for module in self.modules() if isinstance(module, FSDPModule)]


def check(plugin: FullyShardedDataParallelPlugin, config: RunConfig) -> None:
    """Refuses what is not built, or was never tried."""
    if not isinstance(config, PPOConfig):
        raise InputError("accelerate's FSDP is for `rlhf-fast ppo`: use plain data parallelism")
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise InputError("accelerate's config asks for FSDP 1: set fsdp_version: 2")
    precision = plugin.mixed_precision_policy
    not_supported = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
        "mixed_precision: fp16": precision is not None and precision.param_dtype == torch.float16,
    }
    for name, asked in not_supported.items():
        if asked:
            raise InputError(f"{name} in accelerate's config is not supported: leave it out")


def gathered(state: Any, *, keep: bool = True, known: dict[int, Tensor] | None = None) -> Any:
    """The same nest of dicts, lists and tensors, with whole tensors on the CPU in place of shards.

    All processes must call it; one that does not `keep` the result gets None for each shard. A
    tensor that is there twice (tied weights) is gathered once.
    """
    known = {} if known is None else known
    if isinstance(state, dict):
        return {key: gathered(value, keep=keep, known=known) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep=keep, known=known) for value in state]
    if not isinstance(state, DTensor):
        return state.detach() if isinstance(state, Tensor) else state
    if id(state) not in known:
        whole = state.detach().full_tensor()
        known[id(state)] = whole.cpu() if keep else None
    return known[id(state)]


def placed_like(whole: Tensor, other: Tensor) -> Tensor:
    """This process's shard of a tensor that all processes have, if `other` is sharded and of its
    shape."""
    if not isinstance(other, DTensor) or whole.shape != other.shape:
        return whole
    mesh, whole = other.device_mesh, whole.to(other.device)
    return distribute_tensor(whole, mesh, other.placements, src_data_rank=None)
