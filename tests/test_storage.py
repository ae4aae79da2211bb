"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import files as storage


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    storage.write_text(path, "old")
    with pytest.raises(RuntimeError), storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("the writer broke")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left behind"


def test_atomic_path_keeps_the_suffix_and_makes_folders(tmp_path: Path) -> None:
    with storage.atomic_path(tmp_path / "a" / "b.npy") as temporary:
        assert temporary.suffix == ".npy"
        temporary.write_bytes(b"x")
    assert (tmp_path / "a" / "b.npy").read_bytes() == b"x"


def test_written_files_are_readable_by_others(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "shared.txt", "x")
    mask = os.umask(0o022)
    os.umask(mask)
    assert (tmp_path / "shared.txt").stat().st_mode & 0o777 == 0o666 & ~mask


def test_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    storage.write_json(path, {"step": 0})
    script = (
        "import sys, time; from pathlib import Path; from helpers import files as storage\n"
        f"with storage.atomic_path(Path({str(path)!r})) as t:\n"
        "    t.write_text('{'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert storage.read_json(path) == {"step": 0}


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    storage.write_json(path, {"name": "Čapek", "n": 3})
    assert storage.read_json(path) == {"name": "Čapek", "n": 3}
    with pytest.raises(ValueError):
        storage.write_json(path, {"score": float("nan")})
    path.write_text("{'torn")
    with pytest.raises(ValueError, match=r"manifest\.json is not readable JSON"):
        storage.read_json(path)


def test_hashes_agree_with_hashlib(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"art" * 500_000)
    assert storage.sha256_file(tmp_path / "f") == hashlib.sha256(b"art" * 500_000).hexdigest()
    assert storage.sha256_json({"a": 1, "b": [2]}) == storage.sha256_json(json.loads('{"b": [2], "a": 1}'))
    assert storage.sha256_json({"a": 1}) != storage.sha256_json({"a": 2})


def test_free_bytes_of_a_folder_to_be_made(tmp_path: Path) -> None:
    assert storage.free_bytes(tmp_path / "not" / "yet") > 0


def test_a_reader_of_the_old_file_never_sees_half_of_the_new_one(tmp_path: Path) -> None:
    """The file is replaced as a whole: another name of the old one keeps the old content."""
    storage.write_text(tmp_path / "table.csv", "old")
    os.link(tmp_path / "table.csv", tmp_path / "held_open.csv")
    storage.write_text(tmp_path / "table.csv", "new")
    assert (tmp_path / "held_open.csv").read_text() == "old"
