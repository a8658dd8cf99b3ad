"""A head whose vocabulary is shared out over a process group: each rank holds a part of it.

Each rank runs the engine on its part, with logits of its own only. The forward's row kernels see a
part of the vocabulary, or a tile of it; two small all-reduces a chunk turn their results into those
over all of it.
From there on a rank needs nothing of the others: the row kernels' backward is the same for a part,
except that a row's label may be in another one (``check.ELSEWHERE``). Gradients of what all ranks
hold are summed over them at the end (``chunks.Gradients``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .. import check
from . import chunks as linear
from .tokens import Tokens

if TYPE_CHECKING:
    from .exponentials import Exponentials


class Part(NamedTuple):
    """This rank's part of the vocabulary; the parts lie in rank order."""

    group: dist.ProcessGroup
    sizes: list[int]  # of each rank's part

    @property
    def tokens(self) -> Tokens:
        rank = dist.get_rank(self.group)
        return Tokens(sum(self.sizes[:rank]), self.sizes[rank], sum(self.sizes))

    def shared(self, x: Tensor) -> Tensor:
        """x, that all ranks hold and each uses for its part: its gradient is summed over them."""
        same: Tensor = _Shared.apply(x, self)  # type: ignore[no-untyped-call]
        return same

    def summed(self, x: Tensor) -> Tensor:
        """x summed over the ranks, which all do the same with the sum: its gradient is theirs."""
        total: Tensor = _Summed.apply(x, self)  # type: ignore[no-untyped-call]
        return total

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the ranks, in float32 or better."""
        x = x.to(check.accumulator(x))
        dist.all_reduce(x, group=self.group)
        return x


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.part.sum(grad.clone()).to(grad.dtype), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        return part.sum(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def name(group: dist.ProcessGroup | None) -> str | None:
    """The checked group, as kernels take it."""
    if group is None:
        return None
    check.process_group("group", group)
    return group.group_name


def part_of(weight: Tensor, labels: Tensor, group: str | None) -> tuple[Part | None, Tensor]:
    """(this rank's part, labels in it); (None, labels) without a group. Waits for a GPU."""
    if group is None:
        return None, labels
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    ranks: dist.ProcessGroup = resolve(group)
    own = torch.tensor([weight.shape[0], linear.most_rows(1, 1, weight.device.type)])
    own = own.to(weight.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(every, own, group=ranks)
    sizes, budgets = torch.stack(every).t().tolist()
    if 0 in sizes:
        raise ValueError(f"weight must have rows on every rank of group, got {sizes} rows")
    if len(set(budgets)) > 1:  # chunks of other rows would wait for each other
        raise ValueError(f"chunk_budget must be the same on every rank of group, got {budgets}")
    part = Part(ranks, sizes)
    if check.values_can_be_read(labels):
        check.label_range(labels, part.tokens.vocab)
    return part, part.tokens.labels(labels)


def token_logprobs(
    tiles: Iterable[tuple[Tensor, Tensor]],
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    part: Part | None,
    leave: Exponentials | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's (logp, entropy, norm) of rows whose logits these are, tile by tile of this
    part, with labels [1, n] of the tile: over the whole vocabulary, the same on every rank. Their
    exponentials go to ``leave``."""
    found, own_labels = [], []
    for own, logits in tiles:
        how = temperature, per_token, softcap, entropy
        if leave is None:
            of_tile = torch.ops.rlhf_fast.token_logprobs(logits[None], some_label(own), *how, False)
        else:
            of_tile = leave.token_logprobs(logits[None], own, *how)
        found.append(of_tile)
        own_labels.append(own)
    if len(found) == 1 and part is None:
        logp, H, norm = found[0]
        return logp, H, norm
    logps, entropies, norms = zip(*found, strict=True)
    means = torch.stack(entropies) if entropy else None
    of_tiles = [torch.stack(logps)], [torch.stack(norms, 1)], means, [-1], torch.stack(own_labels)
    (logp,), mean, (norm,) = combined(*of_tiles, part)
    return logp, logp.new_empty(0) if mean is None else mean, norm


def logits_kl(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    reverse: bool,
    part: Part | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel's (logp, ref_logp, kl, norm, ref_norm) over the whole vocabulary, of which the
    logits are a part; the same on every rank."""
    logp, ref_logp, kl, norm, ref_norm = torch.ops.rlhf_fast.logits_kl(
        logits, ref_logits, some_label(labels), temperature, per_token, softcap, reverse
    )
    if part is None:
        return logp, ref_logp, kl, norm, ref_norm
    order = 1 if reverse else -1  # the distribution that the mean is taken over comes first
    logps, whole_kl, norms = combined(
        [logp[None], ref_logp[None]][::order],
        [norm[:, None], ref_norm[:, None]][::order],
        kl[None],
        [1, -1],
        labels[None],
        part,
    )
    logp, ref_logp = logps.unbind()[::order]
    norm, ref_norm = norms.unbind()[::order]
    return logp, ref_logp, kl if whole_kl is None else whole_kl, norm, ref_norm


def some_label(labels: Tensor) -> Tensor:
    """Labels that the forward kernels can read the logit of: token 0 for one that is elsewhere."""
    return labels.masked_fill(labels == check.ELSEWHERE, 0)


def combined(
    logps: Sequence[Tensor],
    norms: Sequence[Tensor],
    mean: Tensor | None,
    signs: Sequence[int],
    labels: Tensor,
    part: Part | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Row statistics of the tiles of this part -> (logps, mean, norms), stacked, of the whole
    vocabulary.

    logps [tiles, ...], norms [2, tiles, ...]: of one or two distributions p_i over the same tokens.
    mean [tiles, ...] or None: over p_0, of Σ_i sign_i log p_i: entropy (−1), or KL(p_0 ‖ p_1)
    (1, −1). labels [tiles, ...]: of each tile.

    With e_i = Σ_tile e^(z_i − m_i), m_i the whole maximum, a tile holds the share e_i / Σ e_i of
    p_i, and the log p_i of its tokens are lower by −log share_i in the whole than in the tile: in
    float64, so that what the kernels rounded is all. A tile whose logits are all −inf has a norm of
    (anything below +inf, −inf): its share is 0, and what else the row kernels say of it may be NaN.
    """
    dtype, n = logps[0].dtype, len(logps)
    largest, log_sum = torch.stack(tuple(norms), 1).double()
    whole = largest.amax(1)
    if part is not None:
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=part.group)
    log_e = (largest - whole.unsqueeze(1)) + log_sum
    e, nothing = log_e.exp(), log_e == -torch.inf
    at_label = torch.where(nothing, -torch.inf, torch.stack(tuple(logps)) + log_e)  # z[label] − m
    columns = [e, at_label.masked_fill(labels == check.ELSEWHERE, 0.0)]
    if mean is not None:
        shift = sum(sign * x for sign, x in zip(signs, log_e, strict=True))
        shifted = torch.where(shift.isinf(), shift, mean + shift)  # p_1 = 0 in all of the tile
        columns.append((e[0] * shifted).masked_fill(e[0] == 0, 0.0).unsqueeze(0))
    sums = torch.cat(columns).sum(1)
    if part is not None:
        sums = part.sum(sums)
    log_total = sums[:n].log()
    if mean is not None:
        shift = sum(sign * x for sign, x in zip(signs, log_total, strict=True))
        mean = (sums[-1] / sums[0] - shift).to(dtype)
    whole_logps = (sums[n : 2 * n] - log_total).to(dtype)
    whole_norms = torch.stack([whole, log_total], 1).to(dtype)
    ignored = labels[0] == check.IGNORE_INDEX
    for x in (whole_logps, mean, whole_norms):
        if x is not None:
            x.masked_fill_(ignored, 0.0)
    return whole_logps, mean, whole_norms
