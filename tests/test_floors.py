"""The house's floors, kernels → ops → integrations | trainer: none loads one above it.

Each is imported in a fresh interpreter, all of its modules; the import statements inside functions
are read from the sources. That importing changes nothing of the process is test_imports.py's.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_THE_TRAINER = {"transformers", "datasets", "accelerate", "matplotlib", "rich", "peft", "yaml"}
FRAMEWORKS = {"trl", "verl", "openrlhf", "ray", "vllm"}
# floor: (its folder, what no module of it may load)
FLOORS = {
    "kernels": ("kernels", {"rlhf_fast", *OF_THE_TRAINER, *FRAMEWORKS}),
    "rlhf_fast.ops": (
        "rlhf_fast/ops",
        # and what takes longer to import than torch without it: DTensor brings dynamo
        {
            "rlhf_fast.trainer",
            "rlhf_fast.integrations",
            "torch._dynamo",
            *OF_THE_TRAINER,
            *FRAMEWORKS,
        },
    ),
    "rlhf_fast.integrations": ("rlhf_fast/integrations", {"rlhf_fast.trainer"}),
    "rlhf_fast.trainer": ("rlhf_fast/trainer", {"rlhf_fast.integrations", *FRAMEWORKS}),
}
# An engine loads the library under it when it is made.
ENGINES = {"vllm_in_process.py": {"vllm"}}
# What 0.1 had, by a name of each module that a script may have imported.
MOVED = {
    "cli": "main", "config": "PPOConfig", "data": "Prompt", "experience": "measure",
    "generate": "generate", "models": "load_policy", "ppo": "train", "report": "plot",
    "reward": "train", "rollout": "RolloutEngine", "run": "Run", "scorers": "load_scorer",
    "workers": "Workers",
}  # fmt: skip


def python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def under(module: str, names: set[str]) -> bool:
    """Whether a module is one of these, or lies in one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
found = [p.name for p in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}.")]
for name in found:
    if name.split(".")[-1] not in ("trl", "verl", "openrlhf"):  # they load their frameworks
        importlib.import_module(name)
print(json.dumps([found, sorted(sys.modules)]))
"""


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_loads_none_above_it(floor: str) -> None:
    folder, above = FLOORS[floor]
    found, loaded = json.loads(python(IMPORT_ALL, floor))
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    assert len(found) >= len(files) > 0
    assert [module for module in loaded if under(module, above)] == []


def test_the_public_names_load_the_ops_alone() -> None:
    show = "import json, sys, rlhf_fast; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(python(show))
    above = FLOORS["rlhf_fast.ops"][1]
    assert "rlhf_fast.ops.gae" in loaded
    assert [module for module in loaded if under(module, above)] == []


def imported(path: Path, package: str) -> set[str]:
    """Modules that a file's import statements name, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_no_import_statement_names_a_floor_above(floor: str) -> None:
    folder, above = FLOORS[floor]
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT).parent.as_posix().replace("/", ".")
        names = imported(path, relative)
        forbidden = above - ENGINES.get(path.name, set())
        assert {name for name in names if under(name, forbidden)} == set(), path
        if floor in ("kernels", "rlhf_fast.ops"):  # torch and triton are all they stand on
            outer = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert outer <= {"torch", "triton", floor.split(".")[0]}, path


OLD_PATHS = """
import json, sys, warnings
found = {}
for old, name in json.loads(sys.argv[1]).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"from rlhf_fast.{old} import {name}")
    module = sys.modules[f"rlhf_fast.{old}"]
    said = [str(w.message) for w in caught if w.category is DeprecationWarning]
    found[old] = ([x for x in said if "old path" in x], module.__name__,
                  module is sys.modules[module.__name__])
print(json.dumps(found))
"""


def test_every_old_path_is_known() -> None:
    shims = {path.stem for path in (ROOT / "rlhf_fast" / "moved").glob("*.py")} - {"__init__"}
    assert shims == set(MOVED)


@pytest.mark.long
def test_old_paths_are_the_new_modules_and_say_so() -> None:
    found = json.loads(python(OLD_PATHS, json.dumps(MOVED)))
    assert found.keys() == MOVED.keys()
    for old, (said, new, same) in found.items():
        assert new.startswith("rlhf_fast.trainer.") and same, old
        assert said == [f"rlhf_fast.{old} is now {new}; the old path goes in 0.3"]
