"""docs/walkthrough.md: its code runs in the order it stands in, and what it points at is there."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from rlhf_fast.trainer import cli

ROOT = Path(__file__).parents[2]
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs" / "walkthrough.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = list(re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))


def test_every_block_runs_in_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert len(BLOCKS) == TEXT.count("```python") >= 18
    names: dict = {}
    for block in BLOCKS:
        # empty lines in front, so that a traceback names the line of the page
        code = "\n" * TEXT.count("\n", 0, block.start(1)) + block[1]
        exec(compile(code, str(PAGE), "exec"), names)


def test_every_block_asserts_something() -> None:
    assert [b[1] for b in BLOCKS if "assert" not in b[1]] == []


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert len(targets) > 10
    assert [t for t in targets if not (PAGE.parent / t).exists()] == []


def test_every_error_of_the_slides_is_in_the_table_and_in_its_section() -> None:
    found = re.findall(r"^## (\d+)\. (.*?)(?=^## )", TEXT, re.M | re.S)
    sections = {int(n): body for n, body in found}
    rows = re.findall(r"\| (\d+) \|$", TEXT, re.M)
    assert len(rows) == 11
    for n in set(map(int, rows)):
        assert "**On the slide" in sections[n], f"section {n}"


@pytest.mark.long
def test_hacking_runs_both_policies_and_writes_its_chapter(
    tmp_path, write_jsonl, tiny_policy_folder, tiny_reward_folder, monkeypatch
) -> None:
    pytest.importorskip("vaderSentiment")
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo"))
    hacking = importlib.import_module("hacking")
    commands = []

    def here(*command: object) -> None:  # and not in processes, whose imports take longer
        commands.append(command)
        assert command[:3] == ("-m", "rlhf_fast.trainer.cli", "ppo")
        assert cli.main([*map(str, command[2:])]) == 0

    monkeypatch.setattr(hacking, "run", here)
    page = tmp_path / "walkthrough.md"
    page.write_text(TEXT, encoding="utf-8")
    prompts = write_jsonl([{"prompt": f"the {w} film"} for w in ("good", "bad", "very", "not")] * 3)
    command = [
        "hacking.py", "--betas", "0", "0.5",
        "--model", tiny_policy_folder, "--reward", tiny_reward_folder, "--data", prompts,
        "--runs", tmp_path / "runs", "--out", tmp_path,
        "--steps", "2", "--batch_size", "4", "--eval_prompts", "4", "--trainable_layers", "2",
        "--max_new_tokens", "4", "--device", "cpu",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    hacking.main()
    assert len(commands) == 2
    result = json.loads((tmp_path / "hacking.json").read_text())
    assert [run["beta"] for run in result["runs"]] == [0.0, 0.5]
    for run in result["runs"]:
        assert [row["step"] for row in run["rows"]] == [1, 2]
        assert run["rows"][0].keys() == {"step", "kl", "proxy", "judge"}
    # before training both are the same policy
    first, second = (run["held_out"]["before"] for run in result["runs"])
    assert first == second and first["kl"] == [0.0, 0.0]
    assert (tmp_path / "hacking.png").stat().st_size > 10_000
    chapter = page.read_text(encoding="utf-8").split("<!-- hacking")[1]
    after = result["runs"][1]["held_out"]["after"]["proxy"][0]
    assert "| after, β = 0.5 | " in chapter and f"{after:.2f}" in chapter
    assert "has not been made" not in chapter and "![" in chapter
    assert page.read_text(encoding="utf-8").count("<!--") == 2
