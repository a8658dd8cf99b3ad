"""What a launcher or a fallback of leave_logprobs leaves, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.ops import check, token_logprobs
from rlhf_fast.ops.linear import exponentials, gradients, groups
from rlhf_fast.ops.linear.exponentials import Exponentials
from rlhf_fast.ops.linear.tokens import labels_of_tiles
from rlhf_fast.ops.linear.vocab_parallel import token_logprobs as of_tiles

COLUMNS, WIDE = 32, 2300  # of a tile; of one that a kernel goes through in parts
# How far above 0 the logits of each tile are, of which a row's anchor knows the first alone.
ORDERS = {
    "level": (0.0, 0.0, 0.0, 0.0),
    "rising": (-90.0, -20.0, -9.0, 0.0),
    "falling": (80.0, 9.0, 1.0, -80.0),
    "in and out of reach": (0.0, 9.0, 13.0, -60.0),
    "nothing at first": (-torch.inf, -torch.inf, -5.0, 30.0),
    "nothing at last": (3.0, -torch.inf, -5.0, -torch.inf),
    "far up": (1e4, 1e4 + 200, 1e4, 1e4 - 50),
}


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"temperature": torch.tensor([0.5, 1.0, 3.0, 0.7, 2.0, 1.5]), "softcap": 25.0},
}
CASES = [
    pytest.param(order, options, id=f"{order}, {name}")
    for order in ORDERS
    for name, options in OPTIONS.items()
    if not (name == "softcap" and order.startswith("nothing"))  # capped, no logit is -inf
]


def drawn(order: str, columns: int) -> tuple[Tensor, Tensor]:
    """(logits [6, V], labels [6]) of three tiles and one that is narrower: of an ignored row, of
    rows whose label lies in each tile, and of one whose label is its likeliest token."""
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor(ORDERS[order]).repeat_interleave(columns)[:-12]
    logits = 2 * torch.randn(6, len(level), generator=generator) + level
    labels = torch.tensor([3, columns + 2, -100, 2 * columns, len(level) - 1, 0])
    labels[5] = logits[5].argmax()
    return logits, labels


class Left(Exponentials):
    """By this kernel, in place of the one for the tensors' device."""

    def __init__(self, kernel: Callable[..., Any], left: Tensor) -> None:
        super().__init__(left)
        self.kernel = kernel

    def token_logprobs(self, logits: Tensor, labels: Tensor, *how: Any) -> tuple[Tensor, ...]:
        before, self.before = self.before, self.before + logits.shape[2]
        states = self.left, self.anchors, self.slopes
        return self.kernel(logits, labels, *how, before, *states)


def gradient(
    kernel: Callable[..., Any], order: str, columns: int, device: str, **options: Any
) -> tuple[Tensor, ...]:
    """(logp, entropy, the gradient of logp [n, V]) as the tiles leave it, and in float64."""
    logits, labels = (x.to(device) for x in drawn(order, columns))
    rows, vocab = logits.shape
    place = torch.full((rows, vocab + 12), torch.nan, dtype=torch.bfloat16, device=device)
    left = Left(kernel, place[:, :vocab])
    temperature, softcap = options.get("temperature", 1.0), options.get("softcap")
    per_token = temperature.to(device) if isinstance(temperature, Tensor) else None
    how = (1.0 if per_token is not None else temperature), per_token, softcap, True

    def tiles() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = torch.empty(rows, columns, device=device)
        own = labels_of_tiles(labels[None], columns, vocab)
        for i, of_tile in enumerate(own):
            here = logits[:, i * columns : (i + 1) * columns]
            yield of_tile, buffer[:, : here.shape[1]].copy_(here)

    logp, entropy, norm = of_tiles(tiles(), *how, None, left)
    at_labels, units = left.gradient(labels, logp[0], norm[:, 0])
    kept = labels != check.IGNORE_INDEX
    assert not left.left.gather(1, labels.clamp(min=0)[:, None])[kept].any()
    assert not left.left[~kept].any()
    assert place[:, vocab:].isnan().all()
    got = left.left.double().scatter_add(
        1, at_labels.tokens[:, None], at_labels.entries.double()[:, None]
    )
    exact = logits.double().requires_grad_()
    wide = {"temperature": temperature if per_token is None else per_token.double()}
    want = token_logprobs.reference(exact, labels, **wide, softcap=softcap, entropy=True)
    (d,) = torch.autograd.grad(want[0].sum(), exact)
    return logp[0], entropy[0], got * units.double()[:, None], *(x.detach() for x in want), d


def exactly_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """The form of bfloat16 there, of up to 100 rows, in the operands' own dtype."""
    patch.setattr(exponentials, "hold", lambda dtype: True)
    patch.setattr(groups, "in_groups", lambda hidden: True)
    patch.setattr(groups, "most_together", lambda *_: 100)
    # a chunk made again has its gradient over its logits, and waits for no other
    alone = property(lambda self: False, lambda self, value: None)
    patch.setattr(gradients.Gradients, "in_groups", alone, raising=False)


def check_gradient(
    kernel: Callable[..., Any],
    order: str,
    columns: int = COLUMNS,
    device: str = "cpu",
    cut_off: bool = False,
    **options: Any,
) -> None:
    """Every number is rounded once to bfloat16, whichever tile it is in and wherever its row's
    anchor was. Beside it, a z is known to 2^-22 of itself and of what is subtracted, in float32.
    cut_off: as Triton's interpreter rounds, and no GPU."""
    logp, entropy, got, *want, exact = gradient(kernel, order, columns, device, **options)
    size = 1e4 if order == "far up" else 200
    in_float32 = size * 2**-22 + 2**-18
    for x, y in zip((logp, entropy), want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=in_float32, atol=in_float32)
    off = (got - exact).abs()
    assert (off <= (2 ** (-7 if cut_off else -8) + in_float32) * exact.abs() + 1e-30).all()
