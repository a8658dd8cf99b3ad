"""Preference pairs and prompts: from a file, a folder or the hub to token ids.

Every row is looked at before training begins; the first bad one is named. Text columns hold either
strings or conversations, lists of {"role", "content"}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import InputError

datasets.disable_progress_bars()  # reading is quick; training has bars of its own

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

Text = str | list[dict[str, str]]  # plain text, or a conversation


@dataclass
class Pair:
    chosen: list[int]
    rejected: list[int]
    margin: float


@dataclass
class Prompt:
    ids: list[int]
    prompt: Text
    columns: dict[str, Any]  # the row's other columns, handed to reward functions


def load_rows(source: str, *, split: str = "train", max_rows: int | None = None):
    """A datasets.Dataset from a .jsonl/.csv/.parquet file, a local folder or a hub name."""
    path = Path(source).expanduser()
    try:
        if path.suffix in FILE_FORMATS:
            if not path.is_file():
                raise InputError(f"data={source}: there is no such file")
            if path.stat().st_size == 0:
                raise InputError(f"data={source} is empty")
            rows = datasets.load_dataset(
                FILE_FORMATS[path.suffix], data_files=str(path), split="train"
            )
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(path))
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else source, split=split)
    except InputError:
        raise
    except Exception as error:  # the libraries below raise dozens of types; all mean "unreadable"
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        if "corresponds to no data" in reason:  # how datasets calls a table of headings only
            raise InputError(f"data={source} has no rows") from error
        raise InputError(f"data={source} (split {split}) cannot be read: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"data={source} has no rows")
    return rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))


def preference_pairs(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, source: str, max_tokens: int
) -> list[Pair]:
    """Columns `chosen`, `rejected`, optionally `prompt` and `margin` -> pairs of token ids.

    Pairs with a text longer than `max_tokens` are left out: cut, they might no longer differ.
    """
    need_columns(rows, ("chosen", "rejected"), source)
    pairs = []
    for index, row in enumerate(rows):
        where = f"data={source}, row {index}"
        prompt = row.get("prompt")
        if prompt is not None:
            check_text(prompt, "prompt", where)
        sides = []
        for name in ("chosen", "rejected"):
            check_text(row[name], name, where)
            if prompt is not None and isinstance(prompt, str) != isinstance(row[name], str):
                raise InputError(f"{where}: prompt and {name} must both be text or both messages")
            sides.append(tokenize(*join(prompt, row[name], tokenizer, where), tokenizer))
        margin = row.get("margin")
        margin = 0.0 if margin is None else margin
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise InputError(f"{where}: margin is {margin!r}, expected a number")
        if not math.isfinite(margin):
            raise InputError(f"{where}: margin is {margin}, expected a finite number")
        if max(map(len, sides)) <= max_tokens:
            pairs.append(Pair(*sides, float(margin)))
    if not pairs:
        raise InputError(f"data={source}: no pair is at most max_tokens={max_tokens} tokens long")
    return pairs


def prompts(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, source: str, max_tokens: int
) -> list[Prompt]:
    """Column `prompt` -> token ids, the prompt as it was, and the other columns."""
    need_columns(rows, ("prompt",), source)
    kept = []
    for index, row in enumerate(rows):
        where = f"data={source}, row {index}"
        prompt = row.pop("prompt")
        check_text(prompt, "prompt", where)
        ids = tokenize(*start(prompt, tokenizer, where), tokenizer)
        if not ids:
            raise InputError(f"{where}: prompt has no tokens")
        if len(ids) <= max_tokens:
            kept.append(Prompt(ids, prompt, row))
    if not kept:
        raise InputError(f"data={source}: no prompt is at most max_prompt_tokens={max_tokens} long")
    return kept


def need_columns(rows: datasets.Dataset, names: Sequence[str], source: str) -> None:
    for name in names:
        if name not in rows.column_names:
            raise InputError(
                f"data={source} has no column {name!r}; its columns are "
                + ", ".join(map(repr, rows.column_names))
            )


def check_text(value: Any, name: str, where: str) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where}: {name} is empty")
    elif isinstance(value, list) and value:
        for message in value:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise InputError(f"{where}: {name} has a message without role and content")
            if not isinstance(message["content"], str):
                raise InputError(f"{where}: {name} has a message whose content is no text")
    else:
        raise InputError(
            f"{where}: {name} is {value!r}, expected text or a list of role/content messages"
        )


def join(prompt: Text | None, answer: Text, tokenizer, where: str) -> tuple[str, bool]:
    """Prompt and answer as the one text a reward model reads, and whether a template made it."""
    if isinstance(answer, str):
        return (prompt or "") + answer, False
    return render([*(prompt or []), *answer], tokenizer, where, add_generation_prompt=False), True


def start(prompt: Text, tokenizer, where: str) -> tuple[str, bool]:
    """The text a policy continues, and whether a template made it."""
    if isinstance(prompt, str):
        return prompt, False
    return render(prompt, tokenizer, where, add_generation_prompt=True), True


def render(messages: list[dict], tokenizer, where: str, *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"{where}: a conversation, but the tokenizer has no chat template")
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def tokenize(text: str, templated: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A chat template has put the special tokens in already.
    return tokenizer(text, add_special_tokens=not templated)["input_ids"]


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
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(size, generator=generator).tolist()
        indices.append(order[at])
    return indices
