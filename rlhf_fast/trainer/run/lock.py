"""One run in a folder at a time: the process that writes there holds a lock on a file in it.

The system gives the lock back when its process dies, however it dies, and knows it on every machine
that shares the folder, if the file system has locks. The file's text only names the holder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from rlhf_fast.trainer.errors import InputError

NAME = ".rlhf_fast.lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

held: dict[Path, int] = {}  # of this process: {folder: file}; another Run of it may go on there


def check(folder: Path) -> None:
    """Refuse a folder that another process writes to."""
    file = folder / NAME
    if folder.resolve() in held or not file.exists():
        return
    handle = os.open(file, os.O_RDWR)
    try:
        acquire(handle, folder)
    finally:
        os.close(handle)  # which gives it back


def take(folder: Path) -> None:
    if folder.resolve() in held:
        return
    handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        acquire(handle, folder)
        since = datetime.now().isoformat(" ", "seconds")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
    except BaseException:
        os.close(handle)
        raise
    held[folder.resolve()] = handle


def release() -> None:
    """All that this process holds."""
    while held:
        _, handle = held.popitem()
        try:
            os.ftruncate(handle, 0)
        except OSError:
            pass
        os.close(handle)


def acquire(handle: int, folder: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = read(handle)
        if error.errno in NO_LOCKS:  # then its name is all there is
            if not lives_here(holder):
                return
        elif error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise InputError(
            f"output_dir={folder} is in use by process {holder.get('pid', 'unknown')} on "
            f"{holder.get('host', 'an unknown machine')} (since {holder.get('since', 'unknown')}), "
            "perhaps left over by a launcher that was killed: wait for its end, end it, or choose "
            "another folder"
        ) from None


def read(handle: int) -> dict:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def lives_here(holder: dict) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def holder(folder: Path) -> dict:
    """Who writes there, by the file's text and without touching the lock; {} if nobody does.

    Of a process on another machine it is not known whether it lives."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("host") != socket.gethostname():
        return found if isinstance(found, dict) else {}
    return found if found.get("pid") == os.getpid() or lives_here(found) else {}
