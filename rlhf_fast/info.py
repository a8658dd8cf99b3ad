"""``rlhf-fast info``: versions, devices, how the extension was built, what runs where."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import NoReturn

import torch

from .ops import registry
from .ops.linear import products
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
    for language, (extension, error) in registry.extensions.items():
        if extension is None:
            why = missing().get(language, error) if error == "not built" else error
            rows[f"{language} kernels"] = f"none: {why}"
        else:
            rows[f"{language} kernels"] = "built"
            rows |= {f"  {name}": str(value) for name, value in extension.build_info().items()}
    rows["16-bit products on CPU"] = products.sixteen_bit()
    rows["Triton kernels"] = "there" if registry.HAS_TRITON else "none: triton is not installed"
    return rows


def missing() -> dict[str, str]:
    """Why a kind of kernels was not built, as setup.py left it."""
    record = Path(__file__).with_name("missing.json")
    return json.loads(record.read_text()) if record.exists() else {}


def implementations(device_type: str) -> dict[str, str]:
    """Op name -> what runs on this device; several kernels may differ: "C++ + engine"."""
    return {
        name: " + ".join(dict.fromkeys(k.implementation(device_type) for k in op.kernels))
        or "PyTorch"
        for name, op in registry.OPS.items()
    }


def markdown() -> str:
    """The README's op table."""
    lines = ["| op | what it does |", "|---|---|"]
    for name, op in registry.OPS.items():
        plain = "" if op.kernels else " (plain PyTorch)"
        lines.append(f"| `{name}` | {op.summary.rstrip('.')}{plain} |")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """One line for a wrong flag, as the other commands have it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def flag_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rlhf-fast info",
        description="Show what was built and what runs where.",
        add_help=False,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--markdown", action="store_true", help="print the README's op table alone")
    run.add_argument("--help", "-h", action="help", help="show this and leave")
    return parser


def main(*argv: str) -> None:
    """Print the facts and the table of ops; with --markdown only the README's op table."""
    if flag_parser().parse_args(argv).markdown:
        print(markdown())
        return
    print_columns([[name, value] for name, value in facts().items()])
    columns = [name if here else f"{name} (none here)" for name, here in devices().items()]
    by_device = [implementations(device) for device in devices()]
    print()
    print_columns(
        [["op", *columns], *([name, *(ops[name] for ops in by_device)] for name in registry.OPS)]
    )
    print("engine: a loop over matrix products and the kernels of the other ops")


def print_columns(rows: list[list[str]]) -> None:
    """Aligned, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


if __name__ == "__main__":
    main(*sys.argv[1:])
