"""The trainer's policy losses: an update is that of the formula written out on full logits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast import linear_token_logprobs, policy_loss
from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.batch import Batch, Corrections, corrections
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.measure import Measured, measure, sample_answers
from rlhf_fast.trainer.models.packing import positions
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout.sample import answer_hidden
from rlhf_fast.trainer.run.folder import read_metrics
from rlhf_fast.trainer.schedule import Control, Schedule

LR = 1e-2
CLIPS = {"clip": 0.1, "clip_high": 0.3}
PROMPTS = [[5, 6], [7, 8, 4], [5], [6, 12, 9]]


def setting(config) -> SimpleNamespace:
    """A policy, answers of different lengths, and old log-probs that it has moved away from."""
    torch.manual_seed(0)
    policy = load_policy(
        config.model, device=torch.device("cpu"), trainable_layers=None, critic=False
    )
    generator = torch.Generator().manual_seed(3)
    batch = [
        SimpleNamespace(ids=ids, environment=None)
        for ids in PROMPTS * (config.batch_size // len(PROMPTS))
    ]
    rollout = sample_answers(policy, batch, config, generator)
    old = measure(policy, rollout, config)
    noise = torch.randn(old.logp.shape, generator=generator)
    old = Measured(old.logp + 0.3 * noise, old.entropy, old.ref_logp - 0.5 * noise, None)
    advantages = torch.randn(old.logp.shape, generator=generator)
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    return SimpleNamespace(
        config=config, policy=policy, rollout=rollout, old=old, advantages=advantages
    )


def update(s: SimpleNamespace) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(gradient of each weight, by the step that plain SGD makes; the statistics)."""
    weights = s.policy.trained()
    before = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.SGD(weights.values(), lr=LR)
    workers = Workers(s.config)
    corrected = corrections(s.rollout, s.old, s.config)
    stats = ppo.learn(
        s.policy, Batch(s.rollout, s.old, s.advantages, None, corrected), s.config,
        workers.stepper(s.policy, optimizer, s.config.max_grad_norm),
        Schedule(optimizer, "constant_with_warmup", 0, 1), Control(s.config), workers,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    return {name: (before[name] - p.detach()) / LR for name, p in weights.items()}, stats


def gate(rho: torch.Tensor, tau: float) -> torch.Tensor:
    return 4 / tau * torch.sigmoid(tau * (rho - 1))


def written_out(s: SimpleNamespace, loss: str, ratio: str, entropy_coef: float, kl_coef: float):
    """(loss, its gradients): one number per answer and token, from the model's own logits."""
    c, r, model = s.config, s.rollout, s.policy.model
    logits = model(
        r.ids, attention_mask=r.attention.long(), position_ids=positions(r.attention)
    ).logits[:, r.prompt_length - 1 : -1]
    log_p = torch.log_softmax(logits / c.temperature, -1)
    total, tokens = 0.0, r.mask.sum()
    for row in range(len(r.ids)):
        n = int(r.mask[row].sum())
        logp = log_p[row, range(n), r.labels[row, :n]]
        entropy = -(log_p[row, :n].exp() * log_p[row, :n]).sum(-1)
        log_rho = logp - s.old.logp[row, :n]
        if ratio == "sequence":
            log_rho = log_rho.mean().expand(n)
        rho, A = log_rho.exp(), s.advantages[row, :n]
        bounded = rho.clamp(1 - c.clip, 1 + (c.clip_high or c.clip))
        surrogate = {
            "ppo": torch.minimum(rho * A, bounded * A),
            "cispo": bounded.detach() * A * logp,
            "reinforce": A * logp,
            "sapo": torch.where(A > 0, gate(rho, 2.0), gate(rho, c.sapo_tau_neg)) * A,
        }[loss]
        kl = 0.5 * (logp - s.old.ref_logp[row, :n]) ** 2  # k2
        total = total + (-surrogate - entropy_coef * entropy + kl_coef * kl).sum() / tokens
    weights = s.policy.trained()
    gradients = torch.autograd.grad(total, weights.values())
    return total.item(), dict(zip(weights, gradients, strict=True))


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # an update of float32 weights near 1 resolves a gradient to 6e-8 / LR
        assert (ours[name] - gradient).abs().max() < 2e-5 * scale + 2e-5, name


LOSSES = [
    ("ppo", "token"), ("ppo", "sequence"), ("cispo", "token"), ("cispo", "sequence"),
    ("reinforce", "token"),
]  # fmt: skip


@pytest.fixture
def one_update(configured):
    def make(**options):
        clips = {} if options.get("policy_loss") in ("reinforce", "sapo") else CLIPS
        defaults = {
            "batch_size": 8, "epochs": 1, "minibatches": 1, "max_grad_norm": 1e9,
            "temperature": 0.8, "estimator": "reinforce", "max_new_tokens": 8,
        }  # fmt: skip
        return setting(configured(**(defaults | clips | options)))

    return make


@pytest.mark.parametrize("terms", [False, True], ids=["plain", "entropy and KL"])
@pytest.mark.parametrize(("loss", "ratio"), [*LOSSES, ("sapo", "token")])
def test_an_update_is_the_formulas(one_update, loss, ratio, terms):
    entropy_coef, kl_coef = (0.1, 0.3) if terms else (0.0, 0.0)
    options = {"kl_in": "loss", "kl_estimator": "k2"} if terms else {}
    options |= {"sapo_tau_pos": 2.0} if loss == "sapo" else {}
    s = one_update(
        policy_loss=loss, ratio=ratio, entropy_coef=entropy_coef, beta=kl_coef, **options
    )
    value, gradients = written_out(s, loss, ratio, entropy_coef, kl_coef)
    ours, stats = update(s)
    assert_close(ours, gradients)
    assert stats["loss/policy_avg"] == pytest.approx(value, abs=1e-5)


def test_the_losses_differ(one_update):
    """Else the comparison above could pass with the option ignored."""
    s = one_update()
    found = [written_out(s, *names, 0.0, 0.0)[1] for names in LOSSES]
    name = "model.layers.0.mlp.up_proj.weight"
    for i, a in enumerate(found):
        for b in found[:i]:
            assert (a[name] - b[name]).abs().max() > 1e-2 * a[name].abs().max()


def two_ops(hidden, weight, labels, *constants, temperature, softcap, bias, support, **options):
    """linear_policy_loss as two: the logits made again for the backward, all tokens kept."""
    logp, entropy = linear_token_logprobs(
        hidden, weight, labels.masked_fill(~constants[-1], -100), temperature=temperature,
        softcap=softcap, bias=bias, support=support, entropy=True,
    )  # fmt: skip
    return policy_loss(logp, *constants, entropy=entropy, **options)


@pytest.mark.parametrize("terms", [False, True], ids=["plain", "entropy and KL"])
@pytest.mark.parametrize(("loss", "ratio"), LOSSES)
def test_the_one_pass_is_policy_loss(one_update, monkeypatch, loss, ratio, terms):
    """Loss, statistics and gradient are those of the two ops, to rounding."""
    options = {"entropy_coef": 0.1, "kl_in": "loss", "kl_estimator": "k3"} if terms else {}
    options |= {"dual_clip": 1.5} if loss == "ppo" else {}
    s = one_update(policy_loss=loss, ratio=ratio, **options)
    rows = torch.tensor([3, 0, 6])
    hidden = answer_hidden(s.policy.body, s.rollout, rows).detach().requires_grad_()
    weights = Corrections(s.old.logp.exp(), s.rollout.mask, None)
    batch = Batch(s.rollout, s.old, s.advantages, None, weights)
    inputs = (s.policy, hidden, batch, rows, s.rollout.mask[rows], s.config)
    more = {"beta": 0.3, "normalizer": s.rollout.mask.sum()}
    loss, stats = ppo.policy_term(*inputs, **more)
    monkeypatch.setattr(ppo, "linear_policy_loss", two_ops)
    slow_loss, slow_stats = ppo.policy_term(*inputs, **more)
    torch.testing.assert_close((loss, *stats), (slow_loss, *slow_stats), rtol=1e-5, atol=1e-6)
    fast, slow = (torch.autograd.grad(x, hidden)[0] for x in (loss, slow_loss))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-7)


def test_truncated_weights_and_parts_of_a_minibatch(one_update):
    """A sequence's ratio does not depend on how the rows are cut; tis_cap reaches these losses."""
    whole = one_update(ratio="sequence", aggregation="seq-mean-token-mean")
    cut = one_update(ratio="sequence", aggregation="seq-mean-token-mean", micro_batch_size=3)
    whole, cut = update(whole), update(cut)
    assert_close(cut[0], whole[0])
    assert cut[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-5)

    plain, capped = one_update(policy_loss="cispo"), one_update(policy_loss="cispo", tis_cap=2.0)
    for s in (plain, capped):
        s.rollout.logp = s.old.logp - 1.0  # e times likelier for the trainer: cut at the cap
    plain, capped = update(plain)[0], update(capped)[0]
    assert_close(capped, {name: 2 * gradient for name, gradient in plain.items()})


@pytest.mark.parametrize(("loss", "ratio"), LOSSES)
def test_a_run_has_the_numbers_of_the_two_ops(configured, monkeypatch, loss, ratio):
    options = {
        "steps": 2, "policy_loss": loss, "ratio": ratio, "entropy_coef": 0.01, "temperature": 0.8,
        "minibatches": 2, "epochs": 2, "micro_batch_size": 3,
    }  # fmt: skip
    run = configured("one", **options)
    ppo.train(run)
    calls = []
    monkeypatch.setattr(
        ppo, "linear_policy_loss", lambda *x, **o: calls.append(o) or two_ops(*x, **o)
    )
    two = configured("two", **options)
    ppo.train(two)
    assert {(o["loss"], o["ratio"]) for o in calls} == {(loss, ratio)}
    logs = [read_metrics(Path(c.output_dir) / "metrics.jsonl") for c in (run, two)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, number in ours.items():
            if not name.startswith("perf/") and name != "eps":  # times
                assert number == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.long
def test_gspo_learns(configured):
    config = configured(
        steps=20, batch_size=32, beta=0.01, estimator="grpo", samples_per_prompt=4,
        ratio="sequence", aggregation="seq-mean-token-mean",
    )  # fmt: skip
    summary = ppo.train(config)
    assert summary["score_after"] > summary["score_before"] + 0.3


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}])
def test_right_answers_are_imitated(one_update, monkeypatch, options):
    """The gradient of μ · the mean of −log π over their tokens, on top of the loss's."""
    right = torch.tensor([True, False] * 4)
    mine = partial(Batch, right=right)
    monkeypatch.setitem(globals(), "Batch", mine)
    plain = one_update(policy_loss="reinforce")
    imitating = one_update(policy_loss="reinforce", positive_nll_coef=0.3, **options)
    c, r, model = plain.config, plain.rollout, plain.policy.model
    logits = model(
        r.ids, attention_mask=r.attention.long(), position_ids=positions(r.attention)
    ).logits[:, r.prompt_length - 1 : -1]
    logp = torch.log_softmax(logits / c.temperature, -1).gather(2, r.labels[..., None]).squeeze(-1)
    nll = -logp[r.mask & right[:, None]].mean()
    weights = plain.policy.trained()
    extra = torch.autograd.grad(0.3 * nll, weights.values())
    without, stats = update(plain)
    ours, imitated = update(imitating)
    expected = {n: without[n] + g for n, g in zip(weights, extra, strict=True)}
    assert_close(ours, expected)
    loss = stats["loss/policy_avg"] + 0.3 * nll.item()
    assert imitated["loss/policy_avg"] == pytest.approx(loss, abs=1e-5)
