"""Triton's interpreter with less ado: the same numbers, in a third of the time.

For processes in which every kernel is interpreted (TRITON_INTERPRET=1): nothing is put back.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def faster() -> None:
    interpreter._patch_lang = patched_once(interpreter._patch_lang)
    # Without debug=True the check for overflows of int32 is worked out, and its result thrown away.
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    interpreter.ScanOps.generic_scan = scanned_by_doubling
    # Types and shapes are made anew for every value, of which there are few: a fifth of the time.
    interpreter._get_np_dtype = once_a_name(interpreter._get_np_dtype)
    block_type, shape = once_a_name(tl.block_type), functools.cache(constant_shape)
    tl.block_type.with_element_ty = lambda self, scalar: block_type(scalar, self.shape)
    semantic.TritonSemantic.broadcast_impl_value = broadcast_where_needed(
        semantic.TritonSemantic.broadcast_impl_value
    )

    def tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape(type.shape if type.is_block() else ())

    tl.tensor.__init__ = tensor


def constant_shape(sizes: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def broadcast_where_needed(broadcast: Any) -> Any:
    """Triton compares a tuple with a list, which differ, and broadcasts what has the shape."""

    def made(self: Any, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    return made


def once_a_name(make: Any) -> Any:
    """make(type, ...), remembered; types of pointers and blocks have no hash, but a name."""
    made: dict[Any, Any] = {}

    def known(type: tl.dtype, *shape: Any) -> Any:
        key = type.name, *shape
        if key not in made:
            made[key] = make(type, *shape)
        return made[key]

    return known


def patched_once(patch: Any) -> Any:
    """Triton patches its language at each launch and each call of one jit function by another,
    which takes half of the time here; nothing else uses the language in this process, so that it
    may stay patched."""
    patched: set[Any] = set()
    nothing = interpreter._LangPatchScope()

    def once(function: Any) -> Any:
        languages = {x for x in function.__globals__.values() if x is tl or x is tl.core}
        if not languages <= patched:
            patched.update(languages)
            patch(function)
        return nothing  # to restore

    return once


def scanned_by_doubling(self: Any, inputs: list) -> list:
    """The interpreter's own scan combines one element after the other, some tens of µs each; this
    one all at once, 1, 2, 4, … lanes apart, which is also how a warp does it."""
    values, lanes = [x.handle.data for x in inputs], np.arange(inputs[0].handle.data.size)
    for step in range(lanes.size.bit_length() - 1):
        before = [np.roll(x, 2**step) for x in values]
        both = [
            self.to_tensor(x, y.dtype) for x, y in zip(before + values, 2 * [*inputs], strict=True)
        ]
        combined = [x.handle.data for x in self.combine_fn.fn(*both)]
        values = [np.where(lanes < 2**step, *x) for x in zip(values, combined, strict=True)]
    return [self.to_tensor(x, y.dtype) for x, y in zip(values, inputs, strict=True)]
