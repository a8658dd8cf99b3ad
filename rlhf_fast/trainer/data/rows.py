"""Preference pairs and prompts: from a file, a folder or the hub to token ids.

Every row is looked at before training begins; the first bad one is named, counted from 0. Text
columns hold either strings or conversations, lists of {"role", "content"}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.console import console

datasets.disable_progress_bars()  # reading is quick; training has bars of its own

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_put_around: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[list[int], list[int]]] = (
    WeakKeyDictionary()
)

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


def load_rows(
    source: str, *, split: str = "train", subset: str | None = None, max_rows: int | None = None
) -> datasets.Dataset:
    """A datasets.Dataset from a .jsonl/.json/.csv/.parquet file, a local folder or a hub name.

    A folder is what `save_to_disk` wrote, or holds such files. `split` and `subset` (where the
    dataset has several) mean what they mean in `datasets.load_dataset`: "train[:90%]" works too.
    """
    path = Path(source).expanduser()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its log lines say what we raise
    try:
        rows = read(source, path, split, subset)
    except InputError:
        raise
    except Exception as error:  # the libraries below raise dozens of types; all mean "unreadable"
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        if "corresponds to no data" in reason:  # how datasets calls a table of headings only
            raise InputError(f"data={source} has no rows") from error
        raise InputError(f"data={source} (split {split}) cannot be read: {reason}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    if len(rows) == 0:
        raise InputError(f"data={source} has no rows")
    return rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))


def read(source: str, path: Path, split: str, subset: str | None) -> datasets.Dataset:
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise InputError(f"data={source}: expected a file ending in " + ", ".join(FILE_FORMATS))
        if path.stat().st_size == 0:
            raise InputError(f"data={source} is empty")
        if subset is not None:
            raise InputError(f"subset={subset}, but data={source} is a file, which has none")
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split)
    if (path / "dataset_info.json").is_file():  # save_to_disk of a Dataset: it has no splits
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise InputError(
                f"data={source} has no split {split!r}; its splits are "
                + ", ".join(map(repr, splits))
            )
        return splits[split]
    looks_local = path.suffix in FILE_FORMATS or source.startswith(("/", "./", "../", "~"))
    if looks_local and not path.exists():  # else the hub would be asked for it
        raise InputError(f"data={source}: there is no such file or folder")
    return datasets.load_dataset(str(path) if path.is_dir() else source, subset, split=split)


def preference_pairs(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, source: str, max_tokens: int
) -> list[Pair]:
    """Columns `chosen`, `rejected`, optionally `prompt` and `margin` -> pairs of token ids.

    Without `prompt` both sides begin with it, and are read whole. Pairs with a text longer than
    `max_tokens` are left out: cut, they might no longer differ.
    """
    need_columns(rows, ("chosen", "rejected"), source)
    pairs = []
    for index, row in numbered(rows, source):
        where = f"data={source}, row {index}"
        names = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
        check_texts({name: row[name] for name in names}, where)
        sides = [
            tokenize(*join(row.get("prompt"), row[name], tokenizer, where), tokenizer)
            for name in ("chosen", "rejected")
        ]
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
    report_left_out(source, len(rows) - len(pairs), len(rows), f"max_tokens={max_tokens}")
    return pairs


def prompts(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, source: str, max_tokens: int
) -> list[Prompt]:
    """Column `prompt` -> token ids, the prompt as it was, and the other columns.

    Of preference pairs without that column, what `chosen` and `rejected` have in common at their
    beginning is the prompt.
    """
    implicit = "prompt" not in rows.column_names and {"chosen", "rejected"} <= {*rows.column_names}
    if not implicit:
        need_columns(rows, ("prompt",), source)
    for name in ("prompts", "completions"):
        if name in rows.column_names:
            raise InputError(
                f"data={source} has a column {name!r}, but reward functions get the other columns "
                f"beside an argument {name} of their own: rename it"
            )
    kept = []
    for index, row in numbered(rows, source):
        where = f"data={source}, row {index}"
        if implicit:
            row |= extract_prompt(row["chosen"], row["rejected"], where)
        prompt = row.pop("prompt")
        check_texts({"prompt": prompt}, where)
        ids = tokenize(*start(prompt, tokenizer, where), tokenizer, goes_on=True)
        if not ids:
            raise InputError(f"{where}: prompt has no tokens")
        if len(ids) <= max_tokens:
            kept.append(Prompt(ids, prompt, row))
    if not kept:
        raise InputError(f"data={source}: no prompt is at most max_prompt_tokens={max_tokens} long")
    report_left_out(source, len(rows) - len(kept), len(rows), f"max_prompt_tokens={max_tokens}")
    return kept


def numbered(rows: datasets.Dataset, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
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


def report_left_out(source: str, left_out: int, rows: int, limit: str) -> None:
    if left_out:
        console.print(f"data={source}: {left_out} of {rows} rows are longer than {limit}, left out")


def need_columns(rows: datasets.Dataset, names: Sequence[str], source: str) -> None:
    for name in names:
        if name not in rows.column_names:
            raise InputError(
                f"data={source} has no column {name!r}; its columns are "
                + ", ".join(map(repr, rows.column_names))
            )


def check_texts(texts: dict[str, Any], where: str) -> None:
    """Every column's value is text, or every one a conversation."""
    for name, value in texts.items():
        if isinstance(value, str):
            if not value.strip():
                raise InputError(f"{where}: {name} is empty, expected text")
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
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(size, generator=generator).tolist()
        indices.append(order[at])
    return indices
