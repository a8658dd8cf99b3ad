"""Every option of every `rlhf-fast` command: one dataclass each, checked on creation.

A field is a flag (`--learning_rate` or `--learning-rate`) and a key of the YAML file given with
`--config`; flags win over the file.
"""

from __future__ import annotations

import difflib
import math
import re
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser


class InputError(ValueError):
    """Something the user gave cannot work. The command line prints it as one line, no traceback."""


def option(default: Any = MISSING, *, help: str, choices: Sequence[str] = ()) -> Any:
    metadata = {"help": help, "choices": choices} if choices else {"help": help}
    return field(default=default, metadata=metadata)


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
    resume: bool = option(
        False, help="continue the run in output_dir (or begin it; a finished one is left alone)"
    )
    overwrite: bool = option(False, help="delete the run in output_dir and begin again")

    def __post_init__(self) -> None:
        one_of(self)
        at_least(self, 1, "max_rows", "trainable_layers", "micro_batch_size", "save_every")
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


@dataclass(kw_only=True)
class PPOConfig(RunConfig):
    """Train a policy with PPO against a reward. The data has the column `prompt`.

    r_t = −beta·(log π − log π_ref)_t, plus the score at the last token; GAE; clipped losses.
    """

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
    steps: int = option(1000, help="rounds of sampling answers and learning from them")
    batch_size: int = option(64, help="answers sampled in one step")
    minibatches: int = option(1, help="optimiser steps in one pass over the batch")
    epochs: int = option(4, help="passes over the batch")
    max_prompt_tokens: int = option(512, help="longer prompts are left out")
    max_new_tokens: int = option(64, help="longest answer, in tokens")
    temperature: float = option(1.0, help="divides the logits: in sampling and in every log-prob")
    learning_rate: float = option(3e-6, help="Adam's step size for the policy")
    value_learning_rate: float = option(1e-5, help="Adam's step size for the value head")
    beta: float = option(0.05, help="price of a nat of KL from the frozen reference")
    gamma: float = option(1.0, help="discount of later rewards")
    lam: float = option(0.95, help="GAE's λ: 0 trusts the value head, 1 the sampled rewards")
    clip: float = option(0.2, help="the ratio π/π_old counts within 1 ± clip")
    value_clip: float = option(0.2, help="values may move this far from the old ones in one step")
    value_coef: float = option(0.1, help="weight of the value loss")
    entropy_coef: float = option(0.0, help="weight of the entropy bonus")
    missing_eos_penalty: float = option(
        1.0, help="taken off the score of an answer that ran into max_new_tokens"
    )
    score_clip: float | None = option(None, help="scores are clipped to ± this")
    eval_prompts: int = option(
        32, help="prompts kept from training and answered before and after it"
    )
    log_every: int = option(10, help="steps between printed lines; every step is in metrics.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size", "minibatches", "epochs", "max_prompt_tokens")
        at_least(self, 1, "max_new_tokens", "eval_prompts", "log_every")
        at_least(self, 0, "beta", "value_coef", "entropy_coef", "missing_eos_penalty")
        at_least(self, 0, "gamma", "lam")
        at_most(self, 1, "gamma", "lam")
        above_zero(self, "temperature", "learning_rate", "value_learning_rate")
        above_zero(self, "clip", "value_clip", "score_clip")
        if self.batch_size % self.minibatches:
            raise InputError(
                f"batch_size={self.batch_size} cannot be cut into minibatches={self.minibatches} "
                "of the same size"
            )
        self.check_reward()

    def check_reward(self) -> None:
        if isinstance(self.reward, str):
            self.reward = [self.reward]
        if not self.reward:
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
    seed: int = option(0, help="seed of the sampling")
    device: str = option("auto", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one")

    def __post_init__(self) -> None:
        at_least(self, 1, "samples", "max_new_tokens")
        at_least(self, 0, "temperature")
        if not self.prompt:
            raise InputError("prompt is empty: give the text to continue")


@dataclass(kw_only=True)
class PlotConfig:
    """Draw reward, KL, judge, clip fraction and value loss over the steps of a PPO run."""

    run: str = option(help="output_dir of the run")
    output: str | None = option(None, help="PNG to write [unset: plot.png in the run's folder]")


def at_least(config: Any, low: float, *names: str) -> None:
    check(config, lambda value: value >= low, f"at least {low}", names)


def at_most(config: Any, high: float, *names: str) -> None:
    check(config, lambda value: value <= high, f"at most {high}", names)


def above_zero(config: Any, *names: str) -> None:
    check(config, lambda value: value > 0, "above 0", names)


def one_of(config: Any) -> None:
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise InputError(f"{f.name}={value}: expected one of {', '.join(choices)}")


def check(config: Any, holds: Any, expected: str, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise InputError(f"{name}={value}: expected a finite number, {expected}")


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
    parser.add_argument("--config", help="YAML file of the flags below, without the dashes")

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


def yaml_flags(path: Path, config_class: type) -> list[str]:
    """A YAML mapping as a list of flags, so that argparse checks both alike.

    (YAML reads `1e-5` as a string and argparse as the number that was meant.)
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config={path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config={path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"config={path}: expected lines of `key: value`")
    types = {f.name: str(f.type) for f in fields(config_class)}
    flags = []
    for key, value in values.items():
        if key not in types:
            raise InputError(f"config={path}: unknown key {key}{nearest(str(key), config_class)}")
        if isinstance(value, list) and types[key].startswith("list"):
            flags += [f"--{key}", *map(str, value)]
            continue
        if isinstance(value, dict | list):
            kind = type(value).__name__
            raise InputError(f"config={path}: {key} is a {kind}, expected one value")
        if value is not None:  # `key:` with nothing after it keeps the default
            flags.append(f"--{key}={value}")
    return flags


def nearest(word: str, config_class: type, dashes: str = "") -> str:
    """` (did you mean …?)`, or nothing when no name is near."""
    names = [f.name for f in fields(config_class)] + ["config"]
    asked = word.lstrip("-").split("=")[0].replace("-", "_")
    found = difflib.get_close_matches(asked, names, n=1)
    return f" (did you mean {dashes}{found[0]}?)" if found else ""
