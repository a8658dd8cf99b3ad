"""A run killed with SIGKILL at any moment resumes to the numbers of an unbroken one."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.run.folder import read_metrics

KILLS = 6
REWARD = """
import random

def noisy(prompts, completions, **columns):  # the global generator is part of a run, too
    return [c.split().count("good") + random.random() for c in completions]
"""
ADAPTS = {
    "adaptive_kl_target": 1.0,
    "kl_horizon": 50,
    "warmup_steps": 3,
    "lr_scheduler_type": "linear",
}


@pytest.fixture
def config(tmp_path, tiny_policy_folder, write_jsonl):
    (tmp_path / "noise.py").write_text(REWARD)
    data = write_jsonl([{"prompt": p} for p in ("the film", "a plot is", "actor", "is the") * 4])

    def make(name: str) -> PPOConfig:
        return PPOConfig(
            model=tiny_policy_folder, data=data, reward=f"{tmp_path / 'noise.py'}:noisy",
            output_dir=str(tmp_path / name), steps=6, batch_size=4, eval_prompts=4, epochs=2,
            minibatches=2, max_new_tokens=4, learning_rate=1e-2, value_learning_rate=1e-2,
            save_every=1, resume=True, device="cpu", **ADAPTS,
        )  # fmt: skip

    return make


def outcome(config: PPOConfig) -> tuple:
    """Every number and byte of a finished run that the clock does not decide."""
    folder = Path(config.output_dir)
    rows = [
        {k: v for k, v in row.items() if not k.startswith("perf/") and k != "eps"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    files = ("before.json", "after.json", "model/model.safetensors", "model/value_head.safetensors")
    last = torch.load(folder / "checkpoints" / f"step_{config.steps}.pt", weights_only=True)
    state = tree_map(lambda x: x.numpy().tobytes() if isinstance(x, torch.Tensor) else x, last)
    return rows, [(folder / name).read_bytes() for name in files], state


@pytest.mark.long
def test_killed_at_random_moments(config, monkeypatch):
    """In each sixth of the run's length one; with save_every=1 many fall into a checkpoint.
    test_run.py kills before every single operation on the disk."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["rlhf_fast.trainer.ppo", "transformers.models.llama.modeling_llama"]
    )

    def start(name: str) -> multiprocessing.Process:
        child = processes.Process(target=ppo.train, args=(config(name),))
        child.start()
        return child

    start("warm").join()  # the server imports; what follows forks from it
    began = time.perf_counter()
    unbroken = start("unbroken")
    unbroken.join()
    length = time.perf_counter() - began
    expected = outcome(config("unbroken"))
    assert len(expected[0]) == 6 and expected[0][0]["objective/kl_coef"] == 0.05
    assert expected[0][-1]["objective/kl_coef"] != 0.05

    chance = random.Random(0)
    moments = [length * (i + chance.random()) / KILLS for i in range(KILLS)]
    chance.shuffle(moments)
    finished = 0
    while moments or not finished:
        child = start("killed")
        child.join(moments[-1] if moments else None)
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            moments.pop()
            continue
        assert child.exitcode == 0
        assert outcome(config("killed")) == expected
        finished += 1
        moments[-1:] = [0.8 * moment for moment in moments[-1:]]  # this one came too late
        shutil.rmtree(config("killed").output_dir)
