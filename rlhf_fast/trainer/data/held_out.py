"""Prompts kept from training, and whether all of them fit the models."""

from __future__ import annotations

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.read import Rows
from rlhf_fast.trainer.data.rows import Prompt
from rlhf_fast.trainer.data.rows import prompts as load_prompts
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.loading import context_length
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.run.console import (
    console,
)


def split_prompts(
    config: PPOConfig, policy: Policy, rows: Rows, eval_rows: Rows | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts answered before and after, prompts to train on).

    eval_rows: what the former are from, where it is not `rows`."""
    limit = config.max_prompt_tokens
    prompts = load_prompts(rows, policy.tokenizer, source=config.data, max_tokens=limit)
    own: list[Prompt] = []
    if eval_rows is not None:
        source = config.eval_data or config.data
        own = load_prompts(eval_rows, policy.tokenizer, source=source, max_tokens=limit)
    elif len(prompts) <= config.eval_prompts:
        raise InputError(
            f"data={config.data} has {len(prompts)} prompts: too few to keep "
            f"eval_prompts={config.eval_prompts} of them from training"
        )
    models = {f"model={config.model}": policy.model}
    if policy.value_body is not None:
        models[f"value_model={config.value_model}"] = policy.value_body
    longest = max(len(prompt.ids) for prompt in prompts + own)
    for name, model in models.items():
        room = context_length(model)
        if room is not None and longest + config.max_new_tokens > room:
            raise InputError(
                f"{name} reads at most {room} tokens, but the longest prompt has "
                f"{longest} and max_new_tokens={config.max_new_tokens}: lower that or "
                f"max_prompt_tokens={config.max_prompt_tokens}"
            )
    return (
        apart(own, prompts, config.eval_prompts) if own else hold_out(prompts, config.eval_prompts)
    )


def apart(
    own: list[Prompt], prompts: list[Prompt], count: int
) -> tuple[list[Prompt], list[Prompt]]:
    """(the first `count` different prompts of `own`, the rows of `prompts` with others)."""
    held_out = {tuple(prompt.ids): prompt for prompt in reversed(own)}
    held_out = dict(list(reversed(held_out.items()))[:count])
    if len(own) > len(held_out):
        console.print(f"of {len(own)} held-out rows {len(held_out)} different prompts are answered")
    rest = [prompt for prompt in prompts if tuple(prompt.ids) not in held_out]
    if not rest:
        raise InputError("every prompt of data is one of the held-out ones: nothing is left")
    if left_out := len(prompts) - len(rest):
        console.print(f"{left_out} rows of data with a held-out prompt are left out")
    return list(held_out.values()), rest


def hold_out(prompts: list[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """(the first `count` different prompts, the rows of all others)."""
    first: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        first.setdefault(tuple(prompt.ids), prompt)
    if len(first) <= count:
        console.print(
            f"the {len(prompts)} prompts are duplicates of only {len(first)} different ones: the "
            f"eval_prompts={count} answered before and after are trained on, too"
        )
        return prompts[:count], prompts[count:]
    held_out = dict(list(first.items())[:count])
    rest = [prompt for prompt in prompts if tuple(prompt.ids) not in held_out]
    if twice := len(prompts) - count - len(rest):
        console.print(f"{twice} rows with the same prompt as one of eval_prompts are left out")
    return list(held_out.values()), rest
