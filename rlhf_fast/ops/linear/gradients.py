"""Gradients of what a head is made of, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import check
from . import pages
from .chunks import Chunk, chunk_buffer
from .head import Head
from .products import accumulate, as_they_are, dlogits_dtype, product
from .vocab_parallel import Part


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


class Gradients:
    """Gradients of what a Head is made of, summed over chunks. Each accumulates in float32 or
    better and is cast once, at the end: to its tensor's dtype, or to ``dtype``.

    Of 16-bit operands the products take 16-bit dlogits where that is faster (``dlogits_dtype``).
    Rounded, those of SmolLM2-135M's head on 240 tokens of text would be wrong by 1.9e-3 of dX; the
    entries at the labels, which are nearly all of them, stay in float32, and 4e-4 is left.

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

    def _padded(self, chunk: Chunk) -> Tensor:
        """[m, V] for dlogits, in the dtype that the products take: over the logits, or, where those
        are wider, in memory that all chunks share."""
        dtype = dlogits_dtype(self.head.hidden)
        if chunk.padded.dtype == dtype:
            return chunk.padded
        rows, vocab = chunk.padded.shape
        self.narrow, padded = chunk_buffer(self.narrow, rows, vocab, dtype, chunk.padded.device)
        return padded

    def add(self, chunk: Chunk, labels: Tensor, write: Write) -> None:
        """Add one chunk, whose gradient ``write`` writes; labels [1, n] as the row kernels take
        them, below 0 where a row has none here."""
        padded = self._padded(chunk)
        dlogits = padded[: chunk.logits.shape[0]]
        write(lambda x: x[None], labels, dlogits[None])
        at_labels = None
        if dlogits.dtype != chunk.logits.dtype:
            at_labels = taken_out(dlogits, labels, write)
        self._add(chunk, padded, at_labels)

    def _add(self, chunk: Chunk, padded: Tensor, at_labels: AtLabels | None) -> None:
        head, dlogits = self.head, padded[: chunk.logits.shape[0]]
        units = None if self.row_units is None else self._common_unit(self.row_units)
        assert chunk.hidden is not None  # only a chunk left in memory has none
        hidden = chunk.hidden if units is None else chunk.hidden * units
        with as_they_are(dlogits.device):
            d_low = None  # of hidden @ down.T
            if head.up is not None and (self.hidden is not None or self.down is not None):
                d_low = product(padded, head.up)
                if at_labels is not None:
                    d_low[: dlogits.shape[0]] += at_labels.times(head.up[at_labels.tokens])
            if self.hidden is not None:
                self._add_hidden(self.hidden, chunk, padded, d_low, at_labels)
            if self.weight is not None:
                self._add_rows(self.weight, dlogits, hidden, at_labels)
            if self.down is not None and d_low is not None:
                own = d_low[: dlogits.shape[0]]
                accumulate(self.down, own.t(), hidden, self.first)
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

    def _add_hidden(
        self,
        total: Tensor,
        chunk: Chunk,
        padded: Tensor,
        d_low: Tensor | None,
        at_labels: AtLabels | None,
    ) -> None:
        rows, n = chunk.rows, chunk.logits.shape[0]
        in_place = isinstance(rows, slice) and padded.shape[0] == n and at_labels is None
        in_place &= total.dtype == padded.dtype
        dtype = self.accumulator if at_labels is not None else padded.dtype
        d_x = total[rows]
        if not in_place:
            d_x = padded.new_empty(padded.shape[0], total.shape[1], dtype=dtype)
        accumulate(d_x, padded, self.head.weight, first=True)
        if d_low is not None and self.head.down is not None:
            accumulate(d_x, d_low, self.head.down, first=False)
        if in_place:
            return
        d_x = d_x[:n]
        if at_labels is not None:
            d_x += at_labels.times(self.head.weight[at_labels.tokens])
        if self.row_units is not None:
            d_x *= self.row_units.unsqueeze(-1)
        total[rows] = d_x.to(self.dtype)

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


def taken_out(dlogits: Tensor, labels: Tensor, write: Write) -> AtLabels:
    """The entries of dlogits [n, V] at the labels [1, n], in float32; in dlogits they become 0."""
    tokens, has_none = labels[0].clamp(min=0).unsqueeze(-1), (labels[0] < 0).unsqueeze(-1)
    left = dlogits.gather(-1, tokens).masked_fill(~has_none, 0.0)
    dlogits.scatter_(-1, tokens, left)
    wide = check.accumulator(dlogits)
    entries = torch.empty(1, *tokens.shape, dtype=wide, device=dlogits.device)
    write(lambda x: x.gather(-1, tokens)[None], labels.clamp(max=0), entries)
    return AtLabels(tokens.squeeze(-1), entries[0].masked_fill(has_none, 0.0).squeeze(-1))


def add_in_order(total: Tensor, places: Tensor, rows: Tensor) -> None:
    """total[places] += rows, one after the other: the same bits every time."""
    rows = rows.to(total.dtype)
    if total.is_cuda:  # index_add_ would be atomic there, this sorts
        total.index_put_((places,), rows, accumulate=True)
    else:  # and there index_put_ would be
        total.index_add_(0, places, rows)
