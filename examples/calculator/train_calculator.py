"""From nothing to a policy that uses its tool: imitation, then PPO. A minute on two cores.

python examples/calculator/train_calculator.py [folder]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from imitation import LARGEST, imitate, write_prompts

from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.flags import parse
from rlhf_fast.trainer.ppo import train

HERE = Path(__file__).parent


def run(folder: Path, imitated: int = 800, largest: int = LARGEST, **options) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    imitate(folder / "start", imitated, largest)
    write_prompts(folder / "prompts.jsonl", largest)
    argv = ["--config", str(HERE / "ppo.yaml"), "--model", str(folder / "start")]
    argv += ["--data", str(folder / "prompts.jsonl"), "--output_dir", str(folder / "ppo")]
    config = parse(PPOConfig, [*argv, "--overwrite", "true"], prog="train_calculator.py")
    tool = {"environment": f"{HERE / 'calculator.py'}:Calculator"}
    return train(replace(config, **tool | options))


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/calculator"))
