"""A head in parts: a vocabulary shared out over a process group, and FSDP2's sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rlhf_fast as rf

N, H, R, V = 13, 6, 2, 29


def draw() -> dict:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::4] = -100

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    bias = normal(V).detach()
    bias[-3:] = -torch.inf  # a padded vocabulary
    labels[1] = V - 4
    return {
        "hidden": normal(N, H), "weight": normal(V, H), "labels": labels,
        "bias": bias.requires_grad_(), "lora": (normal(R, H), normal(V, R), 0.7),
        "temperature": 0.5 + torch.rand(N, generator=generator, dtype=torch.float64),
        "softcap": 4.0, "entropy": True,
    }  # fmt: skip


def weighted(logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(N, dtype=torch.float64) % 3  # every third row has no gradient
    return (rows * (logp + 0.3 * entropy)).sum()


def one_rank(rank: int, folder: str, splits: list[int]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(splits)
    )
    x = draw()
    part = slice(sum(splits[:rank]), sum(splits[: rank + 1]))
    own = {name: x[name].detach()[part].clone().requires_grad_() for name in ("weight", "bias")}
    down, up, scale = x["lora"]
    own["lora"] = (down, up.detach()[part].clone().requires_grad_(), scale)
    group = dist.group.WORLD
    logp, entropy = rf.linear_token_logprobs(**x | own, group=group)
    alone = rf.linear_token_logprobs(**x | own | {"entropy": False}, group=group)
    leaves = (x["hidden"], down, own["weight"], own["bias"], own["lora"][1])
    grads = torch.autograd.grad(weighted(logp, entropy), leaves)
    errors = []
    for bad in (V, -1):
        wrong = x["labels"].clone()
        wrong[2] = bad
        with pytest.raises(ValueError, match=rf"labels\[2\] is {bad}, outside \[0, {V}\)"):
            rf.linear_token_logprobs(**x | own | {"labels": wrong}, group=group)
        errors.append(bad)
    with pytest.raises(ValueError, match="weight must have rows on every rank"):
        rf.linear_token_logprobs(
            x["hidden"], x["weight"][: V * (1 - rank)], x["labels"], group=group
        )
    torch.save([logp, entropy, alone, *grads], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("splits", [[14, 15], [1, 28], [27, 2]], ids=str)
def test_ranks_with_parts_give_the_numbers_of_the_whole(splits: list[int], tmp_path: Path) -> None:
    """[27, 2]: the last rank's part is nothing but -inf logits."""
    mp.spawn(one_rank, args=(str(tmp_path), splits), nprocs=2)
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


def one_fsdp_rank(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    x = draw()
    head = torch.nn.Linear(H, V).double()
    with torch.no_grad():
        head.weight.copy_(x["weight"])
        head.bias.copy_(x["bias"])
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    own = {name: x[name].detach()[rank::2] for name in ("hidden", "labels", "temperature")}
    own["hidden"].requires_grad_()
    logp = rf.linear_token_logprobs(
        own["hidden"], head.weight, own["labels"], bias=head.bias, temperature=own["temperature"]
    )
    loss = -logp.sum()
    loss.backward()
    sharded = [head.weight.grad, head.bias.grad]
    assert all(type(grad).__name__ == "DTensor" for grad in sharded)
    with pytest.raises(TypeError, match="hidden must be this rank's own tensor, got a DTensor"):
        rf.linear_token_logprobs(head.weight, head.weight, torch.zeros(V, dtype=torch.int64))
    torch.save(
        [logp, own["hidden"].grad, *(g.full_tensor() for g in sharded)], f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def test_sharded_weights_get_the_averaged_gradient(tmp_path: Path) -> None:
    """FSDP2 averages gradients over the ranks, so this one is half of the two losses' sum."""
    mp.spawn(one_fsdp_rank, args=(str(tmp_path),), nprocs=2)
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
