import json
import math
import random
from pathlib import Path

import pytest
import torch

from rlhf_fast.config import InputError, RewardConfig
from rlhf_fast.data import batch_indices
from rlhf_fast.models import load_reward_model, score_texts
from rlhf_fast.reward import similar_lengths, train
from rlhf_fast.run import Run, read_metrics


@pytest.fixture
def pairs(write_jsonl):
    """Texts of different lengths; the preferred one says "good" somewhere, the other "bad"."""
    rnd = random.Random(0)

    def text(word: str) -> str:
        words = rnd.choices(["the", "a", "film", "plot", "is", "was"], k=rnd.randint(2, 6))
        words.insert(rnd.randint(0, len(words)), word)
        return " ".join(words)

    return write_jsonl([{"chosen": text("good"), "rejected": text("bad")} for _ in range(160)])


@pytest.fixture
def configured(pairs, tiny_policy_folder, tmp_path):
    def make(output: str = "out", **options) -> RewardConfig:
        defaults = {
            "model": tiny_policy_folder, "data": pairs, "learning_rate": 3e-3, "eval_pairs": 40,
            "batch_size": 8, "device": "cpu",
        }  # fmt: skip
        return RewardConfig(**(defaults | {"output_dir": str(tmp_path / output)} | options))

    return make


def losses(config: RewardConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(config.output_dir) / "metrics.jsonl")]


@pytest.mark.parametrize("layers", [None, 2])
def test_learns_the_preference(configured, layers, tiny_tokenizer):
    config = configured(trainable_layers=layers, epochs=3)
    summary = train(config)
    assert summary["accuracy"] > 0.95
    assert losses(config)[0] > 0.4 > losses(config)[-1]  # near ln 2 at first

    model, tokenizer = load_reward_model(
        str(Path(config.output_dir) / "model"), field="reward", device=torch.device("cpu")
    )
    good, bad = score_texts(model, tokenizer(["the film is good", "the film is bad"])["input_ids"])
    assert good > bad + 0.5


def test_scores_of_held_out_texts_are_normalised(configured, write_jsonl, pairs):
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()][:30]
    config = configured(eval_data=write_jsonl(rows, "eval.jsonl"), eval_pairs=None)
    summary = train(config)
    folder = Path(config.output_dir) / "model"
    stored = json.loads((folder / "config.json").read_text())
    assert stored["score_mean"] == pytest.approx(summary["score_mean"])
    model, tokenizer = load_reward_model(str(folder), field="x", device=torch.device("cpu"))
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    scores = score_texts(model, tokenizer(texts)["input_ids"])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)


def test_micro_batches_change_nothing(configured):
    whole, cut = configured("whole", max_rows=60, eval_pairs=20), None
    cut = configured("cut", max_rows=60, eval_pairs=20, micro_batch_size=3)
    train(whole), train(cut)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


def test_margin_and_centring_enter_the_loss(configured, write_jsonl, pairs):
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    margins = write_jsonl([row | {"margin": 5.0} for row in rows], "margins.jsonl")
    plain = configured("plain", max_rows=60)
    wide = configured("wide", max_rows=60, data=margins)
    centred = configured("centred", max_rows=60, center_coef=1.0)
    for config in (plain, wide, centred):
        train(config)
    assert losses(wide)[0] > 3.5 > losses(plain)[0]  # −log σ(−5) ≈ 5
    assert losses(centred)[0] > losses(plain)[0]


@pytest.mark.parametrize("stop_at", [3, 7])
def test_resumed_run_gives_the_same_numbers(configured, monkeypatch, stop_at):
    unbroken, broken = configured("unbroken", save_every=3), configured("broken", save_every=3)
    train(unbroken)

    log = Run.log

    def dies(self, row):
        log(self, row)
        if row["step"] == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.setattr(Run, "log", log)
    broken.resume = True
    train(broken)
    assert losses(broken) == losses(unbroken)
    weights = [
        Path(c.output_dir, "model/model.safetensors").read_bytes() for c in (unbroken, broken)
    ]
    assert weights[0] == weights[1]


def test_too_few_pairs(configured):
    with pytest.raises(InputError, match="has 5 pairs: too few to hold out 5"):
        train(configured(max_rows=5, eval_pairs=5))


def test_diverged_training_is_not_saved(configured):
    config = configured(learning_rate=1e30)
    with pytest.raises(InputError, match=r"learning_rate=1e\+30"):
        train(config)
    assert not Path(config.output_dir, "model").exists()


@pytest.mark.parametrize("size", [100, 64, 10])
def test_batches_alike_in_length_cover_what_random_ones_do(size):
    lengths = [(7 * i) % 31 for i in range(size)]
    batches = [similar_lengths(lengths, 4, step, seed=2) for step in range(8)]
    drawn = sorted(i for batch in batches for i in batch)
    assert drawn == sorted(batch_indices(size, 32, 0, seed=2))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert max(spread) < 15 and not math.isclose(sum(spread), 0)
