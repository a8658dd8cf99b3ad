"""16-bit operands of the linear ops: what comes out is the exact result, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.linear import chunks, gradients

N, H, V = 48, 96, 3000
Numbers = tuple[list[Tensor], list[Tensor]]  # outputs, gradients of hidden and weight


@pytest.fixture
def given() -> dict[str, Tensor]:
    """A peaked head, as a trained model's is: each label is its row's likeliest token."""
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(1, N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) / H**0.5
    labels = (hidden @ weight.t()).argmax(-1)
    advantages = torch.randn(1, N, generator=generator)
    return {"hidden": hidden, "weight": weight, "labels": labels, "advantages": advantages}


def run(op: str, x: dict[str, Tensor], dtype: torch.dtype, wide: torch.dtype) -> Numbers:
    """Of operands rounded to dtype and computed in `wide`."""
    leaves = (x[name].to(dtype).to(wide, copy=True) for name in ("hidden", "weight"))
    hidden, weight = (leaf.requires_grad_() for leaf in leaves)
    labels, advantages = x["labels"], x["advantages"]
    if op == "linear_token_logprobs":
        logp, entropy = rf.linear_token_logprobs(hidden, weight, labels, entropy=True)
        outputs, total = [logp, entropy], (advantages * (logp + 0.1 * entropy)).sum()
    elif op == "linear_token_kl":
        outputs = list(rf.linear_token_kl(hidden, weight, labels, hidden.detach().flip(1)))
        total = (advantages * (outputs[0] + 0.1 * outputs[2])).sum()
    else:
        old = torch.zeros_like(advantages)
        # kl_coef: a gradient in every row; a total with a factor, which a backward has not as 1
        loss, stats = rf.linear_policy_loss(
            hidden, weight, labels, old, advantages, old == 0, ref_logp=old - 0.3, kl_coef=0.1
        )
        outputs, total = [loss, stats.entropy], 3 * loss
    total.backward()
    return [y.detach().double() for y in outputs], [hidden.grad.double(), weight.grad.double()]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("narrow", [False, True], ids=["float32 dlogits", "16-bit dlogits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl", "linear_policy_loss"])
def test_the_result_is_rounded_once(op: str, dtype: torch.dtype, narrow, given, monkeypatch):
    if narrow:  # as on a GPU, and on a CPU that has 16-bit products
        monkeypatch.setattr(gradients, "dlogits_dtype", lambda hidden: hidden.dtype)
    outputs, grads = run(op, given, dtype, dtype)
    exact_outputs, exact_gradients = run(op, given, dtype, torch.float64)
    float32 = H * 2**-23  # a logit is a sum of H products, in any order; in 16 bits it is 2**-8 off
    for got, exact in zip(outputs, exact_outputs, strict=True):
        assert error(got, exact) < float32
    for got, exact in zip(grads, exact_gradients, strict=True):
        assert error(got, exact) <= 1.1 * error(exact.to(dtype).double(), exact)


def row_by_row(_, rows: int, vocab: int, dtype: torch.dtype, device: torch.device):
    """chunks.chunk_buffer as on a GPU; NaN where nothing is written."""
    return None, torch.full((rows, vocab), torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl", "linear_policy_loss"])
@pytest.mark.parametrize("large", [True, False], ids=["large weight", "small weight"])
@pytest.mark.parametrize("most", [30, 100])
def test_groups_are_rounded_once(op, dtype, large, most, given, monkeypatch):
    """As on a GPU: one product for many chunks. dW of all rows comes from it in 16 bits where the
    weight is large; then what belongs to a label is added, here to one label of several rows."""
    monkeypatch.setattr(gradients, "dlogits_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(gradients, "in_groups", lambda hidden: hidden.dtype == dtype)
    monkeypatch.setattr(gradients, "LARGE", 1 if large else N * V)
    monkeypatch.setattr(gradients.Gradients, "_most", lambda *_: most)
    for module in (gradients, chunks):
        monkeypatch.setattr(module, "chunk_buffer", row_by_row)
    given["hidden"][0, 5:9] = given["hidden"][0, 4]
    given["labels"][0, 5:9] = given["labels"][0, 4]
    with rf.chunk_budget(4 * 7 * V):
        _, grads = run(op, given, dtype, dtype)
    _, exact_gradients = run(op, given, dtype, torch.float64)
    for got, exact in zip(grads, exact_gradients, strict=True):
        assert error(got, exact) <= 1.1 * error(exact.to(dtype).double(), exact)
