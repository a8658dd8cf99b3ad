"""Numbers worked out by hand or by another route: what the references themselves must satisfy."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from drawing import Fallbacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical

import rlhf_fast as rf
from rlhf_fast.ops import aggregate


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_token_logprobs_is_the_categorical_distribution() -> None:
    logits, labels = torch.randn(4, 7, 33), torch.randint(33, (4, 7))
    logp, entropy = rf.token_logprobs(logits, labels, temperature=0.7, entropy=True)
    oracle = Categorical(logits=logits / 0.7)
    torch.testing.assert_close(logp, oracle.log_prob(labels))
    torch.testing.assert_close(entropy, oracle.entropy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_temperatures_may_have_a_dtype_of_their_own(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 33), torch.randint(33, (2,))
    ours = rf.token_logprobs(logits, labels, temperature=torch.tensor([0.5, 1.5], dtype=dtype))
    plain = rf.token_logprobs(logits, labels, temperature=torch.tensor([0.5, 1.5]))
    assert ours.dtype == torch.float32 and torch.equal(ours, plain)


def test_uniform_entropy_is_log_v() -> None:
    _, entropy = rf.token_logprobs(torch.zeros(1, 50257), torch.tensor([3]), entropy=True)
    assert entropy.item() == pytest.approx(math.log(50257), abs=1e-5)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    advantages, returns = rf.gae(rewards, values, ones(1, 3), gamma=0.5, lam=0.5)
    a2 = 2.0 - 1.5
    a1 = 0.0 + 0.5 * 1.5 - 1.0 + 0.25 * a2
    a0 = 1.0 + 0.5 * 1.0 - 0.5 + 0.25 * a1
    torch.testing.assert_close(advantages, torch.tensor([[a0, a1, a2]]))
    torch.testing.assert_close(returns, advantages + values)


def test_gae_limits_are_td_and_monte_carlo() -> None:
    rewards, values = torch.randn(3, 20).double(), torch.randn(3, 20).double()
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    td, _ = rf.gae(rewards, values, gamma=0.9, lam=0.0)
    torch.testing.assert_close(td, rewards + 0.9 * following - values)
    _, returns = rf.gae(rewards, values, gamma=0.9, lam=1.0)
    powers = 0.9 ** torch.arange(20).double()
    to_go = torch.stack([(rewards[:, t:] * powers[: 20 - t]).sum(1) for t in range(20)], 1)
    torch.testing.assert_close(returns, to_go)


def test_a_nan_spoils_its_own_episode_and_not_the_one_before() -> None:
    rewards, values = torch.randn(2, 40), torch.randn(2, 40)
    dones = torch.zeros(2, 40, dtype=torch.bool)
    dones[:, 17] = True
    clean, _ = rf.gae(rewards, values, dones=dones)
    rewards[:, 30] = math.nan
    spoilt, _ = rf.gae(rewards, values, dones=dones)
    assert spoilt[:, 18:31].isnan().all()
    torch.testing.assert_close(spoilt[:, :18], clean[:, :18], rtol=0, atol=0)
    torch.testing.assert_close(spoilt[:, 31:], clean[:, 31:], rtol=0, atol=0)


def test_gae_holes() -> None:
    """skip: as if the hole were cut out; zero: a step of its own."""
    rewards, values = torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[0.5, 9.0, 1.5]])
    mask = torch.tensor([[True, False, True]])
    cut = [0, 2]
    joined, _ = rf.gae(rewards[:, cut], values[:, cut], gamma=0.5, lam=0.5)
    skipped, _ = rf.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(skipped[:, cut], joined)
    zeroed, _ = rf.gae(rewards, values, mask, gamma=0.5, lam=0.5, holes="zero")
    kept = rf.gae(rewards * mask, values * mask, gamma=0.5, lam=0.5)[0]
    torch.testing.assert_close(zeroed[:, cut], kept[:, cut])
    assert skipped[0, 1] == zeroed[0, 1] == 0


@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_gae_packed_is_gae_padded_bit_for_bit(holes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 0, 40, 1, 16])
    real = torch.arange(40) < lengths[:, None]
    rewards, values = torch.randn(2, 5, 40, generator=generator)
    mask = real & (torch.rand(5, 40, generator=generator) < 0.7)
    dones = torch.rand(5, 40, generator=generator) < 0.1
    bootstrap = torch.randn(5, generator=generator)
    options = {"gamma": 0.9, "lam": 0.8, "holes": holes}
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    ours = rf.gae_packed(
        rewards[real], values[real], cu_seqlens, mask=mask[real], dones=dones[real],
        bootstrap=bootstrap, **options,
    )  # fmt: skip
    for b, n in enumerate(lengths.tolist()):
        alone = rf.gae(rewards[b, :n], values[b, :n], mask[b, :n], dones=dones[b, :n],
                       bootstrap=bootstrap[b], **options)  # fmt: skip
        for got, want in zip(ours, alone, strict=True):
            assert torch.equal(got[cu_seqlens[b] : cu_seqlens[b + 1]], want)
    if holes == "skip":  # padding on the right is then a hole like any other
        whole = rf.gae(rewards, values, mask, dones=dones & real, bootstrap=bootstrap, **options)
        for got, want in zip(ours, whole, strict=True):
            assert torch.equal(got, want[real])


def test_group_advantages_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 0.9, 0.9, 0.9])  # 0.9 is not the rounded mean of three
    std = math.sqrt((4 + 1 + 9) / 2)
    expected = {
        "grpo": [-2 / (std + 0.5), -1 / (std + 0.5), 3 / (std + 0.5)],
        "rloo": [1 - 4, 2 - 3.5, 6 - 1.5],
        "dr_grpo": [-2, -1, 3],
        "opo": [1 - 3.2, 2 - 3.2, 6 - 3.2],  # (2·1 + 1·2 + 2·6) / 5
    }
    lengths = torch.tensor([2, 1, 2, 7, 1, 4])
    for method, numbers in expected.items():
        more = {"lengths": lengths} if method == "opo" else {}
        ours = rf.group_advantages(scores, 3, method=method, eps=0.5, **more)
        torch.testing.assert_close(ours[:3], torch.tensor(numbers).float())
        assert (ours[3:] == 0).all()


def test_rollout_correction_by_hand() -> None:
    """Two rows of ratios 2, 3 and 1/4, 1; what is masked is NaN."""
    s = torch.tensor([[2.0, 3.0, math.nan], [0.25, 1.0, math.nan]])
    mask = ~s.isnan()
    rollout = -torch.rand(2, 3)
    old = rollout + s.log()

    def correct(**options):
        weights, kept, stats = rf.rollout_correction(old, rollout, mask, **options)
        assert (weights[~kept] == 0).all()
        return weights[:, :2], kept, stats

    weights, kept, stats = correct(low=0.5, high=2.5)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 2.5], [0.5, 1.0]]))
    assert torch.equal(kept, mask) and stats.clipfrac == 0.5 and stats.rejectfrac == 0
    of_four = {
        "ratio_mean": 6.25 / 4, "ratio_max": 3.0, "tokens": 4.0,
        "effective_sample_size": 36 / (4 + 6.25 + 0.25 + 1),
        "kl_k3": (6.25 - 4 - math.log(2 * 3 / 4)) / 4,
    }  # fmt: skip
    for name, number in of_four.items():
        assert getattr(stats, name).item() == pytest.approx(number, rel=1e-6), name
    weights, kept, _ = correct(mode="mask", low=0.5, high=2.5)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(kept, mask)  # a weight of 0 still counts
    weights, _, stats = correct(level="sequence", high=5.0)
    torch.testing.assert_close(weights, torch.tensor([[5.0, 5.0], [0.25, 0.25]]))
    assert stats.ratio_mean.item() == pytest.approx((6 + 0.25) / 2) and stats.clipfrac == 0.5
    weights, _, _ = correct(level="geometric", high=None, batch_normalize=True)
    geometric = torch.tensor([6.0, 0.25]).sqrt()[:, None].expand(2, 2)
    torch.testing.assert_close(weights, geometric / geometric.mean())
    weights, kept, stats = correct(mode=None, reject="max_k1", reject_above=math.log(3.5))
    assert kept[:, :2].tolist() == [[True, True], [False, False]] and stats.rejectfrac == 0.5
    assert weights.tolist() == [[1, 1], [0, 0]] and stats.clipfrac == 0
    _, kept, _ = correct(veto=0.3)
    assert kept[:, :2].tolist() == [[True, True], [False, False]]
    old[0, 1] = -math.inf  # an impossible token is below any veto, also one of less than e^-20
    _, kept, _ = correct(veto=1e-10)
    assert kept[:, :2].tolist() == [[False, False], [True, True]]


def test_kl_penalized_rewards_score_sits_on_the_last_real_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    logp, ref = torch.full((3, 4), -1.0), torch.full((3, 4), -1.5)
    rewards = rf.kl_penalized_rewards(torch.tensor([5.0, 7.0, 9.0]), logp, ref, mask, beta=0.1)
    expected = torch.tensor([[-0.05, 4.95, 0, 0], [-0.05, -0.05, -0.05, 6.95], [0, 0, 0, 0]])
    torch.testing.assert_close(rewards, expected)


def test_kl_estimators_average_to_the_kl() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(20).double(), torch.randn(20).double()
    q = p + 0.3 * (q - p)
    exact = torch.distributions.kl_divergence(Categorical(logits=p), Categorical(logits=q))
    tokens = Categorical(logits=p).sample((400_000,))
    logp, ref = p.log_softmax(0)[tokens], q.log_softmax(0)[tokens]
    for estimator in ("k1", "k3"):
        assert rf.token_kl(logp, ref, estimator).mean() == pytest.approx(exact.item(), rel=0.03)


TOKENS = torch.tensor([[0.25, 0.75]]).log()  # a policy over two tokens, and its reference
REF_TOKENS = torch.tensor([[0.5, 0.5]]).log()


@pytest.mark.parametrize(
    ("direction", "by_hand"),
    [
        ("reverse", 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
        ("forward", 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
    ],
)
def test_linear_token_kl_of_two_tokens_by_hand(direction: str, by_hand: float) -> None:
    """With the identity as both heads the hidden states are the logits."""
    hidden, head = TOKENS.clone().requires_grad_(), torch.eye(2)
    logp, ref_logp, kl = rf.linear_token_kl(
        hidden, head, torch.tensor([1]), REF_TOKENS, head, direction=direction
    )
    assert logp.item() == pytest.approx(math.log(0.75))
    assert ref_logp.item() == pytest.approx(math.log(0.5)) and not ref_logp.requires_grad
    assert kl.item() == pytest.approx(by_hand)
    kl.backward()
    if direction == "reverse":
        slope = 0.25 * (math.log(0.25 / 0.5) - by_hand)
    else:
        slope = 0.25 - 0.5
    torch.testing.assert_close(hidden.grad, torch.tensor([[slope, -slope]]))


def heads(rows: int = 33, width: int = 16, vocab: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(rows, width, generator=generator),
        "weight": torch.randn(vocab, width, generator=generator),
        "labels": torch.randint(vocab, (rows,), generator=generator),
        "ref_hidden": torch.randn(rows, width, generator=generator),
        "ref_weight": torch.randn(vocab, width, generator=generator),
    }


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_linear_token_kl_to_itself_is_0_and_at_its_least(direction: str) -> None:
    x = heads()
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    logp, ref_logp, kl = rf.linear_token_kl(
        hidden, weight, x["labels"], hidden, direction=direction
    )
    assert torch.equal(logp, ref_logp) and kl.abs().max() < 1e-6
    kl.sum().backward()
    assert hidden.grad.abs().max() < 1e-5 and weight.grad.abs().max() < 1e-5


def test_linear_token_kl_is_the_one_of_the_categorical_distributions() -> None:
    x = heads()
    policy = Categorical(logits=(x["hidden"] @ x["weight"].t()).double() / 0.7)
    ref = Categorical(logits=(x["ref_hidden"] @ x["ref_weight"].t()).double() / 0.7)
    for direction, a, b in (("reverse", policy, ref), ("forward", ref, policy)):
        logp, ref_logp, kl = rf.linear_token_kl(**x, direction=direction, temperature=0.7)
        exact = torch.distributions.kl_divergence(a, b)
        torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            logp.double(), policy.log_prob(x["labels"]), rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close(
            ref_logp.double(), ref.log_prob(x["labels"]), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_linear_token_kl_is_what_k1_estimates(direction: str) -> None:
    """k1 of tokens that the first distribution of the KL samples."""
    x = heads(rows=1, vocab=20)
    x["ref_hidden"], x["ref_weight"] = x["hidden"] + 0.2 * x["ref_hidden"], x["weight"]
    whose = "hidden" if direction == "reverse" else "ref_hidden"
    sampled = Categorical(logits=x[whose] @ x["weight"].t()).sample((200_000,))[:, 0]
    _, _, kl = rf.linear_token_kl(**x, direction=direction)
    p, q = ((x[name] @ x["weight"].t()).log_softmax(-1)[0] for name in ("hidden", "ref_hidden"))
    k1 = rf.token_kl(p[sampled], q[sampled], "k1") * (1 if direction == "reverse" else -1)
    assert k1.mean() == pytest.approx(kl.item(), rel=0.05)


@pytest.mark.parametrize("kernels", [contextlib.nullcontext, Fallbacks])
def test_linear_token_kl_where_a_probability_is_0(kernels) -> None:
    """p = 0 adds nothing to KL(p || q); q = 0 where p > 0 makes it infinite, and harms no one who
    does not use it."""
    inf, eye = math.inf, torch.eye(3)
    hidden = torch.zeros(2, 3, requires_grad=True)
    bias, ref_bias = torch.tensor([0.0, 0.0, -inf]), torch.tensor([0.0, -inf, 0.0])
    labels, zero = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)

    def kl(bias: torch.Tensor, ref_bias: torch.Tensor, direction: str) -> tuple[torch.Tensor, ...]:
        with kernels():
            return rf.linear_token_kl(hidden, eye, labels, zero, eye, direction=direction,
                                      bias=bias, ref_bias=ref_bias)  # fmt: skip

    for direction in ("reverse", "forward"):
        assert kl(bias, ref_bias, direction)[2].tolist() == [inf, inf]
    narrow, wide = bias, torch.zeros(3)
    assert kl(narrow, wide, "reverse")[2].tolist() == pytest.approx([math.log(1.5)] * 2)
    assert kl(wide, narrow, "forward")[2].tolist() == pytest.approx([math.log(1.5)] * 2)
    assert kl(wide, narrow, "reverse")[2].tolist() == [inf, inf]
    assert kl(narrow, wide, "forward")[2].tolist() == [inf, inf]

    logp, _, infinite = kl(wide, narrow, "reverse")
    unused = torch.where(torch.tensor([False, False]), infinite, 0.0)
    with kernels():
        (grad,) = torch.autograd.grad((logp + unused).sum(), hidden)
    torch.testing.assert_close(grad, torch.tensor([[2.0, -1.0, -1.0]] * 2) / 3)


def test_policy_loss_at_ratio_one_is_the_policy_gradient() -> None:
    logp = torch.randn(4, 9, requires_grad=True)
    advantages, mask = torch.randn(4, 9), torch.rand(4, 9) > 0.3
    loss, stats = rf.policy_loss(logp, logp.detach(), advantages, mask)
    loss.backward()
    torch.testing.assert_close(logp.grad, -advantages * mask / mask.sum())
    assert stats.clipfrac == 0 and stats.ratio_mean == pytest.approx(1.0)
    assert stats.old_kl_k3 == 0 and stats.ratio_var == 0


def test_policy_loss_clips_only_where_it_would_gain() -> None:
    """A ratio of 2 is clipped for a good action and not for a bad one; a ratio of 1/2 inversely."""
    logp = torch.tensor([[2.0, 2.0, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, stats = rf.policy_loss(logp, torch.zeros(1, 4), advantages, ones(1, 4))
    assert loss.item() == pytest.approx((-1.2 + 2.0 - 0.5 + 0.8) / 4)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, 2.0, -0.5, 0.0]]) / 4)
    assert stats.clipfrac == 0.5 and stats.clipfrac_low == stats.clipfrac_high == 0.25


def test_sequence_ratio_by_hand() -> None:
    """Ratios 2 and 8 have the geometric mean 4; the masked third token has no say."""
    logp = torch.tensor([[2.0, 8.0, 5.0]]).log().requires_grad_()
    mask, advantages = torch.tensor([[True, True, False]]), torch.tensor([[1.0, -1.0, 1.0]])
    loss, stats = rf.policy_loss(logp, torch.zeros(1, 3), advantages, mask, ratio="sequence")
    assert loss.item() == pytest.approx((-1.2 + 4.0) / 2)
    loss.backward()  # only the second surrogate flows, 4 s' = 4 (1/2, 1/2, 0) by the logp
    torch.testing.assert_close(logp.grad, torch.tensor([[1.0, 1.0, 0.0]]))
    assert stats.ratio_mean == stats.ratio_max == pytest.approx(4)
    assert stats.ratio_var == pytest.approx(0, abs=1e-6)
    assert stats.clipfrac == stats.clipfrac_high == 0.5 and stats.clipfrac_low == 0
    log2, log8 = math.log(2), math.log(8)
    assert stats.old_kl_k1 == pytest.approx(-(log2 + log8) / 2)  # these stay by token
    assert stats.old_kl_k2 == pytest.approx((log2**2 + log8**2) / 4)
    assert stats.old_kl_k3 == pytest.approx((2 - 1 - log2 + 8 - 1 - log8) / 2)


def test_the_old_kl_of_a_sequence_ratio_is_that_of_its_tokens() -> None:
    """Log-ratios −60 and 0, as they are; their mean −30, or −20, has no part in it."""
    logp = torch.tensor([[-60.0, 0.0]])
    _, stats = rf.policy_loss(
        logp, torch.zeros(1, 2), torch.ones(1, 2), ones(1, 2), ratio="sequence"
    )
    assert stats.old_kl_k1 == (60 + 0) / 2
    assert stats.old_kl_k2 == (60**2 / 2 + 0) / 2
    assert stats.old_kl_k3 == pytest.approx((60 - 1 + 0) / 2)


@pytest.mark.parametrize("aggregation", aggregate.AGGREGATIONS)
def test_sequence_ratio_is_gspo_token_where_advantages_are_the_sequences(aggregation: str) -> None:
    """GSPO-token (arXiv:2507.18071, eq. 13-14) has sg(s_b) exp(logp_t − sg(logp_t)) for s_b."""
    old, mask = -torch.rand(5, 9).double(), torch.rand(5, 9) > 0.3
    logp = (old + 0.4 * torch.randn(5, 9)).requires_grad_()
    A = torch.randn(5, 1).double().expand(5, 9)
    ours, _ = rf.policy_loss(logp, old, A, mask, ratio="sequence", aggregation=aggregation)
    mean = ((logp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    s = mean.exp().detach() * (logp - logp.detach()).exp()
    surrogate = -torch.minimum(s * A, s.clamp(0.8, 1.2) * A)
    want = aggregate.reference(surrogate, mask, aggregation, None)
    torch.testing.assert_close(ours, want)
    (got,) = torch.autograd.grad(ours, logp)
    torch.testing.assert_close(got, torch.autograd.grad(want, logp)[0])
    assert got[mask].abs().max() > 0


def test_cispo_by_hand() -> None:
    logp = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    old = logp.detach() - torch.tensor([[2.0, 0.5]]).log()
    advantages = torch.tensor([[3.0, -1.0]])

    def cispo(**clip: float):
        loss, stats = rf.policy_loss(logp, old, advantages, ones(1, 2), loss="cispo", **clip)
        return loss.item(), torch.autograd.grad(loss, logp)[0], stats

    loss, gradient, stats = cispo(clip_low=0.2, clip_high=0.3)  # weights 1.3 and 0.8
    assert loss == pytest.approx((1.3 * 3 * 1 - 0.8 * 3) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-1.3 * 3, 0.8]]) / 2)
    assert stats.clipfrac == 1 and stats.clipfrac_low == stats.clipfrac_high == 0.5
    loss, gradient, stats = cispo(clip_low=1.0, clip_high=-0.5)  # TRL with epsilon_high = 0.5
    torch.testing.assert_close(gradient, torch.tensor([[-0.5 * 3, 0.5]]) / 2)
    assert stats.clipfrac == stats.clipfrac_high == 0.5 and stats.clipfrac_low == 0
    loss, stats = rf.policy_loss(
        logp, old, advantages, ones(1, 2), loss="cispo", ratio="sequence", clip_high=0.3
    )  # both weights are sqrt(2 · 0.5) = 1
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.tensor([[-1.5, 0.5]]))
    assert stats.clipfrac == 0


def test_importance_weights_by_their_old_name() -> None:
    x = torch.tensor([[-1.0, -3.0]])
    hidden, head = torch.eye(2)[None], torch.arange(10.0).view(5, 2)
    labels = torch.tensor([[1, 4]])
    for loss, inputs in ((rf.policy_loss, (x,)), (rf.linear_policy_loss, (hidden, head, labels))):
        found = loss(*inputs, x, x, ones(1, 2), importance_weights=-x)
        with pytest.warns(DeprecationWarning, match="weights is now importance_weights"):
            assert loss(*inputs, x, x, ones(1, 2), weights=-x)[0] == found[0]


@pytest.mark.parametrize(("delta", "slopes"), [(3.0, (2.0, 0.0)), (1.5, (0.0, 0.0))])
def test_delta_by_hand(delta: float, slopes: tuple[float, float]) -> None:
    """Ratios 2 and 4 of bad actions, which the clip lets pass; ratio 1.1 of a good one."""
    logp = torch.tensor([[2.0, 4.0, 1.1]]).log().requires_grad_()
    A = torch.tensor([[-1.0, -1.0, 1.0]])
    loss, stats = rf.policy_loss(logp, torch.zeros(1, 3), A, ones(1, 3), delta=delta)
    assert loss.item() == pytest.approx((min(2, delta) + min(4, delta) - 1.1) / 3)
    want = torch.tensor([[*slopes, -1.1]]) / 3
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], want)
    assert stats.dual_clipfrac == pytest.approx(slopes.count(0) / 3) and stats.clipfrac == 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_has_the_gradient_of_the_kl_under_the_old_policys_tokens(estimator) -> None:
    z, old_z, ref_z = torch.randn(3, 7).double()
    z.requires_grad_()
    logp, old, ref = (x.log_softmax(-1) for x in (z, old_z, ref_z))
    (want,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), z, retain_graph=True)

    def expected(**options: bool) -> torch.Tensor:
        """The gradient of the KL term, of every token by its probability under the old policy."""
        x = logp.detach()[None].requires_grad_()
        zero, every = torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)
        loss, _ = rf.policy_loss(
            x, old[None], zero, every, ref_logp=ref[None], kl_coef=1.0, kl_estimator=estimator,
            aggregation="token-sum", **options,
        )  # fmt: skip
        (slope,) = torch.autograd.grad(loss, x)
        return torch.autograd.grad(logp, z, old.exp() * slope[0], retain_graph=True)[0]

    torch.testing.assert_close(expected(unbiased_kl=True), want)
    assert (expected() - want).abs().max() > 0.01


def test_reinforce_by_hand() -> None:
    logp = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    old = logp.detach() - torch.tensor([[2.0, 0.5]]).log()
    loss, stats = rf.policy_loss(
        logp, old, torch.tensor([[3.0, -1.0]]), ones(1, 2), loss="reinforce",
        importance_weights=torch.tensor([[1.0, 2.0]]),
    )  # fmt: skip
    assert loss.item() == pytest.approx((3 - 2 * 3) / 2)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.tensor([[-1.5, 1.0]]))
    assert stats.clipfrac == 0 and stats.ratio_mean == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [("token", "ppo"), ("sequence", "ppo"), ("token", "cispo"), ("sequence", "cispo"),
     ("token", "reinforce"), ("token", "sapo"), ("sequence", "gmpo"), ("sequence", "vespo"),
     ("token", "dppo_kl"), ("sequence_token", "ppo")],
)  # fmt: skip
@pytest.mark.parametrize("aggregation", aggregate.AGGREGATIONS)
def test_micro_batches_with_a_global_normalizer_add_up_to_the_batch(
    aggregation: str, ratio: str, kind: str
) -> None:
    logp, old = torch.randn(6, 9).double(), torch.randn(6, 9).double()
    advantages, mask = torch.randn(6, 9).double(), torch.rand(6, 9) > 0.4
    mask[1] = False
    counts = {"token-mean": mask.sum(), "token-sum": torch.tensor(100)}
    n = counts.get(aggregation, mask.any(1).sum()).double()

    def gradient(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        x = logp[rows].clone().requires_grad_()
        loss, _ = rf.policy_loss(
            x, old[rows], advantages[rows], mask[rows], aggregation=aggregation, normalizer=n,
            ratio=ratio, loss=kind,
        )  # fmt: skip
        return loss, torch.autograd.grad(loss, x)[0]

    whole = gradient(slice(0, 6))
    parts = [gradient(slice(i, i + 2)) for i in range(0, 6, 2)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0])
    torch.testing.assert_close(torch.cat([g for _, g in parts]), whole[1])
    if aggregation != "token-sum":
        own, _ = rf.policy_loss(
            logp, old, advantages, mask, aggregation=aggregation, ratio=ratio, loss=kind
        )
        torch.testing.assert_close(own, whole[0])


@pytest.mark.parametrize("aggregation", aggregate.AGGREGATIONS)
def test_micro_batches_of_the_value_loss_add_up_to_the_batch(aggregation: str) -> None:
    values, old, returns = torch.randn(3, 6, 9).double()
    mask = torch.rand(6, 9) > 0.4
    mask[1] = False
    counts = {"token-mean": mask.sum(), "token-sum": torch.tensor(100)}
    n = counts.get(aggregation, mask.any(1).sum())

    def gradient(rows: slice) -> torch.Tensor:
        x = values[rows].clone().requires_grad_()
        loss, _ = rf.value_loss(x, old[rows], returns[rows], mask[rows], aggregation=aggregation,
                                normalizer=n)  # fmt: skip
        return torch.cat([loss[None], torch.autograd.grad(loss, x)[0].flatten()])

    whole, parts = gradient(slice(0, 6)), [gradient(slice(i, i + 2)) for i in range(0, 6, 2)]
    torch.testing.assert_close(sum(x[0] for x in parts), whole[0])
    torch.testing.assert_close(torch.cat([x[1:] for x in parts]), whole[1:])


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss, stats = rf.value_loss(values, torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]]),
                                ones(1, 2), clip=0.5)  # fmt: skip
    # 1: not moved, error 1; 3: clipped to 1.5, error .25 against 1: the larger counts
    assert loss.item() == pytest.approx(0.5 * (1 + 1) / 2)
    assert stats.clipfrac == 0 and stats.return_var == 0 and stats.explained_var == 0
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.5, 0.5]]))


def test_pairwise_loss_is_ln_2_at_a_tie_and_positive_everywhere() -> None:
    tie, of_ties = rf.pairwise_loss(torch.zeros(3), torch.zeros(3))
    assert of_ties.accuracy == 0  # neither side is above the other
    assert tie.item() == pytest.approx(math.log(2))
    right, stats = rf.pairwise_loss(torch.tensor([9.0]), torch.tensor([-9.0]))
    wrong, _ = rf.pairwise_loss(torch.tensor([-200.0]), torch.tensor([200.0]))
    assert 0 < right < 1e-6 and wrong.item() == pytest.approx(400) and stats.accuracy == 1


def test_whitened_advantages_have_mean_0_and_unbiased_variance_1() -> None:
    values, mask = 1e3 + torch.randn(40, 50), torch.rand(40, 50) > 0.5
    white = rf.masked_whiten(values, mask)
    assert white[mask].mean().abs() < 1e-4 and white[mask].var() == pytest.approx(1, abs=1e-4)
    assert (white[~mask] == 0).all()
    kept = rf.masked_whiten(values, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(values[mask].mean().item(), abs=1e-2)


finite = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 40), st.floats(0.1, 4))
def test_token_logprobs_of_anything(data, rows: int, vocab: int, temperature: float) -> None:
    row = st.lists(finite | st.just(-math.inf), min_size=vocab, max_size=vocab)
    logits = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, vocab - 1), min_size=rows,
                                             max_size=rows)))  # fmt: skip
    logits[:, 0] = torch.where((logits == -math.inf).all(1), 0.0, logits[:, 0])
    logp, entropy = rf.token_logprobs(logits, labels, temperature=temperature, entropy=True)
    exact = Categorical(logits=logits.double() / temperature)
    # z itself is rounded to float32: what is left of it is good to some eps of the largest |z|
    finite_logits = logits[logits.isfinite()]
    scale = float(finite_logits.abs().max()) / temperature * torch.finfo(torch.float32).eps
    want = exact.logits.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), want, rtol=1e-6, atol=1e-5 + 8 * scale)
    log_p = exact.logits.masked_fill(exact.logits == -math.inf, 0)
    torch.testing.assert_close(
        entropy.double(), -(exact.probs * log_p).sum(1), rtol=1e-5, atol=1e-5 + 32 * scale
    )
    assert (entropy >= -1e-5).all() and not logp.isnan().any()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4), st.integers(0, 70), st.floats(0, 1), st.floats(0, 1), st.booleans(),
       st.integers(0, 2**31))  # fmt: skip
def test_gae_of_any_mask(b: int, t: int, gamma: float, lam: float, skip: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(b, t, generator=generator).double()
    values = torch.randn(b, t, generator=generator).double()
    mask = torch.rand(b, t, generator=generator) > 0.5
    dones = torch.rand(b, t, generator=generator) > 0.8
    options = {"gamma": gamma, "lam": lam, "dones": dones, "holes": "skip" if skip else "zero"}
    ours = rf.gae(rewards, values, mask, **options)
    from rlhf_fast.ops.gae import reference

    for got, want in zip(ours, reference(rewards, values, mask, **options), strict=True):
        torch.testing.assert_close(got, want)
