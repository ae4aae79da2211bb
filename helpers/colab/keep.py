"""What is finished outlives the machine: copied to a lasting folder (Google Drive), brought back on a fresh machine.

The workspace is cut into *units*, each finished by itself: a folder of weights, the results of a method, a checkpoint.
A unit travels as one zip without compression, whose checksums tell a whole one from a damaged one. The older zip goes
when the newer lies there and was read again, so the folder holds the last complete version of every unit whenever a
session ends. Only ``session.disconnect`` waits until the cloud has it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from helpers import files

MAX_UNIT_BYTES = 2_200_000_000  # larger units (the merged language model: 13.5 GB) stay: a free Drive has 15 GB
# Areas whose units are the folders that hold a mark, written last by whoever made them.
_MARKS = {"weights": "READY.json", "data": "manifest.json", "results": "manifest.json"}
_REMADE = ("features", "executed", "weights/llama")  # computed again in little time, or only a step on the way
_TEMPORARY = re.compile(r"^\.|\.(partial|part|wrong)$")
_MEMO = ".kept.json"
_NAME = re.compile(r"^(?P<unit>.+)\.(?P<version>\d{19,})\.zip$")
_CHECKPOINT = re.compile(r"^checkpoints/.*/step_\d+$")


@dataclass(frozen=True)
class Archive:
    """Where finished units are kept: a folder, made with the one above it; the one above that must exist."""

    folder: Path
    reconnect: Callable[[], Any] | None = None  # called before a failed operation is repeated: mounts the disk again
    n_tries: int = 4
    wait_seconds: float = 2.0  # before the second attempt; doubles then
    max_unit_bytes: int = MAX_UNIT_BYTES  # larger units are left out, and named

    def patiently(self, action: Callable[[], Any]) -> Any:
        """Repeat an action that the disk refuses; the last OSError is raised with a way out."""
        for attempt in range(1, self.n_tries + 1):
            try:
                return action()
            except OSError as error:
                if attempt == self.n_tries:
                    way = "Free space or run the set-up cell again."
                    raise OSError(f"{error} (in {attempt} attempts). {way}") from error
            time.sleep(self.wait_seconds * 2 ** (attempt - 1))
            if self.reconnect is not None:
                self.reconnect()


@dataclass(frozen=True)
class Outcome:
    """What became of one unit."""

    unit: str  # its folder below the workspace
    state: str  # "saved", "restored", "too large" or "failed"
    problem: str = ""  # why, and what to do

    def __str__(self) -> str:
        return f"{self.unit}: {self.state}" + (f", {self.problem}" if self.problem else "")


def find_units(home: Path) -> dict[str, list[Path]]:
    """Finished units of a workspace: name (folder below ``home``) -> its files, sorted, marks last.

    In ``weights``, ``data`` and ``results`` a unit is a folder with its mark; elsewhere all files are written whole:
    each folder of ``checkpoints`` and each other folder of the workspace is a unit as it is.
    """
    home, units = Path(home), {}
    marked = {path.parent for area, mark in _MARKS.items() for path in (home / area).rglob(mark)}
    marked = {folder for folder in marked if not marked & set(folder.parents)}
    for folder, folders, names in os.walk(home):
        place = Path(folder).relative_to(home)
        folders[:] = [name for name in folders if not _TEMPORARY.search(name) and str(place / name) not in _REMADE]
        unit = place.parts[0] if place.parts else "files"
        if unit in _MARKS:  # not finished without its mark
            owners = marked & {Path(folder), *Path(folder).parents}
            unit = owners.pop().relative_to(home).as_posix() if owners else ""
        elif unit == "checkpoints":
            unit = place.as_posix()
        paths = [Path(folder, name) for name in names if unit and not _TEMPORARY.search(name)]
        units.setdefault(unit, []).extend(paths)
    return {unit: sorted(paths, key=_marks_last) for unit, paths in units.items() if paths}


def save(home: Path, archive: Archive) -> list[Outcome]:
    """Copy every unit that is new or changed since it was last saved or restored here; the others cost no access.

    Nothing is raised when the disk fails: the next call tries again. :func:`restore` must have seen the archive before.
    """
    home, memo = Path(home), _read_memo(home)
    if not memo["has_seen_archive"]:
        return [Outcome("all", "failed", f"{archive.folder} was never listed. Run the set-up cell again.")]
    outcomes, units = [], find_units(home)
    for unit, paths in units.items():
        stamp, known = _stamp(home, paths), memo["units"].get(unit, {"stamp": "", "name": ""})
        n_bytes = sum(path.stat().st_size for path in paths)
        name, state = "", "too large" if n_bytes > archive.max_unit_bytes else "saved"
        if known["stamp"] == stamp and (known["name"] or state == "too large"):
            continue
        try:
            if unit in memo["unread"]:
                raise ValueError(f"An older version could not be read and is not replaced. {_way_out(unit)}")
            name = _put(home, unit, paths, stamp, archive) if state == "saved" else ""
        except (OSError, ValueError) as error:
            outcomes.append(Outcome(unit, "failed", str(error)))
            if isinstance(error, OSError):
                break  # the disk is not to be had now, or full; each further unit would wait as long
            continue
        memo["units"][unit] = {"stamp": stamp, "name": name}
        files.write_json(home / _MEMO, memo)
        _remove(archive.folder, known["name"] if name else "")
        size = f"its {n_bytes / 1e9:.1f} GB stay on this machine only"
        outcomes.append(Outcome(unit, state, "" if name else size))
    for unit in [unit for unit in memo["units"] if _CHECKPOINT.match(unit) and unit not in units]:
        if _remove(archive.folder, memo["units"][unit]["name"]):  # what training dropped goes: each may have 1.4 GB
            del memo["units"][unit]
            files.write_json(home / _MEMO, memo)
    return outcomes


def restore(home: Path, archive: Archive) -> list[Outcome]:
    """Bring back every complete unit that this machine has never had; what is here already stays."""
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    for leftover in home.glob(".keeping-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    memo, outcomes = _read_memo(home), []
    try:
        names = archive.patiently(lambda: _newest(archive.folder))
    except OSError as error:
        return [Outcome("all", "failed", f"{archive.folder} cannot be listed: {error}")]
    memo |= {"has_seen_archive": True, "unread": []}
    here = find_units(home).keys() - {memo["arriving"]}
    for unit, name in sorted(names.items()):
        if unit in memo["units"] or unit in here:
            memo["units"].setdefault(unit, {"stamp": "", "name": name})  # without a stamp it is saved the next time
            continue
        memo["arriving"] = "" if unit.split("/")[0] in _MARKS else unit  # a marked folder appears at once
        files.write_json(home / _MEMO, memo)
        try:
            _get(home, unit, name, archive)
            memo["units"][unit] = {"stamp": _stamp(home, find_units(home)[unit]), "name": name}
            outcomes.append(Outcome(unit, "restored"))
        except (OSError, ValueError, KeyError) as error:
            memo["unread"].append(unit)
            outcomes.append(Outcome(unit, "failed", f"{error} {_way_out(unit)}"))
        memo["arriving"] = ""
    files.write_json(home / _MEMO, memo)
    return outcomes


def _marks_last(path: Path | PurePosixPath) -> tuple[bool, str]:
    return path.suffix == ".json", str(path)


def _stamp(home: Path, paths: Sequence[Path]) -> str:
    """Names, sizes and times: changes when a unit does, costs no reading."""
    states = [(path.relative_to(home).as_posix(), path.stat()) for path in paths]
    return files.sha256_json(sorted((name, state.st_size, state.st_mtime_ns) for name, state in states))


def _way_out(unit: str) -> str:
    return f"Run the set-up cell again; to give that version up, delete {unit.replace('/', '+')}.*.zip there."


def _newest(folder: Path) -> dict[str, str]:
    """Unit -> its newest zip; older ones, emptied ones and half copies of a day ago are removed."""
    folder.parent.mkdir(exist_ok=True)  # the folder above that must be there: a lost mount is an error
    folder.mkdir(exist_ok=True)
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder), reverse=True):
        state, match = (folder / name).stat(), _NAME.match(name)
        unit = match["unit"].replace("+", "/") if match else ""
        if match and state.st_size and unit not in found:
            found[unit] = name
        elif match or (name.endswith(".part") and time.time() - state.st_mtime > 86_400):
            _remove(folder, name)
    return found


def _put(home: Path, unit: str, paths: Sequence[Path], stamp: str, archive: Archive) -> str:
    """Pack a unit, copy the zip, read it again, and only then give it its name, which is returned."""
    name = f"{unit.replace('/', '+')}.{time.time_ns()}.zip"
    with tempfile.TemporaryDirectory(prefix=".keeping-", dir=home) as work:
        packed = Path(work) / "unit.zip"
        with zipfile.ZipFile(packed, "w", strict_timestamps=False) as content:  # links travel as what they point to
            for path in paths:
                content.write(path, path.relative_to(home).as_posix())
        if _stamp(home, paths) != stamp:
            raise ValueError(f"{unit} changed while it was packed; the next round takes it.")
        try:
            archive.patiently(lambda: _copy(packed, archive.folder / name))
        except OSError:
            _remove(archive.folder, f"{name}.part")
            raise
    return name


def _get(home: Path, unit: str, name: str, archive: Archive) -> None:
    """Copy, check and unpack a zip, then put the unit in its place."""
    with tempfile.TemporaryDirectory(prefix=".keeping-", dir=home) as work:
        packed, fresh = Path(work) / "unit.zip", Path(work) / "files"
        archive.patiently(lambda: _copy(archive.folder / name, packed))
        with zipfile.ZipFile(packed) as content:
            inside = [PurePosixPath(one) for one in content.namelist()]
            if any(".." in one.parts or not one.is_relative_to("." if unit == "files" else unit) for one in inside):
                raise ValueError(f"{name} holds a file that leads outside of {unit}.")
            content.extractall(fresh)
        target = home / unit
        if unit.split("/")[0] in _MARKS:
            shutil.rmtree(target, ignore_errors=True)  # without its mark, or it would be a unit of this machine
        if unit != "files" and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh / unit, target)  # a folder that is not there yet appears at once
            return
        for one in sorted(inside, key=_marks_last):
            (home / one).parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh / one, home / one)


def _copy(source: Path, target: Path) -> None:
    """Copy a zip, read the copy to its end, then give it its name; OSError when it is cut or a checksum is wrong."""
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    try:
        with zipfile.ZipFile(part) as content:
            damaged = content.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    if damaged:
        raise OSError(f"{target.name} is damaged ({damaged}).")
    os.replace(part, target)


def _remove(folder: Path, name: str) -> bool:
    """Delete a file if it can be; emptied first, because what is deleted on Drive fills the bin for 30 days."""
    try:
        if name:
            with open(folder / name, "r+b") as file:
                file.truncate()
            (folder / name).unlink()
    except OSError as error:  # a failing disk says of files that they are gone
        return isinstance(error, FileNotFoundError) and not os.path.exists(folder / name)
    return True


def _read_memo(home: Path) -> dict[str, Any]:
    """What this machine has saved or restored, in a hidden file of the workspace."""
    fresh = {"has_seen_archive": False, "unread": [], "arriving": "", "units": {}}
    return fresh | (files.read_json(home / _MEMO) if (home / _MEMO).exists() else {})
