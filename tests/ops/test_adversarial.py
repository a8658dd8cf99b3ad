"""The linear ops on inputs at the edge: against the float64 oracle, no worse than eager PyTorch.

No rows, one row and one token of vocabulary are among the ops' own samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch
from bounds import check_against_float64
from drawing import VOCABULARY_SIZED, Fallbacks
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops import token_logprobs
from rlhf_fast.ops.registry import OPS, Sample

LINEAR = ("linear_token_logprobs", "linear_token_kl", "linear_policy_loss")
N, H, V = 23, 6, 131  # a vocabulary that is a multiple of nothing
COLUMN = torch.arange(V)


def draw(
    op: str, scale: float = 1.0, bias: Tensor | None = None, bits: bool = False
) -> dict[str, Any]:
    """bits: hidden states and heads of ±1, times scale."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix(*shape: int) -> Tensor:
        return normal(*shape).sign() if bits else normal(*shape)

    x: dict[str, Any] = {
        "hidden": matrix(1, N, H),
        "weight": scale * matrix(V, H),
        "labels": torch.randint(100, (1, N), generator=generator),
        "bias": bias,
    }
    if op == "linear_token_logprobs":
        return x | {"entropy": True}
    if op == "linear_token_kl":
        ref = {"ref_hidden": matrix(1, N, H), "ref_weight": scale * matrix(V, H)}
        return x | ref | {"ref_bias": bias}
    logits = torch.nn.functional.linear(x["hidden"], x["weight"], bias)
    logp = token_logprobs.reference(logits, x["labels"])
    return x | {
        "old_logp": logp + 0.3 * normal(1, N),
        "ref_logp": logp + 0.3 * normal(1, N),
        "advantages": normal(1, N),
        "mask": torch.rand(1, N, generator=generator) > 0.3,
        "entropy_coef": 0.1,
        "kl_coef": 0.1,
    }


def minus_infinity(op: str) -> dict[str, Any]:
    return draw(op, bias=torch.where(COLUMN < 100, 0.5, -torch.inf))


def one_hot(op: str) -> dict[str, Any]:
    x = draw(op, bias=torch.where(COLUMN == 7, 0.5, -torch.inf))
    x["labels"][:] = 7
    return x | {name: torch.zeros(1, N) for name in ("old_logp", "ref_logp") if name in x}


def huge(op: str) -> dict[str, Any]:
    """Logits of −49152 to 49152 that 16 bits hold: a rounding of theirs is beyond every clamp."""
    return draw(op, scale=2.0**13, bits=True)


def some_ignored(op: str) -> dict[str, Any]:
    x = draw(op)
    x["labels"][:, ::3] = -100  # whatever the mask says
    return x


def all_ignored(op: str) -> dict[str, Any]:
    x = draw(op)
    x["labels"][:] = -100
    return x


@pytest.mark.parametrize("implementation", ["kernel", "fallback", "bfloat16"])
@pytest.mark.parametrize("case", [minus_infinity, one_hot, huge, some_ignored, all_ignored])
@pytest.mark.parametrize("op", LINEAR)
def test_against_the_oracle(op: str, case, implementation: str) -> None:
    arguments = case(op)
    if implementation == "bfloat16":
        dtype, only = torch.bfloat16, tuple(VOCABULARY_SIZED & set(arguments))
    else:
        dtype, only = torch.float32, None
    with Fallbacks() if implementation == "fallback" else contextlib.nullcontext():
        check_against_float64(OPS[op], Sample("", arguments, ("hidden", "weight")), dtype, only)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("implementation", ["kernel", "fallback"])
@pytest.mark.parametrize("op", LINEAR)
def test_what_does_not_count_may_be_nan(op: str, implementation: str, compact: bool) -> None:
    arguments = some_ignored(op)
    dead = arguments["labels"] == -100
    if "mask" in arguments:
        dead |= ~arguments["mask"]

    def spoilt(**x: Any) -> Any:
        for name in x.keys() & {"hidden", "ref_hidden", "old_logp", "advantages", "ref_logp"}:
            where = dead.unsqueeze(-1) if "hidden" in name else dead
            x[name] = x[name].masked_fill(where, torch.nan)
        temperature = torch.full((1, N), 0.7).masked_fill(dead, -1.0)
        return getattr(rf, op)(**x, temperature=temperature, compact=compact)

    def reference(**x: Any) -> Any:
        return OPS[op].reference(**x, temperature=0.7)

    spoilt_op = dataclasses.replace(OPS[op], function=spoilt, reference=reference)
    with Fallbacks() if implementation == "fallback" else contextlib.nullcontext():
        sample = Sample("", arguments, ("hidden", "weight"))
        check_against_float64(spoilt_op, sample, torch.float32)


@pytest.mark.parametrize("implementation", ["kernel", "fallback"])
@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl"])
def test_a_row_without_gradient_has_none_however_low_its_logits(op, implementation) -> None:
    """Not compact, the backward has logits of 0 for it, beside a maximum of −600."""
    x = draw(op)
    del x["bias"]
    hidden = x["hidden"].fill_(-100.0).requires_grad_()
    weight = x["weight"].abs_().add_(1.0).requires_grad_()
    with Fallbacks() if implementation == "fallback" else contextlib.nullcontext():
        outputs = getattr(rf, op)(**x, compact=False)
        used = torch.arange(N) % 2 == 0
        total = sum((y * used).sum() for y in outputs if y.requires_grad)
        d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    assert d_hidden[:, used].any() and not d_hidden[:, ~used].any()
    assert d_weight.isfinite().all()


@pytest.mark.parametrize("implementation", ["kernel", "fallback"])
def test_a_probability_that_becomes_0_where_the_reference_has_none(implementation: str) -> None:
    """Token 0 makes KL(p || q) infinite until token 100 leaves p nothing there."""
    hidden, labels, head = torch.zeros(1, 1), torch.tensor([100]), torch.zeros(V, 1)
    bias = torch.where(COLUMN == 100, 200.0, 0.0)
    ref_bias = torch.where(COLUMN == 0, -torch.inf, 0.0)
    with Fallbacks() if implementation == "fallback" else contextlib.nullcontext():
        _, _, kl = rf.linear_token_kl(
            hidden, head, labels, hidden, head, bias=bias, ref_bias=ref_bias
        )
    assert kl.item() == pytest.approx(math.log(V - 1))
