"""The tables of docs/performance.md and docs/engines.md, the README's figures and all plots, from
bench/results/.

    python bench/report.py           write them
    python bench/report.py --check   exit with 1 if a page is not what the runs say

A run is kept with ``python bench/run.py … --keep NAME``. Where several have the same row, the
newest counts. What nobody has measured says so.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: let `bench` be found, after what is installed
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import machine, plot
from bench.cases import GPU_HEADLINES, LONG, OPS, PREFERENCES, VOCABULARIES, Shape
from bench.inputs import BOTH, FORWARD
from bench.step import RIVALS
from bench.table import of_rounds, spelled, time

Record = dict[str, Any]
RESULTS = machine.ROOT / "bench" / "results"
README = machine.ROOT / "README.md"
PAGE = machine.ROOT / "docs" / "performance.md"
ENGINES = RESULTS / "engines.json"  # bench/engines.py
ENGINES_PAGE = machine.ROOT / "docs" / "engines.md"
PLOTS = machine.ROOT / "docs" / "bench"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """A speed to reach: the time of ``peer`` over ours at least ``times``, or ours over that of
    ``peer`` at most ``at_most``."""

    work: str
    op: str
    shape: Shape
    kind: str
    peer: str
    times: float | None = None
    at_most: float | None = None


_LOGITS: Shape = {"N": 512, "V": 49152}
_HEAD: Shape = {"N": 512, "H": 576, "V": 49152}
_BATCH: Shape = {"B": 64, "T": 1024}
_PAIR = "policy+value_loss"
CPU_GOALS = (
    Goal("log-probs + entropy of logits", "token_logprobs", _LOGITS, FORWARD, "TRL", 6),
    Goal("", "token_logprobs", _LOGITS, FORWARD, "torch.compile", 2),
    Goal("", "token_logprobs", _LOGITS, BOTH, "TRL", 4),
    Goal("head + PPO loss + entropy", "linear_policy_loss", _HEAD, BOTH, "bare-GEMMs",
         at_most=1.03),
    Goal("", "linear_policy_loss", LONG, BOTH, "bare-GEMMs", at_most=1.03),
    Goal("half of its rows masked", "linear_policy_loss:masked", _HEAD | {"kept": 50}, BOTH,
         "all-rows", at_most=0.53),
    Goal("half of its advantages zero", "linear_policy_loss:zero-advantage",
         _HEAD | {"kept": 50}, BOTH, "all-rows", at_most=0.53),
    Goal("tokens drawn among 50", "linear_policy_loss:support", _HEAD | {"K": 50}, BOTH,
         "all-rows", times=20),
    Goal("GAE", "gae:right-padded", {"B": 256, "T": 1024}, FORWARD, "verl", 50),
    Goal("", "gae:right-padded", {"B": 256, "T": 1024}, FORWARD, "OpenRLHF", 50),
    Goal("policy + value loss, all statistics", _PAIR, _BATCH, BOTH, "eager", 5),
    Goal("", _PAIR, _BATCH, BOTH, "torch.compile", 1.5),
)  # fmt: skip
# On one H100, in the order of GPU_HEADLINES.
_GEMMS = "its bare matrix products"
_COPY = "≥ 90 % of the copy bandwidth"
GPU_GOALS = {
    ("linear_policy_loss", BOTH, 4096): f"≤ 1.1× {_GEMMS}",
    ("linear_policy_loss:no-entropy", BOTH, 4096): f"≤ 1.1× {_GEMMS}",
    ("linear_policy_loss", BOTH, 896): f"≤ 1.35× {_GEMMS}",
    ("linear_policy_loss:masked", BOTH, 4096): "≤ 0.55× all rows",
    ("linear_token_logprobs", FORWARD, 4096): f"≤ 1.1× {_GEMMS}",
    ("linear_token_kl", FORWARD, 4096): f"≤ 1.15× {_GEMMS}",
    ("token_logprobs", FORWARD, None): _COPY,
    ("token_logprobs", BOTH, None): _COPY,
    ("gae", FORWARD, None): "≤ 42 µs",
    ("policy_loss", BOTH, None): "≥ 5× eager",
    ("value_loss", BOTH, None): "≥ 5× eager",
}
STEP_GOAL = 2.5  # samples a second over TRL's
# The log-prob op and its variants have rows of their own; these are what a trainer calls.
HEAD_OPS = ("linear_policy_loss", "linear_token_logprobs")
HEAD_PEERS = ("eager", "torch.compile", "TRL", "Liger")


class Runs:
    """The rows of all kept runs on CPUs, or of those on GPUs, each with its run; of a CPU's those
    of one dtype."""

    def __init__(self, records: list[Record], gpu: bool, dtype: str = "float32") -> None:
        self.records = [r for r in records if is_gpu(r) == gpu]
        self.rows: dict[str, tuple[Record, Record]] = {}
        for record in self.records:
            for row in record["rows"]:
                if not gpu and row["dtype"] not in ("", dtype):
                    continue
                self.rows[_key(row["op"], row["shape"], row["pass"])] = (row, record)

    def row(self, op: str, shape: Shape, kind: str) -> Record | None:
        return self.rows.get(_key(op, shape, kind), (None, None))[0]

    def machines(self) -> list[str]:
        used = {id(record): record for _, record in self.rows.values()}
        used |= {id(r): r for r in self.records if "trainers" in r}
        return list(dict.fromkeys(_machine_line(record) for record in used.values()))


def load(folder: Path = RESULTS) -> list[Record]:
    """All kept runs, oldest first."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    return sorted(records, key=lambda record: record["machine"]["date"])


def is_gpu(record: Record) -> bool:
    return record["machine"]["kind"] == "cuda"


def markdown(records: list[Record]) -> str:
    timed = [record for record in records if record["suite"] != "accuracy"]
    cpu, gpu = Runs(timed, gpu=False), Runs(timed, gpu=True)
    cpu_16 = Runs([r for r in timed if "trainers" not in r], gpu=False, dtype="bfloat16")
    parts = [
        "<!-- written by bench/report.py -->",
        "On the CPU, float32: " + ("; ".join(cpu.machines()) or NOT_MEASURED) + ".",
        "\n".join(_goals(cpu)),
        "The linear ops, forward + backward: time over that of the three bare matrix products of "
        "the same run, and MiB of memory beyond inputs, outputs and gradients.",
        "\n".join(_heads(cpu)),
        "Of bfloat16 operands: " + ("; ".join(cpu_16.machines()) or NOT_MEASURED) + ".",
        "\n".join(_heads(cpu_16)),
        "Preference losses from the hidden states, forward + backward: time over ours, and MiB of "
        "memory beyond inputs, outputs and gradients. Liger's run without torch.compile, TRL's as "
        "in its trainers.",
        "\n".join(_preferences(cpu)),
        "Every op: the time of its peers over ours.",
        "\n".join(_ops(cpu)),
        "A whole PPO step, every weight trained:",
        "\n".join(_steps(cpu)),
        "On a GPU, bfloat16: "
        + ("; ".join(gpu.machines()) or NOT_MEASURED)
        + ". †: rounds what it returns to bfloat16.",
        "\n".join(_gpu(gpu)),
        *_pictures(records),
    ]
    return "\n\n".join(parts)


def figures(records: list[Record]) -> str:
    """The README's figures: five lines and a picture."""
    timed = [record for record in records if record["suite"] != "accuracy"]
    runs = Runs(timed, gpu=False)
    head, run = runs.rows.get(_key("linear_policy_loss", LONG, BOTH), (None, None))
    where = f"{_device(run)}, {run['machine']['threads']} threads" if run else NOT_MEASURED
    lines = [
        "<!-- written by bench/report.py -->",
        "",
        f"| forward + backward, float32, {where} | rlhf_fast | beside |",
        "|---|---|---|",
    ]
    cells = head["cells"] if head else {}
    bare = cells.get("bare-GEMMs", {}).get("ratio", {}).get("median")
    others = ", ".join(f"{name} {_head(cells[name], bare)}" for name in HEAD_PEERS if name in cells)
    what = f"head + PPO loss + entropy, {spelled(LONG)}"
    lines.append(
        f"| {what}: time over its bare products | {_head(cells.get('ours'), bare)} | {others} |"
    )
    for work, op, shape, kind, peers in (
        ("log-probs + entropy from logits", "token_logprobs", _LOGITS, BOTH,
         ("eager", "torch.compile", "TRL")),
        ("policy + value loss, all statistics", _PAIR, _BATCH, BOTH,
         ("eager", "torch.compile")),
        ("GAE", "gae:right-padded", {"B": 256, "T": 1024}, FORWARD, ("verl", "OpenRLHF")),
    ):  # fmt: skip
        row = runs.row(op, shape, kind)
        of = ", ".join(f"{p} {_times(row['cells'].get(p))}" for p in peers) if row else NOT_MEASURED
        lines.append(f"| {work}, {spelled(shape)} | 1× | {of} |")
    step = _step(runs)
    ratios = step["trainers"].get("ours", {}).get("ratios", {}).get("TRL") if step else None
    faster = of_rounds(ratios) if ratios else NOT_MEASURED
    lines.append(
        f"| a PPO step of SmolLM2-135M: samples a second | {faster} | TRL 1.12's PPOTrainer 1× |"
    )
    lines += [
        "",
        "![time and memory of the head with its loss, beside the peers](docs/bench/headline.png)",
    ]
    return "\n".join(lines)


def _goals(runs: Runs) -> Iterator[str]:
    yield "| work | shape | pass | goal | measured |"
    yield "|---|---|---|---|---|"
    for goal in CPU_GOALS:
        row = runs.row(goal.op, goal.shape, goal.kind)
        if goal.times is not None:
            beside = _YARDSTICKS.get(goal.peer, goal.peer)
            want = f"≥ {goal.times:g}× as fast as {beside}"
        else:
            want = f"≤ {goal.at_most:g}× the time of {_YARDSTICKS[goal.peer]}"
        what = f"| {goal.work} | {spelled(goal.shape)} | {goal.kind} "
        yield f"{what}| {want} | {_reached(goal, row)} |"
    step = _step(runs)
    trainers = step["trainers"] if step else {}
    ratios = trainers.get("ours", {}).get("ratios", {}).get("TRL")
    measured = NOT_MEASURED
    if ratios:
        measured = _bold(of_rounds(ratios), statistics.median(ratios) >= STEP_GOAL)
    model = step["setting"]["model"] if step else "SmolLM2-135M"
    yield f"| a PPO step | {model} | | ≥ {STEP_GOAL:g}× TRL's samples a second | {measured} |"


_YARDSTICKS = {"bare-GEMMs": "its three bare matrix products", "all-rows": "all rows"}


def _reached(goal: Goal, row: Record | None) -> str:
    cell = row["cells"].get(goal.peer, {}) if row else {}
    if "ratio" not in cell:
        return cell.get("refused") or cell.get("failed") or cell.get("skipped", NOT_MEASURED)
    ratio = cell["ratio"]["median"]
    if goal.times is not None:
        return _bold(f"{ratio:.3g}×", ratio >= goal.times)
    return _bold(f"{1 / ratio:.3g}×", 1 / ratio <= goal.at_most)


def _bold(text: str, reached: bool) -> str:
    return f"**{text}**" if reached else text


def _heads(runs: Runs) -> Iterator[str]:
    yield "| op | shape | ours | " + " | ".join(HEAD_PEERS) + " |"
    yield "|---" * (3 + len(HEAD_PEERS)) + "|"
    shapes = {"linear_policy_loss": (*VOCABULARIES, LONG), "linear_token_logprobs": VOCABULARIES}
    for op in HEAD_OPS:
        for shape in shapes[op]:
            row = runs.row(op, shape, BOTH)
            cells = row["cells"] if row else {}
            bare = cells.get("bare-GEMMs", {}).get("ratio", {}).get("median")
            texts = [_head(cells.get(name), bare) for name in ("ours", *HEAD_PEERS)]
            yield f"| `{op}` | {spelled(shape)} | " + " | ".join(texts) + " |"


def _head(cell: Record | None, bare: float | None) -> str:
    if cell is None or bare is None:
        return NOT_MEASURED
    if "seconds" not in cell:
        if "refused" in cell:
            return "refused"
        return cell.get("failed") or cell.get("skipped", NOT_MEASURED)
    times = cell.get("ratio", {"median": 1.0})["median"] / bare
    memory = f", {cell['memory']['extra'] / 2**20:.0f} MiB" if "memory" in cell else ""
    return f"{times:.2f}×{memory}"


def _preferences(runs: Runs) -> Iterator[str]:
    yield "| loss | shape | ours | " + " | ".join(HEAD_PEERS) + " |"
    yield "|---" * (3 + len(HEAD_PEERS)) + "|"
    for loss in PREFERENCES:
        op = OPS[f"linear+preference_loss:{loss}"]
        for shape in op.shapes:
            row = runs.row(op.name, shape, BOTH)
            cells = row["cells"] if row else {}
            texts = [_head(cells.get(name), 1.0) for name in ("ours", *HEAD_PEERS)]
            yield f"| {loss} | {spelled(shape)} | " + " | ".join(texts) + " |"


def _ops(runs: Runs) -> Iterator[str]:
    yield "| op | shape | pass | ours, of the ceiling | eager | torch.compile | fastest library |"
    yield "|---|---|---|---|---|---|---|"
    for name, op in OPS.items():
        before = ""
        for row, _ in runs.rows.values():
            if row["op"] != name or row["shape"] not in op.shapes or "rate" not in row:
                continue
            cells = row["cells"]
            library = _fastest_library(cells)
            label, before = ("", before) if before == name else (f"`{name}`", name)
            yield (
                f"| {label} | {spelled(row['shape'])} | {row['pass']} "
                f"| {row['rate']['share']:.0%} | {_times(cells.get('eager'))} "
                f"| {_times(cells.get('torch.compile'))} | {library} |"
            )


def _fastest_library(cells: Record) -> str:
    own = ("ours", "eager", "torch.compile")
    timed = {
        name: cell["ratio"]["median"]
        for name, cell in cells.items()
        if name not in own and "ratio" in cell and not cell.get("yardstick")
    }
    if not timed:
        return ""
    name = min(timed, key=timed.__getitem__)
    return f"{name} {_times(cells[name])}"


def _times(cell: Record | None) -> str:
    if not cell:
        return ""
    if "ratio" in cell:
        return f"{cell['ratio']['median']:.3g}×" + ("†" if "rounded" in cell else "")
    return next(what for what in ("refused", "failed", "skipped") if what in cell)


def _step(runs: Runs) -> Record | None:
    return next((r for r in reversed(runs.records) if "trainers" in r), None)


def _steps(runs: Runs) -> Iterator[str]:
    step = _step(runs)
    if step is None:
        yield NOT_MEASURED
        return
    s = step["setting"]
    yield (
        f"{s['model']}, {s['batch_size']} prompts, {s['new_tokens']} new tokens, {s['epochs']} "
        f"epochs of {s['minibatches']} minibatches. Turns of each trainer: {s['rounds']}, of "
        f"{s['steps']} steps, the first uncounted. The ratios are of samples a second: the median "
        "of the rounds, the least and the most."
    )
    yield ""
    rivals = " | ".join(f"over {rival}" for rival in RIVALS.values())
    yield f"| trainer | | a step | samples a second | {rivals} | peak memory of the process |"
    yield "|---" * (5 + len(RIVALS)) + "|"
    for name, cell in step["trainers"].items():
        label = "`rlhf-fast ppo`"
        if name.startswith("TRL"):
            label = f"TRL {step['versions']['trl']} PPOTrainer"
        if "failed" in cell:
            yield f"| {label} | {cell['critic']} | {cell['failed']} |" + " |" * (2 + len(RIVALS))
            continue
        ratios = " | ".join(of_rounds(cell["ratios"].get(rival)) for rival in RIVALS)
        yield (
            f"| {label} | {cell['critic']} | {time(cell['seconds'])} "
            f"| {cell['samples_per_second']:.3g} | {ratios} "
            f"| {cell['peak_memory'] / 2**20:.0f} MiB |"
        )


def _gpu(runs: Runs) -> Iterator[str]:
    yield (
        "| op | shape | pass | goal on an H100 | time | of the ceiling | extra memory "
        "| its peers' time over ours |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, shape in GPU_HEADLINES:
        kinds = (FORWARD, BOTH)
        if name.startswith("gae"):
            kinds = (FORWARD,)
        elif name.startswith("linear_policy") or name in ("policy_loss", "value_loss", _PAIR):
            kinds = (BOTH,)
        for kind in kinds:
            row = runs.row(name, shape, kind)
            ours = row["cells"]["ours"] if row and "ours" in row["cells"] else {}
            goal = GPU_GOALS.get((name, kind, shape.get("H")), "")
            start = f"| `{name}` | {spelled(shape)} | {kind} | {goal} "
            if "seconds" not in ours or "rate" not in row:
                yield f"{start}| {NOT_MEASURED} | | | |"
                continue
            others = ", ".join(
                f"{peer} {_times(cell)}" for peer, cell in row["cells"].items() if "ratio" in cell
            )
            memory = f"{ours['memory']['extra'] / 2**20:.0f} MiB" if "memory" in ours else ""
            yield (
                f"{start}| {time(ours['seconds']['median'])} | {row['rate']['share']:.0%} "
                f"| {memory} | {others} |"
            )


def _device(record: Record) -> str:
    """Whose times can stand in one picture; runs of 0.1 do not say their instructions."""
    m = record["machine"]
    return " ".join(x for x in (m["device"], m.get("instructions")) if x)


def _machine_line(record: Record) -> str:
    m = record["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    return (
        f"{_device(record)}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}, "
        f"{m['date']}" + (f" ({versions})" if versions else "")
    )


def _pictures(records: list[Record]) -> Iterator[str]:
    texts = {
        "ops": "time of the peers over ours, and extra memory",
        "ops-ceilings": "each op's time over what the device's ceilings allow",
        "linear": "the linear ops at three vocabularies: time and extra memory",
        "linear-ceilings": "the linear ops' time over what the device's ceilings allow",
        "scale": "time and memory against N, V, H, T and the share of rows that matter",
        "step": "a PPO step: samples a second and peak memory",
        "accuracy": "errors against float64 by op and dtype, the backward from random gradients",
    }
    for name, text in texts.items():
        if any(record["suite"] == name.split("-")[0] for record in records):
            yield f"![{text}](bench/{name}.png)"


def draw(records: list[Record], folder: Path = PLOTS) -> list[Path]:
    """A plot of each suite, of its runs on the device that has most rows; those of GPUs in gpu/."""
    paths = []
    for gpu in (False, True):
        by_suite: dict[str, list[Record]] = {}
        for record in records:
            if is_gpu(record) == gpu:
                by_suite.setdefault(record["suite"], []).append(record)
        for runs in by_suite.values():
            of_device: dict[str, list[Record]] = {}
            for record in runs:
                of_device.setdefault(_device(record), []).append(record)
            same = max(of_device.values(), key=lambda records: sum(len(r["rows"]) for r in records))
            target = folder / "gpu" if gpu else folder
            target.mkdir(parents=True, exist_ok=True)
            rows = [row for row, _ in Runs(same, gpu).rows.values()]
            paths += plot.draw({**same[-1], "rows": rows}, target)
    found = Runs(records, gpu=False).rows.get(_key("linear_policy_loss", LONG, BOTH))
    if found:
        paths.append(plot.headline(*found, ("ours", *HEAD_PEERS), folder / "headline.png"))
    return paths


def engines(record: Record) -> str:
    """Tokens a second of the rollout engines, with the machine's line."""
    lines = [
        "<!-- written by bench/report.py -->",
        "",
        f"{record['model']}, prompts of {record['prompt']} tokens, answers of {record['tokens']}, "
        f"float32: {_machine_line(record)}.",
        "",
        "| tokens a second | 1 row | 16 rows | 64 rows | started in |",
        "|---|---|---|---|---|",
        *(engine_line(name, found) for name, found in record["engines"].items()),
    ]
    return "\n".join(lines)


def engine_line(name: str, found: Record) -> str:
    if "failed" in found:
        return f"| {name} | {found['failed']} | | | |"
    speeds = [f"{row['tokens_per_second']:.0f}" for row in found["rows"].values()]
    return f"| {name} | {' | '.join(speeds)} | {found['start']:.1f} s |"


def _key(op: str, shape: Shape, kind: str) -> str:
    return f"{op} {spelled(dict(sorted(shape.items())))} {kind}"


def replaced(page: str, marker: str, text: str) -> str:
    """The page with ``text`` between the marker's two ends."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page must have {begin} and {end} once, in this order")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    records = load()
    of_engines = engines(json.loads(ENGINES.read_text())) if ENGINES.exists() else NOT_MEASURED
    pages = {
        PAGE: ("bench", markdown(records)),
        README: ("figures", figures(records)),
        ENGINES_PAGE: ("engines", of_engines),
    }
    stale = []
    for path, (marker, text) in pages.items():
        before = path.read_text()
        after = replaced(before, marker, text)
        if before != after:
            stale.append(path.name)
        if not check:
            path.write_text(after)
    if check:
        if stale:
            print(f"{', '.join(stale)}: not what bench/results says: run python bench/report.py")
        return int(bool(stale))
    print(*pages, *draw(records), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
