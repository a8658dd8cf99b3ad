"""Reward models: a language model with a head on its last token, or a classifier of any kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_fast.trainer.data.rows import pad
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.loading import (
    load_config,
    load_model,
    made_ready,
    refuse_quantised,
)
from rlhf_fast.trainer.models.tokenizer import check_vocabulary, load_tokenizer
from rlhf_fast.trainer.models.trunk import top_slice


def new_reward_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable_layers: int | None,
    seed: int,
    device: torch.device,
    trust: bool = False,
    loaded: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A language model with a Linear(H, 1) on its last token; the head's std is 1/√(H+1).

    loaded: a classifier that stands for `name`, with the head it has."""
    torch.manual_seed(seed)  # the head below is the only thing drawn
    if loaded is None:
        refuse_quantised(load_config(name, field="model", trust=trust), "model", name)
        model = load_model(
            AutoModelForSequenceClassification, name,
            field="model", device=device, trust=trust, num_labels=1, new_head=True,
        )  # fmt: skip
    else:
        model = made_ready(loaded, device, name)
        if model.config.num_labels != 1:
            raise InputError(
                f"model={name} has {model.config.num_labels} labels, expected one: num_labels=1"
            )
        model.new_head = False
    if not hasattr(model, "score"):
        raise InputError(
            f"model={name} ({type(model).__name__}) is not a decoder: its score is not a Linear "
            "on the last token"
        )
    make_room(model, tokenizer)
    check_vocabulary(tokenizer, model, field="model", name=name)
    if model.new_head:  # else it is trained on
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.config.score_mean, model.config.score_std = 0.0, 1.0  # raw scores, until trained
    for config in (model.config, model.config.get_text_config()):  # of a wrapper: the latter counts
        config.pad_token_id = tokenizer.pad_token_id
    if trainable_layers is not None:
        top = top_slice(model.base_model, trainable_layers, name)
        model.requires_grad_(False)
        for part in (top.layers, top.norm, model.score):
            part.requires_grad_(True)
    return model


@torch.no_grad()
def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """An embedding for a pad token that is new (see tokenizer.choose_pad): zero, and never read."""
    rows = model.get_input_embeddings().weight.size(0)
    if tokenizer.pad_token_id == rows:
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
        model.get_input_embeddings().weight[rows] = 0


def load_classifier(name: str, *, field: str, **kwargs) -> PreTrainedModel:
    """A sequence classifier. Where the config does not say how many labels it has (transformers
    then takes it for two), its score head does: OpenRLHF's reward models."""
    model = load_model(
        AutoModelForSequenceClassification, name, field=field, new_head=True, **kwargs
    )
    if model.new_head:
        labels = 1 if model.config.num_labels == 2 else model.config.num_labels
        model = load_model(
            AutoModelForSequenceClassification, name, field=field, num_labels=labels, **kwargs
        )
    return model


def load_reward_model(
    name: str, *, field: str, device: torch.device, trust: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with its tokenizer. `folder#label` names a label of one with several;
    its number is put into the model's config as `score_label`."""
    folder, _, label = name.partition("#")
    tokenizer = load_tokenizer(folder, field=field, trust=trust)
    model = load_classifier(folder, field=field, device=device, trust=trust)
    check_vocabulary(tokenizer, model, field=field, name=folder)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if label and label not in labels or not label and len(labels) > 1:
        raise InputError(
            f"{field}={name} gives {len(labels)} scores, expected one: name it as "
            + " or ".join(f"{folder}#{each}" for each in labels[:8])
        )
    model.config.score_label = labels.index(label) if len(labels) > 1 else None
    return model.requires_grad_(False), tokenizer


def one_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device,
    *, field: str, name: str,
) -> PreTrainedModel:  # fmt: skip
    """A classifier that was loaded by a program, as load_reward_model gives it, in its dtype."""
    check_vocabulary(tokenizer, model, field=field, name=name)
    labels = model.config.num_labels
    if labels != 1 and getattr(model.config, "score_label", None) is None:
        raise InputError(f"{field}={name} gives {labels} scores, expected one: num_labels=1")
    model.eval()
    return model if model.device == device else model.to(device)


def score_tokens(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Raw score [B] of ids [B, T], mask [B, T], padded on the right: the head on the last real
    token's hidden state.

    The position comes from the mask: a model that looks for its pad id instead takes the wrong
    token when a text ends in it. Of several labels it is the log-odds of the one that
    load_reward_model was asked for, log p/(1 − p), which a single score is already.
    """
    if hasattr(model, "score"):
        hidden = model.base_model(ids, attention_mask=mask.long(), use_cache=False)[0]
        return score_hidden(model, hidden, mask)
    # Encoders have a head of their own on their first token.
    return chosen_score(model, model(ids, attention_mask=mask.long()).logits)


def score_hidden(model: PreTrainedModel, hidden: Tensor, mask: Tensor) -> Tensor:
    """Raw score [B] of final hidden states [B, T, H], mask [B, T]."""
    last = mask.size(1) - 1 - mask.flip(1).long().argmax(1)
    return chosen_score(
        model, model.score(hidden[torch.arange(len(mask), device=mask.device), last])
    )


def chosen_score(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """[B, labels] -> [B] float32."""
    logits, label = logits.float(), getattr(model.config, "score_label", None)
    if label is None:
        return logits.squeeze(-1)
    if model.config.problem_type == "multi_label_classification":  # a sigmoid for each label
        return logits[:, label]
    others = [i for i in range(logits.size(1)) if i != label]
    return logits[:, label] - logits[:, others].logsumexp(-1)


@torch.no_grad()
def score_texts(model: PreTrainedModel, rows: list[list[int]], *, batch_size: int = 64) -> Tensor:
    """Normalised scores [N] of token rows: by the mean and std that training stored."""
    mean = getattr(model.config, "score_mean", 0.0)
    std = getattr(model.config, "score_std", 1.0)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths: little padding
    scores = torch.empty(len(rows))
    for at in range(0, len(order), batch_size):
        chunk = order[at : at + batch_size]
        ids, mask = pad([rows[i] for i in chunk], side="right")
        ids, mask = ids.to(model.device), mask.to(model.device)
        scores[chunk] = score_tokens(model, ids, mask).cpu()
    return (scores - mean) / std
