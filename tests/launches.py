"""Training by `accelerate launch`, and the comparison of two runs that should be the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_fast.trainer.config import PPOConfig, RunConfig
from rlhf_fast.trainer.run.folder import read_metrics

RANKS = str(Path(__file__).with_name("ranks.py"))

COMPARED = (
    "objective/scores", "objective/kl", "objective/entropy", "loss/policy_avg", "loss/value_avg",
    "grad_norm", "policy/entropy_avg", "policy/approxkl_avg", "val/clipfrac_avg", "val/ratio",
    "val/explained_var", "val/num_eos_tokens", "val/answer_tokens", "objective/kl_coef", "lr",
    "policy/updates", "skipped_updates",
)  # fmt: skip

# Adam's step is lr·g/(|g| + ε): with its usual ε, 1e-5, a gradient of that size turns a rounding of
# 1e-8 into a step that differs by 1e-3 of lr.
SMOOTH_ADAM = {"adam_epsilon": 1e-3}


def launch(options: list[str], script: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *script],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def launch_two(
    folder: Path, script: list[str], distributed_type: str, **sections: dict
) -> subprocess.CompletedProcess:
    """Two processes, by a config file as `accelerate config` writes it."""
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": distributed_type,
        "num_machines": 1, "num_processes": 2, "mixed_precision": "no", "main_process_port": 0,
    } | sections  # fmt: skip
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return launch(["--config_file", str(folder / "accelerate.yaml")], script)


def flags(config: RunConfig) -> list[str]:
    options = {k: v if isinstance(v, list) else [v] for k, v in vars(config).items()}
    return [f"--{k}={v}" for k, vs in options.items() for v in vs if v is not None]


def runs_file(folder: Path, runs: list[tuple[RunConfig, dict]]) -> str:
    """Runs with their options, as ranks.py reads them."""
    file = folder / "runs.json"
    file.write_text(json.dumps([(asdict(config), options) for config, options in runs]))
    return str(file)


def assert_same_metrics(config: PPOConfig, other: PPOConfig) -> None:
    one, two = (read_metrics(Path(c.output_dir) / "metrics.jsonl") for c in (config, other))
    assert len(one) == len(two) == config.steps
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & set(COMPARED):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (a["step"], name)


def assert_same_run(config: PPOConfig, other: PPOConfig) -> None:
    """Metrics of every step, and all that was written in the end."""
    assert_same_metrics(config, other)
    folder, others = Path(config.output_dir), Path(other.output_dir)
    norms = [row["grad_norm"] for row in read_metrics(folder / "metrics.jsonl")]
    assert max(norms) > config.max_grad_norm  # clipping is tested, too
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert files and files == sorted(p.relative_to(others) for p in others.rglob("*.safetensors"))
    for file in files:
        a, b = load_file(folder / file), load_file(others / file)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=name)


def broken_off(config: PPOConfig, name: str) -> PPOConfig:
    """A copy of a finished run as it was after its checkpoint, to be continued."""
    folder = Path(config.output_dir).with_name(name)
    shutil.copytree(config.output_dir, folder)
    for result in ("model", "value_model", "adapter"):
        shutil.rmtree(folder / result, ignore_errors=True)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step_2.pt":
            path.unlink()
    return replace(config, output_dir=str(folder), resume=True)
