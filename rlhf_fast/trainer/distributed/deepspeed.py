"""DeepSpeed's ZeRO, stages 1 and 2: each process keeps Adam's moments, and in stage 2 gradients, of
a part of the weights; the weights are whole in all of them.

Asked for by accelerate's config (`distributed_type: DEEPSPEED`), of which `zero_optimization` is
followed: all that DeepSpeed's config may say about learning are options of the trainer. Its engine
owns gradients, clipping and the step; accelerate is not told of it (see workers.py).
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DeepSpeedPlugin
from accelerate.utils import compare_versions, is_deepspeed_available
from torch import Tensor, nn

from rlhf_fast.trainer.config import PPOConfig, RunConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.policy import Policy

OLDEST = "0.19.8"  # the tested one; an older one may not know managed_gradient_accumulation

# Handed on to DeepSpeed: nothing of it changes what is learnt.
FOLLOWED = {
    "zero_optimization", "zero_allow_untested_optimizer", "communication_data_type",
    "wall_clock_breakdown", "steps_per_print", "comms_logger", "dump_state",
}  # fmt: skip

MOMENTS = ("exp_avg", "exp_avg_sq")


def asked_for(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's config, by what `accelerate launch` put into the environment."""
    if not is_deepspeed_available():
        raise InputError("accelerate's config asks for DeepSpeed: pip install deepspeed")
    if compare_versions("deepspeed", "<", OLDEST):
        raise InputError(f"DeepSpeed is too old: pip install 'deepspeed>={OLDEST}'")
    try:
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"accelerate's DeepSpeed config: {reason}") from error
    return engine_config(plugin.deepspeed_config, config)


def switched_on(asked: dict[str, Any], section: str) -> bool:
    return (asked.get(section) or {}).get("enabled") is True


def engine_config(asked: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """What DeepSpeed is given; refuses what is not built, and what contradicts our options."""
    if not isinstance(config, PPOConfig):
        raise InputError(
            "accelerate's DeepSpeed is for `rlhf-fast ppo`: use plain data parallelism"
        )
    zero = asked["zero_optimization"]
    if (stage := zero.get("stage", 0)) not in (1, 2):
        raise InputError(
            f"DeepSpeed's ZeRO stage {stage} is not supported: take stage 1 or 2. To shard "
            "the weights, too, use distributed_type: FSDP with fsdp_version: 2 and "
            "fsdp_reshard_after_forward: true"
        )
    if switched_on(asked, "fp16"):
        raise InputError("fp16 in accelerate's or DeepSpeed's config is not supported: take bf16")
    if switched_on(asked, "bf16") and not config.bf16:
        raise InputError(
            "accelerate's or DeepSpeed's config asks for bf16, but bf16=False: give --bf16, too "
            "(forward passes in bfloat16; the weights stay float32)"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") != "none":
            raise InputError(f"{part} in DeepSpeed's config is not supported: leave it out")
    ours = {
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
        "train_batch_size": ("batch_size/minibatches", config.batch_size // config.minibatches),
        "train_micro_batch_size_per_gpu": ("micro_batch_size", config.micro_batch_size),
        "gradient_accumulation_steps": ("one update a minibatch", 1),
    }
    for name, (option, value) in ours.items():
        if asked.get(name) not in (None, "auto", value):
            raise InputError(
                f"{name}={asked[name]} in DeepSpeed's config contradicts {option}={value}: set it "
                "to auto"
            )
    for name in asked.keys() - ours.keys() - FOLLOWED - {"fp16", "bf16"}:
        raise InputError(
            f"{name} in DeepSpeed's config is not supported: leave it out (the optimizer and all "
            "else about learning are options of rlhf-fast)"
        )
    return {name: value for name, value in asked.items() if name in FOLLOWED} | {
        # "auto" is for a Trainer to fill in; there is no offload; clipping needs the norm
        "zero_optimization": {
            name: value
            for name, value in zero.items()
            if value != "auto" and not name.startswith("offload_")
        },
        "gradient_clipping": config.max_grad_norm,
        "train_micro_batch_size_per_gpu": 1,  # an engine must be told, and uses it for its logs
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # gradients add up until the step
    }


class ZeroStepper:
    """A Stepper that runs DeepSpeed's engine, and shows its optimizer as one of whole weights."""

    def __init__(self, policy: Policy, adam: torch.optim.AdamW, config: dict[str, Any]) -> None:
        on_cpu = policy.model.device.type == "cpu"
        if on_cpu:  # DeepSpeed itself takes a GPU wherever there is one
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        if on_cpu:  # else it compiles an operation for a minute that only its inference uses
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        parts = [policy.model, policy.value_body, policy.value_head]
        learner = nn.ModuleList(part for part in parts if part is not None)
        self.processes = dist.get_world_size()
        # DeepSpeed puts flat parts of the weights into the optimizer's groups.
        weights = [p for group in adam.param_groups for p in group["params"]]
        groups = adam.state_dict()["param_groups"]
        self.engine, zero, *_ = deepspeed.initialize(model=learner, optimizer=adam, config=config)
        self.optimizer = WholeOptimizer(zero, weights, groups)

    def backward(self, loss: Tensor) -> None:
        # The engine averages over the processes; our losses are parts of a sum.
        self.engine.backward(loss * self.processes)

    def drop(self) -> None:
        zero = self.engine.optimizer
        zero.zero_grad()
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            kept.clear()

    def step(self, loss: Tensor) -> tuple[Tensor, bool]:
        if not torch.isfinite(loss):
            self.drop()
            return loss, False
        self.engine.step()  # makes no update where the norm is not finite
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=loss.device)
        return norm, self.engine.was_step_applied()


class WholeOptimizer:
    """DeepSpeed's optimizer as a checkpoint has it: Adam's moments by weight, as without DeepSpeed.

    So a run goes on with any number of processes, and with any way of sharding or none.
    """

    def __init__(self, zero: Any, weights: list[Tensor], groups: list[dict[str, Any]]) -> None:
        self.zero, self.weights, self.groups = zero, weights, groups
        self.param_groups = [{"params": weights}]
        adam = zero.optimizer
        self.states = []
        for flat in [p for group in adam.param_groups for p in group["params"]]:
            adam.state[flat] = {"step": torch.zeros((), device=flat.device)}
            adam.state[flat] |= {name: torch.zeros_like(flat) for name in MOMENTS}
            self.states.append(adam.state[flat])
        # Left to itself, DeepSpeed does this after the update of the first group, for that alone.
        zero._lazy_init_hp_params_optimizer_state()

    def state_dict(self) -> dict[str, Any]:
        """All processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for i, p in enumerate(self.weights):
            moments = {name: safe_get_full_optimizer_state(p, name).cpu() for name in MOMENTS}
            step = self.states[0]["step"].to("cpu", copy=True)  # one each, or all count them all
            state[i] = {"step": step} | moments
        return {"state": state, "param_groups": self.groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """After the weights have been loaded: of them, too, DeepSpeed keeps parts of its own."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.zero.refresh_fp32_params()
        for i, moments in saved["state"].items():  # none before the first update
            for name in MOMENTS:
                whole = moments[name].to(self.weights[i].device)
                safe_set_full_optimizer_state(self.weights[i], whole, name)
            for state in self.states:
                state["step"].copy_(moments["step"])
