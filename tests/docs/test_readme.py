"""What the README shows is what the code does."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from rlhf_fast import info
from rlhf_fast.trainer.config import GenerateConfig, PlotConfig, PPOConfig, RewardConfig

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import run  # noqa: E402

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_a_code_block() -> None:
    assert "```python" in README


def test_the_op_table_is_the_registry() -> None:
    assert info.markdown() in README


def test_its_flags_exist() -> None:
    configs = (RewardConfig, PPOConfig, GenerateConfig, PlotConfig)
    there = {f"--{field.name}" for config in configs for field in dataclasses.fields(config)}
    there |= {"--help", "--config", "--markdown", "--check"}
    there |= set(re.findall(r"--[a-z]+", run._parser().format_help()))
    pip = {"--no-deps", "--no-build-isolation", "--target"}
    accelerate = {"--multi_gpu", "--num_processes", "--cpu", "--config_file"}
    named = set(re.findall(r"(?<![-\w])--[a-z][\w-]*", README + CONTRIBUTING))
    assert named - there - pip - accelerate == set()


def test_its_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README + CONTRIBUTING)
    folders = r"(?:examples|bench|docs|rlhf_fast|kernels|csrc|tests)"
    named = re.findall(rf"`({folders}/[\w./-]*)`", README + CONTRIBUTING)
    assert len(links) > 5 and len(named) > 5
    assert [path for path in links + named if not (ROOT / path).exists()] == []
