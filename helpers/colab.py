"""Google Colab's services behind guards: where Drive is, and how to end a session. Elsewhere they only say so.

``google.colab`` is only imported where it is loaded already, in Colab's own kernels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

MOUNT_POINT = Path("/content/drive")
FOLDER = "art-anomaly"
"""Folder in My Drive that the suite makes."""


def is_colab() -> bool:
    """Whether this kernel was started by Colab's web page, so that its dialogs can appear."""
    return "google.colab" in sys.modules


def mount_drive(*, log: Callable[[str], None] = print) -> Path | None:
    """Mount Google Drive, or find it mounted. Asks for your permission in a dialog the first time.

    Returns:
        the folder of My Drive; None where there is no Drive to be had, with the reason said.
    """
    root = MOUNT_POINT / "MyDrive"
    if is_reachable(root):
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
    if not is_reachable(root):
        log(f"Google Drive: mounted, but {root} cannot be listed. Run this cell again.")
        return None
    return root


def is_reachable(folder: Path) -> bool:
    """Whether a folder can be listed now; a lost mount exists and cannot (error 107)."""
    try:
        os.listdir(folder)
    except OSError:
        return False
    return True


def disconnect(*, log: Callable[[str], None] = print) -> None:
    """Write what Drive still holds back, then give the machine back, so that no more compute units are used.

    The machine's own disk goes with it.
    """
    if not is_colab():
        log("disconnect: not on Colab, nothing to give back")
        return
    from google.colab import drive, runtime

    drive.flush_and_unmount()
    runtime.unassign()


def _advice(error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return "Only Colab's web page can mount it. Work goes on; set ART_DRIVE to another folder that lasts."
    if "timeout" in str(error).lower():
        return "My Drive's top folder may hold too many files: move some into folders, then run this cell again."
    return "Work goes on without it and is lost with this machine. Run this cell again and allow access to keep it."
