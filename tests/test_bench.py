"""The bench's own promises: a wrong result gets no speed-up, a bad name is refused with the list,
what it writes is complete, and its memory reading sees what was allocated."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import inputs, measure, memory, oracle, plot, report, run, suite  # noqa: E402
from bench.peers import PEERS, Peer  # noqa: E402
from rlhf_fast.ops.registry import OPS  # noqa: E402

CPU = torch.device("cpu")
SHAPES = {
    "token_logprobs": {"N": 8, "V": 100},
    "linear_token_logprobs": {"N": 8, "H": 16, "V": 100},
    "policy_loss": {"B": 3, "T": 20},
    "gae": {"B": 3, "T": 20},
}
QUIET = measure.Ceilings(copy=1e10, gemm=1e11, gemm_dtype="float32")


def settings() -> suite.Settings:
    return suite.Settings(CPU, torch.float32, cache=4096, seconds=0.01, rounds=3, patience=60.0)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Weighing starts a process that imports torch; here only the test of it does."""
    monkeypatch.setattr(memory, "measured", lambda *_: {})


def wrong(op_name: str, change):
    """A peer whose answer is the reference's, changed."""

    def function_for(op):
        return lambda **arguments: change(op.reference(**arguments))

    return Peer("wrong", function_for)


@pytest.mark.parametrize("op_name", OPS)
def test_every_op_is_compared(op_name):
    op = OPS[op_name]
    shape = {key: min(size, 40) for key, size in op.shapes[0].items()}
    rows = suite.compare(op, shape, [PEERS["eager"], PEERS["bare-GEMMs"]], settings())
    suite.rate(rows, QUIET)
    assert [row["pass"] for row in rows][0] == "forward"
    for row in rows:
        ours, eager = row["cells"]["ours"], row["cells"]["eager"]
        assert ours["error"]["value"] <= ours["error"]["limit"]
        assert ours["seconds"]["q1"] <= ours["seconds"]["median"] <= ours["seconds"]["q3"]
        assert eager["ratio"]["median"] > 0
        assert row["rounds"] >= 3 and row["bytes"] > 0 and row["rate"]["share"] > 0
        assert ("bare-GEMMs" in row["cells"]) == op_name.startswith("linear")
        assert not any("failed" in cell for cell in row["cells"].values())


@pytest.mark.parametrize(
    "change",
    [
        lambda out: (out[0] * 1.001, out[1]),
        lambda out: (out[0], out[1].detach() + 0 * out[0]),  # right values, half of the gradient
        lambda out: (torch.cat([out[0][:-1], out[0][-1:] + 1e-3]), out[1]),  # one row of many
        lambda out: (out[0] * float("nan"), out[1]),
        lambda out: (out[0][None], out[1]),
    ],
    ids=["scaled", "gradient", "one row", "nan", "shape"],
)
def test_wrong_peer_is_refused(change):
    peer = wrong("token_logprobs", change)
    op = OPS["token_logprobs"]
    *_, row = suite.compare(op, SHAPES[op.name], [peer], settings())
    cell = row["cells"]["wrong"]
    assert "limit" in cell.get("refused", "") or "shape" in cell["failed"]
    assert "seconds" not in cell and "ratio" not in cell
    assert "seconds" in row["cells"]["ours"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("op_name", SHAPES)
def test_no_speed_up_for_a_wrong_ours(op_name, tmp_path, capsys):
    op = OPS[op_name]

    def broken(**arguments):
        out = op.function(**arguments)
        return (1.01 * out[0], *out[1:]) if isinstance(out, tuple) else 1.01 * out

    broken_op = dataclasses.replace(op, function=broken)
    rows = suite.compare(broken_op, SHAPES[op_name], [PEERS["eager"]], settings())
    for row in rows:
        suite.rate(rows, QUIET)
        assert "refused" in row["cells"]["ours"]
        assert "rate" not in row and row["rounds"] == 0
        assert all("ratio" not in cell and "seconds" not in cell for cell in row["cells"].values())
    text = shown({"peers": ["eager"], "rows": rows}, tmp_path)
    assert "REFUSED" in text and "error" in text and "×" not in text


def test_a_loss_that_cancels_is_not_refused_but_a_wrong_statistic_is():
    op = OPS["policy_loss"]

    def stats_changed(out):
        return out[0], out[1]._replace(clipfrac=out[1].clipfrac + 1e-4)

    row, *_ = suite.compare(op, {"B": 8, "T": 256}, [wrong(op.name, stats_changed)], settings())
    assert "refused" not in row["cells"]["ours"]
    assert "loss and statistics" in row["cells"]["wrong"]["refused"]


def test_oracle_in_pieces_is_the_oracle(monkeypatch):
    op, shape = OPS["linear_token_logprobs"], {"N": 50, "H": 16, "V": 100}
    (sample,) = inputs.draw(op, shape, CPU, torch.float32, cache=0)
    whole = oracle.truth(op, shape, sample)
    monkeypatch.setattr(oracle, "ROWS", 16)
    pieces = oracle.truth(op, shape, sample)
    assert len(pieces.seeds) == len(whole.seeds) == 2
    answer = inputs.call(op.function, sample, inputs.BOTH, pieces.seeds)
    assert not oracle.judge(answer, pieces).wrong
    torch.testing.assert_close(pieces.answer.outputs, whole.answer.outputs)


def test_eager_that_overflows_sets_no_limit():
    exact = inputs.Answer([torch.ones(3, dtype=torch.float64)])
    truth = oracle.Truth(exact, {"output 0": float("inf")}, 1e-6, {})
    assert oracle.judge(inputs.Answer([torch.full((3,), float("inf"))]), truth).wrong
    assert not oracle.judge(inputs.Answer([torch.ones(3)]), truth).wrong
    assert oracle.judge(inputs.Answer([torch.ones(3), torch.ones(3)]), truth).wrong


def test_failing_peers_cost_their_cell():
    def raises(op):
        raise ImportError("needs a package that is not installed")

    def allocates(op):
        return lambda **_: torch.empty(2**55)

    def hangs(op):
        return lambda **_: time.sleep(30)

    peers = [Peer("absent", raises), Peer("greedy", allocates), Peer("slow", hangs)]
    peers += [Peer("nothing like it", lambda op: None), PEERS["eager"]]
    one = settings()
    one.patience = 1.0
    (row,) = suite.compare(OPS["gae"], SHAPES["gae"], peers, one)
    cells = row["cells"]
    assert "not installed" in cells["absent"]["failed"]
    assert "memory" in cells["greedy"]["failed"]
    assert "more than 1 s" in cells["slow"]["failed"]
    assert "nothing like it" not in cells
    assert cells["eager"]["ratio"]["median"] > 0


def test_failing_ours_costs_the_row(tmp_path):
    def raises(**_):
        raise RuntimeError("no kernel image")

    broken = dataclasses.replace(OPS["gae"], function=raises)
    (row,) = suite.compare(broken, SHAPES["gae"], [PEERS["eager"]], settings())
    assert "no kernel image" in row["cells"]["ours"]["failed"]
    assert "ratio" not in row["cells"]["eager"]
    assert "no kernel image" in shown({"peers": ["eager"], "rows": [row]}, tmp_path)


def test_out_of_memory_costs_the_row(monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(oracle, "truth", full)
    (row,) = suite.compare(OPS["gae"], SHAPES["gae"], [], settings())
    assert row["failed"] == "out of memory"
    assert "out of memory" in shown({"peers": [], "rows": [row]}, tmp_path)


def test_interleaved_rotates():
    order = []
    calls = {name: (lambda i, n=name: order.append((n, i))) for name in "abc"}
    seconds = measure.interleaved(calls, CPU, budget=0.0, least=3)
    assert "".join(name for name, _ in order) == "abc" + "abc" + "bca" + "cab"
    assert [i for _, i in order] == list(range(12))
    assert all(len(x) == 3 for x in seconds.values())


def test_inputs_outgrow_the_cache():
    op, shape = OPS["token_logprobs"], {"N": 8, "V": 100}
    samples = inputs.draw(op, shape, CPU, torch.float32, cache=10_000)
    size = sum(x.nbytes for x in inputs.tensors(samples[0]).values())
    assert (len(samples) - 1) * size < 20_000 <= len(samples) * size
    assert not torch.equal(samples[0].arguments["logits"], samples[1].arguments["logits"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_sees_temporaries_and_not_what_is_held():
    kept, passing = 12 * 2**20, 40 * 2**20

    def call():
        torch.ones(passing // 4).sum()
        return inputs.Answer([torch.ones(kept // 4)], {})

    growth = memory.resident_growth(call)
    assert growth["held"] == kept
    assert abs(growth["peak"] - passing) < 2**20  # the kernel counts pages in batches
    assert growth["extra"] == growth["peak"] - kept


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_in_a_fresh_process(monkeypatch):
    monkeypatch.undo()
    shape = {"N": 64, "V": 20_000}
    both = [("forward", "ours"), ("forward", "eager"), (inputs.BOTH, "ours")]
    found = memory.measured("token_logprobs", shape, CPU, torch.float32, both)
    logits = 64 * 20_000 * 4
    assert found["forward", "eager"]["extra"] >= logits
    assert found[inputs.BOTH, "ours"]["held"] >= logits


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--op", "gea"], ["'gea'", "gae", "token_logprobs"]),
        (["--peers", "egar"], ["'egar'", "eager", "torch.compile"]),
        (["--device", "tpu"], ["'tpu'", "cpu"]),
        (["--dtype", "int4"], ["'int4'", "bfloat16"]),
        (["--op", "gae", "--shape", "N=2,V=3"], ["N=2 V=3", "B=256,T=1024"]),
        (["--shape", "wide"], ["'wide'", "N=512,V=49152"]),
        (["--shape", "B=0,T=4"], ["B must be at least 1"]),
    ],
)
def test_unknown_names_are_refused_with_the_list(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert all(text in told for text in named), told


def test_main_writes_json_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda *_: QUIET)
    monkeypatch.setattr(run.machine, "bound_memory", lambda: None)  # it would bound pytest
    arguments = ["--quick", "--op", "gae", "value_loss", "--peers", "eager", "--out"]
    assert run.main([*arguments, str(tmp_path), "--shape", "B=4,T=8", "B=2,T=9"]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    machine = ("device", "torch", "triton", "threads", "load", "commit")
    assert record["machine"].keys() >= set(machine)
    assert record["ceilings"]["copy"] and record["ceilings"]["gemm"]
    assert [(r["op"], r["pass"]) for r in record["rows"]] == [
        *[("gae", "forward")] * 2,
        *[("value_loss", "forward"), ("value_loss", inputs.BOTH)] * 2,
    ]
    fields = {"op", "shape", "dtype", "pass", "implementation", "copies", "rounds", "bytes"}
    assert record["rows"][0].keys() >= fields | {"flops", "rate", "cells"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "B=4 T=8" in out and "×" in out and record["machine"]["device"] in out


def test_runs_as_a_script():
    script = [sys.executable, str(ROOT / "bench" / "run.py"), "--op", "nothing"]
    done = subprocess.run(script, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and "unknown op 'nothing'" in done.stderr


def shown(part: dict, folder: Path) -> str:
    """What the table prints of a record, after the plot was drawn of it."""
    from rich.console import Console

    machine = {"device": "d", "threads": 1, "torch": "t", "triton": "none", "commit": "c"}
    machine["load"] = 0.1
    whole = {"machine": machine, "ceilings": QUIET.record(), "seconds": 1.0, **part}
    plot.draw(whole, folder / "bench.png")
    assert (folder / "bench.png").stat().st_size > 0
    console = Console(width=report.WIDTH, record=True)
    report.table(whole, console)
    return console.export_text()
