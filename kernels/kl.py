"""The per-token KL estimators, d = logp − ref_logp, as every kernel that needs one inlines them."""

from __future__ import annotations

import triton
import triton.language as tl

from .exponentials import expm1, expm1_minus_x

MAX_EXPONENT = tl.constexpr(20.0)
LOWEST = tl.constexpr(-1000.0)  # e^x − 1 is −1 there


@triton.jit
def times(a, b):
    """a·b, and 0 where a is 0, whatever b is: infinite b included."""
    return tl.where(a == 0, 0.0, a * b)


@triton.jit
def clamped(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def estimate(d, ESTIMATOR: tl.constexpr):
    """k1 = d, k2 = d²/2, k3 = e^(−d) − 1 + d, beyond d = −20 its tangent there, abs = |d|."""
    if ESTIMATOR == "k1":
        kl = d
    elif ESTIMATOR == "k2":
        kl = 0.5 * d * d
    elif ESTIMATOR == "k3":
        x = clamped(-d, LOWEST, MAX_EXPONENT)
        kl = expm1_minus_x(x) + times(expm1(x), -d - x)
    else:
        kl = tl.abs(d)
    return kl


@triton.jit
def slope(d, ESTIMATOR: tl.constexpr):
    """The estimator's derivative in d."""
    if ESTIMATOR == "k1":
        s = tl.full(d.shape, 1.0, d.dtype)
    elif ESTIMATOR == "k2":
        s = d
    elif ESTIMATOR == "k3":
        s = -expm1(clamped(-d, LOWEST, MAX_EXPONENT))
    else:
        s = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    return s
