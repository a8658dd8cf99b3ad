"""Every value of every option beside every value of every other, in float64.

A handful of combinations in which each pair of values that may meet does: outputs and gradients
against the reference's, and gradcheck. Nothing here may be ignored, in the kernels or in the
fallbacks, in the forward or in the backward.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import fields
from typing import Any

import pytest
import torch
from drawing import CONSTANTS, Fallbacks, tensors
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.options import PolicyOptions
from rlhf_fast.ops.registry import OPS

B, T, H, V, R = 3, 4, 3, 7, 2
SCALES = {
    "temperature": (1.0, 0.6, "per token"),
    "softcap": (None, 1.5),
    "bias": (None, "given"),
    "compact": (True, False),
    "deterministic": (False, True),
    "lora": (None, "given"),
}
SAMPLES = {  # of each option of a policy loss that has no choices: a value beside its default
    "clip_low": 0.05,
    "clip_high": 0.4,
    "dual_clip": 1.3,
    "entropy_coef": 0.3,
    "kl_coef": 0.4,
    "sapo_tau_pos": 2.0,
    "sapo_tau_neg": 0.5,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 2.0,
    "vespo_k_neg": 0.0,
    "vespo_lambda_neg": 1.0,
    "delta": 1.1,
    "unbiased_kl": True,
}
LOSSES = {
    **{
        f.name: f.metadata["choices"] or (f.default, SAMPLES[f.name]) for f in fields(PolicyOptions)
    },
    "normalizer": (None, 5.5, "0-dim"),
    "importance_weights": (None, "given"),
    "ref_logp": (None, "given"),
}
OPTIONS = {
    "linear_token_logprobs": {**SCALES, "entropy": (False, True)},
    "linear_token_kl": {
        **SCALES,
        "direction": ("reverse", "forward"),
        "ref_weight": (None, "given"),
        "ref_bias": (None, "given"),
        "ref_lora": (None, "given"),
    },
    "linear_policy_loss": {**LOSSES, **SCALES},
    "policy_loss": {**LOSSES, "entropy": (None, "given")},
}


def possible(op: str, chosen: dict[str, Any]) -> bool:
    if op == "policy_loss" and chosen["entropy_coef"] and chosen["entropy"] is None:
        return False
    if op == "linear_token_kl":
        return chosen["ref_bias"] is None or chosen["ref_weight"] is not None
    if op == "linear_token_logprobs":
        return True
    try:
        PolicyOptions(**{f.name: chosen[f.name] for f in fields(PolicyOptions)}).check(
            torch.float64
        )
    except ValueError:  # two that have no meaning together
        return False
    return not (chosen["kl_coef"] and chosen["ref_logp"] is None)


def covering(op: str) -> list[dict[str, Any]]:
    """Random combinations, of which those stay that hold a pair which none before them held."""
    choose, seen, kept = random.Random(0).choice, set(), []
    for _ in range(3000):
        chosen = {name: choose(values) for name, values in OPTIONS[op].items()}
        pairs = set(itertools.combinations(chosen.items(), 2))
        if possible(op, chosen) and pairs - seen:
            seen |= pairs
            kept.append(chosen)
    return kept


def inputs(op: str, chosen: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """(the op's arguments, those with a gradient)."""
    generator = torch.Generator().manual_seed(len(str(chosen)))

    def draw(*shape: int, grad: bool = False) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_(grad)

    logp = -draw(B, T).abs()
    given = {
        "temperature": 0.5 + draw(B, T).abs(), "bias": draw(V, grad=True), "ref_bias": draw(V),
        "lora": (draw(R, H, grad=True), draw(V, R, grad=True), 0.7), "ref_weight": draw(V, H),
        "ref_lora": (draw(R, H), draw(V, R), 0.4),
        "importance_weights": draw(B, T).abs(), "ref_logp": logp + 0.3 * draw(B, T),
        "normalizer": torch.tensor(3.5), "entropy": draw(B, T, grad=True),
    }  # fmt: skip
    x: dict[str, Any] = {}
    if op == "policy_loss":
        x["logp"] = logp.clone().requires_grad_()
    else:
        x["hidden"], x["weight"] = draw(B, T, H, grad=True), draw(V, H, grad=True)
        x["labels"] = torch.randint(V, (B, T), generator=generator)
        x["labels"][0, 1] = -100
    if op == "linear_token_kl":
        x["ref_hidden"] = draw(B, T, H)
    if op.endswith("policy_loss"):
        x["old_logp"], x["advantages"] = logp + 0.3 * draw(B, T), draw(B, T)
        x["mask"] = torch.rand(B, T, generator=generator) > 0.3
        x["advantages"][1, 2] = 0.0
    named = ("per token", "given", "0-dim")
    x |= {name: given[name] if value in named else value for name, value in chosen.items()}
    leaves = [y for x_ in x.values() for y in (x_ if isinstance(x_, tuple) else (x_,))]
    return x, [y for y in leaves if isinstance(y, Tensor) and y.requires_grad]


def results(function, x: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients through each of them alone and through all together."""
    outputs = tensors(function(**x))
    ways = [(y * y).sum() for y in outputs if y.requires_grad]
    grads = [  # zeros where none comes through: a coefficient of 0 leaves its term out
        torch.zeros_like(leaf) if grad is None else grad
        for way in (*ways, sum(ways))
        for leaf, grad in zip(
            leaves,
            torch.autograd.grad(way, leaves, retain_graph=True, allow_unused=True),
            strict=True,
        )
    ]
    return outputs + grads


@pytest.mark.parametrize("op", OPTIONS)
def test_every_pair_of_options(op: str) -> None:
    function = getattr(rf, op)
    for chosen in covering(op):
        x, leaves = inputs(op, chosen)
        exact = results(OPS[op].reference, x, leaves)
        ours = results(function, x, leaves)
        with Fallbacks():
            plain = results(function, x, leaves)
        for got in (ours, plain):
            for a, b in zip(got, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=str(chosen))


@pytest.mark.parametrize("op", OPTIONS)
def test_gradcheck_of_every_pair_of_options(op: str) -> None:
    for chosen in covering(op):
        if CONSTANTS & {chosen.get("loss"), chosen.get("ratio")}:
            continue
        x, leaves = inputs(op, chosen)
        if op == "linear_token_kl" and x["ref_weight"] is None:  # or it would move with the policy
            x["ref_weight"] = x["weight"].detach().clone()
            x["ref_bias"] = None if x["bias"] is None else x["bias"].detach().clone()

        def function(*moved: Tensor, x: Any = x, leaves: Any = leaves) -> list[Tensor]:
            def new(y: Any) -> Any:
                if isinstance(y, tuple):
                    return tuple(map(new, y))
                return next((m for m, leaf in zip(moved, leaves, strict=True) if leaf is y), y)

            outputs = tensors(getattr(rf, op)(**{name: new(y) for name, y in x.items()}))
            return [y for y in outputs if y.requires_grad]

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True), chosen
