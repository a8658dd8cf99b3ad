"""examples/calculator in miniature: sums up to 4, less imitation, fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_fast.trainer.run.folder import read_metrics

TOKENS = "val/answer_tokens"
CALCULATOR = Path(__file__).parents[2] / "examples" / "calculator"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(CALCULATOR))
    import calculator
    import train_calculator

    return calculator, train_calculator


@pytest.mark.long
def test_the_policy_learns_to_ask(example, tmp_path, undrawn):
    _, train_calculator = example
    options = {"steps": 8, "eval_prompts": 9, "batch_size": 64, "epochs": 4}
    train_calculator.run(tmp_path, imitated=150, largest=2, **options)
    rows = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    scores, tokens = ([row[name] for row in rows] for name in ("objective/scores", TOKENS))
    assert sum(scores[-3:]) > sum(scores[:3]) + 0.3
    assert sum(tokens[-3:]) > sum(tokens[:3])  # a call is longer than a guess


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
