"""Options that contradict each other or have no effect: every rule of the tables, from a flag, a
file and Python; and every option is in a rule, or always has an effect."""

from __future__ import annotations

from dataclasses import fields

import pytest
import yaml

from rlhf_fast.trainer import PPOTrainer, RewardTrainer, contradictions
from rlhf_fast.trainer.cli import main
from rlhf_fast.trainer.config import GenerateConfig, PPOConfig, RewardConfig, WatchConfig
from rlhf_fast.trainer.contradictions import Rule
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.flags import parse

NEEDED = {"model": "m", "data": "d", "reward": ["r"], "output_dir": "o"}
GROUP = {"estimator": "rloo", "samples_per_prompt": 2}
SAPO, VESPO = {"policy_loss": "sapo"}, {"policy_loss": "vespo", "ratio": "sequence"}
ONE_UPDATE = {"epochs": 1, "minibatches": 1}
ENVIRONMENT = {"environment": "e.py:E"}

# Of each rule, by the options it names: what breaks it, and what mends that.
PPO = {
    "hub_model_id push_to_hub": ({"hub_model_id": "a/b"}, {"push_to_hub": True}),
    "hub_private_repo push_to_hub": ({"hub_private_repo": True}, {"push_to_hub": True}),
    "missing_eos_score missing_eos_penalty": (
        {"missing_eos_score": -1.0, "missing_eos_penalty": 0.5},
        {"missing_eos_penalty": 0.0},
    ),
    "overlong_cache max_new_tokens": ({"overlong_cache": 65}, {"max_new_tokens": 65}),
    "max_turns environment": ({"max_turns": 3}, ENVIRONMENT),
    "keep_special_tokens environment": (
        {"keep_special_tokens": True, **ENVIRONMENT},
        {"environment": None},
    ),
    "environment estimator": ({**ENVIRONMENT, "estimator": "remax"}, {"estimator": "gae"}),
    "judge environment": ({"judge": "environment"}, ENVIRONMENT),
    "reward_weights reward": ({"reward_weights": [0.0]}, {"reward_weights": [-1.0]}),
    "reward environment": ({"reward": ["environment"]}, ENVIRONMENT),
    "lora_r trainable_layers": ({"lora_r": 8, "trainable_layers": 2}, {"lora_r": None}),
    "lora_alpha lora_r": ({"lora_alpha": 32.0}, {"lora_r": 8}),
    "lora_target_modules lora_r": ({"lora_target_modules": "q_proj"}, {"lora_r": 8}),
    "attn_implementation bf16": ({"attn_implementation": "flash_attention_2"}, {"bf16": True}),
    "value_model estimator": ({"value_model": "v", **GROUP}, {"estimator": "gae"}),
    "value_clip estimator": ({"value_clip": 0.3, "estimator": "reinforce"}, {"estimator": "gae"}),
    "value_coef estimator": ({"value_coef": 0.0, "estimator": "remax"}, {"estimator": "gae"}),
    "lam estimator": ({"lam": 1.0, "estimator": "reinforce"}, {"estimator": "gae"}),
    "lam_critic estimator": ({"lam_critic": 0.0, "estimator": "remax"}, {"estimator": "gae"}),
    "lam_length_alpha estimator": ({"lam_length_alpha": 0.1, **GROUP}, {"estimator": "gae"}),
    "critic_warmup_steps estimator": ({"critic_warmup_steps": 2, **GROUP}, {"estimator": "gae"}),
    "whiten_rewards estimator": ({"whiten_rewards": True, **GROUP}, {"estimator": "gae"}),
    "gamma estimator": ({"gamma": 0.9, **GROUP}, {"estimator": "reinforce"}),
    "lam lam_critic lam_length_alpha": (
        {"lam": 0.9, "lam_critic": 1.0, "lam_length_alpha": 0.05},
        {"lam_critic": None},
    ),
    "critic_warmup_steps value_coef": (
        {"critic_warmup_steps": 2, "value_coef": 0.0},
        {"value_coef": 0.1},
    ),
    "critic_warmup_steps steps": ({"critic_warmup_steps": 5, "steps": 5}, {"steps": 6}),
    "estimator samples_per_prompt": (
        {"estimator": "reinforce_baseline"},
        {"samples_per_prompt": 2},
    ),
    "dynamic_sampling_rounds samples_per_prompt": (
        {"dynamic_sampling_rounds": 1},
        {"samples_per_prompt": 2},
    ),
    "dynamic_sampling_rounds estimator": (
        {"dynamic_sampling_rounds": 1, "estimator": "remax", "samples_per_prompt": 2},
        {"estimator": "grpo"},
    ),
    "ratio policy_loss": ({"ratio": "token", "policy_loss": "gmpo"}, {"ratio": "sequence"}),
    "dual_clip policy_loss": ({"dual_clip": 3.0, "policy_loss": "cispo"}, {"policy_loss": "ppo"}),
    "delta policy_loss": ({"delta": 3.0, **SAPO}, {"policy_loss": "dppo_tv"}),
    "clip policy_loss": ({"clip": 0.1, "policy_loss": "reinforce"}, {"policy_loss": "ppo"}),
    "clip_high policy_loss": ({"clip_high": 0.3, **VESPO}, {"policy_loss": "gmpo"}),
    "sapo_tau_pos policy_loss": ({"sapo_tau_pos": 2.0}, SAPO),
    "sapo_tau_neg policy_loss": ({"sapo_tau_neg": 2.0}, SAPO),
    "vespo_k_pos policy_loss": ({"vespo_k_pos": 1.0}, VESPO),
    "vespo_lambda_pos policy_loss": ({"vespo_lambda_pos": 2.0}, VESPO),
    "vespo_k_neg policy_loss": ({"vespo_k_neg": 1.0}, VESPO),
    "vespo_lambda_neg policy_loss": ({"vespo_lambda_neg": 1.0}, VESPO),
    "top_entropy_quantile batch_size max_new_tokens": (
        {"top_entropy_quantile": 1e-3, "batch_size": 8, "max_new_tokens": 16},
        {"batch_size": 64},
    ),
    "kl_in kl_estimator": ({"kl_in": "loss"}, {"kl_estimator": "k3"}),
    "unbiased_kl kl_in": ({"unbiased_kl": True}, {"kl_in": "loss"}),
    "adaptive_kl_target beta": ({"adaptive_kl_target": 6.0, "beta": 0.0}, {"beta": 0.1}),
    "kl_horizon batch_size": (
        {"adaptive_kl_target": 6.0, "batch_size": 320, "kl_horizon": 64},
        {"kl_horizon": 65},
    ),
    "rollout_correction tis_cap": ({"rollout_correction": "mask"}, {"rollout_ratio_min": 0.5}),
    "rollout_ratio_min tis_cap": ({"rollout_ratio_min": 2.0, "tis_cap": 2.0}, {"tis_cap": 3.0}),
    "rollout_correction_level rollout_correction": (
        {"rollout_correction_level": "sequence"},
        {"tis_cap": 2.0},
    ),
    "rollout_ratio_min rollout_correction": (
        {"rollout_ratio_min": 0.5},
        {"rollout_correction": "truncate"},
    ),
    "rollout_normalize rollout_correction": ({"rollout_normalize": True}, {"tis_cap": 2.0}),
    "rollout_reject rollout_reject_above": (
        {"rollout_reject": "sum_k1"},
        {"rollout_reject_above": 1.0},
    ),
    "bypass top_entropy_quantile": (
        {"bypass": True, "top_entropy_quantile": 0.2},
        {"bypass": False},
    ),
    "bypass tis_cap": ({"bypass": True, "tis_cap": 2.0}, {"bypass": False}),
    "bypass rollout_correction": (
        {"bypass": True, "rollout_correction": "mask", "rollout_ratio_min": 0.5},
        {"bypass": False},
    ),
    "bypass rollout_reject": (
        {"bypass": True, "rollout_reject": "sum_k1", "rollout_reject_above": 1.0},
        {"bypass": False},
    ),
    "bypass rollout_veto": ({"bypass": True, "rollout_veto": 1e-4}, {"bypass": False}),
}
REWARD = {name: PPO[name] for name in PPO if name.startswith("hub_")} | {
    "trunk_cache_mib trainable_layers": ({"trunk_cache_mib": 9}, {"trainable_layers": 2}),
}
GREEDY = {"temperature": 0.0}
GENERATE = {
    f"{name} temperature": (GREEDY | {name: value}, {"temperature": 1.0})
    for name, value in {"top_k": 5, "top_p": 0.9, "min_p": 0.1}.items()
}
WATCH = {"every once": ({"every": 3.0, "once": True}, {"once": False})}
TABLES = {
    PPOConfig: (contradictions.PPO, PPO, NEEDED),
    RewardConfig: (contradictions.REWARD, REWARD, {k: NEEDED[k] for k in NEEDED if k != "reward"}),
    GenerateConfig: (contradictions.GENERATE, GENERATE, {"model": "m", "prompt": "p"}),
    WatchConfig: (contradictions.WATCH, WATCH, {"run": "r"}),
}
# What objects may stand for: known where the trainer has them.
ENGINE = {"rollout_engine": "e.py:f"}
FUNCTION = {"reward": ["r", "f.py:f"]}
RUN = {
    "reward_timeout reward judge": ({"reward_timeout": 9.0}, FUNCTION),
    "reward_concurrency reward judge": ({"reward_concurrency": 2}, {"judge": "f.py:f"}),
    "reward_retries reward judge": ({"reward_retries": 2}, FUNCTION),
    "reward_failures reward judge": ({"reward_failures": "end"}, FUNCTION),
    "metric_for_best_model load_best_model_at_end early_stopping_patience": (
        {"metric_for_best_model": "kl", "eval_every": 5},
        {"load_best_model_at_end": True},
    ),
}
OF_RUNS = (
    *contradictions.of_functions(False),
    *contradictions.of_callbacks(False),
)
# Options that have an effect in every run, or of which a value that has none is harmless: a length
# of nothing, a weight of 0, what is named.
ALWAYS = {
    "model", "data", "output_dir", "split", "subset", "max_rows", "max_grad_norm",
    "micro_batch_size", "seed", "device", "save_every", "save_total_limit", "resume", "overwrite",
    "max_skipped_updates", "save_dtype", "trust_remote_code", "report_to", "push_to_hub",
    "score_clip", "packing", "max_prompt_tokens", "eval_data",
    "eval_split", "eval_prompts", "temperature", "top_k", "top_p", "min_p", "rollout_engine",
    "entropy_coef", "aggregation", "whiten_advantages", "stop_at_kl", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "positive_nll_coef", "log_every", "sample_every", "steps", "batch_size",
    "max_new_tokens", "samples_per_prompt", "beta", "kl_estimator", "epochs", "minibatches",
    "bf16", "policy_loss", "trainable_layers", "missing_eos_penalty", "value_learning_rate",
    "target_kl", "off_policy_mask_threshold", "rollout_veto", "tis_cap",
}  # fmt: skip
# Refused elsewhere: those that ask for evaluations, an engine's options without one; and in a rule
# that another's name begins.
ELSEWHERE = {
    "eval_every", "load_best_model_at_end", "early_stopping_patience", "rollout_engine_options",
    "rollout_reject_above",
}  # fmt: skip

CASES = [(kind, rule) for kind, (rules, _, _) in TABLES.items() for rule in rules]


def message(rule: Rule, config: dict) -> str:
    named = [f"{name}={config[name]}" for name in rule.names]
    return f"{' and '.join(named)} contradict each other: {rule.reason}"


def at_defaults(kind: type, values: dict) -> dict:
    return {f.name: f.default for f in fields(kind)} | values


def test_every_rule_has_its_case():
    for rules, cases, _ in (*TABLES.values(), (OF_RUNS, RUN, None)):
        assert [" ".join(rule.names) for rule in rules] == list(cases)


def test_every_option_is_in_a_rule_or_always_counts():
    in_rules = {rule.names[0] for rule in (*contradictions.PPO, *OF_RUNS)}
    assert {f.name for f in fields(PPOConfig)} == in_rules | ALWAYS | ELSEWHERE
    assert not in_rules & ALWAYS


@pytest.mark.parametrize(("kind", "rule"), CASES, ids=lambda x: " ".join(getattr(x, "names", [])))
def test_a_rule(kind, rule, tmp_path):
    _, cases, needed = TABLES[kind]
    broken, mended = cases[" ".join(rule.names)]
    with pytest.raises(InputError) as error:
        kind(**(needed | broken))
    assert str(error.value) == message(rule, at_defaults(kind, needed | broken))
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(needed | broken))
    with pytest.raises(InputError) as error:
        parse(kind, ["--config", str(file)], prog="x")
    assert str(error.value) == message(rule, at_defaults(kind, needed | broken))
    kind(**(needed | broken | mended))


@pytest.mark.parametrize("rule", OF_RUNS, ids=lambda rule: " ".join(rule.names))
def test_a_rule_of_what_may_be_an_object(rule):
    broken, mended = RUN[" ".join(rule.names)]
    with pytest.raises(InputError) as error:
        PPOTrainer(config=PPOConfig(**(NEEDED | broken)))
    assert str(error.value) == message(rule, at_defaults(PPOConfig, NEEDED | broken))
    PPOTrainer(config=PPOConfig(**(NEEDED | broken | mended)))


def test_objects_count(tmp_path):
    """A function and a callback of a Python program are known to the trainer alone."""
    from transformers import EarlyStoppingCallback

    needed = {name: NEEDED[name] for name in ("model", "data", "output_dir")}
    PPOTrainer(
        rewards=lambda prompts, completions, **_: [0.0] * len(prompts),
        callbacks=[EarlyStoppingCallback(2)],
        config=PPOConfig(**needed, reward_retries=2, metric_for_best_model="kl", eval_every=5),
    )
    with pytest.raises(InputError, match="metric_for_best_model=loss and load_best_model_at_end"):
        RewardTrainer(config=RewardConfig(**needed, metric_for_best_model="loss"))


def test_a_command_ends_in_one_line_before_anything_is_read(tmp_path, capsys):
    flags = ["--model", "m", "--data", "d", "--reward", "r", "--output_dir", str(tmp_path / "o")]
    assert main(["ppo", *flags, "--sapo_tau_neg", "2"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "rlhf-fast ppo: sapo_tau_neg=2.0 and policy_loss=ppo contradict each other: only sapo has "
        "temperatures\n"
    )
    assert not said.out and not (tmp_path / "o").exists()


def test_a_recipe_loses_what_the_users_flags_leave_without_an_effect(capsys):
    flags = [f"--{name}={value}" for name, value in (NEEDED | {"reward": "r"}).items()]
    config = parse(PPOConfig, [*flags, "--recipe", "vapo", "--estimator=grpo"], prog="x")
    assert (config.estimator, config.lam_critic, config.critic_warmup_steps) == ("grpo", None, 0)
    assert config.clip_high == 0.28
    said = capsys.readouterr().out
    assert "critic" not in said and "clip_high=0.28" in said
    with pytest.raises(InputError, match="lam_critic=0.5 and estimator=grpo"):  # theirs stays
        parse(
            PPOConfig,
            [*flags, "--recipe", "vapo", "--estimator=grpo", "--lam_critic=0.5"],
            prog="x",
        )
    config = parse(PPOConfig, [*flags, "--recipe", "gspo", "--policy_loss=vespo"], prog="x")
    assert (config.ratio, config.clip, config.clip_high) == ("sequence", 0.2, None)
    config = parse(PPOConfig, [*flags, "--recipe", "grpo", "--beta=0"], prog="x")
    assert (config.kl_in, config.beta) == ("loss", 0.0)
