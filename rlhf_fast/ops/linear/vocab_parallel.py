"""linear_token_logprobs over a process group whose ranks each hold a part of the vocabulary.

Each rank runs the engine on its part, with logits of its own only; three all-reduces make the row
statistics those of the whole vocabulary, and the backward sums the gradient of the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import check
from .. import token_logprobs as from_logits
from ..linear import chunks as linear
from ..linear import logprobs as engine
from ..registry import first_derivative_only, gradient_wanted


def linear_token_logprobs(
    head: linear.Head,
    labels: Tensor,
    options: tuple[Any, ...],
    group: dist.ProcessGroup,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """(logp [N], entropy [N] or empty) over the whole vocabulary, the same on every rank."""
    first, vocab = part_of_vocabulary(head.weight, group)
    check.labels(labels, "hidden", hidden, vocab)
    gradient_wanted("linear_token_logprobs", head)
    return _VocabParallel.apply(*head, labels.reshape(-1), first, options, group)


def part_of_vocabulary(weight: Tensor, group: dist.ProcessGroup) -> tuple[int, int]:
    """(index of this rank's first token, size of the vocabulary): the parts lie in rank order."""
    size = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    counts = [int(n) for n in sizes]
    if 0 in counts:
        raise ValueError(f"weight must have rows on every rank of group, got {counts} rows")
    return sum(counts[: dist.get_rank(group)]), sum(counts)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low, up, labels, first, options, group):
        vocab = weight.shape[0]
        ignored = labels == check.IGNORE_INDEX
        elsewhere = ((labels < first) | (labels >= first + vocab)) & ~ignored
        # the kernels take some label of this part for those rows; it is undone below
        local = (labels - first).masked_fill(elsewhere, 0).masked_fill(ignored, check.IGNORE_INDEX)
        logp, entropy, norm = engine._forward(hidden, weight, bias, low, up, local, *options)
        whole_logp, whole_entropy, whole_norm = combined(logp, entropy, norm, elsewhere, group)
        for x in (whole_logp, whole_entropy, *whole_norm):
            x.masked_fill_(ignored, 0.0) if x.numel() else x
        norm.copy_(whole_norm)  # in place: the engine knows by it the chunk that it has left
        ctx.set_materialize_grads(False)
        ctx.options, ctx.group, ctx.budget = options, group, linear.budget()
        ctx.save_for_backward(hidden, weight, bias, low, up, local, elsewhere, norm, whole_entropy)
        if not options[3]:
            ctx.mark_non_differentiable(whole_entropy)
        return whole_logp, whole_entropy

    @staticmethod
    @first_derivative_only("linear_token_logprobs")
    def backward(ctx, grad_logp, grad_entropy):
        *head, local, elsewhere, norm, entropy = ctx.saved_tensors
        temperature, per_token, softcap, _, compact, deterministic, _ = ctx.options
        if grad_logp is None and grad_entropy is None:
            return (None,) * 9
        if grad_logp is None:
            grad_logp = torch.zeros_like(grad_entropy)
        needs = list(ctx.needs_input_grad[:5])
        with linear.within(ctx.budget):
            grads = engine._backward(
                grad_logp, grad_entropy, *head, local, norm, entropy, temperature, per_token,
                softcap, compact, deterministic, needs, elsewhere,
            )  # fmt: skip
        grads = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
        for i in (0, 3):  # hidden and low are the same on all ranks: each holds a part of the sum
            if grads[i] is not None:
                whole = grads[i].to(check.accumulator(grads[i]))
                dist.all_reduce(whole, group=ctx.group)
                grads[i] = whole.to(grads[i].dtype)
        return *grads, None, None, None, None


def combined(
    logp: Tensor, entropy: Tensor, norm: Tensor, elsewhere: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts' row statistics -> (logp, entropy, norm) of the whole vocabulary.

    With e = Σ_part e^(z − m), m the whole maximum, a part holds the share e / Σe of the
    probability, and H = Σ_parts share · (H_part − log share).
    """
    largest, log_sum = norm
    whole = largest.clone()
    dist.all_reduce(whole, dist.ReduceOp.MAX, group=group)
    log_e = (largest - whole) + log_sum  # -inf where all the part's logits are
    e = log_e.exp()
    finite = log_e.masked_fill(e == 0, 0.0)
    at_label = (logp + log_e).masked_fill(elsewhere, 0.0)  # z[label] − m
    columns = [e, at_label] if not entropy.numel() else [e, at_label, e * (entropy - finite)]
    sums = torch.stack(columns)
    dist.all_reduce(sums, group=group)
    log_total = sums[0].log()
    whole_entropy = sums[2] / sums[0] + log_total if entropy.numel() else entropy
    return sums[1] - log_total, whole_entropy, torch.stack([whole, log_total])


def gradient(arguments: tuple[Any, ...], elsewhere: Tensor, out: Tensor) -> None:
    """token_logprobs_backward into out; rows `elsewhere` have no label here.

    Those were given label 0: the gradient of that one logit is computed again without it.
    """
    grad_logp, grad_entropy, logits, _, norm, entropy, temperature, per_token, softcap = arguments
    first = logits[..., :1].clone()  # out may be logits
    torch.ops.rlhf_fast.token_logprobs_backward(*arguments, out)
    exact = from_logits.softmax_gradient(
        grad_logp, grad_entropy, first, norm, entropy, temperature, per_token, softcap
    )
    out[..., :1] = torch.where(elsewhere.unsqueeze(-1), exact.to(out.dtype), out[..., :1])
