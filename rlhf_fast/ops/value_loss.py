"""value_loss: the critic's clipped squared error and its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aggregate, check
from .registry import Op, Sample, define_kernel, register


class ValueStats(NamedTuple):
    """What ``value_loss`` says of a call: detached 0-dim tensors in the loss's dtype, 0 where no
    token counts.

    Means and variances are over the counting tokens of this call, each with the same weight
    whatever ``aggregation`` and ``normalizer`` are. Of several calls (micro-batches, processes) the
    mean is Σ tokens · mean / Σ tokens; a variance of all needs their means, too.

    Attributes:
        clipfrac: share of the tokens, 0 to 1, whose gradient the clip cut off.
        value_mean: in units of reward; mean over the tokens.
        return_mean: in units of reward; mean over the tokens.
        return_var: in units of reward squared; population variance over the tokens.
        error: (V − R)², unclipped and without the ½, in units of reward squared; mean over the
            tokens.
        explained_var: 1 − Var(R − V) / Var(R) over the tokens, no unit, at most 1; 0 where the
            returns are equal to their rounding: √Var(R) ≤ 4 eps |mean R| of the dtype.
        tokens: how many counted.
    """

    clipfrac: Tensor
    value_mean: Tensor
    return_mean: Tensor
    return_var: Tensor
    error: Tensor
    explained_var: Tensor
    tokens: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    """Clipped value loss with all its statistics, gradient from the same pass.

        L_t = ½ max((V − R)², (clip(V, V_old ± clip) − R)²)

    aggregated over the counting tokens (``rlhf_fast.ops.aggregate``). Source: the PPO of OpenAI
    baselines (the paper has no value clipping).

    Args:
        values: [..., T], in units of reward, with gradient.
        old_values: [..., T], stored with the rollout, a constant; may be None when clip is None.
        returns: [..., T], a constant: advantages + values before whitening.
        mask: [..., T] bool, True = counts. Masked positions may hold anything.
        clip: ≥ 0, or None for the plain squared error.
        aggregation, normalizer: as in ``policy_loss``.

    Returns:
        (loss, ValueStats): float32 0-dim (float64 in, float64 out), to be minimised.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("values", values)
    check.at_least_1d("values", values)
    check.like("returns", returns, "values", values)
    check.boolean_mask(mask, "values", values)
    if clip is not None and old_values is None:
        raise ValueError(f"clip {clip} needs old_values, which is None")
    if old_values is not None:
        check.like("old_values", old_values, "values", values)
    dtype = check.accumulator(values, old_values, returns)
    if clip is not None:
        check.number("clip", clip, low=0.0, dtype=dtype)
    loss, stats, _ = KERNEL(
        check.flat(values, dtype),
        None if clip is None or old_values is None else check.constant(old_values, dtype),
        check.constant(returns, dtype),
        check.flat(mask),
        aggregate.checked(aggregation, normalizer, mask, dtype),
        0.0 if clip is None else float(clip),
        aggregation,
    )
    return loss, ValueStats(*stats.unbind())


def reference(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    dtype = check.accumulator(values, old_values, returns)

    def kept(x: Tensor) -> Tensor:
        return x.to(dtype).masked_fill(~mask, 0.0)

    def mean(x: Tensor) -> Tensor:
        return aggregate.masked_means(mask, x)[0].detach()

    V, R = kept(values), kept(returns)
    squared = clipped = (V - R) ** 2
    larger = torch.zeros_like(mask)
    if clip is not None and old_values is not None:
        bounded = held_near(V, kept(old_values), clip)
        clipped = (bounded - R) ** 2
        # rounded apart, the two may differ where the value is the same
        larger = (bounded != V) & (clipped > squared)
    loss = aggregate.reference(
        0.5 * torch.where(larger, clipped, squared), mask, aggregation, normalizer
    )
    return_var = aggregate.masked_variance(mask, R).detach()
    residual_var = aggregate.masked_variance(mask, R - V).detach()
    stats = ValueStats(
        clipfrac=mean(larger.to(dtype)),
        value_mean=mean(V),
        return_mean=mean(R),
        return_var=return_var,
        error=mean(squared),
        # a variance of nothing but rounding explains nothing
        explained_var=torch.where(
            return_var > (4 * torch.finfo(dtype).eps * mean(R)) ** 2,
            1 - residual_var / return_var,
            0.0,
        ),
        tokens=mask.sum().to(dtype),
    )
    return loss, stats


def held_near(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    return torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)


def _forward(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    clip: float,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats [7], dloss/dvalues [B, T]); old_values None means no clipping."""
    loss, stats = reference(
        values, old_values, returns, mask, clip=None if old_values is None else clip,
        aggregation=aggregation, normalizer=normalizer,
    )  # fmt: skip
    error = d_values = values - returns
    if old_values is not None:
        bounded = held_near(values, old_values, clip)
        larger = (bounded != values) & ((bounded - returns) ** 2 > error**2)
        d_values = error.masked_fill(larger, 0.0)
    c = aggregate.coefficients(mask, aggregation, normalizer, values.dtype).unsqueeze(-1)
    return loss, torch.stack(stats), aggregate.times(c, d_values).masked_fill(~mask, 0.0)


def _fake(values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return values.new_empty(()), values.new_empty(len(ValueStats._fields)), torch.empty_like(values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, d_values = output
    ctx.mark_non_differentiable(stats, d_values)
    ctx.save_for_backward(d_values)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> Any:
    (d_values,) = ctx.saved_tensors
    return grad * d_values, None, None, None, None, None, None


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(b: int, t: int, **options: Any) -> dict[str, Any]:
        values = torch.randn(b, t, generator=generator)
        return {
            "values": values,
            "old_values": values + 0.3 * torch.randn(b, t, generator=generator),
            "returns": values + torch.randn(b, t, generator=generator),
            "mask": torch.rand(b, t, generator=generator) > 0.3,
        } | options

    one = ("values",)
    for mode in aggregate.AGGREGATIONS:
        x = draw(5, 37, aggregation=mode)
        x["mask"][2] = False
        yield Sample(mode, x, one)
        yield Sample(f"{mode}, normalizer", draw(5, 37, aggregation=mode, normalizer=7.5), one)
    yield Sample("no clip", draw(4, 50, clip=None, old_values=None), one)
    yield Sample("no clip, old values", draw(4, 50, clip=None), one)
    yield Sample("tight clip", draw(4, 50, clip=0.01), one)
    constant = draw(3, 8)
    constant["returns"][:] = 2.5
    yield Sample("constant returns", constant, one)
    garbage = draw(3, 30)
    for name in ("values", "old_values", "returns"):
        garbage[name] = garbage[name].masked_fill(~garbage["mask"], torch.nan)
    yield Sample("NaN behind the mask", garbage, one)
    masked = draw(3, 10)
    masked["mask"][:] = False
    yield Sample("all masked", masked, one)
    yield Sample("no tokens", draw(3, 0), one)
    yield Sample("no rows", draw(0, 3), one)


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    size = (shape["B"], shape["T"])
    values = torch.randn(size, generator=generator, device=device)
    arguments = {
        "values": values,
        "old_values": values + 0.2 * torch.randn(size, generator=generator, device=device),
        "returns": values + torch.randn(size, generator=generator, device=device),
        "mask": torch.rand(size, generator=generator, device=device) > 0.1,
    }
    return Sample("bench", arguments, ("values",))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    n = shape["B"] * shape["T"]
    return n * (4 * 4 + 1), 2 * n * 4


KERNEL = define_kernel(
    "value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, "
    "Tensor? normalizer, float clip, str aggregation) -> (Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_fake,
    triton="value_loss:value_loss",
    backward=_autograd,
    setup_context=_setup_context,
)
register(
    Op(
        "value_loss",
        value_loss,
        reference,
        (KERNEL,),
        samples,
        workload,
        ({"B": 64, "T": 1024}, {"B": 24, "T": 16}),
        bytes_moved,
    )
)
