"""The masks of tokens that keep their policy gradient, by hand; beside TRL's in its own test."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast as rf

NAN = torch.nan


def test_the_top_share_by_hand() -> None:
    entropy = torch.tensor([[2.0, 0.0, NAN], [3.0, 1.0, 4.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def kept(share: float) -> list[float]:
        return sorted(entropy[rf.top_entropy_mask(entropy, mask, share)].tolist())

    assert kept(0.0) == [4.0]
    assert kept(0.2) == [4.0]  # the quantile is 3.2
    assert kept(0.3) == [3.0, 4.0]  # 2.8
    assert kept(0.5) == [2.0, 3.0, 4.0]  # 2
    assert kept(1.0) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_top_share_of_a_batch_in_parts() -> None:
    entropy, mask = torch.rand(6, 9), torch.rand(6, 9) > 0.3
    whole = rf.top_entropy_mask(entropy, mask, 0.25)
    every = entropy[mask]
    parts = [
        rf.top_entropy_mask(entropy[i : i + 2], mask[i : i + 2], 0.25, all_entropies=every)
        for i in (0, 2, 4)
    ]
    assert torch.equal(torch.cat(parts), whole)
    alone = [rf.top_entropy_mask(entropy[i : i + 2], mask[i : i + 2], 0.25) for i in (0, 2, 4)]
    assert not torch.equal(torch.cat(alone), whole)


def test_entropies_that_are_no_tensor() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(TypeError, match="all_entropies must be a tensor, got list"):
        rf.top_entropy_mask(x, x > 0.5, 0.5, all_entropies=[0.1, 0.2])  # type: ignore[arg-type]


def test_nothing_counts() -> None:
    x, mask = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    assert not rf.top_entropy_mask(x, mask, 0.5).any()
    assert not rf.off_policy_mask(x, x, x, mask, 0.5).any()
    assert not rf.covariance_mask(x, x, x, mask).any()


def test_off_policy_by_hand() -> None:
    """Rows that moved by .3 and by .1 nats a token; the third token is masked."""
    logp = torch.tensor([[-1.0, -1.0, NAN], [-1.0, -1.0, NAN]])
    old = logp + torch.tensor([[0.6, 0.0, 9.0], [0.3, -0.1, 9.0]])
    A = torch.tensor([[-1.0, 2.0, -1.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False]]).expand(2, 3)
    kept = rf.off_policy_mask(logp, old, A, mask, 0.2)
    assert kept.tolist() == [[False, True, False], [True, True, False]]
    assert rf.off_policy_mask(old, logp, A, mask, 0.2).equal(mask)  # nearer now than then


def test_covariance_by_hand() -> None:
    """Means of 0: the products are 4, 0, 1.5, 0.25 and what is masked; what is clipped stays."""
    logp = torch.tensor([[2.0, 0.0, -1.5, -0.5, NAN]]) - 3
    A = torch.tensor([[2.0, -0.5, -1.0, -0.5, NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    kept = rf.covariance_mask(logp, logp, A, mask, low=1.0, high=5.0, share=1.0)
    assert kept.tolist() == [[False, True, False, True, False]]
    kept = rf.covariance_mask(logp, logp, A, mask, low=1.0, high=4.0, share=1.0)
    assert kept.tolist() == [[True, True, False, True, False]]
    one = rf.covariance_mask(logp, logp, A, mask)  # at least one is drawn
    assert one.sum() == 3 and one[0, 1] and one[0, 3]
    old = logp - torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.0]])  # its ratio is 1.6, and A > 0
    kept = rf.covariance_mask(logp, old, A, mask, share=1.0)
    assert kept.tolist() == [[True, True, False, True, False]]
