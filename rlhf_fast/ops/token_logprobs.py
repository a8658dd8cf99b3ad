"""token_logprobs: log-probability (and entropy) of given tokens, straight from logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import check, pages
from . import support as sets
from .registry import (
    Op,
    Sample,
    define_kernel,
    graph_is_kept,
    register,
    save_for_backward,
    zeros_unless_given,
)


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: Literal[False] = False,
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: Literal[True],
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(logits), without a [..., V] temporary.

    With z = softcap·tanh(logits / softcap) / temperature (no tanh when softcap is None):

        logp = z[label] − logsumexp(z)          entropy = −Σ_v p_v log p_v,   p = softmax(z)

    With ``support`` the sums are over the tokens that truncated sampling (top-k, top-p, min-p, a
    grammar) left of the vocabulary: p is softmax over them, the distribution that the sampler drew
    from, and the logits of the others get no gradient.

    The forward reads the logits once; the backward reads them once and writes their gradient once.
    −inf logits have p = 0 and p·log p = 0.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; any strides. A last dimension
            that is not contiguous is copied.
        labels: [...], int64; −100 marks a row to ignore (logp 0, entropy 0, gradient 0).
        temperature: above 0, the divisor of the logits; a float, or a tensor [...] of one per token
            (no gradient flows to it).
        softcap: above 0, Gemma's bound on the logits; None for none.
        entropy: return the entropy too, with its gradient.
        support: [..., K], int64 or int32: the tokens of each row's set, each once, the label among
            them; −1 fills a row up. A row of −1 alone has no set: its p is over the whole
            vocabulary. None: no row has one.
        inplace_backward: let the backward overwrite ``logits`` with its gradient: no second
            [..., V] tensor. Nothing else may read ``logits`` after that; another backward
            that needs them raises an error. Logits that are a leaf (or a view of one), that share
            memory among rows, or whose graph is kept (retain_graph) are left as they are, as are
            all with ``support``. Inside torch.compile this is left to the compiler's own buffer
            reuse.

    Returns:
        logp [...] in nats, or (logp, entropy); float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype or device; a label outside
            [0, V), or a set that does not hold it (on CUDA checked only under
            ``rlhf_fast.debug()``).
    """
    check.floating("logits", logits)
    check.at_least_1d("logits", logits)
    check.labels(labels, "logits", logits, logits.shape[-1])
    dtype = check.accumulator(logits)
    divisor, per_token = _temperature(temperature, labels, dtype)
    _softcap(softcap, dtype)
    check.flag("entropy", entropy)
    check.flag("inplace_backward", inplace_backward)

    ids = sets.checked(support, labels)
    rows = _rows(logits)
    labels_ = check.reshaped(labels, rows.shape[:-1]).contiguous()
    if per_token is not None:
        per_token = per_token.reshape(rows.shape[:-1]).contiguous()

    def over(
        logits: Tensor, labels: Tensor, softcap: float | None, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        logp, entropy_, _ = FORWARD(logits, labels, divisor, per_token, softcap, entropy, inplace)
        return logp, entropy_

    if ids is None:
        logp, entropy_ = over(rows, labels_, softcap, inplace_backward and _may_overwrite(logits))
    else:
        at = sets.positions(ids, labels.reshape(-1), logits.shape[-1])
        at = at.view(labels_.shape)
        logp, entropy_ = over(sets.taken(rows, ids, softcap), at, None, True)
        whole = labels_.masked_fill(at != check.IGNORE_INDEX, check.IGNORE_INDEX)
        if not check.values_can_be_read(labels) or bool((whole != check.IGNORE_INDEX).any()):
            others = over(rows, whole, softcap, False)
            logp, entropy_ = logp + others[0], entropy_ + others[1]
    logp = check.reshaped(logp, labels.shape)
    return (logp, check.reshaped(entropy_, labels.shape)) if entropy else logp


@overload
def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: Literal[False] = False,
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor: ...
@overload
def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: Literal[True],
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...
def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    support: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; holds several [..., V] tensors."""
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    z = logits.to(check.accumulator(logits))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / divisor
    if support is not None:
        z = sets.left(z, support, labels)
    log_p = torch.log_softmax(z, dim=-1)
    kept = labels != check.IGNORE_INDEX
    index = labels.clamp(min=0).unsqueeze(-1)
    logp = log_p.gather(-1, index).squeeze(-1).masked_fill(~kept, 0.0)
    if not entropy:
        return logp
    p_log_p = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)
    return logp, (-p_log_p.sum(-1)).masked_fill(~kept, 0.0)


# What the kernels do, row by row; the fallback for devices and dtypes without a kernel.


def _scaled(
    logits: Tensor, temperature: float, per_token: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(z, dz/dlogits), both [B, T, V] in the accumulator's dtype."""
    x = logits.to(check.accumulator(logits))
    divisor = temperature if per_token is None else per_token.to(x.dtype).unsqueeze(-1)
    if softcap is None:
        return x / divisor, torch.ones_like(x) / divisor
    t = torch.tanh(x / softcap)
    return softcap * t / divisor, (1 - t * t) / divisor


def _forward(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [B, T], entropy [B, T] or empty, norm [2, B, T]).

    norm is the row's (max, log Σ e^(z − max)). Their sum is logsumexp, but one float32 would hold
    that to only 1e-3 nats at logits of 1e4, and the backward's p would be off by as much. Where all
    logits are −inf the second is −inf.
    """
    check.temperature_range(per_token, labels, check.accumulator(logits))
    z, _ = _scaled(logits, temperature, per_token, softcap)
    kept = labels != check.IGNORE_INDEX
    largest = z.amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)  # -inf - top is -inf
    z = z - largest
    log_sum = z.exp().sum(-1, keepdim=True).log()
    log_p = z.sub_(log_sum)
    logp = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logp = logp.masked_fill(~kept, 0.0)
    norm = torch.stack([largest.squeeze(-1), log_sum.squeeze(-1)])
    if not entropy:
        return logp, logp.new_empty(0), norm
    p_log_p = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)
    return logp, (-p_log_p.sum(-1)).masked_fill(~kept, 0.0), norm


def _backward(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    entropy: Tensor | None,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    out: Tensor,
) -> None:
    """out <- dz/dlogits · (g_logp (1[v = label] − p) − g_entropy · p (log p + entropy)).

    A row whose label is check.ELSEWHERE has its label in another rank's part of the vocabulary.
    """
    z, dz = _scaled(logits, temperature, per_token, softcap)
    log_p = z - norm[0].unsqueeze(-1) - norm[1].unsqueeze(-1)
    p = log_p.exp()
    g = -grad_logp.unsqueeze(-1) * p
    if grad_entropy is not None and entropy is not None:
        tilt = log_p.masked_fill(log_p == -torch.inf, 0.0) + entropy.unsqueeze(-1)
        g -= grad_entropy.unsqueeze(-1) * p * tilt
    add_at_label(g, labels, grad_logp)
    g.mul_(dz).masked_fill_((labels == check.IGNORE_INDEX).unsqueeze(-1), 0.0)
    out.copy_(g)


def add_at_label(g: Tensor, labels: Tensor, grad_logp: Tensor) -> None:
    here = grad_logp.masked_fill(labels < 0, 0.0).unsqueeze(-1)
    g.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), here)


def _forward_fake(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    per_token: Tensor | None,
    softcap: float | None,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    new = logits.new_empty(labels.shape, dtype=check.accumulator(logits))
    norm = new.new_empty((2, *labels.shape))
    return new, torch.empty_like(new) if entropy else new.new_empty(0), norm


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ctx.temperature, per_token, ctx.softcap, ctx.entropy, ctx.inplace = inputs
    _, entropy, norm = output
    ctx.mark_non_differentiable(*((norm,) if ctx.entropy else (entropy, norm)))
    labels = labels.clone()  # theirs may change, and autograd does not see numpy do it
    save_for_backward(ctx, logits, labels, per_token, norm, entropy if ctx.entropy else None)


def _autograd(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None) -> Any:
    nothing = (None,) * 6
    logits, labels, per_token, norm, entropy = ctx.saved_tensors
    grad_logp = zeros_unless_given(grad_logp, grad_entropy)
    inplace = ctx.inplace and not graph_is_kept()
    if inplace:
        out = logits.detach()
    else:  # contiguous, since rows of the logits may overlap in memory
        out = pages.empty_like(logits)
    torch.ops.rlhf_fast.token_logprobs_backward(
        grad_logp.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        logits.detach(),
        labels,
        norm,
        entropy,
        ctx.temperature,
        per_token,
        ctx.softcap,
        out,
    )
    if inplace:
        torch.autograd.graph.increment_version(logits)
    return out, *nothing


def _temperature(
    temperature: float | Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """(float, None) or (1.0, [...] tensor)."""
    if not isinstance(temperature, Tensor):
        check.number("temperature", temperature, above=0.0, dtype=dtype)
        return float(temperature), None
    check.tensor("labels", labels)
    check.like("temperature", temperature, "labels", labels)
    check.temperature_range(temperature, labels, dtype)
    return 1.0, temperature.detach().to(dtype)


def _softcap(softcap: float | None, dtype: torch.dtype) -> None:
    if softcap is not None:
        check.number("softcap", softcap, above=0.0, dtype=dtype)


def _may_overwrite(logits: Tensor) -> bool:
    """Whether a gradient can take the place of the logits."""
    if torch.compiler.is_compiling():
        return False
    whole = logits if logits._base is None else logits._base
    if whole.is_leaf and whole.requires_grad:
        return False
    extent = 1  # elements between the first and the last of the dimensions so far
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            return False  # two elements in one place
        extent += (size - 1) * stride
    return True


def _rows(logits: Tensor) -> Tensor:
    """[..., V] -> [B, T, V] with a contiguous last dimension, as a view wherever one exists.

    Two leading dimensions keep ``logits[:, :-1]`` a view; the kernels take both strides.
    """
    if logits.dim() == 1:
        rows = logits[None, None]
    elif logits.dim() == 2:
        rows = logits[None]
    elif logits.dim() == 3:
        rows = logits
    else:
        rows = logits.flatten(1, -2) if logits.numel() else logits.reshape(0, 1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def logits(*shape: int, scale: float = 3.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    def labels(*shape: int, vocab: int) -> Tensor:
        return torch.randint(vocab, shape, generator=generator)

    def sample(name: str, x: Tensor, y: Tensor, **options: Any) -> Sample:
        return Sample(name, {"logits": x, "labels": y, **options}, ("logits",))

    for vocab in (1, 7, 16, 129, 1000):
        yield sample(f"vocab {vocab}", logits(3, 5, vocab), labels(3, 5, vocab=vocab))
    x, y = logits(2, 9, 321), labels(2, 9, vocab=321)
    y[0, 2:5] = check.IGNORE_INDEX
    per_token = 0.5 + torch.rand(2, 9, generator=generator)
    yield sample("entropy, ignored", x, y, entropy=True)
    yield sample("temperature", x, y, entropy=True, temperature=0.7)
    yield sample("temperature per token", x, y, entropy=True, temperature=per_token)
    yield sample("softcap", x, y, entropy=True, softcap=2.0, temperature=1.3)
    yield sample("inplace", x.clone(), y, entropy=True, inplace_backward=True)
    yield sample("sliced", logits(2, 6, 50)[:, :-1], labels(2, 5, vocab=50), entropy=True)
    yield sample("strided", logits(33, 4).t(), labels(4, vocab=33), entropy=True)
    yield sample("one row", logits(77), labels(vocab=77), entropy=True)
    yield sample("no rows", logits(0, 5), labels(0, vocab=5), entropy=True)
    yield sample("4-D", logits(2, 2, 3, 40), labels(2, 2, 3, vocab=40), entropy=True)
    yield sample("vocab 5000", logits(3, 5000), labels(3, vocab=5000), entropy=True)
    masked = logits(4, 200)
    masked[:, 64:] = -torch.inf
    yield sample("-inf columns", masked, labels(4, vocab=64), entropy=True)
    one_hot = torch.full((4, 65), -torch.inf)
    one_hot[:, 3] = 1.0
    yield sample("one-hot", one_hot, torch.full((4,), 3), entropy=True)
    few = sets.drawn(y, 321, 7, generator)
    yield sample("support", x, y, support=few, entropy=True)
    yield sample("support, all", x, y, support=few.int(), entropy=True, softcap=2.0,
                 temperature=per_token, inplace_backward=True)  # fmt: skip
    yield sample("support of many", x, y, support=sets.drawn(y, 321, 300, generator), entropy=True)
    yield sample("huge", logits(4, 90, scale=1e4), labels(4, vocab=90), entropy=True)


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    n, v = shape["N"], shape["V"]
    logits = torch.randn(n, v, generator=generator, device=device, dtype=torch.float32).to(dtype)
    labels = torch.randint(v, (n,), generator=generator, device=device)
    arguments = {"logits": logits, "labels": labels, "entropy": True}
    return Sample("bench", arguments, ("logits",))


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    logits = shape["N"] * shape["V"] * element_size
    return logits, 2 * logits


FORWARD = define_kernel(
    "token_logprobs(Tensor logits, Tensor labels, float temperature, Tensor? per_token, "
    "float? softcap, bool entropy, bool inplace_backward) -> (Tensor, Tensor, Tensor)",
    fallback=_forward,
    fake=_forward_fake,
    triton="token_logprobs:token_logprobs",
    backward=_autograd,
    setup_context=_setup_context,
)
BACKWARD = define_kernel(
    "token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor logits, Tensor labels, "
    "Tensor norm, Tensor? entropy, float temperature, Tensor? per_token, float? softcap, "
    "Tensor(a!) out) -> ()",
    fallback=_backward,
    fake=lambda *_: None,
    triton="token_logprobs:token_logprobs_backward",
)
register(
    Op(
        "token_logprobs",
        token_logprobs,
        reference,
        (FORWARD, BACKWARD),
        samples,
        workload,
        ({"N": 512, "V": 49152}, {"N": 2048, "V": 49152}, {"N": 512, "V": 151936}),
        bytes_moved,
    )
)
