"""A run's curves while it goes on, in the notebook that it was started from."""

from __future__ import annotations

import time
from io import BytesIO
from typing import Any

from transformers import TrainerCallback
from transformers.utils import is_in_notebook

from rlhf_fast.trainer.run.metrics import Row, finite
from rlhf_fast.trainer.run.plot import panels_of, plot


class LivePlot(TrainerCallback):
    """Draws the curves of `rlhf-fast plot` below the cell that trains, anew every few seconds.

    Outside a notebook it does nothing.

    Args:
        every: seconds from one picture to the next, at the least.
    """

    def __init__(self, every: float = 2.0) -> None:
        self.every = every
        self.rows: list[Row] = []
        self.picture: Any = None  # what IPython knows it by
        self.drawn = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.rows = [row for row in map(dict, state.log_history) if is_of_a_step(row)]
        self.picture = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and is_of_a_step(logs):
            self.rows.append(finite(logs))
            if time.monotonic() - self.drawn >= self.every:
                self.draw(state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.draw(state)

    def draw(self, state) -> None:
        if not (state.is_world_process_zero and self.rows and is_in_notebook()):
            return
        from IPython.display import Image, display

        file = BytesIO()
        plot(self.rows, file)
        image = Image(data=file.getvalue(), format="png")
        if self.picture is None:
            self.picture = display(image, display_id=True)
        else:
            self.picture.update(image)
        self.drawn = time.monotonic()


def is_of_a_step(row: dict[str, Any]) -> bool:
    """And not of an evaluation."""
    return bool(panels_of([row]))
