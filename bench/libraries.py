"""What other libraries have that is like an op of ours, with the op's arguments and outputs.

A function here may return fewer outputs than the op (None, or left out at the end): what it returns
is checked, and the table says what is missing. Imports wait for the first call of ``function_for``,
so that a library that is absent, or not for this device, costs its cells and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import policy_loss

from . import cases, foreign

Function = Callable[..., Any]


def gpu_only(x: Tensor) -> None:
    if x.device.type == "cpu":
        raise foreign.NotHere("runs on GPUs only")


def with_plain_loss(logprobs: Function) -> Function:
    """A library's fused head, then the PPO loss in plain PyTorch: how its users write PPO."""

    def loss(
        hidden: Tensor, weight: Tensor, labels: Tensor, old_logp: Tensor, advantages: Tensor,
        mask: Tensor, *, entropy_coef: float = 0.0,
    ) -> Tensor:  # fmt: skip
        found = logprobs(hidden, weight, labels, entropy=bool(entropy_coef))
        logp, entropy = found if entropy_coef else (found, None)
        return policy_loss.reference(
            logp, old_logp, advantages, mask, entropy=entropy, entropy_coef=entropy_coef
        )[0]

    return loss


def counting(hidden: Tensor, labels: Tensor, logprobs: Function) -> Any:
    """Labels of -100 to 0, and zeros in the results there: for libraries that ignore no label."""
    ignored = labels < 0
    found = logprobs(labels.clamp(min=0))
    zeroed = [x.masked_fill(ignored, 0.0) for x in (found if isinstance(found, tuple) else [found])]
    return tuple(zeroed) if len(zeroed) > 1 else zeroed[0]


# ---------------------------------------------------------------------------------------- PyTorch


def torch_linear(hidden: Tensor, weight: Tensor, labels: Tensor, *, entropy: bool) -> Tensor:
    """F.linear_cross_entropy; its chunked options reduce to a mean, so the plain form it is."""
    assert not entropy
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none")


# ------------------------------------------------------------------------------------------- TRL


def trl() -> ModuleType:
    library = foreign.load("trl.trainer.utils")
    if not hasattr(library, "selective_log_softmax_and_entropy"):  # as the TRL with a PPOTrainer
        raise foreign.NotHere(foreign.NOT_INSTALLED)
    return library


def trl_logits() -> Function:
    library = trl()

    def logprobs(logits: Tensor, labels: Tensor, *, entropy: bool) -> Any:
        if entropy:
            return library.selective_log_softmax_and_entropy(logits, labels)
        return library.selective_log_softmax(logits, labels)

    return logprobs


def trl_linear() -> Function:
    """What its fused language-model head calls, with the chunk size it calls it with."""
    library = trl()

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, entropy: bool) -> Any:
        outputs = ("entropy",) if entropy else ()

        def all_rows(labels: Tensor) -> Any:
            found = library._ChunkedLogProbFunction.apply(
                hidden, weight, None, labels, 1.0, library._CHUNKED_LOGPROB_CHUNK_SIZE,
                None, 1.0, outputs,
            )  # fmt: skip
            return found[:2] if entropy else found[0]

        return counting(hidden, labels, all_rows)

    return logprobs


def trl_preference_loss(loss: str) -> Function:
    """As its trainers compute it: DPO's and KTO's by its fused head, with arithmetic that is no
    function of its own; CPO's (SimPO) and ORPO's by its loss functions on log-probs of all logits.
    """
    library = trl()
    head = trl_linear()
    if loss in ("simpo", "orpo"):
        name = "cpo" if loss == "simpo" else "orpo"
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        module = foreign.load(f"trl.experimental.{name}.{name}_trainer")

    def of_answers(
        hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, ref_hidden: Tensor,
        ref_weight: Tensor,
    ) -> Any:  # fmt: skip
        if loss in ("dpo", "kto"):
            logp = head(hidden, weight, labels, entropy=False).view(mask.shape)
            with torch.no_grad():
                ref = head(ref_hidden, ref_weight, labels, entropy=False).view(mask.shape)
            return cases.plain_preference(loss, logp, mask, ref)[0]
        logits = hidden @ weight.T
        logp = library.selective_log_softmax(logits, labels.clamp(min=0)).view(mask.shape) * mask
        chosen, rejected = (logp.sum(1) / mask.sum(1)).chunk(2)
        where = SimpleNamespace(device=hidden.device)
        if loss == "simpo":
            them = SimpleNamespace(
                accelerator=where, alpha=0.0, beta=0.1, label_smoothing=0.0, loss_type="simpo",
                simpo_gamma=0.0,
            )  # fmt: skip
            return module.CPOTrainer.cpo_loss(them, chosen, rejected)[0].mean()
        them = SimpleNamespace(accelerator=where, beta=0.1)
        better = len(labels) // 2
        nll = torch.nn.functional.cross_entropy(logits[:better], labels[:better])
        return nll - module.ORPOTrainer.odds_ratio_loss(them, chosen, rejected)[0].mean()

    return of_answers


# ----------------------------------------------------------------------------------------- Liger


def liger_linear() -> Function:
    """Scaled cross-entropy: CuTe kernels on Hopper, elsewhere a loop over 512 rows in PyTorch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as ScaledCrossEntropy,
    )

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, entropy: bool) -> Any:
        found = ScaledCrossEntropy.apply(hidden, weight, labels, 1.0, -100, 1, entropy)
        return (-found[0], found[1]) if entropy else -found

    return logprobs


def liger_policy_loss() -> Function:
    """Its GRPO loss, with each row a sequence of one token (its advantages are per sequence) and
    512 of them a chunk, the size of its other loops."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=0.2, epsilon_high=0.2, loss_type="bnpo", use_ref_model=False,
        chunk_size=512,
    )  # fmt: skip

    def loss(
        hidden: Tensor, weight: Tensor, labels: Tensor, old_logp: Tensor, advantages: Tensor,
        mask: Tensor, *, entropy_coef: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert not entropy_coef
        return grpo(
            hidden[:, None], weight, labels[:, None], mask[:, None].float(), advantages,
            old_per_token_logps=old_logp[:, None],
        )[0]  # fmt: skip

    return loss


def liger_preference_loss(loss: str) -> Function:
    """A pair at a time, as its modules have it by default; without its torch.compile, as its other
    loops here."""
    from liger_kernel import chunked_loss

    module = {
        "dpo": partial(chunked_loss.LigerFusedLinearDPOLoss, beta=0.1),
        "simpo": partial(
            chunked_loss.LigerFusedLinearSimPOLoss, beta=0.1, gamma=0.0, compute_nll_loss=False
        ),
        "orpo": partial(chunked_loss.LigerFusedLinearORPOLoss, beta=0.1),
        "kto": partial(chunked_loss.LigerFusedLinearKTOLoss, beta=0.1, use_ref_model=True),
    }[loss](compiled=False)

    def of_answers(
        hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, ref_hidden: Tensor,
        ref_weight: Tensor,
    ) -> Tensor:  # fmt: skip
        shape = (*mask.shape, -1)
        reference = {"ref_input": ref_hidden.view(shape), "ref_weight": ref_weight}
        hidden, labels = hidden.view(shape), labels.view(mask.shape)
        if loss == "kto":
            good = torch.arange(len(mask), device=mask.device) < len(mask) // 2
            return module(hidden, weight, labels, preference_labels=good, **reference)[0]
        return module(weight, hidden, labels, **(reference if loss == "dpo" else {}))[0]

    return of_answers


# --------------------------------------------------------- cut-cross-entropy, quack, flash-attn


def cut_linear() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, entropy: bool) -> Tensor:
        assert not entropy
        kernel = "torch_compile" if hidden.device.type == "cpu" else "cce"
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=kernel)

    return logprobs


def quack_logits() -> Function:
    def logprobs(logits: Tensor, labels: Tensor, *, entropy: bool) -> Tensor:
        gpu_only(logits)
        from quack.cross_entropy import cross_entropy

        return -cross_entropy(logits, labels, reduction="none")

    return logprobs


def quack_linear() -> Function:
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, entropy: bool) -> Tensor:
        gpu_only(hidden)
        from quack.linear_cross_entropy import linear_cross_entropy_func

        return -linear_cross_entropy_func(hidden, weight, None, labels, reduction="none")

    return logprobs


def flash_logits() -> Function:
    def logprobs(logits: Tensor, labels: Tensor, *, entropy: bool) -> Tensor:
        gpu_only(logits)
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        return -cross_entropy_loss(logits, labels)[0]

    return logprobs


# ------------------------------------------------------------------------------------------ verl

_VERL = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.utils")


def verl_functions() -> ModuleType:
    config = type("Config", (), {})  # only compared with isinstance, and in annotations
    tensordict = {"TensorDict": config}
    foreign.load("verl.utils.torch_functional", bare=_VERL, placeholders={"tensordict": tensordict})
    return foreign.load(
        "verl.trainer.ppo.core_algos",
        bare=_VERL,
        placeholders={
            "omegaconf": {"DictConfig": config},
            "verl.trainer.config": {"AlgoConfig": config},
            "verl.workers": {},
            "verl.workers.config": {"ActorConfig": config},
            # of other advantage estimators
            "verl.utils": {"as_torch_index": None, "group_mean_std": None},
        },
    )


def verl_logits() -> Function:
    library = verl_functions().verl_F

    def logprobs(logits: Tensor, labels: Tensor, *, entropy: bool) -> Any:
        logp = library.logprobs_from_logits(logits, labels, inplace_backward=False)
        return (logp, library.entropy_from_logits(logits)) if entropy else logp

    return logprobs


def verl_linear() -> Function:
    """FusedLinearForPPO: a loop over 512 rows in PyTorch, on any device."""
    module = foreign.load(
        "verl.utils.experimental.torch_functional", bare=(*_VERL, "verl.utils.experimental")
    )
    fused = module.FusedLinearForPPO()

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, entropy: bool) -> Any:
        def all_rows(labels: Tensor) -> Any:
            found = fused(hidden, weight, labels)
            return found if entropy else found[0]

        return counting(hidden, labels, all_rows)

    return logprobs


def verl_triton_linear() -> Function:
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, entropy: bool) -> Any:
        gpu_only(hidden)
        name = "verl.utils.kernel.linear_cross_entropy"
        kernel = foreign.load(name, bare=(*_VERL, "verl.utils.kernel")).LinearCrossEntropy

        def all_rows(labels: Tensor) -> Any:
            found = kernel.apply(hidden, weight, labels, 1.0, "none")
            return tuple(found) if entropy else found[0]

        return counting(hidden, labels, all_rows)

    return logprobs


def verl_gae() -> Function:
    library = verl_functions()

    def gae(
        rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float = 0.95
    ) -> tuple[None, Tensor]:
        """Its advantages come whitened, so only the returns can be compared."""
        _, returns = library.compute_gae_advantage_return(rewards, values, mask.float(), gamma, lam)
        return None, returns

    return gae


class VerlConfig(SimpleNamespace):
    """verl reads its config by attribute and by ``get``."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def verl_policy_loss() -> Function:
    library = verl_functions()
    config = VerlConfig(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={}
    )

    def loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return library.compute_policy_loss_vanilla(
            old_logp, logp, advantages, mask, "token-mean", config
        )[0]

    return loss


def verl_value_loss() -> Function:
    library = verl_functions()

    def loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Any:
        return library.compute_value_loss(values, returns, old_values, mask, 0.2)

    return loss


# -------------------------------------------------------------------------------------- OpenRLHF


def openrlhf_losses() -> ModuleType:
    return foreign.load(
        "openrlhf.models.loss",
        bare=("openrlhf", "openrlhf.models"),
        placeholders={"deepspeed": {}},
    )


def openrlhf_logits() -> Function:
    openrlhf_losses()
    library = foreign.load("openrlhf.models.utils")

    def logprobs(logits: Tensor, labels: Tensor, *, entropy: bool) -> Any:
        logp = library.log_probs_from_logits(logits[None], labels[None])[0]
        return (logp, library.compute_entropy(logits)) if entropy else logp

    return logprobs


def openrlhf_gae() -> Function:
    openrlhf_losses()
    module = foreign.load(
        "openrlhf.trainer.ppo_utils.experience_maker",
        bare=("openrlhf", "openrlhf.trainer", "openrlhf.trainer.ppo_utils", "openrlhf.trainer.ray",
              "openrlhf.utils"),
        placeholders={
            "ray": {},
            "openrlhf.trainer.ppo_utils.experience": {"Experience": None},
            "openrlhf.trainer.ppo_utils.length_penalty": {"apply_length_penalties": None},
            "openrlhf.trainer.ray.launcher": {"RayActorGroup": None},
            "openrlhf.utils.logging_utils": {"init_logger": lambda name: None},
            "openrlhf.utils.seqlen_balancing": {
                "get_minimum_num_micro_batch_size": None,
                "get_seqlen_balanced_partitions": None,
            },
        },
    )  # fmt: skip
    loop = module.RemoteExperienceMaker.get_advantages_and_returns

    def gae(
        rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float = 0.95
    ) -> tuple[Tensor, Tensor]:
        return loop(None, values, rewards, mask, gamma, lam)

    return gae


def openrlhf_policy_loss() -> Function:
    module = openrlhf_losses().PolicyLoss()
    return lambda logp, old_logp, advantages, mask: module(logp, old_logp, advantages, mask)[0]


def openrlhf_value_loss() -> Function:
    module = openrlhf_losses().ValueLoss(clip_eps=0.2)
    return lambda values, old_values, returns, mask: module(values, old_values, returns, mask)


def openrlhf_pairwise_loss() -> Function:
    module = openrlhf_losses().PairWiseLoss()
    return lambda chosen, rejected, margin=None: module(chosen, rejected, margin)


# ------------------------------------------------------------------------------------- torchtune


def torchtune_rlhf() -> ModuleType:
    return foreign.load(
        "torchtune.rlhf",
        bare=("torchtune",),
        placeholders={"torchtune.data": {"CROSS_ENTROPY_IGNORE_IDX": -100}},
    )


def torchtune_logits() -> Function:
    library = torchtune_rlhf()

    def logprobs(logits: Tensor, labels: Tensor, *, entropy: bool) -> Tensor:
        assert not entropy
        return library.logits_to_logprobs(logits[None], labels[None])[0]

    return logprobs


def torchtune_gae() -> Function:
    library = torchtune_rlhf()

    def gae(
        rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float = 0.95
    ) -> tuple[None, Tensor]:
        """Its advantages come whitened, so only the returns can be compared."""
        return None, library.estimate_advantages(values, rewards, gamma, lam, mask)[1]

    return gae


def torchtune_losses() -> Function:
    torchtune_rlhf()
    module = foreign.load("torchtune.rlhf.loss").PPOLoss(
        epsilon=0.2, value_clip_range=0.2, value_coeff=0.1
    )

    def loss(
        logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, values: Tensor,
        old_values: Tensor, returns: Tensor,
    ) -> Tensor:  # fmt: skip
        return module(old_logp, logp, advantages, old_values, values, returns, mask, mask)[0]

    return loss


def both_losses(policy: Function, value: Function) -> Function:
    def loss(logp, old_logp, advantages, mask, values, old_values, returns):
        total = value(values, old_values, returns, mask)
        total = total[0] if isinstance(total, tuple) else total
        return policy(logp, old_logp, advantages, mask) + 0.1 * total

    return loss
