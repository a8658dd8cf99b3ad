"""metrics.jsonl: a line for each step, made while it ran."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from rlhf_fast.trainer.errors import InputError

Row = dict[str, float | None]


def finite(row: dict[str, float]) -> Row:
    """What is not finite becomes null, which JSON has and NaN it has not."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    return read_rows(path, is_row)


def read_rows(path: Path, is_row: Callable[[object], bool]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} cannot be read: {error}") from None
        if not is_row(row):
            raise InputError(
                f"{path}, line {number} is not a step's: expected numbers by name, `step` among "
                f"them, got {line.strip()[:60] or 'an empty line'}"
            )
        rows.append(row)
    return rows


def is_row(row: object) -> bool:
    if not has_step(row):
        return False
    return all(value is None or isinstance(value, Real) for value in row.values())


def has_step(row: object) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int


def plain(value: Any) -> Any:
    """Numbers that are not finite become null, wherever they are."""
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
