"""What steers a run from step to step and must survive a restart."""

from __future__ import annotations

from typing import Any

from rlhf_fast.config import PPOConfig


class Control:
    """The KL coefficient, and how many updates in a row could not be made."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.beta = config.beta
        self.skipped_in_a_row = 0

    def adapt(self, kl: float) -> None:
        """β ← β·(1 + clip(kl/target − 1, ±0.2)·n/horizon), Ziegler et al. 2019 (arXiv:1909.08593).

        kl: mean KL of a *sequence*, in nats. Its mean over tokens would leave β at its floor.
        """
        target = self.config.adaptive_kl_target
        if target is not None:
            error = min(max(kl / target - 1, -0.2), 0.2)
            self.beta *= 1 + error * self.config.batch_size / self.config.kl_horizon

    def made(self, update: bool) -> bool:
        """Count an update made or skipped; whether the run may go on."""
        self.skipped_in_a_row = 0 if update else self.skipped_in_a_row + 1
        return self.skipped_in_a_row < self.config.max_skipped_updates

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta = state["beta"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
