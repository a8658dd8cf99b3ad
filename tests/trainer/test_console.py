"""What a run prints fits a terminal of 80 columns."""

from __future__ import annotations

import pytest
from rich.console import Console

from rlhf_fast.trainer.run import console

PROMPTS = ["This movie was one of those", "I have to say that this film"]
ANSWERS = [
    "that I have watched again and again since it came out in the cinemas, all wonderful",
    "donaudampfschifffahrtsgesellschaftskapitänswitwe is a word that is not cut",
]


def printed(table, width: int = 80) -> list[str]:
    shown = Console(width=width, force_terminal=False)
    with shown.capture() as capture:
        shown.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("judged", [False, True])
def test_tables_of_answers_fit_80_columns(judged):
    side = {"prompt": PROMPTS, "answer": ANSWERS, "score": [-10.26, 1.0]}
    if judged:
        side["judge"] = [0.25, -0.5]
    tables = [
        console.answers_table(side, dict(side)),
        console.samples_table(PROMPTS, ANSWERS, [1, 2]),
    ]
    for table, times in zip(tables, (2, 1), strict=True):
        lines = printed(table)
        text = "".join("".join(line.split("│")[-2 - judged - 1 :]) for line in lines)
        assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
        words = [word for answer in ANSWERS for word in answer.split() if len(word) < 20]
        assert all(text.count(word) >= times for word in words)  # none is broken
        assert len(lines) <= 5 + 5 * times * len(ANSWERS)  # nor does one stand alone on a line


def test_a_step_fits_80_columns(monkeypatch):
    row = {"objective/scores": -10.26, "objective/kl": 12.5, "objective/judge": 0.36,
           "perf/tokens_per_second": 1153.0, "perf/seconds": 16.9}  # fmt: skip
    line = console.summary_line(row)
    narrow = Console(width=80, force_terminal=True, _environ={"TERM": "xterm"})
    monkeypatch.setattr(console, "console", narrow)
    with narrow.capture() as capture, console.progress_bar("ppo", 200, 24) as bar:
        bar.show(line)
        bar.progress.refresh()
    assert line in capture.get()
