"""How setup.py compiles the kernels: which there can be, and what is left when one fails.

rlhf_fast._C has the C++ kernels and rlhf_fast._cuda the CUDA ones, in a file of its own, so that
whatever is wrong with nvcc costs nobody the C++ kernels. What is not built is said aloud, and
written down beside the package for ``rlhf-fast info``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from setuptools import Extension

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
# -g0: many a Python compiles with -g, which takes 1.4 times as long, for a file of 17 MB, not 2.
CPP_FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=fast", "-Wno-psabi", STABLE_ABI]
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", STABLE_ABI]
PURE = "RLHF_FAST_PURE_PYTHON"
RECORD = "missing.json"


def plan() -> tuple[list[Extension], dict[str, str]]:
    """What can be built here, and {what cannot: why}."""
    if reason := why_no_cpp():
        return [], {"C++": reason, "CUDA": reason}
    cpp = cpp_extension()
    if reason := why_no_cuda():
        return [cpp], {"CUDA": reason}
    try:
        return [cpp, cuda_extension()], {}
    except Exception as error:  # whatever torch does not find in the toolkit
        return [cpp], {"CUDA": failed(error)}


def why_no_cpp() -> str | None:
    if os.environ.get(PURE) == "1":
        return f"built with {PURE}=1"
    return None if compiler() else "no C++ compiler was found when it was built"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def why_no_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"built beside torch {torch.__version__}, which is no CUDA build"
    return None if toolkit() else "nvcc was not found when it was built"


def toolkit() -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or where nvcc itself says it is.

    torch takes the folder above nvcc's, which is another one where nvcc is a link or a script that
    calls the real one; the build then ends at -lcudart.
    """
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if given or nvcc is None:
        return given
    try:
        asked = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", asked.stdout + asked.stderr, re.MULTILINE)
    return os.path.realpath(top[1]) if top else str(Path(nvcc).resolve().parents[1])


def cpp_extension() -> Extension:
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "rlhf_fast._C",
        files("csrc/module.cpp", "csrc/*_cpu.cpp"),
        depends=files("csrc/*.h"),
        include_dirs=[pybind11.get_include()],
        define_macros=[("RLHF_FAST_COMPILER", f'"{Path(compiler()).name}"')],
        extra_compile_args={"cxx": CPP_FLAGS},
    )


def cuda_extension() -> Extension:
    os.environ["CUDA_HOME"] = toolkit()  # before torch looks for it
    import pybind11
    from torch.utils import cpp_extension as torch_extension

    torch_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # it may have looked already
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return torch_extension.CUDAExtension(
        "rlhf_fast._cuda",
        files("csrc/module_cuda.cpp", "csrc/*_cuda.cu"),
        depends=files("csrc/*.*h"),
        include_dirs=[pybind11.get_include()],
        define_macros=[("RLHF_FAST_CUDA_ARCHITECTURES", f'"{architectures}"')],
        extra_compile_args={"cxx": CPP_FLAGS, "nvcc": CUDA_FLAGS},
    )


def files(*patterns: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


def build_ext(missing: dict[str, str]) -> type:
    """setup.py's command; missing: what plan() leaves out, to which it adds what fails."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            self.extensions = [each for each in self.extensions if each.sources]
            super().run()
            package = Path(self.get_ext_fullpath("rlhf_fast._C")).parent
            for name in {"rlhf_fast._C", "rlhf_fast._cuda"} - {x.name for x in self.extensions}:
                Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)  # of an earlier build
            package.mkdir(parents=True, exist_ok=True)
            (package / RECORD).write_text(json.dumps(missing))
            announce(missing)

        def build_extensions(self) -> None:
            built = []
            for extension in self.extensions:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:
                    if extension.name == "rlhf_fast._C":
                        say(f"the C++ kernels do not compile here. {PURE}=1 installs without them.")
                        raise
                    missing["CUDA"] = failed(error)
                else:
                    built.append(extension)
            self.extensions = built

    return Build


def failed(error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"their build failed: {reason} (pip install -v shows the compiler's own words)"


def announce(missing: dict[str, str]) -> None:
    if "C++" in missing:
        say(
            f"NO C++ KERNELS: {missing['C++']}. Everything works, but on the CPU in plain PyTorch, "
            "many times slower. `rlhf-fast info` shows what runs where."
        )
    elif "failed" in missing.get("CUDA", ""):
        say(
            f"NO CUDA KERNELS: {missing['CUDA']}. The C++ kernels and the Triton kernels, which a "
            "GPU runs by default, are installed. `rlhf-fast info` shows what runs where."
        )


def say(text: str) -> None:
    """On the terminal, if there is one: pip shows nothing of a build that ends well."""
    try:
        out = open("/dev/tty", "w")
    except OSError:
        out = sys.stderr
    print("\n" + textwrap.fill(f"rlhf_fast: {text}", 88), file=out, flush=True)
