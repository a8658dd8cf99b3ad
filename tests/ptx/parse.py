"""The text of a PTX kernel as a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16,
    "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "f16": np.float16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip


class UnknownInstruction(Exception):
    """One that the interpreter has no function for."""


class Register(NamedTuple):
    name: str


class Special(NamedTuple):
    """%tid.x and the like."""

    name: str


class Constant(NamedTuple):
    """Bits of a float (its width in bytes) or an integer (width 0: as wide as it is used)."""

    bits: int
    width: int = 0


class Address(NamedTuple):
    """[base + offset]; without a base, of a parameter or of a place in shared memory."""

    base: Register | None
    offset: int


class Group(NamedTuple):
    """{a, b, …}"""

    parts: tuple[Operand, ...]


Operand = Register | Special | Constant | Address | Group
SINK = Register("_")


@dataclass(frozen=True)
class Instruction:
    text: str
    name: str  # before the first dot
    modifiers: tuple[str, ...]  # between the dots, types not among them
    types: tuple[str, ...]  # the types at its end: of the result, where there are two
    operands: tuple[Operand, ...]
    predicate: Register | None = None
    negated: bool = False
    target: str = ""  # a branch's label

    @property
    def dtype(self) -> type[np.generic]:
        return TYPES[self.types[-1]]


@dataclass(frozen=True)
class Program:
    name: str
    threads: int  # of a block
    parameters: tuple[type[np.generic], ...]
    registers: dict[str, type[np.generic]]  # by prefix, or by name where there is one
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def register_type(self, name: str) -> type[np.generic]:
        return self.registers[re.sub(r"\d+$", "", name) if name not in self.registers else name]


def parse(text: str) -> Program:
    """The one kernel of a PTX module."""
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\(([^)]*)\)(.*?)\n\{(.*?)\n\}", text, re.S)
    assert entry, "no kernel in the PTX"
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    assert threads, "the kernel does not say how many threads a block has"
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, type[np.generic]] = {}
    for statement in re.split(r"[;\n]", body):
        statement = statement.strip().lstrip("{").strip()  # which opens a scope
        if label := re.fullmatch(r"(\$?\w+):", statement):
            labels[label[1]] = len(instructions)
        elif declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%?\w+?)(?:<\d+>)?", statement):
            registers[declared[2]] = TYPES[declared[1]]
        elif statement not in ("", "}") and not statement.startswith("."):
            instructions.append(instruction(statement))
    kinds = tuple(TYPES[kind] for kind in re.findall(r"\.param\s+\.(\w+)", parameters))
    return Program(name, int(threads[1]), kinds, registers, tuple(instructions), labels)


def instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
    if not found:
        raise UnknownInstruction(text)
    negated, predicate, opcode, rest = found.groups()
    name, *parts = opcode.split(".")
    types = tuple(part for part in parts if part in TYPES)
    modifiers = tuple(part for part in parts if part not in TYPES)
    guard = Register(predicate) if predicate else None
    if name == "bra":
        return Instruction(text, name, modifiers, types, (), guard, bool(negated), rest.strip())
    operands = tuple(operand(part) for part in split(rest))
    return Instruction(text, name, modifiers, types, operands, guard, bool(negated))


def split(operands: str) -> list[str]:
    """At the commas that are not in braces."""
    return [x.strip() for x in re.split(r",(?![^{]*\})", operands) if x.strip()]


def place(name: str) -> int | None:
    """Where something that has a name begins: shared memory, a parameter of 8 bytes each."""
    if name == "global_smem":
        return 0
    number = re.fullmatch(r"\w+_param_(\d+)", name)
    return 8 * int(number[1]) if number else None


def operand(text: str) -> Operand:
    if text.startswith("{"):
        return Group(tuple(operand(part) for part in split(text[1:-1])))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        start, moved = place(base), int(offset or "0", 0)
        return Address(Register(base), moved) if start is None else Address(None, start + moved)
    if (start := place(text)) is not None:
        return Constant(start)
    if re.fullmatch(r"%\w+\.[xyz]", text):
        return Special(text)
    if text.startswith(("0f", "0d")):
        return Constant(int(text[2:], 16), 4 if text[1] == "f" else 8)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return Constant(int(text.rstrip("U"), 0))
    return Register(text)
