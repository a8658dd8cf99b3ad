"""Every option of every `rlhf-fast` command: one dataclass each, checked on creation.

A field is a flag (`--learning_rate` or `--learning-rate`) and a key of the YAML file given with
`--config`; flags win over the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, ClassVar

import torch

from rlhf_fast.ops.options import PolicyOptions
from rlhf_fast.ops.rollout_correction import LEVELS, REJECTIONS

from . import contradictions
from .checks import (
    above_zero,
    as_annotated,
    at_least,
    at_most,
    below_one,
    finite,
    in_ranges,
    no_objects,
    paths_as_text,
    seed_in_range,
)
from .contradictions import refuse
from .errors import InputError
from .flags import without_eval


def option(group: str, default: Any = MISSING, *, help: str, choices: Sequence[str] = ()) -> Any:
    metadata = {"group": group, "help": help}
    return field(default=default, metadata=metadata | ({"choices": choices} if choices else {}))


def needed(group: str, *, help: str) -> Any:
    """A flag that must be given. In Python an object may stand for it: see trainers.py."""
    return field(default=None, metadata={"group": group, "help": help, "needed": True})


@dataclass(kw_only=True)
class RunConfig:
    """What training a reward model and training a policy have in common."""

    model: str | None = needed(
        "model and data", help="model to start from: a Hugging Face folder or hub name"
    )
    data: str | None = needed(
        "model and data", help="dataset: a .jsonl, .csv or .parquet file, a folder, or a hub name"
    )
    output_dir: str = option(
        "run", help="folder for the trained model, metrics, plot and checkpoint"
    )
    split: str = option(
        "model and data", "train", help="split to read, or a part of it: train[:5000]"
    )
    subset: str | None = option(
        "model and data", None, help="configuration to read when a dataset has several"
    )
    max_rows: int | None = option(
        "model and data", None, help="use only this many rows of the dataset"
    )
    trainable_layers: int | None = option(
        "model and data",
        None,
        help="train only this many top layers and freeze those below; unset trains all",
    )
    max_grad_norm: float = option("optimiser", 1.0, help="gradients are scaled down to this norm")
    micro_batch_size: int | None = option(
        "devices",
        None,
        help="rows in one forward pass; smaller needs less memory, the result is the same",
    )
    seed: int = option("run", 0, help="seed of shuffling and sampling")
    device: str = option(
        "devices", "auto", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one"
    )
    save_every: int = option("run", 50, help="steps between checkpoints")
    save_total_limit: int = option("run", 2, help="checkpoints kept: the newest ones")
    resume: bool | str = option(
        "run",
        False,
        help="continue the run in output_dir, or begin it when there is none; a finished one is "
        "left alone. `--resume` and `--resume auto` are the same",
    )
    overwrite: bool = option("run", False, help="delete the run in output_dir and begin again")
    max_skipped_updates: int = option(
        "optimiser",
        10,
        help="updates with a loss or gradient that is not finite are skipped; after this many in "
        "a row the run stops and keeps the batch in bad_batch.pt",
    )
    save_dtype: str | None = option(
        "run",
        None,
        choices=("float32", "bfloat16", "float16"),
        help="dtype in which the trained model is saved [unset: that of the model it began as]; "
        "training itself is in float32",
    )
    trust_remote_code: bool = option(
        "model and data",
        False,
        help="run Python code that a model's or tokenizer's folder brings along",
    )
    report_to: str | None = option(
        "run",
        None,
        help="trackers besides metrics.jsonl, separated by commas: tensorboard, wandb, …",
    )

    eval_every: int | None = option(
        "run",
        None,
        help="steps between evaluations of what is held out, kept in metrics/eval.jsonl [unset: "
        "before and after only]",
    )
    load_best_model_at_end: bool = option(
        "run", False, help="the trained model is that of the best evaluation, not the last step's"
    )
    early_stopping_patience: int | None = option(
        "run", None, help="the run ends after this many evaluations in a row without a better one"
    )

    push_to_hub: bool = option(
        "run", False, help="upload the trained model with its card when the run is finished"
    )
    hub_model_id: str | None = option(
        "run", None, help="repository to upload to: `owner/name` [unset: output_dir's name]"
    )
    hub_private_repo: bool = option("run", False, help="make that repository private")

    # What makes a run this run: changed, its checkpoints would not fit, its place in the data would
    # be lost, or its results could not be compared with those before it. All else may differ when
    # it is continued, and counts from there on.
    fixed: ClassVar[set[str]] = {
        "model", "data", "split", "subset", "max_rows", "trainable_layers", "seed",
    }  # fmt: skip
    length: ClassVar[str] = "steps"  # the option that says when a run is finished

    def __post_init__(self) -> None:
        paths_as_text(self)
        no_objects(self)
        if self.resume not in (True, False, "auto"):
            raise InputError(f"resume={self.resume}: expected true, false or auto")
        self.resume = bool(self.resume)
        as_annotated(self)
        at_least(self, 1, "max_rows", "trainable_layers", "micro_batch_size", "save_every")
        at_least(self, 1, "save_total_limit", "max_skipped_updates")
        seed_in_range(self)
        above_zero(self, "max_grad_norm")
        at_least(self, 1, "eval_every", "early_stopping_patience")
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and self.eval_every is None:
                raise InputError(f"{name}={getattr(self, name)} needs evaluations: set eval_every")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite contradict each other: set only one of them")


@dataclass(kw_only=True)
class RewardConfig(RunConfig):
    """Train a reward model: −log σ(score(chosen) − score(rejected) − margin) over preference pairs.

    The data has the columns `chosen` and `rejected`, optionally `prompt` and `margin`.
    """

    eval_data: str | None = option(
        "model and data", None, help="held-out pairs; unset holds out some of data"
    )
    eval_split: str | None = option(
        "model and data",
        None,
        help="split of the held-out pairs, in eval_data or in data [unset: as split]",
    )
    eval_pairs: int | None = option(
        "model and data", None, help="pairs held out of data [unset: a tenth, at most 200]"
    )
    epochs: int = option("optimiser", 1, help="passes over the pairs")
    batch_size: int = option("optimiser", 16, help="pairs in one optimiser step")
    learning_rate: float = option("optimiser", 1e-5, help="Adam's step size, at its highest")
    lr_scheduler_type: str = option(
        "optimiser",
        "linear",
        choices=("constant_with_warmup", "linear", "cosine"),
        help="the step size over the run, after the warm-up",
    )
    warmup_steps: int = option("optimiser", 0, help="steps in which the step size rises from zero")
    max_tokens: int = option(
        "model and data", 512, help="pairs with a longer text than this are left out"
    )
    trunk_cache_mib: int = option(
        "devices",
        1024,
        help="memory in MiB for what the frozen layers make of the pairs: where it suffices, they "
        "run once and not in every epoch",
    )
    center_coef: float = option(
        "objective",
        0.0,
        help="adds this times (score(chosen) + score(rejected))² to keep scores around zero",
    )

    metric_for_best_model: str = option(
        "run",
        "accuracy",
        choices=("accuracy", "loss"),
        help="what makes one evaluation better than another, over the held-out pairs",
    )

    fixed: ClassVar[set[str]] = RunConfig.fixed | {
        "eval_data", "eval_split", "eval_pairs", "batch_size", "max_tokens",
    }  # fmt: skip
    length: ClassVar[str] = "epochs"

    def __post_init__(self) -> None:
        self.metric_for_best_model = without_eval(self.metric_for_best_model)
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
        refuse_same_data(self, "pairs")
        refuse(self, contradictions.REWARD)


def refuse_same_data(config: Any, rows: str) -> None:
    """What is held out must not be what is learnt from."""
    if config.eval_data is None and config.eval_split == config.split:
        raise InputError(f"eval_split={config.eval_split} is split: the {rows} that are trained on")
    if config.eval_data is not None and config.eval_data == config.data:
        if config.eval_split in (None, config.split):
            raise InputError(
                f"eval_data={config.eval_data} is data: the {rows} that are trained on"
            )


# An answer's one advantage, from its score against those of the others to its prompt.
GROUPED = ("grpo", "dr_grpo", "rloo", "opo")
CRITIC_FREE = (*GROUPED, "reinforce", "reinforce_baseline", "remax")


# What a flag has otherwise than the option of the policy loss that it sets; None: it is no flag.
OTHERWISE: dict[str, dict[str, Any] | None] = {
    "clip_low": {"name": "clip", "above": 0.0, "help": "the ratio π/π_old counts within 1 ± clip"},
    "clip_high": {
        "default": None,
        "above": 0.0,
        "help": "upper side of the clip, if it is another (0.28 is usual) [unset: clip]",
    },
    "entropy_coef": {"low": 0.0},
    "kl_coef": None,  # beta, where kl_in is loss
    "kl_estimator": {"default": "k1"},  # kl_in is reward by default
    "aggregation": {
        "help": "how the tokens' policy losses become one number; token-sum is divided by answers "
        "× max_new_tokens (Dr. GRPO)"
    },
    "loss": {"name": "policy_loss"},
}


def policy_flags(options: type) -> type:
    """The base of a config: a flag for every option of the policy loss, with `flags` (option ->
    its flag) and `ranges` (of those that are numbers)."""
    made, flags, ranges = [], {}, {}
    for f in fields(options):
        other = OTHERWISE.get(f.name, {})
        if other is None:
            continue
        name = flags[f.name] = other.get("name", f.name)
        default = other.get("default", f.default)
        kind = f"{f.type} | None" if default is None and "None" not in f.type else f.type
        if kind.startswith("float"):
            ranges[name] = {k: other.get(k, v) for k, v in f.metadata["range"].items()}
        text = other.get("help", f.metadata["help"])
        made.append(
            (name, kind, option("objective", default, help=text, choices=f.metadata["choices"]))
        )
    own = {"flags": flags, "ranges": ranges}
    return make_dataclass("PolicyFlags", made, kw_only=True, namespace=own)


@dataclass(kw_only=True)
class PPOConfig(policy_flags(PolicyOptions), RunConfig):  # type: ignore[misc]
    """Train a policy with PPO against a reward. The data has the column `prompt`.

    r_t = −beta·(log π − log π_ref)_t, plus the score at the last token; GAE; clipped losses. Not
    options, since PPO goes wrong without them: dropout is off in every model, prompts are padded
    on the left with positions taken from the mask, the log-ratio is clamped to ±20, and one
    temperature divides the logits of rollout, old, new and reference log-probs alike.
    """

    # What is learnt from
    reward: list[str] | None = needed(
        "rewards",
        help="what scores an answer, one or several: a reward model (folder or hub name), a "
        "classifier's label (`folder#label`), a Python function (`module:function` or "
        "`file.py:function`), f(prompts, completions, **columns) -> list of floats, or "
        "`environment`",
    )
    reward_weights: list[float] | None = option(
        "rewards",
        None,
        help="the score is the sum of the rewards, each times its weight [unset: 1 each]",
    )
    judge: str | None = option(
        "rewards",
        None,
        help="an independent score, written as a reward is: measured, never trained on",
    )
    missing_eos_penalty: float | None = option(
        "rewards",
        None,
        help="taken off the score of an answer that ran into max_new_tokens [unset: 1.0, or "
        "nothing where missing_eos_score is set]",
    )
    missing_eos_score: float | None = option(
        "rewards",
        None,
        help="takes the place of the score of an answer that ran into max_new_tokens",
    )
    score_clip: float | None = option("rewards", None, help="scores are clipped to ± this")
    overlong_cache: int | None = option(
        "rewards",
        None,
        help="an answer's last so many tokens before max_new_tokens cost it up to 1, linearly "
        "(soft overlong punishment: DAPO); missing_eos_penalty comes on top",
    )
    reward_timeout: float | None = option(
        "rewards",
        None,
        help="seconds that a function of reward or judge may take for a batch of answers, else the "
        "run ends with a checkpoint; for one answer where it returns a list of awaitables [unset: "
        "it is waited for, and named once a minute has passed]",
    )
    reward_concurrency: int = option(
        "rewards", 16, help="answers that a list of awaitables is waited for at a time"
    )
    reward_retries: int = option(
        "rewards", 0, help="a reward function that fails or hangs is called so many times more"
    )
    reward_failures: str = option(
        "rewards",
        "drop",
        choices=("drop", "end"),
        help="an answer whose awaitable fails or hangs leaves the batch (drop), or the run ends "
        "with a checkpoint (end); a function that fails for all its answers ends it anyway",
    )

    keep_special_tokens: bool = option(
        "rewards",
        False,
        help="rewards read an answer with its special tokens (<think>, tool calls), which are left "
        "out otherwise; what ends it and padding stay out",
    )

    # Models
    value_model: str | None = option(
        "model and data",
        None,
        help="a critic of its own: a causal LM (its value head begins at zero) or a reward model "
        "(its score head is where the value head begins); unset: a head on the policy",
    )
    lora_r: int | None = option(
        "model and data",
        None,
        help="train LoRA adapters of this rank; the reference is the model without them",
    )
    lora_alpha: float = option("model and data", 16.0, help="LoRA's scale is lora_alpha / lora_r")
    lora_target_modules: str | None = option(
        "model and data",
        None,
        help="modules with adapters, separated by commas [unset: all linear layers]",
    )
    attn_implementation: str | None = option(
        "devices",
        None,
        choices=("eager", "sdpa", "flash_attention_2"),
        help="unset: flash_attention_2 where it is installed, bf16 runs on a GPU and the model "
        "supports it, else sdpa",
    )
    packing: bool | None = option(
        "devices",
        None,
        help="forward passes over whole answers without padding, all of a micro-batch in one row "
        "[unset: with flash_attention_2. Others attend to the square of all its tokens, so that "
        "only small micro-batches gain]",
    )
    bf16: bool = option(
        "devices", False, help="forward passes in bfloat16 (autocast); weights stay float32"
    )

    # Sampling
    steps: int = option("run", 1000, help="rounds of sampling answers and learning from them")
    batch_size: int = option(
        "sampling", 64, help="answers sampled in one step, by all processes together"
    )
    samples_per_prompt: int = option(
        "sampling", 1, help="answers to each prompt of a batch: the group size"
    )
    dynamic_sampling_rounds: int = option(
        "sampling",
        0,
        help="groups whose answers all score the same are replaced by others, from up to this many "
        "further batches of prompts in a step (dynamic sampling: DAPO)",
    )
    max_prompt_tokens: int = option("model and data", 512, help="longer prompts are left out")
    max_new_tokens: int = option("sampling", 64, help="longest answer, in tokens")
    temperature: float = option(
        "sampling", 1.0, help="divides the logits: in sampling and in every log-prob"
    )
    top_k: int = option(
        "sampling", 0, help="sample among the k likeliest tokens only; 0: among all"
    )
    top_p: float = option(
        "sampling", 1.0, help="sample among the likeliest tokens that together have this p"
    )
    min_p: float = option(
        "sampling", 0.0, help="sample only among tokens whose p is at least this times the largest"
    )
    rollout_engine: str | None = option(
        "sampling",
        None,
        help="what samples: `transformers` (continuous batching), `vllm` (in this process), "
        "`vllm-server`, or a function or class of your own, `module:name` or `file.py:name`; "
        "unset: rlhf_fast's own decoding",
    )
    rollout_engine_options: list[str] | None = option(
        "sampling",
        None,
        help="`name=value` …: options of the engine, or of the library under it; in a file also a "
        "mapping",
    )
    environment: str | None = option(
        "sampling",
        None,
        help="what answers the policy, turn by turn: a class of your own, `module:name` or "
        "`file.py:name`, with reset(prompt, **columns) and step(messages) -> (observation, reward, "
        "done); `--reward environment` is the sum of its rewards. max_new_tokens counts all turns",
    )
    max_turns: int = option(
        "sampling", 8, help="turns of the policy in an episode of the environment"
    )
    tis_cap: float | None = option(
        "objective",
        None,
        help="weigh tokens by min(s, this), s = π_old/π_rollout, for a rollout engine whose "
        "log-probs differ from the trainer's (truncated importance sampling; 2.0 is usual)",
    )
    rollout_correction: str | None = option(
        "objective",
        None,
        choices=("truncate", "mask"),
        help="what becomes of an s outside rollout_ratio_min … tis_cap: truncate holds it there "
        "(TIS), mask makes it 0 (IcePop, MIS) [unset: truncate where tis_cap is set, else no "
        "weights]",
    )
    rollout_correction_level: str = option(
        "objective",
        "token",
        choices=LEVELS,
        help="s is the token's, the product over its answer's tokens, or their geometric mean",
    )
    rollout_ratio_min: float | None = option(
        "objective", None, help="lower bound of s (mask: 0.5 with a tis_cap of 5 is usual)"
    )
    rollout_normalize: bool = option(
        "objective", False, help="divide the weights made of s by their mean over the batch"
    )
    rollout_reject: str | None = option(
        "objective",
        None,
        choices=REJECTIONS,
        help="answers leave the batch by this mean, sum or maximum over their tokens of the KL "
        "estimates between rollout and trainer (k1 by its size)",
    )
    rollout_reject_above: float | None = option(
        "objective", None, help="nats of rollout_reject above which an answer is left out"
    )
    rollout_veto: float | None = option(
        "objective",
        None,
        help="an answer is left out for one token whose s is below this (1e-4 is usual)",
    )
    bypass: bool = option(
        "objective",
        False,
        help="take the rollout's log-probs for the old ones, without a pass for them: the loss's "
        "own ratio is then the correction",
    )
    top_entropy_quantile: float = option(
        "objective",
        1.0,
        help="only this share of the batch's tokens, those of the highest entropy, has a policy "
        "gradient (0.2 is usual; TRL's flag of this name); KL, entropy and critic keep all",
    )
    off_policy_mask_threshold: float | None = option(
        "objective",
        None,
        help="an answer's tokens of negative advantage have no policy gradient once log π_rollout "
        "− log π is above this on average, in nats a token (DeepSeek-V3.2; TRL's flag of this "
        "name). Costs a further product with the head, forward",
    )

    # Advantages
    estimator: str = option(
        "objective",
        "gae",
        choices=("gae", *CRITIC_FREE),
        help="gae: PPO with a critic. grpo, dr_grpo, rloo, opo: a score against the others of its "
        "group. reinforce: rewards to go without a baseline, whitened: REINFORCE++. "
        "reinforce_baseline: with the group's mean taken off. remax: with the score of a greedy "
        "answer taken off",
    )
    gamma: float = option("objective", 1.0, help="discount of later rewards")
    lam: float = option(
        "objective", 0.95, help="GAE's λ: 0 trusts the value head, 1 the sampled rewards"
    )
    lam_critic: float | None = option(
        "objective", None, help="λ of the returns that the critic learns (VAPO: 1) [unset: lam]"
    )
    lam_length_alpha: float | None = option(
        "objective",
        None,
        help="the advantages' λ is 1 − 1/(this · the answer's tokens), at least 0, in place of lam "
        "(VAPO: 0.05)",
    )
    whiten_rewards: bool = option(
        "objective",
        False,
        help="divide rewards per token by their standard deviation; the mean stays",
    )
    whiten_advantages: bool | None = option(
        "objective",
        None,
        help="advantages get mean 0 and standard deviation 1 over the batch's tokens [unset: yes "
        "for gae, reinforce and reinforce_baseline; the others centre by themselves]",
    )

    # The KL from the frozen reference
    beta: float = option(
        "objective",
        0.05,
        help="price of a nat of KL from the frozen reference; another one given on resume takes "
        "the place of what it has adapted to",
    )
    kl_in: str = option(
        "objective",
        "reward",
        choices=("reward", "loss"),
        help="the KL is taken off the reward (PPO, RLOO) or is a term of the loss (GRPO)",
    )
    adaptive_kl_target: float | None = option(
        "objective",
        None,
        help="beta is multiplied by 1 + clip(KL/target − 1, ±0.2)·batch_size/kl_horizon after "
        "each step, KL in nats a sequence (6.0 is usual); unset: beta stays as it is",
    )
    kl_horizon: int = option(
        "objective", 10_000, help="answers over which beta adapts to adaptive_kl_target"
    )

    # Learning
    epochs: int = option("optimiser", 4, help="passes over the batch")
    minibatches: int = option("optimiser", 1, help="optimiser steps in one pass over the batch")
    learning_rate: float = option(
        "optimiser", 3e-6, help="Adam's step size for the policy (LoRA: 1e-5…5e-5)"
    )
    value_learning_rate: float = option("optimiser", 1e-5, help="Adam's step size for the critic")
    lr_scheduler_type: str = option(
        "optimiser",
        "constant_with_warmup",
        choices=("constant_with_warmup", "linear", "cosine"),
        help="both step sizes over the run's optimiser steps, after the warm-up; changed on "
        "resume, it goes on as if it had been so from the beginning",
    )
    warmup_steps: int = option(
        "optimiser", 0, help="optimiser steps in which the step sizes rise from 0"
    )
    adam_beta1: float = option("optimiser", 0.9, help="Adam's β₁")
    adam_beta2: float = option("optimiser", 0.999, help="Adam's β₂ (OpenRLHF: 0.95)")
    adam_epsilon: float = option("optimiser", 1e-5, help="Adam's ε")
    weight_decay: float = option("optimiser", 0.0, help="AdamW's weight decay")
    value_clip: float = option(
        "objective", 0.2, help="values may move this far from the old ones in one step"
    )
    value_coef: float = option("objective", 0.1, help="weight of the value loss, ½·max(…)²")
    critic_warmup_steps: int = option(
        "optimiser",
        0,
        help="first steps in which the critic learns and the policy's step size is 0",
    )
    positive_nll_coef: float = option(
        "objective",
        0.0,
        help="weight of −log π of the answers that score above 0, the right ones (VAPO: 0.1)",
    )
    target_kl: float | None = option(
        "objective",
        None,
        help="a step's passes end before an update whose minibatch is further than this from the "
        "policy that sampled it (mean of ½(log ratio)²; 0.02 is usual)",
    )

    # What is shown
    eval_data: str | None = option(
        "model and data", None, help="held-out prompts; unset holds out some of data"
    )
    eval_split: str | None = option(
        "model and data",
        None,
        help="split of the held-out prompts, in eval_data or in data [unset: as split]",
    )
    eval_prompts: int = option(
        "model and data",
        32,
        help="prompts kept from training and answered before and after it: the first different "
        "ones",
    )
    log_every: int = option(
        "run", 10, help="steps between printed lines; every step is in metrics.jsonl"
    )
    sample_every: int | None = option("run", None, help="steps between printed tables of answers")
    metric_for_best_model: str = option(
        "run",
        "score",
        choices=("score", "judge", "kl"),
        help="what makes one evaluation better than another: the mean score or judge's score of "
        "the held-out prompts' answers, or (lower is better) their KL",
    )
    stop_at_kl: float | None = option(
        "run",
        None,
        help="the run ends after a step whose answers are further than this from the reference "
        "(KL in nats a sequence)",
    )

    fixed: ClassVar[set[str]] = RunConfig.fixed | {
        "value_model", "estimator", "lora_r", "lora_alpha", "lora_target_modules",
        "batch_size", "samples_per_prompt", "max_prompt_tokens",
        "eval_data", "eval_split", "eval_prompts",
        "environment", "max_turns",
        "reward", "reward_weights", "judge", "keep_special_tokens",
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
    }  # fmt: skip

    def __post_init__(self) -> None:
        self.metric_for_best_model = without_eval(self.metric_for_best_model)
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size", "minibatches", "epochs", "max_prompt_tokens")
        at_least(self, 1, "max_new_tokens", "eval_prompts", "log_every", "sample_every")
        at_least(self, 1, "samples_per_prompt", "lora_r", "kl_horizon")
        at_least(self, 0, "dynamic_sampling_rounds", "critic_warmup_steps", "positive_nll_coef")
        at_least(self, 0, "lam_critic")
        at_most(self, 1, "lam_critic")
        at_least(self, 1, "overlong_cache")
        above_zero(self, "lam_length_alpha")
        at_least(self, 0, "beta", "value_coef", "missing_eos_penalty")
        at_least(self, 0, "gamma", "lam", "top_k", "min_p", "warmup_steps", "weight_decay")
        at_least(self, 0, "adam_beta1", "adam_beta2")
        at_most(self, 1, "gamma", "lam", "top_p", "min_p")
        below_one(self, "adam_beta1", "adam_beta2")
        above_zero(self, "temperature", "learning_rate", "value_learning_rate", "adam_epsilon")
        above_zero(self, "value_clip", "score_clip", "target_kl", "tis_cap")
        above_zero(self, "rollout_ratio_min", "rollout_reject_above", "rollout_veto")
        above_zero(self, "top_entropy_quantile")  # or none is left
        at_least(self, 0, "off_policy_mask_threshold")
        at_most(self, 1, "rollout_veto", "top_entropy_quantile")
        above_zero(self, "reward_timeout", "stop_at_kl")
        at_least(self, 1, "reward_concurrency", "max_turns")
        at_least(self, 0, "reward_retries")
        above_zero(self, "adaptive_kl_target", "lora_alpha", "top_p")
        finite(self, "missing_eos_score")
        in_ranges(self, self.ranges)
        for parts in ("minibatches", "samples_per_prompt"):
            if self.batch_size % getattr(self, parts):
                raise InputError(
                    f"batch_size={self.batch_size} cannot be cut into "
                    f"{parts}={getattr(self, parts)} of the same size"
                )
        if self.rollout_engine_options and self.rollout_engine is None:
            raise InputError(
                f"rollout_engine_options={self.rollout_engine_options}: set rollout_engine, too"
            )
        self.check_reward()
        refuse_same_data(self, "prompts")
        refuse(self, contradictions.PPO)
        try:
            PolicyOptions(**self.policy_options(self.beta)).check(torch.float32)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None

    def policy_options(self, beta: float) -> dict[str, Any]:
        """The flags as the options of a policy loss."""
        options = {option: getattr(self, flag) for option, flag in self.flags.items()}
        options["clip_high"] = self.clip_high or self.clip
        options["kl_coef"] = beta if self.kl_in == "loss" else 0.0
        return options

    @property
    def correction(self) -> dict[str, Any]:
        """The flags as arguments of rlhf_fast.rollout_correction."""
        return {
            "mode": self.rollout_correction or (self.tis_cap and "truncate"),
            "level": self.rollout_correction_level,
            "low": self.rollout_ratio_min,
            "high": self.tis_cap,
            "reject": self.rollout_reject,
            "reject_above": self.rollout_reject_above,
            "veto": self.rollout_veto,
            "batch_normalize": self.rollout_normalize,
        }

    # Left unset these follow from others. They stay unset in the config, so that one made from it
    # (--config of a run's config.yaml, dataclasses.replace) with other options has its own.

    def weight_of(self, reward: str) -> float:
        """A reward's in the score; 0 where it is none of them."""
        weights = self.reward_weights or [1.0] * len(self.reward)
        return dict(zip(self.reward, weights, strict=True)).get(reward, 0.0)

    @property
    def eos_penalty(self) -> float:
        if self.missing_eos_penalty is not None:
            return self.missing_eos_penalty
        return 1.0 if self.missing_eos_score is None else 0.0

    @property
    def whitens_advantages(self) -> bool:
        if self.whiten_advantages is not None:
            return self.whiten_advantages
        return not self.is_grouped and self.estimator != "remax"

    @property
    def is_grouped(self) -> bool:
        return self.estimator in GROUPED

    @property
    def has_critic(self) -> bool:
        return self.estimator not in CRITIC_FREE

    @property
    def corrects(self) -> bool:
        """Whether there are weights for what the rollout engine's log-probs are off by."""
        return self.correction["mode"] is not None

    def check_reward(self) -> None:
        if self.reward is None:
            return
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

    model: str = option(
        "model and data", help="policy: a Hugging Face folder (`<output_dir>/model`) or hub name"
    )
    prompt: str = option("model and data", help="text to continue, or to answer with --chat")
    chat: bool = option(
        "model and data", False, help="put the prompt into the model's chat template"
    )
    samples: int = option("sampling", 1, help="answers to write")
    max_new_tokens: int = option("sampling", 64, help="longest answer, in tokens")
    temperature: float = option(
        "sampling", 1.0, help="divides the logits; 0 always takes the likeliest token"
    )
    top_k: int = option(
        "sampling", 0, help="sample among the k likeliest tokens only; 0: among all"
    )
    top_p: float = option(
        "sampling", 1.0, help="sample among the likeliest tokens that together have this p"
    )
    min_p: float = option(
        "sampling", 0.0, help="sample only among tokens whose p is at least this times the largest"
    )
    keep_special_tokens: bool = option(
        "sampling", False, help="write the special tokens of an answer, too (<think>, tool calls)"
    )
    trust_remote_code: bool = option(
        "model and data",
        False,
        help="run Python code that the model's or tokenizer's folder brings along",
    )
    seed: int = option("sampling", 0, help="seed of the sampling")
    device: str = option(
        "devices", "auto", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one"
    )

    def __post_init__(self) -> None:
        as_annotated(self)
        seed_in_range(self)
        at_least(self, 1, "samples", "max_new_tokens")
        at_least(self, 0, "temperature", "top_k", "min_p")
        above_zero(self, "top_p")
        at_most(self, 1, "top_p", "min_p")
        refuse(self, contradictions.GENERATE)


@dataclass(kw_only=True)
class WatchConfig:
    """Follow a run in the terminal: progress, last figures, curves, warnings. Ends when it does."""

    run: str = option("run", help="output_dir of the run")
    once: bool = option("run", False, help="show what there is now and leave")
    every: float = option("run", 2.0, help="seconds from one look into the folder to the next")

    def __post_init__(self) -> None:
        as_annotated(self)
        above_zero(self, "every")
        refuse(self, contradictions.WATCH)


@dataclass(kw_only=True)
class ReportConfig:
    """Write a page about a run, one HTML file that needs no other: curves, answers before and
    after, warnings, options."""

    run: str = option("run", help="output_dir of the run")
    output: str | None = option(
        "run", None, help="HTML file to write [unset: report.html in the run's folder]"
    )

    def __post_init__(self) -> None:
        as_annotated(self)


@dataclass(kw_only=True)
class ConvertConfig:
    """Write a configuration of TRL's or verl's trainer as ours; what has no equal stands in
    comments, with the reason."""

    file: str = option("run", help="YAML file of theirs")
    framework: str | None = option(
        "run",
        None,
        choices=("trl-ppo", "trl-grpo", "verl"),
        help="whose it is [unset: found out by its keys]",
    )
    output: str | None = option("run", None, help="YAML file to write [unset: printed]")
    processes: int = option(
        "devices", 1, help="processes of theirs: TRL's batch sizes are those of one"
    )

    def __post_init__(self) -> None:
        as_annotated(self)
        at_least(self, 1, "processes")


@dataclass(kw_only=True)
class PlotConfig:
    """Draw a run's curves: reward, KL, judge, clip fraction and value loss over the steps."""

    run: str = option("run", help="output_dir of the run")
    output: str | None = option(
        "run", None, help="PNG to write [unset: plot.png in the run's folder]"
    )

    def __post_init__(self) -> None:
        as_annotated(self)


# What each command's flags are; `info` has its own.
COMMAND_CONFIGS: dict[str, type] = {
    "reward": RewardConfig, "ppo": PPOConfig, "generate": GenerateConfig, "watch": WatchConfig,
    "plot": PlotConfig, "report": ReportConfig, "convert": ConvertConfig,
}  # fmt: skip
