"""Ctrl-C while a command still imports torch and transformers, which takes seconds: one line.

An import that is broken off ends in a traceback of the library it was in, or is taken for an error
by it. Nothing has been written then, so the process simply ends.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def quietly(number: int, frame: Any) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)


def is_command() -> bool:
    """Whether this process is `rlhf-fast …` or `python -m rlhf_fast.… …`, not a user's program."""
    words = sys.orig_argv
    if sys.argv[:1] == ["-m"]:  # its package is imported before the module is found
        return words[words.index("-m") + 1].startswith("rlhf_fast.")
    return os.path.basename(sys.argv[0] if sys.argv else "") == "rlhf-fast"


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, quietly)
