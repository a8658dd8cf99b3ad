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
