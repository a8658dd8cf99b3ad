"""make test-levels: the suite on lower instruction sets than this CPU has, where other roundings
appear: ATen's kernels, oneDNN's and MKL's products, and our own C++.

``python tests/levels.py [level …] [-- arguments of pytest]``; a level that the CPU has not is left
out, and said so.
"""

from __future__ import annotations

import os
import subprocess
import sys

SWITCHES = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "RLHF_FAST_CPU_CAPABILITY": "default",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2", "RLHF_FAST_CPU_CAPABILITY": "avx2",
    },
}  # fmt: skip
PROBE = """
import torch
from rlhf_fast.ops import registry
simd = registry.extension.build_info()["SIMD"] if registry.extension else "no C++ kernels"
print(f"ATen {torch.backends.cpu.get_cpu_capability()}, C++ {simd}")
"""


def environment(level: str) -> dict[str, str]:
    return {**os.environ, **SWITCHES[level]}


def what_runs(level: str) -> str:
    """What of a level a process has; "" where the CPU has not got it."""
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=environment(level), capture_output=True, text=True)
    if "RLHF_FAST_CPU_CAPABILITY is" in done.stderr:
        return ""
    done.check_returncode()
    return done.stdout.strip()


def run(level: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=environment(level), text=True)


def main(words: list[str]) -> None:
    cut = words.index("--") if "--" in words else len(words)
    levels, arguments = words[:cut] or list(SWITCHES), words[cut + 1 :]
    failed = []
    for level in levels:
        found = what_runs(level)
        print(f"== {level}: {found or 'this CPU has not got it'}", flush=True)
        if found and run(level, *arguments).returncode:
            failed.append(level)
    raise SystemExit(f"failed on: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
