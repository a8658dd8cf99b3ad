"""Models that a program has loaded: trained or asked here, then given back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


class Before:
    """How a model was: its modes, dtypes, device, what of it learns; not its weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.attention = model.config._attn_implementation
        self.training = [(module, module.training) for module in model.modules()]
        self.parameters = [(p, p.dtype, p.requires_grad) for p in model.parameters()]
        self.buffers = [
            (module, name, buffer.dtype)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def again(self) -> None:
        if self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)
        self.model.to(self.device)
        for p, dtype, learns in self.parameters:
            p.grad = None
            p.data = p.data.to(dtype)
            p.requires_grad_(learns)
        for module, name, dtype in self.buffers:
            module._buffers[name] = module._buffers[name].to(dtype)
        self.model.train(self.training[0][1])  # adapters that were added, too
        for module, training in self.training:
            module.training = training


@contextmanager
def lent(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Afterwards they are as they were, but for the weights that were trained (rounded to the dtype
    they came in) and adapters that were added, also where the training ends in an error."""
    before = [Before(model) for model in models]
    try:
        yield
    finally:
        for state in reversed(before):
            state.again()
