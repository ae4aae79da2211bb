"""File operations that fail below one folder, as a mounted Google Drive does: a stand-in for system calls.

Failures, drawn from a seed: *Transport endpoint is not connected* (error 107) for this and all further calls until the
disk is mounted again, *No such file* for a file that exists, an input/output error, a write that is cut short, a full
disk. With ``kill_at`` the process ends itself with SIGKILL at that call, counting every write, rename and removal, on
the local disk as well: nothing of it can be caught.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tqdm.auto

_ERRORS = (errno.ENOTCONN, errno.ENOENT, errno.EIO)
_CALLS = [(os, name) for name in ("replace", "listdir", "unlink", "remove", "mkdir", "rmdir", "stat")]
_CALLS += [(builtins, "open"), (io, "open"), (shutil, "copyfile")]


def _alone(target: Callable, *arguments: object) -> None:
    """What a copy of this process does: without its threads, and without the lock that a killed one would keep."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for bars in (tqdm.tqdm, tqdm.auto.tqdm):
        bars.set_lock(threading.RLock())
    target(*arguments)


def is_killed(
    target: Callable, *arguments: object, when: Callable[[], bool] = lambda: False, context: str = "fork"
) -> bool:
    """Whether ``target``, called in a copy of this process, ended by a SIGKILL, its own or ours at a certain time. With
    the ``context`` "forkserver" the process is fresh: torch refuses to train in a copy of one that has trained."""
    process = multiprocessing.get_context(context).Process(target=_alone, args=(target, *arguments))
    process.start()
    while process.is_alive() and not when():
        process.join(timeout=0.005)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


class FailingDrive:
    """A disk mounted at ``folder``, of whose calls the share ``rate`` fails."""

    def __init__(
        self, folder: Path, *, seed: int = 0, rate: float = 0.0, kill_at: int | None = None, is_full: bool = False
    ) -> None:
        self._folder, self._random = str(folder), random.Random(seed)
        self.rate, self.kill_at, self.is_full, self.is_lost = rate, kill_at, is_full, False
        self.n_calls = self.n_failures = 0

    def reconnect(self) -> None:
        """``drive.mount(..., force_remount=True)``: works often, not always."""
        self.is_lost = self.is_lost and self._random.random() >= 0.8

    @contextlib.contextmanager
    def installed(self) -> Iterator[FailingDrive]:
        """Puts itself between the program and the disk for the length of the block."""
        with contextlib.ExitStack() as stack:
            for owner, name in _CALLS:
                guarded = self._guarded(getattr(owner, name), name)
                stack.enter_context(mock.patch.object(owner, name, guarded))
            yield self

    def _guarded(self, real: Callable, name: str) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            mode = str(arguments[1] if len(arguments) > 1 else options.get("mode", "r")) if name == "open" else ""
            changes = any(letter in mode for letter in "wax+") if name == "open" else name not in ("listdir", "stat")
            paths = arguments[:1] if name == "open" else arguments[:2]
            self._strike(paths, changes)
            if self.is_full and changes and name in ("open", "copyfile") and self._is_ours(paths[-1]):
                raise OSError(errno.ENOSPC, "No space left on device", str(paths[-1]))
            result = real(*arguments, **options)
            if name == "copyfile" and self._is_ours(arguments[1]) and self._random.random() < self.rate:
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            return result

        return call

    def _is_ours(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def _strike(self, paths: tuple[Any, ...], changes: bool) -> None:
        ours = any(self._is_ours(path) for path in paths)
        self.n_calls += ours or changes
        if (ours or changes) and self.n_calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if ours and not self.is_lost and self._random.random() < self.rate:
            self.n_failures += 1
            code = self._random.choice(_ERRORS)
            self.is_lost = code == errno.ENOTCONN
            raise OSError(code, os.strerror(code), str(paths[0]))
        if ours and self.is_lost:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(paths[0]))
