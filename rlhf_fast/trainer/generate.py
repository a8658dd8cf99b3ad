"""Answer a prompt with a trained policy."""

from __future__ import annotations

import torch

from rlhf_fast.trainer.config import GenerateConfig
from rlhf_fast.trainer.data.rows import Prompt, check_characters, pad, start, tokenize
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.loading import context_length, load_causal_lm, pick_device
from rlhf_fast.trainer.models.tokenizer import check_vocabulary, load_tokenizer, stop_tokens
from rlhf_fast.trainer.quiet import quiet
from rlhf_fast.trainer.rollout.sample import Sampling, decode, sample


@quiet()
def generate(config: GenerateConfig) -> list[str]:
    """`config.samples` answers, without the prompt."""
    check_characters(config.prompt, "prompt")
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.model, field="model", trust=config.trust_remote_code)
    model = load_causal_lm(config.model, device, trust=config.trust_remote_code)
    check_vocabulary(tokenizer, model, field="model", name=config.model)
    prompt = [{"role": "user", "content": config.prompt}] if config.chat else config.prompt
    text = start(prompt, tokenizer, f"prompt={config.prompt!r} with chat")
    asked = tokenize(*text, tokenizer, goes_on=True)
    ids, mask = pad([asked] * config.samples, side="left")
    room = context_length(model)
    if room is not None and ids.size(1) + config.max_new_tokens > room:
        raise InputError(
            f"model={config.model} reads at most {room} tokens, but the prompt has {ids.size(1)} "
            f"and max_new_tokens={config.max_new_tokens}"
        )
    sampling = Sampling(
        config.max_new_tokens, config.temperature, stop_tokens(model, tokenizer),
        config.top_k, config.top_p, config.min_p,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(config.seed)
    draws = torch.rand(config.samples, config.max_new_tokens, generator=generator)
    done = sample(model, ids.to(device), mask.to(device), sampling, draws.to(device))
    return decode(
        tokenizer, done.tokens, done.mask, [Prompt(asked, prompt, {})] * config.samples,
        special_tokens=config.keep_special_tokens, stop_ids=sampling.stop_ids,
    )  # fmt: skip
