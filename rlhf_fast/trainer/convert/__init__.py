"""`rlhf-fast convert`: another trainer's configuration as ours; what has no equal in comments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.contradictions import PPO, useless
from rlhf_fast.trainer.convert import trl_grpo, trl_ppo, verl
from rlhf_fast.trainer.convert.keys import Framework
from rlhf_fast.trainer.errors import InputError

FRAMEWORKS = {x.name: x for x in (trl_ppo.FRAMEWORK, trl_grpo.FRAMEWORK, verl.FRAMEWORK)}
NEEDED = ("model", "data", "reward", "output_dir")
SIGNATURE = "options of `rlhf-fast ppo --config`"  # such a file may be written anew


def convert(path: Path, framework: str | None = None, processes: int = 1) -> str:
    """Our YAML of a file of theirs; framework: of FRAMEWORKS, by default found out by the keys."""
    given = settings(path)
    of = FRAMEWORKS[framework or recognised(given, path)]
    try:
        values, said = converted(given, of, processes)
    except ZeroDivisionError:
        zeros = ", ".join(key for key, value in given.items() if value == 0)
        raise InputError(f"file={path}: a count is 0, expected at least 1; 0: {zeros}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"file={path} has a value that cannot be converted: {error}") from None
    check(values, path)
    return "".join(lines(values, said, given, of, path))


def settings(path: Path) -> dict[str, Any]:
    """{key with dots: value} of a YAML file, nested or not."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"file={path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"file={path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"file={path}: expected lines of `key: value`")
    return {key: as_meant(value) for key, value in flat(found)}


def flat(found: dict[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def as_meant(value: Any) -> Any:
    """1e-5 is a number in their files, and text in YAML 1.1; a quoted "true" is true."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not any(sign.isdigit() for sign in value):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number


def recognised(given: dict[str, Any], path: Path) -> str:
    """By the framework that knows keys which no other does."""
    own = {
        name: sum(key in x.keys and not any(key in y.keys for y in others(x)) for key in given)
        for name, x in FRAMEWORKS.items()
    }
    best = max(own, key=own.__getitem__)
    if own[best] == 0 or list(own.values()).count(own[best]) > 1:
        raise InputError(
            f"file={path}: whose keys these are cannot be told: give --framework, one of "
            f"{', '.join(FRAMEWORKS)}"
        )
    return best


def others(framework: Framework) -> list[Framework]:
    return [x for x in FRAMEWORKS.values() if x is not framework]


def converted(
    given: dict[str, Any], of: Framework, processes: int
) -> tuple[dict[str, Any], list[str]]:
    """({our option: value}, what must be said)."""
    known = of.defaults | {key: value for key, value in given.items() if value is not None}
    for key, default in of.defaults.items():
        if type(default) in (int, float) and type(known[key]) not in (int, float):
            raise ValueError(f"{key}={known[key]}, expected a number")
    values = {
        of.keys[key].ours: value
        for key, value in known.items()
        if key in of.keys and of.keys[key].copied
    }
    made, said = of.options(known, processes)
    values |= made
    order = [f.name for f in fields(PPOConfig)]
    kept = {name: value for name, value in values.items() if value is not None}
    of_theirs = {name for key in given if key in of.keys for name in of.keys[key].options}
    for name in useless(PPOConfig, kept, PPO):
        if kept.pop(name, None) is not None and name in of_theirs:
            said.append(f"{name} is left out: it has no effect beside the rest")
    return dict(sorted(kept.items(), key=lambda item: order.index(item[0]))), said


def check(values: dict[str, Any], path: Path) -> None:
    """It is accepted, once the names are given that it lacks."""
    try:
        PPOConfig(**({"output_dir": "…"} | values))
    except InputError as error:
        raise InputError(f"file={path} becomes options that cannot work: {error}") from None
    except TypeError as error:
        raise InputError(f"file={path} has a value of the wrong kind: {error}") from None


def lines(
    values: dict[str, Any], said: list[str], given: dict[str, Any], of: Framework, path: Path
) -> Iterator[str]:
    yield f"# {path.name}, {of.title}: {SIGNATURE}.\n"
    yield from (f"# {text}\n" for text in said)
    missing = [name for name in NEEDED if name not in values]
    if missing:
        yield f"# Still to be given: {', '.join(missing)}.\n"
    yield "\n"
    default = {f.name: f.default for f in fields(PPOConfig) if f.default is not MISSING}
    sources = {name: theirs for theirs, key in of.keys.items() if theirs in given
               for name in key.options}  # fmt: skip
    for name, value in values.items():
        if name not in sources and value == default.get(name):
            continue
        written = yaml.safe_dump({name: value}, allow_unicode=True, width=10**6).strip()
        written = written.replace("\n", "\n  ") if isinstance(value, list) else written
        comment = of.keys[sources[name]].note if name in sources else f"{of.title}'s default"
        told = f"{sources[name]}{f': {comment}' if comment else ''}" if name in sources else comment
        yield f"{written}  # {told}\n"
    left = [key for key in given if key not in of.keys or not of.keys[key].options]
    if left:
        yield "\n# What has no equal here:\n"
    for key in left:
        value = " ".join(str(given[key]).split())
        why = of.keys[key].note if key in of.keys else of.why(key)
        yield f"# {key}: {value}  ({why})\n"


def is_converted(path: Path) -> bool:
    """Whether this program wrote it."""
    if path.is_symlink() or not path.is_file():
        return False
    return SIGNATURE.encode() in path.read_bytes().partition(b"\n")[0]
