"""The ladder's pictures: returns, variance and bias, importance sampling, and a cat's path."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from cat.env import CELL, ID, SIZE
from cat.ladder import EPISODES, OFF_POLICY, PPO, WHOLE_RATIO, Result
from cat.variance import Estimate

COLORS = ("#9aa0a6", "#5f6368", "#c58af9", "#7b1fa2", "#4fc3f7", "#0277bd", "#ffa726", "#d32f2f")


def new_figure(columns: int, width: float, height: float, rows: int = 1) -> tuple[Figure, list]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for a in axes:
        a.grid(alpha=0.3)
        a.set_axisbelow(True)
    return figure, axes


def returns(results: dict[str, Result], best: float, path: Path) -> None:
    """One panel a rung: its median and 10-90 % band over the seeds, the rung before it in grey."""
    columns = 4
    figure, panels = new_figure(columns, 13, 6, rows=-(-len(results) // columns))
    before = None
    for axes, color, (name, result) in zip(panels, COLORS, results.items(), strict=False):
        episodes = torch.arange(result.returns.shape[1]) * EPISODES
        low, median, high = result.returns.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), 0)
        if before is not None:
            axes.plot(episodes, before[1], color="0.6", linewidth=1.2, label=before[0])
        axes.fill_between(episodes, low, high, color=color, alpha=0.3, linewidth=0)
        axes.plot(episodes, median, color=color, linewidth=1.8, label=name)
        axes.axhline(best, color="black", linewidth=0.8, linestyle=":", label=f"optimum {best:.1f}")
        axes.set_ylim(0, best * 1.05)
        axes.set_title(name, fontsize=11)
        axes.legend(loc="lower right", fontsize=8)
        before = (name, median)
    for axes in panels[-columns:]:
        axes.set_xlabel("episodes")
    for axes in panels[::columns]:
        axes.set_ylabel("exact return J(π)")
    seeds = len(next(iter(results.values())).returns)
    figure.suptitle(f"Return against episodes: median and 10–90 % of {seeds} seeds", fontsize=12)
    figure.savefig(path, dpi=110)


def variance(measured: dict[str, dict[str, Estimate]], path: Path) -> None:
    """measured: {policy: {rung: Estimate}}. Bars of the variance (log axis) and of the bias."""
    figure, (top, bottom) = new_figure(1, 11, 7, rows=2)
    names = list(next(iter(measured.values())))
    width = 0.8 / len(measured)
    for i, (policy, estimates) in enumerate(measured.items()):
        at = [j + (i - (len(measured) - 1) / 2) * width for j in range(len(names))]
        color = ("#b3cde3", "#6497b1", "#005b96", "#03396c")[i % 4]
        bars = [estimates[name] for name in names]
        top.bar(at, [e.variance for e in bars], width, color=color, label=policy)
        # a bias below its own standard error is not distinguishable from none
        seen = [e.bias if e.bias > e.bias_error else 0.0 for e in bars]
        errors = [e.bias_error if s else 0.0 for e, s in zip(bars, seen, strict=True)]
        bottom.bar(at, seen, width, yerr=errors, color=color, error_kw={"linewidth": 0.8})
    top.set_yscale("log")
    top.set_ylabel("variance  E‖ĝ − Eĝ‖² / ‖∇J‖²")
    top.set_title(f"Variance of the gradient from {EPISODES} episodes, at the same policies")
    top.legend(fontsize=9)
    bottom.set_ylabel("bias  ‖Eĝ − ∇J‖ / ‖∇J‖")
    bottom.set_title("Its bias (no bar: below its standard error)")
    for axes in (top, bottom):
        axes.set_xticks(range(len(names)), names)
    figure.savefig(path, dpi=110)


def importance(measured: dict[int, dict[str, Estimate]], path: Path) -> None:
    """measured: {age of the data in updates: {rung: Estimate}}."""
    figure, (left, right) = new_figure(2, 11, 4)
    ages = list(measured)
    labels = {
        OFF_POLICY.name: ("the token's own ratio", "#ffa726"),
        WHOLE_RATIO.name: ("product over the episode", "#7b1fa2"),
        PPO.name: ("the token's own, clipped (PPO)", "#d32f2f"),
    }
    for name, (label, color) in labels.items():
        estimates = [measured[age][name] for age in ages]
        left.plot(ages, [e.variance for e in estimates], "o-", color=color, label=label)
        right.plot(ages, [e.cosine for e in estimates], "o-", color=color, label=label)
    left.set_yscale("log")
    left.set_title("Variance of the gradient from old episodes")
    left.set_ylabel("variance  E‖ĝ − Eĝ‖² / ‖∇J‖²")
    right.set_title("Does the mean gradient still point along ∇J?")
    right.set_ylabel("cosine of Eĝ and ∇J")
    right.axhline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("age of the episodes, in updates of the policy")
        axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def walk(logits: Tensor, *, slip: float, seed: int) -> list[Image.Image]:
    """One episode of the trained cat in the gymnasium environment, its track drawn behind it."""
    env = gymnasium.make(ID, slip=slip, render_mode="rgb_array")
    state, _ = env.reset(seed=seed)
    rng = torch.Generator().manual_seed(seed)
    frames, track = [Image.fromarray(env.render())], [middle(state)]
    over = False
    while not over:
        action = torch.multinomial(logits[state].softmax(-1), 1, generator=rng).item()
        state, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        track.append(middle(state))
        frame = Image.fromarray(env.render())
        ImageDraw.Draw(frame).line(track, fill="#2e7d32", width=3, joint="curve")
        frames.append(frame)
    return frames


def middle(state: int) -> tuple[int, int]:
    row, column = divmod(state, SIZE)
    return column * CELL + CELL // 2, row * CELL + CELL // 2


def save_gif(frames: list[Image.Image], path: Path) -> None:
    pause = [400] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pause, loop=0)
