"""Weight files read by their tables of contents and written in one pass, without ever holding a model in memory.

Reads the two formats that published weights use: torch's zip files (``.pth``, ``.pt``, ``.bin``) and safetensors. Only
names, types, shapes and file offsets are read up front; numbers come later, a few rows at a time. No code from a file
is ever run: torch's table of contents is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 4 << 20
"""Largest piece of a tensor in memory at a time. Measured: a third less CPU time than pieces of 16 MB, whose fresh
memory pages cost more than the sums."""

_SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {code: name for name, code in _SAFETENSORS_DTYPES.items()}
_ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "bool": 1,
}  # fmt: skip


class WeightFileError(ValueError):
    """A weight file that is not what it should be; the message says what came and how to repair it."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file: where it lies, not its numbers.

    Attributes:
        path: the file.
        name: key in the file.
        dtype: torch name of the type, for example ``"float16"``.
        shape: shape as stored.
        offset: position of its first byte in the file.
        data: the tensor itself, only for torch's old format, which cannot be read in pieces.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    data: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def n_rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * _ITEM_BYTES[self.dtype]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the first axis, in the stored type; a scalar has one row.

        Raises:
            WeightFileError: the file ends before the tensor does.
        """
        import torch

        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        if self.data is not None:
            return self.data[start:stop] if self.shape else self.data
        buffer = torch.empty((stop - start) * self.row_bytes, dtype=torch.uint8)
        view, position = memoryview(buffer.numpy()), self.offset + start * self.row_bytes
        with open(self.path, "rb", buffering=0) as file:
            file.seek(position)
            n_read = 0
            while n_read < len(view):
                n_new = file.readinto(view[n_read:])
                if not n_new:
                    raise WeightFileError(
                        f"{self.path} ends inside {self.name}, at byte {position + n_read}. {_refetch(self.path)}"
                    )
                n_read += n_new
        return buffer.view(getattr(torch, self.dtype)).reshape(shape)

    def read(self) -> torch.Tensor:
        """The whole tensor in its stored type."""
        return self.read_rows(0, self.n_rows)


def item_bytes(dtype: str) -> int:
    """Bytes of one number of a torch type name."""
    return _ITEM_BYTES[dtype]


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Table of contents of a weight file, by key, in file order; nested dicts are joined with dots.

    Raises:
        FileNotFoundError: no such file.
        WeightFileError: not a weight file (Git-LFS pointer, web page, empty), cut short, or asks to run code.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "safetensors":
        return _safetensors_index(path)
    if kind == "torch-zip":
        return _torch_index(path)
    return _legacy_torch_index(path)


def sniff(path: Path, *, suffix: str | None = None) -> str:
    """Kind of a weight file: ``"safetensors"``, ``"torch-zip"`` or ``"torch-legacy"``.

    Args:
        path: the file.
        suffix: suffix that it will have, where it still has a temporary name.

    Raises:
        FileNotFoundError: no such file.
        WeightFileError: something else stands in its place, named in plain words.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Put the file there, or run 01_prepare_weights to fetch it.")
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise WeightFileError(f"{path} is empty (0 bytes). {_refetch(path)}")
    if head.startswith(b"version https://git-lfs"):
        size = next((line.split()[1] for line in head.decode().splitlines() if line.startswith("size ")), "unknown")
        raise WeightFileError(
            f"{path} is a Git-LFS pointer (a note that says where the file is), not the {size} bytes of weights. "
            f"Clone with git-lfs installed, or delete it and let 01_prepare_weights fetch the file."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightFileError(
            f"{path} is a web page, not weights: the server sent a login, licence or quota page. {_refetch(path)}"
        )
    if head.startswith(b"PK\x03\x04"):
        return "torch-zip"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= 100_000_000:
        return "safetensors"
    if head[:1] == b"\x80" or (suffix or path.suffix) in (".bin", ".pt", ".pth"):
        return "torch-legacy"
    raise WeightFileError(
        f"{path} is neither a safetensors nor a torch file (starts with {head[:8]!r}). {_refetch(path)}"
    )


def check_crc(path: Path) -> None:
    """Read a torch zip file once and compare every record with its checksum; torch itself never does.

    Raises:
        WeightFileError: a record is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise WeightFileError(f"{path} is damaged: record {bad} does not match its checksum. {_refetch(path)}")


def identity(path: Path) -> dict[str, Any]:
    """Size and a fingerprint of a weight file, without reading all of it.

    For a torch file the fingerprint covers the zip directory, which holds a checksum of every record; for a
    safetensors file the header and 64 blocks of 4 KB spread over the file.
    """
    path, digest = Path(path), hashlib.sha256()
    n_bytes = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                digest.update(f"{info.filename} {info.file_size} {info.CRC}\n".encode())
    else:
        with open(path, "rb") as file:
            digest.update(file.read(1 << 16))
            for block in range(64):
                file.seek(block * max(0, n_bytes - 4096) // 63)
                digest.update(file.read(4096))
    return {"bytes": n_bytes, "fingerprint": digest.hexdigest()}


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[torch.Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a safetensors file in one pass, hashing on the way; it appears under its name only when it is whole.

    Args:
        path: the file; ``<path>.part`` is used until it is complete and on disk.
        layout: type and shape of every tensor, in the order in which they are written.
        chunks: gives the pieces of one tensor in row order; together they have its size.
        metadata: texts for the header.
    Returns:
        ``{"bytes", "sha256", "tensors": {name: sha256 of its bytes}}``.
    Raises:
        OSError: the disk is full; the part file is removed.
        WeightFileError: the pieces of a tensor do not have its type or size.
    """
    path = Path(path)
    header, n_data = _header(layout, metadata)
    part = path.with_name(path.name + ".part")
    digest, tensors = hashlib.sha256(header), {}
    try:
        with open(part, "wb", buffering=0) as file:
            # Claims the space now: a full disk is known before an hour of work, not after.
            os.posix_fallocate(file.fileno(), 0, len(header) + n_data)
            _write_all(file, memoryview(header))
            for name, (dtype, shape) in layout.items():
                tensor_digest, n_expected = hashlib.sha256(), math.prod(shape) * _ITEM_BYTES[dtype]
                for chunk in chunks(name):
                    content = tensor_bytes(chunk, dtype, name)
                    n_expected -= len(content)
                    if n_expected < 0:
                        break
                    digest.update(content)
                    tensor_digest.update(content)
                    _write_all(file, content)
                if n_expected:
                    raise WeightFileError(f"{name} was announced as {dtype} {shape}; its pieces differ from that size.")
                tensors[name] = tensor_digest.hexdigest()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return {"bytes": len(header) + n_data, "sha256": digest.hexdigest(), "tensors": tensors}


def tensor_bytes(tensor: torch.Tensor, dtype: str, name: str) -> memoryview:
    """The bytes of a tensor, without a copy; its type must be ``dtype``."""
    import torch

    if str(tensor.dtype) != f"torch.{dtype}":
        raise WeightFileError(f"{name} was announced as {dtype}; a piece of {tensor.dtype} came.")
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def row_ranges(n_rows: int, row_bytes: int, *, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of at most :data:`CHUNK_BYTES`, each a multiple of ``multiple`` rows (whole attention heads)."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes * multiple)) * multiple
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def _header(layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> tuple[bytes, int]:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        table[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers start on a multiple of 8 bytes, as the format asks
    return struct.pack("<Q", len(text)) + text, end


def _safetensors_index(path: Path) -> dict[str, StoredTensor]:
    n_file = path.stat().st_size
    with open(path, "rb") as file:
        n_header = struct.unpack("<Q", file.read(8))[0]
        text = file.read(n_header)
    if len(text) < n_header:
        raise WeightFileError(
            f"{path} is cut short: its table has {n_header} bytes, the whole file {n_file}. {_refetch(path)}"
        )
    try:
        table = json.loads(text)
    except ValueError as error:
        raise WeightFileError(f"{path} has an unreadable table of contents ({error}). {_refetch(path)}") from error
    start = 8 + n_header
    index, n_used = {}, 0
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise WeightFileError(f"{path}: {name} has type {entry['dtype']}; known are {', '.join(_DTYPES)}.")
        begin, end = entry["data_offsets"]
        stored = StoredTensor(path, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
        if begin < 0 or end - begin != stored.n_bytes:
            raise WeightFileError(
                f"{path}: {name} claims bytes {begin} to {end}, its shape {stored.shape} needs {stored.n_bytes}. "
                f"{_refetch(path)}"
            )
        index[name] = stored
        n_used = max(n_used, end)
    if start + n_used != n_file:
        raise WeightFileError(f"{path} has {n_file} bytes, its table needs {start + n_used}. {_refetch(path)}")
    return dict(sorted(index.items(), key=lambda item: item[1].offset))


def _torch_index(path: Path) -> dict[str, StoredTensor]:
    import torch

    records = _zip_records(path)
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises many kinds; its advice to switch the protection off must not be shown
        raise _unreadable(path, error) from error
    index: dict[str, StoredTensor] = {}
    for name, tensor in _tensors(content, path):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _ITEM_BYTES:
            raise WeightFileError(f"{path}: {name} has type {dtype}; known are {', '.join(_ITEM_BYTES)}.")
        shape = tuple(tensor.shape)
        base = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if base is None or not tensor.is_contiguous():
            # An older torch, or a transposed view: read through a memory map of the file instead.
            return _mapped_index(path)
        stored = StoredTensor(path, name, dtype, shape, base + tensor.storage_offset() * _ITEM_BYTES[dtype])
        _check_inside(stored, records)
        index[name] = stored
    return index


def _mapped_index(path: Path) -> dict[str, StoredTensor]:
    import torch

    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {name: _loaded(path, name, tensor) for name, tensor in _tensors(content, path)}


def _legacy_torch_index(path: Path) -> dict[str, StoredTensor]:
    import psutil
    import torch

    n_bytes, n_free = path.stat().st_size, psutil.virtual_memory().available
    if 1.2 * n_bytes > n_free:
        raise WeightFileError(
            f"{path} is in torch's format from before 2020, which can only be read as a whole: {n_bytes / 1e9:.1f} GB; "
            f"{n_free / 1e9:.1f} GB of memory are free. Use a machine with more memory, or a newer copy of the file."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # see _torch_index
        raise _unreadable(path, error) from error
    return {name: _loaded(path, name, tensor) for name, tensor in _tensors(content, path)}


def _loaded(path: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(path, name, dtype, tuple(tensor.shape), 0, tensor.detach())


def _tensors(content: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if not isinstance(content, Mapping):
        raise WeightFileError(f"{path} holds a {type(content).__name__}; expected a dict of tensors.")
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, path, f"{prefix}{key}.")
        else:
            raise WeightFileError(f"{path}: {prefix}{key} is a {type(value).__name__}; expected a tensor.")


def _zip_records(path: Path) -> list[tuple[int, int]]:
    """Byte ranges of the uncompressed records of a torch file."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            ranges = []
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    continue
                file.seek(info.header_offset + 26)
                n_name, n_extra = struct.unpack("<HH", file.read(4))
                begin = info.header_offset + 30 + n_name + n_extra
                ranges.append((begin, begin + info.file_size))
            return sorted(ranges)
    except (zipfile.BadZipFile, struct.error) as error:
        raise WeightFileError(
            f"{path} is cut short or damaged: it has {path.stat().st_size} bytes and no table of contents at its end. "
            f"{_refetch(path)}"
        ) from error


def _check_inside(stored: StoredTensor, records: list[tuple[int, int]]) -> None:
    """A forged table could point anywhere: every tensor must lie inside one record of the archive."""
    end = stored.offset + stored.n_bytes
    if not any(begin <= stored.offset and end <= stop for begin, stop in records):
        raise WeightFileError(
            f"{stored.path}: {stored.name} claims bytes {stored.offset} to {end}, outside every record of the file. "
            f"The file is damaged or forged; delete it and fetch it from its official source."
        )


def _unreadable(path: Path, error: Exception) -> WeightFileError:
    text = str(error)
    if "GLOBAL " in text:
        what = text.split("GLOBAL ")[1].split()[0]
        return WeightFileError(
            f"{path} was refused: besides tensors it asks for {what}, which could run code on this machine. "
            f"Do not load it any other way; fetch the file from its official source."
        )
    return WeightFileError(f"{path} cannot be read as weights ({type(error).__name__}). {_refetch(path)}")


def _refetch(path: Path) -> str:
    return f"Delete it (rm '{path}') and run 01_prepare_weights again: only this file is fetched anew."


def _write_all(file: Any, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
