"""A head in parts: a vocabulary shared out over a process group, and FSDP2's sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ranks import draw, parts_of_the_vocabulary, sharded_head

import rlhf_fast as rf
from rlhf_fast.ops import check
from rlhf_fast.ops.registry import KERNELS


@pytest.mark.long
def test_ranks_with_parts_give_the_numbers_of_the_whole(tmp_path: Path) -> None:
    """Of every linear op; a part of nothing but -inf logits among them, and NaN wherever a row is
    ignored. In two processes, since starting them takes longer than all the sums."""
    mp.spawn(parts_of_the_vocabulary, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("of", ["C++", "PyTorch"])
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("name", ["token_logprobs_backward", "logits_kl_backward"])
def test_a_label_elsewhere_is_no_token_here(name: str, side_by_side: bool, of: str) -> None:
    """The gradient of a part of the vocabulary is that part of the whole's, over the logits too."""
    generator = torch.Generator().manual_seed(0)
    whole, ref = torch.randn(2, 1, 5, 29, generator=generator)
    labels, kept = torch.tensor([[3, 28, -100, 0, 19]]), 20
    g, ones, norm = *torch.rand(2, 1, 5, generator=generator), torch.rand(2, 1, 5)

    def gradient(kernel, part: slice, labels: torch.Tensor, over: bool) -> torch.Tensor:
        logits, other = (x[..., part] for x in (whole, ref))
        if side_by_side:
            logits, other = (x.mT.contiguous().mT for x in (logits, other))
        else:
            logits, other = logits.contiguous(), other.contiguous()
        out = logits if over else torch.full_like(logits, torch.nan)
        if name == "token_logprobs_backward":
            kernel(g, g, logits, labels, norm, ones, 0.7, None, 3.0, out)
        else:
            kernel(g, g, logits, other, labels, norm, norm, ones, 0.7, None, 3.0, True, out)
        return out

    kernel = KERNELS[name].fallback if of == "PyTorch" else getattr(torch.ops.rlhf_fast, name)
    want = gradient(KERNELS[name].fallback, slice(None), labels, False)[..., :kept]
    own = labels.masked_fill(labels >= kept, check.ELSEWHERE)
    for over in (False, True):
        got = gradient(kernel, slice(0, kept), own, over)
        torch.testing.assert_close(got, want)
    if of == "C++":  # any other label out of range is an error
        with pytest.raises(RuntimeError, match="labels: row 1 is -1, outside"):
            gradient(kernel, slice(0, kept), own.clamp(min=-1), False)


@pytest.mark.parametrize("of", ["C++", "PyTorch"])
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("name", ["token_logprobs", "logits_kl"])
def test_a_row_of_nothing_but_minus_infinity_says_so(
    name: str, side_by_side: bool, of: str
) -> None:
    """log Σ e^(z − max) is -inf, by which a part without any probability is known."""
    logits = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = -torch.inf
    logits = logits.mT.contiguous().mT if side_by_side else logits
    kernel = KERNELS[name].fallback if of == "PyTorch" else getattr(torch.ops.rlhf_fast, name)
    labels = torch.tensor([[3, 4, 5]])
    if name == "token_logprobs":
        norms = kernel(logits, labels, 0.7, None, None, True, False)[2:]
    else:
        norms = kernel(logits, logits, labels, 0.7, None, None, True)[3:]
    for largest, log_sum in norms:
        assert log_sum[0, 1] == -torch.inf and (largest[0, 1] < 0)
        assert log_sum[0, ::2].isfinite().all() and largest[0, ::2].isfinite().all()


@pytest.mark.long
def test_sharded_weights_get_the_averaged_gradient(tmp_path: Path) -> None:
    """FSDP2 averages gradients over the ranks, so this one is half of the two losses' sum."""
    mp.spawn(sharded_head, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x = draw()
    logp = rf.linear_token_logprobs(
        x["hidden"], x["weight"], x["labels"], bias=x["bias"], temperature=x["temperature"],
        lora=x["lora"],
    )  # fmt: skip
    leaves = (x["hidden"], x["weight"], x["bias"], *x["lora"][:2])
    d_hidden, *shared = torch.autograd.grad(-logp.sum(), leaves)
    for rank, got in enumerate(ranks):
        torch.testing.assert_close(got[0], logp.detach()[rank::2])
        torch.testing.assert_close(got[1], d_hidden[rank::2])
        for mean, total in zip(got[2:], shared, strict=True):
            torch.testing.assert_close(mean, total / 2)
