"""The ops on the lowest instruction set, in a child process; `make test-levels` runs all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import levels
import pytest
import torch

from rlhf_fast.ops import registry
from rlhf_fast.ops.decoding import thin_linear  # noqa: F401, which registers its kernel

OPS = Path(__file__).parent
FEW = "test_float32 and (everything or all or garbage or behind or block or far or compact)"


@pytest.mark.long
@pytest.mark.skipif(registry.extension is None, reason="the C++ extension is not built")
def test_the_ops_on_the_lowest_level() -> None:
    found = levels.what_runs("default")
    assert "ATen DEFAULT" in found
    assert "C++ SSE2" in found or os.uname().machine != "x86_64"
    files = [str(OPS / name) for name in ("test_ops.py", "test_draw_tokens.py")]
    assert levels.run("default", *files, "-k", f"({FEW}) or draw or ends").returncode == 0


def test_an_unknown_level_is_one_clear_error() -> None:
    message = "RLHF_FAST_CPU_CAPABILITY must be one of default, avx2, avx512, got"
    for asked in ("avx3", "AVX2", ""):
        with pytest.raises(ValueError, match=f"{message} '{asked}'"):
            registry.choose_cpu(asked)
    environment = {**os.environ, registry.CPU_VARIABLE: "avx3"}
    command = [sys.executable, "-c", "import rlhf_fast"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == f"ValueError: {message} 'avx3'"


@pytest.mark.skipif(registry.extension is None, reason="the C++ extension is not built")
def test_the_levels_of_this_cpu() -> None:
    """Those up to its best can be chosen, which `rlhf-fast info` says; others are refused."""
    extension = registry.extension
    best = extension.use_cpu("nothing")  # which it has not: so it names what it has
    try:
        for name in registry.CPUS:
            if registry.CPUS.index(name) <= registry.CPUS.index(best):
                registry.choose_cpu(name)
                lower = ", where the CPU has" in extension.build_info()["SIMD"]
                assert lower == (name != best)
            else:
                with pytest.raises(
                    ValueError, match=f"is {name}, and this CPU or build has {best}"
                ):
                    registry.choose_cpu(name)
    finally:
        registry.choose_cpu(os.environ.get(registry.CPU_VARIABLE, best))


def seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Of this thread, in turns, the least of many: what else the machine does counts little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    least = dict.fromkeys(calls, float("inf"))
    try:
        for _ in range(20):
            for name, call in calls.items():
                begun = time.thread_time()
                call()
                least[name] = min(least[name], time.thread_time() - begun)
    finally:
        torch.set_num_threads(threads)
    return least


@pytest.mark.skipif(registry.extension is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("side_by_side", [False, True], ids=["rows", "columns"])
def test_vectors_are_not_taken_apart(side_by_side: bool) -> None:
    """A compiler does that, lane by lane, with vectors wider than an instruction set has: a logit
    took 8 to 14 ns with AVX2, as without it, now .5 to .9 (AMD EPYC). Vectors of
    twice SSE2's lanes take half the time; taken apart, the same: 1.5 lies between."""
    level = os.environ.get(registry.CPU_VARIABLE, registry.extension.use_cpu("nothing"))
    if level == "default":
        pytest.skip("no AVX2 here, or none wanted")
    n, vocab = 16, 20000
    x, y = torch.randn(2, 1, n, vocab, generator=torch.Generator().manual_seed(0))
    if side_by_side:
        x, y = (z.transpose(1, 2).contiguous().transpose(1, 2) for z in (x, y))
    labels, ones = torch.zeros(1, n, dtype=torch.int64), torch.ones(1, n)
    kernels, out = torch.ops.rlhf_fast, torch.empty_like(x)
    *_, norm = kernels.token_logprobs(x, labels, 1.0, None, None, True, False)
    calls: dict[str, Callable[[], object]] = {
        "token_logprobs": lambda: kernels.token_logprobs(x, labels, 1.0, None, None, True, False),
        "token_logprobs_backward": lambda: kernels.token_logprobs_backward(
            ones, None, x, labels, norm, None, 1.0, None, None, out
        ),
    }
    if not side_by_side:
        rows, weight = torch.randn(32, 256), torch.randn(256, 256)
        calls["thin_linear"] = lambda: kernels.thin_linear(rows, weight, None)
    else:  # what logits_kl is made for
        _, _, kl, p, q = kernels.logits_kl(x, y, labels, 1.0, None, None, True)
        calls["logits_kl"] = lambda: kernels.logits_kl(x, y, labels, 1.0, None, None, True)
        calls["logits_kl_backward"] = lambda: kernels.logits_kl_backward(
            ones, ones, x, y, labels, p, q, kl, 1.0, None, None, True, out
        )
    taken = seconds(calls)
    try:
        registry.choose_cpu("default")
        plain = seconds(calls)
    finally:
        registry.choose_cpu(level)
    faster = {name: plain[name] / taken[name] for name in calls}
    assert min(faster.values()) > 1.5, faster
