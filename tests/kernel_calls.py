"""A Triton launcher against its fallback in float64, on the arguments that the ops really pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from bounds import Draws, allowed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops.linear import chunks as linear
from rlhf_fast.ops.registry import KERNELS, OPS, Op, Sample

ENGINES = [name for name in OPS if name.startswith("linear_")]  # loops over the other ops' kernels
STATISTICS = ("policy_loss", "value_loss")  # output 1 is a vector of them


def copied(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x with its strides, in storage of its own; a chunk of the linear engine, whose rows lie side
    by side on a CPU, as it is on a GPU: one after the other, apart as they are there."""
    if dtype is None or not x.is_floating_point():
        dtype = x.dtype
    if x.dim() and x.stride(-1) != 1:
        rows = x.new_full((*x.shape[:-1], linear.aligned(x.shape[-1])), torch.nan, dtype=dtype)
        return rows[..., : x.shape[-1]].copy_(x)
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(dtype, copy=True)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def replay(run, args: tuple, written: list[int], dtype: torch.dtype | None = None) -> list[Tensor]:
    """All outputs of run(*args) on copies; a written argument that is no input starts as NaN."""
    copies = [copied(x, dtype) if isinstance(x, Tensor) else x for x in args]
    for i in written:
        twin = next(
            (j for j, x in enumerate(args[:i])
             if isinstance(x, Tensor) and x.numel() and x.data_ptr() == args[i].data_ptr()), None,
        )  # fmt: skip
        copies[i] = copies[i].fill_(torch.nan) if twin is None else copies[twin]
    result = run(*copies)
    outputs = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return outputs + [copies[i] for i in written]


class EveryKernelCall(TorchDispatchMode):
    """Holds each kernel's launcher, or those of some, against its fallback, on the arguments the
    ops really pass."""

    def __init__(self, only: Collection[str] = KERNELS) -> None:
        super().__init__()
        self.only = only
        self.checked: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "rlhf_fast":
            return func(*args, **(kwargs or {}))
        kernel = KERNELS[func._schema.name.split("::")[1]]
        if kernel.triton is not None and kernel.name in self.only:
            self.check(kernel, func, args)
        with self:  # an engine's own kernel calls are looked at too
            return kernel.fallback(*args)

    def check(self, kernel, func, args) -> None:
        written = [
            i
            for i, x in enumerate(func._schema.arguments)
            if x.alias_info and x.alias_info.is_write and args[i] is not None
        ]
        result = replay(kernel.launcher, args, written)
        exact = replay(kernel.fallback, args, written, torch.float64)
        dtype = torch.float32 if any_float64(args) else None
        drawn = Draws(lambda: replay(kernel.fallback, args, written, dtype))
        for i, (got, want) in enumerate(zip(result, exact, strict=True)):
            what, first = f"{kernel.name}, output {i}", next(iter(drawn))[i]
            assert got.dtype == (torch.float64 if dtype else first.dtype), what
            assert got.shape == want.shape, what
            rows = ...
            if kernel.name == "token_logprobs" and i == 2:  # the norm of an ignored row is not used
                rows = (slice(None), args[1] != -100)
            if kernel.name in STATISTICS and i == 1:  # each for itself
                for j in range(len(got)):
                    each = (one[i][j] for one in drawn)
                    compare(f"{kernel.name}, statistic {j}", got[j], want[j], each)
            else:
                compare(what, got[rows], want[rows], (one[i][rows] for one in drawn))
        self.checked.add(kernel.name)


def compare(what: str, got: Tensor, want: Tensor, drawn: Iterable[Tensor]) -> None:
    dtype, finite = got.dtype, want.isfinite()
    got, beyond = got.double(), got[~finite].double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in the wrong places"
    assert torch.equal(beyond.nan_to_num(), want[~finite].nan_to_num()), what
    worst = float((got - want)[finite].abs().max()) if finite.any() else 0.0
    limit = allowed(worst, want, drawn, dtype)
    assert worst <= limit, f"{what}: off by {worst:.3g}, allowed are {limit:.3g}"


def any_float64(args: tuple) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)


def run(sample: Sample, op: Op, dtype: torch.dtype, only: Collection[str] = KERNELS) -> set[str]:
    """The op on the sample; returned are the kernels that were checked."""

    def cast(x: object) -> object:
        if isinstance(x, tuple):  # an adapter's (A, B, scale)
            return tuple(map(cast, x))
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def leaf(x: object) -> object:
        if isinstance(x, tuple):
            return tuple(map(leaf, x))
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    arguments = {name: cast(x) for name, x in sample.arguments.items()}
    arguments |= {name: leaf(arguments[name]) for name in sample.grads}
    with EveryKernelCall(only) as mode:
        result = op.function(**{k: x for k, x in arguments.items()})
        if sample.grads:
            outputs = result if isinstance(result, tuple) else (result,)
            outputs = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
            generator = torch.Generator().manual_seed(1)
            weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
            torch.autograd.backward(outputs, weights)
    assert mode.checked or op.name in ENGINES, "no kernel was called"  # no rows, no call
    return mode.checked
