"""docs/hand-over.md, their keys and ours, from the tables of rlhf_fast/trainer/convert.

python docs/hand_over.py           write it
python docs/hand_over.py --check   exit with 1 if the page is not what the tables say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.trainer.convert import FRAMEWORKS
from rlhf_fast.trainer.convert.keys import TRANSFORMERS, Framework, Key

PAGE = Path(__file__).with_name("hand-over.md")
HEAD = """# From TRL or verl

```sh
rlhf-fast convert trl-config.yaml --output ours.yaml   # or verl's, nested or with dots
rlhf-fast ppo --config ours.yaml --data prompts.jsonl --reward reward.py:score --output_dir runs/ppo
```

`convert` writes the [options](options.md) of `rlhf-fast ppo` that a file of theirs stands for, what
it does not say at their defaults. Each line names the key that it is from; what has no equal here
stands in comments below, with the reason. Batch sizes of TRL are those of one process: `--processes
8` says how many there were. The tables below are what it goes by; `python docs/hand_over.py` writes
this page.

A step here is a round: answers to a batch of prompts, and all updates from them. Rewards are models
or [functions](data-and-rewards.md) of `(prompts, completions, **columns)`, as TRL's are.
"""


def page() -> str:
    shared = table("transformers and TRL's scripts, both of TRL", TRANSFORMERS)
    return HEAD + shared + "".join(map(section, FRAMEWORKS.values()))


def section(framework: Framework) -> str:
    own = {k: x for k, x in framework.keys.items() if TRANSFORMERS.get(k) != x}
    families = {f"{start}…": Key("", why) for start, why in framework.families.items()}
    return table(framework.title, own | families)


def table(title: str, keys: dict[str, Key]) -> str:
    rows = (row(name, key) for name, key in keys.items())
    return f"\n## {title}\n\n| theirs | ours | |\n|---|---|---|\n{''.join(rows)}"


def row(name: str, key: Key) -> str:
    ours = ", ".join(f"`--{option}`" for option in key.options) or "–"
    return f"| `{name}` | {ours} | {key.note} |\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/hand-over.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    text = page()
    if not parser.parse_args(argv).check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        print("docs/hand-over.md is not what the tables say: python docs/hand_over.py writes it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
