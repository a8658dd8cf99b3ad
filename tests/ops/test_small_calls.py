"""A small call costs its kernel and little else: each of torch's functions that is called beside it
takes 1 to 3 us, as much as the kernel itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops.options import PolicyOptions
from rlhf_fast.ops.registry import OPS

PER_TOKEN = ["policy_loss", "value_loss", "gae", "token_kl", "kl_penalized_rewards",
             "pairwise_loss", "masked_mean", "masked_whiten"]  # fmt: skip
FREE = {"aten::view", "aten::detach", "aten::unbind"}  # of no data


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def called(name: str, *, grad: bool) -> list[str]:
    op = OPS[name]
    shape = {letter: min(size, 8) for letter, size in op.shapes[0].items()}
    sample = op.workload(shape, torch.Generator().manual_seed(0), "cpu", torch.float32)
    for leaf in sample.grads:
        sample.arguments[leaf].requires_grad_(grad)
    with Called() as mode:
        op.function(**sample.arguments)
    return mode.names


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_nothing_but_kernels_touches_the_data(name: str, grad: bool) -> None:
    names = called(name, grad=grad)
    kernels = {f"rlhf_fast::{kernel.name}" for kernel in OPS[name].kernels}
    assert set(names) <= FREE | kernels
    assert sum(n in FREE for n in names) <= 4  # and few of those


def test_looking_at_labels_takes_five_calls() -> None:
    names = called("token_logprobs", grad=False)
    data = [n for n in names if n not in {*FREE, "aten::unsqueeze", "rlhf_fast::token_logprobs"}]
    item = "aten::_local_scalar_dense"
    assert data == ["aten::eq", "aten::masked_fill", "aten::aminmax", item, item]


def test_options_are_checked_once() -> None:
    """And never taken for others that are equal: True is 1, and no number."""
    float32 = torch.float32
    chosen, _ = PolicyOptions.checked(float32, {"clip_low": 1.0})
    assert PolicyOptions.checked(float32, {"clip_low": 1.0})[0] is chosen
    with pytest.raises(TypeError, match="clip_low must be a number, got bool True"):
        PolicyOptions.checked(float32, {"clip_low": True})
    with pytest.raises(TypeError, match="clip_low must be a number, got list"):
        PolicyOptions.checked(float32, {"clip_low": [1.0]})
    with pytest.raises(TypeError, match="clip_lo"):
        PolicyOptions.checked(float32, {"clip_lo": 1.0})
