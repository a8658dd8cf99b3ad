"""TRL's GRPOConfig (1.16; 1.12 has fewer keys), with the arguments of its example scripts."""

from __future__ import annotations

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

ADAPTIVE = none("the entropy's coefficient stays as it is: entropy_coef")
CORRECTION = none(
    "there is no vLLM whose log-probs differ; rollout_correction is for an engine of your own"
)
REFERENCE = none("the reference stays what the model began as")
LOGGING = none("completions/ has every evaluation; --sample_every prints")

KEYS = TRANSFORMERS | {
    "model_name_or_path": same("model"),
    "reward_model_name_or_path": becomes("reward", "with reward_funcs"),
    "reward_funcs": becomes("reward", "a function of TRL's own has no name here: give file.py:function"),
    "reward_weights": same("reward_weights"),
    "num_generations": same("samples_per_prompt"),
    "max_completion_length": same("max_new_tokens"),
    "temperature": same("temperature"),
    "top_p": same("top_p"),
    "top_k": same("top_k"),
    "min_p": same("min_p"),
    "generation_batch_size": becomes("batch_size", "answers of one round"),
    "steps_per_generation": becomes("minibatches", "divided by gradient_accumulation_steps"),
    "num_iterations": same("epochs"),
    "max_steps": becomes("steps", "divided by the optimiser steps of a round"),
    "beta": becomes("beta, kl_in, kl_estimator", "in the loss, by k3"),
    "use_bias_correction_kl": becomes("unbiased_kl", "where beta is not 0"),
    "epsilon": becomes("clip", "cispo: 1, so that nothing is bounded from below"),
    "epsilon_high": becomes("clip_high", "cispo: less 1, since TRL's is the ratio itself"),
    "delta": same("delta"),
    "importance_sampling_level": becomes("ratio", "token or sequence; luspo and vespo: sequence"),
    "scale_rewards": becomes("estimator", "group: grpo; none or false: dr_grpo; batch has no equal"),
    "loss_type": becomes("policy_loss, aggregation", "see objectives.md"),
    "sapo_temperature_neg": same("sapo_tau_neg"),
    "sapo_temperature_pos": same("sapo_tau_pos"),
    "vespo_k_pos": same("vespo_k_pos"),
    "vespo_lambda_pos": same("vespo_lambda_pos"),
    "vespo_k_neg": same("vespo_k_neg"),
    "vespo_lambda_neg": same("vespo_lambda_neg"),
    "top_entropy_quantile": same("top_entropy_quantile"),
    "entropy_coef": same("entropy_coef"),
    "mask_truncated_completions": none("missing_eos_penalty or missing_eos_score judge them"),
    "multi_objective_aggregation": none("scores are added up, then compared within the group: sum_then_normalize"),
    "off_policy_mask_threshold": same("off_policy_mask_threshold"),
    "vllm_importance_sampling_correction": CORRECTION, "vllm_importance_sampling_mode": CORRECTION,
    "vllm_importance_sampling_clip_max": CORRECTION, "vllm_importance_sampling_clip_min": CORRECTION,
    "vllm_importance_sampling_cap": CORRECTION,
    "use_adaptive_entropy": ADAPTIVE, "entropy_coef_min": ADAPTIVE, "entropy_coef_max": ADAPTIVE,
    "entropy_coef_delta": ADAPTIVE, "entropy_target": ADAPTIVE,
    "sync_ref_model": REFERENCE, "ref_model_mixup_alpha": REFERENCE,
    "ref_model_sync_steps": REFERENCE,
    "log_completions": LOGGING, "log_multimodal": LOGGING, "num_completions_to_print": LOGGING,
    "log_unique_prompts": LOGGING, "log_completions_hub_repo": LOGGING,
    "repetition_penalty": none("answers are samples of the policy itself"),
    "generation_kwargs": none("answers are samples of the policy itself"),
    "num_generations_eval": none("one answer to each held-out prompt"),
    "chat_template_kwargs": none("the tokenizer's template is taken as it is"),
    "max_tool_calling_iterations": none("see environment, max_turns (docs/engines.md)"),
    "use_vllm": none("see rollout_engine: vllm or vllm-server (docs/engines.md)"),
    "cache_implementation": none("rlhf_fast's own decoding"),
    "use_transformers_paged": none("see rollout_engine: transformers (docs/engines.md)"),
    "use_transformers_continuous_batching": none("see rollout_engine: transformers (docs/engines.md)"),
    "transformers_continuous_batching_config": none("see rollout_engine_options (docs/engines.md)"),
    "disable_dropout": none("dropout is off in every model"),
    "cast_lm_head_to_fp32": none("logits are float32 already"),
    "router_aux_loss_coef": none("no loss of a router"),
    "model_init_kwargs": none("a loaded model may be given in Python: library.md"),
    "shuffle_dataset": none("prompts are always shuffled"),
    "remove_unused_columns": none("reward functions get every column"),
    "pad_to_multiple_of": none("nothing is padded further than the batch"),
    "ds3_gather_for_generation": none("ZeRO-3 is not supported; FSDP2 gathers by itself"),
}  # fmt: skip

TRL_GRPO = {
    "num_generations": 8, "max_completion_length": 512, "temperature": 1.0, "top_p": 1.0,
    "top_k": 0, "num_iterations": 1, "beta": 0.0, "epsilon": 0.2, "loss_type": "dapo",
    "importance_sampling_level": "token", "scale_rewards": "group", "learning_rate": 1e-6,
    "use_bias_correction_kl": True, "max_steps": -1,
}  # fmt: skip

# loss_type -> (policy_loss, aggregation)
LOSSES = {
    "grpo": ("ppo", "seq-mean-token-mean"), "bnpo": ("ppo", "token-mean"),
    "dapo": ("ppo", "token-mean"), "dr_grpo": ("ppo", "token-sum"),
    "luspo": ("ppo", "seq-mean-token-sum"), "cispo": ("cispo", "token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"), "vespo": ("vespo", "token-mean"),
}  # fmt: skip
BY_SEQUENCE = ("luspo", "vespo")
UNSCALED = ("none", False, "False", "false")


def options(given: Settings, processes: int) -> tuple[dict[str, Any], list[str]]:
    micro, accumulated = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    of_a_step = micro * accumulated * processes
    batch = given.get("generation_batch_size") or (
        micro * processes * (given.get("steps_per_generation") or accumulated)
    )
    minibatches = max(1, batch // of_a_step)
    updates = minibatches * given["num_iterations"]
    kind = given["loss_type"]
    loss, aggregation = LOSSES.get(kind, ("ppo", "token-mean"))
    found = of_transformers(given, rounds=updates) | {
        "batch_size": batch, "minibatches": minibatches, "micro_batch_size": micro,
        "warmup_steps": given["warmup_steps"], "missing_eos_penalty": 0.0,
        "estimator": "dr_grpo" if given["scale_rewards"] in UNSCALED else "grpo",
        "policy_loss": loss, "aggregation": aggregation, "clip": given["epsilon"],
        "ratio": "sequence" if kind in BY_SEQUENCE else given["importance_sampling_level"],
        "beta": given["beta"],
    }  # fmt: skip
    del found["value_learning_rate"]  # there is no critic
    high = given.get("epsilon_high")
    if loss == "cispo":
        found["clip"], high = 1.0, (high or given["epsilon"]) - 1
    if high is not None and loss not in ("sapo", "vespo"):
        found["clip_high"] = high
    if given["beta"]:
        found |= {
            "kl_in": "loss",
            "kl_estimator": "k3",
            "unbiased_kl": given["use_bias_correction_kl"],
        }
    said = []
    if given["max_steps"] > 0:
        found["steps"] = max(1, given["max_steps"] // updates)
    else:
        said.append(f"steps: num_train_epochs (3) × prompts × num_generations / {batch}")
    if kind not in LOSSES:
        said.append(f"loss_type={kind} is not known here: ppo stands in its place")
    if given["scale_rewards"] == "batch":
        said.append("scale_rewards=batch has no equal: grpo divides by each group's own spread")
    rewards = given.get("reward_funcs") or []
    rewards = [rewards] if isinstance(rewards, str) else list(rewards)
    if path := given.get("reward_model_name_or_path"):
        rewards.append(path)
    if rewards:
        found["reward"] = rewards
    return found, said


FRAMEWORK = Framework(
    "trl-grpo", "TRL 1.16, GRPOConfig", KEYS, DEFAULTS | TRL_GRPO, FAMILIES, options
)
