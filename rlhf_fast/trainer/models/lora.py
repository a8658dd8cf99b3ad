"""Low-rank adapters, and the model with them merged in."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.installed import check_peft


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by peft, without dropout."""

    r: int
    alpha: float
    target_modules: list[str] | None  # None: every linear layer but the output head
    seed: int


def add_adapters(model: PreTrainedModel, lora: LoRA) -> None:
    """From here on the adapters alone train; until they have learnt, they add zero."""
    check_peft(f"lora_r={lora.r}")
    from peft import LoraConfig

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
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or any(p.requires_grad for p in head.parameters()):
        raise InputError(
            "lora_target_modules names the output head, whose adapter the fused loss would not see"
        )
    if any(p.requires_grad for p in embedding.parameters()) and embedding.weight is head.weight:
        raise InputError(
            f"lora_target_modules={','.join(lora.target_modules or ())} names the embedding "
            "(embed_tokens), whose weight is the output head's, too: merged, its adapter would "
            "change both; leave it out"
        )
    check_merge(model, lora)


@torch.no_grad()
def check_merge(model: PreTrainedModel, lora: LoRA) -> None:
    """The merged model must be the one that is trained: tried with adapters that add something,
    since what cannot be saved had better not be trained."""
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    zero = {name: p.clone() for name, p in adapters.items() if not p.any()}  # the Bs
    generator = torch.Generator().manual_seed(lora.seed)
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().weight.size(0)
    try:
        for name in zero:
            p = adapters[name]
            p.copy_(torch.randn(p.shape, generator=generator) / p.size(-1) ** 0.5)
        trained = model(ids, use_cache=False).logits
        whole = merged(model, model.state_dict(keep_vars=True))
        saved = whole(ids, use_cache=False).logits
        agree = torch.allclose(saved, trained, rtol=1e-3, atol=1e-3 * float(trained.abs().max()))
    except Exception as error:  # peft's wrappers of a family it does not know
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"lora_r={lora.r}: peft cannot merge the adapters of a {type(model).__name__} into its "
            f"weights ({type(error).__name__}: {reason}); name other lora_target_modules"
        ) from error
    finally:
        for name, p in zero.items():
            adapters[name].copy_(p)
    if not agree:
        raise InputError(
            f"lora_r={lora.r}: with its adapters merged, {type(model).__name__} is another model "
            "than the one that would be trained; name other lora_target_modules"
        )


def merged(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A copy with the adapters' products added to the weights; state: the model's, whole."""
    with torch.device("meta"):
        copied = type(model)(model.config)
        copied.add_adapter(model.peft_config["default"])
    copied.load_state_dict(copy.deepcopy(state), assign=True)
    for name, buffer in model.named_buffers():  # those that are not saved: rotary frequencies
        if name not in state:
            owner, _, leaf = name.rpartition(".")
            copied.get_submodule(owner)._buffers[leaf] = buffer.detach().clone()
    while (outer := outermost_adapter(copied)) is not None:
        name, module = outer
        for wrapper in wrappers(module):
            wrapper.merge()
        copied.set_submodule(name, module.get_base_layer())
    copied.generation_config = model.generation_config  # else it would be made from the config
    copied._hf_peft_config_loaded = False  # else only the adapters would be saved
    return copied.eval()


def outermost_adapter(model: nn.Module) -> tuple[str, nn.Module] | None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = model.named_modules()
    return next(((name, x) for name, x in named if isinstance(x, BaseTunerLayer)), None)


def wrappers(module: nn.Module) -> list[nn.Module]:
    """An adapted module's layers of adapters, the inner ones first: peft puts one around another
    where a module has several weights of its own, as the experts of a mixture have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = []
    while isinstance(module, BaseTunerLayer):
        found.append(module)
        module = module.base_layer
    return found[::-1]
