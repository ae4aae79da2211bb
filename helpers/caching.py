"""Arrays that are computed once and kept: features of pictures, by what made them and by the picture's name.

For each settings there is a file of raw rows per array (mapped to memory, not read) and a table of the rows' names,
written after them: what a kill leaves behind the last name is overwritten, what a cut file lacks is computed again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from helpers import files


def cached_arrays(
    folder: Path, settings: Mapping[str, Any], ids: Sequence[str],
    compute: Callable[[list[int]], Mapping[str, np.ndarray]], *, batch_size: int = 16, title: str = "features",
) -> dict[str, np.ndarray]:  # fmt: skip
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
        names, forms = _read_table(place)
        known = set(names)
        missing = sorted({name: index for index, name in enumerate(ids) if name not in known}.values())
        with tqdm(total=len(missing), desc=title, unit="picture", leave=False, delay=2) as bar:
            for start in range(0, len(missing), batch_size):
                indices = missing[start : start + batch_size]
                forms = _append(place, len(names), len(indices), forms, compute(indices))
                names += [ids[index] for index in indices]
                files.write_json(place / "table.json", {"settings": settings, "forms": forms, "ids": names})
                bar.update(len(indices))
    place_of = {name: row for row, name in enumerate(names)}
    rows: Any = [place_of[name] for name in ids]
    if rows and rows == list(range(rows[0], rows[0] + len(rows))):
        rows = slice(rows[0], rows[0] + len(rows))  # a view of the file; anything else is a copy
    return {
        name: np.memmap(place / f"{name}.bin", dtype, mode="r", shape=(len(names), *shape))[rows]
        for name, (dtype, shape) in forms.items()
    }


def _read_table(place: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """Names of the rows that lie whole on disk, and array -> [dtype, row shape]."""
    if not (place / "table.json").exists():
        return [], {}
    table = files.read_json(place / "table.json")
    n_whole = len(table["ids"])
    for name, (dtype, shape) in table["forms"].items():
        path, row_bytes = place / f"{name}.bin", np.dtype(dtype).itemsize * math.prod(shape)
        n_whole = min(n_whole, path.stat().st_size // row_bytes if path.exists() else 0)
    return table["ids"][:n_whole], table["forms"] if n_whole else {}


def _append(
    place: Path, n_before: int, n_rows: int, forms: Mapping[str, list[Any]], arrays: Mapping[str, np.ndarray]
) -> dict[str, list[Any]]:
    """Write a batch behind the rows there are; array -> [dtype, row shape]."""
    now = {name: [array.dtype.str, list(array.shape[1:])] for name, array in arrays.items()}
    if not arrays or any(len(array) != n_rows for array in arrays.values()):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"{n_rows} rows were to be computed, but the arrays are {shapes}.")
    if forms and now != forms:
        raise ValueError(f"{place} holds arrays {forms}; now came {now}. Change the settings, too.")
    for name, array in arrays.items():
        path = place / f"{name}.bin"
        path.touch()
        with open(path, "r+b") as file:
            file.truncate(n_before * array[0].nbytes)  # what a killed run left without its name
            file.seek(0, os.SEEK_END)
            file.write(np.ascontiguousarray(array).tobytes())
            file.flush()
            os.fsync(file.fileno())
    return now
