"""The trainer: a reward model from preference pairs, then PPO against it.

from rlhf_fast.trainer import PPOConfig, PPOTrainer

trainer = PPOTrainer(model, reward_function, dataset, config=PPOConfig(output_dir="runs/ppo"))
summary = trainer.train()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_fast.trainer.config import PPOConfig, RewardConfig
    from rlhf_fast.trainer.errors import InputError
    from rlhf_fast.trainer.live_plot import LivePlot
    from rlhf_fast.trainer.rollout.protocol import Completions, RolloutEngine, Sampling
    from rlhf_fast.trainer.trainers import PPOTrainer, RewardTrainer

__all__ = [
    "Completions",
    "InputError",
    "LivePlot",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "RolloutEngine",
    "Sampling",
]

# Loaded when they are asked for: the command line says in one line which package is missing.
WHERE = {
    "Completions": "rollout.protocol", "InputError": "errors", "LivePlot": "live_plot",
    "PPOConfig": "config", "PPOTrainer": "trainers", "RewardConfig": "config",
    "RewardTrainer": "trainers", "RolloutEngine": "rollout.protocol",
    "Sampling": "rollout.protocol",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
