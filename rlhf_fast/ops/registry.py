"""The one table of ops, and how each reaches torch's dispatcher.

An op has two faces:

* a *public function* (``rlhf_fast.gae``): checks its arguments, flattens shapes, returns what a
  user wants; and its *reference*: the same signature, the formula in plain differentiable PyTorch.
  Tests hold one against the other, the bench times one beside the other.
* one or more *kernels* under ``torch.ops.rlhf_fast``: flat tensors in, flat tensors out. Torch's
  dispatcher picks the implementation: C++ on CPU (registered by the compiled extension), Triton on
  CUDA (imported on the first call), and the plain ``fallback`` anywhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("rlhf_fast", "DEF")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def compiled(module: str) -> tuple[ModuleType | None, str]:
    """A compiled extension, which registers its kernels when it is loaded; or why there is none."""
    try:
        return importlib.import_module(f"rlhf_fast.{module}"), ""
    except ModuleNotFoundError:
        return None, "not built"
    except ImportError as error:  # built against another torch, say: everything still runs, slower
        return None, f"failed to load: {error}"


extensions = {"C++": compiled("_C"), "CUDA": compiled("_cuda")}
extension = extensions["C++"][0]

CPU_VARIABLE, CPUS = "RLHF_FAST_CPU_CAPABILITY", ("default", "avx2", "avx512")


def choose_cpu(asked: str | None) -> None:
    """Runs the C++ kernels on a lower instruction set than the CPU has, as the tests do."""
    if asked is None:
        return
    if asked not in CPUS:
        raise ValueError(f"{CPU_VARIABLE} must be one of {', '.join(CPUS)}, got {asked!r}")
    if extension is not None and (best := extension.use_cpu(asked)):
        raise ValueError(f"{CPU_VARIABLE} is {asked}, and this CPU or build has {best} at most")


choose_cpu(os.environ.get(CPU_VARIABLE))


@dataclass(frozen=True)
class Kernel:
    """One operator of ``torch.ops.rlhf_fast``.

    ``triton`` is ``"module:launcher"`` inside ``rlhf_fast.kernels``; None where torch's own kernels
    are right on a GPU. An ``engine`` is itself a loop over other kernels (the linear ops) and runs
    on every device as it is.
    """

    name: str
    schema: str
    fallback: Callable[..., Any]
    triton: str | None
    engine: bool = False
    direct: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """``torch.ops.rlhf_fast.<name>(*args)``, without the dispatcher's way from Python to our
        own autograd in Python where nobody stands in between: 6 us less a call (AMD EPYC)."""
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if self.direct is None or traced:
            return getattr(torch.ops.rlhf_fast, self.name)(*args)
        return self.direct(*args)

    @property
    def launcher(self) -> Callable[..., Any]:
        """The Triton launcher; takes the same arguments as the kernel."""
        if self.triton is None:
            raise LookupError(f"{self.name} has no Triton launcher of its own")
        module, launcher = self.triton.split(":")
        found: Callable[..., Any] = getattr(
            importlib.import_module(f"rlhf_fast.kernels.{module}"), launcher
        )
        return found

    def implementation(self, device_type: str) -> str:
        """What runs on this device: "C++", "Triton", "engine" or "PyTorch"."""
        key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}.get(device_type)
        if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"rlhf_fast::{self.name}", key):
            return "C++" if key == "CPU" else "Triton"
        return "engine" if self.engine else "PyTorch"


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of a public function; ``grads`` names the differentiable ones."""

    name: str
    arguments: dict[str, Any]
    grads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Op:
    """A public function with everything tests, bench, ``info`` and the README need to know of it.

    samples: edge-case inputs for the tests, drawn with the given generator.
    workload: (shape, generator, device, dtype) -> the inputs that the bench times.
    shapes: bench shapes, each a dict of named sizes; the first is the headline.
    bytes_moved, flops: (shape, element_size) -> least bytes to and from memory and the
        multiply-adds (counted as 2), for (forward, backward); 0 where there is no backward.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    kernels: tuple[Kernel, ...]
    samples: Callable[[torch.Generator], Iterable[Sample]]
    workload: Callable[..., Sample]
    shapes: tuple[dict[str, int], ...]
    bytes_moved: Callable[[dict[str, int], int], tuple[int, int]]
    flops: Callable[[dict[str, int], int], tuple[int, int]] = field(default=lambda s, e: (0, 0))

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").splitlines()[0]


OPS: dict[str, Op] = {}
KERNELS: dict[str, Kernel] = {}


def define_kernel(
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    engine: bool = False,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    linear: bool = False,
) -> Kernel:
    """Define ``torch.ops.rlhf_fast.<name>`` with its fallback, fake, autograd and Triton kernel.

    linear: the backward is made of torch's own functions and may be differentiated again.

    ``Library.define`` costs about 5 us a call where the ``custom_op`` decorator costs 15-21.
    """
    name = schema[: schema.index("(")]
    # an engine lists the rows to compute, for which the host waits (compact=False does without)
    LIBRARY.define(schema, tags=(torch.Tag.cudagraph_unsafe,) if engine else ())
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    direct = None
    if backward is not None and setup_context is not None:
        direct = differentiable(name, setup_context, backward, linear)
        LIBRARY.impl(name, direct, "Autograd")
    kernel = Kernel(name, schema, fallback, triton, engine, direct)
    if triton is not None and HAS_TRITON:
        LIBRARY.impl(name, _on_first_call(kernel), "CUDA")
        LIBRARY.impl(name, _on_first_call(kernel), "XPU")
    torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=LIBRARY)
    KERNELS[name] = kernel
    return kernel


def differentiable(
    name: str,
    setup_context: Callable[..., Any],
    backward: Callable[..., Any],
    linear: bool = False,
) -> Callable[..., Any]:
    """A kernel's implementation where a gradient may be wanted. It does what
    torch.library.register_autograd does, without support for defaults and keyword arguments, which
    no kernel has: policy_loss and its backward take 133 us on a few tokens instead of 216.

    Reverse mode, once: forward-mode tangents, torch.func's grad and second derivatives raise an
    error with the op's name, where autograd would give a silent zero.
    """
    kernel = getattr(torch.ops.rlhf_fast, name).default

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    def forward(ctx: Any, *args: Any) -> Any:  # a setup_context of its own costs 20 us a call
        output = below(*args)
        ctx.set_materialize_grads(False)  # or zeros are filled for gradients and statistics, too
        setup_context(ctx, args, output)
        return output

    differentiate = backward if linear else first_derivative_only(name)(backward)

    def where_any(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return differentiate(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(where_any)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        return (function.apply if gradient_wanted(name, args) else below)(*args)

    return call


def gradient_wanted(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a backward may follow; an error where another derivative than that is asked for."""
    if forward_ad._current_level >= 0 and any(map(has_tangent, args)):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); use reverse mode, torch.autograd.grad"
        )
    wanted = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in args
    )
    if wanted and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{name} cannot be differentiated inside torch.func (grad, vjp, jacrev, hessian); "
            "use torch.autograd.grad outside of it"
        )
    return wanted


def first_derivative_only(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a backward refuse create_graph=True: the gradients that kernels write have none."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{name} has no second derivative: its backward cannot run with "
                    "create_graph=True"
                )
            return backward(ctx, *grads)

        return checked

    return decorate


def has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward that takes what came out of inference_mode too (a rollout's labels, a
    reference's hidden states): autograd refuses those, so a copy is kept."""
    ctx.save_for_backward(
        *(x.clone() if x is not None and x.is_inference() else x for x in tensors)
    )


def zeros_unless_given(grad: Tensor | None, other: Tensor | None) -> Tensor:
    """An output's gradient, where one of two outputs has one."""
    if grad is not None:
        return grad
    assert other is not None
    return torch.zeros_like(other)


def graph_is_kept() -> bool:
    """Inside a backward: whether it may run again (retain_graph=True)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _on_first_call(kernel: Kernel) -> Callable[..., Any]:
    launcher: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not launcher:
            launcher.append(kernel.launcher)
        return launcher[0](*args)

    return launch


def register(op: Op) -> Op:
    """Add an op to the table; tests, bench, info and the README's op table start from it."""
    OPS[op.name] = op
    return op
