"""The task: additions of two numbers below 100, a model of half a million weights that has begun to
learn them, and whether an answer is right.

    <folder>/model/             a Llama of 3 layers with a tokenizer of 14 characters
    <folder>/train.jsonl        {"prompt": "37+58=", "answer": "95"}: what is trained on by reward
    <folder>/held_out.jsonl     questions that no training sees

The supervised start sees a fifth of the questions and ends where the model, sampling, is right
about three times in ten on those it has not seen: often enough that a reward says something.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHARACTERS = "0123456789+="
BELOW = 100  # both numbers
HELD_OUT, SUPERVISED = 512, 2000  # of the BELOW² questions; the rest is trained on by reward
STARTED = 0.3  # the share of right answers at which the supervised start ends

Question = dict[str, str]


def right(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward: 1 for the right number and nothing else, 0 otherwise."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def questions() -> dict[str, list[Question]]:
    """{"held_out", "supervised", "train"}: every question once, in an order of its own."""
    pairs = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    return {
        "held_out": rows[:HELD_OUT],
        "supervised": rows[HELD_OUT : HELD_OUT + SUPERVISED],
        "train": rows[HELD_OUT + SUPERVISED :],
    }


def tokenizer() -> Any:
    """One token a character; ids: <pad> 0, <eos> 1, then CHARACTERS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *CHARACTERS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def new_model(hidden: int = 128, layers: int = 3) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2 + len(CHARACTERS), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(rows: list[Question]) -> tuple[Tensor, Tensor]:
    """(ids, labels) [N, L], labels -100 outside the answers."""
    token = {character: i + 2 for i, character in enumerate(CHARACTERS)}
    asked = [[token[c] for c in row["prompt"]] for row in rows]
    said = [[token[c] for c in row["answer"]] + [1] for row in rows]
    length = max(len(q) + len(a) for q, a in zip(asked, said, strict=True))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (q, a) in enumerate(zip(asked, said, strict=True)):
        ids[i, : len(q) + len(a)] = torch.tensor(q + a)
        labels[i, len(q) : len(q) + len(a)] = torch.tensor(a)
    return ids, labels


@torch.no_grad()
def chance(model: Any, ids: Tensor, labels: Tensor) -> float:
    """How likely the model is to sample a right answer: the mean over the questions."""
    logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    answers = labels[:, 1:]
    taken = logp.gather(-1, answers.clamp(min=0)[..., None])[..., 0]
    return taken.masked_fill(answers < 0, 0).sum(1).exp().mean().item()


def supervised_start(
    model: Any, rows: dict[str, list[Question]], until: float = STARTED, steps: int = 2000
) -> float:
    """Trains on "supervised" until the chance of a right answer is `until`; returns the chance."""
    ids, labels = encode(rows["supervised"])
    probe = encode(rows["train"][:1000])  # not the held-out ones: nothing is chosen by those
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(ids), (256,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 50)
        model(input_ids=ids[chosen], labels=labels[chosen]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and (found := chance(model, *probe)) >= until:
            break
    print(f"supervised start: {step} steps, right with probability {found:.3f}", flush=True)
    return found


def prepare(folder: Path, until: float = STARTED) -> Path:
    """Makes the folder, once: an interrupted preparation leaves nothing behind."""
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = questions()
    for name in ("train", "held_out"):
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    torch.manual_seed(0)
    model = new_model()
    supervised_start(model, rows, until)
    model.save_pretrained(partial / "model")
    tokenizer().save_pretrained(partial / "model")
    os.replace(partial, folder)
    return folder
