"""`rlhf-fast reward|ppo|…`: the commands; each imports the heavy modules it needs."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_fast.trainer.errors import Ended, InputError
from rlhf_fast.trainer.installed import load
from rlhf_fast.trainer.run.terminal import give_up_what_is_gone, steady_terminal


def parsed(config: str, argv: Sequence[str], *, prog: str) -> Any:
    config_class = getattr(load("rlhf_fast.trainer.config"), config)
    return load("rlhf_fast.trainer.flags").parse(config_class, argv, prog=prog)


def reward(argv: Sequence[str]) -> None:
    """train a reward model from pairs of a better and a worse text"""
    config = parsed("RewardConfig", argv, prog="rlhf-fast reward")
    load("rlhf_fast.trainer.trainers").RewardTrainer(config=config).train()


def ppo(argv: Sequence[str]) -> None:
    """train a language model with PPO against a reward model or function"""
    config = parsed("PPOConfig", argv, prog="rlhf-fast ppo")
    load("rlhf_fast.trainer.trainers").PPOTrainer(config=config).train()


def generate(argv: Sequence[str]) -> None:
    """answer a prompt with a trained model"""
    config = parsed("GenerateConfig", argv, prog="rlhf-fast generate")
    for answer in load("rlhf_fast.trainer.generate").generate(config):
        print(answer)


def watch(argv: Sequence[str]) -> None:
    """follow a run in the terminal"""
    config = parsed("WatchConfig", positional(argv, "--run"), prog="rlhf-fast watch")
    watching = load("rlhf_fast.trainer.run.watch")
    from rlhf_fast.trainer.run.console import console

    folder = Path(config.run).expanduser()
    watching.watch(folder, console, once=config.once, every=config.every)


def plot(argv: Sequence[str]) -> None:
    """draw the curves of a run from its metrics"""
    config = parsed("PlotConfig", positional(argv, "--run"), prog="rlhf-fast plot")
    plots = load("rlhf_fast.trainer.run.plot")
    from rlhf_fast.trainer.run.metrics import read_metrics

    folder = Path(config.run).expanduser()
    target = Path(config.output).expanduser() if config.output else folder / "plot.png"
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise InputError(f"run={folder} has no metrics.jsonl with a finished step")
    write(target, plots.is_plot, partial(plots.plot, metrics))


def report(argv: Sequence[str]) -> None:
    """write a page about a run: curves, answers, warnings, options"""
    config = parsed("ReportConfig", positional(argv, "--run"), prog="rlhf-fast report")
    pages = load("rlhf_fast.trainer.run.page")
    from rlhf_fast.trainer.run.record import read

    folder = Path(config.run).expanduser()
    target = Path(config.output).expanduser() if config.output else folder / "report.html"
    text = pages.page(read(folder))
    write(target, pages.is_page, lambda path: path.write_text(text, encoding="utf-8"))


def convert(argv: Sequence[str]) -> None:
    """write a configuration of TRL or verl as ours"""
    config = parsed("ConvertConfig", positional(argv, "--file"), prog="rlhf-fast convert")
    converting = load("rlhf_fast.trainer.convert")
    path = Path(config.file).expanduser()
    text = converting.convert(path, config.framework, config.processes)
    if config.output is None:
        print(text, end="")
        return
    target = Path(config.output).expanduser()
    write(target, converting.is_converted, lambda path: path.write_text(text, encoding="utf-8"))


def positional(argv: Sequence[str], flag: str) -> Sequence[str]:
    """`rlhf-fast plot run/` is `rlhf-fast plot --run run/`."""
    return [flag, *argv] if argv and not argv[0].startswith("-") else argv


def write(target: Path, ours: Callable[[Path], bool], writer: Callable[[Path], Any]) -> None:
    """A file, in the place of none or of an earlier one of this command."""
    from rlhf_fast.trainer.run.files import replacing

    if target.is_dir():
        raise InputError(f"output={target} is a folder: expected a file to write")
    if os.path.lexists(target) and not ours(target):
        raise InputError(
            f"output={target} is there already and was not written by this command: it is not "
            "written over; give another --output"
        )
    try:
        with replacing(target, target.with_name(f".{target.name}.{os.getpid()}")) as unready:
            writer(unready)
    except OSError as error:
        raise InputError(f"output={target} cannot be written: {error.strerror}") from None
    print(target)


def info(argv: Sequence[str]) -> None:
    """show what was built, for which devices, and which ops run where"""
    from rlhf_fast.info import main

    main(*argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (reward, ppo, generate, watch, plot, report, convert, info)
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
