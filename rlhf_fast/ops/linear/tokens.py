"""Tokens that lie side by side in a vocabulary: those of a tile, or of a rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import check


class Tokens(NamedTuple):
    """Neighbouring tokens of a vocabulary."""

    first: int
    size: int
    vocab: int

    def labels(self, labels: Tensor) -> Tensor:
        """Labels of the vocabulary -> among these tokens, ELSEWHERE where they are not."""
        here = (labels >= self.first) & (labels < self.first + self.size)
        own = torch.where(here, labels - self.first, check.ELSEWHERE)
        wrong = (labels < 0) | (labels >= self.vocab)
        own.masked_fill_(wrong & (labels != check.ELSEWHERE), self.size)  # a GPU makes it NaN
        return own.masked_fill_(labels == check.IGNORE_INDEX, check.IGNORE_INDEX)

    def ids(self, ids: Tensor) -> Tensor:
        """Ids of the vocabulary -> among these tokens, −2 elsewhere; negative ones stay."""
        here = (ids >= self.first) & (ids < self.first + self.size)
        return torch.where(here, ids - self.first, torch.where(ids < 0, ids, -2))
