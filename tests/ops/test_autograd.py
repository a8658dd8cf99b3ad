"""What autograd, torch's modes and people's own edits do to a torch function they do to every op:
the right gradient, or one error that says why not. Nothing here names an op of the registry."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from drawing import arguments, leaves_of, one_for_each_option, tensors
from torch import Tensor

from rlhf_fast.ops.registry import KERNELS, OPS, Op, Sample

every_gradient = pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, id=f"{op.name}: {sample.name}")
        for op in OPS.values()
        for sample in one_for_each_option(op)
        if sample.grads
    ],
)
first_sample = [
    (op, next(iter(op.samples(torch.Generator().manual_seed(0))))) for op in OPS.values()
]
every_differentiable_op = pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(*pair, id=pair[0].name) for pair in first_sample if pair[1].grads],
)
NAMES = "|".join(rf"\b{name}\b" for name in KERNELS)


def loss_of(function, made: dict) -> Tensor:
    """A number to which every differentiable output adds, each element with a weight of its own."""
    passed = dict(made)
    if made.get("inplace_backward"):  # which a leaf does not get
        passed["logits"] = passed["logits"] * 1.0
    outputs = [x for x in tensors(function(**passed)) if x.requires_grad]
    weights = (torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs)
    return sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))


def mapped(f, x: object) -> object:
    """f of a tensor, or of those of an adapter."""
    if isinstance(x, tuple):
        return tuple(mapped(f, part) for part in x)
    return f(x) if isinstance(x, Tensor) else x


def gradients(function, made: dict, sample: Sample) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(function, made), leaves_of(made, sample.grads))


def close(ours, right) -> None:
    for got, want in zip(ours, right, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_gradient
def test_every_backward_of_a_kept_graph_adds_the_same_gradient(op: Op, sample: Sample) -> None:
    """Whatever was done to .grad since: the saved tensors are never handed out."""
    made = arguments(sample, torch.float64)
    right = gradients(op.function, made, sample)
    leaves = leaves_of(made, sample.grads)
    total = loss_of(op.function, made)
    for times in (1, 2, 3):
        total.backward(retain_graph=True)
        close([x.grad for x in leaves], [times * g for g in right])
    for x in leaves:
        x.grad.data.zero_()
    total.backward(retain_graph=True)
    close([x.grad for x in leaves], right)
    for x in leaves:
        x.grad.mul_(1e3)
        x.grad = None
    total.backward()
    close([x.grad for x in leaves], right)


def test_no_gradient_that_is_handed_out_is_one_that_is_saved() -> None:
    """With a gradient of exactly 1, where multiplying could be spared."""
    for op, sample in first_sample:
        if not sample.grads:
            continue
        made = arguments(sample, torch.float64)
        leaves = leaves_of(made, sample.grads)
        first = next(x for x in tensors(op.function(**made)) if x.requires_grad)
        one = torch.ones_like(first)
        right = [g.clone() for g in torch.autograd.grad(first, leaves, one, retain_graph=True)]
        for g in torch.autograd.grad(first, leaves, one, retain_graph=True):
            g.data.fill_(torch.nan)
        close(torch.autograd.grad(first, leaves, one), right)


@every_gradient
@pytest.mark.parametrize("how", ["in place", "numpy"])
def test_constants_changed_before_the_backward(op: Op, sample: Sample, how: str) -> None:
    """In place: autograd's own refusal, or the gradient of the values that the forward saw. Through
    numpy, which no version counter sees: nothing out of bounds, and labels as the forward saw them.
    """
    right = gradients(op.function, arguments(sample, torch.float64), sample)
    made = arguments(sample, torch.float64)
    total = loss_of(op.function, made)
    for name, x in made.items():
        if name in sample.grads or not isinstance(x, Tensor) or not x.numel():
            continue
        if how == "numpy" and name != "labels":
            continue
        junk = {torch.bool: False, torch.int64: 2**40}.get(x.dtype, torch.nan)
        x.numpy().fill(junk) if how == "numpy" else x.fill_(junk)
    try:
        close(torch.autograd.grad(total, leaves_of(made, sample.grads)), right)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert how == "in place"


@every_gradient
def test_a_second_derivative_is_right_or_refused(op: Op, sample: Sample) -> None:
    made = arguments(sample, torch.float64)
    if sum(x.numel() for x in leaves_of(made, sample.grads)) == 0:
        return

    def second(function) -> tuple[Tensor, ...]:
        leaves = leaves_of(made, sample.grads)
        total = loss_of(function, made).square()  # so that the incoming gradient has one, too
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    try:
        ours = second(op.function)
    except NotImplementedError as error:
        assert "second derivative" in str(error)
        assert any(name in str(error) for name in KERNELS)
    else:
        close(ours, second(op.reference))


@every_differentiable_op
@pytest.mark.parametrize("how", ["forward_ad", "jvp", "jacfwd", "grad", "vjp", "hessian", "vmap"])
def test_other_derivatives_are_right_or_refused_by_name(
    op: Op, sample: Sample, how: str, recwarn
) -> None:
    made = arguments(Sample("", sample.arguments), torch.float64)
    name = sample.grads[0]
    x = made[name]
    if not x.numel():
        return

    def value(function):
        return lambda y: sum(
            t.sum() for t in tensors(function(**made | {name: y})) if t.is_floating_point()
        )

    def derivative(function):
        f, v = value(function), torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
        if how == "forward_ad":
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
                return torch.zeros(()) if tangent is None else tangent
        if how == "vmap":
            return torch.func.vmap(f)(torch.stack([x, 2 * x]))
        if how == "jvp":
            return torch.func.jvp(f, (x,), (v,))[1]
        if how == "vjp":
            return torch.func.vjp(f, x)[1](x.new_ones(()))[0]
        return getattr(torch.func, how)(f)(x)

    if how == "vmap":
        try:
            ours = derivative(op.function)
        except RuntimeError:  # torch's own
            return
        stacked = torch.stack([value(op.function)(y) for y in (x, 2 * x)])
        torch.testing.assert_close(ours, stacked)
        return
    if not op.kernels:  # plain PyTorch
        torch.testing.assert_close(derivative(op.function), derivative(op.reference))
        return
    with pytest.raises(NotImplementedError, match=NAMES):
        derivative(op.function)


@every_gradient
def test_constants_from_inference_mode(op: Op, sample: Sample) -> None:
    """A rollout under torch.inference_mode() is what a training step gets. An inference tensor
    cannot be saved for a backward, and one that was left in kept memory cannot be written to."""
    right = gradients(op.function, arguments(sample, torch.float64), sample)
    made = arguments(sample, torch.float64)
    with torch.inference_mode():
        op.function(**arguments(sample, torch.float64))
        for name, x in made.items():
            if isinstance(x, Tensor) and name not in sample.grads:
                made[name] = x.clone()
    close(gradients(op.function, made, sample), right)
    for frozen in sample.grads if len(sample.grads) > 1 else ():
        with torch.inference_mode():
            constant = mapped(lambda x: x.detach().clone(), made[frozen])
        others = Sample("", {}, tuple(name for name in sample.grads if name != frozen))
        ours = gradients(op.function, made | {frozen: constant}, others)
        named = [name for name in sample.grads for _ in leaves_of(made, (name,))]
        close(ours, [g for g, name in zip(right, named, strict=True) if name != frozen])


def overlapping(x: Tensor, how: str) -> Tensor:
    """A leaf of x's shape, of which several elements lie in one place."""
    if how == "expanded":
        return x.detach()[:1].expand(x.shape).requires_grad_(x.requires_grad)
    base = torch.linspace(-1.3, 0.7, sum(x.shape) + 1, dtype=x.dtype)
    return base.as_strided(x.shape, (1,) * x.dim()).requires_grad_(x.requires_grad)


@every_gradient
@pytest.mark.parametrize("how", ["expanded", "windows"])
def test_inputs_that_overlap_in_memory(op: Op, sample: Sample, how: str) -> None:
    """As leaves, and as views of leaves; the logits that a backward may overwrite are kept."""
    made = arguments(sample, torch.float64)
    for name, x in made.items():
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.numel():
            if torch.isfinite(x).all() and name != "temperature":
                made[name] = overlapping(x, how)
    plain = {
        name: x.detach().contiguous().clone().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor)
        else x
        for name, x in made.items()
    }
    right = gradients(op.function, plain, sample)
    before = [x.detach().clone() for x in leaves_of(made, sample.grads)]
    weights = [
        torch.linspace(0.5, 1.5, n.numel(), dtype=n.dtype).view(n.shape)
        for n in tensors(op.function(**made))
        if n.requires_grad
    ]
    for view in (False, True):
        passed = dict(made)
        for name in sample.grads if view else ():
            passed[name] = mapped(lambda x: x.view_as(x), made[name])
        outputs = [x for x in tensors(op.function(**passed)) if x.requires_grad]
        total = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
        close(torch.autograd.grad(total, leaves_of(made, sample.grads)), right)
        for x, was in zip(leaves_of(made, sample.grads), before, strict=True):
            torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("argument", ["temperature", "normalizer"])
def test_values_are_looked_at_inside_a_compiled_graph(argument: str) -> None:
    """On a CPU: the public functions' look is skipped there, the kernels' is not."""
    takers = [
        (op, sample)
        for op, sample in first_sample
        if argument in inspect.signature(op.function).parameters
    ]
    assert takers
    for op, sample in takers:
        made = arguments(Sample("", sample.arguments), torch.float32)
        of_rows = made["labels" if argument == "temperature" else "mask"]
        good = torch.ones(of_rows.shape if argument == "temperature" else ())
        if argument == "temperature":
            made["labels"] = of_rows.clamp(min=0)
            made |= {
                name: torch.ones_like(made[name]) for name in ("advantages", "mask") if name in made
            }
        torch._dynamo.reset()
        compiled = torch.compile(op.function, backend="eager", fullgraph=True)
        compiled(**made | {argument: good})
        for bad in (-1.0, 0.0, float("nan"), float("inf")):
            if argument == "normalizer" and bad == 0:  # 0 rows in all: a loss of 0
                continue
            wrong = good.clone()
            wrong.view(-1)[0] = bad
            with pytest.raises(ValueError, match=argument):
                op.function(**made | {argument: wrong})
            with pytest.raises((ValueError, RuntimeError), match=argument):
                compiled(**made | {argument: wrong})
