"""examples/demo/prepare.py: what the reward model learns from, and what the policy is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_fast.trainer.config import PPOConfig, RewardConfig
from rlhf_fast.trainer.flags import parse

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(DEMO))
    import prepare

    return prepare


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("boisterous , heartfelt comedy .", "Boisterous, heartfelt comedy."),
        ("it's dull . . . and i don't care .", "It's dull... And I don't care."),
        ("who won ? ( she did , 100 % ) fine !", "Who won? (she did, 100%) fine!"),
        ("the result is an 'action film' .", "The result is an 'action film'."),
    ],
)
def test_natural(prepare, text, expected):
    assert prepare.natural(text) == expected


def test_fragments_are_beginnings_of_both_kinds_at_lengths_of_their_own(
    prepare, monkeypatch, tmp_path
):
    reviews = [(" ".join(f"{'bg'[label]}{i}" for i in range(30)), label) for label in (0, 1)] * 100
    reviews.append(("short .", 1))
    monkeypatch.setattr(prepare, "read_reviews", lambda: {"rotten_tomatoes": reviews})
    prepare.write_fragments(tmp_path / "f.jsonl")
    rows = read(tmp_path / "f.jsonl")
    assert len(rows) == 100  # the 101st liked one has no other to be preferred to
    for side, first in (("chosen", "G0"), ("rejected", "B0")):
        words = [row[side].split() for row in rows]
        assert all(
            w == [first, *(f"{first[0].lower()}{i}" for i in range(1, len(w)))] for w in words
        )
        assert {len(w) for w in words} == set(range(8, 21))
    assert any(len(r["chosen"].split()) != len(r["rejected"].split()) for r in rows)


def test_openings_are_the_first_words_of_reviews_that_name_a_film(prepare, monkeypatch, tmp_path):
    texts = [
        "This movie was shot in a week.",
        "this movie was shot in Rome",
        "This movie was shot in 1999",  # the same five words again
        "I like old FILMS a lot",
        "I filmed a wedding once there",  # no film
        "A film. It is long and dull",  # a sentence ends
        "After a big tip of the hat",
    ]
    monkeypatch.setattr(prepare, "read_reviews", lambda: {"imdb": [(text, 1) for text in texts]})
    prepare.write_openings(tmp_path / "o.jsonl")
    prompts = [row["prompt"] for row in read(tmp_path / "o.jsonl")]
    assert prompts == [
        "This movie was shot in", "this movie was shot in", "I like old FILMS a"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "config"), [("reward.yaml", RewardConfig), ("ppo.yaml", PPOConfig)]
)
def test_the_demos_configs_are_valid(file, config):
    needed = ["--model", "m", "--data", "d", "--output_dir", "o"]
    needed += ["--reward", "r"] if config is PPOConfig else []
    parsed = parse(config, ["--config", str(DEMO / file), *needed], prog="rlhf-fast")
    assert parsed.trainable_layers == 4
