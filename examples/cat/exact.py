"""Dynamic programming on the grid: the exact values, gradients and optimum, in float64.

With 25 states every expectation of the slides is a linear system, so no estimate has to be taken
on trust. S policies [S, 25, 4] are solved at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat.env import ACTIONS, START, STATES, state_of
from cat.simulate import END, NEXT, REWARD


def model(slip: float) -> tuple[Tensor, Tensor]:
    """P(s'|s, a) [25, 4, 25], 0 where the episode ends, and the expected reward r(s, a) [25, 4]."""
    sober = torch.zeros(STATES, ACTIONS, STATES, dtype=torch.float64)
    sober.scatter_(2, NEXT[..., None], (~END[..., None]).double())
    reward = REWARD.double()
    transitions = (1 - slip) * sober + slip * sober.mean(1, keepdim=True)
    return transitions, (1 - slip) * reward + slip * reward.mean(1, keepdim=True)


def solve(policy: Tensor, slip: float, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """(V [S, 25], Q [S, 25, 4], visits [S, 25]) of policies [S, 25, 4] of probabilities.

    V = (I − γP_π)⁻¹ r_π; visits(s) = Σ_t γ^t P(s_t = s), from the start.
    """
    policy = policy.double()
    transitions, reward = model(slip)
    step = torch.einsum("...sa,san->...sn", policy, transitions)
    system = torch.eye(STATES, dtype=torch.float64) - gamma * step
    values = torch.linalg.solve(system, (policy * reward).sum(-1))
    q = reward + gamma * torch.einsum("san,...n->...sa", transitions, values)
    begin = torch.zeros_like(values)
    begin[..., state_of(START)] = 1
    return values, q, torch.linalg.solve(system.transpose(-1, -2), begin)


def expected_return(logits: Tensor, slip: float, gamma: float) -> Tensor:
    """J(π) = V(start), [S]."""
    return solve(logits.double().softmax(-1), slip, gamma)[0][..., state_of(START)]


def gradient(logits: Tensor, slip: float, gamma: float) -> Tensor:
    """∇J for the logits [S, 25, 4]: visits(s) π(a|s) A(s, a), the policy gradient theorem."""
    policy = logits.double().softmax(-1)
    values, q, visits = solve(policy, slip, gamma)
    return visits[..., None] * policy * (q - values[..., None])


def surrogate_gradient(logits: Tensor, old_logits: Tensor, slip: float, gamma: float) -> Tensor:
    """Gradient in `logits` of E_{s, a ~ π_old}[Σ_t γ^t ρ_t A_old(s, a)].

    What a ratio for each token estimates: states and advantages stay the old policy's.
    """
    policy = logits.double().softmax(-1)
    values, q, visits = solve(old_logits.double().softmax(-1), slip, gamma)
    advantage = q - values[..., None]
    advantage = advantage - (policy * advantage).sum(-1, keepdim=True)
    return visits[..., None] * policy * advantage


def optimum(slip: float, gamma: float) -> tuple[float, Tensor]:
    """(the best return from the start, the greedy policy [25, 4]) by policy iteration."""
    policy = torch.full((STATES, ACTIONS), 1 / ACTIONS, dtype=torch.float64)
    while True:
        values, q, _ = solve(policy, slip, gamma)
        better = torch.nn.functional.one_hot(q.argmax(-1), ACTIONS).double()
        if torch.allclose(solve(better, slip, gamma)[0], values, rtol=1e-12, atol=1e-12):
            return values[state_of(START)].item(), policy
        policy = better
