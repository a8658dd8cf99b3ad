"""Memory for large gradients on a CPU, used again once nobody has the gradient any more.

A gradient of 100 MB, of a head [V, H] or of logits, that is freed goes back to the system, and the
next one's pages are made and cleared anew: on a virtual machine (AMD EPYC) that takes 40 to 150 ms
where writing it takes 20.
"""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor, nn

LEAST = 32 * 2**20  # bytes; smaller ones malloc itself uses again
PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)  # 0 on Windows

_blocks: list[mmap.mmap] = []  # each in use as long as a tensor holds it


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like, contiguous. On a CPU a large one may lie where an earlier one lay that is
    gone with all its views; of the memory that is free then no more than one block is kept."""
    dtype = dtype or x.dtype
    size = x.numel() * dtype.itemsize
    real = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    if not real or size < LEAST or not PRIVATE:
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    fitting = [block for block in _take_free() if size <= len(block) <= 2 * size]
    block = fitting[0] if fitting else mmap.mmap(-1, size, flags=PRIVATE)
    with torch.inference_mode(False):
        # not a view of it: autograd adds in place to what no other tensor shares
        found = torch.frombuffer(block, dtype=dtype, count=x.numel()).resize_(x.shape)
    _blocks.append(block)
    return found


def _take_free() -> list[mmap.mmap]:
    """The blocks that no tensor holds; nobody else finds them from now on."""
    free: list[mmap.mmap] = []
    for _ in range(len(_blocks)):
        block = _blocks.pop(0)
        (free if sys.getrefcount(block) == ALONE else _blocks).append(block)
    return free


def _references() -> int:
    """sys.getrefcount of what a local name alone refers to: one less from Python 3.14 on."""
    blocks = [mmap.mmap(-1, 1)]
    block = blocks.pop(0)
    return sys.getrefcount(block)


ALONE = _references()


def release() -> None:
    """Give back what is free."""
    _take_free()
