"""linear_token_kl: the exact KL of policy and reference at each token, from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import check
from .. import support as sets
from .. import token_logprobs as from_logits
from ..registry import Op, Sample, define_kernel, register, save_for_backward, zeros_unless_given
from . import chunks as linear
from . import gradients, vocab_parallel
from . import support as few
from .head import HEAD, Head, Lora, check_head, plain, product_dtype, wanted

DIRECTIONS = ("reverse", "forward")


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None = None,
    *,
    direction: str = "reverse",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    lora: Lora | None = None,
    ref_lora: Lora | None = None,
    group: ProcessGroup | None = None,
    compact: bool = True,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the labels under policy and reference, and the exact KL between the two.

    With z = softcap·tanh(x / softcap) / temperature (no tanh when softcap is None) of the policy's
    logits x = hidden @ weight.T + bias, y the same of the reference's, p and q their softmax:

        logp = log p[label]        reverse: kl = KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)
        ref_logp = log q[label]    forward: kl = KL(q ‖ p) = Σ_v q_v (log q_v − log p_v)

        dkl/dz_v = p_v ((log p_v − log q_v) − kl)  reverse,    p_v − q_v  forward

    The KL itself, a sum over the whole vocabulary, where k1, k2 and k3 of ``token_kl`` estimate it
    from the sampled token (Schulman, "Approximating KL divergence", 2020): it has no variance from
    sampling, and its gradient is the true one, which k1 as a loss does not have. The reverse
    direction is PPO's penalty, the forward one that of distillation. The reference is constant.
    The logits of both exist only one chunk at a time; the two chunks share
    ``rlhf_fast.chunk_budget``.

    p = 0 (a logit of −inf) contributes 0 to KL(p ‖ q), whatever q is; q = 0 where p > 0 makes it
    +inf. In float32 a p below e^−87 is 0. An infinite reverse KL has no gradient: its row gets NaN
    where a gradient comes in through kl, but not where one comes in through logp alone or that
    through kl is exactly 0.

    FLOPs: 4NHV forward; 8·N'HV backward, N' the rows with gradient (6·N'HV for a frozen weight).
    Where kl has no gradient the backward does not need the reference: 6·N'HV. The last chunk of
    both stays in memory as in ``linear_token_logprobs``: 8NHV in all where one chunk holds
    everything.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], the policy's head, dtype and device of ``hidden`` (under autocast all are
            cast to its dtype).
        labels: [...], int64; −100 marks a row to ignore: logp, ref_logp, kl and gradient 0. Its
            other inputs are not looked at and may hold anything, NaN too.
        ref_hidden: [..., H_ref], the reference's hidden states for the same rows, in the dtype of
            ``hidden``.
        ref_weight: [V, H_ref], the reference's head; None: it is ``weight``, with ``bias`` and
            without ``lora``.
        direction: "reverse", KL(p ‖ q), or "forward", KL(q ‖ p).
        bias, ref_bias: [V] or None.
        temperature: above 0, the divisor of both logits; a float, or a tensor [...] of one per
            token.
        softcap: above 0, the bound on both logits; None for none.
        support: [..., K], the tokens that sampling left, as in ``linear_token_logprobs``: p and q
            are then both softmax over the same set, and the KL is between those two.
        lora: (A [r, H], B [V, r], scale): an adapter on the policy's head that has not been
            merged, as in ``linear_token_logprobs``.
        ref_lora: (A [r, H_ref], B [V, r], scale): the same on the reference's head, of a rank of
            its own; constants. None: it has none.
        group: as in ``linear_token_logprobs``; each rank holds its rows of ``ref_weight``,
            ``ref_bias`` and ref_lora's B, too.
        compact, deterministic: as in ``linear_token_logprobs``.

    Returns:
        (logp, ref_logp, kl), [...] each, in nats; float32 (float64 for float64 inputs). logp and
        kl carry gradients to ``hidden``, ``weight``, ``bias`` and lora's A and B.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype or device; an unknown
            direction; a label outside [0, V), or a set that does not hold it (on CUDA checked only
            under ``rlhf_fast.debug()``).
    """
    check.choice("direction", direction, DIRECTIONS)
    head = check_head(hidden, weight, bias, lora)
    ref = _check_reference(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ref_lora)
    check.labels(labels, "hidden", hidden, weight.shape[0] if group is None else None)
    dtype = check.accumulator(hidden)
    divisor, per_token = from_logits._temperature(temperature, labels, dtype)
    from_logits._softcap(softcap, dtype)
    check.flag("compact", compact)
    check.flag("deterministic", deterministic)
    ref = ref.constant()
    own: tuple[Tensor | None, ...] = ref
    if ref_weight is None:
        own = ref.hidden, None, None, ref.down, ref.up
    ids, ranks = sets.checked(support, labels), vocab_parallel.name(group)
    reverse = direction == "reverse"
    per_token = None if per_token is None else per_token.reshape(-1)

    def whole_heads(labels: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.rlhf_fast.linear_token_kl(
            *head, *own, labels, divisor, per_token, softcap, ids, reverse, compact, deterministic,
            ranks, any(wanted(head)),
        )[:3]  # fmt: skip
        return found

    flat = labels.reshape(-1)
    if ids is None:
        found = whole_heads(flat)
    else:
        rows = few.rows(head, flat, ids, softcap, ranks)
        z, y = (as_in_a_chunk(rows.logits(x))[None] for x in (head, ref))
        of_rows = torch.ops.rlhf_fast.logits_kl(
            z, y, rows.at[None], divisor,
            None if per_token is None else per_token[None].contiguous(), None, reverse,
        )  # fmt: skip
        found = tuple(x.view(-1) for x in of_rows[:3])
        if rows.others is not None:
            others = whole_heads(rows.others)
            found = tuple(x + y for x, y in zip(found, others, strict=True))
    logp, ref_logp, kl = (x.reshape(labels.shape) for x in found)
    return logp, ref_logp, kl


def as_in_a_chunk(logits: Tensor) -> Tensor:
    """[n, K] with its rows side by side on a CPU, where the row kernel then takes them all at once:
    512 rows of 50 tokens forward in 18 ms, one after the other in 27 (AMD EPYC, AVX2)."""
    return logits.t().contiguous().t() if logits.device.type == "cpu" else logits


def _check_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_lora: Lora | None,
) -> Head:
    check.floating("ref_hidden", ref_hidden)
    check.at_least_1d("ref_hidden", ref_hidden)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            "ref_hidden must have the leading shape of hidden, "
            f"{list(hidden.shape[:-1])}; got {check.describe(ref_hidden)}"
        )
    check.same_device("ref_hidden", ref_hidden, "hidden", hidden)
    if product_dtype(ref_hidden) != product_dtype(hidden):
        raise TypeError(
            f"ref_hidden must have the dtype of hidden, {hidden.dtype}; "
            f"got {check.describe(ref_hidden)}"
        )
    if ref_weight is not None:
        ref = check_head(ref_hidden, ref_weight, ref_bias, ref_lora, "ref_")
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"ref_weight must be of weight's vocabulary, {weight.shape[0]}; "
                f"got {check.describe(ref_weight)}"
            )
        return ref
    if ref_bias is not None:
        raise ValueError("ref_bias needs ref_weight: without it the reference has weight and bias")
    if ref_hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"ref_hidden must be [..., {weight.shape[1]}] as weight is where ref_weight is None, "
            f"got {check.describe(ref_hidden)}"
        )
    return check_head(ref_hidden, weight, bias, ref_lora, "ref_")


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None = None,
    *,
    direction: str = "reverse",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    lora: Lora | None = None,
    ref_lora: Lora | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain PyTorch; holds all the logits of both."""
    kept = labels != check.IGNORE_INDEX

    def log_softmax(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
    ) -> Tensor:
        logits, divisor = plain(hidden, weight, bias, lora, temperature, kept)
        x = logits.to(check.accumulator(logits))
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        divisor = divisor.unsqueeze(-1) if isinstance(divisor, Tensor) else divisor
        z = z / divisor
        return torch.log_softmax(z if support is None else sets.left(z, support, labels), dim=-1)

    def at_label(x: Tensor) -> Tensor:
        chosen = x.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return chosen.masked_fill(~kept, 0.0)

    log_p = log_softmax(hidden, weight, bias, lora)
    with torch.no_grad():
        tied = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
        log_q = log_softmax(ref_hidden, *tied, ref_lora)
    a, b = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    gap = (a - b).masked_fill(a.exp() == 0, 0.0)
    kl = (a.exp() * gap).sum(-1).masked_fill(~kept, 0.0)
    return at_label(log_p), at_label(log_q), kl


# The row kernels: logits of both in, no parameters in sight.


def _rows_forward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, ref_logp, kl [1, n], norm, ref_norm [2, 1, n]) of logits, ref_logits [1, n, V];
    norm as in token_logprobs: (max, log Σ e^(z − max))."""
    check.temperature_range(per_token, labels, check.accumulator(logits))
    ignored = labels == check.IGNORE_INDEX

    def one(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, _ = from_logits._scaled(x, temperature, per_token, softcap)
        largest = z.amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
        z = z - largest
        log_sum = z.exp().sum(-1, keepdim=True).log()
        log_p = z - log_sum
        logp = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        norm = torch.stack([largest.squeeze(-1), log_sum.squeeze(-1)])
        return log_p, logp.masked_fill(ignored, 0.0), norm.masked_fill(ignored, 0.0)

    log_p, logp, norm = one(logits)
    log_q, ref_logp, ref_norm = one(ref_logits)
    a, b = (log_p, log_q) if reverse else (log_q, log_p)
    gap = (a - b).masked_fill_(a.exp() == 0, 0.0)
    kl = (a.exp() * gap).sum(-1).masked_fill(ignored, 0.0)
    return logp, ref_logp, kl, norm, ref_norm


def _rows_backward(
    grad_logp: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    ref_norm: Tensor,
    kl: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    reverse: bool,
    out: Tensor,
) -> None:
    """out <- dz/dlogits · (g_logp (1[v = label] − p) + g_kl · dkl/dz)."""
    z, dz = from_logits._scaled(logits, temperature, per_token, softcap)
    y, _ = from_logits._scaled(ref_logits, temperature, per_token, softcap)
    log_p = z - norm[0].unsqueeze(-1) - norm[1].unsqueeze(-1)
    log_q = y - ref_norm[0].unsqueeze(-1) - ref_norm[1].unsqueeze(-1)
    p = log_p.exp()
    if reverse:
        nothing = (p == 0) | (grad_kl == 0).unsqueeze(-1)
        d_kl = p * ((log_p - log_q) - kl.unsqueeze(-1)).masked_fill_(nothing, 0.0)
    else:
        d_kl = p - log_q.exp()
    g = grad_kl.unsqueeze(-1) * d_kl - grad_logp.unsqueeze(-1) * p
    from_logits.add_at_label(g, labels, grad_logp)
    dead = (labels == check.IGNORE_INDEX) | ((grad_logp == 0) & (grad_kl == 0))
    out.copy_(g.mul_(dz).masked_fill_(dead.unsqueeze(-1), 0.0))


def _rows_fake(
    logits: Tensor, ref_logits: Tensor | None, labels: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    new = logits.new_empty(labels.shape, dtype=check.accumulator(logits))
    norm = new.new_empty((2, *labels.shape))
    return new, torch.empty_like(new), torch.empty_like(new), norm, torch.empty_like(norm)


def _rows_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, labels, ctx.temperature, per_token, ctx.softcap, ctx.reverse = inputs
    _, ref_logp, kl, norm, ref_norm = output
    ctx.mark_non_differentiable(ref_logp, norm, ref_norm)
    save_for_backward(ctx, logits, ref_logits, labels, per_token, norm, ref_norm, kl)


def _rows_autograd(
    ctx: Any, grad_logp: Tensor | None, _: None, grad_kl: Tensor | None, *__: None
) -> tuple[Tensor | None, ...]:
    """For the rows with a small set; the engine calls both kernels itself."""
    nothing = (None,) * 6
    given = grad_logp, grad_kl
    grads = (zeros_unless_given(*pair).contiguous() for pair in (given, given[::-1]))
    logits, ref_logits, labels, per_token, norm, ref_norm, kl = ctx.saved_tensors
    out = torch.empty_like(logits)
    torch.ops.rlhf_fast.logits_kl_backward(
        *grads, logits, ref_logits, labels, norm, ref_norm, kl, ctx.temperature, per_token,
        ctx.softcap, ctx.reverse, out,
    )  # fmt: skip
    return out, *nothing


# The engine.


def _chunks(
    heads: tuple[Head, Head],
    keep: Tensor,
    how: dict[str, Any],
    leave_for: Tensor | None = None,
    memories: tuple[linear.Memory | None, ...] = (None, None),
) -> Iterator[tuple[linear.Chunk, Tensor]]:
    """(the policy's chunk, the reference's logits [n, V]) of the same rows."""
    if None in memories:  # or one would begin with the rows that it still has, the other not
        memories = (None, None)
    plan = linear.planned(keep, how["compact"], memories[0])
    loops = (
        linear.chunks(
            head, keep, **how, buffers=2, slot=slot, leave_for=leave_for, memory=memories[slot],
            plan=plan,
        )
        for slot, head in enumerate(heads)
    )  # fmt: skip
    for chunk, ref_chunk in zip(*loops, strict=True):
        yield chunk, ref_chunk.logits


def _heads(tensors: Sequence[Any]) -> tuple[Head, Head]:
    """The policy's head and the reference's; a reference without a weight has the policy's."""
    head, ref = Head(*tensors[:5]), Head(*tensors[5:])
    return head, ref._replace(weight=head.weight, bias=head.bias) if ref.weight is None else ref


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_down: Tensor | None,
    ref_up: Tensor | None,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    support: Tensor | None,
    reverse: bool,
    compact: bool,
    deterministic: bool,
    group: str | None,
    backward_follows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, ref_logp, kl [N], norm, ref_norm [2, N]); 0 in the rows that are ignored."""
    heads = _heads(
        (hidden, weight, bias, down, up, ref_hidden, ref_weight, ref_bias, ref_down, ref_up)
    )
    vocabulary, labels = vocab_parallel.part_of(weight, labels, group)
    logp = hidden.new_zeros(labels.shape, dtype=check.accumulator(hidden))
    norm = logp.new_zeros((2, *labels.shape))
    outputs = logp, torch.zeros_like(logp), torch.zeros_like(logp), norm, torch.zeros_like(norm)
    how: dict[str, Any] = {"compact": compact, "deterministic": deterministic, "part": vocabulary}
    how["support"] = few.of_part(support, vocabulary)
    leave_for = norm if backward_follows else None
    for chunk, ref_logits in _chunks(heads, labels != check.IGNORE_INDEX, how, leave_for):
        of_rows = vocab_parallel.logits_kl(
            chunk.logits[None],
            ref_logits[None],
            linear.take(labels, chunk.rows)[None],
            temperature,
            None if per_token is None else linear.take(per_token, chunk.rows)[None],
            softcap,
            reverse,
            vocabulary,
        )
        for whole, part in zip(outputs, of_rows, strict=True):
            whole[..., chunk.rows] = part.squeeze(-2)
    return outputs


def _backward(
    grad_logp: Tensor,
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_down: Tensor | None,
    ref_up: Tensor | None,
    labels: Tensor,
    norm: Tensor,
    ref_norm: Tensor,
    kl: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    support: Tensor | None,
    reverse: bool,
    compact: bool,
    deterministic: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients in the order of linear.Needs, empty where not needed."""
    heads = _heads(
        (hidden, weight, bias, down, up, ref_hidden, ref_weight, ref_bias, ref_down, ref_up)
    )
    vocabulary, labels = vocab_parallel.part_of(weight, labels, group)
    matters = ((grad_logp != 0) | (grad_kl != 0)) & (labels != check.IGNORE_INDEX)
    grads = gradients.Gradients(heads[0], gradients.Needs(*needs), vocabulary)
    how: dict[str, Any] = {"compact": compact, "deterministic": deterministic, "part": vocabulary}
    how |= {"support": few.of_part(support, vocabulary), "parts": grads.parts}
    both = _chunks(
        heads, matters, how, memories=tuple(linear.left_by(norm, hidden, slot) for slot in (0, 1))
    )
    for chunk, ref_logits in both:

        def part(x: Tensor | None, rows: Tensor | slice = chunk.rows) -> Tensor | None:
            return None if x is None else linear.take(x, rows)[None]

        divisors = part(per_token)
        g_logp, g_kl = grads.fit(
            part(grad_logp),
            part(grad_kl),
            temperature=temperature if divisors is None else divisors,
        )
        p, q = (x[:, chunk.rows][:, None].contiguous() for x in (norm, ref_norm))
        of_rows = g_logp, g_kl, p, q, linear.take(kl, chunk.rows)[None], divisors
        grads.add(
            chunk,
            linear.take(labels, chunk.rows)[None],
            partial(_write, chunk.logits, ref_logits, *of_rows, temperature, softcap, reverse),
        )
        del chunk, ref_logits  # free when the products of a group of all rows are made
    return grads.result()


def _write(
    logits: Tensor,
    ref_logits: Tensor,
    g_logp: Tensor | None,
    g_kl: Tensor | None,
    norm: Tensor,
    ref_norm: Tensor,
    kl: Tensor,
    divisors: Tensor | None,
    temperature: float,
    softcap: float | None,
    reverse: bool,
    columns: Callable[[Tensor], Tensor],
    labels: Tensor,
    out: Tensor,
) -> None:
    torch.ops.rlhf_fast.logits_kl_backward(
        g_logp, g_kl, columns(logits), columns(ref_logits), labels, norm, ref_norm, kl,
        temperature, divisors, softcap, reverse, out,
    )  # fmt: skip


def _forward_fake(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _rows_fake(hidden, None, arguments[9])


def _backward_fake(grad_logp: Tensor, grad_kl: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x) if needed else arguments[0].new_empty(0)
        for x, needed in zip(arguments[:5], arguments[-1], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rest, ctx.reverse, ctx.compact, ctx.same, ctx.group, _ = inputs
    *heads, labels, ctx.temperature, per_token, ctx.softcap, support = rest
    _, ref_logp, kl, norm, ref_norm = output
    ctx.mark_non_differentiable(ref_logp, norm, ref_norm)
    ctx.budget = linear.budget()
    labels = labels.clone()  # theirs may change, and autograd does not see numpy do it
    save_for_backward(ctx, *heads, labels, per_token, support, norm, ref_norm, kl)


def _autograd(
    ctx: Any, grad_logp: Tensor | None, _: None, grad_kl: Tensor | None, *__: None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 15
    *heads, labels, per_token, support, norm, ref_norm, kl = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    scale = ctx.temperature, per_token, ctx.softcap, support
    how = ctx.compact, ctx.same, ctx.group
    with linear.within(ctx.budget):
        if grad_kl is None:  # the reference has no part in it
            grads = torch.ops.rlhf_fast.linear_token_logprobs_backward(
                grad_logp, None, *heads[:5], labels, norm, None, *scale, *how, needs
            )
        else:
            grad_logp = zeros_unless_given(grad_logp, grad_kl)
            grads = torch.ops.rlhf_fast.linear_token_kl_backward(
                grad_logp, grad_kl, *heads, labels, norm, ref_norm, kl, *scale, ctx.reverse, *how,
                needs,
            )  # fmt: skip
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *nothing


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def sample(name: str, n: int, h: int, v: int, ref_h: int = 0, **options: Any) -> Sample:
        """ref_h: the width of the reference's own head; 0: it is the policy's. Those samples are
        not small: gradcheck takes the small ones, and would move the reference with the weight."""
        labels = torch.randint(v, (n,), generator=generator)
        labels[1::3] = check.IGNORE_INDEX
        hidden, weight = draw(n, h), draw(v, h) / h**0.5 * 3
        ref = {"ref_hidden": hidden + 0.5 * draw(n, h)}
        if ref_h:
            ref = {"ref_hidden": draw(n, ref_h), "ref_weight": draw(v, ref_h) / ref_h**0.5 * 3}
        grads = ("hidden", "weight", *(x for x in ("bias", "lora") if x in options))
        arguments = {"hidden": hidden, "weight": weight, "labels": labels, **ref, **options}
        return Sample(name, arguments, grads)

    yield sample("tied", 19, 8, 131)
    yield sample("own head", 19, 8, 131, ref_h=5)
    yield sample("forward, own head", 5, 4, 33, ref_h=3, direction="forward")
    yield sample("reverse, own head", 5, 4, 33, ref_h=3, bias=draw(33), ref_bias=draw(33))
    yield sample("forward, tied", 19, 8, 131, bias=draw(131), direction="forward")
    yield sample("one row", 1, 8, 17, ref_h=5)
    yield sample("no rows", 0, 8, 17)
    yield sample("vocab 1", 5, 4, 1, ref_h=3)
    yield sample("vocab 5000", 3, 4, 5000, ref_h=3)
    yield sample("temperature", 21, 8, 65, temperature=0.7, ref_h=8)
    scale = {"temperature": 0.5 + torch.rand(20, generator=generator), "softcap": 2.0}
    for direction in DIRECTIONS:
        biases = {"bias": draw(33), "ref_bias": draw(33)}
        yield sample(f"all, {direction}", 20, 5, 33, 3, **biases, **scale, direction=direction)
    yield sample("not compact", 21, 16, 65, bias=draw(65), compact=False)
    yield sample("deterministic", 21, 16, 65, bias=draw(65), deterministic=True)

    def adapter(h: int, v: int, rank: int = 3) -> Lora:
        return draw(rank, h) / h**0.5, draw(v, rank) / rank**0.5, 0.5

    yield sample("adapter, tied", 21, 8, 33, lora=adapter(8, 33), bias=draw(33))
    both = {"lora": adapter(4, 33), "ref_lora": adapter(3, 33, 2)}
    for direction in DIRECTIONS:
        yield sample(f"adapters, {direction}", 5, 4, 33, 3, **both, direction=direction)
    both = {"lora": adapter(16, 65), "ref_lora": adapter(8, 65)}
    for how in ({"compact": True}, {"compact": False}, {"deterministic": True}):
        per_token = 0.5 + torch.rand(21, generator=generator)
        garbage = sample(f"NaN where ignored, {how}", 21, 16, 65, 8, **both, **how,
                         temperature=per_token)  # fmt: skip
        for name in ("hidden", "ref_hidden", "temperature"):
            garbage.arguments[name][1::3] = torch.nan
        yield garbage
    for most in (4, 40):  # made token by token; a chunk's row
        for direction in DIRECTIONS:
            garbage = sample(f"support of {most}, {direction}", 21, 16, 65, 8, **both,
                             temperature=per_token.clone(), direction=direction)  # fmt: skip
            x = garbage.arguments
            x["support"] = sets.drawn(x["labels"], 65, most, generator)
            for name in ("hidden", "ref_hidden", "temperature"):
                x[name][1::3] = torch.nan
            yield garbage
    tied = sample("support, tied, softcap", 21, 16, 65, softcap=2.0)
    tied.arguments["support"] = sets.drawn(tied.arguments["labels"], 65, 9, generator)
    yield tied
    for direction in DIRECTIONS:  # a padded vocabulary
        padding = torch.arange(65) >= 60
        bias, ref_bias = (draw(65).masked_fill(padding, -torch.inf) for _ in range(2))
        last = sample(f"-inf bias, {direction}", 21, 16, 65, 8, bias=bias, ref_bias=ref_bias,
                      direction=direction)  # fmt: skip
        last.arguments["labels"] = torch.arange(21) % 60
        yield Sample(last.name, last.arguments, ("hidden", "weight"))


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    n, h, v = shape["N"], shape["H"], shape["V"]

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    arguments = {
        "hidden": draw(n, h).to(dtype),
        "weight": (draw(v, h) / h**0.5).to(dtype),
        "labels": torch.randint(v, (n,), generator=generator, device=device),
        "ref_hidden": draw(n, h).to(dtype),
        "ref_weight": (draw(v, h) / h**0.5).to(dtype),
    }
    return Sample("bench", arguments, ("hidden", "weight"))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    head = (shape["N"] + shape["V"]) * shape["H"] * element_size
    return 2 * head, 3 * head


def flops(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    gemm = 2 * shape["N"] * shape["H"] * shape["V"]
    return 2 * gemm, 2 * gemm  # no logits made again: as where one chunk holds everything


ROWS_FORWARD = define_kernel(
    "logits_kl(Tensor logits, Tensor ref_logits, Tensor labels, float temperature, "
    "Tensor? per_token, float? softcap, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_rows_forward,
    fake=_rows_fake,
    triton="logits_kl:logits_kl",
    backward=_rows_autograd,
    setup_context=_rows_setup_context,
)
ROWS_BACKWARD = define_kernel(
    "logits_kl_backward(Tensor grad_logp, Tensor grad_kl, Tensor logits, Tensor ref_logits, "
    "Tensor labels, Tensor norm, Tensor ref_norm, Tensor kl, float temperature, "
    "Tensor? per_token, float? softcap, bool reverse, Tensor(a!) out) -> ()",
    fallback=_rows_backward,
    fake=lambda *_: None,
    triton="logits_kl:logits_kl_backward",
)
HEADS = (
    f"{HEAD}, Tensor ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor? ref_down, "
    "Tensor? ref_up, Tensor labels, "
)
FORWARD = define_kernel(
    f"linear_token_kl({HEADS}float temperature, Tensor? per_token, float? softcap, "
    "Tensor? support, bool reverse, bool compact, bool deterministic, str? group, "
    "bool backward_follows) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_forward_fake,
    engine=True,
    backward=_autograd,
    setup_context=_setup_context,
)
BACKWARD = define_kernel(
    f"linear_token_kl_backward(Tensor grad_logp, Tensor grad_kl, {HEADS}Tensor norm, "
    "Tensor ref_norm, Tensor kl, float temperature, Tensor? per_token, float? softcap, "
    "Tensor? support, bool reverse, bool compact, bool deterministic, str? group, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_backward,
    fake=_backward_fake,
    engine=True,
)
register(
    Op(
        "linear_token_kl",
        linear_token_kl,
        reference,
        (FORWARD, BACKWARD, ROWS_FORWARD, ROWS_BACKWARD),
        samples,
        workload,
        ({"N": 512, "H": 576, "V": 49152}, {"N": 4096, "H": 576, "V": 49152}),
        bytes_moved,
        flops,
    )
)
