"""The chunk that a forward pass leaves in memory: used by its backward, by no other, and only where
that is less work."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rlhf_fast as rf
from rlhf_fast.ops.linear import chunks as linear
from rlhf_fast.ops.linear.head import Head

N, H, V = 96, 16, 1000
GEMM = 2 * N * H * V
CONSTANTS = torch.zeros(N), torch.ones(N), torch.ones(N, dtype=torch.bool)


def draw(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(N, H, generator=generator, dtype=dtype).requires_grad_(),
        "weight": torch.randn(V, H, generator=generator, dtype=dtype).requires_grad_(),
        "labels": torch.randint(V, (N,), generator=generator),
    }


def products(inside, total: Tensor, **options) -> float:
    """How many products of all rows the backward of `total` makes."""
    counter = FlopCounterMode(display=False)
    with counter, inside:
        total.backward(**options)
    return counter.get_total_flops() / GEMM


def gradients(x: dict[str, Tensor], total: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, (x["hidden"], x["weight"]))


def test_it_spares_the_backward_a_product_once(inside) -> None:
    x = draw()
    total = rf.linear_token_logprobs(**x).sum()
    assert products(inside, total, retain_graph=True) == 2
    assert products(inside, total) == 3  # its logits have been overwritten


def test_of_several_chunks_it_is_the_last(inside) -> None:
    x = draw()
    with rf.chunk_budget(40 * V * 4):  # 32 rows each
        assert products(inside, rf.linear_token_logprobs(**x).sum()) == pytest.approx(3 - 1 / 3)


@pytest.mark.parametrize("between", ["another forward", "policy loss", "a KL without gradient"])
def test_another_call_takes_its_memory(inside, between: str) -> None:
    x, other = draw(), draw()
    other["hidden"] = other["hidden"].detach() * 2
    total = rf.linear_token_logprobs(**x).sum()
    (want,) = torch.autograd.grad(total, x["hidden"], retain_graph=True)
    total = rf.linear_token_logprobs(**x).sum()
    if between == "policy loss":
        rf.linear_policy_loss(*other.values(), *CONSTANTS)
    elif between == "another forward":
        rf.linear_token_logprobs(**other)
    else:
        with torch.no_grad():
            rf.linear_token_kl(**other, ref_hidden=other["hidden"])
    assert products(inside, total) == 3
    torch.testing.assert_close(x["hidden"].grad, want)


def test_log_probs_without_gradients_leave_it(inside) -> None:
    """A reference's may come between the policy's forward and its backward."""
    x = draw()
    want = gradients(x, rf.linear_token_logprobs(**x).sum())
    total = rf.linear_token_logprobs(**x).sum()
    with torch.no_grad():
        rf.linear_token_logprobs(**x)
        rf.linear_policy_loss(*x.values(), *CONSTANTS)
    assert products(inside, total) == 2
    assert torch.equal(x["hidden"].grad, want[0])
    assert torch.equal(x["weight"].grad, want[1])


@pytest.mark.parametrize(("kept", "made"), [(96, 2), (65, 2), (63, 3 * 63 / 96), (0, 0)])
def test_it_is_used_where_two_thirds_of_its_rows_have_a_gradient(inside, kept, made) -> None:
    x = draw()
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(1)) < kept
    with torch.no_grad():  # what is out may hold anything
        x["hidden"][~kept] = torch.nan
    logp = rf.linear_token_logprobs(**x)
    assert products(inside, logp.masked_fill(~kept, 0.0).sum()) == made
    small = {**draw(), "labels": x["labels"].masked_fill(~kept, -100)}
    d_hidden, d_weight = gradients(small, rf.linear_token_logprobs(**small).sum())
    torch.testing.assert_close(x["hidden"].grad, d_hidden)
    torch.testing.assert_close(x["weight"].grad, d_weight)


@pytest.mark.parametrize("budget", [1000, 40], ids=["one chunk", "three chunks"])
@pytest.mark.parametrize("how", [{}, {"compact": False}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl"])
def test_gradients_are_the_same_with_it_and_without(op: str, how: dict, budget: int) -> None:
    """Some rows have no label, some no gradient, and every option is on."""
    x = draw(torch.float64)
    generator = torch.Generator().manual_seed(1)
    x["labels"][::5] = -100
    scale = torch.rand(N, generator=generator, dtype=torch.float64) * (torch.arange(N) % 7 > 0)
    options = {"temperature": 0.7, "softcap": 3.0, **how}
    options["bias"] = torch.randn(V, generator=generator, dtype=torch.float64)
    if op == "linear_token_kl":
        options["ref_hidden"] = x["hidden"].detach() * 0.5
    else:
        options["entropy"] = True

    def results(kept: bool) -> tuple[Tensor, ...]:
        with rf.chunk_budget(budget * V * 8):
            first, *_, last = getattr(rf, op)(**x, **options)
            if not kept:
                linear._memory.clear()
            return gradients(x, (scale * (first + last)).sum())

    for with_it, without in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-12, atol=1e-12)


def test_a_backward_under_autocast_keeps_the_dtype_of_the_forward() -> None:
    x = draw()
    x["labels"][::5] = -100
    want = gradients(x, rf.linear_token_logprobs(**x).sum())
    total = rf.linear_token_logprobs(**x).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(x, total)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_kl_uses_both_chunks_or_none(inside) -> None:
    """Where one has been taken, the loops over the two heads would not see the same rows."""
    x = draw()
    ref_hidden = 0.5 * x["hidden"].detach()

    def kl() -> Tensor:
        with rf.chunk_budget(2 * 40 * V * 4):
            return rf.linear_token_kl(**x, ref_hidden=ref_hidden)[2].sum()

    want = gradients(x, kl())
    total = kl()
    rf.linear_token_logprobs(**x)
    assert products(inside, total) == 4
    torch.testing.assert_close(x["hidden"].grad, want[0])
    torch.testing.assert_close(x["weight"].grad, want[1])


def test_compiled_calls_use_it_too(monkeypatch) -> None:
    x, found = draw(), []
    left_by = linear.left_by
    monkeypatch.setattr(linear, "left_by", lambda *a: found.append(left_by(*a)) or found[-1])
    torch._dynamo.reset()
    compiled = torch.compile(rf.linear_token_logprobs, fullgraph=True, backend="aot_eager")
    got = gradients(x, compiled(**x).sum())
    assert [memory is not None for memory in found] == [True]
    for a, b in zip(got, gradients(x, rf.linear_token_logprobs(**x).sum()), strict=True):
        torch.testing.assert_close(a, b)


def test_a_gpus_memory_stays_only_where_a_backward_follows(monkeypatch) -> None:
    """Shapes alone, on the meta device: what is no CPU is handled as a GPU is."""
    monkeypatch.setattr(linear, "_memory", {})
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta
    head = Head(*(torch.empty(size, device="meta") for size in ((N, H), (V, H))), None)
    keep = torch.empty(N, dtype=torch.bool, device="meta")

    def run(norm: Tensor | None) -> list[linear.Memory]:
        for _ in linear.chunks(head, keep, compact=False, leave_for=norm):
            pass
        return list(linear._memory.values())

    assert run(None) == []
    (first,) = run(torch.empty(2, N, device="meta"))
    (second,) = run(torch.empty(2, N, device="meta"))
    assert second.whole is not first.whole  # the allocator knows which stream used it
    assert run(None) == []


def test_it_holds_no_autograd_graph() -> None:
    """What the caller no longer has is freed, though the memory stays."""
    x = draw()
    hidden = x["hidden"] * 1.0

    def hook(grad: Tensor) -> None: ...

    hidden.register_hook(hook)  # lives as long as the graph
    graph = weakref.ref(hook)
    logp = rf.linear_token_logprobs(hidden, x["weight"], x["labels"])
    del hook, hidden
    assert graph() is not None
    del logp
    assert graph() is None
