"""Tiny models and data, built on the spot: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = ["good", "bad", "film", "plot", "the", "a", "is", "was", "very", "not", "and", "actor"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


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
def tiny_reward_folder(tmp_path_factory, tiny_tokenizer, tiny_config) -> str:
    """A random reward model with its tokenizer."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reward")
    tiny_config.num_labels = 1
    LlamaForSequenceClassification(tiny_config).save_pretrained(folder)
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

    from rlhf_fast.ops.registry import KERNELS

    class Inside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.split("::")[1]
            if func.namespace == "rlhf_fast" and KERNELS[name].triton is None:
                with self:
                    return KERNELS[name].fallback(*args)
            return func(*args, **(kwargs or {}))

    return Inside()
