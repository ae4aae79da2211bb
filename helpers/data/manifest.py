"""A frozen dataset on disk: ``manifest.csv``, a row per picture, and ``manifest.json``, written last."""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files
from helpers.data import images
from helpers.data.names import DatasetError
from helpers.records import SPLITS, Sample

MANIFEST_CSV = "manifest.csv"
MANIFEST_JSON = "manifest.json"
COLUMNS = tuple("image_path sha256 category split is_anomalous kind mask_path group visibility synthesis_seed".split())


@dataclass(frozen=True)
class Dataset:
    """A complete dataset on disk.

    Attributes:
        folder: where ``manifest.csv`` lies.
        samples: all pictures, absolute paths.
        hash: identifies pictures, labels, masks, splits and groups; results name it.
        kinds_held_out: kinds of synthetic damage that no training may use, so that a test on them is one of new kinds.
        limits: a sentence for each artwork whose numbers are optimistic or bare, because it has few genuine pictures;
            there, and only there, splits may share source pictures (:func:`shared_groups`).
    """

    folder: Path
    samples: tuple[Sample, ...]
    hash: str
    kinds_held_out: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)

    @property
    def categories(self) -> tuple[str, ...]:
        """The artworks, sorted."""
        return tuple(sorted({sample.category for sample in self.samples}))

    def n_sources(self, category: str, split: str) -> int:
        """Independent genuine pictures behind the normal pictures of a split: re-photographs of one count once."""
        normal = self.select(category=category, split=split, is_anomalous=False)
        return len({sample.group or str(sample.image_path) for sample in normal})

    def select(
        self,
        *,
        split: str | None = None,
        category: str | None = None,
        kind: str | None = None,
        is_anomalous: bool | None = None,
    ) -> list[Sample]:
        """The pictures that meet every condition given, in the manifest's order.

        Raises:
            ValueError: the dataset has no such split, category or kind at all (a misspelt name selects nothing).
        """
        asked = {"split": split, "category": category, "kind": kind, "is_anomalous": is_anomalous}
        wanted = {name: value for name, value in asked.items() if value is not None}
        known = {"split": SPLITS, "category": self.categories, "kind": sorted({s.kind for s in self.samples})}
        for name, value in wanted.items():
            if value not in known.get(name, (value,)):
                raise ValueError(f"No {name} {value!r} in {self.folder}; there are {', '.join(known[name])}.")
        return [s for s in self.samples if all(getattr(s, name) == value for name, value in wanted.items())]


def write_manifest(path: Path | str, samples: Sequence[Sample], *, info: Mapping[str, Any] | None = None) -> Path:
    """Write ``manifest.csv`` and, last, ``manifest.json``: its presence means that the dataset is complete.

    Args:
        path: the CSV file, or the folder for it.
        samples: the pictures; missing hashes are computed from the files.
        info: further JSON values for ``manifest.json``; ``kinds_held_out`` (list) and ``limits`` (artwork -> sentence)
            come back as attributes of :class:`Dataset`.
    Returns:
        path of the CSV file.
    Raises:
        DatasetError: no samples, or one file named twice in a category.
    """
    import pandas as pd

    path = Path(os.path.abspath(path))
    path = path if path.suffix.lower() == ".csv" else path / MANIFEST_CSV
    folder = path.parent
    samples = [_completed(sample, folder) for sample in samples]
    if not samples:
        raise DatasetError(f"No pictures to write into {path}. Run notebook 02, or check the folder of pictures.")
    (file, category), n = Counter((s.image_path, s.category) for s in samples).most_common(1)[0]
    if n > 1:
        raise DatasetError(f"{file} is named {n} times in {category}; once is allowed.")
    table = pd.DataFrame([asdict(sample) for sample in samples], columns=list(COLUMNS), dtype=object)
    for column in ("image_path", "mask_path"):
        table[column] = [None if file is None else _relative(file, folder) for file in table[column]]
    (folder / MANIFEST_JSON).unlink(missing_ok=True)
    files.write_text(path, table.to_csv(index=False, lineterminator="\n"))
    about = {"dataset_hash": dataset_hash(samples, folder), "n_samples": len(samples), "counts": counts(samples)}
    files.write_json(folder / MANIFEST_JSON, {**(info or {}), **about})
    return path


def load_manifest(path: Path | str) -> list[Sample]:
    """The pictures in a ``manifest.csv`` (or in its folder's), in its order, with absolute paths.

    Raises:
        FileNotFoundError: there is no manifest.
        DatasetError: a column is missing, or a row cannot be read (the message names it).
    """
    path = Path(os.path.abspath(path))
    path = path / MANIFEST_CSV if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Run notebook 02 to make the dataset.")
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
        if missing:
            raise DatasetError(f"{path} has no column {', '.join(missing)}; a manifest has {', '.join(COLUMNS)}.")
        return [_sample_of_row(row, path, number) for number, row in enumerate(table, start=2)]


def open_dataset(dataset_dir: Path | str, *, verify_files: bool = False) -> Dataset:
    """Open a complete dataset and check that its manifest is the one that was frozen.

    Args:
        dataset_dir: folder with ``manifest.csv`` and ``manifest.json``.
        verify_files: also hash every picture again (about 1 GB/s).
    Raises:
        FileNotFoundError: the dataset is missing or incomplete, or a picture of it is gone.
        DatasetError: manifest, masks or (when verified) pictures were changed after the dataset was frozen, or splits
            share source pictures of an artwork that is not in ``limits``.
    """
    folder = Path(os.path.abspath(dataset_dir))
    if not (folder / MANIFEST_JSON).exists():
        raise FileNotFoundError(f"No complete dataset in {folder} (no {MANIFEST_JSON}). Run notebook 02 to make it.")
    samples = load_manifest(folder / MANIFEST_CSV)
    paths = (path for s in samples for path in (s.image_path, s.mask_path) if path is not None)
    gone = [path for path in paths if not path.exists()]
    if gone:
        raise FileNotFoundError(f"{len(gone)} files of {folder} are gone, first {gone[0]}. Run notebook 02 again.")
    info = files.read_json(folder / MANIFEST_JSON)
    found = dataset_hash((replace(s, sha256="") if verify_files else s for s in samples), folder)
    if found != info["dataset_hash"]:
        hashes = f"hash {found[:12]}, frozen {info['dataset_hash'][:12]}"
        way = "Results on it would not be comparable: delete the folder and run notebook 02 again"
        raise DatasetError(f"{folder} was changed after it was frozen ({hashes}). {way}.")
    limits = dict(info.get("limits", {}))
    for category, groups in shared_groups(samples).items():
        if category not in limits:
            what = f"{len(groups)} source pictures of {category} stand in two splits, first {groups[0]}"
            raise DatasetError(f"{folder}: {what}. Tests would be unfair: delete it and run notebook 02 again.")
    return Dataset(folder, tuple(samples), found, tuple(info.get("kinds_held_out", ())), limits)


def shared_groups(samples: Iterable[Sample]) -> dict[str, tuple[str, ...]]:
    """Source pictures that stand in more than one split, by category: none in a fair dataset."""
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for sample in samples:
        if sample.group:
            splits[sample.category, sample.group].add(sample.split)
    shared = sorted(key for key, found in splits.items() if len(found) > 1)
    return {category: tuple(g for c, g in shared if c == category) for category, _ in shared}


def dataset_hash(samples: Iterable[Sample], dataset_dir: Path | str) -> str:
    """Hash of what a dataset is: pictures, categories, splits, labels, kinds, masks and groups, in any order or place.

    Args:
        samples: the pictures; an empty ``sha256`` is computed from the file.
        dataset_dir: folder that relative paths start from.
    """
    folder = Path(os.path.abspath(dataset_dir))
    rows = []
    for s in (_completed(sample, folder) for sample in samples):
        masks = [] if s.mask_path is None else [files.sha256_file(file) for file in images.mask_files(s.mask_path)]
        mask = "".join(masks) if len(masks) < 2 else files.sha256_json(masks)
        rows.append([s.sha256, s.category, s.split, s.is_anomalous, s.kind, mask, s.group])
    return files.sha256_json(sorted(rows))


def mask_of(sample: Sample, shape: tuple[int, int] | None = None) -> np.ndarray | None:
    """Pixel ground truth of a picture, bool ``(H, W)``: all False for a normal picture, None when no mask is known.

    Args:
        sample: the picture.
        shape: ``(H, W)`` of the mask; default for an anomalous picture is its file's own size.
    Raises:
        ValueError: a normal picture without ``shape``.
        helpers.data.images.ImageError: the mask cannot be read or has other proportions.
    """
    if sample.is_anomalous:
        path = sample.mask_path
        return None if path is None else images.load_mask(path, shape, picture=sample.image_path)
    if shape is None:
        raise ValueError(f"{sample.image_path} is normal and has no mask file: give shape=(H, W) for its empty mask.")
    return np.zeros(shape, bool)


def counts(samples: Iterable[Sample]) -> dict[str, dict[str, dict[str, int]]]:
    """Number of pictures by category, split and kind."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for s in samples:
        kinds = table.setdefault(s.category, {}).setdefault(s.split, {})
        kinds[s.kind] = kinds.get(s.kind, 0) + 1
    return table


def _sample_of_row(row: Mapping[str, str], path: Path, number: int) -> Sample:
    try:
        if row["is_anomalous"] not in ("True", "False"):
            raise ValueError(f"is_anomalous is {row['is_anomalous']!r}; allowed are True and False")
        return Sample(
            path.parent / row["image_path"],
            row["category"],
            row["is_anomalous"] == "True",
            path.parent / row["mask_path"] if row["mask_path"] else None,
            row["split"],
            row["kind"],
            row["group"],
            row["sha256"],
            float(row["visibility"]) if row["visibility"] else None,
            int(row["synthesis_seed"]) if row["synthesis_seed"] else None,
        )
    except (ValueError, TypeError) as error:  # TypeError: a row with too few cells
        raise DatasetError(f"{path}, row {number}: {error}. Make the manifest again or correct the row.") from error


def _completed(sample: Sample, folder: Path) -> Sample:
    """The sample with absolute paths and the hash of its file."""
    path = folder / sample.image_path
    mask = None if sample.mask_path is None else folder / sample.mask_path
    return replace(sample, image_path=path, mask_path=mask, sha256=sample.sha256 or files.sha256_file(path))


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
