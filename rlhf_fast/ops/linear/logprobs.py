"""linear_token_logprobs: token log-probs from hidden states, with no [N, V] tensor, ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import check
from .. import token_logprobs as from_logits
from ..linear import chunks as linear
from ..linear import vocab_parallel
from ..registry import Op, Sample, define_kernel, register, save_for_backward


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    lora: linear.Lora | None = None,
    group: ProcessGroup | None = None,
    compact: bool = True,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(hidden @ weight.T + bias), in chunks of rows.

    The same numbers as ``token_logprobs(hidden @ weight.T + bias, labels, ...)``; the logits exist
    only one chunk at a time (``rlhf_fast.chunk_budget`` sets how large), so memory does not grow
    with N·V. The backward recomputes the logits of the rows whose incoming gradient is not zero,
    and of no others: masked, clipped and zero-advantage tokens cost nothing, whatever the loss.
    It begins with the forward's last chunk, whose logits still lie there if no other linear op has
    run since and two thirds of its rows have a gradient.

    FLOPs: 2NHV forward; 6·N'HV backward, N' the rows with gradient (4N'HV for a frozen weight),
    less 2NHV of the last chunk: 6NHV in all where one chunk holds everything.
    H100, bf16, N=8192 H=4096 V=131072, forward: 8.8 TFLOP at the 800 TFLOP/s of a large cuBLAS
    product are 11.0 ms; writing and reading the float32 logits (8 bytes each, 8.6 GB at 3 TB/s,
    chunk by chunk) adds 2.9 ms: 13.9 ms predicted. Backward, the last of 5 chunks kept: 24.7 TFLOP
    are 30.9 ms; logits written and read, their gradient written in 16 bits (10 bytes, less the kept
    chunk's 4: 9.9 GB) are 3.3 ms: 34.2 ms predicted. Not measured on a GPU yet.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], the language-model head, dtype and device of ``hidden`` (under autocast
            both are cast to its dtype). A DTensor (FSDP2) is gathered; its gradient is averaged
            over the ranks and sharded again.
        labels: [...], int64; −100 marks a row to ignore: logp 0, entropy 0, gradient 0, and it
            leaves before the first matrix product, whatever its other inputs hold.
        bias: [V] or None.
        temperature, softcap, entropy: as in ``token_logprobs``.
        lora: (A [r, H], B [V, r], scale): an adapter on the head that has not been merged; the
            logits gain scale · (hidden @ A.T) @ B.T, A and B their gradients. Sharded (FSDP2) as
            ``weight`` may be.
        group: each rank of this process group holds a shard of the vocabulary, in the order of
            the ranks and of any size: its rows of ``weight``, ``bias`` and B. All else, ``labels``
            of the whole vocabulary among it, is the same on all ranks, and so are the results;
            the gradients of ``hidden`` and A are summed over the ranks. Each forward and each
            backward begins by exchanging the shards' sizes, for which a GPU is waited for.
        compact: rows that need no work leave, of which a GPU must tell the host how many there
            are. False: no host sync, every row is computed; for CUDA graphs.
        deterministic: a row's logp, entropy and hidden gradient have the same bits whatever rows
            are around it, and however many. Every chunk then has 128 rows, a lone row's too: on
            2 CPU cores, H=576, V=49152, 512 rows take 1.1 times as long, a lone row 3.6 times.

    Returns:
        logp [...] in nats, or (logp, entropy); float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype or device; a label outside
            [0, V) (on CUDA checked only under ``rlhf_fast.debug()``).
    """
    head = linear.check_head(hidden, weight, bias, lora)
    accumulator = check.accumulator(hidden)
    divisor, per_token = from_logits._temperature(temperature, labels, accumulator)
    from_logits._softcap(softcap, accumulator)
    for name, x in (("entropy", entropy), ("compact", compact), ("deterministic", deterministic)):
        check.flag(name, x)
    check.labels(labels, "hidden", hidden, head.weight.shape[0] if group is None else None)
    logp, entropy_, _ = torch.ops.rlhf_fast.linear_token_logprobs(
        *head,
        labels.reshape(-1),
        divisor,
        None if per_token is None else per_token.reshape(-1),
        softcap,
        entropy,
        compact,
        deterministic,
        vocab_parallel.name(group),
        linear.needs_gradient(head),
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
    lora: linear.Lora | None = None,
    **how: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; holds all the logits."""
    kept = labels != check.IGNORE_INDEX
    logits, temperature = linear.plain(hidden, weight, bias, lora, temperature, kept)
    return from_logits.reference(
        logits, labels, temperature=temperature, softcap=softcap, entropy=entropy
    )


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    compact: bool,
    deterministic: bool,
    group: str | None,
    backward_follows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or empty, norm [2, N]); 0 in the rows that are ignored."""
    part, labels = vocab_parallel.part_of(weight, labels, group)
    logp = hidden.new_zeros(labels.shape, dtype=check.accumulator(hidden))
    H = torch.zeros_like(logp) if entropy else logp.new_empty(0)
    norm = logp.new_zeros((2, *labels.shape))
    head, keep = linear.Head(hidden, weight, bias, down, up), labels != check.IGNORE_INDEX
    how = {"compact": compact, "deterministic": deterministic, "part": part}
    for chunk in linear.chunks(head, keep, **how, leave_for=norm if backward_follows else None):
        rows = chunk.rows
        logp_, entropy_, norm_ = vocab_parallel.token_logprobs(
            chunk.logits[None],
            linear.take(labels, rows)[None],
            temperature,
            None if per_token is None else linear.take(per_token, rows)[None],
            softcap,
            entropy,
            part,
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
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    norm: Tensor,
    entropy: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    compact: bool,
    deterministic: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of linear.Needs, empty where not needed."""
    vocabulary, labels = vocab_parallel.part_of(weight, labels, group)
    matters = grad_logp != 0
    if grad_entropy is not None:
        matters |= grad_entropy != 0
    matters &= labels != check.IGNORE_INDEX
    labels = labels.masked_fill(~matters, check.IGNORE_INDEX)
    head = linear.Head(hidden, weight, bias, down, up)
    grads = linear.Gradients(head, linear.Needs(*needs), vocabulary)
    how = {"compact": compact, "deterministic": deterministic}
    for chunk in linear.chunks(head, matters, **how, memory=linear.left_by(norm, hidden)):

        def part(x: Tensor | None, rows: Tensor | slice = chunk.rows) -> Tensor | None:
            return None if x is None else linear.take(x, rows)[None]

        divisors = part(per_token)
        g_logp, g_entropy = grads.fit(
            part(grad_logp),
            part(grad_entropy),
            temperature=temperature if divisors is None else divisors,
        )
        torch.ops.rlhf_fast.token_logprobs_backward(
            g_logp,
            g_entropy,
            chunk.logits[None],
            part(labels),
            norm[:, chunk.rows][:, None].contiguous(),
            None if grad_entropy is None else part(entropy),
            temperature,
            divisors,
            softcap,
            grads.dlogits(chunk)[None],
        )
        grads.add(chunk)
    return grads.result()


def _forward_fake(hidden, weight, bias, down, up, labels, *options):
    entropy = options[3]
    new = hidden.new_empty(labels.shape, dtype=check.accumulator(hidden))
    norm = new.new_empty((2, *labels.shape))
    return new, torch.empty_like(new) if entropy else new.new_empty(0), norm


def _backward_fake(grad_logp, grad_entropy, *arguments):
    needs = arguments[-1]
    return tuple(
        torch.empty_like(x) if needed else arguments[0].new_empty(0)
        for x, needed in zip(arguments[:5], needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *inputs, ctx.entropy, ctx.compact, ctx.same, ctx.group, _ = inputs
    *head, labels, ctx.temperature, per_token, ctx.softcap = inputs
    _, entropy, norm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((norm,) if ctx.entropy else (entropy, norm)))
    ctx.budget = linear.budget()
    labels = labels.clone()  # theirs may change, and autograd does not see numpy do it
    save_for_backward(ctx, *head, labels, per_token, norm, entropy if ctx.entropy else None)


def _autograd(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None) -> Any:
    nothing = (None,) * 9
    if grad_logp is None and grad_entropy is None:
        return (None,) * 5 + nothing
    *tensors, per_token, norm, entropy = ctx.saved_tensors
    if grad_logp is None:
        grad_logp = torch.zeros_like(grad_entropy)
    needs = list(ctx.needs_input_grad[:5])
    with linear.within(ctx.budget):
        grads = torch.ops.rlhf_fast.linear_token_logprobs_backward(
            grad_logp, grad_entropy, *tensors, norm, entropy, ctx.temperature, per_token,
            ctx.softcap, ctx.compact, ctx.same, ctx.group, needs,
        )  # fmt: skip
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *nothing


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def sample(name: str, n: int, h: int, v: int, **options: Any) -> Sample:
        hidden = torch.randn(n, h, generator=generator)
        weight = torch.randn(v, h, generator=generator) / h**0.5 * 3
        labels = torch.randint(v, (n,), generator=generator)
        labels[1::3] = check.IGNORE_INDEX
        grads = ("hidden", "weight", *(x for x in ("bias", "lora") if x in options))
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
    lora = (torch.randn(3, 16, generator=generator), torch.randn(65, 3, generator=generator), 0.5)
    yield sample("adapter", 21, 16, 65, lora=lora, bias=bias, entropy=True)
    for how in ({"compact": True}, {"compact": False}, {"deterministic": True}):
        garbage = sample(
            f"NaN where ignored, {how}", 21, 16, 65, lora=lora, bias=bias, entropy=True,
            temperature=per_token.clone(), **how,
        )  # fmt: skip
        for name in ("hidden", "temperature"):
            garbage.arguments[name][1::3] = torch.nan
        yield garbage
    yield sample("not compact", 21, 16, 65, bias=bias, entropy=True, compact=False)
    yield sample("deterministic", 21, 16, 65, bias=bias, entropy=True, deterministic=True)
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
    return gemm, 2 * gemm  # no logits made again: as where one chunk holds everything


FORWARD = define_kernel(
    f"linear_token_logprobs({linear.HEAD}, Tensor labels, float temperature, Tensor? per_token, "
    "float? softcap, bool entropy, bool compact, bool deterministic, str? group, "
    "bool backward_follows) "
    "-> (Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_forward_fake,
    engine=True,
    backward=_autograd,
    setup_context=_setup_context,
)
BACKWARD = define_kernel(
    f"linear_token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, {linear.HEAD}, "
    "Tensor labels, Tensor norm, Tensor? entropy, float temperature, Tensor? per_token, "
    "float? softcap, bool compact, bool deterministic, str? group, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_backward,
    fake=_backward_fake,
    engine=True,
)
register(
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
