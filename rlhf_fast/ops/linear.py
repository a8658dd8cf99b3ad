"""The linear engine: the one loop over chunks of logits that every ``linear_*`` op runs.

A chunk's logits are one matrix product into a buffer that all chunks share; a row kernel (C++ or
Triton) reads or overwrites it; the gradients are two more products. cuBLAS and MKL do the FLOPs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import check
from .registry import extension

# Without a budget. CPU (H=576, V=49152, one pass with gradients, in bare products' time): 256 rows
# 1.13, 384 rows 1.11, 512 rows 1.11. GPU: 2048 rows at V=131072; not measured on a GPU yet.
CPU_ROWS = 384
GPU_BYTES = 2**30

_budget: int | None = None


@contextlib.contextmanager
def chunk_budget(n_bytes: int) -> Iterator[None]:
    """Bytes that one chunk of logits may take inside this context.

    Small chunks save memory; each chunk reads and writes the [V, H] weight gradient once, which is
    what they cost. Results do not change beyond rounding. Without a budget a chunk is 384 rows on
    CPU and 1 GiB on a GPU.
    """
    global _budget
    check.number("n_bytes", n_bytes, above=0)
    before, _budget = _budget, int(n_bytes)
    try:
        yield
    finally:
        _budget = before


def chunk_rows(total: int, vocab: int, element_size: int, device_type: str) -> int:
    """Rows of logits in each chunk of `total`: chunks of like size, in 16s where they are large."""
    if _budget is None and device_type == "cpu":
        most = CPU_ROWS
    else:
        most = max(1, (_budget or GPU_BYTES) // max(1, vocab * element_size))
    rows = math.ceil(total / math.ceil(total / most)) if total else 0
    return min(most, math.ceil(rows / 16) * 16) if rows > 16 else rows


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check (hidden, weight, bias) and cast them to autocast's dtype where autocast is on."""
    check.floating("hidden", hidden)
    check.at_least_1d("hidden", hidden)
    check.floating("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with H = hidden's last dimension {hidden.shape[-1]}, "
            f"got {check.describe(weight)}"
        )
    check.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check.floating("bias", bias)
        check.shaped("bias", bias, [weight.shape[0]], "[V]")
        check.same_device("bias", bias, "hidden", hidden)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}; got {check.describe(x)}. "
                "Cast one of them, or use autocast"
            )
    return hidden, weight, bias


def kept_rows(keep: Tensor) -> Tensor | None:
    """Indices of the rows to compute; None when that is all of them.

    On CUDA this is the engine's one host sync: the number of rows is a tensor shape.
    """
    index = keep.nonzero().squeeze(-1)
    return None if index.numel() == keep.numel() else index


def take(x: Tensor, rows: Tensor | slice) -> Tensor:
    """x[rows], contiguous as the row kernels want it (a sum's incoming gradient has stride 0)."""
    return x[rows].contiguous() if isinstance(rows, slice) else x.index_select(0, rows)


def chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Yield (rows, logits [n, V], hidden [n, H]) for chunks of the rows in index (None: all).

    The logits buffer is reused: it belongs to the caller until the next chunk, and may be
    overwritten. On CUDA the logits are float32 out of 16-bit operands; elsewhere they have the
    operands' dtype, as an eager matrix product has.
    """
    total = hidden.shape[0] if index is None else index.numel()
    wide = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if wide else hidden.dtype
    size = chunk_rows(total, weight.shape[0], dtype.itemsize, hidden.device.type)
    # On CPU the rows of a chunk lie side by side: csrc/token_logprobs_columns.h says why.
    if hidden.device.type == "cpu":
        buffer = large_empty((weight.shape[0], size), dtype, hidden.device).t()
    else:
        buffer = large_empty((size, weight.shape[0]), dtype, hidden.device)
    head = weight.t()
    # autocast was applied by check_head; inside, products keep the dtypes they are given
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, total, max(size, 1)):
            stop = min(start + size, total)
            rows = slice(start, stop) if index is None else index[start:stop]
            x = hidden[rows] if index is None else hidden.index_select(0, rows)
            logits = buffer[: stop - start]
            if wide:
                torch.mm(x, head, out_dtype=torch.float32, out=logits)
                if bias is not None:
                    logits.add_(bias)
            elif bias is None:
                torch.mm(x, head, out=logits)
            else:
                torch.addmm(bias, x, head, out=logits)
            yield rows, logits, x


def large_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on CPU in pages of 2 MiB where the system has them.

    Writing to 113 MiB for the first time takes 24 ms in pages of 4 KiB and 7 ms in these, of the
    485 ms that the three products take at N=512, H=576, V=49152.
    """
    x = torch.empty(shape, dtype=dtype, device=device)
    if extension is not None and device.type == "cpu":
        extension.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


class Gradients:
    """Gradients of hidden, weight and bias, summed over chunks; each accumulates in float32 or
    better and is cast to its tensor's dtype once, at the end."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
        needs_bias: bool,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.accumulator = check.accumulator(hidden)
        self.first = True
        nothing = hidden.new_empty(0)
        self.d_hidden = torch.zeros_like(hidden) if needs_hidden else nothing
        self.d_weight = (
            large_empty(weight.shape, self.accumulator, weight.device) if needs_weight else nothing
        )
        self.d_bias = torch.zeros_like(bias, dtype=self.accumulator) if needs_bias else nothing
        self.needs = needs_hidden, needs_weight, needs_bias

    def add(self, rows: Tensor | slice, x: Tensor, dlogits: Tensor) -> None:
        """One chunk: dlogits [n, V] and the hidden states x [n, H] it came from."""
        needs_hidden, needs_weight, needs_bias = self.needs
        if needs_bias:
            self.d_bias += dlogits.sum(0, dtype=self.accumulator)
        operand = dlogits.to(x.dtype)
        if needs_hidden and isinstance(rows, slice):
            torch.mm(operand, self.weight, out=self.d_hidden[rows])
        elif needs_hidden:
            self.d_hidden[rows] = operand @ self.weight
        if needs_weight:
            _accumulate(self.d_weight, operand.t(), x, self.first)
            self.first = False

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = self.needs
        if needs_weight and self.first:
            self.d_weight.zero_()
        return (
            self.d_hidden,
            self.d_weight.to(self.weight.dtype) if needs_weight else self.d_weight,
            self.d_bias.to(self.bias.dtype) if needs_bias else self.d_bias,
        )


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, accumulated in total's dtype; the first product overwrites."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:  # CPU has no float32 product of 16-bit operands: widen them
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1, out=total)
