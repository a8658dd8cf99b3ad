"""The products of the linear engine, and the dtypes they are made in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..registry import define_kernel

# Rows of a 16-bit head that a CPU without products of 16-bit numbers widens at a time.
TILE = 2048


def as_they_are(device: torch.device) -> torch.autocast:
    """Autocast off: check_head has applied it, and products take the dtypes they are given. Never
    held over a chunk's yield: two loops side by side would not leave their contexts in reverse
    order."""
    return torch.autocast(device.type, enabled=False)


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """Float32, out of 16-bit operands too; float64 of float64.

    Logits in bfloat16 would halve their bytes, and lose what a ratio near 1 is made of: of
    SmolLM2-135M's head on 240 tokens of text, log-probs move by 0.016 nats on average and 0.11 at
    most, in float32 by 1e-6 and 1.4e-5.
    """
    return check.accumulator(hidden)


def dlogits_dtype(hidden: Tensor) -> torch.dtype:
    """Of the logits' gradient: what the products take where those of 16 bits are the fast ones,
    else that of the logits, whose place it takes."""
    return hidden.dtype if hidden.is_cuda or fast_on_cpu(hidden.dtype) else logits_dtype(hidden)


@functools.cache
def fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies numbers of this 16-bit type faster than float32 ones."""
    if not on_cpu():
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()


def on_cpu() -> bool:
    """Whether a CPU's wide_product is more than its fallback: in a torch with MKL, of our C++."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("rlhf_fast::wide_product", "CPU")


def sixteen_bit() -> str:
    """How a CPU makes products of 16-bit operands, for ``rlhf-fast info``."""
    if not on_cpu():
        return "a part of the head at a time, widened"
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    fast = [name for name, dtype in names.items() if fast_on_cpu(dtype)]
    return f"MKL's, faster than float32 ones: {', '.join(fast) or 'none'}"


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, accumulated in total's dtype; the first product overwrites."""
    wide: dict[str, Any] = {}
    if not a.dtype == b.dtype == total.dtype:
        if not total.is_cuda:
            if a.dtype == b.dtype:
                torch.ops.rlhf_fast.wide_product(a, b, total, first)
            else:
                _accumulate_widened(a, b, total, first)
            return
        wide = {"out_dtype": total.dtype}
    if first:
        torch.mm(a, b, **wide, out=total)
    else:
        torch.addmm(total, a, b, **wide, out=total)


def _accumulate_widened(a: Tensor, b: Tensor, total: Tensor, first: bool) -> None:
    """total (+)= a @ b where one of them or both are of 16 bits, on a CPU: a part of the head at a
    time is widened, and used while it is in the cache."""
    a, (inner, columns) = a.to(total.dtype), b.shape
    if columns > max(inner, TILE):  # b: the head, turned over
        for start in range(0, columns, TILE):
            tile = slice(start, start + TILE)
            accumulate(total[:, tile], a, b[:, tile].to(total.dtype), first)
        return
    for start in range(0, max(inner, 1), TILE):
        tile = slice(start, start + TILE)
        accumulate(total, a[:, tile], b[tile].to(total.dtype), first)
        first = False


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of an adapter's low rank: on a CPU in float32, or wider, where any of it is."""
    if a.is_cuda:
        return a @ b
    dtype = check.accumulator(a, b)
    return a.to(dtype) @ b.to(dtype)


KERNEL = define_kernel(
    "wide_product(Tensor a, Tensor b, Tensor(a!) out, bool first) -> ()",
    fallback=_accumulate_widened,
    fake=lambda *_: None,
)
