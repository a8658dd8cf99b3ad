"""The products that the logits of a head are made by."""

from __future__ import annotations

import pytest
from torch import Tensor

from rlhf_fast.ops.linear import chunks


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every one from now on."""
    seen: list[tuple[int, int]] = []
    make_logits = chunks.make_logits

    def made(head, hidden: Tensor, out: Tensor) -> None:
        seen.append(tuple(out.shape))
        make_logits(head, hidden, out)

    monkeypatch.setattr(chunks, "make_logits", made)
    return seen
