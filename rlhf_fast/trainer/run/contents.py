"""What the names in a config stood for when the run began: a file may change under its name."""

from __future__ import annotations

import inspect
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.markup import escape
from transformers import PreTrainedModel

from rlhf_fast.trainer.data.read import Rows
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.rewards.functions import source_of
from rlhf_fast.trainer.run.console import console
from rlhf_fast.trainer.run.folder import Run

CONTENTS = "contents.json"
OF_A_MODEL = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "*.txt", "*.jinja")


def check_contents(run: Run, named: dict[str, Any], given: Given) -> dict[str, str]:
    """The digests to keep, in CONTENTS, once the run has begun. Refuses to continue a run whose
    data or models are others by now, and says where code is.

    named: {option: Rows, or the text it was given, or a list of such}; None is left out. A run of a
    version that kept none goes on. given: objects that texts may stand for.
    """
    now, unknown = digests(named, given)
    if run.exists and unknown:
        console.print(escape(
            f"whether it is what it was when the run began cannot be checked: {', '.join(unknown)}"
        ))  # fmt: skip
    before = (run.load(CONTENTS) or {}) if run.exists else {}
    for name, digest in now.items():
        if digest == before.get(name, digest):
            continue
        if name.endswith(":code"):
            name = escape(name.removesuffix(":code"))
            console.print(f"{name}: its code has changed since the run began")
            continue
        trained = isinstance(given.get(name.partition("=")[2]), PreTrainedModel)
        how = "Load it again, as it was then" if trained else "Bring them back"
        raise InputError(
            f"{name} has changed since the run in output_dir={run.folder} began: its contents are "
            f"others under the same name. {how}, begin again with --overwrite, or delete "
            f"{run.folder / CONTENTS} to go on with what is there now"
        )
    return now


def digests(named: dict[str, Any], given: Given) -> tuple[dict[str, str], list[str]]:
    """({"data=file": digest, …}, objects that have none); what is code is marked, what is on the
    hub left out."""
    found, unknown = {}, []
    for option, value in named.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Rows):
                found[option] = each.digest()
            elif (loaded := given.get(each)) is not None:
                name = f"{option}={each}"
                if isinstance(loaded, PreTrainedModel):
                    found[name] = given.weights[each]
                elif (code := code_of(loaded)) is not None:
                    found[f"{name}:code"] = of_text(code)
                else:
                    unknown.append(name)
            elif each is not None and (file := source_of(each)) is not None:
                found[f"{option}={each}:code"] = of_files([file])
            elif each is not None and (folder := Path(each.split("#")[0]).expanduser()).is_dir():
                files = {path for kind in OF_A_MODEL for path in folder.glob(kind)}
                found[f"{option}={each}"] = of_files(sorted(files))
    return found, unknown


def code_of(function: Any) -> str | None:
    """A function's source; None where there is none, or where it is not all that it does: an object
    or a function within another may hold anything."""
    if not inspect.isfunction(function) or function.__closure__:
        return None
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None


def of_text(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def of_files(paths: list[Path]) -> str:
    digest = blake2b(digest_size=16)  # about 1 GB a second
    for path in paths:
        digest.update(path.name.encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
