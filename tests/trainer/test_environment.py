"""Answers of several turns: what the policy is shown, what counts, and where rewards go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.advantages import estimate
from rlhf_fast.trainer.data.rows import Prompt
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.measure import Measured, measure
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout.environment import check_template, play
from rlhf_fast.trainer.rollout.protocol import Completions, Sampling
from rlhf_fast.trainer.rollout.sample import EmbeddedEngine
from rlhf_fast.trainer.run.folder import read_metrics

CPU = torch.device("cpu")
ASK = [{"role": "user", "content": "film"}]
GOOD, BAD, END = 3, 4, 1  # of tiny_tokenizer


@pytest.fixture
def policy(tiny_policy_folder):
    return load_policy(tiny_policy_folder, trainable_layers=None, device=CPU)


class Echo:
    """Says two words after each turn, three times; pays for each turn its number."""

    seen: ClassVar[list] = []

    def reset(self, prompt, **columns):
        self.turn = 0

    def step(self, messages):
        self.seen.append(copy.deepcopy(messages))
        self.turn += 1
        if isinstance(messages, str):
            return " the plot", float(self.turn), self.turn == 3
        messages.clear()  # it is the environment's own copy
        return {"role": "user", "content": "the plot"}, float(self.turn), self.turn == 3


def scripted(*turns):
    """An engine that says these tokens, turn by turn."""
    left = list(turns)

    class Scripted(EmbeddedEngine):
        asked: ClassVar[list] = []

        def draw(self, ids, mask, sampling, draws):
            self.asked.append([row[real].tolist() for row, real in zip(ids, mask, strict=True)])
            tokens = torch.tensor(left.pop(0))[None].expand(len(ids), -1)
            return Completions(
                tokens, torch.ones_like(tokens).bool(), torch.full(tokens.shape, -1.0)
            )

    Scripted.asked = []
    return Scripted


def played(policy, engine, prompts, steps=40, max_turns=8, environment=Echo, **sampling):
    prompts = [Prompt(ids, text, {}, environment) for ids, text in prompts]
    Echo.seen = []
    draws = torch.rand(len(prompts), steps)
    sampling = Sampling(steps, 1.0, [END], **sampling)
    return play(policy, engine, prompts, sampling, draws, max_turns=max_turns, who="environment=e")


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_each_turn_sees_all_before_it(policy, tiny_tokenizer):
    """The policy's tokens as it chose them, its end included; the template's words between."""
    engine = scripted([GOOD, END], [BAD, BAD, END], [GOOD, END])(policy)
    asked = ids_of(tiny_tokenizer, "user film assistant")
    rollout = played(policy, engine, [(asked, ASK)])
    between = ids_of(tiny_tokenizer, "user the plot assistant")
    first = [*asked, GOOD, END, *between]
    assert engine.asked == [[asked], [first], [[*first, BAD, BAD, END, *between]]]
    answer = [GOOD, END, *between, BAD, BAD, END, *between, GOOD, END]
    own = [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert rollout.labels[0].tolist() == answer and rollout.mask[0].int().tolist() == own
    assert rollout.attention.all() and rollout.ended.all()
    earned = [0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 3]
    assert rollout.rewards[0].tolist() == earned and rollout.episodes[0].reward == 6
    assert rollout.logp[0].tolist() == [-float(x) for x in own]
    assert [m["content"] for m in Echo.seen[2]] == [
        "film", "good", "the plot", "bad bad", "the plot", "good",
    ]  # fmt: skip


def test_the_end_of_a_turn_is_there_once(tiny_policy_folder, tiny_tokenizer):
    """A template that writes it, too, puts none beside the policy's own."""
    policy = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU)
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}assistant"
    )
    asked = ids_of(tiny_tokenizer, "user film <eos> assistant")
    rollout = played(policy, scripted([GOOD, END], [BAD, END])(policy), [(asked, ASK)], max_turns=2)
    between = ids_of(tiny_tokenizer, "user the plot <eos> assistant")
    assert rollout.labels[0].tolist() == [GOOD, END, *between, BAD, END]


def test_text_goes_on_as_text(policy, tiny_tokenizer):
    engine = scripted([GOOD, END], [BAD, END])(policy)
    rollout = played(policy, engine, [([5], "film")], max_turns=2)
    the_plot = ids_of(tiny_tokenizer, "the plot")
    assert rollout.labels[0].tolist() == [GOOD, END, *the_plot, BAD, END]
    assert Echo.seen[0] == "filmgood" and rollout.episodes[0].answer == "good the plotbad"


def test_numbers_of_numpy_and_last_words_that_nobody_reads(policy, tiny_tokenizer):
    class Ends(Echo):
        def step(self, messages):
            return None, np.float32(0.5), np.bool_(True)

    asked = [(ids_of(tiny_tokenizer, "user film assistant"), ASK)]
    rollout = played(policy, scripted([GOOD, END])(policy), asked, environment=Ends)
    assert rollout.rewards[0].tolist() == [0, 0.5]


def test_turns_that_do_not_fit(policy, tiny_tokenizer):
    """Cut off at max_new_tokens; what is said and leaves no room for an answer is not said."""
    asked = [(ids_of(tiny_tokenizer, "user film assistant"), ASK)]
    rollout = played(policy, scripted([GOOD, GOOD, BAD])(policy), asked, steps=2)
    assert rollout.labels[0].tolist() == [GOOD, GOOD] and not rollout.ended.any()
    assert not Echo.seen  # an unfinished turn is nobody's
    rollout = played(policy, scripted([GOOD, END])(policy), asked, steps=6)
    assert rollout.labels[0].tolist() == [GOOD, END] and rollout.rewards[0].tolist() == [0, 1]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}])
def test_log_probs_are_those_of_the_whole_episode(policy, configured, tiny_tokenizer, options):
    """As sampled, turn by turn, and as measured in one pass over context and answers."""
    asked = [(ids_of(tiny_tokenizer, f"user {x} assistant"), ASK) for x in ("film", "the plot")]
    rollout = played(policy, EmbeddedEngine(policy), asked * 4, **options)
    measured = measure(policy, rollout, configured(**options))
    mask = rollout.mask
    assert mask.any() and (rollout.attention[:, rollout.prompt_length :] & ~mask).any()
    torch.testing.assert_close(measured.logp[mask], rollout.logp[mask], atol=1e-4, rtol=1e-4)


def test_rewards_of_turns_stand_at_their_ends(configured):
    """With γ = λ = 1 and no values, an advantage is what is still to be earned."""
    mask = torch.tensor([[1, 1, 0, 1, 1]]).bool()
    zeros = torch.zeros(1, 5)
    old = Measured(zeros, zeros, zeros, zeros)
    config = configured(environment="e:f", reward=["environment"], lam=1.0, gamma=1.0)
    config.whiten_advantages = False
    earned = torch.tensor([[0.0, 2.0, 0.0, 0.0, 3.0]])
    for given, expected in ((None, [[5.0, 5, 0, 5, 5]]), (earned, [[5.0, 5, 0, 3, 3]])):
        advantages, _ = estimate(torch.tensor([5.0]), old, mask, 0.1, config, earned=given)
        assert advantages.masked_fill(~mask, 0).tolist() == expected


THOUGHTLESS = (
    "{% for m in messages %}{{ m.role }} "
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TRIMS = "{% for m in messages %}{{ m.role }} {{ m.content | trim }} {% endfor %}assistant "
NO_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}assistant "
)


def test_templates_that_rewrite_history_are_refused(tiny_tokenizer, configured, monkeypatch):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    for template in (tokenizer.chat_template, TRIMS, NO_TOOLS):
        tokenizer.chat_template = template
        check_template(tokenizer, "environment=e")
    tokenizer.chat_template = THOUGHTLESS
    with pytest.raises(InputError, match="environment=e: the chat template rewrites earlier turn"):
        check_template(tokenizer, "environment=e")


FILE = """
class Asks:
    def reset(self, prompt, number, **columns):
        self.number = number
    async def step(self, messages):
        said = messages[-1]["content"].split()
        return "the plot", said.count("good") / max(1, len(said)), len(messages) > 3

class Silent:
    def reset(self, prompt, **columns): pass

class Raises(Asks):
    async def step(self, messages):
        raise KeyError("x")

class Exits(Asks):
    def step(self, messages):
        raise SystemExit("bye")

class Needs(Asks):
    def __init__(self, seed): pass

class Wrong(Asks):
    def step(self, messages):
        return "the plot"

class Five(Asks):
    def step(self, messages):
        return "the plot", 0.0, False, False, {}

class NaN(Asks):
    def step(self, messages):
        return "the plot", float("nan"), False

class Says(Asks):
    def step(self, messages):
        return "the plot", 0.0, "no"

class Nothing(Asks):
    def step(self, messages):
        return None, 0.0, False

class NoRole(Asks):
    async def step(self, messages):
        return [{"content": "the plot"}], 0.0, False

class Late(Asks):
    async def reset(self, prompt, **columns):
        raise KeyError("late")

def also(prompts, completions, environment, **columns):
    assert all(c[-1]["role"] == "assistant" for c in completions)
    return [x / 2 for x in environment]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "asks.py").write_text(FILE)
    return tmp_path / "asks.py"


def test_a_run(configured, file, starts):
    rows = [
        {"prompt": [{"role": "user", "content": p}], "number": i} for i, p in enumerate(starts * 8)
    ]
    options = {"max_new_tokens": 24, "steps": 2, "missing_eos_penalty": 0.0}
    config = configured(
        prompts=rows, environment=f"{file}:Asks", reward=["environment", f"{file}:also"], **options
    )
    summary = ppo.train(config)
    row = read_metrics(Path(config.output_dir) / "metrics.jsonl")[-1]
    assert row["objective/scores"] == pytest.approx(1.5 * row["objective/scores/environment"])
    assert row["val/rollout_ratio_max"] < 1.001 and "score_after" in summary
    answers = (Path(config.output_dir) / "after.json").read_text()
    assert "tool: the plot" in answers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Silent", "Silent has no method step"),
        ("Needs", "cannot be made: missing a required argument: 'seed'"),
        ("none", "has no function none"),
    ],
)
def test_it_is_refused_before_a_model_is_loaded(configured, file, monkeypatch, name, message):
    monkeypatch.setattr(ppo, "load_models", None)
    with pytest.raises(InputError, match=message):
        ppo.train(configured(environment=f"{file}:{name}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "{file}:Raises"}, r"Raises raised KeyError: 'x' \(.*asks.py, line 14\)"),
        ({"environment": "{file}:Wrong"}, "returned 'the plot' from step, expected .observation"),
        ({"environment": "{file}:Five"}, "returned .'the plot', 0.0, False, False, .* from step"),
        ({"environment": "{file}:NaN"}, "returned .'the plot', nan, False. from step, expected"),
        ({"environment": "{file}:Says"}, "returned .'the plot', 0.0, 'no'. from step, .* true or"),
        ({"environment": "{file}:Nothing"}, "returned .None, 0.0, False. from step: .* a message"),
        ({"environment": "{file}:NoRole"}, "from step: expected text, .* with role and content"),
        ({"environment": "{file}:Late"}, "Late cannot begin: KeyError: 'late'"),
        ({"environment": "{file}:Exits"}, r"Exits raised SystemExit: bye \(.*asks.py, line 18\)"),
        ({"reward": ["environment"]}, "there is no environment that gives rewards"),
        ({"environment": "{file}:Asks", "estimator": "remax"}, "contradict each other: remax"),
        ({"environment": "{file}:Asks", "max_turns": 0}, "max_turns=0: expected .* at least 1"),
    ],
)
def test_what_cannot_be_an_environment(configured, file, options, message):
    options = {k: v.format(file=file) if isinstance(v, str) else v for k, v in options.items()}
    rows = [{"prompt": ASK, "number": 1}] * 40
    with pytest.raises(InputError, match=message):
        ppo.train(configured(prompts=rows, eval_prompts=4, max_new_tokens=16, **options))
