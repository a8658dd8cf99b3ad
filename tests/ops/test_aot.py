"""Every Triton kernel and every CUDA source compiled for real GPUs, with no GPU: nothing spills,
and what moves much memory moves it once, in wide pieces.

What is compiled is what the launchers launch: the ops run on their own samples, and on large
shapes in every dtype, with the launches caught; each distinct specialization (types, alignments,
constexprs, warps) is then built for sm_90, and every kernel's large ones for sm_80 and sm_100 too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension
from drawing import arguments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops.linear import chunks, groups
from rlhf_fast.ops.registry import KERNELS, OPS, Op, Sample

triton = pytest.importorskip("triton", reason="no triton on this machine: not compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles for real; the interpreter is on", allow_module_level=True)

from rlhf_fast.kernels import tuning  # noqa: E402
from rlhf_fast.kernels.token_logprobs import BACKWARD_CONFIGS  # noqa: E402
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

BIN = Path(nvidia.__file__).parent / "bin"
ROOT = Path(__file__).parents[2]


# Bytes. Triton 3.6's ptxas (CUDA 12.8 and 12.9) keeps one value of two of the 300 binaries there,
# outside every loop; those of triton 3.7 and later none.
ON_THE_STACK = 8 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0

LARGE = {"N": 2, "V": 262144, "B": 2, "T": 4096, "H": 16}
HALVES = (torch.bfloat16, torch.float16)
ROUNDED = {"*bf16": "cvt.rn.bf16", "*fp16": "cvt.rn.f16"}  # to nearest even, as a cast does
FLOAT32_LOGITS = ("linear_token_logprobs", "linear_token_kl")


class InLaunchersOnly(TorchDispatchMode):
    """Runs the launchers in place of the kernels' other implementations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "rlhf_fast":
            return func(*args, **(kwargs or {}))
        kernel = KERNELS[func._schema.name.split("::")[1]]
        with self:
            return (
                kernel.launcher(*map(on_a_gpu, args)) if kernel.triton else kernel.fallback(*args)
            )


def on_a_gpu(x: object) -> object:
    """A chunk of the linear engine has contiguous rows on a GPU, and not on CPU."""
    return x.contiguous() if isinstance(x, Tensor) and x.dim() == 3 and x.stride(2) != 1 else x


def as_on_a_gpu(
    _: Tensor | None, rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """chunks.chunk_buffer as it is there."""
    whole = torch.zeros(rows, chunks.aligned(vocab), dtype=dtype, device=device)
    return whole, whole[:, :vocab]


def call(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    result = op.function(**arguments(sample, dtype))
    outputs = result if isinstance(result, tuple) else (result,)
    outputs = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def calls() -> Iterator[tuple[bool, Op, Sample, torch.dtype]]:
    """(large, op, sample, dtype) of everything that is compiled."""
    for op in OPS.values():
        if not any(kernel.triton for kernel in op.kernels):
            continue  # a loop over the other ops' kernels
        shape = {name: LARGE.get(name, 2) for name in op.shapes[0]}
        workload = op.workload(shape, torch.Generator().manual_seed(0), "cpu", torch.float32)
        yield True, op, workload, torch.float32
        yield False, op, workload, torch.float64
        for sample in op.samples(torch.Generator().manual_seed(0)):
            yield False, op, sample, torch.float32
    policy = OPS["policy_loss"]
    shape = {name: LARGE[name] for name in policy.shapes[0]}
    plain = policy.workload(shape, torch.Generator().manual_seed(0), "cpu", torch.float32)
    for options in (
        {"ratio": "sequence", "dual_clip": 3.0},
        {"loss": "cispo"},
        {"loss": "reinforce"},
    ):
        yield True, policy, Sample("", {**plain.arguments, **options}, plain.grads), torch.float32
    logits = OPS["token_logprobs"]  # the one op whose kernels read 16-bit tensors
    for dtype in HALVES:
        x, y = torch.zeros(2, LARGE["V"]), torch.zeros(2, dtype=torch.int64)
        for options in ({}, {"entropy": True, "softcap": 30.0}):
            sample = Sample("", {"logits": x, "labels": y, **options}, ("logits",))
            yield True, logits, sample, dtype
        for name in FLOAT32_LOGITS:  # and 16-bit gradients of those
            op = OPS[name]
            workload = op.workload(LARGE, torch.Generator().manual_seed(0), "cpu", dtype)
            yield True, op, workload, dtype


class Specializations:
    """Every distinct (kernel, types, alignments, constexprs, options) that calls() launch."""

    def __init__(self) -> None:
        self.backend = make_backend(GPUTarget("cuda", 90, 32))
        self.found: dict[str, tuple[Any, ...]] = {}
        self.large = False

    def catch(self, fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """In place of JITFunction.run: what it would compile, by Triton's own rules."""
        assert all(0 < n < 2**31 for n in grid), f"{fn.__name__}: bad grid {grid}"
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(fn.signature, fn.params, self.backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constexprs, attrs = fn._pack_args(
            self.backend, kwargs, bound, specialization, options
        )
        key = f"{fn.module}.{fn.__name__} {signature} {constexprs} {options.num_warps}"
        key += f" {attrs}" if self.large else ""
        large = self.large or self.found.get(key, (False,))[0]
        self.found[key] = (large, fn, signature, constexprs, attrs, options.num_warps)

    def collect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch, InLaunchersOnly():
            patch.setattr(JITFunction, "run", lambda fn, *a, **k: self.catch(fn, *a, **k))
            patch.setattr(groups, "dlogits_dtype", lambda hidden: hidden.dtype)
            patch.setattr(groups, "in_groups", lambda hidden: hidden.dtype in HALVES)
            patch.setattr(groups, "chunk_buffer", as_on_a_gpu)
            for i in range(len(BACKWARD_CONFIGS)):
                patch.setattr(tuning, "fastest", lambda configs, *_, i=i: configs[i])
                for self.large, op, sample, dtype in calls():
                    rows = self.large and op.name in ("token_logprobs", *FLOAT32_LOGITS)
                    if i == 0 or (rows and dtype != torch.float16):
                        call(op, sample, dtype)


def resources(cubin: bytes, path: Path) -> str:
    path.write_bytes(cubin)
    command = [BIN / "cuobjdump", "--dump-resource-usage", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# (read, written) bytes of an element that a kernel moves in pieces of 8 or 16 bytes on the large
# shapes; `size` is a logit's, `out` its gradient's. Where the instructions move just that, every
# input is read once, every output is written once, and nothing goes element by element.
MOVED = {
    # every tile of a row is read by one of two loops: that of the row's ends and that of the rest;
    # by a third one where it leaves something, or zeros by a fourth
    "token_logprobs_kernel": lambda size, left: (2 * size + (size if left else 0), 2 * left),
    "token_logprobs_backward_kernel": lambda size, out: (size, out),
    "logits_kl_kernel": lambda size, _: (2 * (size + size), 0),
    "logits_kl_backward_kernel": lambda size, out: (size + size, out),
    "token_kl_kernel": lambda *_: (4 + 4, 4),
    "token_kl_backward_kernel": lambda *_: (4 + 4 + 4, 4),
    "row_counts_kernel": lambda *_: (1, 0),
    "sequence_kernel": lambda *_: (4 + 4 + 4 + 1, 0),
    "policy_loss_kernel": lambda *_: (4 + 4 + 4 + 1, 4),
    "value_loss_kernel": lambda *_: (4 + 4 + 4 + 1, 4),
    "kl_penalized_rewards_kernel": lambda *_: (4 + 4 + 1, 4),
    "masked_sums_kernel": lambda *_: (4 + 1, 0),
    "masked_normalize_kernel": lambda *_: (4 + 1, 4),
}
NARROW = {
    "gae_kernel",  # lanes run backwards in time: 4 bytes a lane, 128 in a row a warp
    "pairwise_loss_kernel",  # a few hundred pairs
    "policy_loss_finish_kernel",  # one program each
    "value_loss_finish_kernel",
    "pairwise_loss_finish_kernel",
    "masked_finish_kernel",
}


def result(signature: dict[str, str]) -> str | None:
    """The type of the gradient that a kernel writes, or leaves to be one."""
    found = (signature.get(name) for name in ("out", "left"))
    return next((type for type in found if type is not None and type.startswith("*")), None)


def moved(ptx: str, instruction: str) -> int:
    """Bytes a thread moves in pieces of 8 or 16, each instruction of the program counted once."""
    pieces = re.findall(rf"{instruction}\.global[.\w:]*\.v(\d)\.b(\d+)", ptx)
    return sum(int(count) * int(bits) // 8 for count, bits in pieces)


def overtaken(ptx: str) -> list[str]:
    """Stores to where a load was, with no barrier between: where one thread writes what all read, a
    warp that is late would read what is written."""
    read: set[str] = set()
    found = []
    for line in ptx.splitlines():
        load, store = (
            re.search(rf"{x}\.global\.b32.*\[ (%rd\d+) \+ 0 \]", line) for x in ("ld", "st")
        )
        if "bar.sync" in line:
            read.clear()
        elif load:
            read.add(load[1])
        elif store and store[1] in read:
            found.append(line.strip())
    return found


def elements(constants: dict[str, int]) -> int:
    """Of one tile, which a program takes at a time."""
    if "LANES" in constants:
        return constants["REPEAT"] * constants["LANES"]
    return constants.get("BLOCK", 0)


@pytest.mark.long
def test_triton_kernels_read_and_write_16_bytes_once_and_do_not_spill(monkeypatch, tmp_path):
    specializations = Specializations()
    specializations.collect(monkeypatch)
    launched = {f"{fn.module.rsplit('.')[-1]}" for _, fn, *_ in specializations.found.values()}
    assert launched >= {k.triton.split(":")[0] for k in KERNELS.values() if k.triton}
    large = {fn.__name__ for is_large, fn, *_ in specializations.found.values() if is_large}
    assert large == MOVED.keys() | NARROW
    rounding = {
        key for key, (is_large, _, types, *_) in specializations.found.items()
        if is_large and types.get("logits") == "*fp32" and result(types) in ROUNDED
    }  # fmt: skip
    # two kernels, fp16 in one configuration; and what a forward leaves, in fp16 and in bf16
    assert len(rounding) == 2 * (len(BACKWARD_CONFIGS) + 1) + 2

    def faults(key: str, capability: int) -> list[str]:
        is_large, fn, signature, constexprs, attrs, num_warps = specializations.found[key]
        compiled = triton.compile(
            ASTSource(fn, signature, constexprs, attrs),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps},
        )
        file = tmp_path / f"{abs(hash(key))}_{capability}.cubin"
        usage = resources(compiled.asm["cubin"], file)
        stack, local = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("STACK", "LOCAL"))
        spills = stack > ON_THE_STACK or local
        found = [f"spills: sm_{capability} {key}\n{usage}"] if spills else []
        found += [f"races: sm_{capability} {x} {key}" for x in overtaken(compiled.asm["ptx"])]
        if key in rounding and ROUNDED[result(signature)] not in compiled.asm["ptx"]:
            found.append(f"no {ROUNDED[result(signature)]}: sm_{capability} {key}")
        if is_large and fn.__name__ in MOVED:
            constants = {fn.arg_names[i]: x for (i,), x in constexprs.items()}
            logit, out = (
                int(re.search(r"\d+", type)[0]) // 8
                for type in (signature.get("logits", "*fp32"), result(signature) or "0")
            )
            tile = constants["BYTES"] // out if "BYTES" in constants else elements(constants)
            expected = MOVED[fn.__name__](logit, out)
            for instruction, bytes_ in zip(("ld", "st"), expected, strict=True):
                a_thread = moved(compiled.asm["ptx"], instruction)
                if a_thread * 32 * num_warps != bytes_ * tile:
                    found.append(
                        f"{instruction} moves {a_thread * 32 * num_warps} bytes a tile in wide "
                        f"pieces, not {bytes_} x {tile}: sm_{capability} {key}"
                    )
        return found

    jobs = [
        (key, capability)
        for key, (is_large, *_) in specializations.found.items()
        for capability in ((80, 90, 100) if is_large else (90,))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # half of the time is ptxas
        found = [text for texts in pool.map(lambda job: faults(*job), jobs) for text in texts]
    print(f"{len(specializations.found)} specializations, {len(jobs)} binaries")
    assert not found, "\n".join(found)


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine: csrc/*.cu is not compiled")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc").glob("*.cu")))
def test_cuda_sources_compile_and_do_not_spill(source: str, architecture: str, tmp_path) -> None:
    command = [NVCC, "-c", ROOT / "csrc" / source, "-o", tmp_path / "object.o", "-std=c++17", "-O3",
               f"-arch={architecture}", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
               "-Xptxas", "-v", "-Werror", "all-warnings"]  # fmt: skip
    for include in torch.utils.cpp_extension.include_paths():
        command += ["-isystem", include]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", run.stderr)
    assert spills, run.stderr
    assert all(spill == ("0", "0") for spill in spills), run.stderr
