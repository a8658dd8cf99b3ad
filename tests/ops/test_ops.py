"""Every op of the registry against its float64 reference: values, gradients, torch's own checks.

Nothing here names an op: a new one is tested as soon as it is registered.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from bounds import check_against_float64
from drawing import (
    CONSTANTS,
    VOCABULARY_SIZED,
    Fallbacks,
    arguments,
    few_for_all_options,
    leaves_of,
    one_for_each_option,
    run,
    tensors,
    with_leaves,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops import registry
from rlhf_fast.ops.registry import KERNELS, OPS, Op, Sample


def all_samples() -> list:
    return [
        pytest.param(op, sample, id=f"{op.name}: {sample.name}")
        for op in OPS.values()
        for sample in op.samples(torch.Generator().manual_seed(0))
    ]


every_sample = pytest.mark.parametrize(("op", "sample"), all_samples())
every_16_bit_sample = pytest.mark.parametrize(
    ("op", "sample"), [p for p in all_samples() if VOCABULARY_SIZED & set(p.values[1].arguments)]
)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN, so that an output nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@every_sample
def test_float32(op: Op, sample: Sample, poisoned_memory) -> None:
    check_against_float64(op, sample, torch.float32)


@every_sample
@pytest.mark.parametrize("implementation", ["kernel", "fallback"])
def test_float64(op: Op, sample: Sample, implementation: str, poisoned_memory) -> None:
    inplace = bool(sample.arguments.get("inplace_backward"))
    exact = run(op.reference, arguments(sample, torch.float64), sample.grads)
    if implementation == "fallback":
        with Fallbacks():
            ours = run(op.function, arguments(sample, torch.float64), sample.grads, inplace)
    else:
        ours = run(op.function, arguments(sample, torch.float64), sample.grads, inplace)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_16_bit_sample
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit(op: Op, sample: Sample, dtype: torch.dtype, poisoned_memory) -> None:
    check_against_float64(op, sample, dtype, tuple(VOCABULARY_SIZED & set(sample.arguments)))


@every_op
def test_16_bit_per_token_inputs_give_float32(op: Op) -> None:
    sample = next(iter(op.samples(torch.Generator().manual_seed(0))))
    narrow = arguments(sample, torch.bfloat16)
    widened = arguments(Sample("", narrow, sample.grads), torch.float32)
    ours = tensors(op.function(**narrow))
    assert all(x.dtype == torch.float32 for x in ours if x.is_floating_point())
    if not VOCABULARY_SIZED & set(sample.arguments):
        for got, want in zip(ours, tensors(op.function(**widened)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def samples_of(choose) -> pytest.MarkDecorator:
    chosen = [(op, sample) for op in OPS.values() for sample in choose(op)]
    ids = [f"{op.name}: {sample.name}" for op, sample in chosen]
    return pytest.mark.parametrize(("op", "sample"), chosen, ids=ids)


every_option = samples_of(one_for_each_option)
all_options = samples_of(few_for_all_options)


def apart(x: object) -> object:
    """x with strides of no contiguous tensor and NaN (or garbage) in the gaps."""
    if isinstance(x, tuple):
        return tuple(map(apart, x))
    if not isinstance(x, Tensor) or not x.dim():
        return x
    junk = torch.full_like(x, torch.nan if x.is_floating_point() else 1)
    return torch.stack([x.detach(), junk], -1)[..., 0].requires_grad_(x.requires_grad)


@every_option
def test_inputs_of_any_strides(op: Op, sample: Sample) -> None:
    made = arguments(sample, torch.float64)
    inplace = bool(sample.arguments.get("inplace_backward"))
    expected = run(op.function, made, sample.grads, inplace)
    ours = run(op.function, {k: apart(x) for k, x in made.items()}, sample.grads, inplace)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


@every_option
def test_an_incoming_gradient_that_is_one_number(op: Op, sample: Sample) -> None:
    """As a sum's is: all strides are 0."""

    def gradients(function) -> tuple[Tensor, ...]:
        made = arguments(sample, torch.float64)
        leaves = leaves_of(made, sample.grads)
        if sample.arguments.get("inplace_backward"):
            made["logits"] = made["logits"] * 1.0
        outputs = [x for x in tensors(function(**made)) if x.requires_grad]
        total = sum((2 + i) * x.sum() for i, x in enumerate(outputs))
        return torch.autograd.grad(total, leaves)

    if not sample.grads:
        return
    for got, want in zip(gradients(op.function), gradients(op.reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_option
def test_constants_get_no_gradient(op: Op, sample: Sample) -> None:
    """Whatever may carry a gradient and is none of the differentiable inputs changes nothing."""
    made = arguments(Sample("", sample.arguments), torch.float64)
    for name, x in made.items():
        if name not in sample.grads and isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    assert not any(x.requires_grad for x in tensors(op.function(**made)))


@every_option
def test_one_float64_input_makes_the_result_float64(op: Op, sample: Sample) -> None:
    """The vocabulary-sized inputs decide for themselves; of the others each does."""
    if VOCABULARY_SIZED & set(sample.arguments):
        return
    for name, x in sample.arguments.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
            continue
        mixed = arguments(Sample("", sample.arguments), torch.float64, only=(name,))
        widened = arguments(Sample("", mixed), torch.float64)
        ours, exact = tensors(op.function(**mixed)), tensors(op.reference(**widened))
        for got, want in zip(ours, exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_op
def test_gradcheck(op: Op, one_thread) -> None:
    """Numerical gradients in float64, through the C++ kernels where they are built."""
    checked = 0
    for sample in op.samples(torch.Generator().manual_seed(2)):
        made = arguments(sample, torch.float64)
        size = max((x.numel() for x in leaves_of(made, sample.grads)), default=0)
        far = any(word in sample.name for word in ("huge", "one-hot", "far", "beyond"))
        garbage = any(
            isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all()
            for x in made.values()
        )
        if not 0 < size <= 200 or far or garbage or sample.arguments.get("inplace_backward"):
            continue
        if CONSTANTS & {sample.arguments.get("loss"), sample.arguments.get("ratio")}:
            continue

        def function(*leaves: Tensor, made=made, sample=sample) -> tuple[Tensor, ...]:
            outputs = tensors(op.function(**with_leaves(made, sample.grads, leaves)))
            return tuple(x for x in outputs if x.requires_grad)

        leaves = tuple(leaves_of(made, sample.grads))
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        checked += 1
    has_gradient = any(s.grads for s in op.samples(torch.Generator()))
    assert checked >= (1 if has_gradient else 0)


class Recorder(TorchDispatchMode):
    """Keeps the first call of each kernel, of those inside an engine too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_fast":
            kernel = KERNELS[func._schema.name.split("::")[1]]
            own = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.setdefault(kernel.name, own)
            if kernel.engine:
                with self:
                    return kernel.fallback(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(op, dtype, id=f"{op.name}-{str(dtype).removeprefix('torch.')}")
        for op in OPS.values()
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.float32
        or VOCABULARY_SIZED & inspect.signature(op.function).parameters.keys()
    ],
)
def test_opcheck(op: Op, dtype: torch.dtype) -> None:
    """torch.library.opcheck on each kernel: schema, fake tensors, autograd, AOT dispatch."""
    recorder = Recorder()
    for sample in list(op.samples(torch.Generator().manual_seed(0)))[:8]:
        narrow = tuple(VOCABULARY_SIZED) if dtype == torch.bfloat16 else None
        with recorder:
            run(op.function, arguments(sample, dtype, narrow), sample.grads)
    assert set(recorder.calls) >= {kernel.name for kernel in op.kernels}
    for kernel in op.kernels:
        args = recorder.calls[kernel.name]
        if "(a!)" not in kernel.schema and op.name != "gae":
            args = tuple(
                x.requires_grad_() if isinstance(x, Tensor) and _grad_argument(op, kernel, i) else x
                for i, x in enumerate(args)
            )
        torch.library.opcheck(getattr(torch.ops.rlhf_fast, kernel.name).default, args)


def _grad_argument(op: Op, kernel, index: int) -> bool:
    """The first kernel of an op is its differentiable face; its arguments carry the op's names."""
    if kernel is not op.kernels[0]:
        return False
    schema = getattr(torch.ops.rlhf_fast, kernel.name).default._schema
    sample = next(iter(op.samples(torch.Generator())))
    return schema.arguments[index].name in sample.grads


@pytest.mark.long
@all_options
def test_compile(op: Op, sample: Sample) -> None:
    """fullgraph=True, and the numbers of eager."""
    inplace = bool(sample.arguments.get("inplace_backward"))
    eager = run(op.function, arguments(sample, torch.float32), sample.grads, inplace)
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    ours = run(compiled, arguments(sample, torch.float32), sample.grads, inplace)
    for got, want in zip(ours, eager, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(registry.extension is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_docstring_has_every_argument_the_result_and_the_errors(op: Op) -> None:
    text = inspect.getdoc(op.function)
    formula, arguments, result, errors = re.split(r"^(?:Args|Returns|Raises):$", text, flags=re.M)
    named = set(re.findall(r"\w+", arguments))
    assert not inspect.signature(op.function).parameters.keys() - named
    assert formula.strip() and re.search(r"float32.*\(float64", result) and "ValueError" in errors


def test_every_kernel_has_its_cpp() -> None:
    """A registration that was forgotten would fall back to PyTorch without a word."""
    missing = {
        name for name, k in KERNELS.items() if not k.engine and k.implementation("cpu") != "C++"
    }
    assert missing == {"leave_logprobs"}  # which the engine calls on GPUs alone


@every_op
def test_one_launcher_for_each_kernel(op: Op) -> None:
    pytest.importorskip("triton")
    for kernel in op.kernels:
        if kernel.triton is not None:
            assert callable(kernel.launcher)
