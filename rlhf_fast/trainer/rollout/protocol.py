"""What turns prompts into answers: the protocol of a rollout engine, what it is asked and gives.

An engine is made once a run and used step by step:

    sync(weights)      before the first generate after an update
    generate(…)        once or several times
    sleep() … wake()   around everything else that a step does
    close()            at the end, also of a run that fails

Its log-probs may differ from the trainer's (other kernels, another precision): the trainer
measures old_logp by itself, logs the gap, and corrects for it when tis_cap or rollout_correction is
set; with bypass it takes the engine's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.ops.support import NO_TOKEN


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: temperature, then top_k, then top_p of what that left, then min_p."""

    max_new_tokens: int
    temperature: float  # divides the logits; 0 takes the likeliest token
    stop_ids: list[int]  # an answer ends with the first of these, which belongs to it
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Completions(NamedTuple):
    """What follows B prompts: at most T ≤ max_new_tokens tokens each."""

    tokens: Tensor  # [B, T] int64; anything where masked
    mask: Tensor  # [B, T] bool, True = a token of the answer, the stop token included
    logp: Tensor  # [B, T] float32: log-probs as sampled, 0 where masked
    trunk: Tensor | None = None  # [B, P+T-1, H]: input of the trained layers, if recorded
    hidden: Tensor | None = None  # [B, T, H]: final hidden states tokens were drawn from, likewise
    # [B, T, K] int32: the tokens that could have been drawn, −1 fills up; None: all of them
    support: Tensor | None = None
    # [B, T] bool, False = said by a tool or another speaker, not by the policy; None: all are its
    loss_mask: Tensor | None = None
    rewards: Tensor | None = None  # [B, T] float32: earned on the way, at the tokens that earned


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples answers. Errors are raised; after `close` nothing of it runs on.

    ``rlhf_fast.trainer.conformance.check_engine`` puts an engine through what is asked of it.
    """

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> Completions:
        """Answers to prompts of token ids, one each, in their order. The seed decides the draws.

        The log-probs are those that tokens were drawn by: after temperature and truncation; at
        temperature 0 those of the model itself.
        """

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights, by their names in transformers, adapters merged.

        They come one by one, and are made when they are asked for: an engine that has no use for
        them costs nothing.
        """

    def sleep(self) -> None:
        """Gives back what memory it can, until `wake`. The weights may be gone: `sync` follows."""

    def wake(self) -> None: ...

    def close(self) -> None:
        """Ends threads, processes and connections. May be called twice."""


class RolloutFunction(Protocol):
    """The shortest engine: a function in a file of your own, which is given the model itself."""

    def __call__(
        self,
        model: PreTrainedModel,
        ids: Tensor,  # [B, P] int64, padded left
        mask: Tensor,  # [B, P] bool, True = a real token
        sampling: Sampling,
        draws: Tensor,  # [B, max_new_tokens] uniform in [0, 1): the randomness, if it can use it
    ) -> Completions: ...


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """For engines whose library takes any number for a token, or fails where nobody sees it."""
    worst = max(max(prompt) for prompt in prompts)
    if worst >= vocabulary:
        raise ValueError(f"a prompt has the token {worst}, of {vocabulary}")


def completions(
    answers: Sequence[Sequence[int]],
    logps: Sequence[Sequence[float]],
    sets: Sequence[Sequence[Sequence[int]]] | None = None,
) -> Completions:
    """Lists of tokens and their log-probs, as engines of other libraries give them, as one batch.

    sets: of each token those it was drawn among, if these are not all.
    """
    size = (len(answers), max(map(len, answers), default=0))
    tokens, logp = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
    mask = torch.zeros(size, dtype=torch.bool)
    for row, (ids, values) in enumerate(zip(answers, logps, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        logp[row, : len(ids)] = torch.tensor(values, dtype=torch.float32)
        mask[row, : len(ids)] = True
    support = None
    if sets is not None:
        most = max((len(among) for row in sets for among in row), default=0)
        support = torch.full((*size, most), NO_TOKEN, dtype=torch.int32)
        for row, of_row in enumerate(sets):
            for t, among in enumerate(of_row):
                support[row, t, : len(among)] = torch.tensor(among, dtype=torch.int32)
    return Completions(tokens, mask, logp, support=support)
