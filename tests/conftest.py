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
