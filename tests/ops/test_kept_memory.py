"""What the linear ops keep between calls, and the settings that threads have of their own."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops import check
from rlhf_fast.ops.linear import chunks as linear
from rlhf_fast.ops.linear import tiles

N, H, V = 48, 8, 100
OPS = ["linear_token_logprobs", "linear_token_kl", "linear_policy_loss", "sequence"]


def call(op: str, n: int = N, v: int = V, dtype: torch.dtype = torch.float32, **options):
    """(leaves, loss) of one of the linear ops on n rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, w = (t.to(dtype).requires_grad_() for t in (draw(1, n, H), draw(v, H) / 3))
    labels = torch.randint(v, (1, n), generator=generator)
    if op == "linear_token_logprobs":
        out = rf.linear_token_logprobs(x, w, labels, **options)
    elif op == "linear_token_kl":
        out = rf.linear_token_kl(x, w, labels, (x + 0.3).detach(), **options)[2]
    else:
        options |= {"ratio": "sequence"} if op == "sequence" else {}
        constants = draw(1, n) - 4, draw(1, n), torch.ones(1, n, dtype=torch.bool)
        out = rf.linear_policy_loss(x, w, labels, *constants, clip_high=9.0, **options)[0]
    return (x, w), out.float().sum()


def kept(tiles: bool = False) -> int:
    """Bytes; of tiles alone."""
    return sum(
        m.whole.numel() * m.whole.element_size()
        for key, m in list(linear._memory.items())
        if not tiles or key[2] == linear.TILES
    )


@pytest.fixture(autouse=True)
def nothing_kept():
    rf.release_memory()
    yield
    rf.release_memory()


@pytest.mark.parametrize("op", OPS)
def test_one_call_gives_the_kept_memory_back(op: str) -> None:
    leaves, loss = call(op)
    right = torch.autograd.grad(loss, leaves, retain_graph=True)
    leaves, loss = call(op)
    assert kept() >= N * V * 4
    rf.release_memory()
    assert kept() == 0
    for got, want in zip(torch.autograd.grad(loss, leaves), right, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "mode", ["gradient", "no backward", "no_grad", "inference", "deterministic"]
)
def test_what_is_kept_is_bounded_by_the_last_need(op: str, mode: str) -> None:
    """Not by the largest ever, not by other dtypes' calls, not by a second loop's of another op."""
    options = {"deterministic": True} if mode == "deterministic" else {}

    def run(op: str, **size) -> None:
        leaves, loss = call(op, **size, **options)
        if mode in ("gradient", "deterministic"):
            torch.autograd.grad(loss, leaves)

    with {"no_grad": torch.no_grad(), "inference": torch.inference_mode()}.get(
        mode, torch.enable_grad()
    ):
        run("linear_token_kl", n=400, v=900, dtype=torch.float64)
        run("linear_policy_loss", n=400, v=900)
        run(op)
    rows = linear.DETERMINISTIC_ROWS if options else N
    loops = 2 if op == "linear_token_kl" else 1
    of_tiles = kept(tiles=True)
    tiled = mode in ("no_grad", "inference") and op != "linear_token_kl"
    assert 0 < (of_tiles if tiled else kept() - of_tiles) <= 2 * loops * rows * V * 4
    assert of_tiles <= 4 * tiles.MOST["cpu"][0]
    assert tiled == (kept() == of_tiles)


@pytest.mark.parametrize("op", OPS)
def test_memory_fits_the_next_call_of_the_same_size(op: str) -> None:
    leaves, loss = call(op)
    before = {m.whole.data_ptr() for m in linear._memory.values()}
    torch.autograd.grad(loss, leaves)
    call(op)
    assert before == {m.whole.data_ptr() for m in linear._memory.values()} != set()


@pytest.mark.parametrize("op", OPS)
def test_a_call_in_inference_mode_leaves_memory_that_training_can_use(op: str) -> None:
    leaves, loss = call(op)
    right = torch.autograd.grad(loss, leaves)
    rf.release_memory()
    with torch.inference_mode():
        call(op, n=N + 2)
    assert not any(m.whole.is_inference() for m in linear._memory.values())
    leaves, loss = call(op)
    for got, want in zip(torch.autograd.grad(loss, leaves), right, strict=True):
        assert torch.equal(got, want)


def rows_at_once(monkeypatch) -> list[int]:
    seen: list[int] = []
    make_logits = linear.make_logits

    def counted(head, inputs, out) -> None:
        seen.append(out.shape[0])
        make_logits(head, inputs, out)

    monkeypatch.setattr(linear, "make_logits", counted)
    return seen


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl", "sequence"])
@pytest.mark.parametrize("where", ["same thread", "another thread"])
def test_a_budget_holds_in_the_backward_too(op: str, where: str, monkeypatch) -> None:
    """Called after the context, or in a thread of its own, as autograd does on a GPU."""
    seen = rows_at_once(monkeypatch)
    with rf.chunk_budget(2 * 5 * V * 4):
        _, loss = call(op)
    assert max(seen) <= 10
    seen.clear()
    if where == "same thread":
        loss.backward()
    else:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert seen and max(seen) <= 10


def test_a_budget_around_the_backward_alone_holds_as_well(monkeypatch) -> None:
    seen = rows_at_once(monkeypatch)
    _, loss = call("linear_token_logprobs")
    assert max(seen) == N
    rf.release_memory()
    seen.clear()
    with rf.chunk_budget(5 * V * 4):
        loss.backward()
    assert seen and max(seen) <= 5


def test_settings_are_each_threads_own() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with rf.chunk_budget(1), rf.debug():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with rf.chunk_budget(77):
        thread.start()
        entered.wait(30)
        assert linear.budget() == 77 and not check._debug.get()
    assert linear.budget() is None
    leave.set()
    thread.join()
    assert linear.budget() is None and not check._debug.get()


@pytest.mark.parametrize("op", OPS)
def test_threads_that_call_at_once_do_not_share_memory(op: str) -> None:
    leaves, loss = call(op)
    right = torch.autograd.grad(loss, leaves)
    wrong: list[str] = []

    def run(rows: int) -> None:
        with rf.chunk_budget(2 * rows * V * 4):
            for _ in range(20):
                leaves, loss = call(op)
                for got, want in zip(torch.autograd.grad(loss, leaves), right, strict=True):
                    if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
                        wrong.append(f"off by {(got - want).abs().max()}")

    threads = [threading.Thread(target=run, args=(rows,)) for rows in (7, 20, N)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [1.0, 2.0**24, 2.0**-9], ids=["1", "2^24", "2^-9"])
@pytest.mark.parametrize(
    "options", [{}, {"deterministic": True}, {"temperature": 0.05}, {"compact": False}], ids=str
)
def test_float16_gradients_under_a_loss_scale(op: str, scale: float, options: dict) -> None:
    """A scale, of the loss and its inverse of what the mean divides by, changes nothing: what fp16
    holds of dlogits is in units of its own. Against float64 on the same operands."""

    def grads(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        n, v = 64, 3000
        x = draw(1, n, H).half().to(dtype).requires_grad_()
        w = (draw(v, H) / 4).half().to(dtype).requires_grad_()
        b = draw(v).half().to(dtype).requires_grad_()
        labels = torch.randint(v, (1, n), generator=generator)
        rows = 10.0 ** -(4 * torch.rand(1, n, generator=generator))  # of very different sizes, ...
        rows[:, ::5] = 0.0  # ... or none: in no row's way
        weights = (draw(1, n) * rows / scale).to(dtype if dtype == torch.float64 else torch.float32)
        with rf.chunk_budget(2 * 16 * v * 2):
            if op == "linear_token_logprobs":
                loss = (rf.linear_token_logprobs(x, w, labels, bias=b, **options) * weights).sum()
            elif op == "linear_token_kl":
                ref = (x + 0.1 * draw(1, n, H)).detach().half().to(dtype)
                logp, _, kl = rf.linear_token_kl(x, w, labels, ref, bias=b, **options)
                loss = ((kl + logp) * weights).sum()
            else:
                how = {"ratio": "sequence"} if op == "sequence" else {}
                old = draw(1, n) * 0.01 - 8
                mask = torch.ones(1, n, dtype=torch.bool)
                loss, _ = rf.linear_policy_loss(
                    x, w, labels, old, weights, mask, bias=b, loss="cispo", clip_low=0.1,
                    aggregation="token-sum", **how, **options,
                )  # fmt: skip
            return [g.double() for g in torch.autograd.grad(loss * scale, (x, w, b))]

    for got, want in zip(grads(torch.float16), grads(torch.float64), strict=True):
        error = (got - want).norm() / want.norm()
        # logits are fp16 on a CPU: off by 2^-11 of up to 4, over the temperature
        assert error < 4 * 2.0**-11 * 4 / options.get("temperature", 1.0)
