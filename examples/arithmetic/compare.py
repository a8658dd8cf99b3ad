"""PPO, GRPO, DAPO and REINFORCE++ side by side on a task whose answers are right or wrong.

    python examples/arithmetic/compare.py

A small model learns additions by supervision until it is right three times in ten (task.py), then
by each of four recipes from the same number of sampled answers, with three seeds each. How often
it is right is counted on questions that no training has seen. What is not in COMMON or OWN below is
the recipe's; further flags (--learning_rate 1e-4, …) are those of `rlhf-fast ppo` and win over all.

Numbers go to docs/arithmetic.json, the figure to docs/arithmetic.png, the table into
docs/arithmetic.md. A finished run is left alone and an interrupted one goes on: start the same
command again.
"""

from __future__ import annotations

import argparse
import json
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from task import prepare
from transformers import TrainerCallback

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.flags import parse
from rlhf_fast.trainer.run.metrics import has_step, read_metrics, read_rows
from rlhf_fast.trainer.trainers import PPOTrainer

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
BEGIN = "<!-- arithmetic: written by examples/arithmetic/compare.py -->"
END = "<!-- end of arithmetic -->"
NAMES = {"ppo": "PPO", "grpo": "GRPO", "dapo": "DAPO", "reinforce_plus_plus": "REINFORCE++"}
COLORS = {"ppo": "#0277bd", "grpo": "#d32f2f", "dapo": "#7b1fa2", "reinforce_plus_plus": "#2e7d32"}

# The same for all, whatever a recipe says: what a small model on two cores needs.
COMMON = ("--batch_size=128", "--minibatches=2", "--max_new_tokens=6",
          "--missing_eos_penalty=0.0", "--eval_every=10", "--eval_prompts=512",
          "--learning_rate=3e-5", "--value_learning_rate=3e-5",
          "--log_every=20", "--device=cpu")  # fmt: skip
# A cache of a fifth of the longest answer, and groups of GRPO's size.
OWN = {"dapo": ("--overlong_cache=1", "--samples_per_prompt=8")}


class Budget(TrainerCallback):
    """Ends a run at its number of sampled answers, those left out by dynamic sampling included."""

    def __init__(self, answers: int, batch_size: int) -> None:
        self.answers, self.batch_size = answers, batch_size

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if sampled(state.log_history, self.batch_size)[-1] >= self.answers:
            control.should_training_stop = True


def sampled(rows: list[dict], batch_size: int) -> list[int]:
    """Answers sampled up to each step, from the rows of metrics.jsonl."""
    total, found = 0, [0]
    for row in rows:
        if "episode" in row:
            total += batch_size * (1 + int(row.get("rollout/rounds") or 0))
            found.append(total)
    return found


def train(
    start: Path, recipe: str, seed: int, answers: int, folder: Path, further: list[str]
) -> dict[str, Any]:
    flags = [
        "--recipe", recipe, f"--model={start / 'model'}", f"--data={start / 'train.jsonl'}",
        f"--eval_data={start / 'held_out.jsonl'}", "--reward", f"{HERE / 'task.py'}:right",
        f"--output_dir={folder}", "--resume", f"--seed={seed}", *COMMON,
        *OWN.get(recipe, ()), *further,
    ]  # fmt: skip
    config = parse(PPOConfig, flags, prog="rlhf-fast ppo")
    config.steps = -(-answers // config.batch_size)
    PPOTrainer(config=config, callbacks=[Budget(answers, config.batch_size)]).train()
    return {"seed": seed, **read_run(folder, config.batch_size)}


def read_run(folder: Path, batch_size: int) -> dict[str, Any]:
    """The share of right answers to the held-out questions over the answers that were sampled."""
    rows = read_metrics(folder / "metrics.jsonl")
    counts = sampled(rows, batch_size)
    updates = [0, *accumulate(int(row["policy/updates"]) for row in rows)]
    before, after = (
        json.loads((folder / f"{moment}.json").read_text())["score"]
        for moment in ("before", "after")
    )
    found = {0: fmean(before)}  # by step
    for row in read_rows(folder / "metrics" / "eval.jsonl", has_step):
        found[row["step"]] = row["eval_score"]
    found[len(rows)] = fmean(after)
    return {
        "questions": len(after),
        "answers": [counts[step] for step in found],
        "updates": [updates[step] for step in found],
        "right": [round(x, 4) for x in found.values()],
    }


def compare(args: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    start = prepare(args.runs / "start")
    runs: dict[str, list] = {recipe: [] for recipe in NAMES}
    for seed in args.seeds:
        for recipe in NAMES:
            folder = args.runs / f"{recipe}-{seed}"
            runs[recipe].append(train(start, recipe, seed, args.answers, folder, further))
    return {"answers": args.answers, "flags": further, "runs": runs}


def at(xs: list[float], ys: list[float], x: float) -> float:
    """The share of right answers at an x, between two evaluations a line."""
    for a, b, p, q in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= b:
            return p + (q - p) * (x - a) / (b - a)
    return ys[-1]


def table(result: dict[str, Any]) -> str:
    total = result["answers"]
    columns = " | ".join(f"{total * part // 4:,} answers" for part in (1, 2, 4))
    lines = [f"| right on held-out questions, % | before | {columns} | rise | updates |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for recipe, runs in result["runs"].items():
        cells = [
            spread([100 * at(run["answers"], run["right"], total * part / 4) for run in runs])
            for part in (0, 1, 2, 4)
        ]
        cells.append(spread([100 * (run["right"][-1] - run["right"][0]) for run in runs]))
        updates = round(fmean(run["updates"][-1] for run in runs))
        lines.append(f"| {NAMES[recipe]} | {' | '.join(cells)} | {updates} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    text = f"{fmean(values):.1f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.1f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Over the answers sampled, and over the updates made of them: means of the seeds, with the
    least and the most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, unit in zip(figure.subplots(1, 2), ("answers", "updates"), strict=True):
        for recipe, runs in result["runs"].items():
            end = min(run[unit][-1] for run in runs)
            xs = [end * i / 60 for i in range(61)]
            columns = [[100 * at(run[unit], run["right"], x) for run in runs] for x in xs]
            axes.plot(xs, [fmean(c) for c in columns], color=COLORS[recipe], label=NAMES[recipe])
            least, most = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(xs, least, most, color=COLORS[recipe], alpha=0.15, lw=0)
        axes.set(xlabel=f"{unit} {'sampled' if unit == 'answers' else 'of the weights'}",
                 ylabel="right on held-out questions, %")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle(f"additions, {len(runs)} seeds: mean, least and most", fontsize=11)
    figure.savefig(path, dpi=110)


def write_chapter(result: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--answers", type=int, default=5120, help="sampled in a run: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="%(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/arithmetic"), help="%(default)s")
    parser.add_argument("--out", type=Path, default=DOCS, help="default: %(default)s")
    args, further = parser.parse_known_args(argv)
    result = compare(args, further)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "arithmetic.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out / "arithmetic.png")
    if (page := args.out / "arithmetic.md").exists():
        write_chapter(result, page)
    print(table(result))


if __name__ == "__main__":
    main()
