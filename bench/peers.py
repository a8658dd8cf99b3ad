"""The peers: what ours is timed beside.

A peer is a name and ``function_for``: op -> a function of the op's own arguments that returns the
op's own outputs, or None where the peer has nothing like the op. It may raise instead; the message
is then printed where its time would be. Every peer is checked like ours, except a yardstick: it
does only part of the work, so it is timed and never called slower or faster. One that ``compiles``
spends seconds in its first call, which --quick cannot always wait for.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.registry import Op

from . import foreign, libraries
from .cases import DENSE, PREFERENCES
from .libraries import both_losses, with_plain_loss

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    name: str
    function_for: Callable[[Op], Function | None]
    yardstick: bool = False
    compiles: bool = False
    distribution: str | None = None  # whose version the record carries


def _eager(op: Op) -> Function:
    return op.reference


def _compiled(op: Op) -> Function:
    return torch.compile(op.reference, fullgraph=True, dynamic=False)


def _bare_gemms(op: Op) -> Function | None:
    """The head's matrix products alone, into buffers that are already there: X·Wᵀ forward; dX and
    dW backward. Each as the logits lie best for it, row by row or token by token. What no
    implementation can go below."""
    parameters = inspect.signature(op.function).parameters.keys()
    if not {"hidden", "weight"} <= parameters or "ref_hidden" in parameters:  # of two models
        return None
    made: dict[tuple[int, ...], Products] = {}
    best: list[dict[str, bool]] = []  # of the first size, that of the check: it is not timed

    class HeadGemms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            size = *hidden.shape, weight.shape[0]
            if not best:
                best.append(Products.by_token(hidden, weight))
            if size not in made:
                made.clear()
                made[size] = Products(hidden, weight, best[0])
            ctx.products = made[size]
            ctx.save_for_backward(hidden, weight)
            ctx.products.logits(hidden, weight)
            return hidden.new_empty(hidden.shape[0]), hidden.new_empty(hidden.shape[0])

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
            return ctx.products.d_hidden(*ctx.saved_tensors), ctx.products.d_weight(
                *ctx.saved_tensors
            )

    return lambda hidden, weight, **_: HeadGemms.apply(hidden, weight)


class Products:
    """The three products of a head [V, H] of N rows, of logits that lie row by row or token by
    token: ``by_token`` says which is faster for each."""

    NAMES = ("logits", "d_hidden", "d_weight")
    TIMES = 3

    def __init__(self, hidden: Tensor, weight: Tensor, by_token: dict[str, bool]) -> None:
        n, v = hidden.shape[0], weight.shape[0]
        self.of_hidden = torch.empty_like(hidden, requires_grad=False)
        self.of_weight = torch.empty_like(weight, requires_grad=False)
        layouts = {
            way: hidden.new_full((v, n), 0.5).t() if way else hidden.new_full((n, v), 0.5)
            for way in set(by_token.values())
        }
        self.lie = {name: layouts[way] for name, way in by_token.items()}

    @classmethod
    def by_token(cls, hidden: Tensor, weight: Tensor) -> dict[str, bool]:
        took: dict[tuple[str, bool], float] = {}
        for way in (False, True):
            products = cls(hidden, weight, dict.fromkeys(cls.NAMES, way))
            for name in cls.NAMES:
                took[name, way] = min(
                    seconds(getattr(products, name), hidden, weight) for _ in range(cls.TIMES)
                )
        return {name: took[name, True] < took[name, False] for name in cls.NAMES}

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(hidden, weight.t(), out=self.lie["logits"])

    def d_hidden(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(self.lie["d_hidden"], weight, out=self.of_hidden)

    def d_weight(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(self.lie["d_weight"].t(), hidden, out=self.of_weight)


def seconds(product: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> float:
    def now() -> float:
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    product(hidden, weight)
    return now() - start


def _all_rows(op: Op) -> Function | None:
    """Ours where every row and token matters: what a variant that drops some has to beat."""
    change = DENSE.get(op.name)
    return change and (lambda **arguments: op.function(**arguments | change(arguments)))


def library(
    name: str,
    distribution: str | None,
    *,
    logits: Function | None = None,
    linear: Function | None = None,
    entropy: bool = True,
    compiles: bool = False,
    others: dict[str, Function] | None = None,
) -> Peer:
    """``logits``, ``linear``, ``others``: makers of the function that is like an op; the log-prob
    ops and their variants share one, ``others`` are by the op's name. ``entropy``: whether it gives
    the entropy too."""
    makers: dict[str, Function] = {}
    heads = ("", "no-entropy", "masked", "zero-advantage")

    def add(op: str, maker: Function) -> None:
        for variant in heads:
            if entropy or variant in ("no-entropy", "zero-advantage"):
                makers[f"{op}:{variant}".removesuffix(":")] = maker

    if logits is not None:
        add("token_logprobs", logits)
    if linear is not None:
        add("linear_token_logprobs", linear)
        add("linear_policy_loss", lambda: with_plain_loss(linear()))
    makers |= others or {}

    def function_for(op: Op) -> Function | None:
        return makers[op.name]() if op.name in makers else None

    return Peer(name, function_for, compiles=compiles, distribution=distribution)


_L = libraries
PAIR, HEADS = "policy+value_loss", "linear+preference_loss"
PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", _eager),
        Peer("torch.compile", _compiled, compiles=True),
        library("F.linear_cross_entropy", None, linear=lambda: _L.torch_linear, entropy=False),
        library(
            "TRL",
            "trl",
            logits=_L.trl_logits,
            linear=_L.trl_linear,
            others={
                f"{HEADS}:{loss}": partial(_L.trl_preference_loss, loss) for loss in PREFERENCES
            },
        ),
        library(
            "Liger",
            "liger-kernel",
            linear=_L.liger_linear,
            others={
                f"{HEADS}:{loss}": partial(_L.liger_preference_loss, loss) for loss in PREFERENCES
            },
        ),
        library(
            "Liger-GRPO",
            "liger-kernel",
            compiles=True,
            others={"linear_policy_loss:no-entropy": _L.liger_policy_loss},
        ),
        library(
            "cut-cross-entropy",
            "cut-cross-entropy",
            linear=_L.cut_linear,
            entropy=False,
            compiles=True,
        ),
        library(
            "quack", "quack-kernels", logits=_L.quack_logits, linear=_L.quack_linear, entropy=False
        ),
        library("flash-attn", "flash-attn", logits=_L.flash_logits, entropy=False),
        library(
            "verl",
            "verl",
            logits=_L.verl_logits,
            linear=_L.verl_linear,
            others={
                "gae:right-padded": _L.verl_gae,
                "policy_loss": _L.verl_policy_loss,
                "value_loss": _L.verl_value_loss,
                PAIR: lambda: both_losses(_L.verl_policy_loss(), _L.verl_value_loss()),
            },
        ),
        library("verl-Triton", "verl", linear=_L.verl_triton_linear),
        library(
            "OpenRLHF",
            "openrlhf",
            logits=_L.openrlhf_logits,
            compiles=True,
            others={
                "gae:right-padded": _L.openrlhf_gae,
                "policy_loss": _L.openrlhf_policy_loss,
                "value_loss": _L.openrlhf_value_loss,
                "pairwise_loss": _L.openrlhf_pairwise_loss,
                PAIR: lambda: both_losses(_L.openrlhf_policy_loss(), _L.openrlhf_value_loss()),
            },
        ),
        library(
            "torchtune",
            "torchtune",
            logits=_L.torchtune_logits,
            entropy=False,
            others={"gae:right-padded": _L.torchtune_gae, PAIR: _L.torchtune_losses},
        ),
        Peer("bare-GEMMs", _bare_gemms, yardstick=True),
        Peer("all-rows", _all_rows, yardstick=True),
    )
}


def versions(peers: list[Peer]) -> dict[str, str]:
    """Of the libraries among the peers, those that are there."""
    asked = dict.fromkeys(p.distribution for p in peers if p.distribution)
    found = {distribution: foreign.version(distribution) for distribution in asked}
    return {distribution: version for distribution, version in found.items() if version}
