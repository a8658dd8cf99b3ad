"""The value head, on the policy or on a critic of its own."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.loading import load_causal_lm, load_config, refuse_quantised
from rlhf_fast.trainer.models.reward_model import load_classifier
from rlhf_fast.trainer.models.tokenizer import load_tokenizer


def new_value_head(features: int, device: torch.device) -> nn.Linear:
    """Zero at first: no value, hence no advantage, is invented before something is learnt."""
    head = nn.Linear(features, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def load_critic(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    attention: str | None,
    *,
    trust: bool = False,
) -> tuple[PreTrainedModel, nn.Linear]:
    """(body, value head): a reward model's head is where values begin, another model's is new.

    A reward model's scores are normalised, and its head with them: values have that scale.
    """
    field = "value_model"
    theirs = load_tokenizer(name, field=field, trust=trust).get_vocab()
    # It may know more: `rlhf-fast reward` adds a pad to a tokenizer that has none.
    if any(theirs.get(token) != number for token, number in tokenizer.get_vocab().items()):
        raise InputError(
            f"{field}={name} has another tokenizer than the policy whose tokens it reads"
        )
    kwargs = {"field": field, "device": device, "trust": trust, "attn_implementation": attention}
    config = load_config(name, field=field, trust=trust)
    refuse_quantised(config, field, name)
    if "SequenceClassification" not in (config.architectures or [""])[0]:
        body = load_causal_lm(name, **kwargs).base_model
        return body, new_value_head(body.config.get_text_config().hidden_size, device)
    model = load_classifier(name, **kwargs)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise InputError(f"{field}={name} has no score head with one output on a decoder")
    head = new_value_head(model.score.in_features, device)
    mean, std = getattr(model.config, "score_mean", 0.0), getattr(model.config, "score_std", 1.0)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    return model.base_model, head
