"""Every notebook runs in ``mini`` (nbmake collects them), and every notebook is fit to be read and reviewed."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MAX_CELL_LINES = 15

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_notebook_is_valid_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in _code_cells(path):
        assert cell.outputs == [] and cell.execution_count is None
        assert "skip-execution" not in cell.metadata.get("tags", [])


def test_notebook_opens_with_title_badge_and_card(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {path.stem[:2]} · ")
    assert f"/notebooks/{path.name})" in first.source, "the Colab badge names another notebook"
    for word in ("Reads", "Writes", "Needs", "Time and hardware"):
        assert f"**{word}**" in first.source


def test_set_up_cell_is_the_same_everywhere(path: Path) -> None:
    set_up = _code_cells(path)[0].source
    assert set_up == _code_cells(NOTEBOOKS[0])[0].source
    assert len(set_up.splitlines()) <= 8


def test_cells_are_short_and_hold_no_branch_on_the_profile(path: Path) -> None:
    for cell in _code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= MAX_CELL_LINES, f"{len(lines)} lines: {lines[0]}"
        assert not re.search(r"\bif\b.*\bprofile\.name\b|\bprofile\.name\s*==", cell.source)


def test_no_absolute_path_and_no_token(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"[\"'](/home/|/content/|/root/|/work/|/tmp/)", text)
    assert not re.search(r"\bhf_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b", text)


def test_notebook_stands_in_the_readme(path: Path) -> None:
    assert path.name in (REPOSITORY / "README.md").read_text(encoding="utf-8")
