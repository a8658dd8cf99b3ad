"""Two processes on the same global batch give the numbers of one, to rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from launches import RANKS, assert_same_metrics, flags, launch, runs_file

from rlhf_fast.trainer import ppo, reward
from rlhf_fast.trainer.config import RewardConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.folder import Run, read_metrics


def launch_ddp(script: list[str]) -> CompletedProcess:
    options = ["--multi_gpu", "--num_machines=1", "--num_processes=2", "--mixed_precision=no",
               "--dynamo_backend=no", "--main_process_port=0"]  # fmt: skip
    return launch(options, script)


ENGINE = """
from rlhf_fast.trainer.rollout.sample import sample
def off(model, ids, mask, sampling, draws):
    done = sample(model, ids, mask, sampling, draws)
    return done._replace(logp=done.logp - 0.5 * (done.tokens % 3) * done.mask)
"""
OPTIONS = {"steps": 3, "batch_size": 12, "adaptive_kl_target": 1.0, "save_every": 2}


@pytest.mark.long
def test_the_command_in_two_processes_gives_the_numbers_of_one(configured, tmp_path):
    (tmp_path / "engine.py").write_text(ENGINE)
    # 3 rows a minibatch: the two processes never have the same share of it
    options = OPTIONS | {
        "minibatches": 4, "micro_batch_size": 1, "whiten_rewards": True, "critic_warmup_steps": 1,
        "positive_nll_coef": 0.1, "tis_cap": 2.0, "rollout_normalize": True,
        "rollout_engine": f"{tmp_path / 'engine.py'}:off",
    }  # fmt: skip
    alone = configured("alone", top_p=0.8, **options)
    device = "cpu" if torch.accelerator.is_available() else "auto"  # auto finds CPUs by itself
    together = configured("together", top_p=0.8, device=device, **options)
    together.data = alone.data
    ppo.train(alone)
    done = launch_ddp(["-m", "rlhf_fast.trainer.cli", "ppo", *flags(together)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes" in done.stdout  # without --multi_gpu a launch on a CPU starts one
    assert_same_metrics(alone, together)
    assert (Path(together.output_dir) / "model" / "model.safetensors").is_file()
    kept = {p.name for p in (Path(together.output_dir) / "checkpoints").iterdir()}
    assert kept == {"step_2.pt", "step_3.pt"}


FAILS = """
import os
calls = 0
def second(prompts, completions, **columns):
    global calls
    calls += 1
    bad = os.environ['RANK'] == '1' and calls == 2
    return [float('nan') if bad else 1.0] * len(prompts)
"""


ENVIRONMENT = """
import os
begun = 0
class Fails:
    def reset(self, prompt, **columns):
        global begun
        begun += 1
        if os.environ['RANK'] == '1' and begun > {first}:
            raise {error}
    def step(self, messages):
        return "", float(messages.count("good")), True
"""


@pytest.mark.long
def test_two_processes_give_the_numbers_of_one(
    configured, tiny_policy_folder, write_jsonl, tmp_path
):
    """Run after run in one launch, since starting it takes as long as any of them: shares of
    nothing, a reward model, callbacks, and an environment and a reward that fail in one process,
    which ends both."""
    # 1 row a minibatch: one process has nothing to learn from
    options = OPTIONS | {"minibatches": 12, "trainable_layers": 2}
    options |= {"estimator": "rloo", "samples_per_prompt": 2, "dynamic_sampling_rounds": 2}
    empty, empties = configured("alone", **options), configured("together", **options)
    empties.data = empty.data
    ppo.train(empty)
    rows = [
        {"chosen": "the film " * (i % 3) + "is good", "rejected": "bad plot " * (i % 4) + "was bad",
         "margin": 0.1 * i} for i in range(22)
    ]  # fmt: skip
    one, two = (
        RewardConfig(
            model=tiny_policy_folder, data=write_jsonl(rows), output_dir=str(tmp_path / name),
            eval_pairs=4, batch_size=6, micro_batch_size=2, learning_rate=1e-3, center_coef=0.1,
            trainable_layers=1, epochs=3, device="cpu",
        )
        for name in ("one", "two")
    )  # fmt: skip
    summary = reward.train(one)
    (tmp_path / "fails.py").write_text(FAILS)
    fails = configured("fails", reward=f"{tmp_path / 'fails.py'}:second", steps=4, save_every=9)
    ended = configured("ended", steps=4, batch_size=12, save_every=9, eval_every=2, epochs=1)
    noted = tmp_path / "noted"
    # The held-out prompts, and this process's share of the first step: the second step fails.
    begun = {"exits": 0, "raises": 4 + 6}
    errors = {"exits": "SystemExit('bye')", "raises": "KeyError('x')"}
    played = []
    for name, first in begun.items():
        (tmp_path / f"{name}.py").write_text(ENVIRONMENT.format(first=first, error=errors[name]))
        options = {"environment": f"{tmp_path / name}.py:Fails", "reward": ["environment"]}
        options |= {"steps": 3, "batch_size": 12, "eval_prompts": 4, "save_every": 9}
        played.append((configured(name, **options), {"refused": str(tmp_path / name)}))
    runs = [(empties, {}), (two, {}), (ended, {"noted": str(noted)}), *played, (fails, {})]
    file = runs_file(tmp_path, runs)
    done = launch_ddp([RANKS, "ddp", file])
    assert done.returncode != 0
    assert "returned nan for row 0" in done.stderr and "(in process 1)" in done.stderr
    assert not (Path(fails.output_dir) / "summary.json").exists()

    for name, error in (("exits", "SystemExit: bye"), ("raises", "KeyError: 'x'")):
        said = {(tmp_path / f"{name}.{rank}").read_text() for rank in range(2)}
        assert len(said) == 1 and error in (line := said.pop()) and "(in process 1)" in line
        assert "\n" not in line
    assert (tmp_path / "raises" / "checkpoints" / "step_1.pt").is_file()

    # Every event in both; what a callback of the other process wants counts for nothing.
    step = ["step_begin {0}", "step_end {1}", "log {1}"]
    events = ["train_begin 0", *(x.format(0, 1) for x in step), *(x.format(1, 2) for x in step)]
    events += ["log 2", "evaluate 2", "save 2", "train_end 2"]
    for rank in range(2):
        assert Path(f"{noted}.{rank}").read_text().splitlines() == events, rank
    assert Run(replace(ended, resume=True)).summary["ended_after_step"] == 2

    assert_same_metrics(empty, empties)
    assert done.stdout.count("held-out pair accuracy") == 1
    alone, shared = (read_metrics(Path(c.output_dir) / "metrics.jsonl") for c in (one, two))
    assert len(alone) == 9
    for a, b in zip(alone, shared, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    found = Run(RewardConfig(**(vars(two) | {"resume": True}))).summary
    for name in ("accuracy", "loss", "score_mean", "score_std"):
        assert found[name] == pytest.approx(summary[name], rel=1e-3, abs=1e-4), name
    stored = json.loads((Path(two.output_dir) / "model" / "config.json").read_text())
    assert stored["score_mean"] == found["score_mean"]


def test_batch_that_cannot_be_shared(configured, monkeypatch):
    from rlhf_fast.trainer.distributed.workers import Workers

    class Three:
        distributed_type, process_index, num_processes = "NO", 0, 3
        state = SimpleNamespace(destroy_process_group=lambda: None)

        def __init__(self, **_):
            pass

    monkeypatch.setattr("rlhf_fast.trainer.distributed.workers.Accelerator", Three)
    with pytest.raises(InputError, match="batch_size=16 cannot be shared by 3 processes"):
        Workers(configured())


def test_a_device_of_each_process_its_own(configured, monkeypatch):
    from rlhf_fast.trainer.distributed.workers import Workers

    monkeypatch.setenv("WORLD_SIZE", "2")
    config = configured()
    config.device = "cuda:1"
    with pytest.raises(InputError, match="device=cuda:1: each of several processes"):
        Workers(config)


def test_processes_see_one_folder(monkeypatch):
    from rlhf_fast.trainer.distributed.workers import Workers

    monkeypatch.setattr(
        "rlhf_fast.trainer.distributed.workers.gather_object", lambda numbers: [*numbers, 0]
    )
    two = SimpleNamespace(size=2)
    with pytest.raises(InputError, match=r"differ in the step .*\(\[3, 0\]\)"):
        Workers.agreed(two, 3, "step")
    assert Workers.agreed(two, 0, "step") == 0
