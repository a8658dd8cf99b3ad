"""A reward's file is a module as others are."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rewards.functions import load_function

F = "def f(prompts, completions, **columns):\n    return {}\n"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """What a file adds to the process is gone after its test."""
    monkeypatch.setattr(sys, "modules", sys.modules)
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def load(tmp_path):
    def load(text, file="my_score.py", name="f", ran=None):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return load_function(f"{path}:{name}", "reward", ran)

    return load


def test_it_can_import_the_file_beside_it(load, tmp_path):
    """At once and inside of a function, its own where another's has the same name."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside.py").write_text(f"WORD = {folder!r}")
        (tmp_path / folder / "later.py").write_text(f"WORD = {folder!r}")
    first = load("import beside\n" + F.format("beside.WORD"), "one/a.py")
    second = load("import beside\n" + F.format("beside.WORD"), "two/b.py")
    assert (first([], []), second([], [])) == ("one", "two")
    lazy = load(F.format("__import__('later').WORD"), "one/c.py")
    assert lazy([], []) == "one"
    assert sys.path[0] not in (str(tmp_path / "one"), str(tmp_path / "two"))


def test_an_edit_of_the_same_second_and_length_is_seen(load, monkeypatch, tmp_path):
    """Python's cache of compiled files would not see it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "edited.py"
    for score in (1, 2):
        file.write_text(F.format(score))
        os.utime(file, (1e9, 1e9))
        assert load_function(f"{file}:f", "reward")([], []) == score


def test_dataclasses_and_pickles(load):
    text = (
        "from __future__ import annotations\nimport dataclasses, typing\n\n@dataclasses.dataclass\n"
        "class Rule:\n    weight: typing.ClassVar[float] = 2.0\n    name: str = ''\n\n"
    )
    function = load(text + F.format("Rule"))
    rule = function([], [])
    assert pickle.loads(pickle.dumps(rule("x"))) == rule("x")
    assert pickle.loads(pickle.dumps(function)) is function


def test_a_process_pool_finds_its_functions(load, tmp_path):
    """Processes that are started anew import the file by its name."""
    load("def one(x):\n    return x + 1\n\n" + F.format("[]"))
    (tmp_path / "main.py").write_text(
        "if __name__ == '__main__':\n"  # what the new process need not import, either
        "    import multiprocessing\n"
        "    from rlhf_fast.trainer.rewards.functions import load_function\n"
        f"    one = load_function({f'{tmp_path}/my_score.py:one'!r}, 'reward')\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(one, [1, 2]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[2, 3]\n", done.stderr


@pytest.mark.parametrize("file", ["json.py", "torch.py", "rlhf_fast.py", "not-a.name.py"])
def test_a_name_that_is_taken(load, file):
    before = sys.modules.get(Path(file).stem)
    function = load("here = 1\n" + F.format("here"), file)
    assert function([], []) == 1
    assert sys.modules.get(Path(file).stem) is before
    assert pickle.loads(pickle.dumps(function)) is function
    assert json.loads("1") == 1


def test_it_is_run_once_a_run(load, tmp_path):
    text = f"open({str(tmp_path / 'log')!r}, 'a').write('x')\n" + F.format("g")
    text += "def g(prompts, completions): return f\n"
    ran = {}
    f, g = load(text, ran=ran), load(text, name="g", ran=ran)
    assert f([], []) is g and g([], []) is f
    assert (tmp_path / "log").read_text() == "x"
    assert load(F.format("'edited'"), ran={})([], []) == "edited"  # the next run reads it anew


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module"),
        ("raise SystemExit(0)", "cannot be imported: SystemExit: 0"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("g = 1", "has no function f"),
    ],
)
def test_a_file_that_cannot_be_run(load, text, message):
    with pytest.raises(InputError, match=message):
        load(text, "broken_score.py")
    assert "broken_score" not in sys.modules or message.startswith("has no")
