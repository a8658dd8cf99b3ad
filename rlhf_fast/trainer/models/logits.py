"""What a model does of its own to its logits, after the head."""

from __future__ import annotations

from transformers import PreTrainedModel


def softcap(model: PreTrainedModel) -> float | None:
    """Gemma 2 and its kind bend their logits: cap·tanh(logits/cap)."""
    return getattr(model.config, "final_logit_softcapping", None)


def logit_divisor(model: PreTrainedModel) -> float:
    """Granite divides its logits and Cohere multiplies them: a temperature of the model's own."""
    config = model.config.get_text_config()
    return getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)
