"""The demo: prepare model and data, train a reward model, train the policy against it.

Each stage is an ordinary command with a config file, printed before it runs. A finished stage is
left alone and an interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from prepare import DEFAULT_CACHE

HERE = Path(__file__).resolve().parent


def run(*command: str | Path) -> None:
    print("\n$", shlex.join(["python", *map(str, command)]), flush=True)
    status = subprocess.run([sys.executable, *map(str, command)]).returncode
    if status < 0:  # killed, for want of memory perhaps: it could not say so itself
        sys.exit(
            f"the last command was ended by signal {-status}; the same command goes on from there"
        )
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        help="where model and data are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="where the trained models, plot and metrics go (default: %(default)s)",
    )
    arguments = parser.parse_args()
    cache, out = arguments.cache.expanduser(), arguments.out.expanduser()
    began = time.perf_counter()

    run(HERE / "prepare.py", "--cache", cache)
    run(
        "-m", "rlhf_fast.trainer.cli", "reward", "--config", HERE / "reward.yaml", "--resume",
        "--model", cache / "smollm2", "--data", cache / "fragments.jsonl",
        "--output_dir", out / "reward",
    )  # fmt: skip
    run(
        "-m", "rlhf_fast.trainer.cli", "ppo", "--config", HERE / "ppo.yaml", "--resume",
        "--model", cache / "smollm2", "--data", cache / "openings.jsonl",
        "--reward", out / "reward" / "model", "--judge", f"{HERE / 'vader.py'}:score",
        "--output_dir", out / "ppo",
    )  # fmt: skip
    run(
        "-m", "rlhf_fast.trainer.cli", "generate", "--model", out / "ppo" / "model",
        "--prompt", "This movie was", "--samples", "3", "--max_new_tokens", "16",
    )  # fmt: skip
    print(f"\n{time.perf_counter() - began:.0f} s; everything is in {out}")


if __name__ == "__main__":
    main()
