"""docs/recipes.md, the options of every recipe and where they are from, from the recipes' files.

python docs/recipes.py           write it
python docs/recipes.py --check   exit with 1 if the page is not what the files say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.flags import yaml_flags
from rlhf_fast.trainer.recipes import FILES

PAGE = Path(__file__).with_name("recipes.md")
HEAD = """# Recipes

```sh
rlhf-fast ppo --recipe dapo --model MODEL --data prompts.jsonl --reward f.py:score --output_dir DIR
```

A recipe gives the [options](options.md) that make up a method. What `--config` and other flags say
wins over it, and what of it has no effect beside them is left out; the command prints the rest. A
run's `config.yaml` has all options that it ran with. Sizes of batches and lengths of answers are
yours: those of the papers are of many GPUs. Each recipe is a file in
`rlhf_fast/trainer/recipes/`; `python docs/recipes.py` writes this page.

| recipe | options | source |
|---|---|---|
"""


def page() -> str:
    return HEAD + "".join(row(name, path) for name, path in FILES.items())


def row(name: str, path: Path) -> str:
    flags = " ".join(flag.replace("=", " ") for flag in yaml_flags(path, PPOConfig))
    source = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return f"| `{name}` | `{flags}` | {source} |\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/recipes.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    text = page()
    if not parser.parse_args(argv).check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        print("docs/recipes.md is not what the recipes say: python docs/recipes.py writes it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
