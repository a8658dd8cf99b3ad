"""The table on the console, made from the record and from nothing else."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .step import RIVALS

Record = dict[str, Any]
WIDTH = 160  # where the output is no terminal


def show(record: Record, console: Console) -> None:
    """Print the machine line, and what the suite has measured."""
    machine = record["machine"] | record.get("versions", {})
    console.print("  ".join(f"[dim]{key}[/] {escape(str(x))}" for key, x in machine.items()))
    if machine["load"] > machine["threads"] / 4:
        busy = f"load {machine['load']}: others were at work; believe the ratios, not the times"
        console.print(f"[yellow]{busy}[/]")
    if "trainers" in record:
        _steps(record, console)
    else:
        _rows(record, console)
    console.print(f"[dim]{record['seconds']:.0f} s in all.[/]")


def _rows(record: Record, console: Console) -> None:
    top = record["ceilings"]
    console.print(
        f"[dim]ceilings[/] copy {top['copy'] / 1e9:.1f} GB/s, "
        f"{top['gemm_dtype']} GEMM {top['gemm'] / 1e9:.0f} GFLOP/s"
    )
    timed = record.get("suite") != "accuracy"
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("op", no_wrap=True)
    grid.add_column("pass", no_wrap=True)
    if timed:
        grid.add_column("ours", justify="right", no_wrap=True)
        grid.add_column("rate, of ceiling", justify="right", no_wrap=True)
        grid.add_column("the peers' time / ours, median of the rounds ± half their quartiles")
        grid.add_column("extra memory, MiB", ratio=1)
    else:
        grid.add_column("largest relative error against float64, ours first")
    before = None
    for row in record["rows"]:
        what = (
            f"{row['op']} [dim]{row['implementation']}[/]\n"
            f"[dim]{spelled(row['shape'])} {row['dtype']}[/]"
        )
        first, before = what != before, what
        label = what if first else ""
        if "failed" in row:
            grid.add_row(label, row["pass"], f"[red]{row['failed']}[/]")
            continue
        kind = row["pass"].replace("forward", "fwd").replace("backward", "bwd")
        cells = row["cells"]
        others = {name: cell for name, cell in cells.items() if name != "ours"}
        if not timed:
            text = "  ".join(f"{name}\u00a0{_error(cell)}" for name, cell in cells.items())
            grid.add_row(label, kind, text)
            continue
        grid.add_row(
            label,
            kind,
            _ours(cells["ours"]),
            _rate(row.get("rate")),
            "  ".join(f"{name}\u00a0{_peer(cell)}" for name, cell in others.items() if _told(cell)),
            "  ".join(f"{name}\u00a0{mebibytes(c)}" for name, c in cells.items() if "memory" in c),
        )
    console.print(grid)
    _troubles(record, console)
    console.print(
        "[dim]extra memory: peak of one call above its inputs, outputs and gradients. *: gives "
        "fewer outputs than ours (no statistics, say). †: rounds what it returns to the inputs' "
        "dtype.[/]"
    )


def _troubles(record: Record, console: Console) -> None:
    """Each reason once, with the rows it is of."""
    found: dict[str, list[str]] = {}
    skipped: dict[str, dict[str, None]] = {}  # reason: the peers
    for row in record["rows"]:
        where = f"{row['op']} {spelled(row['shape'])} {row['pass']}"
        for name, cell in row["cells"].items():
            for what in ("refused", "failed"):
                if what in cell:
                    found.setdefault(f"{name} {what.upper()}: {cell[what]}", []).append(where)
            if "skipped" in cell:
                skipped.setdefault(cell["skipped"], {})[name] = None
        if "memory_failed" in row:
            found.setdefault(f"memory not measured: {row['memory_failed']}", []).append(where)
    if record.get("left_out"):
        console.print(f"{', '.join(record['left_out'])}: left out by --quick", highlight=False)
    for reason, peers in skipped.items():
        console.print(f"{', '.join(peers)}: {reason}", highlight=False)
    for reason, rows in found.items():
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        console.print(
            f"[red]{escape(reason)}[/] [dim]({escape(rows[0])}{more})[/]", highlight=False
        )


def _steps(record: Record, console: Console) -> None:
    setting = record["setting"]
    console.print("  ".join(f"[dim]{key}[/] {x}" for key, x in setting.items()))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trainer", "critic", "a step", "samples/s"):
        grid.add_column(name, justify="left" if name in ("trainer", "critic") else "right")
    for rival in RIVALS.values():
        grid.add_column(f"over {rival}", justify="right")
    grid.add_column("peak memory, MiB", justify="right")
    for name, cell in record["trainers"].items():
        if "failed" in cell:
            grid.add_row(name, cell["critic"], f"[red]{escape(cell['failed'])}[/]")
            continue
        grid.add_row(
            name,
            cell["critic"],
            time(cell["seconds"]),
            f"{cell['samples_per_second']:.3g}",
            *(of_rounds(cell["ratios"].get(rival)) for rival in RIVALS),
            f"{cell['peak_memory'] / 2**20:.0f}",
        )
    console.print(grid)


def of_rounds(ratios: list[float] | None) -> str:
    """The median, and from where to where the rounds went."""
    if not ratios:
        return ""
    spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.3g}×{spread}"


def spelled(shape: dict[str, int]) -> str:
    return " ".join(f"{key}={size}" for key, size in shape.items())


def time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def mebibytes(cell: Record) -> str:
    return f"{cell['memory']['extra'] / 2**20:.1f}"


def _ours(cell: Record) -> str:
    if "seconds" not in cell:
        return "[bold red]REFUSED[/]" if "refused" in cell else "[red]failed[/]"
    x = cell["seconds"]
    return f"{time(x['median'])} ±{(x['q3'] - x['q1']) / 2 / x['median']:.0%}"


def _told(cell: Record) -> bool:
    """Where ours is wrong there is nothing to be faster than."""
    return bool({"refused", "failed", "skipped", "ratio"} & cell.keys())


def _peer(cell: Record) -> str:
    if "refused" in cell:
        return "[bold red]REFUSED[/]"
    if "failed" in cell:
        return "[red]failed[/]"
    if "skipped" in cell:
        return "[dim]–[/]"
    x = cell["ratio"]
    marks = ("*" if "outputs" in cell else "") + ("†" if "rounded" in cell else "")
    spread = (x["q3"] - x["q1"]) / 2 / x["median"]
    return f"[bold]{x['median']:.3g}×[/]{marks}\u00a0[dim]±{spread:.0%}[/]"


def _error(cell: Record) -> str:
    if "failed" in cell:
        return "[red]failed[/]"
    if "error" not in cell:
        return "[dim]–[/]"
    value = cell["error"]["largest"]
    text = value if isinstance(value, str) else f"{value:.1e}"
    mark = "†" if "rounded" in cell else ""
    return f"[bold red]{text} REFUSED[/]" if "refused" in cell else f"[bold]{text}[/]{mark}"


def _rate(rate: Record | None) -> str:
    return "–" if rate is None else f"{rate['value']:.3g} {rate['unit']} {rate['share']:.0%}"
