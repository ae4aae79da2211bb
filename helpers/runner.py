"""Runs every notebook in order, as ``bash colab_setup.sh run`` does: ``python -m helpers.runner [NN ...]``.

Executed copies are kept under ``$ART_HOME/<profile>/executed/``. A notebook is skipped when it, the helpers, the
profile, the dataset and every notebook before it are as they were when it last succeeded.
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
    """Run the notebooks (all, or those with these numbers or names) and print the comparison; 0 when all succeeded or
    were up to date, 1 when a cell failed, 2 for an unknown notebook."""
    names, paths = list(sys.argv[1:] if arguments is None else arguments), sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    unknown = [name for name in names if not any(path.stem.startswith(name) for path in paths)]
    if unknown:
        print(f"No notebook is called {', '.join(unknown)}. There are: {', '.join(path.stem for path in paths)}.")
        return 2
    profile, started = profiles.active(), time.monotonic()
    print(profile, flush=True)
    # Kernels start in another folder: they see this profile through absolute paths.
    os.environ |= {"ART_PROFILE": profile.name, "ART_HOME": str(profile.home.parent)}
    os.environ |= {"ART_DATA": str(profile.data_source)} if profile.data_source else {}
    lasting = os.environ.get("ART_DRIVE", "").strip()
    if lasting.lower() not in ("", "off"):
        os.environ["ART_DRIVE"] = str(Path(lasting).expanduser().absolute())
    code = [path for path in (profiles.REPOSITORY / "helpers").rglob("*.*") if path.suffix != ".pyc"]
    chain, made = [[files.sha256_file(path) for path in sorted(code)], profile.name], profile.data_dir / "manifest.json"
    for number, path in enumerate(paths, start=1):
        chain.append(files.sha256_file(path))
        if path.stem > "03" and made.exists():  # what comes after 02 depends on the dataset that it made
            chain.append(files.sha256_file(made))
        looks = profile.data_source is not None and path.stem.startswith("02")  # whether pictures changed: always runs
        key = files.sha256_json([chain, time.time() if looks else 0])
        wanted = not names or any(path.stem.startswith(name) for name in names)
        if wanted and not _run_or_skip(path, f"[{number}/{len(paths)}] {path.stem}", profile.home / "executed", key):
            return 1
    print(f"all notebooks: {time.monotonic() - started:.0f} s")
    table = profile.report_dir / "comparison.csv"
    if table.exists():
        from helpers.judge import findings

        print(f"\n{findings.as_text(table)}\n\nReport: {table.with_name('index.html')}\nTable:  {table}", flush=True)
    return 0


def _run_or_skip(path: Path, title: str, target: Path, key: str) -> bool:
    """Run one notebook unless its last success has this key; False when a cell failed."""
    executed, started = target / path.name, time.monotonic()
    if executed.exists() and files.read_json(executed)["metadata"].get("key") == key:
        print(f"{title}: up to date", flush=True)
        return True
    executed.unlink(missing_ok=True)

    def show(state: str, end: str = "") -> None:
        """One line a notebook: rewritten in place on a terminal; elsewhere only its start and its end."""
        if sys.stdout.isatty():
            print(f"\r\x1b[K{title}: {state}", end=end, flush=True)
        elif end or state == "started":
            print(f"{title}: {state}", flush=True)

    show("started")
    notebook, error = execute(path, show)
    seconds = f"{time.monotonic() - started:.0f} s"
    notebook.metadata["key"] = "" if error else key
    files.write_text(executed, nbformat.writes(notebook))
    failed = f"failed after {seconds}\n\n{error}\n\nThe notebook up to there: {executed}"
    show(failed if error else seconds, end="\n")
    return not error


def execute(path: Path, show: Callable[[str], None]) -> tuple[nbformat.NotebookNode, str]:
    """Execute a notebook in its folder, in a fresh kernel, and show where it is. Returned is the notebook with outputs,
    and the failing cell with its error as plain text, empty when none failed."""
    notebook, started = nbformat.read(path, as_version=4), time.monotonic()

    def follow(cell: nbformat.NotebookNode, cell_index: int) -> None:
        """The cell, the heading it stands under, and the time left if the others take as long as those before."""
        before = notebook.cells[:cell_index]
        n_done, n = (sum(one.cell_type == "code" for one in cells) for cells in (before, notebook.cells))
        text = "\n".join(one.source for one in before if one.cell_type == "markdown")
        words = [f"cell {n_done + 1} of {n}", *re.findall(r"^#+[\d.· ]*(.*)", text, re.MULTILINE)[-1:]]
        if n_done:
            left = (time.monotonic() - started) / n_done * (n - n_done)
            words.append(f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left")
        if cell.cell_type == "code":
            show(", ".join(words))

    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"], on_cell_start=follow,
    )  # fmt: skip
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        hint = " The usual cause is too little memory." if isinstance(error, DeadKernelError) else ""
        return notebook, re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip() + hint
    return notebook, ""


if __name__ == "__main__":
    sys.exit(main())
