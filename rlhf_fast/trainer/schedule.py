"""What steers a run from step to step and must survive a restart."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from transformers import get_scheduler

from rlhf_fast.trainer.config import PPOConfig, RunConfig


class Updates:
    """How many updates in a row could not be made."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.skipped_in_a_row = 0

    def made(self, update: bool) -> bool:
        """Count an update made or skipped; whether the run may go on."""
        self.skipped_in_a_row = 0 if update else self.skipped_in_a_row + 1
        return self.skipped_in_a_row < self.config.max_skipped_updates

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state["skipped_in_a_row"], int):
            raise TypeError(f"skipped_in_a_row={state['skipped_in_a_row']}")
        self.skipped_in_a_row = state["skipped_in_a_row"]


class Control(Updates):
    """The KL coefficient, and the updates that could not be made."""

    config: PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.beta = config.beta

    def adapt(self, kl: float) -> None:
        """β ← β·(1 + clip(kl/target − 1, ±0.2)·n/horizon), Ziegler et al. 2019 (arXiv:1909.08593).

        kl: mean KL of a *sequence*, in nats. Its mean over tokens would leave β at its floor. One
        that is not finite leaves β as it is.
        """
        target = self.config.adaptive_kl_target
        # min and max would let NaN pass, and β would stay NaN: such a batch says nothing of it.
        if target is not None and math.isfinite(kl):
            error = min(max(kl / target - 1, -0.2), 0.2)
            self.beta *= 1 + error * self.config.batch_size / self.config.kl_horizon

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"beta": self.beta, "given_beta": self.config.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not (math.isfinite(state["beta"]) and state["beta"] >= 0):
            raise ValueError(f"beta={state['beta']}")
        if state.get("given_beta", self.config.beta) == self.config.beta:  # else it was changed
            self.beta = state["beta"]


class Schedule:
    """Step sizes: the optimizer's own, times a function of the updates made.

    It keeps nothing: torch's scheduler and the optimizer's state would bring the old step sizes
    back where a run goes on with others.

    frozen: so many updates leave the first group, the policy's, as it is, with a step size of 0;
    Adam's moments fill with its gradients, so that they are right when it begins.
    """

    def __init__(
        self, optimizer: Optimizer, name: str, warmup: int, updates: int, frozen: int = 0
    ) -> None:
        self.optimizer, self.frozen = optimizer, frozen
        self.highest = [group["lr"] for group in optimizer.param_groups]
        self.rate = get_scheduler(name, optimizer, warmup, updates).lr_lambdas[0]
        self.after(0)

    def after(self, updates: int) -> None:
        """Set the step sizes of the update that follows so many."""
        self.updates = updates
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * self.rate(updates)
        if updates < self.frozen:
            self.optimizer.param_groups[0]["lr"] = 0.0

    def get_last_lr(self) -> list[float]:
        """As torch's schedulers say it, for callbacks."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self) -> None:
        self.after(self.updates + 1)
