"""What a forward leaves where it makes logits tile by tile: their exponentials, in 16 bits.

With S = Σ e^z over the vocabulary, the gradient of a row's log-prob is dz/dlogits (1[v = y] −
e^z / S). A tile's e^z is written while the cache holds its logits, before S is known: 1/S is a
factor of the row, and so is what comes for its log-prob, whatever the loss. The logits themselves
reach no memory beyond the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import check
from .. import token_logprobs as from_logits
from ..registry import define_kernel
from .groups import AtLabels

FAR = 16.0  # by how many powers of 2 what a tile leaves may pass 1
LARGEST = 64 * math.log(2)  # of log S that a float32 is sure to hold, and 1/S


def hold(dtype: torch.dtype) -> bool:
    """Whether exponentials keep their digits at any size: bfloat16 has float32's exponents. float16
    has 5 bits of them: there the row's sum must be known before its gradient is written."""
    return dtype == torch.bfloat16


class Exponentials:
    """Of some rows' logits, tile by tile: −dz/dlogits e^z / (2^shift e^anchor), 0 at the label."""

    def __init__(self, left: Tensor) -> None:
        self.left = left  # [n, V], 16 bits
        self.anchors = left.new_zeros(2, len(left), dtype=check.accumulator(left))
        self.slopes = torch.zeros_like(self.anchors[0])  # dz/dlogits at the label, 0 without one
        self.before = 0  # tokens of the tiles so far

    def token_logprobs(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        per_token: Tensor | None,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel's (logp, entropy, norm) of the next tile; NaN where its label is elsewhere."""
        before, self.before = self.before, self.before + logits.shape[2]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.rlhf_fast.leave_logprobs(
            logits, labels, temperature, per_token, softcap, entropy, before, self.left,
            self.anchors, self.slopes,
        )  # fmt: skip
        return found

    def gradient(self, labels: Tensor, logp: Tensor, norm: Tensor) -> tuple[AtLabels, Tensor]:
        """Of the whole rows' log-probs: (what belongs to the labels, the units 1/S of all); labels,
        logp [n], norm [2, n] as the row kernels take and give them.

        A rank's part of the vocabulary may have so small a share of a row that float32 does not
        hold it: S then stands for the largest that it does, and the share stays nothing."""
        log_sum = norm[0].double() - self.anchors[0] + norm[1]
        log_sum = (log_sum - math.log(2) * self.anchors[1]).clamp(max=LARGEST)
        entries = -torch.expm1(logp) * self.slopes * log_sum.exp().to(logp.dtype)
        labels = labels.clamp(0, self.left.shape[1] - 1)  # one that is none has made logp NaN
        return AtLabels(labels, entries), (-log_sum).exp().to(logp.dtype)


def _leave(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    before: int,
    left: Tensor,
    anchors: Tensor,
    slopes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``token_logprobs`` of logits [1, n, size], the tokens of a tile, which `before` others lie
    before: (logp, entropy, norm), NaN where the label is not among them. Written are, of rows that
    are not ignored,

    left [n, V], the tile's columns: −dz/dlogits e^z / (2^shift e^anchor), 0 at the label;
    anchors [2, n]: (anchor, shift). The anchor is the largest z of the row's first tile that is
        not −inf throughout, and that of a later one that is 2^FAR times as large: then the columns
        before are divided by a power of 2, which rounds nothing;
    slopes [n]: dz/dlogits at the label, where it is among these tokens.
    """
    size, ignored = logits.shape[2], labels == check.IGNORE_INDEX
    known = (labels >= 0) & (labels < size)
    some = labels.masked_fill(~known, 0).masked_fill(ignored, check.IGNORE_INDEX)
    logp, H, norm = from_logits._forward(
        logits, some, temperature, per_token, softcap, entropy, False
    )
    (z,), (dz,) = from_logits._scaled(logits, temperature, per_token, softcap)
    (ignored,), (known,), (labels,) = ignored, known, labels
    top = z.amax(-1)
    first = (anchors[0] == -torch.inf) if before else torch.ones_like(known)
    above = ((top - anchors[0]) / math.log(2) - anchors[1]).masked_fill(first, 0.0)
    steps = above.floor().masked_fill(~(above > FAR), 0.0)
    left[:, :before] *= torch.exp2(-steps).unsqueeze(-1).to(left.dtype)
    moved = (first | (steps > 0)) & ~ignored
    anchors[1] = torch.where(moved, steps - above, anchors[1])
    anchors[0] = torch.where(moved, top, anchors[0])
    e = (z - anchors[0].unsqueeze(-1) - math.log(2) * anchors[1].unsqueeze(-1)).exp()
    e = (-dz * e).masked_fill(z == -torch.inf, 0.0).masked_fill(ignored.unsqueeze(-1), 0.0)
    index = labels.masked_fill(~known, 0).unsqueeze(-1)
    e.scatter_(-1, index, e.gather(-1, index).masked_fill(known.unsqueeze(-1), 0.0))
    left[:, before : before + size] = e
    slopes.copy_(torch.where(known, dz.gather(-1, index).squeeze(-1), slopes))
    return logp.masked_fill(~(known | ignored), torch.nan), H, norm


def _leave_fake(logits: Tensor, labels: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    new = logits.new_empty(labels.shape, dtype=check.accumulator(logits))
    entropy = torch.empty_like(new) if options[3] else new.new_empty(0)
    return new, entropy, new.new_empty((2, *labels.shape))


KERNEL = define_kernel(
    "leave_logprobs(Tensor logits, Tensor labels, float temperature, Tensor? per_token, "
    "float? softcap, bool entropy, int before, Tensor(a!) left, Tensor(b!) anchors, "
    "Tensor(c!) slopes) -> (Tensor, Tensor, Tensor)",
    fallback=_leave,
    fake=_leave_fake,
    triton="token_logprobs:leave_logprobs",
)
