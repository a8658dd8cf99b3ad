"""From scores to advantages: exact numbers on a small batch."""

import pytest
import torch

from rlhf_fast.trainer.advantages import estimate, shaped
from rlhf_fast.trainer.batch import counts, minibatches, parts
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.held_out import hold_out
from rlhf_fast.trainer.data.rows import Prompt, pad
from rlhf_fast.trainer.measure import Measured, measure
from rlhf_fast.trainer.metrics import explained_variance
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout.sample import Sampling, roll_out

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
SCORES = torch.tensor([1.0, -1.0, 0.5, 2.0])


def config(**options) -> PPOConfig:
    required = {"model": "m", "data": "d", "reward": "r", "output_dir": "o", "batch_size": 4}
    return PPOConfig(**(required | options))


@pytest.fixture
def old() -> Measured:
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, values = (torch.randn(4, 3, generator=generator) for _ in range(3))
    return Measured(logp, torch.rand(4, 3), ref_logp, values)


def rewards(old: Measured, beta: float) -> torch.Tensor:
    """−β·KL on every token, the score on the last."""
    r = -beta * (old.logp - old.ref_logp)
    for row, length in enumerate(MASK.sum(1)):
        r[row, length - 1] += SCORES[row]
    return r * MASK


def whitened(x: torch.Tensor) -> torch.Tensor:
    return ((x - x[MASK].mean()) / x[MASK].std()) * MASK


def test_gae_with_and_without_whitening(old):
    r, advantages = rewards(old, 0.1), torch.zeros(4, 3)
    for row, length in enumerate(MASK.sum(1).tolist()):
        after = 0.0
        for t in reversed(range(length)):
            following = old.values[row, t + 1] if t + 1 < length else 0.0
            after = r[row, t] + following - old.values[row, t] + 0.95 * after
            advantages[row, t] = after
    got, returns = estimate(SCORES, old, MASK, 0.1, config(whiten_advantages=False))
    torch.testing.assert_close(got, advantages)
    torch.testing.assert_close(returns[MASK], (advantages + old.values)[MASK])
    got, again = estimate(SCORES, old, MASK, 0.1, config())
    torch.testing.assert_close(got, whitened(advantages), atol=1e-5, rtol=1e-5)
    assert torch.equal(returns[MASK], again[MASK])  # the critic learns the rewards' own scale


def test_lambdas_of_policy_and_critic(old):
    """Each of the two as if it were the only one; by length: 1 − 1/(α·tokens), not below 0."""

    def plain(lam):
        return estimate(SCORES, old, MASK, 0.1, config(lam=lam, whiten_advantages=False))

    options = {"lam": 0.3, "lam_critic": 1.0, "whiten_advantages": False}
    advantages, returns = estimate(SCORES, old, MASK, 0.1, config(**options))
    assert torch.equal(advantages, plain(0.3)[0]) and torch.equal(returns, plain(1.0)[1])
    options = {"lam_critic": 1.0, "whiten_advantages": False, "lam_length_alpha": 0.5}
    advantages, again = estimate(SCORES, old, MASK, 0.1, config(**options))
    assert torch.equal(again, returns)
    for row, length in enumerate(MASK.sum(1).tolist()):
        lam = {1: 0.0, 2: 0.0, 3: 1 - 1 / 1.5}[length]
        assert torch.equal(advantages[row], plain(lam)[0][row])
    assert not torch.equal(plain(0.0)[0][0], plain(1 - 1 / 1.5)[0][0])


def test_reinforce_is_the_reward_to_go(old):
    r = rewards(old, 0.1)
    discounted = torch.zeros(4, 3)
    for t in range(3):
        for later in range(t, 3):
            discounted[:, t] += 0.9 ** (later - t) * r[:, later]
    options = {"estimator": "reinforce", "gamma": 0.9}
    got, returns = estimate(SCORES, old, MASK, 0.1, config(**options, whiten_advantages=False))
    torch.testing.assert_close(got, discounted * MASK)
    assert returns is None
    got, _ = estimate(SCORES, old, MASK, 0.1, config(**options))
    torch.testing.assert_close(got, whitened(discounted), atol=1e-5, rtol=1e-5)


def test_whitened_rewards_keep_their_mean(old):
    r = rewards(old, 0.1)
    scaled = ((r - r[MASK].mean()) / r[MASK].std() + r[MASK].mean()) * MASK
    options = {"estimator": "reinforce", "whiten_rewards": True, "whiten_advantages": False}
    got, _ = estimate(SCORES, old, MASK, 0.1, config(**options))
    torch.testing.assert_close(got, scaled.flip(1).cumsum(1).flip(1) * MASK, atol=1e-5, rtol=1e-5)


def test_kl_in_the_loss_leaves_the_reward_alone(old):
    options = {"estimator": "reinforce", "whiten_advantages": False}
    got, _ = estimate(SCORES, old, MASK, 0.1, config(**options, kl_in="loss", kl_estimator="k3"))
    torch.testing.assert_close(got, SCORES[:, None] * MASK)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_a_group_is_compared_with_itself(old, estimator):
    """Two answers to a prompt; the KL of the sequence is taken off the score first."""
    paid = SCORES - 0.1 * ((old.logp - old.ref_logp) * MASK).sum(1)
    gap = torch.stack([paid[0] - paid[1], paid[1] - paid[0], paid[2] - paid[3], paid[3] - paid[2]])
    expected = {"rloo": gap, "dr_grpo": gap / 2, "grpo": gap.sign() / 2**0.5}[estimator]
    options = {"estimator": estimator, "samples_per_prompt": 2}
    got, returns = estimate(SCORES, old, MASK, 0.1, config(**options))
    torch.testing.assert_close(got, expected[:, None].expand(4, 3), atol=1e-3, rtol=1e-3)
    assert returns is None


def test_shaped_scores():
    ended = torch.tensor([True, True, False, False])
    for options, expected in (
        ({}, [1.0, -1.0, -0.5, 1.0]),
        ({"missing_eos_penalty": 0.25, "score_clip": 0.75}, [0.75, -0.75, 0.25, 0.5]),
        ({"missing_eos_score": -3.0}, [1.0, -1.0, -3.0, -3.0]),
        # 1 to 4 tokens of at most 4, of which the last 2 cost half each
        ({"missing_eos_penalty": 0.0, "overlong_cache": 2}, [1.0, -1.0, 0.0, 1.0]),
    ):
        settings, lengths = config(**options, max_new_tokens=4), torch.tensor([1, 2, 3, 4])
        torch.testing.assert_close(shaped(SCORES, ended, lengths, settings), torch.tensor(expected))


def test_every_pass_covers_the_batch_in_its_own_order():
    generator = torch.Generator().manual_seed(0)
    rows = minibatches(8, config(batch_size=8, epochs=3, minibatches=2), generator)
    assert [len(r) for r in rows] == [4] * 6
    passes = [torch.cat(rows[i : i + 2]) for i in (0, 2, 4)]
    assert all(sorted(p.tolist()) == list(range(8)) for p in passes)
    assert not torch.equal(passes[0], passes[1])


def answered(folder, decoded, sampling):
    """(a policy, two prompts that it has answered), with the hidden states kept if `decoded`."""
    policy = load_policy(folder, device=torch.device("cpu"), trainable_layers=2)
    policy.exact_decoding = decoded
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    draws = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    rollout = roll_out(policy, prompt, torch.ones_like(prompt).bool(), sampling, draws)
    assert (rollout.hidden is not None) == decoded
    return policy, rollout


@pytest.mark.parametrize("decoded", [True, False], ids=["hidden states kept", "measured anew"])
def test_measured_log_probs_are_those_at_the_temperature(decoded, tiny_policy_folder):
    """The policy's, its entropy, and the reference's."""
    policy, rollout = answered(tiny_policy_folder, decoded, Sampling(4, 0.6, []))
    rollout.mask[0, 2:] = False  # as of an answer that ended: what is behind it is nobody's
    with torch.no_grad():  # before any update: the reference is the policy
        measured = measure(policy, rollout, config(temperature=0.6))
        exact = torch.log_softmax(policy.model(rollout.ids).logits[:, 2:-1].double() / 0.6, -1)
    logp = exact.gather(2, rollout.labels[..., None]).squeeze(-1)
    torch.testing.assert_close(rollout.logp.double(), logp, rtol=1e-4, atol=1e-5)
    logp, entropy = logp * rollout.mask, -(exact.exp() * exact).sum(-1) * rollout.mask
    torch.testing.assert_close(measured.logp.double(), logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.ref_logp.double(), logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.entropy.double(), entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoded", [True, False], ids=["hidden states kept", "measured anew"])
def test_measured_log_probs_are_those_of_the_tokens_that_were_left(decoded, tiny_policy_folder):
    policy, rollout = answered(tiny_policy_folder, decoded, Sampling(4, 1.0, [], top_k=3))
    with torch.no_grad():
        measured = measure(policy, rollout, config(top_k=3))
        z = policy.model(rollout.ids).logits[:, 2:-1].double().topk(3)
    at = (z.indices == rollout.labels[..., None]).int().argmax(-1, keepdim=True)
    logp = z.values.log_softmax(-1)
    for found in (rollout.logp, measured.logp, measured.ref_logp):
        torch.testing.assert_close(
            found.double(), logp.gather(2, at).squeeze(-1), atol=1e-5, rtol=1e-4
        )
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(measured.entropy.double(), entropy, atol=1e-5, rtol=1e-4)


def test_a_held_out_prompt_is_not_trained_on():
    """In no row that has it again; unless there are too few different ones."""
    prompts = [Prompt([i], str(i), {}) for i in (1, 2, 1, 3, 2, 4)]
    held_out, rest = hold_out(prompts, 2)
    assert [p.ids for p in held_out] == [[1], [2]] and [p.ids for p in rest] == [[3], [4]]
    held_out, rest = hold_out(prompts[:3], 2)
    assert len(held_out) == 2 and len(rest) == 1


def test_parts_of_a_minibatch():
    rows = torch.arange(5)
    assert [len(p) for p in parts(rows, 2)] == [2, 2, 1]
    assert [len(p) for p in parts(rows, None)] == [5]
    assert len(parts(rows[:0], None)) == 0  # a process without a share of a small minibatch


@pytest.mark.parametrize(
    ("aggregation", "divisor"),
    [
        ("token-mean", 9),
        ("seq-mean-token-mean", 4),
        ("seq-mean-token-sum", 4),
        ("token-sum", 4 * 7),
    ],
)
def test_what_a_loss_is_divided_by(aggregation, divisor):
    tokens, normalizer = counts(MASK, config(aggregation=aggregation, max_new_tokens=7))
    assert (tokens.item(), normalizer.item()) == (9, divisor)


def test_token_sum_where_every_answer_ended_early():
    """Dr. GRPO divides by answers × max_new_tokens, whatever the longest answer of a batch is."""
    assert MASK.shape[1] < 50
    tokens, normalizer = counts(MASK, config(aggregation="token-sum", max_new_tokens=50))
    assert (tokens.item(), normalizer.item()) == (9, 4 * 50)


def test_explained_variance_is_of_variances():
    """A critic that is off by a constant explains all; equal returns have nothing to explain."""
    returns = torch.tensor([[1.0, 2.0, 9.0], [4.0, 7.0, -5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert explained_variance(returns + 3.0, returns, mask) == pytest.approx(1.0, abs=1e-6)
    far = returns + 1e5
    half = far + torch.tensor([[1.0, -2.0, torch.nan], [0.5, 3.0, -1.0]])
    R, E = far[mask].double(), (far - half)[mask].double()
    right = 1 - E.var(correction=0) / R.var(correction=0)
    assert explained_variance(half, far, mask) == pytest.approx(right.item(), abs=1e-3)
    constant = torch.full((2, 3), 0.1)
    assert explained_variance(returns, constant, mask) == 0.0


def test_a_beta_of_0_beside_an_impossible_token():
    logp = torch.full((4, 3), -1.0)
    ref = logp.clone()
    ref[0, 1] = -torch.inf
    old = Measured(logp, -logp, ref, None)
    mask = torch.ones(4, 3, dtype=torch.bool)
    for estimator in ("grpo", "rloo", "reinforce"):
        settings = config(estimator=estimator, beta=0.0, samples_per_prompt=2, batch_size=4)
        advantages, _ = estimate(torch.tensor([0.0, 1.0, 2.0, 4.0]), old, mask, 0.0, settings)
        assert advantages.isfinite().all()


def test_a_critic_of_its_own_reads_the_tokens(tiny_policy_folder):
    """Also where the policy stands on a shared trunk, whose hidden states are not the critic's."""
    policy = load_policy(
        tiny_policy_folder, trainable_layers=1, device=torch.device("cpu"),
        value_model=tiny_policy_folder,
    )  # fmt: skip
    torch.nn.init.normal_(policy.value_head.weight)
    ids, mask = pad([[3, 4, 5], [6, 7]], side="left")
    draws = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    rollout = roll_out(policy, ids, mask, Sampling(4, 1.0, []), draws)
    measured = measure(policy, rollout, config())
    with torch.no_grad():
        hidden = policy.value_body(rollout.ids[:1]).last_hidden_state[:, 2:-1]
        torch.testing.assert_close(measured.values[:1], policy.value_head(hidden).squeeze(-1))
