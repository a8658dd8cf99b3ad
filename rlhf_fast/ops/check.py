"""Argument checks shared by the ops: one clear error that names the argument, before any kernel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

IGNORE_INDEX = -100
# To the kernels' backward: the label is in a part of the vocabulary that another rank holds. No
# label is this number by mistake: any other one out of range is an error there.
ELSEWHERE = -(2**62)

_debug: ContextVar[bool] = ContextVar("debug", default=False)  # each thread has its own


@contextlib.contextmanager
def debug() -> Iterator[None]:
    """Check label values on CUDA too, inside this context, in this thread. Each check waits for the
    device.

    On CPU an out-of-range label is always an error; on CUDA the check would stop the host until
    the device has caught up, so it runs only here.
    """
    token = _debug.set(True)
    try:
        yield
    finally:
        _debug.reset(token)


def describe(x: object) -> str:
    """What came, in one line of any length that a person reads."""
    if isinstance(x, Tensor):
        kind = str(x.dtype).removeprefix("torch.")
        if not is_strided(x):
            layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            return f"a {layout} {kind} tensor on {x.device}"
        return f"a {kind} tensor {list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {short(repr(x))}"


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def is_strided(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}")
    if not is_strided(x):
        raise TypeError(f"{name} must be a dense, strided tensor, got {describe(x)}")


def floating(name: str, x: Tensor) -> None:
    tensor(name, x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {describe(x)}")


def like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x is a floating-point tensor with the shape and the device of other."""
    floating(name, x)
    same_shape(name, x, other_name, other)


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}; got {describe(x)}"
        )
    same_device(name, x, other_name, other)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; got {describe(x)}"
        )


def shaped(name: str, x: Tensor, shape: list[int], meaning: str) -> None:
    """x has exactly this shape; ``meaning`` spells it in the op's own letters, e.g. "[V, H]"."""
    if list(x.shape) != shape:
        raise ValueError(f"{name} must be {meaning} = {shape}, got {describe(x)}")


def boolean_mask(mask: Tensor, other_name: str, other: Tensor, name: str = "mask") -> None:
    tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must be bool (True = counts), got {describe(mask)}; use {name}.bool()"
        )
    same_shape(name, mask, other_name, other)


def at_least_1d(name: str, x: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension [..., T], got {describe(x)}")


def values_can_be_read(x: Tensor) -> bool:
    """Looking at values waits for a GPU, and cannot be traced."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or _debug.get())


def labels(x: Tensor, logits_name: str, leading: Tensor, vocab: int | None) -> None:
    """labels: int64, one for each row; -100 (ignored) or in [0, vocab).

    Inside torch.compile, and where other ranks know the rest of the vocabulary (None), the values
    are left to the kernel's own check.
    """
    tensor("labels", x)
    if x.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {describe(x)}")
    if x.shape != leading.shape[:-1]:
        raise ValueError(
            f"labels must have the leading shape of {logits_name}, {list(leading.shape[:-1])}; "
            f"got {describe(x)}"
        )
    same_device("labels", x, logits_name, leading)
    if vocab is not None and values_can_be_read(x):
        label_range(x, vocab)


def label_range(x: Tensor, vocab: int) -> None:
    if x.numel() == 0:
        return
    low, high = x.masked_fill(x == IGNORE_INDEX, 0).aminmax()
    if int(low) < 0 or int(high) >= vocab:
        wrong = ((x < 0) & (x != IGNORE_INDEX)) | (x >= vocab)
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels{where} is {int(x[tuple(where)])}, outside [0, {vocab}) and not {IGNORE_INDEX}"
        )


def temperature_range(x: Tensor | None, labels: Tensor, dtype: torch.dtype) -> None:
    """One divisor a row, a number above 0 in dtype wherever the row is not ignored."""
    if x is None or not values_can_be_read(x):
        return
    wrong = ~numbers(x, dtype) & (labels != IGNORE_INDEX)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"temperature{where} is {float(x[tuple(where)])}, not finite and above 0"
            + ("" if dtype == torch.float64 else f" (float32: at least {SMALLEST:g})")
        )


def cumulative_lengths(x: Tensor, other_name: str, other: Tensor) -> None:
    """cu_seqlens: [B+1] integers rising from 0 to the length of other, as far as readable."""
    tensor("cu_seqlens", x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {describe(x)}")
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"cu_seqlens must be [B+1], got {describe(x)}")
    same_device("cu_seqlens", x, other_name, other)
    if not values_can_be_read(x):
        return
    n = other.numel()
    if int(x[0]) != 0 or int(x[-1]) != n or bool((x.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to {n}, the length of {other_name}; "
            f"got {short(str(x.tolist()))}"
        )


# What an option of a float32 computation may be, beside 0: float32 ends at 1e-38 and 3e38, and what
# an option is divided by, or divides, must stay inside, too.
SMALLEST, LARGEST = 1e-30, 1e30


def number(
    name: str,
    x: object,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """x is a finite Python number, >= low, <= high, > above where given, that an op can compute
    with in dtype."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {describe(x)}")
    if not abs(x) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {x}")
    if low is not None and x < low:
        raise ValueError(f"{name} must be at least {low}, got {x}")
    if high is not None and x > high:
        raise ValueError(f"{name} must be at most {high:g}, got {x}")
    if above is not None and x <= above:
        raise ValueError(f"{name} must be above {above}, got {x}")
    if dtype != torch.float64 and x and not SMALLEST <= abs(x) <= LARGEST:
        raise ValueError(
            f"{name} must be 0 or of size {SMALLEST:g} to {LARGEST:g} in float32, got {x}; "
            "float64 tensors take others"
        )


def numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Where x, > 0, is finite and a number that an op can compute with in dtype."""
    if dtype == torch.float64:
        return (x > 0) & (x < torch.inf)
    return (x >= SMALLEST) & (x <= LARGEST)


def flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {describe(x)}")


def process_group(name: str, x: object) -> None:
    if not isinstance(x, ProcessGroup):
        raise TypeError(f"{name} must be a ProcessGroup of this rank, got {describe(x)}")


def choice(name: str, x: object, choices: tuple[str, ...]) -> None:
    if x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {short(repr(x))}")


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: what sums and results are held in."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


@overload
def flat(x: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def flat(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None: ...
def flat(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """[..., T] -> contiguous [B, T] in dtype; the kernels of per-token tensors take only this."""
    if x is None:
        return None
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    if x.dim() != 2:  # what would change nothing is left out: each of these costs some 2 us a call
        x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    return x.contiguous()


def constant(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of a tensor whose gradient is nobody's business."""
    return flat(x.detach() if x.requires_grad else x, dtype)


def line(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[...] -> contiguous [N] in dtype."""
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    return (x if x.dim() == 1 else x.reshape(-1)).contiguous()


def reshaped(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.shape == shape else x.reshape(shape)
