"""The linear engine: the one loop over chunks of logits that every ``linear_*`` op runs.

A chunk's logits are one matrix product into a buffer that all chunks share; a row kernel (C++ or
Triton) reads or overwrites it; the gradients are two more products. cuBLAS and MKL do the FLOPs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import check
from ..support import outside
from . import pages

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .vocab_parallel import Part

# Without a budget. CPU (H=576, V=49152, one pass with gradients, in bare products' time): at N=512
# one chunk 1.02, two 1.08, four 1.16; at N=4096 chunks of 496 rows 1.02, 384 1.03, 256 1.08.
# GPU: 2048 rows at V=131072; not measured on a GPU yet.
CPU_ROWS = 512
GPU_BYTES = 2**30
# Rows of a 16-bit head that a CPU widens at a time.
TILE = 2048
# Rows of every chunk of a deterministic call, a lone row's too.
DETERMINISTIC_ROWS = 128

Lora = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r], scale
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? down, Tensor? up"  # in kernels' schemas

_budget: ContextVar[int | None] = ContextVar("chunk_budget", default=None)  # each thread's own
_memory: dict[tuple[torch.device, torch.dtype, int], Memory] = {}


@contextlib.contextmanager
def chunk_budget(n_bytes: int) -> Iterator[None]:
    """Let one chunk of logits take at most ``n_bytes``, at least 1, inside this context.

    It holds for this thread's calls of linear ops and for their backward. Small chunks save memory
    and cost time: each chunk reads and writes the whole [V, H] weight gradient once. Results do
    not change beyond rounding. Without a budget a chunk is at most 512 rows on CPU and 1 GiB on a
    GPU. Logits are float32; of 16-bit inputs on a GPU their gradient, in 16 bits, has memory of its
    own: half as much again. A chunk's memory is kept: on CPU for the next call, on a GPU from
    a forward to its backward, which uses the logits in it again. ``release_memory`` gives it back.
    """
    check.number("n_bytes", n_bytes, low=1)
    token = _budget.set(int(n_bytes))
    try:
        yield
    finally:
        _budget.reset(token)


def budget() -> int | None:
    """This thread's budget; None: there is none."""
    return _budget.get()


def within(of_forward: int | None) -> contextlib.AbstractContextManager[None]:
    """For a backward: its forward's budget, or this thread's where that is smaller. Autograd runs
    the backward of a GPU's ops in a thread of its own, which has none."""
    given = [n for n in (of_forward, budget()) if n is not None]
    return chunk_budget(min(given)) if given else contextlib.nullcontext()


def release_memory() -> None:
    """Give back the memory that the linear ops keep between calls: the last call's chunk of logits
    and, on CPU, that of a large gradient of ``weight`` that is gone.

    A backward that would have used those logits again computes them anew. On CPU the memory goes
    back to the system, on a GPU to torch's allocator (``torch.cuda.empty_cache`` frees it there).
    """
    _memory.clear()
    pages.release()


def most_rows(vocab: int, element_size: int, device_type: str) -> int:
    """Rows of logits that a chunk may have."""
    limit = budget()
    if limit is None and device_type == "cpu":
        return CPU_ROWS
    return max(1, (GPU_BYTES if limit is None else limit) // max(1, vocab * element_size))


def chunk_rows(total: int, vocab: int, element_size: int, device_type: str) -> int:
    """Rows of logits in each chunk of `total`: of nearly equal chunks, multiples of 16 above 16.

    Where one chunk is not enough there are total // most + 1: exactly k times the most rows make
    k + 1 chunks, so that each holds less than 1/k of the logits.
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
    """Check a head's arguments and return it: hidden as [N, H], an adapter's scale multiplied in,
    and all of it in autocast's dtype where autocast is on (float64 stays float64).

    A sharded weight or bias (FSDP2's DTensor) is gathered; its gradient is averaged over the ranks
    on the way back, as FSDP2 averages the others. ``prefix`` goes before the names in errors.
    """
    hidden_name, weight_name, bias_name, down_name, up_name = (
        f"{prefix}{x}" for x in ("hidden", "weight", "bias", "lora's A", "lora's B")
    )
    check.floating(hidden_name, hidden)
    check.at_least_1d(hidden_name, hidden)
    if is_sharded(hidden):
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
    down, up, scale = (
        (None, None, 1.0) if lora is None else check_lora(lora, hidden, weight, prefix)
    )
    weight = gathered(weight)
    bias, down, up = (None if x is None else gathered(x) for x in (bias, down, up))
    hidden, weight = hidden.to(product_dtype(hidden)), weight.to(product_dtype(weight))
    bias, down, up = (None if x is None else x.to(product_dtype(x)) for x in (bias, down, up))
    for name, x in (
        (weight_name, weight), (bias_name, bias), (down_name, down), (up_name, up)
    ):  # fmt: skip
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of {hidden_name}, {hidden.dtype}; "
                f"got {check.describe(x)}. Cast one of them, or use autocast"
            )
    rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    return Head(rows, weight, bias, None if down is None else scale * down, up)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product takes x in: autocast, where it is on, leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def check_lora(lora: Lora, hidden: Tensor, weight: Tensor, prefix: str) -> Lora:
    name = f"{prefix}lora"
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"{name} must be (A [r, H], B [V, r], scale), got {check.describe(lora)}")
    down, up, scale = lora
    for part, x in (("A", down), ("B", up)):
        check.floating(f"{name}'s {part}", x)
        check.same_device(f"{name}'s {part}", x, f"{prefix}hidden", hidden)
    rank = down.shape[0] if down.dim() == 2 else 0
    check.shaped(f"{name}'s A", down, [rank, hidden.shape[-1]], "[r, H]")
    check.shaped(f"{name}'s B", up, [weight.shape[0], rank], "[V, r]")
    check.number(f"{name}'s scale", scale, dtype=check.accumulator(hidden))
    return lora


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    """A DTensor, by what it has: its class alone takes seven times as long to import as all of
    this library: 0.9 s (AMD EPYC, AVX2)."""
    return hasattr(x, "full_tensor")


def gathered(x: Tensor | DTensor) -> Tensor:
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial

    ranks = x.device_mesh.size()
    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / ranks)
    return whole


class Head(NamedTuple):
    """What the logits of N rows are made of: hidden @ weight.T + bias and, where an adapter is on
    the head, (hidden @ down.T) @ up.T. Of a row, nothing but its hidden states enters."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    down: Tensor | None = None  # [r, H], the adapter's scale in it
    up: Tensor | None = None  # [V, r]

    def constant(self) -> Head:
        """The same, with no gradient."""
        bias, down, up = (None if x is None else x.detach() for x in self[2:])
        return Head(self.hidden.detach(), self.weight.detach(), bias, down, up)


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    temperature: float | Tensor,
    kept: Tensor,
) -> tuple[Tensor, float | Tensor]:
    """For the references: (all the logits [..., V], temperature). Rows not kept [...] may hold NaN;
    their hidden states are taken as 0 and their temperature as 1."""
    hidden = hidden.masked_fill(~kept.unsqueeze(-1), 0.0)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if lora is not None:
        down, up, scale = lora
        logits = logits + scale * hidden @ down.t() @ up.t()
    if isinstance(temperature, Tensor):
        temperature = temperature.masked_fill(~kept, 1.0)
    return logits, temperature


def needs_gradient(head: Head) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)


class Chunk(NamedTuple):
    """The logits of some rows, in a buffer that the next chunk overwrites and the caller may."""

    rows: Tensor | slice
    logits: Tensor  # [n, V]
    hidden: Tensor | None  # [n, H]
    padded: Tensor  # [m, V]: logits and, in a deterministic chunk, filler rows up to m


class Memory(NamedTuple):
    """The buffer of a loop over chunks that has ended. After a forward it still holds the logits of
    the last chunk (without its hidden); the backward that comes with the same norm uses them."""

    whole: Tensor
    last: Chunk | None = None
    norm: Tensor | None = None


def left_by(norm: Tensor, hidden: Tensor, slot: int = 0) -> Memory | None:
    """The memory in which the forward pass that computed `norm` left its last chunk; None where
    another loop has taken it since."""
    key = (hidden.device, logits_dtype(hidden), slot)
    memory = _memory.get(key)
    if memory is None or memory.norm is None or memory.norm.data_ptr() != norm.data_ptr():
        return None
    return memory if _memory.pop(key, None) is memory else None


def _forget_others(key: tuple[torch.device, torch.dtype, int], buffers: int) -> None:
    """Drop the buffers that a call with this key and so many loops cannot use: those of other
    dtypes, and of the loops beyond its own."""
    device, dtype, _ = key
    for other in list(_memory):
        if other[0] == device and (other[1] != dtype or other[2] >= buffers):
            _memory.pop(other, None)


def kept_rows(keep: Tensor) -> Tensor | None:
    """Indices of the rows to compute; None when that is all of them.

    A host sync on CUDA: the number of rows is a tensor shape.
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
    slot: int = 0,
    part: Part | None = None,
    support: Tensor | None = None,
    leave_for: Tensor | None = None,
    memory: Memory | None = None,
) -> Iterator[Chunk]:
    """The logits of the rows that `keep` [N] names, chunk by chunk.

    compact: only the rows to keep are computed; the host waits for a GPU to list them. False: all
        rows are, those not kept from hidden states of zero.
    deterministic: every product has the same shape, so that a row's bits depend on no other row.
    buffers: how many loops like this one, over the same rows, share the memory budget; this one is
        number `slot` of them.
    part: this rank's part of the vocabulary; all ranks of its group then have chunks of the same
        rows.
    support: ids [N, K] of ``rlhf_fast.ops.support``, of this part's tokens: the other columns of a
        row are −inf, all are there where it has none.
    leave_for: the norm that a forward pass computes: its last chunk is left where ``left_by`` finds
        it by that norm.
    memory: what ``left_by`` found. The chunk in it comes first, unless more than a third of its
        rows are not kept: the gradients of all its n rows, 4nHV, would then cost more than the
        logits and gradients of those kept, 6HV each.
    """
    vocab, device, dtype = head.weight.shape[0], keep.device, logits_dtype(head.hidden)
    key, used = (device, dtype, slot), 0
    _forget_others(key, buffers)
    if memory is None or memory.last is None:
        memory = _memory.pop(key, None)  # nobody else can have it until it is put back
        if device.type != "cpu":  # torch knows which stream it belongs to
            memory = None
    else:
        last = memory.last
        used = last.padded.numel()
        kept = keep[last.rows]
        if not compact or 3 * int(kept.sum()) >= 2 * kept.numel():
            yield last._replace(hidden=rows_of(head.hidden, last.rows, kept))
            if isinstance(last.rows, slice):
                keep = keep[: last.rows.start]
            else:
                keep = keep.index_fill(0, last.rows, False)
        del last  # or its buffer would live as long as this loop
    index = kept_rows(keep) if compact else None
    total = keep.shape[0] if index is None else index.numel()
    most = vocab if part is None else max(part.sizes)
    if deterministic:
        size = min(DETERMINISTIC_ROWS, most_rows(most, buffers * dtype.itemsize, device.type))
    else:
        size = chunk_rows(total, most, buffers * dtype.itemsize, device.type)
    whole = None if memory is None else memory.whole
    memory = latest = None
    if whole is not None and whole.numel() > 2 * max(size * vocab, used):
        whole = None  # what is kept is bounded by the last need
    whole, buffer = chunk_buffer(whole, size, vocab, dtype, device)
    for start in range(0, total, max(size, 1)):
        stop = min(start + size, total)
        rows = slice(start, stop) if index is None else index[start:stop]
        hidden = rows_of(head.hidden, rows, None if compact else keep[rows])
        operand = pad(hidden, (0, 0, 0, size - (stop - start))) if deterministic else hidden
        padded = buffer[: operand.shape[0]]
        make_logits(head, operand, padded)
        latest = Chunk(rows, padded[: stop - start], hidden, padded)
        if support is not None:
            latest.logits.masked_fill_(outside(take(support, rows), vocab), -torch.inf)
        yield latest
    if latest is not None and leave_for is not None:
        _memory[key] = Memory(whole, latest._replace(hidden=None), leave_for)
    elif device.type == "cpu":
        _memory[key] = Memory(whole)


def rows_of(hidden: Tensor, rows: Tensor | slice, keep: Tensor | None) -> Tensor:
    """Some rows of it, of zeros where not kept (None: all are)."""
    some = take(hidden, rows)
    return some if keep is None else some.masked_fill(~keep.unsqueeze(-1), 0.0)


def make_logits(head: Head, hidden: Tensor, out: Tensor) -> None:
    """The logits of some rows of hidden."""
    with as_they_are(out.device):
        if head.bias is not None and out.dtype == head.bias.dtype:
            torch.addmm(head.bias, hidden, head.weight.t(), out=out)
        else:
            _accumulate(out, hidden, head.weight.t(), first=True)
            if head.bias is not None:
                out.add_(head.bias)
        if head.down is not None and head.up is not None:
            _accumulate(out, _product(hidden, head.down.t()), head.up.t(), first=False)


def as_they_are(device: torch.device) -> torch.autocast:
    """Autocast off: check_head has applied it, and products take the dtypes they are given. Never
    held over a chunk's yield: two loops side by side would not leave their contexts in reverse
    order."""
    return torch.autocast(device.type, enabled=False)


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """Float32, out of 16-bit operands too; float64 of float64.

    Logits in bfloat16 would halve their bytes, and lose what a ratio near 1 is made of: of
    SmolLM2-135M's head on 240 tokens of text, log-probs move by 0.016 nats on average and 0.11 at
    most, in float32 by 1e-6 and 1.4e-5.
    """
    return check.accumulator(hidden)


def dlogits_dtype(hidden: Tensor) -> torch.dtype:
    """Of the logits' gradient: what the products of a GPU take, on a CPU that of the logits, whose
    place it takes."""
    return hidden.dtype if hidden.is_cuda else logits_dtype(hidden)


def chunk_buffer(
    whole: Tensor | None, rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(memory, a view of it as [rows, vocab]); the memory is `whole` where that is large enough.

    On CPU the rows lie side by side (csrc/token_logprobs_columns.h says why), and the last call's
    memory is used again: torch keeps none there, and fresh pages cost 5 % of the three products at
    N=512, H=576, V=49152. (Fresh pages of 2 MiB were no way out: 2 % in a good round, 20 % in every
    other one on a virtual machine that hands free ones back to its host.)
    """
    width = vocab if device.type == "cpu" else aligned(vocab)
    if whole is None or whole.numel() < rows * width:
        with torch.inference_mode(False):  # or no later call could write to it
            whole = torch.empty(rows * width, dtype=dtype, device=device)
    used = whole[: rows * width]
    if device.type == "cpu":
        return whole, used.view(vocab, rows).t()
    return whole, used.view(rows, width)[:, :vocab]


def aligned(vocab: int) -> int:
    """The distance of two rows of a chunk on a GPU: each starts at a multiple of 32 bytes whatever
    the vocabulary. The row kernels and cuBLAS move 16 bytes at a time, and a row's sums are grouped
    the same way in every place."""
    return math.ceil(vocab / 16) * 16


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool
    down: bool
    up: bool


class Gradients:
    """Gradients of what a Head is made of, summed over chunks. Each accumulates in float32 or
    better and is cast once, at the end: to its tensor's dtype, or to ``dtype``.

    float16 has 5 bits of exponent: dlogits of a mean over many tokens would be rounded to 0, those
    of a large loss scale to infinity. So ``fit`` divides each row's incoming gradient by a power of
    two (the row's unit) that brings it near 1, and the products' results are multiplied by it again
    in float32. On a CPU dlogits are float32, and nothing of the kind is needed.
    """

    def __init__(
        self,
        head: Head,
        needs: Needs,
        part: Part | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.head, self.part = head, part
        self.dtype = dtype or head.hidden.dtype
        self.accumulator = check.accumulator(head.hidden)
        self.first = True
        self.row_units: Tensor | None = None  # [n], float32: what a chunk's dlogits are in units of
        self.unit: Tensor | None = None  # 0-dim: what the sums over rows are in units of
        self.hidden = torch.zeros_like(head.hidden, dtype=self.dtype) if needs.hidden else None
        self.weight, self.down, self.up = (
            pages.empty_like(x, self.accumulator) if needed and x is not None else None
            for x, needed in (
                (head.weight, needs.weight), (head.down, needs.down), (head.up, needs.up)
            )
        )  # fmt: skip
        self.bias: Tensor | None = None
        if needs.bias and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=self.accumulator)
        self.narrow: Tensor | None = None

    def fit(
        self, *gradients: Tensor | None, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor | None, ...]:
        """The incoming gradients [1, n] of a chunk's rows; for float16 each in its row's unit.
        temperature: the logits' divisor, and so that of dlogits."""
        if dlogits_dtype(self.head.hidden) != torch.float16:
            return gradients
        sizes = torch.stack([g.abs() for g in gradients if g is not None]).amax(0) / temperature
        exponents = torch.frexp(sizes).exponent.clamp(-100, 100) - 4  # sizes become 8 to 16
        exponents = exponents.masked_fill(sizes == 0, -100)  # no row is measured against these
        self.row_units = torch.exp2(exponents.float()).view(-1)
        return tuple(None if g is None else g / self.row_units for g in gradients)

    def _common_unit(self, row_units: Tensor) -> Tensor:
        """[n, 1]: the rows' units, relative to the one unit of the sums over all rows. That is the
        largest so far (rows that are rounded to 0 beside it would not show in the sum either)."""
        largest = row_units.max()
        if self.unit is None:
            unit = largest
        else:
            unit = torch.maximum(self.unit, largest)
            for total in (self.weight, self.bias, self.down, self.up):
                if total is not None:
                    total *= self.unit / unit
        self.unit = unit
        return (row_units / unit).unsqueeze(-1).to(self.head.hidden.dtype)

    def dlogits(self, chunk: Chunk) -> Tensor:
        """[n, V] to write the gradient of a chunk's logits to, in the dtype that the products take:
        over the logits, or, where those are wider, to memory that all chunks share."""
        return self._padded(chunk)[: chunk.logits.shape[0]]

    def _padded(self, chunk: Chunk) -> Tensor:
        dtype = dlogits_dtype(self.head.hidden)
        if chunk.padded.dtype == dtype:
            return chunk.padded
        rows, vocab = chunk.padded.shape
        self.narrow, padded = chunk_buffer(self.narrow, rows, vocab, dtype, chunk.padded.device)
        return padded

    def add(self, chunk: Chunk) -> None:
        """Add one chunk, whose gradient has been written to dlogits(chunk)."""
        head, padded, dlogits = self.head, self._padded(chunk), self.dlogits(chunk)
        units = None if self.row_units is None else self._common_unit(self.row_units)
        assert chunk.hidden is not None  # only a chunk left in memory has none
        hidden = chunk.hidden if units is None else chunk.hidden * units
        with as_they_are(dlogits.device):
            d_low = None  # of hidden @ down.T
            if head.up is not None and (self.hidden is not None or self.down is not None):
                d_low = _product(padded, head.up)
            if self.hidden is not None:
                self._add_hidden(self.hidden, chunk, padded, d_low)
            if self.weight is not None:
                _accumulate(self.weight, dlogits.t(), hidden, self.first)
            if self.down is not None and d_low is not None:
                own = d_low[: dlogits.shape[0]]
                _accumulate(self.down, own.t(), hidden, self.first)
            if self.up is not None and head.down is not None:
                _accumulate(self.up, dlogits.t(), _product(hidden, head.down.t()), self.first)
            if self.bias is not None and units is not None:
                _accumulate(self.bias.unsqueeze(-1), dlogits.t(), units, first=False)
        if self.bias is not None and units is None:
            self.bias += dlogits.sum(0, dtype=self.accumulator)
        self.first = False

    def _add_hidden(
        self, total: Tensor, chunk: Chunk, padded: Tensor, d_low: Tensor | None
    ) -> None:
        rows, n = chunk.rows, chunk.logits.shape[0]
        in_place = isinstance(rows, slice) and padded.shape[0] == n and self.row_units is None
        in_place &= total.dtype == padded.dtype
        d_x = total[rows] if in_place else padded.new_empty(padded.shape[0], total.shape[1])
        _accumulate(d_x, padded, self.head.weight, first=True)
        if d_low is not None and self.head.down is not None:
            _accumulate(d_x, d_low, self.head.down, first=False)
        if self.row_units is not None:
            d_x = d_x[:n].float() * self.row_units.unsqueeze(-1)
        if not in_place:
            total[rows] = d_x[:n].to(self.dtype)

    def result(self) -> tuple[Tensor, ...]:
        """Gradients in the order of Needs; empty where not asked for."""
        for total in (self.weight, self.bias, self.down, self.up):
            if total is not None and self.first:
                total.zero_()
            elif total is not None and self.unit is not None:
                total *= self.unit
        sums = [self.hidden, self.weight, self.bias, self.down, self.up]
        if self.part is not None:  # each rank has a part of the sum over the vocabulary
            for i in (0, 3):
                own = sums[i]
                sums[i] = None if own is None else self.part.sum(own)
        hidden = self.head.hidden  # each empty one is a tensor of its own: outputs must not alias
        return tuple(hidden.new_empty(0) if x is None else x.to(self.dtype) for x in sums)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, accumulated in total's dtype; the first product overwrites."""
    wide: dict[str, Any] = {}
    if not a.dtype == b.dtype == total.dtype:
        if not total.is_cuda:
            return _accumulate_widened(total, a, b, first)
        wide = {"out_dtype": total.dtype}
    if first:
        torch.mm(a, b, **wide, out=total)
    else:
        torch.addmm(total, a, b, **wide, out=total)


def _accumulate_widened(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """The same of 16-bit operands on a CPU, which has no float32 product of them: a part of the
    head at a time is widened, and used while it is in the cache."""
    a, (inner, columns) = a.to(total.dtype), b.shape
    if columns > max(inner, TILE):  # b: the head, turned over
        for start in range(0, columns, TILE):
            tile = slice(start, start + TILE)
            _accumulate(total[:, tile], a, b[:, tile].to(total.dtype), first)
        return
    for start in range(0, max(inner, 1), TILE):
        tile = slice(start, start + TILE)
        _accumulate(total, a[:, tile], b[tile].to(total.dtype), first)
        first = False


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of an adapter's low rank: on a CPU in float32, or wider, where any of it is."""
    if a.is_cuda:
        return a @ b
    dtype = check.accumulator(a, b)
    return a.to(dtype) @ b.to(dtype)
