"""Reward hacking, measured: the demo's PPO run with and without a price on KL.

    python examples/demo/hacking.py     # after `make demo`, whose model and reward model it uses

One run for each of --betas, alike in everything else; a beta stays what it is, so ppo.yaml's KL
target is left out. What is trained on is the reward model's score, the proxy; VADER, the judge, is
only measured. Rows and flags go to docs/hacking.json, the picture to docs/hacking.png, the figures
into their chapter of docs/walkthrough.md.

A finished run is left alone and an interrupted one goes on: start the same command again. Further
flags (--steps 12, --batch_size 24, …) are handed to `rlhf-fast ppo`. Without any a run takes
about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev

import yaml
from prepare import DEFAULT_CACHE
from run import HERE, run

from rlhf_fast.trainer.run.folder import read_metrics

DOCS = HERE.parent.parent / "docs"
COLUMNS = {"objective/kl": "kl", "objective/scores": "proxy", "objective/judge": "judge"}
BEGIN = "<!-- hacking: written by examples/demo/hacking.py -->"
END = "<!-- end of hacking -->"
COLORS = ("#d32f2f", "#0277bd", "#7b1fa2", "#5f6368")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    cache = DEFAULT_CACHE.expanduser()
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.2], help="%(default)s")
    parser.add_argument("--model", type=Path, default=cache / "smollm2", help="%(default)s")
    parser.add_argument("--data", type=Path, default=cache / "openings.jsonl", help="%(default)s")
    parser.add_argument(
        "--reward", type=Path, default=Path("runs/demo/reward/model"), help="%(default)s"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/hacking"), help="%(default)s")
    parser.add_argument("--out", type=Path, default=DOCS, help="default: %(default)s")
    args, further = parser.parse_known_args()

    settings = yaml.safe_load((HERE / "ppo.yaml").read_text(encoding="utf-8"))
    del settings["adaptive_kl_target"]
    args.runs.mkdir(parents=True, exist_ok=True)
    config = args.runs / "ppo.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    result: dict = {"runs": []}
    for beta in args.betas:
        folder = args.runs / f"beta-{beta:g}"
        run(
            "-m", "rlhf_fast.trainer.cli", "ppo", "--config", config, "--resume",
            "--model", args.model, "--data", args.data, "--reward", args.reward,
            "--judge", f"{HERE / 'vader.py'}:score", "--beta", str(beta),
            "--output_dir", folder, *further,
        )  # fmt: skip
        result["runs"].append({"beta": beta, **read_run(folder)})
        result["flags"] = further
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "hacking.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(result["runs"], args.out / "hacking.png")
    if (page := args.out / "walkthrough.md").exists():
        write_chapter(result, page)
    print(table(result["runs"]))


def read_run(folder: Path) -> dict:
    """Every step's batch, and the held-out prompts before and after."""
    rows = [
        {"step": row["step"]} | {short: round(row[key], 4) for key, short in COLUMNS.items()}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    held_out = {
        moment: {
            short: [round(fmean(answers[key]), 4), round(stdev(answers[key]), 4)]
            for key, short in (("kl", "kl"), ("score", "proxy"), ("judge", "judge"))
        }
        for moment in ("before", "after")
        for answers in [json.loads((folder / f"{moment}.json").read_text())]
    }
    answers = json.loads((folder / "after.json").read_text())
    samples = [
        f"{prompt} |{answer}"
        for prompt, answer in list(zip(answers["prompt"], answers["answer"], strict=True))[:4]
    ]
    return {
        "prompts": len(answers["prompt"]),
        "held_out": held_out,  # [mean, standard deviation over the prompts]
        "samples": samples,
        "rows": rows,
    }


def table(runs: list[dict]) -> str:
    """Markdown: means over the held-out prompts, ± their standard errors."""
    n = runs[0]["prompts"]
    lines = [
        f"| held-out prompts ({n}) | KL, nats an answer | proxy (reward model) | judge (VADER) |",
        "|---|---|---|---|",
    ]

    def cells(moment: dict) -> str:
        return " | ".join(
            f"{mean:.2f} ± {spread / n**0.5:.2f}"
            for mean, spread in (moment[key] for key in ("kl", "proxy", "judge"))
        )

    lines.append(f"| before | {cells(runs[0]['held_out']['before'])} |")
    lines += [f"| after, β = {r['beta']:g} | {cells(r['held_out']['after'])} |" for r in runs]
    return "\n".join(lines)


def write_chapter(result: dict, page: Path) -> None:
    """Between the page's two marks: settings, table, picture and answers, all from the runs."""
    runs = result["runs"]
    flags = f" with `{' '.join(result['flags'])}`" if result["flags"] else ""
    parts = [
        f"{len(runs[0]['rows'])} PPO steps of `examples/demo/ppo.yaml` at a fixed beta{flags}.",
        table(runs),
        "![KL over the steps; reward model and judge over KL, for each β](hacking.png)",
        "The first held-out prompts and their answers afterwards:",
    ]
    for run_ in runs:
        quoted = "\n".join(f"    {' '.join(sample.split())}" for sample in run_["samples"])
        parts.append(f"β = {run_['beta']:g}:\n\n{quoted}")
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    chapter = "\n\n".join(parts)
    page.write_text(f"{before}{BEGIN}\n{chapter}\n{END}{after}", encoding="utf-8")


def plot(runs: list[dict], path: Path) -> None:
    """KL over the steps, and both scores over KL."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    axes_of = (
        ("step", "kl", "How far the policy goes", "PPO step", "KL from the reference, nats"),
        ("kl", "proxy", "What it is trained on", "KL from the reference, nats", "reward model, σ"),
        ("kl", "judge", "What it is not", "KL from the reference, nats", "VADER, −1 to 1"),
    )
    for axes, (x, y, title, x_label, y_label) in zip(panels, axes_of, strict=True):
        for result, color in zip(runs, COLORS, strict=False):
            xs, ys = ([row[key] for row in result["rows"]] for key in (x, y))
            axes.plot(xs, ys, ".", color=color, alpha=0.4)
            axes.plot(smooth(xs), smooth(ys), color=color, label=f"β = {result['beta']:g}")
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[2].set_ylim(-0.5, 1)
    figure.savefig(path, dpi=110)


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Means of neighbouring steps: one batch alone is noisy."""
    return [fmean(values[i : i + width]) for i in range(max(1, len(values) - width + 1))]


if __name__ == "__main__":
    main()
