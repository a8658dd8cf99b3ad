"""Statistics over a process group: two gloo processes give the numbers of one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rlhf_fast as rf


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = 50 + torch.randn(2, 37, generator=generator).double()
    return values, torch.rand(2, 37, generator=generator) > torch.tensor([[0.2], [0.7]])


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=2)  # fmt: skip
    group = dist.group.WORLD
    values, mask = (x[rank] for x in halves())
    values.requires_grad_()
    mean = rf.masked_mean(values, mask, group=group)
    (gradient,) = torch.autograd.grad(mean, values)
    result = {
        "mean": mean.detach(),
        "gradient": gradient,
        "white": rf.masked_whiten(values, mask, group=group),
        "kept": rf.masked_whiten(values, mask, shift_mean=False, group=group),
        "empty": rf.masked_whiten(values, torch.zeros_like(mask), group=group),
    }
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
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
    for rank in ranks:
        torch.testing.assert_close(rank["mean"], mean.detach())
    for name, want in whole.items():
        torch.testing.assert_close(torch.stack([rank[name] for rank in ranks]), want)
