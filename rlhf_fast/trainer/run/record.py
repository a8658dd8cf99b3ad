"""What a run's folder tells of the run, while it goes on or afterwards: read, never written."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.trainer.config import PPOConfig, RewardConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run import lock
from rlhf_fast.trainer.run.metrics import Row, has_step, read_metrics, read_rows
from rlhf_fast.trainer.run.owned import EVALUATIONS
from rlhf_fast.trainer.run.plot import panels_of


@dataclass
class Record:
    folder: Path
    config: dict[str, Any]  # as config.yaml has it
    rows: list[Row]  # of metrics.jsonl
    evaluations: list[dict[str, Any]]  # of metrics/eval.jsonl
    before: dict[str, list] | None
    after: dict[str, list] | None
    summary: dict[str, Any] | None  # of a finished run
    holder: dict[str, Any]  # the process that writes there

    @property
    def is_ppo(self) -> bool:
        return "reward" in self.config

    @property
    def panels(self) -> list[tuple[str, str]]:
        return panels_of(self.rows)

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def steps(self) -> int | None:
        """All that it is to make; None where the config does not say."""
        return self.config.get("steps")

    @property
    def runs(self) -> bool:
        return self.summary is None and bool(self.holder)

    @property
    def state(self) -> str:
        if self.summary is not None:
            ended = self.summary.get("ended_after_step")
            return "finished" if ended is None else f"finished, ended by a callback after {ended}"
        if self.holder:
            return f"running, process {self.holder.get('pid')} on {self.holder.get('host')}"
        return "not running and not finished: --resume goes on"

    def options(self) -> dict[str, tuple[Any, bool]]:
        """{name: (value, whether it is the default)}."""
        default = {
            f.name: None if f.default is MISSING else f.default
            for f in fields(PPOConfig if self.is_ppo else RewardConfig)
        }
        return {
            name: (value, name in default and value == default[name])
            for name, value in self.config.items()
        }


def read(folder: Path) -> Record:
    if not folder.is_dir():
        raise InputError(f"run={folder} is {'a file' if folder.exists() else 'not there'}")
    holder = lock.holder(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        if not holder:
            raise InputError(f"run={folder} holds no run: it has no config.yaml")
        config = {}  # it has just begun
    else:
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict) or "output_dir" not in config:
            raise InputError(f"run={folder} holds no run: {path.name} is not one's")
    return Record(
        folder, config, read_metrics(folder / "metrics.jsonl"),
        read_rows(folder / EVALUATIONS, has_step),
        *(load(folder / f"{name}.json") for name in ("before", "after", "summary")), holder,
    )  # fmt: skip


def load(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} cannot be read: it has no results")
    return value
