"""What scores an answer: reward models with their own tokenizers, Python functions, sums of them.

A reward is written as
    `folder` or a hub name          a reward model: a sequence classifier with one score
    `folder#label`                  a classifier with several: the log-odds of that label
    `module:function`, `file.py:function`   f(prompts, completions, **columns) -> list of floats
    `environment`                   the sum of what the steps of the option environment gave
Text crosses from the policy to a scorer, never token ids: each model tokenizes for itself, and
puts conversations into its own chat template.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.trainer.data.rows import Text, join, tokenize
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.models.loading import context_length
from rlhf_fast.trainer.models.reward_model import load_reward_model, one_score, score_texts
from rlhf_fast.trainer.rewards.awaiting import Lost, Patience, scores_of
from rlhf_fast.trainer.rewards.functions import FUNCTION, load_function
from rlhf_fast.trainer.run.console import console

# (prompts, answers, columns) -> scores [B] float32 on the CPU; NaN: does not apply to this answer,
# +∞: was lost, since a function failed for it
Score = Callable[[list[Text], list[Text], dict[str, list[Any]]], Tensor]

EARNED = "environment"  # the reward, and the column, of what an environment gave
LARGEST = torch.finfo(torch.float32).max


class Scorer:
    """The weighted sum of one or several rewards: scorer(prompts, completions, columns) -> [B].

    A function may return None for an answer it does not apply to: the sum then goes without it, as
    in TRL. An answer that none applies to is an error; one that a function failed for has the score
    NaN, and is to be left out.

    components: {name: unweighted scores [B] of the last call, NaN for None} of several rewards, for
        the metrics; empty with a single one, whose scores are the sum already.
    seconds: {name: what each reward took} since `take_seconds` was last asked.
    """

    def __init__(self, parts: dict[str, Score], weights: Sequence[float], field: str) -> None:
        self.parts = list(parts.values())
        self.names = short_names(list(parts))
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.who = " and ".join(f"{field}={spec}" for spec in parts)
        self.components: dict[str, Tensor] = {}
        self.seconds = dict.fromkeys(self.names, 0.0)

    def take_seconds(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, dict.fromkeys(self.names, 0.0)
        return taken

    def __call__(
        self, prompts: list[Text], completions: list[str], columns: dict[str, list[Any]]
    ) -> Tensor:
        if completions and hasattr(completions[0], "reward"):  # episodes
            columns = {**columns, EARNED: [episode.reward for episode in completions]}
            completions = [episode.answer for episode in completions]
        turns = [as_turn(p, c) for p, c in zip(prompts, completions, strict=True)]
        prompts, answers = [turn[0] for turn in turns], [turn[1] for turn in turns]
        parts = []
        for name, part in zip(self.names, self.parts, strict=True):
            began = time.perf_counter()
            parts.append(part(prompts, answers, columns))
            self.seconds[name] += time.perf_counter() - began
        scores = torch.stack(parts)  # [K, B]
        lost = scores.isinf().any(0)
        scores = scores.masked_fill(scores.isinf(), math.nan)
        nowhere = scores.isnan().all(0) & ~lost
        if nowhere.any():
            row = int(nowhere.long().argmax())
            raise InputError(
                f"{self.who} returned None for row {row}, expected a finite number"
                f"{describe(prompts[row], answers[row])}"
            )
        if len(self.parts) > 1:
            self.components = dict(zip(self.names, scores, strict=True))
        return (self.weights[:, None] * scores).nansum(0).masked_fill(lost, math.nan)

    def check_lengths(self, prompts: list[Text], max_new_tokens: int) -> None:
        """Before a run: no answer may be too long for a reward model to read with its prompt."""
        for part in self.parts:
            if isinstance(part, ModelScore):
                part.check_lengths(prompts, max_new_tokens)


def load_scorer(
    specs: str | Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    field: str,
    device: torch.device,
    trust: bool = False,
    patience: Patience | None = None,
    ran: dict[Path, ModuleType] | None = None,
    given: Given | None = None,
) -> Scorer:
    """Rewards as the option `field` names them (see above), weighted by 1 unless told otherwise.

    trust: run Python code that a model's folder brings. patience: with functions. ran: the files of
    functions that were run already; those run here are added. given: the objects that specs may
    stand for.
    """
    specs = [specs] if isinstance(specs, str) else specs
    if len(set(specs)) < len(specs):
        raise InputError(f"{field}={list(specs)} names the same reward twice: give it a weight")
    ran, patience = {} if ran is None else ran, patience or Patience()
    parts: dict[str, Score] = {}
    for spec in specs:
        loaded = given.get(spec) if given else None
        if isinstance(loaded, PreTrainedModel):
            tokenizer = given.tokenizer(spec)
            loaded = one_score(loaded, tokenizer, device, field=field, name=spec)
            parts[spec] = ModelScore(loaded, tokenizer, f"{field}={spec}")
        elif spec == EARNED:
            parts[spec] = earned
        elif loaded is not None:
            parts[spec] = function_score(loaded, f"{field}={spec}", patience)
        elif FUNCTION.fullmatch(spec) or spec.endswith((".py", ":")):
            function = load_function(spec, field, ran)
            parts[spec] = function_score(function, f"{field}={spec}", patience)
        else:
            loaded = load_reward_model(spec, field=field, device=device, trust=trust)
            parts[spec] = ModelScore(*loaded, f"{field}={spec}")
    return Scorer(parts, weights or [1.0] * len(specs), field)


class ModelScore:
    """A reward model with its tokenizer, as a Score.

    A text longer than the model reads loses its beginning, which is the prompt's, and that is said
    once: check_lengths has refused what could be known before the run.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, who: str
    ) -> None:
        self.model, self.tokenizer, self.who = model, tokenizer, who
        self.limit = min(self.tokenizer.model_max_length, context_length(self.model) or math.inf)
        self.said = False

    def ids(self, prompt: Text, answer: Text) -> list[int]:
        return tokenize(*join(prompt, answer, self.tokenizer, self.who), self.tokenizer)

    def check_lengths(self, prompts: list[Text], max_new_tokens: int) -> None:
        if self.limit == math.inf:
            return
        longest = max(len(self.ids(*as_turn(prompt, ""))) for prompt in prompts)
        if longest + max_new_tokens > self.limit:
            raise InputError(
                f"{self.who} reads at most {self.limit} tokens, but the longest prompt has "
                f"{longest} of its tokens and max_new_tokens={max_new_tokens}: lower that or "
                "max_prompt_tokens"
            )

    def __call__(self, prompts: list[Text], answers: list[Text], columns: dict) -> Tensor:
        rows = [self.ids(*turn) for turn in zip(prompts, answers, strict=True)]
        return checked(
            score_texts(self.model, [self.fitted(row) for row in rows]).tolist(),
            prompts, answers, self.who,
        )  # fmt: skip

    def fitted(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.limit:
            return ids
        if not self.said:
            console.print(
                f"[bold yellow]{escape(self.who)} reads at most {self.limit} tokens, but prompt "
                f"and answer have {len(ids)} of them: it scores the end of such texts[/]"
            )
            self.said = True
        begin = [ids[0]] if ids[0] in self.tokenizer.all_special_ids else []
        return begin + ids[len(ids) - self.limit + len(begin) :]


def function_score(function: Callable, who: str, patience: Patience) -> Score:
    def score(prompts: list[Text], answers: list[Text], columns: dict) -> Tensor:
        arguments = {"prompts": prompts, "completions": answers, **columns}
        return checked(scores_of(function, arguments, who, patience), prompts, answers, who)

    return score


def earned(prompts: list[Text], answers: list[Text], columns: dict) -> Tensor:
    """What an environment's steps gave (rollout/environment.py)."""
    return torch.tensor(columns[EARNED], dtype=torch.float32)


def as_turn(prompt: Text, completion: Text) -> tuple[Text, Text]:
    """(prompt, answer): the answer to a conversation is a conversation, as in TRL.

    Words that a prompt puts into the assistant's mouth are part of the answer.
    """
    if isinstance(prompt, str) or not isinstance(completion, str):
        return prompt, completion
    *earlier, last = prompt
    if last["role"] == "assistant":
        return earlier, [{"role": "assistant", "content": last["content"] + completion}]
    return prompt, [{"role": "assistant", "content": completion}]


def checked(scores: Any, prompts: list[Text], answers: list[Text], who: str) -> Tensor:
    """[B] of finite numbers, NaN where None came and +∞ where the score was lost; anything else is
    an error that names the row."""
    scores = scores.tolist() if hasattr(scores, "tolist") else scores  # tensors, NumPy arrays
    if not isinstance(scores, list | tuple) or len(scores) != len(answers):
        came = f"{len(scores)} scores" if isinstance(scores, list | tuple) else repr(scores)[:80]
        raise InputError(f"{who} returned {came}, expected a list of {len(answers)} numbers")
    return torch.tensor([
        number(score, f"for row {row}", describe(prompts[row], answers[row]), who)
        for row, score in enumerate(scores)
    ])  # fmt: skip


def number(score: Any, where: str, text: str, who: str) -> float:
    """NaN for None, +∞ for one that was lost."""
    if isinstance(score, Lost):
        return math.inf
    if score is None:
        return math.nan
    try:
        value = math.nan if isinstance(score, str | bytes) else float(score)
    except Exception:  # tensors of several numbers, and whatever else it may be
        value = math.nan
    if not abs(value) <= LARGEST:
        came = " ".join(repr(score).split())[:80]
        raise InputError(f"{who} returned {came} {where}, expected a finite number{text}")
    return value


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
        spec = spec.strip("<>").removeprefix("function ")  # of an object
        named, path = FUNCTION.fullmatch(spec), Path(spec)
        folder = path.parent.name if path.name == "model" and path.parent.name else path.name
        names.append(named[2] if named else folder)
    return names if len(set(names)) == len(names) else list(specs)
