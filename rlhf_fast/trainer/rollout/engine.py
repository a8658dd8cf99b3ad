"""A rollout engine of the user's own, by its name."""

from __future__ import annotations

import inspect

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.rewards.functions import load_function
from rlhf_fast.trainer.rollout.sample import (
    RolloutEngine,
)


def load_engine(config: PPOConfig, given: Given) -> RolloutEngine | None:
    if config.rollout_engine is None:
        return None
    engine = given.get(config.rollout_engine)
    if engine is None:
        engine = load_function(config.rollout_engine, "rollout_engine")
    try:
        inspect.signature(engine).bind("model", "ids", "mask", "sampling", "draws")
    except TypeError as error:
        raise InputError(
            f"rollout_engine={config.rollout_engine}: {error}; expected a function of "
            "(model, ids, mask, sampling, draws)"
        ) from None
    return engine
