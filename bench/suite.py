"""One op at one shape: check everybody, time those who are right, weigh them; a record a pass.

A record is plain JSON; the table and the plot are made from it and from nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.registry import Op, Sample

from . import foreign, inputs, measure, memory, oracle
from .inputs import BOTH
from .peers import Peer

Record = dict[str, Any]
Cell = dict[str, Any]


@dataclass
class Settings:
    """seconds, rounds: of timing for a row, at least. patience: seconds a peer's first call may
    take. ends: by time.monotonic(), when all compiling should be over: a peer that compiles may
    take at most half of what is left till then. heavy: bytes of inputs from which on memory
    matters and is measured; thorough: of those that compile, too. last_pass: forward+backward
    alone, where there is one. timed: else the answers are checked and nothing more."""

    device: torch.device
    dtype: torch.dtype
    cache: int
    seconds: float
    rounds: int
    patience: float
    ends: float = float("inf")
    thorough: bool = True
    last_pass: bool = False
    timed: bool = True
    heavy: int = 2**23

    def patience_for(self, peer: Peer) -> float:
        if not peer.compiles:
            return self.patience
        return max(1.0, min(self.patience, (self.ends - time.monotonic()) / 2))


def compare(
    op: Op,
    shape: dict[str, int],
    peers: list[Peer],
    settings: Settings,
    report: Callable[[str], None] = lambda doing: None,
) -> list[Record]:
    """The records of an op at a shape, one for each pass; out of memory costs them, not the run."""
    torch._dynamo.reset()  # else shapes add up to its limit of recompilations
    head = {"op": op.name, "shape": shape, "implementation": implementation(op, settings.device)}
    try:
        report("inputs")
        samples = inputs.draw(op, shape, settings.device, settings.dtype, settings.cache)
        head["dtype"] = str(inputs.dtype_of(samples[0])).removeprefix("torch.")
        report("float64 oracle")
        checked, judged, truth = _truth(op, shape, samples[0], settings)
        if checked != shape:
            head["checked_at"] = checked
        records = []
        for kind in inputs.passes(samples[0])[-1 if settings.last_pass else 0 :]:
            row = _one_pass(op, kind, samples, judged, truth, peers, settings, report)
            counts = _counts(op, shape, inputs.dtype_of(samples[0]), kind)
            records.append({**head, "pass": kind, **counts, **row})
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return [{**head, "dtype": "", "pass": "all", "failed": "out of memory", "cells": {}}]
    if not settings.timed:
        return records
    if sum(x.nbytes for x in inputs.tensors(samples[0]).values()) >= settings.heavy:
        del samples, judged, truth
        report("memory")
        _weigh(op, shape, records, peers, settings)
    return records


def _truth(
    op: Op, shape: dict[str, int], sample: Sample, settings: Settings
) -> tuple[dict[str, int], Sample, oracle.Truth]:
    """The shape that is checked, its inputs, and the right answer to them."""
    *better, last = oracle.checked_shapes(shape, settings.device)
    for checked in better:
        try:
            return checked, sample, oracle.truth(op, checked, sample)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        torch.cuda.empty_cache()
    if last != shape:
        (sample,) = inputs.draw(op, last, settings.device, settings.dtype, cache=0)
    return last, sample, oracle.truth(op, last, sample)


def implementation(op: Op, device: torch.device) -> str:
    names = dict.fromkeys(k.implementation(device.type) for k in op.kernels)
    return ", ".join(names) or "PyTorch"


def _one_pass(
    op: Op,
    kind: str,
    samples: list[Sample],
    judged: Sample,
    truth: oracle.Truth,
    peers: list[Peer],
    settings: Settings,
    report: Callable[[str], None],
) -> Record:
    """Cells of ours and of each peer; times only where ours is right, and only of who is right."""
    cells: dict[str, Cell] = {}
    functions: dict[str, Callable[..., Any]] = {}
    for peer in (Peer("ours", lambda op: op.function), *peers):
        report(f"{kind}: checking {peer.name}")
        cell: Cell = {"yardstick": True} if peer.yardstick else {}
        try:
            function = peer.function_for(op)
            if function is None:
                continue
            with deadline(None if peer.name == "ours" else settings.patience_for(peer)):
                _check(cell, function, judged, kind, truth, ours=peer.name == "ours")
        except Exception as error:  # whatever it is, it costs this cell and not the run
            cell |= _stopped(error, peer, settings)
        cells[peer.name] = cell
        if not {"refused", "failed", "skipped"} & cell.keys():
            functions[peer.name] = function

    row: Record = {"copies": len(samples), "rounds": 0, "cells": cells}
    if "ours" not in functions or not settings.timed:
        return row
    report(f"{kind}: timing")

    def timed(name: str, function: Callable[..., Any]) -> Callable[[int], object]:
        seeds = _seeds(cells[name], truth) if judged is samples[0] else None
        return lambda i: inputs.call(function, samples[i % len(samples)], kind, seeds)

    calls = {name: timed(name, function) for name, function in functions.items()}
    seconds = measure.interleaved(
        calls, settings.device, budget=settings.seconds, least=settings.rounds
    )
    row["rounds"] = len(seconds["ours"])
    for name, measured in seconds.items():
        cells[name]["seconds"] = asdict(measure.Spread.of(measured))
        if name != "ours":
            cells[name]["ratio"] = asdict(measure.ratio(measured, seconds["ours"]))
    return row


def _check(
    cell: Cell,
    function: Callable[..., Any],
    sample: Sample,
    kind: str,
    truth: oracle.Truth,
    ours: bool,
) -> None:
    answer = inputs.call(function, sample, kind, _seeds(cell, truth))
    if cell.get("yardstick"):
        return
    given = sum(x is not None for x in answer.outputs)
    if given < len(truth.answer.outputs):
        cell["outputs"] = {"given": given, "of": len(truth.answer.outputs)}
    verdict = oracle.judge(answer, truth)
    value, largest = (  # JSON has no infinity
        x if math.isfinite(x) else "infinite" for x in (verdict.error, verdict.largest)
    )
    cell["error"] = {
        "of": verdict.part, "value": value, "limit": verdict.limit, "largest": largest,
    }  # fmt: skip
    if verdict.wrong:
        mark = "rounded" if verdict.rounded and not ours else "refused"
        cell[mark] = f"error {verdict.error:.1e} of {verdict.part}, limit {verdict.limit:.1e}"


def _seeds(cell: Cell, truth: oracle.Truth) -> dict[int, Tensor] | None:
    """What a contestant's backward begins with; a yardstick has outputs of its own."""
    return None if cell.get("yardstick") else truth.seeds


def _counts(op: Op, shape: dict[str, int], dtype: torch.dtype, kind: str) -> Record:
    """Bytes and FLOPs of a pass; the counts are the registry's."""
    passes = slice(0, 2 if kind == BOTH else 1)
    return {
        "bytes": sum(op.bytes_moved(shape, dtype.itemsize)[passes]),
        "flops": sum(op.flops(shape, dtype.itemsize)[passes]),
    }


def rate(records: list[Record], ceilings: measure.Ceilings) -> None:
    """Add to each record that has a time how ours stands to the device's ceiling."""
    for record in records:
        seconds = record["cells"].get("ours", {}).get("seconds")
        if seconds:
            record["rate"] = ceilings.rate(record["bytes"], record["flops"], seconds["median"])


def _weigh(
    op: Op, shape: dict[str, int], records: list[Record], peers: list[Peer], settings: Settings
) -> None:
    """Add the peak memory of everybody who was timed, yardsticks aside: they hold no outputs."""
    left_out = {p.name for p in peers if p.yardstick or (p.compiles and not settings.thorough)}
    contestants = [
        (record["pass"], name)
        for record in records
        for name, cell in record["cells"].items()
        if "seconds" in cell and name not in left_out
    ]
    if not contestants:
        return
    try:
        found = memory.measured(op.name, shape, settings.device, settings.dtype, contestants)
    except LookupError as error:
        for record in records:
            record["memory_failed"] = str(error)
        return
    for record in records:
        for name, cell in record["cells"].items():
            if growth := found.get((record["pass"], name)):
                cell["memory"] = growth


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """TimeoutError in the main thread after so many seconds, at the next Python instruction."""
    if seconds is None:
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"the first call took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    logging.disable(logging.ERROR)  # a compiler that is stopped logs where, in pages
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        logging.disable(logging.NOTSET)


def out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in text for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def _stopped(error: Exception, peer: Peer, settings: Settings) -> Cell:
    """{"skipped" or "failed": one line}. A peer that is not here, or that a quick run has no time
    for, has not failed."""
    if isinstance(error, foreign.NotHere):
        return {"skipped": str(error)}
    if isinstance(error, ImportError) and peer.distribution:
        if foreign.version(peer.distribution) is None:
            return {"skipped": foreign.NOT_INSTALLED}
    if out_of_memory(error):
        return {"failed": "out of memory"}
    cause: BaseException | None = error  # a compiler wraps what stopped it in errors of its own
    while cause is not None and not isinstance(cause, TimeoutError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and peer.compiles and settings.ends < float("inf"):
        return {"skipped": "left out by --quick"}
    return {"failed": _reason(cause or error)}


def _reason(cause: BaseException) -> str:
    text = str(cause).strip() or "no message"
    return f"{type(cause).__name__}: {text.splitlines()[0][:200]}"
