"""`rlhf-fast reward|ppo|generate|plot|info`; commands import the heavy modules they need."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from rlhf_fast.trainer.config import GenerateConfig, PlotConfig, PPOConfig, RewardConfig, parse
from rlhf_fast.trainer.errors import Ended, InputError
from rlhf_fast.trainer.run.terminal import give_up_what_is_gone, steady_terminal


def reward(argv: Sequence[str]) -> None:
    """train a reward model from pairs of a better and a worse text"""
    config = parse(RewardConfig, argv, prog="rlhf-fast reward")
    from rlhf_fast.trainer.reward import train

    train(config)


def ppo(argv: Sequence[str]) -> None:
    """train a language model with PPO against a reward model or function"""
    config = parse(PPOConfig, argv, prog="rlhf-fast ppo")
    from rlhf_fast.trainer.ppo import train

    train(config)


def generate(argv: Sequence[str]) -> None:
    """answer a prompt with a trained model"""
    config = parse(GenerateConfig, argv, prog="rlhf-fast generate")
    from rlhf_fast.trainer.generate import generate

    for answer in generate(config):
        print(answer)


def plot(argv: Sequence[str]) -> None:
    """draw the plot of a PPO run from its metrics"""
    if argv and not argv[0].startswith("-"):  # `rlhf-fast plot run/`
        argv = ["--run", *argv]
    config = parse(PlotConfig, argv, prog="rlhf-fast plot")
    from pathlib import Path

    from rlhf_fast.trainer.run.files import replacing
    from rlhf_fast.trainer.run.metrics import read_metrics
    from rlhf_fast.trainer.run.plot import is_plot, plot

    folder = Path(config.run).expanduser()
    target = Path(config.output).expanduser() if config.output else folder / "plot.png"
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise InputError(f"run={folder} has no metrics.jsonl with a finished step")
    if target.is_dir():
        raise InputError(f"output={target} is a folder: expected a file to write")
    if os.path.lexists(target) and not is_plot(target):
        raise InputError(
            f"output={target} is there already and was not drawn by this command: it is not "
            "written over; give another --output"
        )
    try:
        with replacing(target, target.with_name(f".{target.name}.{os.getpid()}")) as partial:
            plot(metrics, partial)
    except OSError as error:
        raise InputError(f"output={target} cannot be written: {error.strerror}") from None
    print(target)


def info(argv: Sequence[str]) -> None:
    """show what was built, for which devices, and which ops run where"""
    from rlhf_fast.info import main

    main(*argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command for command in (reward, ppo, generate, plot, info)
}


def usage() -> str:
    lines = [f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([
        "usage: rlhf-fast COMMAND [--flag VALUE …]", "", *lines, "",
        "`rlhf-fast COMMAND --help` lists the flags of a command.",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    with steady_terminal():
        code = call(*argv)
    give_up_what_is_gone()
    return code


def call(name: str, *rest: str) -> int:
    """One command; its exit code."""
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise InputError("no such command" + (f" (did you mean {near[0]}?)" if near else ""))
        COMMANDS[name](rest)
    except InputError as error:
        print(f"rlhf-fast {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # a training says what can be gone on from
        print(f"rlhf-fast {name}: {error}" if error.args else "interrupted", file=sys.stderr)
        return 130
    except Ended as error:
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
