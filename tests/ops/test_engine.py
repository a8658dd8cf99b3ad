"""The linear engine: what it must not hold, must not compute, and must not depend on."""

from __future__ import annotations

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from rounding import RoundedAfterwards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rlhf_fast as rf
from rlhf_fast.ops import registry
from rlhf_fast.ops.linear import chunks as linear
from rlhf_fast.ops.linear import groups, products
from rlhf_fast.ops.linear.head import Head
from rlhf_fast.ops.registry import KERNELS

N, H, V = 96, 16, 1000
GEMM = 2 * N * H * V


def inputs(requires_grad: bool = True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).requires_grad_(requires_grad)
    weight = torch.randn(V, H, generator=generator).requires_grad_(requires_grad)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_no_tensor_is_larger_than_a_chunk(inside) -> None:
    hidden, weight, labels = inputs()
    largest = Largest()
    with rf.chunk_budget(16 * V * 4), largest, inside:
        logp, entropy = rf.linear_token_logprobs(hidden, weight, labels, entropy=True)
        (logp.sum() + entropy.sum()).backward()
    assert 16 * V <= largest.numel < N * V / 4


def test_the_backward_of_a_loss_in_one_pass_makes_nothing() -> None:
    """The gradients are there: no second copy, and no zeros for what has no gradient."""
    hidden, weight, labels = inputs()
    constants = (torch.full((N,), -7.0), torch.linspace(-1, 1, N), labels >= 0)
    loss, _ = rf.linear_policy_loss(hidden, weight, labels, *constants)
    with Largest() as largest:
        torch.autograd.grad(loss, (hidden, weight))
    assert largest.numel == hidden.numel()  # a view of its gradient


@pytest.mark.parametrize("inplace", [True, False])
def test_an_inplace_backward_makes_no_second_tensor_of_the_logits(inplace: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator).requires_grad_() * 1.0  # not a leaf
    before = logits.detach().clone()
    labels = torch.randint(V, (N,), generator=generator)
    logp = rf.token_logprobs(logits, labels, inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    assert (gradient.data_ptr() == logits.data_ptr()) is inplace
    assert torch.equal(logits, before) is not inplace


@pytest.mark.skipif(registry.extension is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("name", ["token_logprobs", "logits_kl"])
def test_a_row_without_gradient_is_not_looked_at(name: str, side_by_side: bool) -> None:
    """Its logits may be NaN, its label any."""
    logits, ones = torch.randn(1, 3, 40), torch.ones(1, 3)
    logits[0, 1] = torch.nan
    logits = logits.mT.contiguous().mT if side_by_side else logits
    labels, g, norm = (
        torch.tensor([[3, 4, 5]]),
        torch.tensor([[1.0, 0.0, 1.0]]),
        torch.ones(2, 1, 3),
    )
    out = torch.full_like(logits, torch.nan)
    if name == "token_logprobs":
        arguments = (g, g, logits, labels, norm, ones, 1.0, None, None)
    else:
        arguments = (g, g, logits, logits, labels, norm, norm, ones, 1.0, None, None, True)
    getattr(torch.ops.rlhf_fast, f"{name}_backward")(*arguments, out)
    assert not out[0, 1].any() and out[0, ::2].isfinite().all() and out[0, ::2].any()


@pytest.mark.parametrize("rows", [1, 7, 16, 64, 96, 200])
def test_chunks_change_nothing_but_rounding(rows: int) -> None:
    hidden, weight, labels = inputs()
    whole = torch.autograd.grad(
        rf.linear_token_logprobs(hidden, weight, labels).sum(), (hidden, weight)
    )
    with rf.chunk_budget(rows * V * 4):
        parts = torch.autograd.grad(
            rf.linear_token_logprobs(hidden, weight, labels).sum(), (hidden, weight)
        )
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def flops(
    inside, backward_rows: torch.Tensor, frozen: bool = False, labels=None
) -> tuple[int, int]:
    hidden, weight, own_labels = inputs()
    weight = weight.detach() if frozen else weight
    labels = own_labels if labels is None else labels
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward, inside:
        logp = rf.linear_token_logprobs(hidden, weight, labels)
    with backward, inside:
        (logp * backward_rows).sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_are_those_the_docstring_states(inside) -> None:
    assert flops(inside, torch.ones(N)) == (GEMM, 2 * GEMM)
    assert flops(inside, torch.ones(N), frozen=True) == (GEMM, GEMM)


def test_rows_without_gradient_leave_the_backward(inside) -> None:
    half = (torch.arange(N) % 2).float()
    assert flops(inside, half) == (GEMM, 3 * GEMM // 2)
    assert flops(inside, torch.zeros(N)) == (GEMM, 0)


@pytest.mark.parametrize("through", [(1.0, 0.0), (0.0, 1.0)], ids=["logp", "entropy"])
def test_a_gradient_through_one_output_alone(through: tuple[float, float]) -> None:
    """Rows whose log-prob has no gradient still matter when their entropy has one."""
    hidden, weight, labels = inputs()

    def gradients(function) -> tuple[torch.Tensor, ...]:
        logp, entropy = function(hidden, weight, labels, entropy=True)
        outputs = (through[0] * logp + through[1] * entropy) * (torch.arange(N) % 3 > 0)
        return torch.autograd.grad(outputs.sum(), (hidden, weight))

    from rlhf_fast.ops.linear.logprobs import reference

    ours, plain = gradients(rf.linear_token_logprobs), gradients(reference)
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_ignored_rows_leave_the_forward_too(inside) -> None:
    labels = inputs()[2]
    labels[::2] = -100
    assert flops(inside, torch.ones(N), labels=labels) == (GEMM // 2, GEMM)


def test_autocast_runs_the_head_in_its_dtype() -> None:
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = rf.linear_token_logprobs(hidden, weight, labels)
    rounded = rf.linear_token_logprobs(hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, rounded)
    logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl", "linear_policy_loss"])
def test_autocast_is_a_cast_of_every_part_of_the_head(op: str) -> None:
    x, generator = kl_inputs(), torch.Generator().manual_seed(2)
    x["bias"] = torch.randn(V, generator=generator).requires_grad_()
    ref = {name: x.pop(name) for name in ("ref_hidden", "ref_weight")}
    if op == "linear_token_kl":
        x |= ref | {"ref_bias": torch.randn(V, generator=generator)}
    if op == "linear_policy_loss":
        shape = ("hidden", (4, -1, H)), ("labels", (4, -1))
        x |= {name: x[name].detach().view(size) for name, size in shape}
        x["hidden"].requires_grad_()
        constants = {"old_logp": x["labels"] / -100, "advantages": x["labels"] / V - 0.5}
        x |= constants | {"mask": x["labels"] > 100}
    x["lora"] = (torch.randn(3, H, generator=generator).requires_grad_(),
                 torch.randn(V, 3, generator=generator).requires_grad_(), 0.5)  # fmt: skip

    def results(cast) -> list[torch.Tensor]:
        head = {"hidden", "weight", "bias", "lora", *ref, "ref_bias"} & x.keys()
        made = x | {k: tuple(map(cast, x[k])) if k == "lora" else cast(x[k]) for k in head}
        out = getattr(rf, op)(**made)
        out = out[0] + out[2] if op == "linear_token_kl" else out[0] if "mask" in x else out
        leaves = [x["hidden"], x["weight"], x["bias"], *x["lora"][:2]]
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(lambda y: y)
    wanted = results(lambda y: y.bfloat16() if isinstance(y, torch.Tensor) else y)
    for got, want in zip(ours, wanted, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_two_loops_side_by_side_leave_autocast_on() -> None:
    hidden, weight, _ = inputs()
    head = Head(hidden.detach(), weight.detach(), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, other = (linear.chunks(head, torch.ones(N, dtype=torch.bool)) for _ in range(2))
        for _ in zip(own, other, strict=True):
            pass
        assert torch.is_autocast_enabled("cpu")


def test_a_backward_inside_autocast_keeps_the_dtype_of_its_forward() -> None:
    hidden, weight, labels = inputs()
    labels[::3] = -100
    logp = rf.linear_token_logprobs(hidden, weight, labels).sum()
    plain = torch.autograd.grad(logp, (hidden, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(logp, (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


def test_float64_constants_beside_float32_hidden_states() -> None:
    hidden, weight, labels = inputs()
    old_logp, advantages = -7 * torch.ones(N), torch.randn(N, generator=torch.manual_seed(0))
    mask = torch.ones(N, dtype=torch.bool)
    plain, _ = rf.linear_policy_loss(hidden, weight, labels, old_logp, advantages, mask)
    mixed, _ = rf.linear_policy_loss(
        hidden, weight, labels, old_logp.double(), advantages.double(), mask
    )
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)


@pytest.mark.skipif(registry.extension is None, reason="the C++ extension is not built")
def test_cpp_refuses_tensors_of_another_type_than_the_first() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="expected a tensor of type Float, got Double"):
        torch.ops.rlhf_fast.gae(x, x.double(), mask, None, None, 1.0, 1.0, True)


@pytest.mark.parametrize("of", ["weight", "bias"])
def test_16_bit_weight_gradients_accumulate_in_float32(of: str) -> None:
    """Many chunks into one bfloat16 gradient must not be worse than one product."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 8, generator=generator).bfloat16()
    weight, bias = (torch.randn(*size, generator=generator).bfloat16() for size in ((40, 8), (40,)))
    labels = torch.randint(40, (256,), generator=generator)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        x, w, b = (y.to(dtype).requires_grad_() for y in (hidden, weight, bias))
        logp = rf.linear_token_logprobs(x, w, labels, bias=b)
        return torch.autograd.grad(logp.sum(), w if of == "weight" else b)[0].double()

    exact = gradient(torch.float64)
    one = (gradient(torch.bfloat16) - exact).abs().max()
    with rf.chunk_budget(4 * 40 * 2):  # 64 chunks of 4 rows
        many = (gradient(torch.bfloat16) - exact).abs().max()
    assert many <= 1.5 * one


@pytest.mark.parametrize("total", [1, 5, 16, 17, 511, 512, 513, 1024, 1025, 4095, 4096, 5000])
def test_chunks_are_of_like_size_and_within_the_budget(total: int) -> None:
    rows = linear.chunk_rows(total, 49152, 4, "cpu")
    chunks = -(-total // rows)
    assert rows <= linear.CPU_ROWS and rows * chunks - total < 16 * chunks
    assert rows == total or rows % 16 == 0
    assert chunks == {4096: 9}.get(total, -(-total // 512))
    with rf.chunk_budget(2**20):
        assert linear.chunk_rows(total, 49152, 4, "cpu") <= 5
    with rf.chunk_budget(100 * 1000 * 4):
        assert linear.chunk_rows(1089, 1000, 4, "cpu") == 100  # 11 chunks of 99, and not of 112
    gpu = linear.chunk_rows(total, 131072, 4, "cuda")
    assert gpu * 131072 * 4 <= linear.GPU_BYTES


def test_the_chunks_memory_is_used_again_and_never_by_two_at_once() -> None:
    linear._memory.clear()
    hidden, weight, _ = inputs(requires_grad=False)
    head, keep = Head(hidden, weight, None), torch.ones(N, dtype=torch.bool)
    (chunk,) = linear.chunks(head, keep)
    ((memory, *_),) = linear._memory.values()
    again = linear.chunks(head, keep)
    beside = linear.chunks(head, keep)
    first, second = next(again), next(beside)
    assert first.logits.data_ptr() == chunk.logits.data_ptr() == memory.data_ptr()
    assert second.logits.data_ptr() != memory.data_ptr()
    assert torch.equal(first.logits, hidden @ weight.t())


def test_on_a_gpu_every_row_of_a_chunk_starts_at_a_boundary_of_16_bytes(monkeypatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, buffer = linear.chunk_buffer(None, 3, 50257, dtype, torch.device("meta"))
        assert buffer.shape == (3, 50257) and buffer.stride(1) == 1
        assert buffer.stride(0) * dtype.itemsize % 16 == 0

    def gradients() -> list[torch.Tensor]:
        hidden, weight, labels = inputs()
        weight = weight[:-3].detach().requires_grad_()
        labels = labels.clamp(max=V - 4)
        logp, entropy = rf.linear_token_logprobs(hidden, weight, labels, entropy=True)
        return [logp, *torch.autograd.grad((logp + entropy).sum(), (hidden, weight))]

    expected = gradients()
    monkeypatch.setattr(linear, "_memory", {})  # a chunk with a GPU's layout is not to be kept

    def as_on_a_gpu(whole, rows, vocab, dtype, device):
        memory = torch.empty(rows, linear.aligned(vocab), dtype=dtype)
        return memory, memory[:, :vocab]

    monkeypatch.setattr(linear, "chunk_buffer", as_on_a_gpu)
    for x, y in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_logits_of_16_bit_operands_are_float32() -> None:
    """Their gradient too on a CPU; on a GPU it is what the products take."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        on_a_gpu = SimpleNamespace(is_cuda=True, dtype=dtype)
        assert products.logits_dtype(on_a_gpu) == torch.float32
        assert products.dlogits_dtype(on_a_gpu) == dtype
        assert products.dlogits_dtype(torch.zeros(1, dtype=dtype)) == torch.float32
    assert products.dlogits_dtype(torch.zeros(1).double()) == torch.float64


class AsOnAGPU(TorchDispatchMode):
    """The engine's Python as on a GPU, with row kernels that write a gradient in another dtype than
    the logits', and the passes over a chunk that are none of a row kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[str, torch.dtype]] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_fast":
            kernel = KERNELS[func._schema.name.split("::")[1]]
            with self if kernel.engine else contextlib.nullcontext():
                return kernel.fallback(*args)
        self.calls[func._schema.name] += 1
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.shape == (N, V) and not func.is_view:
                self.passes.append((func.overloadpacket.__name__, x.dtype))
        return result


def gradients_of_float32_logits(op: str, **options) -> tuple[list[torch.Tensor], AsOnAGPU]:
    """(the gradients that one of the linear ops gives bfloat16 operands, what ran)."""
    x = {k: v if k == "labels" else v.detach().bfloat16() for k, v in kl_inputs().items()}
    ref = {name: x.pop(name) for name in ("ref_hidden", "ref_weight")}
    leaves = x["hidden"].requires_grad_(), x["weight"].requires_grad_(options.pop("trained"))
    mode = AsOnAGPU()
    with mode:
        if op == "linear_policy_loss":
            constants = (torch.full((N,), -7.0), torch.linspace(-1, 1, N), x["labels"] >= 0)
            total, _ = rf.linear_policy_loss(*x.values(), *constants, entropy_coef=0.1, **options)
        elif op == "linear_token_kl":
            logp, _, kl = rf.linear_token_kl(**x, **ref, **options)
            total = (logp + kl).sum()
        else:
            logp, entropy = rf.linear_token_logprobs(**x, entropy=True, **options)
            total = (logp + entropy).sum()
        total.backward()
    return [leaf.grad for leaf in leaves if leaf.requires_grad], mode


LINEAR_OPS = ["linear_token_logprobs", "linear_policy_loss", "linear_token_kl"]


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_a_gradient_in_16_bits_takes_no_pass_of_its_own(op: str, monkeypatch) -> None:
    """All that goes over a chunk of float32 logits are the row kernels, the products, and what puts
    a 0 at each row's label."""
    monkeypatch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
    _, mode = gradients_of_float32_logits(op, trained=False)
    assert mode.passes == [("scatter_", torch.bfloat16)]


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_rows_are_listed_once_a_pass(op: str) -> None:
    """Also those of two heads: the host waits for a GPU to list them."""
    passes = 1 if op == "linear_policy_loss" else 2
    _, mode = gradients_of_float32_logits(op, trained=True)
    assert mode.calls["aten::nonzero"] == passes
    _, mode = gradients_of_float32_logits(op, trained=True, compact=False)
    assert mode.calls["aten::nonzero"] == 0


def test_engines_say_that_a_cuda_graph_cannot_hold_them() -> None:
    for kernel in KERNELS.values():
        tags = getattr(torch.ops.rlhf_fast, kernel.name).default.tags
        assert (torch.Tag.cudagraph_unsafe in tags) == kernel.engine, kernel.name


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_a_gradient_in_16_bits_is_the_float32_one_rounded(op, deterministic, monkeypatch) -> None:
    monkeypatch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
    options = {"deterministic": deterministic, "trained": True}
    with rf.chunk_budget(20 * V * 4):  # the last chunk is smaller than the others
        ours, _ = gradients_of_float32_logits(op, **options)
        monkeypatch.setattr(groups, "Group", RoundedAfterwards)
        rounded, _ = gradients_of_float32_logits(op, **options)
    for got, want in zip(ours, rounded, strict=True):
        assert torch.equal(got, want) and got.any()


def test_float32_logits_of_16_bit_operands_have_bias_and_adapter(monkeypatch) -> None:
    """The numbers of the same operands in float32."""
    monkeypatch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
    generator = torch.Generator().manual_seed(2)
    hidden, weight, labels = inputs(requires_grad=False)
    shapes = (V,), (3, H), (V, 3)
    parts = [hidden, weight, *(torch.randn(*shape, generator=generator) for shape in shapes)]
    x, w, bias, down, up = (y.bfloat16() for y in parts)
    low = x.float() @ down.float().t()  # on a GPU it is rounded before the last product
    with AsOnAGPU():
        narrow = rf.linear_token_logprobs(x, w, labels, bias=bias)
        (chunk,) = linear.chunks(Head(x, w, bias, down, up), labels >= 0)
        made = chunk.logits.clone()
    x, w, bias, low, up = (y.float() for y in (x, w, bias, low, up))
    wide = rf.linear_token_logprobs(x, w, labels, bias=bias)
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-5)
    logits = x @ w.t() + bias + low @ up.t()
    torch.testing.assert_close(made, logits, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_over_the_budget_is_still_a_row() -> None:
    with rf.chunk_budget(10):
        assert linear.chunk_rows(3, 10**9, 4, "cuda") == 1
    assert linear.chunk_rows(0, 1000, 4, "cpu") == 0


def kl_inputs() -> dict[str, torch.Tensor]:
    """A reference of another width, with a head of its own."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, labels = inputs()
    ref = {
        "ref_hidden": torch.randn(N, H // 2, generator=generator),
        "ref_weight": torch.randn(V, H // 2, generator=generator),
    }
    return {"hidden": hidden, "weight": weight, "labels": labels, **ref}


REF_GEMM = GEMM // 2


def test_kl_holds_two_chunks_that_share_the_budget(inside) -> None:
    x, largest = kl_inputs(), Largest()
    with rf.chunk_budget(32 * V * 4), largest, inside:
        logp, _, kl = rf.linear_token_kl(**x)
        (logp.sum() + kl.sum()).backward()
    assert 16 * V <= largest.numel < 17 * V


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_chunks_of_two_heads_change_nothing_but_rounding(rows: int, direction: str) -> None:
    x = kl_inputs()

    def results() -> tuple[torch.Tensor, ...]:
        logp, ref_logp, kl = rf.linear_token_kl(**x, direction=direction)
        grads = torch.autograd.grad((logp + kl).sum(), (x["hidden"], x["weight"]))
        return logp, ref_logp, kl, *grads

    whole = results()
    with rf.chunk_budget(2 * rows * V * 4):
        parts = results()
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("logp_share", "kl_share", "backward"),
    [(1.0, 1.0, 3 * GEMM + REF_GEMM), (0.0, 1.0, 3 * GEMM + REF_GEMM), (1.0, 0.0, 3 * GEMM)],
)
@pytest.mark.parametrize("kept", [True, False])
def test_kl_flops_are_those_the_docstring_states(
    inside, logp_share, kl_share, backward, kept
) -> None:
    """The reference is not computed again for a gradient that it has no part in."""
    x = kl_inputs()
    backward -= kept * (GEMM + REF_GEMM if kl_share else GEMM)
    counted, again = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counted, inside:
        logp, _, kl = rf.linear_token_kl(**x)
    if not kept:
        linear._memory.clear()
    with again, inside:
        parts = [share * out for share, out in ((logp_share, logp), (kl_share, kl)) if share]
        sum(parts).sum().backward()
    assert counted.get_total_flops() == GEMM + REF_GEMM
    assert again.get_total_flops() == backward


def test_kl_rows_that_cannot_matter_leave_both_heads(inside) -> None:
    x = kl_inputs()
    x["labels"][::2] = -100
    counted, again = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counted, inside:
        logp, _, kl = rf.linear_token_kl(**x)
    with again, inside:
        quarter = torch.arange(N) % 4 == 1
        (kl * quarter + logp * quarter).sum().backward()
    assert counted.get_total_flops() == (GEMM + REF_GEMM) // 2
    assert again.get_total_flops() == (3 * GEMM + REF_GEMM) // 4


def test_the_reference_of_a_kl_is_constant() -> None:
    x = kl_inputs()
    constant = [x[name].requires_grad_() for name in ("ref_hidden", "ref_weight")]
    _, ref_logp, kl = rf.linear_token_kl(**x)
    assert not ref_logp.requires_grad
    grads = torch.autograd.grad(kl.sum(), constant, allow_unused=True)
    assert grads == (None, None)


@pytest.mark.skipif(registry.extension is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("reverse", [True, False])
def test_kl_kernels_take_rows_that_do_not_lie_side_by_side(reverse: bool) -> None:
    """The engine's lie so; any other layout is right too."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits, grads = (
        3 * torch.randn(*shape, generator=generator)
        for shape in ((1, 5, 90), (1, 5, 90), (2, 1, 5))
    )
    labels = torch.tensor([[3, -100, 0, 89, 7]])
    per_token = 0.5 + torch.rand(1, 5, generator=generator)
    options, outs = (1.0, per_token, 5.0, reverse), []
    for layout in (lambda x: x, lambda x: x.mT.contiguous().mT):
        x, y = layout(logits), layout(ref_logits)
        forward = torch.ops.rlhf_fast.logits_kl(x, y, labels, *options)
        _, _, kl, norm, ref_norm = forward
        out = torch.empty_like(x)
        torch.ops.rlhf_fast.logits_kl_backward(
            *grads, x, y, labels, norm, ref_norm, kl, *options, out
        )
        outs.append((*forward, out))
    for got, want in zip(*outs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
