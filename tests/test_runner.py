"""The main job: notebooks run in order, resume, and stop with the failing cell's error."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest

from helpers import profiles, runner


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``ART_HOME`` with two tiny notebooks, the second of which reads what the first writes."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("ART_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ART_PROFILE", "mini")
    monkeypatch.setenv("ART_DATA", "")
    out = tmp_path / "home" / "mini" / "data"
    _notebook(
        tmp_path, "01_first", f"import pathlib; p = pathlib.Path({str(out)!r}); p.mkdir(parents=True, exist_ok=True)"
    )
    _notebook(tmp_path, "02_second", f"open({str(out / 'two.txt')!r}, 'a').write('x')")
    return tmp_path


def _notebook(root: Path, name: str, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


def test_runs_in_order_then_skips_what_is_up_to_date(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([]) == 0
    first = capsys.readouterr().out
    assert "ART_PROFILE=mini" in first
    assert "[2/2] 02_second: started" in first and re.search(r"02_second: \d+ s", first)
    assert (home / "home" / "mini" / "executed" / "02_second.ipynb").exists()

    assert runner.main([]) == 0
    assert capsys.readouterr().out.count("up to date") == 2
    assert (home / "home" / "mini" / "data" / "two.txt").read_text() == "x"

    _notebook(home, "01_first", "1 + 1")
    assert runner.main([]) == 0
    assert "up to date" not in capsys.readouterr().out, "a changed notebook makes the later ones run again"
    assert (home / "home" / "mini" / "data" / "two.txt").read_text() == "xx"


def test_stops_with_the_failing_cell_and_keeps_what_succeeded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _notebook(home, "02_second", "1 + 1", "raise ValueError('no pictures here')")
    _notebook(home, "03_third", "1 + 1")
    assert runner.main([]) == 1
    out = capsys.readouterr().out
    assert "02_second: failed" in out and "ValueError: no pictures here" in out
    assert "\x1b[" not in out, "colour codes make logs unreadable"
    assert "03_third" not in out
    executed = home / "home" / "mini" / "executed"
    assert (executed / "02_second.failed.ipynb").exists() and not (executed / "02_second.ipynb").exists()

    _notebook(home, "02_second", "1 + 1")
    assert runner.main([]) == 0
    assert "01_first: up to date" in capsys.readouterr().out
    assert not (executed / "02_second.failed.ipynb").exists()


def test_changed_pictures_run_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = home / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"1")
    before = runner.pictures_fingerprint(pictures)
    (pictures / "b.png").write_bytes(b"1")
    assert runner.pictures_fingerprint(pictures) != before
    assert runner.pictures_fingerprint(None) == {}


@pytest.mark.parametrize("form", ["linked folder", "table", "utf-16 table", "table in a folder"])
def test_a_picture_replaced_behind_a_link_or_a_table_is_noticed(home: Path, form: str) -> None:
    far, source = home / "far", home / "source"
    far.mkdir(), source.mkdir()
    (far / "a, b.png").write_bytes(b"1")
    (far / "ä.png").write_bytes(b"1")
    if form == "linked folder":
        (source / "linked").symlink_to(far)
        (far / "loop").symlink_to(source)
    else:
        encoding = "utf-16" if form.startswith("utf-16") else "utf-8"
        (source / "t.csv").write_text(f"path;label\n../far/ä.png;good\n{'x' * 400};x\n", encoding=encoding)
        source = source / "t.csv" if form.endswith("table") else source
    before = runner.pictures_fingerprint(source)
    (far / "ä.png").write_bytes(b"22")
    assert runner.pictures_fingerprint(source) != before


def test_kernels_see_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ART_PROFILE", "mini")
    monkeypatch.setenv("ART_HOME", "somewhere")
    monkeypatch.setenv("ART_DATA", "helpers")
    monkeypatch.chdir(tmp_path)
    runner._pass_on(profiles.active())
    assert os.environ["ART_HOME"] == str(tmp_path / "somewhere")
    assert os.environ["ART_DATA"] == str(profiles.REPOSITORY / "helpers")


def test_one_notebook_by_number_and_unknown_names(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["01"]) == 0
    assert "02_second" not in capsys.readouterr().out
    assert runner.main(["7"]) == 2
    assert "There are: 01_first, 02_second" in capsys.readouterr().out


def test_a_terminal_has_one_line_a_notebook_with_section_and_time_left(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("## Five detectors\nWords."), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(notebook, home / "notebooks" / "02_second.ipynb")
    monkeypatch.setattr(runner.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(runner, "_usual_seconds", lambda notebook, profile: 180.0)
    (home / "home" / "mini" / "report").mkdir(parents=True)
    assert runner.main([]) == 0
    out = capsys.readouterr().out
    assert "[2/2] 02_second: cell 1 of 1, Five detectors, about 3 min left" in out
    assert len([line for line in out.split("\n") if "02_second" in line]) == 1
