"""Every op of the registry against its float64 reference: values, gradients, torch's own checks.

Nothing here names an op: a new one is tested as soon as it is registered.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import pytest
import torch
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


# inputs that kernels take in 16 bits
VOCABULARY_SIZED = {"logits", "hidden", "weight", "bias", "lora"}
VOCABULARY_SIZED |= {"ref_hidden", "ref_weight", "ref_bias", "ref_lora"}
every_sample = pytest.mark.parametrize(("op", "sample"), all_samples())
every_16_bit_sample = pytest.mark.parametrize(
    ("op", "sample"), [p for p in all_samples() if VOCABULARY_SIZED & set(p.values[1].arguments)]
)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def arguments(sample: Sample, dtype: torch.dtype, only: tuple[str, ...] | None = None) -> dict:
    """The sample's arguments with its floating tensors in dtype (or just those named in only),
    the differentiable ones as leaves. Strides stay."""

    def make(name: str, x: object) -> object:
        if isinstance(x, tuple):  # an adapter's (A, B, scale)
            return tuple(make(name, part) for part in x)
        if not isinstance(x, Tensor):
            return x
        cast = x.is_floating_point() and (only is None or name in only)
        fresh = torch.empty_strided(x.shape, x.stride(), dtype=dtype if cast else x.dtype).copy_(x)
        return fresh.requires_grad_() if name in sample.grads else fresh

    return {name: make(name, x) for name, x in sample.arguments.items()}


def tensors(output: object) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for x in output for t in tensors(x)]


def leaves_of(made: dict, grads: tuple[str, ...]) -> list[Tensor]:
    """The differentiable tensors, an adapter's A and B each."""
    named = [made[name] for name in grads]
    flat = [part for x in named for part in (x if isinstance(x, tuple) else (x,))]
    return [x for x in flat if isinstance(x, Tensor)]


def with_leaves(made: dict, grads: tuple[str, ...], leaves: tuple[Tensor, ...]) -> dict:
    """made with these in the place of ``leaves_of``'s."""
    new = iter(leaves)

    def place(x: object) -> object:
        if isinstance(x, tuple):
            return tuple(map(place, x))
        return next(new) if isinstance(x, Tensor) else x

    return made | {name: place(made[name]) for name in grads}


def run(function, made: dict, grads: tuple[str, ...], inplace: bool = False) -> list[Tensor]:
    """Outputs, then the gradients of grads under fixed random cotangents."""
    passed = dict(made)
    if inplace:  # an in-place backward needs a tensor that is not a leaf
        passed["logits"] = passed["logits"] * 1.0
    outputs = tensors(function(**passed))
    differentiable = [x for x in outputs if x.requires_grad]
    if not grads:
        assert not differentiable
        return outputs
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in differentiable
    ]
    inputs = leaves_of(made, grads)
    return outputs + list(torch.autograd.grad(differentiable, inputs, cotangents))


class Fallbacks(TorchDispatchMode):
    """Every kernel runs its plain PyTorch fallback."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_fast":
            with self:
                return KERNELS[func._schema.name.split("::")[1]].fallback(*args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN, so that an output nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Thousands of tiny calls: waking a second thread for each costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).detach().abs().max()) if exact.numel() else 0.0


def neighbours(sample: Sample) -> list[Sample]:
    """The same a little further on, 8 times: other roundings of like size."""
    return [
        replace(sample, arguments=sample.arguments | {"hidden": (1 + i / 100) * hidden})
        for hidden in [sample.arguments["hidden"]]
        for i in range(1, 9)
    ]


def check_against_float64(
    op: Op, sample: Sample, dtype: torch.dtype, only: tuple[str, ...] | None = None
) -> None:
    """No worse than eager PyTorch at the same dtype, up to a few roundings of the result.

    In 16 bits the inputs' rounding is nearly all of the error and the same for both. In float32
    both are a handful of random roundings, other ones on each machine's BLAS, and eager's largest
    on a small sample is one draw of them: hence a factor. So it is in 16 bits with an adapter,
    whose part of the logits eager rounds twice more than we do; and there a loss is one number,
    whose roundings may cancel: eager's error is the largest of several draws.
    """
    adapted = dtype.itemsize == 2 and "lora" in sample.arguments
    factor = 1.1 if dtype.itemsize == 2 and not adapted else 2.0

    def errors_of(function, sample: Sample) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """(results, exact results, errors)"""
        narrow = arguments(sample, dtype, only)
        exact_inputs = arguments(Sample("", narrow, sample.grads), torch.float64)
        exact = run(op.reference, exact_inputs, sample.grads)
        inplace = function is op.function and bool(sample.arguments.get("inplace_backward"))
        got = run(function, narrow, sample.grads, inplace)
        assert len(got) == len(exact)
        return got, exact, [error(x, y) for x, y in zip(got, exact, strict=True)]

    ours, exact, errors = errors_of(op.function, sample)
    eager, _, allowed = errors_of(op.reference, sample)
    for other in neighbours(sample) if adapted else []:
        allowed = map(max, allowed, errors_of(op.reference, other)[2])
    for got, plain, want, wrong, eagers in zip(ours, eager, exact, errors, allowed, strict=True):
        assert got.shape == want.shape and got.dtype == plain.dtype
        assert torch.equal(torch.isfinite(got), torch.isfinite(want))
        scale = float(want.detach().abs().max()) if want.numel() else 0.0
        if want.dim() == 0:  # a sum of terms of about 1 that may cancel
            scale = max(scale, 1.0)
        assert wrong <= factor * eagers + 4 * torch.finfo(got.dtype).eps * scale


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
    assert all(x.dtype == torch.float32 for x in ours)
    if not VOCABULARY_SIZED & set(sample.arguments):
        for got, want in zip(ours, tensors(op.function(**widened)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def one_for_each_option(op: Op) -> list[Sample]:
    """The first sample, and each that brings an argument, or a choice, which none before it had."""
    seen: set = set()
    chosen = []
    for sample in op.samples(torch.Generator().manual_seed(0)):
        options = {
            (name, x if isinstance(x, str | bool) else isinstance(x, Tensor | tuple))
            for name, x in sample.arguments.items()
        }
        if options - seen:
            chosen.append(sample)
        seen |= options
    return chosen


every_option = pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, id=f"{op.name}: {sample.name}")
        for op in OPS.values()
        for sample in one_for_each_option(op)
    ],
)


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
        if sample.arguments.get("loss") == "cispo":  # its weight is a constant to the gradient only
            continue

        def function(*leaves: Tensor, made=made, sample=sample) -> tuple[Tensor, ...]:
            outputs = tensors(op.function(**with_leaves(made, sample.grads, leaves)))
            return tuple(x for x in outputs if x.requires_grad)

        leaves = tuple(leaves_of(made, sample.grads))
        assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-5, rtol=1e-4)
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


@every_option
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
    missing = [
        name for name, k in KERNELS.items() if not k.engine and k.implementation("cpu") != "C++"
    ]
    assert missing == []


@every_op
def test_one_launcher_for_each_kernel(op: Op) -> None:
    pytest.importorskip("triton")
    for kernel in op.kernels:
        if kernel.triton is not None:
            assert callable(kernel.launcher)
