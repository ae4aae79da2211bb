"""Arrays that are computed once and kept: features of pictures, by what made them and by the picture's name.

For each settings there is a file of raw rows per array (mapped to memory, not read) and a journal: a line for every
finished batch with its row names and checksums, written after the rows. What a kill leaves behind the last line, and
what a disk damages, is computed again.
"""

from __future__ import annotations

import contextlib
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


def cached_arrays(
    folder: Path,
    settings: Mapping[str, Any],
    ids: Sequence[str],
    compute: Callable[[list[int]], Mapping[str, np.ndarray]],
    *,
    batch_size: int = 16,
    title: str = "features",
) -> dict[str, np.ndarray]:
    """The arrays of some rows, from the cache where they are known.

    Args:
        folder: the cache; several settings may share it.
        settings: JSON values that determine a row beside its id: model, weights, preprocessing, layers.
        ids: one string per row, equal only for equal inputs: a hash of the picture.
        compute: indices into ``ids`` -> named arrays ``(len(indices), ...)``, each of one dtype and row shape.
    Returns:
        name -> array ``(len(ids), ...)``, read-only and mapped to memory where the rows lie in this order on disk.
    Raises:
        ValueError: ``compute`` gave another number of rows, or other names, dtypes or shapes than before.
    """
    place = Path(folder) / files.sha256_json(settings)[:16]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        files.write_json(place / "settings.json", dict(settings))
        table = _Table(place)
        missing = sorted({name: index for index, name in enumerate(ids) if name not in table.rows}.values())
        with tqdm(total=len(missing), desc=title, unit="picture", leave=False, delay=2) as bar:
            for start in range(0, len(missing), batch_size):
                indices = missing[start : start + batch_size]
                table.add([ids[index] for index in indices], compute(indices))
                bar.update(len(indices))
        return table.take([table.rows[name] for name in ids])


class _Table:
    """The rows of one settings, as far as the journal and its checksums vouch for them."""

    def __init__(self, place: Path) -> None:
        self._place, self._journal = place, place / "rows.jsonl"
        self._forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.rows: dict[str, int] = {}
        lines = self._journal.read_text(encoding="utf-8").splitlines() if self._journal.exists() else []
        n_good = next((number for number, line in enumerate(lines) if not self._take_over(line)), len(lines))
        if n_good < len(lines):
            print(f"Cache {place}: {len(lines) - n_good} batches are damaged or unfinished and are computed again.")
            files.write_text(self._journal, "".join(f"{line}\n" for line in lines[:n_good]))

    def add(self, names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Append a batch: rows first, then the line that makes them count."""
        forms = {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
        if not arrays or any(len(array) != len(names) for array in arrays.values()):
            shapes = {name: array.shape for name, array in arrays.items()}
            raise ValueError(f"{len(names)} rows were to be computed, but the arrays are {shapes}.")
        if self.rows and forms != self._forms:
            raise ValueError(f"{self._place} holds arrays {self._forms}; now came {forms}. Change the settings, too.")
        self._forms, noted = forms, {}
        for name, array in arrays.items():
            content = np.ascontiguousarray(array).tobytes()
            self._file(name).touch()
            with open(self._file(name), "r+b") as file:
                file.truncate(len(self.rows) * len(content) // len(names))  # what a killed run left without its line
                file.seek(0, os.SEEK_END)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            noted[name] = [array.dtype.str, list(array.shape[1:]), zlib.crc32(content)]
        files.append_line(self._journal, json.dumps({"ids": list(names), "arrays": noted}))
        self.rows |= {name: row for row, name in enumerate(names, start=len(self.rows))}

    def take(self, rows: list[int]) -> dict[str, np.ndarray]:
        """The arrays of some rows: a view of the file where they lie side by side, else a copy."""
        found = {}
        for name, (dtype, shape) in self._forms.items():
            whole = np.memmap(self._file(name), dtype, mode="r", shape=(len(self.rows), *shape))
            stop = rows[0] + len(rows) if rows else 0
            found[name] = whole[rows[0] : stop] if rows and rows == list(range(rows[0], stop)) else whole[rows]
        return found

    def _take_over(self, line: str) -> bool:
        """Count the batch of a line in if its rows have the checksums it names."""
        forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            batch = json.loads(line)
            start, n_rows = len(self.rows), len(batch["ids"])
            for name, (kind, shape, checksum) in batch["arrays"].items():
                forms[name] = np.dtype(kind), tuple(shape)
                n_bytes = forms[name][0].itemsize * math.prod(shape)
                with open(self._file(name), "rb") as file:
                    file.seek(start * n_bytes)
                    if zlib.crc32(file.read(n_rows * n_bytes)) != checksum:
                        return False
            if not self.rows or forms == self._forms:
                self._forms = forms
                self.rows |= {name: row for row, name in enumerate(batch["ids"], start=start)}
                return True
        return False

    def _file(self, name: str) -> Path:
        return self._place / f"{name}.bin"
