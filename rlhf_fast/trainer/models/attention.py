"""Flash attention where it is there, and whether models let sequences lie in one row."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.packing import can_pack


def has_flash_attention(device: torch.device) -> bool:
    return device.type == "cuda" and is_flash_attn_2_available()


@torch.no_grad()
def use_flash_attention(model: PreTrainedModel) -> None:
    """Flash attention in place of transformers' choice, if the model runs with it.

    transformers knows which classes support it, flash-attn which sizes of heads and which GPUs: a
    short forward pass asks both. It is in bfloat16: there are no kernels for float32.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("flash_attention_2")
        with torch.autocast(model.device.type, torch.bfloat16):
            model(torch.zeros(1, 8, dtype=torch.int64, device=model.device), use_cache=False)
    except (ValueError, RuntimeError, ImportError):
        model.set_attn_implementation(before)


def pick_packing(asked: bool | None, bodies: dict[str, PreTrainedModel]) -> bool:
    """Whether to pack (see packing.py): where all run flash attention, if they allow it."""
    flash = all(b.config._attn_implementation == "flash_attention_2" for b in bodies.values())
    if asked is False or (asked is None and not flash):
        return False
    for name, body in bodies.items():
        if not can_pack(body):
            if asked is None:
                return False
            raise InputError(
                f"packing={asked}: {name} ({type(body).__name__}) does not keep sequences apart "
                "that lie in one row; leave packing unset"
            )
    return True
