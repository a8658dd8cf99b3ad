"""gae on the GPU: one program a row, a scan over steps instead of a loop over them.

The recursion is affine in what comes from the right: the next value is a constant or passed on,
and the advantage is A ← D·A + E with D in {0, 1, γλ}. Both compose, so a block of steps is one (or,
with holes that are skipped, two) associative scans, and blocks hand on a carry. Every input is read
once and every output written once: 17 bytes a step in float32 with a mask. (Values and mask are
loaded a second time one step further on, which the cache has.)

Lanes run backwards in time, lane 0 last: a forward scan then goes right to left. A lane loads 4
bytes, not 16, of a warp's unbroken 128; turning forward 16-byte loads around would take ten
shuffles a value. And ``associative_scan(reverse=True)``, of which a wrong result on operators like
this one is on record (triton-lang/triton#4362), is not needed. The CUDA source csrc/gae_cuda.cu
does the same with warp shuffles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _then_value(keep, value, next_keep, next_value):
    """First (keep, value), then the step to its left: keep 1 passes the value on, 0 replaces it."""
    return keep * next_keep, tl.where(next_keep != 0, value, next_value)


@triton.jit
def _then_advantage(D, E, next_D, next_E):
    """A ↦ next_D (D·A + E) + next_E; a cut (next_D = 0) drops even NaN."""
    return D * next_D, tl.where(next_D == 0, next_E, next_D * E + next_E)


@triton.jit
def gae_kernel(
    rewards, values, cu_seqlens, mask, dones, bootstrap, advantages, returns, T,
    gamma: tl.float64, gamma_lam: tl.float64, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = rewards.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    base = row * T
    if cu_seqlens is not None:
        base = tl.load(cu_seqlens + row)
        T = tl.load(cu_seqlens + row + 1) - base
    gamma = tl.full((), gamma, dtype)
    gamma_lam = tl.full((), gamma_lam, dtype)
    beyond = tl.full((), 0.0, dtype)
    if bootstrap is not None:
        beyond = tl.load(bootstrap + row)
    value_carry = beyond
    advantage_carry = tl.full((), 0.0, dtype)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, T, BLOCK):
        t = T - 1 - start - lanes
        inside = t >= 0
        has_next = inside & (t + 1 < T)
        r = tl.load(rewards + base + t, mask=inside, other=0.0)
        v = tl.load(values + base + t, mask=inside, other=0.0)
        next_v = tl.load(values + base + t + 1, mask=has_next, other=0.0)
        kept = inside
        if mask is not None:
            kept = tl.load(mask + base + t, mask=inside, other=0) != 0
            next_kept = tl.load(mask + base + t + 1, mask=has_next, other=0) != 0
            r = tl.where(kept, r, 0.0)
            v = tl.where(kept, v, 0.0)
            next_v = tl.where(next_kept, next_v, 0.0)

        if SKIP:  # the value at the next counting step, 0 if an episode ended in between
            ends = next_kept
            if dones is not None:
                ends = ends | (tl.load(dones + base + t + 1, mask=has_next, other=0) != 0)
            keep = tl.where(ends, 0.0, 1.0).to(dtype)
            keep, found = tl.associative_scan((keep, next_v), 0, _then_value)
            next_value = tl.where(keep != 0, value_carry, found)
            value_carry = tl.sum(tl.where(lanes == BLOCK - 1, next_value, 0.0))
        else:
            next_value = tl.where(t + 1 < T, next_v, beyond)

        counts = kept if SKIP else inside
        D = tl.where(counts, gamma_lam, 1.0)
        if dones is not None:
            done = tl.load(dones + base + t, mask=inside, other=0) != 0
            D = tl.where(done, 0.0, D)
            next_value = tl.where(done, 0.0, next_value)
        later = tl.where(gamma == 0, 0.0, gamma * next_value)  # 0·∞ is 0 here
        E = tl.where(counts, r + later - v, 0.0)
        D, E = tl.associative_scan((D, E), 0, _then_advantage)
        advantage = tl.where(D == 0, E, D * advantage_carry + E)
        advantage_carry = tl.sum(tl.where(lanes == BLOCK - 1, advantage, 0.0))
        tl.store(advantages + base + t, tl.where(kept, advantage, 0.0), mask=inside)
        tl.store(returns + base + t, tl.where(kept, advantage + v, 0.0), mask=inside)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    skip_holes: bool,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [B, T]."""
    return launch(rewards, values, None, mask, dones, bootstrap, gamma, lam, skip_holes)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    skip_holes: bool,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [N]; cu_seqlens is int64 [B+1]."""
    return launch(rewards, values, cu_seqlens, mask, dones, bootstrap, gamma, lam, skip_holes)


def launch(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    skip_holes: bool,
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    if rewards.numel() == 0:
        return advantages, returns
    steps = rewards.shape[-1]  # packed: an upper bound; a row's own length stays on the device
    rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    block = min(triton.next_power_of_2(steps), 1024)  # 1024 steps fill 4 warps; not measured yet
    with torch.cuda.device_of(rewards):
        gae_kernel[(rows,)](
            rewards, values, cu_seqlens, mask, dones, bootstrap, advantages, returns, steps, gamma,
            gamma * lam, SKIP=skip_holes and mask is not None, BLOCK=block,
            num_warps=max(1, min(4, block // 64)),
        )  # fmt: skip
    return advantages, returns
