"""A frozen dataset on disk: ``manifest.csv``, a row per picture, and ``manifest.json``, written last."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import files
from helpers.data import images
from helpers.data.names import DatasetError
from helpers.records import SPLITS, Sample

MANIFEST_CSV, MANIFEST_JSON = "manifest.csv", "manifest.json"
COLUMNS = "image_path sha256 category split is_anomalous kind mask_path group visibility synthesis_seed".split()


@dataclass(frozen=True)
class Dataset:
    """A complete dataset on disk, with absolute paths and the ``hash`` that results name. No training may use the
    ``kinds_held_out``; splits may share sources only of artworks with few of them, which ``limits`` says in words."""

    folder: Path
    samples: tuple[Sample, ...]
    hash: str
    kinds_held_out: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)

    categories = property(lambda self: tuple(sorted({s.category for s in self.samples})), doc="The artworks, sorted.")

    def select(self, **wanted: str | bool) -> list[Sample]:
        """Pictures of a ``split``, ``category``, ``kind``, ``is_anomalous``; ``ValueError``: a value that none has."""
        known = {"split": SPLITS, "category": self.categories, "kind": sorted({s.kind for s in self.samples})}
        for name, value in wanted.items():
            if value not in known.get(name, (True, False)):
                raise ValueError(f"No {name} {value!r} in {self.folder}; there are {', '.join(known[name])}.")
        return [s for s in self.samples if all(getattr(s, name) == value for name, value in wanted.items())]


def write_manifest(path: Path | str, samples: Sequence[Sample], *, info: Mapping[str, Any] | None = None) -> Path:
    """Write ``manifest.csv`` (its path, which is returned, or its folder) and, last, ``manifest.json``, the mark of a
    complete dataset, with further JSON values (``kinds_held_out`` and ``limits`` come back in :class:`Dataset`).
    Missing hashes of ``samples`` are computed. ``DatasetError``: there are none."""
    path = Path(os.path.abspath(path))
    path = path if path.suffix == ".csv" else path / MANIFEST_CSV
    if not samples:
        raise DatasetError(f"No pictures to write to {path}. Run notebook 02, or check the folder of pictures.")
    samples = [s if s.sha256 else replace(s, sha256=files.sha256_file(s.image_path)) for s in samples]
    table = pd.DataFrame([asdict(sample) for sample in samples], columns=COLUMNS, dtype=object)
    for column in ("image_path", "mask_path"):
        table[column] = [p and p.as_posix().removeprefix(f"{path.parent.as_posix()}/") for p in table[column]]
    path.with_name(MANIFEST_JSON).unlink(missing_ok=True)
    files.write_text(path, table.to_csv(index=False, lineterminator="\n"))
    files.write_json(path.with_name(MANIFEST_JSON), {**(info or {}), "dataset_hash": dataset_hash(samples)})
    return path


def load_manifest(path: Path | str) -> list[Sample]:
    """The pictures in a ``manifest.csv`` (or its folder), with absolute paths. ``DatasetError``: a bad row."""
    path, samples = Path(os.path.abspath(path)), []
    path = path / MANIFEST_CSV if path.is_dir() else path
    parsers = {"is_anomalous": {"True": True, "False": False}.__getitem__, "visibility": float, "synthesis_seed": int}
    parsers |= dict.fromkeys(("image_path", "mask_path"), path.parent.joinpath)
    try:
        for row in pd.read_csv(path, dtype=str, keep_default_na=False, usecols=COLUMNS).to_dict("records"):
            samples.append(Sample(**{name: parsers.get(name, str)(cell) for name, cell in row.items() if cell}))
    except (ValueError, KeyError, TypeError) as error:  # ValueError: also a missing column or cell
        raise DatasetError(f"{path}, row {len(samples) + 2}: {error}. Make it again or correct the row.") from error
    return samples


def open_dataset(dataset_dir: Path | str) -> Dataset:
    """Open a complete dataset. ``FileNotFoundError``: it is incomplete, or a file is gone. ``DatasetError``: manifest
    or masks were changed, or splits share source pictures of an artwork that is not in ``limits``."""
    folder = Path(os.path.abspath(dataset_dir))
    if not (folder / MANIFEST_JSON).exists():
        raise FileNotFoundError(f"No complete dataset in {folder} (no {MANIFEST_JSON}). Run notebook 02 to make it.")
    samples, info = load_manifest(folder), files.read_json(folder / MANIFEST_JSON)
    gone = [path for s in samples for path in (s.image_path, s.mask_path) if path is not None and not path.exists()]
    if gone:
        raise FileNotFoundError(f"{len(gone)} files of {folder} are gone, first {gone[0]}. Run notebook 02 again.")
    found, limits = dataset_hash(samples), info.get("limits", {})
    shared = [category for category in shared_groups(samples) if category not in limits]
    if found != info["dataset_hash"] or shared:
        what = f"source pictures in two splits: {shared}; hash {found[:12]}, frozen {info['dataset_hash'][:12]}"
        way = "Results on it would not be comparable: delete the folder and run notebook 02 again"
        raise DatasetError(f"{folder} was changed after it was frozen ({what}). {way}.")
    return Dataset(folder, tuple(samples), found, tuple(info.get("kinds_held_out", ())), limits)


def shared_groups(samples: Iterable[Sample]) -> Counter[str]:
    """Number of source pictures that stand in more than one split, by category: none in a fair dataset."""
    n_splits = Counter(place[:2] for place in {(s.category, s.group, s.split) for s in samples if s.group})
    return Counter(category for (category, _), n in sorted(n_splits.items()) if n > 1)


def dataset_hash(samples: Iterable[Sample]) -> str:
    """Hash of pictures (their ``sha256``), categories, splits, labels, kinds, masks and groups, in any order."""
    masks = [(s, "" if s.mask_path is None else files.sha256_file(s.mask_path)) for s in samples]
    rows = [[s.sha256, s.category, s.split, s.is_anomalous, s.kind, mask, s.group] for s, mask in masks]
    return files.sha256_json(sorted(rows))


def mask_of(sample: Sample, shape: tuple[int, int] | None = None) -> np.ndarray | None:
    """Pixel ground truth of a picture, bool ``(H, W)``: all False for a normal one (it needs ``shape``), None when no
    mask is known. ``ImageError``: the mask cannot be read or has other proportions than ``shape``."""
    if not sample.is_anomalous:
        return np.zeros(shape, bool)
    return sample.mask_path and images.load_mask(sample.mask_path, shape, picture=sample.image_path)
