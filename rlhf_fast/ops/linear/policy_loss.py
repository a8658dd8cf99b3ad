"""linear_policy_loss: language-model head, policy loss and their gradients in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.distributed import ProcessGroup

from .. import aggregate, check, policy_loss, token_kl
from .. import token_logprobs as from_logits
from ..linear import chunks as linear
from ..linear import vocab_parallel
from ..policy_loss import PolicyStats
from ..registry import Op, Sample, define_kernel, graph_is_kept, register


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    loss: str = "ppo",
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    lora: linear.Lora | None = None,
    group: ProcessGroup | None = None,
    compact: bool = True,
    deterministic: bool = False,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped policy loss straight from hidden states, in 6NHV FLOPs and no [N, V] tensor.

    The numbers of ``policy_loss`` on the log-probs and entropies of ``linear_token_logprobs``.
    Those two cost up to 8NHV, since their backward makes the logits of all chunks but the last
    again; here the loss is known while a chunk's logits exist, so they are overwritten with their
    gradient at once, and dX and dW are ready when the forward ends. The backward only scales them
    by the incoming gradient.
    (bfloat16 ones are rounded by then, and once more where that is not a power of two; float16 ones
    wait in float32 for a loss scale.)
    That holds for every ``loss`` with token ratios. A sequence's ratio is known only with the last
    of its log-probs, so ``ratio="sequence"`` is those two ops in one call.

    Rows that cannot matter leave before the first matrix product: masked ones, and, with token
    ratios, those of zero advantage (or zero weight) when entropy_coef and kl_coef are 0. Nothing
    is known of those, so the statistics (but the surrogate) are means over the tokens that stayed,
    ``PolicyStats.tokens`` of them: weigh by that, not by the mask, whatever you add up over
    micro-batches or processes; where it is 0 they say nothing.

    Without grad mode (or where nothing requires grad): 2NHV, no gradients.

    On a GPU a chunk is gone over four times. Bytes a logit, beyond what the products read::

        operands                                   float32   16-bit
        the product writes the logits, in float32        4        4
        logp and entropy read them                       4        4
        the gradient reads them ...                      4        4
        ... and is written in the operands' dtype        4        2
                                                        16       14

    H100, bf16, N=8192 H=4096 V=131072: 6NHV = 26.4 TFLOP at the 800 TFLOP/s of a large cuBLAS
    product are 33.0 ms; 15.0 GB at 3 TB/s are 5.0 ms: 38.0 ms predicted. (A gradient in float32
    over the logits, rounded by a pass of its own, takes 22 bytes a logit and the same FLOPs:
    40.9 ms.) dW is read and written once a chunk, 19 GB: 6.4 ms more where that does not hide
    behind the products. H=896 V=151936: 6.7 TFLOP are 8.4 ms, 17.4 GB are 5.8 ms: 14.2 ms, 1.7
    times the products (with 22 bytes, 2.1). Half of the rows out: half of it. Not measured on a GPU
    yet.

    Args:
        hidden: [..., T, H]; weight: [V, H]; bias: [V] or None: as in ``linear_token_logprobs``.
        labels: [..., T], int64, the sampled tokens; −100 does not count, whatever mask says.
        old_logp, advantages, mask, weights, ref_logp: [..., T], and clip_low, clip_high,
            dual_clip, ratio, loss, aggregation, normalizer, entropy_coef, kl_coef, kl_estimator:
            as in ``policy_loss``. Entropy is computed here; entropy_coef needs no tensor.
        temperature, softcap: as in ``token_logprobs``.
        lora, group, compact, deterministic: as in ``linear_token_logprobs``: (A [r, H], B [V, r],
            scale) of an adapter on the head; the ranks that share the vocabulary out, whose loss
            and statistics are the same.

    Returns:
        (loss, PolicyStats): float32 0-dim (float64 in, float64 out), to be minimised.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    head = linear.check_head(hidden, weight, bias, lora)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be [..., T, H], got {check.describe(hidden)}")
    check.labels(labels, "hidden", hidden, head.weight.shape[0] if group is None else None)
    per_token_inputs = {"old_logp": old_logp, "advantages": advantages}
    optional = {"ref_logp": ref_logp, "weights": weights}
    per_token_inputs |= {name: x for name, x in optional.items() if x is not None}
    for name, x in per_token_inputs.items():
        check.like(name, x, "labels", labels)
    check.boolean_mask(mask, "labels", labels)
    dtype = check.accumulator(hidden)  # a float64 constant does not make the products float64
    policy_loss.check_options(
        clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator, ref_logp, ratio, loss,
        dtype,
    )  # fmt: skip
    counting = labels.masked_fill(~mask, check.IGNORE_INDEX)
    divisor, per_token = from_logits._temperature(temperature, counting, dtype)
    from_logits._softcap(softcap, dtype)
    check.flag("compact", compact)
    check.flag("deterministic", deterministic)
    how = compact, deterministic, vocab_parallel.name(group)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else check.flat(x.detach(), dtype)

    counts = check.flat(mask & (labels != check.IGNORE_INDEX))
    constants = constant(old_logp), constant(advantages), counts, constant(weights)
    normalizer = aggregate.checked(aggregation, normalizer, mask, dtype)
    dual_clip = None if dual_clip is None else float(dual_clip)
    options = (float(clip_low), float(clip_high), dual_clip, float(entropy_coef), float(kl_coef),
               kl_estimator, aggregation)  # fmt: skip
    labels, per_token = check.flat(labels), check.flat(per_token)
    if ratio == "token":
        grad = torch.is_grad_enabled()
        needs = [grad and x is not None and x.requires_grad for x in head]
        total, stats, *_ = torch.ops.rlhf_fast.linear_policy_loss(
            *head, labels, *constants, constant(ref_logp), normalizer, *options, loss, divisor,
            per_token, softcap, *how, needs,
        )  # fmt: skip
    else:
        logp, entropy, _ = torch.ops.rlhf_fast.linear_token_logprobs(
            *head, labels.masked_fill(~counts, check.IGNORE_INDEX).view(-1), divisor,
            None if per_token is None else per_token.view(-1), softcap, True, *how,
            linear.needs_gradient(head),
        )  # fmt: skip
        entropy = entropy if entropy_coef else entropy.detach()  # no gradient of zeros
        total, stats, *_ = torch.ops.rlhf_fast.policy_loss(
            logp.view_as(counts), *constants, entropy.view_as(counts), constant(ref_logp),
            normalizer, *options, ratio, loss,
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
    ratio: str = "token",
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    lora: linear.Lora | None = None,
    group: None = None,
    compact: bool = True,
    deterministic: bool = False,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    """The formula in plain PyTorch; holds all the logits."""
    mask = mask & (labels != check.IGNORE_INDEX)
    logits, temperature = linear.plain(hidden, weight, bias, lora, temperature, mask)
    logp, entropy = from_logits.reference(
        logits, labels, temperature=temperature, softcap=softcap, entropy=True
    )
    shared = {"entropy": entropy, "entropy_coef": entropy_coef, "kl_coef": kl_coef}
    shared |= {"weights": weights, "ratio": ratio, **options}
    loss, stats = policy_loss.reference(
        logp, old_logp, advantages, mask, aggregation=aggregation, normalizer=normalizer, **shared
    )
    matters = mask
    if ratio == "token":
        matters = mask & _matters(advantages, weights, entropy_coef, kl_coef)
    stayed = policy_loss.reference(logp, old_logp, advantages, matters, **shared)[1]
    return loss, stayed._replace(surrogate=stats.surrogate)


def _matters(
    advantages: Tensor, weights: Tensor | None, entropy_coef: float, kl_coef: float
) -> Tensor:
    """Tokens whose loss can have a gradient."""
    if entropy_coef or kl_coef:
        return torch.ones_like(advantages, dtype=torch.bool)
    return advantages != 0 if weights is None else (advantages != 0) & (weights != 0)


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
    weights: Tensor | None,
    ref_logp: Tensor | None,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    aggregation: str,
    loss: str,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    compact: bool,
    deterministic: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """(loss, stats [14], the gradients of linear.Needs, empty where not needed)."""
    vocabulary, labels = vocab_parallel.part_of(weight, labels, group)
    matters = mask & _matters(advantages, weights, entropy_coef, kl_coef)
    coefficient = aggregate.coefficients(mask, aggregation, normalizer, old_logp.dtype)
    coefficient = coefficient.unsqueeze(-1).expand_as(mask).reshape(-1)
    logp, entropy = torch.zeros_like(old_logp), torch.zeros_like(old_logp)
    options = (clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    head = linear.Head(hidden, weight, bias, down, up)
    grads = linear.Gradients(head, linear.Needs(*needs), vocabulary, _saved_dtype(hidden))
    keep = matters.view(-1)
    labels = labels.masked_fill(~matters, check.IGNORE_INDEX)
    how = {"compact": compact, "deterministic": deterministic, "part": vocabulary}
    for chunk in linear.chunks(head, keep, **how):
        logits = chunk.logits[None]

        def part(full: Tensor | None, rows: Tensor | slice = chunk.rows) -> Tensor | None:
            return None if full is None else linear.take(full.view(-1), rows)[None]

        targets, divisors = part(labels), part(per_token)
        logp_, entropy_, norm = vocab_parallel.token_logprobs(
            logits, targets, temperature, divisors, softcap, True, vocabulary
        )
        logp.view(-1)[chunk.rows], entropy.view(-1)[chunk.rows] = logp_[0], entropy_[0]
        if not any(needs):
            continue
        _, _, d_logp, d_entropy = torch.ops.rlhf_fast.policy_loss(
            logp_, part(old_logp), part(advantages), part(matters), part(weights), entropy_,
            part(ref_logp), None, *options, "token-sum", "token", loss,
        )  # fmt: skip
        scale = part(coefficient)
        d_logp, d_entropy = grads.fit(
            aggregate.times(scale, d_logp),
            d_entropy * scale if entropy_coef else None,
            temperature=temperature if divisors is None else divisors,
        )
        torch.ops.rlhf_fast.token_logprobs_backward(
            d_logp, d_entropy, logits, targets, norm,
            entropy_ if entropy_coef else None, temperature, divisors, softcap,
            grads.dlogits(chunk)[None],
        )  # fmt: skip
        grads.add(chunk)

    def whole(mask: Tensor, aggregation: str, normalizer: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.rlhf_fast.policy_loss(
            logp, old_logp, advantages, mask, weights, entropy, ref_logp, normalizer, *options,
            aggregation, "token", loss,
        )[:2]  # fmt: skip

    total, stats = whole(mask, aggregation, normalizer)
    stats = torch.cat([stats[:1], whole(matters, "token-sum", None)[1][1:]])
    return total, stats, *grads.result()


def _saved_dtype(hidden: Tensor) -> torch.dtype:
    """Of the gradients between forward and backward: they come before a GradScaler's loss scale,
    without which float16 cannot hold them."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _fake(hidden, weight, bias, down, up, labels, old_logp, *rest):
    grads = [
        torch.empty_like(x, dtype=_saved_dtype(hidden)) if needed else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias, down, up), rest[-1], strict=True)
    ]
    return old_logp.new_empty(()), old_logp.new_empty(len(PolicyStats._fields)), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, *grads = output
    ctx.set_materialize_grads(False)  # or autograd fills zeros [V, H] for the gradient of dW
    ctx.mark_non_differentiable(stats, *grads)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*grads)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> Any:
    if grad is None:
        return (None,) * 27
    # loss.backward() comes with exactly 1: then dW needs no second copy, unless the next backward
    # needs this one. Looking costs a host sync on a GPU, and cannot be traced or batched.
    looked_at = grad.device.type == "cpu" and detect_fake_mode([grad]) is None
    looked_at = looked_at and not torch._C._functorch.is_functorch_wrapped_tensor(grad)
    one = looked_at and not graph_is_kept() and grad.item() == 1
    scaled = [
        (g if one else g * grad).to(ctx.dtype) if needed else None
        for g, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:5], strict=True)
    ]
    return *scaled, *(None,) * 22


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(b: int, t: int, h: int, v: int, **options: Any) -> dict[str, Any]:
        hidden = torch.randn(b, t, h, generator=generator)
        weight = torch.randn(v, h, generator=generator) / h**0.5 * 2
        labels = torch.randint(v, (b, t), generator=generator)
        logp = from_logits.reference(hidden @ weight.t(), labels)
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
            "weights": torch.rand(b, t, generator=generator) + 0.5,
            "ref_logp": x["old_logp"] + 0.3 * torch.randn(b, t, generator=generator),
            "bias": torch.randn(v, generator=generator),
            "temperature": 0.5 + torch.rand(b, t, generator=generator),
            "entropy_coef": 0.01,
            "kl_coef": 0.1,
        }

    def adapter(h: int, v: int) -> linear.Lora:
        draw = torch.randn
        return draw(3, h, generator=generator), draw(v, 3, generator=generator), 0.5

    two, three = ("hidden", "weight"), ("hidden", "weight", "bias")
    for mode in aggregate.AGGREGATIONS:
        yield Sample(mode, draw(3, 7, 4, 11, aggregation=mode), two)
        full = everything(4, 9, 8, 33, aggregation=mode, normalizer=17.0)
        yield Sample(f"{mode}, everything", full, three)
    clips = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "softcap": 3.0}
    yield Sample("asymmetric, dual clip, softcap", draw(3, 12, 8, 33, **clips), two)
    for estimator in token_kl.ESTIMATORS:
        yield Sample(estimator, everything(2, 6, 4, 9, kl_estimator=estimator), three)
    for loss in policy_loss.LOSSES:
        still = draw(3, 8, 4, 9, loss=loss)
        still["advantages"][:, ::2] = 0.0
        yield Sample(f"zero advantages, {loss}", still, two)
        yield Sample(f"{loss}, everything", everything(3, 8, 4, 9, loss=loss), three)
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
    inputs = ("hidden", "old_logp", "advantages", "weights", "ref_logp", "temperature")
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
    f"linear_policy_loss({linear.HEAD}, Tensor labels, "
    "Tensor old_logp, Tensor advantages, Tensor mask, Tensor? weights, Tensor? ref_logp, "
    "Tensor? normalizer, float clip_low, float clip_high, float? dual_clip, float entropy_coef, "
    "float kl_coef, str kl_estimator, str aggregation, str loss, float temperature, "
    "Tensor? per_token, float? softcap, bool compact, bool deterministic, str? group, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
