"""Models of transformers from a folder or the hub: loaded whole, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf_fast.trainer.errors import InputError

transformers_logging.disable_progress_bar()  # a bar per loaded model hides the bars that matter


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


def load_config(name: str, *, field: str):
    source = resolve(name, field)
    if Path(source).is_dir() and not Path(source, "config.json").exists():
        raise InputError(f"{field}={name} is not a model folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{field}={name} cannot be loaded as a model: {reason}") from error


def resolve(name: str, field: str) -> str:
    """A folder's path, or a hub name. A path that is no folder would be looked up on the hub and
    refused with a puzzling message."""
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise InputError(f"{field}={name}: there is no such folder")
    return str(folder)


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
