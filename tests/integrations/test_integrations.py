"""What holds for every integration: absent frameworks, and the examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
# A process for all: in each fork of it another framework is absent, or is another version.
FORKS = """
import os, sys, traceback, types
import rlhf_fast
assert not [name for name in sys.modules if name.startswith("rlhf_fast.integrations")]

class Absent:
    def __init__(self, framework):
        self.framework = framework

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.framework:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

for framework, modules in {cases!r}:
    if not os.fork():
        if modules is None:
            sys.meta_path.insert(0, Absent(framework))
        for name, has in (modules or {{}}).items():
            sys.modules[name] = module = types.ModuleType(name)
            module.__path__, module.__version__ = [], "0.0.1"
            for thing in has:
                setattr(module, thing, type(thing, (), {{}}))
        try:
            __import__("rlhf_fast.integrations." + framework)
        except BaseException as error:
            print(*traceback.format_exception_only(error)[-1].splitlines(), flush=True)
        os._exit(0)
    os.wait()
"""


def last_lines(cases: list[tuple[str, dict | None]]) -> list[str]:
    """What importing each integration ends in, beside these modules; None: an absent framework."""
    child = subprocess.run(
        [sys.executable, "-c", FORKS.format(cases=cases)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@pytest.mark.long
def test_an_absent_framework_is_one_clear_error():
    advice = {
        "trl": "needs TRL: pip install 'trl==1.12.0', or 1.16.0",
        "verl": "needs verl: pip install verl==0.9.1",
        "openrlhf": "needs OpenRLHF: pip install openrlhf==0.11.2",
    }
    for (name, needs), last in zip(
        advice.items(), last_lines([(name, None) for name in advice]), strict=True
    ):
        cause = f"(No module named {name!r})"  # or of what it imports itself
        assert last == f"ImportError: rlhf_fast.integrations.{name} {needs} {cause}"


# (framework, the names that its modules have, which one is not there)
OTHERS = [
    # TRL before 1.10 has no chunked head, OpenRLHF's HEAD no KL_IS_WEIGHT_CLIP
    ("trl", {"trl.trainer.utils": ["selective_log_softmax"]}, "_ChunkedLogProbFunction"),
    ("trl", {}, "trl.trainer.utils.selective_log_softmax"),
    (
        "openrlhf",
        {"openrlhf.models.loss": ["PolicyLoss", "ValueLoss"], "openrlhf.models.utils": []},
        "KL_IS_WEIGHT_CLIP",
    ),
    ("openrlhf", {"openrlhf.models.loss": []}, "openrlhf.models.loss.PolicyLoss"),
    ("verl", {"verl.trainer.ppo.core_algos": []}, "register_policy_loss"),
]


@pytest.mark.long
def test_another_version_is_one_clear_line():
    cases = []
    for framework, modules, _ in OTHERS:
        parents: dict[str, list] = {
            ".".join(name.split(".")[:i]): []
            for name in [framework, *modules]
            for i in range(1, name.count(".") + 2)
        }
        cases.append((framework, parents | modules))
    for (_, _, absent), last in zip(OTHERS, last_lines(cases), strict=True):
        assert last.startswith("rlhf_fast.integrations.patching.UnknownSignature: ")
        assert absent in last and "is not there" in last and "nothing was replaced" in last


def run_example(name: str, *modules: str) -> list[str]:
    """What the script prints. Of verl and OpenRLHF the named modules are loaded first, with
    stand-ins for the dependencies that CI does not have."""
    lines = ["import runpy, sys", f"sys.path[:0] = [{str(EXAMPLES)!r}, {str(TESTS)!r}]"]
    lines += ["from frameworks import OPENRLHF as openrlhf, VERL as verl, load"]
    lines += [f"load({module!r}, {module.split('.')[0]})" for module in modules]
    lines += [f"runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"]
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@pytest.mark.long
def test_sft_example():
    _, *rows = [line for line in run_example("sft_trainer.py") if not line.startswith("{")]
    assert len(rows) == 10
    for row in rows:
        _, plain, fused = map(float, row.split())
        assert fused == pytest.approx(plain, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name, start, steps", [("grpo", "loss", 5), ("ppo", "policy loss", 3)])
def test_trl_examples(name, start, steps):
    lines = run_example(f"trl_{name}.py")
    assert lines[0].startswith("rlhf_fast in TRL: trl.trainer.utils.selective_log_softmax")
    assert len([line for line in lines if line.startswith(start)]) == steps


@pytest.mark.long
def test_verl_example():
    lines = run_example(
        "verl_losses.py", "verl.trainer.ppo.core_algos", "verl.utils.kernel.linear_cross_entropy"
    )
    vanilla, fast = (line.split(maxsplit=1) for line in lines[-2:])
    assert (vanilla[0], fast[0]) == ("vanilla", "rlhf_fast") and vanilla[1] == fast[1]


@pytest.mark.long
def test_openrlhf_example():
    lines = run_example("openrlhf_losses.py", "openrlhf.trainer.ppo_utils.experience_maker")
    theirs, ours = (line.split(maxsplit=1) for line in lines[-3:-1])
    assert (theirs[0], ours[0]) == ("OpenRLHF", "rlhf_fast") and theirs[1] == ours[1]
