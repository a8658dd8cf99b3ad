"""A run's folder as training leaves it, written without a training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import yaml

from rlhf_fast.trainer.config import PPOConfig, RewardConfig

EVIL = "<script>document.title = 'run'</script><b>&amp; \"it's\"</b> ${x} {{ 7 * 7 }}"


def ppo_rows(steps: int) -> list[dict]:
    return [
        {
            "step": i + 1, "objective/scores": 1 - math.exp(-i / 15) + 0.1 * math.sin(7 * i),
            "objective/kl": 0.1 * i, "policy/clipfrac_avg": 0.1 + 0.05 * math.cos(i),
            "loss/value_avg": None if i == 3 else math.exp(-i / 20),
            "policy/entropy_avg": 2.0 if i < 0.9 * steps else 0.1, "val/answer_tokens": 20.0,
            "perf/seconds": 2.0, "perf/rollout_seconds": 1.0, "perf/score_seconds": 0.1,
            "perf/reference_seconds": 0.3, "perf/update_seconds": 0.6,
            "perf/tokens_per_second": 9.0,
        }
        for i in range(steps)
    ]  # fmt: skip


def answers(count: int, text: str, score: float) -> dict:
    prompts = [EVIL, *(f"Prompt {i}, which is asked" for i in range(1, count))]
    return {
        "prompt": prompts, "answer": [f"{text} {i}: {EVIL}" for i in range(count)],
        "score": [score + i / 10 for i in range(count)], "kl": [0.5] * count,
        "length": [12] * count, "stop_reason": ["stop"] * count,
    }  # fmt: skip


def write(folder: Path, rows: list[dict], config: PPOConfig | RewardConfig) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def a_ppo_run(folder: Path, *, made: int = 60, steps: int = 60, evaluated: bool = True) -> Path:
    """Finished, if it has made all its steps."""
    config = PPOConfig(
        model="org/small-model", data="org/prompts", reward=["rewards.py:share"], steps=steps,
        output_dir=str(folder), beta=0.01,
    )  # fmt: skip
    write(folder, ppo_rows(made), config)
    (folder / "before.json").write_text(json.dumps(answers(12, "before", 0.0)))
    if evaluated:
        (folder / "metrics").mkdir()
        lines = [
            {"step": at, "eval_score": at / 60, "eval_kl": at / 10, "eval_length": 12.0,
             "samples": answers(12, f"at {at}", at / 60)}
            for at in range(10, made + 1, 10)
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics" / "eval.jsonl").write_text(text)
    if made == steps:
        (folder / "after.json").write_text(json.dumps(answers(12, "after", 1.0)))
        summary = {"score_before": 0.55, "score_after": 1.55, "score_rise": 1.0, "kl": 0.5,
                   "skipped_updates": 0, "seconds": 120.3}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def a_reward_run(folder: Path, made: int = 9) -> Path:
    config = RewardConfig(model="org/small-model", data="org/pairs", output_dir=str(folder))
    rows = [
        {"step": i + 1, "loss": 0.7 - i / 30, "accuracy": 0.5 + i / 30, "margin": i / 9,
         "grad_norm": 1.0, "lr": 1e-5}
        for i in range(made)
    ]  # fmt: skip
    return write(folder, rows, config)
