"""What several test modules share: the folder of reference numbers, a clean environment, the order of tests."""

import os
from pathlib import Path

import pytest

FIXTURES = Path(os.environ.get("PARITY_FIXTURES") or Path(__file__).parent / "golden")
"""Folder of the reference numbers."""


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mini profile in an empty home, with its own pictures, and nothing kept elsewhere."""
    for name in ("ART_DATA", "ART_DRIVE", "ART_DRIVE_LIMIT_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ART_PROFILE", "mini")
    monkeypatch.setenv("ART_HOME", str(tmp_path / "home"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What looks at the notebooks' results runs after them, and only where they run."""
    last = [item for item in items if item.path.name == "test_quality.py"]
    others = [item for item in items if item not in last]
    if any(item.path.suffix == ".ipynb" for item in others):
        items[:] = others + last
    elif others:
        items[:] = others
        config.hook.pytest_deselected(items=last)
