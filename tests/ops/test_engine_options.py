"""The linear ops' options: adapter, no host sync, batch invariance, gradient accumulation."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rlhf_fast as rf
from rlhf_fast.ops import aggregate
from rlhf_fast.ops.linear import chunks as linear
from rlhf_fast.ops.linear.head import Head

N, H, R, V = 96, 16, 3, 500
GEMM, LOW = 2 * N * H * V, 2 * N * R * V


def draw(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=dtype)
    weight = torch.randn(V, H, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def adapter(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(R, H, generator=generator, dtype=dtype)
    return down.requires_grad_(), torch.randn(
        V, R, generator=generator, dtype=dtype
    ).requires_grad_()


@pytest.mark.parametrize("trunk", ["trained", "frozen"])
def test_an_adapter_equals_the_merged_head(trunk: str) -> None:
    hidden, weight, labels = draw(torch.float64)
    hidden.requires_grad_(trunk == "trained")
    down, up = adapter(torch.float64)
    ours = rf.linear_token_logprobs(hidden, weight, labels, lora=(down, up, 0.5), entropy=True)
    merged = rf.linear_token_logprobs(hidden, weight + 0.5 * up @ down, labels, entropy=True)
    leaves = (hidden, down, up) if hidden.requires_grad else (down, up)
    got = torch.autograd.grad(ours[0].sum() + ours[1].sum(), leaves)
    want = torch.autograd.grad(merged[0].sum() + merged[1].sum(), leaves)
    for a, b in zip((*ours, *got), (*merged, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_an_adapter_on_a_frozen_head_costs_no_weight_gradient(inside) -> None:
    """Backward: dX, 2NHV, with the adapter's own small products."""
    hidden, weight, labels = draw()
    counter = FlopCounterMode(display=False)
    lora = (*adapter(), 0.5)
    logp = rf.linear_token_logprobs(hidden.requires_grad_(), weight, labels, lora=lora)
    with counter, inside:
        logp.sum().backward()
    down, low_again_hidden_and_down = 2 * N * H * R, 3
    assert counter.get_total_flops() == GEMM + 2 * LOW + low_again_hidden_and_down * down


class NoSync(TorchDispatchMode):
    """Refuses shapes that depend on values, and counts the numbers that are read back."""

    read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name != "nonzero", name
        self.read += name == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def policy_inputs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden": hidden.view(4, -1, H),
        "weight": weight,
        "labels": labels.view(4, -1),
        "old_logp": -6 + torch.randn(4, N // 4, generator=generator, dtype=hidden.dtype),
        "advantages": torch.randn(4, N // 4, generator=generator, dtype=hidden.dtype),
        "mask": torch.rand(4, N // 4, generator=generator) > 0.4,
    }


@pytest.mark.parametrize(("ratio", "read"), [("token", 1), ("sequence", 0)])
def test_compact_off_reads_nothing_back(inside, ratio: str, read: int) -> None:
    """What CUDA graphs need; and masked rows, garbage or not, still give exactly nothing."""
    hidden, weight, labels = draw()
    arguments = policy_inputs(hidden, weight, labels)
    arguments["hidden"] = arguments["hidden"].masked_fill(~arguments["mask"][..., None], torch.nan)
    arguments["hidden"].requires_grad_()
    arguments["weight"].requires_grad_()
    leaves = (arguments["hidden"], arguments["weight"])

    def losses(compact: bool) -> list[torch.Tensor]:
        loss, _ = rf.linear_policy_loss(**arguments, ratio=ratio, compact=compact)
        kept = arguments["labels"].masked_fill(~arguments["mask"], -100)
        logp = rf.linear_token_logprobs(*leaves, kept, compact=compact)
        other = 0.9 * arguments["hidden"].detach()
        _, _, kl = rf.linear_token_kl(*leaves, kept, other, compact=compact)
        beside, _, _ = rf.linear_token_kl(*leaves, kept, other, compact=compact)
        total = loss + logp.sum() + kl.sum() + beside.sum()
        return [loss, logp, *torch.autograd.grad(total, leaves, torch.full((), 0.5)), kl]

    plain = losses(compact=True)
    with pytest.raises(AssertionError, match="nonzero"), NoSync(), inside:
        losses(compact=True)
    check_label_values = rf.ops.check.label_range
    rf.ops.check.label_range = lambda *_: None  # on a GPU only debug() reads the labels
    sync = NoSync()
    try:
        with sync, inside:
            graphed = losses(compact=False)
    finally:
        rf.ops.check.label_range = check_label_values
    assert sync.read == read  # whether the incoming gradient is 1: asked by one pass, on CPU only
    for got, want in zip(graphed, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not graphed[2][~arguments["mask"]].any()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_deterministic_row_does_not_see_its_neighbours(adapted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 64, generator=generator)
    weight = torch.randn(3000, 64, generator=generator) / 8
    labels = torch.randint(3000, (700,), generator=generator)
    adapter = (torch.randn(*size, generator=generator) / 8 for size in ((48, 64), (3000, 48)))
    lora = (*adapter, 0.5) if adapted else None

    def rows(some: slice, deterministic: bool) -> list[torch.Tensor]:
        x = hidden[some].clone().requires_grad_()
        logp, entropy = rf.linear_token_logprobs(
            x, weight, labels[some], entropy=True, lora=lora, deterministic=deterministic
        )
        return [logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), x)]

    def differences(deterministic: bool) -> int:
        whole = rows(slice(0, 700), deterministic)
        parts = [slice(0, 1), slice(5, 6), slice(3, 100), slice(127, 129), slice(130, 691)]
        return sum(
            not torch.equal(part, full[some])
            for some in parts
            for part, full in zip(rows(some, deterministic), whole, strict=True)
        )

    assert differences(deterministic=True) == 0
    assert differences(deterministic=False) > 0  # else this test would show nothing


@pytest.mark.parametrize("op", ["token", "sequence", "logp beside the kl", "kl"])
def test_the_other_linear_ops_are_deterministic_too(op: str) -> None:
    """The gradient of one row alone, and among 95 others."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 64, generator=generator)
    other = torch.randn(N, 64, generator=generator)
    weight = torch.randn(3000, 64, generator=generator) / 8
    labels = torch.randint(3000, (N,), generator=generator)

    def gradient(rows: slice, deterministic: bool) -> torch.Tensor:
        x = hidden[rows].clone().requires_grad_()
        y, how = labels[rows], {"deterministic": deterministic}
        if op in ("token", "sequence"):  # linear_policy_loss, sequences of one token
            constants = (other[rows, 0] - 8, other[rows, 1], torch.ones_like(y, dtype=torch.bool))
            total, _ = rf.linear_policy_loss(
                x[:, None], weight, y[:, None], *(c[:, None] for c in constants), ratio=op,
                entropy_coef=0.1, aggregation="token-sum", **how,
            )  # fmt: skip
        else:
            logp, _, kl = rf.linear_token_kl(x, weight, y, other[rows], **how)
            total = kl.sum() if op == "kl" else logp.sum()
        return torch.autograd.grad(total, x)[0]

    def same(deterministic: bool) -> bool:
        whole = gradient(slice(0, N), deterministic)
        return all(
            torch.equal(gradient(slice(i, i + 1), deterministic)[0], whole[i])
            for i in range(0, N, 7)
        )

    assert same(deterministic=True)
    assert not same(deterministic=False)  # else this test would show nothing


def test_a_deterministic_chunk_always_has_the_same_rows() -> None:
    hidden, weight, labels = draw()
    head = Head(hidden, weight, None)
    keep = torch.arange(N) < 5
    (chunk,) = linear.chunks(head, keep, deterministic=True)
    assert chunk.logits.shape == (5, V) and chunk.padded.shape == (linear.DETERMINISTIC_ROWS, V)
    with rf.chunk_budget(32 * V * 4):  # two loops share it
        (chunk,) = linear.chunks(head, keep, deterministic=True, buffers=2)
    assert chunk.padded.shape == (16, V)


@pytest.mark.parametrize(
    "how",
    [{}, {"loss": "cispo"}, {"loss": "reinforce"}, {"ratio": "sequence"}],
    ids=lambda how: next(iter(how.values()), "ppo"),
)
@pytest.mark.parametrize("aggregation", aggregate.AGGREGATIONS)
def test_micro_batches_add_up_to_the_batch(aggregation: str, how: dict) -> None:
    hidden, weight, labels = draw(torch.float64)
    arguments = policy_inputs(hidden, weight.requires_grad_(), labels)
    mask = arguments["mask"]
    count = {"token-mean": mask.sum(), "token-sum": 17.0}.get(aggregation, mask.any(-1).sum())
    options = {"aggregation": aggregation, "entropy_coef": 0.1, "normalizer": float(count), **how}
    whole, _ = rf.linear_policy_loss(**arguments, **options)
    (want,) = torch.autograd.grad(whole, weight)
    parts, got = 0.0, torch.zeros_like(weight)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        micro = {k: v if k == "weight" else v[rows] for k, v in arguments.items()}
        loss, _ = rf.linear_policy_loss(**micro, **options)
        parts += loss.detach()
        got += torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def policy_flops(inside, arguments: dict, options: dict) -> tuple[int, int]:
    """Of linear_policy_loss's forward and of its backward."""
    first, second = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with first, inside:
        loss, _ = rf.linear_policy_loss(**arguments, **options)
    with second, inside:
        loss.backward()
    return first.get_total_flops(), second.get_total_flops()


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({"loss": "ppo"}, 3, 0),
        ({"loss": "cispo"}, 3, 0),
        ({"loss": "reinforce"}, 3, 0),
        ({"ratio": "sequence"}, 1, 2),
        ({"ratio": "sequence", "loss": "cispo"}, 1, 2),
    ],
    ids=lambda x: " ".join(x.values()) if isinstance(x, dict) else None,
)
def test_every_loss_by_token_is_one_pass(inside, options, forward, backward) -> None:
    """In matrix products: 6NHV, all in the forward but for a sequence's ratio."""
    hidden, weight, labels = draw()
    arguments = policy_inputs(hidden.requires_grad_(), weight.requires_grad_(), labels)
    arguments["mask"][:] = True
    assert policy_flops(inside, arguments, options) == (forward * GEMM, backward * GEMM)


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, 3 * N // 4, 0),
        ({"importance_weights": "half"}, 3 * N // 8, 0),
        ({"entropy_coef": 0.1}, 3 * N // 2, 0),
        ({"kl_coef": 0.1}, 3 * N // 2, 0),
        ({"ratio": "sequence"}, N // 2, N),  # each log-prob moves the ratio of all
        ({"ratio": "sequence", "loss": "cispo"}, N // 2, 3 * N // 4),
    ],
    ids=str,
)
def test_rows_that_cannot_matter_leave_the_loss(inside, options, forward, backward) -> None:
    """Half of the rows are masked, half of the others have no advantage. In rows of one product."""
    hidden, weight, labels = draw()
    arguments = policy_inputs(hidden.requires_grad_(), weight.requires_grad_(), labels)
    row = torch.arange(N).view(4, -1)
    arguments["mask"] = row % 2 == 0
    arguments["advantages"] = torch.where(row % 4 == 0, 0.0, 1.0)
    if "importance_weights" in options:
        options = {"importance_weights": (row % 8 < 4).float()}
    if "kl_coef" in options:
        options = {**options, "ref_logp": arguments["old_logp"]}
    flops = policy_flops(inside, arguments, options)
    assert flops == (forward * GEMM // N, backward * GEMM // N)


class Names(TorchDispatchMode):
    """The ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "products"), [("nothing", 3), ("weight", 2), ("hidden", 2), ("all", 1)]
)
def test_no_gradient_is_made_that_nobody_asked_for(inside, frozen: str, products: int) -> None:
    hidden, weight, labels = draw()
    arguments = policy_inputs(hidden.requires_grad_(frozen != "hidden"), weight, labels)
    arguments["mask"][:] = True
    weight.requires_grad_(frozen != "weight")
    counter, names = FlopCounterMode(display=False), Names()
    with torch.set_grad_enabled(frozen != "all"), counter, names, inside:
        loss, _ = rf.linear_policy_loss(**arguments)
    assert counter.get_total_flops() == products * GEMM
    assert loss.requires_grad == ("token_logprobs_backward" in names.seen) == (frozen != "all")


@pytest.mark.parametrize(
    "options", [{"loss": "cispo"}, {"loss": "reinforce"}, {"ratio": "sequence"}], ids=str
)
def test_every_loss_compiles_to_the_numbers_of_eager(options: dict) -> None:
    hidden, weight, labels = draw()
    arguments = policy_inputs(hidden.requires_grad_(), weight.requires_grad_(), labels)

    def results(function) -> list[torch.Tensor]:
        loss, stats = function(**arguments, entropy_coef=0.1, **options)
        return [loss, *stats, *torch.autograd.grad(loss, (hidden, weight))]

    eager = results(rf.linear_policy_loss)
    torch._dynamo.reset()
    compiled = torch.compile(rf.linear_policy_loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled), eager, strict=True):
        torch.testing.assert_close(got, want)


def test_the_options_are_those_of_policy_loss() -> None:
    """But entropy, which is computed: the same names, defaults and types."""
    own, theirs = (
        {x.name: x for x in inspect.signature(op).parameters.values() if x.kind == x.KEYWORD_ONLY}
        for op in (rf.linear_policy_loss, rf.policy_loss)
    )
    theirs.pop("entropy")
    assert len(theirs) > 9 and theirs.items() <= own.items()


def test_a_scaled_loss_has_a_scaled_gradient() -> None:
    hidden, weight, labels = draw(torch.float64)
    arguments = policy_inputs(hidden, weight.requires_grad_(), labels)
    (one,) = torch.autograd.grad(rf.linear_policy_loss(**arguments)[0], weight)
    (third,) = torch.autograd.grad(rf.linear_policy_loss(**arguments)[0] / 3, weight)
    torch.testing.assert_close(third, one / 3)


@pytest.mark.long
@pytest.mark.slow
def test_more_than_2_to_the_31_logits() -> None:
    """Offsets are 64-bit: 16-bit logits of 4.3 GB, of which the last row is looked at."""
    rows, vocab = 16400, 131072
    assert rows * vocab > 2**31
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    logits[-1, -1] = 5.0
    labels = torch.full((rows,), -100)  # whose rows cost nothing
    labels[[0, -2, -1]] = vocab - 1
    logits += torch.zeros((), dtype=torch.bfloat16, requires_grad=True)  # no leaf, no copy
    logp, entropy = rf.token_logprobs(
        logits.view(rows, vocab), labels, entropy=True, inplace_backward=True
    )
    exact = torch.log_softmax(logits[-1].detach().double(), -1)
    torch.testing.assert_close(logp[-1].double(), exact[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        entropy[-1].double(), -(exact.exp() * exact).sum(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(logp[0].double(), -torch.tensor(vocab).double().log())
    (gradient,) = torch.autograd.grad(logp[-2:].sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr() and not gradient[:-2].any()
    torch.testing.assert_close(gradient[-1, -1].double(), 1 - exact[-1].exp(), rtol=4e-3, atol=0)
    assert gradient[-2, -1] == 1 and 0 < -gradient[-2, 0] < 1e-5


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("name", ["token_logprobs", "logits_kl"])
def test_logits_further_apart_than_2_to_the_31(name: str, side_by_side: bool) -> None:
    """Rows as a chunk's lie, side by side, and one after the other: three pages of 4.3 GB that are
    never touched."""
    far, n = 2**30 + 3, 3
    storage = torch.empty(2 * far + 64, dtype=torch.bfloat16)
    strides = (far, 1) if side_by_side else (1, far)
    near = torch.randn(2, 1, n, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    if side_by_side:  # [B, T, V] with T contiguous, as its counterpart is
        near = near.mT.contiguous().mT
    spread = [storage.as_strided((1, n, n), (0, *strides[::-1]), at).copy_(x)
              for at, x in zip((0, 32), near, strict=True)]  # fmt: skip
    labels, g, scale = torch.tensor([[2, -100, 2]]), torch.ones(1, n), (0.7, None, None)

    def numbers(logits: torch.Tensor, ref: torch.Tensor) -> list[torch.Tensor]:
        forward, backward = (getattr(torch.ops.rlhf_fast, name + k) for k in ("", "_backward"))
        if name == "token_logprobs":
            found = forward(logits, labels, *scale, True, False)
            backward(g, g, logits, labels, found[2], found[1], *scale, logits)
        else:
            found = forward(logits, ref, labels, *scale, True)
            backward(g, g, logits, ref, labels, *found[3:], found[2], *scale, True, logits)
        return [*found, logits.clone()]

    for got, want in zip(numbers(*spread), numbers(*near), strict=True):
        assert torch.equal(got, want)
