"""exp, expm1, log1p and tanh to full precision in float32 and float64, libdevice-free.

The GPU's own exp2 is exact at whole numbers and good to 2 ulp elsewhere, and an exponential of a
product x·log₂e loses |x| ulp before it starts; fast enough for a softmax, not for KL estimates,
whose values near 0 are differences of nearly equal numbers. These helpers reduce the argument and
finish with a short series, so they cost multiply-adds only and run in Triton's interpreter too.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def series(x, TERMS: tl.constexpr):
    """e^x − 1 − x = x²/2 (1 + x/3 (1 + x/4 (…))), without cancellation; |x| ≤ 1."""
    tail = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(TERMS, 2, -1):
        tail = 1.0 + x * tail * (1.0 / k)
    return 0.5 * x * x * tail


@triton.jit
def reduced(x):
    """(s, q) with e^x = s (1 + q), s a power of two, |q| < 0.42; x ≤ 80, anything below."""
    if x.dtype == tl.float64:
        x = tl.maximum(x, -740.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(x * LOG2_E + 0.5)
        r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10  # n ln 2
        q = r + series(r, 15)
    else:
        x = tl.maximum(x, -120.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(x * LOG2_E + 0.5)
        r = (x - n * 0.693359375) - n * -2.12194440e-4  # n ln 2 in two parts, the first exact
        q = r + series(r, 8)
    return tl.exp2(n), q


@triton.jit
def exp(x):
    s, q = reduced(x)
    return s + s * q


@triton.jit
def expm1(x):
    """e^x − 1; x ≤ 80."""
    s, q = reduced(x)
    return (s - 1.0) + s * q


@triton.jit
def expm1_minus_x(x):
    """e^x − 1 − x, of relative accuracy near 0 too; x ≤ 80."""
    near = tl.abs(x) < 1.0
    inside = tl.where(near, x, 0.0)
    if x.dtype == tl.float64:
        small = series(inside, 19)
    else:
        small = series(inside, 12)
    return tl.where(near, small, expm1(x) - x)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], by 2 artanh(x / (2 + x))."""
    u = x / (2.0 + x)
    v = u * u
    tail = tl.zeros_like(u)
    if x.dtype == tl.float64:
        for k in tl.static_range(18, 0, -1):
            tail = v * (tail + 1.0 / (2 * k + 1))
    else:
        for k in tl.static_range(8, 0, -1):
            tail = v * (tail + 1.0 / (2 * k + 1))
    return 2.0 * u * (1.0 + tail)


@triton.jit
def tanh(x):
    if x.dtype == tl.float64:
        e = expm1(-2.0 * tl.abs(x))
        size = -e / (e + 2.0)
        return tl.where(x < 0, -size, size)
    # 1 − 2/(e^2x + 1) loses digits near 0; there, an odd polynomial fitted on |x| ≤ 0.5 (1.5e-8)
    v = x * x
    p = -0.33333148 + v * (0.13325987 + v * (-0.053052945 + v * 0.01725698))
    return tl.where(v < 0.25, x + x * v * p, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0))
