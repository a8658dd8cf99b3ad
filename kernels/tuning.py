"""The fastest of a few launch configurations, timed on the first call of each kind.

Only kernels without a sum over threads choose this way: whatever is chosen, they write the same
bits. How the forward kernels group a row's sums decides their last bit, so their tiles are fixed,
and a run repeats itself in another process and on another GPU.

``triton.autotune`` times a kernel on the caller's own tensors. A gradient written over its logits
does not survive that, and a saved copy takes the memory that writing in place is to save; so a
trial here has tensors of its own, 128 MiB for a moment, 192 where the gradient is narrower than
the logits, and do_bench 256 MiB to clear the cache with. On a GPU that has no room for them the
first configuration runs, and so it does in the capture of a CUDA graph, which forbids to wait for
the GPU, unless a call before it has chosen.

Four configurations are four compilations of about a quarter of a second and four timings of about
an eighth: a first call of 1.5 s predicted, not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import triton
from torch import Tensor
from triton import Config

SCRATCH_BYTES = 2**27  # more than an L2 cache holds

_fastest: dict[Hashable, Config] = {}


def fastest(
    configs: list[Config],
    kind: Hashable,
    device: torch.device,
    prepare: Callable[[], Callable[[Config], None]],
) -> Config:
    """The configuration for calls of this kind. ``prepare`` makes a trial's tensors and returns
    what runs one configuration on them."""
    if kind not in _fastest:
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return configs[0]
        try:
            trial = prepare()
            times = [triton.testing.do_bench(lambda c=c: trial(c)) for c in configs]
        except torch.OutOfMemoryError:
            return configs[0]
        _fastest[kind] = configs[times.index(min(times))]
    return _fastest[kind]


def scratch(
    logits: Tensor, out: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows like those of logits: (logits [1, n, V], the same again as out where that has the dtype,
    labels and ones [1, n], norm [2, 1, n]). They lie as the linear engine's do."""
    vocab = logits.shape[2]
    rows = max(1, min(logits[..., 0].numel(), SCRATCH_BYTES // (vocab * logits.element_size())))
    x = logits.new_zeros((1, rows, triton.cdiv(vocab, 16) * 16))
    labels = torch.zeros((1, rows), dtype=torch.int64, device=logits.device)
    ones = torch.ones((1, rows), dtype=wide, device=logits.device)
    zeros = ones.new_zeros((2, 1, rows))
    return x[..., :vocab], x.to(out.dtype)[..., :vocab], labels, ones, zeros
