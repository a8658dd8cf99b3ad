"""Triton's launches, each compiled for sm_90 and its PTX interpreted."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .instructions import function_of
from .machine import Machine, Step
from .memory import Global
from .parse import Program, parse

TARGET = GPUTarget("cuda", 90, 32)


class Compiled(NamedTuple):
    program: Program
    functions: list[Step | None]
    shared_size: int


class Launches:
    """``run`` takes the place of JITFunction.run."""

    def __init__(self) -> None:
        self.backend = make_backend(TARGET)
        self.compiled: dict[str, Compiled] = {}
        self.count: Counter[str] = Counter()  # by kernel
        self.beyond: Counter[str] = Counter()  # loads that read beyond a tensor

    def run(self, fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(fn.signature, fn.params, self.backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = fn._pack_args(
            self.backend, kwargs, bound, specialization, options
        )
        key = f"{fn.module}.{fn.__name__} {signature} {constants} {attributes} {options.num_warps}"
        if key not in self.compiled:
            made = triton.compile(
                ASTSource(fn, signature, constants, attributes), target=TARGET,
                options={"num_warps": options.num_warps},
            )  # fmt: skip
            program = parse(made.asm["ptx"])
            functions = [function_of(x) for x in program.instructions]
            self.compiled[key] = Compiled(program, functions, made.metadata.shared)
        passed = [bound[name] for name, kind in signature.items() if kind != "constexpr"]
        self.beyond[fn.__name__] += launch(self.compiled[key], passed, grid)
        self.count[fn.__name__] += 1


def launch(kernel: Compiled, passed: list[Any], grid: tuple[int, ...]) -> int:
    """The number of loads that read beyond a tensor."""
    memory = Global(x for x in passed if isinstance(x, Tensor))
    values = [memory.address(x) if isinstance(x, Tensor) else x for x in passed]
    kinds = kernel.program.parameters
    values += [0] * (len(kinds) - len(values))  # Triton's own: memory that no kernel here asks for
    parameters = np.array([bits(x, kind) for x, kind in zip(values, kinds, strict=True)], np.uint64)
    sizes = (*grid, 1, 1)[:3]
    machine = Machine(kernel.program, sizes, parameters, memory, kernel.shared_size)
    machine.run(kernel.functions)
    memory.give_back()
    return memory.beyond


def bits(x: Any, kind: type[np.generic]) -> int:
    if issubclass(kind, np.floating):
        return int(np.array([x], kind).view(f"u{np.dtype(kind).itemsize}")[0])
    return int(x) & (2 ** (8 * np.dtype(kind).itemsize) - 1)
