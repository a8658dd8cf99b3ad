"""The text of csrc/gae_cuda.cuh, compiled by the host's C++ compiler and run thread by thread."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rlhf_fast.ops import check
from rlhf_fast.ops.gae import reference, samples

CXX = shutil.which("g++") or shutil.which("c++")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CXX is None, reason="no C++ compiler: csrc/gae_cuda.cuh is not run"),
]

ROOT = Path(__file__).parents[2]
SOURCE = """
#include "cuda_on_cpu.h"
#include "gae_cuda.cuh"
#define RUN(S, NAME)                                                                          \\
  extern "C" void NAME(                                                                       \\
      const S* rewards, const S* values, const unsigned char* mask,                           \\
      const unsigned char* dones, const S* bootstrap, S* advantages, S* returns,              \\
      unsigned rows, long long steps, double gamma, double lam, bool skip, int warps,         \\
      bool vectors) {                                                                         \\
    const rlhf_fast::Gae<S> a{rewards, values, bootstrap, mask, dones, advantages, returns,   \\
                              steps, S(gamma), S(gamma * lam), skip};                         \\
    cuda_on_cpu::launch(rows, warps * 32, [&] {                                               \\
      if (warps == 1) vectors ? rlhf_fast::gae_rows<S, 1, true>(a)                            \\
                              : rlhf_fast::gae_rows<S, 1, false>(a);                          \\
      if (warps == 4) vectors ? rlhf_fast::gae_rows<S, 4, true>(a)                            \\
                              : rlhf_fast::gae_rows<S, 4, false>(a);                          \\
    });                                                                                       \\
  }
RUN(float, run_float)
RUN(double, run_double)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "gae.cpp").write_text(SOURCE)
    subprocess.run(
        [CXX, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas",
         f"-I{Path(__file__).parent}", f"-I{ROOT / 'csrc'}", folder / "gae.cpp",
         "-o", folder / "gae.so"],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "gae.so"))


def run(library, warps, dtype, rewards, values, mask=None, *, gamma=1.0, lam=0.95, dones=None,
        bootstrap=None, holes="skip"):  # fmt: skip
    shape = rewards.shape
    rewards, values = check.flat(rewards, dtype), check.flat(values, dtype)
    mask, dones = check.flat(mask), check.flat(dones)
    bootstrap = None if bootstrap is None else bootstrap.to(dtype).reshape(-1).contiguous()
    advantages = torch.full_like(rewards, torch.nan)
    returns = torch.full_like(rewards, torch.nan)
    rows, steps = rewards.shape
    f = library.run_float if dtype == torch.float32 else library.run_double
    pointers = [
        ctypes.c_void_p(None if x is None else x.data_ptr())
        for x in (rewards, values, mask, dones, bootstrap, advantages, returns)
    ]
    f(*pointers, rows, ctypes.c_longlong(steps), ctypes.c_double(gamma), ctypes.c_double(lam),
      holes == "skip", warps, steps % (16 // dtype.itemsize) == 0)  # fmt: skip
    return advantages.reshape(shape), returns.reshape(shape)


def compare(library, warps: int, arguments: dict) -> None:
    for dtype in (torch.float32, torch.float64):
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for k, x in arguments.items()}  # fmt: skip
        results = run(library, warps, dtype, **arguments)
        for result, expected in zip(results, reference(**wide), strict=True):
            torch.testing.assert_close(result, expected.to(dtype), **tolerance)


NAMES = [s.name for s in samples(torch.Generator()) if s.arguments["rewards"].numel()]


@pytest.mark.parametrize("name", NAMES)
def test_samples(library, name: str) -> None:
    everything = samples(torch.Generator().manual_seed(0))
    compare(library, 1, next(s for s in everything if s.name == name).arguments)


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("steps", [1300, 1301])  # several tiles; rows of 16-byte packs, and not
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_many_tiles(library, warps: int, steps: int, holes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, steps, generator=generator) < 0.5
    mask[0, 300:1100] = False  # a hole longer than a tile
    compare(library, warps, {
        "rewards": torch.randn(2, steps, generator=generator).masked_fill(~mask, torch.nan),
        "values": torch.randn(2, steps, generator=generator).masked_fill(~mask, torch.inf),
        "mask": mask,
        "dones": torch.rand(2, steps, generator=generator) < 0.005,
        "bootstrap": torch.randn(2, generator=generator),
        "gamma": 0.99, "lam": 0.97, "holes": holes,
    })  # fmt: skip
