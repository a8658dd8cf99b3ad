"""vLLM in this process as an engine: beside the trainer, on the same device.

It begins with random weights of the policy's shape (`load_format="dummy"`) and takes the policy's
before the first answers; with `enable_lora` it begins with those that are frozen and takes the
adapters. Log-probs are its `processed_logprobs`: after temperature and truncation.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rollout.adapters import adapter_of
from rlhf_fast.trainer.rollout.protocol import (
    Completions,
    Sampling,
    check_prompts,
    completions,
)

ALL = -1  # of a vocabulary, as vLLM counts log-probs
OURS = ("model", "load_format", "logprobs_mode", "max_logprobs", "skip_tokenizer_init")


def refuse(options: dict[str, Any], names: Sequence[str]) -> None:
    """Arguments that are the engine's to give."""
    for name in names:
        if name in options:
            raise InputError(f"rollout_engine_options={name}={options[name]}: the engine's own")


def beside_the_trainer(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments unless others are asked for: room is left for the trainer. On a CPU vLLM counts
    what the trainer holds as its own, so there the cache has a size; and nothing is compiled, which
    would take minutes."""
    dtype = {"dtype": str(model.dtype).removeprefix("torch.")}
    if model.device.type == "cuda":
        return dtype | {"gpu_memory_utilization": 0.4}
    return dtype | {"kv_cache_memory_bytes": 2**30, "enforce_eager": True}


class VLLMEngine:
    """options: arguments of vLLM's LLM."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights go by reference
        from vllm import LLM

        on_gpu = model.device.type == "cuda"
        given = beside_the_trainer(model) | {"enable_sleep_mode": on_gpu}
        self.adapter, self.request = adapter_of(model, options), None
        if self.adapter is not None:
            given |= self.adapter.options
        self.sleeps = on_gpu
        self.bars = patch.object(tqdm, "monitor_interval", 0)  # their thread would stay
        self.bars.start()
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if self.adapter is not None:
                self.adapter.save_the_rest(Path(folder))
            self.llm: Any = LLM(
                model=folder, load_format="auto" if self.adapter else "dummy",
                skip_tokenizer_init=True, logprobs_mode="processed_logprobs", max_logprobs=ALL,
                **given | options,
            )  # fmt: skip
        self.vocabulary = model.get_input_embeddings().weight.size(0)

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        refuse(options, OURS)
        from vllm import LLM, EngineArgs

        known = {field.name for field in fields(EngineArgs)}
        for name in options.keys() - known - inspect.signature(LLM).parameters.keys():
            raise InputError(
                f"rollout_engine_options={name}={options[name]}: vLLM's LLM has no such argument"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> Completions:
        check_prompts(prompts, self.vocabulary)
        asked = parameters(sampling, self.vocabulary)
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        from vllm import SamplingParams

        each = [SamplingParams(**asked, seed=(seed + row) % 2**31) for row in range(len(prompts))]
        done = self.llm.generate(prompts, each, use_tqdm=False, lora_request=self.request)
        answers = [output.outputs[0] for output in done]
        said = [[{t: x.logprob for t, x in at.items()} for at in a.logprobs] for a in answers]
        return drawn([list(a.token_ids) for a in answers], said, sampling)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.adapter is not None:
            from vllm.lora.request import LoRARequest

            path = self.adapter.save()
            self.request = LoRARequest("policy", self.adapter.count, str(path))
            self.llm.llm_engine.add_lora(self.request)
        else:
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": ((n, w.detach()) for n, w in weights)}
            )
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        if self.sleeps:
            # 2: the weights, too, where `sync` brings new ones
            self.llm.sleep(level=1 if self.adapter else 2)

    def wake(self) -> None:
        if self.sleeps:
            self.llm.wake_up()

    def close(self) -> None:
        llm, self.llm = self.llm, None
        if llm is None:
            return
        self.bars.stop()
        if self.adapter is not None:
            self.adapter.close()
        llm.llm_engine.engine_core.shutdown()
        del llm
        from vllm.distributed import cleanup_dist_env_and_memory

        if not torch.distributed.is_initialized() or os.environ.get("WORLD_SIZE", "1") == "1":
            cleanup_dist_env_and_memory()
        end_compilers()
        gc.collect()


def end_compilers() -> None:
    """Threads and processes of torch's compiler, which what vLLM has compiled would leave behind
    where no cache had it. They start again where they are needed."""
    from torch._inductor.async_compile import AsyncCompile, shutdown_compile_workers

    shutdown_compile_workers()
    if AsyncCompile.pool.cache_info().currsize:
        AsyncCompile.pool().shutdown()
        AsyncCompile.pool.cache_clear()


def parameters(sampling: Sampling, vocabulary: int) -> dict[str, Any]:
    """Sampling as vLLM names it. To know what was drawn among it asks for the log-probs of all that
    can be left: top_k tokens, or the whole vocabulary, which is slow for a large one."""
    truncation = {"top_k": min(sampling.top_k, vocabulary), "top_p": sampling.top_p}
    count = 0
    if sampling.truncates:
        count = truncation["top_k"] or ALL
    return {
        "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
        "stop_token_ids": sampling.stop_ids, "ignore_eos": True, "detokenize": False,
        "logprobs": count, "min_p": sampling.min_p, **truncation,
    }  # fmt: skip


def drawn(
    tokens: list[list[int]], said: list[list[dict[int, float]]], sampling: Sampling
) -> Completions:
    """said: of each token {token: log-prob} of those that could have been drawn, −∞ for others."""
    logps = [[at[t] for t, at in zip(*row, strict=True)] for row in zip(tokens, said, strict=True)]
    sets = None
    if sampling.truncates:
        sets = [[[t for t, p in at.items() if p > -math.inf] for at in row] for row in said]
    return completions(tokens, logps, sets)
