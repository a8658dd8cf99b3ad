"""What the README and the pages of docs/ show is what the code does."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast import info
from rlhf_fast.trainer.cli import COMMANDS
from rlhf_fast.trainer.config import COMMAND_CONFIGS

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import report, run  # noqa: E402

FIELDS = [f for config in COMMAND_CONFIGS.values() for f in dataclasses.fields(config)]
README = ROOT / "README.md"
# The walkthrough has tests of its own; the changelog speaks of what was.
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    pytest.param(page, block, id=f"{page}:{i}")
    for page, text in TEXTS.items()
    if page != "docs/walkthrough.md"
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_code_blocks_run(page: str, block: str) -> None:
    if page == "docs/integrations.md":
        pytest.importorskip("trl")
    exec(compile(block, page, "exec"), {})


def test_the_readme_is_short_and_shows_a_loss() -> None:
    assert len(README.read_bytes()) <= 8192
    assert "```python" in TEXTS["README.md"]


def test_the_op_table_is_the_registry() -> None:
    assert info.markdown() in TEXTS["README.md"]


def test_figures_are_those_of_the_kept_runs() -> None:
    assert report.main(["--check"]) == 0


def test_the_options_are_those_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    options = runpy.run_path(str(ROOT / "docs" / "options.py"))
    assert options["main"](["--check"]) == 0, capsys.readouterr().out
    text = TEXTS["docs/options.md"]
    for name in COMMANDS:
        assert f"## rlhf-fast {name}\n" in text
    flags = [field.name for field in FIELDS]
    assert all(text.count(f"| `--{name}`") == flags.count(name) for name in set(flags))


def test_the_recipes_are_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = runpy.run_path(str(ROOT / "docs" / "recipes.py"))
    assert recipes["main"](["--check"]) == 0, capsys.readouterr().out


def test_every_flag_that_is_named_exists() -> None:
    there = {f"--{field.name}" for field in FIELDS}
    there |= {"--help", "--config", "--recipe", "--markdown", "--check"}
    there |= set(re.findall(r"--[a-z]+", run._parser().format_help()))
    there |= {"--no-deps", "--no-build-isolation", "--target"}  # pip's
    there |= {"--multi_gpu", "--num_processes", "--cpu", "--config_file"}  # accelerate's
    there |= {"--slip"}  # examples/cat_gridworld.py's
    there |= {"--answers"}  # examples/arithmetic/compare.py's
    for page, text in TEXTS.items():
        named = set(re.findall(r"(?<![-\w])--[a-z][\w-]*", text))
        assert named - there == set(), page


def test_every_file_that_is_named_exists() -> None:
    folders = r"(?:examples|bench|docs|rlhf_fast|kernels|csrc|tests)"
    missing = []
    for page, text in TEXTS.items():
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        missing += [(page, x) for x in links if not ((ROOT / page).parent / x).exists()]
        named = re.findall(rf"`({folders}/[\w./-]*)`", text)
        missing += [(page, x) for x in named if not (ROOT / x).exists()]
    assert missing == []


def test_every_page_is_on_the_site_and_in_the_index() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in nav, page.name
        assert page.name == "index.md" or f"]({page.name})" in TEXTS["docs/index.md"], page.name


def test_docstrings_are_markdown() -> None:
    """As the API reference shows them: a description that begins with > would be a quotation, and
    the :: of reStructuredText stays as it is."""
    for name in rlhf_fast.__all__:
        said = inspect.getdoc(getattr(rlhf_fast, name)) or ""
        if not name.startswith("_"):
            assert f"::: rlhf_fast.{name}\n" in TEXTS["docs/api.md"], name
            assert re.findall(r"(?m)^ *[\w, ]+: >.*|.*::$", said) == [], name


def test_contributing_names_every_folder() -> None:
    tops = ("rlhf_fast", "kernels", "csrc", "bench", "docs", "examples", "tests")
    kinds = ("*.py", "*.cpp", "*.md", "*.json", "*.png")
    folders = [ROOT / top for top in tops]
    folders += [x for top in tops for x in (ROOT / top).rglob("*") if x.is_dir()]
    table = TEXTS["CONTRIBUTING.md"].split("## Where things are")[1].split("## ")[0]
    for folder in folders:
        name = folder.relative_to(ROOT).as_posix()
        made_by_a_command = any(part[0] in "._" for part in name.split("/"))
        made_by_a_command |= name.startswith("bench/out")
        if not made_by_a_command and any(x for kind in kinds for x in folder.glob(kind)):
            of_a_machine = folder.parent == ROOT / "bench" / "results"
            assert of_a_machine or f"`{name}/`" in table, name
