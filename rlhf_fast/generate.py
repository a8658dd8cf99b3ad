"""Answer a prompt with a trained policy."""

from __future__ import annotations

import torch

from rlhf_fast.config import GenerateConfig
from rlhf_fast.data import pad, start, tokenize
from rlhf_fast.models import (
    check_vocabulary,
    load_causal_lm,
    load_tokenizer,
    pick_device,
    stop_tokens,
)
from rlhf_fast.rollout import answers, sample


def generate(config: GenerateConfig) -> list[str]:
    """`config.samples` answers, without the prompt."""
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.model, field="model")
    model = load_causal_lm(config.model, device)
    check_vocabulary(tokenizer, model, field="model", name=config.model)
    prompt = [{"role": "user", "content": config.prompt}] if config.chat else config.prompt
    text = start(prompt, tokenizer, f"prompt={config.prompt!r} with chat")
    ids, mask = pad([tokenize(*text, tokenizer)] * config.samples, side="left")
    rollout = sample(
        model, ids.to(device), mask.to(device), max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, stop_ids=stop_tokens(model, tokenizer),
        generator=torch.Generator(device).manual_seed(config.seed),
    )  # fmt: skip
    return answers(tokenizer, rollout)
