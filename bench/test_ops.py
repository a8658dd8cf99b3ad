"""pytest-benchmark over the same registry, to compare one commit with another:

pytest bench/ --benchmark-save=before
pytest bench/ --benchmark-compare
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import inputs, machine  # noqa: E402
from bench.cases import OPS  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16


@pytest.mark.parametrize("kind", [inputs.FORWARD, inputs.BOTH])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_op(benchmark, op, kind):
    """Each op's first shape, on inputs that outgrow the cache."""
    shape = op.shapes[0]
    samples = inputs.draw(op, shape, DEVICE, DTYPE, machine.last_cache(DEVICE))
    if kind not in inputs.passes(samples[0]):
        pytest.skip(f"{op.name} has no backward")
    benchmark.extra_info["shape"] = shape
    turns = itertools.cycle(samples)

    def call():
        inputs.call(op.function, next(turns), kind)
        if DEVICE.type != "cpu":
            torch.cuda.synchronize()

    benchmark(call)
