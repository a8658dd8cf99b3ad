"""A pytest plugin: tests run on the pretended GPU; those of a real one are named and left out."""

from __future__ import annotations

from collections.abc import Iterator

import device
import pytest
import torch
from interpreting import faster

faster()
torch.cuda.is_available = lambda: True  # when tests are collected, already
LEFT_OUT = "left out on the pretended GPU: "
left_out: dict[str, str] = {}


@pytest.fixture(autouse=True)
def on_the_pretended_gpu() -> Iterator[None]:
    with device.pretended():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    real = [item for item in items if item.get_closest_marker("real_gpu")]
    for item in real:
        left_out[item.originalname] = item.get_closest_marker("real_gpu").args[0]
    items[:] = [item for item in items if item not in real]
    config.hook.pytest_deselected(items=real)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, reason in left_out.items():
        terminalreporter.write_line(f"{LEFT_OUT}{name}: {reason}")
