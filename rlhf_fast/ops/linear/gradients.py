"""Gradients of what a head is made of, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import check, pages
from . import groups
from .chunks import Chunk, rows_of
from .groups import AtLabels, Left, Rows, Write
from .head import Head
from .products import accumulate, as_they_are, product
from .vocab_parallel import Part


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
        self.in_groups = groups.in_groups(head.hidden)
        self.parts = groups.parts(head.hidden, needs)
        self.group = groups.Group(head, needs.weight, self.dtype, part)
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
        # What a dW made at once still lacks: it is added when the group's memory is free again.
        self.left_out: tuple[AtLabels, Tensor] | None = None

    def fit(
        self, *gradients: Tensor | None, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor | None, ...]:
        """The incoming gradients [1, n] of a chunk's rows; for float16 each in its row's unit.
        temperature: the logits' divisor, and so that of dlogits."""
        fitted, self.row_units = groups.fitted(self.head.hidden, gradients, temperature)
        return fitted

    def _in_common(self, units: Tensor) -> Tensor:
        """[n]: the rows' units, as factors of their hidden states. Those of float16 are relative to
        the one unit, a power of two, of the sums over all rows: the largest so far (rows that are
        rounded to 0 beside it would not show in the sum either)."""
        if self.head.hidden.dtype != torch.float16:
            return units
        size = units.abs().max()
        exponent = torch.frexp(size).exponent.masked_fill(size == 0, groups.NOTHING)
        largest = torch.exp2(exponent.float())
        if self.unit is None:
            unit = largest
        else:
            unit = torch.maximum(self.unit, largest)
            for total in (self.weight, self.bias, self.down, self.up):
                if total is not None:
                    total *= self.unit / unit
        self.unit = unit
        return units / unit

    def add(self, chunk: Chunk, labels: Tensor, write: Write) -> None:
        """Add one chunk, whose gradient ``write`` writes; labels [1, n] as the row kernels take
        them, below 0 where a row has none here."""
        if self.group.is_full(chunk):
            self._add_group()
            self.group.make_room(len(chunk.padded), chunk.together)
        self.group.add(chunk, labels, write, self.row_units)
        if not self.in_groups:
            self._add_group()

    def _add_group(self, alone: bool = False) -> None:
        """The products of the chunks that wait. alone: they are all that there are."""
        together = self.group.taken()
        if together is not None:
            self._add(together, alone)

    def add_left(self, memory: Tensor, left: Left, keep: Tensor | None, grad_logp: Tensor) -> None:
        """Add rows whose gradient a forward has left in this memory, before all others; keep [n]:
        others may be NaN (None: there are none); grad_logp [N]."""
        rows, padded, at_labels, units = left
        grad_logp = grad_logp[rows]
        if keep is not None:
            padded.masked_fill_(~keep.unsqueeze(-1), 0.0)
            at_labels = at_labels._replace(entries=at_labels.entries.masked_fill(~keep, 0.0))
            grad_logp = grad_logp.masked_fill(~keep, 0.0)
        if units is not None:
            grad_logp = grad_logp * (units if keep is None else units.masked_fill(~keep, 0.0))
        self.group.memory = memory
        hidden = rows_of(self.head.hidden, rows, keep)
        self.group.waiting.append(Rows(rows, hidden, padded, at_labels, grad_logp))

    def _add(self, chunk: Rows, alone: bool) -> None:
        head, at_labels = self.head, chunk.at_labels
        dlogits, hidden = chunk.padded[: len(chunk.hidden)], chunk.hidden
        numbers = head.weight.numel()
        units = None if chunk.units is None else self._in_common(chunk.units)

        def in_units(rows: Tensor) -> Tensor:
            if units is None:
                return rows
            return torch.mul(rows, units.unsqueeze(-1), out=torch.empty_like(rows))

        if at_labels is not None and units is not None:
            at_labels = at_labels.scaled(units)
        with as_they_are(dlogits.device):
            d_low = None  # of hidden @ down.T
            if head.up is not None and (self.hidden is not None or self.down is not None):
                d_low = product(chunk.padded, head.up)
                if chunk.at_labels is not None:
                    d_low[: len(hidden)] += chunk.at_labels.times(head.up[chunk.at_labels.tokens])
            if self.hidden is not None:
                self._add_hidden(self.hidden, chunk, d_low)
            if alone and self.needs.weight and groups.rounded_once(numbers, self.dtype):
                self.weight = pages.empty_like(head.weight)
                accumulate(self.weight, dlogits.t(), in_units(hidden), first=True)
                assert at_labels is not None  # dlogits have 16 bits
                self.left_out = at_labels, hidden
            elif self.needs.weight:
                if self.weight is None:
                    self.weight = pages.empty_like(head.weight, self.accumulator)
                self._add_rows(self.weight, dlogits, hidden, in_units, at_labels)
            if self.down is not None and d_low is not None:
                accumulate(self.down, d_low[: len(hidden)].t(), in_units(hidden), self.first)
            if self.up is not None and head.down is not None:
                low = product(hidden, head.down.t())
                self._add_rows(self.up, dlogits, low, in_units, at_labels)
            if self.bias is not None:
                self._add_bias(self.bias, dlogits, units, at_labels)
        self.first = False

    def _add_rows(
        self,
        total: Tensor,
        dlogits: Tensor,
        rows: Tensor,
        in_units: Callable[[Tensor], Tensor],
        at_labels: AtLabels | None,
    ) -> None:
        """total += dlogits.T @ rows."""
        accumulate(total, dlogits.t(), in_units(rows), self.first)
        if at_labels is not None:
            add_in_order(total, at_labels.tokens, at_labels.times(rows))

    def _add_bias(
        self, total: Tensor, dlogits: Tensor, units: Tensor | None, at_labels: AtLabels | None
    ) -> None:
        if units is None:
            total += dlogits.sum(0, dtype=self.accumulator)
        else:
            column = units.unsqueeze(-1).to(dlogits.dtype)
            accumulate(total.unsqueeze(-1), dlogits.t(), column, first=False)
        if at_labels is not None:
            add_in_order(total, at_labels.tokens, at_labels.entries)

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
        self.group.memory = None
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
