"""From REINFORCE to PPO, each rung one change to the rung before it.

Every rung is the same loop on the language model's own ops: token_logprobs, gae, policy_loss,
value_loss. The policy is a table of 25 x 4 logits, the critic a table of 25 values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cat import exact
from cat.env import ACTIONS, STATES
from cat.simulate import Batch, draw_noise, generators, play
from rlhf_fast import gae, policy_loss, token_logprobs, value_loss

GAMMA = 0.95
STEPS = 100  # episodes are cut short here
EPISODES = 16  # in a batch
NO_CLIP = {"clip_low": 1.0, "clip_high": 1e9}  # a ratio is never below 0


# ------------------------------------------------------------- what multiplies ∇log π(a_t|s_t)
# Each gets a batch and the critic's values [S, N, T] and [S, N] (after the last step), and returns
# (ψ, returns), both [S, N, T]. ψ_t carries γ^t: J counts a reward at step t only γ^t times.


def whole_return(batch: Batch, values: Tensor, bootstrap: Tensor) -> tuple[Tensor, Tensor]:
    """ψ_t = R(τ) = Σ_t γ^t r_t, the same for every step of the episode."""
    total = (discounts(batch) * batch.rewards).sum(-1, keepdim=True)
    return total.expand_as(batch.rewards), values


def generalized(
    batch: Batch, values: Tensor, bootstrap: Tensor, *, lam: float
) -> tuple[Tensor, Tensor]:
    """ψ_t = γ^t Â_t by GAE. λ = 1 is Ĝ_t − V(s_t): without a critic, the rewards-to-go."""
    advantages, returns = gae(
        batch.rewards, values, batch.mask,
        gamma=GAMMA, lam=lam, dones=batch.dones, bootstrap=bootstrap,
    )  # fmt: skip
    return discounts(batch) * advantages, returns


def n_step(batch: Batch, values: Tensor, bootstrap: Tensor, *, n: int) -> tuple[Tensor, Tensor]:
    """ψ_t = γ^t (Σ_{k<n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t)): n TD errors, summed.

    The V in between cancel, and what lies behind the episode's end is 0.
    """
    errors, _ = gae(
        batch.rewards, values, batch.mask,
        gamma=GAMMA, lam=0.0, dones=batch.dones, bootstrap=bootstrap,
    )  # fmt: skip
    steps = errors.shape[-1]
    advantages = sum(GAMMA**k * F.pad(errors, (0, k))[..., k:] for k in range(min(n, steps)))
    return discounts(batch) * advantages, advantages + values


def discounts(batch: Batch) -> Tensor:
    return GAMMA ** torch.arange(batch.rewards.shape[-1])


# ------------------------------------------------------------------------------- the rungs


@dataclass(frozen=True)
class Rung:
    name: str
    credit: Callable[[Batch, Tensor, Tensor], tuple[Tensor, Tensor]]
    critic: str = "none"  # "none": V = 0; "constant": one number; "state": one number a cell
    epochs: int = 1  # passes over a batch; after the first update it is off-policy
    ratio: str = "token"  # π/π_old of the token alone, or the product over the "episode"
    clip: float | None = None
    value_clip: float | None = None  # in units of reward
    entropy_coef: float = 0.0


REINFORCE = Rung("REINFORCE", whole_return)
TO_GO = replace(REINFORCE, name="rewards-to-go", credit=partial(generalized, lam=1.0))
BASELINE = replace(TO_GO, name="baseline", critic="constant")
VALUE = replace(BASELINE, name="value function", critic="state")
N_STEP = replace(VALUE, name="5-step", credit=partial(n_step, n=5))
GAE = replace(N_STEP, name="GAE", credit=partial(generalized, lam=0.9))
OFF_POLICY = replace(GAE, name="off-policy", epochs=4)
PPO = replace(OFF_POLICY, name="PPO", clip=0.2, value_clip=10.0, entropy_coef=0.5)
LADDER = (REINFORCE, TO_GO, BASELINE, VALUE, N_STEP, GAE, OFF_POLICY, PPO)
# Beside the ladder: importance sampling as its derivation has it, unbiased and useless.
WHOLE_RATIO = replace(VALUE, name="product of ratios", epochs=4, ratio="episode")


# ---------------------------------------------------------------------------- policy and critic


def new_tables(seeds: int) -> tuple[Tensor, Tensor]:
    """(logits [S, 25, 4], critic [S, 25]), all zero: every move alike, nothing known."""
    logits = torch.zeros(seeds, STATES, ACTIONS, requires_grad=True)
    return logits, torch.zeros(seeds, STATES, requires_grad=True)


def look_up(table: Tensor, states: Tensor) -> Tensor:
    """Rows of table [S, 25, ...] at states [S, ...]."""
    offset = torch.arange(len(table)).view(-1, *[1] * (states.dim() - 1)) * STATES
    return F.embedding(states + offset, table.flatten(0, 1))


def value_of(rung: Rung, critic: Tensor, states: Tensor) -> Tensor:
    if rung.critic == "none":
        return torch.zeros(states.shape)
    if rung.critic == "constant":  # one number stands in the table's first cell
        states = torch.zeros_like(states)
    return look_up(critic[..., None], states).squeeze(-1)


def log_probs(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log π(a_t|s_t), entropy), [S, N, T]."""
    return token_logprobs(look_up(logits, batch.states), batch.actions, entropy=True)


# ---------------------------------------------------------------------------------- the losses


def losses(
    rung: Rung, logits: Tensor, critic: Tensor, batch: Batch, old: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """(policy loss, value loss), summed over seeds: no seed's gradient touches another's.

    Per seed 1/N Σ_i Σ_t, the slides' ĝ: a mean over episodes of a sum over steps.
    """
    old_logp, old_values, credit, returns = old
    logp, entropy = log_probs(logits, batch)
    per_episode = {"aggregation": "seq-mean-token-sum", "normalizer": batch.mask.shape[1]}
    clip = NO_CLIP if rung.clip is None else {"clip_low": rung.clip, "clip_high": rung.clip}
    weights = None
    if rung.ratio == "episode":  # times those of the episode's other steps
        log_ratio = ((logp - old_logp) * batch.mask).detach()
        weights = (log_ratio.sum(-1, keepdim=True) - log_ratio).exp()
    policy, _ = policy_loss(
        logp, old_logp, credit, batch.mask, **clip, importance_weights=weights,
        entropy=entropy, entropy_coef=rung.entropy_coef, **per_episode,
    )  # fmt: skip
    if rung.critic == "none":
        return policy, torch.zeros(())
    values = value_of(rung, critic, batch.states)
    value, _ = value_loss(
        values, old_values, returns, batch.mask, clip=rung.value_clip, **per_episode
    )
    return policy, value


@torch.no_grad()
def remember(rung: Rung, logits: Tensor, critic: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """(old log-probs, old values, ψ, returns): fixed before the first update on the batch."""
    old_logp, _ = log_probs(logits, batch)
    old_values = value_of(rung, critic, batch.states)
    return old_logp, old_values, *rung.credit(batch, old_values, value_of(rung, critic, batch.last))


# ------------------------------------------------------------------------------------ training


@dataclass
class Result:
    returns: Tensor  # [S, batches + 1]: the exact J(π), before training and after each batch
    logits: list[Tensor]  # the policies [S, 25, 4] at the same moments
    critics: list[Tensor]  # and the critics [S, 25]


def train(
    rung: Rung,
    *,
    seeds: list[int],
    batches: int,
    slip: float,
    learning_rate: float = 0.1,
    value_learning_rate: float = 2.0,
) -> Result:
    """All seeds side by side; seed i alone gives the same numbers."""
    rngs = generators(seeds)
    logits, critic = new_tables(len(seeds))
    optimizer = torch.optim.Adam(
        [{"params": [logits]}, {"params": [critic], "lr": value_learning_rate}],
        lr=learning_rate, eps=1e-5,
    )  # fmt: skip
    history = [(logits.detach().clone(), critic.detach().clone())]
    for _ in range(batches):
        batch = play(logits, draw_noise(rngs, EPISODES, STEPS), slip)
        old = remember(rung, logits, critic, batch)
        for _ in range(rung.epochs):
            policy, value = losses(rung, logits, critic, batch, old)
            optimizer.zero_grad()
            (policy + value).backward()
            optimizer.step()
        history.append((logits.detach().clone(), critic.detach().clone()))
    policies, critics = map(list, zip(*history, strict=True))
    returns = exact.expected_return(torch.stack(policies, 1), slip, GAMMA)
    return Result(returns, policies, critics)
