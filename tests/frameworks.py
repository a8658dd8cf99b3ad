"""Import one module of a framework whose other dependencies are not installed.

verl and OpenRLHF need ray, vLLM, DeepSpeed and flash-attn, which CI has no use for. Their packages
are installed alone (``pip install --no-deps``); here the real module is imported with an empty
stand-in for each absent package. Nothing of the framework's own code is replaced. A stand-in only
lets ``import``, ``class X(Base)`` and decorators pass; it is gone from ``sys.modules`` once the
import is over, so a function that looks for an optional package later does not find one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import unittest.mock
from collections.abc import Iterator

# The packages that verl 0.9.1 and OpenRLHF 0.11.2 import at module level and CI does not have.
# flash_attn is listed by submodule: where its cross entropy is missing, both fall back to PyTorch.
VERL = ("cachetools", "codetiming", "deepspeed", "fastapi", "hydra", "omegaconf", "orjson", "peft",
        "ray", "tensordict", "torchdata", "uvicorn", "wandb")  # fmt: skip
OPENRLHF = ("aiohttp", "deepspeed", "fastapi", "flash_attn.bert_padding", "flash_attn.utils",
            "peft", "pylatexenc", "ray", "torchdata", "uvicorn", "vllm", "wandb")  # fmt: skip


class _StandIn(type):
    """A class for every name of an absent package; may be derived from and may decorate."""

    def __getattr__(cls, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (), {})

    def __call__(cls, *args: object, **options: object) -> object:
        if len(args) == 1 and not options and isinstance(args[0], type | types.FunctionType):
            return args[0]  # @ray.remote
        return cls  # @ray.remote(...)


class _Finder:
    def __init__(self, absent: tuple[str, ...]) -> None:
        self.absent = absent
        self.made: list[str] = []

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        for absent in self.absent:  # itself, what is below it, and the packages above it
            if f"{name}.".startswith(f"{absent}.") or f"{absent}.".startswith(f"{name}."):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_StandIn(spec.name, (), {}), name)
        self.made.append(spec.name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def standing_in(absent: tuple[str, ...]) -> Iterator[None]:
    """Inside: each package of ``absent`` that is not installed can be imported, empty."""
    finder = _Finder(absent)
    look_up = importlib.util.find_spec

    def installed(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        """transformers asks so whether peft is there, and remembers the answer."""
        spec = look_up(name, package)
        return None if spec is None or spec.loader is finder else spec

    sys.meta_path.append(finder)  # last: what is installed is found first
    try:
        with unittest.mock.patch("importlib.util.find_spec", installed):
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


def load(name: str, absent: tuple[str, ...]) -> types.ModuleType:
    """The installed module ``name``, with stand-ins for what it imports and CI does not have."""
    with standing_in(absent):
        return importlib.import_module(name)
