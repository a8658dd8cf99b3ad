"""Files that are complete or not there: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """A temporary path for a file or folder that takes target's place when it is complete."""
    partial = partial or target.with_name(f".{target.name}.partial")
    aside = target.with_name(f".{target.name}.old")
    remove(partial)
    try:
        yield partial
    except (Exception, KeyboardInterrupt, SystemExit):  # mostly a full disk: give back what it took
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


def tidy(target: Path) -> None:
    """Finish or undo what a kill broke off in `replacing(target)`."""
    aside = target.with_name(f".{target.name}.old")
    if aside.exists() and not target.exists():  # it came between the two renames
        os.replace(aside, target)
    remove(aside)
    remove(target.with_name(f".{target.name}.partial"))


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """torch.save, but a failing write is the OSError that torch hides behind its own."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def flush(path: Path) -> None:
    """Wait until the bytes are on the disk: a power cut may keep a rename and lose them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
