"""The HTML report of a run: what it says, without markup of the answers and without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recorded import EVIL, a_ppo_run, a_reward_run, ppo_rows

from rlhf_fast.trainer.cli import main
from rlhf_fast.trainer.run.page import from_the_start, page, said
from rlhf_fast.trainer.run.record import read

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OFFLINE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
NEVER_CLOSED = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Texts by the class of the element they are in, tags with what they point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in NEVER_CLOSED:
            self.open.append((tag, given.get("class", "")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in NEVER_CLOSED:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and data.strip():
            tag, kind = self.open[-1]
            self.texts.setdefault(kind or tag, []).append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return a_ppo_run(tmp_path_factory.mktemp("runs") / "my run")


@pytest.fixture(scope="module")
def text(finished) -> str:
    return page(read(finished))


@pytest.fixture
def small(tmp_path) -> Path:
    return a_ppo_run(tmp_path / "run", made=1, steps=1, evaluated=False)


def test_what_it_says(text, finished):
    told = Page(text)
    assert told.texts["h1"] == ["my run"]
    assert told.texts["h2"][:3] == ["Figures", "Training", "Held out"]
    assert "finished; step 60 of 60; 2.00 s a step" in told.texts["muted"][0]
    assert told.texts["li"][0].startswith("At step 55, and at 5 more until step 60: the entropy")
    assert dict(zip(told.texts["dt"], told.texts["dd"], strict=True))["score after"] == "1.55"
    # Each sample: its prompt, the answer before, the answer after.
    assert told.texts["said"][:3] == [EVIL, f"before 0: {EVIL}", f"after 0: {EVIL}"]
    assert len(told.texts["said"]) == 12 * 3
    assert "reward +1.00" in told.texts["up"] and "down" not in told.texts
    assert told.texts["code"][:4] == ["model", "data", "reward", "steps"]
    assert str(finished.parent) not in text  # no folder of this machine


def test_it_needs_no_network_and_runs_nothing(text):
    told = Page(text)
    assert not {"script", "iframe", "object", "embed", "link", "img", "form", "b"} & set(told.tags)
    assert all(link.startswith("#") for link in told.links)
    assert told.tags.count("svg") == 4 + 3


def test_each_mark_of_a_curve_is_its_own(text):
    found = re.findall(r'id="([^"]+)"', text)
    assert len(found) == len(set(found)) > 100
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert {a or b for a, b in used} <= set(found)


def test_a_run_that_goes_on(tmp_path):
    """Its last evaluation is what is beside the answers before."""
    told = Page(page(read(a_ppo_run(tmp_path / "run", made=25))))
    sections = "Training", "Held out", "Held-out prompts, answered before and after step 20"
    assert told.texts["h2"] == [*sections, "Options"]
    assert told.texts["said"][2] == f"at 20 0: {EVIL}"
    assert told.texts["muted"][0].startswith("not running and not finished")


def test_a_run_that_has_hardly_begun(tmp_path):
    folder = a_ppo_run(tmp_path / "run", made=0, evaluated=False)
    assert Page(page(read(folder))).texts["h2"] == ["Options"]


def test_a_reward_model(tmp_path):
    told = Page(page(read(a_reward_run(tmp_path / "run"))))
    assert (
        told.texts["p"][0]
        == "A reward model of org/small-model, trained on the pairs of org/pairs."
    )
    assert told.texts["figcaption"][:2] == ["loss", "share of pairs in the right order"]


def test_held_out_curves_begin_before_training(finished):
    record = read(finished)
    rows = from_the_start(record)
    before = json.loads((finished / "before.json").read_text())
    assert [row["step"] for row in rows[:2]] == [0, 10]
    assert rows[0]["eval_score"] == pytest.approx(sum(before["score"]) / len(before["score"]))
    assert rows[0].keys() <= rows[1].keys()
    record.before["score"] = [None, 4.0, float("nan")]  # two answers were lost
    assert from_the_start(record)[0]["eval_score"] == 4.0


def test_a_warning_is_said_once_however_often_it_comes():
    rows = ppo_rows(20)
    assert len(said(rows)) == 1 and said(rows[:18]) == []


def test_the_command(small, capsys):
    assert main(["report", str(small)]) == 0
    file = small / "report.html"
    first = file.read_bytes()
    (small / "summary.json").write_text(json.dumps({"score_before": 7.0}))
    (small / "metrics.jsonl").write_text("")
    assert main(["report", "--run", str(small)]) == 0 and file.read_bytes() != first
    theirs = small / "theirs.html"
    theirs.write_text("theirs")
    (small / "after.json").unlink()
    for output, words in ((theirs, "was not written by this"), (small, "is a folder")):
        assert main(["report", str(small), "--output", str(output)]) == 2
        assert words in capsys.readouterr().err
    assert theirs.read_text() == "theirs"


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("config.yaml", None, "holds no run: it has no config.yaml"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "a: 3", "holds no run: config.yaml is not one's"),
        ("after.json", "{", "after.json cannot be read"),
        ("after.json", "[]", "it has no results"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1 is not a step's"),
    ],
)
def test_a_folder_that_is_no_run(small, capsys, name, written, words):
    (small / name).unlink()
    if written is not None:
        (small / name).write_text(written)
    for command in ("report", "watch"):
        assert main([command, str(small)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (small / "report.html").exists()


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium on this machine: html.parser alone has read the report, no browser",
)
@pytest.mark.parametrize("width", [1200, 500])  # a window of Chromium is no narrower
def test_in_a_browser(text, tmp_path, width):
    """What a browser makes of it: all samples, no script that ran, nothing too wide."""
    measured = (
        "<script>addEventListener('load', () => document.body.dataset.wide ="
        " document.documentElement.scrollWidth > innerWidth)</script>"
    )
    file = tmp_path / "page.html"
    file.write_text(text.replace("</head>", measured + "</head>"))
    command = [CHROMIUM, *OFFLINE, f"--user-data-dir={tmp_path / 'user'}",
               f"--window-size={width},900", "--dump-dom", f"file://{file}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>my run</title>" in done.stdout and 'data-wide="false"' in done.stdout
    told = Page(done.stdout)
    assert told.texts["said"][1] == f"before 0: {EVIL}" and told.tags.count("svg") == 7
