"""What is measured: the registry's ops, variants of some of their workloads, and the suites' lists.

A variant is an op of its own here, named ``op:variant``: the same function on other inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops as _ops  # noqa: F401  (fills the registry)
from rlhf_fast.ops.kto_loss import kto_loss
from rlhf_fast.ops.preference_loss import preference_loss
from rlhf_fast.ops.registry import OPS as REGISTRY
from rlhf_fast.ops.registry import Op, Sample

Shape = dict[str, int]
Plan = list[tuple[Op, Shape]]
VALUE_COEF = 0.1


def variant(
    base: str,
    name: str,
    change: Callable[[dict[str, Any], Shape], dict[str, Any]],
    shapes: tuple[Shape, ...] | None = None,
) -> Op:
    """``change``: of the base's arguments at a shape, those that are other. With ``kept`` in the
    shape, the percentage of rows that matter, bytes and FLOPs are of those rows alone; with K, the
    tokens of each row, of those tokens alone."""
    op = REGISTRY[base]

    def workload(shape: Shape, generator: torch.Generator, device: str, dtype: torch.dtype):
        sample = op.workload(shape, generator, device, dtype)
        arguments = sample.arguments | change(sample.arguments, shape)
        return dataclasses.replace(sample, arguments=arguments)

    def of_kept(count: Callable[[Shape, int], tuple[int, int]]):
        def counted(shape: Shape, element_size: int) -> tuple[int, int]:
            n = shape.get("N", 0) * shape.get("kept", 100) // 100
            tokens = {"V": shape["K"]} if "K" in shape else {}
            return count(shape | tokens | {"N": n}, element_size)

        return counted

    return dataclasses.replace(
        op,
        name=f"{base}:{name}",
        workload=workload,
        shapes=shapes or op.shapes,
        bytes_moved=of_kept(op.bytes_moved),
        flops=of_kept(op.flops),
    )


def half(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    return tuple(shape | {"kept": 50} for shape in shapes)


def matters(rows: Tensor, shape: Shape) -> Tensor:
    """[N], True in ``kept`` percent of the rows, evenly spread."""
    at = torch.arange(shape["N"], device=rows.device)
    return at * shape["kept"] // 100 != (at + 1) * shape["kept"] // 100


def _among_few(x: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Tokens that were drawn among K, any of the vocabulary's."""
    labels = x["labels"]
    generator = torch.Generator(labels.device).manual_seed(0)
    scores = torch.rand(*labels.shape, shape["V"], generator=generator, device=labels.device)
    scores.scatter_(-1, labels.unsqueeze(-1), 2.0)
    return {"support": scores.topk(shape["K"]).indices}


def _right_padded(x: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Answers of 50 to 100 % of T, zeros behind their end: where all conventions agree."""
    ends = torch.linspace(0.5, 1.0, shape["B"], device=x["mask"].device) * shape["T"]
    mask = torch.arange(shape["T"], device=ends.device) < ends[:, None]
    return {"mask": mask, "rewards": x["rewards"] * mask, "values": x["values"] * mask}


def policy_and_value() -> Op:
    """The two losses of an update in one total, as torchtune has them."""
    policy, value = REGISTRY["policy_loss"], REGISTRY["value_loss"]

    def total(of_policy: Callable[..., Any], of_value: Callable[..., Any]) -> Callable[..., Any]:
        def losses(logp, old_logp, advantages, mask, values, old_values, returns):
            """Policy loss and value loss with their statistics, one backward."""
            policy_loss, stats = of_policy(logp, old_logp, advantages, mask)
            value_loss, value_stats = of_value(values, old_values, returns, mask)
            return policy_loss + VALUE_COEF * value_loss, stats, value_stats

        return losses

    def workload(shape: Shape, *where: Any) -> Sample:
        samples = [op.workload(shape, *where) for op in (value, policy)]
        return Sample("bench", samples[0].arguments | samples[1].arguments, ("logp", "values"))

    def added(count: str) -> Callable[[Shape, int], tuple[int, int]]:
        def both(shape: Shape, element_size: int) -> tuple[int, int]:
            parts = [getattr(op, count)(shape, element_size) for op in (policy, value)]
            return tuple(map(sum, zip(*parts, strict=True)))

        return both

    return Op(
        "policy+value_loss",
        total(policy.function, value.function),
        total(policy.reference, value.reference),
        (*policy.kernels, *value.kernels),
        policy.samples,
        workload,
        policy.shapes[:1],
        added("bytes_moved"),
        added("flops"),
    )


PREFERENCES = ("dpo", "simpo", "orpo", "kto")


def head_and_preference(loss: str) -> Op:
    """A preference loss of 2B answers from their hidden states, and the reference's where it has
    one: what the trainers of DPO, SimPO, ORPO and KTO compute beside the models' bodies."""
    head = REGISTRY["linear_token_logprobs"]
    op = REGISTRY["kto_loss" if loss == "kto" else "preference_loss"]
    referenced = loss in ("dpo", "kto")

    def total(logprobs: Callable[..., Any], of_answers: Callable[..., Any]) -> Callable[..., Any]:
        def losses(hidden, weight, labels, mask, ref_hidden, ref_weight):
            """The loss of the answers with its statistics."""
            ref_logp = None
            if referenced:  # first: then the backward finds what the policy's forward left
                with torch.no_grad():
                    ref_logp = logprobs(ref_hidden, ref_weight, labels).view(mask.shape)
            logp = logprobs(hidden, weight, labels).view(mask.shape)
            return of_answers(loss, logp, mask, ref_logp)

        return losses

    def workload(shape: Shape, *where: Any) -> Sample:
        rows = {**shape, "N": 2 * shape["B"] * shape["T"]}
        drawn, ref = (head.workload(rows, *where).arguments for _ in range(2))
        mask = REGISTRY["preference_loss"].workload(shape, *where).arguments["mask"]
        labels = drawn["labels"].where(mask.flatten(), -100)
        arguments = {"hidden": drawn["hidden"], "weight": drawn["weight"], "labels": labels}
        arguments |= {"mask": mask, "ref_hidden": ref["hidden"], "ref_weight": ref["weight"]}
        return Sample("bench", arguments, ("hidden", "weight"))

    def counted(count: Callable[[Shape, int], tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        def of_pairs(shape: Shape, element_size: int) -> tuple[int, int]:
            there, back = count(shape | {"N": 2 * shape["B"] * shape["T"]}, element_size)
            return there * (1 + referenced), back

        return of_pairs

    return Op(
        f"linear+preference_loss:{loss}",
        total(head.function, our_preference),
        total(head.reference, plain_preference),
        (*head.kernels, *op.kernels),
        op.samples,
        workload,
        ({"B": 2, "T": 128, "H": 576, "V": 49152},),
        counted(head.bytes_moved),
        counted(head.flops),
    )


def our_preference(loss: str, logp: Tensor, mask: Tensor, ref_logp: Tensor | None) -> Any:
    """Of [2B, T] log-probs, the better answers first."""
    if loss == "kto":
        desirable = torch.arange(len(mask), device=mask.device) < len(mask) // 2
        return kto_loss(logp, mask, ref_logp, desirable)
    nll = {"nll_coef": 1.0} if loss == "orpo" else {}
    return preference_loss(logp, mask, ref_logp, loss=loss, **nll)


def plain_preference(loss: str, logp: Tensor, mask: Tensor, ref_logp: Tensor | None) -> Any:
    """The same as their authors and the libraries write it, from a sum or a mean an answer. The
    reference of the op, a loop over pairs, is not what anyone would time."""
    good = len(mask) // 2
    answers = (logp * mask).sum(1)
    if ref_logp is not None:
        answers = answers - (ref_logp * mask).sum(1)
    else:
        answers = answers / mask.sum(1)
    if loss == "kto":
        rewards = (0.1 * answers).detach()
        gain = 0.1 * torch.cat([answers[:good], -answers[good:]])
        return (1 - torch.sigmoid(gain)).mean(), rewards[:good].mean(), rewards[good:].mean()
    nll = -(logp * mask)[:good].sum() / mask[:good].sum()
    if loss == "orpo":
        answers = answers - torch.log1p(-answers.exp())
    else:
        answers = 0.1 * answers
    chosen, rejected = answers[:good], answers[good:]
    each = -torch.nn.functional.logsigmoid(chosen - rejected)
    total = 0.1 * each.mean() + nll if loss == "orpo" else each.mean()
    stats = ((chosen > rejected).to(logp.dtype), chosen, rejected)
    return total, *(x.mean().detach() for x in stats), nll.detach()


_HEAD = ({"N": 512, "H": 576, "V": 49152},)
_VARIANTS = (
    variant("token_logprobs", "no-entropy", lambda x, s: {"entropy": False}),
    variant("linear_token_logprobs", "no-entropy", lambda x, s: {"entropy": False}),
    variant("linear_policy_loss", "no-entropy", lambda x, s: {"entropy_coef": 0.0}),
    variant(
        "linear_policy_loss", "masked", lambda x, s: {"mask": matters(x["mask"], s)}, half(_HEAD)
    ),
    variant(
        "linear_policy_loss",
        "zero-advantage",
        lambda x, s: {
            "advantages": x["advantages"] * matters(x["mask"], s),
            "entropy_coef": 0.0,  # with an entropy term every token has a gradient
        },
        half(_HEAD),
    ),
    variant(
        "linear_token_logprobs",
        "masked",
        lambda x, s: {"labels": x["labels"].where(matters(x["labels"], s), -100)},
        half(_HEAD),
    ),
    *(
        variant(op, "support", _among_few, tuple(shape | {"K": 50} for shape in _HEAD))
        for op in ("linear_policy_loss", "linear_token_logprobs", "linear_token_kl")
    ),
    variant("gae", "right-padded", _right_padded),
    policy_and_value(),
    *map(head_and_preference, PREFERENCES),
)
OPS: dict[str, Op] = REGISTRY | {op.name: op for op in _VARIANTS}

# The arguments with which a variant that drops rows or tokens drops none.
DENSE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "linear_policy_loss:masked": lambda x: {"mask": torch.ones_like(x["mask"])},
    "linear_policy_loss:zero-advantage": lambda x: {
        "advantages": x["advantages"].where(x["advantages"] != 0, 1.0)
    },
    "linear_token_logprobs:masked": lambda x: {"labels": x["labels"].clamp(min=0)},
    "linear_policy_loss:support": lambda x: {"support": None},
    "linear_token_logprobs:support": lambda x: {"support": None},
    "linear_token_kl:support": lambda x: {"support": None},
}

# ------------------------------------------------------------------------------------- the suites

# H100 rows of docs/performance.md, the most important first, so that a run that is interrupted
# has measured those.
GPU_HEADLINES: tuple[tuple[str, Shape], ...] = (
    ("linear_policy_loss", {"N": 8192, "H": 4096, "V": 131072}),
    ("linear_policy_loss:no-entropy", {"N": 8192, "H": 4096, "V": 131072}),
    ("linear_policy_loss", {"N": 8192, "H": 896, "V": 151936}),
    ("linear_policy_loss:masked", {"N": 8192, "H": 4096, "V": 131072, "kept": 50}),
    ("linear_token_logprobs", {"N": 8192, "H": 4096, "V": 131072}),
    ("token_logprobs", {"N": 8192, "V": 151936}),
    ("linear_token_kl", {"N": 8192, "H": 4096, "V": 131072}),
    ("gae", {"B": 512, "T": 4096}),
    ("gae:right-padded", {"B": 512, "T": 4096}),
    ("policy_loss", {"B": 64, "T": 2048}),
    ("value_loss", {"B": 64, "T": 2048}),
    ("policy+value_loss", {"B": 64, "T": 2048}),
)
# Vocabularies of Llama 2, SmolLM2 and Qwen2.5, the last two with the hidden size of their smallest.
VOCABULARIES: tuple[Shape, ...] = (
    {"N": 512, "H": 576, "V": 32000},
    {"N": 512, "H": 576, "V": 49152},
    {"N": 256, "H": 896, "V": 151936},
)
# Minutes on 2 cores, and so asked for by --shape.
LONG: Shape = {"N": 4096, "H": 576, "V": 49152}
SUITES = ("ops", "linear", "step", "scale", "accuracy")


def plan(suite: str, device: torch.device, quick: bool) -> Plan:
    """The ops and shapes of a suite (all but "step"), in the order in which they are run."""
    listed = {"ops": _ops_suite, "linear": _linear_suite, "scale": _scale_suite,
              "accuracy": _accuracy_suite}[suite]  # fmt: skip
    found: Plan = []
    for name, shape in listed(device.type != "cpu", quick):
        if name in OPS and (OPS[name], shape) not in found:
            found.append((OPS[name], shape))
    return found


def _ops_suite(gpu: bool, quick: bool) -> Iterator[tuple[str, Shape]]:
    """Each op once: of its variants only the one that every library has; the suites "linear" and
    "scale" have the others, and more shapes."""
    if gpu:
        yield from GPU_HEADLINES
    for name, op in OPS.items():
        if name == "gae" or (":" in name and name != "gae:right-padded"):
            continue
        most = {"N": 128, "V": 32000} if quick else {}
        yield name, {key: min(size, most.get(key, size)) for key, size in op.shapes[0].items()}


def _linear_suite(gpu: bool, quick: bool) -> Iterator[tuple[str, Shape]]:
    if gpu:
        yield from (row for row in GPU_HEADLINES if row[0].startswith("linear"))
    for shape in VOCABULARIES[:1] if quick else VOCABULARIES:
        yield "linear_policy_loss", shape
        yield "linear_token_logprobs", shape
    yield from (
        (name, OPS[name].shapes[0])
        for name in OPS
        if name.startswith("linear") and name not in ("linear_policy_loss", "linear_token_logprobs")
    )


def _scale_suite(gpu: bool, quick: bool) -> Iterator[tuple[str, Shape]]:
    for name, fixed, axis, sizes in SCALES[gpu]:
        yield from ((name, fixed | {axis: size}) for size in (sizes[:2] if quick else sizes))


def _accuracy_suite(gpu: bool, quick: bool) -> Iterator[tuple[str, Shape]]:
    """Sizes at which an error would show and float64 is quick."""
    small = {"N": 64, "H": 256, "V": 32000, "B": 16, "T": 512, "kept": 50}
    for name, op in OPS.items():
        yield name, {key: min(size, small.get(key, size)) for key, size in op.shapes[0].items()}


# (op, what stays, what grows, its sizes), on CPU and on a GPU.
Scale = tuple[str, Shape, str, tuple[int, ...]]
SCALES: dict[bool, tuple[Scale, ...]] = {
    False: (
        ("linear_policy_loss", {"H": 576, "V": 32000}, "N", (128, 256, 512, 1024)),
        ("linear_policy_loss", {"N": 256, "H": 576}, "V", (8192, 32000, 65536, 151936)),
        ("linear_policy_loss", {"N": 256, "V": 32000}, "H", (256, 512, 1024, 2048)),
        ("linear_policy_loss:masked", {"N": 512, "H": 576, "V": 32000}, "kept", (100, 75, 50, 25)),
        ("linear_policy_loss:zero-advantage", {"N": 512, "H": 576, "V": 32000}, "kept",
         (100, 75, 50, 25)),
        ("token_logprobs", {"V": 32000}, "N", (64, 128, 256, 512, 1024)),
        ("token_logprobs", {"N": 128}, "V", (8192, 32000, 65536, 151936)),
        ("gae:right-padded", {"B": 64}, "T", (128, 512, 2048, 8192)),
        ("policy_loss", {"B": 64}, "T", (128, 512, 2048, 8192)),
    ),
    True: (
        ("linear_policy_loss", {"H": 4096, "V": 131072}, "N", (1024, 2048, 4096, 8192, 16384)),
        ("linear_policy_loss", {"N": 8192, "H": 2048}, "V", (32000, 65536, 131072, 262144)),
        ("linear_policy_loss", {"N": 8192, "V": 131072}, "H", (896, 2048, 4096, 8192)),
        ("linear_policy_loss:masked", {"N": 8192, "H": 4096, "V": 131072}, "kept",
         (100, 75, 50, 25)),
        ("linear_policy_loss:zero-advantage", {"N": 8192, "H": 4096, "V": 131072}, "kept",
         (100, 75, 50, 25)),
        ("token_logprobs", {"V": 151936}, "N", (512, 1024, 2048, 4096, 8192)),
        ("token_logprobs", {"N": 4096}, "V", (32000, 65536, 131072, 262144)),
        ("gae:right-padded", {"B": 512}, "T", (512, 1024, 2048, 4096, 8192)),
        ("policy_loss", {"B": 64}, "T", (512, 2048, 8192, 32768)),
    ),
}  # fmt: skip
