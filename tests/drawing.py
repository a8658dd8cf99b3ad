"""How the ops' tests draw and call: the inputs of a sample in a dtype, an op with its gradients, an
op's plain PyTorch fallbacks. No test file imports another: what two of them need is here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops.registry import KERNELS, Op, Sample

# Losses and ratios of which a weight or value is a constant to the gradient only: no gradcheck.
CONSTANTS = {"cispo", "vespo", "dppo_tv", "dppo_kl", "sequence_token"}
# inputs that kernels take in 16 bits
VOCABULARY_SIZED = {"logits", "hidden", "weight", "bias", "lora"}
VOCABULARY_SIZED |= {"ref_hidden", "ref_weight", "ref_bias", "ref_lora"}


def arguments(sample: Sample, dtype: torch.dtype, only: tuple[str, ...] | None = None) -> dict:
    """The sample's arguments with its floating tensors in dtype (or just those named in only),
    the differentiable ones as leaves. Strides stay."""

    def make(name: str, x: object) -> object:
        if isinstance(x, tuple):  # an adapter's (A, B, scale)
            return tuple(make(name, part) for part in x)
        if not isinstance(x, Tensor):
            return x
        cast = x.is_floating_point() and (only is None or name in only)
        fresh = torch.empty_strided(x.shape, x.stride(), dtype=dtype if cast else x.dtype).copy_(x)
        return fresh.requires_grad_() if name in sample.grads else fresh

    return {name: make(name, x) for name, x in sample.arguments.items()}


def tensors(output: object) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for x in output for t in tensors(x)]


def leaves_of(made: dict, grads: tuple[str, ...]) -> list[Tensor]:
    """The differentiable tensors, an adapter's A and B each."""
    named = [made[name] for name in grads]
    flat = [part for x in named for part in (x if isinstance(x, tuple) else (x,))]
    return [x for x in flat if isinstance(x, Tensor)]


def with_leaves(made: dict, grads: tuple[str, ...], leaves: tuple[Tensor, ...]) -> dict:
    """made with these in the place of ``leaves_of``'s."""
    new = iter(leaves)

    def place(x: object) -> object:
        if isinstance(x, tuple):
            return tuple(map(place, x))
        return next(new) if isinstance(x, Tensor) else x

    return made | {name: place(made[name]) for name in grads}


def run(function, made: dict, grads: tuple[str, ...], inplace: bool = False) -> list[Tensor]:
    """Outputs, then the gradients of grads under fixed random cotangents."""
    passed = dict(made)
    if inplace:  # an in-place backward needs a tensor that is not a leaf
        passed["logits"] = passed["logits"] * 1.0
    outputs = tensors(function(**passed))
    differentiable = [x for x in outputs if x.requires_grad]
    if not grads:
        assert not differentiable
        return outputs
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in differentiable
    ]
    inputs = leaves_of(made, grads)
    return outputs + list(torch.autograd.grad(differentiable, inputs, cotangents))


class Fallbacks(TorchDispatchMode):
    """Every kernel runs its plain PyTorch fallback."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_fast":
            with self:
                return KERNELS[func._schema.name.split("::")[1]].fallback(*args)
        return func(*args, **(kwargs or {}))


def options(sample: Sample) -> set[tuple]:
    """The arguments that it has, and what is chosen of those that are a choice."""
    return {
        (name, x if isinstance(x, str | bool) else isinstance(x, Tensor | tuple))
        for name, x in sample.arguments.items()
    }


def one_for_each_option(op: Op) -> list[Sample]:
    """The first sample, and each that brings an argument, or a choice, which none before it had."""
    seen: set[tuple] = set()
    chosen = []
    for sample in op.samples(torch.Generator().manual_seed(0)):
        if options(sample) - seen:
            chosen.append(sample)
        seen |= options(sample)
    return chosen


def few_for_all_options(op: Op) -> list[Sample]:
    """As few samples as together have every argument and every choice: for what takes seconds."""
    samples = list(op.samples(torch.Generator().manual_seed(0)))
    left = set().union(*map(options, samples))
    chosen = []
    while left:
        chosen.append(max(samples, key=lambda sample: len(options(sample) & left)))
        left -= options(chosen[-1])
    return chosen
