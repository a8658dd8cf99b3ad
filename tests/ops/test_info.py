"""`rlhf-fast info` names every op, what runs it, and how the extension was built."""

from __future__ import annotations

import pytest

from rlhf_fast import info
from rlhf_fast.ops import registry


def test_every_op_and_fact_is_printed(capsys: pytest.CaptureFixture) -> None:
    info.main()
    printed = capsys.readouterr().out
    for name in (*registry.OPS, "torch", "triton", "C++ kernels", "CUDA kernels", "CUDA devices",
                 "16-bit products on CPU"):  # fmt: skip
        assert name in printed
    if registry.extension is not None:
        for fact in ("compiler", "OpenMP", "SIMD"):
            assert fact in printed


def test_implementations_are_those_of_the_dispatcher() -> None:
    on_cpu = info.implementations("cpu")
    assert on_cpu["gae"] == ("PyTorch" if registry.extension is None else "C++")
    assert on_cpu["linear_token_logprobs"] == "engine"
    assert info.implementations("cuda")["gae"] == ("Triton" if registry.HAS_TRITON else "PyTorch")


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        info.main("--markup")
    assert "unrecognized arguments: --markup" in capsys.readouterr().err
