"""What is printed is never worth a run: a terminal, pipe or log may go away, a disk fill up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any


class Steady:
    """A stream whose failures are kept until it can say them, once. It may be None: closed."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.lost: str | None = None  # the reason, while something could not be written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.stream is not None:
            try:
                self.say_what_was_lost()
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
            except (OSError, ValueError, RuntimeError) as error:  # gone, closed, in a signal
                self.lost = reason(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        if self.stream is not None:
            try:
                self.say_what_was_lost()
                self.stream.flush()
            except (OSError, ValueError, RuntimeError) as error:
                self.lost = reason(error)

    def say_what_was_lost(self) -> None:
        if self.lost is not None:
            self.stream.flush()  # raises while it still cannot be shown
            self.stream.write(f"\nsome lines could not be shown here: {self.lost}\n")
            self.stream.flush()
            self.lost = None

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:
            return False


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def steady_terminal() -> Iterator[None]:
    """stdout and stderr of this process, a reward function's prints included, are Steady."""
    streams = (s if isinstance(s, Steady) else Steady(s) for s in (sys.stdout, sys.stderr))
    with redirect_stdout(next(streams)), redirect_stderr(next(streams)):  # type: ignore[type-var]
        yield


def give_up_what_is_gone() -> None:
    """At the end of a command: what a stream could not write must not change the exit code."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)
