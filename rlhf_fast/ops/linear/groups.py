"""Chunks whose dlogits lie side by side, so that dX and dW are one product each of all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import check
from .chunks import Chunk, chunk_buffer, most_rows
from .head import Head
from .products import dlogits_dtype

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
    """What a forward leaves of its last rows, in 16 bits over their logits' place: the gradient of
    their log-probs. A row's own is that times what comes for its log-prob, whatever the loss: no
    logits are made again. (As E = exp(z), which leaves 1/ΣE to the backward, it would be the same
    16 bits.)"""

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


def rounded_once(head: Head, dtype: torch.dtype) -> bool:
    """Whether a group of all rows makes a dW of this dtype at once. A small one has fewer tiles
    than a GPU has multiprocessors: cuBLAS may then split their sums and round each part. float16
    would have to hold sums in their rows' units."""
    return dtype == torch.bfloat16 and head.weight.numel() >= LARGE


def most_together(head: Head, weight: bool, dtype: torch.dtype) -> int:
    """Rows of a group: as many as the budget has room for or, where they then need no float32 dW,
    as take its memory."""
    hidden = head.hidden
    most = most_rows(head.weight.shape[0], hidden.element_size(), hidden.device.type)
    return max(most, 2 * hidden.shape[1]) if weight and rounded_once(head, dtype) else most


class Group:
    """The chunks that wait for their products, and the memory of their dlogits.

    most: rows of a group; one that is full must be ``taken`` before the next chunk is added.
    """

    def __init__(self, head: Head, weight: bool, dtype: torch.dtype) -> None:
        self.dtype = dlogits_dtype(head.hidden)
        self.most = most_together(head, weight, dtype) if in_groups(head.hidden) else 0
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

    def make_room(self, chunk: Chunk) -> None:
        """For this chunk and those after it, after the last group was taken."""
        rows, vocab = chunk.padded.shape
        size = max(rows, min(chunk.together, self.most))
        device = chunk.padded.device
        self.memory, self.place = chunk_buffer(self.memory, size, vocab, self.dtype, device)

    def has_room_for_all(self, chunk: Chunk) -> bool:
        """Whether this chunk and those after it fit, as those of the last group do."""
        if self.place is None and chunk.together <= max(self.most, len(chunk.padded)):
            self.make_room(chunk)
        return self.place is not None

    def placed(self, chunk: Chunk) -> Tensor:
        """[m, V] for dlogits, in the dtype that the products take."""
        if chunk.padded.dtype == self.dtype:
            return chunk.padded
        assert self.place is not None
        return self.place[self._used :][: len(chunk.padded)]

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
    tokens, has_none = labels[0].clamp(min=0).unsqueeze(-1), (labels[0] < 0).unsqueeze(-1)
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
