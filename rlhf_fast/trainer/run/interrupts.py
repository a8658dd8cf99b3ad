"""Signals that end a training: what was learnt is saved first, and the last line says so.

In a step the weights stay as they are until the update begins. Until then a signal ends the step at
once and the weights are saved as the step before left them; during the update, and with several
processes, who must agree, the step is finished first. A second signal ends it wherever it is.
A terminal that hangs up (SIGHUP) ends nothing.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_fast.interrupted import quietly
from rlhf_fast.trainer.errors import Ended
from rlhf_fast.trainer.run import lock
from rlhf_fast.trainer.run.console import console
from rlhf_fast.trainer.run.terminal import steady_terminal

# Ctrl-C; what schedulers send before they kill, at the end of the time they gave included.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
THEIR_OWN = (signal.SIG_DFL, signal.default_int_handler, quietly)  # handlers that may be replaced


class Training:
    """What a signal finds."""

    def __init__(self) -> None:
        self.signal = 0  # that has come
        self.at_once = True  # nothing must be finished first
        self.keep: Callable[[], Any] | None = None  # saves what was learnt
        self.kept = ""  # what can be gone on from, in words

    def came(self, number: int, frame: Any) -> None:
        again, self.signal = self.signal, number
        if self.at_once or again:
            stop(number)
        name = signal.Signals(number).name
        console.print(f"{name}: this step is finished and saved first; once more ends it at once")


training = Training()  # signals are a process's own, so there is one


def step_begins(keep: Callable[[], Any], *, alone: bool) -> None:
    """keep: saves a checkpoint from the weights as they are, if there is none."""
    training.keep, training.at_once = keep, alone
    if alone and training.signal:  # it came when the step before had looked for it already
        stop(training.signal)


def update_begins() -> None:
    training.keep, training.at_once = None, False


def steps_are_over() -> None:
    training.keep, training.at_once = None, True
    if training.signal:
        stop(training.signal)


def keep_what_was_learnt() -> None:
    keep, training.keep = training.keep, None
    if keep is not None:
        training.at_once = False
        keep()


@contextmanager
def keeping_what_was_learnt() -> Iterator[None]:
    """Before an update: what others' code raises must not cost what was learnt."""
    try:
        yield
    except BaseException:
        keep_what_was_learnt()
        raise


@contextmanager
def saving_at_an_error(save: Callable[[], Any]) -> Iterator[None]:
    """After an update: a reward or a callback that fails must not cost what was learnt."""
    try:
        yield
    except Exception:
        save()
        raise


def kept(text: str) -> None:
    """What can be gone on from, in words."""
    training.kept = text


def asked() -> int:
    """The signal that waits for the end of the step, or 0."""
    return training.signal


def stop(number: int) -> None:
    """End the training for a signal."""
    raise KeyboardInterrupt if number == signal.SIGINT else Ended(128 + number)


@contextmanager
def guarded() -> Iterator[None]:
    """Around a training: signals, the terminal, the folder's lock. Also a decorator."""
    global training
    training = Training()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        wanted = {number: training.came for number in ENDING}
        wanted[signal.SIGHUP] = lambda number, frame: None
        for number, handler in wanted.items():
            if signal.getsignal(number) in THEIR_OWN:
                handlers[number] = signal.signal(number, handler)
    try:
        with steady_terminal():
            try:
                yield
            except BaseException as error:
                if training.at_once:  # alone: with others each would have to save at once
                    keep_what_was_learnt()
                if isinstance(error, KeyboardInterrupt | Ended):
                    say(error)
                raise
    finally:
        lock.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def say(error: KeyboardInterrupt | Ended) -> None:
    number = error.code - 128 if isinstance(error, Ended) else signal.SIGINT
    text = f"ended by {signal.Signals(number).name}"
    if isinstance(error, Ended):
        print("; ".join(filter(None, (text, training.kept))), file=sys.stderr)
    else:
        error.args = ("; ".join(filter(None, ("interrupted", training.kept))),)
