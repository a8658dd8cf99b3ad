"""support_logits: the logits of a few tokens a row, without the product of the whole head.

What the linear ops with ``support=`` are made of where a row's set is small. Where it is large the
row goes through a chunk like any other, its other columns at −inf (``chunks.chunks``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check, pages
from ..registry import define_kernel, save_for_backward
from ..support import capped, positions
from . import vocab_parallel
from .head import Head
from .products import as_they_are

# A set is small if the vocabulary is this many times as large. In times of the dense op (AMD EPYC,
# AVX2, N=512 H=576 V=49152, forward and backward), token by token and in a chunk: K=1000 .50 and
# 1.29, 2000 .97 and 1.10, 3000 1.45 and 1.17, 6000 3.19 and 1.35. They cross near V/22.
SMALL = 16


class Rows(NamedTuple):
    """N rows, in two parts: those with a small set, and the others."""

    ids: Tensor  # [N, K], the small sets; −1 in the other rows
    at: Tensor  # [N], where in its set the label stands; −100 in the other rows
    others: Tensor | None  # [N], the other rows' labels; −100 in the rows above. None: no others
    part: vocab_parallel.Part | None
    softcap: float | None

    def logits(self, head: Head) -> Tensor:
        """Of the small sets, [N, K], after the softcap."""
        return capped(logits(head, self.ids, self.part), self.ids, self.softcap)


def rows(head: Head, labels: Tensor, ids: Tensor, softcap: float | None, group: str | None) -> Rows:
    """labels [N], ids [N, K] as ``rlhf_fast.ops.support.checked`` gives them. With a softcap every
    set is small: it would make −softcap of −inf."""
    part, _ = vocab_parallel.part_of(head.weight, labels, group)
    vocab = head.weight.shape[0] if part is None else sum(part.sizes)
    at = positions(ids, labels, vocab)
    sizes = (ids >= 0).sum(-1)
    small = sizes > 0
    if softcap is None:
        small &= sizes * SMALL <= vocab
    others = labels.masked_fill(small, check.IGNORE_INDEX)
    none = check.values_can_be_read(labels) and bool((others == check.IGNORE_INDEX).all())
    ids, at = ids.masked_fill(~small.unsqueeze(-1), -1), at.masked_fill(~small, check.IGNORE_INDEX)
    return Rows(ids, at, None if none else others, part, softcap)


def of_part(ids: Tensor | None, part: vocab_parallel.Part | None) -> Tensor | None:
    return ids if ids is None or part is None else part.tokens.ids(ids)


def logits(head: Head, ids: Tensor, part: vocab_parallel.Part | None) -> Tensor:
    """z[n, k] = logit of token ids[n, k] in row n, −inf where ids is below 0; [N, K] float32
    (float64 for float64 inputs), with gradients. Rows without a token may hold NaN.

    2NKH FLOPs and NKH elements of W read, where the head costs 2NHV; the backward twice that. The
    gradient of W is one row for each token that is in any set, added up in float32 in the order of
    the rows.
    """
    hidden, weight, bias, down, up = head
    own = ids
    if part is not None:
        own = part.tokens.ids(ids)
        hidden, down = part.shared(hidden), None if down is None else part.shared(down)
    z: Tensor = torch.ops.rlhf_fast.support_logits(
        hidden.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        own,
    )
    if down is not None and up is not None:
        hidden = hidden.masked_fill((ids < 0).all(-1, keepdim=True), 0.0)
        with as_they_are(z.device):
            low = hidden @ down.t()
        z = z + torch.ops.rlhf_fast.support_logits(low, up.contiguous(), None, own)
    if part is None:
        return z
    return part.summed(z.masked_fill(own < 0, 0.0)).masked_fill(ids < 0, -torch.inf)


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    wide = check.accumulator(hidden)
    tokens = ids.clamp(min=0)
    z = (hidden.to(wide).unsqueeze(1) * weight[tokens].to(wide)).sum(-1)
    if bias is not None:
        z = z + bias[tokens]
    return z.masked_fill(ids < 0, -torch.inf)


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Writes the gradients that are there to be written."""
    wide = check.accumulator(hidden)
    tokens, g = ids.clamp(min=0), grad.masked_fill(ids < 0, 0.0)
    if d_hidden is not None:
        d_hidden.copy_((g.unsqueeze(-1) * weight[tokens].to(wide)).sum(1))
    if d_weight is not None:
        matters = (g != 0).any(-1, keepdim=True)
        rows = g.unsqueeze(-1) * hidden.to(wide).masked_fill(~matters, 0.0).unsqueeze(1)
        sums = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        d_weight.copy_(sums.index_add_(0, tokens.reshape(-1), rows.flatten(0, 1)))
    if d_bias is not None:
        sums = torch.zeros(d_bias.shape, dtype=wide, device=d_bias.device)
        d_bias.copy_(sums.index_add_(0, tokens.reshape(-1), g.reshape(-1)))


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=check.accumulator(hidden))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_for_backward(ctx, *inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, ids = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    d_weight = pages.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if needs[2] else None
    torch.ops.rlhf_fast.support_logits_backward(
        grad.contiguous(), hidden, weight, ids, d_hidden, d_weight, d_bias
    )
    return d_hidden, d_weight, d_bias, None


FORWARD = define_kernel(
    "support_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids) -> Tensor",
    fallback=_forward,
    fake=_fake,
    triton="support:support_logits",
    backward=_autograd,
    setup_context=_setup_context,
)
BACKWARD = define_kernel(
    "support_logits_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor ids, "
    "Tensor(a!)? d_hidden, Tensor(b!)? d_weight, Tensor(c!)? d_bias) -> ()",
    fallback=_backward,
    fake=lambda *_: None,
    triton="support:support_logits_backward",
)
