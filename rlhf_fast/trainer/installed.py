"""Whether the packages that the trainer stands on are there, and go together.

Their own message about a missing or wrong package is a traceback, or names another one.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType

from rlhf_fast.trainer.errors import InputError

INSTALL = 'pip install "rlhf_fast[train]"'


def load(module: str) -> ModuleType:
    """The module; a package of another version, missing or that does not load is one line."""
    check_versions()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"a package of the trainer does not load ({reason}): {INSTALL}") from error


@cache
def check_versions() -> None:
    """Every package of the extra `train` is installed, in a version that is known to work."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # transformers brings it
        raise InputError(f"the trainer's packages are not installed: {INSTALL}") from None
    try:
        lines = requires("rlhf_fast") or []
    except PackageNotFoundError:  # run from its folder, without an installation
        return
    missing = []
    for asked in map(Requirement, lines):
        if asked.marker and not asked.marker.evaluate({"extra": "train"}):
            continue
        try:
            found = version(asked.name)
        except PackageNotFoundError:
            missing.append(asked.name)
            continue
        if not asked.specifier.contains(found, prereleases=True):
            raise InputError(
                f"rlhf_fast {version('rlhf_fast')} works with {asked.name}{asked.specifier}, and "
                f"{asked.name} {found} is installed: {INSTALL}"
            )
    if missing:
        raise InputError(f"not installed: {', '.join(missing)}: {INSTALL}")


def check_peft(asked: str) -> None:
    """transformers says which peft its adapters need, and finds out only when one is added."""
    try:
        found = version("peft")
    except PackageNotFoundError:
        raise InputError(f'{asked} needs peft: pip install "rlhf_fast[lora]"') from None
    from packaging.version import Version
    from transformers import __version__ as transformers
    from transformers.integrations import peft as integration

    oldest = getattr(integration, "MIN_PEFT_VERSION", "0")
    if Version(found) < Version(oldest):
        raise InputError(
            f"{asked}: transformers {transformers} works with peft {oldest} or newer, and peft "
            f"{found} is installed: install a newer peft or an older transformers"
        )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{asked}: peft {found} does not load beside transformers {transformers}: {reason}"
        ) from error
