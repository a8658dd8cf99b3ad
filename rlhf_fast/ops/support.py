"""What truncated sampling left of the vocabulary: the sets of ``support=``, checked and counted.

With top-k, top-p or min-p a sampler draws from a distribution over a few tokens, not from softmax
over all of them. Everything that is said of such a sample, log-prob, entropy, ratio, KL, is of that
distribution: softmax over the set, whose members are the same for every model that is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import check
from .registry import define_kernel

NO_TOKEN = -1  # fills a row up
# In place of the label's position in its row, as the kernel says it.
WRONG = {
    -1: "must hold the label in each row (or no token at all), {label}, got {ids}",
    -2: "must hold tokens in [0, {vocab}), or {nothing} to fill a row up, got {ids}",
    -3: "must hold each token once, got {ids}",
}


def checked(support: Tensor | None, labels: Tensor) -> Tensor | None:
    """support [..., K], int64 or int32, beside labels [...], as ids [N, K], int64, contiguous; of
    NO_TOKEN where the label is ignored. None where no row can have a set."""
    if support is None:
        return None
    check.tensor("support", support)
    if support.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"support must be int64 or int32, got {check.describe(support)}")
    if support.dim() != labels.dim() + 1 or support.shape[:-1] != labels.shape:
        raise ValueError(
            f"support must be [{', '.join(map(str, [*labels.shape, 'K']))}], the shape of labels "
            f"and K tokens, got {check.describe(support)}"
        )
    check.same_device("support", support, "labels", labels)
    if support.shape[-1] == 0:
        return None
    ids = support.detach().reshape(labels.numel(), support.shape[-1]).to(torch.int64)
    ignored = labels.reshape(-1) == check.IGNORE_INDEX
    return ids.masked_fill(ignored.unsqueeze(-1), NO_TOKEN).contiguous()


def positions(ids: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """Where in its row of ids [N, K] each label [N] stands, [N]; IGNORE_INDEX where it is ignored
    or the row is empty. Values that are wrong are an error where values can be read; inside
    torch.compile the kernel's own, on a CPU."""
    told = check.values_can_be_read(ids)
    found: Tensor = torch.ops.rlhf_fast.support_positions(ids, labels.contiguous(), vocab, told)
    if told:
        _check_positions(found, ids, labels, vocab)
    return found


def _check_positions(found: Tensor, ids: Tensor, labels: Tensor, vocab: int) -> None:
    wrong = (found < 0) & (found != check.IGNORE_INDEX)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        text = WRONG[int(found[row])].format(
            label=int(labels[row]), vocab=vocab, nothing=NO_TOKEN,
            ids=f"{check.short(str(ids[row].tolist()))} in row {row}",
        )  # fmt: skip
        raise ValueError(f"support {text}")


def taken(logits: Tensor, ids: Tensor, softcap: float | None) -> Tensor:
    """The logits [..., V] of the sets' tokens, [..., K], after the softcap; −inf where there is
    none. With its gradient."""
    ids = ids.view(*logits.shape[:-1], ids.shape[-1])
    z = logits.gather(-1, ids.clamp(min=0))
    return capped(z.masked_fill(ids < 0, -torch.inf), ids, softcap)


def capped(z: Tensor, ids: Tensor, softcap: float | None) -> Tensor:
    """z [..., K] after the softcap, which must not bound the −inf where ids has no token."""
    if softcap is None:
        return z
    z = softcap * torch.tanh(z.to(check.accumulator(z)) / softcap)
    return z.masked_fill(ids < 0, -torch.inf)


def left(z: Tensor, support: Tensor, labels: Tensor) -> Tensor:
    """For the references: z [..., V] with −inf for the tokens that are not in a row's set."""
    ids = checked(support, labels)
    if ids is None:
        return z
    return z.masked_fill(outside(ids, z.shape[-1]).reshape(z.shape), -torch.inf)


def outside(ids: Tensor, vocab: int) -> Tensor:
    """[N, vocab] bool: the tokens that are not in a row's set; none of an empty one, which stands
    for the whole vocabulary. Of a part of the vocabulary the tokens elsewhere are −2. The columns
    lie one after the other, as those of a CPU's chunk of logits."""
    no_token = ids < 0
    out = torch.ones(vocab + 1, ids.shape[0], dtype=torch.bool, device=ids.device).t()
    out.scatter_(1, ids.masked_fill(no_token, vocab), False)
    out &= ~(ids == NO_TOKEN).all(-1, keepdim=True)
    return out[:, :vocab]


def drawn(labels: Tensor, vocab: int, most: int, generator: torch.Generator) -> Tensor:
    """For samples: sets [..., most] of 1 to most tokens in any order, the label among them; the
    first row has none."""
    scores = torch.rand(*labels.shape, vocab, generator=generator)
    here = labels.clamp(min=0).unsqueeze(-1)
    ids = scores.scatter(-1, here, 2.0).topk(most).indices  # the label first
    sizes = torch.randint(1, most + 1, labels.shape, generator=generator).unsqueeze(-1)
    ids = ids.masked_fill(torch.arange(most) >= sizes, NO_TOKEN)
    ids.view(-1, most)[:1] = NO_TOKEN
    return ids.flip(-1)


def _positions(ids: Tensor, labels: Tensor, vocab: int, told: bool) -> Tensor:
    hit = ids == labels.unsqueeze(-1)
    found = hit.to(torch.int8).argmax(-1) if ids.shape[-1] else labels.new_zeros(labels.shape)
    found = found.masked_fill(~hit.any(-1), -1)
    on_cpu = ids.device.type == "cpu"
    if told or on_cpu:
        in_order = ids.sort(-1).values
        twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(-1)
        found = found.masked_fill(twice, -3)
        found = found.masked_fill(((ids < NO_TOKEN) | (ids >= vocab)).any(-1), -2)
    nothing = (ids == NO_TOKEN).all(-1) | (labels == check.IGNORE_INDEX)
    found = found.masked_fill(nothing, check.IGNORE_INDEX)
    if on_cpu and not told:
        _check_positions(found, ids, labels, vocab)
    return found


KERNEL = define_kernel(
    "support_positions(Tensor ids, Tensor labels, int vocab, bool told) -> Tensor",
    fallback=_positions,
    fake=lambda ids, labels, vocab, told: torch.empty_like(labels),
)
