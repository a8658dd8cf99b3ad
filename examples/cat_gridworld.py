"""Train the slides' cat by every rung from REINFORCE to PPO, and measure what each rung buys.

    python examples/cat_gridworld.py            # tables, and pictures in runs/cat/
    python examples/cat_gridworld.py --quick    # the same in seconds, with few seeds and batches

Needs `pip install -e ".[examples]"` (gymnasium, pillow). Everything follows from --seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from cat import exact, figures
from cat.ladder import EPISODES, GAE, GAMMA, LADDER, OFF_POLICY, PPO, WHOLE_RATIO, Result, train
from cat.variance import Estimate, measure, snapshot
from rich.console import Console
from rich.progress import track
from rich.table import Table

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/cat"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each rung (default: 20)")
    parser.add_argument("--batches", type=int, default=120, help="of 16 episodes (default: 120)")
    parser.add_argument("--slip", type=float, default=0.1, help="how drunk the cat is: %(default)s")
    parser.add_argument("--quick", action="store_true", help="3 seeds, 20 batches: a smoke test")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.batches = 3, 20
    if args.batches < 20 or args.seeds < 1 or not 0 <= args.slip < 1:
        parser.error("expected --batches of at least 20, --seeds of at least 1, --slip in [0, 1)")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    seeds = list(range(args.seed, args.seed + args.seeds))
    results = {
        rung.name: train(rung, seeds=seeds, batches=args.batches, slip=args.slip)
        for rung in track(LADDER, "training the ladder", console=console)
    }
    best, _ = exact.optimum(args.slip, GAMMA)
    console.print(returns_table(results, best))
    figures.returns(results, best, args.out / "returns.png")

    samples = 20 if args.quick else 500
    moments = [k for k in (5, 15, 40, 100) if k <= args.batches]
    run = results[GAE.name]
    measured = {}
    for k in track(moments, "measuring gradients", console=console):
        at = snapshot(run, k)
        label = f"after {k * EPISODES} episodes, J = {run.returns[0, k]:.0f}"
        measured[label] = measure(LADDER, at, batches=samples, slip=args.slip, seed=args.seed)
    console.print(variance_table(measured))
    figures.variance(measured, args.out / "variance.png")

    aged = {
        age: measure(
            (OFF_POLICY, WHOLE_RATIO, PPO), snapshot(run, 15, lag=age),
            batches=samples, slip=args.slip, seed=args.seed,
        )
        for age in track((0, 1, 3, 6, 10, 15), "importance sampling", console=console)
    }  # fmt: skip
    figures.importance(aged, args.out / "importance.png")

    ppo = results[PPO.name]
    best_seed = int(ppo.returns[:, -1].argmax())
    frames = figures.walk(ppo.logits[-1][best_seed], slip=args.slip, seed=args.seed)
    figures.save_gif(frames, args.out / "path.gif")
    console.print(f"{time.perf_counter() - began:.0f} s; the pictures are in {args.out}")


def returns_table(results: dict[str, Result], best: float) -> Table:
    """Exact returns: the median seed along the way, the worst seed at the end."""
    batches = next(iter(results.values())).returns.shape[1] - 1
    moments = [k for k in (5, 10, 20, 40, 80, 120) if k <= batches]
    table = Table(title=f"return J(π) after so many episodes: median of the seeds; best {best:.1f}")
    table.add_column("rung", no_wrap=True)
    for k in moments:
        table.add_column(str(k * EPISODES), justify="right")
    table.add_column("end, worst", justify="right")
    for name, result in results.items():
        medians = result.returns.median(0).values
        worst = result.returns[:, -1].min()
        table.add_row(name, *(f"{medians[k]:.1f}" for k in moments), f"{worst:.1f}")
    return table


def variance_table(measured: dict[str, dict[str, Estimate]]) -> Table:
    table = Table(title="variance of the gradient / ‖∇J‖²  (bias / ‖∇J‖ where it can be told)")
    table.add_column("rung", no_wrap=True)
    for label in measured:
        table.add_column(label.replace(", ", ",\n"), justify="right")
    for name in next(iter(measured.values())):
        estimates = [column[name] for column in measured.values()]
        table.add_row(name, *map(shown, estimates))
    return table


def shown(e: Estimate) -> str:
    bias = f"{e.bias:.2f}" if e.bias > 2 * e.bias_error else "–"
    return f"{e.variance:.3g} ({bias})"


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it helps
    main()
