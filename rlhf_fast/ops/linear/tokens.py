"""Tokens that lie side by side in a vocabulary: those of a tile, or of a rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import check


def own_labels(labels: Tensor, first: int | Tensor, size: int | Tensor, vocab: int) -> Tensor:
    """Labels of the vocabulary -> among the `size` tokens from first on, ELSEWHERE where they are
    not."""
    here = (labels >= first) & (labels < first + size)
    own = torch.where(here, labels - first, check.ELSEWHERE)
    wrong = (labels < 0) | (labels >= vocab)
    own = torch.where(wrong & (labels != check.ELSEWHERE), size, own)  # a GPU makes it NaN
    return own.masked_fill_(labels == check.IGNORE_INDEX, check.IGNORE_INDEX)


def labels_of_tiles(labels: Tensor, columns: int, vocab: int) -> Tensor:
    """[tiles, *labels.shape]: the same for each tile of so many tokens, in a few launches."""
    first = torch.arange(0, vocab, columns, device=labels.device)
    first = first.view(-1, *(1 for _ in labels.shape))
    return own_labels(labels, first, (vocab - first).clamp(max=columns), vocab)


class Tokens(NamedTuple):
    """Neighbouring tokens of a vocabulary."""

    first: int
    size: int
    vocab: int

    def labels(self, labels: Tensor) -> Tensor:
        """Labels of the vocabulary -> among these tokens, ELSEWHERE where they are not."""
        return own_labels(labels, self.first, self.size, self.vocab)

    def ids(self, ids: Tensor) -> Tensor:
        """Ids of the vocabulary -> among these tokens, −2 elsewhere; negative ones stay."""
        here = (ids >= self.first) & (ids < self.first + self.size)
        return torch.where(here, ids - self.first, torch.where(ids < 0, ids, -2))
