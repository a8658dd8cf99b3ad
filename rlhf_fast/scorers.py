"""What scores an answer: a reward model with its own tokenizer, or a Python function.

Both become one callable, scorer(prompts, completions, columns) -> scores [B] float32 on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import InputError
from rlhf_fast.data import Text, join, tokenize
from rlhf_fast.models import load_reward_model, score_texts

Scorer = Callable[[list[Text], list[str], dict[str, list[Any]]], Tensor]


def load_scorer(spec: str, *, field: str, device: torch.device) -> Scorer:
    """`module:function` and `file.py:function` name a function, anything else a model."""
    named = re.fullmatch(r"(.+):([A-Za-z_]\w*)", spec)
    if named:
        return function_scorer(load_function(*named.groups(), spec, field), spec, field)
    return model_scorer(spec, field, device)


def model_scorer(name: str, field: str, device: torch.device) -> Scorer:
    model, tokenizer = load_reward_model(name, field=field, device=device)

    def score(prompts: list[Text], completions: list[str], columns: dict) -> Tensor:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            answer = as_message(prompt, completion)
            rows.append(tokenize(*join(prompt, answer, tokenizer, f"{field}={name}"), tokenizer))
        scores = score_texts(model, rows)
        return checked(scores.tolist(), prompts, completions, f"{field}={name}")

    return score


def function_scorer(function: Callable, spec: str, field: str) -> Scorer:
    def score(prompts: list[Text], completions: list[str], columns: dict) -> Tensor:
        answers = [as_message(p, c) for p, c in zip(prompts, completions, strict=True)]
        scores = function(prompts=prompts, completions=answers, **columns)
        return checked(scores, prompts, completions, f"{field}={spec}")

    return score


def as_message(prompt: Text, completion: str) -> Text:
    """Answers to a conversation are conversations, as in TRL."""
    if isinstance(prompt, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def checked(scores: Any, prompts: list, completions: list, who: str) -> Tensor:
    """One finite number for each answer, or an error that names the row."""
    scores = scores.tolist() if isinstance(scores, Tensor) else scores
    if not isinstance(scores, list | tuple) or len(scores) != len(completions):
        came = f"{len(scores)} scores" if isinstance(scores, list | tuple) else repr(scores)[:80]
        raise InputError(f"{who} returned {came}, expected a list of {len(completions)} numbers")
    for row, score in enumerate(scores):
        try:
            finite = math.isfinite(score)
        except TypeError:
            finite = False
        if not finite:
            raise InputError(
                f"{who} returned {score!r} for row {row}, expected a finite number; "
                f"prompt {short(prompts[row])}, answer {short(completions[row])}"
            )
    return torch.tensor([float(score) for score in scores])


def short(text: Any) -> str:
    text = repr(text)
    return text if len(text) <= 80 else text[:77] + "..."


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
