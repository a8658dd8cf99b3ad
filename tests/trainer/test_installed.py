"""Packages that are missing, or do not go together, are one line that names them."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest
import transformers
from transformers.integrations import peft as integration

from rlhf_fast.trainer import cli, installed, ppo
from rlhf_fast.trainer.errors import InputError


@pytest.fixture(autouse=True)
def looked_at_anew():
    installed.check_versions.cache_clear()
    yield
    installed.check_versions.cache_clear()


def test_a_peft_that_transformers_refuses_is_named_with_it(configured, monkeypatch):
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.1")
    with pytest.raises(InputError) as error:
        ppo.train(configured(lora_r=2))
    peft = importlib.metadata.version("peft")
    message = str(error.value)
    assert "\n" not in message and "lora_target_modules" not in message
    assert f"transformers {transformers.__version__}" in message and f"peft {peft}" in message
    assert message.startswith("lora_r=2: ") and "99.1" in message


def test_a_peft_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="lora_r=2: peft .* does not load beside transformers"):
        installed.check_peft("lora_r=2")


def found(monkeypatch, **versions: str | None) -> None:
    """As if these versions were installed; None: not at all."""

    def version(name: str) -> str:
        if name not in versions:
            return importlib.metadata.version(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(installed, "version", version)


def test_what_is_missing_is_named(monkeypatch, capsys):
    found(monkeypatch, peft=None)
    with pytest.raises(InputError, match=r"lora_r=2 needs peft: pip .*rlhf_fast\[lora\]"):
        installed.check_peft("lora_r=2")
    found(monkeypatch, datasets=None, rich=None)
    for command in ("reward", "ppo", "generate", "plot"):
        assert cli.main([command, "--help"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"rlhf-fast {command}: not installed: datasets, rich: {installed.INSTALL}"


def test_a_version_out_of_range_is_named(monkeypatch, capsys):
    found(monkeypatch, transformers="4.57.6")
    assert cli.main(["ppo", "--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"rlhf_fast .* works with transformers.*>=5.*, and transformers 4.57.6", line)


def test_a_package_that_does_not_load_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "rlhf_fast.trainer.run.console")
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(InputError, match="does not load.*rich.table.*rlhf_fast"):
        installed.load("rlhf_fast.trainer.run.console")


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"numpy", "transformers", "accelerate", "datasets", "safetensors",
                                  "yaml", "rich", "matplotlib", "packaging", "peft"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch, rlhf_fast
values = torch.zeros(2, 3, requires_grad=True)
rlhf_fast.token_kl(values, torch.ones(2, 3)).sum().backward()
from rlhf_fast.trainer.cli import main
assert main(["info"]) == 0 and main(["--help"]) == 0
for command in ("reward", "ppo", "generate", "plot"):
    assert main([command, "--help"]) == 2
"""


def test_with_torch_alone_there_are_the_ops_and_info():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rlhf-fast")]
    assert len(lines) == 4 and all(installed.INSTALL in line for line in lines)
    assert "Traceback" not in done.stderr and "linear_policy_loss" in done.stdout
