"""What the compiler makes of the Triton kernels, their PTX for sm_90, interpreted by tests/ptx and
held against float64.

Bounds are those of Triton's interpreter (tests/bounds.py); ex2.approx is modelled as exactly
rounded. Races, reads of shared memory that nobody wrote and accesses outside tensors are errors.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from drawing import few_for_all_options
from kernel_calls import run
from left_exponentials import OPTIONS, WIDE, check_gradient

from rlhf_fast.ops.linear import groups
from rlhf_fast.ops.registry import KERNELS, OPS, Op, Sample
from rlhf_fast.ops.support import drawn

triton = pytest.importorskip("triton", reason="no triton on this machine: no PTX is made")
pytest.importorskip("triton.backends.nvidia", reason="this triton makes no PTX")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles for real; the interpreter is on", allow_module_level=True)

from ptx.launch import Launches  # noqa: E402
from ptx.memory import Fault  # noqa: E402
from ptx.parse import UnknownInstruction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = pytest.mark.long

# Of kernels/, from the registry: a new kernel is here by itself.
MODULES = sorted({k.triton.split(":")[0] for k in KERNELS.values() if k.triton})
INDIRECTLY = {"support": ("linear_token_logprobs",)}  # whose ops list other kernels
READ_BEYOND = {"token_logprobs", "logits_kl"}  # 16 bytes at a row's end, which the engine pads
LONG = {"B": 2, "T": 1030, "N": 2, "V": 9001, "H": 8}  # more than one block
MANY = {"B": 260, "T": 2}  # more programs than are added up at a time
LONG_ROW = {"B": 1, "T": 1030}  # a reference that goes step by step
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW = 8  # samples with the most options; a compilation takes half a second


def kernels_of(module: str) -> set[str]:
    return {k.name for k in KERNELS.values() if k.triton and k.triton.split(":")[0] == module}


def ops_of(module: str) -> list[Op]:
    names = kernels_of(module)
    own = [op for op in OPS.values() if names & {k.name for k in op.kernels}]
    return own or [OPS[name] for name in INDIRECTLY[module]]


def calls(module: str) -> Iterator[tuple[Op, Sample, torch.dtype]]:
    for op in ops_of(module):
        for sample in few_for_all_options(op)[:FEW]:
            yield op, sample, torch.float32
        for sizes in (LONG_ROW,) if module == "gae" else (LONG, MANY):
            if set(op.shapes[0]) <= set(sizes):
                shape = {name: sizes[name] for name in op.shapes[0]}
                dtypes = {"logits_kl": FLOATS, "token_logprobs": FLOATS[:2]}
                for dtype in dtypes.get(module, FLOATS[:1]):
                    yield op, workload(op, shape, dtype), dtype
        if module == "token_logprobs":
            yield from ((op, at_every_offset(), dtype) for dtype in FLOATS)
        if module == "support":
            yield from ((op, large_sets(op, dtype), dtype) for dtype in FLOATS)


def workload(op: Op, shape: dict[str, int], dtype: torch.dtype) -> Sample:
    return op.workload(shape, torch.Generator().manual_seed(0), "cpu", dtype)


def at_every_offset() -> Sample:
    """Rows that begin anywhere between two boundaries of 16 bytes; one is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 1025, generator=generator)
    labels = torch.randint(1025, (10,), generator=generator).index_fill(0, torch.tensor([4]), -100)
    given = {"logits": logits, "labels": labels, "softcap": 2.0, "entropy": True}
    return Sample("rows at every offset", given, ("logits",))


def large_sets(op: Op, dtype: torch.dtype) -> Sample:
    """More tokens and more columns than a block has."""
    sample = workload(op, {"N": 5, "V": 200, "H": 530}, dtype)
    labels = sample.arguments["labels"].clone()
    labels.view(-1)[1] = -100
    ids = drawn(labels, 200, 20, torch.Generator().manual_seed(0))
    given = sample.arguments | {"labels": labels, "support": ids}
    return Sample("sets of 20", given, sample.grads)


def left_by_tiles() -> set[str]:
    """What it leaves of a tile depends on the tiles before."""
    leave = KERNELS["leave_logprobs"].launcher
    check_gradient(leave, "rising", columns=WIDE)
    check_gradient(leave, "nothing at first", temperature=0.7)
    check_gradient(leave, "in and out of reach", **OPTIONS["softcap"])
    return {"leave_logprobs"}


@contextmanager
def told(what: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, Fault, UnknownInstruction) as error:
        raise AssertionError(f"{what}: {error}") from error


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(JITFunction, "run", lambda fn, *args, **how: made.run(fn, *args, **how))
    # on a GPU the gradient of 16-bit operands' logits has 16 bits
    monkeypatch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
    return made


@pytest.mark.parametrize("module", MODULES)
def test_the_ptx_of(module: str, launches: Launches) -> None:
    kernels, checked = kernels_of(module), set()
    for op, sample, dtype in calls(module):
        with told(f"{op.name}, {sample.name}, {dtype}"):
            checked |= run(sample, op, dtype, kernels)
    if "leave_logprobs" in kernels:
        checked |= left_by_tiles()
    assert checked == kernels
    assert module in READ_BEYOND or not +launches.beyond
    made = vars(importlib.import_module(f"rlhf_fast.kernels.{module}"))
    compiled = {x.__name__ for x in made.values() if isinstance(x, JITFunction)}
    assert {name for name in compiled if name.endswith("_kernel")} <= set(launches.count)
