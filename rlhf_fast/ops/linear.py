"""The linear engine: the one loop over chunks of logits that every ``linear_*`` op runs.

A chunk's logits are one matrix product into a buffer that all chunks share; a row kernel (C++ or
Triton) reads or overwrites it; the gradients are two more products. cuBLAS and MKL do the FLOPs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.nn.functional import pad

from . import check

# Without a budget. CPU (H=576, V=49152, one pass with gradients, in bare products' time): at N=512
# one chunk 1.02, two 1.08, four 1.16; at N=4096 chunks of 496 rows 1.02, 384 1.03, 256 1.08.
# GPU: 2048 rows at V=131072; not measured on a GPU yet.
CPU_ROWS = 512
GPU_BYTES = 2**30
# Rows of every chunk of a deterministic call, a lone row's too.
DETERMINISTIC_ROWS = 128

Lora = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r], scale

_budget: int | None = None
_free: dict[torch.dtype, Tensor] = {}  # memory of the last chunks on CPU, by dtype


@contextlib.contextmanager
def chunk_budget(n_bytes: int) -> Iterator[None]:
    """``n_bytes``, above 0: what one chunk of logits may take inside this context.

    Small chunks save memory; each chunk reads and writes the [V, H] weight gradient once, which is
    what they cost. Results do not change beyond rounding. Without a budget a chunk is at most 512
    rows on CPU and 1 GiB on a GPU, where the gradient of float32 logits of 16-bit operands takes
    half as much again. On CPU the memory is kept for the next call.
    """
    global _budget
    check.number("n_bytes", n_bytes, above=0)
    before, _budget = _budget, int(n_bytes)
    try:
        yield
    finally:
        _budget = before


def most_rows(vocab: int, element_size: int, device_type: str) -> int:
    """Rows of logits that a chunk may have."""
    if _budget is None and device_type == "cpu":
        return CPU_ROWS
    return max(1, (_budget or GPU_BYTES) // max(1, vocab * element_size))


def chunk_rows(total: int, vocab: int, element_size: int, device_type: str) -> int:
    """Rows of logits in each chunk of `total`: chunks of like size, in 16s where they are large.

    What takes more than one chunk is cut once more than it must be: k times the most rows hold less
    than 1/k of the logits at a time.
    """
    most = most_rows(vocab, element_size, device_type)
    if total <= most:
        return total
    rows = math.ceil(total / (total // most + 1))
    return min(most, math.ceil(rows / 16) * 16) if rows > 16 else rows


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None = None,
    prefix: str = "",
) -> Head:
    """The checked head, flat, in autocast's dtype where autocast is on.

    A sharded weight or bias (FSDP2's DTensor) is gathered; its gradient is averaged over the ranks
    on the way back, as FSDP2 averages the others. ``prefix`` goes before the names in errors.
    """
    hidden_name, weight_name, bias_name = (f"{prefix}{x}" for x in ("hidden", "weight", "bias"))
    check.floating(hidden_name, hidden)
    check.at_least_1d(hidden_name, hidden)
    if isinstance(hidden, DTensor):
        raise TypeError(
            f"{hidden_name} must be this rank's own tensor, got a DTensor; use .to_local()"
        )
    check.floating(weight_name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must be [V, H] with H = {hidden_name}'s last dimension "
            f"{hidden.shape[-1]}, got {check.describe(weight)}"
        )
    check.same_device(weight_name, weight, hidden_name, hidden)
    if bias is not None:
        check.floating(bias_name, bias)
        check.shaped(bias_name, bias, [weight.shape[0]], "[V]")
        check.same_device(bias_name, bias, hidden_name, hidden)
    down, up, scale = (None, None, 1.0) if lora is None else check_lora(lora, hidden, weight)
    weight, bias, down, up = (gathered(x) for x in (weight, bias, down, up))
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias, down, up = (None if x is None else x.to(dtype) for x in (bias, down, up))
    for name, x in ((weight_name, weight), (bias_name, bias), ("lora's A", down), ("lora's B", up)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of {hidden_name}, {hidden.dtype}; "
                f"got {check.describe(x)}. Cast one of them, or use autocast"
            )
    rows = hidden.reshape(-1, hidden.shape[-1])
    low = None if down is None else scale * (rows @ down.t())
    return Head(rows, weight, bias, low, up)


def check_lora(lora: Lora, hidden: Tensor, weight: Tensor) -> Lora:
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"lora must be (A [r, H], B [V, r], scale), got {check.describe(lora)}")
    down, up, scale = lora
    for name, x in (("lora's A", down), ("lora's B", up)):
        check.floating(name, x)
        check.same_device(name, x, "hidden", hidden)
    rank = down.shape[0] if down.dim() == 2 else 0
    check.shaped("lora's A", down, [rank, hidden.shape[-1]], "[r, H]")
    check.shaped("lora's B", up, [weight.shape[0], rank], "[V, r]")
    check.number("lora's scale", scale)
    return lora


def gathered(x: Tensor | None) -> Tensor | None:
    if not isinstance(x, DTensor):
        return x
    ranks = x.device_mesh.size()
    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / ranks)
    return whole


class Head(NamedTuple):
    """What the logits of N rows are made of: hidden @ weight.T + bias, and low @ up.T where an
    adapter is on the head."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    low: Tensor | None = None  # [N, r]
    up: Tensor | None = None  # [V, r]

    @property
    def products(self) -> list[tuple[Tensor, Tensor]]:
        main = (self.hidden, self.weight)
        return [main] if self.low is None else [main, (self.low, self.up)]


class Chunk(NamedTuple):
    """Some rows' logits. They lie in a buffer that the next chunk overwrites; so may the caller."""

    rows: Tensor | slice
    logits: Tensor  # [n, V]
    inputs: list[Tensor]  # hidden [n, H] and, with an adapter, low [n, r]
    padded: Tensor  # [m, V]: logits and, in a deterministic chunk, rows of no meaning up to m


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
    head: Head,
    keep: Tensor,
    *,
    compact: bool = True,
    deterministic: bool = False,
    buffers: int = 1,
) -> Iterator[Chunk]:
    """The logits of the rows that `keep` [N] names, chunk by chunk.

    compact: rows that are not kept leave before the first product, which waits for a GPU. False:
        all rows are there, those not kept with inputs of zero.
    deterministic: every product has the same shape, so that a row's bits depend on no other row.
    buffers: how many loops like this one, over the same rows, share the memory budget.
    """
    hidden, weight, bias = head.hidden, head.weight, head.bias
    index = kept_rows(keep) if compact else None
    total = hidden.shape[0] if index is None else index.numel()
    vocab, device, dtype = weight.shape[0], hidden.device, logits_dtype(hidden)
    wide = dtype != hidden.dtype
    if deterministic:
        size = min(DETERMINISTIC_ROWS, most_rows(vocab, buffers * dtype.itemsize, device.type))
    else:
        size = chunk_rows(total, vocab, buffers * dtype.itemsize, device.type)
    whole, buffer = chunk_buffer(size, vocab, dtype, device)
    for start in range(0, total, max(size, 1)):
        # Autocast was applied by check_head; products keep the dtypes they are given. It is on
        # again at the yield: of two loops side by side, the one that began first ends first.
        with torch.autocast(device.type, enabled=False):
            stop = min(start + size, total)
            rows = slice(start, stop) if index is None else index[start:stop]
            inputs = [take(x, rows) for x, _ in head.products]
            if not compact:
                inputs = [x.masked_fill(~keep[rows].unsqueeze(-1), 0.0) for x in inputs]
            if deterministic:
                operands = [pad(x, (0, 0, 0, size - (stop - start))) for x in inputs]
            else:
                operands = inputs
            padded = buffer[: operands[0].shape[0]]
            if bias is not None and not wide:
                torch.addmm(bias, operands[0], weight.t(), out=padded)
            else:
                _accumulate(padded, operands[0], weight.t(), first=True)
            if bias is not None and wide:
                padded.add_(bias)
            if head.low is not None:
                _accumulate(padded, operands[1], head.up.t(), first=False)
        yield Chunk(rows, padded[: stop - start], inputs, padded)
    if device.type == "cpu":
        _free[dtype] = whole


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """Float32 out of 16-bit operands on CUDA; elsewhere the operands' own, as in eager PyTorch.

    Logits in bfloat16 would halve their bytes, and lose what a ratio near 1 is made of: of
    SmolLM2-135M's head on 240 tokens of text, log-probs move by 0.016 nats on average and 0.11 at
    most, in float32 by 1e-6 and 1.4e-5.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return hidden.dtype


def chunk_buffer(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(memory, the same as [rows, vocab]). On CPU the rows lie side by side
    (csrc/token_logprobs_columns.h says why), and the last call's memory is used again: torch keeps
    none there, and fresh pages cost 5 % of the three products at N=512, H=576, V=49152. (Fresh
    pages of 2 MiB were no way out: 2 % in a good round, 20 % in every other one on a virtual
    machine that hands free ones back to its host.)
    """
    if device.type != "cpu":
        whole = aligned_rows(rows, vocab, dtype, device)
        return whole, whole
    whole = _free.pop(dtype, None)  # nobody else can have it until it is put back
    if whole is None or whole.numel() < rows * vocab:
        whole = torch.empty(rows * vocab, dtype=dtype)
    return whole, whole[: rows * vocab].view(vocab, rows).t()


def aligned_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, vocab], each row at a multiple of 32 bytes whatever the vocabulary: the row kernels
    and cuBLAS move 16 bytes at a time, and a row's sums are grouped the same way in every place."""
    return torch.empty((rows, math.ceil(vocab / 16) * 16), dtype=dtype, device=device)[:, :vocab]


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool
    low: bool = False
    up: bool = False


class Gradients:
    """Gradients of what a Head is made of, summed over chunks. Each accumulates in float32 or
    better and is cast to its tensor's dtype once, at the end."""

    def __init__(self, head: Head, needs: Needs) -> None:
        self.head, self.needs = head, needs
        self.accumulator = check.accumulator(head.hidden)
        self.first = True
        self.inputs = [
            torch.zeros_like(x) if needed else None
            for (x, _), needed in zip(head.products, (needs.hidden, needs.low), strict=False)
        ]
        self.weights = [
            torch.empty_like(w, dtype=self.accumulator) if needed else None
            for (_, w), needed in zip(head.products, (needs.weight, needs.up), strict=False)
        ]
        self.bias = torch.zeros_like(head.bias, dtype=self.accumulator) if needs.bias else None
        self.narrow: Tensor | None = None

    def dlogits(self, chunk: Chunk) -> Tensor:
        """[n, V] to write the gradient of a chunk's logits to, in the dtype that the products take:
        over the logits, or, where those are wider, to memory that all chunks share."""
        return self._padded(chunk)[: chunk.logits.shape[0]]

    def _padded(self, chunk: Chunk) -> Tensor:
        dtype = self.head.hidden.dtype
        if chunk.padded.dtype == dtype:
            return chunk.padded
        if self.narrow is None:  # no chunk is larger than the first
            self.narrow = aligned_rows(*chunk.padded.shape, dtype, chunk.padded.device)
        return self.narrow[: chunk.padded.shape[0]]

    def add(self, chunk: Chunk) -> None:
        """One chunk, whose gradient has been written to dlogits(chunk)."""
        padded, dlogits = self._padded(chunk), self.dlogits(chunk)
        plain = isinstance(chunk.rows, slice) and padded.shape == dlogits.shape
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.accumulator)
        products = zip(chunk.inputs, self.head.products, self.inputs, self.weights, strict=True)
        for x, (_, w), d_x, d_w in products:
            if d_x is not None and plain:
                torch.mm(dlogits, w, out=d_x[chunk.rows])
            elif d_x is not None:
                product = torch.mm(padded, w, out=padded.new_empty(padded.shape[0], w.shape[1]))
                d_x[chunk.rows] = product[: dlogits.shape[0]]  # out=: autocast leaves it alone
            if d_w is not None:
                _accumulate(d_w, dlogits.t(), x, self.first)
        self.first = False

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients in the order of Needs; empty where not asked for."""
        if self.first:
            for d_w in self.weights:
                if d_w is not None:
                    d_w.zero_()
        d_hidden, d_low = (*self.inputs, None)[:2]
        d_weight, d_up = (*self.weights, None)[:2]
        return tuple(
            self.head.hidden.new_empty(0) if d is None else d.to(self.head.hidden.dtype)
            for d in (d_hidden, d_weight, self.bias, d_low, d_up)
        )


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, accumulated in total's dtype; the first product overwrites."""
    wide = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    if wide and not total.is_cuda:  # CPU has no float32 product of 16-bit operands: widen them
        a, b, wide = a.to(total.dtype), b.to(total.dtype), {}
    if first:
        torch.mm(a, b, **wide, out=total)
    else:
        torch.addmm(total, a, b, **wide, out=total)
