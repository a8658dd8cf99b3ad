"""Rollout engines: all are put through the same, and what a run does with them."""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.conformance import check_engine
from rlhf_fast.trainer.data.rows import pad
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.flags import parse
from rlhf_fast.trainer.models.lora import LoRA
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout import engine as engine_module
from rlhf_fast.trainer.rollout.continuous import TransformersEngine
from rlhf_fast.trainer.rollout.engine import FunctionEngine, ask, check_answers, engine_options
from rlhf_fast.trainer.rollout.protocol import Completions, Sampling
from rlhf_fast.trainer.rollout.sample import EmbeddedEngine, sample
from rlhf_fast.trainer.run.folder import read_metrics

CPU = torch.device("cpu")


@pytest.fixture
def policy(tiny_policy_folder):
    return load_policy(tiny_policy_folder, trainable_layers=None, device=CPU)


MAKERS = {
    "embedded": EmbeddedEngine,
    "function": lambda policy: FunctionEngine(policy, sample),
    "transformers": lambda policy: TransformersEngine(policy.model, policy.tokenizer),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MAKERS)
def test_conformance(policy, name):
    check_engine(lambda: MAKERS[name](policy), policy.model, gap=1e-4)


class Wrong(EmbeddedEngine):
    """Ours with a mistake."""

    def __init__(self, policy, spoil=lambda done: done):
        super().__init__(policy)
        self.spoil = spoil

    def draw(self, *arguments):
        return self.spoil(super().draw(*arguments))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda done: done._replace(support=None), "what it was drawn among is not said"),
        (lambda done: done._replace(logp=done.logp - 0.01), "log-probs are off by 0.01"),
        (lambda done: done._replace(tokens=done.tokens.roll(1, 1)), "is not the model's"),
    ],
)
def test_mistakes_that_conformance_finds(policy, spoil, message):
    with pytest.raises(AssertionError, match=message):
        check_engine(lambda: Wrong(policy, spoil), policy.model)


@pytest.mark.long
def test_stale_weights_and_what_is_left_running(policy):
    class Stale(EmbeddedEngine):
        def __init__(self, policy):
            super().__init__(copy.deepcopy(policy))

    with pytest.raises(AssertionError, match="is not the model's"):
        check_engine(lambda: Stale(policy), policy.model)

    ended = threading.Event()

    class Busy(EmbeddedEngine):
        def close(self):
            threading.Thread(target=ended.wait, name="left over").start()

    try:
        with pytest.raises(AssertionError, match="after close there are still.*left over"):
            check_engine(lambda: Busy(policy), policy.model)
    finally:
        ended.set()


class Plain:
    """An engine of its own: no numbers are drawn for it, and it is asked as the protocol says."""

    made: ClassVar[list] = []

    def __init__(self, model, tokenizer, temperature=1.0):
        self.model, self.calls, self.options = model, [], temperature
        self.made.append(self)

    def generate(self, prompts, sampling, seed):
        self.calls.append(("generate", seed))
        ids, mask = pad([list(p) for p in prompts], side="left")
        draws = torch.rand(len(prompts), sampling.max_new_tokens)
        return sample(self.model, ids, mask, sampling, draws)._replace(trunk=None, hidden=None)

    def sync(self, weights):
        self.calls.append(("sync", sorted(name for name, _ in weights)))

    def sleep(self):
        self.calls.append("sleep")

    def wake(self):
        self.calls.append("wake")

    def close(self):
        self.calls.append("close")


@pytest.fixture
def engine_file(tmp_path, monkeypatch):
    """A file that names Plain, and the engines that were made of it."""
    monkeypatch.setattr(Plain, "made", [])
    half = type("Half", (), {"generate": Plain.generate})
    monkeypatch.setitem(sys.modules, "the_engines", SimpleNamespace(Plain=Plain, Half=half))
    return "the_engines:Plain"


def test_a_step_syncs_generates_and_sleeps(configured, engine_file):
    options = {"rollout_engine_options": ["temperature=0.5"]}
    ppo.train(configured(steps=2, rollout_engine=engine_file, **options))
    (engine,) = Plain.made
    kinds = [call if isinstance(call, str) else call[0] for call in engine.calls]
    assert kinds == ["wake", "sync", "generate", "sleep"] * 2 + ["close"]
    assert "model.embed_tokens.weight" in engine.calls[1][1] and engine.options == 0.5
    seeds = [call[1] for call in engine.calls if call[0] == "generate"]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**31 for seed in seeds)


def test_adapters_are_merged_into_the_weights_it_takes(tiny_policy_folder):
    policy = load_policy(
        tiny_policy_folder, trainable_layers=None, device=CPU, lora=LoRA(4, 8.0, None, 0)
    )
    names = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU).model.state_dict()
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    weights = dict(policy.weights())
    assert weights.keys() == names.keys()
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy_folder)
    plain.load_state_dict(weights)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(plain(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_engine_that_fails_ends_the_run_with_a_checkpoint_and_is_closed(
    configured, engine_file, monkeypatch
):
    generate = Plain.generate

    def fails(self, *arguments):
        if sum(call[0] == "generate" for call in self.calls) == 2:
            raise ConnectionError("it is gone")
        return generate(self, *arguments)

    config = configured(steps=3, rollout_engine=engine_file)
    said = r"the_engines:Plain: generate raised ConnectionError: it is gone .*engines.py, line \d"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=said):
        patch.setattr(Plain, "generate", fails)
        ppo.train(config)
    assert Plain.made[0].calls[-1] == "close"
    assert (Path(config.output_dir) / "checkpoints" / "step_2.pt").exists()
    config.resume = True
    ppo.train(config)
    assert len(read_metrics(Path(config.output_dir) / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rollout_engine": "vllm"},
            "=vllm: vllm is not installed .pip install vllm",
        ),
        ({"rollout_engine_options": ["a=1"]}, "rollout_engine_options=.* set rollout_engine, too"),
        (
            {"rollout_engine": "transformers", "rollout_engine_options": ["seed=1"]},
            "rollout_engine_options=seed=1: expected a field of transformers' Continuous",
        ),
        (
            {"rollout_engine": "the_engines:Plain", "rollout_engine_options": ["top=1"]},
            "cannot be made with rollout_engine_options=.*unexpected keyword argument 'top'",
        ),
        (
            {"rollout_engine": "the_engines:Plain", "rollout_engine_options": ["top"]},
            "rollout_engine_options=top: expected name=value",
        ),
        ({"rollout_engine": "vlm"}, "=vlm: expected transformers, vllm, vllm-server, file.py:name"),
        ({"rollout_engine": "the_engines:Half"}, "the_engines:Half has no method sync"),
        (
            {"rollout_engine": "transformers", "rollout_engine_options": ["a=1", "a=2"]},
            "rollout_engine_options=a=2: a is given twice",
        ),
        (
            {"rollout_engine": "transformers", "rollout_engine_options": ["page_size=abc"]},
            "rollout_engine_options=page_size=abc: expected int",
        ),
        (
            {"rollout_engine": "transformers", "rollout_engine_options": ["num_blocks=true"]},
            "rollout_engine_options=num_blocks=True: expected int or null",
        ),
        (
            {"rollout_engine": "transformers", "rollout_engine_options": ["page_size=0"]},
            "rollout_engine_options=page_size=0: expected at least 1",
        ),
        (
            {"rollout_engine": "vllm-server", "rollout_engine_options": ["port=80"]},
            "rollout_engine_options=port=80: the engine's own",
        ),
        (
            {"rollout_engine": "vllm-server", "rollout_engine_options": ["start_timeout=soon"]},
            "rollout_engine_options=start_timeout=soon: expected seconds, above 0",
        ),
    ],
)
def test_what_cannot_be_an_engine(configured, engine_file, monkeypatch, options, message):
    monkeypatch.setattr(ppo, "load_models", None)  # said before anything is loaded
    monkeypatch.setattr(engine_module, "find_spec", lambda name: name == "transformers" or None)
    with pytest.raises(InputError, match=message):
        ppo.train(configured(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.full((1, 1), 99)}, "tokens outside of the model's 17"),
        ({"logp": torch.full((1, 1), float("nan"))}, "log-probs that are not finite"),
        ({"logp": torch.full((1, 1), -torch.inf)}, "log-probs that are not finite"),
        ({"mask": torch.ones(2, 1).bool()}, r"mask of shape \(2, 1\), expected \(1, T\)"),
        ({"mask": torch.ones(1, 1)}, "mask of float32, expected a tensor of bool"),
        ({"mask": torch.ones(1, 3).bool()[:, None]}, r"shape \(1, 1, 3\), expected \(1, T\)"),
        ({"tokens": [[1]]}, "tokens of list, expected a tensor of int64"),
        ({"tokens": torch.full((1, 1), -1)}, "tokens outside of the model's 17"),
        ({"tokens": torch.ones(1, 1)}, "tokens of float32, expected a tensor of int64"),
        ({"logp": torch.zeros(1, 1).bfloat16()}, "logp of bfloat16, expected a tensor of float32"),
        ({"logp": torch.zeros(1, 2)}, r"logp of shape \(1, 2\), expected \(1, T\)"),
        ({"support": torch.full((1, 1, 2), 3).int()}, "or without the token that was drawn"),
        ({"support": torch.tensor([[[1, 17]]]).int()}, "support with tokens outside of the model"),
        ({"support": torch.ones(1, 1).int()}, r"support of shape .* expected \(1, T, K\)"),
        ({"rewards": torch.zeros(1, 2)}, r"rewards of shape \(1, 2\)"),
        (
            {
                "tokens": torch.ones(1, 3).long(),
                "logp": torch.zeros(1, 3),
                "mask": torch.tensor([[True, False, True]]),
            },
            "a mask with gaps",
        ),
        (
            {
                "tokens": torch.ones(1, 5).long(),
                "logp": torch.zeros(1, 5),
                "mask": torch.ones(1, 5).bool(),
            },
            "T at most 4",
        ),
    ],
)
def test_answers_that_cannot_be_learnt_from(policy, change, message):
    done = Completions(torch.ones(1, 1).long(), torch.ones(1, 1).bool(), torch.zeros(1, 1))
    sampling = Sampling(4, 1.0, [])
    check_answers(done, 1, sampling, policy.model)
    with pytest.raises(InputError, match=message):
        check_answers(done._replace(**change), 1, sampling, policy.model)


def test_a_function_is_checked_too_and_named_when_it_fails(configured, monkeypatch):
    def wrong(model, ids, mask, sampling, draws):
        return sample(model, ids, mask, sampling, draws)._replace(logp=None)

    def fails(model, ids, mask, sampling, draws):
        return ids.nothing

    functions = SimpleNamespace(wrong=wrong, fails=fails)
    monkeypatch.setitem(sys.modules, "the_functions", functions)
    for name, message in {
        "wrong": "returned logp of NoneType, expected a tensor of float32",
        "fails": "the_functions:fails: draw raised AttributeError: .* .*test_engines.py, line",
    }.items():
        with pytest.raises(InputError, match=message):
            ppo.train(configured(name, rollout_engine=f"the_functions:{name}", eval_prompts=2))


def test_one_that_cannot_be_closed_costs_nothing(configured, engine_file, monkeypatch, capsys):
    """Not the run that is finished; and an error of the run is not hidden by its own."""

    def fails(self, *arguments):
        raise OSError("stuck")

    monkeypatch.setattr(Plain, "close", fails)
    options = {"steps": 1, "eval_prompts": 2, "rollout_engine": engine_file}
    assert "score_after" in ppo.train(configured("one", **options))
    assert "Plain could not be closed: OSError: stuck" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(Plain, "sleep", lambda self: 1 / 0)
    with pytest.raises(InputError, match="Plain: sleep raised ZeroDivisionError"):
        ppo.train(configured("two", **options))


@pytest.mark.parametrize("returned", [3, None, (1, 2, 3)])
def test_what_is_no_answer_at_all(policy, returned):
    ids = torch.ones(1, 2).long()
    arguments = policy.model, ids, ids.bool(), Sampling(4, 1.0, []), torch.rand(1, 4)
    kind = type(returned).__name__
    with pytest.raises(InputError, match=f"returned {kind}, expected Completions"):
        ask(lambda *_: returned, *arguments)


def test_options_of_an_engine(tmp_path):
    """Flags and a mapping in a file say the same."""
    file = tmp_path / "run.yaml"
    file.write_text("rollout_engine: vllm\nrollout_engine_options: {dtype: float32, a: 1}\n")
    argv = ["--config", str(file), "--model", "m", "--data", "d", "--reward", "r"]
    config = parse(PPOConfig, [*argv, "--output_dir", "o"], prog="ppo")
    assert config.rollout_engine_options == ["dtype=float32", "a=1"]
    assert engine_options(["a=1", "b=true", "c=0.5", "d=x=y"]) == {
        "a": 1, "b": True, "c": 0.5, "d": "x=y",
    }  # fmt: skip


def test_transformers_engine_trains(configured):
    """With what truncation left: the trainer's log-probs are the engine's."""
    config = configured(steps=1, rollout_engine="transformers", top_k=4)
    ppo.train(config)
    (row,) = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert row["val/rollout_ratio_max"] < 1.001
