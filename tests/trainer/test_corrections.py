"""An engine whose log-probs are not the trainer's: what is weighed, left out and said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_fast.trainer import measure, ppo
from rlhf_fast.trainer.rollout.sample import sample
from rlhf_fast.trainer.run.folder import read_metrics


def off_by(factor: float, of: slice = slice(None)):
    """An engine that says `factor` times the trainer's probability for the answers of some rows."""

    def engine(*given):
        done = sample(*given)
        logp = done.logp.clone()
        logp[of] += torch.tensor(factor).log()
        return done._replace(logp=logp * done.mask)

    return engine


@pytest.fixture
def ran(configured, monkeypatch):
    """ran(engine, **options) -> (the metrics of one step, the batch that it learnt from)"""

    def run(engine, **options):
        seen, real = [], ppo.learn

        def record(policy, batch, *more):
            seen.append(batch)
            return real(policy, batch, *more)

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "learn", record)
            once = {"steps": 1, "epochs": 1, "minibatches": 1, "eval_prompts": 1}
            config = configured(**(once | options))
            ppo.train(config, engine=engine)
        (row,) = read_metrics(Path(config.output_dir) / "metrics.jsonl")
        return row, *seen

    return run


def test_weights_of_answers_and_what_is_said_of_them(ran):
    """Half of the answers are said to be 4 times likelier than they are: s is 1/4 there."""
    row, batch = ran(
        off_by(4.0, slice(8)), tis_cap=2.0, rollout_ratio_min=0.5, rollout_correction="mask"
    )
    mask, weights = batch.mask, batch.corrections.weights
    assert (weights[:8] == 0).all() and mask[:8].any(1).all()
    torch.testing.assert_close(weights[8:][mask[8:]], torch.ones(int(mask[8:].sum())))
    share = (mask[:8].sum() / mask.sum()).item()
    assert row["rollout/is_mean"] == pytest.approx(1 - 0.75 * share, rel=1e-4)
    assert row["rollout/is_max"] == pytest.approx(1, rel=1e-4)
    assert row["rollout/is_oob_ratio"] == pytest.approx(share, rel=1e-5)
    assert row["rollout/is_eff_sample_size"] == pytest.approx(1 - share, rel=1e-4)
    k3 = 0.25 - 1 + torch.tensor(4.0).log().item()
    assert row["rollout/k3_kl"] == pytest.approx(share * k3, rel=1e-4)
    assert row["rollout/rs_masked_fraction"] == 0


@pytest.mark.parametrize(
    "options", [{"rollout_veto": 0.3}, {"rollout_reject": "mean_k1", "rollout_reject_above": 1.0}]
)
def test_answers_that_are_left_out(ran, options):
    row, batch = ran(off_by(4.0, slice(8)), **options)
    mask = batch.mask
    assert batch.corrections.weights is None
    assert not mask[:8].any() and mask[8:].any(1).all()
    answered = 16 * row["val/answer_tokens"]  # of all answers
    left_out = answered - mask.sum().item()
    assert row["rollout/rs_masked_fraction"] == pytest.approx(left_out / answered)


def test_advantages_are_whitened_over_what_is_left(ran):
    _, batch = ran(off_by(4.0, slice(8)), rollout_veto=0.3)
    kept = batch.advantages[batch.mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-5)
    assert kept.std().item() == pytest.approx(1, rel=1e-3)


def test_nothing_left_is_no_update_of_nan(ran):
    row, batch = ran(off_by(4.0), rollout_veto=0.3, aggregation="seq-mean-token-mean")
    assert not batch.mask.any()
    assert row["loss"] == 0 and row["grad_norm"] == 0 and row["skipped_updates"] == 0


@pytest.mark.parametrize("estimator", ["gae", "reinforce"])
def test_bypass_asks_the_policy_for_nothing(ran, monkeypatch, estimator):
    """Old log-probs are the engine's, so the loss's first ratio is the trainer's over it."""
    calls, real = [], measure.logprobs
    monkeypatch.setattr(measure, "logprobs", lambda *x: calls.append(x[2]) or real(*x))
    row, batch = ran(off_by(1.25), bypass=True, estimator=estimator, trainable_layers=2)
    assert batch.corrections.weights is None
    assert row["val/ratio"] == pytest.approx(1 / 1.25, rel=1e-4)
    assert row["val/rollout_logp_gap"] == 0
    assert len(calls) == 3  # the reference's: of the step's answers, and of the held-out ones twice


def test_the_tokens_of_the_highest_entropy_steer(ran):
    _, batch = ran(sample, top_entropy_quantile=0.25)
    entropy, weights, mask = batch.old.entropy, batch.corrections.weights, batch.mask
    kept, least = weights > 0, entropy[weights > 0].min()
    assert least > entropy[mask & ~kept].max()
    share = 0.25 * int(mask.sum())  # and those of the same entropy as the last of them
    assert (entropy[mask] > least).sum() <= share + 1 and kept.sum() >= share - 1
    assert torch.equal(mask, batch.rollout.mask)  # all others count, in everything else


def test_answers_that_have_moved_away_lose_their_negative_advantages(ran, monkeypatch):
    """The engine says 4 times the policy's probability for half of them: 1.4 nats a token."""
    calls, real = [], ppo.linear_policy_loss

    def record(hidden, weight, labels, old_logp, advantages, mask, **options):
        calls.append((advantages, mask, options["importance_weights"]))
        return real(hidden, weight, labels, old_logp, advantages, mask, **options)

    monkeypatch.setattr(ppo, "linear_policy_loss", record)
    row, batch = ran(off_by(4.0, slice(8)), off_policy_mask_threshold=1.0)
    ((advantages, mask, weights),) = calls
    left_out = mask & (weights == 0)
    assert (advantages[left_out] < 0).all()
    assert left_out.sum() == (batch.mask & (batch.advantages < 0))[:8].sum() > 0
    assert row["val/ratio"] == pytest.approx(1, rel=1e-4)  # all others count, in everything else
