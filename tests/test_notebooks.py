"""Every notebook runs in ``mini`` (nbmake collects them), and every notebook is fit to be read and reviewed."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from helpers import profiles

REPOSITORY = profiles.REPOSITORY
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MAX_CELL_LINES, MAX_SET_UP_LINES = 15, 8
BADGE = "https://colab.research.google.com/github/art-anomaly/art-anomaly-notebooks/blob/main/notebooks/"
CARD = ("Reads", "Writes", "Needs", "Time and hardware")
COLAB_NOISE = ("id", "outputId", "colab", "collapsed", "scrolled", "executionInfo")
BRANCH = re.compile(r"\bif\b[^#\n]*\bprofile\b|\bprofile\.name\s*[!=]=|\bwhile\b|\btry:|\bdef |\bclass ")
TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bghp_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9]{20,}"
    r"|\bAIza[0-9A-Za-z_-]{30,}|\bglpat-[A-Za-z0-9_-]{20,}"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


SET_UP = _cells(NOTEBOOKS[0], "code")[0].source


@each_notebook
def test_notebook_is_valid_and_stripped(path: Path) -> None:
    """Saved from Colab with a progress bar, ``metadata.widgets`` makes GitHub show *Invalid Notebook*."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert not set(cell.metadata) & set(COLAB_NOISE)
        assert cell.source.strip(), "an empty cell"
    for cell in _cells(path, "code"):
        assert cell.outputs == [] and cell.execution_count is None
        assert not {"skip-execution", "raises-exception"} & set(cell.metadata.get("tags", []))
        assert "nbmake" not in cell.metadata


@each_notebook
def test_notebook_opens_with_title_badge_and_card(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {path.stem[:2]} · ")
    assert f"({BADGE}{path.name})" in first.source, "the Colab badge names another notebook"
    card = dict(re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \|$", first.source, flags=re.MULTILINE))
    assert list(card) == list(CARD) and all(len(text) >= 5 for text in card.values())
    assert "mini" in card["Time and hardware"] and re.search("estimate|rithmetic", card["Time and hardware"])


@each_notebook
def test_notebook_begins_with_the_same_set_up_ends_with_checks_and_has_more_prose_than_code(path: Path) -> None:
    code, n_words = _cells(path, "code"), sum(len(cell.source.split()) for cell in _cells(path, "markdown"))
    assert code[0].source == SET_UP and len(SET_UP.splitlines()) <= MAX_SET_UP_LINES
    assert n_words >= 25 * len(code), "a result without a sentence about it is understood by nobody"
    assert any("results.confirm(" in cell.source or "assert " in cell.source for cell in code[-4:])
    assert any(cell.source.startswith("## Summary") for cell in _cells(path, "markdown")[-2:])


@each_notebook
def test_cells_are_short_hold_no_branch_on_the_profile_and_fit_the_page(path: Path) -> None:
    """In Colab a form is one line with a play button; what is read must not be cut off at the right."""
    cells = _cells(path, "code")
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= MAX_CELL_LINES, f"{len(lines)} lines: {lines[0]}"
        assert not BRANCH.search(cell.source)
        is_form = cell.source.startswith(("#@title Set-up", "#@title Check"))
        assert (cell.metadata.get("cellView") == "form") == is_form, cell.source[:60]
    assert all(len(line) <= 100 for cell in cells[1:] for line in cell.source.splitlines())
    assert any(cell.source.startswith("#@title Check") for cell in cells[-3:])


@each_notebook
def test_nothing_foreign_is_installed_imported_or_named(path: Path) -> None:
    """A remote service or an unquoted ``>=`` in a cell is what breaks notebooks most often; and no path, no token."""
    for cell in _cells(path, "code"):
        assert not re.search(r"^\s*[!%]", cell.source, flags=re.MULTILINE), "no shell and no magic commands"
        assert not re.search(r"^\s*(?:import|from) google\b", cell.source, flags=re.MULTILINE), "session has guards"
        assert not re.search(r"weights_only\s*=\s*False|\bpickle\b|allow_pickle", cell.source)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w./])/(home|content|root|work|tmp|mnt|Users|usr|opt)/|\b[A-Z]:\\\\", text)
    assert not TOKENS.search(text)


@each_notebook
def test_links_resolve_and_the_readme_links_to_each_notebook(path: Path) -> None:
    for cell in _cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)]+)\)", cell.source):
            assert not target.startswith("http://")
            if not target.startswith("https://"):
                assert (path.parent / target.partition("#")[0]).exists(), target
    assert int(path.stem[:2]) == NOTEBOOKS.index(path) + 1
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"[{path.stem}](notebooks/{path.name})" in readme and f"({BADGE}{path.name})" in readme


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> SimpleNamespace:
    """``run(folder)`` runs the set-up cell with every command recorded; ``git clone`` links this repository."""
    commands: list[list[str]] = []

    def record(command: list[str], check: bool) -> None:
        commands.append(command)
        assert check, "a failed command must stop the cell"
        if command[:2] == ["git", "clone"]:
            Path(command[-1]).symlink_to(REPOSITORY, target_is_directory=True)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(folder: Path) -> profiles.Profile:
        monkeypatch.chdir(folder)
        names: dict[str, object] = {}
        exec(SET_UP, names)
        return names["profile"]

    return SimpleNamespace(run=run, commands=commands)


def test_set_up_works_from_a_local_checkout(set_up: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    assert set_up.run(REPOSITORY / "notebooks").name == "mini"
    assert set_up.commands == []
    assert "✓ weights" in capsys.readouterr().out


def test_set_up_clones_on_colab_once_and_installs(set_up, monkeypatch, tmp_path: Path) -> None:
    """A machine that has only the notebook: clone, then the script; the second time neither."""
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    for name in [name for name in sys.modules if name.partition(".")[0] == "helpers"]:
        monkeypatch.delitem(sys.modules, name)
    set_up.run(tmp_path)
    clone, install = set_up.commands
    assert clone[:3] == ["git", "clone", "--depth"] and clone[-1] == "art-anomaly"
    assert install == ["bash", "art-anomaly/colab_setup.sh"]
    set_up.run(tmp_path)
    assert len(set_up.commands) == 2, "modules in use are not exchanged under a running kernel"


def test_script_on_colab_updates_and_installs_only_what_is_missing(tmp_path: Path) -> None:
    """With stand-ins for python3 and git that write down how they were called."""
    log = tmp_path / "log"
    for name, answer in (("python3", "echo full"), ("git", "exit 1")):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >>"{log}"\n{answer}\n')
        stub.chmod(0o755)
    done = subprocess.run(
        ["bash", REPOSITORY / "colab_setup.sh"], capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "COLAB_RELEASE_TAG": "release-colab_20260819"},
    )  # fmt: skip
    assert "was not updated" in done.stdout and "Set-up: done" in done.stdout
    calls = log.read_text().splitlines()
    assert calls[0] == f"git -C {REPOSITORY} pull --quiet --ff-only"
    installs = [call for call in calls if " -m pip install " in call]
    assert len(installs) == 1 and installs[0].endswith(f"-r {REPOSITORY}/requirements.txt")
    assert " -U" not in installs[0] and "--upgrade" not in installs[0]
