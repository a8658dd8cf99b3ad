"""The Triton kernels under Triton's interpreter: triton_interpreter.py, in a child process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton on this machine: its kernels are not tested")


# Together they are all of it, whatever is added; apart, two workers can share them.
PARTS = (
    "linear_policy_loss",
    "linear and not linear_policy_loss",
    "policy_loss and not linear",
    "not policy_loss and not linear",
)


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    file = Path(__file__).with_name("triton_interpreter.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-q", "-rf", "-p", "no:cacheprovider",
         "--import-mode=importlib", "--maxfail=5", "-k", part],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 50, run.stdout
