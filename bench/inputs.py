"""What is called: one op at one shape, on copies of its inputs, forward or forward + backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlhf_fast.ops.registry import Op, Sample

FORWARD, BOTH = "forward", "forward+backward"
MOST_COPIES = 256


@dataclass
class Answer:
    """All tensors a call gave: its outputs, flattened (None: one that a peer does not give), and
    the gradients of its inputs by name."""

    outputs: list[Tensor | None]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.outputs, *self.gradients.values()) if x is not None)


def passes(sample: Sample) -> tuple[str, ...]:
    return (FORWARD, BOTH) if sample.grads else (FORWARD,)


def draw(
    op: Op, shape: dict[str, int], device: torch.device, dtype: torch.dtype, cache: int
) -> list[Sample]:
    """Copies of the op's inputs that together outgrow the cache twice, so that none is still in it
    when its turn comes again. (At most 256: inputs of a few KB stay in the cache, as they do in
    training, where the op before has just written them.)"""
    generator = torch.Generator(device).manual_seed(0)

    def one() -> Sample:
        sample = op.workload(shape, generator, device.type, dtype)
        for name in sample.grads:
            sample.arguments[name].requires_grad_()
        return sample

    first = one()
    size = sum(x.nbytes for x in tensors(first).values())
    copies = min(MOST_COPIES, math.ceil(2 * cache / max(size, 1)))
    return [first, *(one() for _ in range(copies - 1))]


def tensors(sample: Sample) -> dict[str, Tensor]:
    return {name: x for name, x in sample.arguments.items() if isinstance(x, Tensor)}


def dtype_of(sample: Sample) -> torch.dtype:
    """The dtype of the floating-point inputs: some workloads are float32 whatever is asked."""
    return next(x.dtype for x in tensors(sample).values() if x.is_floating_point())


def call(
    function: Callable[..., Any], sample: Sample, kind: str, seeds: dict[int, Tensor] | None = None
) -> Answer:
    """Run one pass. The backward starts from ``seeds``, one gradient for each differentiable
    output by its index; from ones where there are none."""
    if kind == FORWARD:
        with torch.no_grad():
            return Answer(flat(function(**sample.arguments)))
    outputs = flat(function(**sample.arguments))
    if seeds is None:
        there = enumerate(outputs)
        seeds = {i: torch.ones_like(x) for i, x in there if x is not None and x.requires_grad}
    seeded = {i: g.to(outputs[i].dtype) for i, g in seeds.items() if i < len(outputs)}
    if len(seeded) < len(seeds):
        raise ValueError("an output that carries a gradient is missing")
    gradients = torch.autograd.grad(
        [outputs[i] for i in seeded],
        [sample.arguments[name] for name in sample.grads],
        list(seeded.values()),
    )
    return Answer(outputs, dict(zip(sample.grads, gradients, strict=True)))


def flat(outputs: Any) -> list[Tensor | None]:
    return [x for x in tree_leaves(outputs) if x is None or isinstance(x, Tensor)]
