"""The trained model's card: what it was made from and how, with the run's figures."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, get_token

from rlhf_fast.trainer.config import PPOConfig, RunConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.console import console
from rlhf_fast.version import __version__

# Of this machine, or of this call only.
PRIVATE = {"output_dir", "resume", "overwrite", "device", "report_to", "push_to_hub",
           "hub_model_id", "hub_private_repo"}  # fmt: skip


def model_card(config: RunConfig, summary: dict[str, Any]) -> ModelCard:
    policy = isinstance(config, PPOConfig)
    data = ModelCardData(
        base_model=on_the_hub(config.model), datasets=on_the_hub(config.data),
        library_name="transformers", tags=["rlhf_fast", "ppo" if policy else "reward-model"],
        pipeline_tag="text-generation" if policy else "text-classification",
    )  # fmt: skip
    what = (
        f"A language model, trained with PPO against the reward {public(config.reward)}."
        if policy
        else "A reward model, trained on preference pairs. Its score is (logit − `score_mean`) / "
        "`score_std`, both in its config."
    )
    lines = [
        f"# {Path(config.output_dir).expanduser().resolve().name}",
        "",
        f"{what} It began as {public(config.model)}; the data was {public(config.data)}.",
        "",
        "| figure | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {figure(value)} |" for name, value in summary.items()),
        "",
        "| option | |",
        "|---|---|",
        *(f"| `{name}` | {public(value)} |" for name, value in options(config).items()),
        "",
        f"Made with rlhf_fast {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def options(config: RunConfig) -> dict[str, Any]:
    """Those that are not at their default."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in PRIVATE}
    default = {f.name: None if f.default is MISSING else f.default for f in fields(config)}
    return {name: value for name, value in given.items() if value != default[name]}


def figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_local(name: str) -> bool:
    return name.startswith("<") or Path(name.partition("#")[0]).expanduser().exists()


def public(value: Any) -> str:
    """A name as others may read it: no folders of this machine."""
    if isinstance(value, list):
        return ", ".join(map(public, value))
    text = str(value)
    path, _, function = text.rpartition(":")
    if path.endswith(".py"):
        return f"`{Path(path).name}:{function}`"
    local = is_local(text) or text.startswith(("/", "~", "."))
    return f"`{Path(text).name if local else text}`"


def on_the_hub(name: str | None) -> str | None:
    return None if name is None or is_local(name) else name


# --------------------------------------------------------------------------------- to the hub


def check_push(config: RunConfig) -> None:
    """Before anything is trained."""
    if not config.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        raise InputError("push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be uploaded")
    if get_token() is None:
        raise InputError("push_to_hub needs a token of the hub: log in with `hf auth login`")


def push(config: RunConfig, folder: Path) -> None:
    """Upload a finished run's model; what fails there costs nothing that was trained."""
    if not config.push_to_hub:
        return
    name = config.hub_model_id or folder.resolve().name
    try:
        api = HfApi()
        repo = api.create_repo(name, private=config.hub_private_repo or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder / "model", commit_message="Trained model"
        )
    except Exception as error:  # of the network, the hub, the name
        reason = " ".join(str(error).split())[:300]
        console.print(f"push_to_hub={name} failed, the model is in {folder / 'model'}: {reason}")
    else:
        console.print(f"the model is at {repo}")
