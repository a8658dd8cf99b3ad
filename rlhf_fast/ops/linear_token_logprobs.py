"""linear_token_logprobs: token log-probs from hidden states, with no [N, V] tensor, ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import check, linear
from . import token_logprobs as from_logits
from .registry import Op, Sample, define_kernel, register


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(hidden @ weight.T + bias), in chunks of rows.

    The same numbers as ``token_logprobs(hidden @ weight.T + bias, labels, ...)``; the logits exist
    only one chunk at a time (``rlhf_fast.chunk_budget`` sets how large), so memory does not grow
    with N·V. The backward recomputes the logits of the rows whose incoming gradient is not zero,
    and of no others: masked, clipped and zero-advantage tokens cost nothing, whatever the loss.

    FLOPs: 2NHV forward; 6·N'HV backward, N' the rows with gradient (4N'HV for a frozen weight).

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], the language-model head, dtype and device of ``hidden`` (under autocast
            both are cast to its dtype).
        labels: [...], int64; −100 marks a row to ignore: logp 0, entropy 0, gradient 0, and it
            leaves before the first matrix product.
        bias: [V] or None.
        temperature, softcap, entropy: as in ``token_logprobs``.

    Returns:
        logp [...] in nats, or (logp, entropy); float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype or device; a label outside
            [0, V) (on CUDA checked only under ``rlhf_fast.debug()``).
    """
    hidden, weight, bias = linear.check_head(hidden, weight, bias)
    check.labels(labels, "hidden", hidden, weight.shape[0])
    divisor, per_token = from_logits._temperature(temperature, labels, check.accumulator(hidden))
    from_logits._softcap(softcap)

    logp, entropy_, _ = torch.ops.rlhf_fast.linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        bias,
        divisor,
        None if per_token is None else per_token.reshape(-1),
        softcap,
        entropy,
    )
    logp = logp.reshape(labels.shape)
    return (logp, entropy_.reshape(labels.shape)) if entropy else logp


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; holds all the logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return from_logits.reference(
        logits, labels, temperature=temperature, softcap=softcap, entropy=entropy
    )


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or empty, norm [2, N]); 0 in the rows that are ignored."""
    logp = hidden.new_zeros(labels.shape, dtype=check.accumulator(hidden))
    H = torch.zeros_like(logp) if entropy else logp.new_empty(0)
    norm = logp.new_zeros((2, *labels.shape))
    for rows, logits, _ in linear.chunks(
        hidden, weight, bias, linear.kept_rows(labels != check.IGNORE_INDEX)
    ):
        logp_, entropy_, norm_ = torch.ops.rlhf_fast.token_logprobs(
            logits[None],
            linear.take(labels, rows)[None],
            temperature,
            None if per_token is None else linear.take(per_token, rows)[None],
            softcap,
            entropy,
            False,
        )
        logp[rows], norm[:, rows] = logp_[0], norm_[:, 0]
        if entropy:
            H[rows] = entropy_[0]
    return logp, H, norm


def _backward(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    entropy: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    matters = grad_logp != 0
    if grad_entropy is not None:
        matters |= grad_entropy != 0
    matters &= labels != check.IGNORE_INDEX
    grads = linear.Gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)
    for rows, logits, x in linear.chunks(hidden, weight, bias, linear.kept_rows(matters)):
        torch.ops.rlhf_fast.token_logprobs_backward(
            linear.take(grad_logp, rows)[None],
            None if grad_entropy is None else linear.take(grad_entropy, rows)[None],
            logits[None],
            linear.take(labels, rows)[None],
            norm[:, rows][:, None].contiguous(),
            None if grad_entropy is None else linear.take(entropy, rows)[None],
            temperature,
            None if per_token is None else linear.take(per_token, rows)[None],
            softcap,
            logits[None],
        )
        grads.add(rows, x, logits)
    return grads.result()


def _forward_fake(hidden, weight, labels, bias, temperature, per_token, softcap, entropy):
    new = hidden.new_empty(labels.shape, dtype=check.accumulator(hidden))
    norm = new.new_empty((2, *labels.shape))
    return new, torch.empty_like(new) if entropy else new.new_empty(0), norm


def _backward_fake(
    grad_logp, grad_entropy, hidden, weight, labels, bias, norm, entropy, temperature, per_token,
    softcap, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    def like(x, needed):
        return torch.empty_like(x) if needed else hidden.new_empty(0)

    return like(hidden, needs_hidden), like(weight, needs_weight), like(bias, needs_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, ctx.temperature, per_token, ctx.softcap, ctx.entropy = inputs
    _, entropy, norm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((norm,) if ctx.entropy else (entropy, norm)))
    saved_entropy = entropy if ctx.entropy else None
    ctx.save_for_backward(hidden, weight, labels, bias, per_token, norm, saved_entropy)


def _autograd(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None) -> Any:
    nothing = (None,) * 4
    if grad_logp is None and grad_entropy is None:
        return None, None, None, None, *nothing
    hidden, weight, labels, bias, per_token, norm, entropy = ctx.saved_tensors
    if grad_logp is None:
        grad_logp = torch.zeros_like(grad_entropy)
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    d_hidden, d_weight, d_bias = torch.ops.rlhf_fast.linear_token_logprobs_backward(
        grad_logp, grad_entropy, hidden, weight, labels, bias, norm, entropy, ctx.temperature,
        per_token, ctx.softcap, needs_hidden, needs_weight, needs_bias,
    )  # fmt: skip
    return (
        d_hidden if needs_hidden else None,
        d_weight if needs_weight else None,
        None,
        d_bias if needs_bias else None,
        *nothing,
    )


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def sample(name: str, n: int, h: int, v: int, **options: Any) -> Sample:
        hidden = torch.randn(n, h, generator=generator)
        weight = torch.randn(v, h, generator=generator) / h**0.5 * 3
        labels = torch.randint(v, (n,), generator=generator)
        labels[1::3] = check.IGNORE_INDEX
        grads = ("hidden", "weight", "bias") if "bias" in options else ("hidden", "weight")
        return Sample(
            name, {"hidden": hidden, "weight": weight, "labels": labels, **options}, grads
        )

    yield sample("plain", 19, 8, 131)
    yield sample("one row", 1, 8, 17, entropy=True)
    yield sample("no rows", 0, 8, 17, entropy=True)
    yield sample("vocab 1", 5, 4, 1, entropy=True)
    bias = torch.randn(65, generator=generator)
    per_token = 0.5 + torch.rand(21, generator=generator)
    yield sample("bias", 21, 16, 65, bias=bias, entropy=True)
    yield sample("all", 21, 16, 65, bias=bias, entropy=True, temperature=per_token, softcap=2.0)
    padded = bias.masked_fill(torch.arange(65) >= 60, -torch.inf)
    labels = torch.arange(21) % 60
    last = sample("-inf bias", 21, 16, 65, bias=padded, entropy=True)
    yield Sample(last.name, {**last.arguments, "labels": labels}, ("hidden", "weight"))


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    n, h, v = shape["N"], shape["H"], shape["V"]
    hidden = torch.randn(n, h, generator=generator, device=device).to(dtype)
    weight = (torch.randn(v, h, generator=generator, device=device) / h**0.5).to(dtype)
    labels = torch.randint(v, (n,), generator=generator, device=device)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "entropy": True}
    return Sample("bench", arguments, ("hidden", "weight"))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    operands = (shape["N"] + shape["V"]) * shape["H"] * element_size
    return operands, 2 * operands


def flops(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    gemm = 2 * shape["N"] * shape["H"] * shape["V"]
    return gemm, 3 * gemm


FORWARD = define_kernel(
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
    "float temperature, Tensor? per_token, float? softcap, bool entropy) "
    "-> (Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_forward_fake,
    triton=None,
    backward=_autograd,
    setup_context=_setup_context,
)
BACKWARD = define_kernel(
    "linear_token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor hidden, "
    "Tensor weight, Tensor labels, Tensor? bias, Tensor norm, Tensor? entropy, float temperature, "
    "Tensor? per_token, float? softcap, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor)",
    fallback=_backward,
    fake=_backward_fake,
    triton=None,
)
OP = register(
    Op(
        "linear_token_logprobs",
        linear_token_logprobs,
        reference,
        (FORWARD, BACKWARD),
        samples,
        workload,
        ({"N": 512, "H": 576, "V": 49152}, {"N": 4096, "H": 576, "V": 49152}),
        bytes_moved,
        flops,
    )
)
