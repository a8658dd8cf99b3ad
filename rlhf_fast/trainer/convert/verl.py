"""verl 0.9's PPO trainer (verl.trainer.main_ppo): keys with dots, as its scripts write them."""

from __future__ import annotations

from typing import Any

from rlhf_fast.trainer.convert.keys import Framework, Settings, becomes, none, same, scheduler

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
NO_RAY = none("one program, no Ray: processes are accelerate's")

KEYS = {
    "data.train_files": becomes("data", "one file"),
    "data.val_files": becomes("eval_data", "one file"),
    "data.train_max_samples": becomes("max_rows", "-1: all"),
    "data.max_prompt_length": same("max_prompt_tokens"),
    "data.max_response_length": same("max_new_tokens"),
    "data.train_batch_size": becomes("batch_size", "prompts there, answers here: times rollout.n"),
    "data.trust_remote_code": same("trust_remote_code"),
    "data.seed": same("seed"),
    "data.filter_overlong_prompts": none("longer prompts are always left out"),
    "data.truncation": none("longer prompts are always left out"),
    "data.prompt_key": none("the column is `prompt`"),
    "data.shuffle": none("prompts are always shuffled"),
    f"{MODEL}.path": same("model"),
    f"{MODEL}.trust_remote_code": same("trust_remote_code"),
    f"{MODEL}.lora_rank": becomes("lora_r", "0: none"),
    f"{MODEL}.lora_alpha": becomes("lora_alpha", "with lora_rank"),
    f"{MODEL}.use_remove_padding": none("packing: by itself with flash_attention_2"),
    f"{MODEL}.enable_gradient_checkpointing": none("a smaller micro_batch_size needs less memory"),
    f"{ACTOR}.optim.lr": same("learning_rate"),
    f"{ACTOR}.optim.weight_decay": same("weight_decay"),
    f"{ACTOR}.optim.betas": becomes("adam_beta1, adam_beta2", ""),
    f"{ACTOR}.optim.lr_warmup_steps": becomes("warmup_steps", "-1: none"),
    f"{ACTOR}.optim.lr_scheduler_type": becomes("lr_scheduler_type", "constant is constant_with_warmup here"),
    f"{ACTOR}.grad_clip": same("max_grad_norm"),
    f"{ACTOR}.ppo_epochs": same("epochs"),
    f"{ACTOR}.ppo_mini_batch_size": becomes("minibatches", "their size, in prompts, there; their number here"),
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": same("micro_batch_size"),
    f"{ACTOR}.clip_ratio": becomes("clip", "where clip_ratio_low is unset"),
    f"{ACTOR}.clip_ratio_low": becomes("clip", ""),
    f"{ACTOR}.clip_ratio_high": becomes("clip_high", ""),
    f"{ACTOR}.clip_ratio_c": becomes("dual_clip", "of loss_mode=vanilla"),
    f"{ACTOR}.policy_loss.loss_mode": becomes("policy_loss, ratio", "see objectives.md"),
    f"{ACTOR}.tau_pos": same("sapo_tau_pos"),
    f"{ACTOR}.tau_neg": same("sapo_tau_neg"),
    f"{ACTOR}.loss_agg_mode": becomes("aggregation", "seq-mean-token-sum-norm: token-sum"),
    f"{ACTOR}.entropy_coeff": same("entropy_coef"),
    f"{ACTOR}.use_kl_loss": becomes("kl_in", "loss"),
    f"{ACTOR}.kl_loss_coef": becomes("beta", "where use_kl_loss is set"),
    f"{ACTOR}.kl_loss_type": becomes("kl_estimator, unbiased_kl", "low_var_kl: k3, mse: k2; a + is unbiased_kl"),
    f"{ROLLOUT}.n": same("samples_per_prompt"),
    f"{ROLLOUT}.temperature": same("temperature"),
    f"{ROLLOUT}.top_p": same("top_p"),
    f"{ROLLOUT}.top_k": becomes("top_k", "-1 there is 0 here: all tokens"),
    "critic.optim.lr": same("value_learning_rate"),
    "critic.model.path": becomes("value_model", "where there is a critic"),
    "critic.cliprange_value": same("value_clip"),
    "algorithm.adv_estimator": becomes("estimator", "reinforce_plus_plus: reinforce"),
    "algorithm.norm_adv_by_std_in_grpo": becomes("estimator", "false: dr_grpo"),
    "algorithm.gamma": same("gamma"),
    "algorithm.lam": same("lam"),
    "algorithm.use_kl_in_reward": becomes("kl_in", "reward"),
    "algorithm.kl_penalty": becomes("kl_estimator", "kl: k1, mse: k2, low_var_kl: k3"),
    "algorithm.kl_ctrl.kl_coef": becomes("beta", "where use_kl_in_reward is set"),
    "algorithm.kl_ctrl.type": becomes("adaptive_kl_target", "adaptive"),
    "algorithm.kl_ctrl.target_kl": becomes("adaptive_kl_target", "there a token's mean, here nats a sequence: set it by hand"),
    "algorithm.kl_ctrl.horizon": becomes("kl_horizon", "with an adaptive coefficient"),
    "algorithm.filter_groups.enable": becomes("dynamic_sampling_rounds", "with max_num_gen_batches, or 10"),
    "algorithm.filter_groups.max_num_gen_batches": becomes("dynamic_sampling_rounds", "less the first batch"),
    "algorithm.filter_groups.metric": none("groups are left out by their scores"),
    "reward_model.model.path": becomes("reward", ""),
    "reward.reward_model.model_path": becomes("reward", ""),
    "custom_reward_function.path": becomes("reward", "verl's function scores one answer at a time: give it our arguments"),
    "custom_reward_function.name": becomes("reward", ""),
    "reward.custom_reward_function.path": becomes("reward", "as custom_reward_function.path"),
    "reward.custom_reward_function.name": becomes("reward", ""),
    "trainer.total_training_steps": same("steps"),
    "trainer.total_epochs": none("steps says how long a run is"),
    "trainer.save_freq": becomes("save_every", "-1: left at the default"),
    "trainer.test_freq": becomes("eval_every", "-1: before and after only"),
    "trainer.critic_warmup": becomes("critic_warmup_steps", "where there is a critic"),
    "trainer.logger": becomes("report_to", "without console and file"),
    "trainer.default_local_dir": same("output_dir"),
    "trainer.max_actor_ckpt_to_keep": same("save_total_limit"),
    "trainer.val_before_train": none("held-out prompts are always answered first"),
    "trainer.resume_mode": none("--resume, a flag of the call"),
    "trainer.experiment_name": none("a run's name is its folder's"),
    "trainer.project_name": none("WANDB_PROJECT, in the environment"),
    "trainer.nnodes": NO_RAY, "trainer.n_gpus_per_node": NO_RAY,
}  # fmt: skip

DEFAULTS = {
    "data.max_prompt_length": 512, "data.max_response_length": 512, "data.train_batch_size": 1024,
    f"{ACTOR}.optim.lr": 1e-6, f"{ACTOR}.optim.weight_decay": 0.01, f"{ACTOR}.grad_clip": 1.0,
    f"{ACTOR}.optim.lr_scheduler_type": "constant", f"{ACTOR}.optim.lr_warmup_steps": -1,
    f"{ACTOR}.ppo_epochs": 1, f"{ACTOR}.ppo_mini_batch_size": 256, f"{ACTOR}.clip_ratio": 0.2,
    f"{ACTOR}.clip_ratio_low": 0.2, f"{ACTOR}.clip_ratio_high": 0.2, f"{ACTOR}.clip_ratio_c": 3.0,
    f"{ACTOR}.policy_loss.loss_mode": "vanilla", f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.entropy_coeff": 0, f"{ACTOR}.use_kl_loss": False, f"{ACTOR}.kl_loss_coef": 0.001,
    f"{ACTOR}.kl_loss_type": "low_var_kl", f"{ROLLOUT}.n": 1, f"{ROLLOUT}.temperature": 1.0,
    f"{ROLLOUT}.top_p": 1, f"{ROLLOUT}.top_k": -1, "critic.cliprange_value": 0.5,
    "critic.optim.lr": 1e-5, "algorithm.adv_estimator": "gae",
    "algorithm.norm_adv_by_std_in_grpo": True, "algorithm.gamma": 1.0, "algorithm.lam": 1.0,
    "algorithm.use_kl_in_reward": False, "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.kl_coef": 0.001, "algorithm.kl_ctrl.type": "fixed",
    "algorithm.kl_ctrl.horizon": 10000, "trainer.critic_warmup": 0,
}  # fmt: skip

FAMILIES = {
    ROLLOUT: "see rollout_engine, rollout_engine_options (docs/engines.md)",
    "actor_rollout_ref.ref": "the reference is measured with the policy",
    ACTOR: "no equal: FSDP is accelerate's, batches are micro_batch_size",
    MODEL: "no equal",
    "critic.": "no equal: the critic shares the policy's batches and clipping",
    "data.": "no equal",
    "trainer.": "no equal",
    "reward": "no equal: a reward is a model, or a function of all answers",
    "ray_kwargs": "one program, no Ray",
}

ESTIMATORS = {
    "gae": "gae", "grpo": "grpo", "rloo": "rloo", "opo": "opo", "remax": "remax",
    "reinforce_plus_plus": "reinforce", "reinforce_plus_plus_baseline": "reinforce_baseline",
}  # fmt: skip
LOSSES = {
    "vanilla": {}, "gspo": {"ratio": "sequence_token"}, "cispo": {"policy_loss": "cispo"},
    "sapo": {"policy_loss": "sapo"}, "geo_mean": {"policy_loss": "gmpo", "ratio": "sequence"},
    "dppo_tv": {"policy_loss": "dppo_tv", "delta": 20.0},
    "dppo_kl": {"policy_loss": "dppo_kl", "delta": 20.0},
}  # fmt: skip
ESTIMATES = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}

AGGREGATIONS = {"seq-mean-token-sum-norm": "token-sum"}


def options(given: Settings, processes: int) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    answers, prompts = given[f"{ROLLOUT}.n"], given["data.train_batch_size"]
    mode = given[f"{ACTOR}.policy_loss.loss_mode"]
    estimator, aggregation = given["algorithm.adv_estimator"], given[f"{ACTOR}.loss_agg_mode"]
    if mode not in LOSSES:
        said.append(f"loss_mode={mode} is not known here: ppo stands in its place")
    if estimator not in ESTIMATORS:
        said.append(f"adv_estimator={estimator} is not known here: grpo stands in its place")
    found: dict[str, Any] = {
        "batch_size": prompts * answers, "missing_eos_penalty": 0.0,
        "minibatches": max(1, prompts // given[f"{ACTOR}.ppo_mini_batch_size"]),
        "estimator": ESTIMATORS.get(estimator, "grpo"),
        "lr_scheduler_type": scheduler(given[f"{ACTOR}.optim.lr_scheduler_type"]),
        "top_k": max(0, given[f"{ROLLOUT}.top_k"]),
        "aggregation": AGGREGATIONS.get(aggregation, aggregation),
        **LOSSES.get(mode, {}),
    }  # fmt: skip
    if estimator == "grpo" and not given["algorithm.norm_adv_by_std_in_grpo"]:
        found["estimator"] = "dr_grpo"
    low, high = given[f"{ACTOR}.clip_ratio_low"], given[f"{ACTOR}.clip_ratio_high"]
    found["clip"] = given[f"{ACTOR}.clip_ratio"] if low is None else low
    if mode != "sapo" and high not in (None, found["clip"]):
        found["clip_high"] = high
    if mode == "vanilla" and given[f"{ACTOR}.clip_ratio_c"]:
        found["dual_clip"] = given[f"{ACTOR}.clip_ratio_c"]
    if (steps := given[f"{ACTOR}.optim.lr_warmup_steps"]) > 0:
        found["warmup_steps"] = steps * given[f"{ACTOR}.ppo_epochs"] * found["minibatches"]
    found |= of_the_kl(given, said)
    if found["estimator"] == "gae":
        found["value_coef"] = 1.0  # its optimiser there is its own
        found["value_model"] = given.get("critic.model.path")
        found["critic_warmup_steps"] = given["trainer.critic_warmup"]
    if given.get("algorithm.filter_groups.enable"):
        rounds = given.get("algorithm.filter_groups.max_num_gen_batches") or 11
        found["dynamic_sampling_rounds"] = max(1, rounds - 1)
    found |= of_names(given, said)
    if given.get("trainer.total_training_steps") is None:
        said.append(f"steps: total_epochs × prompts / {prompts}")
    return found, said


def of_the_kl(given: Settings, said: list[str]) -> dict[str, Any]:
    if given[f"{ACTOR}.use_kl_loss"]:
        kind = str(given[f"{ACTOR}.kl_loss_type"])
        found = {"beta": given[f"{ACTOR}.kl_loss_coef"], "kl_in": "loss"}
        if given["algorithm.use_kl_in_reward"]:
            said.append("the KL is in the loss and in the reward there: here it is in the loss")
        estimate = ESTIMATES.get(kind.rstrip("+"), "k3")
        return found | {"kl_estimator": estimate, "unbiased_kl": kind.endswith("+")}
    if not given["algorithm.use_kl_in_reward"]:
        return {"beta": 0.0}
    if given["algorithm.kl_ctrl.type"] == "adaptive":
        said.append("adaptive_kl_target: verl's target is not in nats a sequence, set it by hand")
    estimate = ESTIMATES.get(str(given["algorithm.kl_penalty"]), "k1")
    return {"beta": given["algorithm.kl_ctrl.kl_coef"], "kl_in": "reward", "kl_estimator": estimate}


def of_names(given: Settings, said: list[str]) -> dict[str, Any]:
    """Files, models, trackers, steps between this and that."""
    found: dict[str, Any] = {}
    for theirs, ours in (("data.train_files", "data"), ("data.val_files", "eval_data")):
        files = given.get(theirs)
        files = [files] if isinstance(files, str) else list(files or [])
        if len(files) > 1:
            said.append(f"{ours}: {theirs} has {len(files)} files, give a folder with them")
        elif files:
            found[ours] = files[0]
    if found.get("eval_data") is not None and found["eval_data"] == found.get("data"):
        del found["eval_data"]
        said.append("eval_data: data.val_files are the prompts that are trained on")
    if given.get(f"{MODEL}.lora_rank"):
        found["lora_r"] = given[f"{MODEL}.lora_rank"]
        found["lora_alpha"] = given.get(f"{MODEL}.lora_alpha", 16)
    if betas := given.get(f"{ACTOR}.optim.betas"):
        found["adam_beta1"], found["adam_beta2"] = betas
    for theirs, ours in (
        ("data.train_max_samples", "max_rows"), ("trainer.save_freq", "save_every"),
        ("trainer.test_freq", "eval_every"),
    ):  # fmt: skip
        if given.get(theirs, -1) > 0:
            found[ours] = given[theirs]
    loggers = given.get("trainer.logger") or []
    loggers = [loggers] if isinstance(loggers, str) else loggers
    found["report_to"] = ",".join(x for x in loggers if x not in ("console", "file")) or None
    model = given.get("reward_model.model.path") or given.get("reward.reward_model.model_path")
    for start in ("", "reward."):
        if path := given.get(f"{start}custom_reward_function.path"):
            name = given.get(f"{start}custom_reward_function.name") or "compute_score"
            found["reward"] = f"{path}:{name}"
    if model and "reward" not in found:
        found["reward"] = model
    return found


FRAMEWORK = Framework("verl", "verl 0.9, main_ppo", KEYS, DEFAULTS, FAMILIES, options)
