"""The plots, made from the record and from nothing else: time and memory beside the peers, the
distance to the device's ceilings, curves, errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

from .step import RIVALS  # noqa: E402
from .table import of_rounds, spelled, time  # noqa: E402

Record = dict[str, Any]
OURS = "#1b7837"
COLORS = {
    "ours": OURS,
    "eager": "#5b8db8",
    "torch.compile": "#e08214",
    "F.linear_cross_entropy": "#a6cee3",
    "TRL": "#c51b7d",
    "Liger": "#9970ab",
    "Liger-GRPO": "#5e3c99",
    "cut-cross-entropy": "#01665e",
    "verl": "#bf812d",
    "verl-Triton": "#8c510a",
    "OpenRLHF": "#80cdc1",
    "torchtune": "#d6604d",
    "bare-GEMMs": "#8c8c8c",
    "all-rows": "#c7c7c7",
}
LINE = 0.21  # inches of a line of a plot with a line for each row
AXES = {"N": "rows N", "V": "vocabulary V", "H": "hidden size H", "T": "steps T",
        "kept": "percent of the rows that matter"}  # fmt: skip


def draw(record: Record, folder: Path) -> list[Path]:
    """Write the plots that the record's suite has; their paths."""
    suite = record.get("suite", "ops")
    plots = {"scale": [_curves], "accuracy": [_errors], "step": [_steps]}.get(
        suite, [_times, _ceilings]
    )
    paths = []
    for plot in plots:
        figure = plot(record)
        if figure is None:
            continue
        paths.append(folder / f"{suite}{'-ceilings' if plot is _ceilings else ''}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def headline(row: Record, record: Record, names: Iterable[str], path: Path) -> Path:
    """One shape, time and memory side by side: what the README shows at a glance."""
    cells = {name: row["cells"][name] for name in names if "seconds" in row["cells"].get(name, {})}
    bare = row["cells"]["bare-GEMMs"]["ratio"]["median"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.9 + 0.34 * len(cells)), sharey=True, layout="constrained"
    )
    labels = ["rlhf_fast" if name == "ours" else name for name in cells]
    colors = [_color(name) for name in cells]
    times = [cell.get("ratio", {"median": 1.0})["median"] / bare for cell in cells.values()]
    memory = [cell.get("memory", {}).get("extra", float("nan")) / 2**20 for cell in cells.values()]
    for axis, values, form, title in (
        (left, times, "{:.2f}×", "time over the three bare matrix products"),
        (right, memory, "{:.0f} MiB", "peak memory beyond inputs and gradients"),
    ):
        drawn = axis.barh(labels, values, color=colors)
        axis.bar_label(drawn, [form.format(x) if x == x else "not measured" for x in values],
                       fontsize=8, padding=3)  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.2)
        axis.xaxis.set_visible(False)
    left.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    left.invert_yaxis()
    what = f"{row['op']}, forward + backward, {spelled(row['shape'])}, {row['dtype']}"
    _finish(figure, record, (), note=what)
    for axis in (left, right):
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(labelsize=9, left=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _times(record: Record) -> Any:
    """A line for each op, shape and pass: a dot for each contestant's time over ours, and one for
    its memory."""
    rows = [row for row in record["rows"] if "failed" not in row]
    seen: list[str] = []
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + LINE * len(rows)), sharey=True, width_ratios=(2.2, 1),
        layout="constrained",
    )  # fmt: skip
    for y, row in enumerate(rows):
        for name, cell in row["cells"].items():
            if "refused" not in cell and name == "ours":
                _dot(left, 1, y, name)
            elif "ratio" in cell:
                spread = cell["ratio"]
                left.plot([spread["q1"], spread["q3"]], [y, y], color=_color(name), linewidth=1)
                _dot(left, spread["median"], y, name)
            else:
                continue
            seen += [] if name in seen else [name]
            if "memory" in cell:
                _dot(right, cell["memory"]["extra"] / 2**20, y, name)
        _tell_refused(left, y, row)
    times = [row["cells"].get("ours", {}).get("seconds") for row in rows]
    labels = [
        _line(row) + (f" · {time(x['median'])}" if x else "")
        for row, x in zip(rows, times, strict=True)
    ]
    _lines(left, labels)
    left.set_xscale("log")
    left.axvline(1, color=OURS, linewidth=1, zorder=0)
    left.set_xlim(min(left.get_xlim()[0], 0.5), max(left.get_xlim()[1], 5))
    left.set_xlabel(
        "time over that of rlhf_fast (log scale);\nright of the line: slower", fontsize=8
    )
    _ticks(left)
    if not right.lines:
        right.text(0.5, 0.5, "not measured", transform=right.transAxes, ha="center")
    right.set_xscale("symlog", linthresh=10)
    right.set_xlim(-1, max(100, right.get_xlim()[1] * 1.5))
    right.set_xlabel(
        "extra memory, MiB (log scale): peak\nbeyond inputs, outputs and gradients", fontsize=8
    )
    right.xaxis.set_major_formatter("{x:g}")
    right.tick_params(axis="x", labelsize=8)
    right.grid(linewidth=0.4, alpha=0.5)
    _finish(figure, record, seen)
    return figure


def _ceilings(record: Record) -> Any:
    """Each contestant's time over what the device's ceilings allow for the op's bytes and FLOPs."""
    top = record["ceilings"]
    rows = [row for row in record["rows"] if "rate" in row]
    rows = [row for row in rows if row["pass"] != "forward" or not _has_backward(row, record)]
    if not rows:
        return None
    seen: list[str] = []
    figure, axis = plt.subplots(figsize=(10, 1.6 + LINE * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        ideal = row["flops"] / top["gemm"] if row["flops"] else row["bytes"] / top["copy"]
        for name, cell in row["cells"].items():
            if "seconds" in cell and not cell.get("yardstick"):
                seen += [] if name in seen else [name]
                _dot(axis, cell["seconds"]["median"] / ideal, y, name)
    _lines(axis, [_line(row) for row in rows])
    axis.set_xscale("log")
    axis.axvline(1, color="#333333", linewidth=1, zorder=0)
    axis.set_xlim(min(axis.get_xlim()[0], 0.8), max(axis.get_xlim()[1], 5))
    axis.set_xlabel(
        "time over the device's ceiling (log scale): FLOPs at its rate of matrix products, or\n"
        "bytes at its copy bandwidth; left is better",
        fontsize=8,
    )
    _ticks(axis)
    _finish(figure, record, seen)
    return figure


def _line(row: Record) -> str:
    return f"{row['op']} · {row['pass']} · {spelled(row['shape'])} · {row['dtype']}"


def _dot(axis: Any, x: float, y: float, name: str) -> None:
    ours = name == "ours"
    axis.plot(x, y, "D" if ours else "o", color=_color(name), markersize=6 if ours else 5,
              zorder=3 if ours else 2)  # fmt: skip


def _lines(axis: Any, labels: list[str]) -> None:
    """One line of text for each y, from the top."""
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.4, -0.6)


def _ticks(axis: Any) -> None:
    """At 1, 2 and 5 where there is room for them."""
    low, high = axis.get_xlim()
    subs = (1, 2, 5) if high < 100 * low else (1,)
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(linewidth=0.4, alpha=0.5)


def _tell_refused(axis: Any, y: float, row: Record) -> None:
    """Who was wrong has no place on the line, and is named at its end."""
    names = ["rlhf_fast" if name == "ours" else name for name, cell in row["cells"].items()
             if "refused" in cell]  # fmt: skip
    if names:
        axis.text(0.995, y, f"REFUSED: {', '.join(names)}", transform=axis.get_yaxis_transform(),
                  ha="right", va="center", fontsize=7, color="#b2182b")  # fmt: skip


def _has_backward(row: Record, record: Record) -> bool:
    key = (row["op"], row["shape"])
    return any((r["op"], r["shape"]) == key and r["pass"] != "forward" for r in record["rows"])


def _curves(record: Record) -> Any:
    """Time and memory of everybody against what grows."""
    series = _series(record)
    if not series:
        return None
    figure, grid = plt.subplots(
        len(series), 2, figsize=(11, 3.1 * len(series)), squeeze=False, layout="constrained"
    )
    seen: list[str] = []
    for (title, grows, rows), axes in zip(series, grid, strict=True):
        for name in dict.fromkeys(name for row in rows for name in row["cells"]):
            style = {"color": _color(name), "marker": "D" if name == "ours" else "o"}
            style |= {"linewidth": 2.2 if name == "ours" else 1.3, "markersize": 4}
            cells = [(row["shape"][grows], row["cells"].get(name, {})) for row in rows]
            timed = [(x, c["seconds"]["median"]) for x, c in cells if "seconds" in c]
            heavy = [(x, c["memory"]["extra"] / 2**20) for x, c in cells if "memory" in c]
            for axis, points in zip(axes, (timed, heavy), strict=True):
                if points:
                    axis.plot(*zip(*points, strict=True), **style)
            seen += [] if name in seen or not timed else [name]
        sizes = [row["shape"][grows] for row in rows]
        for axis, label in zip(axes, ("seconds", "extra memory, MiB"), strict=True):
            if grows == "kept":
                axis.set_ylim(bottom=0)
            else:
                axis.set_xscale("log")
                axis.set_yscale("log" if label == "seconds" else "symlog")
            if not axis.lines:
                axis.set_axis_off()
                axis.text(0.5, 0.5, "inputs under 8 MiB: not measured", ha="center",
                          transform=axis.transAxes, fontsize=8)  # fmt: skip
            axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.set(xlabel=AXES[grows], ylabel=label)
            axis.set_title(title, fontsize=9)
            axis.grid(linewidth=0.4, alpha=0.5)
    _finish(figure, record, seen)
    return figure


def _series(record: Record) -> list[tuple[str, str, list[Record]]]:
    """(title, what grows, its rows in order) of each curve that has two points."""
    found = []
    for op, fixed, grows in record["scales"]:
        rows = [
            row
            for row in record["rows"]
            if row["op"] == op and "failed" not in row and fixed.items() <= row["shape"].items()
        ]
        rows.sort(key=lambda row: row["shape"][grows])
        if len(rows) > 1:
            found.append((f"{op}  {spelled(fixed)}  {rows[0]['pass']}", grows, rows))
    return found


def _errors(record: Record) -> Any:
    """Relative error against float64, the largest of all outputs and gradients."""
    rows = [row for row in record["rows"] if "ours" in row["cells"]]
    figure, axis = plt.subplots(figsize=(10, 2 + 0.22 * len(rows)), layout="constrained")
    seen: list[str] = []
    for y, row in enumerate(rows):
        for name, cell in row["cells"].items():
            value = cell.get("error", {}).get("largest")
            if not isinstance(value, float):
                continue
            seen += [] if name in seen else [name]
            style = {"marker": "X" if "refused" in cell else "D" if name == "ours" else "o"}
            axis.plot(max(value, 1e-9), y, color=_color(name), linestyle="none",
                      zorder=3 if name == "ours" else 2, **style)  # fmt: skip
    labels = [f"{row['op']} · {row['dtype']}" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel(
        "relative error against float64 (log scale; left is better; ✕: refused)", fontsize=8
    )
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(linewidth=0.4, alpha=0.5)
    _finish(figure, record, seen)
    return figure


def _steps(record: Record) -> Any:
    done = {name: cell for name, cell in record["trainers"].items() if "seconds" in cell}
    if not done:
        return None
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.6 * len(done)), sharey=True, layout="constrained"
    )
    names = [
        f"{'rlhf_fast' if name.startswith('ours') else 'TRL'}\n{cell['critic']}"
        for name, cell in done.items()
    ]
    colors = [OURS if "ours" in name else COLORS["TRL"] for name in done]
    samples, texts = [], []
    for cell in done.values():
        ratios = [f"{of_rounds(x)} {RIVALS[rival]}" for rival, x in cell["ratios"].items()]
        texts.append("\n".join([f"{cell['samples_per_second']:.3g}", *ratios]))
        samples.append(cell["samples_per_second"])
    left.bar_label(left.barh(names, samples, color=colors), texts, fontsize=7, padding=3)
    left.set_xlim(0, 1.7 * max(samples))  # room for the numbers
    left.set_xlabel("samples a second; times another's: median of the rounds (least to most)")
    memory = [cell["peak_memory"] / 2**20 for cell in done.values()]
    drawn = right.barh(names, memory, color=colors)
    right.bar_label(drawn, fmt="%.0f", fontsize=7, padding=3)
    right.margins(x=0.15)
    right.set_xlabel("peak memory of the process, MiB")
    left.invert_yaxis()
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(8)
    _finish(figure, record, ())
    return figure


def _color(name: str) -> str:
    return COLORS.get(name, "#000000")


def _finish(figure: Any, record: Record, names: Iterable[str], note: str = "") -> None:
    """Legend above, machine line below, no frames."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    handles = [
        plt.Rectangle(
            (0, 0), 1, 1, color=_color(name), label="rlhf_fast" if name == "ours" else name
        )
        for name in names
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 9),
                      frameon=False, fontsize=8, handlelength=1.2, columnspacing=1.4)  # fmt: skip
    m, top = record["machine"], record.get("ceilings")
    text = (
        f"{m['device']} {m.get('instructions', '')}".strip()
        + f", {m['threads']} threads, load {m['load']} · torch {m['torch']} · "
        f"triton {m['triton']} · commit {m['commit']}"
    )
    if note:
        text = f"{note}\n{text}"
    elif top:
        text += (
            f" · copy {top['copy'] / 1e9:.0f} GB/s, {top['gemm_dtype']} GEMM "
            f"{top['gemm'] / 1e9:.0f} GFLOP/s"
        )
    figure.supxlabel(text, fontsize=7, color="#555555")
