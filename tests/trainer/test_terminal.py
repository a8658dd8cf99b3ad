"""A terminal, pipe or log that goes away, is full or closed, or cannot hold a letter."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.run import terminal
from rlhf_fast.trainer.run.console import console, progress_bar
from rlhf_fast.trainer.run.terminal import Steady, steady_terminal


class Fails(io.StringIO):
    """A stream that cannot be written to while it has an error."""

    error: Exception | None = None

    def write(self, text):
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.error is not None:
            raise self.error


ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ValueError("I/O operation on closed file."),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_what_could_not_be_shown_is_said_once(error):
    stream = Fails()
    steady = Steady(stream)
    steady.write("one\n")
    stream.error = error
    steady.write("two\n"), steady.flush(), steady.write("three\n")
    stream.error = None
    steady.write("four\n"), steady.write("five\n")
    reason = getattr(error, "strerror", None) or str(error)
    said = f"\nsome lines could not be shown here: {reason}\n"
    assert stream.getvalue() == f"one\n{said}four\nfive\n"


@pytest.mark.parametrize("error", [*ERRORS, None], ids=str)
def test_everything_that_prints(monkeypatch, error):
    """Console, progress bar and a reward function's own prints; without stdout, too."""
    stream = Fails()
    stream.error = error
    monkeypatch.setattr(sys, "stdout", None if error is None else stream)
    monkeypatch.setattr(sys, "stderr", None if error is None else stream)
    with steady_terminal():
        console.print("text")
        print("text", flush=True)
        print("text", file=sys.stderr)
        with progress_bar("ppo", 2) as bar:
            bar.show("step")
        assert not sys.stdout.isatty()
    assert sys.stdout is (None if error is None else stream)


def test_letters_that_the_terminal_does_not_have():
    raw = io.BytesIO()
    steady = Steady(io.TextIOWrapper(raw, encoding="ascii"))
    steady.write("Grüße ━━ 🙂\n")
    steady.flush()
    assert raw.getvalue() == b"Gr??e ?? ?\n"


def test_a_training_whose_log_is_full(configured, monkeypatch):
    stream = Fails()
    stream.error = ERRORS[0]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    config = configured(steps=1, log_every=1, sample_every=1)
    ppo.train(config)
    assert (Path(config.output_dir) / "model" / "config.json").exists()  # to its end


@pytest.mark.parametrize("target", ["/dev/full", "a pipe that is closed"])
def test_the_exit_code_of_a_process(target):
    """What Python itself still wants to write at its end would make it 120."""
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('t', {terminal.__file__!r})\n"
        "t = u.module_from_spec(s); s.loader.exec_module(t)\n"
        "with t.steady_terminal():\n    print('x' * 9999)\n    print('y')\n"
        "t.give_up_what_is_gone()\n"
    )
    if target == "/dev/full":
        stdout = os.open(target, os.O_WRONLY)
    else:
        closed, stdout = os.pipe()
        os.close(closed)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    os.close(stdout)
    assert (done.returncode, done.stderr) == (0, "")
