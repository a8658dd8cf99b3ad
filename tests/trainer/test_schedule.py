import pytest

from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.schedule import Control


def control(**options) -> Control:
    defaults = {"model": "m", "data": "d", "reward": "r", "output_dir": "o", "batch_size": 50}
    return Control(PPOConfig(**(defaults | options)))


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 50 / 1000),
        (100.0, 1 + 0.2 * 50 / 1000),  # the error is clipped to ±0.2
        (-5.0, 1 - 0.2 * 50 / 1000),
    ],
)
def test_adaptive_kl(kl, factor):
    steered = control(beta=0.1, adaptive_kl_target=6.0, kl_horizon=1000)
    steered.adapt(kl)
    assert steered.beta == pytest.approx(0.1 * factor, rel=1e-12)
    steered.adapt(kl)
    assert steered.beta == pytest.approx(0.1 * factor**2, rel=1e-12)


def test_fixed_kl():
    fixed = control(beta=0.1)
    fixed.adapt(100.0)
    assert fixed.beta == 0.1


def test_skipped_in_a_row():
    counted = control(max_skipped_updates=2)
    assert [counted.made(x) for x in (False, True, False, False)] == [True, True, True, False]
    again = control(max_skipped_updates=3)
    again.load_state_dict(counted.state_dict())
    assert again.state_dict() == {"beta": 0.05, "given_beta": 0.05, "skipped_in_a_row": 2}


def test_the_given_beta_counts_where_it_was_changed():
    adapted = control(beta=0.1, adaptive_kl_target=6.0)
    adapted.adapt(100.0)
    state = adapted.state_dict()
    for beta, expected in ((0.1, adapted.beta), (0.2, 0.2)):
        again = control(beta=beta)
        again.load_state_dict(state)
        assert again.beta == expected


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), -float("inf")])
def test_a_kl_that_is_not_finite_leaves_beta_as_it_is(kl):
    """min and max let NaN pass, and a β that is NaN once is so for good, in checkpoints, too."""
    steered = control(beta=0.1, adaptive_kl_target=6.0)
    steered.adapt(kl)
    assert steered.beta == 0.1
    steered.adapt(100.0)
    assert 0.1 < steered.beta < 1


@pytest.mark.parametrize("beta", [float("nan"), float("inf"), -1.0, None])
def test_a_saved_beta_that_cannot_be_one(beta):
    state = control().state_dict() | {"beta": beta}
    with pytest.raises((TypeError, ValueError)):
        control().load_state_dict(state)
