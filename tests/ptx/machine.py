"""The threads of a launch: their registers, who runs, and where they meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import Fault, Global, Numbers, Shared
from .parse import SINK, Address, Constant, Instruction, Operand, Program, Register, Special

Values = NDArray[Any]
WARP = 32
FLOW = {"bra", "bar", "ret"}


class Machine:
    """All threads of all blocks, block after block. An operand is an array with an entry a thread,
    or of one entry where it is a constant."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        parameters: NDArray[np.uint64],
        memory: Global,
        shared_size: int,
    ) -> None:
        self.program, self.parameters, self.memory = program, parameters, memory
        self.blocks = grid[0] * grid[1] * grid[2]
        self.count = self.blocks * program.threads
        self.shared = Shared(self.blocks, shared_size)
        self.thread = np.arange(self.count)
        self.block, of_block = np.divmod(self.thread, program.threads)
        self.lane = of_block % WARP
        zero = np.zeros(1, np.uint32)
        self.special = {
            "%tid.x": of_block, "%tid.y": zero, "%tid.z": zero,
            "%ctaid.x": self.block % grid[0], "%ctaid.y": self.block // grid[0] % grid[1],
            "%ctaid.z": self.block // (grid[0] * grid[1]),
            **{f"%nctaid.{axis}": zero + size for axis, size in zip("xyz", grid, strict=True)},
        }  # fmt: skip
        self.registers: dict[str, Values] = {}
        self.active = np.ones(self.count, np.bool_)  # the threads that do the present instruction
        self.whole = True  # all of them

    # operands

    def read(self, operand: Operand, dtype: type[np.generic]) -> Values:
        if isinstance(operand, Register):
            return as_type(self.raw(operand), dtype)
        if isinstance(operand, Special):
            return self.special[operand.name].astype(dtype)
        assert isinstance(operand, Constant), operand
        width = np.dtype(dtype).itemsize
        if operand.width or not issubclass(dtype, np.floating):
            bits = operand.bits & (2 ** (8 * width) - 1)
            return np.array([bits], f"u{width}").view(dtype)
        return np.array([operand.bits], dtype)

    def raw(self, register: Register) -> Values:
        try:
            return self.registers[register.name]
        except KeyError:
            raise Fault(f"{register.name} is read before anything is in it") from None

    def write(self, target: Operand, values: Values) -> None:
        if target == SINK:
            return
        assert isinstance(target, Register), target
        values = as_type(values, self.program.register_type(target.name))
        before = self.registers.get(target.name)
        if before is None or self.whole:
            values = np.broadcast_to(values, self.count)
        else:
            values = np.where(self.active, values, before)
        self.registers[target.name] = values

    def addresses(self, operand: Operand) -> Numbers:
        """Of the active threads."""
        assert isinstance(operand, Address), operand
        if operand.base is None:
            return np.full(self.running.size, operand.offset)
        base = self.read(operand.base, np.int64)
        return self.of_running(base) + operand.offset

    @property
    def running(self) -> Numbers:
        return self.thread if self.whole else np.flatnonzero(self.active)

    def of_running(self, values: Values) -> Values:
        if values.size == 1:
            return np.broadcast_to(values, self.running.size)
        return values if self.whole else values[self.active]

    def spread(self, values: Values) -> Values:
        """An array of all threads, from the active ones' values."""
        if self.whole:
            return values
        result = np.zeros(self.count, values.dtype)
        result[self.active] = values
        return result

    def whole_warps(self) -> None:
        warps = self.active.reshape(-1, WARP)
        if not (warps.all(1) | ~warps.any(1)).all():
            raise Fault("an instruction of a whole warp, whose threads have parted")

    # threads

    def let(self, active: NDArray[np.bool_]) -> None:
        self.active, self.whole = active, bool(active.all())

    def run(self, functions: Sequence[Step | None]) -> None:
        """Until every thread has returned. functions: the instructions', None where one decides
        who goes on where."""
        self.places = {0: self.active}  # threads that can go on, by where
        self.waiting: dict[int, NDArray[np.bool_]] = {}  # at a barrier, by where
        with np.errstate(all="ignore"):
            while self.places or self.waiting:
                if not self.places:
                    self.meet()
                place = min(self.places)
                self.let(self.places.pop(place))
                self.go(place, min(self.places, default=len(functions)), functions)

    def go(self, place: int, until: int, functions: Sequence[Step | None]) -> None:
        """The active threads, to the place of others or to where they part, wait or return."""
        group, whole = self.active, self.whole
        while place < until:
            step, function = self.program.instructions[place], functions[place]
            place += 1
            chosen = group
            if step.predicate is not None:
                predicate = self.raw(step.predicate)
                chosen = group & (~predicate if step.negated else predicate)
            if function is None:
                self.flow(step, place, group, chosen)
                return
            if chosen is group:
                self.active, self.whole = group, whole
            elif chosen.any():
                self.let(chosen)
            else:
                continue
            try:
                function(self, step)
            except Fault as fault:
                raise Fault(f"{self.program.name}: {step.text}: {fault}") from None
        self.arrive(place, group)

    def flow(
        self, step: Instruction, after: int, group: NDArray[np.bool_], chosen: NDArray[np.bool_]
    ) -> None:
        if step.name == "bra":
            self.arrive(self.program.labels[step.target], chosen)
        elif step.name == "bar":
            self.waiting[after] = self.waiting.get(after, False) | chosen
        if chosen is not group:  # ret: nobody arrives anywhere
            self.arrive(after, group & ~chosen)

    def arrive(self, place: int, threads: NDArray[np.bool_]) -> None:
        if threads.any():
            self.places[place] = self.places[place] | threads if place in self.places else threads

    def meet(self) -> None:
        """All wait: every block's threads must be there, and at the same barrier."""
        for place, threads in self.waiting.items():
            there = threads.reshape(self.blocks, -1)
            if (there.any(1) != there.all(1)).any():
                raise Fault(f"{self.program.name}: a barrier that some threads of a block miss")
            self.shared.barrier(np.flatnonzero(there.any(1)))
            self.arrive(place, threads)
        self.waiting = {}


Step = Callable[[Machine, Instruction], None]


def as_type(values: Values, dtype: type[np.generic]) -> Values:
    """The bits of values: the low ones of wider, zeros above narrower ones."""
    if values.dtype == dtype:
        return values
    width = np.dtype(dtype).itemsize
    if values.itemsize != width:
        values = values.view(f"u{values.itemsize}").astype(f"u{width}")
    return values.view(dtype)
