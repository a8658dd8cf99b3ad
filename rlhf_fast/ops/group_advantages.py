"""group_advantages: critic-free advantages from the scores of several responses to one prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import check
from .registry import Op, Sample, register

METHODS = ("grpo", "rloo", "dr_grpo", "opo")


def group_advantages(
    scores: Tensor,
    group_size: int,
    *,
    method: str = "grpo",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
) -> Tensor:
    """Each response's advantage over the other responses to its prompt, from their scores alone.

    With the mean and the (unbiased) standard deviation of the response's own group:

        grpo      (score − mean) / (std + eps)        Shao et al., arXiv:2402.03300, sec. 4.1.2
        rloo      score − mean of the group's others  Ahmadian et al., arXiv:2402.14740, sec. 3
        dr_grpo   score − mean                        Liu et al., arXiv:2503.20783, sec. 3
        opo       score − Σ length·score / Σ length   Hao et al., arXiv:2505.23585

    A group whose scores are all equal gets exactly 0. A few hundred numbers: plain PyTorch.

    Args:
        scores: [B], in units of reward; the group_size rows of a group are consecutive.
        group_size: ≥ 2; divides B.
        method: grpo, rloo, dr_grpo or opo.
        eps: ≥ 0, only for grpo. TRL's 1e-4; verl has 1e-6.
        lengths: [B] int64 or int32, the responses' tokens; for opo, which needs them, alone. A
            group without a token has the plain mean.

    Returns:
        [B], float32 (float64 in, float64 out); no gradient flows.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("scores", scores)
    check.shaped("scores", scores, [scores.numel()], "[B]")
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an int, got {check.describe(group_size)}")
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}")
    if scores.numel() % group_size:
        raise ValueError(
            f"group_size {group_size} must divide the number of scores, {scores.numel()}"
        )
    check.choice("method", method, METHODS)
    check.number("eps", eps, low=0.0, dtype=check.accumulator(scores))

    if (lengths is not None) != (method == "opo"):
        raise ValueError(
            f"lengths and method='opo' need each other, got method={method!r} and lengths "
            f"{'None' if lengths is None else check.describe(lengths)}"
        )
    if lengths is not None:
        check.tensor("lengths", lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths must be int32 or int64, got {check.describe(lengths)}")
        check.same_shape("lengths", lengths, "scores", scores)
        if check.values_can_be_read(lengths) and bool((lengths < 0).any()):
            raise ValueError(f"lengths must be at least 0, got {int(lengths.min())}")

    groups = scores.detach().to(check.accumulator(scores)).reshape(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if method == "rloo":
        advantages = advantages * (group_size / (group_size - 1))
    elif lengths is not None:
        weights = lengths.reshape(-1, group_size)
        total = weights.sum(1, keepdim=True)
        advantages = advantages - (weights * advantages).sum(1, keepdim=True) / total.clamp(min=1)
    elif method == "grpo":
        # of the largest deviation, for squares of 1e-23 or 1e20 are no float32
        unit = advantages.abs().amax(1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)
        variance = (advantages / unit).square().sum(1, keepdim=True) / (group_size - 1)
        advantages = advantages / (unit * variance.sqrt() + eps)
    # the rounded mean of equal numbers need not be that number
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).reshape(-1)


def reference(
    scores: Tensor,
    group_size: int,
    *,
    method: str = "grpo",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
) -> Tensor:
    """One group after another, by the formula."""
    scores = scores.detach().to(check.accumulator(scores))
    advantages = []
    for i, group in enumerate(scores.reshape(-1, group_size)):
        if (group == group[0]).all():
            advantages.append(torch.zeros_like(group))
        elif method == "rloo":
            others = (group.sum() - group) / (group_size - 1)
            advantages.append(group - others)
        elif lengths is not None and (tokens := lengths.reshape(-1, group_size)[i]).any():
            advantages.append(group - (tokens * group).sum() / tokens.sum())
        else:
            scale = group.std() + eps if method == "grpo" else 1.0
            advantages.append((group - group.mean()) / scale)
    return torch.cat([*advantages, scores[:0]])


def samples(generator: torch.Generator) -> Iterator[Sample]:
    for method in METHODS:
        scores = torch.randn(24, generator=generator)
        scores[6:12] = 0.3  # of which the rounded mean of six is not 0.3
        arguments = {"scores": scores, "group_size": 6, "method": method}
        if method == "opo":
            lengths = torch.randint(9, (24,), generator=generator)
            lengths[18:] = 0
            arguments["lengths"] = lengths
        yield Sample(method, arguments)
    yield Sample("pairs", {"scores": torch.randn(10, generator=generator), "group_size": 2})
    yield Sample("eps", {"scores": torch.rand(8, generator=generator), "group_size": 4, "eps": 0.5})
    yield Sample("no scores", {"scores": torch.zeros(0), "group_size": 4})


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    scores = torch.randn(shape["B"] * shape["G"], generator=generator, device=device)
    return Sample("bench", {"scores": scores, "group_size": shape["G"]})


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    return shape["B"] * shape["G"] * 2 * 4, 0


register(
    Op(
        "group_advantages",
        group_advantages,
        reference,
        (),
        samples,
        workload,
        ({"B": 128, "G": 8},),
        bytes_moved,
    )
)
