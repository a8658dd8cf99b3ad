"""What logits are made of: a language model's head, with a bias, an adapter, sharded or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .. import check

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Lora = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r], scale
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? down, Tensor? up"  # in kernels' schemas


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None = None,
    prefix: str = "",
) -> Head:
    """Check a head's arguments and return it: hidden as [N, H], an adapter's scale multiplied in,
    and all of it in autocast's dtype where autocast is on (float64 stays float64).

    A sharded weight or bias (FSDP2's DTensor) is gathered; its gradient is averaged over the ranks
    on the way back, as FSDP2 averages the others. ``prefix`` goes before the names in errors.
    """
    hidden_name, weight_name, bias_name, down_name, up_name = (
        f"{prefix}{x}" for x in ("hidden", "weight", "bias", "lora's A", "lora's B")
    )
    check.floating(hidden_name, hidden)
    check.at_least_1d(hidden_name, hidden)
    if is_sharded(hidden):
        raise TypeError(
            f"{hidden_name} must be this rank's own tensor, got a DTensor; use .to_local()"
        )
    check.floating(weight_name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must be [V, H] with H = {hidden_name}'s last dimension "
            f"{hidden.shape[-1]}, got {check.describe(weight)}"
        )
    check.same_device(weight_name, weight, hidden_name, hidden)
    if bias is not None:
        check.floating(bias_name, bias)
        check.shaped(bias_name, bias, [weight.shape[0]], "[V]")
        check.same_device(bias_name, bias, hidden_name, hidden)
    down, up, scale = (
        (None, None, 1.0) if lora is None else check_lora(lora, hidden, weight, prefix)
    )
    weight = gathered(weight)
    bias, down, up = (None if x is None else gathered(x) for x in (bias, down, up))
    hidden, weight = hidden.to(product_dtype(hidden)), weight.to(product_dtype(weight))
    bias, down, up = (None if x is None else x.to(product_dtype(x)) for x in (bias, down, up))
    for name, x in (
        (weight_name, weight), (bias_name, bias), (down_name, down), (up_name, up)
    ):  # fmt: skip
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of {hidden_name}, {hidden.dtype}; "
                f"got {check.describe(x)}. Cast one of them, or use autocast"
            )
    rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    return Head(rows, weight, bias, None if down is None else scale * down, up)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product takes x in: autocast, where it is on, leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def check_lora(lora: Lora, hidden: Tensor, weight: Tensor, prefix: str) -> Lora:
    name = f"{prefix}lora"
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"{name} must be (A [r, H], B [V, r], scale), got {check.describe(lora)}")
    down, up, scale = lora
    for part, x in (("A", down), ("B", up)):
        check.floating(f"{name}'s {part}", x)
        check.same_device(f"{name}'s {part}", x, f"{prefix}hidden", hidden)
    rank = down.shape[0] if down.dim() == 2 else 0
    check.shaped(f"{name}'s A", down, [rank, hidden.shape[-1]], "[r, H]")
    check.shaped(f"{name}'s B", up, [weight.shape[0], rank], "[V, r]")
    check.number(f"{name}'s scale", scale, dtype=check.accumulator(hidden))
    return lora


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    """A DTensor, by what it has: its class alone takes seven times as long to import as all of
    this library: 0.9 s (AMD EPYC, AVX2)."""
    return hasattr(x, "full_tensor")


def gathered(x: Tensor | DTensor) -> Tensor:
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial

    ranks = x.device_mesh.size()
    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / ranks)
    return whole


class Head(NamedTuple):
    """What the logits of N rows are made of: hidden @ weight.T + bias and, where an adapter is on
    the head, (hidden @ down.T) @ up.T. Of a row, nothing but its hidden states enters."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    down: Tensor | None = None  # [r, H], the adapter's scale in it
    up: Tensor | None = None  # [V, r]

    def constant(self) -> Head:
        """The same, with no gradient."""
        bias, down, up = (None if x is None else x.detach() for x in self[2:])
        return Head(self.hidden.detach(), self.weight.detach(), bias, down, up)


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    temperature: float | Tensor,
    kept: Tensor,
) -> tuple[Tensor, float | Tensor]:
    """For the references: (all the logits [..., V], temperature). Rows not kept [...] may hold NaN;
    their hidden states are taken as 0 and their temperature as 1."""
    hidden = hidden.masked_fill(~kept.unsqueeze(-1), 0.0)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if lora is not None:
        down, up, scale = lora
        logits = logits + scale * hidden @ down.t() @ up.t()
    if isinstance(temperature, Tensor):
        temperature = temperature.masked_fill(~kept, 1.0)
    return logits, temperature


def wanted(head: Head) -> list[bool]:
    """Which gradients a backward pass may be asked for."""
    grad = torch.is_grad_enabled()
    return [grad and x is not None and x.requires_grad for x in head]
