"""Tiny models and data, built on the spot: nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = ["good", "bad", "film", "plot", "the", "a", "is", "was", "very", "not", "and", "actor"]
STARTS = ["the film", "a plot is", "the actor was", "film", "is the plot"]

# Share of "good" among the answer's words: real, and learnable in seconds.
REWARD = """
import os, signal
from pathlib import Path

def share(prompts, completions, **columns):
    return [c.split().count("good") / max(1, len(c.split())) for c in completions]

def negative(prompts, completions, **columns):
    return [-x for x in share(prompts, completions)]

def three(prompts, completions, **columns):
    return [3.0] * len(prompts)

def number(prompts, completions, number, **columns):
    return number

def conversation(prompts, completions, **columns):
    assert all(p[-1]["role"] == "user" for p in prompts)
    assert all(c[0]["role"] == "assistant" for c in completions)
    return share(prompts, [c[0]["content"] for c in completions])

calls = 0

def fails_later(prompts, completions, **columns):
    global calls
    calls += 1
    scores = share(prompts, completions)
    if calls == 6:
        scores[2] = float("nan")
    return scores

def killed(prompts, completions, **columns):
    file = Path(os.environ["KILL_AFTER"])
    left = int(file.read_text())
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    file.write_text(str(left - 1))
    return share(prompts, completions)

def nan(prompts, completions, **columns):
    return [0.0, 1.0, float("nan")] + [0.0] * (len(prompts) - 3)

def none(prompts, completions, **columns):
    return [None] * len(prompts)

def short(prompts, completions, **columns):
    return [1.0]

def wrong(prompts, completions, **columns):
    return 3.0

not_a_function = 3
"""

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(autouse=True)
def own_draws():
    """What a test draws does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)
    random.seed(0)


def threads(count):
    """A fixture: torch's threads in a test."""

    @pytest.fixture
    def given():
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(count)
        yield
        torch.set_num_threads(before)

    return given


# `make test` gives a process one thread; the kernels share their work out over two.
two_threads = threads(2)
# For thousands of tiny calls: waking a second thread for each costs more than it computes.
one_thread = threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token a word; ids: <pad> 0, <eos> 1, <unk> 2, then WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *WORDS, "user", "assistant"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template=CHAT,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_policy_folder(tmp_path_factory, tiny_tokenizer, tiny_config) -> str:
    """A random Llama with its tokenizer, as `--model` takes it."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy")
    LlamaForCausalLM(tiny_config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory, tiny_tokenizer, tiny_config) -> str:
    """The same with a head that is not the embedding."""
    import copy

    import torch
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(tiny_config)
    config.tie_word_embeddings = False
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("untied")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_reward_folder(tmp_path_factory, tiny_tokenizer, tiny_config) -> str:
    """A random reward model with its tokenizer."""
    import copy

    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reward")
    config = copy.deepcopy(tiny_config)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(rows, name) -> path of the file, as a string."""

    def write(rows: list[dict], name: str = "data.jsonl") -> str:
        path = Path(tmp_path) / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def inside():
    """Runs the engine's Python under the active modes, instead of as one opaque op."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from rlhf_fast.ops.linear import chunks as linear
    from rlhf_fast.ops.registry import KERNELS

    linear._memory.clear()  # memory that an earlier, larger call left

    class Inside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.split("::")[1]
            if func.namespace == "rlhf_fast" and KERNELS[name].engine:
                with self:
                    return KERNELS[name].fallback(*args)
            return func(*args, **(kwargs or {}))

    return Inside()


@pytest.fixture
def starts() -> list[str]:
    return STARTS


@pytest.fixture
def reward(tmp_path):
    """reward("name") -> the spec of a function of REWARD."""
    (tmp_path / "my_reward.py").write_text(REWARD)
    return lambda name: f"{tmp_path / 'my_reward.py'}:{name}"


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """A run's plot is an empty file: drawing it takes half of a tiny run's time."""
    monkeypatch.setattr("rlhf_fast.trainer.ppo.plot", lambda rows, path: path.touch())


@pytest.fixture
def configured(undrawn, write_jsonl, tiny_policy_folder, tmp_path, reward):
    """configured("folder", **options) -> a PPOConfig that trains a tiny model in seconds."""
    from rlhf_fast.trainer.config import PPOConfig

    def make(output: str = "out", prompts: list | None = None, **options):
        rows = [{"prompt": p, "number": float(i)} for i, p in enumerate(STARTS * 8)]
        data = write_jsonl(rows if prompts is None else prompts, f"{output}.jsonl")
        defaults = {
            "model": tiny_policy_folder, "data": data, "reward": reward("share"), "steps": 4,
            "batch_size": 16, "minibatches": 2, "epochs": 2, "max_new_tokens": 6,
            "eval_prompts": 8, "learning_rate": 3e-3, "value_learning_rate": 1e-2,
            "missing_eos_penalty": 0.0, "device": "cpu", "output_dir": str(tmp_path / output),
        }  # fmt: skip
        return PPOConfig(**(defaults | options))

    return make
