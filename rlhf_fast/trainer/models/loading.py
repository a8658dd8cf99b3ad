"""Models of transformers from a folder or the hub: loaded whole, or one line that says why not.

transformers and what it calls raise dozens of types for a folder that cannot be loaded (pickle's,
safetensors', a missing package's, a bare Exception): all of them are that one line here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf_fast.trainer.errors import InputError

HEADS = {"score", "classifier", "classification_head"}  # what families call a classifier's head
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched


def load_causal_lm(
    name: str, device: torch.device, *, field: str = "model", trust: bool = False, **kwargs
) -> PreTrainedModel:
    config = load_config(name, field=field, trust=trust)
    if "SequenceClassification" in (config.architectures or [""])[0]:
        # with tied embeddings nothing would be missing
        raise InputError(f"{field}={name} is a {config.architectures[0]}: expected a causal LM")
    refuse_quantised(config, field, name)
    kwargs |= {"field": field, "device": device, "trust": trust}
    model = load_model(AutoModelForCausalLM, name, **kwargs)
    check_causal_lm(model, field, name)
    return model


def check_causal_lm(model: PreTrainedModel, field: str, name: str) -> None:
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise InputError(f"{field}={name} has no linear output head")
    if model.base_model is model:
        raise InputError(
            f"{field}={name} ({type(model).__name__}) does not keep its body apart from its head: "
            "such models are not supported"
        )


def made_ready(
    model: PreTrainedModel, device: torch.device, name: str, attention: str | None = None
) -> PreTrainedModel:
    """A model that was loaded by a program, as load_model gives it: in float32, dropout off."""
    refuse_quantised(model.config, "model", name)
    if attention is not None:
        model.set_attn_implementation(attention)
    model.zero_grad()
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"model={name} has no weight that requires a gradient: nothing can learn")
    return model.eval().to(device, torch.float32)


def load_model(
    auto: type,
    name: str,
    *,
    field: str,
    device: torch.device,
    trust: bool = False,
    new_head: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """A model in float32, dropout off. Weights that are missing or of another shape are an error.

    new_head: a classifier's head need not be there, or may be of another size; `model.new_head`
        then says whether it was drawn anew.
    """
    load_config(name, field=field, trust=trust)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of the weights: we judge it below
    try:
        model, info = auto.from_pretrained(
            resolve(name, field),
            dtype=torch.float32,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # judged below, too
            **kwargs,
        )
    except Exception as error:
        raise unreadable(field, name, "cannot be loaded as a model", error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    other = [key for key in info["mismatched_keys"] if not in_head(key[0], new_head)]
    if other:
        key, saved, expected = sorted(other)[0]
        raise InputError(
            f"{field}={name}: its weights do not fit its config.json: {key} is {list(saved)} where "
            f"the config expects {list(expected)}"
        )
    missing = sorted(key for key in info["missing_keys"] if not in_head(key, new_head))
    if missing:
        raise InputError(
            f"{field}={name} lacks the weights {missing[:3]}: it is not a "
            + (
                "complete language model"
                if field == "model"
                else "reward model (train one with `rlhf-fast reward`)"
            )
        )
    if new_head:
        model.new_head = bool(info["missing_keys"] or info["mismatched_keys"])
    return model.eval().to(device)  # eval: dropout off; gradients flow all the same


def in_head(key: str, new_head: bool) -> bool:
    return new_head and not HEADS.isdisjoint(key.split("."))


def load_config(name: str, *, field: str, trust: bool = False) -> PretrainedConfig:
    source = resolve(name, field)
    if Path(source).is_dir() and not Path(source, "config.json").exists():
        raise InputError(f"{field}={name} is not a model folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust)
    except Exception as error:
        raise unreadable(field, name, "cannot be loaded as a model", error) from error


def unreadable(field: str, name: str, what: str, error: Exception) -> InputError:
    """The one line for whatever the libraries below have raised."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:  # transformers': its advice is another program's argument
        reason = "it brings Python code of its own, which runs only with --trust_remote_code"
    if "weights_only" in reason:  # torch's advice would run what the file says
        reason = "its weights are a pickle that cannot be read safely, or a damaged file"
    return InputError(f"{field}={name} {what}: {reason[:300] or type(error).__name__}")


def resolve(name: str, field: str) -> str:
    """A folder's path, or a hub name. A path that is no folder would be looked up on the hub and
    refused with a puzzling message."""
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise InputError(f"{field}={name}: there is no such folder")
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.stat().st_size < 1024:
                with file.open("rb") as opened:
                    if opened.read(len(POINTER)) == POINTER:
                        raise InputError(
                            f"{field}={name}: {file.name} is a pointer of Git LFS, not the file "
                            "itself: fetch it with `git lfs pull`"
                        )
    return str(folder)


def refuse_quantised(config: PretrainedConfig, field: str, name: str) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        given = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise InputError(
            f"{field}={name} is quantised ({given.get('quant_method', 'by an unnamed method')}): "
            "its weights cannot be trained; give the model it was made from"
        )


def source_dtype(name: str, *, field: str, trust: bool = False) -> torch.dtype:
    """The dtype that the model was saved in, by its config; float32 where that does not say."""
    config = load_config(name, field=field, trust=trust)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    return named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read; None where nothing says. (A wrapper's own config, Gemma 3's
    say, does not: that of its text model does. RoBERTa and its kind number theirs from the pad
    on.)"""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
    found = (getattr(config, name, None) for name in names)
    room = next((room for room in found if isinstance(room, int) and room > 0), None)
    embeddings = getattr(model.base_model, "embeddings", None)
    pad = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return room if room is None or pad is None else room - pad - 1


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
