"""Many cats at once, on tensors: S seeds, each with N episodes of at most T steps.

Every seed draws from a generator of its own, so its numbers do not depend on the others beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cat.env import ACTIONS, START, STATES, cell_of, move, state_of


def tables() -> tuple[Tensor, Tensor, Tensor]:
    """(next state, reward, end) [25, 4] of every sober move."""
    moves = [
        (state_of(cell), reward, end)
        for s in range(STATES)
        for cell, reward, end in (move(cell_of(s), a) for a in range(ACTIONS))
    ]
    following, reward, end = zip(*moves, strict=True)
    shape = (STATES, ACTIONS)
    return (
        torch.tensor(following).view(shape),
        torch.tensor(reward).view(shape),
        torch.tensor(end).view(shape),
    )


NEXT, REWARD, END = tables()


@dataclass
class Batch:
    """Episodes, one a row, padded on the right: laid out like a language model's answers."""

    states: Tensor  # [S, N, T] int64: where the cat stood
    actions: Tensor  # [S, N, T] int64: what it chose (a slip may have moved it elsewhere)
    rewards: Tensor  # [S, N, T]
    mask: Tensor  # [S, N, T] bool, True = a step that was made
    dones: Tensor  # [S, N, T] bool, True = bath or meat; an episode cut short by T has none
    last: Tensor  # [S, N] int64: the state after the last step

    def select(self, rows: Tensor) -> Batch:
        """The same episodes of every seed: rows [n] of the N."""
        return Batch(**{name: x[:, rows] for name, x in vars(self).items()})


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(rngs: list[torch.Generator], episodes: int, steps: int) -> Tensor:
    """[S, N, T, 2] uniform numbers: one for the choice of the action, one for the slip."""
    return torch.stack([torch.rand(episodes, steps, 2, generator=rng) for rng in rngs])


@torch.no_grad()
def play(logits: Tensor, noise: Tensor, slip: float) -> Batch:
    """Episodes under the policies softmax(logits) [S, 25, 4], driven by noise [S, N, T, 2]."""
    seeds, episodes, steps, _ = noise.shape
    thresholds = logits.softmax(-1).cumsum(-1)[..., :-1].flatten(0, 1)  # [S·25, 3]
    offset = torch.arange(seeds)[:, None] * STATES
    choice, luck = noise.unbind(-1)
    slipped = luck < slip
    slipped_to = (luck / slip * ACTIONS).long() if slip else torch.zeros_like(luck).long()

    state = torch.full((seeds, episodes), state_of(START))
    running = torch.ones(seeds, episodes, dtype=torch.bool)
    columns = []
    for t in range(steps):
        action = (choice[..., t, None] >= thresholds[state + offset]).sum(-1)
        moved = torch.where(slipped[..., t], slipped_to[..., t], action)
        end = END[state, moved] & running
        columns.append((state, action, REWARD[state, moved] * running, running, end))
        state = torch.where(running, NEXT[state, moved], state)
        running = running & ~end
        if not running.any():
            break
    return Batch(*(torch.stack(column, -1) for column in zip(*columns, strict=True)), state)
