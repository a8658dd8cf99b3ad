"""token_kl and its gradient on the GPU: element by element, each tensor read or written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import kl


@triton.jit
def token_kl_kernel(logp, ref_logp, out, n, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    d = tl.load(logp + i, mask=inside, other=0.0) - tl.load(ref_logp + i, mask=inside, other=0.0)
    tl.store(out + i, kl.estimate(d, ESTIMATOR), mask=inside)


@triton.jit
def token_kl_backward_kernel(
    grad, logp, ref_logp, out, n, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    d = tl.load(logp + i, mask=inside, other=0.0) - tl.load(ref_logp + i, mask=inside, other=0.0)
    g = tl.load(grad + i, mask=inside, other=0.0)
    tl.store(out + i, kl.times(g, kl.slope(d, ESTIMATOR)), mask=inside)


BLOCK = 1024


def token_kl(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """KL estimate, logp's shape."""
    out, n = torch.empty_like(logp), logp.numel()
    if n:
        with torch.cuda.device_of(logp):
            token_kl_kernel[(triton.cdiv(n, BLOCK),)](
                logp, ref_logp, out, n, ESTIMATOR=estimator, BLOCK=BLOCK
            )
    return out


def token_kl_backward(grad: Tensor, logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """Gradient of logp; that of ref_logp is its negative."""
    out, n = torch.empty_like(logp), logp.numel()
    if n:
        with torch.cuda.device_of(logp):
            token_kl_backward_kernel[(triton.cdiv(n, BLOCK),)](
                grad, logp, ref_logp, out, n, ESTIMATOR=estimator, BLOCK=BLOCK
            )
    return out
