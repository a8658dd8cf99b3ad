"""examples/calculator in miniature: sums up to 4, less imitation, fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CALCULATOR = Path(__file__).parents[2] / "examples" / "calculator"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(CALCULATOR))
    import calculator
    import run

    return calculator, run


def test_the_policy_learns_to_ask(example, tmp_path, undrawn):
    _, run = example
    options = {"steps": 8, "eval_prompts": 9, "batch_size": 32, "max_turns": 2}
    summary = run.run(tmp_path, imitated=150, largest=2, **options)
    answers = [
        json.loads((tmp_path / "ppo" / f"{x}.json").read_text()) for x in ("before", "after")
    ]
    asked = [sum("tool:" in text for text in side["answer"]) for side in answers]
    print(summary, asked)
    assert asked[1] > asked[0] and summary["score_rise"] > 0.1


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ("calc 7 + 8", ("15", 0.0, False)),
        ("answer 15", ("", 1.0, True)),
        ("answer 14", ("", 0.0, True)),
        ("answer", ("", -0.1, True)),
        ("calc 7 + 8 9", ("", -0.1, True)),
    ],
)
def test_what_the_calculator_says(example, said, result):
    environment = example[0].Calculator()
    environment.reset([], total=15)
    assert environment.step([{"role": "assistant", "content": said}]) == result
