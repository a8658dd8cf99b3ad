"""`rlhf-fast report`: one HTML file about a run that needs no other, and no network."""

from __future__ import annotations

import math
import re
from datetime import datetime
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlhf_fast.trainer.run.card import PRIVATE, figure, public
from rlhf_fast.trainer.run.completions import as_text
from rlhf_fast.trainer.run.console import profile
from rlhf_fast.trainer.run.diagnostics import warnings
from rlhf_fast.trainer.run.metrics import Row
from rlhf_fast.trainer.run.plot import number, panel
from rlhf_fast.trainer.run.record import Record
from rlhf_fast.version import __version__

SIGNATURE = "rlhf-fast report"  # in the file: such a one may be written anew
SHOWN = 8  # samples that are open
INK, LINE = "#010203", "#040506"  # drawn with, for the page's own colours to take their place
NAMES = {"data", "model", "reward", "judge", "value_model", "eval_data", "rollout_engine"}

HELD_OUT = {"kl": "KL from the reference (nats a sequence)", "length": "length (tokens)"}


def page(record: Record) -> str:
    later, after = latest(record)
    options = {
        name: (public(value).strip("`") if name in NAMES else value, default)
        for name, (value, default) in record.options().items()
        if name not in PRIVATE
    }
    values: dict[str, Any] = {
        "signature": SIGNATURE,
        "name": record.folder.resolve().name,
        "what": what(record),
        "state": record.state,
        "is_ppo": record.is_ppo,
        "step": record.step,
        "steps": record.steps,
        "time": profile(record.rows) if record.is_ppo and record.rows else "",
        "warnings": said(record.rows) if record.is_ppo else [],
        "figures": {
            name.replace("_", " "): figure(value) for name, value in (record.summary or {}).items()
        },
        "curves": {
            "Training": drawn(record.rows, record.panels),
            "Held out": drawn(from_the_start(record), held_out(record.evaluations)),
        },
        "samples": pairs(record.before, after, later),
        "later": later,
        "shown": SHOWN,
        "given": {name: value for name, (value, default) in options.items() if not default},
        "default": {name: value for name, (value, default) in options.items() if default},
        "made": f"Written by rlhf_fast {__version__}, torch {torch.__version__}, "
        f"{datetime.now():%Y-%m-%d %H:%M}.",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def what(record: Record) -> str:
    names = {k: public(record.config.get(k)).replace("`", "") for k in ("model", "data", "reward")}
    if record.is_ppo:
        return f"{names['model']}, trained with PPO against {names['reward']}, on {names['data']}."
    return f"A reward model of {names['model']}, trained on the pairs of {names['data']}."


def said(rows: list[Row]) -> list[str]:
    """Each warning once, as it was first given, with the steps that gave it."""
    steps: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for i, row in enumerate(rows):
        for name, text in warnings(rows[: i + 1]).items():
            steps.setdefault(name, []).append(int(row["step"]))
            texts.setdefault(name, text)
    return [f"{when(steps[name])}: {text}." for name, text in texts.items()]


def when(steps: list[int]) -> str:
    more = f", and at {len(steps) - 1} more until step {steps[-1]}" if len(steps) > 1 else ""
    return f"At step {steps[0]}{more}"


# ----------------------------------------------------------------------------- the answers


def latest(record: Record) -> tuple[str, dict[str, list] | None]:
    """When the last answers were given, in words, and the answers."""
    if record.after is not None:
        return "after training", record.after
    samples = record.evaluations[-1].get("samples") if record.evaluations else None
    return (f"after step {record.evaluations[-1]['step']}", samples) if samples else ("", None)


def pairs(before: dict | None, after: dict | None, later: str) -> list[dict[str, Any]]:
    """The answers to each prompt, side by side."""
    if not before or not after:
        return []
    rows = zip(before["prompt"], after["prompt"], strict=False)
    both = [i for i, (prompt, again) in enumerate(rows) if prompt == again]
    return [
        {
            "prompt": words(before["prompt"][i]),
            "sides": [side("before", before, None, i), side(later, after, before, i)],
        }
        for i in both
    ]


def words(prompt: Any) -> str:
    if isinstance(prompt, list):  # a conversation
        return "\n\n".join(f"{m.get('role')}: {as_text(m.get('content'))}" for m in prompt)
    return prompt


def side(label: str, answers: dict, earlier: dict | None, i: int) -> dict[str, Any]:
    found = []
    for name, shown in (("score", "reward"), ("judge", "judge")):
        value = answers[name][i] if name in answers else None
        if value is None:
            continue
        rise = value - (earlier[name][i] or 0.0) if earlier and name in earlier else 0.0
        kind = "up" if rise > 0 else "down" if rise < 0 else "muted"
        found.append({"text": f"{shown} {value:+.2f}", "kind": kind})
    return {"label": label, "answer": answers["answer"][i] or "(empty)", "scores": found}


# ------------------------------------------------------------------------------ the curves


def from_the_start(record: Record) -> list[dict[str, Any]]:
    """The evaluations, and before them what was answered before training."""
    before, known = record.before or {}, set().union(*record.evaluations)
    answered = {f"eval_{name}": values for name, values in before.items()}
    numbers = {  # a lost answer has no score
        name: [x for x in map(number, values) if not math.isnan(x)]
        for name, values in answered.items()
        if name in known
    }
    start = {name: mean(values) for name, values in numbers.items() if values}
    return [{"step": 0} | start, *record.evaluations] if start else record.evaluations


def held_out(evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    names = [name for name in evaluations[-1] if name.startswith("eval_")] if evaluations else []
    plain = ((name, name.removeprefix("eval_")) for name in names)
    return [(name, HELD_OUT.get(title, title)) for name, title in plain]


def drawn(rows: list[dict[str, Any]], panels: list[tuple[str, str]]) -> dict[str, Markup]:
    return {title: svg(rows, key, title) for key, title in panels}


def svg(rows: list[dict[str, Any]], key: str, title: str) -> Markup:
    """A curve whose ink and line are the page's, light or dark."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {"svg.fonttype": "none", "svg.hashsalt": key} | dict.fromkeys(inks, INK)
    with matplotlib.rc_context(style):
        picture = Figure(figsize=(4, 2.6), layout="constrained")
        FigureCanvasSVG(picture)
        axes = picture.subplots()
        panel(axes, rows, key, color=LINE)
        for part in (picture.patch, axes.patch):
            part.set_visible(False)
        file = StringIO()
        picture.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(LINE, "var(--line)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Marks are used by their ids: those of one curve must not be another's.
    found = set(re.findall(r'id="([^"]+)"', text))
    for name in sorted(found, key=len, reverse=True):
        mine = f"{re.sub(r'[^a-z]', '-', key)}-{name}"
        for use in ('id="{}"', '"#{}"', "url(#{})"):
            text = text.replace(use.format(name), use.format(mine))
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)[0]
    label = Markup.escape(title)
    head = f'<svg {box} role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" ' \
        'xmlns:xlink="http://www.w3.org/1999/xlink"'  # fmt: skip
    return Markup(f"{head}>{rest}")


def is_page(path: Path) -> bool:
    """Whether this program wrote it."""
    if path.is_symlink() or not path.is_file():
        return False
    return f'content="{SIGNATURE}"'.encode() in path.read_bytes()[:1000]
