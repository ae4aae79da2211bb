"""``drive.mount`` and ``flush_and_unmount``: My Drive is a link to ``state.cloud``."""

from __future__ import annotations

from pathlib import Path

from google.colab._state import state


class MessageError(Exception):
    """A refused dialog; Colab's own derives from Exception alone, too."""


def mount(mountpoint: str, force_remount: bool = False, timeout_ms: int = 120_000, readonly: bool = False) -> None:
    state.calls.append("drive.mount(force)" if force_remount else "drive.mount")
    if not state.hosted:
        raise NotImplementedError("google.colab.drive is unsupported in this environment.")
    if " " in mountpoint:
        raise ValueError("Mountpoint must not contain a space.")
    if state.mount_errors:
        raise state.mount_errors.pop(0)
    place = Path(mountpoint)
    if place.is_symlink():
        raise ValueError("Mountpoint must not be a symlink.")
    link = place / "MyDrive"
    if link.is_symlink():
        if not force_remount:
            print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.mount(...)")
            return
        link.unlink()
    if place.exists() and any(place.iterdir()):
        raise ValueError("Mountpoint must not already contain files")
    place.mkdir(parents=True, exist_ok=True)
    assert state.cloud is not None, "the test must say where My Drive lies"
    link.symlink_to(state.cloud, target_is_directory=True)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms: int = 24 * 60 * 60 * 1000) -> None:
    state.calls.append("drive.flush_and_unmount")
