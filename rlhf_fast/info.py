"""``rlhf-fast info``: versions, devices, how the extension was built, what runs where."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from .ops import registry
from .version import __version__

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "numpy")


def devices() -> dict[str, bool]:
    """Device type -> whether this machine has one."""
    return {"cpu": True, "cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available()}


def facts() -> dict[str, str]:
    """Everything `info` prints above the table, in order."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    rows = {"rlhf_fast": __version__, "python": platform.python_version()}
    rows |= {package: version(package) for package in PACKAGES}
    rows["CPU threads"] = str(torch.get_num_threads())
    rows["CUDA devices"] = (
        ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    )
    if registry.extension is None:
        rows["C++ extension"] = (
            f"{registry.extension_error}; every op runs in plain PyTorch on the CPU"
        )
    else:
        rows["C++ extension"] = "built"
        build = registry.extension.build_info()
        rows |= {f"  {name}": str(value) or "none" for name, value in build.items()}
    return rows


def implementations(device_type: str) -> dict[str, str]:
    """Op name -> what runs on this device; several kernels may differ: "C++ + engine"."""
    return {
        name: " + ".join(dict.fromkeys(k.implementation(device_type) for k in op.kernels))
        or "PyTorch"
        for name, op in registry.OPS.items()
    }


def markdown() -> str:
    """The README's op table."""
    lines = ["| op | what it does | reference | CPU | GPU |", "|---|---|---|---|---|"]
    for name, op in registry.OPS.items():
        cpu = "C++" if op.kernels else "PyTorch"
        gpu = "Triton" if any(k.triton for k in op.kernels) else "PyTorch"
        if any(kernel.engine for kernel in op.kernels):
            cpu, gpu = "C++ rows", "Triton rows"
        lines.append(f"| `{name}` | {op.summary.rstrip('.')} | PyTorch | {cpu} | {gpu} |")
    return "\n".join(lines)


def main(*argv: str) -> None:
    """Print the facts and the table of ops; with --markdown only the README's op table."""
    parser = argparse.ArgumentParser(
        prog="rlhf-fast info", description="Show what was built and what runs where."
    )
    parser.add_argument("--markdown", action="store_true", help="print the README's op table alone")
    if parser.parse_args(argv).markdown:
        print(markdown())
        return
    console = Console()
    grid = Table.grid(padding=(0, 2))
    for name, value in facts().items():
        grid.add_row(f"[bold]{name}[/]", value)
    console.print(grid)

    columns = [name if here else f"{name} (none here)" for name, here in devices().items()]
    table = Table("op", *columns)
    by_device = [implementations(device) for device in devices()]
    for name in registry.OPS:
        table.add_row(name, *(ops[name] for ops in by_device))
    console.print(table)
    console.print("engine: a loop over matrix products and the kernels of the other ops")


if __name__ == "__main__":
    main(*sys.argv[1:])
