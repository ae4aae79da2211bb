"""Weight files read by their tables of contents, a few rows at a time, and written in one pass.

Reads the two formats that published weights use, torch's zip files (``.pth``, ``.pt``, ``.bin``) and safetensors. Only
names, types, shapes and offsets are read up front. No code from a file is ever run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

CHUNK_BYTES = 4 << 20
"""Largest piece in memory; a third less CPU time than 16 MB, whose fresh memory pages cost more than the sums."""

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_UNREADABLE = (  # what both libraries raise over damaged files
    SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error, OSError,
)  # fmt: skip


class WeightFileError(ValueError):
    """A weight file that is not what it should be; the message says what came and how to repair it."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read, or made, on demand from ``files``, and written as ``dtype`` and ``shape``.

    ``rows(start, stop)`` gives rows of the first axis in any type (a scalar has one row), ``multiple`` at a time (one
    attention head).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    files: tuple[Path, ...]
    rows: Callable[[int, int], torch.Tensor]
    multiple: int = 1

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.n_rows)

    def pieces(self) -> Iterator[torch.Tensor]:
        """The tensor in its type, in pieces of at most :data:`CHUNK_BYTES`."""
        together = self.multiple * self.n_bytes // max(1, self.n_rows)
        step = max(1, CHUNK_BYTES // max(1, together)) * self.multiple
        for start in range(0, self.n_rows, step):
            yield self.rows(start, min(start + step, self.n_rows)).to(self.dtype)


def read_index(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file by key, in the order of the file; nested dicts are joined with dots.

    Raises:
        FileNotFoundError: no such file.
        WeightFileError: a Git-LFS pointer, a web page, empty, cut short, or a pickle that asks to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Put the file there, or run 01_prepare_weights to fetch it.")
    with open(path, "rb") as file:
        head = file.read(512)
    try:
        return _safetensors_index(path) if head[8:9] == b"{" else _torch_index(path)
    except _UNREADABLE as error:  # torch's own text recommends to switch its protection off: it stays unseen
        if isinstance(error, WeightFileError) or getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
            raise  # in words already, or the disk's trouble; torch says EINVAL where a file ends too early
        problem = f"is cut short, or cannot be read as weights ({path.stat().st_size} bytes)"
        if head.startswith(b"version https://git-lfs"):
            problem = "is a Git-LFS pointer, a note about weights"
        elif head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            problem = "is a web page, not weights: a login, licence or quota page"
        elif wanted := str(error).partition("GLOBAL ")[2].split():
            problem = f"was refused: it asks for {wanted[0]}, which could run code"
    raise WeightFileError(f"{path} {problem}. Delete it (rm '{path}') and run 01_prepare_weights again.")


def _safetensors_index(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="np"):  # torch would map the file writably, which a small machine refuses
        pass  # the library checks the table: no overlap, no hole, nothing beyond the end
    with open(path, "rb") as file:
        n_header = struct.unpack("<Q", file.read(8))[0]
        table = json.loads(file.read(n_header))
    table.pop("__metadata__", None)
    items = sorted(table.items(), key=lambda item: item[1]["data_offsets"][0])
    return {
        name: _stored(path, name, _DTYPES[item["dtype"]], tuple(item["shape"]), 8 + n_header + item["data_offsets"][0])
        for name, item in items
    }


def _torch_index(path: Path) -> dict[str, Tensor]:
    """Positions come from ``torch.load`` on the meta device, which reads no numbers."""
    index, n_bytes = {}, path.stat().st_size
    for name, tensor in _flat(torch.load(path, map_location="meta", weights_only=True)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous() or tensor.dtype not in _CODES:
            raise WeightFileError(f"{path}: {name} is no plain tensor. Use the published file.")
        start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
        if start + tensor.numel() * tensor.dtype.itemsize > n_bytes:
            raise WeightFileError(f"{path}: {name} claims bytes beyond the end of the file: damaged or forged.")
        index[name] = _stored(path, name, tensor.dtype, tuple(tensor.shape), start)
    return index


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _stored(path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """A tensor whose first byte lies at ``offset``."""
    n_row = math.prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> torch.Tensor:
        content = torch.empty((stop - start) * n_row, dtype=torch.uint8)
        with open(path, "rb") as file:
            file.seek(offset + start * n_row)
            if file.readinto(memoryview(content.numpy())) < len(content):
                raise WeightFileError(f"{path} ends inside {name}. Delete it and fetch it again.")
        return content.view(dtype).reshape((stop - start, *shape[1:]) if shape else ())

    return Tensor(dtype, shape, (path,), rows)


def file_hash(path: Path, kind: str = "sha256") -> str:
    """Hash of a file, with a progress bar where it is large."""
    digest = hashlib.new(kind)
    with _shown(path, kind) as file:
        for chunk in iter(partial(file.read, CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def check_records(path: Path) -> None:
    """Compare every record of a torch zip file with its own checksum, which torch never does; others carry none."""
    if zipfile.is_zipfile(path):
        with _shown(path, "checksums") as file:
            if bad := zipfile.ZipFile(file).testzip():
                raise WeightFileError(f"{path} is damaged: {bad} does not match its checksum.")


def _shown(path: Path, what: str) -> IO[bytes]:
    options = {"total": path.stat().st_size, "desc": f"{what} of {path.name}"}
    return tqdm.wrapattr(open(path, "rb"), "read", **options, disable=options["total"] < 5e8)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors in one pass; the file has its name only when it is whole. Returns ``{"bytes", "sha256"}``.

    Raises:
        WeightFileError: a number is not finite, or the rows do not have the announced size.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.n_bytes
        table[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers start on a multiple of 8 bytes, as the format asks
    header = struct.pack("<Q", len(text)) + text
    part, digest, n_written = path.with_name(path.name + ".part"), hashlib.sha256(header), len(header)
    try:
        with open(part, "wb") as file:
            file.write(header)
            for name, tensor in tensors.items():
                for piece in tensor.pieces():
                    content = _content(name, piece)
                    digest.update(content)
                    n_written += file.write(content)
                if n_written != len(header) + table[name]["data_offsets"][1]:
                    raise WeightFileError(f"{name} should be {tensor.dtype} {tensor.shape}; its rows are not.")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return {"bytes": n_written, "sha256": digest.hexdigest()}


def _content(name: str, piece: torch.Tensor) -> memoryview:
    """The bytes of a piece of finite numbers."""
    # the largest magnitude tells as much as isfinite, ten times as fast on halves
    if piece.is_floating_point() and piece.numel() and not torch.isfinite(piece.abs().max()):
        raise WeightFileError(f"{name} is not a finite number in the result: unfit or damaged inputs.")
    return memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
