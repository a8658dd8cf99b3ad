"""The trainer as a library: what a command's options name may be objects here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlhf_fast.trainer import ppo, reward
from rlhf_fast.trainer.config import PPOConfig, RewardConfig, RunConfig
from rlhf_fast.trainer.data.rows import need_pairs, need_prompts
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.given import Given, check_call, wrong
from rlhf_fast.trainer.models.lent import lent
from rlhf_fast.trainer.rollout.protocol import RolloutEngine, RolloutFunction

Model = str | PathLike[str] | PreTrainedModel
Data = str | PathLike[str] | datasets.Dataset | Sequence[dict[str, Any]]
Function = Callable[..., Sequence[float | None]]
Classifier = PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]
Reward = str | PathLike[str] | Function | Classifier
Callbacks = Sequence[TrainerCallback | type[TrainerCallback]] | None  # Trainer's default

C = TypeVar("C", bound=RunConfig)


class PPOTrainer:
    """Trains a policy with PPO against a reward (Ouyang et al. 2022, arXiv:2203.02155).

    What is None is what the config names; given twice, it is refused.

    Args:
        model: a name, a folder or a loaded causal LM. A loaded one holds the trained weights
            afterwards, in the dtype, on the device and in the mode that it came in; with `lora_r`
            its adapters stay in it.
        rewards: one, or a list of which the scores are added up: a spec as ``--reward`` takes it, a
            function ``f(prompts, completions, **columns) -> list[float]``, a loaded sequence
            classifier with one score, or a pair of that and its tokenizer.
        train_dataset: a spec as ``--data`` takes it, a ``datasets.Dataset`` or a list of dicts,
            with the column ``prompt``.
        eval_dataset: likewise: prompts to answer before, after and on the way.
        config: all other options; ``output_dir`` must be there.
        tokenizer: the model's; unset: the one beside the weights that the model came from.
        judge: written as one reward is; measured, never trained on.
        engine: what samples the answers: a ``RolloutEngine``, which you close, or a function
            (``RolloutFunction``).
        callbacks: ``TrainerCallback`` of transformers, or their classes.

    Raises:
        InputError: one line that names what cannot work, before anything is trained.
    """

    config: PPOConfig

    def __init__(
        self,
        model: Model | None = None,
        rewards: Reward | Sequence[Reward] | None = None,
        train_dataset: Data | None = None,
        eval_dataset: Data | None = None,
        config: PPOConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        judge: Reward | None = None,
        engine: RolloutEngine | RolloutFunction | str | None = None,
        callbacks: Callbacks = (),
    ) -> None:
        self.given = given = Given()
        found = common(given, config, PPOConfig, model, tokenizer, "CausalLM", callbacks)
        found |= datasets_of(given, train_dataset, eval_dataset)
        if rewards is not None:
            several = rewards if isinstance(rewards, list) else [rewards]
            found["reward"] = [given.reward(each, "reward") for each in several]
        if judge is not None:
            found["judge"] = given.reward(judge, "judge")
        if engine is not None:
            found["rollout_engine"] = given.engine(engine)
        self.config = with_names(config, found)
        given.check(self.config)
        for option in ("data", "eval_data"):
            if (rows := given.get(getattr(self.config, option))) is not None:
                need_prompts(rows, f"{option}={getattr(self.config, option)}")
        if (rows := given.get(self.config.data)) is not None:
            for option in ("reward", "judge"):
                value = getattr(self.config, option)
                for name in value if isinstance(value, list) else [value]:
                    function = given.get(name)
                    if function is not None and not isinstance(function, PreTrainedModel):
                        check_call(function, f"{option}={name}", rows.column_names)

    def train(self) -> dict[str, Any]:
        """Returns (and saves as summary.json) score, judge and KL before and after training."""
        self.given.fingerprint()
        with lent(self.given.models()):
            return ppo.train(self.config, given=self.given)


class RewardTrainer:
    """Trains a reward model from preference pairs: −log σ(r(chosen) − r(rejected) − margin).

    What is None is what the config names; given twice, it is refused.

    Args:
        model: a name or a folder of a causal LM or a sequence classifier, or a loaded sequence
            classifier with one label, which holds the trained weights afterwards, in the dtype, on
            the device and in the mode that it came in. Its config gets ``score_mean``,
            ``score_std`` and a pad token, and its embedding a row where that token is new.
        train_dataset: a spec as ``--data`` takes it, a ``datasets.Dataset`` or a list of dicts,
            with the columns ``chosen`` and ``rejected``.
        eval_dataset: likewise: the held-out pairs.
        config: all other options; ``output_dir`` must be there.
        tokenizer: the model's; unset: the one beside the weights that the model came from.
        callbacks: ``TrainerCallback`` of transformers, or their classes.

    Raises:
        InputError: one line that names what cannot work, before anything is trained.
    """

    config: RewardConfig

    def __init__(
        self,
        model: Model | None = None,
        train_dataset: Data | None = None,
        eval_dataset: Data | None = None,
        config: RewardConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Callbacks = (),
    ) -> None:
        self.given = given = Given()
        head = "SequenceClassification"
        found = common(given, config, RewardConfig, model, tokenizer, head, callbacks)
        found |= datasets_of(given, train_dataset, eval_dataset)
        self.config = with_names(config, found)
        given.check(self.config)
        for option in ("data", "eval_data"):
            if (rows := given.get(getattr(self.config, option))) is not None:
                need_pairs(rows, f"{option}={getattr(self.config, option)}")

    def train(self) -> dict[str, Any]:
        """Returns (and saves as summary.json) held-out accuracy, loss, the scores' mean and std."""
        self.given.fingerprint()
        with lent(self.given.models()):
            return reward.train(self.config, given=self.given)


def common(
    given: Given,
    config: RunConfig | None,
    kind: type[RunConfig],
    model: Model | None,
    tokenizer: PreTrainedTokenizerBase | None,
    head: str,
    callbacks: Callbacks,
) -> dict[str, Any]:
    """The names of what both trainers take."""
    if not isinstance(config, kind):
        raise wrong("config", config, f"a {kind.__name__}(output_dir=…)")
    given.call(callbacks)
    if model is None and tokenizer is not None and config.model is not None:
        given.model(config.model, tokenizer, head)
    return {} if model is None else {"model": given.model(model, tokenizer, head)}


def datasets_of(given: Given, train: Data | None, held_out: Data | None) -> dict[str, Any]:
    found = {"data": train, "eval_data": held_out}
    return {name: given.data(data, name) for name, data in found.items() if data is not None}


def with_names(config: C, found: dict[str, Any]) -> C:
    """A copy of the config with names for what was given."""
    for name in found:
        if (named := getattr(config, name)) is not None:
            raise InputError(
                f"{name} is given twice: to the trainer, and as {named!r} in its config"
            )
    return replace(config, **found)
