"""Functions of libraries that need not be installed whole.

verl and OpenRLHF import Ray, vLLM or DeepSpeed beside functions of pure PyTorch, and torchtune asks
for torchao. ``bench/peers.txt`` puts their code into ``bench/.peers``, where nothing else looks,
and here one module at a time is taken out of it: its parent packages are bare (their ``__init__``
does not run), and what it imports but the measured functions never touch is a placeholder.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent / ".peers"
NOT_INSTALLED = "not installed: make bench"


class NotHere(Exception):
    """A peer that cannot run here, and why: it has not failed."""


Placeholders = Mapping[str, Mapping[str, object]]


def load(
    name: str, *, bare: tuple[str, ...] = (), placeholders: Placeholders | None = None
) -> ModuleType:
    """Module ``name`` out of bench/.peers, or of the library where it is installed.
    ``placeholders``: names that stand in a module that is absent, or in one of the library's own
    that would import too much."""
    library = name.split(".")[0]
    folder = FOLDER
    if not (FOLDER / library).is_dir():
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            raise NotHere(NOT_INSTALLED)
        folder = Path(spec.origin).parent.parent
    with _on_path(folder), _standing_in(folder, library, bare, placeholders or {}):
        return importlib.import_module(name)


def version(distribution: str) -> str | None:
    """What the bench runs of it: the copy in bench/.peers, else the installed one."""
    for found in metadata.distributions(name=distribution, path=[str(FOLDER)]):
        return found.version
    return installed(distribution)


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def absent(module: str) -> bool:
    """Whether a library that is meant to be installed as usual is not."""
    return importlib.util.find_spec(module) is None


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _standing_in(
    folder: Path, library: str, bare: tuple[str, ...], placeholders: Placeholders
) -> Iterator[None]:
    """Bare packages stay, for imports inside a function; what stands in for a package that is not
    there is taken away again, so that nobody else takes it for the real one."""
    borrowed = []
    for package in bare:
        if package not in sys.modules:
            module, path = ModuleType(package), folder / package.replace(".", "/")
            module.__path__ = [str(path)]
            module.__spec__ = ModuleSpec(package, None, origin=str(path / "__init__.py"))
            sys.modules[package] = module
    for package, names in placeholders.items():
        own = package.split(".")[0] == library
        if package not in sys.modules:
            if not own and not absent(package.split(".")[0]):
                continue
            sys.modules[package] = ModuleType(package)
            borrowed += [] if own else [package]
        elif not own:
            continue
        vars(sys.modules[package]).update(names)
    try:
        yield
    finally:
        for package in borrowed:
            del sys.modules[package]
