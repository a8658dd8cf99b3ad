"""token_kl: per-token estimates of KL(π ‖ π_ref) from the log-probs of the sampled tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import check
from .registry import Op, Sample, define_kernel, register, save_for_backward

ESTIMATORS = ("k1", "k2", "k3", "abs")
MAX_EXPONENT = 20.0
LOWEST_EXPONENT = -1000.0  # e^x − 1 is −1 there


def token_kl(logp: Tensor, ref_logp: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token KL estimate from two log-probs of the same sampled token.

    With d = logp − ref_logp, for tokens drawn from π (Schulman, http://joschu.net/blog/kl-approx.html):

        k1 = d              unbiased, may be negative
        k2 = d² / 2         biased, ≥ 0; its gradient is that of KL
        k3 = e^(−d) − 1 + d unbiased, ≥ 0, less variance
        abs = |d|

    Beyond d = −20 k3 goes on as its tangent there: it rises with the gap and its gradient points
    back to the reference, yet one unlikely token cannot overflow it. Where one of the log-probs is
    −inf, k2, k3 and abs are inf and k1 is ±inf.

    Args:
        logp, ref_logp: [...], nats, of the policy and of the reference.
        estimator: one of k1, k2, k3, abs.

    Returns:
        [...] in nats, float32 (float64 in, float64 out); differentiable in both arguments.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("logp", logp)
    check.like("ref_logp", ref_logp, "logp", logp)
    check.choice("estimator", estimator, ESTIMATORS)
    dtype = check.accumulator(logp, ref_logp)
    kl: Tensor = FORWARD(logp.to(dtype).contiguous(), ref_logp.to(dtype).contiguous(), estimator)
    return kl


def estimate(d: Tensor, estimator: str) -> Tensor:
    """The estimators in plain PyTorch, d = logp − ref_logp."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    if estimator == "k3":
        x = (-d).clamp(LOWEST_EXPONENT, MAX_EXPONENT)
        rise = torch.expm1(x)
        beyond = torch.where(rise == 0, 0.0, rise.detach() * (-d - x))
        return (rise - x) + beyond
    return d.abs()


def slope(d: Tensor, estimator: str) -> Tensor:
    """Their derivative in d."""
    if estimator == "k1":
        return torch.ones_like(d)
    if estimator == "k2":
        return d
    if estimator == "k3":
        return -torch.expm1((-d).clamp(LOWEST_EXPONENT, MAX_EXPONENT))
    return d.sign()


def reference(logp: Tensor, ref_logp: Tensor, estimator: str = "k1") -> Tensor:
    dtype = check.accumulator(logp, ref_logp)
    return estimate(logp.to(dtype) - ref_logp.to(dtype), estimator).clone()


def _forward(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    return reference(logp, ref_logp, estimator)


def _backward(grad: Tensor, logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    return torch.where(grad == 0, 0.0, grad * slope(logp - ref_logp, estimator))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logp, ref_logp, ctx.estimator = inputs
    save_for_backward(ctx, logp, ref_logp)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    logp, ref_logp = ctx.saved_tensors
    g = torch.ops.rlhf_fast.token_kl_backward(grad.contiguous(), logp, ref_logp, ctx.estimator)
    return g, -g if ctx.needs_input_grad[1] else None, None


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(*shape: int, scale: float = 1.0) -> dict[str, Tensor]:
        logp = -scale * torch.rand(*shape, generator=generator)
        return {"logp": logp, "ref_logp": -scale * torch.rand(*shape, generator=generator)}

    both = ("logp", "ref_logp")
    for estimator in ESTIMATORS:
        yield Sample(estimator, {**draw(3, 17), "estimator": estimator}, both)
        yield Sample(f"{estimator}, far", {**draw(40, scale=60), "estimator": estimator}, both)
    yield Sample("empty", draw(2, 0), both)
    yield Sample("0-dim", {"logp": torch.tensor(-1.0), "ref_logp": torch.tensor(-2.0)}, both)


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    size = (shape["B"], shape["T"])
    logp = -torch.rand(size, generator=generator, device=device)
    ref_logp = -torch.rand(size, generator=generator, device=device)
    return Sample("bench", {"logp": logp, "ref_logp": ref_logp, "estimator": "k3"}, ("logp",))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    n = shape["B"] * shape["T"] * 4
    return 3 * n, 4 * n


FORWARD = define_kernel(
    "token_kl(Tensor logp, Tensor ref_logp, str estimator) -> Tensor",
    fallback=_forward,
    fake=lambda logp, ref_logp, estimator: torch.empty_like(logp),
    triton="token_kl:token_kl",
    backward=_autograd,
    setup_context=_setup_context,
)
BACKWARD = define_kernel(
    "token_kl_backward(Tensor grad, Tensor logp, Tensor ref_logp, str estimator) -> Tensor",
    fallback=_backward,
    fake=lambda grad, logp, ref_logp, estimator: torch.empty_like(grad),
    triton="token_kl:token_kl_backward",
)
register(
    Op(
        "token_kl",
        token_kl,
        reference,
        (FORWARD, BACKWARD),
        samples,
        workload,
        ({"B": 64, "T": 1024}, {"B": 256, "T": 4096}),
        bytes_moved,
    )
)
