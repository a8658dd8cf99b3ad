"""Every op of the registry beside its peers on this device: a table, JSON and plots.

    python bench/run.py                   every op, some minutes on 2 cores
    python bench/run.py --quick           each op at a small shape: what fits into 3 minutes
    python bench/run.py --suite linear    ops that begin at the hidden states: three vocabularies
    python bench/run.py --suite scale     time and memory against N, V, H, T, rows that matter
    python bench/run.py --suite accuracy  errors against float64, by dtype
    python bench/run.py --suite step      a whole PPO step beside TRL's PPOTrainer

Contestants run in one process, interleaved in rotated order, warm, on inputs that outgrow the
cache; times are medians with quartiles, and what counts are the ratios of one run. Whoever differs
from the op's reference in float64 is REFUSED: it gets an error, not a time. On a GPU the rows of
docs/performance.md's GPU table come first; an interrupted run keeps what it has measured. ``--keep
NAME`` puts the record where ``bench/report.py`` makes its tables from it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: let `bench` be found, after what is installed
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import cases, machine, measure, plot, step, suite, table
from bench.cases import OPS, Plan
from bench.peers import PEERS, Peer, versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}  # fmt: skip
# --quick ends within 3 minutes. What is begun by then is finished: a slow row, ceilings, plots.
QUICK_SECONDS = 110
QUICK_COMPILING = 30  # by then it is to be through with compiling
OUT = machine.ROOT / "bench" / "out"
# Elsewhere all of them. Who compiles would do so at every point of a curve and in every dtype.
# On a CPU Liger's linear loop is verl's, and the GPU's peers say in the suite "ops" that they are.
PEERS_OF = {
    "linear": [
        "eager",
        "torch.compile",
        "F.linear_cross_entropy",
        "TRL",
        "Liger",
        "Liger-GRPO",
        "cut-cross-entropy",
        "bare-GEMMs",
        "all-rows",
    ],
    "scale": ["eager", "TRL", "Liger", "verl", "bare-GEMMs", "all-rows"],
    "accuracy": [p.name for p in PEERS.values() if not p.yardstick and not p.compiles],
}


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        name = _known("suite", options.suite, cases.SUITES)
        device = _device(options.device)
        dtypes = _dtypes(options.dtype, device, name)
        if name == "step":
            if options.op or options.shape or options.dtype:
                raise ValueError("the suite step has no --op, --shape or --dtype")
            plan = []
            peers = [_known("peer", peer, step.TRAINERS) for peer in options.peers or step.TRAINERS]
        else:
            plan = _plan(name, options.op, options.shape, device, options.quick)
            peers = _peers(options.peers, name, device)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    if name == "step":
        record = step.run(peers, device, options.quick)
    else:
        record = run(name, plan, peers, device, dtypes, options.quick)
    _write(record, options.out / f"{name}.json")
    table.show(record, Console(width=None if sys.stdout.isatty() else table.WIDTH))
    written = [options.out / f"{name}.json", *plot.draw(record, options.out)]
    if options.keep:
        folder = machine.folder(record["machine"], device)
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{options.keep}.json")
        _write(record, written[-1])
    print("", *written, sep="\n")
    return 0


def run(
    name: str,
    plan: Plan,
    peers: list[Peer],
    device: torch.device,
    dtypes: list[torch.dtype],
    quick: bool,
) -> dict[str, Any]:
    """The whole record: the machine, its ceilings, and the rows."""
    started = time.monotonic()
    where = machine.describe(device)  # first: the load is that of the others
    if device.type == "cpu":
        machine.bound_memory()
    else:
        torch.cuda.set_device(device)
    cache = machine.last_cache(device)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    patience = 20.0 if device.type == "cpu" else 90.0  # a GPU's kernels are tuned then
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("ceilings", total=len(plan) * len(dtypes))
        before = measure.ceilings(device, dtypes[0], cache)
        with contextlib.suppress(KeyboardInterrupt):
            for dtype in dtypes:
                settings = suite.Settings(
                    device,
                    dtype,
                    cache if name != "accuracy" else 0,
                    seconds=0.6 if quick else 2.0,
                    rounds=3,
                    patience=patience,
                    ends=started + QUICK_COMPILING if quick else float("inf"),
                    thorough=name == "linear" and not quick,
                    last_pass=name in ("linear", "scale", "accuracy"),
                    timed=name != "accuracy",
                )
                for op, shape in plan:
                    text = f"{op.name} {table.spelled(shape)}"
                    if quick and time.monotonic() - started > QUICK_SECONDS:
                        left_out.append(op.name)
                        continue
                    progress.update(task, description=text)

                    def report(doing: str, text: str = text) -> None:
                        progress.update(task, description=f"{text}: {doing}")

                    found = suite.compare(op, shape, peers, settings, report)
                    wanted = str(dtype).removeprefix("torch.")
                    # an op that is float32 whatever is asked need not be told of again
                    rows += [r for r in found if len(dtypes) == 1 or r["dtype"] in ("", wanted)]
                    progress.advance(task)
        progress.update(task, description="ceilings")
        # once more: on a machine with others on it, a spell of theirs is no ceiling
        ceilings = before.or_better(measure.ceilings(device, dtypes[0], cache))
    suite.rate(rows, ceilings)
    return {
        "suite": name,
        "machine": where,
        "versions": versions(peers),
        "ceilings": ceilings.record(),
        "peers": [peer.name for peer in peers],
        "quick": quick,
        "left_out": list(dict.fromkeys(left_out)),
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
        "scales": [scale[:3] for scale in cases.SCALES[device.type != "cpu"]],
    }


def _write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="ops", help=f"of {', '.join(cases.SUITES)}; ops")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--op", nargs="+", metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--shape", nargs="+", metavar="SHAPE",
        help="like N=512,V=49152: any sizes for the letters of an op's shape",
    )  # fmt: skip
    parser.add_argument(
        "--peers", nargs="*", metavar="PEER",
        help=f"of {', '.join(PEERS)}; for the suite step of {', '.join(step.TRAINERS)}",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda; a GPU where there is one")
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)}; float32 on CPU, else bfloat16")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON and the plots")
    parser.add_argument("--keep", metavar="NAME", help="also bench/results/<device>/NAME.json")
    return parser


def _device(name: str | None) -> torch.device:
    """With its number, which torch.cuda.set_device wants."""
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = name or ("cuda" if cards else "cpu")
    _known("device", name, ["cpu", *(["cuda"] if cards else []), *cards])
    return torch.device(cards[0] if name == "cuda" else name)


def _dtypes(name: str | None, device: torch.device, suite: str) -> list[torch.dtype]:
    if name is None and suite == "accuracy":
        return [torch.float32, torch.bfloat16, torch.float16]
    default = "float32" if device.type == "cpu" else "bfloat16"
    return [DTYPES[_known("dtype", name or default, DTYPES)]]


def _peers(names: list[str] | None, suite: str, device: torch.device) -> list[Peer]:
    everybody = PEERS if device.type != "cpu" and suite == "linear" else PEERS_OF.get(suite, PEERS)
    chosen = everybody if names is None else names
    return [PEERS[_known("peer", name, PEERS)] for name in chosen]


def _plan(
    suite: str,
    names: list[str] | None,
    shapes: list[str] | None,
    device: torch.device,
    quick: bool,
) -> Plan:
    """What to run. Shapes that are asked for go to the ops that have exactly their letters; an op
    that is asked for and not of the suite, at its own shapes."""
    ops = [OPS[_known("op", name, OPS)] for name in names or OPS]
    if shapes is None:
        plan = cases.plan(suite, device, quick)
        if names is None:
            return plan
        chosen = [(op, shape) for op, shape in plan if op.name in names]
        there = {op.name for op, _ in chosen}
        return chosen + [(op, s) for op in ops if op.name not in there for s in op.shapes]
    asked = [_shape(text) for text in shapes]
    plan = [(op, s) for op in ops for s in asked if s.keys() == op.shapes[0].keys()]
    for shape in asked:
        if not any(s is shape for _, s in plan):
            there = "; ".join(f"{op.name}: {_list(op.shapes)}" for op in ops)
            raise ValueError(f"no op here has the shape {table.spelled(shape)}; there are {there}")
    return plan


def _shape(text: str) -> dict[str, int]:
    try:
        shape = {key: int(size) for key, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"shape {text!r} is not of the form N=512,V=49152") from None
    for key, size in shape.items():
        if size < 1:
            raise ValueError(f"shape {text!r}: {key} must be at least 1")
    if shape.get("kept", 0) > 100:
        raise ValueError(f"shape {text!r}: kept is the percentage of rows that matter")
    return shape


def _list(shapes: tuple[dict[str, int], ...]) -> str:
    return " ".join(",".join(f"{k}={v}" for k, v in shape.items()) for shape in shapes)


def _known(what: str, name: str, there: Any) -> str:
    if name not in there:
        raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(there)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
