"""The table, made from the record and from nothing else."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Record = dict[str, Any]
WIDTH = 140  # where the output is no terminal


def table(record: Record, console: Console) -> None:
    """Print the machine line, its ceilings and a row for each op, shape and pass."""
    machine, top = record["machine"], record["ceilings"]
    console.print("  ".join(f"[dim]{key}[/] {escape(str(x))}" for key, x in machine.items()))
    if machine["load"] > machine["threads"] / 4:
        busy = f"load {machine['load']}: others were at work; believe the ratios, not the times"
        console.print(f"[yellow]{busy}[/]")
    console.print(
        f"[dim]ceilings[/] copy {top['copy'] / 1e9:.1f} GB/s, "
        f"{top['gemm_dtype']} GEMM {top['gemm'] / 1e9:.0f} GFLOP/s   "
        "[dim]peers: their time / ours, median of the rounds, ± half the interquartile range[/]"
    )
    peers = [p for p in record["peers"] if any(p in row["cells"] for row in record["rows"])]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "pass"):
        grid.add_column(name, no_wrap=True)
    for name in ("ours", *peers, "rate, of ceiling"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("extra memory, MiB\n" + " / ".join(("ours", *weighed(record))), justify="right")
    before = None
    for row in record["rows"]:
        what = (
            f"{row['op']} [dim]{row['implementation']}[/]\n"
            f"[dim]{spelled(row['shape'])} {row['dtype']}[/]"
        )
        first, before = what != before, what
        if "failed" in row:
            grid.add_row(what, row["pass"], f"[red]{row['failed']}[/]")
            continue
        cells = row["cells"]
        grid.add_row(
            what if first else "",
            row["pass"].replace("forward", "fwd").replace("backward", "bwd"),
            _ours(cells["ours"]),
            *(_peer(cells.get(name)) for name in peers),
            _rate(row.get("rate")),
            " / ".join(_mebibytes(cells.get(name)) for name in ("ours", *weighed(record))),
        )
    console.print(grid)
    for row in record["rows"]:
        for name, cell in row["cells"].items():
            for what in ("refused", "failed"):
                if what in cell:
                    where = f"{row['op']} {spelled(row['shape'])} {row['pass']}"
                    text = escape(f"{name} {what.upper()} on {where}: {cell[what]}")
                    console.print(f"[red]{text}[/]", highlight=False)
        if "memory_failed" in row:
            console.print(f"[red]memory of {row['op']} not measured: {row['memory_failed']}[/]")
    console.print(
        "[dim]extra memory: peak of one call above its inputs, outputs and gradients. "
        f"{record['seconds']:.0f} s in all.[/]"
    )


def weighed(record: Record) -> list[str]:
    """The peers whose memory was measured."""
    rows = record["rows"]
    return [p for p in record["peers"] if any("memory" in r["cells"].get(p, {}) for r in rows)]


def spelled(shape: dict[str, int]) -> str:
    return " ".join(f"{key}={size}" for key, size in shape.items())


def time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def _ours(cell: Record) -> str:
    if "seconds" not in cell:
        return "[bold red]REFUSED[/]" if "refused" in cell else "[red]failed[/]"
    x = cell["seconds"]
    return f"{time(x['median'])} ±{(x['q3'] - x['q1']) / 2 / x['median']:.0%}"


def _peer(cell: Record | None) -> str:
    if cell is None:
        return "[dim]–[/]"
    if "refused" in cell:
        return "[bold red]REFUSED[/]"
    if "failed" in cell:
        return "[red]failed[/]"
    if "ratio" not in cell:  # ours is wrong: there is nothing to be faster than
        return "[dim]–[/]"
    x = cell["ratio"]
    return f"[bold]{x['median']:.3g}×[/] ±{(x['q3'] - x['q1']) / 2 / x['median']:.0%}"


def _rate(rate: Record | None) -> str:
    return "–" if rate is None else f"{rate['value']:.3g} {rate['unit']} {rate['share']:.0%}"


def _mebibytes(cell: Record | None) -> str:
    if not cell or "memory" not in cell:
        return "–"
    return f"{cell['memory']['extra'] / 2**20:.1f}"
