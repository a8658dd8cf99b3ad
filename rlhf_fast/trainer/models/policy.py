"""The policy with its value head, the frozen reference, and the reward model.

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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from rlhf_fast.trainer.data.rows import pad
from rlhf_fast.trainer.distributed.fsdp import Sharded
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.packing import can_pack

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


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

    def save(self, folder: Path, state: dict[str, dict[str, Tensor]]) -> None:
        """The policy as transformers reads it, adapters merged; the value head beside it."""
        if self.reference_model is not None:
            self.model.save_pretrained(folder, state_dict=state["model"])
        else:
            merged(self.model, state["model"]).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.value_head is not None:
            save_file(state["value_head"], folder / "value_head.safetensors")


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
) -> Policy:
    flash = has_flash_attention(device)
    if attn_implementation == "flash_attention_2" and not flash:
        where = (
            "flash-attn is not installed" if device.type == "cuda" else f"not on device={device}"
        )
        raise InputError(f"attn_implementation={attn_implementation}: {where}")
    tokenizer = load_tokenizer(name, field="model")
    model = load_causal_lm(name, device, attn_implementation=attn_implementation)
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
        value_body, value_head = load_critic(value_model, tokenizer, device, attn_implementation)
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
        bf16,
    )
    with policy.precision():  # flash attention has no float32
        check_architecture(policy, name)
        bodies = {f"model={name}": base}
        if value_body is not None:
            bodies[f"value_model={value_model}"] = value_body
        policy.packed = pick_packing(packing, bodies)
    return policy


def new_value_head(features: int, device: torch.device) -> nn.Linear:
    """Zero at first: no value, hence no advantage, is invented before something is learnt."""
    head = nn.Linear(features, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def load_critic(
    name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, attention: str | None
) -> tuple[PreTrainedModel, nn.Linear]:
    """(body, value head): a reward model's head is where values begin, another model's is new.

    A reward model's scores are normalised, and its head with them: values have that scale.
    """
    field = "value_model"
    if load_tokenizer(name, field=field).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{field}={name} has another tokenizer than the policy whose tokens it reads"
        )
    kwargs = {"field": field, "device": device, "attn_implementation": attention}
    architectures = load_config(name, field=field).architectures or [""]
    if "SequenceClassification" not in architectures[0]:
        body = load_model(AutoModelForCausalLM, name, **kwargs).base_model
        return body, new_value_head(body.config.get_text_config().hidden_size, device)
    model = load_model(AutoModelForSequenceClassification, name, **kwargs)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise InputError(f"{field}={name} has no score head with one output on a decoder")
    head = new_value_head(model.score.in_features, device)
    mean, std = getattr(model.config, "score_mean", 0.0), getattr(model.config, "score_std", 1.0)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    return model.base_model, head


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by peft, without dropout."""

    r: int
    alpha: float
    target_modules: list[str] | None  # None: every linear layer but the output head
    seed: int


def add_adapters(model: PreTrainedModel, lora: LoRA) -> None:
    """Only they train from here on; until they learn, they add zero."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise InputError(f"lora_r={lora.r} needs peft: pip install peft") from None
    torch.manual_seed(lora.seed)  # A is drawn, B is zero
    try:
        model.add_adapter(
            LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
                target_modules=lora.target_modules or "all-linear",
            )
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"lora_target_modules: {' '.join(str(error).split())[:300]}") from error
    model.eval()  # the adapters, too, are without dropout
    if not isinstance(model.get_output_embeddings(), nn.Linear) or any(
        p.requires_grad for p in model.get_output_embeddings().parameters()
    ):
        raise InputError(
            "lora_target_modules names the output head, whose adapter the fused loss would not see"
        )


def merged(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A copy with the adapters' products added to the weights; state: the model's, whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.device("meta"):
        copied = type(model)(model.config)
        copied.add_adapter(model.peft_config["default"])
    copied.load_state_dict(copy.deepcopy(state), assign=True)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            copied.set_submodule(name, module.get_base_layer())
    copied._hf_peft_config_loaded = False  # else only the adapters would be saved
    return copied


def load_causal_lm(name: str, device: torch.device, **kwargs) -> PreTrainedModel:
    architectures = load_config(name, field="model").architectures or [""]
    if (
        "SequenceClassification" in architectures[0]
    ):  # with tied embeddings nothing would be missing
        raise InputError(f"model={name} is a {architectures[0]}: expected a causal LM")
    model = load_model(AutoModelForCausalLM, name, field="model", device=device, **kwargs)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise InputError(f"model={name} has no linear output head")
    return model


def top_slice(base: PreTrainedModel, layers: int, name: str) -> nn.Module:
    """The same model with only its top layers: shares every weight, takes `inputs_embeds`."""
    found = getattr(base, "layers", None)
    if not isinstance(found, nn.ModuleList) or not hasattr(base, "norm"):
        raise InputError(
            f"trainable_layers={layers}: model={name} ({type(base).__name__}) is not built as "
            "layers and a final norm; leave trainable_layers unset to train the whole model"
        )
    if layers > len(found):
        raise InputError(f"trainable_layers={layers}: model={name} has {len(found)} layers")
    top = shallow_copy(base)
    top.layers = found[len(found) - layers :]
    top.config = copy.deepcopy(base.config)
    top.config.num_hidden_layers = layers
    if getattr(top.config, "layer_types", None):
        top.config.layer_types = base.config.layer_types[-layers:]
    return top


def frozen_copy(top: nn.Module) -> nn.Module:
    """The reference's own copy of what trains; the rest stays shared."""
    reference = shallow_copy(top)
    reference.layers = copy.deepcopy(top.layers).requires_grad_(False)
    reference.norm = copy.deepcopy(top.norm).requires_grad_(False)
    return reference


def shallow_copy(module: nn.Module) -> nn.Module:
    new = copy.copy(module)
    new._modules = dict(module._modules)  # copy.copy shares this dict: replacing a child would too
    return new


@contextmanager
def trunk_recorder(model: PreTrainedModel, trunk_layers: int) -> Iterator[list[Tensor]]:
    """Collects what enters the lowest trained layer, one [B, tokens, H] for every forward pass."""
    recorded: list[Tensor] = []
    if not trunk_layers:
        yield recorded
        return
    layer = model.base_model.layers[trunk_layers]
    handle = layer.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
    try:
        yield recorded
    finally:
        handle.remove()


def softcap(model: PreTrainedModel) -> float | None:
    """Gemma 2 and its kind bend their logits: cap·tanh(logits/cap)."""
    return getattr(model.config, "final_logit_softcapping", None)


def logit_divisor(model: PreTrainedModel) -> float:
    """Granite divides its logits and Cohere multiplies them: a temperature of the model's own."""
    config = model.config.get_text_config()
    return getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)


@torch.no_grad()
def check_architecture(policy: Policy, name: str) -> None:
    """Layers cut off and a head applied by hand must give the model's own logits.

    They do not where a model does something of its own to either; better to know now than to train
    on log-probs of another distribution.
    """
    device = policy.model.device
    ids = torch.arange(8, device=device)[None] % policy.model.config.get_text_config().vocab_size
    with trunk_recorder(policy.model, policy.trunk_layers) as recorded:
        expected = policy.model(ids, use_cache=False).logits
    given = {"inputs_embeds": recorded[0]} if policy.trunk_layers else {"input_ids": ids}
    logits = policy.head(policy.body(**given, use_cache=False).last_hidden_state)
    if (cap := softcap(policy.model)) is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / logit_divisor(policy.model)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"model={name} ({type(policy.model).__name__}) computes its logits in a way that "
            "is not supported" + (" with trainable_layers" if policy.trunk_layers else "")
        )


# ------------------------------------------------------------------------------- reward model


def new_reward_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable_layers: int | None,
    seed: int,
    device: torch.device,
) -> PreTrainedModel:
    """A language model with a Linear(H, 1) on its last token; the head's std is 1/√(H+1)."""
    torch.manual_seed(seed)  # the head below is the only thing drawn
    model = load_model(
        AutoModelForSequenceClassification, name, field="model", device=device, num_labels=1
    )
    check_vocabulary(tokenizer, model, field="model", name=name)
    if not hasattr(model, "score"):
        raise InputError(
            f"model={name} ({type(model).__name__}) is not a decoder: its score is not a Linear "
            "on the last token"
        )
    if type(model).__name__ not in (model.config.architectures or ()):  # else it is trained on
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.config.score_mean, model.config.score_std = 0.0, 1.0  # raw scores, until trained
    model.config.pad_token_id = tokenizer.pad_token_id
    if trainable_layers is not None:
        top = top_slice(model.base_model, trainable_layers, name)
        model.requires_grad_(False)
        for part in (top.layers, top.norm, model.score):
            part.requires_grad_(True)
    return model


def load_reward_model(
    name: str, *, field: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with its tokenizer. `folder#label` names a label of one with several;
    its number is put into the model's config as `score_label`."""
    folder, _, label = name.partition("#")
    tokenizer = load_tokenizer(folder, field=field)
    model = load_model(AutoModelForSequenceClassification, folder, field=field, device=device)
    check_vocabulary(tokenizer, model, field=field, name=folder)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if label and label not in labels or not label and len(labels) > 1:
        raise InputError(
            f"{field}={name} gives {len(labels)} scores, expected one: name it as "
            + " or ".join(f"{folder}#{each}" for each in labels[:8])
        )
    model.config.score_label = labels.index(label) if len(labels) > 1 else None
    return model.requires_grad_(False), tokenizer


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


# ------------------------------------------------------------------------------------ shared


def load_config(name: str, *, field: str):
    source = resolve(name, field)
    if Path(source).is_dir() and not Path(source, "config.json").exists():
        raise InputError(f"{field}={name} is not a model folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{field}={name} cannot be loaded as a model: {reason}") from error


def load_model(auto: type, name: str, *, field: str, device: torch.device, **kwargs):
    source = resolve(name, field)
    load_config(name, field=field)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of missing weights: we judge it below
    try:
        model, info = auto.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{field}={name} cannot be loaded as a model: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    making_a_head = "num_labels" in kwargs  # only then may the head be missing
    if info["missing_keys"] and not making_a_head:
        raise InputError(
            f"{field}={name} lacks the weights {sorted(info['missing_keys'])[:3]}: it is not a "
            + (
                "reward model (train one with `rlhf-fast reward`)"
                if field != "model"
                else "complete language model"
            )
        )
    return model.eval().to(device)  # eval: dropout off; gradients flow all the same


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


def resolve(name: str, field: str) -> str:
    """A folder's path, or a hub name. A path that is no folder would be looked up on the hub and
    refused with a puzzling message."""
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise InputError(f"{field}={name}: there is no such folder")
    return str(folder)


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


def has_flash_attention(device: torch.device) -> bool:
    return device.type == "cuda" and is_flash_attn_2_available()


@torch.no_grad()
def use_flash_attention(model: PreTrainedModel) -> None:
    """Flash attention in place of transformers' choice, if the model runs with it.

    transformers knows which classes support it, flash-attn which sizes of heads and which GPUs: a
    short forward pass asks both. It is in bfloat16: there are no kernels for float32.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("flash_attention_2")
        with torch.autocast(model.device.type, torch.bfloat16):
            model(torch.zeros(1, 8, dtype=torch.int64, device=model.device), use_cache=False)
    except (ValueError, RuntimeError, ImportError):
        model.set_attn_implementation(before)


def pick_packing(asked: bool | None, bodies: dict[str, PreTrainedModel]) -> bool:
    """Whether to pack (see packing.py): where all run flash attention, if they allow it."""
    flash = all(b.config._attn_implementation == "flash_attention_2" for b in bodies.values())
    if asked is False or (asked is None and not flash):
        return False
    for name, body in bodies.items():
        if not can_pack(body):
            if asked is None:
                return False
            raise InputError(
                f"packing={asked}: {name} ({type(body).__name__}) does not keep sequences apart "
                "that lie in one row; leave packing unset"
            )
    return True


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"device={name} cannot be used: {reason}") from None
    return device
