"""gae_packed: generalized advantage estimation on sequences packed end to end, without padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import check
from . import gae as padded
from .registry import Op, Sample, define_kernel, register


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    holes: str = "skip",
) -> tuple[Tensor, Tensor]:
    """``gae`` of B sequences that lie end to end, as flash-attn's cu_seqlens describes them.

    Sequence b is ``[cu_seqlens[b]:cu_seqlens[b + 1]]``; nothing flows from one into another. The
    numbers are those of ``gae`` on the padded form, which has the formula.

    Args:
        rewards, values: [N], in units of reward.
        cu_seqlens: [B+1], int32 or int64, rising from 0 to N; equal neighbours are an empty
            sequence. Its values are checked on CPU, and on CUDA under ``rlhf_fast.debug()``.
        mask, dones: [N] bool; gamma, lam, holes: as in ``gae``.
        bootstrap: [B], the value after each sequence's last step.

    Returns:
        (advantages, returns), both [N], float32 (float64 in, float64 out).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or value, by name.
    """
    check.floating("rewards", rewards)
    check.shaped("rewards", rewards, [rewards.numel()], "[N]")
    check.like("values", values, "rewards", rewards)
    check.cumulative_lengths(cu_seqlens, "rewards", rewards)
    if mask is not None:
        check.boolean_mask(mask, "rewards", rewards)
    if dones is not None:
        check.boolean_mask(dones, "rewards", rewards, name="dones")
    if bootstrap is not None:
        check.floating("bootstrap", bootstrap)
        check.shaped("bootstrap", bootstrap, [cu_seqlens.numel() - 1], "[B] of cu_seqlens [B+1]")
        check.same_device("bootstrap", bootstrap, "rewards", rewards)
    dtype = check.accumulator(rewards, values, bootstrap)
    padded.check_options(gamma, lam, holes, dtype)

    return torch.ops.rlhf_fast.gae_packed(
        rewards.detach().to(dtype).contiguous(),
        values.detach().to(dtype).contiguous(),
        cu_seqlens.to(torch.int64).contiguous(),
        None if mask is None else mask.contiguous(),
        None if dones is None else dones.contiguous(),
        None if bootstrap is None else bootstrap.detach().to(dtype).contiguous(),
        float(gamma),
        float(lam),
        holes == "skip",
    )


def reference(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    dones: Tensor | None = None,
    **options: float | str,
) -> tuple[Tensor, Tensor]:
    """``gae`` of one sequence after another."""
    dtype = check.accumulator(rewards, values, bootstrap)
    advantages, returns = (
        torch.empty_like(rewards, dtype=dtype),
        torch.empty_like(rewards, dtype=dtype),
    )
    bounds = cu_seqlens.tolist()
    for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        one = slice(begin, end)
        advantages[one], returns[one] = padded.reference(
            rewards[one].to(dtype),
            values[one].to(dtype),
            None if mask is None else mask[one],
            dones=None if dones is None else dones[one],
            bootstrap=None if bootstrap is None else bootstrap[b],
            **options,
        )
    return advantages, returns


def _forward(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    skip_holes: bool,
) -> tuple[Tensor, Tensor]:
    return reference(
        rewards, values, cu_seqlens, mask=mask, gamma=gamma, lam=lam, dones=dones,
        bootstrap=bootstrap, holes="skip" if skip_holes else "zero",
    )  # fmt: skip


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(*lengths: int, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
        return {
            "rewards": torch.randn(sum(lengths), generator=generator),
            "values": torch.randn(sum(lengths), generator=generator),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(dtype),
        }

    yield Sample("defaults", draw(5, 37, 1, 16))
    yield Sample("int32, empty sequences", draw(0, 3, 0, 0, 9, 0, dtype=torch.int32))
    yield Sample("one sequence", draw(11))
    yield Sample("no sequences", draw())
    yield Sample("no tokens", draw(0, 0))
    for holes in padded.HOLES:
        x = draw(13, 0, 29, 8, 1, 70)
        n = x["rewards"].numel()
        x |= {
            "mask": torch.rand(n, generator=generator) < 0.6,
            "dones": torch.rand(n, generator=generator) < 0.1,
            "bootstrap": torch.randn(6, generator=generator),
        }
        for name in ("rewards", "values"):
            x[name][~x["mask"]] = torch.nan
        yield Sample(f"{holes}, everything", {**x, "gamma": 0.97, "lam": 0.9, "holes": holes})


def workload(
    shape: dict[str, int], generator: torch.Generator, device: str, dtype: torch.dtype
) -> Sample:
    n = shape["B"] * shape["T"]
    arguments = {
        "rewards": torch.randn(n, generator=generator, device=device),
        "values": torch.randn(n, generator=generator, device=device),
        "cu_seqlens": torch.arange(shape["B"] + 1, device=device) * shape["T"],
        "gamma": 0.99,
    }
    return Sample("bench", arguments)


def bytes_moved(shape: dict[str, int], element_size: int) -> tuple[int, int]:
    return shape["B"] * shape["T"] * 4 * 4, 0


KERNEL = define_kernel(
    "gae_packed(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? dones, "
    "Tensor? bootstrap, float gamma, float lam, bool skip_holes) -> (Tensor, Tensor)",
    fallback=_forward,
    fake=lambda rewards, *_: (torch.empty_like(rewards), torch.empty_like(rewards)),
    triton="gae:gae_packed",
)
register(
    Op(
        "gae_packed",
        gae_packed,
        reference,
        (KERNEL,),
        samples,
        workload,
        ({"B": 256, "T": 1024}, {"B": 64, "T": 256}),
        bytes_moved,
    )
)
