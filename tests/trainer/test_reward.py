import json
import math
import random
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import trl
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from rlhf_fast.trainer import reward
from rlhf_fast.trainer.config import RewardConfig
from rlhf_fast.trainer.data.rows import Pair, preference_pairs
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.reward_model import load_reward_model, new_reward_model, score_texts
from rlhf_fast.trainer.models.tokenizer import load_tokenizer
from rlhf_fast.trainer.reward import (
    batch_loss,
    hold_out,
    load_pairs,
    score_rows,
    similar_lengths,
    steps_of_a_pass,
    train,
)
from rlhf_fast.trainer.run.folder import Run, read_metrics


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


def test_micro_batches_change_nothing_but_how_much_is_held(configured, monkeypatch):
    sizes: list[int] = []

    def spied(score, pairs, **options):
        sizes.append(len(pairs))
        return batch_loss(score, pairs, **options)

    monkeypatch.setattr(reward, "batch_loss", spied)
    whole = configured("whole", max_rows=60, eval_pairs=20)
    cut = configured("cut", max_rows=60, eval_pairs=20, micro_batch_size=3)
    train(whole)
    assert sizes == [8] * 5
    sizes.clear()
    train(cut)
    assert sizes == [3, 3, 2] * 5
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize(("max_grad_norm", "moves"), [(1.0, True), (1e-12, False)])
def test_gradients_are_clipped(configured, tiny_tokenizer, max_grad_norm, moves):
    """Far below Adam's epsilon nothing is left of them."""
    config = configured(max_rows=48, max_grad_norm=max_grad_norm)
    before = new_reward_model(
        config.model, tiny_tokenizer, trainable_layers=None, seed=config.seed, device="cpu"
    )
    train(config)
    after, _ = load_reward_model(
        str(Path(config.output_dir) / "model"), field="x", device=torch.device("cpu")
    )
    moved = (after.score.weight - before.score.weight).abs().max()
    assert (moved > 1e-3) if moves else (moved < 1e-6)


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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`")
@pytest.mark.parametrize("center_coef", [0.0, 0.3])
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("kind", ["text", "conversation", "conversation with prompt"])
def test_loss_is_trls(kind, margins, center_coef, tiny_policy_folder, tmp_path):
    """Same rows, same batch: the same tokens, loss and gradients as trl's RewardTrainer."""

    def row(i: int) -> dict:
        prompt, good, bad = "the film " * (i + 1), "is good " * (3 - i), "was very bad"
        found = {"margin": 0.7 * i} if margins else {}
        if kind == "text":  # trl puts an eos behind text, and none behind one that is there
            return found | {"chosen": f"{prompt}{good}<eos>", "rejected": f"{prompt}{bad}<eos>"}
        asked = [{"role": "user", "content": prompt}]
        sides = {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", good), ("rejected", bad))
        }
        if kind == "conversation":
            return found | {name: asked + answer for name, answer in sides.items()}
        return found | {"prompt": asked} | sides

    rows = datasets.Dataset.from_list([row(i) for i in range(3)])
    device = torch.device("cpu")
    tokenizer = load_tokenizer(tiny_policy_folder, field="model")
    model = new_reward_model(
        tiny_policy_folder, tokenizer, trainable_layers=None, seed=0, device=device
    )
    trainer = trl.RewardTrainer(
        model, processing_class=tokenizer, train_dataset=rows,
        args=trl.RewardConfig(
            output_dir=str(tmp_path), center_rewards_coefficient=center_coef or None,
            use_cpu=True, bf16=False, report_to=[],
        ),
    )  # fmt: skip
    examples = list(trainer.train_dataset)
    pairs = preference_pairs(rows, tokenizer, source="d", max_tokens=64)
    for pair, example in zip(pairs, examples, strict=True):
        assert (pair.chosen, pair.rejected) == (example["chosen_ids"], example["rejected_ids"])

    def gradients(loss) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = trainer.compute_loss(model, trainer.data_collator(examples))
    loss, stats = batch_loss(partial(score_rows, model), pairs, center_coef=center_coef)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert stats.accuracy.item() == pytest.approx(trainer._metrics["eval"]["accuracy"][0])
    theirs, ours = gradients(expected), gradients(loss)
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-6 * scale, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0, 0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1, 1]),
        ("cosine", [0, 0.5, *((1 + math.cos(math.pi * i / 5)) / 2 for i in range(5))]),
    ],
)
def test_course_of_the_step_size(configured, name, expected):
    config = configured(
        max_rows=36, eval_pairs=8, batch_size=4, lr_scheduler_type=name, warmup_steps=2
    )
    train(config)
    rates = [row["lr"] for row in read_metrics(Path(config.output_dir) / "metrics.jsonl")]
    assert rates == pytest.approx([3e-3 * rate for rate in expected])


def test_warm_up_without_end(configured):
    with pytest.raises(InputError, match="warmup_steps=9, but the 28 pairs give 7 steps"):
        train(configured(max_rows=36, eval_pairs=8, batch_size=4, warmup_steps=9))


def test_split_of_its_own_for_held_out_pairs(configured, pairs, tmp_path):
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    swapped = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:30]]
    made = {"train": rows, "test": swapped}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in made.items()}).save_to_disk(
        tmp_path / "splits"
    )
    splits = str(tmp_path / "splits")
    config = configured(data=splits, eval_split="test", eval_pairs=None, epochs=3)
    assert train(config)["accuracy"] < 0.1  # learnt from train, judged by test
    tokenizer = load_tokenizer(config.model, field="model")
    other = configured(eval_data=splits, eval_split="test", eval_pairs=None)
    learnt, held_out = load_pairs(other, tokenizer)
    assert (len(learnt), len(held_out)) == (160, 30)


def test_a_reward_model_is_trained_further(configured, write_jsonl, pairs):
    """From its own head and raw scores; the old normalisation is not normalised again."""
    first = configured("first", epochs=3)
    train(first)
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()][:40]
    second = configured(
        "second", model=str(Path(first.output_dir) / "model"), learning_rate=1e-9,
        eval_data=write_jsonl(rows, "eval.jsonl"), eval_pairs=None, max_rows=40,
    )  # fmt: skip
    assert train(second)["accuracy"] > 0.95
    model, tokenizer = load_reward_model(
        str(Path(second.output_dir) / "model"), field="x", device=torch.device("cpu")
    )
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    scores = score_texts(model, tokenizer(texts)["input_ids"])
    assert (scores.mean().item(), scores.std().item()) == pytest.approx((0, 1), abs=1e-4)


@pytest.fixture
def frozen_passes(monkeypatch) -> list[int]:
    """Grows by the number of texts whenever the frozen layers run."""
    passes: list[int] = []
    run = LlamaDecoderLayer.forward

    def counted(self, hidden, *args, **kwargs):
        if self.self_attn.layer_idx == 0:
            passes.append(len(hidden))
        return run(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return passes


def test_frozen_layers_run_once(configured, frozen_passes):
    options = {"trainable_layers": 1, "epochs": 3, "max_rows": 72}
    again = configured("again", trunk_cache_mib=0, **options)
    once = configured("once", **options)
    train(again)
    assert sum(frozen_passes) == 3 * 2 * 32 + 2 * 40  # epochs of pairs, and the held-out pairs
    frozen_passes.clear()
    train(once)
    distinct = sum(frozen_passes) - 2 * 40 - 2  # less the two that try whether it works
    assert 60 <= distinct <= 2 * 32
    assert losses(once) == pytest.approx(losses(again), rel=1e-4)
    assert losses(once)[-1] < losses(once)[0] / 2


def test_frozen_layers_that_cannot_be_cut_off_run_every_time(configured, monkeypatch):
    """Models that scale what they embed would scale cached states as well."""
    run = LlamaModel.forward

    def scaled(self, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return run(self, inputs_embeds=2 * embeds, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    options = {"trainable_layers": 1, "epochs": 2, "max_rows": 56}
    runs = [configured(f"{mib}", trunk_cache_mib=mib, **options) for mib in (0, 64)]
    for config in runs:
        train(config)
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize(("stop_at", "options"), [
    (3, {}), (7, {}), (7, {"trainable_layers": 1, "epochs": 2}),
])  # fmt: skip
def test_resumed_run_gives_the_same_numbers(configured, monkeypatch, stop_at, options):
    options |= {"save_every": 3}
    unbroken, broken = configured("unbroken", **options), configured("broken", **options)
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


def test_a_run_is_made_longer(configured):
    options = {"max_rows": 60, "eval_pairs": 20, "lr_scheduler_type": "constant_with_warmup"}
    whole, longer = configured("whole", epochs=2, **options), configured("longer", **options)
    train(whole), train(longer)
    longer.resume, longer.epochs = True, 2
    summary = train(longer)
    assert len(losses(longer)) == 10 and losses(longer) == losses(whole)
    assert train(longer) == summary


def test_texts_longer_than_the_model_reads(configured, write_jsonl):
    rows = [{"chosen": "good " * (120 + i), "rejected": "bad"} for i in range(10)]
    config = configured(data=write_jsonl(rows, "long.jsonl"), max_tokens=512, eval_pairs=2)
    with pytest.raises(InputError, match="at most 128 tokens, .* text has 129: lower max_tokens=5"):
        train(config)


def test_too_few_pairs(configured):
    with pytest.raises(InputError, match="has 5 pairs: too few to hold out 5"):
        train(configured(max_rows=5, eval_pairs=5))


def test_diverged_training_is_not_saved(configured):
    config = configured(learning_rate=1e30, max_skipped_updates=99)
    with pytest.raises(InputError, match=r"learning_rate=1e\+30"):
        train(config)
    assert not Path(config.output_dir, "model").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_without_updates_stops_with_the_batch(configured, monkeypatch, what):
    healthy, calls = reward.batch_loss, 0

    def bad(*arguments, **options):
        nonlocal calls
        calls += 1
        loss, stats = healthy(*arguments, **options)
        if calls in (2, 5, 6, 7):  # one alone is skipped, three in a row end the run
            loss = loss + torch.inf if what == "loss" else loss * torch.nan
        return loss, stats

    monkeypatch.setattr(reward, "batch_loss", bad)
    config = configured(save_every=1, max_skipped_updates=3)
    with pytest.raises(InputError, match="step 7: 3 updates in a row .*checkpoint is that of st"):
        train(config)
    folder = Path(config.output_dir)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 0, 1, 1]
    dump = torch.load(folder / "bad_batch.pt", weights_only=True)
    assert dump["step"] == 7 and len(dump["chosen"]) == len(dump["rejected"]) == 8
    states = [
        torch.load(folder / "checkpoints" / f"step_{step}.pt", weights_only=True) for step in (5, 6)
    ]
    assert [state["updates"]["skipped_in_a_row"] for state in states] == [1, 2]
    for name, weight in states[1]["weights"].items():
        assert torch.isfinite(weight).all() and torch.equal(weight, states[0]["weights"][name])

    calls = 7  # the loss is sound from here on: the run goes on from its last step
    config.resume = True
    assert train(config)["accuracy"] > 0.4
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [*range(1, 16)]


def test_trackers(configured):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured(max_rows=56, report_to="tensorboard")
    train(config)
    events = EventAccumulator(str(Path(config.output_dir) / "rlhf_fast"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(config), rel=1e-6)


@pytest.mark.parametrize(("size", "batch_size"), [(100, 4), (64, 8), (10, 4), (90, 16), (3, 8)])
def test_a_pass_has_every_pair_once(size, batch_size):
    lengths = [(7 * i) % 31 for i in range(size)]
    steps = steps_of_a_pass(size, batch_size)
    passes = [
        [
            similar_lengths(lengths, batch_size, epoch * steps + step, seed=2)
            for step in range(steps)
        ]
        for epoch in range(3)
    ]
    for batches in passes:
        assert sorted(i for batch in batches for i in batch) == list(range(size))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert size < 4 or passes[0] != passes[1]  # shuffled anew


def test_batches_are_alike_in_length():
    lengths = [(7 * i) % 31 for i in range(96)]
    batches = [similar_lengths(lengths, 4, step, seed=2) for step in range(24)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 6  # of random batches 19
    assert batches != sorted(batches, key=lambda b: lengths[b[0]])  # not from short to long


def of_prompts(counts):
    pairs = [Pair([i], [j], 0.0, asked=str(i)) for i, n in enumerate(counts) for j in range(n)]
    random.Random(0).shuffle(pairs)
    return pairs


@pytest.mark.parametrize("counts", [[4] * 10, [1] * 8 + [5], [3, 3, 3], [1, 20]])
def test_held_out_pairs_answer_prompts_of_their_own(counts, capsys):
    pairs = of_prompts(counts)
    learnt, held_out = hold_out(pairs, 4)
    assert {p.asked for p in learnt}.isdisjoint(p.asked for p in held_out)
    assert len(learnt) + len(held_out) == len(pairs) and len(held_out) >= 4
    assert not capsys.readouterr().out


def test_pairs_of_one_prompt_cannot_be_kept_apart(capsys):
    learnt, held_out = hold_out(of_prompts([12]), 4)
    assert (len(learnt), len(held_out)) == (8, 4)
    assert "have the same prompt" in " ".join(capsys.readouterr().out.split())


def test_held_out_pairs_that_are_trained_on_are_said(configured, capsys):
    config = configured(split="train[:40]", eval_split="train[30:60]")
    load_pairs(config, load_tokenizer(config.model, field="model"))
    assert "10 of the 30 held-out pairs are duplicates" in " ".join(capsys.readouterr().out.split())


def test_an_epoch_is_a_pass(configured):
    config = configured(max_rows=27, eval_pairs=5, batch_size=4, epochs=2)
    train(config)
    assert len(losses(config)) == 2 * 6  # 22 pairs, of which 20 were seen
