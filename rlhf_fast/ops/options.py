"""The options of a policy loss: the one list of their names, defaults, ranges and meanings.

All that knows an option has it from here: the signatures and docstrings of ``policy_loss`` and
``linear_policy_loss``, their checks, the kernels' schemas and launchers, the trainer's flags and
the tests of pairs. CONTRIBUTING.md says what a new one takes beside its field.
"""

from __future__ import annotations

import functools
import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch

from . import check
from .aggregate import AGGREGATIONS
from .token_kl import ESTIMATORS

LOSSES = {  # each with the ratios that it has a meaning with
    "ppo": ("token", "sequence", "sequence_token"),
    "cispo": ("token", "sequence"),
    "reinforce": ("token",),
    "sapo": ("token",),
    "gmpo": ("sequence",),
    "vespo": ("sequence",),
    "dppo_tv": ("token",),
    "dppo_kl": ("token",),
}
RATIOS = ("token", "sequence", "sequence_token")
HELD = ("ppo", "dppo_tv", "dppo_kl")  # those with a delta

# A field's type, as kernels' schemas spell it.
SCHEMA: dict[Any, str] = {
    "float": "float", "float | None": "float?", "bool": "bool", "str": "str",
}  # fmt: skip
HERE = "**options: the fields of ``PolicyOptions``."  # in a docstring: they are put here

F = TypeVar("F", bound=Callable[..., Any])


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of PolicyOptions. A number is ≥ low, ≤ high and > above, where given; a text is one
    of choices."""
    numbers = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "choices": choices, "range": numbers})


@dataclass(frozen=True)
class PolicyOptions:
    """Every option of a policy loss, in the order in which the kernels take them."""

    clip_low: float = option(
        0.2,
        "the ratio π/π_old counts from 1 − this on; 1: no lower bound. gmpo: of the log-ratio. "
        "dppo: of π − π_old or the KL",
        low=0.0,
        high=1.0,
    )
    clip_high: float = option(  # its lower bound depends on others: check
        0.2,
        "the ratio counts up to 1 + this; at least 0, for cispo −clip_low. TRL's CISPO is "
        "clip_low = 1, clip_high = epsilon_high − 1, since its epsilon_high is the upper bound. "
        "gmpo and dppo: as clip_low",
    )
    dual_clip: float | None = option(
        None,
        "bounds the loss at negative advantages to this many times them (3.0 is usual); ppo only",
        above=1.0,
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    kl_coef: float = option(0.0, "weight of the KL from the reference; needs ref_logp")
    kl_estimator: str = option(
        "k3",
        "k1 = log(π/π_ref), k2 = k1²/2, k3 = exp(−k1) − 1 + k1, abs = |k1|",
        choices=ESTIMATORS,
    )
    aggregation: str = option(
        "token-mean", "how the tokens' losses become one number", choices=AGGREGATIONS
    )
    ratio: str = option(
        "token",
        "π/π_old of each token, or of the whole answer, its geometric mean over the tokens: GSPO "
        "(TRL's importance_sampling_level), with clips of 3e-4 and 4e-4. sequence_token: the same "
        "value, each token's own gradient",
        choices=RATIOS,
    )
    loss: str = option(
        "ppo",
        "ppo: the clipped surrogate. cispo: log-probs weighted by the clipped ratio, no token "
        "loses its gradient (TRL's loss_type, verl's loss_mode). reinforce: no ratio, no clip. "
        "sapo: a smooth gate in the place of the clip. gmpo: the answer's ratio, of clipped "
        "log-ratios. vespo: log-probs weighted by a smooth function of the answer's π/π_old. "
        "dppo_tv, dppo_kl: log-probs weighted by the ratio where π is near π_old",
        choices=tuple(LOSSES),
    )
    sapo_tau_pos: float = option(
        1.0, "temperature of sapo's gate at positive advantages", above=0.0
    )
    sapo_tau_neg: float = option(1.05, "temperature of sapo's gate at the others", above=0.0)
    vespo_k_pos: float = option(
        2.0, "power of π/π_old in vespo's weight at advantages of at least 0", low=0.0
    )
    vespo_lambda_pos: float = option(3.0, "decay of vespo's weight there", above=0.0)
    vespo_k_neg: float = option(3.0, "that power at negative advantages", low=0.0)
    vespo_lambda_neg: float = option(2.0, "that decay at negative advantages", above=0.0)
    delta: float | None = option(
        None,
        "holds the ratio at this from above, before the clip and at either sign of the advantage "
        "(TRL's delta, above 1 + clip_high); dppo: holds its weight (20 is usual)",
        above=0.0,
    )
    unbiased_kl: bool = option(
        False,
        "the KL from the reference times the token's π/π_old, with its gradient: unbiased for "
        "tokens of π_old (TRL's use_bias_correction_kl)",
    )

    def check(self, dtype: torch.dtype) -> None:
        """Every option by itself, for sums in dtype, then those that say something of others."""
        for name, f in self.__dataclass_fields__.items():
            value, choices = getattr(self, name), f.metadata["choices"]
            if choices:
                check.choice(name, value, choices)
            elif f.type == "bool":
                check.flag(name, value)
            elif value is not None or f.type == "float":
                check.number(name, value, dtype=dtype, **f.metadata["range"])
        low = -self.clip_low if self.loss == "cispo" else 0.0
        check.number("clip_high", self.clip_high, low=low, dtype=dtype)
        if self.ratio not in LOSSES[self.loss]:
            ratios = " or ".join(map(repr, LOSSES[self.loss]))
            raise ValueError(f"loss={self.loss!r} needs ratio={ratios}, got ratio={self.ratio!r}")
        if self.dual_clip is not None and self.loss != "ppo":
            raise ValueError(f"dual_clip {self.dual_clip} needs loss='ppo', got loss={self.loss!r}")
        if self.loss == "vespo":
            self._weights_can_be_held("pos", self.vespo_k_pos, self.vespo_lambda_pos, dtype)
            self._weights_can_be_held("neg", self.vespo_k_neg, self.vespo_lambda_neg, dtype)
        if self.delta is not None and self.loss not in HELD:
            raise ValueError(
                f"delta {self.delta} needs loss={' or '.join(map(repr, HELD))}, "
                f"got loss={self.loss!r}"
            )

    @staticmethod
    def _weights_can_be_held(sign: str, k: float, decay: float, dtype: torch.dtype) -> None:
        """vespo: e^λ w^k e^(−λw), largest at w = k/λ, is a number for all w from 1e-8 to e^20."""
        w = min(max(k / decay, 1e-8), math.exp(20.0))
        largest = decay + k * math.log(w) - decay * w
        most = math.log(torch.finfo(dtype).max) - 8.0  # a factor of 3000 for what it multiplies
        if not largest <= most:
            raise ValueError(
                f"vespo_k_{sign} {k:g} and vespo_lambda_{sign} {decay:g} make weights of up to "
                f"e^{largest:.3g}, expected at most e^{most:.0f}"
            )

    def values(self) -> tuple[Any, ...]:
        """As the kernels take them; ``PolicyOptions(*values)`` is this again."""
        return tuple(
            float(getattr(self, name)) if type(getattr(self, name)) is int else getattr(self, name)
            for name in self.__dataclass_fields__
        )

    @classmethod
    def checked(
        cls, dtype: torch.dtype, options: dict[str, Any]
    ) -> tuple[PolicyOptions, tuple[Any, ...]]:
        """(the checked options, their values()) of a call's keyword arguments. The last calls' are
        kept: to make and check them again would take a small call 25 us."""
        check_once: Any = _checked
        if torch.compiler.is_compiling() or not all(map(hashable, options.values())):
            check_once = _checked.__wrapped__
        found: tuple[PolicyOptions, tuple[Any, ...]] = check_once(dtype, **options)
        return found

    @classmethod
    def schema(cls) -> str:
        """The kernels' arguments for values()."""
        return ", ".join(f"{SCHEMA[f.type]} {f.name}" for f in fields(cls))

    @classmethod
    def documented(cls, function: F) -> F:
        """function(..., **options), with the options in its signature and its docstring."""
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()  # the last is **options
        keyword = inspect.Parameter.KEYWORD_ONLY
        own += [
            inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type)
            for f in fields(cls)
        ]
        function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        if function.__doc__ is not None:  # python -OO
            lines = "\n".join(f"{f.name}: {meaning(f)}" for f in fields(cls))
            function.__doc__ = function.__doc__.replace(HERE, indented(lines, 8).lstrip())
        return function


@functools.lru_cache(maxsize=64, typed=True)  # typed: True, which is no number, equals 1
def _checked(dtype: torch.dtype, **options: Any) -> tuple[PolicyOptions, tuple[Any, ...]]:
    chosen = PolicyOptions(**options)
    chosen.check(dtype)
    return chosen, chosen.values()


def hashable(x: Any) -> bool:
    return type(x).__hash__ is not None


def meaning(f: Any) -> str:
    """One sentence of an option: what it may be, what it does."""
    signs = {"low": "≥", "high": "≤", "above": "above"}
    bounds = [f"{signs[k]} {v:g}" for k, v in f.metadata["range"].items() if v is not None]
    may_be = ", ".join(f.metadata["choices"] or bounds)
    if f.type.endswith("None"):
        may_be = f"{may_be}, or None" if may_be else "may be None"
    return f"{may_be}; {f.metadata['help']}." if may_be else f"{f.metadata['help']}."


def indented(lines: str, by: int) -> str:
    """Each line wrapped to 100 columns, what follows its first one 4 deeper."""
    first, rest = " " * by, " " * (by + 4)
    wrap = textwrap.TextWrapper(100, initial_indent=first, subsequent_indent=rest)
    return "\n".join(wrap.fill(line) for line in lines.splitlines())
