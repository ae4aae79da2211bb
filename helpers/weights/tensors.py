"""Weight files read by their tables of contents, a few rows at a time, and written in one pass.

Reads the two formats that published weights use, torch's zip files (``.pth``, ``.pt``, ``.bin``) and safetensors. Only
names, types, shapes and offsets are read up front. No code from a file is ever run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

CHUNK_BYTES = 4 << 20
"""Largest piece in memory at a time. Measured: a third less CPU time than pieces of 16 MB, whose fresh memory pages
cost more than the sums."""

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class WeightFileError(ValueError):
    """A weight file that is not what it should be; the message says what came and how to repair it."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where its first byte lies, not its numbers."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the first axis, in the stored type; a scalar has one row."""
        n_row = math.prod(self.shape[1:]) * self.dtype.itemsize
        content = torch.empty((stop - start) * n_row, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self.offset + start * n_row)
            if file.readinto(memoryview(content.numpy())) < len(content):
                raise WeightFileError(f"{self.path} ends inside {self.name}. Delete it and fetch it again.")
        return content.view(self.dtype).reshape((stop - start, *self.shape[1:]) if self.shape else ())


def row_ranges(n_rows: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of at most :data:`CHUNK_BYTES`, each a multiple of ``multiple`` rows (whole attention heads)."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes * multiple)) * multiple
    yield from ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def read_index(path: Path) -> dict[str, Stored]:
    """Table of contents of a weight file, by key; nested dicts are joined with dots.

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
    except WeightFileError:
        raise
    except Exception as error:  # both libraries raise many kinds; torch's advice to switch protection off stays unseen
        problem = f"is cut short, or cannot be read as weights ({path.stat().st_size} bytes)"
        if head.startswith(b"version https://git-lfs"):
            problem = "is a Git-LFS pointer, a note about weights"
        elif head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            problem = "is a web page, not weights: a login, licence or quota page"
        elif wanted := str(error).partition("GLOBAL ")[2].split():
            problem = f"was refused: it asks for {wanted[0]}, which could run code"
    raise WeightFileError(f"{path} {problem}. Delete it (rm '{path}') and run 01_prepare_weights again.")


def _safetensors_index(path: Path) -> dict[str, Stored]:
    with safe_open(path, framework="np"):  # torch would map the file writably, which a small machine refuses
        pass  # the library checks the table: no overlap, no hole, nothing beyond the end
    with open(path, "rb") as file:
        n_header = struct.unpack("<Q", file.read(8))[0]
        table = json.loads(file.read(n_header))
    table.pop("__metadata__", None)
    items = sorted(table.items(), key=lambda item: item[1]["data_offsets"][0])
    return {
        name: Stored(path, name, _DTYPES[item["dtype"]], tuple(item["shape"]), 8 + n_header + item["data_offsets"][0])
        for name, item in items
    }


def _torch_index(path: Path) -> dict[str, Stored]:
    """Positions come from ``torch.load`` on the meta device, which reads no numbers."""
    index, n_bytes = {}, path.stat().st_size
    for name, tensor in _flat(torch.load(path, map_location="meta", weights_only=True)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous() or tensor.dtype not in _CODES:
            raise WeightFileError(f"{path}: {name} is no plain tensor. Use the published file.")
        start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
        if start + tensor.numel() * tensor.dtype.itemsize > n_bytes:
            raise WeightFileError(f"{path}: {name} claims bytes beyond the end of the file: damaged or forged.")
        index[name] = Stored(path, name, tensor.dtype, tuple(tensor.shape), start)
    return index


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def file_hash(path: Path, kind: str = "sha256") -> str:
    """Hash of a file, with a progress bar where it is large."""
    digest = hashlib.new(kind)
    with _shown(path, kind) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_records(path: Path) -> None:
    """Compare every record of a torch zip file with its own checksum, which torch never does; others carry none."""
    if zipfile.is_zipfile(path):
        with _shown(path, "checksums") as file:
            if bad := zipfile.ZipFile(file).testzip():
                raise WeightFileError(f"{path} is damaged: {bad} does not match its checksum.")


def _shown(path: Path, what: str) -> IO[bytes]:
    n_bytes = path.stat().st_size
    title = f"{what} of {path.name}"
    return tqdm.wrapattr(open(path, "rb"), "read", total=n_bytes, desc=title, disable=n_bytes < 5e8)


def write_safetensors(
    path: Path, parts: Mapping[str, tuple[torch.dtype, tuple[int, ...], Iterable[torch.Tensor]]]
) -> dict[str, Any]:
    """Write tensors (type, shape, pieces in row order) in one pass; the file has its name only when it is whole.

    Returns:
        ``{"bytes", "sha256"}``.
    Raises:
        WeightFileError: a number is not finite, or the pieces do not have the announced type or size.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, _) in parts.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers start on a multiple of 8 bytes, as the format asks
    header = struct.pack("<Q", len(text)) + text
    part, digest, n_written = path.with_name(path.name + ".part"), hashlib.sha256(header), len(header)
    try:
        with open(part, "wb") as file:
            file.write(header)
            for name, (dtype, shape, pieces) in parts.items():
                for piece in pieces:
                    content = _content(name, dtype, piece)
                    digest.update(content)
                    n_written += file.write(content)
                if n_written != len(header) + table[name]["data_offsets"][1]:
                    raise WeightFileError(f"{name} was announced as {dtype} {shape}; its pieces differ from that size.")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return {"bytes": n_written, "sha256": digest.hexdigest()}


def _content(name: str, dtype: torch.dtype, piece: torch.Tensor) -> memoryview:
    """The bytes of a piece, which must have the announced type and finite numbers."""
    if piece.dtype != dtype:
        raise WeightFileError(f"{name} was announced as {dtype}; a piece of {piece.dtype} came.")
    # the largest magnitude tells as much as isfinite, ten times as fast on halves
    if dtype.is_floating_point and piece.numel() and not torch.isfinite(piece.abs().max()):
        raise WeightFileError(f"{name} is not a finite number in the result: unfit or damaged inputs.")
    return memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
