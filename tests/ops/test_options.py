"""An option of the policy loss stands in one place: what CONTRIBUTING.md promises of a new one."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast.ops.options import PolicyOptions
from rlhf_fast.ops.registry import KERNELS

ROOT = Path(__file__).parents[2]
LOSSES = [rf.policy_loss, rf.linear_policy_loss]

# A field is added to a copy of the package, and to nothing else. No formula knows it, so the copy
# runs without C++; all else must.
FIELD = """
    humour: float = option(0.25, "how much of a laugh a token is", low=0.0, high=3.0)
    mood: str = option("dry", "which laugh", choices=("dry", "silly"))

    def check(self"""
SCRIPT = """
import contextlib, inspect, io, sys
sys.modules["rlhf_fast._C"] = None
import torch
import rlhf_fast as rf
from rlhf_fast.ops.registry import KERNELS
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.flags import parse
from rlhf_fast.trainer.errors import InputError

def refused(call):
    try:
        call()
    except (ValueError, InputError) as error:
        return str(error)

def shown(call):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        call()
    return " ".join(text.getvalue().split())

mask, x = torch.ones(2, 3, dtype=torch.bool), torch.rand(2, 3)
hidden, weight = torch.rand(2, 3, 4, requires_grad=True), torch.rand(5, 4)
calls = {
    rf.policy_loss: (x.clone().requires_grad_(), x, x, mask),
    rf.linear_policy_loss: (hidden, weight, torch.zeros(2, 3, dtype=torch.int64), x, x, mask),
}
for loss, inputs in calls.items():
    assert inspect.signature(loss).parameters["humour"].default == 0.25
    assert "humour: ≥ 0, ≤ 3; how much of a laugh a token is." in loss.__doc__
    assert "mood: dry, silly; which laugh." in loss.__doc__
    assert KERNELS[loss.__name__].schema.count("float humour, str mood)") == 1
    assert refused(lambda: loss(*inputs, humour=4)) == "humour must be at most 3, got 4"
    assert "mood must be one of dry, silly" in refused(lambda: loss(*inputs, mood="sad"))
    for options in ({"humour": 2, "mood": "silly"}, {"ratio": "sequence", "humour": 0.5}):
        loss(*inputs, **options)[0].backward()

given = ["--model=m", "--data=d", "--output_dir=o", "--reward=r"]
flags = parse(PPOConfig, [*given, "--humour=2", "--mood=silly"], prog="x")
assert flags.policy_options(0.1).items() >= {"humour": 2.0, "mood": "silly"}.items()
assert "humour=4.0" in refused(lambda: parse(PPOConfig, [*given, "--humour=4"], prog="x"))
assert refused(lambda: parse(PPOConfig, [*given, "--mood=sad"], prog="x"))
assert "how much of a laugh a token is" in shown(lambda: parse(PPOConfig, ["--help"], prog="x"))
print("one field")
"""


def test_a_new_option_costs_its_field(tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "rlhf_fast", tmp_path / "rlhf_fast", ignore=skip)
    options = tmp_path / "rlhf_fast/ops/options.py"
    text = options.read_text(encoding="utf-8")
    assert text.count("\n    def check(self") == 1
    options.write_text(text.replace("\n    def check(self", FIELD), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=300,
    )  # fmt: skip
    assert done.stdout == "one field\n", done.stderr[-2000:]


@pytest.mark.parametrize("loss", LOSSES)
def test_signature_and_docstring_show_every_option(loss) -> None:
    shown = inspect.signature(loss).parameters
    for f in fields(PolicyOptions):
        assert (
            shown[f.name].default == f.default and shown[f.name].kind == shown[f.name].KEYWORD_ONLY
        )
        assert f"\n        {f.name}: " in loss.__doc__
    assert not any(p.kind == p.VAR_KEYWORD for p in shown.values())
    assert PolicyOptions.schema() in KERNELS[loss.__name__].schema


def test_a_word_that_is_no_option_is_refused_by_name() -> None:
    x, mask = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="clip_hihg"):
        rf.policy_loss(x, x, x, mask, clip_hihg=0.3)


def test_an_option_is_named_where_it_means_something_and_nowhere_else() -> None:
    """dual_clip: the field; its formula, twice in PyTorch, in C++ and in Triton; its samples; its
    foreign names in the integrations. Whoever passes it on does not name it."""
    naming = {
        str(path.relative_to(ROOT))
        for folder in ("rlhf_fast", "kernels", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h") and "dual_clip" in path.read_text(encoding="utf-8")
    }
    assert naming == {
        "rlhf_fast/ops/options.py", "rlhf_fast/ops/policy_loss.py", "kernels/policy_loss.py",
        "csrc/policy_loss_cpu.cpp", "rlhf_fast/ops/linear/policy_loss.py",  # a sample
        "rlhf_fast/trainer/contradictions.py",
        "rlhf_fast/integrations/verl.py", "rlhf_fast/integrations/openrlhf.py",
        "rlhf_fast/trainer/convert/verl.py",
    }  # fmt: skip


@pytest.mark.parametrize("stats", [rf.PolicyStats, rf.ValueStats])
def test_every_statistic_is_documented(stats) -> None:
    for name in stats._fields:
        assert f"\n        {name}: " in stats.__doc__
