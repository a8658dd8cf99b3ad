"""Statistics of parts as those of the whole: sums and counts are added up, never means of parts.

A step learns in minibatches, each in micro-batches, each process on a share of them; tokens that
cannot matter leave a loss, so that parts of one size may know of few tokens or of many. A part's
mean therefore counts as often as there are numbers in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Means:
    """Weighted means by name, in float64, without waiting for the device until one is read.

    names: all that may be added, the same in every process, also in one that has nothing to add.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(names)
        # [names, 2]: Σ count · mean, and Σ count. Processes and parts are added up in it.
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)

    def add(self, means: Mapping[str, Tensor | float], count: Tensor | float) -> None:
        """Means over `count` numbers; of none they say nothing, whatever they are."""
        device = self.sums.device
        n = torch.as_tensor(count, dtype=torch.float64, device=device)
        for name, mean in means.items():
            x = torch.as_tensor(mean, device=device).detach().double()
            self.sums[self.names.index(name)] += torch.stack([torch.where(n > 0, n * x, 0.0), n])

    def merge(self, other: Means) -> None:
        """Take in all that another has, of some of these names."""
        for name, sums in zip(other.names, other.sums, strict=True):
            self.sums[self.names.index(name)] += sums

    def __getitem__(self, name: str) -> Tensor:
        """NaN where nothing was added."""
        total, count = self.sums[self.names.index(name)]
        return total / count

    def known(self) -> dict[str, float]:
        """The means of which something was added."""
        rows = zip(self.names, self.sums.tolist(), strict=True)
        return {name: total / count for name, (total, count) in rows if count}


# How an update's policy differs from the one that sampled: over the tokens that it is known of.
OF_POLICY = ("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "val/ratio")
# E[(ratio − 1)²], whence the variance of all parts together: near 1 no digit is lost.
SPREAD = "val/ratio_var"


def with_variance(means: dict[str, float]) -> dict[str, float]:
    """The ratio's mean square distance from 1 as its variance."""
    if SPREAD not in means:
        return means
    return means | {SPREAD: max(0.0, means[SPREAD] - (means["val/ratio"] - 1) ** 2)}


def times(coefficient: float, x: Tensor | float) -> Tensor | float:
    """coefficient · x, and 0 where the coefficient is 0, whatever x is: infinite x included."""
    return coefficient * x if coefficient else 0.0
