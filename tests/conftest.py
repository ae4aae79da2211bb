"""Fixtures that several test modules share: tiny real pictures in a public folder layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def parity_fixtures() -> Path:
    """Folder of the reference numbers: ``PARITY_FIXTURES``, by default the copy in ``tests/golden``."""
    return Path(os.environ.get("PARITY_FIXTURES") or GOLDEN)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked ``forks`` runs in a fresh process: a copy of one whose libraries have started threads can hang."""
    if pyfuncitem.get_closest_marker("forks") is None or "IN_A_FRESH_PROCESS" in os.environ:
        return None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath, env=os.environ | {"IN_A_FRESH_PROCESS": "1"}, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What looks at the notebooks' results runs after them, and only where they run."""
    last = [item for item in items if item.path.name == "test_quality.py"]
    others = [item for item in items if item not in last]
    if any(item.path.suffix == ".ipynb" for item in others):
        items[:] = others + last
    elif others:
        items[:] = others
        config.hook.pytest_deselected(items=last)
