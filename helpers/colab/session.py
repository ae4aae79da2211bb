"""The set-up cell's one call: profile, what is kept from earlier sessions, and whether this machine will do.

Afterwards every cell that finishes something has it copied to the lasting folder, where there is one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from helpers import profiles
from helpers.colab import keep, preflight

MOUNT_POINT = Path("/content/drive")
FOLDER = "art-anomaly"  # in My Drive; the suite makes it
_PAUSE_SECONDS = 300  # after a failed round, so that a dead Drive does not slow down every cell
_CHECKPOINT_SECONDS = 900  # between two rounds in one long cell: a checkpoint of AnomalyGPT has 1.4 GB

_current: _Keeper | None = None


def start(*, log: Callable[[str], None] = print) -> profiles.Profile:
    """Find the profile, bring back finished work, and print the preflight table.

    Run again it mounts a lost Drive anew. A ``✗`` says what will stop the session, and what to do; what stops it here
    is an ``ART_PROFILE``, ``ART_DATA`` or ``ART_DRIVE_LIMIT_GB`` that means nothing (ValueError, FileNotFoundError).
    """
    global _current
    from IPython import get_ipython

    asked = os.environ.get("ART_DATA", "")
    if "drive/" in asked and "://" not in asked:
        mount_drive(log=log)  # the user's pictures lie there
    profile = profiles.active()
    log(str(profile))
    lasting = lasting_folder(profile.device, log=log)
    shell = get_ipython()
    if shell is not None and _current is not None:
        shell.events.unregister("post_run_cell", _current)  # a set-up cell that runs twice must not save twice
    _current = None
    if lasting is not None:
        reconnect = partial(mount_drive, log=log) if lasting.is_relative_to(MOUNT_POINT) else None
        limit = os.environ.get("ART_DRIVE_LIMIT_GB", "").strip() or str(keep.MAX_UNIT_BYTES / 1e9)
        if not limit.replace(".", "", 1).isdigit():
            raise ValueError(f"ART_DRIVE_LIMIT_GB is {limit!r}; give a number of GB, or unset it for 2.2.")
        archive = keep.Archive(lasting / profile.name, reconnect, max_unit_bytes=int(float(limit) * 1e9))
        for outcome in keep.restore(profile.home, archive):
            log(f"kept in {lasting}: {outcome}")
        _current = _Keeper(profile.home, archive, log)
        if shell is not None:
            shell.events.register("post_run_cell", _current)
            log(f"finished work is copied to {archive.folder} whenever a cell ends")
    log(preflight.as_text(preflight.run(profile, lasting=lasting)))
    log(preflight.where_am_i(profile.home))
    return profile


def lasting_folder(device: str, *, log: Callable[[str], None] = print) -> Path | None:
    """Where finished work is kept: ``ART_DRIVE`` (``off``: nowhere), or Google Drive on a machine with a GPU."""
    asked = os.environ.get("ART_DRIVE", "").strip()
    if asked:
        return None if asked.lower() == "off" else Path(asked).expanduser().absolute()
    root = mount_drive(log=log) if device.startswith("cuda") else None
    return None if root is None else root / FOLDER


def checkpoint_keeper() -> Callable[[Path], None] | None:
    """For ``on_checkpoint`` of a training that takes hours in one cell; None where nothing is kept."""
    return None if _current is None else _Keeper(_current.home, _current.archive, print, _CHECKPOINT_SECONDS)


def is_colab() -> bool:
    """Whether this kernel was started by Colab's web page, so that its dialogs can appear."""
    return "google.colab" in sys.modules


def mount_drive(*, log: Callable[[str], None] = print) -> Path | None:
    """The folder of My Drive, mounted after a dialog the first time; None where there is none, with the reason said."""
    root = MOUNT_POINT / "MyDrive"
    if preflight.is_reachable(root):
        return root
    if not is_colab():
        log("Google Drive: not on Colab, nothing to mount")
        return None
    from google.colab import drive

    try:
        drive.mount(str(MOUNT_POINT), force_remount=MOUNT_POINT.exists())
    except Exception as error:  # NotImplementedError, ValueError and Colab's own MessageError: no common base
        log(f"Google Drive: could not be mounted ({type(error).__name__}: {error}). {_advice(error)}")
        return None
    if not preflight.is_reachable(root):
        log(f"Google Drive: mounted, but {root} cannot be listed. Run this cell again.")
        return None
    return root


def disconnect(*, log: Callable[[str], None] = print) -> None:
    """Wait until Drive has everything, then give the machine (and its disk) back: no more compute units are used."""
    if not is_colab():
        log("disconnect: not on Colab, nothing to give back")
        return
    from google.colab import drive, runtime

    drive.flush_and_unmount()
    runtime.unassign()


@dataclass
class _Keeper:
    """Saves what is finished; called by IPython when a cell has ended, or by a training with each checkpoint."""

    home: Path
    archive: keep.Archive
    log: Callable[[str], None]
    pause_seconds: float = 0.0
    not_before: float = 0.0

    def __call__(self, _what: Any = None) -> None:
        if time.monotonic() < self.not_before:
            return
        outcomes = keep.save(self.home, self.archive)
        for outcome in outcomes:
            self.log(f"kept: {outcome}")
        has_failed = any(outcome.state == "failed" for outcome in outcomes)
        self.not_before = time.monotonic() + max(self.pause_seconds, _PAUSE_SECONDS if has_failed else 0)


def _advice(error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return "Only Colab's web page can mount it. Work goes on; set ART_DRIVE to another folder that lasts."
    if "timeout" in str(error).lower():
        return "My Drive's top folder may hold too many files: move some into folders, then run this cell again."
    return "Work goes on without it and is lost with this machine. Run this cell again and allow access to keep it."
