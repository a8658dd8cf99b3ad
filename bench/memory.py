"""Peak extra memory of one call: what the process held at most, above its inputs.

On CUDA the allocator knows. On CPU the kernel does: a fresh process builds the inputs, makes the
call once to load its code (torch.compile compiles, the BLAS gets the scratch it then keeps), gives
freed memory back, notes its resident size, resets the high-water mark (VmHWM), makes the call once
more and reads the mark. That counts every page touched, whoever allocated it: torch, a C++ kernel,
the BLAS; not the scratch the BLAS kept from the first call. It is good to a few 100 KB: the kernel
counts pages in batches.

``peak`` is all of the growth; ``held`` the outputs and gradients, which anyone has to hold;
``extra`` the rest of the peak: the temporaries.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from rlhf_fast.ops.linear import chunks as linear

from . import inputs
from .cases import OPS
from .inputs import Answer
from .peers import PEERS

Growth = dict[str, int]  # peak, held, extra in bytes
Found = dict[tuple[str, str], Growth]  # by (pass, contestant); one that fails is not in it

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of glibc's mallopt


def measured(
    op: str,
    shape: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    contestants: list[tuple[str, str]],
) -> Found:
    """Growth of each (pass, "ours" or a peer's name). LookupError says why there is none."""
    arguments = (op, shape, device, dtype, contestants, torch.get_num_threads())
    if device.type != "cpu":
        return _each(*arguments)
    if not Path("/proc/self/clear_refs").exists():
        raise LookupError("needs /proc/self/clear_refs (Linux)")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_each, *arguments).result()
        except BrokenProcessPool:
            raise LookupError("the measuring process was killed") from None


def _each(
    op_name: str,
    shape: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    contestants: list[tuple[str, str]],
    threads: int,
) -> Found:
    torch.set_num_threads(threads)
    op = OPS[op_name]
    (sample,) = inputs.draw(op, shape, device, dtype, cache=0)
    growth = resident_growth if device.type == "cpu" else allocated_growth
    found = {}
    for kind, name in contestants:
        function = op.function if name == "ours" else PEERS[name].function_for(op)
        with contextlib.suppress(RuntimeError, MemoryError):  # its cell stays empty
            found[kind, name] = growth(lambda f=function, k=kind: inputs.call(f, sample, k))
    return found


def allocated_growth(call: Callable[[], Answer]) -> Growth:
    """By the CUDA allocator, during the second of two calls."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = call().bytes
    torch.cuda.synchronize()
    return _growth(torch.cuda.max_memory_allocated() - before, held)


def resident_growth(call: Callable[[], Answer]) -> Growth:
    """Of this process, during the second of two calls."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc: what is freed goes back at once and cannot be reused
        libc.mallopt(_MMAP_THRESHOLD, 64 * 1024)
        libc.mallopt(_ARENA_MAX, 1)
    call()
    linear.release_memory()  # what the linear engine keeps, a chunk and a gradient's memory, counts
    gc.collect()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    answer = call()
    return _growth(_status("VmHWM") - before, answer.bytes)


def _growth(peak: int, held: int) -> Growth:
    return {"peak": peak, "held": held, "extra": max(0, peak - held)}


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)[1]) * 1024
