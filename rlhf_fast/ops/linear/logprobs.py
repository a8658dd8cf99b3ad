"""linear_token_logprobs: token log-probs from hidden states, with no [N, V] tensor, ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from . import exponentials, gradients, groups, vocab_parallel
from . import support as few
from .head import HEAD, Head, Lora, check_head, plain, wanted
from .tiles import TiledChunk, tiled_chunks
from .vocab_parallel import Part


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    support: Tensor | None = None,
    lora: Lora | None = None,
    group: ProcessGroup | None = None,
    compact: bool = True,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(hidden @ weight.T + bias), in chunks of rows.

    The same numbers as ``token_logprobs(hidden @ weight.T + bias, labels, ...)``; the logits exist
    only one chunk at a time (``rlhf_fast.chunk_budget`` sets how large), so memory does not grow
    with N·V. The backward recomputes the logits of the rows whose incoming gradient is not zero,
    and of no others: masked, clipped and zero-advantage tokens cost nothing, whatever the loss.
    The forward's last chunk of logits stays in memory, and the backward uses it again if no other
    linear op has run in between (log-probs without gradients, a reference's, do no harm), and at
    least two thirds of its rows have a gradient. On a GPU, of 16-bit inputs, it is the gradient of
    the log-probs of the last rows that stays, in 16 bits (of bfloat16 the logits' exponentials,
    written tile by tile while a cache holds the logits): of as many as the budget has room for,
    and of bfloat16 with a large trained ``weight`` of 2H at least. Of those no logits are made
    again whatever the loss, unless ``entropy`` has a gradient, which is not in it.

    FLOPs: 2NHV forward; 6·N'HV backward, N' the rows with gradient (4·N'HV for a frozen weight),
    less 2nHV where n rows are used again: 6NHV in all where that is all of them. Rows with a small
    set of ``support`` take 6NKH and no product of the head at all.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], the language-model head, dtype and device of ``hidden`` (under autocast
            both are cast to its dtype). A DTensor (FSDP2) is gathered; its gradient is averaged
            over the ranks and sharded again.
        labels: [...], int64; −100 marks a row to ignore: logp 0, entropy 0, gradient 0. Its other
            inputs are not looked at and may hold anything, NaN too.
        bias: [V] or None.
        temperature, softcap, entropy: as in ``token_logprobs``.
        support: as in ``token_logprobs``: [..., K], the tokens that sampling left. With a ``group``
            they are tokens of the whole vocabulary. A set of at most V/16 tokens (with a softcap,
            any set) is made from its own rows of ``weight``; a larger one in a chunk of logits,
            like the whole vocabulary.
        lora: (A [r, H], B [V, r], scale): an adapter on the head that has not been merged; the
            logits gain scale · (hidden @ A.T) @ B.T, A and B their gradients. Sharded (FSDP2) as
            ``weight`` may be.
        group: each rank of this process group holds a shard of the vocabulary, in the order of
            the ranks and of any size: its rows of ``weight``, ``bias`` and B. Everything else is
            the same on all ranks (``labels`` are indices into the whole vocabulary), and so are
            the results; the gradients of ``hidden`` and A are summed over the ranks. Each forward
            and each backward begins by exchanging the shards' sizes, for which the host waits.
        compact: True: rows that need no work are left out of the matrix products; the host waits
            for a GPU to count them. False: every row is computed, without waiting; for CUDA graphs.
        deterministic: a row's logp, entropy and hidden gradient have the same bits whichever other
            rows are in the call, and however many. Every chunk is then filled up to 128 rows: on
            2 CPU cores, H=576, V=49152, 512 rows take 1.1 times as long, a lone row 3.6 times.

    Returns:
        logp [...] in nats, or (logp, entropy); float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype or device; a label outside
            [0, V), or a set that does not hold it (on CUDA checked only under
            ``rlhf_fast.debug()``).
    """
    head = check_head(hidden, weight, bias, lora)
    accumulator = check.accumulator(hidden)
    divisor, per_token = from_logits._temperature(temperature, labels, accumulator)
    from_logits._softcap(softcap, accumulator)
    for name, x in (("entropy", entropy), ("compact", compact), ("deterministic", deterministic)):
        check.flag(name, x)
    check.labels(labels, "hidden", hidden, head.weight.shape[0] if group is None else None)
    ids = sets.checked(support, labels)
    logp, entropy_ = over_support(
        head, labels.reshape(-1), ids, divisor,
        None if per_token is None else per_token.reshape(-1), softcap, entropy, compact,
        deterministic, vocab_parallel.name(group),
    )  # fmt: skip
    logp = logp.reshape(labels.shape)
    return (logp, entropy_.reshape(labels.shape)) if entropy else logp


def over_support(
    head: Head,
    labels: Tensor,
    ids: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    compact: bool,
    deterministic: bool,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """(logp [N], entropy [N] or empty), with gradients, of checked arguments: labels [N] and the
    sets ids [N, K], None where no row has one."""

    def whole_head(labels: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        logp, entropy_, _ = torch.ops.rlhf_fast.linear_token_logprobs(
            *head, labels, temperature, per_token, softcap, ids, entropy, compact, deterministic,
            group, wanted(head),
        )  # fmt: skip
        return logp, entropy_

    if ids is None:
        return whole_head(labels, None)
    rows = few.rows(head, labels, ids, softcap, group)
    z = rows.logits(head)
    logp, entropy_, _ = torch.ops.rlhf_fast.token_logprobs(
        z[None], rows.at[None], temperature,
        None if per_token is None else per_token[None].contiguous(), None, entropy, True,
    )  # fmt: skip
    logp, entropy_ = logp.view(-1), entropy_.view(-1)
    if rows.others is not None:
        others = whole_head(rows.others, ids)
        logp, entropy_ = logp + others[0], entropy_ + others[1]
    return logp, entropy_


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    support: Tensor | None = None,
    lora: Lora | None = None,
    **how: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; holds all the logits."""
    kept = labels != check.IGNORE_INDEX
    logits, temperature = plain(hidden, weight, bias, lora, temperature, kept)
    return from_logits.reference(
        logits, labels, temperature=temperature, softcap=softcap, entropy=entropy, support=support
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
    support: Tensor | None,
    entropy: bool,
    compact: bool,
    deterministic: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``forward``, of labels of the whole vocabulary."""
    part, labels = vocab_parallel.part_of(weight, labels, group)
    return forward(
        Head(hidden, weight, bias, down, up), labels, temperature, per_token, softcap, support,
        entropy, compact, deterministic, part, needs,
    )  # fmt: skip


def leaves_all(
    head: Head, labels: Tensor, deterministic: bool, part: Part | None, needs: list[bool]
) -> bool:
    """Whether ``forward`` leaves the exponentials of all rows: ``backward`` then makes no logits
    again unless so many rows have no gradient that it is less work (``chunks.planned``)."""
    hidden = head.hidden
    if deterministic or not groups.in_groups(hidden) or not exponentials.hold(hidden.dtype):
        return False
    group = groups.Group(head, gradients.Needs(*needs).weight, hidden.dtype, part)
    return labels.numel() <= group.most


def forward(
    head: Head,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    support: Tensor | None,
    entropy: bool,
    compact: bool,
    deterministic: bool,
    part: Part | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or empty, norm [2, N]); 0 in the rows that are ignored. labels: of
    this part; needs: the gradients that a backward will be asked for (``gradients.Needs``)."""
    hidden, vocab = head.hidden, head.weight.shape[0]
    logp = hidden.new_zeros(labels.shape, dtype=check.accumulator(hidden))
    H = torch.zeros_like(logp) if entropy else logp.new_empty(0)
    norm, keep = logp.new_zeros((2, *labels.shape)), labels != check.IGNORE_INDEX
    left = None  # deterministic: every product has the same shape, a group's has not
    if any(needs) and groups.in_groups(hidden) and not deterministic:
        left = groups.Group(head, gradients.Needs(*needs).weight, hidden.dtype, part)
    in_tiles = exponentials.hold(hidden.dtype) if left is not None else not any(needs)
    how: dict[str, Any] = {"compact": compact, "support": few.of_part(support, part)}
    how["parts"] = 1 if left is None else groups.PARTS
    loop: Callable[..., Iterator[linear.Chunk | TiledChunk]] = linear.chunks
    if in_tiles and not deterministic:  # whose rows have the same bits whatever a backward needs
        loop = tiled_chunks
        if left is not None:
            how["last"] = left.most
            linear.forget_left(hidden)
        if part is None and check.values_can_be_read(labels):
            check.label_range(labels, vocab)  # a tile's kernel would tell of the tile
    else:
        how |= {"deterministic": deterministic, "part": part}
        how["leave_for"] = norm if any(needs) and left is None else None
    for chunk in loop(head, keep, **how):
        rows = chunk.rows
        targets = linear.take(labels, rows)[None]
        divisors = None if per_token is None else linear.take(per_token, rows)[None]
        of_rows = temperature, divisors, softcap
        number, e = targets.shape[1], None
        stays = left is not None and left.has_room_for_all(number, chunk.together)
        if left is not None and stays and isinstance(chunk, TiledChunk):
            e = exponentials.Exponentials(left.next(number))
        logp_, entropy_, norm_ = vocab_parallel.token_logprobs(
            chunk.tiles(targets), *of_rows, entropy, part, e
        )
        logp[rows], norm[:, rows] = logp_[0], norm_[:, 0]
        if entropy:
            H[rows] = entropy_[0]
        if left is not None and e is not None and isinstance(chunk, TiledChunk):
            gradient = e.gradient(targets[0], logp_[0], norm_[:, 0])
            left.waiting.append(groups.Rows(rows, chunk.hidden, e.left, *gradient))
        elif left is not None and stays and isinstance(chunk, linear.Chunk):
            divided = temperature if divisors is None else divisors
            (ones, _), units = groups.fitted(hidden, (torch.ones_like(logp_), None), divided)
            of_gradient = partial(write, chunk.logits, ones, None, norm_, None, *of_rows)
            left.add(chunk, targets, of_gradient, units)
    if left is not None and left.memory is not None:
        linear.leave(left.memory, left.left(), norm, hidden)
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
    support: Tensor | None,
    compact: bool,
    deterministic: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``backward``, of labels of the whole vocabulary."""
    part, labels = vocab_parallel.part_of(weight, labels, group)
    return backward(
        grad_logp, grad_entropy, Head(hidden, weight, bias, down, up), labels, norm, entropy,
        temperature, per_token, softcap, support, compact, deterministic, part, needs,
    )  # fmt: skip


def backward(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    head: Head,
    labels: Tensor,
    norm: Tensor,
    entropy: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    support: Tensor | None,
    compact: bool,
    deterministic: bool,
    vocabulary: Part | None,
    needs: list[bool],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Gradients in the order of ``gradients.Needs``, empty where not needed, in this dtype or the
    operands' own; labels: of this part of the vocabulary."""
    matters = grad_logp != 0
    if grad_entropy is not None:
        matters |= grad_entropy != 0
    matters &= labels != check.IGNORE_INDEX
    labels = labels.masked_fill(~matters, check.IGNORE_INDEX)
    grads = gradients.Gradients(head, gradients.Needs(*needs), vocabulary, dtype)
    how: dict[str, Any] = {"compact": compact, "deterministic": deterministic}
    how |= {"support": few.of_part(support, vocabulary), "parts": grads.parts}
    memory = linear.left_by(norm, head.hidden)
    if memory is not None and isinstance(memory.last, groups.Left):
        usable = memory if grad_entropy is None else None  # the entropy's gradient is not in it
        how["plan"] = linear.planned(matters, compact, usable)
        if how["plan"].again:
            kept = None if how["plan"].complete else matters[memory.last.rows]
            grads.add_left(memory.whole, memory.last, kept, grad_logp)
        memory = usable = None
    for chunk in linear.chunks(head, matters, **how, memory=memory):

        def part(x: Tensor | None, rows: Tensor | slice = chunk.rows) -> Tensor | None:
            return None if x is None else linear.take(x, rows)[None]

        divisors = part(per_token)
        g_logp, g_entropy = grads.fit(
            part(grad_logp),
            part(grad_entropy),
            temperature=temperature if divisors is None else divisors,
        )
        norm_ = norm[:, chunk.rows][:, None].contiguous()
        entropy_ = None if grad_entropy is None else part(entropy)
        of_rows = g_logp, g_entropy, norm_, entropy_, temperature, divisors, softcap
        grads.add(
            chunk,
            linear.take(labels, chunk.rows)[None],
            partial(write, chunk.logits, *of_rows),
        )
        del chunk  # free when the products of a group of all rows are made
    return grads.result()


def write(
    logits: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    norm: Tensor,
    entropy: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    columns: Callable[[Tensor], Tensor],
    labels: Tensor,
    out: Tensor,
) -> None:
    """The gradient of some columns of a chunk's logits [n, V] (``groups.Write``)."""
    torch.ops.rlhf_fast.token_logprobs_backward(
        g_logp, g_entropy, columns(logits), labels, norm, entropy, temperature, per_token, softcap,
        out,
    )  # fmt: skip


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    entropy = options[4]
    new = hidden.new_empty(labels.shape, dtype=check.accumulator(hidden))
    norm = new.new_empty((2, *labels.shape))
    return new, torch.empty_like(new) if entropy else new.new_empty(0), norm


def _backward_fake(
    grad_logp: Tensor, grad_entropy: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    needs = arguments[-1]
    return tuple(
        torch.empty_like(x) if needed else arguments[0].new_empty(0)
        for x, needed in zip(arguments[:5], needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rest, ctx.entropy, ctx.compact, ctx.same, ctx.group, _ = inputs
    *head, labels, ctx.temperature, per_token, ctx.softcap, support = rest
    _, entropy, norm = output
    kept = entropy if ctx.entropy else None
    ctx.mark_non_differentiable(*((norm,) if ctx.entropy else (entropy, norm)))
    ctx.budget = linear.budget()
    labels = labels.clone()  # theirs may change, and autograd does not see numpy do it
    save_for_backward(ctx, *head, labels, per_token, support, norm, kept)


def _autograd(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None) -> Any:
    nothing = (None,) * 10
    *tensors, per_token, support, norm, entropy = ctx.saved_tensors
    grad_logp = zeros_unless_given(grad_logp, grad_entropy)
    needs = list(ctx.needs_input_grad[:5])
    with linear.within(ctx.budget):
        grads = torch.ops.rlhf_fast.linear_token_logprobs_backward(
            grad_logp, grad_entropy, *tensors, norm, entropy, ctx.temperature, per_token,
            ctx.softcap, support, ctx.compact, ctx.same, ctx.group, needs,
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
    down, up = (torch.randn(*size, generator=generator) for size in ((3, 16), (65, 3)))
    lora = (down / 16**0.5, up / 3**0.5, 0.5)
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
    base = sample("support", 21, 16, 65, bias=bias, entropy=True, temperature=per_token)
    labels = base.arguments["labels"]
    for most in (4, 40):  # made token by token; a chunk's row
        ids = sets.drawn(labels, 65, most, generator)
        for options in ({}, {"lora": lora}, {"softcap": 2.0}):
            given = base.arguments | {"support": ids, **options}
            name = ", ".join([f"support of {most}", *options])
            yield Sample(name, given, (*base.grads, *(x for x in options if x == "lora")))
    hidden = base.arguments["hidden"].masked_fill((labels < 0).unsqueeze(-1), torch.nan)
    ignored = base.arguments | {"support": ids, "hidden": hidden, "lora": lora}
    yield Sample("support, NaN where ignored", ignored, (*base.grads, "lora"))
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
    f"linear_token_logprobs({HEAD}, Tensor labels, float temperature, Tensor? per_token, "
    "float? softcap, Tensor? support, bool entropy, bool compact, bool deterministic, "
    "str? group, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_forward_fake,
    engine=True,
    backward=_autograd,
    setup_context=_setup_context,
)
BACKWARD = define_kernel(
    f"linear_token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, {HEAD}, "
    "Tensor labels, Tensor norm, Tensor? entropy, float temperature, Tensor? per_token, "
    "float? softcap, Tensor? support, bool compact, bool deterministic, str? group, "
    "bool[] needs) "
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
