"""A whole PPO step, ours beside the PPOTrainer of trl==1.12.0: samples a second and peak memory.

Both train every weight of the same model on the same prompts against the same reward model, with
the same batch, lengths, epochs, minibatches and precision (float32, no gradient checkpointing),
each in a fresh process. A step is everything from the prompts to the last update; the first one
warms up and is not counted. The model is SmolLM2-135M where ``examples/demo/prepare.py`` has put
it, else random weights of that shape; on a GPU, random weights in the shape of Qwen2.5-0.5B.

The steps of one process differ by 2 %, processes started minutes apart by 10 to 20 %: the machine's
speed drifts. So the trainers take turns, short and several times, back and forth (what drifts
evenly cancels), and what counts is the ratio within a round.

TRL trains a critic that is a second model, where ours is by default a head on the policy, so there
are two of each: ``TRL`` as its users run it, ``TRL-shared`` with a critic that is a head on the
policy's own weights (TRL still runs them once for each of the two).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script, in the fresh process
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import Progress

from bench import foreign, machine

DEMO = Path(os.environ.get("RLHF_FAST_CACHE", "~/.cache/rlhf_fast")).expanduser() / "demo"
WORDS = ("the", "film", "was", "a", "very", "good", "bad", "story", "and", "I", "liked", "it")
TRAINERS = {
    "ours": "critic: a head on the policy",
    "ours-critic": "critic: a model of its own",
    "TRL": "critic: a model of its own",
    "TRL-shared": "critic: a head on the policy",
}
# Whose samples a second everybody's are compared with, in words.
RIVALS = {"TRL": "TRL's", "TRL-shared": "TRL's with a head"}
RESULT = "result.json"  # of a turn
VERSION = "1.12.0"  # the last TRL with a PPOTrainer


@dataclasses.dataclass(frozen=True)
class Setting:
    model: str  # in words
    batch_size: int = 16
    max_prompt_tokens: int = 8
    new_tokens: int = 24
    epochs: int = 2
    minibatches: int = 2
    steps: int = 2  # of a turn; the first is not counted
    rounds: int = 3  # in each of which every trainer has a turn


SHAPES = {
    "SmolLM2-135M's shape": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                             "num_hidden_layers": 30, "num_attention_heads": 9,
                             "num_key_value_heads": 3},
    "Qwen2.5-0.5B's shape": {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                             "num_hidden_layers": 24, "num_attention_heads": 14,
                             "num_key_value_heads": 2},
    "a tiny Llama": {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


def run(names: list[str], device: torch.device, quick: bool) -> dict[str, Any]:
    """The record; a trainer that fails costs its own place in it."""
    started = time.monotonic()
    where = machine.describe(device)
    trainers: dict[str, Any] = {name: {"critic": TRAINERS[name], "turns": []} for name in names}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as bar:
        setting = prepare(Path(folder), device, quick)
        task = bar.add_task(setting.model, total=len(names) * setting.rounds)
        for i in range(setting.rounds):
            for name in names if i % 2 == 0 else reversed(names):
                bar.update(task, description=f"{setting.model}, round {i + 1}: {name}")
                if "failed" not in trainers[name]:
                    turn = _in_fresh_process(name, Path(folder), device)
                    if "failed" in turn:
                        trainers[name] = {"critic": TRAINERS[name], **turn}
                    else:
                        trainers[name]["turns"].append(turn)
                bar.advance(task)
    summarize(trainers, setting.batch_size)
    return {
        "suite": "step",
        "machine": where,
        "versions": {"trl": VERSION},
        "quick": quick,
        "setting": dataclasses.asdict(setting),
        "trainers": trainers,
        "seconds": round(time.monotonic() - started, 1),
        "rows": [],
    }


def summarize(trainers: dict[str, Any], batch_size: int) -> None:
    """Add to each trainer that has had all its turns: the median seconds of a step, samples a
    second, the largest peak of memory, and its samples a second over each rival's, by round."""
    steps = {
        name: [statistics.median(turn["seconds"]) for turn in cell["turns"]]
        for name, cell in trainers.items()
        if "failed" not in cell
    }
    for name, seconds in steps.items():
        trainers[name] |= {
            "seconds": statistics.median(seconds),
            "samples_per_second": batch_size / statistics.median(seconds),
            "peak_memory": max(turn["peak_memory"] for turn in trainers[name]["turns"]),
            "ratios": {
                rival: [a / b for a, b in zip(steps[rival], seconds, strict=True)]
                for rival in RIVALS
                if rival in steps and rival != name
            },
        }


def prepare(folder: Path, device: torch.device, quick: bool) -> Setting:
    """model/, reward/ and prompts.jsonl in the folder, and the setting for them."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # the reward model's head is new, and meant to be
    logging.disable_progress_bar()
    if quick:
        setting = Setting("a tiny Llama", batch_size=8, new_tokens=8, rounds=2)
    elif device.type != "cpu":
        setting = Setting("Qwen2.5-0.5B's shape", batch_size=64, new_tokens=128, steps=4)
    elif (DEMO / "openings.jsonl").exists():
        setting = Setting("SmolLM2-135M")
    else:
        setting = Setting("SmolLM2-135M's shape")
    torch.manual_seed(0)
    if setting.model == "SmolLM2-135M":
        (folder / "model").symlink_to(DEMO / "smollm2")
        (folder / "prompts.jsonl").symlink_to(DEMO / "openings.jsonl")
    else:
        _random_model(folder / "model", SHAPES[setting.model])
        prompts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(6)) for i in range(512)]
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)
        (folder / "prompts.jsonl").write_text(lines)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    reward.save_pretrained(folder / "reward")
    _tokenizer(folder).save_pretrained(folder / "reward")
    (folder / "setting.json").write_text(json.dumps(dataclasses.asdict(setting)))
    return setting


def _random_model(folder: Path, shape: dict[str, int]) -> None:
    """Random weights, and a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(len(words), shape["vocab_size"])]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                         tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model", padding_side="left")


def _in_fresh_process(name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """One turn: seconds of each counted step and the process's peak memory, or how it failed."""
    with tempfile.TemporaryDirectory() as turn:  # ours writes its models there
        command = [sys.executable, __file__, name, str(folder), turn, str(device)]
        done = subprocess.run(command, capture_output=True, text=True)
        result = Path(turn) / RESULT
        if result.exists():
            return json.loads(result.read_text())
    lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    return {"failed": lines[-1][:200]}


# ----------------------------------------------------------------- what runs in the fresh process


def measure(name: str, folder: Path, turn: Path, device: torch.device) -> dict[str, Any]:
    setting = Setting(**json.loads((folder / "setting.json").read_text()))
    trainer = trl_seconds if name.startswith("TRL") else our_seconds
    seconds = trainer(name, folder, turn / "run", setting, device)[1:]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024
    return {"seconds": seconds, "peak_memory": peak}


def our_seconds(
    name: str, folder: Path, out: Path, setting: Setting, device: torch.device
) -> list[float]:
    from rlhf_fast.trainer.config import PPOConfig
    from rlhf_fast.trainer.ppo import train
    from rlhf_fast.trainer.run.folder import read_metrics

    critic = {"value_model": str(folder / "model")} if name == "ours-critic" else {}
    train(
        PPOConfig(
            model=str(folder / "model"), data=str(folder / "prompts.jsonl"),
            reward=str(folder / "reward"), output_dir=str(out), device=str(device),
            steps=setting.steps, batch_size=setting.batch_size, epochs=setting.epochs,
            minibatches=setting.minibatches, max_prompt_tokens=setting.max_prompt_tokens,
            max_new_tokens=setting.new_tokens, missing_eos_penalty=0.0, eval_prompts=1,
            save_every=setting.steps + 1, **critic,
        )
    )  # fmt: skip
    return [row["perf/seconds"] for row in read_metrics(out / "metrics.jsonl")]


def trl_seconds(
    name: str, folder: Path, out: Path, setting: Setting, device: torch.device
) -> list[float]:
    if foreign.installed("trl") != VERSION:
        raise ImportError(f"needs trl=={VERSION}: pip install -e '.[bench]'")
    import datasets
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = _tokenizer(folder)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    tokens = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    short = [{"input_ids": ids} for ids in tokens if len(ids) <= setting.max_prompt_tokens]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    torch.nn.init.zeros_(critic.score.weight)  # as ours begins
    if name == "TRL-shared":
        setattr(critic, critic.base_model_prefix, policy.base_model)
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(out), report_to="none", save_strategy="no",
            use_cpu=device.type == "cpu", bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=setting.batch_size, gradient_accumulation_steps=1,
            num_mini_batches=setting.minibatches, num_ppo_epochs=setting.epochs,
            total_episodes=setting.steps * setting.batch_size, temperature=1.0,
            local_rollout_forward_batch_size=setting.batch_size, num_sample_generations=0,
            response_length=setting.new_tokens, kl_coef=0.05, disable_tqdm=True,
        ),
        processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=critic, train_dataset=datasets.Dataset.from_list(short),
        eval_dataset=datasets.Dataset.from_list(short[:1]), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return [end - start for start, end in zip(clock[:-1], clock[1:], strict=True)]


def main(name: str, folder: str, turn: str, device: str) -> None:
    try:
        found = measure(name, Path(folder), Path(turn), torch.device(device))
    except Exception as error:  # whatever it is, it costs this trainer and not the run
        found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    (Path(turn) / RESULT).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
