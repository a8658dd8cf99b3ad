"""mkdocs: links out of docs/ into the source work in the repository; on the site they are names."""

from __future__ import annotations

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\[[^\]]*\]\(\.\./([^)#]+)\)", r"`\1`", markdown)
