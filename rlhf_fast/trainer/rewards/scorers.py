"""What scores an answer: reward models with their own tokenizers, Python functions, sums of them.

A reward is written as
    `folder` or a hub name          a reward model: a sequence classifier with one score
    `folder#label`                  a classifier with several: the log-odds of that label
    `module:function`, `file.py:function`   f(prompts, completions, **columns) -> list of floats
Text crosses from the policy to a scorer, never token ids: each model tokenizes for itself, and
puts conversations into its own chat template.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.trainer.data.rows import Text, join, tokenize
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.loading import context_length
from rlhf_fast.trainer.models.reward_model import load_reward_model, score_texts

# (prompts, answers, columns) -> scores [B] float32 on the CPU; NaN: does not apply to this answer
Score = Callable[[list[Text], list[Text], dict[str, list[Any]]], Tensor]

LARGEST = torch.finfo(torch.float32).max
FUNCTION = re.compile(r"(.+):([A-Za-z_]\w*)")


class Scorer:
    """The weighted sum of one or several rewards: scorer(prompts, completions, columns) -> [B].

    A function may return None for an answer it does not apply to: the sum then goes without it, as
    in TRL. An answer that none applies to is an error.

    components: {name: unweighted scores [B] of the last call, NaN for None} of several rewards, for
        the metrics; empty with a single one, whose scores are the sum already.
    """

    def __init__(self, parts: dict[str, Score], weights: Sequence[float], field: str) -> None:
        self.parts = list(parts.values())
        self.names = short_names(list(parts))
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.who = " and ".join(f"{field}={spec}" for spec in parts)
        self.components: dict[str, Tensor] = {}

    def __call__(
        self, prompts: list[Text], completions: list[str], columns: dict[str, list[Any]]
    ) -> Tensor:
        turns = [as_turn(p, c) for p, c in zip(prompts, completions, strict=True)]
        prompts, answers = [turn[0] for turn in turns], [turn[1] for turn in turns]
        scores = torch.stack([part(prompts, answers, columns) for part in self.parts])  # [K, B]
        nowhere = scores.isnan().all(0)
        if nowhere.any():
            row = int(nowhere.long().argmax())
            raise InputError(
                f"{self.who} returned None for row {row}, expected a finite number"
                f"{describe(prompts[row], answers[row])}"
            )
        if len(self.parts) > 1:
            self.components = dict(zip(self.names, scores, strict=True))
        return (self.weights[:, None] * scores).nansum(0)


def load_scorer(
    specs: str | Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    field: str,
    device: torch.device,
    trust: bool = False,
) -> Scorer:
    """Rewards as the option `field` names them (see above), weighted by 1 unless told otherwise.

    trust: run Python code that a model's folder brings.
    """
    specs = [specs] if isinstance(specs, str) else specs
    if len(set(specs)) < len(specs):
        raise InputError(f"{field}={list(specs)} names the same reward twice: give it a weight")
    parts = {}
    for spec in specs:
        named = FUNCTION.fullmatch(spec)
        if not named and spec.endswith((".py", ":")):
            raise InputError(f"{field}={spec}: expected file.py:function or module:function")
        parts[spec] = (
            function_score(load_function(*named.groups(), spec, field), f"{field}={spec}")
            if named
            else model_score(spec, field, device, trust=trust)
        )
    return Scorer(parts, weights or [1.0] * len(specs), field)


def model_score(spec: str, field: str, device: torch.device, *, trust: bool = False) -> Score:
    model, tokenizer = load_reward_model(spec, field=field, device=device, trust=trust)
    who = f"{field}={spec}"
    limit = min(tokenizer.model_max_length, context_length(model) or math.inf)

    def score(prompts: list[Text], answers: list[Text], columns: dict) -> Tensor:
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = tokenize(*join(prompt, answer, tokenizer, who), tokenizer)
            if len(ids) > limit:
                raise InputError(
                    f"{who} reads at most {limit} tokens, but prompt and answer have {len(ids)}: "
                    "lower max_prompt_tokens or max_new_tokens"
                )
            rows.append(ids)
        return checked(score_texts(model, rows).tolist(), prompts, answers, who)

    return score


def function_score(function: Callable, who: str) -> Score:
    def score(prompts: list[Text], answers: list[Text], columns: dict) -> Tensor:
        # Copies: a function that empties its lists must not empty those of the next reward.
        arguments = {"prompts": list(prompts), "completions": list(answers), **columns}
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise InputError(
                f"{who} cannot be called with {', '.join(arguments)}: {error}; "
                "expected a function of (prompts, completions, **columns)"
            ) from None
        try:
            scores = function(**arguments)
        except Exception as error:  # whatever the user's function raises
            _, *frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename == frames[0].filename]
            at = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{who} raised {reason}{at}") from error
        return checked(scores, prompts, answers, who)

    return score


def as_turn(prompt: Text, completion: str) -> tuple[Text, Text]:
    """(prompt, answer): the answer to a conversation is a conversation, as in TRL.

    Words that a prompt puts into the assistant's mouth are part of the answer.
    """
    if isinstance(prompt, str):
        return prompt, completion
    *earlier, last = prompt
    if last["role"] == "assistant":
        return earlier, [{"role": "assistant", "content": last["content"] + completion}]
    return prompt, [{"role": "assistant", "content": completion}]


def checked(scores: Any, prompts: list[Text], answers: list[Text], who: str) -> Tensor:
    """[B] of finite numbers, NaN where None came; anything else is an error that names the row."""
    scores = scores.tolist() if hasattr(scores, "tolist") else scores  # tensors, NumPy arrays
    if not isinstance(scores, list | tuple) or len(scores) != len(answers):
        came = f"{len(scores)} scores" if isinstance(scores, list | tuple) else repr(scores)[:80]
        raise InputError(f"{who} returned {came}, expected a list of {len(answers)} numbers")
    for row, score in enumerate(scores):
        try:
            good = score is None or (math.isfinite(score) and abs(score) <= LARGEST)
        except (TypeError, OverflowError):
            good = False
        if not good:
            raise InputError(
                f"{who} returned {score!r} for row {row}, expected a finite number"
                f"{describe(prompts[row], answers[row])}"
            )
    return torch.tensor([math.nan if score is None else float(score) for score in scores])


def describe(prompt: Text, answer: Text) -> str:
    return f"; prompt {short(prompt)}, answer {short(answer)}"


def short(text: Any) -> str:
    text = repr(text)
    return text if len(text) <= 80 else text[:77] + "..."


def short_names(specs: Sequence[str]) -> list[str]:
    """A function's or a folder's own name; the whole spec where two would have the same.

    `rlhf-fast reward` saves to `<output_dir>/model`: there the name is the output_dir's.
    """
    names = []
    for spec in specs:
        named, path = FUNCTION.fullmatch(spec), Path(spec)
        folder = path.parent.name if path.name == "model" and path.parent.name else path.name
        names.append(named[2] if named else folder)
    return names if len(set(names)) == len(names) else list(specs)


def load_function(module: str, name: str, spec: str, field: str) -> Callable:
    try:
        if module.endswith(".py"):
            path = Path(module).expanduser()
            if not path.is_file():
                raise InputError(f"{field}={spec}: there is no file {module}")
            found = importlib.util.spec_from_file_location(path.stem, path)
            loaded = importlib.util.module_from_spec(found)
            found.loader.exec_module(loaded)
        else:
            if "" not in sys.path:  # a console script, unlike `python -m`, leaves out the folder
                sys.path.insert(0, "")  # one stands in
            loaded = importlib.import_module(module)
    except InputError:
        raise
    except Exception as error:  # whatever the user's file raises
        raise InputError(
            f"{field}={spec}: {module} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(loaded, name, None)
    if not callable(function):
        raise InputError(f"{field}={spec}: {module} has no function {name}")
    return function
