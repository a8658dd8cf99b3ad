import pytest

from rlhf_fast.trainer.run.diagnostics import warnings

QUIET = {
    "objective/kl": 2.0, "val/answer_tokens": 20.0, "policy/entropy_avg": 1.5,
    "val/rollout_ratio_max": 1.01, "val/explained_var": 0.3, "skipped_updates": 0,
}  # fmt: skip


def rows(count: int = 30, **last: float | None) -> list[dict]:
    """A quiet run whose last row differs."""
    return [dict(QUIET) for _ in range(count - 1)] + [{**QUIET, **last}]


def test_a_quiet_run_and_none_at_all():
    assert warnings(rows()) == {} and warnings([]) == {}


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ({"objective/kl": 10.1}, "kl_explodes"),  # 5 times what it was
        ({"objective/kl": -1.1}, "kl_is_negative"),
        ({"policy/entropy_avg": 0.14}, "entropy_collapses"),
        ({"val/rollout_ratio_max": 10.5}, "rollout_differs"),
        ({"skipped_updates": 2}, "updates_skipped"),
    ],
)
def test_one_row_is_enough(last, name):
    assert list(warnings(rows(**last))) == [name]


@pytest.mark.parametrize(
    "last",
    [
        {"objective/kl": 9.9},
        {"objective/kl": -0.9},
        {"policy/entropy_avg": 0.16},
        {"val/rollout_ratio_max": 9.5},
        {"objective/kl": None},  # not finite in the metrics
        {"policy/entropy_avg": None, "val/explained_var": None},
    ],
)
def test_not_yet(last):
    assert warnings(rows(**last)) == {}


def test_kl_of_a_token():
    assert warnings([{"objective/kl": 6.1, "val/answer_tokens": 4.0}]).keys() == {"kl_explodes"}
    assert warnings([{"objective/kl": 5.9, "val/answer_tokens": 4.0}]) == {}


def test_negative_three_times_in_a_row():
    low = {**QUIET, "objective/kl": -0.1}
    assert warnings([QUIET, low, low]) == {}
    assert warnings([QUIET, low, low, low]).keys() == {"kl_is_negative"}


def test_a_critic_that_learns_nothing_for_long():
    bad = {**QUIET, "val/explained_var": -0.1}
    assert warnings([QUIET] + [bad] * 19) == {}
    assert warnings([QUIET] + [bad] * 20).keys() == {"critic_knows_nothing"}
    assert warnings([bad] * 19 + [QUIET]) == {}


def test_words_name_numbers_and_a_remedy():
    (text,) = warnings(rows(**{"objective/kl": 123.4})).values()
    assert "123.4 nats" in text and "beta" in text


def test_a_first_step_that_was_not_finite_blinds_no_check():
    """metrics.jsonl has null there, as the rows in memory have."""
    seen = rows(**{"policy/entropy_avg": 0.14})
    seen[0]["policy/entropy_avg"] = None
    assert list(warnings(seen)) == ["entropy_collapses"]
    seen = rows(**{"objective/kl": 40.0})
    seen[-8]["objective/kl"] = None
    assert list(warnings(seen)) == ["kl_explodes"]
