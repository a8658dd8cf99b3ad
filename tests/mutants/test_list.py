"""The mutants still are what they were: each names a text of its file that is there once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants.list import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.name}")
def test_its_text_is_there_once(mutant) -> None:
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    for word in mutant.tests.split():
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), word


def test_enough_of_them_and_each_once() -> None:
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS) >= 50
