"""What a Python program gives in place of names: loaded models, datasets, functions, callbacks.

A config is text, as YAML and --resume need it. There an object has a name in angle brackets,
`<LlamaForCausalLM>`, which stands for it in this process only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from os import PathLike
from typing import Any

import datasets
import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_callback import CallbackHandler

from rlhf_fast.trainer.config import PPOConfig, RunConfig
from rlhf_fast.trainer.contradictions import of_callbacks, of_functions, refuse
from rlhf_fast.trainer.data.read import Rows
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.tokenizer import load_tokenizer
from rlhf_fast.trainer.rewards.functions import FUNCTION

# The options that objects may stand for.
OPTIONS = ("model", "data", "eval_data", "reward", "judge", "rollout_engine", "environment")


@dataclass
class Given:
    objects: dict[str, Any] = field(default_factory=dict)  # by their names in the config
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)  # of the models
    callbacks: list[TrainerCallback] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)  # digests of the models', by name

    def get(self, name: str | None) -> Any:
        """The object of that name; None where it names a file, a folder or the like."""
        return None if name is None else self.objects.get(name)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase | None:
        return self.tokenizers.get(name)

    def add(self, given: Any) -> str:
        """A name for it."""
        name, number = kind(given), 1
        while name in self.objects:  # two lambdas, say
            number += 1
            name = f"{kind(given)} {number}"
        self.objects[name] = given
        return name

    def models(self) -> list[PreTrainedModel]:
        return [x for x in self.objects.values() if isinstance(x, PreTrainedModel)]

    def fingerprint(self) -> None:
        """Note what the models are, before one of them is trained."""
        models = {n: x for n, x in self.objects.items() if isinstance(x, PreTrainedModel)}
        self.weights = {name: digest_of(model) for name, model in models.items()}

    def is_function(self, name: str) -> bool:
        """Whether that reward is a function: an object, or as a spec says so."""
        given = self.get(name)
        if given is not None:
            return not isinstance(given, PreTrainedModel)
        return FUNCTION.fullmatch(name) is not None

    def check(self, config: RunConfig, sharing: str = "") -> None:
        """Everything that a run needs is there, and what is there has an effect. sharing: what each
        of several processes has a part of, in words (see Workers)."""
        if sharing and self.get(config.model) is not None:
            raise InputError(
                f"model={config.model}: processes share{sharing}, and a loaded model could not be "
                "given back whole: give its name or folder"
            )
        for name in OPTIONS:
            value = getattr(config, name, None)
            if value is None and name in needed(config):
                raise InputError(
                    f"{name} is not given: expected a name in the config, or an object"
                )
            for text in value if isinstance(value, list) else [value]:
                if text and text.startswith("<") and text not in self.objects:
                    raise InputError(
                        f"{name}={text} was an object of a Python program: give it to the trainer "
                        "again, or name a file or folder"
                    )
        if config.metric_for_best_model == "judge" and getattr(config, "judge", None) is None:
            raise InputError("metric_for_best_model=judge: there is no judge")
        stops = any(isinstance(x, EarlyStoppingCallback) for x in self.callbacks)
        if stops and config.eval_every is None:
            raise InputError(
                "callbacks: EarlyStoppingCallback waits for evaluations: set eval_every"
            )
        refuse(config, of_callbacks(bool(self.callbacks)))
        if isinstance(config, PPOConfig):
            scorers = [*config.reward, *([config.judge] if config.judge else [])]
            refuse(config, of_functions(any(map(self.is_function, scorers))))

    def untouched(self) -> str:
        """What is said of a loaded model where nothing is left to train."""
        loaded = any(isinstance(x, PreTrainedModel) for x in self.objects.values())
        return "\nloaded models stay as they are: the trained one is in `model`" if loaded else ""

    # ----------------------------------------------------------------- what may be given

    def model(self, given: Any, tokenizer: Any, head: str) -> str:
        """A name, a folder, or a loaded model with such a head (CausalLM, …)."""
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise wrong("tokenizer", tokenizer, "a tokenizer of transformers")
        if isinstance(given, str | PathLike):
            if tokenizer is not None:
                name = str(given)
                self.tokenizers[name] = tokenizer
            return str(given)
        if not isinstance(given, PreTrainedModel):
            merge = "; merge its adapters first, merge_and_unload()" if is_peft(given) else ""
            raise wrong("model", given, f"a name, a folder or a loaded model{merge}")
        check_head("model", given, head)
        name = self.add(given)
        self.tokenizers[name] = tokenizer or tokenizer_of(given, "model", name)
        return name

    def data(self, given: Any, option: str) -> str:
        """A name, a file, a folder, a Dataset or rows."""
        if isinstance(given, str | PathLike):
            return str(given)
        if isinstance(given, datasets.DatasetDict):
            splits = " or ".join(f"[{name!r}]" for name in given)
            raise InputError(f"{option}=<DatasetDict> has splits: give one of them, {splits}")
        if isinstance(given, datasets.Dataset):
            rows = Rows([given.with_format(None)])
        elif isinstance(given, Sequence):
            for number, row in enumerate(given):
                if not isinstance(row, dict):
                    raise InputError(
                        f"{option}={kind(given)}: row {number} is {short(row)}, expected a dict"
                    )
            rows = Rows([list(given)])
        else:
            raise wrong(option, given, "a file, a folder, a name, a datasets.Dataset or dicts")
        if len(rows) == 0:
            raise InputError(f"{option}={kind(given)} has no rows")
        return self.add(rows)

    def reward(self, given: Any, option: str) -> str:
        """A name, a function, a loaded classifier, or (classifier, its tokenizer)."""
        if isinstance(given, str | PathLike):
            return str(given)
        tokenizer = None
        if isinstance(given, tuple):
            if len(given) != 2 or not isinstance(given[1], PreTrainedTokenizerBase):
                raise wrong(
                    option, given, "(classifier, its tokenizer); several rewards are a list"
                )
            given, tokenizer = given
        if isinstance(given, PreTrainedModel):
            check_head(option, given, "SequenceClassification")
            name = self.add(given)
            self.tokenizers[name] = tokenizer or tokenizer_of(given, option, name)
            return name
        if not callable(given) or isinstance(given, type) or tokenizer is not None:
            raise wrong(option, given, "a name, a function or a loaded sequence classifier")
        return self.add(given)

    def engine(self, given: Any) -> str:
        if isinstance(given, str):
            return given
        if not callable(given) and not hasattr(given, "generate"):
            raise wrong(
                "engine", given, "a function of (model, ids, mask, sampling, draws) or an engine"
            )
        return self.add(given)

    def call(self, callbacks: Iterable[Any] | None) -> None:
        """Callbacks of transformers, or their classes."""
        if isinstance(callbacks, TrainerCallback | type):
            callbacks = [callbacks]
        for given in callbacks or ():
            callback = made(given)
            if not isinstance(callback, TrainerCallback) or isinstance(callback, CallbackHandler):
                raise wrong("callbacks", given, "a TrainerCallback of transformers")
            self.callbacks.append(callback)


def digest_of(model: PreTrainedModel) -> str:
    digest = blake2b(digest_size=16)  # about 1 GB a second
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def made(callback: Any) -> Any:
    if not isinstance(callback, type):
        return callback
    try:
        return callback()
    except TypeError as error:
        raise InputError(f"callbacks: {callback.__name__}() cannot be made: {error}") from None


def needed(config: RunConfig) -> set[str]:
    fields = type(config).__dataclass_fields__.items()
    return {name for name, f in fields if f.metadata.get("needed")}


def kind(given: Any) -> str:
    """`<LlamaForCausalLM>`, `<function share>`, `<lambda>`."""
    if isinstance(given, Rows):
        return kind(given.parts[0])
    if inspect.isroutine(given):
        name = getattr(given, "__name__", "")
        return name if name == "<lambda>" else f"<function {name}>"
    return f"<{type(given).__name__}>"


def short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def wrong(option: str, given: Any, expected: str) -> InputError:
    plain = given is None or isinstance(given, int | float | str | tuple | dict)
    return InputError(f"{option}={short(given) if plain else kind(given)}: expected {expected}")


def is_peft(given: Any) -> bool:
    return any(base.__name__ == "PeftModel" for base in type(given).__mro__)


def check_head(option: str, model: PreTrainedModel, head: str) -> None:
    who = f"{option}={kind(model)}"
    name = type(model).__name__
    other = {"CausalLM": "SequenceClassification"}.get(head)
    if other in name if other else head not in name:
        raise InputError(f"{who}: expected a model …For{head}, as AutoModelFor{head} loads it")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{who} has adapters already: expected a model without")
    devices = {p.device.type for p in model.parameters()}
    if "meta" in devices:
        raise InputError(f"{who} has weights on the device meta: expected a model that is loaded")


def tokenizer_of(model: PreTrainedModel, option: str, name: str) -> PreTrainedTokenizerBase:
    """The one beside the weights that the model came from, as TRL looks for it."""
    source = model.name_or_path
    how = "tokenizer=" if option == "model" else f"{option}=(model, tokenizer)"
    try:
        if not source:
            raise InputError("")
        return load_tokenizer(source, field=option)
    except InputError as error:
        at = f"its name_or_path={source!r}" + (f": {error}" if str(error) else " says nothing")
        raise InputError(
            f"{option}={name} has no tokenizer that can be found ({at}): give it, {how}"
        ) from None


def check_call(function: Callable[..., Any], who: str, columns: Iterable[str]) -> None:
    """A reward function takes prompts, completions and the data's other columns."""
    arguments = {"prompts", "completions", *columns} - {"prompt"}
    try:
        inspect.signature(function).bind(**dict.fromkeys(arguments))
    except TypeError as error:
        raise InputError(
            f"{who} cannot be called with {', '.join(sorted(arguments))}: {error}; "
            "expected a function of (prompts, completions, **columns)"
        ) from None
    except ValueError:  # a function of C has no signature to check
        pass
