"""Every op on cuda against its reference in float64 on the same device.

``pytest -m gpu``; without a CUDA GPU everything here skips and says so. But what our own code does
there is run on a device that is pretended, too (test_pretended_gpu.py), on fewer samples; what
needs the real thing is marked ``real_gpu``, with the reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drawing import few_for_all_options
from left_exponentials import CASES, check_gradient
from rounding import RoundedAfterwards
from torch import Tensor

from rlhf_fast import chunk_budget, linear_token_logprobs, token_logprobs
from rlhf_fast.ops.linear import groups, tiles
from rlhf_fast.ops.registry import KERNELS, OPS, Op, Sample

PRETENDED = os.environ.get("RLHF_FAST_TESTS_GPU") == "pretended"
# There the references run on the CPU, and the interpreter cuts bfloat16 off instead of rounding.
REFERENCE, SIXTEEN_BIT = ("cpu", 4e-2) if PRETENDED else ("cuda", 2e-2)
ALL_FLOATS = (torch.float32,) if PRETENDED else (torch.float32, torch.float64)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NO CUDA GPU: the kernels are not run on one here"
    ),
]


def on_cuda(sample: Sample, dtype: torch.dtype) -> dict:
    arguments = {}
    for name, x in sample.arguments.items():
        x = each_tensor(lambda t: t.cuda().to(dtype) if t.is_floating_point() else t.cuda(), x)
        leaf = name in sample.grads
        arguments[name] = each_tensor(lambda t: t.detach().requires_grad_(), x) if leaf else x
    return arguments


def each_tensor(change: Callable[[Tensor], Tensor], x: object) -> object:
    """change(x), or a tuple (an adapter's) with each of its tensors changed."""
    if isinstance(x, tuple):
        return tuple(each_tensor(change, part) for part in x)
    return change(x) if isinstance(x, Tensor) else x


def flat(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in flat(part)]


def results(function, arguments: dict, grads: tuple[str, ...]) -> list[Tensor]:
    """Outputs, then gradients of a fixed weighting of them."""
    outputs = flat(function(**arguments))
    scored = [x for x in outputs if x.requires_grad]
    weights = [torch.cos(torch.arange(x.numel(), device=x.device).to(x.dtype)).view(x.shape)
               for x in scored]  # fmt: skip
    named = [arguments[name] for name in grads]
    inputs = [t for x in named for t in (x[:2] if isinstance(x, tuple) else (x,))]  # A and B
    found = torch.autograd.grad(scored, inputs, weights, allow_unused=True) if scored else []
    return [x.detach() for x in outputs] + [x for x in found if x is not None]


def close(x: Tensor, y: Tensor, dtype: torch.dtype) -> None:
    eps = {torch.float32: 2e-5, torch.float64: 1e-9}.get(dtype, SIXTEEN_BIT)
    x, y = x.to(y.device), y.double()  # a mask, too
    scale = y.nan_to_num(0, 0, 0).abs().max().item() if y.numel() else 0.0
    scale = max(scale, 1.0) if y.dim() == 0 else scale  # a mean may cancel to anything
    torch.testing.assert_close(
        x.double(), y, rtol=eps, atol=max(eps * scale, 1e-30), equal_nan=True
    )


def widened(arguments: dict) -> dict:
    """For a reference, in float64."""

    def wide(x: Tensor) -> Tensor:
        there = x.detach().to(REFERENCE)
        return there.double().requires_grad_(x.requires_grad) if x.is_floating_point() else there

    return {name: each_tensor(wide, x) for name, x in arguments.items()}


def compare(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    arguments = on_cuda(sample, dtype)
    exact = results(op.reference, widened(arguments), sample.grads)
    with watched(op):
        ours = results(op.function, arguments, sample.grads)
    for x, y in zip(ours, exact, strict=True):
        assert x.is_cuda
        close(x, y, dtype)


def watched(op: Op) -> contextlib.AbstractContextManager[None]:
    """On the pretended device, which counts: only the engine's compaction waits for it."""
    if not PRETENDED:
        return contextlib.nullcontext()
    from device import no_waits

    compaction = {"aten::nonzero at chunks.py", "aten::item at chunks.py"}
    return no_waits(but=compaction if op.name.startswith("linear_") else set())


def samples(op: Op, few: bool = PRETENDED) -> list[Sample]:
    return few_for_all_options(op) if few else list(op.samples(torch.Generator().manual_seed(0)))


def sample_cases(dtypes: tuple[torch.dtype, ...], names: list[str]) -> list:
    return [
        pytest.param(op, sample, dtype, id=f"{op.name}-{sample.name}-{str(dtype)[6:]}")
        for op in map(OPS.get, names)
        for sample in samples(op)
        for dtype in dtypes
    ]


@pytest.mark.parametrize("op, sample, dtype", sample_cases(ALL_FLOATS, list(OPS)))
def test_samples(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    compare(op, sample, dtype)


CUT_OFF = "bfloat16, which the interpreter cuts off instead of rounding"
HALVES = (torch.bfloat16, torch.float16)
SIXTEEN_BITS = sample_cases(HALVES, ["token_logprobs", "linear_token_logprobs"])
if PRETENDED:  # two samples of each engine
    engines = [name for name in OPS if name.startswith("linear_")]
    SIXTEEN_BITS = [x for name in engines for x in sample_cases(HALVES[:1], [name])[:2]]


@pytest.mark.parametrize("op, sample, dtype", SIXTEEN_BITS)
def test_16_bit_logits(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    compare(op, sample, dtype)


@pytest.mark.real_gpu("the interpreter would take hours")
@pytest.mark.parametrize("name", OPS)
def test_bench_shapes(name: str) -> None:
    op = OPS[name]
    generator = torch.Generator(device="cuda").manual_seed(0)
    # the reference of packed rows takes them step by step, a quarter of a million of them
    shape = op.shapes[0] | ({"B": 8} if name == "gae_packed" else {})
    compare(op, op.workload(shape, generator, "cuda", torch.float32), torch.float32)


def test_every_kernel_is_triton_on_cuda() -> None:
    for kernel in KERNELS.values():
        expected = "engine" if kernel.engine else "Triton" if kernel.triton else "PyTorch"
        assert kernel.implementation("cuda") == expected, kernel.name


@pytest.mark.real_gpu("nothing is captured; what waits is counted in pretended_gpu/suite.py")
@pytest.mark.parametrize("name", OPS)
def test_capture_in_a_cuda_graph(name: str) -> None:
    """Also shows that nothing waits for the device: that would end the capture."""
    op = OPS[name]
    engine = name.startswith("linear_")
    sizes = {"B": 8, "G": 8, "T": 300, "N": 9, "H": 64, "V": 5003}
    shape = {letter: sizes[letter] for letter in op.shapes[0]}
    generator = torch.Generator(device="cuda").manual_seed(0)
    sample = op.workload(shape, generator, "cuda", torch.float32)
    arguments = on_cuda(sample, torch.float32) | ({"compact": False} if engine else {})
    expected = results(op.function, arguments, sample.grads)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(op.function, arguments, sample.grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(op.function, arguments, sample.grads)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    # our kernels have no atomics: the same bits every time. Products may be cuBLAS's other ones.
    exactly = {} if engine else {"rtol": 0, "atol": 0}
    for x, y in zip(captured, expected, strict=True):
        torch.testing.assert_close(x, y, **exactly)


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_kl"])
def test_every_configuration_writes_the_same_bits(name: str, monkeypatch) -> None:
    from rlhf_fast.kernels import token_logprobs, tuning

    op = OPS[name]
    generator = torch.Generator().manual_seed(0)
    sample = op.workload(
        {"N": 2 if PRETENDED else 9, "V": 5003, "H": 64}, generator, "cpu", torch.bfloat16
    )
    arguments = on_cuda(sample, torch.bfloat16)
    found = []
    for config in token_logprobs.BACKWARD_CONFIGS:
        monkeypatch.setattr(tuning, "fastest", lambda *_, config=config: config)
        found.append(results(op.function, arguments, sample.grads))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith("linear_")])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=pytest.mark.real_gpu(CUT_OFF)), torch.float16],
)
def test_a_gradient_in_16_bits_is_the_float32_one_rounded(name, dtype, monkeypatch) -> None:
    rows, vocab = (21, 203) if PRETENDED else (70, 5003)
    generator = torch.Generator().manual_seed(0)
    sample = OPS[name].workload({"N": rows, "V": vocab, "H": 64}, generator, "cpu", dtype)
    for budget in (2**30, 32 * 5003 * 4) if not PRETENDED else (8 * vocab * 4,):
        arguments = on_cuda(sample, dtype)
        with chunk_budget(budget), monkeypatch.context() as patch:
            ours = results(OPS[name].function, arguments, sample.grads)
            patch.setattr(groups, "Group", RoundedAfterwards)
            rounded = results(OPS[name].function, arguments, sample.grads)
        for x, y in zip(ours, rounded, strict=True):
            assert torch.equal(x, y)


def small_tiles(monkeypatch) -> None:
    """Of 4 rows and 1024 tokens."""
    monkeypatch.setattr(tiles, "MOST", {"gpu": (4 * 1024, 16)})
    monkeypatch.setattr(tiles, "GPU_WORK", 0)


@pytest.mark.parametrize("order, options", CASES)
def test_what_tiles_leave(order: str, options: dict[str, object]) -> None:
    leave = torch.ops.rlhf_fast.leave_logprobs
    check_gradient(leave, order, device="cuda", cut_off=PRETENDED, **options)


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_policy_loss"])
def test_gradients_by_tiles(name: str, monkeypatch) -> None:
    """Of bfloat16 inputs; what is left of them is rounded once, and so is the result."""
    small_tiles(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    sample = OPS[name].workload({"N": 9, "V": 2500, "H": 64}, generator, "cpu", torch.bfloat16)
    arguments = on_cuda(sample, torch.bfloat16)
    arguments |= {"entropy_coef": 0.0} if name == "linear_policy_loss" else {"entropy": False}
    ours = results(OPS[name].function, arguments, sample.grads)
    exact = results(OPS[name].reference, widened(arguments), sample.grads)
    for x, y in zip(ours[-2:], exact[-2:], strict=True):
        rounded = y.to(torch.bfloat16).double()
        off = (x.to(y.device).double() - y).norm()
        # the interpreter cuts off: exponentials, operand and result are each 2^-8 ln 2 too small on
        # average, together 5 times what rounding one number to nearest is off
        assert off <= (6 if PRETENDED else 1.1) * (rounded - y).norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_label_that_is_none(dtype: torch.dtype) -> None:
    """Outside of debug() only NaN can tell of it; the other rows are as they would be."""
    generator = torch.Generator().manual_seed(0)
    shape = {"N": 5, "V": 203, "H": 64}
    sample = OPS["linear_token_logprobs"].workload(shape, generator, "cpu", dtype)
    found = []
    for wrong in ([203, -7], [-100, -100]):
        labels = sample.arguments["labels"].index_copy(0, torch.tensor([1, 3]), torch.tensor(wrong))
        with_it = Sample("", sample.arguments | {"labels": labels}, sample.grads)
        arguments = on_cuda(with_it, dtype) | {"entropy": False}
        logp, of_hidden, _ = results(linear_token_logprobs, arguments, sample.grads)
        found.append((logp.cpu(), of_hidden.cpu()))
    bad = torch.tensor([False, True, False, True, False])
    (logp, of_hidden), (expected, of_others) = found
    assert torch.equal(logp.isnan(), bad)
    assert torch.equal(logp[~bad], expected[~bad])
    torch.testing.assert_close(of_hidden[~bad], of_others[~bad], rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_tiles_of_the_vocabulary(dtype: torch.dtype, monkeypatch) -> None:
    """Of a pass without gradients, beside one with: either rounds a few numbers no larger than the
    largest log-prob, or log V."""
    small_tiles(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    shape = {"N": 9, "V": 2500, "H": 64}
    sample = OPS["linear_token_logprobs"].workload(shape, generator, "cpu", dtype)
    arguments = on_cuda(sample, dtype) | {"entropy": True}
    with_gradients = linear_token_logprobs(**arguments)
    with torch.no_grad():
        without = linear_token_logprobs(**arguments)
    largest = with_gradients[0].abs().max().item()
    for x, y in zip(without, with_gradients, strict=True):
        bound = 8 * torch.finfo(dtype).eps * max(largest, 8)
        torch.testing.assert_close(x, y.detach(), rtol=0, atol=bound)


@pytest.mark.real_gpu("a CUDA source, which nothing interprets")
@pytest.mark.parametrize("steps", [1, 37, 128, 1000, 1024, 5000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip", [True, False])
def test_gae_cuda(steps: int, dtype: torch.dtype, skip: bool) -> None:
    if not hasattr(torch.ops.rlhf_fast, "gae_cuda"):
        pytest.skip("the extension was built without CUDA: gae_cuda is not run")
    generator = torch.Generator(device="cuda").manual_seed(0)
    draw = torch.randn(2, 67, steps, generator=generator, device="cuda", dtype=dtype)
    mask = torch.rand(67, steps, generator=generator, device="cuda") < 0.5
    dones = torch.rand(67, steps, generator=generator, device="cuda") < 0.01
    bootstrap = torch.randn(67, generator=generator, device="cuda", dtype=dtype)
    for m, d, b in ((mask, dones, bootstrap), (mask, None, None), (None, None, None)):
        arguments = (draw[0], draw[1], m, d, b, 0.99, 0.97, skip)
        exact = KERNELS["gae"].fallback(*(  # a loop over steps: quicker where nothing is launched
            x.cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else
            x.cpu() if isinstance(x, Tensor) else x for x in arguments
        ))  # fmt: skip
        for run in (torch.ops.rlhf_fast.gae_cuda, torch.ops.rlhf_fast.gae):
            for x, y in zip(run(*arguments), exact, strict=True):
                close(x.cpu(), y, dtype)


@pytest.mark.real_gpu("6 GiB of logits")
def test_more_than_2_to_31_logits() -> None:
    rows, vocab = 15_000, 151_936  # 4.2 GiB in bfloat16; the gradient overwrites it
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16)
    logits.normal_(generator=generator)
    labels = torch.randint(vocab, (rows,), device="cuda", generator=generator)
    checked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    small = logits[checked].double().requires_grad_()
    logits += torch.zeros((), device="cuda", dtype=logits.dtype, requires_grad=True)  # no leaf
    logp = token_logprobs(logits, labels, inplace_backward=True)
    exact = OPS["token_logprobs"].reference(small, labels[checked])
    close(logp[checked].detach(), exact.detach(), torch.float32)
    logp.sum().backward()
    exact.sum().backward()
    close(logits.detach()[checked], small.grad, torch.bfloat16)


@pytest.mark.real_gpu("a trainer on a GPU: models and their optimizers are not pretended")
def test_a_run_is_that_of_a_cpu(configured) -> None:
    """Two steps of training; the draws are made on the CPU, so the first answers are the same."""
    pytest.importorskip("datasets", reason="NO DATASETS: no run is made on a GPU here")
    from rlhf_fast.trainer import ppo
    from rlhf_fast.trainer.run.folder import read_metrics

    rows = []
    for device in ("cpu", "cuda"):
        config = configured(device, steps=2, device=device)
        ppo.train(config)
        rows.append(read_metrics(Path(config.output_dir) / "metrics.jsonl"))
    cpu, cuda = rows
    assert len(cpu) == len(cuda) == 2
    for name in ("objective/scores", "val/answer_tokens", "loss/policy_avg", "grad_norm"):
        assert cuda[0][name] == pytest.approx(cpu[0][name], rel=1e-3, abs=1e-4), name


@pytest.mark.real_gpu("flash attention")
@pytest.mark.parametrize("layers", [None, 2])
def test_flash_attention(tiny_policy_folder: str, layers: int | None) -> None:
    """Sampled with it, and learnt from without padding, against SDPA on padded rows in float32."""
    from transformers.utils import is_flash_attn_2_available  # the ops' tests need torch alone

    if not is_flash_attn_2_available():
        pytest.skip("NO FLASH-ATTN: sampling and packed forward passes are not run with it here")
    from rlhf_fast.trainer.data.rows import pad
    from rlhf_fast.trainer.models.policy import load_policy
    from rlhf_fast.trainer.rollout.sample import Sampling, answer_hidden, roll_out, run_trunk

    options = {"trainable_layers": layers, "device": torch.device("cuda")}
    flash = load_policy(
        tiny_policy_folder, attn_implementation="flash_attention_2", bf16=True, **options
    )
    exact = load_policy(tiny_policy_folder, attn_implementation="sdpa", **options)
    assert flash.packed and not exact.packed
    ids, mask = pad([[7, 5], [3, 4, 5, 6, 8], [9], [10, 3, 4]], side="left")
    draws = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    with flash.precision():
        rollout = roll_out(
            flash, ids.cuda(), mask.cuda(), Sampling(16, 1.0, stop_ids=[1, 4]), draws.cuda()
        )
    assert not rollout.mask.all()  # some answers are shorter

    def hidden_and_gradient(policy):
        with policy.precision():
            rollout.trunk = run_trunk(policy, rollout) if policy.trunk_layers else None
            hidden = answer_hidden(policy.body, rollout, slice(None), packed=policy.packed)
        hidden = hidden[rollout.mask].float()
        weights = torch.cos(torch.arange(hidden.numel(), device="cuda")).view(hidden.shape)
        return hidden, *torch.autograd.grad(
            (hidden * weights).sum(), policy.body.layers[-1].self_attn.q_proj.weight
        )

    hidden, gradient = hidden_and_gradient(flash)
    exact_hidden, exact_gradient = hidden_and_gradient(exact)
    assert (hidden - exact_hidden).norm() < 0.02 * exact_hidden.norm()
    assert (gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()
    with torch.no_grad():
        logp = torch.log_softmax(exact.head(exact_hidden), -1)
    logp = logp.gather(1, rollout.labels[rollout.mask][:, None]).squeeze(1)
    torch.testing.assert_close(rollout.logp[rollout.mask], logp, rtol=0, atol=0.1)
