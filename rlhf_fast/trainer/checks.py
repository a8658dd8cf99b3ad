"""What the values of a config are checked for: each check names the fields that it is of."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from rlhf_fast.ops.check import LARGEST, SMALLEST

from .errors import InputError
from .flags import COMMAS

# Options that are or may be paths.
PATHS = {
    "model", "data", "eval_data", "output_dir", "value_model", "reward", "judge", "rollout_engine",
    "environment",
    "run", "output", "file",
}  # fmt: skip


def at_least(config: Any, low: float, *names: str) -> None:
    check(config, lambda value: value >= low, f"at least {low}", names)


def at_most(config: Any, high: float, *names: str) -> None:
    check(config, lambda value: value <= high, f"at most {high}", names)


def above_zero(config: Any, *names: str) -> None:
    check(config, lambda value: value > 0, "above 0", names)


def below_one(config: Any, *names: str) -> None:
    check(config, lambda value: value < 1, "below 1", names)


def finite(config: Any, *names: str) -> None:
    check(config, lambda value: True, "or unset", names)


def in_ranges(config: Any, ranges: dict[str, dict[str, float | None]]) -> None:
    for name, bounds in ranges.items():
        low, high, above = bounds["low"], bounds["high"], bounds["above"]
        finite(config, name)
        if low is not None:
            check(config, lambda value, low=low: value >= low, f"at least {low:g}", [name])
        if high is not None:
            check(config, lambda value, high=high: value <= high, f"at most {high:g}", [name])
        if above is not None:
            check(config, lambda value, above=above: value > above, f"above {above:g}", [name])


def seed_in_range(config: Any) -> None:
    at_least(config, 0, "seed")
    at_most(config, 2**32 - 1, "seed")


def paths_as_text(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, PathLike):
            setattr(config, f.name, str(value))
        elif isinstance(value, list | tuple) and any(isinstance(x, PathLike) for x in value):
            setattr(config, f.name, [str(x) if isinstance(x, PathLike) else x for x in value])


def no_objects(config: Any) -> None:
    """A config is text and numbers: what else came is for the trainer."""
    for name in sorted(PATHS):
        value = getattr(config, name, None)
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is not None and not isinstance(each, str):
                kind = getattr(each, "__name__", None) or f"<{type(each).__name__}>"
                raise InputError(
                    f"{name}={kind}: expected text in a config; PPOTrainer and RewardTrainer take "
                    "models, datasets and functions (from rlhf_fast.trainer import PPOTrainer)"
                )


def as_annotated(config: Any) -> None:
    """What every config is checked for: text that is there, the kinds and choices of its fields."""
    paths_as_text(config)
    texts_of_a_config(config)
    kinds_as_annotated(config)
    one_of(config)


# What an annotation asks for; a bool is no number here, though Python counts with it.
KINDS = {
    bool: ("true or false", bool), int: ("a whole number", Integral), float: ("a number", Real),
    str: ("text", str), NoneType: ("unset", NoneType),
    list[str]: ("a list of texts", str), list[float]: ("a list of numbers", Real),
}  # fmt: skip


def kinds_as_annotated(config: Any) -> None:
    """A Python program may give a field anything; flags are of the right kind already."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if any(map(get_args, allowed)) and not isinstance(value, list | tuple | None):
            value = [value]  # one stands for a list of one
            setattr(config, f.name, value)
        if not any(is_of(value, kind) for kind in allowed):
            expected = " or ".join(KINDS[kind][0] for kind in allowed)
            if f.name in COMMAS:
                expected = "names in one text, separated by commas"
            raise InputError(f"{f.name}={value!r}: expected {expected}")


def is_of(value: Any, kind: Any) -> bool:
    if get_args(kind):  # a list
        items = value if isinstance(value, list | tuple) else [None]
        return all(isinstance(item, KINDS[kind][1]) for item in items)
    return isinstance(value, KINDS[kind][1]) and (kind is bool or not isinstance(value, bool))


def texts_of_a_config(config: Any) -> None:
    """Text is there, and where it is a name of a file or folder the system can look for it."""
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, str) and not value.strip(" ,\t\n" if f.name in COMMAS else None):
            raise InputError(f"{f.name} is empty: expected text")
        for text in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(text, str):
                continue
            if "\0" in text:
                raise InputError(f"{f.name}={text!r}: expected text without a NUL character")
            if f.name in PATHS and too_long(text):
                raise InputError(f"{f.name}={text[:40]}…: longer than the name of a file can be")


def too_long(path: str) -> bool:
    try:
        os.lstat(os.path.expanduser(path))
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def one_of(config: Any) -> None:
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise InputError(f"{f.name}={value}: expected one of {', '.join(choices)}")


def check(config: Any, holds: Any, expected: str, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not (math.isfinite(value) and holds(value)):
            raise InputError(f"{name}={value}: expected a finite number, {expected}")
        if value and not SMALLEST <= abs(value) <= LARGEST:
            raise InputError(
                f"{name}={value}: expected a number that float32 can compute with, "
                f"{SMALLEST:g} to {LARGEST:g}"
            )
