"""Low-rank adapters, and the model with them merged in."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.trainer.errors import InputError


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by peft, without dropout."""

    r: int
    alpha: float
    target_modules: list[str] | None  # None: every linear layer but the output head
    seed: int


def add_adapters(model: PreTrainedModel, lora: LoRA) -> None:
    """Only they train from here on; until they learn, they add zero."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise InputError(f"lora_r={lora.r} needs peft: pip install peft") from None
    torch.manual_seed(lora.seed)  # A is drawn, B is zero
    try:
        model.add_adapter(
            LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
                target_modules=lora.target_modules or "all-linear",
            )
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"lora_target_modules: {' '.join(str(error).split())[:300]}") from error
    model.eval()  # the adapters, too, are without dropout
    if not isinstance(model.get_output_embeddings(), nn.Linear) or any(
        p.requires_grad for p in model.get_output_embeddings().parameters()
    ):
        raise InputError(
            "lora_target_modules names the output head, whose adapter the fused loss would not see"
        )


def merged(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A copy with the adapters' products added to the weights; state: the model's, whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.device("meta"):
        copied = type(model)(model.config)
        copied.add_adapter(model.peft_config["default"])
    copied.load_state_dict(copy.deepcopy(state), assign=True)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            copied.set_submodule(name, module.get_base_layer())
    copied._hf_peft_config_loaded = False  # else only the adapters would be saved
    return copied
