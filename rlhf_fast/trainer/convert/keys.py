"""What a table from another trainer's keys to ours is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]  # the other's keys, what was not given at its default


@dataclass(frozen=True)
class Key:
    ours: str = ""  # the options that it becomes, separated by commas; "": it has no equal
    note: str = ""  # the reason, or what else is to be known
    copied: bool = False  # the value stays as it is

    @property
    def options(self) -> list[str]:
        return [name.strip() for name in self.ours.split(",") if name.strip()]


def same(ours: str, note: str = "") -> Key:
    return Key(ours, note, copied=True)


def becomes(ours: str, note: str) -> Key:
    return Key(ours, note)


def none(why: str) -> Key:
    return Key("", why)


@dataclass(frozen=True)
class Framework:
    name: str  # as --framework has it
    title: str
    keys: dict[str, Key]
    defaults: dict[str, Any]  # of the framework, where they count
    families: dict[str, str]  # beginning of a key -> why none of them has an equal
    # (settings, processes) -> our options of those that are not copied, and what must be said
    options: Callable[[Settings, int], tuple[dict[str, Any], list[str]]]

    def why(self, key: str) -> str:
        """Why a key that the table does not have is left out."""
        found = [why for start, why in self.families.items() if key.startswith(start)]
        return found[0] if found else "not known here"


# transformers' TrainingArguments, and the scripts' own arguments, as TRL's examples have them.
TRANSFORMERS = {
    "output_dir": same("output_dir"),
    "seed": same("seed"),
    "max_grad_norm": same("max_grad_norm"),
    "adam_beta1": same("adam_beta1"),
    "adam_beta2": same("adam_beta2"),
    "adam_epsilon": same("adam_epsilon"),
    "weight_decay": same("weight_decay"),
    "learning_rate": becomes("learning_rate, value_learning_rate", "one step size for both there"),
    "lr_scheduler_type": becomes("lr_scheduler_type", "constant is constant_with_warmup here"),
    "warmup_steps": becomes("warmup_steps", "counted in optimiser steps here"),
    "bf16": same("bf16", "weights stay float32"),
    "report_to": becomes("report_to", "separated by commas; none and all are left out"),
    "logging_steps": becomes("log_every", "of printed lines: metrics.jsonl has every step"),
    "save_steps": becomes("save_every", "in rounds of sampling here"),
    "save_total_limit": same("save_total_limit"),
    "eval_strategy": becomes("eval_every", "steps, with eval_steps; else before and after only"),
    "eval_steps": becomes("eval_every", "in rounds of sampling here"),
    "load_best_model_at_end": same("load_best_model_at_end"),
    "push_to_hub": same("push_to_hub"),
    "hub_model_id": same("hub_model_id"),
    "hub_private_repo": same("hub_private_repo"),
    "per_device_train_batch_size": becomes("batch_size, micro_batch_size", "times processes and accumulation: batch_size"),
    "gradient_accumulation_steps": becomes("batch_size", "see per_device_train_batch_size"),
    "gradient_checkpointing": none("activations are kept; a smaller micro_batch_size needs less"),
    "dataset_name": same("data"),
    "dataset_config": same("subset"),
    "dataset_train_split": same("split"),
    "dataset_test_split": becomes("eval_split", "left out where it is the training split"),
    "trust_remote_code": same("trust_remote_code"),
    "attn_implementation": same("attn_implementation"),
    "use_peft": becomes("lora_r", "without it the other LoRA keys count for nothing"),
    "lora_r": becomes("lora_r", "where use_peft is set"),
    "lora_alpha": becomes("lora_alpha", "where use_peft is set"),
    "lora_target_modules": becomes("lora_target_modules", "where use_peft is set"),
}  # fmt: skip

DEFAULTS = {
    "seed": 42, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "weight_decay": 0.0, "lr_scheduler_type": "linear", "warmup_steps": 0,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip

FAMILIES = {
    "vllm_": "see rollout_engine_options (docs/engines.md)",
    "deepspeed": "given to accelerate, as `accelerate launch --config_file`",
    "fsdp": "given to accelerate, as `accelerate launch --config_file`",
    "load_in_": "models are not quantised",
    "bnb_": "models are not quantised",
    "hub_": "only hub_model_id and hub_private_repo",
    "dataloader_": "batches are made in the process",
    "logging_": "see log_every and report_to",
    "lora_": "only rank, alpha and target modules",
    "torch_": "torch is not told by the trainer",
    "resume_from_checkpoint": "--resume, a flag of the call",
    "overwrite_output_dir": "--overwrite, a flag of the call",
    "dtype": "trained in float32; save_dtype is of the saved model",
    "num_train_epochs": "steps says how long a run is",
    "warmup_ratio": "warmup_steps has a number",
    "optim": "AdamW",
}


def of_transformers(given: Settings, rounds: int) -> dict[str, Any]:
    """rounds: optimiser steps in one round of sampling."""
    found: dict[str, Any] = {"learning_rate": given["learning_rate"]}
    found["value_learning_rate"] = given["learning_rate"]
    kind = given["lr_scheduler_type"]
    found["lr_scheduler_type"] = scheduler(kind)
    trackers = given.get("report_to")
    if trackers not in (None, "none", "all", ["none"], ["all"], []):
        found["report_to"] = trackers if isinstance(trackers, str) else ",".join(trackers)
    if "logging_steps" in given:
        found["log_every"] = per_round(given["logging_steps"], rounds)
    if "save_steps" in given:
        found["save_every"] = per_round(given["save_steps"], rounds)
    if given.get("eval_strategy") == "steps" and given.get("eval_steps"):
        found["eval_every"] = per_round(given["eval_steps"], rounds)
    test = given.get("dataset_test_split")
    if test is not None and test != given.get("dataset_train_split", "train"):
        found["eval_split"] = test
    if given.get("use_peft"):
        found["lora_r"], found["lora_alpha"] = given.get("lora_r", 16), given.get("lora_alpha", 32)
        if modules := given.get("lora_target_modules"):
            found["lora_target_modules"] = (
                modules if isinstance(modules, str) else ",".join(modules)
            )
    return found


def per_round(steps: Any, rounds: int) -> Any:
    """A share of the run (below 1) cannot be told without its length."""
    return max(1, round(steps / rounds)) if steps >= 1 else None


def scheduler(kind: str) -> str:
    kinds = {"constant": "constant_with_warmup", "cosine_with_min_lr": "cosine"}
    return kinds.get(kind, kind)
