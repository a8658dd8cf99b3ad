"""kl_penalized_rewards: the per-token rewards that PPO on a language model learns from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import check, token_kl
from .registry import Op, Sample, define_kernel, register


def kl_penalized_rewards(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    estimator: str = "k1",
) -> Tensor:
    """Per-token rewards: −β·KL_t everywhere, plus the score on the last counting token.

        r_t = −β · kl(logp_t, ref_logp_t) + 1[t = last] · score

    The penalty that keeps the policy near the reference (Ziegler et al., arXiv:1909.08593, eq. 2;
    InstructGPT, arXiv:2203.02155, eq. 2). ``logp`` is the sampling policy's, not the reward
    model's. A row in which nothing counts gets no reward at all. Rewards carry no gradient.

    Args:
        scores: [B], one a sequence, any finite unit.
        logp, ref_logp: [B, T] in nats.
        mask: [B, T] bool, True = response token.
        beta: ≥ 0, score units per nat; 0 is no penalty, also of an infinite KL.
        estimator: k1, k2, k3 or abs, as in ``token_kl``.

    Returns:
        rewards [B, T], 0 where masked; float32 (float64 in, float64 out).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("logp", logp)
    if logp.dim() != 2:
        raise ValueError(f"logp must be [B, T], got {check.describe(logp)}")
    check.like("ref_logp", ref_logp, "logp", logp)
    check.boolean_mask(mask, "logp", logp)
    check.floating("scores", scores)
    check.shaped("scores", scores, [logp.shape[0]], "[B]")
    check.same_device("scores", scores, "logp", logp)
    check.choice("estimator", estimator, token_kl.ESTIMATORS)
    dtype = check.accumulator(scores, logp, ref_logp)
    check.number("beta", beta, low=0.0, dtype=dtype)
    rewards: Tensor = KERNEL(
        check.line(scores.detach(), dtype),
        check.constant(logp, dtype),
        check.constant(ref_logp, dtype),
        mask.contiguous(),
        float(beta),
        estimator,
    )
    return rewards


def reference(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    estimator: str = "k1",
) -> Tensor:
    dtype = check.accumulator(scores, logp, ref_logp)
    with torch.no_grad():
        rewards = torch.zeros_like(logp, dtype=dtype)
        if beta:  # 0·∞ is 0 here
            rewards = -beta * token_kl.estimate(logp.to(dtype) - ref_logp.to(dtype), estimator)
        rewards = rewards.masked_fill(~mask, 0.0)
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        last = positions.masked_fill(~mask, -1).amax(1) if mask.shape[1] else mask.new_zeros(0)
        is_last = mask & (positions == last.unsqueeze(-1)) if mask.shape[1] else mask
        return rewards + torch.where(is_last, scores.to(dtype).unsqueeze(-1), 0.0)


def _forward(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float, estimator: str
) -> Tensor:
    return reference(scores, logp, ref_logp, mask, beta=beta, estimator=estimator)


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(b: int, t: int) -> dict[str, Tensor]:
        lengths = torch.randint(0, t + 1, (b, 1), generator=generator)
        return {
            "scores": torch.randn(b, generator=generator),
            "logp": -torch.rand(b, t, generator=generator),
            "ref_logp": -torch.rand(b, t, generator=generator),
            "mask": torch.arange(t) < lengths,
        }

    for estimator in token_kl.ESTIMATORS:
        yield Sample(estimator, {**draw(5, 19), "beta": 0.3, "estimator": estimator})
    holes = draw(4, 33)
    holes["mask"] = torch.rand(4, 33, generator=generator) > 0.5
    yield Sample("holes", {**holes, "beta": 0.1})
    masked = draw(3, 8)
    masked["mask"][:] = False
    masked["logp"][:] = torch.nan
    yield Sample("all masked, NaN", {**masked, "beta": 0.1})
    yield Sample("no tokens", {**draw(3, 0), "beta": 0.1})
    yield Sample("no rows", {**draw(0, 5), "beta": 0.1})


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    b, t = shape["B"], shape["T"]
    arguments = {
        "scores": torch.randn(b, generator=generator, device=device),
        "logp": -torch.rand(b, t, generator=generator, device=device),
        "ref_logp": -torch.rand(b, t, generator=generator, device=device),
        "mask": torch.rand(b, t, generator=generator, device=device) > 0.2,
        "beta": 0.05,
    }
    return Sample("bench", arguments)


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    return shape["B"] * shape["T"] * (3 * 4 + 1), 0


KERNEL = define_kernel(
    "kl_penalized_rewards(Tensor scores, Tensor logp, Tensor ref_logp, Tensor mask, float beta, "
    "str estimator) -> Tensor",
    fallback=_forward,
    fake=lambda scores, logp, ref_logp, mask, beta, estimator: torch.empty_like(logp),
    triton="kl_penalized_rewards:kl_penalized_rewards",
)
register(
    Op(
        "kl_penalized_rewards",
        kl_penalized_rewards,
        reference,
        (KERNEL,),
        samples,
        workload,
        ({"B": 64, "T": 1024}, {"B": 256, "T": 4096}),
        bytes_moved,
    )
)
