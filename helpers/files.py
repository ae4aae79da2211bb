"""Files that are whole or absent: atomic writes, JSON, hashes, and lines appended by several sessions.

Everything is written under a hidden temporary name in the same folder, flushed to disk and renamed. A folder is
complete when its mark (``manifest.json`` or ``READY.json``), written last, is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Temporary name to write to; renamed to ``path`` when the block succeeds, removed when it fails.

    The suffix of ``path`` is kept, so that libraries which choose a format by suffix work.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:40]}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; nan and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a ValueError names the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}). Delete it and run the step that makes it.") from error


def append_line(path: Path | str, line: str) -> None:
    """Add a line to a text file that other sessions may be adding to; it is on disk when this returns.

    The unfinished last line of a writer that died is closed first, for the reader to report.

    Raises:
        ValueError: the line holds a line break.
        TimeoutError: another session held the lock for a minute.
    """
    if len(line.splitlines()) > 1 or line.endswith("\n"):
        raise ValueError(f"A line holds a line break: {line[:80]!r}. Escape it, for example as JSON.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=60), open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a value's canonical JSON, for settings and manifests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def free_bytes(path: Path) -> int:
    """Free space of the disk that holds ``path`` (which need not exist yet)."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
