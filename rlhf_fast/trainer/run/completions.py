"""The answers of an evaluation as tables: a Parquet file of the run, rows for a tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = "completions"
SHOWN = 32  # rows that a tracker's table has: the files have all

# Of `evaluate`'s columns; `judge` only where there is one.
COLUMNS = ("prompt", "answer", "score", "judge", "kl", "length", "stop_reason")
NAMES = {"answer": "completion"}  # as TRL's files have it


def name_of(step: int) -> str:
    return f"{FOLDER}/step_{step:06}.parquet"  # so that their order by name is that of the steps


def files(folder: Path) -> dict[int, Path]:
    """{step: file} of those in a run's folder, in order."""
    found = (folder / FOLDER).glob("step_*.parquet")
    steps = {path.stem.removeprefix("step_"): path for path in found}
    known = {int(step): path for step, path in steps.items() if step.isdecimal()}
    return {step: path for step, path in sorted(known.items()) if name_of(step).endswith(path.name)}


def table(step: int, answers: dict[str, list]) -> dict[str, list]:
    """The file's columns. A conversation is JSON text, so that all files are of one kind."""
    kept = {NAMES.get(name, name): answers[name] for name in COLUMNS if name in answers}
    kept["prompt"] = [as_text(prompt) for prompt in kept["prompt"]]
    return {"step": [step] * len(kept["prompt"]), **kept}


def as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def save(step: int, answers: dict[str, list], path: Path) -> None:
    import pyarrow  # which datasets brings along
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(table(step, answers)), path)


# -------------------------------------------------------------------------------- trackers


def log_table(tracker: Any, step: int, answers: dict[str, list]) -> None:
    """Some of the answers in a tracker of accelerate, if it can show a table."""
    columns = table(step, answers)
    names, rows = list(columns), [list(row) for row in zip(*columns.values(), strict=True)][:SHOWN]
    if hasattr(tracker, "log_table"):  # wandb, clearml
        tracker.log_table("completions", columns=names, data=rows, step=step)
    elif tracker.name == "tensorboard":  # whose texts are Markdown
        tracker.log({"completions": markdown(names, rows)}, step=step)
    elif tracker.name == "trackio":
        import pandas
        import trackio

        shown = trackio.Table(dataframe=pandas.DataFrame(rows, columns=names))
        tracker.log({"completions": shown}, step=step)


def markdown(names: list[str], rows: list[list]) -> str:
    lines = [names, ["---"] * len(names), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = " ".join(str(value).split())
    return text.translate({ord(sign): f"\\{sign}" for sign in "\\`*_{}[]<>#|~"})
