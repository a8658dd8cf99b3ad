"""The CUDA paths of our own Python, on a device that is pretended (tests/pretended_gpu)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

FOLDER = Path(__file__).parents[1] / "pretended_gpu"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.long
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: nothing is pretended")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: -m gpu runs on it")
def test_every_op_on_a_pretended_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="no triton on this machine: kernels not tested")
    guard, libraries = tmp_path / "guard.so", str(Path(torch.__file__).with_name("lib"))
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    subprocess.run(
        [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", *include, str(FOLDER / "guard.cpp"),
         "-o", str(guard), f"-L{libraries}", "-lc10", "-ltorch_cpu"], check=True,
    )  # fmt: skip
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "LD_PRELOAD": str(guard), "OMP_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": libraries, "PYTHONPATH": f"{FOLDER}{os.pathsep}{FOLDER.parent}",
        "PYTEST_ADDOPTS": "", "RLHF_FAST_TESTS_GPU": "pretended",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "plugin", "suite.py",
        "../ops/test_gpu.py",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=900
    )
    print(*(x for x in done.stdout.splitlines() if x.startswith("left out")), sep="\n")
    last = (done.stdout.strip() or done.stderr).splitlines()
    assert done.returncode == 0, "\n".join(last[-60:])
    assert " passed" in last[-1] and "skipped" not in last[-1]
