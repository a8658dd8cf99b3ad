"""The policy with its value head, and the frozen reference.

All are models of transformers. Dropout is off in every one of them: log-probs of the same tokens
under the same weights must be the same number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.trainer.distributed.fsdp import Sharded, gathered
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.attention import (
    has_flash_attention,
    pick_packing,
    use_flash_attention,
)
from rlhf_fast.trainer.models.critic import load_critic, new_value_head
from rlhf_fast.trainer.models.loading import (
    check_causal_lm,
    load_causal_lm,
    made_ready,
    source_dtype,
)
from rlhf_fast.trainer.models.logits import logit_divisor, softcap
from rlhf_fast.trainer.models.lora import LoRA, add_adapters, merged
from rlhf_fast.trainer.models.packing import final_hidden
from rlhf_fast.trainer.models.saving import save_model
from rlhf_fast.trainer.models.tokenizer import check_vocabulary, load_tokenizer, stop_tokens
from rlhf_fast.trainer.models.trunk import frozen_copy, top_slice, trunk_recorder


@dataclass
class Policy:
    """A causal LM that is trained, its critic, and the frozen reference beside it.

    `body` maps tokens to final hidden states. When only the top layers train it is just those
    layers, on hidden states of the trunk below (`trunk_layers` > 0): the trunk is the same for
    policy, value head and reference, so a rollout computes it once, for every epoch and all three.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    body: nn.Module
    value_head: nn.Linear | None  # None: the advantages need no critic
    value_body: PreTrainedModel | None  # a critic of its own; None: its head sits on `body`
    reference_model: nn.Module | None  # body of the frozen copy; None: `body` without adapters
    reference_head: nn.Module
    trunk_layers: int
    stop_ids: list[int]
    save_dtype: torch.dtype = torch.float32  # what `save` rounds the weights to
    bf16: bool = False  # forward passes in bfloat16, by autocast
    packed: bool = False  # forward passes over whole answers go without padding (packing.py)
    exact_decoding: bool = False  # see rollout.decodes_exactly

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def precision(self) -> torch.autocast:
        """To be left before the weights change: autocast keeps what it has cast."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The body whose log-probs the KL is taken from."""
        if self.reference_model is not None:
            yield self.reference_model
            return
        self.model.disable_adapters()
        try:
            yield self.body
        finally:
            self.model.enable_adapters()

    def trained(self) -> dict[str, Tensor]:
        """What a checkpoint holds: every parameter that learns."""
        named = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        return named | self.critic()

    def critic(self) -> dict[str, Tensor]:
        """The part of them that learns values."""
        parts = {"value_model": self.value_body, "value_head": self.value_head}
        return {
            f"{name}.{k}": p
            for name, part in parts.items()
            if part is not None
            for k, p in part.named_parameters()
        }

    def whole(self) -> AbstractContextManager:
        """Where the model can be called in any way: a sharded one has all its weights there."""
        return self.body.whole() if isinstance(self.body, Sharded) else nullcontext()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What `save` writes; under FSDP still in shards."""
        parts = {"model": self.model, "value_model": self.value_body, "value_head": self.value_head}
        return {
            name: part.state_dict(keep_vars=True)
            for name, part in parts.items()
            if part is not None
        }

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's, one by one and whole, under the names that `save` gives them; adapters are
        merged. Under FSDP all processes must ask."""
        state = self.model.state_dict(keep_vars=True)
        if self.reference_model is None:
            state = merged(self.model, gathered(state)).state_dict(keep_vars=True)
        for name, weight in state.items():
            yield name, gathered(weight)

    def save(
        self, folder: Path, state: dict[str, dict[str, Tensor]], card: ModelCard | None = None
    ) -> None:
        """The policy as transformers reads it, adapters merged; value head and card beside it."""
        if self.reference_model is not None:
            save_model(self.model, folder, state["model"], self.save_dtype)
        else:
            whole = merged(self.model, state["model"])
            save_model(whole, folder, whole.state_dict(keep_vars=True), self.save_dtype)
        self.tokenizer.save_pretrained(folder)
        if self.value_head is not None:
            save_file(state["value_head"], folder / "value_head.safetensors")
        if card is not None:
            card.save(folder / "README.md")

    def save_critic(self, folder: Path, state: dict[str, dict[str, Tensor]]) -> None:
        """The body of a critic of its own."""
        save_model(self.value_body, folder, state["value_model"], self.save_dtype)


def load_policy(
    name: str,
    *,
    trainable_layers: int | None,
    device: torch.device,
    critic: bool = True,
    value_model: str | None = None,
    lora: LoRA | None = None,
    attn_implementation: str | None = None,
    bf16: bool = False,
    packing: bool | None = None,
    save_dtype: str | None = None,
    trust: bool = False,
    loaded: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Policy:
    """save_dtype: None keeps the dtype of the source. trust: run Python code that it brings.
    loaded, tokenizer: what stands for `name`, if it is there already."""
    flash = has_flash_attention(device)
    if attn_implementation == "flash_attention_2" and not flash:
        where = (
            "flash-attn is not installed" if device.type == "cuda" else f"not on device={device}"
        )
        raise InputError(f"attn_implementation={attn_implementation}: {where}")
    if tokenizer is None:
        tokenizer = load_tokenizer(name, field="model", trust=trust)
    if loaded is None:
        source = source_dtype(name, field="model", trust=trust)
        model = load_causal_lm(name, device, trust=trust, attn_implementation=attn_implementation)
    else:
        source, model = loaded.dtype, made_ready(loaded, device, name, attn_implementation)
        check_causal_lm(model, "model", name)
    check_vocabulary(tokenizer, model, field="model", name=name)
    prefer_flash = flash and bf16 and attn_implementation is None
    if prefer_flash:
        use_flash_attention(model)
    base = model.base_model

    body, trunk_layers, reference, reference_head = base, 0, None, model.get_output_embeddings()
    if lora is not None:
        add_adapters(model, lora)
    elif trainable_layers is not None:
        body = top_slice(base, trainable_layers, name)
        trunk_layers = len(base.layers) - trainable_layers
        model.requires_grad_(False)
        body.layers.requires_grad_(True)
        body.norm.requires_grad_(True)
        reference = frozen_copy(body)
    else:
        copied = copy.deepcopy(model).requires_grad_(False)
        reference, reference_head = copied.base_model, copied.get_output_embeddings()

    value_body = value_head = None
    if value_model is not None:
        value_body, value_head = load_critic(
            value_model, tokenizer, device, attn_implementation, trust=trust
        )
        if prefer_flash:
            use_flash_attention(value_body)
    elif critic:
        value_head = new_value_head(model.get_output_embeddings().in_features, device)

    policy = Policy(
        model,
        tokenizer,
        body,
        value_head,
        value_body,
        reference,
        reference_head,
        trunk_layers,
        stop_tokens(model, tokenizer),
        getattr(torch, save_dtype) if save_dtype else source,
        bf16,
    )
    with policy.precision():  # flash attention has no float32
        check_architecture(policy, name)
        bodies = {f"model={name}": base}
        if value_body is not None:
            bodies[f"value_model={value_model}"] = value_body
        policy.packed = pick_packing(packing, bodies)
    return policy


@torch.no_grad()
def check_architecture(policy: Policy, name: str) -> None:
    """Layers cut off and a head applied by hand must give the model's own logits, and padding must
    change nothing.

    They do not where a model does something of its own to either; better to know now than to train
    on log-probs of another distribution.
    """
    who = f"model={name} ({type(policy.model).__name__})"
    cut = " with trainable_layers" if policy.trunk_layers else ""
    device = policy.model.device
    ids = torch.arange(8, device=device)[None] % policy.model.get_input_embeddings().weight.size(0)
    try:
        with trunk_recorder(policy.model, policy.trunk_layers) as recorded:
            expected = policy.model(ids, use_cache=False).logits
        given = {"inputs_embeds": recorded[0]} if policy.trunk_layers else {"input_ids": ids}
        hidden = policy.body(**given, use_cache=False).last_hidden_state
        logits = policy.head(hidden)
        if (cap := softcap(policy.model)) is not None:
            logits = cap * torch.tanh(logits / cap)
        logits = logits / logit_divisor(policy.model)
        same = torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)
        rows = torch.cat([torch.cat([ids[:, :5], ids], 1), ids.roll(1, 1).repeat(1, 2)[:, :13]])
        mask = torch.ones_like(rows, dtype=torch.bool)
        mask[0, :5] = False  # left, as prompts are
        base = policy.model.base_model
        alone = base(ids, use_cache=False).last_hidden_state[0]
        padded = final_hidden(base, mask, packed=False, input_ids=rows)[0, 5:]
    except Exception as error:  # whatever a family's own code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{who} cannot be trained here{cut}: {reason}") from error
    if not same:
        raise InputError(f"{who} computes its logits in a way that is not supported{cut}")
    if not close(padded, alone, policy.bf16):
        raise InputError(
            f"{who} reads padding as text: prompts of several lengths in one batch are not "
            "supported by it"
        )


def close(a: Tensor, b: Tensor, bf16: bool) -> bool:
    """Whether hidden states are equal but for rounding (bfloat16's is 0.005 in SmolLM2-135M)."""
    return bool((a - b).norm() <= (0.05 if bf16 else 1e-3) * b.norm())
