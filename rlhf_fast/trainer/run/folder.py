"""A run's folder: config, metrics, checkpoints, results. A kill at any moment leaves it usable.

Everything but the metrics, whose lines are appended, is written under a temporary name, flushed to
the disk and renamed; `summary.json` comes last and means the run is finished. Nothing is deleted or
written over that this program did not write (owned.py), and one process at a time writes (lock.py).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.distributed.fsdp import gathered, placed_like
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run import checkpoints, completions, interrupts, lock
from rlhf_fast.trainer.run.console import console
from rlhf_fast.trainer.run.files import flush, remove, replacing, save_tensors, tidy
from rlhf_fast.trainer.run.metrics import finite, has_step, plain, read_metrics, read_rows
from rlhf_fast.trainer.run.owned import EVALUATIONS, RECORDS, Owned, inputs
from rlhf_fast.trainer.run.plot import is_plot

# In the order of deletion: what says how far the run has come goes first. Left by a kill, the rest
# belongs to no run and is deleted when the next one begins.
RESULTS = ("metrics.jsonl", EVALUATIONS, "summary.json", "checkpoints", "contents.json",
           "before.json", "after.json", completions.FOLDER, "bad_batch.pt", "model", "adapter",
           "value_model", "plot.png")  # fmt: skip
TEXTS = ("prompt", "answer", "stop_reason")  # columns of evaluations
# Of these folders a run owns single files; the user may have others there.
OF_STEPS = ("checkpoints", completions.FOLDER)


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
        self.evaluations = self.folder / EVALUATIONS
        self.best: int | None = None  # the step whose checkpoint is kept whatever comes after it
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output_dir={self.folder} is a file")
        if writes:
            with self.disk_errors_explained(lock.NAME):
                lock.check(self.folder)
        self.seen = self.state()
        self.owned = Owned(self.folder)
        # Metrics begin when the first step does: a run refused before that is no run yet.
        found = self.metrics.is_file() and (self.owned.begun or self.of_an_earlier_version())
        self.exists = found and not config.overwrite
        # There from before the first deletion of an --overwrite until after its last.
        self.overwriting = self.folder / ".overwriting"
        if not (found or config.overwrite or self.overwriting.exists()):
            self.check_metrics_are_there()
        if self.exists and not config.resume:
            raise InputError(
                f"output_dir={self.folder} holds a run already: continue it with --resume, delete "
                "it with --overwrite, or choose another folder"
            )
        self.changed = self.changed_options() if self.exists else {}
        if self.summary is None:  # else nothing is going to be written
            self.check_inputs()
            self.check_others()

    def state(self) -> list[tuple[int, int] | None]:
        """What another process would change."""
        files = (self.folder / name for name in RECORDS)
        stats = (file.stat() if file.is_file() else None for file in files)
        return [stat and (stat.st_mtime_ns, stat.st_size) for stat in stats]

    def of_an_earlier_version(self) -> bool:
        """Version 0.1 left no mark of its own."""
        try:
            earlier = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(earlier, dict) and {"model", "data", "output_dir"} <= earlier.keys()

    def check_metrics_are_there(self) -> None:
        """Or a run that has lost them would count as none, and its checkpoints be deleted."""
        if self.owned.begun and self.checkpoints():
            raise InputError(
                f"output_dir={self.folder} holds checkpoints and no metrics.jsonl: bring it back, "
                "or begin again with --overwrite"
            )

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
            absent = MISSING if f.metadata.get("needed") else f.default
            before, now = earlier.get(f.name, absent), getattr(self.config, f.name)
            if before is MISSING:
                raise InputError(
                    f"output_dir={self.folder} holds a run whose config.yaml has no {f.name}: it "
                    "was cut short, or is of another command"
                )
            if before == now:
                continue
            if f.name in self.config.fixed:
                raise InputError(
                    f"{f.name}={now}, but the run in output_dir={self.folder} began with "
                    f"{f.name}={before}: set it back, or begin again with --overwrite"
                )
            changed[f.name] = (before, now)
        return changed

    def check_inputs(self) -> None:
        """A run must not delete or write over what it reads."""
        for given, path in inputs(self.config).items():
            for name in RESULTS:
                target = (self.folder / name).resolve()
                if target == path or target in path.parents:
                    raise InputError(
                        f"{given} lies where the run in output_dir={self.folder} puts its own "
                        f"{name}: choose another output_dir"
                    )

    def check_others(self) -> None:
        """Refuse a folder where a run would delete or write over what others wrote."""
        names = (*RESULTS, "config.yaml")
        others = [part for name in names for part in self.strangers(name)]
        if not self.owned.begun:
            hidden = (f".{name}.{kind}" for name in names for kind in ("partial", "old"))
            others += [name for name in hidden if os.path.lexists(self.folder / name)]
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise InputError(
                f"output_dir={self.folder} holds {', '.join(others[:3])}{more}, which this program "
                "did not write, or which were changed since: nothing is deleted or written over; "
                "move them away, or choose another folder"
            )

    def strangers(self, name: str) -> list[str]:
        """What this program did not write of what a run would delete or write over there."""
        path = self.folder / name
        if name in OF_STEPS and path.is_dir():  # of a run that exists others are left alone
            names = [] if self.exists else self.files_of(name)
            return [part for name in names for part in self.owned.strangers(name)]
        if name == "plot.png" and is_plot(path):  # drawn by `rlhf-fast plot`
            return []
        if name in RECORDS and self.exists and not self.owned.begun:
            return []  # of an earlier version
        return self.owned.strangers(name)

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
        """Begin to write, after everything the user gave has been checked."""
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir={self.folder} cannot be made: {error.strerror}") from None
        with self.disk_errors_explained(lock.NAME):
            lock.take(self.folder)
        if self.state() != self.seen:
            raise InputError(
                f"output_dir={self.folder} was written to by another run since this one was "
                "started: start it again"
            )
        self.check_others()
        for name, (before, now) in self.changed.items():
            if name not in ("output_dir", "resume", "overwrite"):
                console.print(f"going on with {name}={now} (before: {before})")
        with self.disk_errors_explained("a file"):
            self.owned.begin()
            self.tidy()
            if not self.exists:  # a checkpoint left by a deleted run must not be resumed from
                self.overwriting.touch()
                for name in RESULTS:
                    self.delete(name)
            self.overwriting.unlink(missing_ok=True)
            remove(self.folder / "summary.json")  # of a run whose end was moved
        text = yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True)
        self.write("config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
        interrupts.kept(self.last_checkpoint())

    def tidy(self) -> None:
        """Finish what a kill broke off: a partial checkpoint is as large as a whole one, and its
        step may not be saved again."""
        for name in (*RESULTS, "config.yaml"):
            tidy(self.folder / name)
        for name in OF_STEPS:
            for path in list((self.folder / name).glob(".step_*.partial")):
                remove(path)

    def delete(self, name: str) -> None:
        """Delete what has been checked to be ours."""
        for part in self.files_of(name) if name in OF_STEPS else [name]:
            remove(self.folder / part)
            self.owned.forget(part)

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        if not self.writes:
            return
        target = self.folder / name
        if others := self.strangers(name):
            raise InputError(
                f"output_dir={self.folder}: {', '.join(others[:3])} was put there by another hand "
                "and is not written over: move it away, then go on with --resume"
            )
        with self.disk_errors_explained(name):
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as partial:
                writer(partial)
                if name not in RECORDS:
                    self.owned.record(name, partial)

    def save(self, name: str, value: Any) -> None:
        self.write(name, lambda path: path.write_text(json.dumps(value, indent=1)))

    def load(self, name: str, columns: Sequence[str] = ()) -> Any:
        """What `save` wrote, a table with these columns if any are named; None if there is none."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or not value:
                raise ValueError("it has no results")
            if columns and not is_table(value, columns):
                raise ValueError(f"it is not a table of {', '.join(columns)}")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read: {error}; without the file --resume makes it again"
            ) from None
        return value

    def log(self, row: dict[str, float]) -> None:
        """Append a row."""
        if not self.writes:
            return
        with self.disk_errors_explained("metrics.jsonl"):
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(row)) + "\n")

    def log_evaluation(self, row: dict[str, Any]) -> None:
        """Append one: its step, means and samples."""
        if not self.writes:
            return
        with self.disk_errors_explained(EVALUATIONS):
            self.evaluations.parent.mkdir(exist_ok=True)
            with open(self.evaluations, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")

    def save_completions(self, step: int, answers: dict[str, list]) -> None:
        """The answers after `step` steps, as Parquet."""
        self.write(completions.name_of(step), lambda p: completions.save(step, answers, p))

    def drop_completions(self, step: int) -> None:
        """Those of evaluations that a resumed run makes anew."""
        for made, path in completions.files(self.folder).items():
            name = completions.name_of(made)
            if made > step and not self.owned.strangers(name):
                remove(path)
                self.owned.forget(name)

    def files_of(self, name: str) -> list[str]:
        """Those of a folder in OF_STEPS, by their names in the run's."""
        of = completions.files(self.folder) if name == completions.FOLDER else self.checkpoints()
        return [f"{name}/{path.name}" for path in of.values()]

    # ------------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> dict[int, Path]:
        """{step: file}, oldest first."""
        found = (self.folder / "checkpoints").glob("step_*.pt")
        numbered = ((re.fullmatch(r"step_(0|[1-9]\d*)", path.stem), path) for path in found)
        return dict(sorted((int(match[1]), path) for match, path in numbered if match))

    def checkpoint_of(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step}.pt"

    def last_checkpoint(self) -> str:
        steps = list(self.checkpoints())
        if not steps:
            return "there is no checkpoint yet"
        return f"--resume goes on from the checkpoint of step {steps[-1]}"

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
        state = {"step": step, "moments": len(tensors["optimizer"]["state"]), **tensors}
        state |= {name: part.state_dict() for name, part in parts.items()}
        for path in (self.metrics, self.evaluations):  # on the disk before their checkpoint is
            if path.is_file():
                with self.disk_errors_explained(path.name):
                    flush(path)
        self.check_room(step, checkpoints.size_of(tensors))
        self.write(f"checkpoints/step_{step}.pt", lambda path: save_tensors(state, path))
        self.prune()
        interrupts.kept(self.last_checkpoint())

    def check_room(self, step: int, size: int) -> None:
        """Before a checkpoint of so many bytes is begun: a full disk costs others more than it."""
        free = shutil.disk_usage(self.folder).free
        if free < size:
            with self.disk_errors_explained(f"checkpoints/step_{step}.pt"):
                raise OSError(
                    errno.ENOSPC, f"it takes {size / 2**20:.1f} MiB, {free / 2**20:.1f} are free"
                )

    def keep(self, step: int, *state: Any, **parts: Stateful) -> None:
        """A checkpoint of what was learnt, before the run ends early: none if there is one."""
        if step and step not in self.checkpoints():
            self.save_checkpoint(step, *state, **parts)

    def prune(self) -> None:
        """Delete all but the newest, once one of these is known to be whole, and the best."""
        paths = list(self.checkpoints().values())
        limit = self.config.save_total_limit
        if len(paths) <= limit:
            return
        if not any(checkpoints.is_whole(path) for path in reversed(paths[-limit:])):
            console.print(f"[bold yellow]{paths[-1]} is damaged: those before it are kept[/]")
            return
        for path in paths[:-limit]:
            name = f"checkpoints/{path.name}"
            if path.name != f"step_{self.best}.pt" and not self.owned.strangers(name):
                remove(path)
                self.owned.forget(name)

    def restore(
        self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, **parts: Stateful
    ) -> int:
        """Load the newest checkpoint, if any, and drop metrics after it; the step to go on from."""
        step = 0
        rows = read_metrics(self.metrics)
        evaluations = read_rows(self.evaluations, has_step)
        if self.exists and (found := self.checkpoints()):
            step, path = found.popitem()
            self.check_metrics([row["step"] for row in rows if row["step"] <= step], step)
            state = self.read_checkpoint(step, weights, optimizer, parts)
            put(state["weights"], weights)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            for i, moments in state["optimizer"]["state"].items():
                for name, moment in moments.items():
                    moments[name] = placed_like(moment, trained[i])
            # Its moments only: Adam's options are the config's, which may have changed.
            options = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state["optimizer"] | {"param_groups": options})
        if self.writes:
            self.prune()  # a kill may have come between a checkpoint and this
            self.drop_completions(step)
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        self.write("metrics.jsonl", lambda path: path.write_text("".join(kept)))
        if evaluations:
            rows = [row for row in evaluations if row["step"] <= step]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.write(EVALUATIONS, lambda path: path.write_text(lines, encoding="utf-8"))
        return step

    def go_back(
        self, step: int, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Put the weights of a step's checkpoint in place."""
        put(self.read_checkpoint(step, weights, optimizer, {})["weights"], weights)

    def read_checkpoint(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        parts: dict[str, Stateful],
    ) -> dict[str, Any]:
        """Load this step's checkpoint into the parts, each of which checks its own state."""
        path = self.checkpoint_of(step)
        try:
            state = checkpoints.read(path)
            old = {name for name, part in parts.items() if getattr(part, "came_later", False)}
            checkpoints.check(state, step, weights, optimizer, parts.keys() - old)
            for name, part in parts.items():
                if name in old and name not in state:
                    continue
                try:
                    part.load_state_dict(state[name])
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise checkpoints.Damaged(f"has a {name} that is not one: {error}") from None
        except (OSError, checkpoints.Damaged) as error:
            reason = getattr(error, "strerror", None)
            reason = f"cannot be read: {reason}" if reason else error
            raise InputError(f"{path} {reason}; {self.without(step)}") from None
        return state

    def without(self, step: int) -> str:
        """What can be done about a checkpoint that cannot be used."""
        before = [s for s in self.checkpoints() if s < step]
        if not before:
            return "there is none before it: begin again with --overwrite"
        return f"without the file --resume goes on from the checkpoint of step {before[-1]}"

    def check_metrics(self, steps: list[int], made: int) -> None:
        """The rows up to a checkpoint's step are all there, once each."""
        whole = next((i for i, step in enumerate(steps) if step != i + 1), len(steps))
        if whole == made == len(steps):
            return
        usable = [step for step in self.checkpoints() if step <= whole]
        advice = (
            f"without the checkpoints after it --resume goes on from that of step {usable[-1]}"
            if usable
            else "no checkpoint is as early: begin again with --overwrite"
        )
        raise InputError(
            f"{self.metrics} is whole to step {whole} only, and the newest checkpoint is of step "
            f"{made}: put the rows back; or {advice}"
        )

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
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            steps = list(self.checkpoints())
            kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "nothing was lost"
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise InputError(
                f"output_dir={self.folder}: {name} cannot be written: {reason}; {kept}. Make room, "
                "then go on with --resume"
            ) from error


@torch.no_grad()
def put(kept: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(placed_like(kept[name], tensor))


def is_table(value: dict[str, Any], columns: Sequence[str]) -> bool:
    """Lists of one length, of numbers in all columns but TEXTS."""
    if not set(columns) <= value.keys() or not all(isinstance(x, list) for x in value.values()):
        return False
    of_numbers = [x for name, x in value.items() if name not in TEXTS]
    return len({len(x) for x in value.values()}) == 1 and all(
        isinstance(x, Real) for column in of_numbers for x in column
    )


def is_of_the_disk(error: Exception) -> bool:
    """Libraries in Rust have errors of their own for what is an OSError in Python: tokenizers a
    bare Exception, with the system's number in its text."""
    if isinstance(error, InputError):
        return False
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)
