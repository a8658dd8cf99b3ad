"""Put functions in the place of a framework's, all or none, and take them back."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


class UnknownSignature(RuntimeError):
    """The framework's function is not one that the adapter was written for."""


def found(framework: str, package: str, versions: str, install: str, *names: str) -> list[Any]:
    """What a framework has by these names, "module:attribute" or "module:Class.attribute".

    Raises:
        ImportError: the framework, or what it imports itself, is not installed.
        UnknownSignature: it is installed and does not have them: another version.
    """

    def absent(error: Exception) -> ImportError:
        reason = " ".join(str(error).split())
        return ImportError(
            f"rlhf_fast.integrations.{package} needs {framework}: pip install {install} ({reason})"
        )

    def look_up(name: str) -> Any:
        module, _, path = name.partition(":")
        try:
            thing: Any = importlib.import_module(module)
            for part in path.split("."):
                thing = getattr(thing, part)
        except (ImportError, AttributeError, RuntimeError) as error:
            missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else ""
            if missing and not f"{missing}.".startswith(f"{package}."):
                raise absent(error) from error
            what = f"{module}.{path} is not there ({error})"
            raise unknown(framework, package, versions, what) from error
        return thing

    with warnings.catch_warnings():  # TRL warns of its experimental modules
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise absent(error) from error
        return [look_up(name) for name in names]


def unknown(framework: str, package: str, versions: str, what: str) -> UnknownSignature:
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
    return UnknownSignature(
        f"{framework} {version}: {' '.join(what.split())}. rlhf_fast works with "
        f"{framework} {versions}; nothing was replaced."
    )


@dataclass(frozen=True)
class Replacement:
    """One function of the framework and what takes its place.

    Args:
        module: where the framework defines it (or, with ``only_here``, uses it).
        name: its name there; ``Class.method`` for a method.
        by_signature: the signatures it is known to have (parameters and defaults, without
            annotations; see ``signature``), each with the replacement for it.
        optional: some known versions do not have it.
        only_here: leave the other modules that imported the name alone.
    """

    module: str
    name: str
    by_signature: dict[str, Callable]
    optional: bool = False
    only_here: bool = False


class Patch:
    """Replacements for one framework. Also a context manager that takes them back at its end."""

    def __init__(self, framework: str, package: str, versions: str, *parts: Replacement) -> None:
        self.framework, self.package, self.versions = framework, package, versions
        self.parts = parts
        self.replaced: list[str] = []
        self._swaps: list[tuple[Any, Callable, Callable, bool]] = []

    def apply(self) -> Patch:
        """Replace everything, after every signature was checked; a second call changes nothing.

        Raises:
            UnknownSignature: a function is missing or has another signature; nothing was replaced.
        """
        if not self._swaps:
            self._swaps = [found for part in self.parts if (found := self._find(part))]
            for owner, old, new, everywhere in self._swaps:
                self.replaced += self._swap(owner, old, new, everywhere)
        return self

    def undo(self) -> None:
        """Put the framework's own functions back, in modules imported since the patch too."""
        for owner, old, new, everywhere in self._swaps:
            self._swap(owner, new, old, everywhere)
        self._swaps, self.replaced = [], []

    def __enter__(self) -> Patch:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"rlhf_fast in {self.framework}: " + (", ".join(self.replaced) or "nothing replaced")

    def _find(self, part: Replacement) -> tuple[Any, Callable, Callable, bool] | None:
        """(owner, the framework's, ours, in every module?), or None where it may be absent."""
        *classes, name = part.name.split(".")
        try:
            with warnings.catch_warnings():  # TRL warns of its experimental modules
                warnings.simplefilter("ignore")
                owner: Any = importlib.import_module(part.module)
            for outer in classes:
                owner = getattr(owner, outer)
            old = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            if part.optional:
                return None
            raise self._unknown(part, f"is not there ({error})") from error
        found = signature(old)
        if found not in part.by_signature:
            expected = " or ".join(part.by_signature)
            raise self._unknown(part, f"takes {found}, expected {expected}")
        return owner, old, part.by_signature[found], not (classes or part.only_here)

    def _unknown(self, part: Replacement, what: str) -> UnknownSignature:
        return unknown(
            self.framework, self.package, self.versions, f"{part.module}.{part.name} {what}"
        )

    def _swap(self, owner: Any, old: Callable, new: Callable, everywhere: bool) -> list[str]:
        """Replace ``old`` in its owner or in every loaded module; the names of the places."""
        owners = self._modules() if everywhere else [owner]
        places = []
        for place in owners:
            for name, value in list(vars(place).items()):
                if value is old:
                    setattr(place, name, new)
                    places.append(f"{place.__name__}.{name}")
        return places

    def _modules(self) -> list[ModuleType]:
        loaded = [(name, module) for name, module in sys.modules.items() if module is not None]
        return [module for name, module in loaded if f"{name}.".startswith(f"{self.package}.")]


def signature(function: Callable) -> str:
    """Parameters and defaults without annotations, as "(logits, index, temperature=1.0)".

    Of a class, or of the ``apply`` of an autograd Function, those of its own ``__init__``, if it
    has one, and ``forward``.
    """
    function = getattr(function, "__self__", function)
    if inspect.isclass(function):
        own = vars(function)
        methods = [own[name] for name in ("__init__", "forward") if name in own]
        return " ".join(signature(getattr(method, "__func__", method)) for method in methods)
    empty = inspect.Parameter.empty
    full = inspect.signature(function)
    plain = [parameter.replace(annotation=empty) for parameter in full.parameters.values()]
    return str(full.replace(parameters=plain, return_annotation=empty))
