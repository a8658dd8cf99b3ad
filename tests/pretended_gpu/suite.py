"""What only the pretended GPU shows, beside ../ops/test_gpu.py: who waits for it, how many bytes
are allocated on it, and what it refuses.

../ops/test_pretended_gpu.py runs both in a process of their own."""

from __future__ import annotations

import gc

import device
import pytest
import torch
from drawing import arguments, tensors
from rlhf_fast.kernels import tuning
from torch import Tensor

from rlhf_fast.ops.linear import chunks as linear
from rlhf_fast.ops.linear import groups
from rlhf_fast.ops.registry import OPS, Sample


def on_the_gpu(x: object) -> object:
    if isinstance(x, tuple):  # an adapter's A and B
        return tuple(map(on_the_gpu, x))
    return x.cuda() if isinstance(x, Tensor) else x


WITHOUT_WAITS = [(name, torch.float32) for name in OPS]
WITHOUT_WAITS += [(name, torch.bfloat16) for name in OPS if name.startswith("linear_")]


@pytest.mark.parametrize("name, dtype", WITHOUT_WAITS)
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    """What a CUDA graph's capture shows on a real one (test_gpu.py)."""
    sizes = {"B": 4, "G": 4, "T": 40, "N": 9, "H": 16, "V": 203}
    op = OPS[name]
    shape = {letter: sizes[letter] for letter in op.shapes[0]}
    sample = op.workload(shape, torch.Generator().manual_seed(0), "cpu", dtype)
    engine = {"compact": False} if name.startswith("linear_") else {}
    made = arguments(Sample("", sample.arguments | engine, ()), dtype)
    there = {key: on_the_gpu(x) for key, x in made.items()}
    for key in sample.grads:
        there[key].requires_grad_()
    with device.no_waits():
        result = op.function(**there)
        scored = [x for x in tensors(result) if x.requires_grad]
        if scored:
            torch.autograd.grad(
                scored, [there[key] for key in sample.grads], [*map(torch.ones_like, scored)]
            )


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_policy_loss", "linear_token_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk_and_the_gradients(name: str, dtype: torch.dtype) -> None:
    """As chunk_budget says: beside the results float32 logits of a chunk or, of 16-bit inputs, a
    quarter of that and their gradient, and what the forward pass left; and the sum over chunks of
    the weight's gradient in float32."""
    n, width, vocab, rows = 16, 16, 2048, 8
    size, budget = dtype.itemsize, rows * vocab * 4
    extra = most_memory(name, n, width, vocab, dtype, budget)
    results = size * (n + vocab) * width
    if name == "linear_policy_loss":  # made in the forward pass; the backward scales them
        results *= 2
    chunk = budget
    if size < 4:
        chunk = 5 * budget // 4 if name == "linear_policy_loss" else 2 * budget
    sums = 4 * vocab * width if size < 4 else 0
    assert budget <= extra <= chunk + sums + results + 2**15


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_policy_loss"])
def test_a_large_weight_has_no_gradient_in_float32(name: str, monkeypatch) -> None:
    """N=8192 H=4096 V=131072 in bfloat16 takes 2.3 GiB beside inputs and results: every size here
    is a 64th of that."""
    monkeypatch.setattr(groups, "LARGE", 1)
    n, width, vocab, gib = 8192 // 64, 4096 // 64, 131072 // 64, 2**30 // 64**2
    extra = most_memory(name, n, width, vocab, torch.bfloat16, gib)
    results = 2 * (n + vocab) * width
    assert 2.0 * gib < extra - results < 2.3 * gib


def most_memory(name: str, n: int, width: int, vocab: int, dtype: torch.dtype, budget: int) -> int:
    """The most bytes allocated at a time by a call and its backward."""
    op = OPS[name]
    generator = torch.Generator().manual_seed(0)
    sample = op.workload({"N": n, "H": width, "V": vocab}, generator, "cpu", dtype)
    made = {key: on_the_gpu(x) for key, x in sample.arguments.items()}
    for key in sample.grads:
        made[key].requires_grad_()
    linear.release_memory()
    gc.collect()
    device.memory.begin()
    with linear.chunk_budget(budget), pytest.MonkeyPatch.context() as patch:
        # trying configurations would take memory of its own
        patch.setattr(tuning, "fastest", lambda configs, *_: configs[0])
        outputs = tensors(op.function(**made))
        total = sum(x.sum() for x in outputs if x.requires_grad)
        found = torch.autograd.grad(total, [made[key] for key in sample.grads])
    assert len(found) == len(sample.grads)
    return device.memory.most


def test_what_a_gpu_refuses() -> None:
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
