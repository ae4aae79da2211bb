"""What is finished outlives the machine: copied to a lasting folder (Google Drive), brought back on a fresh machine.

The workspace is cut into *units*, each finished by itself: a folder of weights, a dataset, the results of a method, a
training checkpoint, the report. A unit travels as one tar archive, because Drive is slow with many small files and
fails in folders with thousands. Beside it lies an index with the hashes of the archive and of its files, written
last: an archive without index does not exist. A newer version is written beside the older one, which goes when the new
index is in place. So whatever moment a session ends at, the folder holds the last complete version of every unit.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import files as storage
from helpers.weights import fetch as downloads

MAX_UNIT_BYTES = 2_000_000_000
"""Larger units (the merged language model: 13.5 GB) are not copied: a Drive without a plan has 15 GB."""

_MARKS = {"weights": "READY.json", "data": "manifest.json", "results": "manifest.json"}
"""Areas whose units are the folders that hold a mark, written last by whoever made them."""
_REMADE = ("features", "executed", "weights/llama")
"""Folders that are computed again in little time, or only a step on the way: the base that is merged."""
_MEMO = ".kept.json"
_STALE_SECONDS = 24 * 3600
_CHECKPOINT = re.compile(r"^checkpoints/.*/step_\d+$")


@dataclass(frozen=True)
class Archive:
    """Where finished units are kept.

    Attributes:
        folder: the lasting folder, made with the one above it; the one above that must exist.
        reconnect: called before a failed operation is repeated, to mount the disk again.
        n_tries, wait_seconds: attempts per operation, and the pause before the second one, which then doubles.
        max_unit_bytes: larger units are left out, and named.
    """

    folder: Path
    reconnect: Callable[[], None] | None = None
    n_tries: int = 4
    wait_seconds: float = 2.0
    max_unit_bytes: int = MAX_UNIT_BYTES

    def copy(self, source: Path, target: Path, sha256: str) -> None:
        downloads.copy_verified(
            source, target, sha256=sha256,
            n_tries=self.n_tries, wait_seconds=self.wait_seconds, reconnect=self.reconnect,
        )  # fmt: skip

    def patiently(self, action: Callable[[], Any]) -> Any:
        return downloads.patiently(
            action, n_tries=self.n_tries, wait_seconds=self.wait_seconds, reconnect=self.reconnect
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one unit.

    Attributes:
        unit: its folder below the workspace.
        state: ``"saved"``, ``"restored"``, ``"here"`` (local already), ``"too large"`` or ``"failed"``.
        n_bytes: size of its files, 0 when unknown.
        problem: why it failed, and what to do; empty otherwise.
    """

    unit: str
    state: str
    n_bytes: int = 0
    problem: str = ""

    def __str__(self) -> str:
        size = f" ({self.n_bytes / 1e6:.1f} MB)" if self.n_bytes else ""
        return f"{self.unit}{size}: {self.state}" + (f", {self.problem}" if self.problem else "")


def find_units(home: Path) -> dict[str, list[Path]]:
    """Finished units of a workspace: name (folder below ``home``) -> its files, sorted, marks last.

    In ``weights``, ``data`` and ``results`` a unit is a folder with its mark. Elsewhere every file is written whole, so
    that each folder of ``checkpoints``, and each other folder of the workspace, is a unit as it is.
    """
    home, units = Path(home), {}
    marked = {path.parent for area, mark in _MARKS.items() for path in (home / area).rglob(mark)}
    outermost = {folder for folder in marked if not any(parent in marked for parent in folder.parents)}
    for path in _files(home):
        unit = _unit_of(path.relative_to(home), home, outermost)
        if unit is not None:
            units.setdefault(unit, []).append(path)
    return {unit: sorted(files, key=lambda path: (path.suffix == ".json", path)) for unit, files in units.items()}


def save(home: Path, archive: Archive) -> list[Outcome]:
    """Copy every unit that is new or changed since it was last saved or restored here; the others cost no access.

    Nothing is raised when the disk fails: local files are complete, and the next call tries again.

    Args:
        home: ``profile.home``; :func:`restore` must have seen the archive from here, so that nothing older is replaced
            unseen.
        archive: where to.
    Returns:
        what happened to each unit that was not up to date.
    """
    home, memo = Path(home), _Memo(home)
    if not memo.has_seen_archive:
        return [
            Outcome("everything", "failed", problem=f"{archive.folder} was never listed. Run the set-up cell again.")
        ]
    outcomes, units = [], find_units(home)
    for unit, files in units.items():
        stamp = _stamp(home, files)
        if memo.stamp(unit) == stamp:
            continue
        n_bytes = sum(path.stat().st_size for path in files)
        if unit in memo.pending:
            problem = f"an older version in {archive.folder} could not be read and is not replaced. {_give_up(unit)}"
            outcomes.append(Outcome(unit, "failed", n_bytes, problem))
            continue
        if n_bytes > archive.max_unit_bytes:
            memo.note(unit, stamp, "")
            outcomes.append(Outcome(unit, "too large", n_bytes, "it stays on this machine only"))
            continue
        try:
            memo.note(unit, stamp, _put(home, unit, files, stamp, archive, memo.archive_name(unit)))
            outcomes.append(Outcome(unit, "saved", n_bytes))
        except OSError as error:
            outcomes.append(Outcome(unit, "failed", n_bytes, str(error)))
            break  # the disk is not to be had now, or full; each further unit would wait as long
    _forget_pruned(memo, units, archive)
    return outcomes


def restore(home: Path, archive: Archive) -> list[Outcome]:
    """Bring back every complete unit that this machine has never had.

    A unit appears under its name only when it is whole and its archive has its hash. What is here already stays.

    Args:
        home: ``profile.home``; may be empty or missing.
        archive: where from; a folder that does not exist yet is made.
    Returns:
        what happened to each unit of the archive.
    """
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    _drop_leftovers(home)
    memo = _Memo(home)
    try:
        names = archive.patiently(lambda: _listing(archive.folder))
    except OSError as error:
        problem = f"{archive.folder} cannot be listed ({error}). Run the set-up cell again."
        return [Outcome("everything", "failed", problem=problem)]
    memo.see_archive()
    outcomes, kept, here = [], set(), find_units(home)
    for name in sorted(name for name in names if name.endswith(".json")):
        unit = _unit_name(name)
        if memo.knows(unit):
            kept.add(memo.archive_name(unit))
            outcomes.append(Outcome(unit, "here"))
            continue
        try:
            index = archive.patiently(lambda name=name: storage.read_json(archive.folder / name))
            kept.add(index["archive"])
            outcomes.append(_get(home, unit, index, archive, here.get(unit, [])))
            is_restored = outcomes[-1].state == "restored"  # else: what lies here is saved the next time
            stamp = _stamp(home, find_units(home)[unit]) if is_restored else ""
            memo.note(unit, stamp, index["archive"])
        except (OSError, ValueError, KeyError) as error:
            memo.wait_for(unit)
            outcomes.append(Outcome(unit, "failed", problem=f"{error} {_give_up(unit)}"))
    if not memo.pending:
        _sweep(archive.folder, names, kept)
    return outcomes


def keeper(home: Path, archive: Archive, *, min_seconds: float = 900, log: Callable[[str], None] = print) -> Callable:
    """A callback for ``on_checkpoint`` of :func:`helpers.training.train`: saves, but not more often than given.

    Args:
        home, archive: see :func:`save`.
        min_seconds: pause between two rounds; an AnomalyGPT checkpoint has 1.4 GB.
        log: receives one sentence a unit.
    """
    last = -min_seconds

    def keep(_checkpoint: Path) -> None:
        nonlocal last
        if time.monotonic() - last < min_seconds:
            return
        for outcome in save(home, archive):
            log(f"kept: {outcome}")
        last = time.monotonic()

    return keep


def _files(home: Path) -> Iterator[Path]:
    """Finished files: neither hidden nor temporary, in areas worth keeping."""
    for folder, folders, names in os.walk(home):
        place = Path(folder).relative_to(home)
        folders[:] = [f for f in folders if not _is_temporary(f) and (place / f).as_posix() not in _REMADE]
        yield from (Path(folder) / name for name in names if not _is_temporary(name))


def _is_temporary(name: str) -> bool:
    return name.startswith(".") or name.endswith((".partial", ".part", ".wrong"))


def _unit_of(path: Path, home: Path, marked: set[Path]) -> str | None:
    """Unit of a file (relative path); None in a folder that is not finished."""
    area = path.parts[0]
    if len(path.parts) == 1:
        return "files"
    if area in _MARKS:
        folder = next((parent for parent in path.parents if home / parent in marked), None)
        return None if folder is None else folder.as_posix()
    return path.parent.as_posix() if area == "checkpoints" else area


def _stamp(home: Path, files: Sequence[Path]) -> str:
    """Names, sizes and times: changes when a unit does, costs no reading."""
    return storage.sha256_json(
        sorted((path.relative_to(home).as_posix(), *_size_and_time(path.stat())) for path in files)
    )


def _size_and_time(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns


def _file_name(unit: str) -> str:
    return unit.replace("/", "+")


def _unit_name(index: str) -> str:
    return index.removesuffix(".json").replace("+", "/")


def _give_up(unit: str) -> str:
    return f"Run the set-up cell again; to give that version up, delete {_file_name(unit)}.json there."


def _put(home: Path, unit: str, files: Sequence[Path], stamp: str, archive: Archive, previous: str) -> str:
    """Pack a unit, copy the archive, then its index; returns the archive's name."""
    with tempfile.TemporaryDirectory(prefix=".keeping-", dir=home) as work:
        tar, index = Path(work) / "unit.tar", Path(work) / "index.json"
        hashes = {}
        with tarfile.open(tar, "w", dereference=True) as packed:  # links travel as what they point to
            for path in files:
                name = path.relative_to(home).as_posix()
                packed.add(path, arcname=name, recursive=False)
                hashes[name] = storage.sha256_file(path)
        if _stamp(home, files) != stamp:
            raise OSError(f"{unit} changed while it was packed; the next round takes it.")
        sha256 = storage.sha256_file(tar)
        name = f"{_file_name(unit)}.{sha256[:16]}.tar"
        archive.copy(tar, archive.folder / name, sha256)
        storage.write_json(index, {"unit": unit, "archive": name, "sha256": sha256, "files": hashes})
        archive.copy(index, archive.folder / f"{_file_name(unit)}.json", storage.sha256_file(index))
    if previous and previous != name:
        _remove(archive.folder / previous)
    return name


def _get(home: Path, unit: str, index: Mapping[str, Any], archive: Archive, here: Sequence[Path]) -> Outcome:
    """Copy and check, unpack aside, then put the unit in its place."""
    local = {path.relative_to(home).as_posix(): path for path in here}
    is_torn_restore = bool(local) and local.keys() < index["files"].keys() and all(
        storage.sha256_file(path) == index["files"][name] for name, path in local.items()
    )  # fmt: skip
    if local and not is_torn_restore:
        return Outcome(unit, "here")
    with tempfile.TemporaryDirectory(prefix=".keeping-", dir=home) as work:
        tar, fresh = Path(work) / "unit.tar", Path(work) / "files"
        archive.copy(archive.folder / index["archive"], tar, index["sha256"])
        downloads.unpack(tar, fresh)
        n_bytes = sum((fresh / name).stat().st_size for name in index["files"])
        _put_in_place(fresh, home, unit, index["files"])
    return Outcome(unit, "restored", n_bytes)


def _put_in_place(fresh: Path, home: Path, unit: str, names: Mapping[str, str]) -> None:
    """A folder that is not there yet appears at once; in one that is, the files appear one by one, marks last."""
    target = home / unit
    if unit.split("/")[0] in _MARKS and target.exists():
        shutil.rmtree(target)  # without its mark, or it would be a unit of this machine
    if unit != "files" and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / unit, target)
        return
    for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / name, home / name)


def _listing(folder: Path) -> list[str]:
    folder.parent.mkdir(exist_ok=True)  # the folder above that must be there: a lost mount is an error
    folder.mkdir(exist_ok=True)
    return os.listdir(folder)


def _forget_pruned(memo: _Memo, units: Mapping[str, Any], archive: Archive) -> None:
    """Training checkpoints that training itself has dropped go from the archive, too: each may have 1.4 GB."""
    for unit in [unit for unit in memo.units() if _CHECKPOINT.match(unit) and unit not in units]:
        if _remove(archive.folder / f"{_file_name(unit)}.json"):
            _remove(archive.folder / memo.archive_name(unit))
            memo.forget(unit)


def _sweep(folder: Path, names: Sequence[str], kept: set[str]) -> None:
    """Remove what interrupted copies left: parts and archives without index, a day old so that no session uses them."""
    for name in names:
        is_orphan = name.endswith(".part") or (name.endswith(".tar") and name not in kept)
        if is_orphan and _age(folder / name) > _STALE_SECONDS:
            _remove(folder / name)


def _drop_leftovers(home: Path) -> None:
    for folder in home.glob(".keeping-*"):
        if _age(folder) > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> bool:
    """Delete a file if it can be; a leftover does no harm and is swept up later."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


class _Memo:
    """What this machine has saved or restored, in a hidden file of the workspace."""

    def __init__(self, home: Path) -> None:
        self._path = home / _MEMO
        fresh = {"has_seen_archive": False, "pending": [], "units": {}}
        self._value: dict[str, Any] = storage.read_json(self._path) if self._path.exists() else fresh

    @property
    def has_seen_archive(self) -> bool:
        return self._value["has_seen_archive"]

    @property
    def pending(self) -> list[str]:
        """Units that the archive holds and that could not be restored yet."""
        return self._value["pending"]

    def units(self) -> list[str]:
        return list(self._value["units"])

    def knows(self, unit: str) -> bool:
        return unit in self._value["units"]

    def stamp(self, unit: str) -> str:
        return self._value["units"].get(unit, {}).get("stamp", "")

    def archive_name(self, unit: str) -> str:
        return self._value["units"].get(unit, {}).get("archive", "")

    def see_archive(self) -> None:
        self._value |= {"has_seen_archive": True, "pending": []}
        self._write()

    def note(self, unit: str, stamp: str, archive: str) -> None:
        self._value["units"][unit] = {"stamp": stamp, "archive": archive}
        self._write()

    def wait_for(self, unit: str) -> None:
        self._value["pending"].append(unit)
        self._write()

    def forget(self, unit: str) -> None:
        del self._value["units"][unit]
        self._write()

    def _write(self) -> None:
        storage.write_json(self._path, self._value)
