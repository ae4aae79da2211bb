"""What Colab preinstalls stays as it is, said offline; code and notebooks pass the linter of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
from packaging.requirements import Requirement

TESTS = Path(__file__).parent
LINES = (TESTS.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
BROUGHT_BY_US = {"open_clip_torch"}


def test_preinstalled_versions_satisfy_the_requirements_and_only_ours_are_capped() -> None:
    """A cap on a preinstalled package becomes a downgrade on the day Colab ships its next version."""
    columns = {"names": ["runtime", "name", "version"], "sep": " |==", "engine": "python", "dtype": str}
    pins = pd.read_csv(TESTS / "colab_freeze.txt", comment="#", **columns)
    requirements = [Requirement(line) for line in LINES if line and not line.startswith("#")]
    for one in requirements:
        there = pins[pins["name"] == one.name]
        if one.name in BROUGHT_BY_US:
            assert there.empty
        elif one.specifier:
            assert set(there["runtime"]) == set(pins["runtime"]), f"{one} is not everywhere"
            assert all(map(one.specifier.contains, there["version"])), f"{one} is not there:\n{there}"
    capped = {r.name for r in requirements if any(part.operator in ("<", "<=", "==", "~=") for part in r.specifier)}
    assert capped == BROUGHT_BY_US


def test_code_and_notebooks_pass_the_linter() -> None:
    for command in (["check"], ["format", "--check", "--quiet", "helpers", "tests"]):
        command = [sys.executable, "-m", "ruff", *command]
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
