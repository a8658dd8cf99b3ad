"""examples/library.ipynb: its cells run one after the other, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_fast.trainer import LivePlot

ROOT = Path(__file__).parents[2]


def test_the_cells_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rlhf_fast.trainer.ppo.plot", lambda rows, path: path.touch())
    drawn: list[int] = []
    monkeypatch.setattr(LivePlot, "draw", lambda plot, state: drawn.append(len(plot.rows)))
    notebook = json.loads((ROOT / "examples" / "library.ipynb").read_text(encoding="utf-8"))
    session: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), session)
    assert session["summary"]["score_after"] > session["summary"]["score_before"] + 0.3
    assert len(session["rows"]) == 12 and drawn[-1] == 12
    said = capsys.readouterr().out
    assert "step  0: 0.00" in said and "step 12: " in said
    assert "the film was" in said.splitlines()[-1]
