"""What ends a run with one line in place of a traceback."""

from __future__ import annotations


class Ended(SystemExit):
    """By a signal other than Ctrl-C's, which is a KeyboardInterrupt. Its code is 128 + signal."""


class InputError(ValueError):
    """Something the user gave cannot work. The command line prints it as one line, no traceback."""
