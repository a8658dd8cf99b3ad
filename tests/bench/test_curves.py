"""bench/curves.py: both trainers get one reward, and what it says of the two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import curves  # noqa: E402

SCORES, KL = curves.COLUMNS


def test_one_reward_for_both(tiny_tokenizer):
    """TRL reads the score where the last token is, behind a prompt that is padded on the left."""
    prompts, answers = ["the film", "plot"], [" is good good", " was bad film"]
    expected = curves.score(prompts, answers)
    assert expected[0] > 0 > expected[1]
    rows = [tiny_tokenizer(p + a).input_ids for p, a in zip(prompts, answers, strict=True)]
    ids = torch.tensor([rows[0], [0, *rows[1]]])
    scoring = curves.Scoring(tiny_tokenizer)
    hidden = scoring.body(input_ids=ids, attention_mask=ids != 0, use_cache=False).hidden_states
    assert scoring.score(hidden[-1])[:, -1, 0].tolist() == pytest.approx(expected)


def test_the_same_until_another_token_is_drawn(tmp_path):
    ours = {SCORES: [0.1, 0.2, 0.3, 0.5], KL: [0.0, 0.1, 0.5, 0.6]}
    theirs = {SCORES: [0.1, 0.2, 0.4, 0.5], KL: [0.0, 0.1001, 0.2, 0.6]}
    found = curves.compare(ours, theirs)
    nearest = found.pop("largest_difference_till_then")
    assert nearest == pytest.approx({SCORES: 0.0, KL: 1e-4})
    assert found == {"steps": 4, "together": 2}
    curves.plot({"ours": [ours], "TRL": [theirs]}, [0], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_our_order_is_the_trainers():
    rows = [{"prompt": str(i)} for i in range(20)]
    setting = curves.Setting(steps=3, batch_size=4)
    order = [row["prompt"] for row in curves.in_our_order(rows, setting, seed=1)]
    assert len(order) == len(set(order)) == 12 and "0" not in order
    assert order != [row["prompt"] for row in curves.in_our_order(rows, setting, seed=2)]
