"""Chunks whose dlogits lie side by side, so that dX and dW are one product each of all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import check
from .chunks import Chunk, chunk_buffer, most_rows
from .head import Head
from .products import dlogits_dtype

if TYPE_CHECKING:
    from .vocab_parallel import Part

# Of a group's 16-bit dlogits and the logits they are made of: those are made in so many parts, 512
# rows of 131072 each, which a product's time on a GPU does not show (predicted).
PARTS = 4
LARGE = 2**24  # numbers: 512 tiles of 128 × 256
NOTHING = -100  # the exponent of a unit that no other row is measured against

# Writes the gradient of some columns of a chunk's logits: (what takes those columns of a tensor
# [n, V], the labels among them, out [1, n, columns]).
Write = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], None]


class AtLabels(NamedTuple):
    """The gradient at each row's label, where dlogits are of 16 bits: the one entry that is large,
    and that their rounding would hurt most. It has none in them: they are 0 there."""

    tokens: Tensor  # [n], some token where the row has no label here
    entries: Tensor  # [n], 0 where the row has no label here

    def times(self, rows: Tensor) -> Tensor:
        return self.entries.unsqueeze(-1) * rows

    def scaled(self, by: Tensor) -> AtLabels:
        return AtLabels(self.tokens, self.entries * by)


class Rows(NamedTuple):
    """Rows whose gradient is written, as the products take it."""

    rows: Tensor | slice
    hidden: Tensor  # [n, H]
    padded: Tensor  # [m, V]: their dlogits and, in a deterministic chunk, filler rows
    at_labels: AtLabels | None
    units: Tensor | None  # [n], float32: what the dlogits are in units of; None: of 1


class Left(NamedTuple):
    """What a forward leaves of its last rows, in 16 bits: the gradient of their log-probs. A row's
    own is that times what comes for its log-prob, whatever the loss: no logits are made again."""

    rows: Tensor | slice
    padded: Tensor  # [n, V]
    at_labels: AtLabels
    units: Tensor | None


def in_groups(hidden: Tensor) -> bool:
    """Whether dlogits wait for those of other chunks."""
    return hidden.is_cuda and dlogits_dtype(hidden) != check.accumulator(hidden)


def parts(hidden: Tensor, needs: list[bool] | tuple[bool, ...]) -> int:
    """In how many parts the logits that the budget allows are made (``chunks.chunks``)."""
    return PARTS if in_groups(hidden) and any(needs) else 1


def rounded_once(numbers: int, dtype: torch.dtype) -> bool:
    """Whether a group of all rows makes a dW of so many numbers and this dtype at once. A small one
    has fewer tiles than a GPU has multiprocessors: cuBLAS may then split their sums and round each
    part. float16 would have to hold sums in their rows' units."""
    return dtype == torch.bfloat16 and numbers >= LARGE


def most_together(hidden: Tensor, vocab: int, weight: bool, dtype: torch.dtype) -> int:
    """Rows of a group: as many as the budget has room for or, where they then need no float32 dW
    [vocab, H], as take its memory."""
    width = hidden.shape[1]
    most = most_rows(vocab, hidden.element_size(), hidden.device.type)
    return max(most, 2 * width) if weight and rounded_once(vocab * width, dtype) else most


class Group:
    """The chunks that wait for their products, and the memory of their dlogits.

    most: rows of a group; one that is full must be ``taken`` before the next chunk is added.
    """

    def __init__(
        self, head: Head, weight: bool, dtype: torch.dtype, part: Part | None = None
    ) -> None:
        self.dtype, self.vocab = dlogits_dtype(head.hidden), head.weight.shape[0]
        widest = self.vocab if part is None else max(part.sizes)  # the same rows on every rank
        together = in_groups(head.hidden)
        self.most = most_together(head.hidden, widest, weight, dtype) if together else 0
        self.device = head.hidden.device
        self.waiting: list[Rows] = []
        self.place: Tensor | None = None  # [rows, V], of their dlogits
        self.memory: Tensor | None = None  # and of those of the next group

    def is_full(self, chunk: Chunk) -> bool:
        """Whether this chunk has no place here. One over whose logits the gradient is written has:
        it is a group of its own."""
        if chunk.padded.dtype == self.dtype:
            return False
        return self.place is None or self._used + len(chunk.padded) > len(self.place)

    @property
    def _used(self) -> int:
        return sum(len(x.padded) for x in self.waiting)

    def make_room(self, rows: int, together: int) -> None:
        """For a chunk of so many rows, together with those after it, after the last group was
        taken."""
        size = max(rows, min(together, self.most))
        of_group = size, self.vocab, self.dtype, self.device
        self.memory, self.place = chunk_buffer(self.memory, *of_group)

    def has_room_for_all(self, rows: int, together: int) -> bool:
        """Whether such a chunk and those after it fit, as those of the last group do."""
        if self.place is None and together <= max(self.most, rows):
            self.make_room(rows, together)
        return self.place is not None

    def next(self, rows: int) -> Tensor:
        """[rows, V] for what is next."""
        assert self.place is not None
        return self.place[self._used :][:rows]

    def placed(self, chunk: Chunk) -> Tensor:
        """[m, V] for dlogits, in the dtype that the products take."""
        same = chunk.padded.dtype == self.dtype
        return chunk.padded if same else self.next(len(chunk.padded))

    def add(self, chunk: Chunk, labels: Tensor, write: Write, units: Tensor | None) -> None:
        """Add one chunk, whose gradient ``write`` writes, in these units; labels [1, n] as the row
        kernels take them, below 0 where a row has none here. The gradient takes the logits' place
        or, where those are wider, one beside those of its group."""
        padded = self.placed(chunk)
        dlogits = padded[: chunk.logits.shape[0]]
        write(lambda x: x[None], labels, dlogits[None])
        at_labels = None
        if padded.dtype != chunk.padded.dtype:
            at_labels = taken_out(dlogits, labels, write)
        assert chunk.hidden is not None  # only a chunk left in memory has none
        self.waiting.append(Rows(chunk.rows, chunk.hidden, padded, at_labels, units))

    def taken(self) -> Rows | None:
        """All that wait, as one."""
        chunks, place = self.waiting, self.place
        self.waiting, self.place = [], None
        if not chunks:
            return None
        first = chunks[0]
        if len(chunks) == 1 or place is None:
            return first
        at_labels = units = None
        if first.at_labels is not None:
            each = zip(*(x.at_labels for x in chunks if x.at_labels is not None), strict=True)
            at_labels = AtLabels(*map(torch.cat, each))
        if first.units is not None:
            units = torch.cat([x.units for x in chunks if x.units is not None])
        used = sum(len(x.padded) for x in chunks)
        hidden = torch.cat([x.hidden for x in chunks])
        return Rows(rows_of(chunks, place.device), hidden, place[:used], at_labels, units)

    def left(self) -> Left:
        """All that wait, as a forward leaves them."""
        rows = self.taken()
        assert rows is not None and rows.at_labels is not None  # there is some of 16 bits
        return Left(rows.rows, rows.padded, rows.at_labels, rows.units)


def fitted(
    hidden: Tensor, gradients: tuple[Tensor | None, ...], temperature: float | Tensor
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Incoming gradients [1, n], for float16 each in its row's unit; the units [n]."""
    if dlogits_dtype(hidden) != torch.float16:
        return gradients, None
    sizes = torch.stack([g.abs() for g in gradients if g is not None]).amax(0) / temperature
    exponents = torch.frexp(sizes).exponent.clamp(-100, 100) - 4  # sizes become 8 to 16
    exponents = exponents.masked_fill(sizes == 0, NOTHING)
    units = torch.exp2(exponents.float()).view(-1)
    return tuple(None if g is None else g / units for g in gradients), units


def taken_out(dlogits: Tensor, labels: Tensor, write: Write) -> AtLabels:
    """The entries of dlogits [n, V] at the labels [1, n], in float32; in dlogits they become 0."""
    last = dlogits.shape[1] - 1  # a label beyond it has made its row NaN
    tokens, has_none = labels[0].clamp(0, last).unsqueeze(-1), (labels[0] < 0).unsqueeze(-1)
    left = dlogits.gather(-1, tokens).masked_fill(~has_none, 0.0)
    dlogits.scatter_(-1, tokens, left)
    wide = check.accumulator(dlogits)
    entries = torch.empty(1, *tokens.shape, dtype=wide, device=dlogits.device)
    write(lambda x: x.gather(-1, tokens)[None], labels.clamp(max=0), entries)
    return AtLabels(tokens.squeeze(-1), entries[0].masked_fill(has_none, 0.0).squeeze(-1))


def rows_of(chunks: list[Rows], device: torch.device) -> Tensor | slice:
    """One slice where theirs follow each other."""
    rows = [x.rows for x in chunks]
    slices = [x for x in rows if isinstance(x, slice)]
    if len(slices) == len(rows) and all(a.stop == b.start for a, b in pairwise(slices)):
        return slice(slices[0].start, slices[-1].stop)
    return torch.cat(
        [torch.arange(x.start, x.stop, device=device) if isinstance(x, slice) else x for x in rows]
    )
