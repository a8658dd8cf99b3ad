"""Options that contradict each other, or have no effect beside others: a table for each command.

An option that has no effect is one that its user believes in. What is refused is a value other than
the default, wherever it comes from: a flag, a file, Python. No contradiction are a weight of 0
beside options of what it weighs (sweeps begin there, and `--recipe grpo --beta 0` must work), a
step size or a horizon of what is not there, steps between this and that which are longer than a
short trial of a run, and a bound that this run cannot reach: a correction of our own decoding,
whose log-probs are the trainer's, or a `target_kl` of a step's only update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from rlhf_fast.ops.options import HELD, LOSSES

from .errors import InputError

UNBOUNDED = ("reinforce", "sapo", "vespo")  # the losses without a clip


@dataclass(frozen=True)
class Rule:
    """names: the options, as the message has them. broken: of a config. useless: the first of them
    would have no effect, so that without it all is well."""

    names: tuple[str, ...]
    broken: Callable[[Any], bool]
    reason: str
    useless: bool = False


def no_effect(names: str, beside: str, where: Callable[[Any], bool], reason: str) -> Iterator[Rule]:
    """Each of these options has none where that holds."""
    for name in names.split():

        def broken(config: Any, name: str = name) -> bool:
            return getattr(config, name) != default(config, name) and where(config)

        yield Rule((name, *beside.split()), broken, reason, useless=True)


def default(config: Any, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default


def refuse(config: Any, rules: Iterable[Rule]) -> None:
    for rule in rules:
        if rule.broken(config):
            raise InputError(
                " and ".join(f"{name}={getattr(config, name)}" for name in rule.names)
                + f" contradict each other: {rule.reason}"
            )


def useless(config_class: type, values: dict[str, Any], rules: Iterable[Rule]) -> list[str]:
    """The options among these values that have no effect beside the others."""
    config = object.__new__(config_class)  # unchecked: it is not whole yet
    vars(config).update({f.name: f.default for f in fields(config_class)} | values)
    return [rule.names[0] for rule in rules if rule.useless and rule.broken(config)]


# ------------------------------------------------------------------------------------- the tables

RUN = tuple(
    no_effect(
        "hub_model_id hub_private_repo", "push_to_hub", lambda c: not c.push_to_hub,
        "nothing is uploaded",
    )
)  # fmt: skip

REWARD = (
    *RUN,
    *no_effect(
        "trunk_cache_mib", "trainable_layers", lambda c: c.trainable_layers is None,
        "without frozen layers there is nothing to keep",
    ),
)  # fmt: skip

_LOSS = (
    Rule(
        ("ratio", "policy_loss"),
        lambda c: c.ratio not in LOSSES.get(c.policy_loss, c.ratio),
        "this loss has no such ratio",
    ),
    *no_effect(
        "dual_clip", "policy_loss", lambda c: c.policy_loss != "ppo", "only ppo has a dual clip"
    ),
    *no_effect(
        "delta", "policy_loss", lambda c: c.policy_loss not in HELD, "this loss holds no ratio"
    ),
    *no_effect(
        "clip clip_high", "policy_loss", lambda c: c.policy_loss in UNBOUNDED,
        "this loss has no clip",
    ),
    *no_effect(
        "sapo_tau_pos sapo_tau_neg", "policy_loss", lambda c: c.policy_loss != "sapo",
        "only sapo has temperatures",
    ),
    *no_effect(
        "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", "policy_loss",
        lambda c: c.policy_loss != "vespo", "only vespo has this weight",
    ),
    Rule(
        ("top_entropy_quantile", "batch_size", "max_new_tokens"),
        lambda c: c.top_entropy_quantile * c.batch_size * c.max_new_tokens < 1,
        "not one token of the batch would be left",
    ),
)  # fmt: skip

_KL = (
    Rule(
        ("kl_in", "kl_estimator"),
        lambda c: c.kl_in == "loss" and c.kl_estimator == "k1" and not c.unbiased_kl,
        "k1's gradient is zero on average: choose k2 or k3, or unbiased_kl",
    ),
    *no_effect(
        "unbiased_kl", "kl_in", lambda c: c.kl_in != "loss",
        "only the loss has a KL with a gradient",
    ),
    Rule(
        ("adaptive_kl_target", "beta"),
        lambda c: c.adaptive_kl_target is not None and c.beta == 0,
        "multiplying 0 leaves 0",
    ),
    Rule(
        ("kl_horizon", "batch_size"),
        lambda c: c.adaptive_kl_target is not None and 0.2 * c.batch_size >= c.kl_horizon,
        "a KL of 0 would take beta to 0 or below, choose a horizon above batch_size/5",
    ),
)  # fmt: skip

_ADVANTAGES = (
    *no_effect(
        "value_model value_clip value_coef lam lam_critic lam_length_alpha "
        "critic_warmup_steps",
        "estimator", lambda c: not c.has_critic, "this estimator has no critic",
    ),
    *no_effect(
        "whiten_rewards gamma", "estimator", lambda c: c.is_grouped,
        "this estimator has no rewards per token",
    ),
    *no_effect(
        "lam", "lam_critic lam_length_alpha",
        lambda c: c.lam_critic is not None and c.lam_length_alpha is not None,
        "advantages and returns each have a λ of their own",
    ),
    Rule(
        ("critic_warmup_steps", "value_coef"),
        lambda c: c.critic_warmup_steps > 0 and c.value_coef == 0,
        "in these steps nothing would learn",
    ),
    Rule(
        ("critic_warmup_steps", "steps"),
        lambda c: c.critic_warmup_steps >= c.steps,
        "the policy would never learn",
    ),
    Rule(
        ("estimator", "samples_per_prompt"),
        lambda c: (
            (c.is_grouped or c.estimator == "reinforce_baseline") and c.samples_per_prompt < 2
        ),
        "an answer needs others to its prompt to be compared with",
    ),
    *no_effect(
        "dynamic_sampling_rounds", "samples_per_prompt", lambda c: c.samples_per_prompt < 2,
        "the scores of one answer have no spread",
    ),
    *no_effect(
        "dynamic_sampling_rounds", "estimator", lambda c: c.estimator == "remax",
        "remax compares with a greedy answer and not with the group",
    ),
)  # fmt: skip

_ANSWERS = (
    Rule(
        ("missing_eos_score", "missing_eos_penalty"),
        lambda c: c.missing_eos_score is not None and bool(c.missing_eos_penalty),
        "an answer without an end is scored by one of them",
    ),
    Rule(
        ("overlong_cache", "max_new_tokens"),
        lambda c: c.overlong_cache is not None and c.overlong_cache > c.max_new_tokens,
        "the answer is not that long",
    ),
    *no_effect(
        "max_turns", "environment", lambda c: c.environment is None,
        "only an environment has turns",
    ),
    *no_effect(
        "keep_special_tokens", "environment", lambda c: c.environment is not None,
        "it is told what is said without them",
    ),
    Rule(
        ("environment", "estimator"),
        lambda c: c.environment is not None and c.estimator == "remax",
        "remax asks for one greedy answer, of one turn",
    ),
    Rule(
        ("judge", "environment"),
        lambda c: c.environment is None and c.judge == "environment",
        "there is no environment that gives rewards",
    ),
    Rule(
        ("reward_weights", "reward"),
        lambda c: bool(c.reward_weights) and not any(c.reward_weights),
        "no score would be learnt from",
    ),
    Rule(
        ("reward", "environment"),
        lambda c: c.environment is None and "environment" in (c.reward or ()),
        "there is no environment that gives rewards",
    ),
)  # fmt: skip

_MODELS = (
    Rule(
        ("lora_r", "trainable_layers"),
        lambda c: c.lora_r is not None and c.trainable_layers is not None,
        "either adapters learn or the top layers do",
    ),
    *no_effect(
        "lora_alpha lora_target_modules", "lora_r", lambda c: c.lora_r is None,
        "without a rank there are no adapters",
    ),
    Rule(
        ("attn_implementation", "bf16"),
        lambda c: c.attn_implementation == "flash_attention_2" and not c.bf16,
        "flash attention has no float32",
    ),
)  # fmt: skip

_CORRECTION = (
    Rule(
        ("rollout_correction", "tis_cap"),
        lambda c: c.corrects and c.tis_cap is None and c.rollout_ratio_min is None,
        "a bound is missing, tis_cap or rollout_ratio_min",
    ),
    Rule(
        ("rollout_ratio_min", "tis_cap"),
        lambda c: (
            None not in (c.rollout_ratio_min, c.tis_cap) and c.rollout_ratio_min >= c.tis_cap
        ),
        "nothing lies between them",
    ),
    *no_effect(
        "rollout_correction_level rollout_ratio_min rollout_normalize", "rollout_correction",
        lambda c: not c.corrects,
        "there are no weights without a tis_cap or a rollout_correction",
    ),
    Rule(
        ("rollout_reject", "rollout_reject_above"),
        lambda c: (c.rollout_reject is None) != (c.rollout_reject_above is None),
        "each needs the other",
    ),
    Rule(
        ("bypass", "top_entropy_quantile"),
        lambda c: c.bypass and c.top_entropy_quantile < 1,
        "no pass measures the entropies of the old policy",
    ),
    *(
        Rule(
            ("bypass", name),
            lambda c, name=name: c.bypass and getattr(c, name) is not None,
            "where the rollout's log-probs are the old ones, there is nothing to correct",
        )
        for name in ("tis_cap", "rollout_correction", "rollout_reject", "rollout_veto")
    ),
)  # fmt: skip

PPO = (*RUN, *_ANSWERS, *_MODELS, *_ADVANTAGES, *_LOSS, *_KL, *_CORRECTION)

GENERATE = tuple(
    no_effect(
        "top_k top_p min_p", "temperature", lambda c: c.temperature == 0,
        "the likeliest token is always taken",
    )
)  # fmt: skip

WATCH = tuple(no_effect("every", "once", lambda c: c.once, "there is one look"))


def of_functions(functions: bool) -> tuple[Rule, ...]:
    """A reward or a judge may be an object of a Python program, so that a config alone cannot tell
    whether one is a function."""
    return tuple(
        no_effect(
            "reward_timeout reward_concurrency reward_retries reward_failures", "reward judge",
            lambda c: not functions, "there is no function to wait for",
        )
    )  # fmt: skip


def of_callbacks(callbacks: bool) -> tuple[Rule, ...]:
    """A callback of transformers may ask for the best evaluation, too."""
    return tuple(
        no_effect(
            "metric_for_best_model", "load_best_model_at_end early_stopping_patience",
            lambda c: not (c.load_best_model_at_end or c.early_stopping_patience or callbacks),
            "nothing asks which evaluation is the best",
        )
    )  # fmt: skip
