"""What each instruction does: one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import FLOW, WARP, Machine, Step, Values, as_type
from .memory import typed
from .parse import TYPES, Group, Instruction, Operand, UnknownInstruction

WIDER: dict[type[np.generic], type[np.generic]] = {
    np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64,
}  # fmt: skip


def computed(function: Callable[..., Values]) -> Step:
    """d = function(a, b, …), all of one type; .ftz takes subnormal numbers as 0, and gives none."""

    def step(machine: Machine, x: Instruction) -> None:
        given = [machine.read(a, x.dtype) for a in x.operands[1:]]
        if "ftz" in x.modifiers:
            given = [flushed(a) for a in given]
        result = function(*given)
        machine.write(x.operands[0], flushed(result) if "ftz" in x.modifiers else result)

    return step


def flushed(x: Values) -> Values:
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def fused(a: Values, b: Values, c: Values) -> Values:
    """a·b + c, rounded once (float32: by way of float64)."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    product = a * b
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)  # of the sum (Knuth); and, below, of the product
    (a1, a2), (b1, b2) = halves(a), halves(b)
    lost = lost + (((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2)
    return np.where(np.isfinite(lost), total + lost, total)


def halves(x: Values) -> tuple[Values, Values]:
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


def quotient(a: Values, b: Values) -> Values:
    if issubclass(a.dtype.type, np.floating):
        return a / b
    return (a - np.fmod(a, b)) // b  # towards 0


def coarse_reciprocal(x: Values) -> Values:
    """rcp.approx.ftz.f64: the low 32 bits of the result are 0."""
    return ((1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def multiplied(machine: Machine, x: Instruction) -> None:
    """mul and mad: .lo, or .wide with a result of twice the width."""
    result: type[np.generic] = WIDER[x.dtype] if "wide" in x.modifiers else x.dtype
    a, b = (machine.read(y, x.dtype).astype(result) for y in x.operands[1:3])
    product = a * b
    if x.name == "mad":
        product = product + machine.read(x.operands[3], result)
    machine.write(x.operands[0], product)


def extreme(plain: Any, with_nan: Any) -> Step:
    """min and max give the number where one operand is NaN, .NaN gives NaN."""
    steps = {False: computed(plain), True: computed(with_nan)}
    return lambda machine, x: steps["NaN" in x.modifiers](machine, x)


def shifted(machine: Machine, x: Instruction) -> None:
    """By as many bits as there are, and more, too."""
    value, bits = machine.read(x.operands[1], x.dtype), machine.read(x.operands[2], np.uint32)
    width = 8 * value.itemsize
    most = np.minimum(bits, width - 1).astype(x.dtype)
    if x.name == "shl":
        result = np.where(bits < width, value << most, 0)
    else:
        signed = issubclass(x.dtype, np.signedinteger)
        result = np.where(signed | (bits < width), value >> most, 0)
    machine.write(x.operands[0], result.astype(x.dtype))


def field(machine: Machine, x: Instruction) -> None:
    """bfe of an unsigned number: `length` bits from bit `start`."""
    if x.types[-1] not in ("u32", "u64"):
        raise UnknownInstruction(x.text)
    value = machine.read(x.operands[1], x.dtype).astype(np.uint64)
    start, length = (machine.read(y, np.uint32) & np.uint64(255) for y in x.operands[2:4])
    kept = (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1)
    machine.write(x.operands[0], ((value >> np.minimum(start, 63)) & kept).astype(x.dtype))


def permuted(machine: Machine, x: Instruction) -> None:
    """prmt: each byte one of the 8 of two registers, or its sign 8 times."""
    low, high, chosen = (machine.read(y, np.uint32).astype(np.uint64) for y in x.operands[1:4])
    both, result = low | (high << np.uint64(32)), np.uint64(0)
    for i in range(4):
        which = (chosen >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
        byte = np.where(which > 7, sign, byte)
        result = result | (byte << np.uint64(8 * i))
    machine.write(x.operands[0], result.astype(np.uint32))


COMPARISONS: dict[str, Callable[..., Values]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def compared(machine: Machine, x: Instruction) -> None:
    """setp; of floats, the comparisons that end in u are true where one is NaN."""
    a, b = (machine.read(y, x.dtype) for y in x.operands[1:3])
    if "ftz" in x.modifiers:
        a, b = flushed(a), flushed(b)
    how = x.modifiers[0]
    nan = np.isnan(a) | np.isnan(b) if issubclass(x.dtype, np.floating) else np.False_
    if how in ("nan", "num"):
        result = nan if how == "nan" else ~nan
    elif how in COMPARISONS:
        result = COMPARISONS[how](a, b) & ~nan
    elif how[:-1] in COMPARISONS and how.endswith("u"):
        result = COMPARISONS[how[:-1]](a, b) | nan
    else:
        raise UnknownInstruction(x.text)
    machine.write(x.operands[0], result)


def selected(machine: Machine, x: Instruction) -> None:
    a, b = (machine.read(y, x.dtype) for y in x.operands[1:3])
    machine.write(x.operands[0], np.where(machine.read(x.operands[3], np.bool_), a, b))


def moved(machine: Machine, x: Instruction) -> None:
    """mov, also of a register to its parts and back."""
    target, source = x.operands
    parts = target if isinstance(target, Group) else source if isinstance(source, Group) else None
    if parts is None:
        machine.write(target, machine.read(source, x.dtype))
        return
    width = np.dtype(x.dtype).itemsize
    part = TYPES[f"b{8 * width // len(parts.parts)}"]
    if parts is target:
        whole = np.ascontiguousarray(machine.read(source, x.dtype)).view(part)
        for i, register in enumerate(parts.parts):
            machine.write(register, whole[i :: len(parts.parts)])
        return
    pieces = [np.broadcast_to(machine.read(y, part), machine.count) for y in parts.parts]
    machine.write(target, np.stack(pieces, 1).view(x.dtype)[:, 0])


def to_bfloat16(x: Values) -> Values:
    """To nearest, to even."""
    bits = x.view(np.uint32)
    rounded = (bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def converted(machine: Machine, x: Instruction) -> None:
    """cvt: between integers, from them to floats, and between floats."""
    to, source = x.types
    given = [machine.read(y, TYPES[source]) for y in x.operands[1:]]
    if "ftz" in x.modifiers:
        given = [flushed(y) for y in given]
    if to in ("bf16x2", "f16x2"):  # the second operand is the low half
        high, low = (narrowed(y, to[:-2]).astype(np.uint32) for y in given)
        result = (high << np.uint32(16)) | low
    elif to in ("bf16", "f16"):
        result = narrowed(given[0], to)
    elif source == "bf16":
        result = (given[0].astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif source[0] == "f" and to[0] != "f":
        raise UnknownInstruction(x.text)  # would have to be cut off at the integers' ends
    elif "rmi" in x.modifiers:
        result = np.floor(given[0])
    elif "rni" in x.modifiers or "rzi" in x.modifiers:
        result = (np.rint if "rni" in x.modifiers else np.trunc)(given[0])
    else:
        result = given[0].astype(TYPES[to])
    machine.write(x.operands[0], result)


def narrowed(x: Values, to: str) -> Values:
    return to_bfloat16(x) if to == "bf16" else x.astype(np.float16).view(np.uint16)


def parts(x: Operand) -> tuple[Operand, ...]:
    return x.parts if isinstance(x, Group) else (x,)


def loaded(machine: Machine, x: Instruction) -> None:
    targets, place = parts(x.operands[0]), x.operands[1]
    if "param" in x.modifiers:
        values = machine.parameters[machine.addresses(place) // 8]
        machine.write(targets[0], machine.spread(as_type(values, x.dtype)))
        return
    width, addresses = np.dtype(x.dtype).itemsize, machine.addresses(place)
    if "global" in x.modifiers:
        values = machine.memory.load(addresses, width, len(targets))
    else:
        running = machine.running
        found = machine.shared.load(
            addresses, machine.block[running], running, width * len(targets)
        )
        values = typed(np.ascontiguousarray(found), width)
    for i, target in enumerate(targets):
        machine.write(target, machine.spread(values[:, i]).view(x.dtype))


def stored(machine: Machine, x: Instruction) -> None:
    place, sources = x.operands[0], parts(x.operands[1])
    unsigned = np.dtype(f"u{np.dtype(x.dtype).itemsize}").type
    values = np.stack([machine.of_running(machine.read(y, unsigned)) for y in sources], 1)
    running, addresses = machine.running, machine.addresses(place)
    blocks = machine.block[running]
    if "global" in x.modifiers:
        machine.memory.store(addresses, values, blocks)
    else:
        machine.shared.store(addresses, blocks, running, values.view(np.uint8))


def shuffled(machine: Machine, x: Instruction) -> None:
    """shfl.sync: another lane's value, one's own where there is none (PTX ISA, its pseudocode)."""
    machine.whole_warps()
    targets, value = x.operands[0], np.broadcast_to(
        machine.read(x.operands[1], np.uint32), machine.count
    )  # fmt: skip
    by, bounds = (machine.read(y, np.uint32).astype(np.int64) for y in x.operands[2:4])
    segment, clamp, lane = bounds >> 8 & 31, bounds & 31, machine.lane
    top = (lane & segment) | (clamp & ~segment)
    mode = next(m for m in x.modifiers if m != "sync")
    source = {
        "bfly": lane ^ by, "up": lane - by, "down": lane + by,
        "idx": (lane & segment) | (by & ~segment),
    }[mode]  # fmt: skip
    there = source >= top if mode == "up" else source <= top
    source = machine.thread - lane + np.where(there, source, lane)
    machine.write(targets, value[source])


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip


def reduced(machine: Machine, x: Instruction) -> None:
    """redux.sync: of a warp."""
    machine.whole_warps()
    function = REDUCTIONS[next(m for m in x.modifiers if m != "sync")]
    values = np.broadcast_to(machine.read(x.operands[1], x.dtype), machine.count)
    result = function.reduce(values.reshape(-1, WARP), axis=1, dtype=x.dtype)
    machine.write(x.operands[0], np.repeat(result, WARP))


def matrices(machine: Machine, x: Instruction) -> None:
    """ldmatrix and stmatrix: 8 x 8 of 16 bits, matrix j's rows where lanes 8j to 8j + 7 point; lane
    t has elements 2(t % 4) and the next of row t // 4."""
    machine.whole_warps()
    stores = x.name == "stmatrix"
    place, registers = x.operands if stores else x.operands[::-1]
    running, addresses = machine.running, machine.addresses(place).reshape(-1, 4, 8)
    blocks = machine.block[running].reshape(-1, WARP)[:, :8].reshape(-1)
    # threads of one warp meet here; the row's other lanes are no others
    leaders = running.reshape(-1, WARP)[:, :1].repeat(8, 1).reshape(-1)
    for j, register in enumerate(parts(registers)):
        rows = addresses[:, j].reshape(-1)
        if stores:
            value = machine.of_running(machine.read(register, np.uint32))
            content = np.ascontiguousarray(value).view(np.uint8).reshape(-1, 16)
            machine.shared.store(rows, blocks, leaders, content)
        else:
            found = machine.shared.load(rows, blocks, leaders, 16)
            value = typed(np.ascontiguousarray(found), 4).reshape(-1)
            machine.write(register, machine.spread(value))


PLACES = {"global", "shared", "shared::cta", "param", "v2", "v4"}
WARPS = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "shared"}
SHUFFLES = {"sync", "bfly", "up", "down", "idx"}
COMPARING = {*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "nan", "num", "ftz"}

# name: (the modifiers that its function knows, the function)
TABLE: dict[str, tuple[set[str], Step]] = {
    "abs": ({"ftz"}, computed(np.abs)),
    "add": ({"rn"}, computed(np.add)),
    "and": (set(), computed(np.bitwise_and)),
    "bfe": (set(), field),
    "cvt": ({"rn", "ftz", "rmi", "rni", "rzi"}, converted),
    "div": ({"full", "rn"}, computed(quotient)),
    "ex2": ({"approx", "ftz"}, computed(np.exp2)),
    "fma": ({"rn", "ftz"}, computed(fused)),
    "ld": (PLACES, loaded),
    "ldmatrix": (WARPS, matrices),
    "lg2": ({"approx", "ftz"}, computed(np.log2)),
    "mad": ({"lo", "wide"}, multiplied),
    "max": ({"NaN"}, extreme(np.fmax, np.maximum)),
    "min": ({"NaN"}, extreme(np.fmin, np.minimum)),
    "mov": (set(), moved),
    "mul": ({"lo", "wide", "rn"}, multiplied),
    "neg": (set(), computed(np.negative)),
    "not": (set(), computed(np.invert)),
    "or": (set(), computed(np.bitwise_or)),
    "prmt": (set(), permuted),
    "rcp": ({"approx", "ftz"}, computed(coarse_reciprocal)),
    "redux": ({"sync", *REDUCTIONS}, reduced),
    "rem": (set(), computed(np.fmod)),
    "selp": (set(), selected),
    "setp": (COMPARING, compared),
    "shfl": (SHUFFLES, shuffled),
    "shl": (set(), shifted),
    "shr": (set(), shifted),
    "sqrt": ({"approx", "rn", "ftz"}, computed(np.sqrt)),
    "st": (PLACES, stored),
    "stmatrix": (WARPS, matrices),
    "sub": ({"rn"}, computed(np.subtract)),
    "xor": (set(), computed(np.bitwise_xor)),
}


def function_of(x: Instruction) -> Step | None:
    """None of what decides who goes on where, which the machine does itself."""
    if x.name in FLOW and set(x.modifiers) <= {"uni", "sync"}:
        return None
    if x.name not in TABLE or not set(x.modifiers) <= TABLE[x.name][0]:
        raise UnknownInstruction(x.text)
    return TABLE[x.name][1]
