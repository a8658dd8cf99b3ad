"""The linear layer of a decoding step against `linear` in float64."""

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast.ops.decoding import thin_linear as module
from rlhf_fast.ops.decoding.thin_linear import MOST_ROWS, thin_linear

# around the groups of 8 and 16, with AVX-512 of 16 and 32
ROWS = (1, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 48, 49, 64, MOST_ROWS)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("outputs", [1, 3, 4, 5, 6, 7, 12, 193])  # around the kernel's 6 and 4
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 256, 600])  # its lines of 16, blocks of 256
@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(outputs: int, columns: int, biased: bool) -> None:
    weight, bias = draw(outputs, columns), draw(outputs) if biased else None
    for rows in ROWS:
        x = draw(rows, columns)
        y = torch.ops.rlhf_fast.thin_linear(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=2e-6 * columns**0.5)


def test_the_rows_beside_a_row_do_not_change_it() -> None:
    x, weight = draw(40, 300), draw(50, 300)
    whole = thin_linear(x, weight)
    for rows in (slice(0, 1), slice(3, 20), slice(33, 40)):
        assert torch.equal(thin_linear(x[rows], weight), whole[rows])


def test_shapes_and_strides() -> None:
    x, weight = draw(9, 2, 7).transpose(0, 2), draw(9, 20).t()  # [7, 2, 9] and [20, 9]
    torch.testing.assert_close(thin_linear(x, weight), F.linear(x, weight))
    assert thin_linear(x[0, 0], weight).shape == (20,)
    assert thin_linear(x[:0], weight).shape == (0, 2, 20)


@pytest.mark.parametrize("what", ["many rows", "float64", "bfloat16", "autocast", "gradient"])
def test_what_goes_to_linear(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.rlhf_fast, "thin_linear", None)  # calling it would fail
    x, weight = draw(MOST_ROWS + (what == "many rows"), 8), draw(4, 8)
    if what in ("float64", "bfloat16"):
        x, weight = (t.to(getattr(torch, what)) for t in (x, weight))
    if what == "gradient":
        weight.requires_grad_()
    with torch.autocast("cpu", enabled=what == "autocast"):
        y, plain = module.thin_linear(x, weight), F.linear(x, weight)
    assert torch.equal(y, plain) and y.dtype == plain.dtype


def test_opcheck() -> None:
    for bias in (None, draw(3)):
        arguments = (draw(4, 8), draw(3, 8), bias)
        torch.library.opcheck(torch.ops.rlhf_fast.thin_linear.default, arguments)
