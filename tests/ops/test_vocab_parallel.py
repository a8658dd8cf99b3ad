"""A head in parts: a vocabulary shared out over a process group, and FSDP2's sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ranks import draw, part_of_the_vocabulary, sharded_head, weighted

import rlhf_fast as rf
from rlhf_fast.ops.linear import vocab_parallel


@pytest.mark.parametrize("splits", [[14, 15], [1, 28], [27, 2]], ids=str)
def test_ranks_with_parts_give_the_numbers_of_the_whole(splits: list[int], tmp_path: Path) -> None:
    """[27, 2]: the last rank's part is nothing but -inf logits."""
    mp.spawn(part_of_the_vocabulary, args=(str(tmp_path), splits), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x = draw()
    down, up, _ = x["lora"]
    logp, entropy = rf.linear_token_logprobs(**x)
    leaves = (x["hidden"], down, x["weight"], x["bias"], up)
    want = torch.autograd.grad(weighted(logp, entropy), leaves)
    for rank in (first, second):
        for got, whole in zip(rank[:5], (logp, entropy, logp, *want[:2]), strict=True):
            torch.testing.assert_close(got, whole.detach(), rtol=1e-9, atol=1e-10)
    for i in range(3):
        parts = torch.cat([first[5 + i], second[5 + i]])
        torch.testing.assert_close(parts, want[2 + i], rtol=1e-9, atol=1e-10)


def test_the_gradient_of_a_part_may_be_written_elsewhere_than_over_its_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1, 5, 29, generator=generator), torch.tensor([[3, 0, -100, 0, 28]])
    elsewhere = torch.tensor([[False, True, False, False, False]])
    _, entropy, norm = torch.ops.rlhf_fast.token_logprobs(
        logits, labels, 1.0, None, None, True, False
    )
    arguments = (*torch.rand(2, 1, 5), logits, labels, norm, entropy, 1.0, None, None)
    apart, before = torch.full_like(logits, torch.nan), logits.clone()
    vocab_parallel.gradient(arguments, elsewhere, apart)
    assert torch.equal(logits, before)
    vocab_parallel.gradient(arguments, elsewhere, logits)
    assert torch.equal(logits, apart)


def test_sharded_weights_get_the_averaged_gradient(tmp_path: Path) -> None:
    """FSDP2 averages gradients over the ranks, so this one is half of the two losses' sum."""
    mp.spawn(sharded_head, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x = draw()
    logp = rf.linear_token_logprobs(
        x["hidden"], x["weight"], x["labels"], bias=x["bias"], temperature=x["temperature"]
    )
    leaves = (x["hidden"], x["weight"], x["bias"])
    d_hidden, *shared = torch.autograd.grad(-logp.sum(), leaves)
    for rank, got in enumerate(ranks):
        torch.testing.assert_close(got[0], logp.detach()[rank::2])
        torch.testing.assert_close(got[1], d_hidden[rank::2])
        for mean, total in zip(got[2:], shared, strict=True):
            torch.testing.assert_close(mean, total / 2)
