"""A run's folder: config, metrics, checkpoints, results. A kill at any moment leaves it usable.

Everything but the metrics, whose lines are appended, is written under a temporary name, flushed to
the disk and renamed; `summary.json` comes last and means the run is finished.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.distributed.fsdp import gathered, placed_like
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.console import console

# In the order of deletion: the metrics make a folder a run, so they go last.
RESULTS = ("summary.json", "checkpoints", "before.json", "after.json", "bad_batch.pt", "model",
           "adapter", "value_model", "metrics.jsonl")  # fmt: skip


class Stateful(Protocol):
    """What a checkpoint keeps beside weights and optimizer: a scheduler, a KL controller, …"""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """The folder `config.output_dir`. Creating a Run reads and refuses; only begin() writes.

    Of several processes one writes (`writes`); the others read the same folder.
    """

    def __init__(self, config: RunConfig, *, writes: bool = True) -> None:
        self.config = config
        self.writes = writes
        self.folder = Path(config.output_dir).expanduser()
        self.metrics = self.folder / "metrics.jsonl"
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output_dir={self.folder} is a file")
        # Metrics begin when the first step does: a run refused before that is no run yet.
        self.exists = self.metrics.is_file() and not config.overwrite
        if self.exists and not config.resume:
            raise InputError(
                f"output_dir={self.folder} holds a run already: continue it with --resume, delete "
                "it with --overwrite, or choose another folder"
            )
        self.changed = self.changed_options() if self.exists else {}

    def changed_options(self) -> dict[str, tuple[Any, Any]]:
        """{name: (before, now)} of the options that were changed, all of which may be."""
        path = self.folder / "config.yaml"
        try:
            earlier = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"output_dir={self.folder} holds a run whose config.yaml cannot be read: {reason}"
            ) from None
        changed = {}
        for f in fields(self.config):
            before, now = earlier.get(f.name, f.default), getattr(self.config, f.name)
            if before == now:
                continue
            if f.name in self.config.fixed:
                raise InputError(
                    f"{f.name}={now}, but the run in output_dir={self.folder} began with "
                    f"{f.name}={before}: set it back, or begin again with --overwrite"
                )
            changed[f.name] = (before, now)
        return changed

    @property
    def summary(self) -> dict[str, Any] | None:
        """The results of a finished run; None, too, of one whose end was moved."""
        moved = self.config.length in self.changed
        return self.load("summary.json") if self.exists and not moved else None

    def check_end(self, steps: int) -> None:
        """A run that is continued cannot end before the step it has reached."""
        made = max(self.checkpoints(), default=0) if self.exists else 0
        if made > steps:
            raise InputError(
                f"the run in output_dir={self.folder} has made {made} steps already, it cannot end "
                f"after {steps}"
            )

    def begin(self) -> None:
        """After everything the user gave has been checked."""
        if not self.writes:
            return
        for name, (before, now) in self.changed.items():
            if name not in ("output_dir", "resume", "overwrite"):
                console.print(f"going on with {name}={now} (before: {before})")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir={self.folder} cannot be made: {error.strerror}") from None
        if not self.exists:  # a checkpoint left by a deleted run must not be resumed from
            for name in RESULTS:
                remove(self.folder / name)
        remove(self.folder / "summary.json")  # of a run whose end was moved
        text = yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True)
        self.write("config.yaml", lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        if not self.writes:
            return
        target = self.folder / name
        with self.disk_errors_explained(name):
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as partial:
                writer(partial)

    def save(self, name: str, value: Any) -> None:
        self.write(name, lambda path: path.write_text(json.dumps(value, indent=1)))

    def load(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise InputError(
                f"{path} cannot be read: {error}; without the file --resume makes it again"
            ) from None

    def log(self, row: dict[str, float]) -> None:
        """Append a row; what is not finite becomes null, which JSON has and NaN it has not."""
        if not self.writes:
            return
        row = {k: v if math.isfinite(v) else None for k, v in row.items()}
        with self.disk_errors_explained("metrics.jsonl"):
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    # ------------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> dict[int, Path]:
        """{step: file}, oldest first."""
        found = (self.folder / "checkpoints").glob("step_*.pt")
        numbered = ((re.fullmatch(r"step_(\d+)", path.stem), path) for path in found)
        return dict(sorted((int(match[1]), path) for match, path in numbered if match))

    def save_checkpoint(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        **parts: Stateful,
    ) -> None:
        """The state after `step` steps. Data order and sampling are functions of (seed, step)."""
        tensors = {"weights": weights, "optimizer": optimizer.state_dict()}
        tensors = gathered(tensors, keep=self.writes)  # shards are put together by all processes
        if not self.writes:
            return
        state = {"step": step, **tensors}
        state |= {name: part.state_dict() for name, part in parts.items()}
        if self.metrics.is_file():  # no checkpoint may be on the disk before its metrics are
            with self.disk_errors_explained("metrics.jsonl"):
                flush(self.metrics)
        self.write(f"checkpoints/step_{step}.pt", lambda path: save_tensors(state, path))
        self.prune()

    def prune(self) -> None:
        for path in list(self.checkpoints().values())[: -self.config.save_total_limit]:
            remove(path)

    def restore(
        self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, **parts: Stateful
    ) -> int:
        """Load the newest checkpoint, if any, and drop metrics after it; the step to go on from."""
        step = 0
        if self.exists and (found := self.checkpoints()):
            step, path = found.popitem()
            state = self.read_checkpoint(path, weights, parts)
            with torch.no_grad():
                for name, tensor in weights.items():
                    tensor.copy_(placed_like(state["weights"][name], tensor))
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            for i, moments in state["optimizer"]["state"].items():
                for name, moment in moments.items():
                    moments[name] = placed_like(moment, trained[i])
            # Its moments only: Adam's options are the config's, which may have changed.
            options = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state["optimizer"] | {"param_groups": options})
            for name, part in parts.items():
                part.load_state_dict(state[name])
        if self.writes:
            self.prune()  # a kill may have come between a checkpoint and this
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.metrics) if row["step"] <= step]
        self.write("metrics.jsonl", lambda path: path.write_text("".join(kept)))
        return step

    def read_checkpoint(
        self, path: Path, weights: dict[str, Tensor], parts: dict[str, Stateful]
    ) -> dict[str, Any]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of a file that was cut or changed torch raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path} cannot be read: {reason}; without the file --resume goes on from the "
                "checkpoint before it"
            ) from None
        fits = isinstance(state, dict) and {"step", "weights", "optimizer", *parts} <= state.keys()
        shapes = {name: w.shape for name, w in weights.items()}
        if not fits or {name: w.shape for name, w in state["weights"].items()} != shapes:
            raise InputError(f"{path} is not a checkpoint of what is trained here: another model?")
        return state

    def stop_with_the_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Keep what no update could be made from, and end the run."""
        self.write("bad_batch.pt", lambda path: save_tensors({"step": step} | batch, path))
        steps = list(self.checkpoints())
        kept = (
            f"the last good checkpoint is that of step {steps[-1]}"
            if steps
            else "there is no checkpoint yet"
        )
        raise InputError(
            f"step {step}: {self.config.max_skipped_updates} updates in a row had a loss or "
            f"gradient that is not finite (max_skipped_updates). The batch is in "
            f"{self.folder / 'bad_batch.pt'}, {kept}. A lower learning_rate may help, which "
            "--resume takes, or a warm-up from the beginning"
        )

    @contextmanager
    def disk_errors_explained(self, name: str) -> Iterator[None]:
        """A full disk is the user's to mend, and nothing that was written before is harmed."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            steps = list(self.checkpoints())
            kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "nothing was lost"
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"output_dir={self.folder}: {name} cannot be written: {reason}; {kept}. Make room, "
                "then go on with --resume"
            ) from error


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """torch.save, but a failing write is the OSError that torch hides behind its own."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n"):
                rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number} cannot be read: {error}") from None
    return rows


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that takes target's place when it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    aside = target.with_name(f".{target.name}.old")
    remove(partial)
    try:
        yield partial
    except Exception:  # mostly a full disk: give back what was taken
        remove(partial)
        raise
    files = [partial, *partial.rglob("*")] if partial.is_dir() else [partial]
    for path in files:
        flush(path)
    if target.is_dir():  # rename cannot replace a folder that has something in it
        remove(aside)
        os.replace(target, aside)
    os.replace(partial, target)
    flush(target.parent)
    remove(aside)


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
