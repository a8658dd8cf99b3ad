"""transformers' callbacks in our loops, evaluation on the way, runs that end early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import STARTS
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from rlhf_fast.trainer import InputError, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.run.folder import Run, read_metrics

EVENTS = (
    "init_end", "train_begin", "train_end", "step_begin", "step_end", "log", "evaluate", "save",
)  # fmt: skip


class Notes(TrainerCallback):
    """What was called, after which step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.given: dict[str, dict] = {}


def noted(event: str):
    def on_event(self, args, state, control, **kwargs):
        self.seen.append((event, state.global_step))
        self.given[event] = {"args": args, "state": state, **kwargs}

    return on_event


for event in EVENTS:
    setattr(Notes, f"on_{event}", noted(event))


class At(TrainerCallback):
    """Sets flags of the control at an event after a step."""

    def __init__(self, event: str, step: int, *flags: str) -> None:
        def on_event(args, state, control, **kwargs):
            if state.global_step == step:
                for flag in flags:
                    setattr(control, flag, True)

        setattr(self, f"on_{event}", on_event)


class Counter(TrainerCallback, ExportableState):
    """Counts steps over a restart."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self) -> dict:
        return {"args": {}, "attributes": {"count": self.count}}


@pytest.fixture
def config(configured) -> PPOConfig:
    return configured(steps=4, batch_size=8, epochs=1, max_new_tokens=4, eval_prompts=4)


def train(config: RunConfig, *callbacks: TrainerCallback) -> dict:
    return PPOTrainer(config=config, callbacks=callbacks).train()


def metrics(config: RunConfig) -> list[dict]:
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def evaluations(config: RunConfig) -> list[dict]:
    lines = (Path(config.output_dir) / "metrics" / "eval.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def completions(config: RunConfig) -> list[dict]:
    files = str(Path(config.output_dir) / "completions" / "*.parquet")
    return load_dataset("parquet", data_files=files, split="train").to_list()


def kept(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())


def test_events_that_never_come_are_named():
    """Of all that transformers has."""
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")
    there, never = page.split("Those that never come:")
    for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
        comes = event.removeprefix("on_") in EVENTS
        assert (f"`{event}`" in there, f"`{event}`" in never) == (comes, not comes), event


def test_every_event_comes_with_what_it_is_of(config):
    notes = Notes()
    train(replace(config, steps=3, save_every=2, eval_every=2), notes)
    step = ["step_begin", "step_end", "log"]
    assert [name for name, _ in notes.seen] == [
        "init_end", "train_begin", *step, *step, "log", "evaluate", "save",
        *step, "log", "evaluate", "save", "train_end",
    ]  # fmt: skip
    assert [at for name, at in notes.seen if name == "step_begin"] == [0, 1, 2]
    assert [at for name, at in notes.seen if name in ("evaluate", "save")] == [2, 2, 3, 3]
    begin, log, evaluate = (notes.given[name] for name in ("train_begin", "log", "evaluate"))
    assert begin["args"].max_steps == begin["state"].max_steps == 3
    assert begin["args"].output_dir == config.output_dir and begin["state"].is_world_process_zero
    assert begin["model"].get_output_embeddings() is not None and begin["processing_class"]
    assert begin["optimizer"].param_groups and begin["lr_scheduler"].get_last_lr()[0] == 3e-3
    names = {"eval_score", "eval_kl", "eval_length"}
    assert evaluate["metrics"].keys() == log["logs"].keys() - {"step"} == names
    assert [row["step"] for row in begin["state"].log_history] == [1, 2, 2, 3, 3]
    assert begin["state"].log_history[0]["objective/kl"] == metrics(config)[0]["objective/kl"]


@pytest.mark.parametrize("event", ["step_begin", "step_end", "log", "evaluate", "save"])
def test_the_run_ends_from_within(config, event):
    """Its model is there, and what it was ended with is kept."""
    step = 0 if event == "step_begin" else 1
    config = replace(config, eval_every=1, save_every=1 if event == "save" else 50)
    summary = train(config, At(event, step, "should_training_stop"))
    assert summary["ended_after_step"] == 1 and len(metrics(config)) == 1
    assert kept(config)[-1] == "step_1.pt" and (Path(config.output_dir) / "model").is_dir()


@pytest.mark.parametrize("event", ["step_end", "save"])
def test_a_run_that_was_ended_and_is_continued(config, event):
    """It has ended, until it is given another number of steps."""
    config = replace(config, save_every=1)
    summary = train(config, At(event, 1, "should_training_stop"))
    assert train(replace(config, resume=True)) == summary and kept(config) == ["step_1.pt"]
    (Path(config.output_dir) / "summary.json").unlink()  # as if killed before it
    assert train(replace(config, resume=True))["ended_after_step"] == 1
    train(replace(config, resume=True, steps=2))
    assert len(metrics(config)) == 2


@pytest.mark.parametrize("who", ["reward", "callback"])
def test_an_evaluation_that_fails_costs_no_step(config, reward, who):
    """What was learnt until then is saved, and the run goes on from it to the same numbers."""

    class Fails(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            raise RuntimeError("no more")

    whole = replace(config, steps=3, output_dir=config.output_dir + "_whole")
    train(whole)
    config = replace(config, steps=3, eval_every=2)
    if who == "reward":  # before, step 1, step 2: the fourth call is the evaluation's
        config.reward = [reward("fails_later")]
        file = Path(config.reward[0].split(":")[0])
        file.write_text(file.read_text().replace("calls == 6", "calls == 4"))
    with pytest.raises(InputError if who == "reward" else RuntimeError):
        train(config, *([Fails()] if who == "callback" else []))
    assert kept(config) == ["step_2.pt"]
    train(replace(config, resume=True, eval_every=None))
    assert [row["loss"] for row in metrics(config)] == [row["loss"] for row in metrics(whole)]


def test_saves_and_evaluates_from_within(config):
    notes, save = Notes(), At("log", 1, "should_save", "should_evaluate")
    train(replace(config, steps=2), notes, save)
    assert [x for x in notes.seen if x[0] in ("evaluate", "save")] == [
        ("evaluate", 1), ("save", 1), ("save", 2)]  # fmt: skip
    assert kept(config) == ["step_1.pt", "step_2.pt"]


def test_callbacks_of_transformers(config, capsys):
    train(replace(config, steps=1), PrinterCallback)
    assert "'objective/kl': '" in capsys.readouterr().out


def test_evaluations(config, reward):
    """The answers of after.json are the last one's; a mean and the samples of each."""
    config = replace(config, steps=2, eval_every=1, judge=reward("negative"))
    train(config)
    rows = evaluations(config)
    assert [row["step"] for row in rows] == [1, 2]
    after = json.loads((Path(config.output_dir) / "after.json").read_text())
    assert rows[1]["samples"] == after and len(after["answer"]) == 4
    assert rows[1]["eval_score"] == pytest.approx(sum(after["score"]) / 4)
    assert rows[1]["eval_judge"] == pytest.approx(-rows[1]["eval_score"])
    assert rows[1]["eval_length"] == pytest.approx(sum(after["length"]) / 4)
    assert rows[1]["eval_kl"] == pytest.approx(sum(after["kl"]) / 4)
    assert "eval.jsonl" not in str(metrics(config))


FALLING = """
calls = 0
SCORES = [0.0, 1.0, 3.0, 2.0, 2.5, 1.0, 1.0, 1.0]

def falling(prompts, completions, **columns):
    global calls
    if len(prompts) != 4:  # of a step
        return [float(i) for i in range(len(prompts))]
    calls += 1
    return [SCORES[calls - 1]] * 4
"""


@pytest.fixture
def falling(tmp_path, config):
    """A run whose evaluations are better, best, worse, …: SCORES, the first of them before it."""
    (tmp_path / "falling.py").write_text(FALLING)
    spec = f"{tmp_path / 'falling.py'}:falling"
    return replace(
        config, reward=[spec], eval_every=1, steps=5, save_every=9, save_total_limit=1,
        load_best_model_at_end=True,
    )  # fmt: skip


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    kept = torch.load(path, weights_only=True)["weights"]
    return {name: x for name, x in kept.items() if not name.startswith("value")}


def trained(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


def test_the_best_model_is_the_trained_one(falling):
    """Its checkpoint is kept whatever comes after it."""
    summary = train(falling)
    assert (summary["best_step"], summary["best_score"]) == (2, 3.0)
    assert kept(falling) == ["step_2.pt", "step_5.pt"]
    best = weights_of(Path(falling.output_dir) / "checkpoints" / "step_2.pt")
    saved = trained(falling)
    assert all(torch.equal(saved[name], x) for name, x in best.items() if name in saved)
    last = weights_of(Path(falling.output_dir) / "checkpoints" / "step_5.pt")
    assert not all(torch.equal(last[name], x) for name, x in best.items())


@pytest.mark.parametrize("stop", [{"early_stopping_patience": 2}, EarlyStoppingCallback(2)])
def test_early_stopping(falling, stop):
    given = [] if isinstance(stop, dict) else [stop]
    config = replace(falling, **(stop if not given else {}))
    summary = train(config, *given)
    assert summary["ended_after_step"] == 4 and summary["best_step"] == 2


def test_resume_keeps_counts_and_best(falling, monkeypatch):
    """Killed after a worse evaluation: patience, best score and a callback's own state go on."""
    config = replace(falling, early_stopping_patience=2, save_every=3, resume=True)

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    with pytest.raises(Killed):
        train(config, Counter(), Kill())
    assert kept(config) == ["step_2.pt", "step_3.pt"]
    file = Path(config.reward[0].split(":")[0])
    file.write_text(file.read_text().replace("calls = 0", "calls = 4"))  # its own state is its own
    counter = Counter()
    summary = train(config, counter)
    assert (summary["ended_after_step"], summary["best_step"], counter.count) == (4, 2, 4)
    assert [row["step"] for row in evaluations(config)] == [1, 2, 3, 4]
    best = weights_of(Path(config.output_dir) / "checkpoints" / "step_2.pt")
    saved = trained(config)
    assert all(torch.equal(saved[name], x) for name, x in best.items() if name in saved)


def test_evaluations_after_the_checkpoint_are_dropped(config, monkeypatch):
    """As metrics are: the steps are made again."""
    config = replace(config, steps=2, eval_every=1, save_every=1)
    train(config)
    folder = Path(config.output_dir)
    whole = evaluations(config)
    for name in ("summary.json", "checkpoints/step_2.pt"):
        (folder / name).unlink()
    train(replace(config, resume=True))
    assert evaluations(config) == whole and [row["step"] for row in whole] == [1, 2]
    assert [row["step"] for row in completions(config)] == [0] * 4 + [1] * 4 + [2] * 4
    Run(replace(config, resume=False, overwrite=True)).begin()
    assert not (folder / "metrics" / "eval.jsonl").exists()
    assert not list((folder / "completions").iterdir())


def test_evaluating_changes_no_number(config):
    config = replace(config, steps=2)
    train(config)
    other = replace(config, output_dir=config.output_dir + "_evaluated", eval_every=1)
    train(other)
    assert [row["loss"] for row in metrics(config)] == [row["loss"] for row in metrics(other)]


def test_stops_at_a_kl(config):
    config = replace(config, steps=50, learning_rate=3e-2, beta=0.0, stop_at_kl=0.5)
    summary = train(config)
    kls = [row["objective/kl"] for row in metrics(config)]
    assert summary["ended_after_step"] == len(kls) < 50
    assert kls[-1] > 0.5 and max(kls[:-1]) <= 0.5


def test_the_reward_trainer(tiny_policy_folder, tmp_path):
    rows = [{"chosen": f"{start} good", "rejected": f"{start} bad"} for start in STARTS * 2]
    config = RewardConfig(
        model=tiny_policy_folder, output_dir=tmp_path / "rm", eval_pairs=2, batch_size=2,
        learning_rate=1e-2, eval_every=2, metric_for_best_model="loss", device="cpu",
        load_best_model_at_end=True,
    )  # fmt: skip
    notes = Notes()
    summary = RewardTrainer(train_dataset=rows, config=config, callbacks=[notes]).train()
    assert [x for x in notes.seen if x[0] == "evaluate"] == [("evaluate", 2), ("evaluate", 4)]
    found = evaluations(config)
    assert found[1].keys() == {"step", "eval_accuracy", "eval_loss", "samples"}
    assert summary["best_loss"] == min(row["eval_loss"] for row in found)
    assert notes.given["evaluate"]["metrics"] == {
        "eval_accuracy": found[1]["eval_accuracy"], "eval_loss": found[1]["eval_loss"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "scroe"}, "scroe: expected one of score, judge, kl"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True needs evaluations"),
        ({"early_stopping_patience": 1}, "early_stopping_patience=1 needs evaluations"),
        ({"early_stopping_patience": 0, "eval_every": 1}, "early_stopping_patience=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"stop_at_kl": 0.0}, "stop_at_kl=0.0"),
    ],
)
def test_options_that_cannot_work(config, options, message):
    with pytest.raises(InputError, match=message):
        replace(config, **options)


def test_callbacks_that_cannot_work(config):
    class Unsaved(Counter):
        def state(self):
            return {"args": {}, "attributes": {"count": object()}}

    for given, options, message in (
        ([EarlyStoppingCallback()], {}, "EarlyStoppingCallback waits for evaluations: set"),
        ([], {"metric_for_best_model": "judge"}, "metric_for_best_model=judge: there is no judge"),
        ([Unsaved()], {"steps": 1}, "callbacks: the state of one cannot be saved"),
    ):
        with pytest.raises(InputError, match=message):
            train(replace(config, **options), *given)


def test_a_callback_may_change_what_it_is_given(config):
    class Empties(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logs.clear()

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics.clear()

    summary = train(replace(config, steps=1, eval_every=1, load_best_model_at_end=True), Empties())
    assert summary["best_score"] == summary["score_after"]


def test_a_checkpoint_of_before_there_were_callbacks(config):
    train(replace(config, steps=1))
    folder = Path(config.output_dir)
    file = folder / "checkpoints" / "step_1.pt"
    state = torch.load(file, weights_only=True)
    del state["callbacks"]
    torch.save(state, file)
    train(replace(config, steps=2, resume=True))
    assert [row["step"] for row in metrics(config)] == [1, 2]
