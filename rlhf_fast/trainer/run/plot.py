"""A run's plot: one PNG, each panel a metric over steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.metrics import Row

PANELS = (
    ("objective/scores", "reward (score, before KL)"),
    ("objective/kl", "KL from the reference (nats a sequence)"),
    ("objective/judge", "independent judge"),
    ("policy/clipfrac_avg", "share of clipped ratios"),
    ("loss/value_avg", "value loss"),
)
PANELS_OF_A_REWARD_MODEL = (
    ("loss", "loss"),
    ("accuracy", "share of pairs in the right order"),
    ("margin", "score of the better text, less the other's"),
    ("grad_norm", "norm of the gradient"),
)
SIGNATURE = "rlhf-fast plot"  # in the PNG: such a file may be drawn anew
SMOOTH_FROM = 20  # steps
ACROSS = 3  # panels side by side: what a page is wide enough for
NAN = float("nan")


def plot(metrics: list[Row], path: Path | IO[bytes]) -> None:
    """Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(metrics)
    if not panels:
        where = path.parent if isinstance(path, Path) else "the run"
        raise InputError(f"{where} has no metrics to plot")
    across = min(len(panels), ACROSS)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (key, title) in zip(grid, panels, strict=False):
        panel(axes, metrics, key, title)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": SIGNATURE})


def panels_of(metrics: list[Row]) -> list[tuple[str, str]]:
    """(metric, title) of those that a run has."""
    has = set().union(*metrics)
    known = PANELS if has & dict(PANELS).keys() else PANELS_OF_A_REWARD_MODEL
    return [(key, title) for key, title in known if key in has]


def panel(axes, metrics: list[Row], key: str, title: str = "", *, color: str = "C0") -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = [row["step"] for row in metrics], [number(row.get(key)) for row in metrics]
    draw(axes, steps, values, color)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # of one step, too
    axes.grid(alpha=0.3)


def draw(axes, steps: list[int], values: list[float], color: str = "C0") -> None:
    """A line that breaks where there is no value, dots where it has no neighbour; of a long run
    the line is light, under its moving mean."""
    if all(math.isnan(value) for value in values):
        axes.text(0.5, 0.5, "no finite value", ha="center", va="center", transform=axes.transAxes)
        return
    long = len(values) >= SMOOTH_FROM
    axes.plot(steps, values, color=color, linewidth=1.0 if long else 1.5, alpha=0.35 if long else 1)
    around = [NAN, *values, NAN]
    alone = [
        value if math.isnan(before) and math.isnan(after) else NAN
        for before, value, after in zip(around, values, around[2:], strict=False)
    ]
    axes.plot(steps, alone, color=color, linestyle="none", marker="o", markersize=4)
    if long:
        axes.plot(steps, smoothed(values, len(values) // SMOOTH_FROM), color=color, linewidth=1.8)


def smoothed(values: list[float], reach: int) -> list[float]:
    """Means over the `reach` neighbours on each side that have a value; no value stays none."""
    means = []
    for i, value in enumerate(values):
        near = [x for x in values[max(0, i - reach) : i + reach + 1] if not math.isnan(x)]
        means.append(NAN if math.isnan(value) else sum(near) / len(near))
    return means


def number(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else NAN


def is_plot(path: Path) -> bool:
    """Whether this program drew it."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return SIGNATURE.encode() in file.read(4096)
