"""Preference pairs and prompts: from rows (see read.py) to token ids.

Every row is looked at before training begins; the first bad one is named, counted from 0. Text
columns hold either strings or conversations, lists of {"role", "content"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast.trainer.data.read import Rows
from rlhf_fast.trainer.data.read import load_rows as load_rows  # rlhf_fast.data had it in 0.1
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.console import console

_put_around: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[list[int], list[int]]] = (
    WeakKeyDictionary()
)

Text = str | list[dict[str, str]]  # plain text, or a conversation


@dataclass
class Pair:
    chosen: list[int]
    rejected: list[int]
    margin: float
    asked: str = ""  # what both answer: pairs of one prompt are held out together


@dataclass
class Prompt:
    ids: list[int]
    prompt: Text
    columns: dict[str, Any]  # the row's other columns, handed to reward functions
    environment: Callable[[], Any] | None = None  # makes what answers, if there are several turns


def preference_pairs(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, source: str, max_tokens: int
) -> list[Pair]:
    """Columns `chosen`, `rejected`, optionally `prompt` and `margin` -> pairs of token ids.

    Without `prompt` both sides begin with it, and are read whole. Pairs with a text longer than
    `max_tokens` are left out: cut, they might no longer differ. So are those whose sides are the
    same: they teach nothing and no model can order them.
    """
    need_pairs(rows, f"data={source}")
    pairs, same = [], 0
    for index, row in numbered(rows, source):
        where = f"data={source}, row {index}"
        prompt = prompt_of(row, where)
        sides = [
            tokenize(*join(prompt, row[name], tokenizer, where), tokenizer)
            for name in ("chosen", "rejected")
        ]
        margin = margin_of(row.get("margin"), where)
        if sides[0] == sides[1]:
            same += 1
        elif max(map(len, sides)) <= max_tokens:
            pairs.append(Pair(*sides, margin, asked(prompt, row)))
    report_left_out(source, same, len(rows), "have the same text as chosen and as rejected")
    if not pairs:
        differ = " of different texts" if same else ""
        raise InputError(
            f"data={source}: no pair{differ} is at most max_tokens={max_tokens} tokens long"
        )
    too_long = len(rows) - same - len(pairs)
    report_left_out(source, too_long, len(rows), f"are longer than max_tokens={max_tokens}")
    return pairs


def prompt_of(row: dict[str, Any], where: str) -> Text | None:
    """What both sides answer, or None where they begin with it.

    The sides of UltraFeedback and its kind are whole conversations beside a prompt, which is text
    or their first messages: the sides say more, so they count. TRL does so for the text.
    """
    names = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    conversations = all(isinstance(row[name], list) for name in ("chosen", "rejected"))
    if names[0] == "chosen" or not conversations:
        check_texts({name: row[name] for name in names}, where)
        return row.get("prompt")
    check_texts({name: row[name] for name in names[1:]}, where)
    check_texts({"prompt": row["prompt"]}, where)
    sides = row["chosen"], row["rejected"]
    prompt = row["prompt"]
    if isinstance(prompt, str):
        whole = all(side[0]["role"] != "assistant" for side in sides)
        return None if whole else [{"role": "user", "content": prompt}]
    whole = all(side[: len(prompt)] == prompt and len(side) > len(prompt) for side in sides)
    return None if whole else prompt


def asked(prompt: Text | None, row: dict[str, Any]) -> str:
    """The same for pairs of the same prompt; of pairs of plain texts without one, for the same."""
    if prompt is None and isinstance(row["chosen"], list):
        sides = zip(row["chosen"], row["rejected"], strict=False)
        prompt = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], sides)]
    return json.dumps(prompt or sorted((row["chosen"], row["rejected"]), key=str), default=str)


def margin_of(value: Any, where: str) -> float:
    margin = 0.0 if value is None or value == "" else value
    if isinstance(margin, str):  # a CSV has nothing else
        try:
            margin = float(margin)
        except ValueError:
            pass
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise InputError(f"{where}: margin is {value!r}, expected a number")
    try:
        margin = float(margin)
    except OverflowError:
        margin = math.inf
    if not math.isfinite(margin):
        raise InputError(f"{where}: margin is {value}, expected a finite number")
    return margin


def prompts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, source: str, max_tokens: int
) -> list[Prompt]:
    """Column `prompt` -> token ids, the prompt as it was, and the other columns.

    Of preference pairs without that column, what `chosen` and `rejected` have in common at their
    beginning is the prompt.
    """
    implicit = need_prompts(rows, f"data={source}")
    kept, same = [], 0
    for index, row in numbered(rows, source):
        where = f"data={source}, row {index}"
        if implicit and row["chosen"] == row["rejected"] and isinstance(row["chosen"], str):
            same += 1  # where the prompt ends is not known
            continue
        if implicit:
            row |= extract_prompt(row["chosen"], row["rejected"], where)
        elif answers_are_conversations(row):
            whole = prompt_of(row, where) is None
            said = [{"role": "user", "content": row["prompt"]}]
            row["prompt"] = (
                extract_prompt(row["chosen"], row["rejected"], where)["prompt"] if whole else said
            )
        prompt = row.pop("prompt")
        check_texts({"prompt": prompt}, where)
        ids = tokenize(*start(prompt, tokenizer, where), tokenizer, goes_on=True)
        if not ids:
            raise InputError(f"{where}: prompt has no tokens")
        if len(ids) <= max_tokens:
            kept.append(Prompt(ids, prompt, row))
    report_left_out(source, same, len(rows), "have the same text as chosen and as rejected")
    if not kept:
        raise InputError(f"data={source}: no prompt is at most max_prompt_tokens={max_tokens} long")
    too_long = len(rows) - same - len(kept)
    report_left_out(source, too_long, len(rows), f"are longer than max_prompt_tokens={max_tokens}")
    return kept


def answers_are_conversations(row: dict[str, Any]) -> bool:
    """A prompt of plain text beside whole conversations, as UltraFeedback's: theirs is the prompt,
    with the roles that a chat template needs."""
    sides = [row.get("chosen"), row.get("rejected")]
    return isinstance(row["prompt"], str) and all(
        isinstance(side, list) and side and isinstance(side[0], dict) for side in sides
    )


def numbered(rows: Rows, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """enumerate(rows): text is decoded only when its row is read."""
    try:
        yield from enumerate(rows)
    except UnicodeDecodeError as error:
        raise InputError(f"data={source} is not UTF-8 text: {error}") from None


def extract_prompt(chosen: Text, rejected: Text, where: str) -> dict[str, Text]:
    """{"prompt", "chosen", "rejected"} of a pair whose prompt is the beginning of both sides.

    As TRL's extract_prompt: the longest common beginning that leaves an answer on either side, by
    characters or messages; a space before the answer belongs to the answer.
    """
    check_texts({"chosen": chosen, "rejected": rejected}, where)
    sides = list(zip(chosen, rejected, strict=False))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], sides[:-1]))
    if shared and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        shared -= 1
    if not shared:
        raise InputError(
            f"{where}: chosen and rejected begin differently, so there is no prompt to extract; "
            "expected a common beginning, or a column prompt"
        )
    return {
        "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:],
    }  # fmt: skip


def report_left_out(source: str, left_out: int, rows: int, reason: str) -> None:
    if left_out:
        console.print(f"data={source}: {left_out} of {rows} rows {reason}, left out")


def need_pairs(rows: Rows, who: str) -> None:
    need_columns(rows, ("chosen", "rejected"), who)


def need_prompts(rows: Rows, who: str) -> bool:
    """Whether the prompts are what the sides of pairs begin with."""
    implicit = "prompt" not in rows.column_names and {"chosen", "rejected"} <= {*rows.column_names}
    if not implicit:
        need_columns(rows, ("prompt",), who)
    for name in ("prompts", "completions"):
        if name in rows.column_names:
            raise InputError(
                f"{who} has a column {name!r}, but reward functions get the other columns "
                f"beside an argument {name} of their own: rename it"
            )
    return implicit


def need_columns(rows: Rows, names: Sequence[str], who: str) -> None:
    for name in names:
        if name not in rows.column_names:
            raise InputError(
                f"{who} has no column {name!r}; its columns are "
                + ", ".join(map(repr, rows.column_names))
            )


def check_characters(text: str, what: str) -> None:
    """No half of a pair of UTF-16, which JSON and bytes that are not UTF-8 can bring."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"{what} has {half!r}, expected text of whole characters") from None


def check_texts(texts: dict[str, Any], where: str) -> None:
    """Every column's value is text, or every one a conversation."""
    for name, value in texts.items():
        if isinstance(value, str):
            if not value.strip():
                raise InputError(f"{where}: {name} is empty, expected text")
            check_characters(value, f"{where}: {name}")
        elif isinstance(value, list) and value:
            for message in value:
                if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                    raise InputError(f"{where}: {name} has a message without role and content")
                for key in ("role", "content"):
                    if not isinstance(message[key], str):
                        raise InputError(
                            f"{where}: {name} has a message with {key} {message[key]!r}, "
                            "expected text"
                        )
                    check_characters(message[key], f"{where}: {name}")
        else:
            raise InputError(
                f"{where}: {name} is {value!r}, expected text or a list of role/content messages"
            )
    first, *others = texts
    for name in others:
        if isinstance(texts[name], str) != isinstance(texts[first], str):
            raise InputError(f"{where}: {first} and {name} must both be text or both messages")


def join(prompt: Text | None, answer: Text, tokenizer, where: str) -> tuple[str, bool]:
    """Prompt and answer as the one text a reward model reads, and whether a template made it."""
    if isinstance(answer, str):
        return (prompt or "") + answer, False
    return render([*(prompt or []), *answer], tokenizer, where), True


def start(prompt: Text, tokenizer, where: str) -> tuple[str, bool]:
    """The text a policy continues, and whether a template made it.

    A conversation that ends in the assistant's own words is continued there, as in TRL.
    """
    if isinstance(prompt, str):
        return prompt, False
    begun = prompt[-1]["role"] == "assistant"
    options = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    return render(prompt, tokenizer, where, **options), True


def render(messages: list[dict], tokenizer, where: str, **options: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: a conversation, but the tokenizer has no chat template: expected text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates raise what they like: about the order of roles, say
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where}: the chat template refuses the conversation: {reason}"
        ) from error


def tokenize(
    text: str, templated: bool, tokenizer: PreTrainedTokenizerBase, *, goes_on: bool = False
) -> list[int]:
    """Token ids with what the tokenizer puts around a text (<s>, [CLS] … [SEP], an eos), once.

    A chat template has put its special tokens in already; so has one that rendered the text before
    it came here, which then begins with them. goes_on: a policy continues the text, so nothing is
    put behind it: after an eos there is nothing to say.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if templated:
        return ids
    before, after = put_around(tokenizer, text)
    if before and ids[: len(before)] != before:
        ids = before + ids
    if after and not goes_on and ids[-len(after) :] != after:
        ids = ids + after
    return ids


def put_around(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer's post-processor puts before and behind a text."""
    if tokenizer not in _put_around:
        for probe in ("a", text):  # some tokenizers know no "a" and make nothing of it
            bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
            whole = tokenizer(probe)["input_ids"]
            places = range(len(whole) - len(bare) + 1 if bare else 0)
            at = next((i for i in places if whole[i : i + len(bare)] == bare), None)
            if at is not None:
                _put_around[tokenizer] = whole[:at], whole[at + len(bare) :]
                break
        else:
            return [], []
    return _put_around[tokenizer]


def pad(rows: Sequence[list[int]], *, side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids [B, T] int64 and mask [B, T] bool, True = a real token.

    Every consumer reads the mask, never `ids == pad`, so the filling may be any valid id.
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.tensor(row)
        mask[i, at] = True
    return ids, mask


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of the step-th batch: shuffled passes over `size` rows, one after the other.

    A function of (seed, step) alone, so a resumed run needs no saved position.
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(position, size)
        if not indices or at == 0:
            order = batch_order(size, epoch, seed)
        indices.append(order[at])
    return indices


def batch_order(size: int, epoch: int, seed: int) -> list[int]:
    """The order in which a pass takes the rows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()
