"""masked_mean and masked_whiten: statistics over the counting positions only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import check
from .registry import Op, Sample, define_kernel, register, save_for_backward

EPSILON = 1e-8


def masked_mean(values: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of the counting values; 0 where none counts.

    Args:
        values: [...], with gradient; masked positions may hold anything.
        mask: [...] bool, True = counts.
        group: average over all ranks of this process group (by all-reduced sums); the gradient
            is that of this rank's share.

    Returns:
        0-dim, float32 (float64 in, float64 out).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("values", values)
    check.boolean_mask(mask, "values", values)
    if group is not None:
        check.process_group("group", group)
    dtype = check.accumulator(values)
    local: Tensor = MEAN(check.line(values, dtype), check.line(mask))
    if group is None:
        return local
    count = mask.sum().to(dtype)
    total = torch.stack([local.detach() * count, count])
    dist.all_reduce(total, group=group)
    n = total[1].clamp(min=1)
    return local * count / n + (total[0] - local.detach() * count) / n


def masked_mean_reference(
    values: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    kept = values.to(check.accumulator(values)).masked_fill(~mask, 0.0)
    return kept.sum() / mask.sum().clamp(min=1)


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(values − mean) / √(var + 1e-8) over the counting positions; 0 where masked.

    var is the unbiased (n − 1) variance, as in TRL and verl; with one counting value it is 0. No
    gradient flows: advantages are constants of the policy loss.

    Args:
        values: [...]; masked positions may hold anything.
        mask: [...] bool, True = counts.
        shift_mean: True: the result has mean 0. False: the mean is put back (rewards).
        group: take mean and variance over all ranks of this process group.

    Returns:
        [...], float32 (float64 in, float64 out).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("values", values)
    check.boolean_mask(mask, "values", values)
    check.flag("shift_mean", shift_mean)
    if group is not None:
        check.process_group("group", group)
    dtype = check.accumulator(values)
    flat_values, flat_mask = check.line(values.detach(), dtype), check.line(mask)
    moments = MOMENTS(flat_values, flat_mask)
    if group is not None:
        moments = _all_reduced(moments, group)
    whitened: Tensor = NORMALIZE(flat_values, flat_mask, moments, shift_mean)
    return check.reshaped(whitened, values.shape)


def masked_whiten_reference(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    with torch.no_grad():
        kept = values.to(check.accumulator(values)).masked_fill(~mask, 0.0)
        n = mask.sum()
        mean = kept.sum() / n.clamp(min=1)
        centered = (kept - mean).masked_fill(~mask, 0.0)
        var = (centered**2).sum() / (n - 1).clamp(min=1)
        whitened = centered * torch.rsqrt(var + EPSILON)
        return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


def _all_reduced(moments: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(count, mean, sum of squared deviations) of all ranks together, Chan et al. 1979."""
    count, mean, deviation = moments.double().unbind()
    sums = torch.stack([count, count * mean])
    dist.all_reduce(sums, group=group)
    global_mean = sums[1] / sums[0].clamp(min=1)
    deviation = deviation + count * (mean - global_mean) ** 2
    dist.all_reduce(deviation, group=group)
    return torch.stack([sums[0], global_mean, deviation]).to(moments.dtype)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean_reference(values, mask)


def _mean_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_for_backward(ctx, inputs[1])


def _mean_autograd(ctx: Any, grad: Tensor) -> Any:
    (mask,) = ctx.saved_tensors
    return torch.where(mask, grad / mask.sum().clamp(min=1), 0.0), None


def _moments(values: Tensor, mask: Tensor) -> Tensor:
    """[count, mean, sum of squared deviations from the mean]."""
    kept = values.masked_fill(~mask, 0.0)
    n = mask.sum().to(values.dtype)
    mean = kept.sum() / n.clamp(min=1)
    deviation = ((kept - mean).masked_fill(~mask, 0.0) ** 2).sum()
    return torch.stack([n, mean, deviation])


def _normalize(values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    count, mean, deviation = moments.unbind()
    whitened = (values - mean) * torch.rsqrt(deviation / (count - 1).clamp(min=1) + EPSILON)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def _draws(generator: torch.Generator) -> Iterator[tuple[str, dict[str, Tensor]]]:
    def draw(*shape: int, offset: float = 0.0, p: float = 0.7) -> dict[str, Tensor]:
        return {
            "values": offset + torch.randn(*shape, generator=generator),
            "mask": torch.rand(*shape, generator=generator) < p,
        }

    yield "plain", draw(5, 37)
    yield "far from 0", draw(5, 37, offset=1000.0)
    yield "3-D", draw(2, 3, 5)
    yield "large", draw(70, 1031)
    garbage = draw(4, 50)
    garbage["values"][~garbage["mask"]] = torch.nan
    yield "NaN behind the mask", garbage
    yield "all masked", draw(4, 5, p=0.0)
    one = draw(4, 5, p=0.0)
    one["mask"][1, 2] = True
    yield "one counts", one
    yield "empty", draw(3, 0)


def mean_samples(generator: torch.Generator) -> Iterator[Sample]:
    for name, arguments in _draws(generator):
        yield Sample(name, arguments, ("values",))


def whiten_samples(generator: torch.Generator) -> Iterator[Sample]:
    for name, arguments in _draws(generator):
        yield Sample(name, arguments)
        yield Sample(f"{name}, mean kept", {**arguments, "shift_mean": False})


def _workload(shape: dict[str, int], generator: torch.Generator, device: str) -> dict[str, Tensor]:
    size = (shape["B"], shape["T"])
    return {
        "values": torch.randn(size, generator=generator, device=device),
        "mask": torch.rand(size, generator=generator, device=device) > 0.1,
    }


def mean_workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    return Sample("bench", _workload(shape, generator, device), ("values",))


def whiten_workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    return Sample("bench", _workload(shape, generator, device))


def mean_bytes(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    n = shape["B"] * shape["T"]
    return n * (4 + 1), n * (4 + 1)


def whiten_bytes(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    return shape["B"] * shape["T"] * (2 * (4 + 1) + 4), 0


MEAN = define_kernel(
    "masked_mean(Tensor values, Tensor mask) -> Tensor",
    fallback=_mean,
    fake=lambda values, mask: values.new_empty(()),
    triton="masked:masked_mean",
    backward=_mean_autograd,
    setup_context=_mean_context,
    linear=True,
)
MOMENTS = define_kernel(
    "masked_moments(Tensor values, Tensor mask) -> Tensor",
    fallback=_moments,
    fake=lambda values, mask: values.new_empty(3),
    triton="masked:masked_moments",
)
NORMALIZE = define_kernel(
    "masked_normalize(Tensor values, Tensor mask, Tensor moments, bool shift_mean) -> Tensor",
    fallback=_normalize,
    fake=lambda values, mask, moments, shift_mean: torch.empty_like(values),
    triton="masked:masked_normalize",
)
SHAPES = ({"B": 64, "T": 1024}, {"B": 256, "T": 4096})
MEAN_OP = register(
    Op(
        "masked_mean",
        masked_mean,
        masked_mean_reference,
        (MEAN,),
        mean_samples,
        mean_workload,
        SHAPES,
        mean_bytes,
    )
)
WHITEN_OP = register(
    Op(
        "masked_whiten",
        masked_whiten,
        masked_whiten_reference,
        (MOMENTS, NORMALIZE),
        whiten_samples,
        whiten_workload,
        SHAPES,
        whiten_bytes,
    )
)
