"""Every op on the pretended GPU, against its reference in float64.

../ops/test_pretended_gpu.py runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import device
import pytest
import torch
from drawing import arguments, few_for_all_options
from interpreting import faster
from torch import Tensor

from rlhf_fast.ops.linear import chunks as linear
from rlhf_fast.ops.registry import OPS, Op, Sample

faster()
CASES = [
    pytest.param(op, sample, id=f"{op.name}: {sample.name}")
    for op in OPS.values()
    for sample in few_for_all_options(op)
]
# What may make the host wait: rows that are left out are counted (compact=False leaves none out).
COMPACT = {"aten::nonzero at chunks.py", "aten::item at chunks.py"}


def each(change: Callable[[Tensor], Tensor], x: object) -> object:
    if isinstance(x, tuple):  # an adapter's A and B
        return tuple(each(change, part) for part in x)
    return change(x) if isinstance(x, Tensor) else x


def leaves(made: dict, sample: Sample) -> Iterator[Tensor]:
    for name in sample.grads:
        for x in made[name] if isinstance(made[name], tuple) else (made[name],):
            if isinstance(x, Tensor):
                yield x.requires_grad_()


def flat(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for part in x for y in flat(part)]


def numbers(function: Callable, made: dict, sample: Sample) -> list[Tensor]:
    """Outputs, then the gradients of their sum."""
    given = list(leaves(made, sample))
    outputs = flat(function(**made))
    scored = [x for x in outputs if x.requires_grad]
    found: tuple[Tensor | None, ...] = ()
    if scored and given:
        total = sum((x.sum() for x in scored[1:]), scored[0].sum())
        found = torch.autograd.grad(total, given, allow_unused=True)
    return [*outputs, *(x for x in found if x is not None)]


def compare(op: Op, sample: Sample, dtype: torch.dtype, eps: float) -> None:
    made = arguments(Sample("", sample.arguments), dtype)
    wide = {k: each(lambda x: x.double() if x.is_floating_point() else x.clone(), v)
            for k, v in made.items()}  # fmt: skip
    exact = [x.detach().double() for x in numbers(op.reference, wide, sample)]
    with device.pretended():
        there = {k: each(lambda x: x.detach().cuda(), v) for k, v in made.items()}
        device.waits.clear()
        got = numbers(op.function, there, sample)
        waits = set(device.waits)
    assert waits <= (COMPACT if op.name.startswith("linear") else set())
    for x, y in zip(got, exact, strict=True):
        assert isinstance(x, device.Pretended)
        scale = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
        torch.testing.assert_close(
            x.inner.detach().double(), y, rtol=eps, atol=eps * max(scale, 1e-3), equal_nan=True
        )


@pytest.mark.parametrize("op, sample", CASES)
def test_float32(op: Op, sample: Sample) -> None:
    compare(op, sample, torch.float32, 2e-5)


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss", "linear_token_kl"])
def test_16_bit_operands(op: str) -> None:
    """Products of 16-bit operands into float32, and their gradient back in 16 bits: of the samples
    that have most options."""
    for sample in few_for_all_options(OPS[op])[:2]:
        compare(OPS[op], sample, torch.bfloat16, 4e-2)


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss", "linear_token_kl"])
def test_nothing_waits_without_compaction(op: str) -> None:
    sample = few_for_all_options(OPS[op])[0]
    with device.pretended():
        made = {
            k: each(lambda x: x.detach().cuda(), v)
            for k, v in arguments(Sample("", sample.arguments), torch.float32).items()
        }
        device.waits.clear()
        numbers(OPS[op].function, made | {"compact": False}, sample)
        assert not device.waits


def test_memory_is_that_of_a_chunk_and_the_gradients() -> None:
    """Beyond inputs and gradients: dW in float32, logits, and their gradient in 16 bits."""
    n, width, vocab, rows = 64, 16, 4096, 16
    with device.pretended(), linear.chunk_budget(rows * vocab * 4):
        hidden = torch.randn(1, n, width, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn(vocab, width, device="cuda").bfloat16().requires_grad_()
        labels = torch.zeros(1, n, dtype=torch.int64, device="cuda")
        ones = torch.ones(1, n, device="cuda")
        before = device.memory.most = device.memory.now
        loss, _ = OPS["linear_policy_loss"].function(hidden, weight, labels, ones, ones, ones > 0)
        loss.backward()
        extra = device.memory.most - before
    gradients = 2 * (n + vocab) * width
    chunk = rows * vocab * (4 + 2)
    assert extra <= 4 * vocab * width + 2 * gradients + chunk + 2**16
    assert extra >= chunk  # or nothing was counted


def test_what_a_gpu_refuses() -> None:
    with device.pretended():
        there, here = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(AssertionError, match="several dtypes"):
            torch.mm(there, there.bfloat16(), out=torch.empty_like(there))
        with pytest.raises(AssertionError, match="operands of two dtypes"):
            torch.mm(there.half(), there.bfloat16(), out_dtype=torch.float32)
        assert torch.empty(3, device="cuda").inner.isnan().all()
        device.waits.clear()
        assert there.sum().item() == 9 and len(device.waits) == 1
