"""The ops are tested on two threads."""

import pytest


@pytest.fixture(autouse=True)
def threads(two_threads) -> None:
    pass
