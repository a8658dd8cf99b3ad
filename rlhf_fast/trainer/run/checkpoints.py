"""A checkpoint's contents, read with suspicion: a disk, a copy or a hand may have changed them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # Adam's, of each weight


class Damaged(ValueError):
    """Why a checkpoint cannot be gone on from."""


def verify(path: Path) -> None:
    """Byte by byte as it was saved: torch.load does not look at the checksums of its zip file."""
    if not path.stat().st_size:
        raise Damaged("cannot be read: it is empty")
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except Exception as error:  # of what is no zip file, or one whose headers are changed
        raise Damaged(f"cannot be read: {' '.join(str(error).split())}") from None
    if wrong is not None:
        raise Damaged(f"is damaged: {wrong} in it does not match its checksum")


def is_whole(path: Path) -> bool:
    try:
        verify(path)
    except (OSError, Damaged):
        return False
    return True


def size_of(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(size_of, parts)) if isinstance(value, dict | list | tuple) else 0


def read(path: Path) -> dict[str, Any]:
    verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whose message may advise to load whatever is there
        raise Damaged(f"cannot be read: {type(error).__name__} in torch.load") from None


def check(
    state: Any,
    step: int,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parts: Iterable[str],
) -> None:
    """Check that it is whole, of this step and of what is trained here."""
    if not isinstance(state, dict):
        raise Damaged("is not a checkpoint of a run")
    missing = {"step", "weights", "optimizer", *parts} - state.keys()
    if missing:
        raise Damaged(f"is not a checkpoint of what is trained here: it has no {min(missing)}")
    if state["step"] != step:
        raise Damaged(f"is the checkpoint of step {state['step']} by its contents")
    if shapes(state["weights"]) != shapes(weights):
        raise Damaged("is not a checkpoint of what is trained here: another model?")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    kept = state["optimizer"]
    moments = kept.get("state") if isinstance(kept, dict) else None
    if not isinstance(moments, dict) or len(moments) != state.get("moments", len(moments)):
        raise Damaged("lacks moments of the optimizer")
    if moments and moments.keys() != set(range(len(trained))):  # none before the first update
        raise Damaged("lacks moments of the optimizer, or is a checkpoint of another model")
    for i, of_weight in moments.items():
        expected = {name: trained[i].shape for name in MOMENTS} | {"step": torch.Size()}
        if shapes(of_weight) != expected:
            raise Damaged(f"has moments of another shape or name for weight {i} of the optimizer")


def shapes(tensors: Any) -> dict[str, torch.Size] | None:
    if not isinstance(tensors, dict):
        return None
    return {k: t.shape if isinstance(t, Tensor) else None for k, t in tensors.items()}
