"""A token for a draw, against the cumulated probabilities in float64."""

import math

import pytest
import torch

from rlhf_fast.ops.decoding import draw_tokens as module

SIZES = (1, 7, 8, 9, 511, 512, 513, 1025, 49152)  # around the vectors of 8 and the parts of 512


def draw_tokens(logits, draws):
    return torch.ops.rlhf_fast.draw_tokens(logits, torch.as_tensor(draws, dtype=torch.float64))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_against_float64(size: int, scale: float) -> None:
    logits = scale * draw(64, size) - 40.0
    logits[:, 1::7] = float("-inf")
    draws = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    token, logp = draw_tokens(logits, draws)
    exact = torch.log_softmax(logits.double(), -1)
    expected = (exact.exp().cumsum(-1) <= draws[:, None]).sum(-1)
    assert torch.equal(token, expected)
    exact = exact.gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("draw_tokens", [draw_tokens, module.reference], ids=["C++", "PyTorch"])
@pytest.mark.parametrize("size", [3, 8, 512, 2000])
def test_the_ends_of_the_draws(size: int, draw_tokens) -> None:
    """Never a token of probability 0: not at a draw of 0, nor where rounding ends below 1."""
    logits = torch.full((200, 3 * size), float("-inf"))
    logits[:, size : 2 * size] = draw(200, size)
    logits[:, 2 * size - 1] = -200.0  # e to the -200 is 0, too
    logits[0, size] = -200.0
    draws = torch.full((200,), 1 - 2**-53, dtype=torch.float64)
    draws[:2] = 0.0
    token, logp = draw_tokens(logits, draws)
    assert token.tolist() == [size + 1, size] + 198 * [2 * size - 2]
    assert torch.isfinite(logp).all()


@pytest.mark.parametrize("draw_tokens", [draw_tokens, module.reference], ids=["C++", "PyTorch"])
@pytest.mark.parametrize("nothing", [-200.0, float("-inf")])
def test_a_sum_that_never_comes_to_the_target(nothing: float, draw_tokens) -> None:
    """One by one, 2^-54 added to 1 is lost; in lanes it is not, so the total is out of reach."""
    logits = torch.full((1, 500), nothing)
    logits[:, 0], logits[:, 1:400] = 0.0, -54 * math.log(2)
    token, logp = draw_tokens(logits, torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert token.item() < 400 and logp.item() > -100


def test_the_rows_beside_a_row_do_not_change_it() -> None:
    logits, draws = draw(40, 3000), torch.rand(40, generator=torch.Generator().manual_seed(0))
    tokens, logp = draw_tokens(logits, draws)
    for row in range(40):
        one = slice(row, row + 1)
        alone = draw_tokens(logits[one], draws[one])
        assert torch.equal(alone[0], tokens[one]) and torch.equal(alone[1], logp[one])


def test_opcheck() -> None:
    draws = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    kernel = getattr(torch.ops.rlhf_fast, module.KERNEL.name)
    torch.library.opcheck(kernel.default, (draw(3, 20), draws))


def test_no_row() -> None:
    token, logp = draw_tokens(torch.empty(0, 9), torch.empty(0))
    assert token.shape == logp.shape == (0,)
