"""Noise and bias of each rung's gradient, all rungs at the same fixed policies.

Policies and critics are snapshots of one training run. At each, many independent batches of 16
episodes are played and every rung turns the same episodes into its gradient estimate. The exact
gradient is known (exact.py), so both errors can be told apart:

    variance = E‖ĝ − E ĝ‖² / ‖∇J‖²        bias = ‖E ĝ − ∇J‖ / ‖∇J‖        cosine of E ĝ and ∇J
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cat import exact
from cat.env import STATES
from cat.ladder import EPISODES, GAMMA, STEPS, Result, Rung, losses, remember
from cat.simulate import Batch, draw_noise, generators, play

LAG = 3  # updates between the policy that played and the one that learns: the 4th epoch's


@dataclass
class Snapshot:
    batches: int  # of training
    logits: Tensor  # [25, 4]
    old_logits: Tensor  # [25, 4], LAG updates earlier
    critic: Tensor  # [25], as the run had it: it has seen few episodes, of older policies


@dataclass
class Estimate:
    variance: float
    bias: float
    bias_error: float  # standard error of the bias, from the finite number of batches
    cosine: float


def snapshot(run: Result, batches: int, lag: int = LAG) -> Snapshot:
    """Of a run's first seed."""
    logits, critics = run.logits, run.critics
    return Snapshot(batches, logits[batches][0], logits[batches - lag][0], critics[batches][0])


def gradients(
    rung: Rung, snapshot: Snapshot, slip: float, batch: Batch, old_batch: Batch
) -> Tensor:
    """The rung's estimate of ∇J from each of K batches: [K, 25, 4], float64.

    `batch` was played by the snapshot's policy, `old_batch` by the earlier one.
    """
    played = batch if rung.epochs == 1 else old_batch
    size = len(played.states)
    old_logits = snapshot.logits if rung.epochs == 1 else snapshot.old_logits
    critic = critic_for(rung, snapshot, slip).expand(size, -1)
    old = remember(rung, old_logits.expand(size, -1, -1), critic, played)
    logits = snapshot.logits.expand(size, -1, -1).clone().requires_grad_()
    policy, _ = losses(rung, logits, critic, played, old)
    (gradient,) = torch.autograd.grad(-policy, logits)  # a loss goes down where J goes up
    return gradient.double()


def critic_for(rung: Rung, snapshot: Snapshot, slip: float) -> Tensor:
    """The snapshot's critic; where one number has to do, its mean over the cells visited."""
    if rung.critic != "constant":
        return snapshot.critic
    _, _, visits = exact.solve(snapshot.logits.double().softmax(-1), slip, GAMMA)
    return ((visits * snapshot.critic).sum() / visits.sum()).float().expand(STATES)


def estimate(estimates: Tensor, truth: Tensor) -> Estimate:
    """From [K, ...] estimates of truth [...]."""
    k, scale = len(estimates), truth.norm()
    variance = estimates.var(0).sum()
    mean = estimates.mean(0)
    # ‖mean − truth‖² has the mean's own variance in it
    bias = ((mean - truth).square().sum() - variance / k).clamp(min=0).sqrt()
    return Estimate(
        variance=(variance / scale**2).item(),
        bias=(bias / scale).item(),
        bias_error=((variance / k).sqrt() / scale).item(),
        cosine=((mean * truth).sum() / (mean.norm() * scale)).item(),
    )


def measure(
    rungs: tuple[Rung, ...], snapshot: Snapshot, *, batches: int, slip: float, seed: int
) -> dict[str, Estimate]:
    noise = draw_noise(generators([seed]), batches * EPISODES, STEPS)
    noise = noise.view(batches, EPISODES, STEPS, 2)
    batch, old_batch = (
        play(logits.expand(batches, -1, -1), noise, slip)
        for logits in (snapshot.logits, snapshot.old_logits)
    )
    truth = exact.gradient(snapshot.logits, slip, GAMMA)
    return {
        rung.name: estimate(gradients(rung, snapshot, slip, batch, old_batch), truth)
        for rung in rungs
    }
