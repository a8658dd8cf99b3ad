"""Modules by the paths they had in 0.1: they still import, with a DeprecationWarning, until 0.3.

This folder lies on rlhf_fast's search path, so ``rlhf_fast.ppo`` finds ``moved/ppo.py``.
"""

from __future__ import annotations

import importlib
import sys
import warnings


def moved(old: str, new: str) -> None:
    """The module ``old`` is ``new`` from here on, one object under both names."""
    warnings.warn(f"{old} is now {new}; the old path goes in 0.3", DeprecationWarning, stacklevel=3)
    sys.modules[old] = importlib.import_module(new)
