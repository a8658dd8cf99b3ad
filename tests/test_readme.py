"""What the README shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_fast import info

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_a_code_block() -> None:
    assert "```python" in README


def test_the_op_table_is_the_registry() -> None:
    assert info.markdown() in README
