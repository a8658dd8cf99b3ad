"""Reward functions that wait for something: called again where they fail, their awaitables awaited
side by side.

A function may return its scores, an awaitable of them, or a list in which some are awaitables, one
an answer: only those can be lost one by one.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from rlhf_fast.trainer.errors import Ended, InputError
from rlhf_fast.trainer.rewards.functions import (
    TimedOut,
    alarm,
    awaited,
    call,
    can_ring,
    named_if_slow,
    reason_of,
)
from rlhf_fast.trainer.run.console import console


@dataclass(frozen=True)
class Patience:
    """With functions that score; the options reward_timeout, reward_concurrency, …"""

    timeout: float | None = None  # seconds for a call, and for each awaitable
    concurrency: int = 16
    retries: int = 0
    failures: str = "drop"  # answers whose awaitables fail; "end": so does the run


class Lost:
    """In place of a score: why there is none."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def scores_of(
    function: Callable, arguments: dict[str, list[Any]], who: str, patience: Patience
) -> Any:
    """What the function returns for its arguments, each a list with an item an answer, with its
    awaitables awaited; Lost where one failed. The function gets copies: what it does to them must
    not reach the data, nor the next call."""
    scores = called(function, arguments, who, patience)
    if not isinstance(scores, list | tuple) or not any(map(inspect.isawaitable, scores)):
        return scores
    size = len(arguments["completions"])
    if len(scores) != size:
        for score in filter(inspect.iscoroutine, scores):
            score.close()
        raise InputError(f"{who} returned {len(scores)} scores, expected a list of {size} numbers")
    scores = side_by_side(scores, function, who, patience)
    for _ in range(patience.retries):
        failed = [row for row, score in enumerate(scores) if isinstance(score, Lost)]
        if not failed:
            break
        some = {name: [column[row] for row in failed] for name, column in arguments.items()}
        again = called(function, some, who, patience)
        if not isinstance(again, list | tuple) or len(again) != len(failed):
            raise InputError(f"{who} returned no list of {len(failed)} scores when called again")
        for row, score in zip(failed, side_by_side(again, function, who, patience), strict=True):
            scores[row] = score
    lost = [score for score in scores if isinstance(score, Lost)]
    if lost and (patience.failures == "end" or len(lost) == size):
        raise InputError(f"{who} failed for {len(lost)} of {size} answers: {lost[0].reason}")
    if lost:
        text = f"{who} failed for {len(lost)} of {size} answers, which are left out"
        console.print(f"[bold yellow]{escape(f'{text}: {lost[0].reason}')}[/]")
    return scores


def called(function: Callable, arguments: dict[str, Any], who: str, patience: Patience) -> Any:
    for left in reversed(range(patience.retries + 1)):
        try:
            return call(function, copy.deepcopy(arguments), who, patience.timeout)
        except InputError:
            if not left:
                raise


def side_by_side(scores: list[Any], function: Callable, who: str, patience: Patience) -> list[Any]:
    """The scores, with those that are awaitables awaited, so many at a time."""
    seconds = patience.timeout
    late = f"it took longer than reward_timeout={seconds} seconds"
    beat = Beat(seconds)

    async def score_of(score: Awaitable[Any]) -> Any:
        try:
            return await score
        except Ended:  # a signal's
            raise
        except TimedOut:
            return Lost(f"{late} without letting others go on (it waits where it should await)")
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            return Lost(reason_of(error, function))

    async def one(score: Awaitable[Any], turn: asyncio.Semaphore) -> Any:
        async with turn:
            task = asyncio.ensure_future(score_of(score))
            # Not wait_for, which would wait for one that takes no notice of being cancelled.
            await asyncio.wait({task}, timeout=seconds)
            if not task.done():
                task.cancel()
                return Lost(late)
            return Lost("it was cancelled") if task.cancelled() else task.result()

    async def all_of_them() -> list[Any]:
        turn = asyncio.Semaphore(patience.concurrency)
        waiting = [one(x, turn) if inspect.isawaitable(x) else known(x) for x in scores]
        beats = asyncio.ensure_future(beat.beats())
        try:
            return await asyncio.gather(*waiting)
        finally:
            beats.cancel()
            beat.at = math.inf

    async def known(score: Any) -> Any:
        return score

    try:
        with named_if_slow(who), beat.watched():
            return awaited(all_of_them())
    except TimedOut:  # between two awaitables
        raise InputError(f"{who} failed: {late}") from None


class Beat:
    """Sees that the loop goes on: an awaitable that waits without awaiting stops all of them, and
    their timeouts, too. After so many seconds it is ended by TimedOut."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.at = seconds, 0.0

    async def beats(self) -> None:
        while self.seconds is not None:
            self.at = time.monotonic()
            await asyncio.sleep(self.seconds / 10)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Where there are alarms: not in a notebook's thread."""
        if self.seconds is None or not can_ring():
            yield
            return
        self.at = time.monotonic()
        with alarm(self.seconds, self.seconds / 10, self.ring):
            yield

    def ring(self) -> None:
        if time.monotonic() - self.at > self.seconds:
            self.at = time.monotonic()  # the next one has as long
            raise TimedOut
