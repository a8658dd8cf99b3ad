"""What a run shows: progress bars, tables of answers, where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(highlight=False)


class Bar:
    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task

    def show(self, text: str, advance: int = 1) -> None:
        self.progress.update(self.task, advance=advance, now=escape(text))


@contextmanager
def progress_bar(name: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Bar]:
    roomy = console.width >= 110  # else the numbers beside the bar would not fit
    columns = (
        TextColumn("{task.description}"),
        *([BarColumn(bar_width=24)] if roomy else []),
        MofNCompleteColumn(),
        *([TimeElapsedColumn()] if roomy else []),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, disable=not shown) as progress:
        yield Bar(progress, progress.add_task(name, total=total, completed=done, now=""))


def summary_line(row: dict[str, float]) -> str:
    judge = f"  judge {row['objective/judge']:+.2f}" if "objective/judge" in row else ""
    return (
        f"reward {row['objective/scores']:+.2f}  kl {row['objective/kl']:.2f}{judge}  "
        f"{row['perf/tokens_per_second']:.0f} tokens/s  {row['perf/seconds']:.1f} s"
    )


class Stopwatch:
    """Seconds of each part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap was `name`'s. Kernels run behind Python on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    @property
    def total(self) -> float:
        return sum(self.laps.values())

    def metrics(self) -> dict[str, float]:
        parts = {f"perf/{name}_seconds": seconds for name, seconds in self.laps.items()}
        return {"perf/seconds": self.total, **parts}


SHARES = {"rollout": "rollout", "score": "reward", "reference": "reference", "update": "learning"}


def profile(rows: list[dict[str, float]]) -> str:
    """Where a run's time went, in one line. `reference` includes old log-probs and values."""
    rows = [row for row in rows if row.get("perf/seconds")]
    if not rows:
        return "no step was timed"
    total = sum(row["perf/seconds"] for row in rows)
    shares = {
        shown: sum(row.get(f"perf/{name}_seconds") or 0 for row in rows) / total
        for name, shown in SHARES.items()
    }
    return f"{total / len(rows):.2f} s a step: " + ", ".join(
        f"{name} {share:.0%}" for name, share in shares.items()
    )


def samples_table(
    prompts: list[Any], texts: list[str], scores: list[float], rows: int = 4
) -> Table:
    """Answers of this step with their scores."""
    table = Table(show_lines=True)
    for name in ("prompt", "answer"):
        table.add_column(name, overflow="fold")
    table.add_column("reward", justify="right")
    for prompt, text, score in list(zip(prompts, texts, scores, strict=True))[:rows]:
        table.add_row(escape(shown(prompt)), escape(shown(text)), f"{score:+.2f}")
    return table


def answers_table(before: dict[str, list], after: dict[str, list], rows: int = 8) -> Table:
    """The same prompts answered by the reference and by the trained policy, with scores.

    One below the other: side by side they leave a terminal of 80 columns a word a line.
    """
    judged = "judge" in before
    table = Table()
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("")
    table.add_column("answer", ratio=3, overflow="fold")
    for name in ("reward", "judge") if judged else ("reward",):
        table.add_column(name, justify="right")
    for i in range(min(rows, len(before["prompt"]))):
        for name, side in (("before", before), ("after", after)):
            prompt = escape(shown(before["prompt"][i])) if name == "before" else ""
            scores = [side["score"][i], *([side["judge"][i]] if judged else [])]
            cells = [prompt, name, escape(shown(side["answer"][i])), *(f"{x:+.2f}" for x in scores)]
            table.add_row(*cells, end_section=name == "after")
    return table


def shown(text: Any) -> str:
    if isinstance(text, list):  # a conversation: its last message is what is answered
        text = text[-1]["content"]
    return " ".join(text.split())
