"""What one process of a group does in the tests of several: child processes import this file."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from left_exponentials import exactly_as_on_a_gpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rlhf_fast as rf
from rlhf_fast.ops import support as sets
from rlhf_fast.ops.linear import tiles

N, H, R, V = 13, 6, 2, 29


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = 50 + torch.randn(2, 37, generator=generator).double()
    return values, torch.rand(2, 37, generator=generator) > torch.tensor([[0.2], [0.7]])


def gaps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of trainer and rollout, which differ by values around 50."""
    return values - 50, torch.zeros_like(values)


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
    result["weights"], _, stats = rf.rollout_correction(
        *gaps(values), mask, batch_normalize=True, group=group
    )
    result["stats"] = torch.stack(stats)
    assert rf.masked_mean(values, torch.zeros_like(mask), group=group) == 0
    own_group = [dist.new_group([r]) for r in range(2)][rank]
    for function in (rf.masked_mean, rf.masked_whiten):
        of_one = function(values, mask, group=own_group)
        torch.testing.assert_close(of_one, function(values, mask))
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def draw() -> dict:
    """A head as linear_token_logprobs takes it."""
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


LINEAR = ("linear_token_logprobs", "linear_policy_loss", "linear_token_kl")
OF_THE_VOCABULARY = ("weight", "bias", "lora", "ref_weight", "ref_bias", "ref_lora")


def head(op: str, impossible: slice, **options: object) -> dict:
    """Arguments of a linear op. The tokens `impossible` have logits of -inf; what is ignored or
    masked is NaN in every input."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = False) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_(grad)

    possible = torch.ones(V, dtype=torch.bool)
    possible[impossible] = False
    drawn = torch.randint(int(possible.sum()), (1, N), generator=generator)
    labels = possible.nonzero().squeeze(-1)[drawn]
    mask = torch.arange(N) % 4 > 0
    labels[:, :1] = -100

    def bias(**how: bool) -> torch.Tensor:
        return normal(V).masked_fill(~possible, -torch.inf).requires_grad_(**how)

    def row(x: torch.Tensor, **how: bool) -> torch.Tensor:
        x = x.masked_fill(~mask.view(-1, *[1] * (x.dim() - 2)), torch.nan)
        return x.requires_grad_(**how)

    x = {
        "hidden": row(normal(1, N, H)), "weight": (normal(V, H) / 3).requires_grad_(),
        "lora": (normal(R, H, grad=True), normal(V, R, grad=True), 0.7),
        "labels": labels, "bias": bias(),
        "temperature": row(0.5 + normal(1, N).abs()).detach(),
    }  # fmt: skip
    if op == "linear_policy_loss":
        constants = {
            "old_logp": normal(1, N) - 4, "advantages": normal(1, N),
            "importance_weights": normal(1, N).abs(), "ref_logp": normal(1, N) - 4,
        }  # fmt: skip
        x |= {name: row(value).detach() for name, value in constants.items()}
        x |= {"mask": mask[None], "entropy_coef": 0.3, "kl_coef": 0.2}
    else:
        x["labels"] = labels.masked_fill(~mask, -100)
    if op == "linear_token_kl":
        ref = {"ref_hidden": row(normal(1, N, H)).detach(), "ref_weight": normal(V, H)}
        x |= ref | {"ref_bias": bias().detach(), "ref_lora": (normal(R, H), normal(V, R), 0.4)}
    if op == "linear_token_logprobs":
        x["entropy"] = True
    return x | options


def part_of_it(x: dict, part: slice) -> dict:
    """A rank's own arguments: leaves of their own, of the vocabulary its part."""

    def own(y: torch.Tensor, rows: slice) -> torch.Tensor:
        return y.detach()[rows].clone().requires_grad_(y.requires_grad)

    made = dict(x)
    for name in x.keys() & set(OF_THE_VOCABULARY):
        if isinstance(x[name], tuple):
            down, up, scale = x[name]
            made[name] = (own(down, slice(None)), own(up, part), scale)
        elif x[name] is not None:
            made[name] = own(x[name], part)
    return made | {"hidden": own(x["hidden"], slice(None))}


def outputs_and_gradients(function, x: dict) -> list[torch.Tensor]:
    """And the gradients of hidden, A (of all ranks), weight, bias, B (of the vocabulary)."""
    outputs = function(**x)
    outputs = [outputs[0], *outputs[1]] if "mask" in x else list(outputs)
    rows = torch.arange(1.0, N + 1, dtype=torch.float64) % 5  # every fifth has no gradient
    total = sum((y * (rows if y.dim() else 1.0)).sum() for y in outputs if y.requires_grad)
    leaves = (x["hidden"], x["lora"][0], x["weight"], x["bias"], x["lora"][1])
    return [*outputs, *torch.autograd.grad(total, leaves)]


def parts_of_the_vocabulary(rank: int, folder: str) -> None:
    """The linear ops on two ranks give the numbers of the whole, in values and gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=2)  # fmt: skip
    for op in LINEAR:
        print(op, flush=True)  # for one that fails
        parts_in_one_op(rank, op)
        if op != "linear_token_kl":
            exponentials_in_one_op(rank, op)
    dist.destroy_process_group()


def parts_in_one_op(rank: int, op: str) -> None:
    group, function = dist.group.WORLD, getattr(rf, op)

    def check(x: dict, first: int, call=function) -> None:
        part = slice(0, first) if rank == 0 else slice(first, V)
        got = outputs_and_gradients(call, part_of_it(x, part) | {"group": group})
        want = outputs_and_gradients(function, part_of_it(x, slice(None)))
        want[-3:] = (y[part] for y in want[-3:])
        for y, z in zip(got, want, strict=True):
            assert z.isfinite().all()
            torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-10)

    options = {
        "linear_token_logprobs": {"softcap": 4.0, "temperature": 0.7},
        "linear_policy_loss": {"ratio": "sequence", "loss": "cispo"},
        "linear_token_kl": {"direction": "forward", "softcap": 4.0},
    }[op]
    ways = [{}, {"compact": False}, {"deterministic": True}, options]
    for impossible, first in IMPOSSIBLE:
        for how in ways:
            x = head(op, impossible, **how)
            check(x, first)
            with rf.chunk_budget(8 * 14 * 4):  # several chunks, as many on both ranks
                check(x, first)
    for most in (2, V // 2):  # sets made token by token; in a chunk, some of them in one part
        for first, how in ((3, {}), (14, options), (V - 2, {})):
            x = head(op, slice(0, 0), **how)
            draws = torch.Generator().manual_seed(most)
            check(x | {"support": sets.drawn(x["labels"], V, most, draws)}, first)
    if op == "linear_token_kl":
        alone = {"ref_weight": None, "ref_bias": None, "ref_lora": None}
        check(head(op, slice(0, 3), **alone), 3)
    check(head(op, slice(0, 3)), 3, torch.compile(function, fullgraph=True, backend="aot_eager"))
    x = head(op, slice(0, 0))
    own_group = [dist.new_group([r]) for r in range(2)][rank]  # who is not in it has no say
    of_one, single = (outputs_and_gradients(function, x | {"group": g}) for g in (own_group, None))
    torch.testing.assert_close(of_one, single)
    own = part_of_it(x, slice(0, 14) if rank == 0 else slice(14, V)) | {"group": group}
    for bad in (V, -1):
        wrong = x["labels"].clone()
        wrong[0, 2] = bad
        with pytest.raises(ValueError, match=rf"labels\[.*\] is {bad}, outside \[0, {V}\)"):
            function(**own | {"labels": wrong})
    nothing = part_of_it(x, slice(0, V) if rank == 0 else slice(0, 0)) | {"group": group}
    with pytest.raises(ValueError, match="weight must have rows on every rank of group"):
        function(**nothing)
    with (
        pytest.raises(ValueError, match="chunk_budget must be the same on every rank of group"),
        rf.chunk_budget(1000 + rank),
    ):
        function(**own)
    if op != "linear_policy_loss":  # which needs old log-probs, and those of such tokens are -inf
        x = head(op, slice(0, 3))
        part = slice(0, 3) if rank == 0 else slice(3, V)
        cases = [x | {"labels": x["labels"].clamp(max=2)}]  # of p = 0
        if op == "linear_token_kl":  # p = 0 in the part for one of the two alone: inf, or nothing
            finite, other = torch.zeros(V, dtype=torch.float64), {"direction": "forward"}
            for apart in ({"bias": finite}, {"ref_bias": finite}):
                cases += [x | apart, x | apart | other]
        for case in cases:
            both = (function(**y) for y in (part_of_it(case, part) | {"group": group}, case))
            for y, z in zip(*both, strict=True):
                assert not z.isnan().any()
                torch.testing.assert_close(y, z)


def exponentials_in_one_op(rank: int, op: str) -> None:
    """What a forward leaves on a GPU, tile by tile: of parts it is the whole's."""

    def call(**x) -> tuple:
        found = getattr(rf, op)(**x)
        return found if op == "linear_policy_loss" else found[:1]  # the entropy without gradient

    ways = [{}, {"compact": False}, {"softcap": 4.0, "temperature": 0.7}]
    for (impossible, first), how in itertools.product(IMPOSSIBLE, ways):
        x = head(op, impossible, **how)
        x |= {"entropy_coef": 0.0} if op == "linear_policy_loss" else {}
        part = slice(0, first) if rank == 0 else slice(first, V)
        want = outputs_and_gradients(call, part_of_it(x, slice(None)))
        want[-3:] = (y[part] for y in want[-3:])
        with pytest.MonkeyPatch.context() as patch:
            exactly_as_on_a_gpu(patch)
            patch.setattr(tiles, "NARROW", 4)
            patch.setattr(tiles, "STEP", 4)
            patch.setattr(tiles, "MOST", {"cpu": (4 * 5, 5)})
            mine = part_of_it(x, part) | {"group": dist.group.WORLD}
            got = outputs_and_gradients(call, mine)
        for y, z in zip(got, want, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-10)


# (tokens whose logits are -inf, size of the first part): none, some of a part, the one or the other
# part as a whole.
IMPOSSIBLE = [(slice(0, 0), 1), (slice(V - 2, V), 14), (slice(26, V), 26), (slice(0, 3), 3)]


def sharded_head(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    x = draw()
    head = torch.nn.Linear(H, V).double()
    head.down, head.up = torch.nn.Linear(H, R).double(), torch.nn.Linear(R, V).double()
    down, up, scale = x["lora"]
    with torch.no_grad():
        head.weight.copy_(x["weight"])
        head.bias.copy_(x["bias"])
        head.down.weight.copy_(down)
        head.up.weight.copy_(up)
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    own = {name: x[name].detach()[rank::2] for name in ("hidden", "labels", "temperature")}
    own["hidden"].requires_grad_()
    logp = rf.linear_token_logprobs(
        own["hidden"], head.weight, own["labels"], bias=head.bias, temperature=own["temperature"],
        lora=(head.down.weight, head.up.weight, scale),
    )  # fmt: skip
    loss = -logp.sum()
    loss.backward()
    sharded = [x.grad for x in (head.weight, head.bias, head.down.weight, head.up.weight)]
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
    """Runs one after the other, by the configs in a JSON file, under accelerate's launcher."""
    from rlhf_fast.trainer import ppo, reward
    from rlhf_fast.trainer.config import PPOConfig, RewardConfig

    ppo.plot = lambda rows, path: path.touch()  # drawing takes half of the time
    if sharded_by == "fsdp":
        look_at_shards()
    if sharded_by == "deepspeed":
        look_at_moments()
    atexit.register(fail_in_a_group)  # called last, being the first
    with open(file) as runs:
        for config, options in json.load(runs):
            os.environ |= options.get("environment", {})  # as accelerate's launcher sets it
            refused = options.get("refused")
            with (
                broken() if options.get("broken") else contextlib.nullcontext(),
                saying(refused) if refused else contextlib.nullcontext(),
            ):
                if "eval_pairs" in config:
                    reward.train(RewardConfig(**config))
                else:
                    noted = options.get("noted")
                    ppo.train(PPOConfig(**config), given=noting(noted) if noted else None)


@contextlib.contextmanager
def saying(file: str) -> Iterator[None]:
    """The run's error, written down by each process, which then goes on to the next run."""
    from rlhf_fast.trainer.errors import InputError

    with pytest.raises(InputError) as error:
        yield
    with open(f"{file}.{os.environ['RANK']}", "w") as said:
        said.write(str(error.value))


def noting(file: str):
    """Callbacks that write down every event, a file for each process, and differ in what they
    want: the main process's ends the run after step 2, the other's evaluates and saves at once."""
    from transformers import TrainerCallback

    from rlhf_fast.trainer.given import Given

    rank = int(os.environ["RANK"])

    class Notes(TrainerCallback):
        pass

    def on(event: str):
        def note(self, args, state, control, **kwargs):
            with open(f"{file}.{rank}", "a") as notes:
                notes.write(f"{event} {state.global_step}\n")
            if event == "step_end" and rank == 1:
                control.should_evaluate = control.should_save = True
            if event == "step_end" and rank == 0 and state.global_step == 2:
                control.should_training_stop = True

        return note

    events = ("train_begin", "step_begin", "step_end", "log", "evaluate", "save", "train_end")
    for event in events:
        setattr(Notes, f"on_{event}", on(event))
    given = Given()
    given.call(Notes)
    return given


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

    def term(policy, hidden, batch, rows, *arguments, **options):
        if 5 in rows:
            hidden.register_hook(lambda gradient: gradient * float("nan"))
        loss, stats = policy_term(policy, hidden, batch, rows, *arguments, **options)
        return loss + float("nan") if 7 in rows else loss, stats

    ppo.policy_term = term
    try:
        yield
    finally:
        ppo.policy_term = policy_term


if __name__ == "__main__":
    train_each(*sys.argv[1:])
