"""Builds the kernels (build_kernels.py): C++, and CUDA where nvcc and a CUDA torch are.

They use torch's stable ABI (a second a file to compile, any torch from 2.10 on runs the binary).
Everything still works without, in plain PyTorch: with no C++ compiler, or with
RLHF_FAST_PURE_PYTHON=1, the install is pure Python and ``rlhf-fast info`` says so.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# Under pip's build isolation the torch to build against is the installed one, outside.
sys.path += [str(Path(__file__).parent), sysconfig.get_path("platlib")]
try:
    import build_kernels
except ImportError as error:
    raise SystemExit(
        f"rlhf_fast builds against the torch you run: install torch first, then rlhf_fast ({error})"
    ) from None

extensions, missing = build_kernels.plan()
setup(
    ext_modules=extensions or [Extension("rlhf_fast._C", [])],  # its command notes what is missing
    cmdclass={"build_ext": build_kernels.build_ext(missing)},
)
