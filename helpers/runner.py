"""Runs every notebook in order, as ``bash colab_setup.sh run`` does: ``python -m helpers.runner [NN ...]``.

Each notebook's executed copy is kept under ``$ART_HOME/<profile>/executed/``. A notebook is skipped when it, the
helpers, the profile, the pictures and every notebook before it are as they were when it last succeeded.
"""

from __future__ import annotations

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks (all, or those with these numbers or names) and print the comparison.

    Returns:
        0 when every notebook succeeded or was up to date, 1 when a cell failed, 2 for an unknown notebook.
    """
    names, paths = list(sys.argv[1:] if arguments is None else arguments), sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    unknown = [name for name in names if not any(path.stem.startswith(name) for path in paths)]
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
        wanted = not names or any(path.stem.startswith(name) for name in names)
        if wanted and not _run_or_skip(path, f"[{number}/{len(paths)}] {path.stem}", profile, key):
            return 1
    print(f"all notebooks: {time.monotonic() - started:.0f} s")
    table = profile.report_dir / "comparison.csv"
    if table.exists():
        from helpers.judge import findings

        print(f"\n{findings.as_text(table)}\n\nReport: {table.with_name('index.html')}\nTable:  {table}", flush=True)
    return 0


def _run_or_skip(path: Path, title: str, profile: profiles.Profile, key: str) -> bool:
    """Run one notebook unless its last success has this key; False when a cell failed."""
    executed = profile.home / "executed" / path.name
    mark = executed.with_suffix(".json")
    if executed.exists() and mark.exists() and files.read_json(mark) == {"key": key}:
        print(f"{title}: up to date", flush=True)
        return True
    mark.unlink(missing_ok=True)
    in_place, started = sys.stdout.isatty(), time.monotonic()

    def show(state: str, *, is_last: bool = False) -> None:
        """One line a notebook: rewritten in place on a terminal; elsewhere only its start and its end."""
        if in_place:
            print(f"\r\x1b[K{title}: {state}", end="\n" if is_last else "", flush=True)
        elif is_last or state == "started":
            print(f"{title}: {state}", flush=True)

    show("started")
    notebook, error = execute(path, show)
    seconds = f"{time.monotonic() - started:.0f} s"
    files.write_text(executed, nbformat.writes(notebook))
    if error:
        show(f"failed after {seconds}\n\n{error}\n\nThe notebook up to there: {executed}", is_last=True)
        return False
    files.write_json(mark, {"key": key})
    show(seconds, is_last=True)
    return True


def execute(path: Path, show: Callable[[str], None]) -> tuple[nbformat.NotebookNode, str]:
    """Execute a notebook in its folder, in a fresh kernel of this Python, and show where it is.

    Returns:
        the notebook with outputs, and the failing cell with its error as plain text, empty when none failed.
    """
    notebook, place, started = nbformat.read(path, as_version=4), "", time.monotonic()
    is_code = [cell.cell_type == "code" for cell in notebook.cells]
    heading = ""

    def follow(cell: nbformat.NotebookNode, cell_index: int) -> None:
        """The cell, the heading it stands under, and the time left if the others take as long as those before."""
        nonlocal place, heading
        if not is_code[cell_index]:
            headings = [line for line in cell.source.splitlines() if line.startswith("#")]
            heading = f", {headings[-1].lstrip('#0123456789.· ')}" if headings else heading
            return
        n_done, n = sum(is_code[:cell_index]), sum(is_code)
        place = f"cell {n_done + 1} of {n}{heading}"
        left = (time.monotonic() - started) / n_done * (n - n_done) if n_done else 0
        words = f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
        show(place + (words if left else ""))

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
        return notebook, re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip()
    except DeadKernelError as error:
        return notebook, f"The kernel died in {place} ({error}). The usual cause is too little memory."
    return notebook, ""


def _pass_on(profile: profiles.Profile) -> None:
    """Make the kernels see this profile: absolute paths, since they start in another folder."""
    os.environ |= {"ART_PROFILE": profile.name, "ART_HOME": str(profile.home.parent)}
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
