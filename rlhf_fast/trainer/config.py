"""Every option of every `rlhf-fast` command: one dataclass each, checked on creation.

A field is a flag (`--learning_rate` or `--learning-rate`) and a key of the YAML file given with
`--config`; flags win over the file.
"""

from __future__ import annotations

import difflib
import math
import re
from argparse import ArgumentDefaultsHelpFormatter
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from rlhf_fast.ops.aggregate import AGGREGATIONS
from rlhf_fast.ops.check import LARGEST, SMALLEST
from rlhf_fast.ops.policy_loss import LOSSES, RATIOS

from .errors import InputError


def option(default: Any = MISSING, *, help: str, choices: Sequence[str] = ()) -> Any:
    metadata = {"help": help, "choices": choices} if choices else {"help": help}
    return field(default=default, metadata=metadata)


# Names in one text, separated by commas; in a file they may also be a list.
COMMAS = {"report_to", "lora_target_modules"}


@dataclass(kw_only=True)
class RunConfig:
    """What training a reward model and training a policy have in common."""

    model: str = option(help="model to start from: a Hugging Face folder or hub name")
    data: str = option(help="dataset: a .jsonl, .csv or .parquet file, a folder, or a hub name")
    output_dir: str = option(help="folder for the trained model, metrics, plot and checkpoint")
    split: str = option("train", help="split to read, or a part of it: train[:5000]")
    subset: str | None = option(None, help="configuration to read when a dataset has several")
    max_rows: int | None = option(None, help="use only this many rows of the dataset")
    trainable_layers: int | None = option(
        None, help="train only this many top layers and freeze those below; unset trains all"
    )
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm")
    micro_batch_size: int | None = option(
        None, help="rows in one forward pass; smaller needs less memory, the result is the same"
    )
    seed: int = option(0, help="seed of shuffling and sampling")
    device: str = option("auto", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    save_every: int = option(50, help="steps between checkpoints")
    save_total_limit: int = option(2, help="checkpoints kept: the newest ones")
    resume: bool | str = option(
        False,
        help="continue the run in output_dir, or begin it when there is none; a finished one is "
        "left alone. `--resume` and `--resume auto` are the same",
    )
    overwrite: bool = option(False, help="delete the run in output_dir and begin again")
    max_skipped_updates: int = option(
        10,
        help="updates with a loss or gradient that is not finite are skipped; after this many in "
        "a row the run stops and keeps the batch in bad_batch.pt",
    )
    save_dtype: str | None = option(
        None,
        choices=("float32", "bfloat16", "float16"),
        help="dtype in which the trained model is saved [unset: that of the model it began as]; "
        "training itself is in float32",
    )
    trust_remote_code: bool = option(
        False, help="run Python code that a model's or tokenizer's folder brings along"
    )
    report_to: str | None = option(
        None,
        help="trackers besides metrics.jsonl, separated by commas: tensorboard, wandb, …",
    )

    # What makes a run this run: changed, its checkpoints would not fit, its place in the data would
    # be lost, or its results could not be compared with those before it. All else may differ when
    # it is continued, and counts from there on.
    fixed: ClassVar[set[str]] = {
        "model", "data", "split", "subset", "max_rows", "trainable_layers", "seed",
    }  # fmt: skip
    length: ClassVar[str] = "steps"  # the option that says when a run is finished

    def __post_init__(self) -> None:
        paths_as_text(self)
        if self.resume not in (True, False, "auto"):
            raise InputError(f"resume={self.resume}: expected true, false or auto")
        self.resume = bool(self.resume)
        not_empty(self)
        one_of(self)
        at_least(self, 1, "max_rows", "trainable_layers", "micro_batch_size", "save_every")
        at_least(self, 1, "save_total_limit", "max_skipped_updates")
        seed_in_range(self)
        above_zero(self, "max_grad_norm")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite contradict each other: set only one of them")


@dataclass(kw_only=True)
class RewardConfig(RunConfig):
    """Train a reward model: −log σ(score(chosen) − score(rejected) − margin) over preference pairs.

    The data has the columns `chosen` and `rejected`, optionally `prompt` and `margin`.
    """

    eval_data: str | None = option(None, help="held-out pairs; unset holds out some of data")
    eval_split: str | None = option(
        None, help="split of the held-out pairs, in eval_data or in data [unset: as split]"
    )
    eval_pairs: int | None = option(
        None, help="pairs held out of data [unset: a tenth, at most 200]"
    )
    epochs: int = option(1, help="passes over the pairs")
    batch_size: int = option(16, help="pairs in one optimiser step")
    learning_rate: float = option(1e-5, help="Adam's step size, at its highest")
    lr_scheduler_type: str = option(
        "linear",
        choices=("constant_with_warmup", "linear", "cosine"),
        help="the step size over the run, after the warm-up",
    )
    warmup_steps: int = option(0, help="steps in which the step size rises from zero")
    max_tokens: int = option(512, help="pairs with a longer text than this are left out")
    trunk_cache_mib: int = option(
        1024,
        help="memory in MiB for what the frozen layers make of the pairs: where it suffices, they "
        "run once and not in every epoch",
    )
    center_coef: float = option(
        0.0, help="adds this times (score(chosen) + score(rejected))² to keep scores around zero"
    )

    fixed: ClassVar[set[str]] = RunConfig.fixed | {
        "eval_data", "eval_split", "eval_pairs", "batch_size", "max_tokens",
    }  # fmt: skip
    length: ClassVar[str] = "epochs"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "eval_pairs", "epochs", "batch_size", "max_tokens")
        at_least(self, 0, "center_coef", "warmup_steps", "trunk_cache_mib")
        above_zero(self, "learning_rate")
        for name in ("eval_data", "eval_split"):
            if getattr(self, name) is not None and self.eval_pairs is not None:
                raise InputError(
                    f"{name} and eval_pairs contradict each other: held-out pairs are either a "
                    "dataset or split of their own, or drawn from data"
                )
        if self.eval_data is None and self.eval_split == self.split:
            raise InputError(
                f"eval_split={self.eval_split} is split: the pairs that are trained on"
            )
        if self.eval_data == self.data and self.eval_split in (None, self.split):
            raise InputError(f"eval_data={self.eval_data} is data: the pairs that are trained on")


CRITIC_FREE = ("grpo", "dr_grpo", "rloo", "reinforce")
GROUPED = ("grpo", "dr_grpo", "rloo")  # an answer is compared with the others to its prompt


@dataclass(kw_only=True)
class PPOConfig(RunConfig):
    """Train a policy with PPO against a reward. The data has the column `prompt`.

    r_t = −beta·(log π − log π_ref)_t, plus the score at the last token; GAE; clipped losses. Not
    options, since PPO goes wrong without them: dropout is off in every model, prompts are padded
    on the left with positions taken from the mask, the log-ratio is clamped to ±20, and one
    temperature divides the logits of rollout, old, new and reference log-probs alike.
    """

    # What is learnt from
    reward: list[str] = option(
        help="what scores an answer, one or several: a reward model (folder or hub name), a "
        "classifier's label (`folder#label`), or a Python function (`module:function` or "
        "`file.py:function`), f(prompts, completions, **columns) -> list of floats"
    )
    reward_weights: list[float] | None = option(
        None, help="the score is the sum of the rewards, each times its weight [unset: 1 each]"
    )
    judge: str | None = option(
        None, help="an independent score, written as a reward is: measured, never trained on"
    )
    missing_eos_penalty: float | None = option(
        None,
        help="taken off the score of an answer that ran into max_new_tokens [unset: 1.0, or "
        "nothing where missing_eos_score is set]",
    )
    missing_eos_score: float | None = option(
        None, help="takes the place of the score of an answer that ran into max_new_tokens"
    )
    score_clip: float | None = option(None, help="scores are clipped to ± this")
    reward_timeout: float | None = option(
        None,
        help="seconds that a function of reward or judge may take for a batch of answers, else the "
        "run ends with a checkpoint [unset: it is waited for, and named once a minute has passed]",
    )

    keep_special_tokens: bool = option(
        False,
        help="rewards read an answer with its special tokens (<think>, tool calls), which are left "
        "out otherwise; what ends it and padding stay out",
    )

    # Models
    value_model: str | None = option(
        None,
        help="a critic of its own: a causal LM (its value head begins at zero) or a reward model "
        "(its score head is where the value head begins); unset: a head on the policy",
    )
    lora_r: int | None = option(
        None, help="train LoRA adapters of this rank; the reference is the model without them"
    )
    lora_alpha: float = option(16.0, help="LoRA's scale is lora_alpha / lora_r")
    lora_target_modules: str | None = option(
        None,
        help="modules with adapters, separated by commas [unset: all linear layers]",
    )
    attn_implementation: str | None = option(
        None,
        choices=("eager", "sdpa", "flash_attention_2"),
        help="unset: flash_attention_2 where it is installed, bf16 runs on a GPU and the model "
        "supports it, else sdpa",
    )
    packing: bool | None = option(
        None,
        help="forward passes over whole answers without padding, all of a micro-batch in one row "
        "[unset: with flash_attention_2. Others attend to the square of all its tokens, so that "
        "only small micro-batches gain]",
    )
    bf16: bool = option(False, help="forward passes in bfloat16 (autocast); weights stay float32")

    # Sampling
    steps: int = option(1000, help="rounds of sampling answers and learning from them")
    batch_size: int = option(64, help="answers sampled in one step, by all processes together")
    samples_per_prompt: int = option(1, help="answers to each prompt of a batch: the group size")
    max_prompt_tokens: int = option(512, help="longer prompts are left out")
    max_new_tokens: int = option(64, help="longest answer, in tokens")
    temperature: float = option(1.0, help="divides the logits: in sampling and in every log-prob")
    top_k: int = option(0, help="sample among the k likeliest tokens only; 0: among all")
    top_p: float = option(1.0, help="sample among the likeliest tokens that together have this p")
    rollout_engine: str | None = option(
        None,
        help="what samples, `module:function` or `file.py:function` (see rollout.RolloutEngine); "
        "unset: rlhf_fast's own decoding",
    )
    tis_cap: float | None = option(
        None,
        help="weigh tokens by min(π_old/π_rollout, this), for a rollout engine whose log-probs "
        "differ from the trainer's (truncated importance sampling; 2.0 is usual)",
    )

    # Advantages
    estimator: str = option(
        "gae",
        choices=("gae", *CRITIC_FREE),
        help="gae: PPO with a critic. grpo, dr_grpo, rloo: a score against the others of its "
        "group. reinforce: returns without a baseline",
    )
    gamma: float = option(1.0, help="discount of later rewards")
    lam: float = option(0.95, help="GAE's λ: 0 trusts the value head, 1 the sampled rewards")
    whiten_rewards: bool = option(
        False, help="divide rewards per token by their standard deviation; the mean stays"
    )
    whiten_advantages: bool | None = option(
        None,
        help="advantages get mean 0 and standard deviation 1 over the batch's tokens [unset: yes "
        "for gae and reinforce; the group estimators centre by themselves]",
    )

    # The KL from the frozen reference
    beta: float = option(
        0.05,
        help="price of a nat of KL from the frozen reference; another one given on resume takes "
        "the place of what it has adapted to",
    )
    kl_in: str = option(
        "reward",
        choices=("reward", "loss"),
        help="the KL is taken off the reward (PPO, RLOO) or is a term of the loss (GRPO)",
    )
    kl_estimator: str = option(
        "k1",
        choices=("k1", "k2", "k3", "abs"),
        help="k1 = log(π/π_ref), k2 = k1²/2, k3 = exp(−k1) − 1 + k1, abs = |k1|",
    )
    adaptive_kl_target: float | None = option(
        None,
        help="beta is multiplied by 1 + clip(KL/target − 1, ±0.2)·batch_size/kl_horizon after "
        "each step, KL in nats a sequence (6.0 is usual); unset: beta stays as it is",
    )
    kl_horizon: int = option(10_000, help="answers over which beta adapts to adaptive_kl_target")

    # Learning
    epochs: int = option(4, help="passes over the batch")
    minibatches: int = option(1, help="optimiser steps in one pass over the batch")
    learning_rate: float = option(3e-6, help="Adam's step size for the policy (LoRA: 1e-5…5e-5)")
    value_learning_rate: float = option(1e-5, help="Adam's step size for the critic")
    lr_scheduler_type: str = option(
        "constant_with_warmup",
        choices=("constant_with_warmup", "linear", "cosine"),
        help="both step sizes over the run's optimiser steps, after the warm-up; changed on "
        "resume, it goes on as if it had been so from the beginning",
    )
    warmup_steps: int = option(0, help="optimiser steps in which the step sizes rise from 0")
    adam_beta1: float = option(0.9, help="Adam's β₁")
    adam_beta2: float = option(0.999, help="Adam's β₂ (OpenRLHF: 0.95)")
    adam_epsilon: float = option(1e-5, help="Adam's ε")
    weight_decay: float = option(0.0, help="AdamW's weight decay")
    policy_loss: str = option(
        "ppo",
        choices=LOSSES,
        help="ppo: the clipped surrogate. cispo: log-probs weighted by the clipped ratio, no token "
        "loses its gradient (TRL's loss_type, verl's loss_mode). reinforce: no ratio, no clip",
    )
    ratio: str = option(
        "token",
        choices=RATIOS,
        help="π/π_old of each token, or of the whole answer, its geometric mean over the tokens: "
        "GSPO (TRL's importance_sampling_level), with clip 3e-4 and clip_high 4e-4",
    )
    clip: float = option(0.2, help="the ratio π/π_old counts within 1 ± clip")
    clip_high: float | None = option(
        None, help="upper side of the clip, if it is another (0.28 is usual) [unset: clip]"
    )
    dual_clip: float | None = option(
        None, help="bounds the loss at negative advantages to this many times them (3.0 is usual)"
    )
    value_clip: float = option(0.2, help="values may move this far from the old ones in one step")
    value_coef: float = option(0.1, help="weight of the value loss, ½·max(…)²")
    entropy_coef: float = option(0.0, help="weight of the entropy bonus")
    aggregation: str = option(
        "token-mean",
        choices=AGGREGATIONS,
        help="how the tokens' policy losses become one number; token-sum is divided by "
        "answers × max_new_tokens (Dr. GRPO)",
    )
    target_kl: float | None = option(
        None,
        help="a step's passes end before an update whose minibatch is further than this from the "
        "policy that sampled it (mean of ½(log ratio)²; 0.02 is usual)",
    )

    # What is shown
    eval_prompts: int = option(
        32, help="prompts kept from training and answered before and after it"
    )
    log_every: int = option(10, help="steps between printed lines; every step is in metrics.jsonl")
    sample_every: int | None = option(None, help="steps between printed tables of answers")

    fixed: ClassVar[set[str]] = RunConfig.fixed | {
        "value_model", "estimator", "lora_r", "lora_alpha", "lora_target_modules",
        "batch_size", "samples_per_prompt", "max_prompt_tokens", "eval_prompts",
        "reward", "reward_weights", "judge", "keep_special_tokens",
        "max_new_tokens", "temperature", "top_k", "top_p",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size", "minibatches", "epochs", "max_prompt_tokens")
        at_least(self, 1, "max_new_tokens", "eval_prompts", "log_every", "sample_every")
        at_least(self, 1, "samples_per_prompt", "lora_r", "kl_horizon")
        at_least(self, 0, "beta", "value_coef", "entropy_coef", "missing_eos_penalty")
        at_least(self, 0, "gamma", "lam", "top_k", "warmup_steps", "weight_decay")
        at_least(self, 0, "adam_beta1", "adam_beta2")
        at_most(self, 1, "gamma", "lam", "top_p", "clip")
        below_one(self, "adam_beta1", "adam_beta2")
        above_zero(self, "temperature", "learning_rate", "value_learning_rate", "adam_epsilon")
        above_zero(self, "clip", "clip_high", "value_clip", "score_clip", "target_kl", "tis_cap")
        above_zero(self, "reward_timeout")
        above_zero(self, "adaptive_kl_target", "lora_alpha", "top_p")
        finite(self, "missing_eos_score")
        above_one(self, "dual_clip")
        for parts in ("minibatches", "samples_per_prompt"):
            if self.batch_size % getattr(self, parts):
                raise InputError(
                    f"batch_size={self.batch_size} cannot be cut into "
                    f"{parts}={getattr(self, parts)} of the same size"
                )
        self.check_reward()
        self.refuse_contradictions()

    # Left unset these follow from others. They stay unset in the config, so that one made from it
    # (--config of a run's config.yaml, dataclasses.replace) with other options has its own.

    @property
    def eos_penalty(self) -> float:
        if self.missing_eos_penalty is not None:
            return self.missing_eos_penalty
        return 1.0 if self.missing_eos_score is None else 0.0

    @property
    def whitens_advantages(self) -> bool:
        if self.whiten_advantages is not None:
            return self.whiten_advantages
        return self.estimator not in GROUPED

    def refuse_contradictions(self) -> None:
        grouped = self.estimator in GROUPED
        for contradict, names, reason in (
            (
                self.missing_eos_score is not None and self.missing_eos_penalty,
                ("missing_eos_score", "missing_eos_penalty"),
                "an answer without an end is scored by one of them",
            ),
            (
                self.lora_r is not None and self.trainable_layers is not None,
                ("lora_r", "trainable_layers"),
                "either adapters learn or the top layers do",
            ),
            (
                self.lora_target_modules is not None and self.lora_r is None,
                ("lora_target_modules", "lora_r"),
                "without a rank there are no adapters",
            ),
            (
                self.value_model is not None and self.estimator in CRITIC_FREE,
                ("value_model", "estimator"),
                "this estimator has no critic",
            ),
            (
                grouped and self.samples_per_prompt < 2,
                ("estimator", "samples_per_prompt"),
                "an answer needs others to its prompt to be compared with",
            ),
            (
                grouped and self.whiten_rewards,
                ("estimator", "whiten_rewards"),
                "this estimator has no rewards per token",
            ),
            (
                self.kl_in == "loss" and self.kl_estimator == "k1",
                ("kl_in", "kl_estimator"),
                "k1's gradient is zero on average: choose k2 or k3",
            ),
            (
                self.ratio == "sequence" and self.policy_loss == "reinforce",
                ("ratio", "policy_loss"),
                "this loss has no ratio",
            ),
            (
                self.dual_clip is not None and self.policy_loss != "ppo",
                ("dual_clip", "policy_loss"),
                "only ppo has a dual clip",
            ),
            (
                self.clip_high is not None and self.policy_loss == "reinforce",
                ("clip_high", "policy_loss"),
                "this loss has no clip",
            ),
            (
                self.adaptive_kl_target is not None and self.beta == 0,
                ("adaptive_kl_target", "beta"),
                "multiplying 0 leaves 0",
            ),
            (
                self.attn_implementation == "flash_attention_2" and not self.bf16,
                ("attn_implementation", "bf16"),
                "flash attention has no float32",
            ),
        ):
            if contradict:
                raise InputError(
                    " and ".join(f"{name}={getattr(self, name)}" for name in names)
                    + f" contradict each other: {reason}"
                )

    def check_reward(self) -> None:
        if isinstance(self.reward, str):
            self.reward = [self.reward]
        if not all(self.reward or [""]):
            raise InputError("reward is empty: give at least one model or function")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise InputError(
                f"reward_weights={self.reward_weights} has {len(self.reward_weights)} numbers for "
                f"the {len(self.reward)} of reward={self.reward}: give each reward its weight"
            )
        for weight in self.reward_weights or ():
            if not math.isfinite(weight):
                raise InputError(f"reward_weights={self.reward_weights}: expected finite numbers")


@dataclass(kw_only=True)
class GenerateConfig:
    """Answer a prompt with a trained policy."""

    model: str = option(help="policy: a Hugging Face folder (`<output_dir>/model`) or hub name")
    prompt: str = option(help="text to continue, or to answer with --chat")
    chat: bool = option(False, help="put the prompt into the model's chat template")
    samples: int = option(1, help="answers to write")
    max_new_tokens: int = option(64, help="longest answer, in tokens")
    temperature: float = option(1.0, help="divides the logits; 0 always takes the likeliest token")
    top_k: int = option(0, help="sample among the k likeliest tokens only; 0: among all")
    top_p: float = option(1.0, help="sample among the likeliest tokens that together have this p")
    keep_special_tokens: bool = option(
        False, help="write the special tokens of an answer, too (<think>, tool calls)"
    )
    trust_remote_code: bool = option(
        False, help="run Python code that the model's or tokenizer's folder brings along"
    )
    seed: int = option(0, help="seed of the sampling")
    device: str = option("auto", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one")

    def __post_init__(self) -> None:
        paths_as_text(self)
        not_empty(self)
        seed_in_range(self)
        at_least(self, 1, "samples", "max_new_tokens")
        at_least(self, 0, "temperature", "top_k")
        above_zero(self, "top_p")
        at_most(self, 1, "top_p")


@dataclass(kw_only=True)
class PlotConfig:
    """Draw reward, KL, judge, clip fraction and value loss over the steps of a PPO run."""

    run: str = option(help="output_dir of the run")
    output: str | None = option(None, help="PNG to write [unset: plot.png in the run's folder]")


def at_least(config: Any, low: float, *names: str) -> None:
    check(config, lambda value: value >= low, f"at least {low}", names)


def at_most(config: Any, high: float, *names: str) -> None:
    check(config, lambda value: value <= high, f"at most {high}", names)


def above_one(config: Any, *names: str) -> None:
    check(config, lambda value: value > 1, "above 1", names)


def above_zero(config: Any, *names: str) -> None:
    check(config, lambda value: value > 0, "above 0", names)


def below_one(config: Any, *names: str) -> None:
    check(config, lambda value: value < 1, "below 1", names)


def finite(config: Any, *names: str) -> None:
    check(config, lambda value: True, "or unset", names)


def seed_in_range(config: Any) -> None:
    at_least(config, 0, "seed")
    at_most(config, 2**32 - 1, "seed")


def paths_as_text(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, PathLike):
            setattr(config, f.name, str(value))
        elif isinstance(value, list | tuple) and any(isinstance(x, PathLike) for x in value):
            setattr(config, f.name, [str(x) if isinstance(x, PathLike) else x for x in value])


def not_empty(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, str) and not value.strip():
            raise InputError(f"{f.name} is empty: expected text")


def one_of(config: Any) -> None:
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise InputError(f"{f.name}={value}: expected one of {', '.join(choices)}")


def check(config: Any, holds: Any, expected: str, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not (math.isfinite(value) and holds(value)):
            raise InputError(f"{name}={value}: expected a finite number, {expected}")
        if value and not SMALLEST <= abs(value) <= LARGEST:
            raise InputError(
                f"{name}={value}: expected a number that float32 can compute with, "
                f"{SMALLEST:g} to {LARGEST:g}"
            )


# ------------------------------------------------------------------------------------ parsing

C = TypeVar("C")


class FlagHelp(ArgumentDefaultsHelpFormatter):
    """One spelling of each flag in --help (both `_` and `-` are taken), and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: Any) -> str:
        flag = action.option_strings[0]
        several = " …" if action.nargs == "+" else ""
        return flag if action.nargs in (0, "?") else f"{flag} {action.dest.upper()}{several}"

    def _get_help_string(self, action: Any) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(HfArgumentParser):
    """Raises InputError where argparse would print its usage and leave."""

    def error(self, message: str) -> None:
        raise InputError(message)


def parse(config_class: type[C], argv: Sequence[str], *, prog: str) -> C:
    """Flags, and the YAML file they name with --config, -> a checked config."""
    parser = FlagParser(
        config_class,
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--flag VALUE …]",
        description=config_class.__doc__,
        formatter_class=FlagHelp,
        allow_abbrev=False,
    )
    parser._negative_number_matcher = re.compile(r"-\d*\.?\d+(e[-+]?\d+)?$")  # -1e-3 is no flag
    parser.add_argument("--config", help="YAML file of these flags, without the dashes")
    for action in parser._actions:
        if action.dest == "resume":  # a switch that also takes the word other trainers have for it
            action.type = lambda word: word == "auto" or yes_or_no(word)
        elif action.type is string_to_bool:
            action.type = yes_or_no

    argv = list(argv)
    if not {"-h", "--help"} & set(argv):
        file = FlagParser(add_help=False, allow_abbrev=False)
        file.add_argument("--config")
        named, argv = file.parse_known_args(argv)
        if named.config is not None:  # the file's values come first, so later flags win
            argv = yaml_flags(Path(named.config), config_class) + argv

    required = [action for action in parser._actions if action.required]
    for action in required:  # asked for below, after misspelt flags: one of those may be the cause
        action.required = False
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unknown flag {unknown[0]}{nearest(unknown[0], config_class, '--')}")
    missing = [a.option_strings[0] for a in required if getattr(namespace, a.dest) is None]
    if missing:
        raise InputError(f"missing {', '.join(missing)}: give the flag, or the key in --config")
    values = vars(namespace)
    values.pop("config")
    return config_class(**values)


def yes_or_no(word: str) -> bool:
    return string_to_bool({"on": "true", "off": "false"}.get(word.lower(), word))


def yaml_flags(path: Path, config_class: type) -> list[str]:
    """A YAML mapping as a list of flags, so that argparse checks both alike.

    A value is the text that is written, as a flag's is, and the option says what it means: YAML 1.1
    makes False of `no`, 7 of `007`, a date of `2026-11-28` and a string of `1e-5`. Of its words
    only `null`, `~` and nothing are not text, where they are not quoted: they leave the default.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"config={path}: expected lines of `key: value`")
        written = Counter(str(key.value) for key, _ in node.value)
        loader.flatten_mapping(node)  # `<<: *other`, whose keys come first
    except OSError as error:
        raise InputError(f"config={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"config={path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config={path} is not YAML: {' '.join(str(error).split())}") from None
    known = {f.name: f for f in fields(config_class)}
    values: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            word = key.value if isinstance(key, yaml.ScalarNode) else "that is not a word"
            raise InputError(f"config={path}: unknown key {word}{nearest(word, config_class)}")
        if written[key.value] > 1:  # YAML itself would take the last
            raise InputError(f"config={path}: {key.value} is there {written[key.value]} times")
        values[key.value] = value
    flags = []
    for name, value in values.items():
        where = f"config={path}: {name}"
        several = str(known[name].type).startswith("list")
        if isinstance(value, yaml.SequenceNode) and (several or name in COMMAS):
            words = [scalar(item, f"{where} has an item that") for item in value.value]
            if None in words:
                raise InputError(f"{where} has an item that is empty, expected text")
            if any(word.startswith("--") for word in words):
                raise InputError(f"{where} has an item that begins with --, as flags do")
            flags += [f"--{name}", *words] if several else [f"--{name}={','.join(words)}"]
        elif (word := scalar(value, where)) is not None:
            flags.append(f"--{name}={word}")
    return flags


def scalar(node: yaml.Node, where: str) -> str | None:
    """The text as it is written; None for null."""
    if not isinstance(node, yaml.ScalarNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "dict"
        raise InputError(f"{where} is a {kind}, expected one value")
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"):
        raise InputError(f"{where} has the tag {node.tag}, expected one value without a tag")
    return None if kind == "null" else node.value


def nearest(word: str, config_class: type, dashes: str = "") -> str:
    """` (did you mean …?)`, or nothing when no name is near."""
    names = [f.name for f in fields(config_class)] + (["config"] if dashes else [])
    asked = word.lstrip("-").split("=")[0].replace("-", "_")
    found = difflib.get_close_matches(asked, names, n=1)
    return f" (did you mean {dashes}{found[0]}?)" if found else ""
