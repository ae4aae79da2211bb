"""One long write of a model folder that may be interrupted at any moment and goes on where it stopped.

A job owns its target folder through a lock. Each shard is written to ``<name>.part``, hashed on the way, forced to
disk, renamed and then noted in ``journal.json``; what the journal does not name is written again. ``READY.json`` comes
last, and later notebooks look at nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files as storage
from helpers.weights import tensors as tensor_files
from helpers.weights.tensors import StoredTensor, WeightFileError

if TYPE_CHECKING:
    import torch

READY, JOURNAL, LOCK = "READY.json", "journal.json", ".lock"
FORMAT = 1
SHARD_BYTES = 2_000_000_000
RESERVE_BYTES = 2_000_000_000
"""Disk left free after a job, unless the job itself is smaller than that."""

_EXPONENTS = {"float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80), "float32": (np.uint32, 0x7F800000)}


@dataclass(frozen=True)
class OutTensor:
    """One tensor to be written.

    Attributes:
        name: key in the output.
        dtype: torch name of its type.
        shape: its shape.
        chunks: gives its pieces in row order, each at most about 4 MB.
        inputs: files that the pieces are read from.
        measured: numbers that ``chunks`` fills in while it runs (root mean squares and the like).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[torch.Tensor]]
    inputs: tuple[Path, ...]
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * tensor_files.item_bytes(self.dtype)


class Job:
    """An open job on one target folder; made by :func:`open_job`.

    Attributes:
        target: the folder.
        ready: content of ``READY.json`` when the folder is complete already, else None.
        notes: sentences for ``READY.json``; each is also printed once.
    """

    def __init__(self, target: Path, log: Callable[[str], None]) -> None:
        self.target, self.log = target, log
        self.ready = storage.read_json(target / READY) if (target / READY).exists() else None
        journal = storage.read_json(target / JOURNAL) if (target / JOURNAL).exists() else {}
        self._known: dict[str, Any] = journal.get("inputs", {}) or (self.ready or {}).get("inputs", {})
        self._journal: dict[str, Any] = journal
        self._inputs: dict[str, Any] = {}
        self.notes: list[str] = list(journal.get("notes", []))

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            self.log(f"note: {sentence}")

    def known_inputs(self, role: str) -> list[str]:
        """File names of this role that an earlier, interrupted run has read (and may have deleted since)."""
        return sorted(key.split("/", 1)[1] for key in self._known if key.startswith(f"{role}/"))

    def index(self, role: str, path: Path) -> dict[str, StoredTensor]:
        """Table of contents of an input; from the journal when the file was deleted after it had been used up.

        Raises:
            FileNotFoundError: the file is absent and no earlier run has read it.
            WeightFileError: the file is not the one that the interrupted or finished run has read.
        """
        key = f"{role}/{path.name}"
        known = self._known.get(key)
        if not path.exists() and known is not None:
            self._inputs[key] = known
            return {
                name: StoredTensor(path, name, dtype, tuple(shape), offset)
                for name, (dtype, shape, offset) in known["index"].items()
            }
        index = tensor_files.read_index(path)
        found = tensor_files.identity(path)
        if known is not None and (known["bytes"], known["fingerprint"]) != (found["bytes"], found["fingerprint"]):
            raise WeightFileError(
                f"{self.target} was begun with another {path.name} ({known['bytes']} bytes, fingerprint "
                f"{known['fingerprint'][:12]}; now {found['bytes']} bytes, {found['fingerprint'][:12]}). Mixing them "
                f"would give a model that is neither. Choose a new, empty target folder, or delete this one."
            )
        found["index"] = {name: (item.dtype, list(item.shape), item.offset) for name, item in index.items()}
        self._inputs[key] = found
        return index

    def run(
        self,
        tensors: Sequence[OutTensor],
        *,
        component: str,
        settings: Mapping[str, Any],
        write_sidecars: Callable[[Path], None],
        source: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
        reserve_bytes: int | None = None,
        delete_inputs: bool = False,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Write all tensors as safetensors shards, then the small files, then ``READY.json``.

        Args:
            tensors: what to write, in this order.
            component: name in ``READY.json``.
            settings: what else decides the result; part of the plan's hash.
            write_sidecars: writes config and tokenizer files into the folder it is given.
            source: where the inputs came from, for ``READY.json``.
            shard_bytes: largest output file.
            reserve_bytes: disk to leave free; None for the smaller of 2 GB and the output's size.
            delete_inputs: delete each input file as soon as every tensor read from it is safely on disk.
            progress: show a progress bar.
        Returns:
            the content of ``READY.json``.
        Raises:
            WeightFileError: another plan owns the folder, or a number of the result is not finite.
            OSError: the disk is too small; says by how much and what may be deleted.
        """
        shards = _split(tensors, shard_bytes)
        identities = {
            key: {k: value[k] for k in ("bytes", "fingerprint")} for key, value in sorted(self._inputs.items())
        }
        plan = storage.sha256_json(
            {
                "format": FORMAT,
                "settings": dict(settings),
                "inputs": identities,
                "shards": [[(t.name, t.dtype, list(t.shape)) for t in members] for members in shards.values()],
            }
        )
        if self.ready is not None:
            return self._finished(plan, component)
        done, deleted = self._resume(plan, shards), self._journal.get("deleted", [])
        self._check_disk(shards, done, reserve_bytes)
        self._journal = {"plan": plan, "component": component, "inputs": self._inputs, "notes": self.notes}
        self._journal["deleted"] = deleted
        self._journal["shards"] = done
        storage.write_json(self.target / JOURNAL, self._journal)
        with _one_thread():
            self._write(shards, done, delete_inputs=delete_inputs, progress=progress)
        if len(shards) > 1:
            storage.write_json(self.target / "model.safetensors.index.json", _weight_map(shards))
        write_sidecars(self.target)
        names = sorted(
            path.name
            for path in self.target.iterdir()
            if path.is_file() and path.name not in (READY, JOURNAL, LOCK) and path.suffix != ".part"
        )
        ready = {
            "format": FORMAT,
            "component": component,
            "plan": plan,
            "source": dict(source),
            "notes": self.notes,
            "files": {
                name: done[name]["file"]
                if name in done
                else {"bytes": (self.target / name).stat().st_size, "sha256": storage.sha256_file(self.target / name)}
                for name in names
            },
            "tensors": {name: value for entry in done.values() for name, value in entry["tensors"].items()},
            "inputs": self._inputs,
            "settings": dict(settings),
        }
        storage.write_json(self.target / READY, ready)
        (self.target / JOURNAL).unlink()
        self.ready = ready
        return ready

    def _finished(self, plan: str, component: str) -> dict[str, Any]:
        if self.ready["plan"] != plan:
            raise WeightFileError(
                f"{self.target} already holds a complete {self.ready['component']} made from other inputs or settings. "
                f"Choose another target folder, or delete this one first."
            )
        check_files(self.target, self.ready)
        self.log(f"{component}: already complete in {self.target}")
        return self.ready

    def _resume(self, plan: str, shards: Mapping[str, Sequence[OutTensor]]) -> dict[str, Any]:
        """Entries of the journal whose files are still what it says."""
        for part in self.target.glob("*.part"):
            part.unlink()
        if not self._journal:
            return {}
        if self._journal["plan"] != plan:
            raise WeightFileError(
                f"{self.target} was begun with another plan (other inputs, shard size or settings). Repeat the first "
                f"call to finish it, choose a new folder, or delete {self.target / JOURNAL} and the shards beside it."
            )
        done = {}
        for name, entry in self._journal["shards"].items():
            path = self.target / name
            if path.exists() and storage.sha256_file(path) == entry["file"]["sha256"]:
                done[name] = entry
            elif path.exists():
                self.note(f"{name} no longer matched its hash and was written again.")
        self.log(f"resuming at {len(done)}/{len(shards)} shards")
        return done

    def _check_disk(
        self, shards: Mapping[str, Sequence[OutTensor]], done: Mapping[str, Any], reserve_bytes: int | None
    ) -> None:
        remaining = sum(t.n_bytes for name, members in shards.items() if name not in done for t in members)
        reserve = min(RESERVE_BYTES, remaining) if reserve_bytes is None else reserve_bytes
        n_free = storage.free_bytes(self.target)
        if remaining + reserve > n_free:
            raise OSError(28, self._disk_message(remaining + reserve - n_free, remaining, n_free))

    def _disk_message(self, missing: int, remaining: int, n_free: int) -> str:
        return (
            f"the disk of {self.target} is too small: {remaining / 1e9:.2f} GB are still to be written, "
            f"{n_free / 1e9:.2f} GB are free, {missing / 1e9:.2f} GB are missing. Finished shards are kept. May be "
            f"deleted: the Colab sample data, pip's cache, raw files that are used up; or call again with "
            f"delete_inputs=True"
        )

    def _write(
        self, shards: Mapping[str, Sequence[OutTensor]], done: dict[str, Any], *, delete_inputs: bool, progress: bool
    ) -> None:
        from tqdm.auto import tqdm

        total = sum(t.n_bytes for name, members in shards.items() if name not in done for t in members)
        missing = sorted(
            {str(p) for name, ms in shards.items() if name not in done for t in ms for p in t.inputs if not p.exists()}
        )
        if missing:
            raise FileNotFoundError(f"still needed for the shards that remain: {', '.join(missing)}. Put them back.")
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=self.target.name, disable=not progress or total < 100_000_000
        ) as bar:
            for name, members in shards.items():
                if name in done:
                    continue
                by_name = {tensor.name: tensor for tensor in members}

                def chunks(key: str, by_name: Mapping[str, OutTensor] = by_name) -> Iterator[torch.Tensor]:
                    n_before = 0
                    for chunk in by_name[key].chunks():
                        _check_finite(chunk, key, n_before, by_name[key])
                        n_before += chunk.numel()
                        yield chunk
                        bar.update(chunk.numel() * chunk.element_size())

                layout = {tensor.name: (tensor.dtype, tensor.shape) for tensor in members}
                try:
                    written = tensor_files.write_safetensors(
                        self.target / name, layout, chunks, metadata={"format": "pt"}
                    )
                except OSError as error:
                    if error.errno != 28:
                        raise
                    n_free, n_bytes = storage.free_bytes(self.target), sum(t.n_bytes for t in members)
                    message = self._disk_message(max(0, n_bytes - n_free), n_bytes, n_free)
                    raise OSError(28, message) from error
                hashes = written.pop("tensors")
                entries = {key: {"sha256": hashes[key], **by_name[key].measured} for key in hashes}
                done[name] = {"file": written, "tensors": entries}
                storage.write_json(self.target / JOURNAL, self._journal)
                if delete_inputs:
                    self._delete_used(shards, done)

    def _delete_used(self, shards: Mapping[str, Sequence[OutTensor]], done: Mapping[str, Any]) -> None:
        """Delete the inputs that no unwritten shard reads; the journal on disk already names what they gave."""
        needed = {path for name, members in shards.items() if name not in done for t in members for path in t.inputs}
        used = {path for name, members in shards.items() if name in done for t in members for path in t.inputs}
        gone = [path for path in sorted(used - needed) if path.exists()]
        if gone:
            self._journal.setdefault("deleted", []).extend(path.name for path in gone)
            storage.write_json(self.target / JOURNAL, self._journal)
        for path in gone:
            path.unlink()
            self.log(f"deleted {path} (used up; its fingerprint is in the journal)")


@contextlib.contextmanager
def open_job(target: Path, *, log: Callable[[str], None] = print) -> Iterator[Job]:
    """Lock ``target`` and open it for one job; the lock goes with the process, also when it is killed.

    Raises:
        BlockingIOError: another process works in the folder; says which and since when.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    handle = os.open(target / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 4096).decode(errors="replace").strip() or "an unnamed process"
            raise BlockingIOError(
                error.errno,
                f"{target} is being written by {holder}. Wait until it ends, or stop that run; nothing was changed",
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield Job(target, log)
    finally:
        os.close(handle)


def check_files(folder: Path, ready: Mapping[str, Any], *, verify: bool = False) -> None:
    """Compare a folder with its ``READY.json``: sizes always, hashes with ``verify``.

    Raises:
        WeightFileError: files are missing, have another size, or (``verify``) another hash; names all of them.
    """
    wrong = []
    for name, expected in ready["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        elif verify and storage.sha256_file(path) != expected["sha256"]:
            wrong.append(f"{name} does not match its SHA-256")
    if wrong:
        raise WeightFileError(
            f"{folder} is damaged: {'; '.join(wrong)}. Delete the folder and run 01_prepare_weights again."
        )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch with one thread: hashing and disk decide here, and a second thread would only wait busily."""
    import torch

    n_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_before)


def _split(tensors: Sequence[OutTensor], shard_bytes: int) -> dict[str, list[OutTensor]]:
    """Tensors in order, cut into files of at most ``shard_bytes`` (a larger tensor gets its own)."""
    groups: list[list[OutTensor]] = [[]]
    n_bytes = 0
    for tensor in tensors:
        if groups[-1] and n_bytes + tensor.n_bytes > shard_bytes:
            groups.append([])
            n_bytes = 0
        groups[-1].append(tensor)
        n_bytes += tensor.n_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _weight_map(shards: Mapping[str, Sequence[OutTensor]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(t.n_bytes for members in shards.values() for t in members)},
        "weight_map": {t.name: name for name, members in shards.items() for t in members},
    }


def _check_finite(chunk: torch.Tensor, name: str, n_before: int, tensor: OutTensor) -> None:
    """Stop at the first NaN or infinity. A test of the exponent bits: ten times as fast as ``isfinite`` on halves."""
    if tensor.dtype not in _EXPONENTS:
        return
    word, mask = _EXPONENTS[tensor.dtype]
    words = np.frombuffer(tensor_files.tensor_bytes(chunk, tensor.dtype, name), dtype=word)
    exponents = np.bitwise_and(words, word(mask))
    if exponents.size and exponents.max() == mask:
        first = n_before + int(np.argmax(exponents == mask))
        place = [int(i) for i in np.unravel_index(first, tensor.shape)] if tensor.shape else []
        raise WeightFileError(
            f"{name}{place} is not a finite number in the result. The inputs do not belong together, or one of them is "
            f"damaged; they are kept, and nothing was written for this shard. Read from: "
            f"{', '.join(str(path) for path in tensor.inputs)}."
        )
