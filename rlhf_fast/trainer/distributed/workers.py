"""Several processes, each with a share of every batch: data parallelism through accelerate.

    accelerate launch --multi_gpu --num_processes 2 -m rlhf_fast.trainer.cli ppo …  # whole models
    accelerate launch --config_file fsdp.yaml -m rlhf_fast.trainer.cli ppo …  # shards: fsdp.py
    accelerate launch --config_file zero.yaml -m rlhf_fast.trainer.cli ppo …  # ZeRO: deepspeed.py

`--multi_gpu` makes accelerate start torch's launcher, and is right on a machine of CPUs, too: with
`--cpu`, or a config of `distributed_type: MULTI_CPU`, accelerate 1.15 starts one process unless
it is given an MPI hostfile. (`torchrun --nproc_per_node 2 -m rlhf_fast.trainer.cli ppo …` does the
same.)
Where there is no GPU the processes take CPUs and gloo; where there is, `--device cpu` does that.

Each process samples, scores and measures its share of a batch. Then all gather it, so that every
process knows the whole batch and computes the same advantages, normalizers and minibatches; of a
minibatch each takes an equal share, and the gradients are *summed*, since every loss is divided by
the count of the whole minibatch already. So the numbers are those of one process, to rounding.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedType,
    disable_fsdp_ram_efficient_loading,
    gather_object,
    patch_environment,
)
from rich.markup import escape
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.distributed.deepspeed import ZeroStepper, asked_for
from rlhf_fast.trainer.distributed.fsdp import Sharder, check
from rlhf_fast.trainer.errors import Ended, InputError
from rlhf_fast.trainer.models.loading import pick_device
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.run.completions import log_table
from rlhf_fast.trainer.run.console import console
from rlhf_fast.trainer.update import Stepper

SUPPORTED = {
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU, DistributedType.FSDP,
}  # fmt: skip

# What `accelerate launch` sets for a config. On CPUs accelerate would ignore them in silence.
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def switched_on(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


class Workers:
    def __init__(self, config: RunConfig) -> None:
        for asked, name in REFUSED.items():
            if switched_on(asked):
                raise InputError(
                    f"accelerate's config asks for {name}, which is not supported. To shard, use "
                    "distributed_type: FSDP with fsdp_version: 2 (fsdp_reshard_after_forward false "
                    "is like ZeRO-2, true like ZeRO-3)"
                )
        # Each process reads the models by itself: a reward model is not sharded, and must be whole.
        disable_fsdp_ram_efficient_loading()
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if not alone and config.device not in ("auto", "cpu"):
            raise InputError(
                f"device={config.device}: each of several processes takes a device of its own; "
                "leave device=auto, or set cpu"
            )
        self.device = pick_device(config.device) if alone else None
        # accelerate takes CPUs only when told to, even where there is nothing else.
        cpu = (self.device.type if alone else config.device) == "cpu"
        cpu = cpu or not torch.accelerator.is_available()
        # The engine is ours to make (deepspeed.py). Accelerate would ignore it on CPUs; on GPUs it
        # would have transformers cut up every model that is loaded, where the config asks for
        # stage 3.
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
            self.accelerator = Accelerator(
                cpu=cpu, log_with=tracker_names(config) or None, project_dir=config.output_dir
            )
        if self.accelerator.distributed_type not in SUPPORTED:
            raise InputError(
                f"accelerate's distributed_type={self.accelerator.distributed_type.value} is not "
                "supported: launch with plain data parallelism or FSDP"
            )
        self.device = self.device or self.accelerator.device
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        if self.size > 1:
            # A script may train twice, so the group lives as long as the process; one that is still
            # there while the interpreter is taken down can abort (pytorch/pytorch#190489).
            atexit.register(self.accelerator.state.destroy_process_group)
        if config.batch_size % self.size:
            raise InputError(
                f"batch_size={config.batch_size} cannot be shared by {self.size} processes"
            )
        self.sharder = None
        if switched_on("ACCELERATE_USE_FSDP") and self.size > 1:
            # From the same environment as the Accelerator's, which keeps none for CPUs.
            plugin = FullyShardedDataParallelPlugin()
            if self.accelerator.mixed_precision != "no":
                plugin.set_mixed_precision(self.accelerator.mixed_precision)
            check(plugin, config)
            self.sharder = Sharder(plugin, self.device)
        self.zero = None
        if switched_on("ACCELERATE_USE_DEEPSPEED") and self.size > 1:
            self.zero = asked_for(config)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharing(self) -> str:
        """What each process has a part of, beside the batch, in words."""
        if self.sharder is not None:
            return " and all weights (FSDP2)"
        if self.zero is not None:
            return f" and Adam's moments (ZeRO-{self.zero['zero_optimization']['stage']})"
        return ""

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def shard(self, policy: Policy) -> None:
        """Policy, critic and reference, in place, if accelerate's config asks for FSDP."""
        if self.sharder is None:
            return
        # What is computed outside FSDP's modules, the losses, has their precision.
        policy.bf16 |= self.sharder.precision.param_dtype == torch.bfloat16
        policy.exact_decoding = False  # the head's weight is whole only after a pass of the body
        policy.body = self.sharder.body_with_head(policy.body, policy.model.base_model, policy.head)
        if (reference := policy.reference_model) is not None:
            policy.reference_model = self.sharder.body_with_head(
                reference, reference, policy.reference_head
            )
        if policy.value_body is not None:
            self.sharder.body(policy.value_body)
        if policy.value_head is not None:
            self.sharder.unit(policy.value_head, reshard_after_forward=True)
        # FSDP learns what its root is from the first call, and decoding calls what is inside it.
        with torch.no_grad():
            tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            policy.body(tokens, use_cache=False)
        policy.body.drop_whole()

    def stepper(
        self, policy: Policy, optimizer: torch.optim.AdamW, max_norm: float
    ) -> Stepper | ZeroStepper:
        if self.zero is not None:
            return ZeroStepper(policy, optimizer, self.zero)
        return Stepper(policy.trained().values(), optimizer, max_norm, self.sum)

    def in_step(self, passes: Sequence[Tensor], *, idle: Tensor) -> list[tuple[Tensor, bool]]:
        """(rows, whether they count) of each of this process's passes over a minibatch.

        Sharded weights are gathered, and ZeRO's gradients reduced, by all processes together, so
        one that has fewer passes than another makes up for them with `idle` rows that do not count.
        """
        together = self.sharder is not None or self.zero is not None
        missing = self.largest(len(passes)) - len(passes) if together else 0
        return [(rows, True) for rows in passes] + [(idle, False)] * missing

    def share(self, size: int) -> slice:
        """This process's rows of a batch."""
        return slice(self.rank * size // self.size, (self.rank + 1) * size // self.size)

    def gather(self, rows: Tensor) -> Tensor:
        """Each process's rows [b, …] -> all rows [B, …], in the batch's order."""
        return rows if self.size == 1 else self.accelerator.gather(rows.contiguous())

    def largest(self, number: int) -> int:
        return number if self.size == 1 else max(gather_object([number]))

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sums over the processes, in place; a shard is of a sum already."""
        if self.size > 1:
            plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
            for handle in [dist.all_reduce(tensor, async_op=True) for tensor in plain]:
                handle.wait()

    def agreed(self, number: int, what: str) -> int:
        """number, if all processes have the same: they must see the same folder."""
        numbers = [number] if self.size == 1 else gather_object([number])
        if len(set(numbers)) > 1:
            raise InputError(
                f"processes differ in the {what} ({numbers}): output_dir must be shared"
            )
        return number

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside in one process ends all of them with its error.

        Alone, the process that failed would leave the others waiting.
        """
        if self.size == 1:
            yield
            return
        failure = None
        try:
            yield
        except Ended:  # a signal's
            raise
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            failure = InputError(f"{kind}{error} (in process {self.rank})")
        for error in gather_object([failure]):
            if error is not None:
                raise error

    @contextmanager
    def in_turns(self, items: Iterator[Any]) -> Iterator[Iterator[Any]]:
        """Items that under FSDP all processes must make together, as whole weights are: a use that
        ends early in one of them, or fails there, does not leave the others waiting."""
        if self.sharder is None:
            yield items
            return
        turns = Turns(items, self.largest)
        try:
            yield turns
        except Ended:  # a signal's
            raise
        except (Exception, SystemExit):
            turns.sit_out()
            raise
        turns.sit_out()

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What action returns in each process; if it fails in one, all raise its error."""
        with self.together():
            outcome = action(*arguments)
        return [outcome] if self.size == 1 else gather_object([outcome])

    def main_only(self, action: Callable[[], Any]) -> Any:
        """action's result, computed by the main process, known to all."""
        return self.attempt(lambda: action() if self.is_main else None)[0]

    # ---------------------------------------------------------------------------- trackers

    def start_trackers(self, name: str, config: dict[str, Any]) -> None:
        """name: the run's, in the project $WANDB_PROJECT, or rlhf_fast."""
        # TensorBoard takes numbers and text only. What is unset stays out: as the text "None" it
        # would make text of what is a number in the run beside it.
        plain = {
            k: v if isinstance(v, int | float | str) else str(v)
            for k, v in config.items()
            if v is not None
        }
        project = os.environ.get("WANDB_PROJECT", "rlhf_fast")
        names = {"wandb": {"name": name}}
        try:
            self.accelerator.init_trackers(project, config=plain, init_kwargs=names)
        except Exception as error:  # whatever a tracker raises: no key, no server, …
            reason = " ".join(str(error).split())
            raise InputError(f"report_to={config['report_to']} cannot start: {reason}") from error

    def log(self, row: dict[str, float]) -> None:
        self.track(lambda: self.accelerator.log(row, step=row["step"]))

    def log_answers(self, step: int, answers: dict[str, list]) -> None:
        for tracker in self.accelerator.trackers:
            self.track(lambda tracker=tracker: log_table(tracker, step, answers))

    def track(self, action: Callable[[], Any]) -> None:
        """A tracker that fails, its server gone perhaps, must not cost the run: metrics.jsonl has
        all that it would have shown."""
        try:
            action()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warning = f"a tracker failed, the run goes on without: {escape(reason)}"
            console.print(f"[bold yellow]{warning}[/]")
            self.accelerator.trackers = []

    def end(self) -> None:
        for tracker in self.accelerator.trackers:
            self.track(tracker.finish)


class Turns:
    """An iterator that is there in every process: an item is made if any of them asks for it, and
    those that do not help to make it."""

    def __init__(self, items: Iterator[Any], largest: Callable[[int], int]) -> None:
        self.items, self.largest, self.over = items, largest, False

    def __iter__(self) -> Turns:
        return self

    def __next__(self) -> Any:
        return self.turn(asks=True)

    def sit_out(self) -> None:
        """Until nobody asks any more, or there are no more items."""
        while not self.over:
            with suppress(StopIteration):
                self.turn(asks=False)

    def turn(self, *, asks: bool) -> Any:
        if self.over or not self.largest(int(asks)):
            self.over = True
            raise StopIteration
        try:
            return next(self.items)
        except StopIteration:
            self.over = True
            raise


def tracker_names(config: RunConfig) -> list[str]:
    names = [name.strip() for name in (config.report_to or "").split(",") if name.strip()]
    installed = {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise InputError(f"report_to={name}: expected one of {known}")
        if name not in installed:
            raise InputError(f"report_to={name}: it is not installed (pip install {name})")
    return names
