"""gae: generalized advantage estimation, one reverse scan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import check
from .registry import Op, Sample, define_kernel, register

HOLES = ("skip", "zero")


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    holes: str = "skip",
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and their returns, by one scan from the right.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_t

    Schulman et al., arXiv:1506.02438, eq. 16. Beyond the last step V is ``bootstrap`` (0 without
    one) and A is 0. λ = 0 is TD(0), λ = 1 the discounted return minus V. No gradient flows.

    Args:
        rewards, values: [..., T], in units of reward; V_t is the value at the position that
            predicts action t.
        mask: [..., T] bool, True = counts; None: all count. Masked positions may hold anything;
            both results are 0 there.
        gamma: discount in [0, 1].
        lam: λ in [0, 1].
        dones: [..., T] bool, True where step t ended its episode: nothing flows from t+1 into t.
        bootstrap: [...], the value after step T−1, for episodes cut short.
        holes: what a masked position in the middle means: "skip" joins its neighbours as if it
            were not there (verl); "zero" is a step of reward 0 and value 0 (the plain recursion
            on zeroed inputs).

    Returns:
        (advantages, returns), both [..., T], float32 (float64 in, float64 out); returns are those
        *before* any whitening.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("rewards", rewards)
    check.at_least_1d("rewards", rewards)
    check.like("values", values, "rewards", rewards)
    if mask is not None:
        check.boolean_mask(mask, "rewards", rewards)
    if dones is not None:
        check.boolean_mask(dones, "rewards", rewards, name="dones")
    if bootstrap is not None:
        check.floating("bootstrap", bootstrap)
        check.shaped("bootstrap", bootstrap, list(rewards.shape[:-1]), "[...] of rewards")
        check.same_device("bootstrap", bootstrap, "rewards", rewards)
    dtype = check.accumulator(rewards, values, bootstrap)
    check_options(gamma, lam, holes, dtype)

    advantages, returns = KERNEL(
        check.constant(rewards, dtype),
        check.constant(values, dtype),
        check.flat(mask),
        check.flat(dones),
        None if bootstrap is None else check.line(bootstrap.detach(), dtype),
        float(gamma),
        float(lam),
        holes == "skip",
    )
    return check.reshaped(advantages, rewards.shape), check.reshaped(returns, rewards.shape)


def check_options(gamma: float, lam: float, holes: str, dtype: torch.dtype) -> None:
    """The checks that gae and gae_packed share."""
    for name, x in (("gamma", gamma), ("lam", lam)):
        check.number(name, x, low=0.0, dtype=dtype)
        if x > 1:
            raise ValueError(f"{name} must be at most 1, got {x}")
    check.choice("holes", holes, HOLES)


def reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    holes: str = "skip",
) -> tuple[Tensor, Tensor]:
    """The recursion as a Python loop over steps."""
    dtype = check.accumulator(rewards, values, bootstrap)
    with torch.no_grad():
        rewards, values = rewards.to(dtype), values.to(dtype)
        mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
        rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
        next_value = rewards.new_zeros(rewards.shape[:-1])
        if bootstrap is not None:
            next_value = bootstrap.to(dtype)
        next_advantage = torch.zeros_like(next_value)
        advantages = torch.zeros_like(rewards)
        for t in reversed(range(rewards.shape[-1])):
            if dones is not None:  # an episode that ended inside a hole ended all the same
                next_value = next_value.masked_fill(dones[..., t], 0.0)
                next_advantage = next_advantage.masked_fill(dones[..., t], 0.0)
            delta = rewards[..., t] - values[..., t]
            if gamma:  # 0·∞ is 0 here
                delta = rewards[..., t] + gamma * next_value - values[..., t]
            advantage = delta + gamma * lam * next_advantage if gamma * lam else delta
            counts = mask[..., t] if holes == "skip" else torch.ones_like(mask[..., t])
            next_value = torch.where(counts, values[..., t], next_value)
            next_advantage = torch.where(counts, advantage, next_advantage)
            advantages[..., t] = next_advantage
        advantages = advantages.masked_fill(~mask, 0.0)
        return advantages, (advantages + values).masked_fill(~mask, 0.0)


def _forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    skip_holes: bool,
) -> tuple[Tensor, Tensor]:
    return reference(
        rewards, values, mask, gamma=gamma, lam=lam, dones=dones, bootstrap=bootstrap,
        holes="skip" if skip_holes else "zero",
    )  # fmt: skip


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(*shape: int) -> dict[str, Tensor]:
        return {
            "rewards": torch.randn(*shape, generator=generator),
            "values": torch.randn(*shape, generator=generator),
        }

    def bits(*shape: int, p: float) -> Tensor:
        return torch.rand(*shape, generator=generator) < p

    yield Sample("defaults", draw(5, 37))
    yield Sample("one step", draw(3, 1))
    yield Sample("no steps", draw(3, 0))
    yield Sample("no rows", draw(0, 4))
    yield Sample("1-D", draw(11))
    yield Sample("3-D", {**draw(2, 3, 9), "mask": bits(2, 3, 9, p=0.7)})
    for holes in HOLES:
        x: dict[str, Any] = {**draw(19, 70), "mask": bits(19, 70, p=0.6), "gamma": 0.97, "lam": 0.9}
        x["rewards"][~x["mask"]] = torch.nan
        x["values"][~x["mask"]] = torch.inf
        yield Sample(f"{holes}, garbage in holes", {**x, "holes": holes})
        everything = {
            "dones": bits(19, 70, p=0.1),
            "bootstrap": torch.randn(19, generator=generator),
        }
        yield Sample(f"{holes}, dones, bootstrap", {**x, **everything, "holes": holes})
    yield Sample("all masked", {**draw(4, 8), "mask": bits(4, 8, p=0.0)})
    yield Sample("lam 0", {**draw(4, 8), "lam": 0.0, "gamma": 0.5})
    yield Sample("lam 1", {**draw(4, 8), "lam": 1.0, "gamma": 0.99})


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    size = (shape["B"], shape["T"])
    arguments = {
        "rewards": torch.randn(size, generator=generator, device=device),
        "values": torch.randn(size, generator=generator, device=device),
        "mask": torch.rand(size, generator=generator, device=device) > 0.1,
        "gamma": 0.99,
    }
    return Sample("bench", arguments)


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    return shape["B"] * shape["T"] * (4 * 4 + 1), 0


KERNEL = define_kernel(
    "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? bootstrap, "
    "float gamma, float lam, bool skip_holes) -> (Tensor, Tensor)",
    fallback=_forward,
    fake=lambda rewards, *_: (torch.empty_like(rewards), torch.empty_like(rewards)),
    triton="gae:gae",
)
register(
    Op(
        "gae",
        gae,
        reference,
        (KERNEL,),
        samples,
        workload,
        ({"B": 256, "T": 1024}, {"B": 64, "T": 256}),
        bytes_moved,
    )
)
