"""PPO on answers drawn with top-p .7: losses over the tokens that were left, and over all of them.

    python examples/truncated_sampling.py [--out docs/truncated.png]

A random Llama of 60 words is paid for words of one half of them, so that many answers are as good
as the best. Both runs of a seed differ in one thing: whether the trainer is told among which tokens
each one was drawn (``Completions.support``). About 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.rollout.sample import Completions, sample
from rlhf_fast.trainer.run.metrics import read_metrics

WORDS = [f"w{i}" for i in range(60)]
REWARD = """
def share(prompts, completions, **columns):
    words = [c.split() for c in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in x) / max(1, len(x)) for x in words]
"""
TOP_P, STEPS, SEEDS = 0.7, 80, (0, 1, 2)
RUNS = {"over the tokens left": True, "over the whole vocabulary": False}
COLOURS = dict(zip(RUNS, ("tab:blue", "tab:red"), strict=True))


class Seen(NamedTuple):
    """Of one step, means over its tokens."""

    reward: float
    entropy: float  # nats, of the whole distribution
    ratio_gap: float  # |log π_old − log π_rollout|, nats: 0 where both mean the same distribution


def save_model(folder: Path) -> None:
    words = ["<pad>", "<eos>", *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    set_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def engine(told: bool, entropies: list[float], model: LlamaForCausalLM, *given) -> Completions:
    """The trainer's own decoding, which says among which tokens it drew only if `told`."""
    done = sample(model, *given)
    ids, mask = given[:2]
    whole = torch.cat([ids, done.tokens], 1), torch.cat([mask, done.mask], 1)
    logits = model(whole[0], attention_mask=whole[1].long()).logits[:, ids.size(1) - 1 : -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    entropies.append(float(entropy[done.mask].mean()))
    return done if told else done._replace(support=None)


def train(folder: Path, told: bool, seed: int, steps: int) -> list[Seen]:
    data = folder / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{a} {b}"}) + "\n" for a in WORDS for b in WORDS)
    )
    (folder / "reward.py").write_text(REWARD)
    config = PPOConfig(
        model=str(folder), data=str(data), reward=f"{folder / 'reward.py'}:share",
        output_dir=str(folder / f"{told}-{seed}"), steps=steps, batch_size=64, minibatches=2,
        epochs=2, max_new_tokens=8, top_p=TOP_P, learning_rate=1e-3, value_learning_rate=1e-2,
        beta=0.0, missing_eos_penalty=0.0, eval_prompts=8, seed=seed, device="cpu",
        save_every=steps,
    )  # fmt: skip
    entropies: list[float] = []
    ppo.train(config, engine=partial(engine, told, entropies))
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [
        Seen(row["objective/scores"], entropy, row["val/rollout_logp_gap"])
        for row, entropy in zip(rows, entropies[1:], strict=False)
    ]


def draw(found: dict[str, list[list[Seen]]], path: Path) -> None:
    figure, panes = plt.subplots(1, 3, figsize=(9, 2.8), constrained_layout=True)
    titles = ("mean reward", "entropy of the whole distribution, nats",
              "|log π_old − log π_rollout|, nats")  # fmt: skip
    for pane, name, title in zip(panes, Seen._fields, titles, strict=True):
        for run, curves in found.items():
            for i, curve in enumerate(curves):
                values = [getattr(step, name) for step in curve]
                pane.plot(values, color=COLOURS[run], lw=1, label=run if i == 0 else None)
        pane.set_title(title, fontsize=9)
        pane.set_xlabel("step", fontsize=8)
        pane.tick_params(labelsize=8)
        pane.spines[["top", "right"]].set_visible(False)
    panes[0].legend(
        title=f"losses, top-p {TOP_P}, {len(SEEDS)} seeds", fontsize=7, title_fontsize=7
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("truncated.png"))
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="the rollout engine samples among few tokens")
    found: dict[str, list[list[Seen]]] = {run: [] for run in RUNS}
    for seed in SEEDS:
        for run, told in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                save_model(Path(folder))
                found[run].append(train(Path(folder), told, seed, options.steps))
            last = found[run][-1][-1]
            print(f"seed {seed}, losses {run}: reward {last.reward:.3f}, entropy "
                  f"{last.entropy:.2f} nats, gap {last.ratio_gap:.2g}", flush=True)  # fmt: skip
    draw(found, options.out)


if __name__ == "__main__":
    main()
