"""Statistics of parts as those of the whole: sums and counts are added up, never means of parts.

A step learns in minibatches, each in micro-batches, each process on a share of them; tokens that
cannot matter leave a loss, so that parts of one size may know of few tokens or of many. A part's
mean therefore counts as often as there are numbers in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rlhf_fast import RolloutStats, masked_mean, token_kl, value_loss
from rlhf_fast.ops.policy_loss import PolicyStats
from rlhf_fast.ops.value_loss import ValueStats
from rlhf_fast.trainer.batch import Batch
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.measure import Measured
from rlhf_fast.trainer.rollout.sample import Rollout


class Means:
    """Weighted means by name, in float64, without waiting for the device until one is read.

    names: all that may be added, the same in every process, also in one that has nothing to add.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(names)
        # [names, 2]: Σ count · mean, and Σ count. Processes and parts are added up in it.
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)

    def add(self, means: Mapping[str, Tensor | float], count: Tensor | float) -> None:
        """Means over `count` numbers; of none they say nothing, whatever they are."""
        device = self.sums.device
        n = torch.as_tensor(count, dtype=torch.float64, device=device)
        for name, mean in means.items():
            x = torch.as_tensor(mean, device=device).detach().double()
            self.sums[self.names.index(name)] += torch.stack([torch.where(n > 0, n * x, 0.0), n])

    def merge(self, other: Means) -> None:
        """Take in all that another has, of some of these names."""
        for name, sums in zip(other.names, other.sums, strict=True):
            self.sums[self.names.index(name)] += sums

    def __getitem__(self, name: str) -> Tensor:
        """NaN where nothing was added."""
        total, count = self.sums[self.names.index(name)]
        return total / count

    def known(self) -> dict[str, float]:
        """The means of which something was added."""
        rows = zip(self.names, self.sums.tolist(), strict=True)
        return {name: total / count for name, (total, count) in rows if count}


# How an update's policy differs from the one that sampled: over the tokens that it is known of.
OF_POLICY = ("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "val/ratio")
# E[(ratio − 1)²], whence the variance of all parts together: near 1 no digit is lost.
SPREAD = "val/ratio_var"


def with_variance(means: dict[str, float]) -> dict[str, float]:
    """The ratio's mean square distance from 1 as its variance."""
    if SPREAD not in means:
        return means
    return means | {SPREAD: max(0.0, means[SPREAD] - (means["val/ratio"] - 1) ** 2)}


class UpdateMetrics:
    """Metrics of a step's updates, each made of a minibatch in parts: sums of the parts' losses,
    means of the statistics over the tokens that are known."""

    def __init__(self, device: torch.device, *, critic: bool) -> None:
        self.device = device
        self.losses = ["loss", "loss/policy_avg"] + ["loss/value_avg"] * critic
        self.statistics = [*OF_POLICY, SPREAD] + ["val/clipfrac_avg"] * critic
        self.step = Means([*self.losses, *self.statistics, "grad_norm"], device)
        self.updates = self.skipped = 0

    def begin(self) -> None:
        """A minibatch begins."""
        self.known = Means(self.statistics, self.device)
        self.sums = dict.fromkeys(self.losses, torch.zeros((), device=self.device))

    def add_policy(self, loss: Tensor, stats: PolicyStats) -> None:
        self.sums["loss"] = self.sums["loss"] + loss.detach()
        self.sums["loss/policy_avg"] = self.sums["loss/policy_avg"] + loss.detach()
        self.known.add(
            {
                "policy/approxkl_avg": stats.old_kl_k2,
                "policy/clipfrac_avg": stats.clipfrac,
                "policy/entropy_avg": stats.entropy,
                "val/ratio": stats.ratio_mean,
                SPREAD: stats.ratio_var + (stats.ratio_mean - 1) ** 2,
            },
            stats.tokens,  # rows of no advantage may have left
        )

    def add_values(self, loss: Tensor, stats: ValueStats, coefficient: float) -> None:
        self.sums["loss"] = self.sums["loss"] + times(coefficient, loss.detach())
        self.sums["loss/value_avg"] = self.sums["loss/value_avg"] + loss.detach()
        self.known.add({"val/clipfrac_avg": stats.clipfrac}, stats.tokens)

    def sum_up(self, workers: Workers) -> None:
        """Over all processes, once a minibatch's parts are there."""
        totals = torch.stack(list(self.sums.values()))
        workers.sum([totals, self.known.sums])
        self.sums = dict(zip(self.sums, totals, strict=True))

    @property
    def loss(self) -> Tensor:
        """The minibatch's loss."""
        return self.sums["loss"]

    @property
    def kl(self) -> Tensor:
        """The minibatch's KL from the policy that sampled it: mean of ½(log ratio)²."""
        return self.known["policy/approxkl_avg"]

    def end(self, norm: Tensor, made: bool) -> None:
        """The minibatch became an update, or was skipped."""
        if not made:
            self.skipped += 1
            return
        self.updates += 1
        self.step.add(self.sums | {"grad_norm": norm}, 1)
        self.step.merge(self.known)

    def of_the_step(self, old: Measured, mask: Tensor) -> dict[str, float]:
        stats = with_variance(self.step.known())
        if self.updates and "val/ratio" not in stats:  # no token had an advantage: none was read
            stats |= unmoved(old, mask)
        return {**stats, "policy/updates": self.updates, "skipped_updates": self.skipped}


def unmoved(old: Measured, mask: Tensor) -> dict[str, float]:
    """A step's statistics of the policy that it began with."""
    entropy = masked_mean(old.entropy, mask).item()
    zeros = dict.fromkeys(("policy/approxkl_avg", "policy/clipfrac_avg", SPREAD), 0.0)
    return zeros | {"policy/entropy_avg": entropy, "val/ratio": 1.0}


def of_the_answers(
    columns: dict[str, Tensor], scores: Tensor, batch: Batch, beta: float, kept: Tensor
) -> dict[str, float]:
    """Metrics of a step's answers, before anything is learnt from them.

    columns: each scorer's scores [B]; scores [B]: as they are learnt from; kept [B]: the answers
    that have one.
    """
    rollout, old, mask = batch.rollout, batch.old, batch.rollout.mask
    kl = masked_sum(token_kl(old.logp, old.ref_logp, "k1"), mask)[kept].mean().item()  # a sequence
    row = {
        **{f"objective/{name}": x.nanmean().item() for name, x in columns.items()},
        "objective/scores_std": columns["scores"][kept.cpu()].std(correction=0).item(),
        "objective/kl": kl,
        "objective/kl_coef": beta,
        "objective/entropy": masked_sum(old.entropy, mask)[kept].mean().item(),
        "objective/non_score_reward": -times(beta, kl),
        "objective/rlhf_reward": scores[kept].mean().item() - times(beta, kl),
        "val/num_eos_tokens": int(rollout.ended.sum()),
        "val/answer_tokens": mask.sum().item() / max(1, int(kept.sum())),
        "rollout/answers_lost": int((~kept).sum()),  # a reward failed for them
        **rollout_gap(rollout, old),
        **corrected(batch.corrections.stats),
    }
    if old.values is not None:
        row["val/explained_var"] = explained_variance(old.values, batch.returns, mask)
    return row


def times(coefficient: float, x: Tensor | float) -> Tensor | float:
    """coefficient · x, and 0 where the coefficient is 0, whatever x is: infinite x included."""
    return coefficient * x if coefficient else 0.0


def rollout_gap(rollout: Rollout, old: Measured) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's, of the same tokens."""
    gap = (rollout.logp - old.logp).abs()
    return {
        "val/rollout_logp_gap": masked_mean(gap, rollout.mask).item(),
        "val/rollout_ratio_max": gap.masked_fill(~rollout.mask, 0.0).max().exp().item(),
    }


def corrected(stats: RolloutStats) -> dict[str, float]:
    """What the correction for the engine did, in verl's words: importance sampling, rejection."""
    numbers = dict(zip(stats._fields, torch.stack(stats).tolist(), strict=True))
    return {
        "rollout/is_mean": numbers["ratio_mean"],
        "rollout/is_max": numbers["ratio_max"],
        "rollout/is_oob_ratio": numbers["clipfrac"],
        "rollout/is_eff_sample_size": numbers["effective_sample_size"] / max(1, numbers["tokens"]),
        "rollout/rs_masked_fraction": numbers["rejectfrac"],
        "rollout/k3_kl": numbers["kl_k3"],
    }


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B]."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values)/Var(returns): 1 is a perfect critic, 0 one that knows nothing, or
    returns that are all the same (see ValueStats)."""
    return value_loss(values, None, returns, mask, clip=None)[1].explained_var.item()
