"""Does our PPO learn what TRL's learns? Reward and KL over the steps of both, from the same seeds.

    python bench/curves.py [--seeds 0 1 2] [--steps 10]

SmolLM2-135M (`python examples/demo/prepare.py` puts it where it is looked for) writes on from the
first words of film reviews; VADER, a lexicon of how positive words are, scores opening and answer
together. Both trainers train the top layers of the same policy, with a head on it as the critic and
the same settings. Where a default differs, TRL's is taken for both where ours can be set to it (no
gradient clipping, one step size, no penalty for a missing end), and ours where TRL's can (no decay
of the step size, Adam's epsilon, temperature 1, a value head that begins at zero and has a bias).

What a seed means is made the same, too: TRL is given our order of the prompts and our draws, so
that one policy gives one answer in both. Everything else of TRL is its own. The curves then lie on
each other until a rounding makes another token; what is between them after that is the noise of
sampling.

No token ends an answer. With ends TRL puts the score on the position after the end and learns a
value there, where we put it on the end itself: the one thing that no setting makes equal.

A run that is finished is not made again: start the same command again after an interruption.
Curves go to bench/results/curves.json, the figure to docs/bench/curves.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from bench import foreign, machine
from bench.step import DEMO, VERSION

ROOT = machine.ROOT
RESULTS = ROOT / "bench" / "results" / "curves.json"
FIGURE = ROOT / "docs" / "bench" / "curves.png"
TRAINERS = {"ours": "rlhf_fast", "TRL": f"TRL {VERSION}"}
COLORS = ("#0277bd", "#d32f2f", "#2e7d32", "#7b1fa2", "#5f6368")
COLUMNS = {
    "objective/scores": "score (VADER, −1 to 1)",
    "objective/kl": "KL from the reference, nats an answer",
}
PARTED = 1e-3  # what one other token changes in a batch of 8 answers is more
UNUSED = "<reponame>"  # a token that the model never samples: no answer ends before its time


@dataclasses.dataclass(frozen=True)
class Setting:
    steps: int = 10
    batch_size: int = 8
    new_tokens: int = 16
    epochs: int = 2
    minibatches: int = 1
    max_prompt_tokens: int = 8
    learning_rate: float = 5e-5
    trainable_layers: int = 6
    beta: float = 0.05
    adam_epsilon: float = 1e-5


# ------------------------------------------------------------------------------- the reward of both


def sentiment(texts: list[str]) -> list[float]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def score(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return sentiment([p + c for p, c in zip(prompts, completions, strict=True)])


class Scoring(torch.nn.Module):
    """The same as the reward model that TRL wants: a score in place of each hidden state."""

    base_model_prefix = "body"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.body = Texts(tokenizer)
        self.score = torch.nn.Identity()


class Texts(torch.nn.Module):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        rows = zip(input_ids, attention_mask.bool(), strict=True)
        texts = [self.tokenizer.decode(ids[m], skip_special_tokens=True) for ids, m in rows]
        scores = torch.tensor(sentiment(texts))[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(hidden_states=(scores,))


# ------------------------------------------------------------------------------------- the trainers


def prepare(folder: Path, setting: Setting) -> None:
    """model/ without ends and prompts.jsonl, once for all runs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "prompts.jsonl").exists():
        return
    if not (DEMO / "openings.jsonl").exists():
        sys.exit("there is no SmolLM2-135M: python examples/demo/prepare.py makes it")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "smollm2", padding_side="left")
    tokenizer.eos_token = UNUSED
    model = AutoModelForCausalLM.from_pretrained(DEMO / "smollm2")
    ends = tokenizer.convert_tokens_to_ids(UNUSED)
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.loads(line) for line in (DEMO / "openings.jsonl").read_text().splitlines()]
    short = [r for r in rows if len(tokenizer(r["prompt"]).input_ids) <= setting.max_prompt_tokens]
    lines = "".join(json.dumps(row) + "\n" for row in short)
    (folder / "prompts.jsonl").write_text(lines)


def run_ours(folder: Path, out: Path, setting: Setting, seed: int) -> list[dict]:
    from rlhf_fast.trainer.config import PPOConfig
    from rlhf_fast.trainer.ppo import train
    from rlhf_fast.trainer.run.folder import read_metrics

    train(
        PPOConfig(
            model=str(folder / "model"), trainable_layers=setting.trainable_layers,
            data=str(folder / "prompts.jsonl"), reward=f"{Path(__file__).resolve()}:score",
            output_dir=str(out), device="cpu", seed=seed, steps=setting.steps,
            batch_size=setting.batch_size, epochs=setting.epochs,
            minibatches=setting.minibatches, max_prompt_tokens=setting.max_prompt_tokens,
            max_new_tokens=setting.new_tokens, missing_eos_penalty=0.0, beta=setting.beta,
            learning_rate=setting.learning_rate, value_learning_rate=setting.learning_rate,
            adam_epsilon=setting.adam_epsilon, max_grad_norm=1e9, eval_prompts=1,
            save_every=setting.steps + 1, resume=True,
        )
    )  # fmt: skip
    return read_metrics(out / "metrics.jsonl")


def in_our_order(rows: list[dict], setting: Setting, seed: int) -> list[dict]:
    """The prompts of all steps; our trainer keeps the first one for itself (eval_prompts=1)."""
    from rlhf_fast.trainer.data.rows import batch_indices

    rest = rows[1:]
    return [
        rest[i]
        for step in range(setting.steps)
        for i in batch_indices(len(rest), setting.batch_size, step, seed)
    ]


def unshuffled(loader: type) -> Callable[..., Any]:
    return lambda *args, **options: loader(*args, **options | {"shuffle": False})


def our_draws(forward: Callable, tokenizer: Any, setting: Setting, seed: int) -> Callable[..., Any]:
    """In the place of TRL's `batch_generation`: our decoding, with the draws of our trainer."""
    from rlhf_fast.trainer.rollout.sample import Sampling, sample

    steps = itertools.count()
    sampling = Sampling(setting.new_tokens, 1.0, [tokenizer.eos_token_id])

    @torch.no_grad()
    def batch_generation(model, queries, chunk_size, pad, generation_config):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + next(steps))
        draws = torch.rand(len(queries), setting.new_tokens, generator=generator)
        answers = sample(model, queries, queries != pad, sampling, draws)
        assert answers.mask.all(), "an answer ended"
        texts = torch.cat([queries, answers.tokens], 1)
        return texts, forward(model, texts, pad).logits[:, queries.size(1) - 1 : -1]

    return batch_generation


def run_trl(folder: Path, out: Path, setting: Setting, seed: int) -> list[dict]:
    if foreign.installed("trl") != VERSION:
        sys.exit(f"needs trl=={VERSION}: pip install -e '.[bench]'")
    import datasets
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
        set_seed,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    asked = in_our_order(rows, setting, seed)
    tokens = [{"input_ids": tokenizer(row["prompt"]).input_ids} for row in asked]
    ppo_trainer.DataLoader = unshuffled(ppo_trainer.DataLoader)
    ppo_trainer.batch_generation = our_draws(ppo_trainer.forward, tokenizer, setting, seed)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    policy.requires_grad_(False)
    body = policy.base_model
    for part in (*body.layers[-setting.trainable_layers :], body.norm):
        part.requires_grad_(True)
    setattr(critic, critic.base_model_prefix, body)
    critic.score = torch.nn.Linear(critic.score.in_features, 1)
    torch.nn.init.zeros_(critic.score.weight)
    torch.nn.init.zeros_(critic.score.bias)
    kept: list[dict] = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if "objective/kl" in logs:
                kept.append(dict(logs))
                print(f"step {len(kept)}: {[round(logs[c], 3) for c in COLUMNS]}", flush=True)

    PPOTrainer(
        args=PPOConfig(
            output_dir=str(out), report_to="none", save_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, seed=seed, logging_steps=1,
            per_device_train_batch_size=setting.batch_size // setting.minibatches,
            gradient_accumulation_steps=setting.minibatches,
            num_mini_batches=setting.minibatches, num_ppo_epochs=setting.epochs,
            total_episodes=setting.steps * setting.batch_size, temperature=1.0,
            local_rollout_forward_batch_size=setting.batch_size, num_sample_generations=0,
            response_length=setting.new_tokens, kl_coef=setting.beta, disable_tqdm=True,
            learning_rate=setting.learning_rate, lr_scheduler_type="constant",
            adam_epsilon=setting.adam_epsilon,
        ),
        processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=Scoring(tokenizer), value_model=critic,
        train_dataset=datasets.Dataset.from_list(tokens),
        eval_dataset=datasets.Dataset.from_list(tokens[:1]), callbacks=[Keep()],
    ).train()  # fmt: skip
    return kept


def run(trainer: str, folder: Path, seed: int, setting: Setting) -> None:
    make = run_ours if trainer == "ours" else run_trl
    rows = make(folder, folder / f"{trainer}-{seed}", setting, seed)
    curves = {column: [round(row[column], 5) for row in rows] for column in COLUMNS}
    (folder / f"{trainer}-{seed}.json").write_text(json.dumps(curves))


# ---------------------------------------------------------------------------- figure and comparison


def compare(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, Any]:
    """Of one seed: the steps, those until its curves part, and how near each is till then."""
    apart = {c: [abs(a - b) for a, b in zip(ours[c], theirs[c], strict=True)] for c in COLUMNS}
    steps = list(zip(*apart.values(), strict=True))
    together = sum(1 for _ in itertools.takewhile(lambda step: max(step) < PARTED, steps))
    nearest = {c: max(differences[:together], default=0.0) for c, differences in apart.items()}
    return {"steps": len(steps), "together": together, "largest_difference_till_then": nearest}


def plot(runs: dict[str, list[dict]], seeds: list[int], path: Path) -> None:
    """A colour a seed: TRL's broad and pale, ours thin above it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    lines = {"TRL": {"lw": 7, "alpha": 0.3}, "ours": {"lw": 1.2, "marker": ".", "ls": "--"}}
    for axes, (column, what) in zip(figure.subplots(1, 2), COLUMNS.items(), strict=True):
        for trainer, style in lines.items():
            for seed, run, color in zip(seeds, runs[trainer], COLORS, strict=False):
                label = f"{TRAINERS[trainer]}, seed {seed}"
                steps = range(1, len(run[column]) + 1)
                axes.plot(steps, run[column], color=color, label=label, **style)
        axes.set(xlabel="PPO step", ylabel=what)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="%(default)s")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="%(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"), help="%(default)s")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # trainer, seed: of a process
    args = parser.parse_args()
    setting = Setting(steps=args.steps)
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder, setting)
    if args.one:
        run(args.one[0], args.folder, int(args.one[1]), setting)
        return
    runs: dict[str, list[dict]] = {trainer: [] for trainer in TRAINERS}
    for seed in args.seeds:
        for trainer in TRAINERS:
            file = args.folder / f"{trainer}-{seed}.json"
            if not file.exists():  # in a process of its own: each leaves its models behind
                command = [sys.executable, __file__, "--folder", args.folder]
                command += ["--steps", str(args.steps), "--one", trainer, str(seed)]
                subprocess.run(command, check=True)
            runs[trainer].append(json.loads(file.read_text()))
    result = {
        "machine": machine.describe(torch.device("cpu")), "setting": dataclasses.asdict(setting),
        "seeds": args.seeds, "runs": runs,
        "compared": list(map(compare, runs["ours"], runs["TRL"])),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, args.seeds, FIGURE)
    for seed, row in zip(args.seeds, result["compared"], strict=True):
        print(f"seed {seed}: {row}")


if __name__ == "__main__":
    main()
