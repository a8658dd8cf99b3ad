"""constraints.txt has a pin for all that pyproject.toml asks for, within its ranges."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = [Requirement(line) for line in LINES if not line.startswith("#")]
HERE = {canonicalize_name(p.name): p for p in PINS if p.marker is None or p.marker.evaluate()}


def asked_for(*extras: str) -> list[Requirement]:
    everything = map(Requirement, requires("rlhf_fast"))
    return [
        each
        for each in everything
        if each.name != "rlhf_fast"
        and (each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras))
    ]


def test_every_package_is_pinned_in_its_range() -> None:
    """Fails after an edit of pyproject.toml without `make constraints`."""
    asked = asked_for("", "train", "lora", "demo", "examples", "integrations", "bench", "test")
    assert len(asked) > 20
    wrong = []
    for each in asked:
        pin = HERE.get(canonicalize_name(each.name))
        if pin is None or not each.specifier.contains(str(pin.specifier).removeprefix("==")):
            wrong.append(f"{each}: {pin}")
    assert wrong == []


def test_pins_are_versions_and_nothing_else() -> None:
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in PINS)
    assert [line for line in LINES if "//" in line or line.startswith("-")] == []


def test_the_ops_need_torch_and_triton_alone() -> None:
    assert {each.name for each in asked_for("")} <= {"torch", "triton"}
