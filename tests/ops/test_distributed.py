"""Statistics over a process group: two gloo processes give the numbers of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ranks import gaps, halves, masked_statistics

import rlhf_fast as rf


@pytest.mark.long
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    mp.spawn(masked_statistics, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    values, mask = halves()
    values.requires_grad_()
    mean = rf.masked_mean(values, mask)
    (gradient,) = torch.autograd.grad(mean, values)
    whole = {
        "gradient": gradient,
        "white": rf.masked_whiten(values, mask),
        "kept": rf.masked_whiten(values, mask, shift_mean=False),
        "empty": torch.zeros_like(values.detach()),
    }
    whole["weights"], _, stats = rf.rollout_correction(*gaps(values), mask, batch_normalize=True)
    for rank in ranks:
        torch.testing.assert_close(rank["mean"], mean.detach())
        torch.testing.assert_close(rank["stats"], torch.stack(stats))
    for name, want in whole.items():
        torch.testing.assert_close(torch.stack([rank[name] for rank in ranks]), want)
