"""What holds for every integration: absent frameworks, and the examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{framework}":
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
import rlhf_fast
assert not [name for name in sys.modules if name.startswith("rlhf_fast.integrations")]
import rlhf_fast.integrations.{framework}
"""


@pytest.mark.parametrize(
    "framework, advice",
    [
        ("trl", "needs TRL: pip install 'trl==1.12.0' (or 1.16.0)"),
        ("verl", "needs verl: pip install verl==0.9.1"),
        ("openrlhf", "needs OpenRLHF: pip install openrlhf==0.11.2"),
    ],
)
def test_an_absent_framework_is_one_clear_error(framework, advice):
    child = subprocess.run(
        [sys.executable, "-c", BLOCK.format(framework=framework)], capture_output=True, text=True
    )
    last = child.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: rlhf_fast.integrations.{framework} {advice}"


@pytest.mark.parametrize(
    "name, lines",
    [
        ("sft_trainer", 11),
        ("trl_grpo", 6),
        ("trl_ppo", 4),
        ("verl_losses", 3),
        ("openrlhf_losses", 3),
    ],
)
def test_examples_run(name, lines):
    """Each as a user runs it, but that verl's and OpenRLHF's other dependencies are stood in for."""
    modules = {
        "verl_losses": ("verl.trainer.ppo.core_algos", "verl.utils.kernel.linear_cross_entropy"),
        "openrlhf_losses": ("openrlhf.trainer.ppo_utils.experience_maker",),
    }.get(name, ())
    loads = "".join(f"frameworks.load({m!r}, frameworks.{m.split('.')[0].upper()})\n" for m in modules)
    code = (
        f"import runpy, sys\nsys.path[:0] = [{str(EXAMPLES)!r}, {str(Path(__file__).parent)!r}]\n"
        f"import frameworks\n{loads}runpy.run_path({str(EXAMPLES / name)!r} + '.py', "
        "run_name='__main__')\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    marks = {
        "sft_trainer": "  ", "trl_grpo": ("rlhf_fast in TRL", "loss "),
        "trl_ppo": ("rlhf_fast in TRL", "policy loss"),
        "verl_losses": ("rlhf_fast in verl", "vanilla ", "rlhf_fast "),
        "openrlhf_losses": ("OpenRLHF ", "rlhf_fast "),
    }[name]  # fmt: skip
    shown = [line for line in child.stdout.splitlines() if line.startswith(marks)]
    if name == "sft_trainer":
        for line in shown:
            _, plain, fused = map(float, line.split())
            assert fused == pytest.approx(plain, rel=1e-5)
        lines -= 1
    if name in ("verl_losses", "openrlhf_losses"):  # theirs and ours print the same numbers
        rows = [line.split(maxsplit=1)[1] for line in shown if " loss" in line or "actor/" in line]
        assert len(rows) == 2 and rows[0] == rows[1]
    assert len(shown) == lines
