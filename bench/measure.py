"""Time: contestants interleaved in one process, and the device's own ceilings in the same run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

MOST_ROUNDS = 1000
# Clock cycles a GPU waits before a call, about 0.5 ms: the host queues its kernels meanwhile, as in
# training, where it runs ahead. Without that a GPU's time would be the host's for what takes 50 us.
HEAD_START = 1_000_000


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, numbers: list[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, q1, q3)


def interleaved(
    calls: dict[str, Callable[[int], object]],
    device: torch.device,
    *,
    budget: float,
    least: int,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round; every round begins with another contestant, so a slow
    spell of the machine meets all of them. A call gets a running number, to choose its inputs by.

    After one round to warm up there are as many as fit ``budget`` seconds, from ``least`` to 1000.
    Where a round alone takes longer than that, the first one counts: it has made all warm long
    before it ends, and was itself not the first call of anybody.
    """
    names = list(calls)
    first_round = {name: stopwatch(calls[name], i, device) for i, name in enumerate(names)}
    warm_up = sum(first_round.values())
    rounds = max(least, min(MOST_ROUNDS, int(budget / warm_up)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    if warm_up > budget > 0:
        seconds, rounds = {name: [x] for name, x in first_round.items()}, rounds - 1
    number = len(names)
    gc.collect()
    gc.disable()
    try:
        for first in range(rounds):
            for i in range(len(names)):
                name = names[(first + i) % len(names)]
                seconds[name].append(stopwatch(calls[name], number, device))
                number += 1
    finally:
        gc.enable()
    return seconds


def stopwatch(call: Callable[[int], object], number: int, device: torch.device) -> float:
    """Seconds of one call, on a GPU those of its kernels. Freeing what it returned is not part of
    it."""
    if device.type == "cpu":
        start = time.perf_counter()
        result = call(number)
        seconds = time.perf_counter() - start
    else:
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        result = call(number)
        end.record()
        torch.cuda.synchronize(device)
        seconds = begin.elapsed_time(end) / 1e3
    del result
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> Spread:
    """How many times as long as ours, round against round: what slows a whole round down cancels,
    which it would not in the ratio of two medians."""
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


@dataclass(frozen=True)
class Ceilings:
    """What this device does at most, in bytes and FLOPs a second, by torch's own copy and GEMM.

    The copy counts a read and a write. An op that only reads may pass it: on CPU a write first
    reads the line it will overwrite.
    """

    copy: float
    gemm: float
    gemm_dtype: str

    def rate(self, n_bytes: int, flops: int, seconds: float) -> dict[str, float | str]:
        """The rate of an op against its own ceiling: GEMM if it multiplies matrices, else copy."""
        if flops:
            rate = flops / seconds
            return {"unit": "GFLOP/s", "value": rate / 1e9, "share": rate / self.gemm}
        rate = n_bytes / seconds
        return {"unit": "GB/s", "value": rate / 1e9, "share": rate / self.copy}

    def or_better(self, other: Ceilings) -> Ceilings:
        return Ceilings(max(self.copy, other.copy), max(self.gemm, other.gemm), self.gemm_dtype)

    def record(self) -> dict[str, float | str]:
        return asdict(self)


def ceilings(device: torch.device, dtype: torch.dtype, cache: int) -> Ceilings:
    big = device.type != "cpu"
    source = torch.ones(max(8 * cache, 256 * 2**20) // 4, device=device)
    target = torch.empty_like(source)
    n = 8192 if big else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    product = torch.empty_like(a)
    seconds = interleaved(
        {
            "copy": lambda _: target.copy_(source),
            "gemm": lambda _: torch.mm(a, a, out=product),
        },
        device,
        budget=2.0,
        least=5,
    )
    best = {name: min(x) for name, x in seconds.items()}  # a ceiling is not a median
    return Ceilings(
        2 * source.nbytes / best["copy"], 2 * n**3 / best["gemm"], str(dtype).removeprefix("torch.")
    )
