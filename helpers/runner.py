"""Runs every notebook in order, as ``bash colab_setup.sh run`` does: ``python -m helpers.runner [NN ...]``.

Each notebook's executed copy is kept under ``$ART_HOME/<profile>/executed/``. A notebook is skipped when it, the
helpers, the profile, the pictures and every notebook before it are as they were when it last succeeded.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from helpers import files, profiles

NOTEBOOKS = profiles.REPOSITORY / "notebooks"
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks (all, or those with these numbers or names) and print the comparison.

    Returns:
        0 when every notebook succeeded or was up to date, 1 when a cell failed, 2 for an unknown notebook.
    """
    parser = argparse.ArgumentParser(prog="colab_setup.sh run", description="Run the notebooks in order.")
    parser.add_argument("notebook", nargs="*", help="number or name, for example 03 or 03_clip; all by default")
    parser.add_argument("--again", action="store_true", help="run even what is up to date")
    options = parser.parse_args(arguments)
    paths = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    unknown = [name for name in options.notebook if not any(path.stem.startswith(name) for path in paths)]
    if unknown:
        print(f"No notebook is called {', '.join(unknown)}. There are: {', '.join(path.stem for path in paths)}.")
        return 2
    profile, started = profiles.active(), time.monotonic()
    print(profile, flush=True)
    _pass_on(profile)
    sources = [path for path in sorted((profiles.REPOSITORY / "helpers").rglob("*")) if path.is_file()]
    code = [(str(path), files.sha256_file(path)) for path in sources if path.suffix != ".pyc"]
    key = files.sha256_json([code, profile.name, pictures_fingerprint(profile.data_source)])
    for number, path in enumerate(paths, start=1):
        key = files.sha256_json([key, files.sha256_file(path)])
        wanted = not options.notebook or any(path.stem.startswith(name) for name in options.notebook)
        if wanted and not _run_or_skip(path, f"[{number}/{len(paths)}] {path.stem}", profile, key, again=options.again):
            return 1
    print(f"all notebooks: {time.monotonic() - started:.0f} s")
    table = profile.report_dir / "comparison.csv"
    if table.exists():
        from helpers.judge import findings

        print(f"\n{findings.as_text(table)}\n\nReport: {table.with_name('index.html')}\nTable:  {table}", flush=True)
    return 0


def _run_or_skip(path: Path, title: str, profile: profiles.Profile, key: str, *, again: bool) -> bool:
    """Run one notebook unless its last success has this key; False when a cell failed."""
    from helpers.colab.preflight import STAGES

    executed = profile.home / "executed" / path.name
    mark, failed = executed.with_suffix(".json"), executed.with_suffix(".failed.ipynb")
    last = files.read_json(mark) if mark.exists() else {}
    if not again and executed.exists() and last.get("key") == key:
        print(f"{title}: up to date", flush=True)
        return True
    mark.unlink(missing_ok=True)
    usual = STAGES.get(path.stem)
    usual_seconds = 0.0 if usual is None else usual.mini_seconds if profile.name == "mini" else 60 * usual.l4_minutes
    line = _LiveLine(title, last.get("seconds", usual_seconds))
    notebook, error = execute(path, line.show)
    if error:
        files.write_text(failed, nbformat.writes(notebook))
        line.end(f"failed after {line.seconds:.0f} s\n\n{error}\n\nThe notebook up to there: {failed}")
        return False
    files.write_text(executed, nbformat.writes(notebook))
    failed.unlink(missing_ok=True)
    files.write_json(mark, {"key": key, "seconds": round(line.seconds, 1)})
    line.end(f"{line.seconds:.0f} s")
    return True


def execute(path: Path, show: Callable[[str], None]) -> tuple[nbformat.NotebookNode, str]:
    """Execute a notebook in its folder, in a fresh kernel of this Python, and show which cell runs.

    Returns:
        the notebook with outputs, and the failing cell with its error as plain text, empty when none failed.
    """
    notebook = nbformat.read(path, as_version=4)
    n_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    started, section = 0, ""

    def follow(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal started, section
        if cell.cell_type == "code":
            started += 1
            show(f"cell {started} of {n_cells}" + (f", {section}" if section else ""))
        elif headings := re.findall(r"^##+ +(.+)$", cell.source, flags=re.MULTILINE):
            section = headings[-1].strip()

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # the kernel's warnings about its own transport are not for the reader
        on_cell_start=follow,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return notebook, _ANSI.sub("", str(error)).strip()
    except DeadKernelError as error:
        where = f"code cell {started} of {n_cells}"
        return notebook, f"The kernel died in {where} ({error}). The usual cause is too little memory."
    return notebook, ""


class _LiveLine:
    """One line a notebook: rewritten in place on a terminal; elsewhere only its start and its end are printed."""

    def __init__(self, title: str, usual_seconds: float) -> None:
        self._title, self._usual, self._started = title, usual_seconds, time.monotonic()
        self._in_place = sys.stdout.isatty()
        if not self._in_place:
            print(f"{title}: started{self._left()}", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def show(self, state: str) -> None:
        if self._in_place:
            print(f"\r\x1b[K{self._title}: {state}{self._left()}", end="", flush=True)

    def end(self, outcome: str) -> None:
        start = "\r\x1b[K" if self._in_place else ""
        print(f"{start}{self._title}: {outcome}", flush=True)

    def _left(self) -> str:
        left = self._usual - self.seconds
        if left >= 90:
            return f", about {left / 60:.0f} min left"
        return f", about {max(10, round(left, -1)):.0f} s left" if left > 0 else ""


def _pass_on(profile: profiles.Profile) -> None:
    """Make the kernels see this profile: absolute paths, since they start in another folder."""
    os.environ["ART_PROFILE"] = profile.name
    os.environ["ART_HOME"] = str(profile.home.parent)
    if profile.data_source is not None:
        os.environ["ART_DATA"] = str(profile.data_source)
    lasting = os.environ.get("ART_DRIVE", "").strip()
    if lasting and lasting.lower() != "off":
        os.environ["ART_DRIVE"] = str(Path(lasting).expanduser().absolute())


def pictures_fingerprint(source: Path | None) -> dict[str, tuple[int, int]]:
    """Size and time of every file that a folder or a table leads to: tells a replaced picture without reading it.

    Linked folders are followed; in tables every cell that names a file counts, wherever the file lies.
    """
    found = {source} if source is not None and source.is_file() else set()
    seen: set[str] = set()
    for folder, folders, names in os.walk(source, followlinks=True) if source is not None else ():
        if os.path.realpath(folder) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        found |= {Path(folder, name) for name in names}
    for table in [path for path in found if path.suffix.lower() in (".csv", ".tsv")]:
        content = table.read_bytes()
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        cells = re.split(r'[,;\t\r\n"]+', content.decode(encoding, errors="replace"))
        found |= {table.parent / cell.strip() for cell in cells if cell.strip()}
    states = {str(path): path.stat() for path in sorted(found) if os.path.isfile(path)}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}


if __name__ == "__main__":
    sys.exit(main())
