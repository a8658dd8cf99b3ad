"""How far from the exact result a right computation may be: derived, not measured on a machine.

A bound is (roundings of the formula) × (condition of the sample). Both come from the formula in
plain PyTorch, run a few times with each operation worked out in float64 and then rounded to the
dtype that it has (`Rounded`):

* float32: up or down at random. However a CPU's vectors, FMA and libraries round, it is one of
  these computations or lies between them;
* a sum or matrix product, by one rounding of Σ|terms| besides: it adds in an order of its own, and
  the roundings of its partial sums amount to that, for hundreds of terms. So a Σ that cancels to
  almost 0 is not asked for its own last digit, nor any other excused;
* 16 bits: to nearest, as everybody does it; where an adapter is on the head, whose product the
  kernels do not round by itself, up or down at random as well.

The largest error of these runs is what the formula loses on this sample. A kernel may lose SLACK
times that, as one that takes another way to the same number does (a log-sum-exp by blocks, an exp
to 2 ulp), and 4 roundings of the output's largest value. Nothing of this is done in the machine's
own float32 arithmetic: the bound is the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from drawing import arguments, run
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops.registry import Op, Sample

DRAWS = 4
SLACK, SLACK_16_BIT = 2.0, 1.1  # a result's rounding to 16 bits is the same on either way
SUMS = {"sum", "mean", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "cumsum"}
COMPOSED = {"_log_softmax", "_log_softmax_backward_data", "_softmax", "logsumexp"}  # many roundings
EXACT = {
    "where", "masked_fill", "masked_fill_", "neg", "abs", "sgn", "clamp", "copy_", "fill_", "set_",
    "clone", "amax", "maximum", "minimum", "gather", "cat", "stack", "scalar_tensor", "lift_fresh",
    "ones_like", "zeros_like", "empty_like", "new_zeros", "empty_strided", "empty", "zeros", "ones",
    "gt", "ge", "lt", "le", "eq", "ne", "bitwise_not", "bitwise_and", "logical_and_", "logical_not",
    "randn",  # or its second call here would draw other cotangents than the exact run has
}  # fmt: skip


@functools.cache
def kind(func: OpOverload) -> str:
    name = func._schema.name.split("::")[1]
    if name in EXACT or func.is_view:
        return "exact"
    if name in COMPOSED:
        return "composed"
    if func._schema.is_mutable:
        return "in place"
    return "sum" if name in SUMS else "rounds"


class Rounded(TorchDispatchMode):
    """Every operation in float64, its result rounded to the dtype that torch gives it."""

    def __init__(self, seed: int, alike: bool = True) -> None:
        """alike: what has 16 bits is rounded where the kernel rounds it, too."""
        super().__init__()
        self.alike = alike
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        what = kind(func)
        if what == "exact":
            return func(*args, **kwargs)
        if what == "composed":
            with self:
                return decomposition_table[func](*args, **kwargs)
        wide = [widened(x) for x in args]
        if what == "in place":  # self is written
            exact = func(*wide, **kwargs)
            return args[0].copy_(self.rounded(exact, args[0].dtype))
        result = func(*args, **kwargs)
        several = isinstance(result, tuple)
        if not (several or (isinstance(result, Tensor) and result.is_floating_point())):
            return result
        kwargs = {k: torch.float64 if k == "dtype" else x for k, x in kwargs.items()}
        exact, size = func(*wide, **kwargs), None
        if what == "sum":
            size = func(*[x.abs() if isinstance(x, Tensor) else x for x in wide], **kwargs)
        if several:
            return tuple(self.rounded(x, y.dtype) for x, y in zip(exact, result, strict=True))
        return self.rounded(exact, result.dtype, size)

    def rounded(self, exact: Tensor, dtype: torch.dtype, size: Tensor | None = None) -> Tensor:
        if not dtype.is_floating_point or dtype == torch.float64:
            return exact.to(dtype)
        eps = torch.finfo(torch.float32).eps
        if size is not None:
            exact = torch.where(exact.isfinite(), exact + eps * self.signs(size) * size, exact)
        nearest = exact.to(dtype)
        if dtype != torch.float32 and self.alike:
            return nearest
        half = torch.finfo(dtype).eps / 2
        moved = (exact + half * self.signs(exact) * exact).to(dtype)
        return torch.where(nearest.double() == exact, nearest, moved)

    def signs(self, x: Tensor) -> Tensor:
        drawn = torch.randint(2, x.shape, generator=self.generator, dtype=torch.float64)
        return drawn.mul_(2).sub_(1)


def widened(x: Any) -> Any:
    """In float64, in memory of its own."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.to(torch.float64, copy=True)
    return x


class Draws:
    """The outputs of the formula, rounded in a few ways, each made when it is asked for."""

    def __init__(self, formula: Callable[[], list[Tensor]], alike: bool = True) -> None:
        self.formula, self.alike = formula, alike
        self.made: list[list[Tensor]] = []

    def __iter__(self) -> Iterator[list[Tensor]]:
        for seed in range(DRAWS):
            if seed == len(self.made):
                with Rounded(seed, self.alike):
                    self.made.append([x.detach() for x in self.formula()])
            yield self.made[seed]


def allowed(
    error: float,
    exact: Tensor,
    drawn: Iterable[Tensor],
    dtype: torch.dtype | None = None,
    slack: float = SLACK,
) -> float:
    """`bound` by as few of the draws as the error keeps: it only grows with each of them."""
    seen, limit = [], 0.0
    for one in drawn:
        seen.append(one)
        limit = bound(exact, seen, dtype, slack)
        if error <= limit:
            break
    return limit


def bound(
    exact: Tensor, drawn: list[Tensor], dtype: torch.dtype | None = None, slack: float = SLACK
) -> float:
    """The largest error that an output may have; drawn are its Rounded runs.

    dtype: the output's, where drawn have another: in float64 there is nothing to round from, and
    the formula loses what it loses in float32 in units of the last digit, and `exact` loses it too.
    """
    finite = exact.isfinite()
    values = exact[finite]
    if not values.numel():
        return 0.0
    lost = max(float((x.double()[finite] - values).abs().max()) for x in drawn)
    eps, largest = torch.finfo(drawn[0].dtype).eps, float(values.abs().max())
    unit = 1.0 if exact.dim() == 0 else 0.0  # a mean ratio is kept as its excess over 1
    allowed = slack * lost + eps * max(4 * largest, unit)
    if dtype == torch.float64:
        return 2 * allowed * torch.finfo(torch.float64).eps / eps
    return allowed


def check_against_float64(
    op: Op, sample: Sample, dtype: torch.dtype, only: tuple[str, ...] | None = None
) -> None:
    """Outputs and gradients of op on the sample in dtype (of the arguments named in only)."""
    inplace = bool(sample.arguments.get("inplace_backward"))
    narrow = arguments(sample, dtype, only)
    exact_inputs = arguments(Sample("", narrow, sample.grads), torch.float64)
    exact = run(op.reference, exact_inputs, sample.grads)
    # an adapter's product is rounded to 16 bits by itself in the formula, and not in the kernels
    alike = "lora" not in sample.arguments
    drawn = Draws(lambda: run(op.reference, arguments(sample, dtype, only), sample.grads), alike)
    ours = run(op.function, narrow, sample.grads, inplace)
    slack = SLACK_16_BIT if dtype.itemsize == 2 and alike else SLACK
    for i, (got, want) in enumerate(zip(ours, exact, strict=True)):
        got, want = got.detach(), want.detach()
        assert got.shape == want.shape and got.dtype == next(iter(drawn))[i].dtype, f"result {i}"
        if not want.is_floating_point():  # a mask: there is nothing to round
            assert torch.equal(got, want), f"result {i}"
            continue
        assert torch.equal(got.isfinite(), want.isfinite()), f"result {i}"
        errors = (got.double() - want)[want.isfinite()].abs()
        worst = float(errors.max()) if errors.numel() else 0.0
        limit = allowed(worst, want, (one[i] for one in drawn), slack=slack)
        assert worst <= limit, f"result {i} is off by {worst:.3g}, allowed are {limit:.3g}"
