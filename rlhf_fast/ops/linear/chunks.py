"""The linear engine: the one loop over chunks of logits that every ``linear_*`` op runs.

A chunk's logits are one matrix product into a buffer that all chunks share; a row kernel (C++ or
Triton) reads or overwrites it; the gradients are two more products. cuBLAS and MKL do the FLOPs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import check, pages
from ..support import outside
from .head import Head
from .products import accumulate, as_they_are, logits_dtype, product

if TYPE_CHECKING:
    from .groups import Left
    from .vocab_parallel import Part

# Without a budget. CPU (H=576, V=49152, one pass with gradients, in bare products' time): at N=512
# one chunk 1.02, two 1.08, four 1.16; at N=4096 chunks of 496 rows 1.02, 384 1.03, 256 1.08.
# GPU: 2048 rows at V=131072; not measured on a GPU yet.
CPU_ROWS = 512
GPU_BYTES = 2**30
# Rows of every chunk of a deterministic call, a lone row's too.
DETERMINISTIC_ROWS = 128

TILES = -1  # the slot of the memory of tiles; others are numbers of loops

_budget: ContextVar[int | None] = ContextVar("chunk_budget", default=None)  # each thread's own
_memory: dict[tuple[torch.device, torch.dtype, int], Memory] = {}


@contextlib.contextmanager
def chunk_budget(n_bytes: int) -> Iterator[None]:
    """Let one chunk of logits take at most ``n_bytes``, at least 1, inside this context.

    It holds for this thread's calls of linear ops and for their backward. Small chunks save memory
    and cost time: each chunk reads and writes the whole [V, H] weight gradient once. Results do
    not change beyond rounding. Without a budget a chunk is at most 512 rows on CPU and 1 GiB on a
    GPU. Logits are float32. Of 16-bit inputs their gradient has memory of its own where it is of 16
    bits too: on a CPU with AMX half as much again; on a GPU four times the logits, which then are
    made in parts. (There the gradients of all rows may take what a float32 gradient of ``weight``
    would, which then is not needed.) A chunk's memory is kept: on CPU for the next call, on a GPU
    from a forward to its backward, which uses the logits in it again or their gradient.
    ``release_memory`` gives it back.

    Where no gradient is wanted, and of bfloat16 on a GPU where no entropy's is, too,
    ``linear_token_logprobs`` and ``linear_policy_loss`` have no more of the logits than a tile of
    some rows and some tokens: 16 MiB on CPU, 32 on a GPU (more where H is less than 4096, 146 at
    896, 1 GiB at most), or the budget (of that gradient a quarter of it) where that is less, but at
    least 1024 tokens of a row.
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
    and, on CPU, that of a large gradient of ``weight`` or of logits that is gone.

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

    As few as can be, up to eight; from there on exactly k times the most rows make k + 1 chunks,
    so that a chunk and what lies beside it are less than 1/k of the logits. (Two chunks of 512
    rows take .97 to 1 times as long as three of 352, four .98 to 1 times as long as five of 416,
    on an Intel Xeon with AVX-512.)
    """
    most = most_rows(vocab, element_size, device_type)
    if total <= most:
        return total
    count = math.ceil(total / most) if total < 8 * most else total // most + 1
    rows = math.ceil(total / count)
    return min(most, math.ceil(rows / 16) * 16) if rows > 16 else rows


class Chunk(NamedTuple):
    """The logits of some rows, in a buffer that the next chunk overwrites and the caller may."""

    rows: Tensor | slice
    logits: Tensor  # [n, V]
    hidden: Tensor | None  # [n, H]
    padded: Tensor  # [m, V]: logits and, in a deterministic chunk, filler rows up to m
    together: int  # this chunk's rows and those after it, whose gradients may share a product

    def tiles(self, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """One of all tokens; ``tiles.TiledChunk`` has more."""
        return [(labels, self.logits)]


class Memory(NamedTuple):
    """The buffer of a loop over chunks that has ended. After a forward it still holds the logits of
    the last chunk (without its hidden), or the gradient of those of a last group; the backward that
    comes with the same norm uses them."""

    whole: Tensor
    last: Chunk | Left | None = None
    norm: Tensor | None = None


def leave(whole: Tensor, left: Left, norm: Tensor, hidden: Tensor) -> None:
    """Keep what a forward wrote for its backward, which finds it by ``left_by``."""
    _memory[hidden.device, logits_dtype(hidden), 0] = Memory(whole, left, norm)


def forget_left(hidden: Tensor) -> None:
    """Before a forward that leaves something else: two would take twice the memory."""
    _memory.pop((hidden.device, logits_dtype(hidden), 0), None)


def left_by(norm: Tensor, hidden: Tensor, slot: int = 0) -> Memory | None:
    """The memory in which the forward pass that computed `norm` left its last chunk; None where
    another loop has taken it since."""
    key = (hidden.device, logits_dtype(hidden), slot)
    memory = _memory.get(key)
    if memory is None or memory.norm is None or memory.norm.data_ptr() != norm.data_ptr():
        return None
    return memory if _memory.pop(key, None) is memory else None


@contextlib.contextmanager
def tile_memory(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """Memory of tiles [rows, columns] (``chunk_buffer``), kept on CPU beside that of chunks: what a
    forward has left there for its backward stays."""
    key = device, dtype, TILES
    _forget_others(key, buffers=2)
    memory = _memory.pop(key, None)  # nobody else can have it until it is put back
    whole = None if memory is None else memory.whole
    if whole is not None and whole.numel() > 2 * rows * columns:
        whole = None  # what is kept is bounded by the last need
    whole, _ = chunk_buffer(whole, rows, columns, dtype, device)
    yield whole
    if device.type == "cpu":
        _memory[key] = Memory(whole)


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


class Plan(NamedTuple):
    """What a loop over chunks has to compute; making it is what the host waits for a GPU for."""

    again: bool  # begin with the chunk in memory
    complete: bool  # and all of its rows are known to be kept
    keep: Tensor  # [N]: the rows to keep; where that chunk was the last slice of rows, up to it
    listed: Tensor | None  # of those to keep beyond that chunk; None: all of keep

    @property
    def total(self) -> int:
        """How many rows there are beyond that chunk."""
        return self.keep.shape[0] if self.listed is None else self.listed.numel()


def planned(keep: Tensor, compact: bool, memory: Memory | None) -> Plan:
    """The chunk in memory comes first, unless more than a third of its rows are not kept: the
    gradients of all its n rows, 4nHV, would then cost more than the logits and gradients of those
    kept, 6HV each."""
    again = complete = False
    if memory is not None and memory.last is not None:
        rows = memory.last.rows
        kept = keep[rows]
        number = int(kept.sum()) if compact else 0
        again, complete = not compact or 3 * number >= 2 * len(kept), number == len(kept)
        if again:
            keep = (
                keep[: rows.start] if isinstance(rows, slice) else keep.index_fill(0, rows, False)
            )
    return Plan(again, complete, keep, kept_rows(keep) if compact else None)


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
    parts: int = 1,
    part: Part | None = None,
    support: Tensor | None = None,
    leave_for: Tensor | None = None,
    memory: Memory | None = None,
    plan: Plan | None = None,
) -> Iterator[Chunk]:
    """The logits of the rows that `keep` [N] names, chunk by chunk.

    compact: only the rows to keep are computed; the host waits for a GPU to list them. False: all
        rows are, those not kept from hidden states of zero.
    deterministic: every product has the same shape, so that a row's bits depend on no other row.
    buffers: how many loops like this one, over the same rows, share the memory budget; this one is
        number `slot` of them.
    parts: in how many parts the logits that the budget allows are made (``Gradients.parts``).
    part: this rank's part of the vocabulary; all ranks of its group then have chunks of the same
        rows.
    support: ids [N, K] of ``rlhf_fast.ops.support``, of this part's tokens: the other columns of a
        row are −inf, all are there where it has none.
    leave_for: the norm that a forward pass computes: its last chunk is left where ``left_by`` finds
        it by that norm.
    memory: what ``left_by`` found; ``planned`` says when the chunk in it comes first.
    plan: of these rows and this memory, where two loops share one.
    """
    plan = planned(keep, compact, memory) if plan is None else plan
    vocab, device, dtype = head.weight.shape[0], keep.device, logits_dtype(head.hidden)
    key, used = (device, dtype, slot), 0
    _forget_others(key, buffers)
    if memory is None or not isinstance(memory.last, Chunk):
        memory = _memory.pop(key, None)  # nobody else can have it until it is put back
        if device.type != "cpu":  # torch knows which stream it belongs to
            memory = None
    else:
        last = memory.last
        used = last.padded.numel()
        if plan.again:
            hidden = rows_of(head.hidden, last.rows, keep[last.rows])
            together = len(last.padded) + (0 if deterministic else plan.total)
            yield last._replace(hidden=hidden, together=together)
        del last  # or its buffer would live as long as this loop
    keep, index, total = plan.keep, plan.listed, plan.total
    most = vocab if part is None else max(part.sizes)
    element_size = buffers * parts * dtype.itemsize
    if deterministic:
        size = min(DETERMINISTIC_ROWS, most_rows(most, element_size, device.type))
    else:
        size = chunk_rows(total, most, element_size, device.type)
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
        together = len(padded) if deterministic else total - start
        latest = Chunk(rows, padded[: stop - start], hidden, padded, together)
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
            accumulate(out, hidden, head.weight.t(), first=True)
            if head.bias is not None:
                out.add_(head.bias)
        if head.down is not None and head.up is not None:
            accumulate(out, product(hidden, head.down.t()), head.up.t(), first=False)


def chunk_buffer(
    whole: Tensor | None, rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(memory, a view of it as [rows, vocab]); the memory is `whole` where that is large enough.

    On CPU the rows lie side by side (csrc/token_logprobs_columns.h says why), and the last call's
    memory is used again: torch keeps none there, and fresh pages cost 5 % of the three products at
    N=512, H=576, V=49152. (Fresh pages of 2 MiB were no way out: 2 % in a good round, 20 % in every
    other one on a virtual machine that hands free ones back to its host.)
    """
    on_cpu = device.type == "cpu"
    lines, width = (vocab, apart(rows)) if on_cpu else (rows, aligned(vocab))
    if whole is None or whole.numel() < lines * width:
        with torch.inference_mode(False):  # or no later call could write to it
            whole = torch.empty(lines * width, dtype=dtype, device=device)
    used = whole[: lines * width].view(lines, width)
    if on_cpu:
        return whole, used[:, :rows].t()
    used[:, vocab:] = 0.0  # what a load of 16 bytes at a row's end may read
    return whole, used[:, :vocab]


def apart(rows: int) -> int:
    """The distance of two tokens of a chunk on a CPU. At a multiple of 1 KiB those that a row
    kernel reads at a time, 16, would share few lines of the cache: 512 rows took 1.2 times as long
    (AMD EPYC, AVX2); the products take no notice."""
    return rows + 16 if rows and rows % 256 == 0 else rows


def aligned(vocab: int) -> int:
    """The distance of two rows of a chunk on a GPU: each starts at a multiple of 32 bytes whatever
    the vocabulary. The row kernels and cuBLAS move 16 bytes at a time, and a row's sums are grouped
    the same way in every place."""
    return math.ceil(vocab / 16) * 16
