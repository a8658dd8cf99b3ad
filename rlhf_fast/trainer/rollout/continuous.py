"""transformers' continuous batching as an engine: the policy itself, over a paged cache.

Log-probs are those that it reports of the logits it drew by, after temperature and truncation.
What truncation left it does not say; a processor behind its own writes that down.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)
from transformers.generation.continuous_batching.initialization import WorkloadHints

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rollout.protocol import (
    Completions,
    Sampling,
    check_prompts,
    completions,
)

OURS = {"return_logprobs", "seed"}  # fields of its config that the engine sets
SIZES = {
    "page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch",
    "max_blocks_per_request", "block_size",
}  # fmt: skip


class TransformersEngine:
    """options: fields of transformers' ContinuousBatchingConfig. The policy's own model generates,
    in its own dtype, so that there are no weights to take."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        self.check_options(options)
        self.model, self.options = model, options

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        known = {f.name: f.type for f in fields(ContinuousBatchingConfig) if f.name not in OURS}
        for name, value in options.items():
            said = f"rollout_engine_options={name}={value}"
            if name not in known:
                raise InputError(
                    f"{said}: expected a field of transformers' ContinuousBatchingConfig: "
                    f"{', '.join(sorted(known))}"
                )
            kinds = get_args(known[name]) or (known[name],)
            if type(value) not in kinds and not (type(value) is int and float in kinds):
                expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
                raise InputError(f"{said}: expected {expected.replace('NoneType', 'null')}")
            if name in SIZES and value is not None and value < 1:
                raise InputError(f"{said}: expected at least 1")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> Completions:
        warm = sampling.temperature > 0
        drawing = {
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }  # fmt: skip
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=warm,
            eos_token_id=sampling.stop_ids or [-1], **(drawing if warm else {}),
        )  # fmt: skip
        plan = ContinuousBatchingConfig(
            return_logprobs=True, seed=seed, **self.room(prompts, sampling)
        )
        hints = WorkloadHints(max(map(len, prompts)), sampling.max_new_tokens, len(prompts))
        check_prompts(prompts, self.model.get_input_embeddings().weight.size(0))
        with torch.random.fork_rng():  # its seed is the process's
            manager = self.model.init_continuous_batching(config, plan, hints)
            sets = Sets() if sampling.truncates else None
            if sets is not None:
                manager.logit_processor.logits_processor.append(sets)
                manager.logit_processor.tensors_required += 1
            try:
                manager.start()
                done = self.collect(manager, [list(prompt) for prompt in prompts])
            finally:
                manager.stop(hard_stop=True)
                manager.destroy()
        names, outputs = zip(*done, strict=True)
        return completions(
            [output.generated_tokens for output in outputs],
            [output.logprobs for output in outputs],
            None if sets is None else [sets.of[n][: len(o.logprobs)] for n, o in done],
        )

    def room(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> dict[str, Any]:
        """The options, and on a CPU a cache of what the answers need: left to itself it takes most
        of the machine's memory, and the time to fill that."""
        if self.model.device.type != "cpu":
            return self.options
        page = self.options.get("page_size", 32)
        pages = sum(-(-(len(prompt) + sampling.max_new_tokens) // page) for prompt in prompts)
        tokens = sum(map(len, prompts)) + len(prompts)
        sized = {"page_size": page, "num_blocks": pages + 1, "max_batch_tokens": min(tokens, 4096)}
        return sized | self.options

    def collect(self, manager: ContinuousBatchingManager, prompts: list[list[int]]) -> list:
        """(name, output) of every prompt, in their order; an error of its thread is raised here."""
        names, outputs = manager.add_requests(prompts), {}
        while len(outputs) < len(names):
            output = manager.get_result(timeout=0.2)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching ended before all answers were there")
            elif output.error is not None:
                raise RuntimeError(f"continuous batching failed: {output.error}")
            elif output.is_finished():
                outputs[output.request_id] = output
        return [(name, outputs[name]) for name in names]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def sleep(self) -> None:
        gc.collect()  # the cache is one of each call

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Sets(ContinuousBatchingLogitsProcessor):
    """Notes which tokens each request's next one is drawn among; changes nothing."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.of: dict[str, list[list[int]]] = defaultdict(list)  # request -> its tokens' sets
        self.next: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None: ...

    def prepare_tensor_args(self, requests_with_new_token: list) -> Tensor:
        """Of every batch, just before it is run: the rows' requests."""
        self.next = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self.next), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for name, row in zip(self.next, scores > -torch.inf, strict=False):  # rows may be padded
            self.of[name].append(row.nonzero().flatten().tolist())
        return scores
