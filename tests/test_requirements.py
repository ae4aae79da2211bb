"""requirements.txt changes nothing that Colab preinstalls, and says so offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

TESTS = Path(__file__).parent
BROUGHT_BY_US = {"open_clip_torch"}


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


REQUIREMENTS = [Requirement(line) for line in _lines(TESTS.parent / "requirements.txt")]
FREEZE: dict[str, dict[str, str]] = {}
for line in _lines(TESTS / "colab_freeze.txt"):
    runtime, pin = line.split()
    FREEZE.setdefault(runtime, {}).update([pin.split("==")])


@pytest.mark.parametrize("runtime", FREEZE)
@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_preinstalled_version_satisfies_the_requirement(requirement: Requirement, runtime: str) -> None:
    preinstalled = FREEZE[runtime].get(requirement.name)
    if requirement.name in BROUGHT_BY_US:
        assert preinstalled is None
    elif requirement.specifier:
        assert preinstalled is not None, f"{requirement.name} is not preinstalled on Colab {runtime}"
        assert requirement.specifier.contains(preinstalled)


def test_only_our_own_packages_are_capped() -> None:
    """A cap on a preinstalled package becomes a downgrade on the day Colab ships its next version."""
    capped = {r.name for r in REQUIREMENTS if any(part.operator in ("<", "<=", "==", "~=") for part in r.specifier)}
    assert capped == BROUGHT_BY_US
