"""Arrays that are computed once and kept: features of pictures, by what made them and by the picture's name.

A cache folder holds, for each settings, one file of raw rows per array (mapped to memory, not read) and a journal: a
line for every finished batch with its row names and checksums, written after the rows. What a kill leaves behind the
last line, and what a disk damages, is computed again.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from helpers import files

_JOURNAL = "rows.jsonl"


def cached_arrays(
    folder: Path,
    settings: Mapping[str, Any],
    ids: Sequence[str],
    compute: Callable[[list[int]], Mapping[str, np.ndarray]],
    *,
    batch_size: int = 16,
    title: str = "",
) -> dict[str, np.ndarray]:
    """The arrays of some rows, from the cache where they are known.

    Args:
        folder: the cache; several settings may share it.
        settings: JSON values that determine a row beside its id: model, weights, preprocessing, layers.
        ids: one string per row, equal only for equal inputs: a hash of the picture.
        compute: indices into ``ids`` -> named arrays ``(len(indices), ...)``, each of one dtype and row shape.
        batch_size: rows per call of ``compute``.
        title: of the progress bar.
    Returns:
        name -> array ``(len(ids), ...)``, read-only and mapped to memory where the rows lie in this order on disk.
    Raises:
        ValueError: ``compute`` gave another number of rows, or other names, dtypes or shapes than before.
    """
    place = Path(folder) / files.sha256_json(settings)[:16]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not (place / "settings.json").exists():
            files.write_json(place / "settings.json", dict(settings))
        table = _Table(place)
        first = {name: index for index, name in reversed(list(enumerate(ids)))}
        missing = [index for name, index in first.items() if name not in table.rows]
        missing.sort()
        with tqdm(total=len(missing), desc=title or "features", unit="picture", leave=False, delay=2) as bar:
            for start in range(0, len(missing), batch_size):
                indices = missing[start : start + batch_size]
                table.add([ids[index] for index in indices], compute(indices))
                bar.update(len(indices))
        return table.take([table.rows[name] for name in ids])


class _Table:
    """The rows of one settings, as far as the journal and its checksums vouch for them."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.rows: dict[str, int] = {}
        journal = place / _JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        n_good = 0
        for line in lines:
            if not self._is_intact(line):
                break
            n_good += 1
        if n_good < len(lines):
            print(f"Cache {place}: {len(lines) - n_good} batches are damaged or unfinished and are computed again.")
            files.write_bytes(journal, b"".join(lines[:n_good]))

    def add(self, names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Append a batch: rows first, then the line that makes them count."""
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        forms = {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
        if any(len(array) != len(names) for array in arrays.values()) or not arrays:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise ValueError(f"{len(names)} rows were to be computed, but the arrays are {shapes}.")
        if self.rows and forms != self._forms:
            raise ValueError(f"{self._place} holds arrays {self._forms}; now came {forms}. Change the settings, too.")
        self._forms = forms
        line: dict[str, Any] = {"ids": list(names), "arrays": {}}
        for name, array in arrays.items():
            with open(self._file(name), "r+b" if self._file(name).exists() else "w+b") as file:
                file.truncate(len(self.rows) * _row_bytes(forms[name]))  # what a killed run left without its line
                file.seek(0, os.SEEK_END)
                file.write(array.tobytes())
                file.flush()
                os.fsync(file.fileno())
            line["arrays"][name] = [array.dtype.str, list(array.shape[1:]), zlib.crc32(array.tobytes())]
        with open(self._place / _JOURNAL, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {name: row for row, name in enumerate(names, start=len(self.rows))}

    def take(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The arrays of some rows: a view of the file where they lie side by side, else a copy."""
        found = {}
        for name, (dtype, shape) in self._forms.items():
            whole = np.memmap(self._file(name), dtype, mode="r", shape=(len(self.rows), *shape))
            side_by_side = list(rows) == list(range(rows[0], rows[0] + len(rows))) if rows else False
            found[name] = whole[rows[0] : rows[0] + len(rows)] if side_by_side else whole[list(rows)]
        return found

    def _is_intact(self, line: bytes) -> bool:
        """Take over a line of the journal if its rows have the checksums it names."""
        try:
            batch = json.loads(line)
            names, start, forms = batch["ids"], len(self.rows), {}
            for name, (kind, shape, checksum) in batch["arrays"].items():
                forms[name] = np.dtype(kind), tuple(shape)
                n_bytes = _row_bytes(forms[name])
                with open(self._file(name), "rb") as file:
                    file.seek(start * n_bytes)
                    if zlib.crc32(file.read(len(names) * n_bytes)) != checksum:
                        return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if self.rows and forms != self._forms:
            return False
        self._forms = forms
        self.rows |= {name: row for row, name in enumerate(names, start=start)}
        return True

    def _file(self, name: str) -> Path:
        return self._place / f"{name}.bin"


def _row_bytes(form: tuple[np.dtype, tuple[int, ...]]) -> int:
    dtype, shape = form
    return dtype.itemsize * math.prod(shape)
