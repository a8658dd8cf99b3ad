"""Every recipe is a run that can be broken off, below what the user says himself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.flags import parse
from rlhf_fast.trainer.recipes import FILES
from rlhf_fast.trainer.run.folder import read_metrics

REQUIRED = ["--model", "m", "--data", "d", "--reward", "r", "--output_dir", "o"]


def parsed(*flags: str) -> PPOConfig:
    return parse(PPOConfig, [*REQUIRED, *flags], prog="x")


def test_what_the_user_says_wins_and_the_rest_is_printed(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("clip: 0.3\nsteps: 7\n")
    flags = ["--clip-high=0.5", "--beta", "0.1", "--config", str(file), "--recipe", "dapo"]
    config = parsed(*flags)
    assert (config.clip, config.clip_high, config.beta, config.steps) == (0.3, 0.5, 0.1, 7)
    assert (config.samples_per_prompt, config.overlong_cache) == (16, 12)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "recipe dapo: estimator=grpo samples_per_prompt=16 aggregation=token-mean "
        "dynamic_sampling_rounds=10 overlong_cache=12 missing_eos_penalty=0.0 epochs=1 "
        "minibatches=16 learning_rate=1e-6"
    )
    assert parsed().estimator == "gae" and capsys.readouterr().out == ""


def test_an_unknown_recipe_is_one_line():
    with pytest.raises(InputError, match="recipe: invalid choice: 'dpo' .*'cispo', 'dapo'"):
        parsed("--recipe", "dpo")


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_runs_and_goes_on_to_the_same_numbers(name, configured, tmp_path):
    base = configured(batch_size=16, eval_prompts=1, max_new_tokens=4, steps=2)
    own = ["model", "data", "output_dir", "max_new_tokens", "batch_size", "eval_prompts", "steps"]
    flags = [x for key in own for x in (f"--{key}", str(getattr(base, key)))]
    flags += ["--reward", *base.reward, "--device", "cpu", "--learning_rate", "1e-3"]
    flags += ["--save_every", "1"]
    # Two answers an update, where a recipe makes 16 updates of a batch; what fits short answers.
    flags += {
        "cispo": ["--overlong_cache", "2", "--minibatches", "8"],
        "dapo": ["--overlong_cache", "2", "--minibatches", "8"],
        "vapo": ["--critic_warmup_steps", "1", "--minibatches", "8"],
    }.get(name, [])
    whole = parse(PPOConfig, [*flags, "--recipe", name], prog="x")
    ppo.train(whole)
    broken = replace(whole, output_dir=str(tmp_path / "broken"))
    shutil.copytree(whole.output_dir, broken.output_dir)
    for late in ("summary.json", "checkpoints/step_2.pt"):  # as if killed in the second step
        (Path(broken.output_dir) / late).unlink()
    ppo.train(replace(broken, resume=True))
    rows, weights = [], []
    for config in (whole, broken):
        folder = Path(config.output_dir)
        timed = read_metrics(folder / "metrics.jsonl")
        rows.append(
            [{k: v for k, v in r.items() if k != "eps" and k[:5] != "perf/"} for r in timed]
        )
        state = torch.load(folder / "checkpoints" / "step_2.pt", weights_only=True)
        weights.append(state["weights"])
    assert len(rows[0]) == 2 and rows[0] == rows[1]
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())
