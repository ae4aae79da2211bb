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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import files as storage
from helpers import profiles

if TYPE_CHECKING:
    import nbformat

NOTEBOOKS = profiles.REPOSITORY / "notebooks"
_EXECUTED = "executed"
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks and print the comparison.

    Args:
        arguments: notebook numbers or names to run (``03``, ``03_clip``); all when empty.
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
    profile = profiles.active()
    print(profile, flush=True)
    _pass_on(profile)
    started = time.monotonic()
    key = storage.sha256_json([_source_hash(), profile.name, _pictures_fingerprint(profile.data_source)])
    for number, path in enumerate(paths, start=1):
        key = storage.sha256_json([key, storage.sha256_file(path)])
        wanted = not options.notebook or any(path.stem.startswith(name) for name in options.notebook)
        if wanted and not _run_or_skip(path, f"[{number}/{len(paths)}] {path.stem}", profile, key, again=options.again):
            return 1
    print(f"all notebooks: {time.monotonic() - started:.0f} s")
    _print_comparison(profile)
    return 0


def _run_or_skip(path: Path, title: str, profile: profiles.Profile, key: str, *, again: bool) -> bool:
    """Run one notebook unless its last success has this key; False when a cell failed."""
    executed = profile.home / _EXECUTED / path.name
    mark = executed.with_suffix(".json")
    if not again and executed.exists() and mark.exists() and storage.read_json(mark)["key"] == key:
        print(f"{title}: up to date", flush=True)
        return True
    mark.unlink(missing_ok=True)
    before = _tree(profile.home)
    started = time.monotonic()
    notebook, error = execute(path, on_cell=_live_line(title))
    seconds = time.monotonic() - started
    if error:
        failed = executed.with_suffix(".failed.ipynb")
        _write_notebook(failed, notebook)
        print(f"\r{title}: failed after {seconds:.0f} s\n\n{error}\n\nThe notebook up to there: {failed}", flush=True)
        return False
    _write_notebook(executed, notebook)
    executed.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    storage.write_json(mark, {"key": key, "seconds": round(seconds, 1)})
    print(f"\r{title}: {seconds:.0f} s, wrote {_changes(before, _tree(profile.home))}", flush=True)
    return True


def execute(
    path: Path, *, on_cell: Callable[[int, int], None] | None = None
) -> tuple[nbformat.NotebookNode, str | None]:
    """Execute a notebook in its folder, in a fresh kernel of this Python.

    Args:
        path: the notebook.
        on_cell: called with (code cells started, code cells in all).
    Returns:
        the notebook with outputs, and None or the failing cell with its error as plain text.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    n_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    started = 0

    def count(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal started
        if cell.cell_type == "code":
            started += 1
            if on_cell is not None:
                on_cell(started, n_cells)

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # the kernel's warnings about its own transport are not for the reader
        on_cell_start=count,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return notebook, _ANSI.sub("", str(error)).strip()
    except DeadKernelError as error:
        cell = f"code cell {started} of {n_cells}"
        return notebook, f"The kernel died in {cell} ({error}). The usual cause is too little memory."
    return notebook, None


def _live_line(title: str) -> Callable[[int, int], None]:
    """Prints how far a notebook is: rewritten in place on a terminal, once at the start elsewhere."""

    def show(started: int, n_cells: int) -> None:
        if sys.stdout.isatty():
            print(f"\r{title}: cell {started} of {n_cells} ", end="", flush=True)
        elif started == 1:
            print(f"{title}: running {n_cells} cells", flush=True)

    return show


def _pass_on(profile: profiles.Profile) -> None:
    """Make the kernels see this profile: absolute paths, since they start in another folder."""
    os.environ["ART_PROFILE"] = profile.name
    os.environ["ART_HOME"] = str(profile.home.parent)
    if profile.data_source is not None:
        os.environ["ART_DATA"] = str(profile.data_source)
    lasting = os.environ.get("ART_DRIVE", "").strip()
    if lasting and lasting.lower() != "off":
        os.environ["ART_DRIVE"] = str(Path(lasting).expanduser().absolute())


def _source_hash() -> str:
    """Hash of the helpers, so that changed code runs again."""
    files = sorted((profiles.REPOSITORY / "helpers").rglob("*"))
    return storage.sha256_json(
        [(str(file), storage.sha256_file(file)) for file in files if file.is_file() and "__pycache__" not in file.parts]
    )


def _pictures_fingerprint(source: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the user's files: enough to notice a new or changed picture without reading all."""
    if source is None:
        return []
    files: Iterator[Path] = iter([source]) if source.is_file() else iter(sorted(source.rglob("*")))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _tree(home: Path) -> dict[Path, tuple[int, int]]:
    files = [file for file in home.rglob("*") if file.is_file() and _EXECUTED not in file.relative_to(home).parts[:1]]
    return {file.relative_to(home): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def _changes(before: dict[Path, tuple[int, int]], after: dict[Path, tuple[int, int]]) -> str:
    """New and changed files in words, by folder: ``results/clip_lof (3 files, 0.1 MB)``."""
    folders: dict[str, list[int]] = {}
    for path, state in after.items():
        if before.get(path) != state:
            folders.setdefault("/".join(path.parts[:-1][:2]) or path.name, []).append(state[0])
    if not folders:
        return "nothing new"
    folders_in_words = [f"{name} ({len(sizes)} files, {sum(sizes) / 1e6:.1f} MB)" for name, sizes in folders.items()]
    return ", ".join(sorted(folders_in_words))


def _write_notebook(path: Path, notebook: nbformat.NotebookNode) -> None:
    import nbformat

    storage.write_text(path, nbformat.writes(notebook))


def _print_comparison(profile: profiles.Profile) -> None:
    table = profile.report_dir / "comparison.csv"
    if table.exists():
        from helpers.judge import comparison

        print(f"\n{comparison.as_text(table)}\n\nReport: {profile.report_dir / 'index.html'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
