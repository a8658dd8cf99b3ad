"""Every Triton launcher, run by Triton's interpreter on CPU tensors, against float64.

The interpreter has to be on before triton is imported, and other test files compile kernels for
real; so tests/ops/test_triton.py runs this file in a process of its own. By hand:
``TRITON_INTERPRET=1 pytest tests/ops/triton_interpreter.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable

import pytest
import torch
from drawing import one_for_each_option
from kernel_calls import ENGINES, copied, replay, run
from left_exponentials import CASES, WIDE, check_gradient
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops import check
from rlhf_fast.ops.linear import groups
from rlhf_fast.ops.options import PolicyOptions
from rlhf_fast.ops.registry import KERNELS, OPS, Op, Sample

triton = pytest.importorskip("triton", reason="no triton on this machine: kernels not tested")
tl = pytest.importorskip("triton.language")

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
from interpreting import faster  # noqa: E402
from rlhf_fast.kernels import partials  # noqa: E402

faster()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's 0/0 under a mask


def all_samples(op: Op) -> list[Sample]:
    return list(op.samples(torch.Generator().manual_seed(0)))


def cases(dtype: torch.dtype, ops: Iterable[str], of: Callable[[Op], list[Sample]]) -> list:
    return [
        pytest.param(name, sample, dtype, id=f"{name}-{sample.name}-{str(dtype)[6:]}")
        for name in ops
        for sample in of(OPS[name])
    ]


KERNELS_OF_THEIR_OWN = [name for name, op in OPS.items() if op.kernels and name not in ENGINES]
SAMPLES = cases(torch.float32, ENGINES + KERNELS_OF_THEIR_OWN, all_samples)
# In another dtype a kernel takes the same branches: once through each of them.
SAMPLES += cases(torch.float64, KERNELS_OF_THEIR_OWN, one_for_each_option)
SAMPLES += cases(torch.bfloat16, ["token_logprobs"], all_samples)
SAMPLES += cases(torch.float16, ["token_logprobs"], one_for_each_option)


@pytest.mark.parametrize("name, sample, dtype", SAMPLES)
def test_samples(name: str, sample: Sample, dtype: torch.dtype) -> None:
    run(sample, OPS[name], dtype)


LONG = ({"B": 2, "T": 2100}, {"B": 260, "T": 2}, {"B": 2500}, {"N": 2, "V": 20001, "H": 8})


FITTING = [
    pytest.param(name, shape, id=f"{name}-{shape}")
    for name, op in OPS.items()
    for shape in LONG
    if (op.kernels or name in ENGINES)
    and set(op.shapes[0]) <= set(shape)
    and ("T" in op.shapes[0]) == ("T" in shape)
]


@pytest.mark.parametrize("name, shape", FITTING)
def test_more_than_one_block(name: str, shape: dict[str, int]) -> None:
    op = OPS[name]
    dtypes = (torch.float32, torch.bfloat16) if "V" in shape else (torch.float32,)
    for dtype in dtypes:
        run(op.workload(shape, torch.Generator().manual_seed(0), "cpu", dtype), op, dtype)


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_kl"])
def test_softcap_and_temperature_in_every_block(name: str) -> None:
    shape, generator = {"N": 2, "V": 20001, "H": 8}, torch.Generator().manual_seed(0)
    sample = OPS[name].workload(shape, generator, "cpu", torch.float32)
    options = {"softcap": 1.5, "temperature": torch.tensor([0.6, 1.4])}
    run(Sample("", sample.arguments | options, sample.grads), OPS[name], torch.float32)


@pytest.mark.parametrize("order, options", CASES)
def test_token_logprobs_of_tiles(order: str, options: dict[str, object]) -> None:
    check_gradient(KERNELS["leave_logprobs"].launcher, order, cut_off=True, **options)


@pytest.mark.parametrize("order", ["rising", "in and out of reach"])
def test_token_logprobs_of_wide_tiles(order: str) -> None:
    check_gradient(KERNELS["leave_logprobs"].launcher, order, columns=WIDE, cut_off=True)


@triton.jit
def of_all_programs_kernel(sums, programs, mean, out):
    tl.store(out, partials.largest(sums, programs, 0))
    tl.store(out + 1, partials.picked(partials.totals(sums, programs, 3, 4), 0, 4))
    tl.store(out + 2, partials.all_squares(sums, programs, 1, 0, 2, tl.load(mean)))
    tl.store(out + 3, partials.all_squares(sums, programs, 1, 0, 2, tl.load(mean) + 0.1))


@triton.jit
def squares_kernel(x, out):
    values = tl.load(x + tl.arange(0, 64))
    total = tl.sum(values)
    tl.store(out, partials.squares(values, values == values, total, 64.0))
    tl.store(out + 1, partials.squares(values, values == values, total + 6.4, 64.0))


def test_a_means_rounding_adds_nothing_to_a_variance() -> None:
    x, out = 5 + torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.empty(2)
    squares_kernel[(1,)](x, out)
    assert out.tolist() == pytest.approx([x.double().var().item() * 63] * 2, rel=1e-5)


@pytest.mark.parametrize("program", [0, 255, 256, 511, 600])
def test_what_is_put_together_of_all_programs(program: int) -> None:
    """The last launch looks at 256 programs at a time; an extremum may be in any of them."""
    sums = torch.stack([torch.zeros(601), torch.ones(601), torch.full((601,), 0.5)])
    sums[0, program] = 7.0
    out, mean = torch.full((4,), torch.nan), sums[0].mean()
    of_all_programs_kernel[(1,)](sums, 601, mean, out)
    squares = 601 * 0.5 + ((sums[0] - mean) ** 2).sum().item()
    assert out.tolist() == pytest.approx([7.0, 7.0, squares, squares])


@pytest.mark.parametrize("level, spread", [(1e4, 0.1), (0.1, 0.0), (-7e4, 0.0)])
def test_a_variance_keeps_its_digits(level: float, spread: float) -> None:
    g = torch.Generator().manual_seed(0)
    returns = level + spread * torch.randn(3, 2100, generator=g)
    values = returns + (spread or 1.0) / 2 * torch.randn(3, 2100, generator=g)
    mask = torch.rand(3, 2100, generator=g) > 0.2
    launcher = KERNELS["value_loss"].launcher
    stats = launcher(values, None, returns, mask, None, 0.0, "token-mean")[1]
    R, E = returns.double()[mask], (returns.double() - values.double())[mask]
    explained = (1 - E.var(correction=0) / R.var(correction=0)).item() if spread else 0.0
    assert stats[5].item() == pytest.approx(explained, abs=1e-2)
    assert stats[3].item() == pytest.approx(R.var(correction=0).item(), rel=1e-2, abs=1e-3)
    assert stats[6] == mask.sum()


INF = math.inf


@pytest.mark.parametrize("name", ["reinforce", "weight", "entropy", "normalizer"])
def test_a_coefficient_of_0_beside_an_infinity(name: str) -> None:
    A, ones = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2)
    of_zero = name == "normalizer"
    options = PolicyOptions(
        loss="ppo" if name in ("entropy", "normalizer") else "reinforce",
        kl_coef=1.0 if of_zero else 0.0, kl_estimator="k2",
    )  # fmt: skip
    total, _, d_logp, _ = KERNELS["policy_loss"].launcher(
        torch.tensor([[-INF, -1.0]]), -ones, A, torch.ones(1, 2, dtype=torch.bool),
        A if name == "weight" else None, torch.tensor([[INF, 1.0]]) if name == "entropy" else None,
        -ones if of_zero else None, torch.tensor(0.0) if of_zero else None, *options.values(),
    )  # fmt: skip
    assert total.isfinite() and d_logp.isfinite().all()
    assert not of_zero or (total == 0 and not d_logp.any())


def test_no_penalty_and_no_centring_of_an_infinity() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    impossible = torch.tensor([[-1.0, -INF, -2.0]])
    for estimator in ("k1", "k2", "k3", "abs"):
        rewards = KERNELS["kl_penalized_rewards"].launcher(
            torch.ones(1), -torch.ones(1, 3), impossible, mask, 0.0, estimator
        )
        assert rewards.tolist() == [[0.0, 0.0, 1.0]]
    loss, _, *grads = KERNELS["pairwise_loss"].launcher(
        torch.tensor([INF, 1.0]), torch.zeros(2), None, 0.0
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)) / 2)
    assert all(g.isfinite().all() for g in grads)
    values = torch.tensor([[0.5, 0.25, INF]])
    advantages, _ = KERNELS["gae"].launcher(
        torch.tensor([[1.0, 2.0, 0.0]]), values, None, None, torch.tensor([INF]), 0.0, 0.9, True
    )
    assert advantages.tolist() == [[0.5, 1.75, -INF]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_rises_with_the_gap_and_points_back(dtype: torch.dtype) -> None:
    d = torch.tensor([0.0, -1.0, -19.0, -20.0, -25.0, -1e3, -1e9, -INF], dtype=dtype)
    zero, one = torch.zeros_like(d), torch.ones_like(d)
    kl = KERNELS["token_kl"].launcher(d, zero, "k3")
    slope = KERNELS["token_kl_backward"].launcher(one, d, zero, "k3")
    assert kl[0] == 0 and (kl.diff() > 0).all() and (slope <= 0).all()
    assert torch.equal(KERNELS["token_kl"].launcher(-d, zero, "k3").isnan(), d.isnan())


@pytest.mark.parametrize("name", ["masked_mean", "policy_loss", "value_loss", "gae"])
def test_any_byte_but_0_is_true(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = OPS[name].workload({"B": 3, "T": 50}, generator, "cpu", torch.float32).arguments
    sevens = (x["mask"].to(torch.uint8) * 6).view(torch.bool)

    def called(mask: Tensor) -> list[Tensor]:
        found = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace != "rlhf_fast":
                    return func(*args, **(kwargs or {}))
                result = KERNELS[func._schema.name.split("::")[1]].launcher(*args)
                found.extend([result] if isinstance(result, Tensor) else result)
                return result

        with Mode():
            OPS[name].function(**{**x, "mask": mask})
        return found

    for clean, odd in zip(called(x["mask"]), called(sevens), strict=True):
        assert torch.equal(clean, odd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_of_the_vocabulary(dtype: torch.dtype) -> None:
    """Rows of nothing but -inf have a sum whose log is -inf; a label elsewhere is no token here."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 1, 4, 77, generator=generator).to(dtype)
    logits[0, 1], ref[0, 2] = -torch.inf, -torch.inf
    labels = torch.tensor([[3, 4, 5, 6]])
    scale = (labels, 0.7, None, None)
    _, _, norm = KERNELS["token_logprobs"].launcher(logits, *scale, True, False)
    *_, kl_norm, ref_norm = KERNELS["logits_kl"].launcher(logits, ref, *scale, True)
    for (_, log_sum), x in ((norm, logits), (kl_norm, logits), (ref_norm, ref)):
        nothing = (x == -torch.inf).all(-1)
        assert torch.equal(log_sum == -torch.inf, nothing) and not log_sum.isnan().any()
    logits, ref = torch.randn(2, 1, 4, 77, generator=generator).to(dtype)
    labels = torch.tensor([[check.ELSEWHERE, 76, check.ELSEWHERE, -100]])
    g, ones = torch.rand(1, 4, generator=generator).to(dtype), torch.ones(1, 4, dtype=dtype)
    norm = torch.ones(2, 1, 4, dtype=dtype)
    for name, arguments in (
        ("token_logprobs_backward", (g, g, logits, labels, norm, ones, 0.7, None, 3.0)),
        ("logits_kl_backward",
         (g, g, logits, ref, labels, norm, norm, ones, 0.7, None, 3.0, True)),
    ):  # fmt: skip
        got, want = torch.full_like(logits, torch.nan), torch.full_like(logits, torch.nan)
        KERNELS[name].launcher(*arguments, got)
        KERNELS[name].fallback(*arguments, want)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_gae_carries_across_blocks(holes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 2100, generator=generator) < 0.5
    mask[0, 500:1800] = False  # a hole longer than a block
    draw = torch.randn(2, 1, 2100, generator=generator)
    arguments = {
        "rewards": draw[0], "values": draw[1], "mask": mask, "gamma": 0.99, "holes": holes,
        "dones": torch.rand(1, 2100, generator=generator) < 0.003, "bootstrap": torch.ones(1),
    }  # fmt: skip
    run(Sample("", arguments), OPS["gae"], torch.float32)


@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_a_sequence_ratio_over_many_blocks(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = OPS["policy_loss"].workload({"B": 2, "T": 2100}, generator, "cpu", torch.float32)
    arguments = {**sample.arguments, "ratio": "sequence", "loss": loss, "clip_high": 1e-4}
    run(Sample("", arguments, sample.grads), OPS["policy_loss"], torch.float32)


def test_gae_packed_of_sequences_longer_and_shorter_than_a_block() -> None:
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 1500, 1500, 1507])
    rewards, values = torch.randn(2, 1507, generator=generator)
    arguments = {"rewards": rewards, "values": values, "cu_seqlens": cu_seqlens,
                 "bootstrap": torch.ones(3), "gamma": 0.99}  # fmt: skip
    run(Sample("", arguments), OPS["gae_packed"], torch.float32)


def test_rows_more_than_2_to_31_elements_apart() -> None:
    """The last of three rows starts at element 2^31; only the touched pages are ever real."""
    vocab, apart = 7, 2**30
    storage = torch.empty(2 * apart + vocab, dtype=torch.bfloat16)
    logits = storage.as_strided((1, 3, vocab), (3 * apart, apart, 1))
    logits.copy_(torch.randn(1, 3, vocab, generator=torch.Generator().manual_seed(0)))
    labels = torch.tensor([[1, 6, 3]])
    forward, backward = KERNELS["token_logprobs"], KERNELS["token_logprobs_backward"]
    result = forward.launcher(logits, labels, 1.0, None, None, True, False)
    expected = forward.fallback(logits.float().clone(), labels, 1.0, None, None, True, False)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    ones, small = torch.ones(1, 3), torch.empty(1, 3, vocab)
    arguments = (labels, result[2], result[1], 1.0, None, None)
    backward.fallback(ones, ones, logits.float().clone(), *arguments, small)
    backward.launcher(ones, ones, logits, *arguments, logits)
    torch.testing.assert_close(logits.float(), small, rtol=1e-2, atol=1e-3)


def test_an_infinite_kl_that_nobody_uses_leaves_the_gradient_of_logp() -> None:
    ref_logits = torch.zeros(1, 2, 5)
    ref_logits[..., 3] = -torch.inf
    x, labels, zero = torch.randn(1, 2, 5), torch.tensor([[1, 2]]), torch.zeros(1, 2)
    arguments = (x, ref_logits, labels, 1.0, None, None, True)
    _, _, kl, norm, ref_norm = KERNELS["logits_kl"].launcher(*arguments)
    assert kl.isinf().all()
    out = torch.full_like(x, torch.nan)
    arguments = (x, ref_logits, labels, norm, ref_norm, kl, 1.0, None, None, True, out)
    KERNELS["logits_kl_backward"].launcher(zero + 1, zero, *arguments)
    one_hot = torch.nn.functional.one_hot(labels, 5)
    torch.testing.assert_close(out, one_hot - x.softmax(-1))


def test_a_probability_that_becomes_0_where_the_reference_has_none() -> None:
    """Token 0 makes KL(p || q) infinite until token 100 leaves p nothing there."""
    x, ref_logits = torch.zeros(2, 1, 1, 131)
    x[..., 100], ref_logits[..., 0] = 200.0, -torch.inf
    arguments = (x, ref_logits, torch.tensor([[100]]), 1.0, None, None, True)
    kl = KERNELS["logits_kl"].launcher(*arguments)[2]
    torch.testing.assert_close(kl, torch.tensor([[130.0]]).log())


def test_a_gradient_through_the_kl_alone() -> None:
    x, ref_logits = torch.randn(2, 1, 2, 5)
    labels, zero = torch.tensor([[1, 2]]), torch.zeros(1, 2)
    _, _, kl, norm, ref_norm = KERNELS["logits_kl"].launcher(
        x, ref_logits, labels, 1.0, None, None, True
    )
    out = torch.full_like(x, torch.nan)
    arguments = (x, ref_logits, labels, norm, ref_norm, kl, 1.0, None, None, True, out)
    KERNELS["logits_kl_backward"].launcher(zero, zero + 1, *arguments)
    log_p, log_q = x.log_softmax(-1), ref_logits.log_softmax(-1)
    torch.testing.assert_close(out, log_p.exp() * (log_p - log_q - kl[..., None]))


def test_a_gradient_through_the_entropy_alone() -> None:
    x, labels, zero = torch.randn(1, 2, 5), torch.tensor([[1, 2]]), torch.zeros(1, 2)
    _, entropy, norm = KERNELS["token_logprobs"].launcher(x, labels, 1.0, None, None, True, False)
    out = torch.full_like(x, torch.nan)
    arguments = (zero, zero + 1, x, labels, norm, entropy, 1.0, None, None, out)
    KERNELS["token_logprobs_backward"].launcher(*arguments)
    log_p = x.log_softmax(-1)
    torch.testing.assert_close(out, -log_p.exp() * (log_p + entropy[..., None]))


@pytest.mark.parametrize("name", ["token_logprobs", "logits_kl"])
def test_a_row_without_gradient_is_not_looked_at(name: str) -> None:
    logits, ones, norm = torch.randn(1, 3, 40), torch.ones(1, 3), torch.ones(2, 1, 3)
    logits[0, 1] = torch.nan
    labels, g = torch.tensor([[3, 4, 5]]), torch.tensor([[1.0, 0.0, 1.0]])
    out = torch.full_like(logits, torch.nan)
    if name == "token_logprobs":
        arguments = (g, g, logits, labels, norm, ones, 1.0, None, None)
    else:
        arguments = (g, g, logits, logits, labels, norm, norm, ones, 1.0, None, None, True)
    KERNELS[f"{name}_backward"].launcher(*arguments, out)
    assert not out[0, 1].any() and out[0, ::2].isfinite().all() and out[0, ::2].any()


def shifted(vocab: int, dtype: torch.dtype, gap: int, seed: int = 0) -> Tensor:
    """Logits [1, n, vocab] whose rows start at every offset from a boundary of 16 bytes, with NaN
    before, between and behind them."""
    rows, apart = 16 // dtype.itemsize, vocab + gap
    assert apart % 2 == 1, "the offsets would repeat"
    storage = torch.full((rows * apart + 32,), torch.nan, dtype=dtype)
    logits = storage.as_strided((1, rows, vocab), (rows * apart, apart, 1), 16)
    offsets = {logits[0, i].data_ptr() % 16 for i in range(rows)}
    assert len(offsets) == rows
    return logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))


def around(logits: Tensor) -> Tensor:
    """What of shifted()'s storage is not in a row, as NaN or not."""
    storage = torch.empty(0, dtype=logits.dtype).set_(logits.untyped_storage()).clone()
    storage.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(torch.nan)
    return storage.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab, gap", [(1, 2), (6, 1), (17, 0), (16384, 1), (20001, 0)])
def test_rows_at_every_offset(vocab: int, gap: int, dtype: torch.dtype) -> None:
    """Forward and the in-place backward of both row kernels; nothing outside a row is written."""
    logits = shifted(vocab, dtype, gap)
    ref_logits = shifted(vocab, dtype, gap, seed=1)
    n = logits.shape[1]
    labels = torch.arange(n)[None] % vocab
    labels[0, 1] = -100
    cases = {
        "token_logprobs": (logits, labels, 1.0, None, None, True, False),
        "logits_kl": (logits, ref_logits, labels, 1.0, None, None, True),
    }
    for name, arguments in cases.items():
        forward, backward = KERNELS[name], KERNELS[f"{name}_backward"]
        exact = replay(forward.fallback, arguments, [], torch.float64)
        result = replay(forward.launcher, arguments, [])
        kept = labels[0] != -100
        for x, y in zip(result, exact, strict=True):
            torch.testing.assert_close(x[..., kept].double(), y[..., kept], rtol=1e-5, atol=1e-5)
        ones = torch.ones(1, n)
        if name == "token_logprobs":
            logp, entropy, norm = result
            arguments = (ones, ones, logits, labels, norm, entropy, 1.0, None, None)
        else:
            _, _, kl, norm, ref_norm = result
            arguments = (ones, ones, logits, ref_logits, labels, norm, ref_norm, kl, 1.0, None,
                         None, True)  # fmt: skip
        small = torch.empty(1, n, vocab, dtype=torch.float64)
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in arguments]  # fmt: skip
        backward.fallback(*wide, small)
        apart = torch.full((1, n, vocab), torch.nan, dtype=dtype)  # rows that lie differently
        backward.launcher(*arguments, apart)
        own = copied(logits)
        backward.launcher(*arguments[:2], own, *arguments[3:], own)
        assert around(own).all()
        torch.testing.assert_close(own, apart, rtol=0, atol=0)
        # the interpreter cuts bfloat16 off where a GPU rounds it
        rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(own.double(), small, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "vocab, apart, out_apart", [(17, 32, 32), (20001, 20016, 20016), (40, 55, 55), (40, 55, 54)]
)
def test_a_gradient_in_16_bits_is_the_float32_one_rounded(vocab, apart, out_apart, dtype) -> None:
    """Of rows that start at boundaries, as the engine's do; that do not; that lie differently."""
    labels = torch.tensor([[3, -100, vocab - 1, 0]])

    def rows(apart: int, dtype: torch.dtype = torch.float32) -> Tensor:
        storage = torch.full((4 * apart,), torch.nan, dtype=dtype)
        return storage.as_strided((1, 4, vocab), (4 * apart, apart, 1))

    x, y = rows(apart), rows(apart)
    generator = torch.Generator().manual_seed(0)
    for logits in (x, y):
        logits.copy_(3 * torch.randn(logits.shape, generator=generator))
    g = torch.randn(2, 1, 4, generator=generator)
    g[..., 3] = 0
    scale = (0.7, None, 5.0)
    _, entropy, norm = KERNELS["token_logprobs"].launcher(x, labels, *scale, True, False)
    _, _, kl, norm, ref_norm = KERNELS["logits_kl"].launcher(x, y, labels, *scale, True)
    for name, arguments in {
        "token_logprobs_backward": (*g, x, labels, norm, entropy, *scale),
        "logits_kl_backward": (*g, x, y, labels, norm, ref_norm, kl, *scale, True),
    }.items():
        wide, narrow = rows(apart), rows(out_apart, dtype)
        KERNELS[name].launcher(*arguments, wide)
        KERNELS[name].launcher(*arguments, narrow)
        if dtype == torch.bfloat16:  # which the interpreter cuts off where a GPU rounds it
            wide = (wide.contiguous().view(torch.int32) >> 16 << 16).view(torch.float32)
        assert torch.equal(narrow, wide.to(dtype)) and around(narrow).all()


@pytest.mark.parametrize(
    "name, sample",
    [
        pytest.param(name, sample, id=f"{name}-{sample.name}")
        for name in ENGINES
        for sample in one_for_each_option(OPS[name])
    ],
)
def test_engines_with_float32_logits_of_16_bit_operands(name, sample, monkeypatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
    run(sample, OPS[name], torch.bfloat16)


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_kl"])
def test_every_configuration_writes_the_same_bits(name: str, monkeypatch) -> None:
    from rlhf_fast.kernels import token_logprobs, tuning

    shape = {"N": 3, "V": 5003, "H": 8}
    sample = OPS[name].workload(shape, torch.Generator().manual_seed(0), "cpu", torch.float32)
    logits, labels = shifted(5003, torch.bfloat16, 0), torch.arange(8)[None]
    norm = torch.stack([torch.zeros(1, 8), torch.full((1, 8), 9.0)])
    ones = torch.ones(1, 8)
    results = []
    for config in token_logprobs.BACKWARD_CONFIGS:
        monkeypatch.setattr(tuning, "fastest", lambda *_, config=config: config)
        run(sample, OPS[name], torch.float32)
        out = torch.full((1, 8, 5003), torch.nan, dtype=torch.bfloat16)
        if name == "token_logprobs":
            arguments = (ones, ones, logits, labels, norm, ones, 1.0, None, None)
        else:
            arguments = (ones, ones, logits, logits.exp(), labels, norm, norm, ones, 1.0, None,
                         None, True)  # fmt: skip
        kernel = "token_logprobs" if name == "token_logprobs" else "logits_kl"
        KERNELS[f"{kernel}_backward"].launcher(*arguments, out)
        results.append(out)
    assert len(results) > 1 and not results[0].isnan().any()
    assert all(torch.equal(results[0], x) for x in results)


def test_the_fastest_configuration_is_timed_once_and_not_in_a_capture(monkeypatch) -> None:
    from rlhf_fast.kernels import alignment, tuning

    timed, capturing = [], [True]
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(triton.testing, "do_bench", lambda call: call())
    configs = [triton.Config({"BYTES": size}) for size in (3, 1, 2)]

    def prepare():
        timed.append("prepared")
        return lambda config: timed.append(config) or config.kwargs["BYTES"]

    def chosen(kind: str, device: str = "cuda") -> triton.Config:
        return tuning.fastest(configs, kind, torch.device(device), prepare)

    assert chosen("a", "cpu") is configs[0] and chosen("a") is configs[0] and not timed
    capturing[0] = False
    assert chosen("a") is configs[1] and timed == ["prepared", *configs]
    capturing[0] = True
    assert chosen("a") is configs[1] and chosen("b") is configs[0] and len(timed) == 4
    capturing[0], room = False, [False]

    def full():
        if room[0]:
            return prepare()
        raise torch.OutOfMemoryError

    device = torch.device("cuda")
    assert tuning.fastest(configs, "c", device, full) is configs[0]
    room[0] = True  # it asks again
    assert tuning.fastest(configs, "c", device, full) is configs[1]
    rows = torch.zeros(2, 3, 7)
    logits, out, labels, ones, norm = tuning.scratch(rows, rows, torch.float32)
    assert logits.shape == (1, 6, 7) and norm.shape == (2, 1, 6)
    assert labels.shape == ones.shape == (1, 6) and out.data_ptr() == logits.data_ptr()
    logits, out, *_ = tuning.scratch(rows, rows.half(), torch.float32)
    assert out.dtype == torch.float16 and alignment.vector(logits, out) == 8


def test_an_unknown_label_gives_nan_and_reads_nothing() -> None:
    logits, labels = torch.zeros(1, 3, 5), torch.tensor([[5, -7, 4]])
    launcher = KERNELS["token_logprobs"].launcher
    logp, _, _ = launcher(logits, labels, 1.0, None, None, False, False)
    assert logp.isnan().tolist() == [[True, True, False]]


@triton.jit
def apply(x, out, FUNCTION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, FUNCTION(tl.load(x + i)))


@pytest.mark.parametrize("name", ["exp", "expm1", "expm1_minus_x", "log1p", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_keep_their_digits(name: str, dtype: torch.dtype) -> None:
    from rlhf_fast.kernels import exponentials

    generator = torch.Generator().manual_seed(0)
    size = 10 ** torch.empty(4096, dtype=torch.float64).uniform_(-6, 1.3, generator=generator)
    x = (size * torch.randn(4096, generator=generator).sign()).clamp(max=20)
    if name == "log1p":
        x = x.abs().clamp(max=1)
    if name == "expm1_minus_x" and dtype == torch.float64:
        x = x[x.abs() > 0.1].repeat(2)[:1024]  # nearer to 0 the oracle below has no digits left
    x = x.to(dtype)
    out = torch.empty_like(x)
    apply[(1,)](x, out, FUNCTION=getattr(exponentials, name), N=x.numel())
    exact = {
        "exp": torch.exp, "expm1": torch.expm1, "log1p": torch.log1p, "tanh": torch.tanh,
        "expm1_minus_x": lambda y: torch.where(
            y.abs() < 1e-3, y * y / 2 * (1 + y / 3 * (1 + y / 4)), torch.expm1(y) - y
        ),
    }[name](x.double())  # fmt: skip
    error = ((out.double() - exact) / exact).abs().max()
    assert error < (4e-7 if dtype == torch.float32 else 1e-13), float(error)
