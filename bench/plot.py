"""The plot, made from the record and from nothing else: time beside ours, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

from .report import spelled, time, weighed  # noqa: E402

OURS = "#1b7837"
COLORS = ("#5b8db8", "#e08214", "#8c8c8c", "#9970ab", "#c51b7d", "#01665e", "#bf812d")


def draw(record: dict[str, Any], path: Path) -> None:
    """Horizontal bars, a group for each op, shape and pass; REFUSED and failed are written out."""
    rows = [row for row in record["rows"] if "failed" not in row]
    peers = [p for p in record["peers"] if any(p in row["cells"] for row in rows)]
    colors = dict(zip(peers, COLORS * len(peers), strict=False))
    groups = []  # (row, its contestants), in the table's order from the top
    for row in rows:
        groups.append((row, [name for name in ("ours", *peers) if name in row["cells"]]))
    bars = sum(len(names) for _, names in groups)
    height = max(3.0, 1.6 + 0.19 * bars + 0.16 * len(groups))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, height), sharey=True, width_ratios=(3, 1.3), layout="constrained"
    )
    y, ticks, labels = 0.0, [], []
    for row, names in groups:
        top = y
        for name in names:
            color = OURS if name == "ours" else colors[name]
            _time_bar(left, y, name, row["cells"][name], color)
            growth = row["cells"][name].get("memory")
            if growth:
                _memory_bar(right, y, growth["extra"] / 2**20, color)
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
    right.set_xlabel("extra memory, MiB (log scale)")
    left.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}×")
    left.xaxis.set_minor_locator(ticker.NullLocator())
    right.xaxis.set_major_formatter("{x:g}")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", linewidth=0.4, alpha=0.5)
        axis.set_axisbelow(True)
    handles = [plt.Rectangle((0, 0), 1, 1, color=OURS, label="rlhf_fast")]
    handles += [plt.Rectangle((0, 0), 1, 1, color=colors[p], label=p) for p in peers]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    m, top = record["machine"], record["ceilings"]
    figure.supxlabel(
        f"{m['device']}, {m['threads']} threads, load {m['load']} · torch {m['torch']} · "
        f"triton {m['triton']} · commit {m['commit']} · copy {top['copy'] / 1e9:.0f} GB/s, "
        f"{top['gemm_dtype']} GEMM {top['gemm'] / 1e9:.0f} GFLOP/s · extra memory: peak beyond "
        f"inputs, outputs, gradients ({', '.join(('ours', *weighed(record)))})",
        fontsize=7,
        color="#555555",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
    if name == "ours":
        axis.plot(1, y, "D", color=color, markersize=4)
        if "seconds" in cell:
            axis.text(1.06, y, time(cell["seconds"]["median"]), va="center", fontsize=7)
        return
    if "ratio" not in cell:
        return
    x = cell["ratio"]
    spread = [[x["median"] - x["q1"]], [x["q3"] - x["median"]]]
    axis.barh(y, x["median"] - 1, left=1, height=0.9, color=color, xerr=spread,
              error_kw={"linewidth": 0.8, "ecolor": "#333333"})  # fmt: skip
    text = f"{x['median']:.3g}×" + (" (part of the work)" if cell.get("yardstick") else "")
    axis.text(max(x["q3"], 1) * 1.06, y, text, va="center", fontsize=7)


def _memory_bar(axis: Any, y: float, mebibytes: float, color: str) -> None:
    axis.barh(y, mebibytes, height=0.9, color=color)
    axis.text(max(mebibytes, 0.02) * 1.05, y, f" {mebibytes:.1f}", va="center", fontsize=7)
