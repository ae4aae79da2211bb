"""Files that only grow: one line at a time, safe when a writer dies and when two sessions write at once.

:mod:`helpers.storage` replaces whole files; a log that two notebooks append to cannot be replaced without losing one
of them. Here a line is added under a lock, in one write, and flushed to disk.
"""

from __future__ import annotations

import os
from pathlib import Path

LOCK_SECONDS = 60
"""How long to wait for another session that is writing."""


def append_line(path: Path | str, line: str, *, header: str | None = None) -> None:
    """Add a line to a text file.

    The unfinished last line of a writer that died is closed first: it stays in the file, apart from the new line, for
    the reader to report.

    Args:
        path: made with its folder when it does not exist.
        line: without line breaks.
        header: first line of a new file.
    Raises:
        ValueError: the line holds a line break.
        TimeoutError: another session held the lock for :data:`LOCK_SECONDS`.
        OSError: the disk is full or cannot be written to.
    """
    from filelock import FileLock

    if len(line.splitlines()) > 1 or line.endswith("\n"):
        raise ValueError(f"A line holds a line break: {line[:80]!r}. Escape it, for example as JSON.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS), open(path, "ab+") as file:
        start = f"{header}\n" if header is not None and file.tell() == 0 else ""
        if _is_torn(file):
            start = "\n"
        file.write(f"{start}{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _is_torn(file) -> bool:
    """True when the file does not end with a line break; it is open for appending, so reading moves no write."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
