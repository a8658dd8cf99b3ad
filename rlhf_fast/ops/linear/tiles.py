"""A chunk's logits, made tile by tile of the vocabulary.

The row kernel takes each tile while the cache holds it, and the next one takes its place. A pass
that is to leave gradients has it leave the tiles' exponentials (``exponentials``), on a GPU; on a
CPU it writes gradients over its logits, and needs them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..support import outside
from . import chunks
from .head import Head
from .products import logits_dtype
from .tokens import Tokens, labels_of_tiles

# Numbers of a tile and rows of a chunk, at most. CPU (Intel Xeon, AVX-512, H=576 V=49152, in the
# bare product's time): of N=2048 rows 1024 at a time by 4096 tokens 1.05, 512 by 8192 1.07, 512 by
# 4096 1.08, 512 by 2048 1.17, 512 by all 1.10; of 512 rows by 8192 1.05, by all 1.07. GPU: 32 of
# the 50 MiB of an H100's L2; 8192 rows by 1024 tokens are two waves of tiles of 128 by 256 on 132
# multiprocessors (predicted). Where a row's hidden state is short, a tile there has so many numbers
# that its product takes 86 us: the host takes about 65 to launch what a tile needs (predicted).
MOST = {"cpu": (2**22, 1024), "gpu": (2**23, 8192)}
GPU_WORK = 2**35  # multiply-adds of a tile's product, at least
NARROW = 1024  # tokens of a tile, at least
STEP = 256  # and a multiple of


class TiledChunk(NamedTuple):
    """Some rows, and what their logits are made of."""

    rows: Tensor | slice
    head: Head
    hidden: Tensor  # [n, H]
    support: Tensor | None  # [n, K]
    memory: Tensor
    columns: int  # tokens of a tile
    together: int  # this chunk's rows and those after it

    def tiles(self, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(labels [1, n] of its tokens, their logits [n, size]), which the next tile overwrites."""
        weight, device = self.head.weight, self.hidden.device
        vocab = weight.shape[0]
        starts = range(0, vocab, self.columns)
        for first, own in zip(starts, labels_of_tiles(labels, self.columns, vocab), strict=True):
            tokens = Tokens(first, min(self.columns, vocab - first), vocab)
            here = slice(first, first + tokens.size)
            bias, up = (None if x is None else x[here] for x in (self.head.bias, self.head.up))
            head = self.head._replace(weight=weight[here], bias=bias, up=up)
            _, logits = chunks.chunk_buffer(
                self.memory, len(self.hidden), tokens.size, self.memory.dtype, device
            )
            chunks.make_logits(head, self.hidden, logits)
            if self.support is not None:
                absent = outside(tokens.ids(self.support), tokens.size)
                logits.masked_fill_(absent, -torch.inf)
            yield own, logits


def tiled_chunks(
    head: Head,
    keep: Tensor,
    *,
    compact: bool,
    support: Tensor | None,
    parts: int = 1,
    last: int = 0,
) -> Iterator[TiledChunk]:
    """The rows that `keep` [N] names, chunk by chunk; the last so many of them are chunks of their
    own. Other arguments as of ``chunks.chunks``. All ranks that share a vocabulary have chunks of
    the same rows."""
    vocab, device, dtype = head.weight.shape[0], keep.device, logits_dtype(head.hidden)
    index = chunks.kept_rows(keep) if compact else None
    total = keep.shape[0] if index is None else index.numel()
    numbers, most = sizes(head.hidden)
    if (budget := chunks.budget()) is not None:
        numbers = min(numbers, budget // (dtype.itemsize * parts))
    most = max(1, min(most, numbers // NARROW))
    places = [slice(0, total - last), slice(max(total - last, 0), total)]
    slices = [part for place in places for part in evenly_cut(place, most, 16)]
    rows = max((x.stop - x.start for x in slices), default=0)
    columns = evenly(vocab, max(NARROW, numbers // max(rows, 1)), STEP)
    with chunks.tile_memory(rows, columns, dtype, device) as memory:
        for here in slices:
            of = here if index is None else index[here]
            hidden = chunks.rows_of(head.hidden, of, None if compact else keep[of])
            ids = None if support is None else chunks.take(support, of)
            yield TiledChunk(of, head, hidden, ids, memory, columns, total - here.start)


def sizes(hidden: Tensor) -> tuple[int, int]:
    """(numbers of a tile, rows of a chunk), at most."""
    if hidden.device.type == "cpu":
        return MOST["cpu"]
    numbers, rows = MOST["gpu"]
    worth = min(GPU_WORK // max(hidden.shape[1], 1), chunks.GPU_BYTES // 4)
    return max(numbers, worth), rows


def evenly_cut(place: slice, most: int, step: int) -> list[slice]:
    """In nearly equal parts of `most` at most, multiples of step."""
    size = max(1, evenly(place.stop - place.start, most, step))
    starts = range(place.start, place.stop, size)
    return [slice(start, min(start + size, place.stop)) for start in starts]


def evenly(total: int, most: int, step: int) -> int:
    """The size of the parts that `total` is cut into: nearly equal ones, multiples of step."""
    if total <= most:
        return total
    size = math.ceil(total / math.ceil(total / most) / step) * step
    return size if size <= most else most - most % step or most
