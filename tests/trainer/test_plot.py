"""What a plot shows, by its coloured pixels: text, axes and grid are grey."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.plot import panel, plot, smoothed

NAN = float("nan")


def colours(tmp_path, values: list[float | None]) -> int:
    plot([{"step": i + 1, "objective/kl": v} for i, v in enumerate(values)], tmp_path / "a.png")
    image = imread(tmp_path / "a.png")[..., :3]
    return int(((image.max(-1) - image.min(-1)) > 0.2).sum())


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.5, None], [None, 0.5, None], [0.5, None, 0.7], [1.0, NAN, 2.0, math.inf, 3.0]],
    ids=str,
)
def test_every_value_shows(tmp_path, values):
    dots = sum(v is not None and math.isfinite(v) for v in values)
    assert colours(tmp_path, values) > 20 * dots


def test_a_panel_without_a_finite_value_says_so(tmp_path):
    assert colours(tmp_path, [None, NAN]) == 0


def test_a_metric_that_begins_late_has_a_panel(tmp_path):
    plot([{"step": 1}, {"step": 2, "objective/kl": 1.0}], tmp_path / "a.png")
    with pytest.raises(InputError, match="no metrics to plot"):
        plot([{"step": 1}], tmp_path / "a.png")


@pytest.mark.parametrize("steps", [[2], [2, 3], [1, 2, 3], [10, 200]])
def test_steps_are_whole_numbers(steps):
    axes = Figure().subplots()
    panel(axes, [{"step": step, "score": 1.0} for step in steps], "score")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_the_moving_mean():
    assert smoothed([1.0, 2.0, 6.0], 1) == [1.5, 3.0, 4.0]
    mean = smoothed([1.0, NAN, 3.0], 1)
    assert mean[0] == 1 and math.isnan(mean[1]) and mean[2] == 3
    assert smoothed([1.0, 2.0], 0) == [1.0, 2.0]
