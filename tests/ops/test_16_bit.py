"""16-bit operands of the linear ops: what comes out is the exact result, rounded once."""

from __future__ import annotations

import head_products
import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.linear import chunks, groups, tiles

N, H, V = 48, 96, 3000
LOGP = "linear_token_logprobs, of logp alone"
LINEAR_OPS = [LOGP, "linear_token_logprobs", "linear_token_kl", "linear_policy_loss"]
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
    if op == LOGP:
        logp = rf.linear_token_logprobs(hidden, weight, labels)
        outputs, total = [logp], (advantages * logp).sum()
    elif op == "linear_token_logprobs":
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
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_the_result_is_rounded_once(op: str, dtype: torch.dtype, narrow, given, monkeypatch):
    if narrow:  # as on a GPU, and on a CPU that has 16-bit products
        monkeypatch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
    outputs, grads = run(op, given, dtype, dtype)
    exact_outputs, exact_gradients = run(op, given, dtype, torch.float64)
    float32 = H * 2**-23  # a logit is a sum of H products, in any order; in 16 bits it is 2**-8 off
    for got, exact in zip(outputs, exact_outputs, strict=True):
        assert error(got, exact) < float32
    for got, exact in zip(grads, exact_gradients, strict=True):
        assert error(got, exact) <= 1.1 * error(exact.to(dtype).double(), exact)


def row_by_row(_, rows: int, vocab: int, dtype: torch.dtype, device: torch.device):
    """chunks.chunk_buffer as on a GPU; NaN where nothing is written."""
    buffer = torch.full((rows, vocab), torch.nan, dtype=dtype, device=device)
    return buffer, buffer


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """(dtype, rows of a group): one product for many chunks."""

    def patch(dtype: torch.dtype, most: int) -> None:
        monkeypatch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
        monkeypatch.setattr(groups, "in_groups", lambda hidden: hidden.dtype == dtype)
        monkeypatch.setattr(groups, "most_together", lambda *_: most)
        for module in (groups, chunks):
            monkeypatch.setattr(module, "chunk_buffer", row_by_row)

    return patch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize("large", [True, False], ids=["large weight", "small weight"])
@pytest.mark.parametrize("most", [30, 100])
def test_groups_are_rounded_once(op, dtype, large, most, given, monkeypatch, as_on_a_gpu):
    """dW of all rows comes from one product in 16 bits where the weight is large; then what belongs
    to a label is added, here to one label of several rows."""
    as_on_a_gpu(dtype, most)
    monkeypatch.setattr(groups, "LARGE", 1 if large else N * V)
    given["hidden"][0, 5:9] = given["hidden"][0, 4]
    given["labels"][0, 5:9] = given["labels"][0, 4]
    with rf.chunk_budget(4 * 7 * V):
        _, grads = run(op, given, dtype, dtype)
    _, exact_gradients = run(op, given, dtype, torch.float64)
    for got, exact in zip(grads, exact_gradients, strict=True):
        assert error(got, exact) <= 1.1 * error(exact.to(dtype).double(), exact)


@pytest.mark.parametrize("most, again", [(100, 0), (30, 18), (1, 47)])
@pytest.mark.parametrize("loss", ["logp", "sequence"])
def test_logits_are_made_once_whatever_the_loss(loss, most, again, given, as_on_a_gpu, monkeypatch):
    """Those of the last rows, of which a group has room for as many."""
    as_on_a_gpu(torch.bfloat16, most)
    hidden, weight = (given[x].bfloat16().requires_grad_() for x in ("hidden", "weight"))
    labels, advantages = given["labels"], given["advantages"]
    made = head_products.noted(monkeypatch)
    with rf.chunk_budget(4 * 4 * 7 * V):  # made in 4 parts
        if loss == "logp":
            total = rf.linear_token_logprobs(hidden, weight, labels).square().sum()
        else:
            old = torch.zeros_like(advantages)
            total, _ = rf.linear_policy_loss(
                hidden, weight, labels, old, advantages, old == 0, ratio="sequence", clip_high=1e9
            )
        assert sum(n * v for n, v in made) == N * V
        total.backward()
    assert sum(n * v for n, v in made) == (N + again) * V


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compact", [True, False])
def test_what_a_forward_left_may_be_nan_where_nothing_comes(dtype, compact, given, as_on_a_gpu):
    as_on_a_gpu(dtype, 100)
    without = torch.arange(N) % 5 == 2
    hidden = given["hidden"].masked_fill(without[:, None], torch.nan).to(dtype).requires_grad_()
    weight = given["weight"].to(dtype).requires_grad_()
    logp = rf.linear_token_logprobs(hidden, weight, given["labels"], compact=compact)
    logp.backward(given["advantages"].masked_fill(without, 0.0))
    assert hidden.grad[0, without].eq(0).all() and hidden.grad[0, ~without].any(-1).all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 512.0, "apart"])
def test_the_loss_scale_acts_in_float32(dtype, size, given, as_on_a_gpu):
    """A GradScaler's, or that of a mean over many tokens: the same relative error, also where what
    comes for one row is far below zero and for the others hardly above it."""
    as_on_a_gpu(dtype, 100)
    found = []
    if size == "apart":
        size = torch.full((N,), 2.0**-10).index_fill(0, torch.tensor([7]), -(2.0**10))
        given["advantages"] = torch.ones(1, N)
    for wide in (dtype, torch.float64):
        leaves = (given[x].to(dtype).to(wide, copy=True) for x in ("hidden", "weight"))
        hidden, weight = (leaf.requires_grad_() for leaf in leaves)
        logp = rf.linear_token_logprobs(hidden, weight, given["labels"])
        logp.backward(size * given["advantages"].to(logp.dtype))
        found.append((hidden.grad.double(), weight.grad.double()))
    for got, exact in zip(*found, strict=True):
        assert error(got, exact) <= 1.1 * error(exact.to(dtype).double(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_logits_may_come_last(dtype, given, monkeypatch, as_on_a_gpu):
    """By more than 16 bits hold, where what is left of the tiles before is already written."""
    as_on_a_gpu(dtype, 100)
    monkeypatch.setattr(tiles, "MOST", {"cpu": (16 * 1024, 16)})
    given["weight"][:2048] /= 8
    given["labels"] = (given["hidden"] @ given["weight"].t()).argmax(-1)
    assert given["labels"].min() > 2048
    _, grads = run(LOGP, given, dtype, dtype)
    _, exact_gradients = run(LOGP, given, dtype, torch.float64)
    for got, exact in zip(grads, exact_gradients, strict=True):
        assert error(got, exact) <= 1.1 * error(exact.to(dtype).double(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_flat_row_keeps_its_digits_beside_a_peaked_one(dtype, given, as_on_a_gpu):
    """Its tokens are improbable, each, and so is the sum that they are divided by large."""
    as_on_a_gpu(dtype, 100)
    hidden = given["hidden"][0, :2] * torch.tensor([[4.0], [0.03]])
    weight, labels = given["weight"], given["labels"][0, :2]
    found = []
    for wide in (dtype, torch.float64):
        x, w = (y.to(dtype).to(wide, copy=True) for y in (hidden, weight))
        logp = rf.linear_token_logprobs(x, w.requires_grad_(), labels)
        logp.backward(torch.full_like(logp, 1024.0))
        found.append(w.grad.double())
    got, exact = found
    of_the_flat_row = torch.ones(V, dtype=torch.bool)
    of_the_flat_row[labels] = False
    of_the_flat_row &= (hidden[0] @ weight.t()).softmax(-1) < 1e-12
    got, exact = got[of_the_flat_row], exact[of_the_flat_row]
    assert len(got) > V / 4
    # a probability, what it is multiplied by and the result are rounded, each once
    assert ((got - exact).abs() <= 3 * torch.finfo(dtype).eps / 2 * exact.abs() + 2**-24).all()
