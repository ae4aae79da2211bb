"""Datasets: any supported folder -> ``manifest.csv``, and a frozen dataset -> samples with one hash.

``manifest.csv`` holds a row per picture, ``manifest.json``, written last, the dataset's hash and counts. Reading a
folder decodes every picture once, so that bad files are listed before anything runs, and compares all pictures, so
that no copy of a training picture is tested on.
"""

from __future__ import annotations

import csv
import io
import os
import stat
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers import files as storage
from helpers.data import images, layouts
from helpers.data.layouts import DatasetError
from helpers.records import NORMAL_KIND, SPLITS, Sample

__all__ = [
    "Dataset",
    "DatasetError",
    "FolderReading",
    "build_manifest",
    "dataset_hash",
    "load_manifest",
    "mask_of",
    "near_duplicates",
    "open_dataset",
    "perceptual_hash",
    "read_folder",
    "write_manifest",
]

MANIFEST_CSV = "manifest.csv"
MANIFEST_JSON = "manifest.json"
COLUMNS = (
    "image_path",
    "sha256",
    "category",
    "split",
    "is_anomalous",
    "kind",
    "mask_path",
    "group",
    "visibility",
    "synthesis_seed",
)
_REQUIRED = ("image_path", "category", "split", "is_anomalous", "kind")

HASH_SIDE = 16
NEAR_DUPLICATE_LIMIT = 0.02
"""Share of differing bits up to which two pictures show one scan. Measured on the 139 real paintings: JPEG at quality
30, other sizes, brightness x 1.3 and noise give 0, a box over 2.5 % of the picture 0.02, a crop of 1 % per side 0.04,
tiles of different roads at least 0.37; other scans of the same painting spread from 0.01 upwards."""
_SHOWN = 12


@dataclass(frozen=True)
class FolderReading:
    """What :func:`read_folder` understood of a folder.

    Attributes:
        source: the folder or CSV file.
        layout: name of the layout.
        samples: readable pictures by category, split and kind; ``group`` joins copies of one picture.
        bad_files: files left out and why.
        exact_duplicates: pairs of byte-identical pictures that may stay (same split, or different categories).
        near_duplicates: pairs in different splits, or with different labels, that show one scan.
        notes: further sentences for the user.
    """

    source: Path
    layout: str
    samples: tuple[Sample, ...]
    bad_files: tuple[tuple[Path, str], ...]
    exact_duplicates: tuple[tuple[Path, Path], ...]
    near_duplicates: tuple[tuple[Path, Path], ...]
    notes: tuple[str, ...]

    def describe(self) -> str:
        """The tree in words, then notes, near duplicates and bad files."""
        root = self.source if self.source.is_dir() else self.source.parent
        categories = sorted({sample.category for sample in self.samples})
        n = len(self.samples)
        lines = [f"{self.source}: {self.layout}, {_count(n, 'picture')} of {_count(len(categories), 'artwork')}"]
        for category in categories:
            lines.append(f"  {category}")
            mine = [sample for sample in self.samples if sample.category == category]
            for split in SPLITS:
                kinds = Counter(sample.kind for sample in mine if sample.split == split)
                if kinds:
                    lines.append(f"    {split:<12}" + ", ".join(f"{kind} {kinds[kind]}" for kind in _kind_order(kinds)))
            anomalous = [sample for sample in mine if sample.is_anomalous]
            if anomalous:
                n_masks = sum(sample.mask_path is not None for sample in anomalous)
                lines.append(f"    {'masks':<12}{n_masks} of {_count(len(anomalous), 'anomalous picture')}")
        lines += [f"Note: {note}" for note in self.notes]
        lines += _listed(
            "Same file more than once", [f"{_short(a, root)} = {_short(b, root)}" for a, b in self.exact_duplicates]
        )
        lines += _listed(
            "Near duplicates (one scan in two splits or under two labels)",
            [f"{_short(a, root)} ~ {_short(b, root)}" for a, b in self.near_duplicates],
        )
        lines += _listed("Files left out", [f"{_short(path, root)}: {reason}" for path, reason in self.bad_files])
        return "\n".join(lines)


@dataclass(frozen=True)
class Dataset:
    """A complete dataset on disk.

    Attributes:
        folder: where ``manifest.csv`` lies.
        samples: all pictures, absolute paths.
        hash: identifies pictures, labels, masks, splits and groups; results name it.
        kinds_held_out: kinds of synthetic damage that no training may use, so that a test on them is one of unseen
            kinds.
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
        asked = {"split": split, "category": category, "kind": kind}
        known = {
            "split": SPLITS,
            "category": self.categories,
            "kind": sorted({sample.kind for sample in self.samples}),
        }
        for name, value in asked.items():
            if value is not None and value not in known[name]:
                raise ValueError(f"No {name} {value!r} in {self.folder}; there are {', '.join(known[name])}.")
        wanted = asked | {"is_anomalous": is_anomalous}
        return [s for s in self.samples if all(v is None or getattr(s, name) == v for name, v in wanted.items())]


def build_manifest(folder: Path | str, *, output: Path | str | None = None) -> Path:
    """Make ``manifest.csv`` (and ``manifest.json``) for a folder in any supported layout; print what was understood.

    Bad files are left out and listed at the end, and in ``manifest.json``. A folder that this suite froze itself
    (notebook 02) is not read again: its manifest is returned.

    Args:
        folder: folder of pictures, or a CSV file; see :data:`helpers.data.layouts.EXPECTED`.
        output: manifest file (``*.csv``) or folder for it. Default: the folder itself, or, when that is read-only, a
            folder for temporary files, which is printed.
    Returns:
        path of the manifest. Paths in it are relative where the picture lies below it, else absolute.
    Raises:
        FileNotFoundError: the folder does not exist.
        DatasetError: the layout is not understood, no picture can be read, one picture stands in two splits of an
            artwork or under two labels, or a foreign ``manifest.csv`` would be overwritten.
    """
    source = Path(os.path.abspath(folder))
    frozen = source if source.is_file() else source / MANIFEST_CSV
    if output is None and _is_frozen(frozen):
        print(f"{frozen} is a frozen dataset and was left as it is.")
        return frozen
    reading = read_folder(source)
    target = _target(source, output)
    root = source if source.is_dir() else source.parent
    written = write_manifest(
        target,
        reading.samples,
        info={
            "layout": reading.layout,
            "source": str(source),
            "bad_files": [{"path": _short(path, root), "reason": reason} for path, reason in reading.bad_files],
            "exact_duplicates": [[_short(a, root), _short(b, root)] for a, b in reading.exact_duplicates],
            "near_duplicates": [[_short(a, root), _short(b, root)] for a, b in reading.near_duplicates],
            "notes": list(reading.notes),
            "limits": {
                category: f"{_count(len(groups), 'picture')} of two splits show one scan, so numbers are optimistic."
                for category, groups in shared_groups(reading.samples).items()
            },
        },
    )
    print(reading.describe())
    print(f"Manifest: {written}")
    return written


def read_folder(folder: Path | str) -> FolderReading:
    """Understand a folder in any supported layout, decode every picture once and look for duplicates; write nothing.

    Raises:
        FileNotFoundError, DatasetError: as :func:`build_manifest`.
    """
    layout = layouts.recognise(Path(folder))
    source = Path(os.path.abspath(folder))
    checks = _inspect_all(layout.found)
    samples: list[Sample] = []
    hashes: list[np.ndarray | None] = []
    bad = list(layout.problems)
    for found, check in zip(layout.found, checks):
        if check.problem:
            bad.append((found.image_path, check.problem))
            continue
        if check.mask_problem:
            bad.append((found.mask_path, check.mask_problem))
        samples.append(_sample(found, check, keep_mask=not check.mask_problem))
        hashes.append(check.perceptual_hash)
    if not samples:
        raise DatasetError(_nothing_readable(source, layout, bad))
    notes = list(layout.notes)
    if not any(not sample.is_anomalous for sample in samples):
        raise DatasetError(
            f"{source} ({layout.name}): all {len(samples)} readable pictures are anomalous. Detectors learn from "
            f"normal pictures: add some as train/good.\n{layouts.EXPECTED}"
        )
    root = source if source.is_dir() else source.parent
    exact = _exact_duplicates(samples, root)
    near = near_duplicates(samples, hashes)
    stated = {found.image_path: found.group for found in layout.found}
    samples = _grouped(samples, [stated[s.image_path] for s in samples], [*exact, *near], notes)
    order = sorted(range(len(samples)), key=lambda i: _order(samples[i], i))
    crossing = [
        (i, j)
        for i, j in near
        if (i, j) not in exact
        and (samples[i].split != samples[j].split or samples[i].is_anomalous != samples[j].is_anomalous)
    ]
    _note_gaps(samples, notes)
    return FolderReading(
        source,
        layout.name,
        tuple(samples[i] for i in order),
        tuple(bad),
        tuple((samples[i].image_path, samples[j].image_path) for i, j in exact),
        tuple((samples[i].image_path, samples[j].image_path) for i, j in crossing),
        tuple(notes),
    )


def write_manifest(path: Path | str, samples: Sequence[Sample], *, info: Mapping[str, Any] | None = None) -> Path:
    """Write ``manifest.csv`` and, last, ``manifest.json``: its presence means that the dataset is complete.

    Args:
        path: the CSV file, or the folder for it.
        samples: the pictures; missing hashes are computed from the files.
        info: further JSON values for ``manifest.json`` (how the dataset was made); ``kinds_held_out`` (list) and
            ``limits`` (artwork -> sentence) come back as attributes of :class:`Dataset`.
    Returns:
        path of the CSV file.
    Raises:
        DatasetError: no samples, or one file named twice in a category.
    """
    path = Path(os.path.abspath(path))
    path = path if path.suffix.lower() == ".csv" else path / MANIFEST_CSV
    folder = path.parent
    samples = [_with_hash(_absolute(sample, folder)) for sample in samples]
    if not samples:
        raise DatasetError(f"No pictures to write into {path}. Run notebook 02, or check the folder of pictures.")
    repeated = [key for key, n in Counter((s.image_path, s.category) for s in samples).items() if n > 1]
    if repeated:
        raise DatasetError(f"{repeated[0][0]} is named {len(repeated) + 1} times in {repeated[0][1]}; once is allowed.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in samples:
        writer.writerow(
            [
                _relative(sample.image_path, folder),
                sample.sha256,
                sample.category,
                sample.split,
                sample.is_anomalous,
                sample.kind,
                "" if sample.mask_path is None else _relative(sample.mask_path, folder),
                sample.group,
                "" if sample.visibility is None else repr(float(sample.visibility)),
                "" if sample.synthesis_seed is None else int(sample.synthesis_seed),
            ]
        )
    (folder / MANIFEST_JSON).unlink(missing_ok=True)
    storage.write_text(path, text.getvalue())
    storage.write_json(
        folder / MANIFEST_JSON,
        {
            **(info or {}),
            "dataset_hash": dataset_hash(samples, folder),
            "n_samples": len(samples),
            "counts": counts(samples),
        },
    )
    return path


def load_manifest(path: Path | str) -> list[Sample]:
    """Read ``manifest.csv``.

    Args:
        path: the CSV file, or its folder.
    Returns:
        the pictures in the file's order, with absolute paths.
    Raises:
        FileNotFoundError: there is no manifest.
        DatasetError: a column is missing, or a row cannot be read (the message names it).
    """
    path = Path(os.path.abspath(path))
    path = path / MANIFEST_CSV if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Make the dataset with notebook 02 (02_synthesize_anomalies).")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in _REQUIRED if column not in (reader.fieldnames or ())]
        if missing:
            raise DatasetError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['nothing'])}. "
                f"A manifest has {', '.join(COLUMNS)}: make it with helpers.data.manifest.build_manifest."
            )
        return [_sample_of_row(row, path, number) for number, row in enumerate(reader, start=2)]


def open_dataset(dataset_dir: Path | str, *, verify_files: bool = False) -> Dataset:
    """Open a complete dataset and check that its manifest is the one that was frozen.

    Args:
        dataset_dir: folder with ``manifest.csv`` and ``manifest.json``.
        verify_files: also hash every picture again (about 1 GB/s).
    Raises:
        FileNotFoundError: the dataset is missing or incomplete, or a picture of it is gone.
        DatasetError: manifest, masks or (when verified) pictures were changed after the dataset was frozen.
    """
    folder = Path(os.path.abspath(dataset_dir))
    if not (folder / MANIFEST_JSON).exists():
        raise FileNotFoundError(
            f"No complete dataset in {folder} ({MANIFEST_JSON} is missing). Run notebook 02 "
            "(02_synthesize_anomalies), which makes it."
        )
    samples = load_manifest(folder / MANIFEST_CSV)
    paths = (path for s in samples for path in (s.image_path, s.mask_path) if path is not None)
    gone = [path for path in paths if not path.exists()]
    if gone:
        raise FileNotFoundError(f"{len(gone)} files of {folder} are gone, first {gone[0]}. Run notebook 02 again.")
    info = storage.read_json(folder / MANIFEST_JSON)
    frozen = info["dataset_hash"]
    checked = [replace(sample, sha256="") for sample in samples] if verify_files else samples
    found = dataset_hash(checked, folder)
    if found != frozen:
        raise DatasetError(
            f"{folder} was changed after it was frozen (hash {found[:12]}, frozen {frozen[:12]}). Results made on it "
            "would not be comparable: delete the folder and run notebook 02 again."
        )
    limits = dict(info.get("limits", {}))
    shared = {category: groups for category, groups in shared_groups(samples).items() if category not in limits}
    if shared:
        category, groups = next(iter(shared.items()))
        raise DatasetError(
            f"{folder}: {_count(len(groups), 'source picture')} of {category} stand in two splits, first {groups[0]}: "
            "a detector would be tested on what it has learnt. Delete the folder and run notebook 02 again."
        )
    return Dataset(folder, tuple(samples), frozen, tuple(info.get("kinds_held_out", ())), limits)


def shared_groups(samples: Iterable[Sample]) -> dict[str, tuple[str, ...]]:
    """Source pictures that stand in more than one split, by category: none in a fair dataset."""
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for sample in samples:
        if sample.group:
            splits[sample.category, sample.group].add(sample.split)
    shared: dict[str, list[str]] = defaultdict(list)
    for category, group in sorted(key for key, found in splits.items() if len(found) > 1):
        shared[category].append(group)
    return {category: tuple(groups) for category, groups in shared.items()}


def dataset_hash(samples: Iterable[Sample], dataset_dir: Path | str) -> str:
    """Hash of what a dataset is: pictures, categories, splits, labels, kinds, masks and groups.

    Order and place do not matter: the same dataset elsewhere has the same hash.

    Args:
        samples: the pictures; an empty ``sha256`` is computed from the file.
        dataset_dir: folder that relative paths start from.
    """
    folder = Path(os.path.abspath(dataset_dir))
    rows = []
    for sample in samples:
        sample = _with_hash(_absolute(sample, folder))
        mask = "" if sample.mask_path is None else _mask_hash(sample.mask_path)
        rows.append(
            [sample.sha256, sample.category, sample.split, sample.is_anomalous, sample.kind, mask, sample.group]
        )
    return storage.sha256_json(sorted(rows))


def mask_of(sample: Sample, shape: tuple[int, int] | None = None) -> np.ndarray | None:
    """Pixel ground truth of a picture.

    Args:
        sample: the picture.
        shape: ``(H, W)`` of the mask; default for an anomalous picture is its file's own size.
    Returns:
        bool ``(H, W)``, all False for a normal picture; None when no mask is known.
    Raises:
        ValueError: a normal picture without ``shape``.
        helpers.data.images.ImageError: the mask cannot be read or has other proportions.
    """
    if sample.is_anomalous:
        return None if sample.mask_path is None else images.load_mask(sample.mask_path, shape)
    if shape is None:
        raise ValueError(f"{sample.image_path} is normal and has no mask file: give shape=(H, W) for its empty mask.")
    return np.zeros(shape, bool)


def counts(samples: Iterable[Sample]) -> dict[str, dict[str, dict[str, int]]]:
    """Number of pictures by category, split and kind."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for sample in samples:
        kinds = table.setdefault(sample.category, {}).setdefault(sample.split, {})
        kinds[sample.kind] = kinds.get(sample.kind, 0) + 1
    return table


def perceptual_hash(image: np.ndarray) -> np.ndarray | None:
    """256 bits that survive other sizes, JPEG and brightness: the signs of low frequencies of the grey picture.

    A second set of bits marks the frequencies that are strong enough to have a sign; in a smooth picture many are not.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
    Returns:
        uint64 ``(2, 4)``: signs and marks; None for an almost uniform picture, whose signs would be noise.
    Source: the "pHash" idea of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010.
    """
    side = 4 * HASH_SIDE
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (side, side), interpolation=cv2.INTER_AREA)
    if grey.std() < 2:
        return None
    low = cv2.dct(grey.astype(np.float32))[:HASH_SIDE, :HASH_SIDE].ravel()
    low[0] = 0  # the mean brightness has no say
    strong = np.abs(low) > 0.003 * np.abs(low).max()
    return np.stack([np.packbits(low > 0).view(np.uint64), np.packbits(strong).view(np.uint64)])


# --- reading a folder ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Check:
    """What decoding one picture and its mask showed."""

    problem: str = ""
    mask_problem: str = ""
    sha256: str = ""
    perceptual_hash: np.ndarray | None = None


def _inspect_all(found: Sequence[layouts.Found]) -> list[_Check]:
    from tqdm.auto import tqdm

    # Decoders release the interpreter lock; four at a time keep the memory of four largest pictures below 1 GB.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        checks = tqdm(pool.map(_inspect, found), total=len(found), desc="reading pictures", unit="file", delay=3)
        return list(checks)


def _inspect(found: layouts.Found) -> _Check:
    if _printable(str(found.image_path)) != str(found.image_path):
        return _Check(problem="the file name is not valid UTF-8: rename the file")
    try:
        image = images.load_image(found.image_path, max_side=8 * HASH_SIDE)
        sha256 = storage.sha256_file(found.image_path)
    except (images.ImageError, OSError) as error:
        return _Check(problem=_reason(error, found.image_path))
    return _Check("", _mask_problem(found, image.shape[:2]), sha256, perceptual_hash(image))


def _mask_problem(found: layouts.Found, shape: tuple[int, int]) -> str:
    if found.mask_path is None:
        return ""
    try:
        mask = images.load_mask(found.mask_path)
        small = images.resize(mask, 8 * HASH_SIDE).shape
        if max(abs(small[0] - shape[0]), abs(small[1] - shape[1])) > 2:
            return f"proportions of the mask ({mask.shape[1]} x {mask.shape[0]}) are not its picture's; mask not used"
    except (images.ImageError, OSError) as error:
        return f"{_reason(error, found.mask_path)} (mask not used)"
    return "" if mask.any() else "the mask is empty although the picture is anomalous; mask not used"


def _reason(error: Exception, path: Path) -> str:
    return _printable(str(error).replace(f"{path} ", "").replace(str(path), path.name))


def _sample(found: layouts.Found, check: _Check, *, keep_mask: bool) -> Sample:
    return Sample(
        found.image_path,
        found.category,
        found.kind != NORMAL_KIND,
        found.mask_path if keep_mask else None,
        found.split,
        found.kind,
        found.group,
        check.sha256,
        found.visibility,
        found.synthesis_seed,
    )


def _exact_duplicates(samples: Sequence[Sample], root: Path) -> list[tuple[int, int]]:
    """Pairs of equal files; raises for a pair that would make the numbers wrong."""
    by_hash: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_hash[sample.sha256].append(index)
    pairs = [pair for same in by_hash.values() for pair in combinations(same, 2)]
    leaks, quarrels = [], []
    for i, j in pairs:
        first, second = samples[i], samples[j]
        words = f"  {_short(first.image_path, root)} = {_short(second.image_path, root)}"
        if first.category == second.category and first.split != second.split:
            leaks.append(f"{words} ({first.split} and {second.split})")
        elif first.category == second.category and first.is_anomalous != second.is_anomalous:
            quarrels.append(f"{words} ({first.kind} and {second.kind})")
    if leaks:
        raise DatasetError(
            f"{_count(len(leaks), 'picture')} stand in two splits; a detector would be tested on what it has learnt:\n"
            + "\n".join(leaks[:_SHOWN])
            + ("\n  ..." if len(leaks) > _SHOWN else "")
            + "\nDelete one of each pair (normally the one in train/) and run this again."
        )
    if quarrels:
        raise DatasetError(
            f"{_count(len(quarrels), 'picture')} are labelled normal and anomalous at once:\n"
            + "\n".join(quarrels[:_SHOWN])
            + "\nKeep the right one of each pair and run this again."
        )
    return pairs


def near_duplicates(samples: Sequence[Sample], hashes: Sequence[np.ndarray | None]) -> list[tuple[int, int]]:
    """Pairs of pictures that show one scan, exact copies among them: indices ``(i, j)`` with ``i < j``.

    Args:
        samples: the pictures.
        hashes: their :func:`perceptual_hash`.
    """
    known = [index for index, value in enumerate(hashes) if value is not None]
    if len(known) < 2:
        return []
    signs, strong = np.stack([hashes[index] for index in known], axis=1)  # each (n, 4)
    n_strong = np.bitwise_count(strong).sum(axis=1)
    pairs = []
    for row in range(len(known) - 1):
        both = strong[row] & strong[row + 1 :]
        n_both = np.bitwise_count(both).sum(axis=1)
        n_different = np.bitwise_count((signs[row] ^ signs[row + 1 :]) & both).sum(axis=1)
        comparable = n_both >= 0.7 * np.maximum(n_strong[row], n_strong[row + 1 :])
        alike = comparable & (n_different <= NEAR_DUPLICATE_LIMIT * n_both)
        pairs += [(known[row], known[row + 1 + k]) for k in np.flatnonzero(alike)]
    return pairs


def _grouped(
    samples: Sequence[Sample], stated: Sequence[str], pairs: Sequence[tuple[int, int]], notes: list[str]
) -> list[Sample]:
    """Samples with their groups: as the CSV states, else by file name, joined over near duplicates."""
    stems = Counter((s.category, s.image_path.stem) for s in samples)
    names = []
    for sample, group in zip(samples, stated):
        stem = sample.image_path.stem
        is_unique = stems[sample.category, stem] == 1  # MVTec calls a picture 000 in every folder
        names.append(group or "/".join([sample.category, *(() if is_unique else (sample.split, sample.kind)), stem]))
    parent = list(range(len(samples)))

    def leader(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for i, j in pairs:
        if samples[i].category == samples[j].category:
            first, second = sorted((leader(i), leader(j)))
            parent[second] = first
    sizes = Counter(leader(index) for index in range(len(samples)))
    totals = Counter(sample.category for sample in samples)
    too_alike = {samples[i].category for i, n in sizes.items() if n >= 8 and n > totals[samples[i].category] / 2}
    for category in sorted(too_alike):
        notes.append(
            f"{category}: most pictures look the same to the duplicate test (a fixed camera, perhaps), so each counts "
            "as a picture of its own. Give a CSV with a column `group` if some are copies."
        )
    return [
        replace(sample, group=names[index if sample.category in too_alike else leader(index)])
        for index, sample in enumerate(samples)
    ]


def _note_gaps(samples: Sequence[Sample], notes: list[str]) -> None:
    for category in sorted({sample.category for sample in samples}):
        mine = [sample for sample in samples if sample.category == category]
        if not any(sample.split == "train" for sample in mine):
            notes.append(f"{category}: no pictures to learn from (train/good).")
        tested = [sample for sample in mine if sample.split == "test"]
        if tested and not any(not sample.is_anomalous for sample in tested):
            notes.append(f"{category}: test/ has no normal pictures, so false alarms cannot be counted.")


def _nothing_readable(source: Path, layout: layouts.Layout, bad: Sequence[tuple[Path, str]]) -> str:
    root = source if source.is_dir() else source.parent
    listed = "\n".join(_listed("Files left out", [f"{_short(path, root)}: {reason}" for path, reason in bad]))
    return f"{source} ({layout.name}): no picture can be used.\n{listed}\n{layouts.EXPECTED}"


# --- writing and reading manifests -----------------------------------------------------------------------------------


def _is_frozen(manifest: Path) -> bool:
    """True for a dataset that a notebook froze, in contrast to one that :func:`build_manifest` may make again."""
    mark = manifest.parent / MANIFEST_JSON
    if manifest.name != MANIFEST_CSV or not manifest.exists() or not mark.exists():
        return False
    found = storage.read_json(mark)
    return "dataset_hash" in found and "layout" not in found


def _target(source: Path, output: Path | str | None) -> Path:
    if output is not None:
        path = Path(os.path.abspath(output))
        return path if path.suffix.lower() == ".csv" else path / MANIFEST_CSV
    folder = source if source.is_dir() else source.parent
    if not _is_writable(folder):
        place = storage.sha256_json(str(source))[:8]
        chosen = Path(tempfile.gettempdir()) / f"art_anomaly_{place}" / MANIFEST_CSV
        print(f"{folder} is read-only; the manifest goes to {chosen.parent} (choose another place with output=...).")
        return chosen
    path = folder / MANIFEST_CSV
    if path.exists():
        header = path.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0].strip().split(",")
        if not set(COLUMNS) <= set(header):
            raise DatasetError(f"{path} exists and is not a manifest of this suite. Rename it, or give output=... .")
    return path


def _is_writable(folder: Path) -> bool:
    """Whether the owner wants it written: root may write everywhere, so the permission bits are asked, too."""
    bits = folder.stat().st_mode
    return os.access(folder, os.W_OK) and bool(bits & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def _sample_of_row(row: Mapping[str, str], path: Path, number: int) -> Sample:
    try:
        label = (row["is_anomalous"] or "").strip().lower()
        if label not in ("true", "false", "1", "0"):
            raise ValueError(f"is_anomalous is {row['is_anomalous']!r}; allowed are True and False")
        if not row["image_path"]:
            raise ValueError("image_path is empty")
        mask = row.get("mask_path") or ""
        return Sample(
            path.parent / row["image_path"],
            row["category"],
            label in ("true", "1"),
            path.parent / mask if mask else None,
            row["split"],
            row["kind"],
            row.get("group") or "",
            row.get("sha256") or "",
            float(row["visibility"]) if row.get("visibility") else None,
            int(row["synthesis_seed"]) if row.get("synthesis_seed") else None,
        )
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{path}, row {number}: {error}. Make the manifest again or correct the row.") from error


def _absolute(sample: Sample, folder: Path) -> Sample:
    mask = sample.mask_path if sample.mask_path is None else folder / sample.mask_path
    return replace(sample, image_path=folder / sample.image_path, mask_path=mask)


def _with_hash(sample: Sample) -> Sample:
    return sample if sample.sha256 else replace(sample, sha256=storage.sha256_file(sample.image_path))


def _mask_hash(path: Path) -> str:
    hashes = [storage.sha256_file(file) for file in images.mask_files(path)]
    return hashes[0] if path.is_file() else storage.sha256_json(hashes)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _order(sample: Sample, index: int) -> tuple[Any, ...]:
    return sample.category, SPLITS.index(sample.split), sample.kind != NORMAL_KIND, sample.kind, index


def _kind_order(kinds: Iterable[str]) -> list[str]:
    return sorted(kinds, key=lambda kind: (kind != NORMAL_KIND, kind))


def _short(path: Path | None, root: Path) -> str:
    return "" if path is None else _printable(_relative(path, root))


def _printable(text: str) -> str:
    """Text that can be written as UTF-8: file systems allow names that cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "s")


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {len(lines) - _SHOWN} more (all in {MANIFEST_JSON})"] if len(lines) > _SHOWN else []
    return [f"{title}: {len(lines)}", *(f"  {line}" for line in lines[:_SHOWN]), *more]
