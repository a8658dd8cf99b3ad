"""What a model does of its own to its logits, after the head.

Names differ from family to family, and sit in the text model's config where a wrapper is around it.
policy.check_architecture holds what is read here against the model itself.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere and MPT; Falcon-H1


def softcap(model: PreTrainedModel) -> float | None:
    """Gemma 2 and its kind bend their logits: cap·tanh(logits/cap)."""
    return first_number(model, SOFTCAPS)


def logit_divisor(model: PreTrainedModel) -> float:
    """Granite divides its logits and Cohere multiplies them: a temperature of the model's own."""
    divisor = first_number(model, ("logits_scaling",)) or 1.0
    return divisor / (first_number(model, MULTIPLIERS) or 1.0)


def first_number(model: PreTrainedModel, names: tuple[str, ...]) -> float | None:
    config = model.config.get_text_config(decoder=True)
    values: list[Any] = [getattr(config, name, None) for name in names]
    return next((x for x in values if isinstance(x, int | float) and not isinstance(x, bool)), None)
