"""OpenRLHF's own functions, imported by module, beside ours: the same values and gradients."""

from __future__ import annotations

import types
from functools import partial

import pytest
import torch
from frameworks import OPENRLHF, load
from torch.testing import assert_close

losses = load("openrlhf.models.loss", OPENRLHF)
utils = load("openrlhf.models.utils", OPENRLHF)
maker = load("openrlhf.trainer.ppo_utils.experience_maker", OPENRLHF)
actor = load("openrlhf.trainer.ray.ppo_actor", OPENRLHF)

from rlhf_fast.integrations import openrlhf as fast  # noqa: E402
from rlhf_fast.integrations.patching import UnknownSignature  # noqa: E402
from rlhf_fast.trainer.advantages import estimate, shaped  # noqa: E402
from rlhf_fast.trainer.config import PPOConfig  # noqa: E402
from rlhf_fast.trainer.measure import Measured  # noqa: E402

COUNTS = [
    {},
    {"dp_size": 2, "batch_num_tokens": 71, "global_batch_size": 9},
    {"dp_size": 2},  # without a global count OpenRLHF does not use it
]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fast.unpatch()


def batch(spread: float = 0.4, mask: str = "padding") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    size = (6, 11)
    logp = -3 * torch.rand(size, generator=g)
    lengths = torch.tensor([11, 3, 1, 0, 7, 5])
    masks = {
        "padding": (torch.arange(11) < lengths[:, None]).long(),
        "holes": (torch.rand(size, generator=g) > 0.4).float(),
        "all": torch.ones(size),
    }
    return {
        "log_probs": logp,
        "old_log_probs": logp + spread * torch.randn(size, generator=g),
        "advantages": torch.randn(size, generator=g),
        "action_mask": masks[mask],
    }


def run(function, leaf: str, inputs: dict, **options):
    """(result, gradient of the named input)"""
    x = inputs[leaf].clone().requires_grad_()
    result = function(**inputs | {leaf: x}, **options)
    value = result[0] if isinstance(result, tuple) else result
    value.backward(torch.linspace(-1, 2, value.numel()).reshape(value.shape))
    return result, x.grad


def same(theirs, ours, leaf: str, inputs: dict, **options):
    a, grad_a = run(theirs, leaf, inputs, **options)
    b, grad_b = run(ours, leaf, inputs, **options)
    assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert_close(grad_b, grad_a, rtol=1e-5, atol=1e-6)
    return a


@pytest.mark.parametrize("mask", ["padding", "holes", "all"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss(dual_clip, token_level_loss, counts, mask):
    options = dict(clip_eps_low=0.1, clip_eps_high=0.3, dual_clip=dual_clip)
    options["token_level_loss"] = token_level_loss
    for spread in (0.4, 2.0):
        result = same(
            losses.PolicyLoss(**options), fast.PolicyLoss(**options), "log_probs",
            batch(spread, mask), **counts,
        )  # fmt: skip
        loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = result
        assert clip_ratio > 0 and ppo_kl != 0 and vllm_kl is is_filter_ratio is None


@pytest.mark.parametrize("counts", COUNTS)
def test_gspo(counts):
    options = dict(policy_loss_type="gspo", clip_eps_low=0.05, clip_eps_high=0.1)
    result = same(
        losses.PolicyLoss(**options), fast.PolicyLoss(**options), "log_probs", batch(), **counts
    )
    assert result[1] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"is_correction_mode": "mask"},
        {"is_correction_mode": "clip"},
        {"is_correction_level": "seq"},
        {"is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.1]},
        {"policy_loss_type": "gspo"},
    ],
)
def test_importance_sampling_correction(options):
    """By the token's ratio it is ours, else OpenRLHF's own."""
    options = {"is_correction_level": "token", "is_correction_threshold": [0.8, 1.3]} | options
    inputs = batch()
    noise = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    inputs["rollout_log_probs"] = inputs["old_log_probs"] - 0.3 * noise
    if options["is_correction_level"] == "seq":  # NaN in OpenRLHF where a row has no token
        inputs["action_mask"] = torch.ones(6, 11)
    result = same(losses.PolicyLoss(**options), fast.PolicyLoss(**options), "log_probs", inputs)
    if "policy_loss_type" not in options:
        assert result[3] is not None and 0 < result[4] < 1


def test_a_ratio_beyond_the_clamp():
    """The loss holds it; ppo_kl is of the log-ratio as it is: a policy that ran away must show."""
    result = same(losses.PolicyLoss(), fast.PolicyLoss(), "log_probs", batch(30.0))
    far = batch(0.1)
    far["log_probs"] = far["log_probs"] - 100.0
    _, _, ppo_kl, *_ = same(losses.PolicyLoss(), fast.PolicyLoss(), "log_probs", far)
    assert ppo_kl > 99 and result[2].isfinite()


def test_no_mask_is_every_token():
    x = batch(mask="all")
    del x["action_mask"]
    ours, _ = run(fast.PolicyLoss(), "log_probs", x)
    theirs, _ = run(losses.PolicyLoss(), "log_probs", batch(mask="all"))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_all_masked_is_zero_where_openrlhf_is_nan():
    """OpenRLHF divides 0 by 0; see OpenRLHF#525 for what NaN at padding does."""
    x = batch() | {"action_mask": torch.zeros(6, 11)}
    (theirs, *_), _ = run(losses.PolicyLoss(), "log_probs", x)
    (ours, *_), grad = run(fast.PolicyLoss(), "log_probs", x)
    assert theirs.isnan() and ours == 0 and grad.eq(0).all()


def test_infinity_at_padding_does_not_spread():
    """0·inf at padding makes OpenRLHF's loss NaN (OpenRLHF#525)."""
    x = batch()
    x["old_log_probs"] = x["old_log_probs"].masked_fill(x["action_mask"] == 0, -torch.inf)
    x["advantages"] = x["advantages"].masked_fill(x["action_mask"] == 0, torch.inf)
    (theirs, *_), _ = run(losses.PolicyLoss(), "log_probs", x)
    (ours, *_), grad = run(fast.PolicyLoss(), "log_probs", x)
    (expected, *_), expected_grad = run(losses.PolicyLoss(), "log_probs", batch())
    assert theirs.isnan()
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("clip_eps", [None, 0.3])
def test_value_loss(clip_eps, token_level_loss, counts):
    g = torch.Generator().manual_seed(1)
    values, old, returns = torch.randn(3, 6, 11, generator=g)
    inputs = {"values": values, "old_values": old, "returns": returns}
    inputs["action_mask"] = batch()["action_mask"]
    options = dict(clip_eps=clip_eps, token_level_loss=token_level_loss)
    same(losses.ValueLoss(**options), fast.ValueLoss(**options), "values", inputs, **counts)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("leaf", ["chosen_reward", "reject_reward"])
def test_pairwise_loss(leaf, margin):
    g = torch.Generator().manual_seed(2)
    chosen, rejected, gap = 5 * torch.randn(3, 13, generator=g)
    inputs = {"chosen_reward": chosen, "reject_reward": rejected}
    inputs["margin"] = gap if margin else None
    same(losses.PairWiseLoss(), fast.PairWiseLoss(), leaf, inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(3, 7), (2, 0), (9,)])
def test_log_probs_from_logits(shape, temperature):
    g = torch.Generator().manual_seed(3)
    logits, labels = 5 * torch.randn(*shape, 33, generator=g), torch.randint(20, shape, generator=g)
    logits[..., 20:25] = -torch.inf

    def on_a_copy(function):  # OpenRLHF divides its argument in place, which a leaf cannot bear
        return lambda logits, labels: function(logits.clone(), labels, temperature)

    same(
        on_a_copy(utils.log_probs_from_logits), on_a_copy(fast.log_probs_from_logits), "logits",
        {"logits": logits, "labels": labels},
    )  # fmt: skip
    before = logits.clone()
    fast.log_probs_from_logits(logits, labels, 0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("unbiased_gradient", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_compute_approx_kl(kl_estimator, old, unbiased_gradient):
    for spread in (0.5, 30.0):
        x = batch(spread)
        inputs = {"log_probs": x["log_probs"], "log_probs_base": x["old_log_probs"]}
        inputs["log_probs_old"] = x["log_probs"] + x["advantages"] if old else None
        same(
            utils.compute_approx_kl, fast.compute_approx_kl, "log_probs", inputs,
            kl_estimator=kl_estimator, unbiased_gradient=unbiased_gradient,
        )  # fmt: skip
    with pytest.raises(ValueError, match="kl_estimator must be k1, k2 or k3, got 'k4'"):
        fast.compute_approx_kl(x["log_probs"], x["log_probs"], kl_estimator="k4")


@pytest.mark.parametrize("gamma, lambd", [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("mask", ["padding", "holes", "all", None])
def test_advantages_and_returns(mask, gamma, lambd):
    """Where masked between two tokens OpenRLHF leaves numbers, ours are 0."""
    g = torch.Generator().manual_seed(4)
    values, rewards = torch.randn(2, 6, 11, generator=g)
    counts = None if mask is None else batch(mask=mask)["action_mask"]
    arguments = (None, values, rewards, counts, gamma, lambd)
    theirs = maker.RemoteExperienceMaker.get_advantages_and_returns(*arguments)
    ours = fast.get_advantages_and_returns(*arguments)
    for a, b in zip(ours, theirs, strict=True):
        b = b if counts is None else b.masked_fill(counts == 0, 0)
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_patch_and_unpatch():
    original = losses.PolicyLoss, maker.RemoteExperienceMaker.get_advantages_and_returns
    with fast.patch() as done:
        assert actor.PolicyLoss is losses.PolicyLoss is fast.PolicyLoss
        assert actor.compute_approx_kl is maker.compute_approx_kl is fast.compute_approx_kl
        assert (
            maker.RemoteExperienceMaker.get_advantages_and_returns
            is fast.get_advantages_and_returns
        )
        assert "openrlhf.models.ValueLoss" in done.replaced
        assert isinstance(actor.PolicyLoss(), original[0])
    assert original == (actor.PolicyLoss, maker.RemoteExperienceMaker.get_advantages_and_returns)
    assert losses.PolicyLoss is original[0]


def test_an_unknown_signature_is_refused(monkeypatch):
    original = losses.PolicyLoss
    monkeypatch.setattr(utils, "log_probs_from_logits", lambda logits: None)
    with pytest.raises(UnknownSignature, match=r"log_probs_from_logits takes \(logits\), expected"):
        fast.patch()
    assert losses.PolicyLoss is original


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_reinforce_plus_plus(name):
    """With the KL in the reward, of groups of 3, and OpenRLHF's whitening by the n-th, ours by the
    (n − 1)-th of the squares; the soft overlong punishment is in its scores, too."""
    inputs = batch()
    mask = inputs["action_mask"].bool()
    mask[3, :2] = True
    scores, lengths = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 0.5]), mask.sum(1)
    kl = inputs["log_probs"] - inputs["old_log_probs"]
    space = types.SimpleNamespace
    args = space(
        algo=space(advantage=space(estimator=name, gamma=1.0, no_std_norm=False)),
        rollout=space(n_samples_per_prompt=3, max_new_tokens=12),
        reward=space(clip_range=None, overlong_buffer_len=6, overlong_penalty_factor=1.0),
    )
    one = space(
        rewards=scores.clone(), index=list(range(6)), kl=kl, action_mask=mask.float(), values=None,
        info={}, response_length=lengths,
    )  # fmt: skip
    made = space(
        strategy=space(args=args), kl_ctl=space(value=0.1), advantage_estimator=name,
        get_cumulative_returns=partial(maker.RemoteExperienceMaker.get_cumulative_returns, None),
    )  # fmt: skip
    maker.RemoteExperienceMaker.compute_advantages_and_returns(made, [one])

    required = {"model": "m", "data": "d", "reward": "r", "output_dir": "o"}
    config = PPOConfig(
        **required, batch_size=6, samples_per_prompt=3, estimator=name, overlong_cache=6,
        max_new_tokens=12, missing_eos_penalty=0.0,
    )  # fmt: skip
    paid = shaped(scores, torch.ones(6).bool(), lengths, config)
    old = Measured(inputs["log_probs"], kl, inputs["old_log_probs"], None)
    ours, _ = estimate(paid, old, mask, 0.1, config)
    n = mask.sum()
    assert_close((ours * (n / (n - 1)).sqrt())[mask], one.advantages[mask], rtol=1e-4, atol=1e-5)
    assert (paid != scores).any()
