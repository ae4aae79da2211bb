"""Arrays that are computed once and kept: features of pictures, by what made them and by the picture's name.

Settings have a file of records, mapped to memory, and a table of names, written after them: records without a name are
overwritten, names without a record computed again.
"""

from __future__ import annotations

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
    compute: Callable[[list[int]], Mapping[str, np.ndarray]], *, batch_size: int = 16,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The arrays of some rows, from the cache where they are known.

    Args:
        folder: the cache; several settings may share it.
        settings: JSON values that determine a row beside its id: model, weights, preprocessing, layers.
        ids: one string per row, equal only for equal inputs: a hash of the picture.
        compute: indices into ``ids`` -> named arrays ``(len(indices), ...)``, each of one dtype and row shape.
    Returns:
        name -> array ``(len(ids), ...)``, read-only and mapped to memory where the rows lie in this order on disk.

    ValueError: ``compute`` gave another number of rows, or other names, dtypes or shapes than before.
    """
    place = Path(folder) / files.sha256_json(settings)[:16]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        names, form = _known(place)
        known = set(names)
        missing = sorted({name: index for index, name in enumerate(ids) if name not in known}.values())
        starts = range(0, len(missing), batch_size)
        for start in tqdm(starts, desc="features", unit="batch", leave=False, delay=2):
            indices = missing[start : start + batch_size]
            arrays = compute(indices)
            now = [[name, array.dtype.str, list(array.shape[1:])] for name, array in arrays.items()]
            if now != (form or now) or {len(array) for array in arrays.values()} != {len(indices)}:
                shapes = [array.shape for array in arrays.values()]
                raise ValueError(f"{len(indices)} rows of {form or now} were to be computed, but {shapes} came.")
            form, records = now, np.zeros(len(indices), _dtype(now))
            for name, array in arrays.items():
                records[name] = array
            with open(place / "records.bin", "ab") as file:
                file.truncate(len(names) * records.itemsize)  # what a killed run left without its name
                file.write(records.tobytes())
                file.flush()
                os.fsync(file.fileno())
            names += [ids[index] for index in indices]
            files.write_json(place / "table.json", {"settings": settings, "form": form, "ids": names})
    row_of = {name: row for row, name in enumerate(names)}
    rows: Any = [row_of[name] for name in ids]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        rows = slice(rows[0], rows[0] + len(rows))  # a view of the file; anything else is a copy
    records = np.memmap(place / "records.bin", _dtype(form), mode="r", shape=len(names))[rows]
    return {name: records[name] for name, *_ in form}


def _known(place: Path) -> tuple[list[str], list[list[Any]]]:
    """Names of the records that lie whole on disk, and name, dtype and shape of each array in a record."""
    table, records = place / "table.json", place / "records.bin"
    if not table.exists() or not records.exists():
        return [], []
    found = files.read_json(table)
    n_whole = records.stat().st_size // _dtype(found["form"]).itemsize
    return found["ids"][:n_whole], found["form"] if n_whole else []


def _dtype(form: Sequence[Sequence[Any]]) -> np.dtype:
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in form], align=True)
