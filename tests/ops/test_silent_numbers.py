"""Kinds of input that give a wrong number without a word, in every op that has them.

Masks of other bytes than 0 and 1, statistics far from 0, coefficients of 0 beside an infinity,
options that float32 cannot hold, log-ratios beyond 20 nats, float64 under autocast, rows that left
a loss.

The C++ kernels and the plain fallbacks alike; the Triton kernels in triton_interpreter.py.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast as rf
from rlhf_fast.ops.registry import KERNELS, OPS

INF = math.inf


class Fallbacks(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_fast":
            with self:
                return KERNELS[func._schema.name.split("::")[1]].fallback(*args)
        return func(*args, **(kwargs or {}))


both = pytest.mark.parametrize("kernels", [contextlib.nullcontext, Fallbacks])
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def sample_of(name: str, *needed: str) -> dict:
    for sample in OPS[name].samples(torch.Generator().manual_seed(0)):
        x = sample.arguments
        if all(isinstance(x.get(n), Tensor) and x[n].numel() > 8 for n in needed):
            return dict(x)
    raise LookupError(f"{name} has no sample with {needed}")


# ------------------------------------------------------------------------------- bytes of a mask

MASKED = [
    (name, argument)
    for name, op in OPS.items()
    for argument in ("mask", "dones")
    if argument in inspect.signature(op.function).parameters
]


@pytest.mark.parametrize("name, argument", MASKED)
def test_any_byte_but_0_is_true(name, argument):
    x = sample_of(name, argument)
    bits = x[argument].to(torch.uint8)
    odd = bits * torch.tensor([1, 2, 255, 4, 7, 64, 3]).to(torch.uint8).repeat(
        bits.numel() // 7 + 1
    )[: bits.numel()].view(bits.shape)
    results = []
    for mask in (bits.view(torch.bool), odd.view(torch.bool)):
        result = OPS[name].function(**{**x, argument: mask})
        outputs = result if isinstance(result, tuple) else (result,)
        results.append([t for o in outputs for t in (o if isinstance(o, tuple) else (o,))])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


# --------------------------------------------------------------------- statistics far from zero


@both
@pytest.mark.parametrize("level, spread", [(0.0, 1.0), (1e3, 0.01), (1e4, 0.1), (1e5, 1.0)])
def test_a_variance_keeps_its_digits(kernels, level, spread):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 700, generator=g) > 0.2
    returns = level + spread * torch.randn(8, 700, generator=g)
    values = returns + spread / 2 * torch.randn(8, 700, generator=g)
    with kernels():
        stats = rf.value_loss(values, None, returns, mask, clip=None)[1]
        white = rf.masked_whiten(returns, mask)
    R, E = returns.double()[mask], (returns.double() - values.double())[mask]
    assert stats.return_var.item() == pytest.approx(R.var(correction=0).item(), rel=1e-3)
    explained = 1 - E.var(correction=0) / R.var(correction=0)
    assert stats.explained_var.item() == pytest.approx(explained.item(), abs=1e-3)
    assert white[mask].double().var().item() == pytest.approx(1, rel=1e-2)


@both
@pytest.mark.parametrize("middle, spread", [(0.0, 1e-3), (9.0, 1e-5), (-3.0, 1e-4)])
def test_the_ratios_variance_keeps_its_digits(kernels, middle, spread):
    g = torch.Generator().manual_seed(0)
    logp = middle + spread * torch.randn(8, 700, generator=g)
    mask, zero = torch.rand(8, 700, generator=g) > 0.2, torch.zeros(8, 700)
    with kernels():
        stats = rf.policy_loss(logp, zero, zero, mask)[1]
    ratio = logp.double().exp()[mask]
    assert stats.ratio_var.item() == pytest.approx(ratio.var(correction=0).item(), rel=2e-3)
    assert stats.ratio_mean.item() == pytest.approx(ratio.mean().item(), rel=1e-6)
    assert stats.tokens == mask.sum()


@both
@either_dtype
@pytest.mark.parametrize("level", [0.1, -7e4, 0.0])
def test_constant_returns_explain_nothing(kernels, dtype, level):
    """In 0.1 a mean of equal numbers need not be that number."""
    returns = torch.full((8, 700), level, dtype=dtype)
    values = torch.randn(8, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(8, 700, dtype=torch.bool)
    with kernels():
        stats = rf.value_loss(values, None, returns, mask, clip=None)[1]
        assert stats.explained_var == 0
        returns[0, 0] += 1.0 + abs(level)  # one that differs is no rounding
        stats = rf.value_loss(values, None, returns, mask, clip=None)[1]
    E, R = (returns - values).double(), returns.double()
    right = 1 - E.var(correction=0) / R.var(correction=0)
    assert stats.explained_var.item() == pytest.approx(right.item(), rel=1e-3, abs=1e-6)


@either_dtype
@pytest.mark.parametrize("size", [1e-23, 1.0, 1e20])
def test_scores_of_any_size_have_the_same_advantages(dtype, size):
    """Squares of the small ones are 0 in float32, those of the large ones infinite."""
    scores = torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=dtype)
    right = rf.group_advantages(scores, 4, eps=0.0)
    assert right.tolist() == pytest.approx([-0.783, 1.306, 0.261, -0.783], abs=1e-3)
    assert rf.group_advantages(scores * size, 4, eps=0.0).tolist() == pytest.approx(right.tolist())


# ------------------------------------------------------------------------- 0 times an infinity


def one(*numbers: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([numbers], dtype=dtype, requires_grad=True)


ALL = torch.ones(1, 2, dtype=torch.bool)
A = torch.tensor([[0.0, 1.0]])


def loss_of_policy(**options):
    logp = one(-INF, -1.0)
    return rf.policy_loss(logp, torch.full((1, 2), -1.0), A, ALL, **options)[0], logp


def loss_of_values(**options):
    values = one(INF, 1.0)
    return rf.value_loss(values, None, torch.zeros(1, 2), ALL, clip=None, **options)[0], values


def loss_of_pairs(chosen, rejected):
    chosen = one(*chosen)
    return rf.pairwise_loss(chosen, torch.tensor([rejected]), center_coef=0.0)[0], chosen


def kl_of_masked(estimator):
    logp = one(-INF, -1.0)
    kl = rf.token_kl(logp, torch.full((1, 2), -2.0), estimator)
    return torch.where(torch.tensor([[False, True]]), kl, 0.0).sum(), logp


INFINITE = {
    "reinforce, advantage 0": lambda: loss_of_policy(loss="reinforce"),
    "cispo, advantage 0": lambda: loss_of_policy(loss="cispo"),
    "weight 0": lambda: loss_of_policy(loss="reinforce", importance_weights=A),
    "entropy_coef 0": lambda: loss_of_policy(entropy=torch.tensor([[INF, 1.0]])),
    "kl_coef 0": lambda: loss_of_policy(ref_logp=-torch.ones(1, 2), kl_estimator="k2"),
    "normalizer 0, KL": lambda: loss_of_policy(
        ref_logp=-torch.ones(1, 2), kl_coef=1.0, kl_estimator="k2", normalizer=torch.tensor(0.0)
    ),
    "normalizer 0, values": lambda: loss_of_values(normalizer=torch.tensor(0.0)),
    "center_coef 0, chosen": lambda: loss_of_pairs((INF, 1.0), (0.0, 0.0)),
    "center_coef 0, rejected": lambda: loss_of_pairs((2.0, 1.0), (-INF, 0.0)),
    **{f"{e} of a masked token": lambda e=e: kl_of_masked(e) for e in ("k1", "k2", "k3", "abs")},
}


@both
@pytest.mark.parametrize("name", INFINITE)
def test_a_coefficient_of_0_beside_an_infinity(kernels, name):
    with kernels():
        loss, x = INFINITE[name]()
        (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and gradient.isfinite().all()
    if name.startswith("normalizer 0"):
        assert loss == 0 and not gradient.any()


@both
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_no_penalty_on_an_impossible_token(kernels, estimator):
    logp, ref = torch.full((1, 3), -1.0), torch.tensor([[-1.0, -INF, -2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    with kernels():
        rewards = rf.kl_penalized_rewards(
            torch.ones(1), logp, ref, mask, beta=0.0, estimator=estimator
        )
    assert rewards.tolist() == [[0.0, 0.0, 1.0]]


@both
@pytest.mark.parametrize("dones", [None, torch.zeros(1, 3, dtype=torch.bool)])
@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 0.0, "lam": 0.0}, {"lam": 0.0}])
def test_what_gamma_or_lam_of_0_cuts_off_may_be_infinite(kernels, dones, options):
    """gamma 0: an advantage is r − V of its own step; lam 0: of the next value only."""
    rewards, values = torch.tensor([[1.0, 2.0, INF]]), torch.tensor([[0.5, 0.25, 0.5]])
    with kernels():
        advantages, _ = rf.gae(rewards, values, dones=dones, **options)
        if not options.get("gamma", 1.0):
            values[0, 2] = INF
            rewards[0, 2] = 0.0
            again, _ = rf.gae(
                rewards, values, dones=dones, bootstrap=torch.tensor([INF]), **options
            )
            assert again.tolist() == [[0.5, 1.75, -INF]]
    right = [0.5, 1.75] if "gamma" in options else [0.75, 2.25]
    assert advantages.tolist() == [[*right, INF]]


# ----------------------------------------------------------- options that float32 cannot hold

OPTIONS = [
    (name, option)
    for name, op in OPS.items()
    for option in inspect.signature(op.function).parameters
    if option
    in {
        "clip_low", "clip_high", "dual_clip", "entropy_coef", "kl_coef", "normalizer", "beta",
        "clip", "gamma", "lam", "center_coef", "eps", "temperature", "softcap", "lora",
    }
]  # fmt: skip


def numbers_for(option: str) -> list[float]:
    if option in ("clip_low", "gamma", "lam"):  # at most 1
        return [1e-46, 1e-40]
    return [1e40] if option == "dual_clip" else [1e-46, 1e-40, 1e40]


def with_option(name: str, option: str, x: float, dtype: torch.dtype) -> dict:
    arguments = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in sample_of(name).items()
    }
    if option == "lora":
        V, H = arguments["weight"].shape
        return arguments | {"lora": (torch.zeros(2, H).to(dtype), torch.zeros(V, 2).to(dtype), x)}
    if option == "kl_coef":
        arguments["ref_logp"] = arguments["old_logp"]
    if option == "entropy_coef" and "entropy" in inspect.signature(OPS[name].function).parameters:
        arguments["entropy"] = arguments["old_logp"]
    return arguments | {option: x}


@pytest.mark.parametrize("name, option", OPTIONS)
def test_an_option_that_float32_cannot_hold_is_refused(name, option):
    for x in numbers_for(option):
        said = "lora's scale" if option == "lora" else option
        with pytest.raises(
            ValueError, match=f"{said} must be .* in float32, got {re.escape(str(x))}"
        ):
            OPS[name].function(**with_option(name, option, x, torch.float32))
        OPS[name].function(**with_option(name, option, x, torch.float64))  # holds it


@pytest.mark.parametrize(
    "name, option", [o for o in OPTIONS if o[1] in ("temperature", "normalizer")]
)
@pytest.mark.parametrize("x", [1e-46, 1e-40, 1e40])
def test_a_tensor_option_that_float32_cannot_hold_is_refused(name, option, x):
    arguments = with_option(name, option, x, torch.float32)
    shape = arguments["labels"].shape if option == "temperature" else ()
    arguments[option] = torch.full(shape, x, dtype=torch.float64)
    with pytest.raises(ValueError, match=option):
        OPS[name].function(**arguments)


@pytest.mark.parametrize("x", [10**400, -(10**400), INF, math.nan])
def test_no_number_at_all(x):
    with pytest.raises(ValueError, match="beta must be finite"):
        rf.kl_penalized_rewards(**{**sample_of("kl_penalized_rewards"), "beta": x})


# -------------------------------------------------------------------- beyond twenty nats


@both
@either_dtype
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
def test_k3_and_its_slope_near_0(kernels, dtype, size):
    """e^(−d) − 1 of a small d keeps no digit where the exponential is taken first."""
    d = (torch.linspace(-1, 1, 21, dtype=dtype) * size).requires_grad_()
    with kernels():
        kl = rf.token_kl(d, torch.zeros_like(d), "k3")
        kl.sum().backward()
    exact = d.detach().double()
    rounding = 4 * torch.finfo(dtype).eps * size
    torch.testing.assert_close(kl.double(), exact + torch.expm1(-exact), rtol=0, atol=rounding)
    torch.testing.assert_close(d.grad.double(), -torch.expm1(-exact), rtol=0, atol=rounding)


@both
@either_dtype
def test_k3_rises_with_the_gap_and_points_back(kernels, dtype):
    gaps = [0.0, -1e-3, -1.0, -19.0, -19.99, -20.0, -20.01, -25.0, -1e3, -1e9, -INF]
    d = torch.tensor(gaps, dtype=dtype, requires_grad=True)
    with kernels():
        kl = rf.token_kl(d, torch.zeros_like(d), "k3")
        (slope,) = torch.autograd.grad(kl.sum(), d)
        other = -d.detach()
        up = rf.token_kl(other, torch.zeros_like(other), "k3")
    assert (kl.diff() > 0).all() and (slope.diff() <= 0).all() and (slope <= 0).all()
    assert (up.diff() > 0).all() and up[-1] == INF and kl[0] == 0
    assert up[5].item() == pytest.approx(math.expm1(-20) + 20, rel=1e-6)


@both
@pytest.mark.parametrize("gap", [-19.0, -21.0, -100.0, -1e9])
def test_a_kl_term_pulls_back_from_any_distance(kernels, gap):
    logp = one(gap)
    options = {"ref_logp": torch.zeros(1, 1), "kl_coef": 1.0, "kl_estimator": "k3"}
    with kernels():
        loss, stats = rf.policy_loss(logp, logp.detach(), torch.zeros(1, 1), ALL[:, :1], **options)
        (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient < -1 and stats.ref_kl >= 0


@both
def test_statistics_are_of_the_log_ratio_as_it_is(kernels):
    """The clamp at 20 nats is for the exponential: a policy that ran away must not look tame."""
    old = torch.tensor([[-200.0, -1.0, -101.0, -2.0]])
    logp = torch.tensor([[-100.0, -1.5, -1.0, -22.0]])
    mask = torch.tensor([[True, True, False, True]])
    with kernels():
        stats = rf.policy_loss(logp, old, torch.ones(1, 4), mask)[1]
        impossible = rf.policy_loss(one(-INF, -1.0), -torch.ones(1, 2), A, ALL)[1]
    d = [100.0, -0.5, -20.0]
    e20 = math.exp(20)
    k3 = [e20 - 21 + 80 * (e20 - 1), math.exp(-0.5) - 0.5, math.exp(-20) + 19]
    assert stats.old_kl_k1.item() == pytest.approx(-sum(d) / 3)
    assert stats.old_kl_k2.item() == pytest.approx(sum(x * x / 2 for x in d) / 3)
    assert stats.old_kl_k3.item() == pytest.approx(sum(k3) / 3)
    assert impossible.old_kl_k1 == impossible.old_kl_k2 == impossible.old_kl_k3 == INF


# ------------------------------------------------------------------------------- autocast

FLOAT64_UNDER_AUTOCAST = ("linear_token_logprobs", "linear_policy_loss", "linear_token_kl")


@pytest.mark.parametrize("name", FLOAT64_UNDER_AUTOCAST)
def test_autocast_leaves_float64_alone(name):
    def double(x):
        if isinstance(x, tuple):
            return tuple(map(double, x))
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    for sample in OPS[name].samples(torch.Generator().manual_seed(0)):
        x = {k: double(v) for k, v in sample.arguments.items()}
        plain = OPS[name].function(**x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = OPS[name].function(**x)
        torch.testing.assert_close(cast, plain, rtol=0, atol=0, equal_nan=True)


def test_under_autocast_float64_and_float32_do_not_mix():
    x = sample_of("linear_token_kl")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="dtype of hidden"):
        rf.linear_token_kl(**{**x, "ref_hidden": x["ref_hidden"].double()})


# ------------------------------------------------------------- statistics of what stayed


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_parts_weighed_by_their_tokens_are_the_whole(micro):
    """Rows of no advantage leave a part, other ones in each: its mask's count is not the weight."""
    x = sample_of("linear_policy_loss")
    x["advantages"][0] = 0.0
    x["advantages"][1, 2:] = 0.0
    whole = rf.linear_policy_loss(**x)[1]
    totals = torch.zeros(len(whole))
    rows = torch.arange(len(x["labels"]))
    for part in rows.split(micro):
        cut = {
            k: v[part] if isinstance(v, Tensor) and v.shape[:1] == rows.shape and k != "weight"
            else v
            for k, v in x.items()
        }  # fmt: skip
        stats = rf.linear_policy_loss(**cut)[1]
        totals += stats.tokens * torch.stack(stats)
    stayed = (x["mask"] & (x["advantages"] != 0)).sum()
    assert whole.tokens == stayed < x["mask"].sum()
    for name in ("entropy", "ratio_mean", "old_kl_k2", "clipfrac"):
        i = whole._fields.index(name)
        torch.testing.assert_close(totals[i] / stayed, whole[i])


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl"])
@pytest.mark.parametrize("most", [None, 3, 65])
def test_a_row_that_the_loss_leaves_out_may_be_anything(most: int | None, op: str) -> None:
    """With a set made token by token, with one that goes through a chunk, with none."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(65, 8, generator=generator)
    labels = torch.randint(65, (6,), generator=generator)
    sets = None if most is None else (labels[:, None] + torch.arange(most)) % 65
    found = []
    for kept in (slice(0, 6), slice(0, 5)):
        given = hidden.clone()
        given[5] = math.nan
        leaves = [given[kept].requires_grad_(), weight.clone().requires_grad_()]
        one = (*leaves, labels[kept])
        those = {} if sets is None else {"support": sets[kept]}
        if op == "linear_token_kl":
            logp, _, more = rf.linear_token_kl(*one, leaves[0].detach().flip(-1), **those)
        else:
            logp, more = rf.linear_token_logprobs(*one, entropy=True, **those)
        found.append(torch.autograd.grad((logp + 0.1 * more)[:5].sum(), leaves))
    assert (found[0][0][5] == 0).all()
    torch.testing.assert_close(found[0][0][:5], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
