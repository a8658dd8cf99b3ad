"""Every kernel says the shape of each of its pointers, in Triton and in C++."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = re.compile(r"n|rows|programs|\w*stride(_[bt])?")

TRITON = [
    (path.stem, function)
    for path in sorted((ROOT / "kernels").glob("*.py"))
    for function in ast.parse(path.read_text()).body
    if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel")
]
SOURCES = sorted(x for x in (ROOT / "csrc").iterdir() if x.suffix in (".cpp", ".cu"))
CPP = [
    (path, name)
    for path in SOURCES
    for name in re.findall(r"TORCH_BOX\(&(\w+)\)", path.read_text())
]


@pytest.mark.parametrize("function", [pytest.param(f, id=f"{m}.{f.name}") for m, f in TRITON])
def test_triton(function):
    said = ast.get_docstring(function) or ""
    for parameter in function.args.args:
        name = parameter.arg
        if parameter.annotation is None and name.islower() and not SIZES.fullmatch(name):
            assert re.search(rf"\b{name}\b", said), f"{function.name} does not say what {name} is"
    assert "[" in said


@pytest.mark.parametrize("path, name", [pytest.param(*x, id=x[1]) for x in CPP])
def test_cpp(path, name):
    text = path.read_text()
    entry = re.search(rf"((?:^//.*\n)+)^[\w:<>, ]+ {name}\(([^{{]*)\) {{", text, re.MULTILINE)
    assert entry, f"{path.name}: no comment above {name}"
    said, parameters = entry.groups()
    for tensor in re.findall(r"Tensor>?[&>]* (\w+)", parameters):
        assert re.search(rf"\b{tensor}\b", said), f"{name} does not say what {tensor} is"
    assert "[" in said


def test_there_are_kernels():
    assert len(TRITON) >= 17 and len(CPP) >= 17
