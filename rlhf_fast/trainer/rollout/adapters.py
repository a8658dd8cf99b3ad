"""Adapters alone for an engine that has the policy's frozen weights already: vLLM's `enable_lora`.

Sampling through adapters costs some time a token, and sending them costs next to none; merged
weights are the other way round.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlhf_fast.trainer.errors import InputError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


class Adapter:
    """The policy's, as peft writes it, in a new folder each time: vLLM takes the same one for the
    adapter that it has read from it before."""

    def __init__(self, model: PreTrainedModel) -> None:
        asked = "rollout_engine_options=enable_lora=true"
        if not getattr(model, "peft_config", None):
            raise InputError(f"{asked}: the policy has no adapters, set lora_r, too")
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise InputError(f"{asked}: not with FSDP, where each process has a part of them")
        rank = model.peft_config["default"].r
        if rank > RANKS[-1]:
            raise InputError(f"{asked}: vLLM takes ranks up to {RANKS[-1]}, lora_r={rank}")
        self.options = {
            "enable_lora": True, "max_loras": 1,
            "max_lora_rank": next(most for most in RANKS if most >= rank),
        }  # fmt: skip
        self.model, self.count = model, 0
        self.folder = Path(tempfile.mkdtemp(prefix="adapter_"))

    def save(self) -> Path:
        shutil.rmtree(self.folder / str(self.count), ignore_errors=True)
        self.count += 1
        self.model.save_pretrained(self.folder / str(self.count))
        return self.folder / str(self.count)

    def save_the_rest(self, folder: Path) -> None:
        """The frozen weights, by the names that they have without adapters."""
        frozen = {
            name.replace(".base_layer.", "."): weight.cpu().clone()
            for name, weight in self.model.state_dict().items()
            if ".lora_" not in name
        }
        save_file(frozen, folder / "model.safetensors", metadata={"format": "pt"})

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def adapter_of(model: PreTrainedModel, options: dict[str, Any]) -> Adapter | None:
    """None where the engine is to get merged weights."""
    return Adapter(model) if options.get("enable_lora") else None
