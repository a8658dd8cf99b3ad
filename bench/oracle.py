"""Is the answer right? Outputs and gradients against the op's reference in float64.

The limit is relative to what the same formula in eager PyTorch loses at the same dtype: at most
four times its error, and never less than 1e-6 (1e-12 in float64). Beyond it the bench prints
REFUSED and the error, and reports no time. Only a peer that returns 16-bit numbers where ours are
float32 may be off by a few roundings of its dtype: it is timed, and marked as rounded.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.ops.registry import Op, Sample

from .inputs import Answer, dtype_of, flat, tensors

SLACK = 4.0  # times eager's error, and roundings of a 16-bit peer
ROWS = 512  # of a [N, V] op at a time: 512 rows of V=151936 are 0.6 GB a tensor in float64
MOST = 2**27  # logits that the float64 reference of a loss may hold on a CPU: 1 GB a tensor


@dataclass
class Truth:
    """The reference's answer in float64, what eager PyTorch loses, and the gradients both began
    the backward with (by index of the output)."""

    answer: Answer
    eager_errors: dict[str, float]
    floor: float
    seeds: dict[int, Tensor]
    rounding: float = 0.0  # what one rounding to the dtype of the inputs costs


@dataclass
class Verdict:
    """The part of an answer that is worst against its limit."""

    part: str
    error: float
    limit: float
    rounding: float = 0.0
    largest: float = 0.0  # error of any part

    @property
    def wrong(self) -> bool:
        return not self.error <= self.limit

    @property
    def rounded(self) -> bool:
        """Wrong by no more than a few roundings to the inputs' dtype."""
        return self.wrong and self.error <= SLACK * self.rounding


def checked_shapes(shape: dict[str, int], device: torch.device) -> list[dict[str, int]]:
    """Shapes at which to check answers, in the order in which to try: this one, and that of ROWS
    rows, for where all of them are out of memory, or on a CPU would take float64 minutes. H and V
    stay, and so do the blocks of the kernels."""
    n, v = shape.get("N", 0), shape.get("V", 0)
    if n <= ROWS:
        return [shape]
    fewer = shape | {"N": ROWS}
    return [fewer] if device.type == "cpu" and n * v > MOST else [shape, fewer]


def truth(op: Op, shape: dict[str, int], sample: Sample) -> Truth:
    wide = {
        name: x.detach().double() if x.is_floating_point() else x
        for name, x in tensors(sample).items()
    }
    exact = Sample(sample.name, {**sample.arguments, **wide}, sample.grads)
    for name in sample.grads:
        exact.arguments[name].requires_grad_()
    answer, seeds = _reference(op, shape, exact)
    eager, _ = _reference(op, shape, sample)
    narrow = all(x.dtype != torch.float64 for x in tensors(sample).values())
    floor = 1e-6 if narrow else 1e-12
    return Truth(answer, errors(eager, answer), floor, seeds, torch.finfo(dtype_of(sample)).eps)


def judge(answer: Answer, truth: Truth) -> Verdict:
    verdicts = []
    found = errors(answer, truth.answer)
    largest = max(found.values())
    for part, error in found.items():
        eager = truth.eager_errors.get(part, 0.0)
        # where eager PyTorch itself overflows it sets no limit
        limit = max(SLACK * eager if math.isfinite(eager) else 0.0, truth.floor)
        verdicts.append(Verdict(part, error, limit, truth.rounding, largest))
    return max(verdicts, key=lambda v: v.error / v.limit)


NUMBERS = "loss and statistics"


def errors(answer: Answer, exact: Answer) -> dict[str, float]:
    """Relative error of each part that the answer has: each output, each gradient, and all the
    numbers (a loss and its statistics) as one vector: a mean that happens to cancel to 1e-4 of its
    terms cannot be asked for seven digits of itself."""
    if len(answer.outputs) > len(exact.outputs):
        return {"number of outputs": float("inf")}
    given = itertools.zip_longest(answer.outputs, exact.outputs)
    outputs = [x if mine is None else mine for mine, x in given]  # what is missing is not wrong
    mine = _parts(Answer(outputs, answer.gradients))
    right = _parts(exact)
    if NUMBERS in mine and mine[NUMBERS].shape == right[NUMBERS].shape:
        size = right[NUMBERS].abs().clamp(min=1)  # a count of tokens would hide the others
        mine[NUMBERS], right[NUMBERS] = mine[NUMBERS] / size, right[NUMBERS] / size
    return {part: relative(mine[part], x) for part, x in right.items() if part in mine}


def relative(x: Tensor, exact: Tensor) -> float:
    """The larger of ‖x − exact‖ / ‖exact‖ in the 2-norm and in the maximum norm; infinite where
    shapes differ or x is not a number. One wrong element among millions shows in the second, a
    small error everywhere in the first."""
    if x.shape != exact.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    exact = exact.double().flatten()  # a mask, too
    difference = x.detach().double().flatten() - exact
    worst = 0.0
    for norm in (2, float("inf")):
        scale = float(torch.linalg.vector_norm(exact, norm)) or 1.0
        error = float(torch.linalg.vector_norm(difference, norm)) / scale
        if not error < float("inf"):
            return float("inf")
        worst = max(worst, error)
    return worst


def _parts(answer: Answer) -> dict[str, Tensor]:
    parts = {f"output {i}": x for i, x in enumerate(answer.outputs) if x.dim()}
    numbers = [x.detach().double() for x in answer.outputs if not x.dim()]
    if numbers:
        parts[NUMBERS] = torch.stack(numbers)
    return parts | {f"gradient of {name}": x for name, x in answer.gradients.items()}


def _pieces(op: Op, shape: dict[str, int], sample: Sample) -> list[Sample]:
    """The sample whole, or cut into ROWS rows each: with N rows that do not know of each other
    (every output of two rows has two entries) the [N, V] temporaries need not all exist at once."""
    n = shape.get("N", 0)

    def rows(start: int, stop: int) -> Sample:
        cut = {
            name: x.detach()[start:stop].requires_grad_(x.requires_grad)
            for name, x in tensors(sample).items()
            if x.shape[:1] == (n,)
        }
        return Sample(sample.name, {**sample.arguments, **cut}, sample.grads)

    if n <= ROWS:
        return [sample]
    with torch.no_grad():
        two = flat(op.reference(**rows(0, 2).arguments))
    if not all(x.shape[:1] == (2,) for x in two):
        return [sample]
    return [rows(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]


def _reference(op: Op, shape: dict[str, int], sample: Sample) -> tuple[Answer, dict[int, Tensor]]:
    """The reference's answer, and the random gradients its backward began with; they are the same
    at every call, whatever the dtype of the sample."""
    generator = torch.Generator().manual_seed(1)
    outputs: list[list[Tensor]] = []
    seeds: dict[int, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {name: [] for name in sample.grads}
    pieces = _pieces(op, shape, sample)
    for piece in pieces:
        out = flat(op.reference(**piece.arguments))
        outputs.append([x.detach() for x in out])
        roots = {i: x for i, x in enumerate(out) if x.requires_grad}
        for i, x in roots.items():
            seed = torch.randn(x.shape, generator=generator).to(x.device)
            seeds.setdefault(i, []).append(seed)
        if roots:
            found = torch.autograd.grad(
                list(roots.values()),
                [piece.arguments[name] for name in sample.grads],
                [seeds[i][-1].to(x.dtype) for i, x in roots.items()],
            )
            for name, g in zip(sample.grads, found, strict=True):
                gradients[name].append(g)

    def joined(name: str) -> Tensor:
        parts = gradients[name]
        if len(parts) == 1:
            return parts[0]
        if pieces[0].arguments[name] is sample.arguments[name]:  # shared by all rows: a sum
            return sum((g.double() for g in parts[1:]), parts[0].double())
        return torch.cat(parts)

    answer = Answer(
        [x[0] if len(x) == 1 else torch.cat(x) for x in zip(*outputs, strict=True)],
        {name: joined(name) for name in sample.grads},
    )
    return answer, {i: x[0] if len(x) == 1 else torch.cat(x) for i, x in seeds.items()}
