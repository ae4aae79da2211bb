"""``files.upload`` gives the chosen files by name; ``files.download`` refuses what is not there."""

from __future__ import annotations

from pathlib import Path

from google.colab._state import state


def upload(target_dir: str = "") -> dict[str, bytes]:
    state.calls.append("files.upload")
    chosen, state.uploads = state.uploads, {}
    for name, content in chosen.items():
        (Path(target_dir) / name).write_bytes(content)
    return chosen


def download(filename: str) -> None:
    state.calls.append(f"files.download({filename})")
    if not Path(filename).exists():
        raise FileNotFoundError(f"Cannot find file: {filename}")
