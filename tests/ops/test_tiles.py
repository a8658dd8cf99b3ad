"""A pass without gradients, whose logits are made tile by tile of the vocabulary."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import head_products
import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.linear import logprobs, tiles

N, H, V = 70, 12, 3000  # in tiles of 32 rows and 1024, 1024, 952 tokens
SHAPES = [(n, v) for n, v in product((0, 1, 31, 70), (1, 7, 1024, 1025, 3000))]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "MOST", dict.fromkeys(tiles.MOST, (32 * 1024, 48)))


def draw(n: int = N, v: int = V, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(n, H, generator=generator, dtype=dtype),
        "weight": torch.randn(v, H, generator=generator, dtype=dtype),
        "labels": torch.randint(v, (n,), generator=generator),
    }


def options(n: int = N, v: int = V) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def number(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "bias": number(v),
        "temperature": number(n).exp(),
        "softcap": 3.0,
        "lora": (number(2, H), number(v, 2), 0.5),
    }


@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_a_pass_without_gradients_has_the_numbers_of_one_with(n: int, v: int) -> None:
    x = draw(n, v) | options(n, v)
    x["labels"][::5] = -100
    for compact in (True, False):
        got = rf.linear_token_logprobs(**x, entropy=True, compact=compact)
        want = logprobs.reference(**x, entropy=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [1, 20, 200])
def test_sets_of_tokens_fall_into_tiles(most: int) -> None:
    """A tile in which a row's set has no token holds nothing but -inf."""
    x = draw()
    scores = torch.rand(N, V, generator=torch.Generator().manual_seed(2))
    ids = scores.scatter(1, x["labels"][:, None], 2.0).topk(most).indices
    ids[::3, 1:] = -1
    ids[1] = -1  # the whole vocabulary
    flat = x["hidden"], x["weight"], None, None, None, x["labels"], 0.7, None, None, ids
    logp, entropy, _ = logprobs._forward(*flat, True, True, False, None, [False] * 5)
    want = logprobs.reference(**x, temperature=0.7, entropy=True, support=ids)
    for a, b in zip((logp, entropy), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_policy_loss_without_gradients_has_the_numbers_of_one_with() -> None:
    x = draw()
    old, advantages = torch.randn(2, N, generator=torch.Generator().manual_seed(3)).double()
    constants = old - 8, advantages, torch.arange(N) % 4 > 0

    def loss() -> tuple[Tensor, ...]:
        how = options() | {"entropy_coef": 0.1, "clip_high": 9.0}
        total, stats = rf.linear_policy_loss(*x.values(), *constants, **how)
        return total.detach(), *stats

    without = loss()
    x["hidden"].requires_grad_()
    for a, b in zip(without, loss(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("peaked", [0.125, 4.0])
def test_float32_loses_a_few_roundings_alone(peaked: float) -> None:
    """Of logits that float32 holds exactly, flat or with nearly all on a few tokens: a tile's sums
    are of 16 terms in float32 (then in double), each an exponential to about 1 ulp; its log-prob,
    entropy and sum are rounded once, and so is the result."""
    x = draw()
    x["hidden"], x["weight"] = x["hidden"].mul(4).round() / 4, x["weight"].mul(4).round() * peaked
    x["labels"][::2] = (x["hidden"] @ x["weight"].t()).argmax(-1)[::2]
    want = logprobs.reference(**x, entropy=True)
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    got = rf.linear_token_logprobs(**narrow, entropy=True)
    largest = max(float(want[0].abs().max()), math.log(V))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 2**-24 * 24 * (1 + largest)


def test_tokens_that_cannot_come_fill_a_tile() -> None:
    x, bias = draw(), torch.zeros(V, dtype=torch.float64)
    bias[:1024] = -torch.inf
    x["labels"] = x["labels"].clamp(min=1024)
    logp, entropy = rf.linear_token_logprobs(**x, bias=bias, entropy=True)
    rest = {**x, "weight": x["weight"][1024:], "labels": x["labels"] - 1024}
    want = logprobs.reference(**rest, entropy=True)
    torch.testing.assert_close(logp, want[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, want[1], rtol=1e-12, atol=0)
    x["labels"][3] = 5
    assert rf.linear_token_logprobs(**x, bias=bias)[3] == -torch.inf


def test_tiles_are_nearly_equal_and_within_the_budget(monkeypatch) -> None:
    x, seen = draw(), head_products.noted(monkeypatch)
    rf.linear_token_logprobs(**x)
    assert seen == [(n, v) for n in (32, 32, 6) for v in (1024, 1024, 952)]
    seen.clear()
    with rf.chunk_budget(9 * 1024 * 8):
        rf.linear_token_logprobs(**x)
    assert max(n * v for n, v in seen) <= 9 * 1024 and sum(n * v for n, v in seen) == N * V
    seen.clear()
    with rf.chunk_budget(1):
        rf.linear_token_logprobs(**x)
    assert {n for n, _ in seen} == {1} and {v for _, v in seen} == {1024, 952}


def test_tiles_are_for_passes_without_gradients_alone(monkeypatch) -> None:
    x, seen = draw(), head_products.noted(monkeypatch)
    without = rf.linear_token_logprobs(**x)
    for how in ({"deterministic": True}, {}):
        seen.clear()
        needs = x["hidden"].requires_grad_(not how)
        with_gradients = rf.linear_token_logprobs(**{**x, "hidden": needs}, **how).detach()
        assert {v for _, v in seen} == {V}
        torch.testing.assert_close(with_gradients, without, rtol=1e-12, atol=0)


def test_a_deterministic_rows_bits_are_the_same_whether_a_backward_follows() -> None:
    x = draw(dtype=torch.float32)
    without = rf.linear_token_logprobs(**x, deterministic=True)
    x["hidden"].requires_grad_()
    assert torch.equal(without, rf.linear_token_logprobs(**x, deterministic=True).detach())


def test_labels_outside_the_vocabulary_are_told_as_such() -> None:
    """Not as outside of a tile, where a compiled graph is the first to see them."""
    x = draw()
    x["labels"][40] = V
    with pytest.raises(ValueError, match=rf"labels\[40\] is {V}, outside \[0, {V}\)"):
        logprobs._forward(
            x["hidden"], x["weight"], None, None, None, x["labels"], 1.0, None, None, None, False,
            True, False, None, [False] * 5,
        )  # fmt: skip
