"""A random Llama, a word-level tokenizer and prompts, so that the examples need no download."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

PROMPTS = ["the film was", "a very good plot and", "not a bad actor", "the plot is"]
VOCABULARY = 8000


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(" ".join(PROMPTS).split())]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",  # answers follow their prompts
    )  # fmt: skip


def config(**more: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, **more,
    )  # fmt: skip


def policy() -> LlamaForCausalLM:
    return LlamaForCausalLM(config())


def scorer() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(config(num_labels=1))
