"""Tokenizers: read, given a pad that means nothing, held against the model they belong to."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.loading import resolve

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(name: str, *, field: str) -> PreTrainedTokenizerBase:
    source = resolve(name, field)
    if Path(source).is_dir() and not any(Path(source, f).exists() for f in TOKENIZER_FILES):
        raise InputError(f"{field}={name} has no tokenizer: save one there with save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{field}={name} has no tokenizer that can be read: {reason}") from error
    choose_pad(tokenizer)
    return tokenizer


def choose_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad that is not the eos where the tokenizer has one: saved models find their last token
    by it. Nothing here depends on it (see data.pad), so without one the eos stays."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    used = {tokenizer.eos_token, tokenizer.bos_token}
    spare = [token for token in tokenizer.all_special_tokens if token not in used]
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token


def check_vocabulary(tokenizer, model: PreTrainedModel, *, field: str, name: str) -> None:
    """The tokenizer may know fewer tokens than the model (padded embeddings), never more."""
    largest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{field}={name}: its tokenizer has another vocabulary than the model (token ids up "
            f"to {largest}, {rows} embeddings)"
        )


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the generation config may name several."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)
