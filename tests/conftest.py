"""Fixtures that several test modules share: tiny real pictures in a public folder layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def parity_fixtures() -> Path:
    """Folder of the reference numbers: ``PARITY_FIXTURES``, by default the copy in ``tests/golden``."""
    return Path(os.environ.get("PARITY_FIXTURES") or GOLDEN)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What looks at the notebooks' results runs after them, and only where they run."""
    last = [item for item in items if item.path.name == "test_quality.py"]
    others = [item for item in items if item not in last]
    if any(item.path.suffix == ".ipynb" for item in others):
        items[:] = others + last
    elif others:
        items[:] = others
        config.hook.pytest_deselected(items=last)
