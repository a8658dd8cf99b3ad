"""Warnings in words when a run goes wrong: pure functions of the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from statistics import fmean

Rows = list[dict[str, float]]


def warnings(rows: Rows) -> dict[str, str]:
    """{name: text} of what is wrong after the last of these rows."""
    if not rows:
        return {}
    found = {check.__name__: check(rows) for check in CHECKS}
    return {name: text for name, text in found.items() if text is not None}


def new_warnings(history: Rows) -> list[str]:
    """Warnings that the step before did not give."""
    known = warnings(history[:-1])
    return [text for name, text in warnings(history).items() if name not in known]


def kl_explodes(rows: Rows) -> str | None:
    """Above 1.5 nats a token, or above 10 nats a sequence and 3 times the mean of ten steps."""
    kl = last(rows, "objective/kl")
    before = recent(rows[:-1], "objective/kl", 10)
    jumps = kl is not None and before and kl > max(10.0, 3 * fmean(before))
    length = last(rows, "val/answer_tokens")
    if kl is not None and (jumps or (length and kl / length > 1.5)):
        return (
            f"the KL from the reference explodes ({kl:.1f} nats a sequence): the policy leaves the "
            "language it knew. Raise beta, set adaptive_kl_target or target_kl, or lower "
            "learning_rate"
        )
    return None


def entropy_collapses(rows: Rows) -> str | None:
    """Below a tenth of what it was at first."""
    values = (row.get("policy/entropy_avg") for row in rows)
    first = next((value for value in values if value is not None), None)
    now = last(rows, "policy/entropy_avg")
    if now is not None and first is not None and now < 0.1 * first:
        return (
            f"the entropy has collapsed ({now:.2g} nats a token, {first:.2g} at first): the policy "
            "gives the same answers again and again. Raise entropy_coef or beta"
        )
    return None


def rollout_differs(rows: Rows) -> str | None:
    """A ratio beyond 10 before the first update, which should be 1."""
    ratio = last(rows, "val/rollout_ratio_max")
    if ratio is not None and ratio > 10:
        return (
            f"a token's probability differs by a factor of {ratio:.3g} between rollout and trainer "
            "before any update: they do not compute the same model. Check the rollout engine, its "
            "temperature and precision; tis_cap limits the damage"
        )
    return None


def kl_is_negative(rows: Rows) -> str | None:
    """The sampled KL may fall below 0 by chance, not by a nat and not three times in a row."""
    kls = recent(rows, "objective/kl", 3)
    if kls and (kls[-1] < -1 or (len(kls) == 3 and max(kls) < -0.05)):
        return (
            f"the KL from the reference is negative ({kls[-1]:.2f} nats a sequence): the answers "
            "are not samples of the policy they are measured under (an engine with a temperature, "
            "a truncation or stop tokens of its own), and the policy is paid for that"
        )
    return None


def critic_knows_nothing(rows: Rows) -> str | None:
    """Explained variance below 0 for twenty steps."""
    variances = recent(rows, "val/explained_var", 20)
    if len(variances) == 20 and max(variances) < 0:
        return (
            "the critic has explained less than nothing of the returns for 20 steps (explained "
            "variance below 0). Change value_learning_rate or value_coef, or give it a value_model"
        )
    return None


def updates_skipped(rows: Rows) -> str | None:
    skipped = last(rows, "skipped_updates")
    if skipped:
        return f"{skipped:.0f} updates were skipped: their loss or gradient was not finite"
    return None


CHECKS: tuple[Callable[[Rows], str | None], ...] = (
    kl_explodes,
    entropy_collapses,
    rollout_differs,
    kl_is_negative,
    critic_knows_nothing,
    updates_skipped,
)


def last(rows: Rows, name: str) -> float | None:
    return rows[-1].get(name)


def recent(rows: Rows, name: str, count: int) -> list[float]:
    """The last `count` values, as far back as there is one in every row."""
    values = [row.get(name) for row in rows[-count:]]
    return list(takewhile(lambda value: value is not None, reversed(values)))[::-1]
