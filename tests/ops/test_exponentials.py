"""What a forward in tiles leaves to its backward, as it is on a GPU: exponentials in 16 bits."""

from __future__ import annotations

from typing import Any

import head_products
import pytest
import torch
from left_exponentials import CASES, WIDE, check_gradient, exactly_as_on_a_gpu
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops import check
from rlhf_fast.ops import support as sets
from rlhf_fast.ops.linear import (
    chunks,
    groups,
    logprobs,
    policy_loss,
    tiles,
)
from rlhf_fast.ops.linear.exponentials import Exponentials
from rlhf_fast.ops.registry import KERNELS

N, H, V = 41, 12, 3000


@pytest.mark.parametrize("order, options", CASES)
def test_each_number_is_rounded_once(order: str, options: dict[str, Any]) -> None:
    check_gradient(KERNELS["leave_logprobs"].fallback, order, **options)


@pytest.mark.parametrize("order", ["rising", "in and out of reach"])
def test_wide_tiles_too(order: str) -> None:
    check_gradient(KERNELS["leave_logprobs"].fallback, order, columns=WIDE)


def test_a_share_that_float32_does_not_hold() -> None:
    """A rank's part may be e^-300 of a row: what is left of it there is nothing, but at a label."""
    e = Exponentials(torch.ones(2, 5, dtype=torch.bfloat16))
    e.anchors[0], e.slopes = torch.tensor([-300.0, -torch.inf]), torch.tensor([0.5, 0.0])
    logp, norm = torch.tensor([-301.0, -2.0]), torch.zeros(2, 2)
    at_labels, units = e.gradient(torch.tensor([3, check.ELSEWHERE]), logp, norm)
    assert at_labels.tokens.tolist() == [3, 0]
    assert (at_labels.entries * units).tolist() == pytest.approx([0.5, 0.0])
    assert (units < 1e-18).all()


@pytest.fixture
def in_float64(monkeypatch) -> list[tuple[int, int]]:
    """The form of 16 bits on a GPU, exactly; (rows, tokens) of every product of the head."""
    exactly_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(tiles, "MOST", dict.fromkeys(tiles.MOST, (16 * 1024, 16)))
    return head_products.noted(monkeypatch)


def draw(**options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def number(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = number(V, H)
    weight[1024:2048] *= 6  # the second tile holds the largest logits, and -inf
    bias = number(V).index_fill(0, torch.arange(1100, 1200), -torch.inf)
    x = {
        "hidden": number(N, H), "weight": weight, "labels": torch.arange(N) * 71, "bias": bias,
        "lora": (number(2, H), number(V, 2), 0.5), "temperature": number(N).exp(),
    } | options  # fmt: skip
    x["labels"][::5] = -100
    x["labels"][16] = 0
    for name in ("hidden", "weight", "bias"):
        x[name].requires_grad_()
    for y in x["lora"][:2]:
        y.requires_grad_()
    return x


def leaves(x: dict[str, Any]) -> tuple[Tensor, ...]:
    return x["hidden"], x["weight"], x["bias"], *x["lora"][:2]


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("how", [{}, {"compact": False}, {"softcap": 3.0}, {"temperature": 0.7}])
def test_log_probs_have_the_gradients_of_the_formula(how: dict[str, Any], in_float64) -> None:
    x = draw(**how)
    kept = x["labels"] != -100
    incoming = torch.linspace(-2, 3, N, dtype=torch.float64).index_fill(0, torch.arange(9, 14), 0.0)
    logp = rf.linear_token_logprobs(**x)
    got = torch.autograd.grad(logp, leaves(x), incoming)
    rows = int(kept.sum()) if x.pop("compact", True) else N
    assert sum(n * v for n, v in in_float64) == rows * V
    assert max(v for _, v in in_float64) == 1024
    same(got, torch.autograd.grad(logprobs.reference(**x), leaves(x), incoming))


def test_a_second_forward_does_not_wait_for_the_first(in_float64, monkeypatch) -> None:
    """What that has left is free before the next one's is made."""
    x, kept, make_logits = draw(), set(), chunks.make_logits

    def noted(*args: Any) -> None:
        kept.update(type(memory.last) for memory in chunks._memory.values())
        make_logits(*args)

    first = rf.linear_token_logprobs(**x)
    monkeypatch.setattr(chunks, "make_logits", noted)
    second = rf.linear_token_logprobs(**x)
    assert groups.Left not in kept
    for logp in (first, second):
        got = torch.autograd.grad(logp.sum(), leaves(x))
        same(got, torch.autograd.grad(logprobs.reference(**x).sum(), leaves(x)))


def test_an_entropy_has_logits_made_again(in_float64) -> None:
    x = draw()
    logp, entropy = rf.linear_token_logprobs(**x, entropy=True)
    got = torch.autograd.grad((logp + 0.3 * entropy).sum(), leaves(x))
    kept = int((x["labels"] != -100).sum())
    assert sum(n * v for n, v in in_float64) == 2 * kept * V
    logp, entropy = logprobs.reference(**x, entropy=True)
    same(got, torch.autograd.grad((logp + 0.3 * entropy).sum(), leaves(x)))


def test_sets_of_tokens(in_float64) -> None:
    x = draw()
    ids = sets.drawn(x["labels"], V, 700, torch.Generator().manual_seed(1))
    logp = rf.linear_token_logprobs(**x, support=ids)
    got = torch.autograd.grad(logp.sum(), leaves(x))
    assert max(v for _, v in in_float64) == 1024
    want = logprobs.reference(**x, support=ids)
    same((logp,), (want,))
    same(got, torch.autograd.grad(want.sum(), leaves(x)))


@pytest.mark.parametrize("how", [{}, {"ratio": "sequence"}, {"kl_coef": 0.2}, {"compact": False}])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_a_policy_loss_makes_logits_once(how, entropy_coef: float, in_float64) -> None:
    x = draw()
    x["labels"] = x["labels"].clamp(min=0)
    rows = {name: x[name][None] for name in ("hidden", "labels", "temperature")}
    x |= rows | {"mask": torch.arange(N)[None] % 3 > 0, "entropy_coef": entropy_coef}
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)[None]
    head = (x[name].detach() for name in ("hidden", "weight", "labels"))
    old_logp = logprobs.reference(*head, temperature=x["temperature"]) - 0.1
    x |= {"advantages": advantages.index_fill(1, torch.arange(5), 0.0), "old_logp": old_logp}
    x |= {"ref_logp": old_logp - 0.1, "clip_low": 0.9, "clip_high": 9.0} | how
    del x["bias"], x["lora"]
    wanted = x["hidden"], x["weight"]
    loss, stats = rf.linear_policy_loss(**x)
    got = torch.autograd.grad(loss, wanted)
    made = sum(n * v for n, v in in_float64)
    again = 2 if how.get("ratio") and entropy_coef else 1
    assert made <= again * N * V
    if not entropy_coef:
        assert max(v for _, v in in_float64) == 1024
    want, expected = policy_loss.reference(**x)
    same((loss, *stats), (want, *expected))
    same(got, torch.autograd.grad(want, wanted))
