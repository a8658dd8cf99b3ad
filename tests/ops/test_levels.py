"""The ops on the lowest instruction set, in a child process; `make test-levels` runs all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import levels
import pytest

from rlhf_fast.ops import registry

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
