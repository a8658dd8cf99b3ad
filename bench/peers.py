"""The peers: what ours is timed beside.

A peer is a name and ``function_for``: op -> a function of the op's own arguments that returns the
op's own outputs, or None where the peer has nothing like the op. It may raise instead; the message
is then printed where its time would be. Every peer is checked like ours, except a yardstick: it
does only part of the work, so it is timed and never called slower or faster. One that ``compiles``
spends seconds in its first call, which --quick cannot always wait for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.registry import Op

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    name: str
    function_for: Callable[[Op], Function | None]
    yardstick: bool = False
    compiles: bool = False


def _eager(op: Op) -> Function:
    return op.reference


def _compiled(op: Op) -> Function:
    return torch.compile(op.reference, fullgraph=True, dynamic=False)


def _bare_gemms(op: Op) -> Function | None:
    """The head's matrix products alone, into buffers that are already there: X·Wᵀ forward; dX and
    dW backward, from the [N, V] buffer as it lies. What no implementation can go below."""
    if not {"hidden", "weight"} <= inspect.signature(op.function).parameters.keys():
        return None
    buffers: dict[str, Tensor] = {}

    class HeadGemms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            if not buffers:
                buffers["logits"] = hidden.new_empty(hidden.shape[0], weight.shape[0])
                buffers["hidden"] = torch.empty_like(hidden, requires_grad=False)
                buffers["weight"] = torch.empty_like(weight, requires_grad=False)
            ctx.save_for_backward(hidden, weight)
            torch.mm(hidden, weight.t(), out=buffers["logits"])
            return hidden.new_empty(hidden.shape[0]), hidden.new_empty(hidden.shape[0])

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
            hidden, weight = ctx.saved_tensors
            torch.mm(buffers["logits"], weight, out=buffers["hidden"])
            torch.mm(buffers["logits"].t(), hidden, out=buffers["weight"])
            return buffers["hidden"], buffers["weight"]

    return lambda hidden, weight, **_: HeadGemms.apply(hidden, weight)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", _eager),
        Peer("torch.compile", _compiled, compiles=True),
        Peer("bare-GEMMs", _bare_gemms, yardstick=True),
    )
}
