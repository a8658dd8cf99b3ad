"""verl's own functions, imported by module, beside ours: the same values and gradients."""

from __future__ import annotations

import math
import types
import warnings

import pytest
import torch
from frameworks import VERL, load
from torch.testing import assert_close

with warnings.catch_warnings():  # verl names each engine that is not installed
    warnings.simplefilter("ignore")
    ray_trainer = load("verl.trainer.ppo.ray_trainer", VERL)
    core = load("verl.trainer.ppo.core_algos", VERL)
    losses = load("verl.workers.utils.losses", VERL)
    torch_functional = load("verl.utils.torch_functional", VERL)
    fused = load("verl.utils.experimental.torch_functional", VERL)
    cross_entropy = load("verl.utils.kernel.linear_cross_entropy", VERL)
    rollout_corr = load("verl.trainer.ppo.rollout_corr_helper", VERL)

import rlhf_fast  # noqa: E402
from rlhf_fast.integrations import verl as fast  # noqa: E402
from rlhf_fast.integrations.patching import UnknownSignature  # noqa: E402
from rlhf_fast.trainer.advantages import estimate  # noqa: E402
from rlhf_fast.trainer.config import PPOConfig  # noqa: E402
from rlhf_fast.trainer.measure import Measured  # noqa: E402

MODES = [
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]  # fmt: skip
INFOS = [
    {},
    {"dp_size": 2, "batch_num_tokens": 71, "global_batch_size": 9},
    {"dp_size": 1, "batch_num_tokens": 71, "global_batch_size": 9, "loss_scale_factor": 50},
]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fast.unpatch()


def actor_config(**changes):
    """What the losses read of verl's ActorConfig, whose own class needs omegaconf."""

    class Config(types.SimpleNamespace):
        def get(self, name, default=None):
            return getattr(self, name, default)

    values = dict(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0,
                  global_batch_info={})  # fmt: skip
    return Config(**values | changes)


def batch(spread: float = 0.4, mask: str = "padding") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    size = (6, 11)
    logp = -3 * torch.rand(size, generator=g)
    lengths = torch.tensor([11, 3, 1, 0, 7, 5])
    masks = {
        "padding": torch.arange(11) < lengths[:, None],
        "holes": torch.rand(size, generator=g) > 0.4,
        "all": torch.ones(size, dtype=torch.bool),
    }
    return {
        "log_prob": logp,
        "old_log_prob": logp + spread * torch.randn(size, generator=g),
        "advantages": torch.randn(size, generator=g),
        "response_mask": masks[mask],
    }


def run(function, leaf: str, inputs: dict, *args, **options):
    """(result, gradient of the named input)"""
    x = inputs[leaf].clone().requires_grad_()
    result = function(**inputs | {leaf: x}, **options)
    value = result[0] if isinstance(result, tuple) else result
    value.backward(torch.linspace(-1, 2, value.numel()).reshape(value.shape))
    return result, x.grad


def same_loss(theirs, ours, leaf: str, inputs: dict, **options):
    (a, more_a), grad_a = run(theirs, leaf, inputs, **options)
    (b, more_b), grad_b = run(ours, leaf, inputs, **options)
    assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert_close(grad_b, grad_a, rtol=1e-5, atol=1e-7)
    return more_a, more_b


@pytest.mark.parametrize("mask", ["padding", "holes", "all"])
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(mode, info, mask):
    for spread in (0.4, 2.0, 15.0):
        inputs = batch(spread, mask)
        config = actor_config(global_batch_info=info, clip_ratio_high=0.28)
        theirs, ours = same_loss(
            core.compute_policy_loss_vanilla, core.get_policy_loss_fn("rlhf_fast"), "log_prob",
            inputs, loss_agg_mode=mode, config=config,
        )  # fmt: skip
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert theirs["actor/pg_clipfrac"] > 0


def test_policy_loss_with_rollout_weights():
    inputs = batch() | {"rollout_is_weights": torch.rand(6, 11, generator=torch.manual_seed(1))}
    config = actor_config(clip_ratio_low=0.1, clip_ratio_c=1.5)
    theirs, ours = same_loss(
        core.compute_policy_loss_vanilla, fast.compute_policy_loss, "log_prob", inputs,
        config=config,
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert theirs["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_gspo_and_cispo(name, mode, monkeypatch):
    """verl's GSPO holds the log-ratio at 10 from above, ours at ±20: not reached here."""
    config = actor_config(clip_ratio_low=0.05, clip_ratio_high=0.1)
    monkeypatch.setattr(core, "ActorConfig", type(config))
    inputs = batch()
    theirs, ours = same_loss(
        core.get_policy_loss_fn(name), core.get_policy_loss_fn(f"rlhf_fast_{name}"), "log_prob",
        inputs, loss_agg_mode=mode, config=config,
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert theirs["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("mask", ["padding", "all"])
@pytest.mark.parametrize("info", INFOS)
def test_sapo(info, mask, monkeypatch):
    config = actor_config(tau_pos=1.0, tau_neg=1.05, global_batch_info=info)
    monkeypatch.setattr(core, "ActorConfig", type(config))
    for spread in (0.4, 15.0):
        inputs = batch(spread, mask) | {"rollout_is_weights": torch.rand(6, 11)}
        theirs, ours = same_loss(
            core.get_policy_loss_fn("sapo"), core.get_policy_loss_fn("rlhf_fast_sapo"), "log_prob",
            inputs, config=config,
        )  # fmt: skip
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("mask", ["padding", "holes", "all"])
def test_clip_cov(mask):
    """From the same draws the same tokens."""
    policy_loss = types.SimpleNamespace(clip_cov_ratio=0.2, clip_cov_lb=0.1, clip_cov_ub=2.0)
    config = actor_config(policy_loss=policy_loss)
    inputs = batch(0.2, mask)
    torch.manual_seed(3)
    (theirs, _), grad = run(core.compute_policy_loss_clip_cov, "log_prob", inputs, config=config)
    torch.manual_seed(3)
    given = [inputs[x] for x in ("log_prob", "old_log_prob", "advantages", "response_mask")]
    kept = rlhf_fast.covariance_mask(*given, share=0.2, low=0.1, high=2.0)
    left_out = (given[3] & ~kept).sum()
    assert left_out == int(0.2 * given[3].sum()) > 1
    logp = given[0].clone().requires_grad_()
    ours, _ = rlhf_fast.policy_loss(logp, *given[1:], importance_weights=kept.float())
    ours.backward(torch.tensor(-1.0))  # what run() gives to a single number
    assert_close(ours, theirs)
    assert_close(logp.grad, grad)


def test_dro_is_reinforce_with_the_old_policy_as_the_reference():
    config = actor_config(policy_loss=types.SimpleNamespace(dro_beta=0.7))
    inputs = batch()
    (theirs, _), grad = run(core.compute_policy_loss_dro, "log_prob", inputs, config=config)
    logp = inputs["log_prob"].clone().requires_grad_()
    old, *more = (inputs[x] for x in ("old_log_prob", "advantages", "response_mask"))
    options = {"loss": "reinforce", "ref_logp": old, "kl_estimator": "k2", "kl_coef": 0.7}
    ours, _ = rlhf_fast.policy_loss(logp, old, *more, **options)
    ours.backward(torch.tensor(-1.0))
    assert_close(ours, theirs)
    assert_close(logp.grad, grad)


@pytest.mark.parametrize("mask", ["padding", "holes", "all"])
def test_kl_cov_has_the_old_policy_as_the_reference_of_few_tokens(mask):
    """As docs/objectives.md writes it; the others have themselves, and so no KL and no gradient."""
    policy_loss = types.SimpleNamespace(kl_cov_ratio=0.2, ppo_kl_coef=0.5)
    inputs = batch(0.2, mask)
    (theirs, _), grad = run(
        core.compute_policy_loss_kl_cov, "log_prob", inputs,
        config=actor_config(policy_loss=policy_loss),
    )  # fmt: skip
    now, old, advantages, counts = (
        inputs[x] for x in ("log_prob", "old_log_prob", "advantages", "response_mask")
    )
    added = (advantages - advantages[counts].mean()) * (now - now[counts].mean())
    few = max(1, int(0.2 * counts.sum()))
    chosen = added >= added[counts].topk(few).values[-1]
    logp = now.clone().requires_grad_()
    ours, _ = rlhf_fast.policy_loss(
        logp, old, advantages, counts, clip_low=1.0, clip_high=1e9,
        ref_logp=torch.where(chosen, old, now), kl_estimator="abs", kl_coef=0.5,
    )  # fmt: skip
    ours.backward(torch.tensor(-1.0))
    assert few > 1 and not chosen[counts].all()
    assert_close(ours, theirs)
    assert_close(logp.grad, grad)


def test_gpg_is_reinforce_of_centred_scores():
    inputs = batch()
    config = actor_config()
    (theirs, _), grad = run(core.compute_policy_loss_gpg, "log_prob", inputs, config=config)
    logp = inputs["log_prob"].clone().requires_grad_()
    more = (inputs[x] for x in ("old_log_prob", "advantages", "response_mask"))
    ours, _ = rlhf_fast.policy_loss(logp, *more, loss="reinforce")
    ours.backward(torch.tensor(-1.0))
    assert_close(ours, theirs)
    assert_close(logp.grad, grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo(name, mode):
    inputs = batch(1.0) | {"rollout_is_weights": torch.rand(6, 11)}
    inputs["old_log_prob"] = inputs["old_log_prob"].clamp(max=0)
    config = actor_config(clip_ratio_low=0.05, clip_ratio_high=0.1, clip_ratio_c=1.5)
    theirs, ours = same_loss(
        core.get_policy_loss_fn(name), core.get_policy_loss_fn(f"rlhf_fast_{name}"), "log_prob",
        inputs, loss_agg_mode=mode, config=config,
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert theirs["actor/pg_clipfrac"] > 0 and theirs["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("mask", ["padding", "holes"])
def test_geo_mean(mask):
    inputs = batch(0.4, mask) | {"rollout_is_weights": 0.5 + torch.rand(6, 11)}
    inputs["advantages"] = inputs["advantages"][:, :1].expand(6, 11)
    for info in INFOS:
        theirs, ours = same_loss(
            core.get_policy_loss_fn("geo_mean"), core.get_policy_loss_fn("rlhf_fast_geo_mean"),
            "log_prob", inputs, config=actor_config(clip_ratio_high=0.4, global_batch_info=info),
        )  # fmt: skip
        assert ours["actor/ppo_kl"] == pytest.approx(theirs["actor/ppo_kl"], rel=1e-5)
        outside = theirs["actor/pg_clipfrac"] + theirs["actor/pg_clipfrac_lower"]
        assert 0 < ours["actor/pg_clipfrac"] < outside


def test_all_masked_is_zero_where_verl_is_nan():
    inputs = batch() | {"response_mask": torch.zeros(6, 11, dtype=torch.bool)}
    (theirs, _), _ = run(
        core.compute_policy_loss_vanilla, "log_prob", inputs, config=actor_config()
    )
    (ours, _), grad = run(fast.compute_policy_loss, "log_prob", inputs, config=actor_config())
    assert theirs.isnan() and ours == 0 and grad.eq(0).all()


def test_policy_loss_needs_its_counts_and_config():
    inputs = batch()
    for function in (core.compute_policy_loss_vanilla, fast.compute_policy_loss):
        with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
            function(**inputs, config=actor_config(global_batch_info={"dp_size": 2}))
    with pytest.raises(ValueError, match="config must be verl's actor config, got None"):
        fast.compute_policy_loss(**inputs)


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(mode, info):
    g = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 6, 11, generator=g)
    inputs = {"vpreds": values, "values": old, "returns": returns}
    inputs["response_mask"] = batch()["response_mask"]
    theirs, ours = same_loss(
        core.compute_value_loss, fast.compute_value_loss, "vpreds", inputs, cliprange_value=0.3,
        loss_agg_mode=mode, **info,
    )  # fmt: skip
    assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert theirs > 0


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("mask", ["padding", "holes", "all"])
def test_gae(mask, gamma, lam):
    """verl leaves whitened numbers at masked positions; ours are 0 there."""
    g = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 6, 11, generator=g)
    counts = batch(mask=mask)["response_mask"]
    arguments = (rewards, values, counts.long(), gamma, lam)
    theirs = core.compute_gae_advantage_return(*arguments)
    ours = fast.compute_gae_advantage_return(*arguments)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b.masked_fill(~counts, 0), rtol=1e-4, atol=1e-5)


def test_gae_selected_from_verls_config():
    """What ``algorithm.adv_estimator`` does in verl's own ``compute_advantage``."""
    g = torch.Generator().manual_seed(4)
    rewards, values = torch.randn(2, 6, 11, generator=g)
    mask = batch()["response_mask"].long()

    class Config(dict):
        gamma, lam = 0.97, 0.9

    def advantages(name: str) -> torch.Tensor:
        columns = {"token_level_rewards": rewards, "values": values, "response_mask": mask}
        data = types.SimpleNamespace(batch=columns, non_tensor_batch={})
        ray_trainer.compute_advantage(data, name, gamma=0.97, lam=0.9, config=Config())
        return columns["advantages"]

    expected = advantages("gae").masked_fill(mask == 0, 0)
    with pytest.raises(ValueError, match="verl passes them only for adv_estimator=gae"):
        advantages("rlhf_fast_gae")  # verl 0.9.1 gives it no values, as the message says
    with fast.patch():
        patched = advantages("gae")
    assert patched[mask == 0].eq(0).all()
    assert_close(patched, expected, rtol=1e-4, atol=1e-5)
    estimator = core.get_adv_estimator_fn("rlhf_fast_gae")
    arguments = dict(token_level_rewards=rewards, response_mask=mask, values=values)
    assert_close(estimator(**arguments, config=Config())[0], patched, rtol=0, atol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten(shift_mean):
    x = batch()
    mask = x["response_mask"]
    theirs = torch_functional.masked_whiten(x["advantages"], mask, shift_mean)
    ours = fast.masked_whiten(x["advantages"], mask, shift_mean)
    assert_close(ours, theirs.masked_fill(~mask, 0), rtol=1e-5, atol=1e-5)
    one = torch.zeros_like(mask)
    one[0, 0] = True
    with pytest.raises(ValueError, match="sum of the mask is one"):
        torch_functional.masked_whiten(x["advantages"], one)
    assert fast.masked_whiten(x["advantages"], one).eq(0).all()


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_kl_penalty(name, plus):
    for spread in (0.5, 30.0):
        x = batch(spread)
        inputs = {"logprob": x["log_prob"], "ref_logprob": x["old_log_prob"]}
        options = {"kl_penalty": name + plus}
        theirs, their_grad = run(core.kl_penalty, "logprob", inputs, **options)
        ours, our_grad = run(fast.kl_penalty, "logprob", inputs, **options)
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-6)


def test_kl_penalty_full_is_refused_by_both():
    x = torch.zeros(2, 3)
    for function in (core.kl_penalty, fast.kl_penalty):
        with pytest.raises(NotImplementedError):
            function(x, x, "full")


@pytest.mark.parametrize("shape", [(3, 7), (2, 0), (9,)])
@pytest.mark.parametrize("inplace", [True, False])
def test_logprobs_from_logits(shape, inplace):
    g = torch.Generator().manual_seed(5)
    logits, labels = 5 * torch.randn(*shape, 33, generator=g), torch.randint(20, shape, generator=g)
    logits[..., 20:25] = -torch.inf
    inputs = {"logits": logits, "labels": labels}
    theirs, their_grad = run(torch_functional.logprobs_from_logits, "logits", inputs)
    ours, our_grad = run(fast.logprobs_from_logits, "logits", inputs, inplace_backward=inplace)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-6)


def test_logprobs_of_packed_rows():
    """verl's fast path takes labels of any shape beside [N, V]; its engine has [1, N]."""
    g = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(9, 33, generator=g), torch.randint(33, (1, 9), generator=g)
    right = torch.log_softmax(logits, -1).gather(-1, labels.T).squeeze(-1)
    assert_close(fast.logprobs_from_logits(logits, labels), right)
    assert_close(fast.logprobs_from_logits(logits[None], labels[0]), right[None])
    with pytest.raises(ValueError, match="labels must have the leading shape of logits"):
        fast.logprobs_from_logits(logits, labels[:, 1:])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_cross_entropy(temperature):
    """verl's kernel needs a GPU; FusedLinearForPPO, its other backend, runs here."""
    g = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(2, 9, 16, generator=g), torch.randn(37, 16, generator=g)
    labels = torch.randint(37, (2, 9), generator=g)
    twin = fused.FusedLinearForPPO(chunk_size=4)

    def step(function, **options):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = (x.flatten() for x in function(h, w, labels, **options))
        share = torch.linspace(-1, 1, 18)
        (logp * share + entropy * share**2).sum().backward()
        return logp, entropy, h.grad, w.grad

    ours = step(fast.linear_cross_entropy, temperature=temperature)
    assert_close(ours, step(twin, temperature=temperature), rtol=1e-4, atol=1e-5)
    logp, entropy = fast.linear_cross_entropy(hidden, weight, labels)
    assert logp.shape == entropy.shape == (18,)


def test_linear_cross_entropy_refuses_what_it_cannot_do():
    x = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="takes reduction='none'"):
        fast.linear_cross_entropy(*x, 1.0, "mean")


def test_patch_and_unpatch():
    original = losses.kl_penalty, losses.compute_value_loss, torch_functional.logprobs_from_logits
    kernel = cross_entropy.linear_cross_entropy
    done = fast.patch()
    assert losses.kl_penalty is core.kl_penalty is fast.kl_penalty
    assert losses.compute_value_loss is fast.compute_value_loss
    assert torch_functional.logprobs_from_logits is fast.logprobs_from_logits
    assert torch_functional.masked_whiten is fast.masked_whiten
    assert cross_entropy.linear_cross_entropy is fast.linear_cross_entropy
    assert "verl.workers.utils.losses.kl_penalty" in done.replaced
    fast.unpatch()
    assert original == (
        losses.kl_penalty, losses.compute_value_loss, torch_functional.logprobs_from_logits,
    )  # fmt: skip
    assert cross_entropy.linear_cross_entropy is kernel


def test_an_unknown_signature_is_refused(monkeypatch):
    original = core.compute_gae_advantage_return
    monkeypatch.setattr(core, "kl_penalty", lambda logprob, ref_logprob: None)
    with pytest.raises(UnknownSignature, match="verl 0.9.1: .*kl_penalty takes .*works with verl"):
        fast.patch()
    assert core.compute_gae_advantage_return is original


# ------------------------------------------------- where rollout and trainer disagree, estimators


def gap(spread: float = 0.5, mask: str = "padding") -> tuple[torch.Tensor, ...]:
    """(old_logp, rollout_logp, mask) without an empty row, of which verl makes NaN."""
    inputs = batch(spread, mask)
    keep = inputs["response_mask"].any(1)
    names = ("log_prob", "old_log_prob", "response_mask")
    return tuple(inputs[name][keep] for name in names)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("threshold", [1.5, "0.7_1.5"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rollout_weights(level, threshold, normalize):
    icepop = isinstance(threshold, str)
    far = [] if icepop else [(20.0, "all")]  # where no weight is left, verl divides by 0
    for spread, mask in (*far, (0.3, "padding"), (0.3, "holes")):
        old, rollout, counts = gap(spread, mask)
        theirs, metrics = rollout_corr.compute_rollout_correction_weights(
            old - rollout, counts, level, threshold, normalize
        )
        options = {"mode": "mask", "low": 0.7} if icepop else {}
        ours, kept, stats = rlhf_fast.rollout_correction(
            old, rollout, counts, level=level, high=1.5, batch_normalize=normalize, **options
        )
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(kept, counts)
        share = stats.effective_sample_size.item() / int(counts.sum())
        assert share == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=1e-4)
        if icepop:
            assert stats.clipfrac.item() == pytest.approx(metrics["rollout_is_oob_ratio"])
            assert stats.clipfrac > 0
    off_policy = rollout_corr.compute_offpolicy_metrics(old, rollout, counts)
    assert stats.kl_k3.item() == pytest.approx(off_policy["k3_kl"], rel=1e-4)


REJECTIONS = [name for name in rlhf_fast.ops.rollout_correction.REJECTIONS if name != "max_k1"]


@pytest.mark.parametrize("name", REJECTIONS)
def test_rejected_sequences(name):
    """A k1 has one threshold u in verl: the ratio is to be within [1/u, u]."""
    old, rollout, counts = gap(0.3, "holes")
    above = {"mean_k1": 0.05, "max_k2": 0.12, "max_k3": 0.12, "mean_k2": 0.04, "mean_k3": 0.04}
    above = above.get(name, 0.25)
    limit = math.exp(above) if name.endswith("k1") else above
    theirs, metrics = rollout_corr.compute_rollout_rejection_mask(
        old - rollout, counts, f"seq_{name}", limit
    )
    _, kept, stats = rlhf_fast.rollout_correction(
        old, rollout, counts, mode=None, reject=name, reject_above=above
    )
    assert torch.equal(kept, theirs.bool())
    assert stats.rejectfrac.item() == pytest.approx(metrics["rollout_rs_masked_fraction"])
    assert 0 < stats.rejectfrac < 1


def of_the_trainer(scores, mask, **options):
    """The trainer's advantages at beta 0, of groups of 3."""
    required = {"model": "m", "data": "d", "reward": "r", "output_dir": "o", "beta": 0.0}
    config = PPOConfig(**required, batch_size=6, samples_per_prompt=3, **options)
    zeros = torch.zeros(mask.shape)
    return lambda **more: estimate(
        scores, Measured(zeros, zeros, zeros, None), mask, 0.0, config, **more
    )[0]


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline", "opo", "remax"])
def test_estimators(name):
    mask = batch()["response_mask"]
    mask[3, :2] = True
    scores, greedy = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 0.5]), torch.tensor([0.3] * 6)
    rewards = torch.zeros(6, 11)
    rewards[range(6), mask.sum(1) - 1] = scores
    index, config = [0, 0, 0, 1, 1, 1], types.SimpleNamespace(gamma=1.0)
    verl = {
        "reinforce": "reinforce_plus_plus", "reinforce_baseline": "reinforce_plus_plus_baseline",
    }.get(name, name)  # fmt: skip
    theirs, _ = core.get_adv_estimator_fn(verl)(
        token_level_rewards=rewards, response_mask=mask.float(), index=index, config=config,
        reward_baselines=greedy,
    )  # fmt: skip
    more = {"baseline": greedy} if name == "remax" else {}
    ours = of_the_trainer(scores, mask, estimator=name)(**more)
    assert_close(ours * mask, theirs * mask, rtol=1e-5, atol=1e-6)
    assert theirs.abs().max() > 0.5
