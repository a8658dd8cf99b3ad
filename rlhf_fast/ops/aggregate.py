"""How per-token losses [B, T] become one number: the four aggregations, for every loss.

Each is Σ_b c_b Σ_t mask·x, so a loss and its gradient need one coefficient a row (n_b: row b's
counting tokens; N: ``normalizer``, or this call's own count where it is None):

    token-mean            c_b = 1 / N           N = Σ_b n_b tokens
    seq-mean-token-mean   c_b = 1 / (N n_b)     N = rows with at least one counting token
    seq-mean-token-sum    c_b = 1 / N           N = rows with at least one counting token
    token-sum             c_b = 1 / N           N = 1; Dr. GRPO passes its constant

``normalizer`` is the *global* count under gradient accumulation and data parallelism: then the
micro-batches' losses and gradients add up to those of the one big batch. A count of zero gives
c_b = 0, so an all-masked batch has loss 0 and zero gradients. Source: DAPO (arXiv:2503.14476)
eq. 8, Dr. GRPO (arXiv:2503.20783) sec. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import check

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum")


def coefficients(
    mask: Tensor, aggregation: str, normalizer: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """c_b as [B] for mask [B, T]."""
    counts = mask.sum(-1).to(dtype)
    if normalizer is not None:
        _range(normalizer, dtype)
        n = normalizer.to(dtype)
    elif aggregation == "token-mean":
        n = counts.sum()
    elif aggregation == "token-sum":
        n = torch.ones((), dtype=dtype, device=mask.device)
    else:
        n = (counts > 0).sum().to(dtype)
    per_row = counts if aggregation == "seq-mean-token-mean" else torch.ones_like(counts)
    divisor = n * per_row
    return torch.where(divisor > 0, 1 / divisor, 0.0)


def checked(
    aggregation: str, normalizer: float | Tensor | None, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """normalizer as a 0-dim tensor beside ``like``, or None."""
    check.choice("aggregation", aggregation, AGGREGATIONS)
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        check.shaped("normalizer", normalizer, [], "a 0-dim tensor")
        check.same_device("normalizer", normalizer, "mask", like)
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"normalizer must be a number, got {check.describe(normalizer)}")
        _range(normalizer, dtype)
        return normalizer.detach().to(dtype)
    check.number("normalizer", normalizer, above=0, dtype=dtype)
    return torch.full((), float(normalizer), dtype=dtype, device=like.device)


def _range(normalizer: Tensor, dtype: torch.dtype) -> None:
    """Check the value of a normalizer, here and again where it is used: a compiled graph skips the
    first check."""
    if not check.values_can_be_read(normalizer):
        return
    if not bool((normalizer == 0) | check.numbers(normalizer, dtype)):
        raise ValueError(
            f"normalizer must be finite and at least 0, and no smaller than {check.SMALLEST:g} "
            f"where it is not 0; got {normalizer.item()}"
        )


def reference(
    x: Tensor, mask: Tensor, aggregation: str, normalizer: float | Tensor | None
) -> Tensor:
    """Σ_b c_b Σ_t mask·x; masked positions may hold anything."""
    n = None if normalizer is None else torch.as_tensor(normalizer, device=x.device)
    rows, kept = check.flat(x), check.flat(mask)
    per_row = rows.masked_fill(~kept, 0.0).sum(-1)
    return times(coefficients(kept, aggregation, n, rows.dtype), per_row).sum()


def times(coefficient: Tensor, x: Tensor) -> Tensor:
    """coefficient · x, and 0 where the coefficient is 0, whatever x is: infinite x included."""
    return torch.where(coefficient == 0, 0.0, coefficient * x)


def masked_means(mask: Tensor, *columns: Tensor) -> list[Tensor]:
    """Mean of each column over the counting tokens; 0 where none counts."""
    n = mask.sum().clamp(min=1)
    return [x.masked_fill(~mask, 0.0).sum() / n for x in columns]


def masked_variance(mask: Tensor, x: Tensor) -> Tensor:
    """Population variance over the counting tokens, by two passes; 0 where none counts."""
    d = x - masked_means(mask, x)[0]
    square, off = masked_means(mask, d * d, d)  # off: the rounding of the mean
    return (square - off * off).clamp(min=0)
