"""Tokenizers: read, given a pad that means nothing, held against the model they belong to."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.loading import resolve, unreadable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(name: str, *, field: str, trust: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer as it was saved: nothing here needs a pad token (see data.pad), so it keeps the
    one it has, or goes without."""
    source = resolve(name, field)
    if Path(source).is_dir() and not any(Path(source, f).exists() for f in TOKENIZER_FILES):
        raise InputError(f"{field}={name} has no tokenizer: save one there with save_pretrained")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
    except Exception as error:  # tokenizers raises a bare one
        raise unreadable(field, name, "has no tokenizer that can be read", error) from error


PAD = re.compile(r"[<\[|]*(pad|padding|finetune_right_pad_id)[>\]|]*", re.IGNORECASE)
UNUSED = re.compile(r"[<\[|]*(reserved|unused)(_special_token)?_?\d+[>\]|]*", re.IGNORECASE)


def choose_pad(tokenizer: PreTrainedTokenizerBase, used: Collection[int] = ()) -> None:
    """A pad token that no text holds: readers of a saved reward model take the last token that is
    not the pad for a text's end, and score that.

    used: ids that texts are made of. Its own pad stays unless it has a meaning: ends or begins
    texts, stands in the chat template or in a text. Else it is a token that is there for nothing
    but padding or future use; else a new one.
    """
    named = {tokenizer.eos_token, tokenizer.bos_token}
    template = str(tokenizer.chat_template or "")

    def means_nothing(token: str) -> bool:
        number = tokenizer.convert_tokens_to_ids(token)
        return token not in named and token not in template and number not in used

    if tokenizer.pad_token is not None and means_nothing(tokenizer.pad_token):
        return
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    spare = [t for kind in (PAD, UNUSED) for t in added if kind.fullmatch(t) and means_nothing(t)]
    new = "<|pad|>"
    while new in tokenizer.get_vocab():
        new = f"<|{new.strip('<|>')}_|>"
    tokenizer.add_special_tokens({"pad_token": spare[0] if spare else new})


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
    if named is None:
        named = model.config.get_text_config(decoder=True).eos_token_id
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)
