"""Every op of the registry beside its peers on this device: a table, JSON and a plot.

    python bench/run.py            everything
    python bench/run.py --quick    each op's first shape, within 3 minutes on 2 cores

Contestants run in one process, interleaved in rotated order, warm, on inputs that outgrow the
cache; times are medians with quartiles, and what counts are the ratios of one run. Whoever differs
from the op's reference in float64 is REFUSED: it gets an error, not a time.
"""

from __future__ import annotations

import argparse
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

from bench import machine, measure, plot, report, suite
from bench.peers import PEERS, Peer
from rlhf_fast import ops  # noqa: F401  (fills the registry)
from rlhf_fast.ops.registry import OPS, Op

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}  # fmt: skip
QUICK_SECONDS = 150  # by then --quick is to be through with compiling
OUT = machine.ROOT / "bench" / "out"

Plan = list[tuple[Op, dict[str, int]]]


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        device = _device(options.device)
        dtype = _dtype(options.dtype, device)
        plan = _plan(options.op, options.shape, options.quick)
        peers = _peers(options.peers)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    record = run(plan, peers, device, dtype, options.quick)
    report.table(record, Console(width=None if sys.stdout.isatty() else report.WIDTH))
    (options.out / "bench.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    plot.draw(record, options.out / "bench.png")
    print(f"\n{options.out / 'bench.json'}\n{options.out / 'bench.png'}")
    return 0


def run(
    plan: Plan, peers: list[Peer], device: torch.device, dtype: torch.dtype, quick: bool
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
    rows: list[dict[str, Any]] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("ceilings", total=len(plan))
        before = measure.ceilings(device, dtype, cache)
        settings = suite.Settings(
            device,
            dtype,
            cache,
            seconds=1.0 if quick else 10.0,
            rounds=3 if quick else 5,
            patience=20.0 if quick else 120.0,
            ends=started + QUICK_SECONDS if quick else float("inf"),
            thorough=not quick,
        )
        for op, shape in plan:
            name = f"{op.name} {report.spelled(shape)}"
            progress.update(task, description=name)
            rows += suite.compare(
                op, shape, peers, settings,
                lambda doing, name=name: progress.update(task, description=f"{name}: {doing}"),
            )  # fmt: skip
            progress.advance(task)
        progress.update(task, description="ceilings")
        # once more: on a machine with others on it, a spell of theirs is no ceiling
        ceilings = before.or_better(measure.ceilings(device, dtype, cache))
    suite.rate(rows, ceilings)
    return {
        "machine": where,
        "ceilings": ceilings.record(),
        "peers": [peer.name for peer in peers],
        "quick": quick,
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="each op's first shape, short")
    parser.add_argument("--op", nargs="+", metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--shape", nargs="+", metavar="SHAPE",
        help="like N=512,V=49152: any sizes for the letters of an op's shape",
    )  # fmt: skip
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--device", help="cpu or cuda; a GPU where there is one")
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)}; float32 on CPU, else bfloat16")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of bench.json and bench.png")
    return parser


def _device(name: str | None) -> torch.device:
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name is None:
        return torch.device("cuda" if "cuda" in there else "cpu")
    return torch.device(_known("device", name, there))


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    default = "float32" if device.type == "cpu" else "bfloat16"
    return DTYPES[_known("dtype", name or default, DTYPES)]


def _peers(names: list[str] | None) -> list[Peer]:
    return [PEERS[_known("peer", name, PEERS)] for name in (PEERS if names is None else names)]


def _plan(names: list[str] | None, shapes: list[str] | None, quick: bool) -> Plan:
    """What to run. Shapes that are asked for go to the ops that have exactly their letters."""
    ops_ = [OPS[_known("op", name, OPS)] for name in names or OPS]
    if shapes is None:
        return [(op, shape) for op in ops_ for shape in op.shapes[: 1 if quick else None]]
    asked = [_shape(text) for text in shapes]
    plan = [(op, s) for op in ops_ for s in asked if s.keys() == op.shapes[0].keys()]
    for shape in asked:
        if not any(s is shape for _, s in plan):
            there = "; ".join(f"{op.name}: {_list(op.shapes)}" for op in ops_)
            raise ValueError(f"no op here has the shape {report.spelled(shape)}; there are {there}")
    return plan


def _shape(text: str) -> dict[str, int]:
    try:
        shape = {key: int(size) for key, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"shape {text!r} is not of the form N=512,V=49152") from None
    for key, size in shape.items():
        if size < 1:
            raise ValueError(f"shape {text!r}: {key} must be at least 1")
    return shape


def _list(shapes: tuple[dict[str, int], ...]) -> str:
    return " ".join(",".join(f"{k}={v}" for k, v in shape.items()) for shape in shapes)


def _known(what: str, name: str, there: Any) -> str:
    if name not in there:
        raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(there)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
