"""Files of a run that a disk, a copy or a hand has changed: one line that names the file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run import lock
from rlhf_fast.trainer.run.folder import Run
from rlhf_fast.trainer.schedule import Control

STEPS = (2, 4)


@pytest.fixture
def begin(tmp_path):
    """begin() -> (run, weights, optimizer, control): a run of 4 steps of a few weights."""

    def begin(**options):
        config = PPOConfig(
            model="m", data="d", reward="r", output_dir=str(tmp_path / "run"), resume=True,
            **options,
        )  # fmt: skip
        torch.manual_seed(0)
        weights = {"a": torch.randn(40, 30), "b": torch.randn(7)}
        for weight in weights.values():
            weight.requires_grad_()
        optimizer = torch.optim.AdamW(weights.values(), lr=0.1, fused=True)
        return Run(config), weights, optimizer, Control(config)

    run, weights, optimizer, control = begin()
    run.begin()
    for step in range(1, 5):
        sum(weight.square().sum() for weight in weights.values()).backward()
        optimizer.step()
        run.log({"step": step})
        if step in STEPS:
            run.save_checkpoint(step, weights, optimizer, control=control)
    yield begin
    lock.release()


def restore(begin) -> int:
    run, weights, optimizer, control = begin()
    return run.restore(weights, optimizer, control=control)


def refused(begin, words: str) -> None:
    """By one line with these words, before anything is loaded."""
    run, weights, optimizer, control = begin()
    before = [weight.detach().clone() for weight in weights.values()]
    with pytest.raises(InputError, match=words) as error:
        run.restore(weights, optimizer, control=control)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert all(map(torch.equal, before, weights.values())) and not optimizer.state


def file(begin, name: str) -> Path:
    return begin()[0].folder / name


def test_any_bit_of_a_checkpoint(begin):
    """It is refused, or the bit was one that means nothing: the numbers are the same."""
    path = file(begin, "checkpoints/step_4.pt")
    whole = path.read_bytes()

    def numbers():
        run, weights, optimizer, control = begin()
        assert run.restore(weights, optimizer, control=control) == 4
        moments = [m for state in optimizer.state.values() for m in state.values()]
        return [*weights.values(), *moments, torch.tensor(control.beta)]

    right, chance, caught = numbers(), random.Random(0), 0
    for _ in range(150):
        at = chance.randrange(len(whole))
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
        )
        try:
            assert all(map(torch.equal, numbers(), right)), at
        except InputError as error:
            assert "step_4.pt" in str(error) and "checkpoint of step 2" in str(error)
            assert "\n" not in str(error)
            caught += 1
    assert caught > 75  # 11 kB of numbers in a file of 16


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1])
def test_a_checkpoint_cut_short(begin, size):
    path = file(begin, "checkpoints/step_4.pt")
    path.write_bytes(path.read_bytes()[:size])
    refused(begin, "step_4.pt cannot be read: .*; without the file --resume .* of step 2")
    path.unlink()  # as it says
    assert restore(begin) == 2


def test_a_checkpoint_under_another_name(begin):
    path = file(begin, "checkpoints/step_4.pt")
    path.rename(path.with_name("step_3.pt"))
    refused(begin, "step_3.pt is the checkpoint of step 4 by its contents; .* of step 2")


def other_shape(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def one_moment_missing(state):
    del state["optimizer"]["state"][1]["exp_avg_sq"]


def moments_of_a_weight_missing(state):
    del state["optimizer"]["state"][1]


def no_moments(state):
    state["optimizer"]["state"] = {}


def no_optimizer(state):
    state["optimizer"] = None


def beta_is_nan(state):
    state["control"]["beta"] = float("nan")


def no_beta(state):
    del state["control"]["beta"]


def no_control(state):
    state["control"] = []


def another_weight(state):
    state["weights"]["a"] = torch.zeros(30, 40)


def no_weights(state):
    state["weights"] = 3


@pytest.mark.parametrize(
    "spoil",
    [
        other_shape, one_moment_missing, moments_of_a_weight_missing, no_moments, no_optimizer,
        beta_is_nan, no_beta, no_control, another_weight, no_weights,
    ],
)  # fmt: skip
def test_a_whole_checkpoint_of_wrong_contents(begin, spoil):
    path = file(begin, "checkpoints/step_4.pt")
    state = torch.load(path, weights_only=True)
    spoil(state)
    torch.save(state, path)
    refused(begin, "step_4.pt .*; without the file --resume goes on from .* step 2")


def test_the_first_checkpoint_has_none_before_it(begin):
    file(begin, "checkpoints/step_2.pt").unlink()
    file(begin, "checkpoints/step_4.pt").write_bytes(b"x")
    refused(begin, "step_4.pt cannot be .*; there is none before it: begin again with --overwrite")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": 1}\nnull\n', "line 2 is not a step's: .* got null"),
        ('{"step": 1}\n{"kl": 2}\n', "line 2 is not a step's"),
        ('{"step": "1"}\n', "line 1 is not a step's"),
        ('{"step": 1, "kl": "high"}\n', "line 1 is not a step's"),
        ("[]\n", "line 1 is not a step's"),
        ('{"step": 1}\n{"st\n{"step": 3}\n', "line 2 cannot be read"),
        ('{"step": 1}\n\n', "line 2 cannot be read"),
        ("\x00" * 30 + "\n", "line 1 cannot be read"),
        ("", "is whole to step 0 only, .* of step 4.* no checkpoint is as early"),
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', "is whole to step 3 .* that of step 2"),
        ('{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 4}\n', "whole to step 2 .* of step 2"),
        ('{"step": 2}\n{"step": 3}\n{"step": 4}\n', "is whole to step 0"),
    ],
)
def test_metrics(begin, text, words):
    file(begin, "metrics.jsonl").write_text(text)
    refused(begin, f"metrics.jsonl.*{words}")


def test_metrics_that_are_no_text(begin):
    file(begin, "metrics.jsonl").write_bytes(b"\xff\xfe{}\n")
    refused(begin, "metrics.jsonl cannot be read: 'utf-8' codec")


COLUMNS = ("prompt", "answer", "score", "kl")
TABLE = {"prompt": ["p"], "answer": ["a"], "score": [1.0], "kl": [0.5]}


@pytest.mark.parametrize(
    "value",
    [
        {}, [], None, 3, {"prompt": ["p"]}, TABLE | {"score": []}, TABLE | {"score": ["high"]},
        TABLE | {"kl": None}, TABLE | {"judge": ["low"]},
    ],
    ids=str,
)  # fmt: skip
def test_answers_before_training(begin, value):
    run = begin()[0]
    path = run.folder / "before.json"
    path.write_text(json.dumps(TABLE))
    assert run.load("before.json", COLUMNS) == TABLE
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match="before.json cannot be read: .*; without the file"):
        run.load("before.json", COLUMNS)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '"x"', "\x00\x00"])
def test_a_summary(begin, text):
    file(begin, "summary.json").write_text(text)
    with pytest.raises(InputError, match="summary.json cannot be read: .*--resume makes it again"):
        begin()


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "NoneType"), ("{}", "has no model"), ("model: m\n", "has no data"), ("\x00", "special")],
)
def test_a_config(begin, text, words):
    file(begin, "config.yaml").write_text(text)
    with pytest.raises(InputError, match=f"config.yaml .*{words}"):
        begin()
