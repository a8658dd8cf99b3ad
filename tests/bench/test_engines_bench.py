"""bench/engines.py: what it counts."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from rlhf_fast.trainer.rollout.protocol import completions

FILE = Path(__file__).parents[2] / "bench" / "engines.py"


def test_tokens_a_second(monkeypatch):
    spec = importlib.util.spec_from_file_location("engines_bench", FILE)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Engine:
        def generate(self, prompts, sampling, seed):
            clock[0] += [9.0, 1.0, 2.0, 6.0][seed]  # the first is not counted; the median is 2
            size = sampling.max_new_tokens
            return completions([[3] * size] * len(prompts), [[-1.0] * size] * len(prompts))

    assert bench.tokens_a_second(Engine(), rows=16, tokens=8) == pytest.approx(16 * 8 / 2)
