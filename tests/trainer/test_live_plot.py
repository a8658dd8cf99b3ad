"""The plot that grows in a notebook, with a notebook that is pretended."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from recorded import ppo_rows

from rlhf_fast.trainer import LivePlot, live_plot
from rlhf_fast.trainer.run.plot import plot


class Display:
    """IPython's, as far as it is used: what is shown where, in order."""

    def __init__(self) -> None:
        self.shown: list[bytes] = []
        self.updates = 0

    def display(self, image, display_id):
        assert display_id is True
        self.shown.append(image)
        return self

    def update(self, image):
        self.updates += 1
        self.shown[-1] = image


@pytest.fixture
def notebook(monkeypatch) -> Display:
    display = Display()
    module = SimpleNamespace(display=display.display, Image=lambda data, format: data)
    whole = SimpleNamespace(display=module, version_info=(9, 0))  # which matplotlib reads
    monkeypatch.setitem(sys.modules, "IPython", whole)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(live_plot, "is_in_notebook", lambda: True)
    monkeypatch.setattr(live_plot, "plot", lambda rows, file: file.write(b"%d rows" % len(rows)))
    return display


def state(main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(is_world_process_zero=main, log_history=[])


def trained(live: LivePlot, rows: list[dict], of: SimpleNamespace) -> None:
    live.on_train_begin(None, of, None)
    for row in rows:
        live.on_log(None, of, None, logs=row)
        live.on_log(None, of, None, logs={"step": row["step"], "eval_score": 1.0})
    live.on_train_end(None, of, None)


def test_one_picture_that_is_drawn_anew(notebook):
    live = LivePlot(every=0)
    trained(live, ppo_rows(2), state())
    assert len(notebook.shown) == 1 and notebook.updates == 2  # a step more, and the end
    assert notebook.shown == [b"2 rows"]
    assert [row["step"] for row in live.rows] == [1, 2]
    trained(live, ppo_rows(1), state())  # another cell
    assert len(notebook.shown) == 2


def test_the_picture(notebook, monkeypatch):
    monkeypatch.setattr(live_plot, "plot", plot)
    trained(LivePlot(every=1e6), ppo_rows(1), state())
    assert notebook.shown[0].startswith(b"\x89PNG")


def test_no_faster_than_it_is_looked_at(notebook):
    trained(LivePlot(every=1e6), ppo_rows(3), state())
    assert len(notebook.shown) == 1 and notebook.updates <= 1  # and the end


def test_a_resumed_run_has_its_first_steps(notebook):
    live, of = LivePlot(), state()
    of.log_history = [*ppo_rows(3), {"step": 3, "eval_kl": 1.0}]
    live.on_train_begin(None, of, None)
    assert [row["step"] for row in live.rows] == [1, 2, 3]


@pytest.mark.parametrize("why", ["no notebook", "not the main process"])
def test_nothing_is_drawn(notebook, monkeypatch, why):
    monkeypatch.setattr(live_plot, "is_in_notebook", lambda: why != "no notebook")
    trained(LivePlot(every=0), ppo_rows(2), state(main=why == "no notebook"))
    assert not notebook.shown
