"""What Colab preinstalls stays as it is, said offline; code and notebooks pass the linter of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

TESTS = Path(__file__).parent
BROUGHT_BY_US = {"open_clip_torch"}


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


REQUIREMENTS = [Requirement(line) for line in _lines(TESTS.parent / "requirements.txt")]


def test_preinstalled_versions_satisfy_the_requirements_and_only_ours_are_capped() -> None:
    """A cap on a preinstalled package becomes a downgrade on the day Colab ships its next version."""
    freezes: dict[str, dict[str, str]] = {}
    for runtime, pin in (line.split() for line in _lines(TESTS / "colab_freeze.txt")):
        freezes.setdefault(runtime, {}).update([pin.split("==")])
    for runtime, freeze in freezes.items():
        for one in REQUIREMENTS:
            there = freeze.get(one.name)
            if one.name in BROUGHT_BY_US:
                assert there is None
            elif one.specifier:
                assert there is not None and one.specifier.contains(there), f"{one} has {there} on Colab {runtime}"
    capped = {r.name for r in REQUIREMENTS if any(part.operator in ("<", "<=", "==", "~=") for part in r.specifier)}
    assert capped == BROUGHT_BY_US


def test_code_and_notebooks_pass_the_linter() -> None:
    for command in (["check"], ["format", "--check", "--quiet", "helpers", "tests"]):
        command = [sys.executable, "-m", "ruff", *command]
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
