"""A small model that has seen the calculator used, half of the time, and sums guessed as often."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST = 20  # summand
WORDS = ["<pad>", "<eos>", "user", "assistant", "tool", "+", "calc", "answer"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tokenizer(largest: int) -> PreTrainedTokenizerFast:
    """One token a word; numbers are words."""
    words = [*WORDS, *map(str, range(2 * largest + 1))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


def episode(draw: random.Random, largest: int) -> str:
    a, b = draw.randint(0, largest), draw.randint(0, largest)
    if draw.random() < 0.5:
        turns = f"calc {a} + {b} <eos> tool {a + b} assistant answer {a + b} <eos>"
    else:
        turns = f"answer {draw.randint(0, 2 * largest)} <eos>"
    return f"user {a} + {b} assistant {turns}"


def imitate(folder: Path, steps: int = 800, largest: int = LARGEST, seed: int = 0) -> None:
    """A random model learns to speak as the episodes do."""
    torch.manual_seed(seed)
    draw, known = random.Random(seed), tokenizer(largest)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(known), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        texts = [episode(draw, largest) for _ in range(64)]
        batch = known(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :5] = -100  # the question is not the model's
        loss = model(batch["input_ids"], batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    known.save_pretrained(folder)


def write_prompts(file: Path, largest: int = LARGEST, count: int = 2000, seed: int = 1) -> None:
    draw = random.Random(seed)
    with open(file, "w") as out:
        for _ in range(count):
            a, b = draw.randint(0, largest), draw.randint(0, largest)
            prompt = [{"role": "user", "content": f"{a} + {b}"}]
            out.write(json.dumps({"prompt": prompt, "total": a + b}) + "\n")
