"""That the interpreter of PTX (tests/ptx) sees what a kernel must not do: kernels written by hand,
each of which is right until one line of it is changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no triton on this machine: no PTX is made")

from ptx.instructions import function_of  # noqa: E402
from ptx.launch import Compiled, launch  # noqa: E402
from ptx.memory import Fault  # noqa: E402
from ptx.parse import parse  # noqa: E402

# out[block, i] = x[block, (i + 1) % 64], by way of shared memory.
RIGHT = """
.visible .entry turned(
	.param .u64 turned_param_0,
	.param .u64 turned_param_1
)
.reqntid 64
{
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	shl.b32 %r3, %r2, 6;
	add.s32 %r4, %r3, %r1;
	ld.param.b64 %rd1, [turned_param_0];
	mad.wide.s32 %rd2, %r4, 4, %rd1;
	ld.global.b32 %r5, [%rd2];
	shl.b32 %r6, %r1, 2;
	st.shared.b32 [%r6], %r5;
	bar.sync 0;
	add.s32 %r7, %r6, 4;
	and.b32 %r7, %r7, 255;
	ld.shared.b32 %r8, [%r7];
	ld.param.b64 %rd3, [turned_param_1];
	mad.wide.s32 %rd4, %r4, 4, %rd3;
	st.global.b32 [%rd4], %r8;
	ret;
}
"""
WRONG = {
    "a read with no barrier after": ("\tbar.sync 0;\n", ""),
    "a write with no barrier after another thread's write": (
        "bar.sync 0;", "st.shared.b32 [%r3], %r5;\n\tbar.sync 0;"),
    "a write with no barrier after another thread's read": (
        "ld.param.b64 %rd3", "st.shared.b32 [%r6], %r8;\n\tld.param.b64 %rd3"),
    "different values to one byte of shared memory": ("shl.b32 %r6, %r1, 2", "shl.b32 %r6, %r2, 2"),
    "shared memory that nobody has written": ("and.b32 %r7, %r7, 255", "mov.u32 %r7, 256"),
    "shared memory has 512 bytes": ("and.b32 %r7, %r7, 255", "add.s32 %r7, %r7, 508"),
    "misaligned access of 4 bytes of shared memory": ("shl.b32 %r6, %r1, 2", "shl.b32 %r6, %r1, 1"),
    "misaligned access of 4 bytes": ("%r4, 4, %rd1", "%r4, 2, %rd1"),
    "two programs write one element": (
        "st.global.b32 [%rd4], %r8;",
        "setp.eq.u32 %p1, %r2, 0;\n@%p1 st.global.b32 [%rd3], 7;\n@!%p1 st.global.b32 [%rd3], 7;"),
    "different values to one element at once": ("%r4, 4, %rd3", "%r2, 4, %rd3"),
    "store to .* beyond a tensor": ("st.global.b32 [%rd4]", "st.global.b32 [%rd4+4]"),
    "load of .* which is in no tensor": ("b32 %r5, [%rd2]", "b32 %r5, [%rd2+32]"),
    "from .* is in no tensor": ("%r4, 4, %rd1", "%r4, 256, %rd1"),
    "is read before anything is in it": ("\tshl.b32 %r3, %r2, 6;\n", ""),
    "a barrier that some threads of a block miss": (
        "ret;", "setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;\nret;"),
}  # fmt: skip


def run(text: str, x: Tensor) -> tuple[Tensor, int]:
    """(out, the loads that read beyond x)"""
    program = parse(text.replace(".reg .b32", ".reg .pred %p<2>;\n.reg .b32"))
    kernel = Compiled(program, [function_of(i) for i in program.instructions], 512)
    out = torch.zeros(3, 64, dtype=x.dtype)
    return out, launch(kernel, [x, out], (3,))


def test_what_is_right_runs() -> None:
    x = torch.arange(3 * 64, dtype=torch.int32).view(3, 64)
    out, beyond = run(RIGHT, x)
    assert torch.equal(out, x.roll(-1, 1)) and beyond == 0


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_said(fault: str) -> None:
    right, wrong = WRONG[fault]
    assert RIGHT.count(right) == 1
    with pytest.raises(Fault, match=fault):
        run(RIGHT.replace(right, wrong), torch.arange(3 * 64, dtype=torch.int32))


def test_a_load_beyond_a_tensor_is_counted() -> None:
    """In the 16 bytes where the last element lies; what is read there is NaN in every dtype."""
    out, beyond = run(RIGHT, torch.arange(190, dtype=torch.int32))
    assert beyond == 2 and (out[-1, -3:-1] == -1).all()
