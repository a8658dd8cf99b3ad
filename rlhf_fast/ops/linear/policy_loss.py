"""linear_policy_loss: language-model head, policy loss and their gradients in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.distributed import ProcessGroup

from .. import aggregate, check, policy_loss, token_kl
from .. import support as sets
from .. import token_logprobs as from_logits
from ..options import LOSSES, RATIOS, PolicyOptions
from ..policy_loss import PolicyStats
from ..registry import Op, Sample, define_kernel, graph_is_kept, register
from . import chunks as linear
from . import gradients, logprobs, vocab_parallel
from .head import HEAD, Head, Lora, check_head, plain, wanted
from .logprobs import over_support


@PolicyOptions.documented
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    ref_logp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    group: ProcessGroup | None = None,
    compact: bool = True,
    deterministic: bool = False,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped policy loss straight from hidden states, in 6NHV FLOPs and no [N, V] tensor.

    The loss and statistics of ``policy_loss`` on the log-probs and entropies of
    ``linear_token_logprobs``, for less work. One after the other, those two ops take up to 8NHV:
    the logits never all exist at once, so the backward computes them a second time (but for those
    that the forward leaves). Here each chunk of rows goes from logits to loss to gradient before
    the next one begins. The gradient takes the place of the logits, and the gradients of ``hidden``
    and ``weight`` are complete when the forward ends; the backward multiplies them by the incoming
    gradient. (On a GPU gradients of bfloat16 inputs are rounded to bfloat16 before that
    multiplication, and once more after it unless its factor is a power of two. All others stay in
    float32 until then; a loss scale arrives with the incoming gradient.) Where the exponentials of
    all rows find room, as ``linear_token_logprobs`` leaves them of bfloat16 on a GPU, and
    entropy_coef is 0, the log-probs of all rows come first, of logits no larger than a tile; where
    more than a third of those rows then have no gradient, the others' logits are made again.

    That holds for every ``loss`` with token ratios. A sequence's ratio is known only when all of
    its log-probs are, so the other ratios run the two ops one after the other. So does ``support``,
    whose small sets need no chunks.

    Rows that cannot change the loss are left out of the matrix products: masked ones, and, with
    token ratios and no ``support``, those of zero advantage (or zero weight) when entropy_coef and
    kl_coef are 0. The log-probs of rows left out are not known, so the statistics other than the
    surrogate are means over the remaining tokens. ``PolicyStats.tokens`` is their number: weigh by
    it, and not by the mask, to average over micro-batches or processes. Where it is 0 the
    statistics say nothing.

    FLOPs: 6NHV, N the rows that are not left out; 2NHV where no gradient is wanted (no grad mode,
    or nothing requires grad).

    Args:
        hidden: [..., T, H]; weight: [V, H]; bias: [V] or None: as in ``linear_token_logprobs``.
        labels: [..., T], int64, the sampled tokens; −100 does not count, whatever mask says.
        old_logp, advantages, mask, importance_weights, ref_logp: [..., T], and normalizer: as in
            ``policy_loss``. Entropy is computed here; entropy_coef needs no tensor.
        temperature, softcap: as in ``token_logprobs``.
        support: [..., T, K], the tokens that sampling left, as in ``linear_token_logprobs``;
            ``old_logp`` and ``ref_logp`` must be of the same sets.
        lora, group, compact, deterministic: as in ``linear_token_logprobs``: (A [r, H], B [V, r],
            scale) of an adapter on the head; the ranks that share the vocabulary out, whose loss
            and statistics are the same.
        **options: the fields of ``PolicyOptions``.

    Returns:
        (loss, PolicyStats): float32 0-dim (float64 in, float64 out), to be minimised.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    importance_weights = policy_loss.under_old_name(importance_weights, options)
    head = check_head(hidden, weight, bias, lora)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be [..., T, H], got {check.describe(hidden)}")
    check.labels(labels, "hidden", hidden, head.weight.shape[0] if group is None else None)
    per_token_inputs = {"old_logp": old_logp, "advantages": advantages}
    optional = {"ref_logp": ref_logp, "importance_weights": importance_weights}
    per_token_inputs |= {name: x for name, x in optional.items() if x is not None}
    for name, x in per_token_inputs.items():
        check.like(name, x, "labels", labels)
    check.boolean_mask(mask, "labels", labels)
    dtype = check.accumulator(hidden)  # a float64 constant does not make the products float64
    chosen, values = policy_loss.checked_options(dtype, options, ref_logp)
    counting = labels.masked_fill(~mask, check.IGNORE_INDEX)
    divisor, per_token = from_logits._temperature(temperature, counting, dtype)
    from_logits._softcap(softcap, dtype)
    check.flag("compact", compact)
    check.flag("deterministic", deterministic)
    how = compact, deterministic, vocab_parallel.name(group)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else check.constant(x, dtype)

    counts = check.flat(mask & (labels != check.IGNORE_INDEX))
    constants = constant(old_logp), constant(advantages), counts, constant(importance_weights)
    normalizer = aggregate.checked(chosen.aggregation, normalizer, mask, dtype)
    ids = sets.checked(support, counting)
    labels, per_token = check.flat(labels), check.flat(per_token)
    if chosen.ratio == "token" and ids is None:
        total, stats, *_ = torch.ops.rlhf_fast.linear_policy_loss(
            *head, labels, *constants, constant(ref_logp), normalizer, divisor, per_token, softcap,
            *how, wanted(head), *values,
        )  # fmt: skip
    else:
        logp, entropy = over_support(
            head, labels.masked_fill(~counts, check.IGNORE_INDEX).view(-1), ids, divisor,
            None if per_token is None else per_token.view(-1), softcap, True, *how,
        )  # fmt: skip
        entropy = entropy if chosen.entropy_coef else entropy.detach()  # no gradient of zeros
        total, stats, *_ = torch.ops.rlhf_fast.policy_loss(
            logp.view_as(counts), *constants, entropy.view_as(counts), constant(ref_logp),
            normalizer, *values,
        )  # fmt: skip
    return total, PolicyStats(*stats.unbind())


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    ref_logp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    group: None = None,
    compact: bool = True,
    deterministic: bool = False,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    """The formula in plain PyTorch; holds all the logits."""
    o = PolicyOptions(**options)
    mask = mask & (labels != check.IGNORE_INDEX)
    logits, temperature = plain(hidden, weight, bias, lora, temperature, mask)
    logp, entropy = from_logits.reference(
        logits,
        labels.masked_fill(~mask, check.IGNORE_INDEX),
        temperature=temperature,
        softcap=softcap,
        entropy=True,
        support=support,
    )
    inputs = {"importance_weights": importance_weights, "entropy": entropy, "ref_logp": ref_logp}
    loss, stats = policy_loss.reference(
        logp, old_logp, advantages, mask, normalizer=normalizer, **inputs, **options
    )
    matters = mask
    if o.ratio == "token" and support is None:
        matters = mask & _matters(advantages, importance_weights, o)
    stayed = policy_loss.reference(logp, old_logp, advantages, matters, **inputs, **options)[1]
    return loss, stayed._replace(surrogate=stats.surrogate)


def _matters(
    advantages: Tensor, importance_weights: Tensor | None, options: PolicyOptions
) -> Tensor:
    """Tokens whose loss can have a gradient."""
    if options.entropy_coef or options.kl_coef:
        return torch.ones_like(advantages, dtype=torch.bool)
    if importance_weights is None:
        return advantages != 0
    return (advantages != 0) & (importance_weights != 0)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    importance_weights: Tensor | None,
    ref_logp: Tensor | None,
    normalizer: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    compact: bool,
    deterministic: bool,
    group: str | None,
    needs: list[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    """(loss, stats [14], the gradients of linear.Needs, empty where not needed)."""
    o = PolicyOptions(*options)  # ratio: token
    token_sum = replace(o, aggregation="token-sum").values()
    matters = mask & _matters(advantages, importance_weights, o)
    labels = labels.masked_fill(~matters, check.IGNORE_INDEX)
    head = Head(hidden, weight, bias, down, up)

    def result(logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, stats, gradient of logp where its sum is the loss)"""

        def whole(mask: Tensor, normalizer: Tensor | None, options: Any) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.ops.rlhf_fast.policy_loss(
                logp, old_logp, advantages, mask, importance_weights, entropy, ref_logp, normalizer,
                *options,
            )  # fmt: skip
            return found

        total, stats, *_ = whole(mask, normalizer, options)
        _, stayed, of_logp, _ = whole(matters, None, token_sum)
        return total, torch.cat([stats[:1], stayed[1:]]), of_logp

    def coefficients() -> Tensor:
        """[N]: by how much each token's loss counts."""
        of_row = aggregate.coefficients(mask, o.aggregation, normalizer, old_logp.dtype)
        return of_row.unsqueeze(-1).expand_as(mask).reshape(-1)

    vocabulary, labels = vocab_parallel.part_of(weight, labels, group)
    engine = compact, deterministic, vocabulary, needs
    if not any(needs) or (not o.entropy_coef and logprobs.leaves_all(head, labels, *engine[1:])):
        rows, divisors = labels.view(-1), None if per_token is None else per_token.view(-1)
        of_rows = temperature, divisors, softcap, None
        *found, norm_of_all = logprobs.forward(head, rows, *of_rows, True, *engine)
        logp, entropy = (x.view_as(old_logp) for x in found)
        loss, stats, of_logp = result(logp, entropy)
        if not any(needs):
            return loss, stats, *(hidden.new_empty(0) for _ in needs)
        of_logp = aggregate.times(coefficients(), of_logp.view(-1))
        gradients_of = of_logp, None, head, rows, norm_of_all, None, *of_rows, *engine
        return loss, stats, *logprobs.backward(*gradients_of, _saved_dtype(hidden))

    coefficient = coefficients()
    logp, entropy = torch.zeros_like(old_logp), torch.zeros_like(old_logp)
    grads = gradients.Gradients(head, gradients.Needs(*needs), vocabulary, _saved_dtype(hidden))
    how: dict[str, Any] = {"compact": compact, "deterministic": deterministic, "part": vocabulary}
    for chunk in linear.chunks(head, matters.view(-1), **how, parts=grads.parts):

        def part(full: Tensor, rows: Tensor | slice = chunk.rows) -> Tensor:
            return linear.take(full.view(-1), rows)[None]

        targets = part(labels)
        divisors, weights_, ref_logp_ = (
            None if x is None else part(x) for x in (per_token, importance_weights, ref_logp)
        )
        logp_, entropy_, norm = vocab_parallel.token_logprobs(
            chunk.tiles(targets), temperature, divisors, softcap, True, vocabulary
        )
        logp.view(-1)[chunk.rows], entropy.view(-1)[chunk.rows] = logp_[0], entropy_[0]
        _, _, d_logp, d_entropy = torch.ops.rlhf_fast.policy_loss(
            logp_, part(old_logp), part(advantages), part(matters), weights_, entropy_,
            ref_logp_, None, *token_sum,
        )  # fmt: skip
        scale = part(coefficient)
        d_logp, d_entropy = grads.fit(
            aggregate.times(scale, d_logp),
            d_entropy * scale if o.entropy_coef else None,
            temperature=temperature if divisors is None else divisors,
        )
        own_entropy = entropy_ if o.entropy_coef else None
        of_gradient = d_logp, d_entropy, norm, own_entropy, temperature, divisors, softcap
        grads.add(chunk, targets, partial(logprobs.write, chunk.logits, *of_gradient))
        del chunk  # free when the products of a group of all rows are made
    return *result(logp, entropy)[:2], *grads.result()


def _saved_dtype(hidden: Tensor) -> torch.dtype:
    """Of the gradients between forward and backward: they come before a GradScaler's loss scale,
    without which float16 cannot hold them. Those of bfloat16 stay in the float32 that they are
    summed in on a CPU; on a GPU its memory is wanted."""
    if hidden.dtype == torch.bfloat16 and hidden.is_cuda:
        return hidden.dtype
    return check.accumulator(hidden)


NEEDS = 18  # the place of needs among the kernel's arguments


def _fake(*args: Any) -> tuple[Tensor, ...]:
    hidden, old_logp = args[0], args[6]
    grads = [
        torch.empty_like(x, dtype=_saved_dtype(hidden)) if needed else hidden.new_empty(0)
        for x, needed in zip(args[:5], args[NEEDS], strict=True)
    ]
    return old_logp.new_empty(()), old_logp.new_empty(len(PolicyStats._fields)), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, *grads = output
    ctx.mark_non_differentiable(stats, *grads)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*grads)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> Any:
    # Unless the next backward needs them, too, the saved gradients are what is returned: a second
    # dW would be new memory, which takes longer than all else here. loss.backward() comes with
    # exactly 1. Looking costs a host sync on a GPU, and cannot be traced or batched.
    looked_at = grad.device.type == "cpu" and detect_fake_mode([grad]) is None
    looked_at = looked_at and not torch._C._functorch.is_functorch_wrapped_tensor(grad)
    ours = looked_at and not graph_is_kept()
    one = ours and grad.item() == 1

    def scaled(g: Tensor) -> Tensor:
        return g if one else g.mul_(grad) if ours else g * grad

    grads = (
        scaled(g).to(ctx.dtype) if needed else None
        for g, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:5], strict=True)
    )
    return *grads, *(None,) * (len(ctx.needs_input_grad) - 5)


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(b: int, t: int, h: int, v: int, **options: Any) -> dict[str, Any]:
        hidden = torch.randn(b, t, h, generator=generator)
        weight = torch.randn(v, h, generator=generator) / h**0.5 * 2
        labels = torch.randint(v, (b, t), generator=generator)
        down, up, scale = options.get("lora", (hidden.new_zeros(1, h), hidden.new_zeros(v, 1), 0.0))
        logits = hidden @ weight.t() + scale * hidden @ down.t() @ up.t()
        logp = from_logits.reference(logits, labels)  # else ratios are far from 1
        return {
            "hidden": hidden,
            "weight": weight,
            "labels": labels,
            "old_logp": logp + 0.3 * torch.randn(b, t, generator=generator),
            "advantages": torch.randn(b, t, generator=generator),
            "mask": torch.rand(b, t, generator=generator) > 0.3,
        } | options

    def everything(b: int, t: int, h: int, v: int, **options: Any) -> dict[str, Any]:
        x = draw(b, t, h, v, **options)
        return x | {
            "importance_weights": torch.rand(b, t, generator=generator) + 0.5,
            "ref_logp": x["old_logp"] + 0.3 * torch.randn(b, t, generator=generator),
            "bias": torch.randn(v, generator=generator),
            "temperature": 0.5 + torch.rand(b, t, generator=generator),
            "entropy_coef": 0.01,
            "kl_coef": 0.1,
        }

    def adapter(h: int, v: int) -> Lora:
        down, up = (torch.randn(*size, generator=generator) for size in ((3, h), (v, 3)))
        return down / h**0.5, up / 3**0.5, 0.5

    two, three = ("hidden", "weight"), ("hidden", "weight", "bias")
    for mode in aggregate.AGGREGATIONS:
        yield Sample(mode, draw(3, 7, 4, 11, aggregation=mode), two)
        full = everything(4, 9, 8, 33, aggregation=mode, normalizer=17.0)
        yield Sample(f"{mode}, everything", full, three)
    clips = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "softcap": 3.0}
    yield Sample("asymmetric, dual clip, softcap", draw(3, 12, 8, 33, **clips), two)
    for estimator in token_kl.ESTIMATORS:
        yield Sample(estimator, everything(2, 6, 4, 9, kl_estimator=estimator), three)
    for loss in LOSSES:
        named = {"loss": loss, "ratio": LOSSES[loss][0]}
        still = draw(3, 8, 4, 9, **named)
        still["advantages"][:, ::2] = 0.0
        yield Sample(f"zero advantages, {loss}", still, two)
        yield Sample(f"{loss}, everything", everything(3, 8, 4, 9, **named), three)
    cispo = {"loss": "cispo", "clip_low": 0.6, "clip_high": -0.3}
    yield Sample("cispo, clipped below 1", draw(3, 12, 8, 33, **cispo), two)
    for loss in ("ppo", "cispo"):
        row = {"ratio": "sequence", "loss": loss, "clip_low": 0.02, "clip_high": 0.04}
        scaled = draw(5, 7, 4, 11, **row, temperature=0.7, softcap=2.0)
        yield Sample(f"sequence, {loss}", scaled, two)
        full = everything(4, 9, 8, 33, **row, aggregation="seq-mean-token-mean")
        yield Sample(f"sequence, {loss}, everything", full, three)
    dual = {"ratio": "sequence", "dual_clip": 1.05}
    yield Sample("sequence, dual clip", draw(9, 3, 4, 11, **dual), two)
    impossible = draw(3, 8, 4, 9)
    impossible["advantages"][:, ::2] = 0.0
    impossible["old_logp"][:, ::2] = -torch.inf
    yield Sample("zero advantages, impossible before", impossible, two)
    garbage = draw(3, 8, 4, 9)
    for name in ("old_logp", "advantages"):
        garbage[name] = garbage[name].masked_fill(~garbage["mask"], torch.nan)
    garbage["labels"][~garbage["mask"]] = check.IGNORE_INDEX
    yield Sample("NaN behind the mask", garbage, two)
    adapted = (*three, "lora")
    full = everything(3, 9, 8, 33, lora=adapter(8, 33), softcap=3.0)
    yield Sample("adapter, everything", full, adapted)
    row = draw(3, 7, 4, 11, lora=adapter(4, 11), ratio="sequence")
    yield Sample("adapter, sequence", row, (*two, "lora"))
    for most in (2, 20):  # made token by token; a chunk's row
        for ratio in RATIOS:
            x = everything(3, 9, 8, 33, lora=adapter(8, 33), ratio=ratio)
            x["support"] = sets.drawn(x["labels"], 33, most, generator)
            x["support"][~x["mask"]] = 1000  # behind the mask it may hold anything
            yield Sample(f"support of {most}, {ratio}", x, adapted)
    inputs = ("hidden", "old_logp", "advantages", "importance_weights", "ref_logp", "temperature")
    for how in ({"compact": True}, {"compact": False}, {"deterministic": True},
                {"ratio": "sequence"}):  # fmt: skip
        garbage = everything(3, 9, 8, 33, lora=adapter(8, 33), **how)
        garbage["labels"][0, ::2] = check.IGNORE_INDEX
        out = ~garbage["mask"] | (garbage["labels"] == check.IGNORE_INDEX)
        for name in inputs:
            garbage[name][out] = torch.nan
        yield Sample(f"NaN in every input where ignored, {how}", garbage, adapted)
    masked = draw(2, 5, 4, 9)
    masked["mask"][:] = False
    yield Sample("all masked", masked, two)
    yield Sample("no tokens", draw(2, 0, 4, 9), two)
    yield Sample("one token", draw(1, 1, 4, 9), two)


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    n, h, v = shape["N"], shape["H"], shape["V"]
    hidden = torch.randn(n, h, generator=generator, device=device).to(dtype)
    weight = (torch.randn(v, h, generator=generator, device=device) / h**0.5).to(dtype)
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "labels": torch.randint(v, (n,), generator=generator, device=device),
        "old_logp": -11 + torch.randn(n, generator=generator, device=device),
        "advantages": torch.randn(n, generator=generator, device=device),
        "mask": torch.ones(n, dtype=torch.bool, device=device),
        "entropy_coef": 0.01,
    }
    return Sample("bench", arguments, ("hidden", "weight"))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    operands = (shape["N"] + shape["V"]) * shape["H"] * element_size
    return 2 * operands, 2 * operands


def flops(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    gemm = 2 * shape["N"] * shape["H"] * shape["V"]
    return gemm, 2 * gemm


KERNEL = define_kernel(
    f"linear_policy_loss({HEAD}, Tensor labels, "
    "Tensor old_logp, Tensor advantages, Tensor mask, Tensor? importance_weights, "
    "Tensor? ref_logp, Tensor? normalizer, float temperature, Tensor? per_token, float? softcap, "
    f"bool compact, bool deterministic, str? group, bool[] needs, {PolicyOptions.schema()}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_fake,
    engine=True,
    backward=_autograd,
    setup_context=_setup_context,
)
register(
    Op(
        "linear_policy_loss",
        linear_policy_loss,
        reference,
        (KERNEL,),
        samples,
        workload,
        ({"N": 512, "H": 576, "V": 49152}, {"N": 4096, "H": 576, "V": 49152}),
        bytes_moved,
        flops,
    )
)
