"""Which files of a folder this program wrote: no other may it delete or write over.

A folder that a run has begun in has the file `.rlhf_fast.json` with a fingerprint of every model
and checkpoint that was written there: one that was put in its place, or added to it, is somebody
else's. The run's small records are ours by their names, since a run begins only where there are
none of these names, and people do edit them.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.files import replacing

MARK = ".rlhf_fast.json"
EVALUATIONS = "metrics/eval.jsonl"
RECORDS = ("metrics.jsonl", EVALUATIONS, "summary.json", "contents.json", "before.json",
           "after.json", "config.yaml")  # fmt: skip
SAMPLES, SAMPLE = 16, 2**16  # blocks of a file that its fingerprint reads, bytes of each

Fingerprint = dict[str, list[int] | None]  # file of a folder, or "" -> size and checksum


class Owned:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / MARK
        self.begun = self.file.is_file()
        self.known: dict[str, list[Fingerprint]] = self.read() if self.begun else {}

    def read(self) -> dict[str, list[Fingerprint]]:
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))["written"]
            if all(isinstance(p, dict) for prints in known.values() for p in prints):
                return known
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        raise InputError(
            f"{self.file} cannot be read, which says what this program wrote there: without the "
            "file --resume goes on, but a model that is there already must be moved away first"
        )

    def begin(self) -> None:
        """Where there are no others' files of a run's names."""
        if not self.begun:
            self.save()
            self.begun = True

    def save(self) -> None:
        with replacing(self.file) as partial:
            partial.write_text(json.dumps({"written": self.known}), encoding="utf-8")

    def record(self, name: str, partial: Path) -> None:
        """`partial` is about to take the place of `name`: either may be there after a kill."""
        now = fingerprint(self.folder / name)
        kept = [p for p in self.known.get(name, []) if p == now]
        self.known[name] = [*kept, fingerprint(partial)]
        self.save()

    def forget(self, name: str) -> None:
        """It was deleted; noted with the next record."""
        self.known.pop(name, None)

    def strangers(self, name: str) -> list[str]:
        """What of the file or folder `name` was not written by this program, by name."""
        path = self.folder / name
        if not os.path.lexists(path):
            return []
        if path.is_symlink():
            return [f"{name} (a link)"]
        if name in RECORDS:
            return [] if self.begun and path.is_file() else [name]
        found, known = fingerprint(path), self.known.get(name, [])
        if found in known:
            return []
        if not known:
            return [name]
        other = [part for part, mark in found.items() if mark != known[-1].get(part)]
        return [f"{name}/{part}" if part else name for part in other] or [name]


def fingerprint(path: Path) -> Fingerprint:
    """Of a file, or of each file of a folder; None stands for what is neither, links included."""
    if path.is_dir():
        parts = (p for p in sorted(path.rglob("*")) if p.is_symlink() or not p.is_dir())
        return {str(part.relative_to(path)): checksum(part) for part in parts}
    return {"": checksum(path)}


def checksum(path: Path) -> list[int] | None:
    """Size and CRC of blocks spread evenly over a file, its ends among them: it is to tell files
    apart, not to find damage, and a model is read at 1 MiB."""
    if path.is_symlink() or not path.is_file():
        return None
    size, crc = path.stat().st_size, 0
    with open(path, "rb") as file:
        if size <= SAMPLES * SAMPLE:
            return [size, zlib.crc32(file.read())]
        for i in range(SAMPLES):
            file.seek((size - SAMPLE) * i // (SAMPLES - 1))
            crc = zlib.crc32(file.read(SAMPLE), crc)
    return [size, crc]


def inputs(config: Any) -> dict[str, Path]:
    """{"option=value": path} of all that a config names and that is there."""
    found = {}
    for name, given in vars(config).items():
        if name == "output_dir":
            continue
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, str):
                continue
            for path in (value, value.rpartition(":")[0]):  # file.py:function
                if path and os.path.exists(os.path.expanduser(path)):
                    found[f"{name}={value}"] = Path(path).expanduser().resolve()
    return found
