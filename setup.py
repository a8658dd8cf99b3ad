"""Builds rlhf_fast._C: the C++ kernels, and the CUDA ones where nvcc and a CUDA torch are.

The kernels use torch's stable ABI (a second a file to compile, any torch from 2.10 on runs the
binary). Everything still works without the extension, in plain PyTorch: with no C++ compiler, or
with RLHF_FAST_PURE_PYTHON=1, the install is pure Python and ``rlhf-fast info`` says so.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# Under pip's build isolation the torch to build against is the installed one, outside.
sys.path.append(sysconfig.get_path("platlib"))
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "rlhf_fast builds against the torch you run: install torch first, then rlhf_fast "
        f"(import torch failed: {error})"
    ) from None

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
CPP_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=fast", "-Wno-psabi", STABLE_ABI]
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", STABLE_ABI]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def extension():
    import pybind11

    root = Path(__file__).parent
    cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    patterns = ["csrc/*.cpp", "csrc/*.cu"] if cuda else ["csrc/*.cpp"]
    sources = sorted(str(p.relative_to(root)) for pattern in patterns for p in root.glob(pattern))
    macros = [("RLHF_FAST_COMPILER", f'"{Path(compiler()).name}"')]
    if cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        macros.append(("RLHF_FAST_CUDA_ARCHITECTURES", f'"{architectures}"'))
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "rlhf_fast._C",
        sources,
        depends=[str(p.relative_to(root)) for p in root.glob("csrc/*.*h")],
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args={"cxx": CPP_FLAGS, "nvcc": CUDA_FLAGS},
    )


options = {}
if os.environ.get("RLHF_FAST_PURE_PYTHON") == "1":
    print("rlhf_fast: RLHF_FAST_PURE_PYTHON=1, installing without the C++ kernels")
elif compiler() is None:
    print("rlhf_fast: no C++ compiler found, installing without the C++ kernels")
else:
    options["ext_modules"] = [extension()]
    options["cmdclass"] = {"build_ext": cpp_extension.BuildExtension}
setup(**options)
