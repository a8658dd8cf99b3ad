"""bench/engines.py: what it counts, what it makes of engines that fail, the table."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import engines, report  # noqa: E402
from rlhf_fast.trainer.rollout.protocol import completions  # noqa: E402


class Engine:
    """Takes 9 seconds for the first answers at a size, then 1, 2 and 6."""

    clock = 0.0

    def __init__(self, model, tokenizer):
        self.closed = False

    def generate(self, prompts, sampling, seed):
        Engine.clock += [9.0, 1.0, 2.0, 6.0][seed]
        size = sampling.max_new_tokens
        return completions([[3] * size] * len(prompts), [[-1.0] * size] * len(prompts))

    def sync(self, weights):
        Engine.clock += 5.0

    def close(self):
        self.closed = True


class Fails(Engine):
    made: list = []  # noqa: RUF012

    def sync(self, weights):
        self.made.append(self)
        raise OSError("no\nroom")


def test_what_it_counts(monkeypatch, tmp_path, capsys, tiny_policy_folder):
    """The first answers at a size count for nothing, the median of the others does; what is absent
    or fails has a line, and is closed; the record is what the page is made of."""
    monkeypatch.setattr(time, "perf_counter", lambda: Engine.clock)
    made = {"ours": Engine, "transformers": Fails, "vllm": Engine}
    monkeypatch.setattr(engines, "ENGINES", made)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    monkeypatch.setattr(report, "ENGINES", tmp_path / "engines.json")
    engines.main(["--model", tiny_policy_folder, "--tokens", "8", "--keep"])
    record = json.loads((tmp_path / "engines.json").read_text())
    lines = report.engines(record).splitlines()
    assert lines[-3:] == [
        "| ours | 4 | 64 | 256 | 5.0 s |",
        "| transformers | OSError: no room | | | |",
        "| vllm | not installed | | | |",
    ]
    assert all(line in capsys.readouterr().out for line in lines[-1:])
    assert Fails.made[-1].closed
    assert record["engines"]["ours"]["rows"]["16"]["seconds"] == [1.0, 2.0, 6.0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["vlm"], "no engine vlm: expected ours"), (["--model", "nowhere"], "no model in nowhere")],
)
def test_what_it_refuses(capsys, argv, message):
    with pytest.raises(SystemExit):
        engines.main(argv)
    assert message in capsys.readouterr().err
