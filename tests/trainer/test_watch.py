"""`rlhf-fast watch`: what it shows of a run, when it ends."""

from __future__ import annotations

import io
import json
import math
import os
import socket
from pathlib import Path

import pytest
from recorded import a_ppo_run, a_reward_run, ppo_rows
from rich.console import Console

from rlhf_fast.trainer.cli import main
from rlhf_fast.trainer.run import lock, watch
from rlhf_fast.trainer.run.record import read

NAN = math.nan


def held(folder: Path, **other) -> None:
    """As a process that runs there leaves its lock."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": "now"} | other
    (folder / lock.NAME).write_text(json.dumps(holder))


def shown(folder: Path, *, terminal: bool = False, width: int = 80, **options) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, highlight=False)
    watch.watch(folder, console, **options)
    return file.getvalue()


def test_a_finished_run_is_shown_once(tmp_path):
    text = shown(a_ppo_run(tmp_path / "run"))
    assert "finished" in text and "step 60/60" in text and "left" not in text
    row = next(line for line in text.splitlines() if line.startswith("kl"))
    assert row.split()[:4] == ["kl", "5.9", "0", "5.9"]
    assert row.split()[4] == "".join(sorted(row.split()[4])) and row[-1] == "█"  # it only rises
    assert "held out, after step 60: score 1  kl 6  length 12" in text
    assert "! the entropy has collapsed" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_narrow_terminal_keeps_the_names(tmp_path):
    folder = a_ppo_run(tmp_path / "run")
    lines = shown(folder, width=40).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["kl"][1] == "5.9" and rows["kl"][-1][-1] == "█"
    assert {watch.name_of(key) for key, _ in read(folder).panels} <= rows.keys()
    assert max(map(len, lines)) <= 40


def test_a_run_that_goes_on(tmp_path):
    folder = a_ppo_run(tmp_path / "run", made=25)
    held(folder)
    text = " ".join(shown(folder, once=True).split())
    assert f"running, process {os.getpid()}" in text and "step 25/60 0:01:10 left" in text


def test_it_ends_with_the_run(tmp_path, monkeypatch):
    """A line for each step on a pipe, those that come meanwhile once each."""
    folder = a_ppo_run(tmp_path / "run", made=2, evaluated=False)
    held(folder)
    rows = [json.dumps(row) + "\n" for row in ppo_rows(60)]
    metrics = folder / "metrics.jsonl"

    def time_passes(seconds: float) -> None:
        made = metrics.read_text().count("\n")
        if made == 4:
            (folder / lock.NAME).write_text("")
        else:  # and half a line, as a file is seen while it is written
            metrics.write_text("".join(rows[: made + 1]) + rows[made + 1][:20])

    monkeypatch.setattr(watch.time, "sleep", time_passes)
    lines = shown(folder).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/60", "2/60", "3/60", "4/60"]
    assert "kl 0.1" in lines[1] and lines[-1].startswith("not running and not finished")


def test_on_a_terminal(tmp_path, monkeypatch):
    folder = a_ppo_run(tmp_path / "run", made=25)
    held(folder)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: (folder / lock.NAME).unlink())
    text = shown(folder, terminal=True)
    assert "\x1b" in text and text.index("running") < text.index("not running")


def test_ctrl_c_is_quiet(tmp_path, monkeypatch, capsys):
    folder = a_ppo_run(tmp_path / "run", made=25)
    held(folder)

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", pressed)
    assert main(["watch", str(folder)]) == 0
    assert capsys.readouterr().err == ""


def test_a_reward_model(tmp_path):
    text = shown(a_reward_run(tmp_path / "run"))
    assert "step 9" in text and "accuracy" in text and "0.767" in text


def test_a_folder_that_is_just_made(tmp_path, capsys):
    """The lock is taken before the config is there."""
    folder = tmp_path / "run"
    assert main(["watch", str(folder)]) == 2
    assert "is not there" in capsys.readouterr().err
    folder.mkdir()
    assert main(["watch", str(folder)]) == 2
    assert "holds no run" in capsys.readouterr().err
    held(folder)
    assert "running" in shown(folder, once=True)


@pytest.mark.parametrize(
    ("holder", "runs"),
    [({}, True), ({"pid": 2**22 + 1}, False), ({"host": "elsewhere", "pid": 1}, True)],
)
def test_whether_it_runs(tmp_path, holder, runs):
    folder = a_ppo_run(tmp_path / "run", made=1)
    held(folder, **holder)
    assert read(folder).runs is runs


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_lock_that_names_nobody(tmp_path, text):
    folder = a_ppo_run(tmp_path / "run", made=1)
    (folder / lock.NAME).write_text(text)
    assert not read(folder).runs


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0, 1], 8, "▁█"), ([3, 3, 3], 8, "▁▁▁"), ([], 8, ""), ([NAN], 8, " "),
        ([0, NAN, 7], 8, "▁ █"), ([0, 0, 7, 7], 2, "▁█"), (list(range(8)), 8, "▁▂▃▄▅▆▇█"),
        ([0, NAN, 7, NAN], 2, "▁█"),
    ],
)  # fmt: skip
def test_sparkline(values, width, expected):
    assert watch.sparkline(values, width) == expected
