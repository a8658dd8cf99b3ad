"""mkdocs: formulas become MathML, which browsers draw without a script from elsewhere; links out of
docs/ into the source, which work in the repository, are names on the site."""

from __future__ import annotations

import re

from latex2mathml.converter import convert

CODE_OR_FORMULA = re.compile(r"```.*?```|`[^`\n]*`|\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)

formulas: list[str] = []  # of the page at hand: markdown would read them as text


def on_page_markdown(markdown: str, **_: object) -> str:
    formulas.clear()
    markdown = CODE_OR_FORMULA.sub(kept, markdown)
    return re.sub(r"\[[^\]]*\]\(\.\./([^)#]+)\)", r"`\1`", markdown)


def on_page_content(html: str, **_: object) -> str:
    return re.sub(r"FORMULA(\d+)END", lambda found: formulas[int(found[1])], html)


def kept(found: re.Match[str]) -> str:
    """A placeholder for a formula; code as it is."""
    block, inline = found.groups()
    if not (block or inline):
        return found[0]
    formulas.append(convert(block or inline, display="block" if block else "inline"))
    return f"FORMULA{len(formulas) - 1}END"
