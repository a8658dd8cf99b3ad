"""What one process of a group does in the tests of several: child processes import this file."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rlhf_fast as rf
from rlhf_fast.ops.linear import chunks as linear

N, H, R, V = 13, 6, 2, 29


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = 50 + torch.randn(2, 37, generator=generator).double()
    return values, torch.rand(2, 37, generator=generator) > torch.tensor([[0.2], [0.7]])


def masked_statistics(rank: int, folder: str) -> None:
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
    assert rf.masked_mean(values, torch.zeros_like(mask), group=group) == 0
    own_group = [dist.new_group([r]) for r in range(2)][rank]
    for function in (rf.masked_mean, rf.masked_whiten):
        of_one = function(values, mask, group=own_group)
        torch.testing.assert_close(of_one, function(values, mask))
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


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
    rows = torch.arange(N, dtype=torch.float64) % 4  # every fourth row has no gradient
    return (rows * (logp + 0.3 * entropy)).sum()


def part_of_the_vocabulary(rank: int, folder: str, splits: list[int]) -> None:
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
    found, left_by = [], linear.left_by
    linear.left_by = lambda *x: found.append(left_by(*x)) or found[0]
    leaves = (x["hidden"], down, own["weight"], own["bias"], own["lora"][1])
    grads = torch.autograd.grad(weighted(logp, entropy), leaves)
    assert found[0] is not None  # the chunk that the forward left
    linear.left_by = left_by
    alone = rf.linear_token_logprobs(**x | own | {"entropy": False}, group=group)
    own_group = [dist.new_group([r]) for r in range(len(splits))][rank]
    of_one = rf.linear_token_logprobs(**x, group=own_group)  # who is not in the group has no say
    single = rf.linear_token_logprobs(**x)
    both = [(*y, *torch.autograd.grad(weighted(*y), x["hidden"])) for y in (of_one, single)]
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want)
    how, chunks = [], linear.chunks

    def noted(*args, compact, deterministic, **rest):
        how.append((compact, deterministic))
        return chunks(*args, compact=compact, deterministic=deterministic, **rest)

    linear.chunks = noted
    options = {"temperature": 0.7, "compact": False, "deterministic": True}
    parts = rf.linear_token_logprobs(**x | own | options, group=group)
    whole = rf.linear_token_logprobs(**x | options)
    both = [(*y, *torch.autograd.grad(y[1].sum(), x["hidden"])) for y in (parts, whole)]
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want)
    assert how == [(False, True)] * 4  # forward and backward of both
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


def sharded_head(rank: int, folder: str) -> None:
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
    # FSDP2 keeps the group's threads alive after destroy_process_group, and one that drops the last
    # collective's tensors while the interpreter is taken down aborts (pytorch/pytorch#190489).
    os._exit(0)


def fail_in_a_group() -> None:
    """A process that ends with a live group may abort."""
    if dist.is_initialized():
        os._exit(1)


def train_each(sharded_by: str, file: str) -> None:
    """PPO runs one after the other, by the configs in a JSON file, under accelerate's."""
    from rlhf_fast.trainer import ppo
    from rlhf_fast.trainer.config import PPOConfig

    look_at_shards() if sharded_by == "fsdp" else look_at_moments()
    atexit.register(fail_in_a_group)  # called last, being the first
    with open(file) as runs:
        for config, options in json.load(runs):
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(options.get("stage"))
            with broken() if options.get("broken") else contextlib.nullcontext():
                ppo.train(PPOConfig(**config))


def look_at_shards() -> None:
    """Half of every weight must lie in this process."""
    from rlhf_fast.trainer.distributed.workers import Workers

    shard = Workers.shard

    def shard_and_look(self, policy) -> None:
        shard(self, policy)
        weights = {*policy.model.parameters(), *policy.trained().values()}
        if policy.reference_model is not None:
            weights |= {*policy.reference_model.parameters()}
        held = sum(p.to_local().numel() for p in weights)
        assert held < 0.51 * sum(p.numel() for p in weights)

    Workers.shard = shard_and_look


def look_at_moments() -> None:
    """Half of Adam's moments must lie in this process."""
    from rlhf_fast.trainer.distributed.workers import Workers

    stepper = Workers.stepper

    def stepper_and_look(self, policy, adam, max_norm):
        made = stepper(self, policy, adam, max_norm)
        held = sum(state["exp_avg"].numel() for state in adam.state.values())
        assert held < 0.51 * sum(p.numel() for p in policy.trained().values()) + 8  # padding
        return made

    Workers.stepper = stepper_and_look


@contextlib.contextmanager
def broken() -> Iterator[None]:
    """Row 5 of every batch has a gradient of NaN, row 7 a loss of NaN with a finite gradient."""
    from rlhf_fast.trainer import ppo

    policy_term = ppo.policy_term

    def term(policy, hidden, rollout, old, advantages, rows, *arguments, **options):
        if 5 in rows:
            hidden.register_hook(lambda gradient: gradient * float("nan"))
        loss, stats = policy_term(
            policy, hidden, rollout, old, advantages, rows, *arguments, **options
        )
        return loss + float("nan") if 7 in rows else loss, stats

    ppo.policy_term = term
    try:
        yield
    finally:
        ppo.policy_term = policy_term


if __name__ == "__main__":
    train_each(*sys.argv[1:])
