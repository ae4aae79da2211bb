"""Reader of GGUF files, the format of llama.cpp: its settings, and its tensors as float16.

Only what the small language model of ``mini`` needs: version 3, types F32, F16, Q8_0 and Q4_1. The library ``gguf``
reads far more, but takes six seconds for the word lists alone. Layout: ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_BLOCKS = {  # type number -> (numbers in a block, layout of a block)
    0: (1, np.dtype([("x", "<f4")])),
    1: (1, np.dtype([("x", "<f2")])),
    3: (32, np.dtype([("scale", "<f2"), ("low", "<f2"), ("nibbles", "u1", 16)])),
    8: (32, np.dtype([("scale", "<f2"), ("x", "i1", 32)])),
}
_ALIGNMENT = 32


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of a GGUF file.

    Args:
        path: the file.
    Returns:
        settings by key (numbers, texts, lists), and float16 arrays by name in row-major shape ``(out, in)``.
    Raises:
        ValueError: not a GGUF file of version 3, or a tensor type that is not read here; names it.
    """
    content = memoryview(Path(path).read_bytes())
    if bytes(content[:4]) != b"GGUF" or struct.unpack_from("<I", content, 4)[0] != 3:
        raise ValueError(f"{path} is not a GGUF file of version 3 (starts with {bytes(content[:8])!r}). Reinstall it.")
    n_tensors, n_settings = struct.unpack_from("<QQ", content, 8)
    position, settings = 24, {}
    for _ in range(n_settings):
        key, position = _string(content, position)
        kind = struct.unpack_from("<I", content, position)[0]
        settings[key], position = _value(content, position + 4, kind)
    table = []
    for _ in range(n_tensors):
        name, position = _string(content, position)
        n_axes = struct.unpack_from("<I", content, position)[0]
        shape = struct.unpack_from(f"<{n_axes}Q", content, position + 4)
        kind, offset = struct.unpack_from("<IQ", content, position + 4 + 8 * n_axes)
        position += 16 + 8 * n_axes
        if kind not in _BLOCKS:
            raise ValueError(f"{path}: {name} has GGUF type {kind}; read are {sorted(_BLOCKS)} (F32, F16, Q4_1, Q8_0).")
        table.append((name, shape[::-1], kind, offset))
    alignment = settings.get("general.alignment", _ALIGNMENT)
    start = position + -position % alignment
    return settings, {
        name: _numbers(content, start + offset, kind, math.prod(shape)).reshape(shape)
        for name, shape, kind, offset in table
    }


def _numbers(content: memoryview, position: int, kind: int, n: int) -> np.ndarray:
    n_block, layout = _BLOCKS[kind]
    blocks = np.frombuffer(content, dtype=layout, count=n // n_block, offset=position)
    if kind in (0, 1):
        return blocks["x"].astype(np.float16)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == 8:
        return (blocks["x"] * scale).astype(np.float16).reshape(-1)
    values = np.empty((len(blocks), 32), np.float32)  # the low nibbles are the first 16 numbers
    np.multiply(blocks["nibbles"] & 15, scale, out=values[:, :16])
    np.multiply(blocks["nibbles"] >> 4, scale, out=values[:, 16:])
    values += blocks["low"].astype(np.float32)[:, None]
    return values.astype(np.float16).reshape(-1)


def _string(content: memoryview, position: int) -> tuple[str, int]:
    n = struct.unpack_from("<Q", content, position)[0]
    return str(content[position + 8 : position + 8 + n], "utf-8"), position + 8 + n


def _value(content: memoryview, position: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(content, position)
    if kind == _ARRAY:
        item, n = struct.unpack_from("<IQ", content, position)
        position += 12
        if item in _SCALARS:
            array = np.frombuffer(content, dtype=np.dtype(_SCALARS[item]), count=n, offset=position)
            return array.tolist(), position + array.nbytes
        values = []
        for _ in range(n):
            value, position = _value(content, position, item)
            values.append(value)
        return values, position
    if kind not in _SCALARS:
        raise ValueError(f"GGUF value type {kind} is unknown. The file is damaged or newer than this reader.")
    return struct.unpack_from(_SCALARS[kind], content, position)[0], position + struct.calcsize(_SCALARS[kind])
