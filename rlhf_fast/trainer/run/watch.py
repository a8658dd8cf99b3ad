"""`rlhf-fast watch`: a run's progress, figures and warnings in the terminal, until it ends."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_fast.trainer.run.diagnostics import new_warnings, warnings
from rlhf_fast.trainer.run.metrics import Row
from rlhf_fast.trainer.run.plot import number
from rlhf_fast.trainer.run.record import Record, read

BARS = "▁▂▃▄▅▆▇█"
RECENT = 20  # steps, from which the time that is left is told
MOST, LEAST = 48, 8  # columns of a curve


def watch(folder: Path, console: Console, *, once: bool = False, every: float = 2.0) -> None:
    """Until the run ends or Ctrl-C is pressed; once: what there is now."""
    try:
        record = read(folder)
        if once or not record.runs:
            console.print(screen(record, console.width))
        elif console.is_terminal:
            follow(record, console, every)
        else:
            log(record, console, every)
    except KeyboardInterrupt:
        pass  # to look away is no error


def follow(record: Record, console: Console, every: float) -> None:
    with Live(screen(record, console.width), console=console, auto_refresh=False) as live:
        while record.runs:
            time.sleep(every)
            record = read(record.folder)
            live.update(screen(record, console.width), refresh=True)


def log(record: Record, console: Console, every: float) -> None:
    """A line for each step, where no terminal can be drawn on."""
    said = 0
    while True:
        for i in range(said, len(record.rows)):
            console.print(escape(line(record, record.rows[i])), soft_wrap=True)
            for text in new_warnings(record.rows[: i + 1]) if record.is_ppo else ():
                console.print(escape(f"warning: {text}"), soft_wrap=True)
        said = len(record.rows)
        if not record.runs:
            console.print(escape(record.state), soft_wrap=True)
            return
        time.sleep(every)
        record = read(record.folder)


def line(record: Record, row: Row) -> str:
    of = f"/{record.steps}" if record.steps else ""
    values = (f"{name_of(key)} {number(row.get(key)):.3g}" for key, _ in record.panels)
    return f"step {row['step']}{of}  {'  '.join(values)}"


def name_of(metric: str) -> str:
    return metric.rpartition("/")[2].removesuffix("_avg")


# --------------------------------------------------------------------------- what is shown


def screen(record: Record, width: int) -> RenderableType:
    parts: list[RenderableType] = [
        Text.assemble((str(record.folder), "bold"), f"  {record.state}"),
        progress(record),
    ]
    if record.rows:
        parts.append(figures(record, width))
    if record.evaluations:
        last = record.evaluations[-1]
        means = (
            f"{name.removeprefix('eval_')} {number(value):.3g}"
            for name, value in last.items()
            if name.startswith("eval_")
        )
        parts.append(Text(f"held out, after step {last['step']}: {'  '.join(means)}"))
    if record.is_ppo:
        parts += [Text(f"! {text}", "bold yellow") for text in warnings(record.rows).values()]
    return Group(*parts)


def progress(record: Record) -> RenderableType:
    if not record.steps:
        return Text(f"step {record.step}")
    row = Table.grid(padding=(0, 2))
    said = f"step {record.step}/{record.steps}"
    if record.runs and (left := seconds_left(record)) is not None:
        said += f"  {timedelta(seconds=round(left))} left"
    row.add_row(ProgressBar(record.steps, min(record.step, record.steps), width=24), said)
    return row


def seconds_left(record: Record) -> float | None:
    taken = [row.get("perf/seconds") for row in record.rows[-RECENT:]]
    known = [seconds for seconds in taken if seconds is not None]
    return fmean(known) * (record.steps - record.step) if known else None


def figures(record: Record, width: int) -> Table:
    table = Table(box=None, pad_edge=False)
    room = width - max(len(name_of(key)) for key, _ in record.panels or [("metric", "")]) - 34
    wide = room >= LEAST  # else least and most go: a figure needs its name
    table.add_column("metric", no_wrap=True)
    for name in ("last", "least", "most") if wide else ("last",):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"steps 1 … {record.step}", no_wrap=True)
    for key, _ in record.panels:
        values = [number(row.get(key)) for row in record.rows]
        known = [value for value in values if not math.isnan(value)] or [math.nan]
        shown = (values[-1], min(known), max(known))
        curve = sparkline(values, max(LEAST, min(MOST, room)))
        cells = [f"{value:.3g}" for value in (shown if wide else shown[:1])]
        table.add_row(name_of(key), *cells, curve)
    return table


def sparkline(values: list[float], width: int) -> str:
    """A bar for each of at most `width` stretches, as high as its mean; blank where it has none."""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)] if width else []
    stretches = (values[a:b] for a, b in zip(edges, edges[1:], strict=False))
    known = ([value for value in part if not math.isnan(value)] for part in stretches)
    means = [fmean(part) if part else math.nan for part in known]
    finite = [mean for mean in means if not math.isnan(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(x) else BARS[round((x - low) * scale)] for x in means)
