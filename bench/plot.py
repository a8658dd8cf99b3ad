"""The plots, made from the record and from nothing else: bars of time and memory, the distance to
the device's ceilings, curves, errors."""

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
AXES = {"N": "rows N", "V": "vocabulary V", "H": "hidden size H", "T": "steps T",
        "kept": "percent of the rows that matter"}  # fmt: skip


def draw(record: Record, folder: Path) -> list[Path]:
    """Write the plots that the record's suite has; their paths."""
    suite = record.get("suite", "ops")
    plots = {"scale": [_curves], "accuracy": [_errors], "step": [_steps]}.get(
        suite, [bars, _distance]
    )
    paths = []
    for plot in plots:
        figure = plot(record)
        if figure is None:
            continue
        paths.append(folder / f"{suite}{'-ceilings' if plot is _distance else ''}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def headline(row: Record, record: Record, names: Iterable[str], path: Path) -> Path:
    """One shape, time and memory side by side: what the README shows at a glance."""
    cells = {name: row["cells"][name] for name in names if "seconds" in row["cells"].get(name, {})}
    bare = row["cells"]["bare-GEMMs"]["seconds"]["median"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.9 + 0.34 * len(cells)), sharey=True, layout="constrained"
    )
    labels = ["rlhf_fast" if name == "ours" else name for name in cells]
    colors = [_color(name) for name in cells]
    times = [cell["seconds"]["median"] / bare for cell in cells.values()]
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


def bars(record: Record) -> Any:
    """Horizontal bars, a group for each op, shape and pass; REFUSED and failed are written out."""
    rows = [row for row in record["rows"] if "failed" not in row]
    peers = [p for p in record["peers"] if any(p in row["cells"] for row in rows)]
    groups = []  # (row, its contestants), in the table's order from the top
    for row in rows:
        groups.append((row, [name for name in ("ours", *peers) if name in row["cells"]]))
    count = sum(len(names) for _, names in groups)
    height = max(3.0, 1.6 + 0.19 * count + 0.16 * len(groups))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, height), sharey=True, width_ratios=(3, 1.3), layout="constrained"
    )
    y, ticks, labels = 0.0, [], []
    for row, names in groups:
        top = y
        for name in names:
            _time_bar(left, y, name, row["cells"][name], _color(name))
            growth = row["cells"][name].get("memory")
            if growth:
                _memory_bar(right, y, growth["extra"] / 2**20, _color(name))
            y += 1
        ticks.append((top + y - 1) / 2)
        labels.append(f"{row['op']} · {row['pass']}\n{spelled(row['shape'])} {row['dtype']}")
        y += 0.9

    left.set_yticks(ticks, labels, fontsize=8)
    left.set_ylim(y - 0.4, -1)
    left.set_xscale("log")
    left.axvline(1, color=OURS, linewidth=1, zorder=0)
    low, high = left.get_xlim()
    left.set_xlim(min(low, 0.5), high * 3)  # room for the numbers
    left.set_xlabel("time / ours (log scale); right of the line: slower than ours")
    if not any("memory" in cell for row in rows for cell in row["cells"].values()):
        right.text(0.5, 0.5, "not measured", transform=right.transAxes, ha="center")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(0, max(10, right.get_xlim()[1] * 6))
    right.set_xlabel("extra memory, MiB (log scale):\npeak beyond inputs,\noutputs and gradients")
    left.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}×")
    left.xaxis.set_minor_locator(ticker.NullLocator())
    right.xaxis.set_major_formatter("{x:g}")
    for axis in (left, right):
        axis.grid(axis="x", linewidth=0.4, alpha=0.5)
    _finish(figure, record, ())
    return figure


def _distance(record: Record) -> Any:
    """Each contestant's time over what the device's ceiling allows for the op's bytes and FLOPs:
    a roofline on which every op, of GEMMs or of memory, has its place."""
    top = record["ceilings"]
    figure, axis = plt.subplots(figsize=(10, 7), layout="constrained")
    seen: list[str] = []
    ideals = []
    for row in record["rows"]:
        if "rate" not in row or row["pass"] == "forward" and _has_backward(row, record):
            continue
        ideal = row["flops"] / top["gemm"] if row["flops"] else row["bytes"] / top["copy"]
        ideals.append(ideal)
        for name, cell in row["cells"].items():
            if "seconds" not in cell or cell.get("yardstick"):
                continue
            seen += [] if name in seen else [name]
            marker = "D" if name == "ours" else "o"
            axis.plot(
                ideal, cell["seconds"]["median"], marker, color=_color(name),
                markersize=8 if name == "ours" else 5, zorder=3 if name == "ours" else 2,
            )  # fmt: skip
        label = f"{row['op']}\n{spelled(row['shape'])}"
        ours = row["cells"]["ours"]["seconds"]["median"]
        axis.annotate(label, (ideal, ours), (6, -4), textcoords="offset points", fontsize=6,
                      va="top", color="#555555")  # fmt: skip
    if not ideals:
        plt.close(figure)
        return None
    ends = [min(ideals) / 3, max(ideals) * 3]
    for times, style in ((1, "-"), (10, ":"), (100, ":")):
        axis.plot(ends, [x * times for x in ends], style, color="#333333", linewidth=1, zorder=1)
        text = "the ceiling" if times == 1 else f"{times}×"
        axis.annotate(text, (ends[0], ends[0] * times), (2, 4), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    axis.set(xscale="log", yscale="log", ylabel="seconds measured (log scale)",
             xlabel="seconds at the device's ceiling: FLOPs / its GEMM rate, or bytes / its copy "
             "bandwidth (log scale)")  # fmt: skip
    axis.grid(linewidth=0.4, alpha=0.5)
    _finish(figure, record, seen)
    return figure


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
    axis.set_xlabel("relative error against float64 (log scale; left is better; ✕: refused)")
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
    names = [f"{name}\n{cell['critic']}" for name, cell in done.items()]
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
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 7),
                      frameon=False)  # fmt: skip
    m, top = record["machine"], record.get("ceilings")
    text = (
        f"{m['device']}, {m['threads']} threads, load {m['load']} · torch {m['torch']} · "
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


def _time_bar(axis: Any, y: float, name: str, cell: dict[str, Any], color: str) -> None:
    """A bar from 1, quartiles as its whisker, the number at its end; or why there is none."""
    note = {"va": "center", "fontsize": 7, "color": "#b2182b", "clip_on": True}
    if "refused" in cell:  # hatched over the whole width, so that no length can be read off it
        across = axis.get_yaxis_transform()
        axis.barh(y, 1, height=0.9, color="white", edgecolor="#f4a582", hatch="////",
                  transform=across)  # fmt: skip
        text = axis.text(1.06, y, f"{name} REFUSED: {cell['refused']}", **note)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        return
    if "failed" in cell:
        axis.text(1.06, y, f"{name} failed: {cell['failed'][:90]}", **note)
        return
    if "skipped" in cell:
        axis.text(1.06, y, f"{name}: {cell['skipped']}", **(note | {"color": "#555555"}))
        return
    if name == "ours":
        axis.plot(1, y, "D", color=color, markersize=4)
        if "seconds" in cell:
            text = f"rlhf_fast {time(cell['seconds']['median'])}"
            axis.text(1.06, y, text, va="center", fontsize=7)
        return
    if "ratio" not in cell:
        return
    x = cell["ratio"]
    spread = [[x["median"] - x["q1"]], [x["q3"] - x["median"]]]
    axis.barh(y, x["median"] - 1, left=1, height=0.9, color=color, xerr=spread,
              error_kw={"linewidth": 0.8, "ecolor": "#333333"})  # fmt: skip
    text = f"{name} {x['median']:.3g}×" + (" (other work)" if cell.get("yardstick") else "")
    axis.text(max(x["q3"], 1) * 1.06, y, text, va="center", fontsize=7)


def _memory_bar(axis: Any, y: float, mebibytes: float, color: str) -> None:
    axis.barh(y, mebibytes, height=0.9, color=color)
    axis.text(max(mebibytes, 0.02) * 1.05, y, f" {mebibytes:.1f}", va="center", fontsize=7)
