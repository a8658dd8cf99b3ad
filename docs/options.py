"""docs/options.md, every flag of every command in the groups of its --help, from the same source.

python docs/options.py           write it
python docs/options.py --check   exit with 1 if the page is not what the commands take
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast import info
from rlhf_fast.trainer.config import COMMAND_CONFIGS
from rlhf_fast.trainer.flags import flag_parser

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

Every flag of every command, as `rlhf-fast COMMAND --help` shows them. A flag may be written with
`-` for `_`, and each is a key of the YAML file given with `--config`; flags win over the file.
`python docs/options.py` writes this page.
"""


def parsers() -> list[argparse.ArgumentParser]:
    commands = COMMAND_CONFIGS.items()
    trainer = [flag_parser(config, prog=f"rlhf-fast {name}") for name, config in commands]
    return [*trainer, info.flag_parser()]


def page() -> str:
    return "\n".join([HEAD, *map(section, parsers())])


def section(parser: argparse.ArgumentParser) -> str:
    """A command: what it does, and a table a group."""
    lines = [f"## {parser.prog}", "", escaped(" ".join((parser.description or "").split())), ""]
    for group in parser._action_groups:
        if group._group_actions:
            lines += [
                f"### {parser.prog}: {group.title}",
                "",
                "| flag | default | |",
                "|---|---|---|",
            ]
            lines += [*map(row, group._group_actions), ""]
    return "\n".join(lines)


def row(action: argparse.Action) -> str:
    flag = f"`{action.option_strings[0]}`"
    if action.choices:
        flag += " " + ", ".join(action.choices)
    return f"| {flag} | {default(action)} | {escaped(action.help or '')} |"


def default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default in (None, argparse.SUPPRESS):
        return ""
    return f"`{str(action.default).lower() if action.default is False else action.default}`"


def escaped(text: str) -> str:
    """Markdown's signs as themselves, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(x if x.startswith("`") else re.sub(r"([*|<])", r"\\\1", x) for x in parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/options.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    text = page()
    if not parser.parse_args(argv).check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        print("docs/options.md is not what the commands take: python docs/options.py writes it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
