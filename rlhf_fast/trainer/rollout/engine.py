"""The engine that `--rollout_engine` names, and how the trainer asks one for answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import yaml
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.rows import pad
from rlhf_fast.trainer.errors import Ended, InputError
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.rewards.functions import load_function, reason_of
from rlhf_fast.trainer.rollout.protocol import (
    Completions,
    RolloutEngine,
    RolloutFunction,
    Sampling,
)
from rlhf_fast.trainer.run.console import console

# Name -> (file beside this one, its class, the package that must be installed beside it).
ENGINES = {
    "transformers": ("continuous", "TransformersEngine", "transformers"),
    "vllm": ("vllm_in_process", "VLLMEngine", "vllm"),
    "vllm-server": ("vllm_server", "VLLMServerEngine", None),  # may have its own environment
}

METHODS = ("generate", "sync", "sleep", "wake", "close")

Maker = Callable[[Policy], RolloutEngine]  # made of the policy, once that is loaded

made_here: list[RolloutEngine] = []  # to be closed at the end of the training


def load_engine(
    config: PPOConfig, given: Given, engine: RolloutEngine | RolloutFunction | None = None
) -> Maker | None:
    """What makes the engine: everything that can be said without the policy is said here. None
    where the trainer decodes by itself. engine: one that is there."""
    if engine is not None:
        if is_engine(engine):
            return lambda policy: Named(engine, f"engine={type(engine).__name__}")
        return lambda policy: Named(FunctionEngine(policy, engine), "engine")
    name = config.rollout_engine
    if name is None:
        return None
    options = engine_options(config.rollout_engine_options)
    found = named(name, given)
    if isinstance(found, type):
        check_class(found, options, name)
        return partial(make, found, options, name)
    if options:
        raise InputError(
            f"rollout_engine_options={config.rollout_engine_options}: rollout_engine={name} is no "
            "class, and takes none"
        )
    who = f"rollout_engine={name}"
    if is_engine(found):  # the caller's, who closes it
        return lambda policy: Named(found, who)
    check_function(found, name)
    return lambda policy: Named(FunctionEngine(policy, found), who)


def named(name: str, given: Given) -> Any:
    """One of ours, or what the caller or a file has under the name."""
    if name in ENGINES:
        file, kind, package = ENGINES[name]
        if package is not None and find_spec(package) is None:
            raise InputError(
                f"rollout_engine={name}: {package} is not installed (pip install {package})"
            )
        return getattr(import_module(f"rlhf_fast.trainer.rollout.{file}"), kind)
    found = given.get(name)
    if found is None and ":" not in name:
        raise InputError(
            f"rollout_engine={name}: expected {', '.join(ENGINES)}, file.py:name or module:name"
        )
    return found or load_function(name, "rollout_engine")


def check_class(kind: type, options: dict[str, Any], name: str) -> None:
    for method in METHODS:
        if not callable(getattr(kind, method, None)):
            raise InputError(f"rollout_engine={name} has no method {method} (docs/engines.md)")
    try:
        inspect.signature(kind).bind("model", "tokenizer", **options)
    except TypeError as error:
        given = " ".join(f"{option}={value}" for option, value in options.items()) or "none"
        raise InputError(
            f"rollout_engine={name} cannot be made with rollout_engine_options={given}: {error}"
        ) from None
    if check := getattr(kind, "check_options", None):
        check(options)


def make(
    kind: type[RolloutEngine], options: dict[str, Any], name: str, policy: Policy
) -> RolloutEngine:
    try:
        engine = kind(policy.model, policy.tokenizer, **options)  # type: ignore[call-arg]
    except InputError:
        raise
    except Exception as error:  # whatever the library under it raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise InputError(f"rollout_engine={name} cannot be started: {reason}") from error
    made_here.append(engine)
    return Named(engine, f"rollout_engine={name}")


@contextmanager
def engines_closed() -> Iterator[None]:
    """Around a training: what it made is closed, whatever happens. Also a decorator.

    One that cannot be closed is said to be: that must not hide the error that ended the run, nor
    make a failure of one that is finished.
    """
    try:
        yield
    finally:
        while made_here:
            engine = made_here.pop()
            try:
                engine.close()
            except Exception as error:  # whatever the library under it raises
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                text = f"{type(engine).__name__} could not be closed: {reason}"
                console.print(f"[bold yellow]{escape(text)}[/]")


def engine_options(words: Sequence[str] | None) -> dict[str, Any]:
    """`name=value` -> {name: number, truth value or text}."""
    options: dict[str, Any] = {}
    for word in words or ():
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"rollout_engine_options={word}: expected name=value")
        if name in options:
            raise InputError(f"rollout_engine_options={word}: {name} is given twice")
        try:
            options[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            options[name] = text
    return options


class Named:
    """An engine whose errors are one line that says whose they are, and where."""

    def __init__(self, engine: RolloutEngine, who: str) -> None:
        for method in (*METHODS, "draw"):
            if (function := getattr(engine, method, None)) is not None:
                own = getattr(engine, "function", function)  # of a FunctionEngine
                setattr(self, method, partial(said, function, own, f"{who}: {method}"))


def said(function: Callable[..., Any], own: Callable[..., Any], who: str, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (InputError, Ended):  # one that says everything; a signal's
        raise
    except (Exception, SystemExit) as error:  # whatever the user's engine raises
        raise InputError(f"{who} raised {reason_of(error, own)[:500]}") from error


def is_engine(given: Any) -> bool:
    return isinstance(given, RolloutEngine) and not isinstance(given, type)


def check_function(function: RolloutFunction, name: str) -> None:
    try:
        inspect.signature(function).bind("model", "ids", "mask", "sampling", "draws")
    except TypeError as error:
        raise InputError(
            f"rollout_engine={name}: {error}; expected a function of "
            "(model, ids, mask, sampling, draws), or an engine (docs/engines.md)"
        ) from None


class FunctionEngine:
    """A function of (model, ids, mask, sampling, draws) as an engine. It is given the policy's own
    model, so that it has no weights to take."""

    def __init__(self, policy: Policy, function: RolloutFunction) -> None:
        self.policy, self.function = policy, function

    def draw(self, ids: Tensor, mask: Tensor, sampling: Sampling, draws: Tensor) -> Completions:
        done = self.function(self.policy.model, ids, mask, sampling, draws)
        return received(done, len(ids), sampling, self.policy.model)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> Completions:
        device = self.policy.model.device
        ids, mask = (x.to(device) for x in pad([list(p) for p in prompts], side="left"))
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(len(prompts), sampling.max_new_tokens, generator=generator)
        return self.draw(ids, mask, sampling, draws.to(device))

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def ask(
    engine: RolloutEngine | RolloutFunction,
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    draws: Tensor,
) -> Completions:
    """An engine's answers to prompts [B, P] that are padded left, on the model's device.

    One that can (`draw`, or a function) draws by the numbers that are there for the whole batch, so
    that its answers are the same with any number of processes. Others get a seed made of them.
    """
    draw = getattr(engine, "draw", None) or (None if is_engine(engine) else partial(engine, model))
    if draw is not None:
        return completions(draw(ids, mask, sampling, draws))
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    prompts = [[t for t, real in zip(row, kept, strict=True) if real] for row, kept in rows]
    return received(
        engine.generate(prompts, sampling, seed_of(draws)), len(prompts), sampling, model
    )


def received(done: Any, batch: int, sampling: Sampling, model: PreTrainedModel) -> Completions:
    """An engine's answers, checked, on the model's device."""
    check_answers(completions(done), batch, sampling, model)
    return Completions(*(None if x is None else x.to(model.device) for x in done))


def completions(done: Any) -> Completions:
    if not isinstance(done, Completions):
        raise InputError(f"the rollout engine returned {type(done).__name__}, expected Completions")
    return done


def seed_of(draws: Tensor) -> int:
    """A seed that every one of the draws changes: below 2³¹, which all libraries take."""
    return int((draws.double() * 2**24).sum().item()) % 2**31


KINDS = {"mask": "bool", "tokens": "int64", "logp": "float32"}  # and what else is of [B, T]


def check_answers(
    done: Completions, batch: int, sampling: Sampling, model: PreTrainedModel
) -> None:
    """What an engine gave can be learnt from: shapes, tokens that exist, log-probs of
    probabilities."""
    who = "the rollout engine returned"
    vocabulary = model.get_output_embeddings().weight.size(0)
    for name, kind in KINDS.items():
        x = getattr(done, name)
        came = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
        if came != kind:
            raise InputError(f"{who} {name} of {came}, expected a tensor of {kind}")
    steps = done.mask.size(1) if done.mask.ndim == 2 else -1
    for name in (*KINDS, "loss_mask", "rewards", "support"):
        x = getattr(done, name)
        if x is None:
            continue
        came, more = tuple(x.shape), (", K" if name == "support" else "")
        if (
            came[:2] != (batch, steps)
            or x.ndim != 2 + bool(more)
            or steps > sampling.max_new_tokens
        ):
            raise InputError(
                f"{who} {name} of shape {came}, expected ({batch}, T{more}) with T at most "
                f"{sampling.max_new_tokens}"
            )
    if (done.mask[:, 1:] & ~done.mask[:, :-1]).any():
        raise InputError(f"{who} a mask with gaps: an answer's tokens stand at its beginning")
    tokens, logp = done.tokens[done.mask], done.logp[done.mask]
    if ((tokens < 0) | (tokens >= vocabulary)).any():
        raise InputError(f"{who} tokens outside of the model's {vocabulary}")
    if not logp.isfinite().all():
        raise InputError(f"{who} log-probs that are not finite")
    if done.support is not None:
        among = done.support[done.mask]
        if (among >= vocabulary).any() or not (among == tokens[:, None]).any(1).all():
            raise InputError(
                f"{who} a support with tokens outside of the model's {vocabulary}, or without the "
                "token that was drawn"
            )
