"""Answers of several turns: the policy speaks, an environment (a tool, a game, a user) answers.

The tokens that the policy chose are kept as they were sampled, those of the environment come
between them: they are context, and no loss knows them.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.rows import Prompt, Text, pad, render, start, tokenize
from rlhf_fast.trainer.errors import Ended, InputError
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.rewards.functions import (
    awaited,
    load_function,
    named_if_slow,
    reason_of,
)
from rlhf_fast.trainer.rollout.engine import ask
from rlhf_fast.trainer.rollout.protocol import Completions, RolloutEngine, Sampling, completions
from rlhf_fast.trainer.rollout.sample import Rollout, put_behind

Said = str | dict[str, str] | list[dict[str, str]]  # a tool's words, a message, or several

MARK = "\u241fthe answer\u241f"  # stands for an answer where a template is asked what follows it


class Environment(Protocol):
    """What answers the policy. One is made for each answer, by calling what the option names.

    Both methods get copies. Both may be async: the steps of a batch are then awaited together.
    """

    def reset(self, prompt: Text, **columns: Any) -> None:
        """An episode begins: the row's prompt and its other columns."""

    def step(self, messages: Text) -> tuple[Said, float, bool]:
        """(what is said to the policy, the reward of its turn, whether the episode is over).

        messages: the whole conversation, the policy's turn last; the whole text, where the prompt
        is text. A str that comes back is a message of the role `tool`, or more text.
        """


@dataclass
class Episode:
    """An answer of several turns, as it grows."""

    prompt: Prompt
    environment: Environment
    messages: Text  # prompt and turns
    rendered: str = ""  # of a conversation: its text when the policy was last asked
    tokens: list[int] = field(default_factory=list)  # behind the prompt
    own: list[bool] = field(default_factory=list)  # whether the policy chose them
    logps: list[float] = field(default_factory=list)
    sets: list[list[int]] = field(default_factory=list)
    earned: list[float] = field(default_factory=list)  # at each token
    turns: int = 0
    over: bool = False

    @property
    def reward(self) -> float:
        return sum(self.earned)

    @property
    def answer(self) -> Text:
        """All turns: text, or the messages behind the prompt's."""
        return self.messages[len(self.prompt.prompt) :]

    def add(self, ids: Sequence[int], own: bool, logps: Sequence[float] = (), sets=()) -> None:
        size = len(ids)
        self.tokens += ids
        self.own += [own] * size
        self.logps += list(logps) or [0.0] * size
        self.sets += list(sets) or [[]] * size
        self.earned += [0.0] * size

    def __str__(self) -> str:
        if isinstance(self.answer, str):
            return self.answer
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.answer)


def load_environment(config: PPOConfig, given: Given) -> Callable[[], Environment] | None:
    """What makes an environment, if the option names something: said before a model is loaded."""
    name = config.environment
    if name is None:
        return None
    make = given.get(name) or load_function(name, "environment")
    for method in ("reset", "step"):
        if isinstance(make, type) and not callable(getattr(make, method, None)):
            raise InputError(f"environment={name} has no method {method}")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise InputError(
            f"environment={name} cannot be made: {error}; expected a call without arguments"
        ) from None
    except ValueError:  # one of C has no signature to check
        pass
    return make


def with_environment(
    prompts: Sequence[Prompt], make: Callable[[], Environment] | None, policy: Policy, who: str
) -> None:
    """Each prompt is told what answers its turns, if anything does."""
    if make is None:
        return
    conversations = [p for p in prompts if not isinstance(p.prompt, str)]
    if any(p.prompt[-1]["role"] == "assistant" for p in conversations):
        raise InputError(f"{who}: a prompt ends in the assistant's own words, expected another's")
    if conversations:
        check_template(policy.tokenizer, who)
    for prompt in prompts:
        prompt.environment = make


def check_template(tokenizer: PreTrainedTokenizerBase, who: str) -> None:
    """A template that changes earlier turns when later ones come (one that takes the thoughts out,
    say) would show the policy another history than the one it is trained on."""
    thought = "<think>so</think>two"
    for role in ("tool", "user"):
        begun: Text = [{"role": "user", "content": "one"}]
        try:
            text = start(begun, tokenizer, who)[0]
            for _ in range(2):
                said = [{"role": role, "content": "three"}]
                text = behind(begun, thought, said, text, tokenizer, who)[1]
                begun = [*begun, {"role": "assistant", "content": thought}, *said]
            return
        except InputError:
            if role == "user":  # a template may know no tools
                raise


def behind(
    before: Text, answer: str, said: list[dict], rendered: str, tokenizer: Any, who: str
) -> tuple[str, str]:
    """(what a template puts behind an answer: its end, what is said to it, the next turn's
    beginning; the whole text). rendered: that of the conversation before the answer."""
    marked = [*before, {"role": "assistant", "content": MARK}, *said]
    text = render(marked, tokenizer, who, add_generation_prompt=True)
    head, found, tail = text.partition(MARK)
    real = [*before, {"role": "assistant", "content": answer}, *said]
    whole = render(real, tokenizer, who, add_generation_prompt=True)
    kept = {head + a + tail for a in (answer, answer.strip(), answer.lstrip(), answer.rstrip())}
    more = head.removeprefix(rendered)  # a space before an answer, which the policy may leave out
    if not found or more.strip() or whole not in kept:
        raise InputError(
            f"{who}: the chat template rewrites earlier turns when later ones come, so that the "
            "policy would be trained on another history than it sees: give the tokenizer a "
            "chat_template that keeps them"
        )
    return tail, whole


def play(
    policy: Policy,
    engine: RolloutEngine,
    prompts: list[Prompt],
    sampling: Sampling,
    draws: Tensor,
    *,
    max_turns: int,
    who: str,
) -> Rollout:
    """Episodes of at most max_new_tokens tokens behind their prompts, the environment's included.

    A turn ends with a stop token. An answer that is cut off, by its length or that of what is said
    to it, has not ended. Each token is drawn by the number of its place, as without turns.
    """
    device, steps = policy.model.device, sampling.max_new_tokens
    episodes = [begin(prompt, policy.tokenizer, who) for prompt in prompts]
    while live := [i for i, episode in enumerate(episodes) if not episode.over]:
        at = torch.tensor([len(episodes[i].tokens) for i in live])
        room = int(steps - at.min())
        rows, mask = pad([episodes[i].prompt.ids + episodes[i].tokens for i in live], side="left")
        places = (at[:, None] + torch.arange(room)) % steps  # those behind the end are cut off
        numbers = draws[torch.tensor(live)].gather(1, places.to(draws.device))
        done = ask(
            engine, policy.model, rows.to(device), mask.to(device),
            replace(sampling, max_new_tokens=room), numbers,
        )  # fmt: skip
        spoken = [i for row, i in enumerate(live) if speak(episodes[i], done, row, policy, steps)]
        for i, (said, reward, over) in zip(
            spoken, answered([episodes[i] for i in spoken], who), strict=True
        ):
            episode = episodes[i]
            episode.earned[-1] = reward
            episode.over = over or episode.turns == max_turns
            if not episode.over:
                listen(episode, said, policy, steps, who)
    truncated = sampling.truncates and done.support is not None
    answer = completions(
        [e.tokens for e in episodes],
        [e.logps for e in episodes],
        [e.sets for e in episodes] if truncated else None,
    )
    own, earned = torch.zeros_like(answer.mask), torch.zeros_like(answer.logp)
    for row, episode in enumerate(episodes):
        own[row, : len(episode.own)] = torch.tensor(episode.own)
        earned[row, : len(episode.earned)] = torch.tensor(episode.earned)
    answer = answer._replace(loss_mask=own, rewards=earned)
    ids, mask = (x.to(device) for x in pad([prompt.ids for prompt in prompts], side="left"))
    answer = Completions(*(None if x is None else x.to(device) for x in answer))
    rollout = put_behind(policy, ids, mask, sampling, answer)
    rollout.episodes = episodes
    return rollout


def begin(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, who: str) -> Episode:
    try:
        environment = prompt.environment()
        with named_if_slow(who):
            begun = environment.reset(copy.deepcopy(prompt.prompt), **copy.deepcopy(prompt.columns))
            if inspect.isawaitable(begun):
                awaited(begun)
    except Ended:  # a signal's
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise InputError(f"{who} cannot begin: {reason_of(error, prompt.environment)}") from error
    rendered = "" if isinstance(prompt.prompt, str) else start(prompt.prompt, tokenizer, who)[0]
    return Episode(prompt, environment, prompt.prompt, rendered)


def speak(episode: Episode, done: Completions, row: int, policy: Policy, steps: int) -> bool:
    """The policy's turn; whether it came to its end."""
    room = steps - len(episode.tokens)
    kept = done.mask[row]
    ids, logps = done.tokens[row][kept].tolist()[:room], done.logp[row][kept].tolist()[:room]
    sets: list[list[int]] = []
    if done.support is not None:
        sets = [[t for t in among if t >= 0] for among in done.support[row][kept].tolist()[:room]]
    episode.add(ids, True, logps, sets)
    episode.turns += 1
    text = policy.tokenizer.decode(ids, skip_special_tokens=True)
    if isinstance(episode.messages, str):
        episode.messages += text
    else:
        episode.messages = [*episode.messages, {"role": "assistant", "content": text}]
    ended = bool(ids) and ids[-1] in policy.stop_ids
    episode.over = not ended
    return ended


def answered(episodes: list[Episode], who: str) -> list[tuple[Said, float, bool]]:
    """What the environments make of the turns."""
    if not episodes:
        return []
    step = type(episodes[0].environment).step
    try:
        with named_if_slow(who):
            results = [e.environment.step(copy.deepcopy(e.messages)) for e in episodes]
            if any(map(inspect.isawaitable, results)):
                results = awaited(together(results))
    except Ended:  # a signal's
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise InputError(f"{who} raised {reason_of(error, step)}") from error
    return [
        checked(result, isinstance(episode.messages, str), who)
        for result, episode in zip(results, episodes, strict=True)
    ]


async def together(results: list[Any]) -> list[Any]:
    return await asyncio.gather(*(x if inspect.isawaitable(x) else known(x) for x in results))


async def known(result: Any) -> Any:
    return result


def checked(result: Any, is_text: bool, who: str) -> tuple[Said, float, bool]:
    """What a step returned, if it can be gone on from."""
    came = " ".join(repr(result).split())[:80]
    said, reward, over = result if isinstance(result, tuple) and len(result) == 3 else (None,) * 3
    kinds = isinstance(reward, Real) and isinstance(over, bool | int | np.bool_)
    if not kinds or not math.isfinite(reward):
        raise InputError(
            f"{who} returned {came} from step, expected (observation, a finite reward, whether it "
            "is over: true or false)"
        )
    messages = said if isinstance(said, list) else [said]
    if is_text:
        expected, fits = "text, as the prompt is text", isinstance(said, str)
    else:
        expected = "text, a message or a list of messages, each with role and content"
        fits = isinstance(said, str) or all(map(is_message, messages))
    if not (fits or over):  # nobody reads the last words
        raise InputError(f"{who} returned {came} from step: expected {expected}, to be said")
    return said, float(reward), bool(over)


def is_message(said: Any) -> bool:
    return isinstance(said, dict) and all(isinstance(said.get(k), str) for k in ("role", "content"))


def listen(episode: Episode, said: Said, policy: Policy, steps: int, who: str) -> None:
    """What is said to the policy comes behind its turn; an episode that has no room for that and
    an answer is over."""
    if isinstance(episode.messages, str):
        ids = tokenize(said, True, policy.tokenizer)
        messages: Text = episode.messages + said
        whole = ""
    else:
        if isinstance(said, str):
            said = {"role": "tool", "content": said}
        said = [said] if isinstance(said, dict) else said
        *before, answer = episode.messages
        tail, whole = behind(
            before, answer["content"], said, episode.rendered, policy.tokenizer, who
        )
        ids = tokenize(tail, True, policy.tokenizer)
        if ids[:1] == episode.tokens[-1:]:  # the end of a turn, which the policy has said itself
            ids = ids[1:]
        messages = [*episode.messages, *said]
    if len(episode.tokens) + len(ids) >= steps:
        episode.over = True
        return
    episode.add(ids, False)
    episode.messages, episode.rendered = messages, whole
