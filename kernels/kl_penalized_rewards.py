"""kl_penalized_rewards on the GPU: one pass from the right, which meets the last token first.

One program a row; every input is read once (13 bytes a token with the output, in float32). Whether
a later block already held a counting token is all that blocks hand on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import kl


@triton.jit
def kl_penalized_rewards_kernel(
    scores, logp, ref_logp, mask, out, T, beta: tl.float64,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = logp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    base = row * T
    beta = tl.full((), beta, dtype)
    score = tl.load(scores + row)
    found = tl.full((), 0, tl.int32)
    blocks = tl.cdiv(T, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = t < T
        kept = tl.load(mask + base + t, mask=inside, other=0) != 0
        d = tl.load(logp + base + t, mask=inside, other=0.0)
        d -= tl.load(ref_logp + base + t, mask=inside, other=0.0)
        reward = tl.where(kept, kl.times(-beta, kl.estimate(d, ESTIMATOR)), 0.0)
        last = tl.max(tl.where(kept, t, -1))
        reward += tl.where((t == last) & kept & (found == 0), score, 0.0)
        found = tl.maximum(found, (last >= 0).to(tl.int32))
        tl.store(out + base + t, reward, mask=inside)


def kl_penalized_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float, estimator: str
) -> Tensor:
    """Rewards [B, T]."""
    out = torch.empty_like(logp)
    if out.numel() == 0:
        return out
    rows, steps = logp.shape
    block = min(triton.next_power_of_2(steps), 1024)
    with torch.cuda.device_of(logp):
        kl_penalized_rewards_kernel[(rows,)](
            scores, logp, ref_logp, mask, out, steps, beta, ESTIMATOR=estimator, BLOCK=block,
            num_warps=max(1, min(4, block // 64)),
        )  # fmt: skip
    return out
