"""What is trained in float32 is saved in the dtype that its source came in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel


def save_model(
    model: PreTrainedModel, folder: Path, state: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """save_pretrained of `state`, the model's weights in float32, rounded to `dtype`."""
    model.save_pretrained(folder, state_dict=rounded(model, state, dtype))
    path = Path(folder, "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    # save_pretrained writes the dtype that the model has in memory.
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        if "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def rounded(
    model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tied weights stay one tensor; those that a family keeps in float32 (routers, states) stay."""
    kept = {
        name
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
    }
    made: dict[int, Tensor] = {}  # by the tensor itself: tied weights are one

    def round_one(name: str, weight: Tensor) -> Tensor:
        if not weight.is_floating_point() or any(part in name for part in kept):
            return weight
        return made.setdefault(id(weight), weight.detach().to(dtype))

    return {name: round_one(name, weight) for name, weight in state.items()}
