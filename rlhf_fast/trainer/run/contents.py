"""What the names in a config stood for when the run began: a file may change under its name."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

from rlhf_fast.trainer.data.read import Rows
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rewards.functions import source_of
from rlhf_fast.trainer.run.console import console
from rlhf_fast.trainer.run.folder import Run

CONTENTS = "contents.json"
OF_A_MODEL = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "*.txt", "*.jinja")


def check_contents(run: Run, named: dict[str, Any]) -> dict[str, str]:
    """The digests to keep, in CONTENTS, once the run has begun. Refuses to continue a run whose
    data or models are others by now, and says where code is.

    named: {option: Rows, or the text it was given, or a list of such}; None is left out. A run of a
    version that kept none goes on.
    """
    now = digests(named)
    before = (run.load(CONTENTS) or {}) if run.exists else {}
    for name, digest in now.items():
        if digest == before.get(name, digest):
            continue
        if name.endswith(":code"):
            console.print(f"{name.removesuffix(':code')}: its code has changed since the run began")
            continue
        raise InputError(
            f"{name} has changed since the run in output_dir={run.folder} began: its contents are "
            "others under the same name. Bring them back, begin again with --overwrite, or delete "
            f"{run.folder / CONTENTS} to go on with what is there now"
        )
    return now


def digests(named: dict[str, Any]) -> dict[str, str]:
    """{"data=file": digest, …}; what is code is marked, what is on the hub left out."""
    found = {}
    for option, value in named.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Rows):
                found[option] = each.digest()
            elif each is not None and (file := source_of(each)) is not None:
                found[f"{option}={each}:code"] = of_files([file])
            elif each is not None and (folder := Path(each.split("#")[0]).expanduser()).is_dir():
                files = {path for kind in OF_A_MODEL for path in folder.glob(kind)}
                found[f"{option}={each}"] = of_files(sorted(files))
    return found


def of_files(paths: list[Path]) -> str:
    digest = blake2b(digest_size=16)  # about 1 GB a second
    for path in paths:
        digest.update(path.name.encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
