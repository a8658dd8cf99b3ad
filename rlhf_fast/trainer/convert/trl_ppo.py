"""TRL 1.12's PPOConfig (trl.experimental.ppo), with the arguments of its example scripts."""

from __future__ import annotations

import math
from typing import Any

from rlhf_fast.trainer.convert.keys import (
    DEFAULTS,
    FAMILIES,
    TRANSFORMERS,
    Framework,
    Settings,
    becomes,
    none,
    of_transformers,
    same,
)

MADE = none("not set: PPOTrainer computes it")

KEYS = TRANSFORMERS | {
    "num_ppo_epochs": same("epochs"),
    "num_mini_batches": same("minibatches"),
    "total_episodes": becomes("steps", "divided by batch_size, rounded up"),
    "response_length": same("max_new_tokens"),
    "temperature": same("temperature"),
    "stop_token": none("an answer always ends at the model's own stop tokens: TRL's eos"),
    "stop_token_id": none("an answer always ends at the model's own stop tokens"),
    "missing_eos_penalty": becomes("missing_eos_penalty", "unset: 0 there, 1 here"),
    "sft_model_path": same("model"),
    "reward_model_path": becomes("reward, value_model", "the critic begins as the reward model, as in TRL's scripts"),
    "model_name_or_path": none("TRL's scripts take only the tokenizer from it: here it is model's"),
    "kl_coef": same("beta"),
    "kl_estimator": same("kl_estimator"),
    "whiten_rewards": same("whiten_rewards"),
    "cliprange": same("clip"),
    "cliprange_value": same("value_clip"),
    "vf_coef": same("value_coef", "both losses have the factor ½"),
    "gamma": same("gamma"),
    "lam": same("lam"),
    "num_sample_generations": becomes("sample_every", "steps divided by it"),
    "local_rollout_forward_batch_size": none("rollouts need no size of their own; micro_batch_size bounds forward passes"),
    "max_grad_norm": same("max_grad_norm", "TRL's PPOTrainer does not scale gradients down"),
    "warmup_steps": becomes("warmup_steps", "TRL counts batches: times epochs and minibatches"),
    "dataset_num_proc": none("prompts are read in the process"),
    "model_adapter_name": none("adapters are trained from nothing: lora_r"),
    "ref_adapter_name": none("the reference is the model without adapters"),
    "ds3_gather_for_generation": none("ZeRO-3 is not supported; FSDP2 gathers by itself"),
    "world_size": none("--processes says it here"),
    "num_total_batches": MADE, "micro_batch_size": MADE, "local_batch_size": MADE,
    "batch_size": MADE, "local_mini_batch_size": MADE, "mini_batch_size": MADE,
}  # fmt: skip

TRL_PPO = {
    "num_ppo_epochs": 4, "num_mini_batches": 1, "response_length": 53, "temperature": 0.7,
    "kl_coef": 0.05, "kl_estimator": "k1", "whiten_rewards": False, "cliprange": 0.2,
    "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95, "learning_rate": 3e-6,
    "num_sample_generations": 10,
}  # fmt: skip


def options(given: Settings, processes: int) -> tuple[dict[str, Any], list[str]]:
    micro = given["per_device_train_batch_size"]
    batch = micro * given["gradient_accumulation_steps"] * processes
    updates = given["num_ppo_epochs"] * given["num_mini_batches"]
    found = of_transformers(given, rounds=1) | {  # a step of TRL's trainer is a batch, as here
        "estimator": "gae", "kl_in": "reward", "batch_size": batch, "micro_batch_size": micro,
        "warmup_steps": given["warmup_steps"] * updates,
        "missing_eos_penalty": given.get("missing_eos_penalty") or 0.0,
    }  # fmt: skip
    said = []
    if episodes := given.get("total_episodes"):
        found["steps"] = math.ceil(episodes / batch)
        if given["num_sample_generations"] > 0:
            found["sample_every"] = max(1, found["steps"] // given["num_sample_generations"])
    else:
        said.append(f"steps: unset total_episodes is num_train_epochs (3) × prompts / {batch}")
    if path := given.get("reward_model_path"):
        found["reward"], found["value_model"] = path, path
    return found, said


FRAMEWORK = Framework("trl-ppo", "TRL 1.12, PPOConfig", KEYS, DEFAULTS | TRL_PPO, FAMILIES, options)
