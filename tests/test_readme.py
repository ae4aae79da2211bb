"""The README shows the recorded run, and nothing it names is missing."""

from __future__ import annotations

import re
import subprocess

import pytest

from helpers import profiles, readme

README = readme.README.read_text(encoding="utf-8")


def test_results_table_is_the_recorded_run() -> None:
    assert readme.main(["--check"]) == 0


def test_check_notices_a_changed_number(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    digit = re.search(r"0\.\d\d", README[README.index(readme._BEGIN) :])
    assert digit is not None
    at = README.index(readme._BEGIN) + digit.start()
    (tmp_path / "README.md").write_text(README[:at] + "9" + README[at + 1 :], encoding="utf-8")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    assert readme.main(["--check"]) == 1


def test_marks_are_needed() -> None:
    with pytest.raises(ValueError, match="needs the two lines"):
        readme.with_table("no table here", "| a |")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?://|#)([^)]+)\)", README))))
def test_relative_links_resolve(target: str) -> None:
    assert (profiles.REPOSITORY / target).exists()


@pytest.mark.parametrize("anchor", sorted(set(re.findall(r"\]\(#([^)]+)\)", README))))
def test_anchors_resolve(anchor: str) -> None:
    headings = [
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    ]
    assert anchor in headings


def test_every_helper_stands_in_the_map_of_the_code() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "helpers/*.py"], cwd=profiles.REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    missing = [path for path in tracked if not path.endswith("__init__.py") and path.split("/")[-1][:-3] not in README]
    assert missing == []
