"""thin_linear: a linear layer for the few rows of a decoding step. Not public: `sample` uses it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import define_kernel

MOST_ROWS = 128  # `linear` takes .9 (Intel Xeon) to 1.1 (AMD EPYC) times as long there


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` for few rows; no gradient flows through the C++ kernel.

    A CPU's BLAS packs W anew for every product, which with 16 rows costs as much as the product
    itself. The kernel reads W where it lies: 4·N·K bytes and 2·M·N·K FLOPs, memory-bound below
    about 12 rows. SmolLM2-135M's layers and head at 1, 16 and 64 rows: 1.7, 2.1 and 1.2 times as
    fast (AMD EPYC, 2 threads), .6, 1.4 and 1.2 times on an Intel Xeon with AVX-512, whose BLAS has
    a way of its own for one row. A row's result does not depend on the rows beside it.

    Args:
        x: [..., K]. More rows than ``MOST_ROWS``, another device than CPU, another type than
            float32, autocast, or a gradient to compute: `linear` itself.
        weight, bias: [N, K], [N] or None.
    """
    columns = weight.shape[-1]
    given = [x, weight] if bias is None else [x, weight, bias]
    if (
        x.device.type != "cpu"
        or not 0 < x.numel() <= MOST_ROWS * columns
        or any(t.dtype != torch.float32 for t in given)
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and any(t.requires_grad for t in given))
    ):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.rlhf_fast.thin_linear(
        x.reshape(-1, columns).contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    return y.view(*x.shape[:-1], weight.shape[0])


KERNEL = define_kernel(
    "thin_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fallback=F.linear,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
