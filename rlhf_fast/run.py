"""A run's folder: config, metrics, checkpoint, results. A kill at any moment leaves it usable.

Everything but the metrics, whose lines are appended, is written under a temporary name, flushed to
the disk and renamed; `summary.json` comes last and means the run is finished.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rlhf_fast.config import InputError, RunConfig

# Options that may differ when a run is continued: they change no number.
FREE = {"output_dir", "resume", "overwrite", "save_every", "log_every", "device"}

RESULTS = ("summary.json", "before.json", "after.json", "metrics.jsonl", "checkpoint.pt", "model")


class Run:
    """The folder `config.output_dir`. Creating a Run reads and refuses; only begin() writes."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir).expanduser()
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoint = self.folder / "checkpoint.pt"
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output_dir={self.folder} is a file")
        # Metrics begin when the first step does: a run refused before that is no run yet.
        self.exists = self.metrics.is_file() and not config.overwrite
        if self.exists and not config.resume:
            raise InputError(
                f"output_dir={self.folder} holds a run already: continue it with --resume, delete "
                "it with --overwrite, or choose another folder"
            )
        if self.exists:
            self.check_same_config()

    def check_same_config(self) -> None:
        earlier = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        for name, value in asdict(self.config).items():
            if name not in FREE and earlier.get(name) != value:
                raise InputError(
                    f"{name}={value}, but the run in output_dir={self.folder} began with "
                    f"{name}={earlier.get(name)}: set it back, or begin again with --overwrite"
                )

    @property
    def summary(self) -> dict[str, Any] | None:
        """The results of a finished run."""
        return self.load("summary.json") if self.exists else None

    def begin(self) -> None:
        """After everything the user gave has been checked."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config.overwrite:
            for name in RESULTS:
                remove(self.folder / name)
        text = yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True)
        self.write("config.yaml", lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        with replacing(self.folder / name) as partial:
            writer(partial)

    def save(self, name: str, value: Any) -> None:
        self.write(name, lambda path: path.write_text(json.dumps(value, indent=1)))

    def load(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else None

    def log(self, row: dict[str, float]) -> None:
        """Append a row; what is not finite becomes null, which JSON has and NaN it has not."""
        row = {k: v if math.isfinite(v) else None for k, v in row.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save_checkpoint(
        self, step: int, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """The state after `step` steps. Data order and sampling are functions of (seed, step)."""
        state = {"step": step, "weights": weights, "optimizer": optimizer.state_dict()}
        self.write("checkpoint.pt", lambda path: torch.save(state, path))

    def restore(self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Load the checkpoint if there is one, drop metrics after it; the step to go on from."""
        step = 0
        if self.exists and self.checkpoint.is_file():
            device = next(iter(weights.values())).device
            state = torch.load(self.checkpoint, map_location=device, weights_only=True)
            with torch.no_grad():
                for name, tensor in weights.items():
                    tensor.copy_(state["weights"][name])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.metrics) if row["step"] <= step]
        self.write("metrics.jsonl", lambda path: path.write_text("".join(kept)))
        return step


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that takes target's place when it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)
    yield partial
    files = [partial, *partial.rglob("*")] if partial.is_dir() else [partial]
    for path in files:
        flush(path)
    if target.is_dir():  # rename cannot replace a folder that has something in it
        remove(target)
    os.replace(partial, target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Until the bytes are on the disk a rename may survive a power cut and they may not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
