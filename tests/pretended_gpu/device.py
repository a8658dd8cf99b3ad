"""A pretended CUDA device: tensors that say cuda:0 and whose data are a CPU tensor's.

It runs what Triton's interpreter alone cannot: our own Python as it goes on a GPU (launchers, the
engine with 16-bit products into float32, no reuse of memory), with every kernel in the interpreter.
It refuses what a GPU would refuse (tensors of two devices, products of two dtypes, a Triton pointer
to a CPU tensor), fills new memory with NaN, and counts what would make the host wait, and the bytes
that are allocated. Needs TRITON_INTERPRET=1 and guard.cpp, preloaded.
"""

from __future__ import annotations

import gc
import traceback
import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from rlhf_fast.ops.registry import KERNELS

OURS = str(Path(__file__).parents[2] / "rlhf_fast"), str(Path(__file__).parents[2] / "kernels")
# Whose result the host reads, or whose shape depends on values.
WAITS = {
    "aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero",
    "aten::masked_select",
}  # fmt: skip
COPIES = {"aten::copy_", "aten::_to_copy", "aten::set_"}
EMPTY = {
    "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided",
    "aten::new_empty_strided",
}  # fmt: skip

waits: Counter[str] = Counter()  # "op at file:line" of ours


LARGE = 2**15  # bytes


class Memory:
    """Bytes of the storages made since ``begin`` that are alive, and the most there have been."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.known: set[int] = set()
        self.earlier: set[int] = set()  # alive, and made before: when they go nothing is gained

    def begin(self) -> None:
        self.now = self.most = 0
        self.earlier |= self.known
        self.known = set()

    def made(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if where in self.known or where in self.earlier or not size:
            return
        self.known.add(where)
        self.now += size
        if self.now > self.most and size >= LARGE:
            gc.collect()  # pytree leaves cycles here, with tensors that a real device has freed
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.gone, where, size)

    def gone(self, where: int, size: int) -> None:
        if where in self.known:
            self.known.discard(where)
            self.now -= size
        self.earlier.discard(where)


memory = Memory()


@contextmanager
def no_waits(but: Collection[str] = ()) -> Iterator[None]:
    """Nothing of ours that runs inside waits for the device; but what is named."""
    waits.clear()
    yield
    assert set(waits) <= set(but), waits


class Pretended(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="cuda:0", requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on cuda:0 has no numpy array")

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def wait(what: str) -> None:
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
    waits[f"{what} at {Path(frames[-1].filename).name}" if frames else what] += 1


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, given = func._schema.name, [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
    device = kwargs.get("device")
    to_gpu = device is not None and torch.device(device).type == "cuda"
    to_cpu = device is not None and torch.device(device).type == "cpu"
    there = [x for x in given if isinstance(x, Pretended)]
    if not there and not to_gpu:
        return func(*args, **kwargs)
    here = [x for x in given if not isinstance(x, Pretended) and x.dim()]
    if name.startswith("rlhf_fast::"):
        kernel = KERNELS[name.split("::")[1]]
        assert len(there) == len(given), f"{name}: tensors of two devices"
        with Pretending():
            return (kernel.launcher if kernel.triton else kernel.fallback)(*args)
    moves = name in COPIES
    if there and here and not moves and not name.startswith("aten::index"):
        raise RuntimeError(f"expected all tensors to be on the same device: {name}")
    by_mask = [x for x in tree_leaves(args[1:2]) if is_tensor(x) and x.dtype == torch.bool]
    if name in WAITS or (name.startswith("aten::index") and by_mask) or (moves and here):
        wait(name)
    if to_cpu and there:
        wait(f"{name} to the host")
    plain = dict(kwargs)
    if to_gpu:
        plain["device"] = torch.device("cpu")
        plain.pop("pin_memory", None)
    product = name in ("aten::mm", "aten::addmm")
    if product and "dtype" not in func._overloadname:
        assert len({x.dtype for x in given}) == 1, f"{name}: a product of several dtypes"
    inner_args, inner_kwargs = tree_map(inner, (args, plain))
    if product and "dtype" in func._overloadname:
        result = wide_product(name, inner_args, inner_kwargs)
    else:
        result = func(*inner_args, **inner_kwargs)
    if name in EMPTY and is_tensor(result) and result.is_floating_point():
        result.fill_(torch.nan)
    back = {id(x.inner): x for x in there}

    def wrapped(x: Any) -> Any:
        if not is_tensor(x) or to_cpu:
            return x
        if id(x) in back:
            return back[id(x)]
        memory.made(x)
        return Pretended(x)

    return tree_map(wrapped, result)


def wide_product(name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """mm and addmm with out_dtype: 16-bit operands, a result in float32."""
    *added, a, b, dtype = args
    assert a.dtype == b.dtype, f"{name}: operands of two dtypes"
    assert dtype in (a.dtype, torch.float32), f"{name}: out_dtype {dtype}"
    product = a.float() @ b.float()
    if added:
        assert added[0].dtype in (dtype, a.dtype), f"{name}: adds {added[0].dtype}"
        product += added[0].float()
    out = kwargs.get("out")
    if out is None:
        return product.to(dtype)
    assert out.dtype == dtype and out.shape == product.shape, f"{name}: out does not fit"
    return out.copy_(product)


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, Pretended) else x


@contextmanager
def pretended() -> Iterator[None]:
    """Inside: torch.cuda says that there is a device, and tensors can be on it."""
    import triton.runtime.interpreter as interpreter
    import triton.testing

    cuda: Any = torch.cuda
    replaced = [
        (cuda, "is_available", lambda: True),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "_exchange_device", lambda index: 0),
        (cuda, "_maybe_exchange_device", lambda index: 0),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "mem_get_info", lambda *_: (2**30, 2**30)),
        (triton.testing, "do_bench", lambda call, **_: (call(), 1.0)[1]),
        (Tensor, "cuda", lambda self, *_: self.to("cuda")),
    ]
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = tree_leaves((args, kwargs))
        assert all(isinstance(x, Pretended) for x in given if is_tensor(x)), "a pointer to the host"
        detached = tree_map(lambda x: inner(x).detach() if is_tensor(x) else x, (args, kwargs))
        with _disable_current_modes():
            return launch(self, *detached[0], **detached[1])

    replaced.append((interpreter.GridExecutor, "__call__", launched))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with Pretending():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
