"""Gradients of what a head is made of, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import check
from . import pages
from .chunks import Chunk, chunk_buffer, most_rows
from .head import Head
from .products import accumulate, as_they_are, dlogits_dtype, product
from .vocab_parallel import Part

# Of a group's 16-bit dlogits and the logits they are made of: those are made in so many parts, 512
# rows of 131072 each, which a product's time on a GPU does not show (predicted).
PARTS = 4
LARGE = 2**24  # numbers: 512 tiles of 128 × 256


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool
    down: bool
    up: bool


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


class Rows(NamedTuple):
    """A chunk whose gradient is written, as the products take it."""

    rows: Tensor | slice
    hidden: Tensor  # [n, H]
    padded: Tensor  # [m, V]: their dlogits and, in a deterministic chunk, filler rows
    at_labels: AtLabels | None
    units: Tensor | None  # [n], float32: what the dlogits are in units of; float16 only


class Gradients:
    """Gradients of what a Head is made of, summed over chunks. Each accumulates in float32 or
    better and is cast once, at the end: to its tensor's dtype, or to ``dtype``.

    Of 16-bit operands the products take 16-bit dlogits where that is faster (``dlogits_dtype``).
    Rounded, those of SmolLM2-135M's head on 240 tokens of text would be wrong by 1.9e-3 of dX; the
    entries at the labels, which are nearly all of them, stay in float32, and 4e-4 is left.

    On a GPU those of many chunks, a group, lie side by side for one product each of dX and dW. A
    group of all rows needs no float32 dW to sum in, which is why it may be as large as that.

    float16 has 5 bits of exponent: dlogits of a mean over many tokens would be rounded to 0, those
    of a large loss scale to infinity. So ``fit`` divides each row's incoming gradient by a power of
    two (the row's unit) that brings it near 1, and the products' results are multiplied by it again
    in float32.
    """

    def __init__(
        self,
        head: Head,
        needs: Needs,
        part: Part | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.head, self.part, self.needs = head, part, needs
        self.dtype = dtype or head.hidden.dtype
        self.accumulator = check.accumulator(head.hidden)
        self.groups = in_groups(head.hidden)
        self.parts = PARTS if self.groups and any(needs) else 1
        self.first = True
        self.row_units: Tensor | None = None  # of the chunk to be added (``Rows.units``)
        self.unit: Tensor | None = None  # 0-dim: what the sums over rows are in units of
        self.hidden = torch.zeros_like(head.hidden, dtype=self.dtype) if needs.hidden else None
        self.weight: Tensor | None = None
        self.down, self.up = (
            pages.empty_like(x, self.accumulator) if needed and x is not None else None
            for x, needed in ((head.down, needs.down), (head.up, needs.up))
        )
        self.bias: Tensor | None = None
        if needs.bias and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=self.accumulator)
        self.waiting: list[Rows] = []  # the chunks of a group so far
        self.group: Tensor | None = None  # [rows, V]: the place of their dlogits
        self.memory: Tensor | None = None  # and of those of the next group
        # What a dW made at once still lacks: it is added when the group's memory is free again.
        self.left_out: tuple[AtLabels, Tensor] | None = None

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

    def add(self, chunk: Chunk, labels: Tensor, write: Write) -> None:
        """Add one chunk, whose gradient ``write`` writes; labels [1, n] as the row kernels take
        them, below 0 where a row has none here."""
        padded = self._place(chunk)
        dlogits = padded[: chunk.logits.shape[0]]
        write(lambda x: x[None], labels, dlogits[None])
        at_labels = None
        if dlogits.dtype != chunk.logits.dtype:
            at_labels = taken_out(dlogits, labels, write)
        assert chunk.hidden is not None  # only a chunk left in memory has none
        self.waiting.append(Rows(chunk.rows, chunk.hidden, padded, at_labels, self.row_units))
        if not self.groups:
            self._add_group()

    def _place(self, chunk: Chunk) -> Tensor:
        """[m, V] for dlogits, in the dtype that the products take: over the logits, or, where those
        are wider, beside those of its group."""
        dtype, device = dlogits_dtype(self.head.hidden), chunk.padded.device
        if chunk.padded.dtype == dtype:
            return chunk.padded
        (rows, vocab), used = chunk.padded.shape, sum(len(x.padded) for x in self.waiting)
        if self.group is None or used + rows > len(self.group):
            self._add_group()
            size = max(rows, min(chunk.together, self._most(vocab))) if self.groups else rows
            self.memory, self.group = chunk_buffer(self.memory, size, vocab, dtype, device)
            used = 0
        return self.group[used : used + rows]

    def _most(self, vocab: int) -> int:
        """Rows of a group."""
        hidden = self.head.hidden
        most = most_rows(vocab, hidden.element_size(), hidden.device.type)
        return max(most, 2 * hidden.shape[1]) if self._summed_at_once else most

    @property
    def _summed_at_once(self) -> bool:
        """Whether a group of all rows makes a bfloat16 dW at once. A small one has fewer tiles than
        a GPU has multiprocessors: cuBLAS may then split their sums and round each part. float16
        would have to hold sums in their rows' units."""
        large = self.head.weight.numel() >= LARGE
        return self.needs.weight and self.dtype == torch.bfloat16 and large

    def _add_group(self, alone: bool = False) -> None:
        """The products of the chunks that wait. alone: they are all that there are."""
        if self.waiting:
            together = joined(self.waiting, self.group)
            self.waiting, self.group = [], None
            self._add(together, alone)

    def _add(self, chunk: Rows, alone: bool) -> None:
        head, at_labels = self.head, chunk.at_labels
        dlogits = chunk.padded[: len(chunk.hidden)]
        units = None if chunk.units is None else self._common_unit(chunk.units)
        hidden = chunk.hidden if units is None else chunk.hidden * units
        with as_they_are(dlogits.device):
            d_low = None  # of hidden @ down.T
            if head.up is not None and (self.hidden is not None or self.down is not None):
                d_low = product(chunk.padded, head.up)
                if at_labels is not None:
                    d_low[: len(hidden)] += at_labels.times(head.up[at_labels.tokens])
            if self.hidden is not None:
                self._add_hidden(self.hidden, chunk, d_low)
            if self.needs.weight and alone and self._summed_at_once:
                self.weight = pages.empty_like(head.weight)
                accumulate(self.weight, dlogits.t(), hidden, first=True)
                assert at_labels is not None  # dlogits have 16 bits
                self.left_out = at_labels, hidden
            elif self.needs.weight:
                if self.weight is None:
                    self.weight = pages.empty_like(head.weight, self.accumulator)
                self._add_rows(self.weight, dlogits, hidden, at_labels)
            if self.down is not None and d_low is not None:
                accumulate(self.down, d_low[: len(hidden)].t(), hidden, self.first)
            if self.up is not None and head.down is not None:
                low = product(hidden, head.down.t())
                self._add_rows(self.up, dlogits, low, at_labels)
            if self.bias is not None:
                self._add_bias(self.bias, dlogits, units, at_labels)
        self.first = False

    def _add_rows(
        self, total: Tensor, dlogits: Tensor, rows: Tensor, at_labels: AtLabels | None
    ) -> None:
        """total += dlogits.T @ rows."""
        accumulate(total, dlogits.t(), rows, self.first)
        if at_labels is not None:
            add_in_order(total, at_labels.tokens, at_labels.times(rows))

    def _add_bias(
        self, total: Tensor, dlogits: Tensor, units: Tensor | None, at_labels: AtLabels | None
    ) -> None:
        if units is None:
            total += dlogits.sum(0, dtype=self.accumulator)
        else:
            accumulate(total.unsqueeze(-1), dlogits.t(), units, first=False)
        if at_labels is not None:
            entries = at_labels.entries if units is None else at_labels.times(units).squeeze(-1)
            add_in_order(total, at_labels.tokens, entries)

    def _add_hidden(self, total: Tensor, chunk: Rows, d_low: Tensor | None) -> None:
        padded, at_labels, n = chunk.padded, chunk.at_labels, len(chunk.hidden)
        in_place = isinstance(chunk.rows, slice) and len(padded) == n and at_labels is None
        in_place &= total.dtype == padded.dtype
        dtype = self.accumulator if at_labels is not None else padded.dtype
        if in_place:
            d_x = total[chunk.rows]
        else:
            d_x = padded.new_empty(len(padded), total.shape[1], dtype=dtype)
        accumulate(d_x, padded, self.head.weight, first=True)
        if d_low is not None and self.head.down is not None:
            accumulate(d_x, d_low, self.head.down, first=False)
        if in_place:
            return
        d_x = d_x[:n]
        if at_labels is not None:
            d_x += at_labels.times(self.head.weight[at_labels.tokens])
        if chunk.units is not None:
            d_x *= chunk.units.unsqueeze(-1)
        total[chunk.rows] = d_x.to(self.dtype)

    def result(self) -> tuple[Tensor, ...]:
        """Gradients in the order of Needs; empty where not asked for."""
        self._add_group(alone=self.first)
        self.memory = None
        if self.weight is not None and self.left_out is not None:
            at_labels, rows = self.left_out
            add_rounded_once(self.weight, at_labels.tokens, at_labels.times(rows))
        if self.needs.weight and self.weight is None:
            self.weight = pages.empty_like(self.head.weight, self.accumulator)
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


def taken_out(dlogits: Tensor, labels: Tensor, write: Write) -> AtLabels:
    """The entries of dlogits [n, V] at the labels [1, n], in float32; in dlogits they become 0."""
    tokens, has_none = labels[0].clamp(min=0).unsqueeze(-1), (labels[0] < 0).unsqueeze(-1)
    left = dlogits.gather(-1, tokens).masked_fill(~has_none, 0.0)
    dlogits.scatter_(-1, tokens, left)
    wide = check.accumulator(dlogits)
    entries = torch.empty(1, *tokens.shape, dtype=wide, device=dlogits.device)
    write(lambda x: x.gather(-1, tokens)[None], labels.clamp(max=0), entries)
    return AtLabels(tokens.squeeze(-1), entries[0].masked_fill(has_none, 0.0).squeeze(-1))


def in_groups(hidden: Tensor) -> bool:
    """Whether dlogits wait for those of other chunks."""
    return hidden.is_cuda and dlogits_dtype(hidden) != check.accumulator(hidden)


def joined(chunks: list[Rows], group: Tensor | None) -> Rows:
    """Chunks whose dlogits lie side by side, in this order, as one."""
    first = chunks[0]
    if len(chunks) == 1 or group is None:
        return first
    at_labels = units = None
    if first.at_labels is not None:
        parts = zip(*(x.at_labels for x in chunks if x.at_labels is not None), strict=True)
        at_labels = AtLabels(*map(torch.cat, parts))
    if first.units is not None:
        units = torch.cat([x.units for x in chunks if x.units is not None])
    return Rows(
        rows_of(chunks, group.device),
        torch.cat([x.hidden for x in chunks]),
        group[: sum(len(x.padded) for x in chunks)],
        at_labels,
        units,
    )


def rows_of(chunks: list[Rows], device: torch.device) -> Tensor | slice:
    """One slice where theirs follow each other."""
    rows = [x.rows for x in chunks]
    slices = [x for x in rows if isinstance(x, slice)]
    if len(slices) == len(rows) and all(a.stop == b.start for a, b in pairwise(slices)):
        return slice(slices[0].start, slices[-1].stop)
    return torch.cat(
        [torch.arange(x.start, x.stop, device=device) if isinstance(x, slice) else x for x in rows]
    )


def add_in_order(total: Tensor, places: Tensor, rows: Tensor) -> None:
    """total[places] += rows, one after the other: the same bits every time."""
    rows = rows.to(total.dtype)
    if total.is_cuda:  # index_add_ would be atomic there, this sorts
        total.index_put_((places,), rows, accumulate=True)
    else:  # and there index_put_ would be
        total.index_add_(0, places, rows)


def add_rounded_once(total: Tensor, places: Tensor, rows: Tensor) -> None:
    """total[places] += rows [n, H] where total has 16 bits: those of one place as their sum."""
    order = places.argsort(stable=True)
    places, rows = places[order], rows[order]
    new = torch.ones_like(places)
    new[1:] = places[1:] != places[:-1]
    number = new.cumsum(0) - 1  # of each one's place among those there are
    sums = torch.zeros_like(rows)
    add_in_order(sums, number, rows)
    total[places] = (total[places] + sums[number]).to(total.dtype)  # the same for all of one place
