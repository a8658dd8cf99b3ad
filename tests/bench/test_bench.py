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

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import (  # noqa: E402
    cases,
    foreign,
    inputs,
    measure,
    memory,
    oracle,
    peers,
    plot,
    report,
    run,
    step,
    suite,
    table,
)
from bench.cases import OPS  # noqa: E402
from bench.peers import PEERS, Peer  # noqa: E402

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


@pytest.mark.long
@pytest.mark.parametrize("op_name", OPS)
def test_every_op_is_compared(op_name):
    op = OPS[op_name]
    shape = {key: min(size, 48) for key, size in op.shapes[0].items()}
    rows = suite.compare(op, shape, [PEERS["eager"], PEERS["bare-GEMMs"]], settings())
    suite.rate(rows, QUIET)
    assert [row["pass"] for row in rows][0] == "forward"
    for row in rows:
        ours, eager = row["cells"]["ours"], row["cells"]["eager"]
        assert ours["error"]["value"] <= ours["error"]["limit"]
        assert ours["seconds"]["q1"] <= ours["seconds"]["median"] <= ours["seconds"]["q3"]
        assert eager["ratio"]["median"] > 0
        assert row["rounds"] >= 3 and row["bytes"] > 0 and row["rate"]["share"] > 0
        assert ("bare-GEMMs" in row["cells"]) == (PEERS["bare-GEMMs"].function_for(op) is not None)
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


def test_a_16_bit_peer_is_marked_and_a_16_bit_ours_refused():
    op = OPS["token_logprobs"]

    def rounded(**arguments):
        return tuple(x.bfloat16() for x in op.function(**arguments))

    one = settings()
    one.dtype = torch.bfloat16
    peer = Peer("rounds", lambda op: rounded)
    row, *_ = suite.compare(op, SHAPES[op.name], [peer], one)
    assert "rounded" in row["cells"]["rounds"] and row["cells"]["rounds"]["ratio"]
    half_wrong = wrong(op.name, lambda out: (1.1 * out[0], out[1]))
    row, *_ = suite.compare(op, SHAPES[op.name], [half_wrong], one)
    assert "refused" in row["cells"]["wrong"]
    ours = dataclasses.replace(op, function=rounded)
    row, *_ = suite.compare(ours, SHAPES[op.name], [], one)
    assert "refused" in row["cells"]["ours"]


def test_an_op_without_kernels_of_its_own():
    plain = dataclasses.replace(OPS["value_loss"], name="plain", kernels=())
    row, *_ = suite.compare(plain, {"B": 3, "T": 8}, list(PEERS.values())[:1], settings())
    assert row["implementation"] == "PyTorch" and row["cells"]["eager"]["ratio"]["median"] > 0


def test_a_peer_may_give_fewer_outputs():
    op = OPS["policy_loss"]
    loss_alone = wrong(op.name, lambda out: out[0])
    *_, row = suite.compare(op, {"B": 8, "T": 256}, [loss_alone], settings())
    cell = row["cells"]["wrong"]
    assert cell["outputs"] == {"given": 1, "of": 1 + len(op.reference(**sample(op))[1])}
    assert cell["ratio"]["median"] > 0
    for change in (lambda out: 1.001 * out[0], lambda out: (None, *out[1])):
        *_, row = suite.compare(op, {"B": 8, "T": 256}, [wrong(op.name, change)], settings())
        assert "ratio" not in row["cells"]["wrong"]  # refused: a wrong loss; failed: no loss


def sample(op, **sizes):
    shape = {key: min(size, 20) for key, size in op.shapes[0].items()} | sizes
    return inputs.draw(op, shape, CPU, torch.float32, cache=0)[0].arguments


@pytest.mark.parametrize("op_name", [name for name in cases.DENSE if "support" not in name])
def test_variants_keep_the_rows_they_say(op_name):
    op = OPS[op_name]
    base = OPS[op_name.split(":")[0]]
    shape = {"N": 40, "H": 8, "V": 30, "kept": 25}
    arguments = sample(op, **shape)
    rows = {
        "linear_policy_loss:masked": lambda x: x["mask"],
        "linear_policy_loss:zero-advantage": lambda x: x["advantages"] != 0,
        "linear_token_logprobs:masked": lambda x: x["labels"] >= 0,
    }[op_name]
    assert int(rows(arguments).sum()) == 10
    assert bool(rows(arguments | cases.DENSE[op_name](arguments)).all())
    assert op.flops(shape, 4) == base.flops(shape | {"N": 10}, 4)


@pytest.mark.parametrize("op_name", [name for name in cases.DENSE if "support" in name])
def test_variants_keep_the_tokens_they_say(op_name):
    op, base = OPS[op_name], OPS[op_name.split(":")[0]]
    shape = {"N": 40, "H": 8, "V": 30, "K": 4}
    arguments = sample(op, **shape)
    support, labels = arguments["support"], arguments["labels"]
    assert support.shape == (*labels.shape, 4) and (support == labels[..., None]).any(-1).all()
    assert cases.DENSE[op_name](arguments) == {"support": None}
    assert op.flops(shape, 4) == base.flops(shape | {"V": 4}, 4)


def test_errors_alone():
    one = settings()
    one.timed = False
    for row in suite.compare(OPS["token_logprobs"], {"N": 8, "V": 100}, [PEERS["eager"]], one):
        assert all("error" in cell and "seconds" not in cell for cell in row["cells"].values())


def test_what_float64_cannot_hold_is_checked_at_fewer_rows(monkeypatch):
    monkeypatch.setattr(oracle, "MOST", 1000)
    monkeypatch.setattr(oracle, "ROWS", 8)
    shape = {"N": 20, "H": 8, "V": 100}
    for row in suite.compare(OPS["linear_token_logprobs"], shape, [PEERS["eager"]], settings()):
        assert row["checked_at"] == shape | {"N": 8}
        assert row["shape"] == shape and row["cells"]["eager"]["ratio"]["median"] > 0


def test_bare_products_lie_as_is_best_for_each(monkeypatch):
    """As the first size says, which is not timed."""
    tried = []

    def seconds(product, hidden, weight):
        result, name = product(hidden, weight), product.__name__
        assert result.shape == {"logits": (5, 7), "d_hidden": (5, 3), "d_weight": (7, 3)}[name]
        rows = product.__self__.lie[name].stride() == (7, 1)
        tried.append((name, rows))
        return 1.0 if rows == (name != "d_hidden") else 2.0

    monkeypatch.setattr(peers, "seconds", seconds)
    function = PEERS["bare-GEMMs"].function_for(OPS["linear_token_logprobs"])
    for rows in (5, 9):
        hidden, weight = torch.ones(rows, 3, requires_grad=True), torch.ones(7, 3)
        logp, _ = function(hidden, weight.requires_grad_())
        logp.sum().backward()
        products = logp.grad_fn.products
        places = {name: x.stride() for name, x in products.lie.items()}
        assert places == {"logits": (7, 1), "d_hidden": (1, rows), "d_weight": (7, 1)}
        assert torch.equal(products.lie["logits"], torch.full((rows, 7), 3.0))
    assert len(tried) == 6 * peers.Products.TIMES == 3 * len(set(tried))


def test_absent_libraries_are_said_to_be_absent(monkeypatch, tmp_path):
    """They have not failed."""
    monkeypatch.setattr(foreign, "FOLDER", tmp_path)
    monkeypatch.setattr(foreign, "installed", lambda distribution: None)
    for name, library in (("TRL", "trl"), ("verl", "verl"), ("OpenRLHF", "openrlhf")):
        monkeypatch.setitem(sys.modules, library, None)  # as if not installed
        (row,) = suite.compare(
            OPS["token_logprobs"], {"N": 4, "V": 9}, [PEERS[name]], last_pass(settings())
        )
        assert row["cells"][name] == {"skipped": "not installed: make bench"}
        assert "seconds" in row["cells"]["ours"]
        text = shown({"peers": [name], "rows": [row]}, tmp_path)
        assert f"{name}: not installed: make bench" in text and "failed" not in text.lower()


def last_pass(one):
    one.last_pass = True
    return one


def test_a_module_out_of_a_library_that_is_not_whole(monkeypatch, tmp_path):
    (tmp_path / "lib" / "deep").mkdir(parents=True)
    (tmp_path / "lib" / "__init__.py").write_text("raise RuntimeError('imports too much')")
    (tmp_path / "lib" / "heavy.py").write_text("raise RuntimeError('imports too much')")
    (tmp_path / "lib" / "deep" / "__init__.py").touch()
    (tmp_path / "lib" / "deep" / "one.py").write_text(
        "from absent_package import Thing\nfrom lib.heavy import other\nimport json\nfound = 1\n"
    )
    monkeypatch.setattr(foreign, "FOLDER", tmp_path)
    placeholders = {"absent_package": {"Thing": int}, "lib.heavy": {"other": 2}, "json": {}}
    module = foreign.load("lib.deep.one", bare=("lib",), placeholders=placeholders)
    assert module.found == 1 and module.Thing is int and module.other == 2
    assert module.json.dumps([1]) == "[1]"  # what is there is not stood in for
    assert "absent_package" not in sys.modules and str(tmp_path) not in sys.path


def test_two_modules_out_of_an_installed_library(monkeypatch, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "__init__.py").write_text("raise RuntimeError('imports too much')")
    for name in ("one", "two"):
        (tmp_path / "whole" / f"{name}.py").write_text("found = 1")
    monkeypatch.setattr(foreign, "FOLDER", tmp_path / "empty")
    monkeypatch.syspath_prepend(tmp_path)
    assert foreign.load("whole.one", bare=("whole",)).found == 1
    assert foreign.load("whole.two", bare=("whole",)).found == 1


def test_every_suite_has_a_plan():
    for gpu in ("cpu", "cuda"):
        for name in cases.SUITES:
            if name == "step":
                continue
            for quick in (True, False):
                plan = cases.plan(name, torch.device(gpu), quick)
                assert plan and all(op.name in OPS for op, _ in plan)
    here = [(op.name, shape) for op, shape in cases.plan("ops", torch.device("cuda"), False)]
    there = [(name, shape) for name, shape in cases.GPU_HEADLINES if name in OPS]
    assert here[: len(there)] == there
    for quick in (True, False):
        names = {op.name.split(":")[0] for op, _ in cases.plan("ops", CPU, quick)}
        assert names >= cases.REGISTRY.keys()


@pytest.mark.long
def test_a_ppo_step_of_a_tiny_model(tmp_path):
    record = step.run(["ours-critic"], CPU, quick=True)
    assert record["setting"]["rounds"] == 2
    ours = record["trainers"]["ours-critic"]
    assert [len(turn["seconds"]) for turn in ours["turns"]] == [1, 1]  # of 2 steps, in 2 rounds
    assert ours["samples_per_second"] == pytest.approx(8 / ours["seconds"])
    assert ours["peak_memory"] > 2**27
    machine_line = {"kind": "cpu", "device": "d", "date": "2026-01-01", "commit": "c"}
    record["machine"] |= machine_line
    assert "8 prompts" in report.markdown([record])
    assert [p.name for p in plot.draw(record, tmp_path)] == ["step.png"]
    json.dumps(record, allow_nan=False)


def steps_record(**trainers):
    """The record of a setting of 16 prompts; of each trainer its turns, or why it failed."""
    cells = {
        name: {"critic": "c", **({"failed": turns} if isinstance(turns, str) else {"turns": turns})}
        for name, turns in trainers.items()
    }
    step.summarize(cells, batch_size=16)
    setting = dataclasses.asdict(step.Setting("a model"))
    return kept("step", [], trainers=cells, setting=setting) | {"versions": {"trl": "1.12.0"}}


def turns(*rounds, memory=2**30):
    return [{"seconds": list(seconds), "peak_memory": memory} for seconds in rounds]


def test_steps_are_compared_within_a_round(tmp_path):
    ours = turns([1.0, 1.0, 9.0], [2.0], [4.0])
    ours[1]["peak_memory"] = 2**31
    record = steps_record(ours=ours, TRL=turns([3.0], [4.0], [20.0]), **{"TRL-shared": "no TRL"})
    cell = record["trainers"]["ours"]
    assert cell["seconds"] == 2.0 and cell["samples_per_second"] == 8.0
    assert cell["peak_memory"] == 2**31
    assert cell["ratios"] == {"TRL": [3.0, 2.0, 5.0]}  # of the medians it would be 2
    assert "ratios" not in record["trainers"]["TRL-shared"]
    assert "3× (2 to 5)" in shown(record, tmp_path)
    text = report.markdown([record])
    assert "| **3× (2 to 5)** |" in text
    assert "| `rlhf-fast ppo` | c | 2 s | 8 | 3× (2 to 5) |  | 2048 MiB |" in text
    assert "| TRL 1.12.0 PPOTrainer | c | no TRL |" in text
    record = steps_record(ours=turns([2.0]), TRL=turns([3.0]))
    assert "| 1.5× |" in report.markdown([record])  # under its goal of 2, and of one round


def test_trainers_take_turns_and_one_that_fails_is_not_asked_again(monkeypatch):
    asked = []

    def one(name, folder, device):
        asked.append(name)
        if name == "TRL":
            return {"failed": "needs trl"}
        return {"seconds": [1.0], "peak_memory": 1}

    monkeypatch.setattr(step, "_in_fresh_process", one)
    monkeypatch.setattr(step, "prepare", lambda *_: step.Setting("none", rounds=3))
    record = step.run(["ours", "TRL", "ours-critic"], CPU, quick=False)
    assert asked == ["ours", "TRL", "ours-critic", "ours-critic", "ours", "ours", "ours-critic"]
    assert record["trainers"]["TRL"]["failed"] == "needs trl"
    assert len(record["trainers"]["ours"]["turns"]) == 3


def test_a_trainer_that_is_absent_costs_its_place(monkeypatch, tmp_path):
    monkeypatch.setattr(foreign, "installed", lambda name: None)
    (tmp_path / "setting.json").write_text(json.dumps({"model": "none"}))
    step.main("TRL", str(tmp_path), str(tmp_path), "cpu")
    assert "needs trl==" in json.loads((tmp_path / step.RESULT).read_text())["failed"]


def kept(suite_name, rows, date="2026-01-01", kind="cpu", **more):
    where = {"device": "d", "kind": kind, "threads": 1, "torch": "t", "triton": "none",
             "commit": "c", "load": 0.0, "date": date}  # fmt: skip
    return {"suite": suite_name, "machine": where, "versions": {}, "rows": rows, "seconds": 1.0,
            "peers": ["eager", "verl"], "ceilings": QUIET.record(), **more}  # fmt: skip


def kept_row(op, shape, kind, **ratios):
    spread = {"median": 0.5, "q1": 0.4, "q3": 0.6}
    cells = {"ours": {"seconds": spread}}
    for name, ratio in ratios.items():
        cells[name] = {"seconds": spread, "ratio": dict.fromkeys(("median", "q1", "q3"), ratio)}
    return {"op": op, "shape": shape, "dtype": "float32", "pass": kind, "implementation": "C++",
            "bytes": 1, "flops": 0, "rate": {"share": 0.5}, "cells": cells}  # fmt: skip


def test_readme_tables_are_made_of_the_newest_runs(tmp_path, monkeypatch):
    shape = {"B": 256, "T": 1024}
    old = kept("ops", [kept_row("gae:right-padded", shape, "forward", verl=40.0, eager=30.0)])
    assert "| 40× |" in report.markdown([old])  # under its goal of 50: not bold
    new = kept(
        "ops", [kept_row("gae:right-padded", shape, "forward", verl=60.0)], date="2026-02-01"
    )
    for i, record in enumerate((new, old)):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{i}.json").write_text(json.dumps(record))
    text = report.markdown(report.load(tmp_path))
    assert "| **60×** |" in text and "40×" not in text
    gpu = kept_row("gae", {"B": 512, "T": 4096}, "forward", eager=7.0)
    both = report.markdown([new, kept("ops", [gpu], kind="cuda")])
    assert "| `gae` | B=512 T=4096 | forward | ≤ 42 µs | 500 ms | 50% |  | eager 7× |" in both
    assert "| `gae` | B=512 T=4096 | forward | ≤ 42 µs | not measured |" in text
    assert text.count("not measured") > both.count("not measured") > 10
    names = {path.name for path in report.draw([new], tmp_path)}
    assert names == {"ops.png", "ops-ceilings.png"}
    pair = OPS["linear+preference_loss:dpo"]
    row = kept_row(pair.name, pair.shapes[0], inputs.BOTH, eager=2.0, Liger=3.0)
    row["cells"]["Liger"]["memory"] = {"extra": 7 * 2**20}
    line = "1.00× | 2.00× | not measured | not measured | 3.00×, 7 MiB |"
    assert f"| dpo | B=2 T=128 H=576 V=49152 | {line}" in report.markdown([kept("linear", [row])])


@pytest.mark.long  # TRL is imported
@pytest.mark.parametrize("loss", cases.PREFERENCES)
def test_preference_losses_of_all_libraries_are_right(loss):
    """Those that are installed; a library's own sums of log-probs may round as eager PyTorch's."""
    shape, op = {"B": 3, "T": 9, "H": 16, "V": 50}, OPS[f"linear+preference_loss:{loss}"]
    peers = [PEERS[name] for name in ("eager", "TRL", "Liger")]
    rows = suite.compare(op, shape, peers, dataclasses.replace(settings(), timed=False))
    for cell in (cell for row in rows for cell in row["cells"].values()):
        assert not {"refused", "failed", "rounded"} & cell.keys(), cell
    assert len(rows) == 2 and {"ours", "eager"} <= rows[1]["cells"].keys()


def test_the_readme_is_what_the_kept_runs_say():
    assert report.main(["--check"]) == 0


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="bench:begin"):
        report.replaced("# no markers", "bench", "text")


def test_curves_take_their_points_from_every_row(tmp_path):
    def row(**shape):
        return kept_row("token_logprobs", shape, "forward", eager=2.0)

    rows = [row(N=8, V=10), row(N=16, V=10), row(N=8, V=20)]
    scales = [("token_logprobs", {"V": 10}, "N"), ("token_logprobs", {"N": 8}, "V")]
    record = kept("scale", rows, scales=scales)
    assert [(grows, len(found)) for _, grows, found in plot._series(record)] == [("N", 2), ("V", 2)]
    assert [p.name for p in plot.draw(record, tmp_path)] == ["scale.png"]


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


def test_who_compiles_too_long_for_a_quick_run_is_left_out(tmp_path):
    def hangs(op):
        return lambda **_: time.sleep(30)

    one = settings()
    one.ends = time.monotonic()
    peers = [Peer("slow", hangs, compiles=True)]
    (row,) = suite.compare(OPS["gae"], SHAPES["gae"], peers, one)
    assert row["cells"]["slow"] == {"skipped": "left out by --quick"}
    text = shown({"peers": ["slow"], "rows": [row]}, tmp_path)
    assert "slow: left out by --quick" in text and "failed" not in text.lower()


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


def test_a_round_longer_than_the_budget_is_counted():
    order = []
    calls = {name: (lambda i, n=name: order.append(n)) for name in "ab"}
    seconds = measure.interleaved(calls, CPU, budget=1e-12, least=3)
    assert "".join(order) == "ab" + "ab" + "ba"
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
def test_memory_that_is_used_again_counts():
    """A gradient of the head that lies where the call before had its own."""
    sample = OPS["linear_token_logprobs"].workload(
        {"N": 16, "H": 256, "V": 40_000}, torch.Generator(), "cpu", torch.float32
    )
    for name in sample.grads:
        sample.arguments[name].requires_grad_()
    growth = memory.resident_growth(
        lambda: inputs.call(OPS["linear_token_logprobs"].function, sample, inputs.BOTH)
    )
    assert growth["held"] > 256 * 40_000 * 4
    assert growth["peak"] > growth["held"]


@pytest.mark.long
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
        (["--suite", "al"], ["'al'", *cases.SUITES]),
        (["--suite", "step", "--peers", "eager"], ["'eager'", "TRL", "ours"]),
        (["--suite", "step", "--op", "gae"], ["step", "--op"]),
        (["--op", "gae", "--shape", "N=2,V=3"], ["N=2 V=3", "B=256,T=1024"]),
        (["--shape", "wide"], ["'wide'", "N=512,V=49152"]),
        (["--shape", "B=0,T=4"], ["B must be at least 1"]),
        (["--shape", "N=2,H=2,V=2,kept=101"], ["kept is the percentage"]),
    ],
)
def test_unknown_names_are_refused_with_the_list(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert all(text in told for text in named), told


@pytest.mark.long
def test_main_writes_json_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda *_: QUIET)
    monkeypatch.setattr(run.machine, "bound_memory", lambda: None)  # it would bound pytest
    arguments = ["--quick", "--op", "gae", "value_loss", "--peers", "eager", "--out"]
    assert run.main([*arguments, str(tmp_path), "--shape", "B=4,T=8", "B=2,T=9"]) == 0
    record = json.loads((tmp_path / "ops.json").read_text())
    machine = ("device", "torch", "triton", "threads", "load", "commit")
    assert record["machine"].keys() >= set(machine)
    assert record["ceilings"]["copy"] and record["ceilings"]["gemm"]
    assert [(r["op"], r["pass"]) for r in record["rows"]] == [
        *[("gae", "forward")] * 2,
        *[("value_loss", "forward"), ("value_loss", inputs.BOTH)] * 2,
    ]
    fields = {"op", "shape", "dtype", "pass", "implementation", "copies", "rounds", "bytes"}
    assert record["rows"][0].keys() >= fields | {"flops", "rate", "cells"}
    for name in ("ops.png", "ops-ceilings.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "B=4 T=8" in out and "×" in out and record["machine"]["device"] in out


def test_a_gpu_has_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [run._device(name) for name in (None, "cuda", "cuda:1", "cpu")]
    assert [str(device) for device in found] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="unknown device 'cuda:2'"):
        run._device("cuda:2")


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda *_: QUIET)
    monkeypatch.setattr(run.machine, "bound_memory", lambda: None)  # it would bound pytest
    measured = suite.compare

    def compare(op, *rest):
        if op.name == "value_loss":
            raise KeyboardInterrupt
        return measured(op, *rest)

    monkeypatch.setattr(suite, "compare", compare)
    arguments = ["--quick", "--op", "gae", "value_loss", "--peers", "eager", "--shape", "B=4,T=8"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert row["op"] == "gae" and "seconds" in row["cells"]["ours"]


def test_a_quick_run_leaves_out_what_it_has_no_time_for(tmp_path, monkeypatch, capsys):
    """3 minutes are promised on any machine: the clock is here at their end after the first row."""
    monkeypatch.setattr(measure, "ceilings", lambda *_: QUIET)
    monkeypatch.setattr(run.machine, "bound_memory", lambda: None)  # it would bound pytest
    measured, late = suite.compare, run.QUICK_SECONDS

    def compare(*arguments):
        monkeypatch.setattr(run, "QUICK_SECONDS", -1)
        return measured(*arguments)

    monkeypatch.setattr(suite, "compare", compare)
    arguments = ["--op", "gae", "value_loss", "--peers", "eager", "--shape", "B=4,T=8", "B=2,T=9"]
    for quick, rows, told in ((["--quick"], {"gae"}, True), ([], {"gae", "value_loss"}, False)):
        monkeypatch.setattr(run, "QUICK_SECONDS", late)
        assert run.main([*arguments, *quick, "--out", str(tmp_path)]) == 0
        record = json.loads((tmp_path / "ops.json").read_text())
        assert {row["op"] for row in record["rows"]} == rows
        out = capsys.readouterr().out
        assert ("gae, value_loss: left out by --quick" in out) is told


@pytest.mark.long
def test_runs_as_a_script():
    script = [sys.executable, str(ROOT / "bench" / "run.py"), "--op", "nothing"]
    done = subprocess.run(script, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and "unknown op 'nothing'" in done.stderr


def shown(part: dict, folder: Path) -> str:
    """What the table prints of a record, after the plot was drawn of it."""
    from rich.console import Console

    machine = {"device": "d", "threads": 1, "torch": "t", "triton": "none", "commit": "c"}
    machine["load"] = 0.1
    whole = {"ceilings": QUIET.record(), "seconds": 1.0, **part, "machine": machine}
    assert all(path.stat().st_size for path in plot.draw(whole, folder))
    console = Console(width=table.WIDTH, record=True)
    table.show(whole, console)
    return console.export_text()
