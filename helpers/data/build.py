"""Source pictures -> one frozen dataset: splits by source picture, re-photographs, anomalies with masks.

The dataset is written in the MVTec layout with ``manifest.csv``; ``synthesis.jsonl`` beside it says how each picture
came about. Everything is saved as PNG: JPEG would change pixels outside the mask, and a detector could learn the
compression instead of the damage.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from helpers import files as storage
from helpers.data import images, sources
from helpers.data import manifest as data
from helpers.data.manifest import DatasetError
from helpers.data.reading import read_folder
from helpers.records import NORMAL_KIND, SPLITS, Sample
from helpers.synthesis import marks as synthesis

if TYPE_CHECKING:
    import pandas as pd

RECORDS = "synthesis.jsonl"
ORIGINS = ("genuine", "rephotographed", "real anomaly", "synthetic anomaly")
"""How a picture of the dataset came about; ``origin`` in the records."""

CALIBRATION_SHARE = 0.3
"""Share of the groups of genuine pictures that set thresholds, when the source has test pictures of its own."""
OWN_TEST_SHARES = (0.2, 0.3)
"""Shares of calibration and test groups when the source has no normal test pictures; the rest is learnt from."""
MOST_TIMES = 3
"""Genuine pictures beyond this many times the number asked for are left out, at random."""
MIN_SIDE = 32
"""Shorter side in pixels that a source picture must have at the dataset's resolution; a crop still leaves room."""
_SETTINGS = "settings.json"
_PROGRESS = "progress.jsonl"
_THREADS = 4
_VERSION = 2
"""Raised when the same sources and settings make another dataset, so that old ones are made again."""


@dataclass(frozen=True)
class Source:
    """Pictures to make a dataset of.

    Attributes:
        samples: absolute paths; splits as the source has them.
        description: the source in words, several lines.
        notes: what the user should know about it.
        count_real: True when the source's anomalous pictures count towards the number of anomalies asked for.
    """

    samples: tuple[Sample, ...]
    description: str
    notes: tuple[str, ...] = ()
    count_real: bool = False


def source_for(data_source: Path | str | None, *, builtin: str, target: Path | str, max_side: int, seed: int) -> Source:
    """The user's pictures, or built-in ones when there are none.

    Args:
        data_source: the user's folder or CSV file, or None.
        builtin: used when ``data_source`` is None: ``"embedded"`` (two painted pictures, offline) or ``"wikimedia"``
            (the Mona Lisa and Girl with a Pearl Earring, network).
        target: folder that the built-in pictures are written to.
        max_side: longer side of embedded pictures in pixels.
        seed: of the embedded pictures.
    Raises:
        FileNotFoundError, DatasetError: the folder is missing or not understood (:func:`helpers.data.read_folder`).
        helpers.data.sources.SourceError: the network is missing.
        ValueError: unknown ``builtin``.
    """
    if data_source is not None:
        reading = read_folder(data_source)
        return Source(reading.samples, reading.describe(), reading.notes)
    if builtin == "embedded":
        samples = sources.embedded_artworks(target, max_side=max_side, seed=seed)
        words = "two paintings made on this machine from photographs that ship with scikit-image"
        return Source(tuple(samples), _described(words, samples), count_real=True)
    if builtin == "wikimedia":
        samples = sources.wikimedia(target)
        return Source(tuple(samples), _described("public-domain reproductions from Wikimedia Commons", samples))
    raise ValueError(f"No built-in pictures {builtin!r}; there are 'embedded' and 'wikimedia'. Or set ART_DATA.")


def build_dataset(
    samples: Iterable[Sample],
    target: Path | str,
    *,
    n_train: int,
    n_calibration: int,
    n_test_normal: int,
    n_test_anomalous: int,
    max_side: int,
    seed: int,
    notes: Sequence[str] = (),
    kinds: Sequence[str] = synthesis.LOCAL_KINDS,
    count_real: bool = False,
) -> Path:
    """Make and freeze a dataset; a complete one with the same pictures and settings is returned at once.

    Pictures derived from one source picture (``group``) stay in one split. Where there are fewer genuine pictures than
    asked for, they are photographed again (:func:`helpers.synthesis.marks.rephotograph`); where there are more, all are
    used, up to :data:`MOST_TIMES` as many. Damage is done to test normals only, genuine and re-photographed, to
    each source picture about equally often, so that an anomalous picture differs from a normal one by the damage and
    not by the way it was photographed. The source's
    own anomalous pictures are all kept, for testing only. With one or two genuine pictures of an artwork, splits
    cannot be separate; they are simulated by re-photographs and a warning is printed and recorded.

    The work is done in a folder beside ``target`` and goes on where it was stopped.

    Args:
        samples: source pictures (:class:`Source`).
        target: folder of the dataset. It is replaced when it holds a dataset of other settings.
        n_train, n_calibration, n_test_normal: normal pictures per artwork and split.
        n_test_anomalous: synthetic anomalies per artwork, spread over ``kinds``, the report's five with the largest
            share; with ``count_real``, anomalies of the source count towards this number.
        max_side: longer side of every picture in pixels.
        seed: decides about splits and every synthetic picture; the same seed gives the same bytes.
        notes: sentences for ``manifest.json``.
        kinds: local kinds, and anomalous variations of the whole picture (which have no mask).
    Returns:
        path of ``manifest.csv``.
    Raises:
        ValueError: a count is out of range or a kind is unknown.
        DatasetError: no genuine picture can be read, one picture is labelled normal and anomalous, or ``target``
            holds something else.
    """
    counts = {
        "train": n_train,
        "calibration": n_calibration,
        "test": n_test_normal,
        "anomalous": n_test_anomalous,
    }
    _check_settings(counts, kinds)
    target = Path(os.path.abspath(target))
    samples = [_completed(sample) for sample in samples]
    settings = {
        "version": _VERSION,
        "counts": counts,
        "max_side": max_side,
        "seed": seed,
        "kinds": list(kinds),
        "count_real": count_real,
        "notes": list(notes),
        "sources": sorted(map(_fingerprint, samples)),
        "generator": _generator_fingerprint(),
    }
    settings_hash = storage.sha256_json(settings)
    _check_target(target, samples)
    if _is_complete(target, settings_hash):
        print(f"{target} is complete: nothing to do.")
        _print_outcome(storage.read_json(target / data.MANIFEST_JSON))
        return target / data.MANIFEST_CSV

    readable, bad, told = _readable(samples, max_side)
    plan = _Plan(seed=seed, counts=counts, kinds=tuple(kinds), count_real=count_real, notes=[*notes, *told])
    for category in sorted({sample.category for sample in readable}):
        plan.add_category(category, [sample for sample in readable if sample.category == category])
    if not plan.jobs:
        raise DatasetError(
            f"None of the {len(samples)} source pictures is a readable normal one, so there is nothing to learn from."
            + _lines("Left out", [f"{path}: {reason}" for path, reason in bad])
        )
    partial = target.with_name(f"{target.name}.partial")
    rows = _write_pictures(plan.jobs, partial, settings_hash, max_side, seed)
    _finish(partial, rows, plan, bad, settings, settings_hash)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    _print_outcome(storage.read_json(target / data.MANIFEST_JSON))
    return target / data.MANIFEST_CSV


def read_records(dataset_dir: Path | str) -> dict[Path, dict[str, Any]]:
    """How each picture of a dataset came about, by absolute path.

    Every record has ``image_path`` (relative), ``category``, ``split``, ``kind``, ``group``, ``origin`` (one of
    :data:`ORIGINS`) and ``source_path``: the file it was copied from, or, relative to the dataset, the picture it was
    made of. Re-photographs have ``variations``; synthetic anomalies the record of :func:`marks.synthesize`.

    Raises:
        FileNotFoundError: there is no such file; notebook 02 makes it.
    """
    folder = Path(os.path.abspath(dataset_dir))
    path = folder / RECORDS
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Make the dataset with notebook 02 (02_synthesize_anomalies).")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {folder / row["image_path"]: row for row in rows}


def summary(dataset_dir: Path | str) -> pd.DataFrame:
    """Pictures per artwork and split: a column per origin (:data:`ORIGINS`), and the number of groups."""
    import pandas as pd

    rows = pd.DataFrame(list(read_records(dataset_dir).values()))
    keys = [rows["category"].rename("artwork"), pd.Categorical(rows["split"], SPLITS, ordered=True)]
    table = pd.crosstab(keys, pd.Categorical(rows["origin"], ORIGINS), dropna=False).loc[lambda t: t.sum(axis=1) > 0]
    table["source pictures"] = rows.groupby(keys, observed=True)["group"].nunique()
    table.columns.name = None
    return table.rename_axis(["artwork", "split"])


def kind_examples(
    dataset_dir: Path | str, *, category: str | None = None
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """One synthetic anomaly of each kind, of middle visibility: kind, original, anomalous (uint8 RGB), mask (bool).

    Args:
        dataset_dir: a dataset of :func:`build_dataset`.
        category: the artwork; default: they take turns.
    """
    folder = Path(os.path.abspath(dataset_dir))
    records = read_records(folder)
    made = [s for s in data.open_dataset(folder).select(is_anomalous=True) if s.visibility is not None]
    of_kind: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(made, key=lambda s: s.visibility):
        if records[sample.image_path]["origin"] == ORIGINS[3]:
            of_kind[sample.kind].append(sample)
    artworks = sorted({sample.category for sample in made})
    examples = []
    for turn, kind in enumerate(sorted(of_kind, key=synthesis.LOCAL_KINDS.index)):
        wanted = category or artworks[turn % len(artworks)]
        choice = [s for s in of_kind[kind] if s.category == wanted] or of_kind[kind]
        sample = choice[len(choice) // 2]
        image = images.load_image(sample.image_path)
        original = images.load_image(folder / records[sample.image_path]["source_path"])
        examples.append((kind, original, image, data.mask_of(sample)))
    return examples


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One picture to write: what it is, and what it is made of."""

    path: str
    category: str
    split: str
    kind: str
    group: str
    origin: str
    source: str
    mask_source: Path | None = None


@dataclass
class _Plan:
    """All pictures of the dataset, decided before the first is written; the same input gives the same plan."""

    seed: int
    counts: Mapping[str, int]
    kinds: tuple[str, ...]
    count_real: bool
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    jobs: list[_Job] = field(default_factory=list)
    _taken: set[str] = field(default_factory=set)

    def add_category(self, category: str, samples: Sequence[Sample]) -> None:
        normals = [sample for sample in samples if not sample.is_anomalous]
        real = [sample for sample in samples if sample.is_anomalous]
        if not normals:
            self.notes.append(f"{category}: {len(real)} anomalous pictures and no normal one; the artwork is left out.")
            return
        folder = _unique(_safe(category), self._taken)
        rng = synthesis.rng_for(self.seed, f"{category}/splits")
        splits, simulated = self._split(category, normals, real, rng)
        learnt = {sample.group for split in SPLITS[:2] for sample in splits[split]}
        writer = _CategoryPlan(self, category, folder)
        writer.add_normals(splits, simulated, rng)
        writer.add_real([_apart(s) if s.group in learnt else s for s in real])
        n_wanted = self.counts["anomalous"] - (len(real) if self.count_real else 0)
        writer.add_synthetic(max(0, n_wanted), rng)
        self.jobs += writer.jobs

    def _split(
        self, category: str, normals: Sequence[Sample], real: Sequence[Sample], rng: np.random.Generator
    ) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
        """Genuine pictures by split, and the splits that must be simulated from training pictures."""
        by_split = {split: _by_group(s for s in normals if s.split == split) for split in SPLITS}
        train, calibration, tested = by_split["train"], by_split["calibration"], by_split["test"]
        has_own_test = bool(tested)
        if not train and not calibration:
            self.notes.append(f"{category}: no pictures to learn from; the source's normal test pictures are split.")
            train, tested, has_own_test = tested, {}, False
        calibration = {group: members for group, members in calibration.items() if group not in train}
        if not has_own_test or not train:
            train, calibration = {**train, **calibration}, {}
        shared = ({s.group for s in real} | set(tested)) & (set(train) | set(calibration))
        n_shared = sum(len(members) for pool in (train, calibration) for g, members in pool.items() if g in shared)
        if shared and len(train.keys() - shared) >= 2:
            self.notes.append(
                f"{category}: {_pictures(n_shared)} for learning became test pictures, because a test picture shows "
                "the same photograph (or is named as its copy)."
            )
            for pool in (train, calibration):
                for group in sorted(shared & set(pool)):
                    tested.setdefault(group, []).extend(pool.pop(group))
        elif shared:
            self.warnings.append(
                f"{category}: {_pictures(n_shared)} for learning and test pictures come from the same photographs, and "
                "there are no others. The results will look better than they are. Add photographs taken independently."
            )
            apart = [_apart(s) if s.group in shared else s for members in tested.values() for s in members]
            tested = _by_group(apart)
        order = [sorted(train)[i] for i in rng.permutation(len(train))]
        n_calibration, n_test = _group_counts(
            len(order), n_calibration=len(calibration), n_test=len(tested), has_own_test=has_own_test
        )
        parts = {
            "calibration": order[:n_calibration],
            "test": order[n_calibration : n_calibration + n_test],
            "train": order[n_calibration + n_test :],
        }
        chosen = {split: [s for group in groups for s in train[group]] for split, groups in parts.items()}
        chosen["calibration"] += [s for group in sorted(calibration) for s in calibration[group]]
        chosen["test"] += [s for group in sorted(tested) for s in tested[group]]
        simulated = tuple(split for split in SPLITS if not chosen[split])
        n_train, n_rest = (len({s.group for s in chosen[split]}) for split in SPLITS[:2])
        if simulated:
            self.warnings.append(
                f"{category}: only {_pictures(n_train, 'independent genuine')} to learn from, so the pictures for "
                f"{' and '.join(simulated)} are simulated: re-photographs (light, colour, crop, perspective, "
                "compression) of what is learnt. Real photographs differ more, so scores and false-alarm rates will "
                "look better than they are. Add at least three genuine photographs of the artwork."
            )
        elif n_rest < 3:
            self.notes.append(
                f"{category}: thresholds rest on {_pictures(n_rest, 'independent genuine')} and re-photographs; real "
                "false-alarm rates may be higher than aimed at. More genuine pictures help."
            )
        return chosen, simulated


def _group_counts(n: int, *, n_calibration: int, n_test: int, has_own_test: bool) -> tuple[int, int]:
    """How many of ``n`` groups to learn from go to calibration and to test; (0, 0) where they are too few.

    Args:
        n: groups to distribute; the rest is learnt from, at least one.
        n_calibration, n_test: groups that stand in these splits already.
        has_own_test: True when the source brought normal test pictures, so that test needs no more.

    >>> _group_counts(10, n_calibration=0, n_test=0, has_own_test=False)
    (2, 3)
    >>> _group_counts(10, n_calibration=0, n_test=5, has_own_test=True)
    (3, 0)
    >>> _group_counts(2, n_calibration=0, n_test=0, has_own_test=False)
    (0, 0)
    """
    total = n if has_own_test else n + n_test
    test = 0 if has_own_test else max(round(OWN_TEST_SHARES[1] * total) - n_test, 0 if n_test else 1)
    share = CALIBRATION_SHARE if has_own_test else OWN_TEST_SHARES[0]
    calibration = 0 if n_calibration else max(round(share * total), 1)
    if n < 1 + (calibration > 0) + (test > 0):
        return 0, 0
    test = min(test, n - 1 - (calibration > 0))
    return min(calibration, n - 1 - test), test


class _CategoryPlan:
    """The jobs of one artwork."""

    def __init__(self, plan: _Plan, category: str, folder: str) -> None:
        self._plan = plan
        self._category = category
        self._folder = folder
        self._taken: set[str] = set()
        self.jobs: list[_Job] = []

    def add_normals(
        self, splits: Mapping[str, Sequence[Sample]], simulated: Sequence[str], rng: np.random.Generator
    ) -> None:
        for split in SPLITS:
            n_asked = self._plan.counts[split]
            kept = self._limited(split, splits[split], n_asked, rng)
            for sample in kept:
                self._add(split, sample, ORIGINS[0])
            models = [job for job in self.jobs if job.split == ("train" if split in simulated else split)]
            models = [job for job in models if job.origin == ORIGINS[0]]
            for index, model in zip(range(n_asked - len(kept)), _turns(models)):
                group = model.group
                if split in simulated:  # its own name, since the same source is learnt from; the manifest says so
                    group = f"{model.group}~rephotograph {split} {index:02d}"
                path = self._free_path(split, NORMAL_KIND, f"{Path(model.path).stem}~{index:03d}")
                self.jobs.append(_Job(path, self._category, split, NORMAL_KIND, group, ORIGINS[1], model.path))

    def add_real(self, samples: Sequence[Sample]) -> None:
        for sample in sorted(samples, key=lambda s: (s.kind, s.image_path)):
            self._add("test", sample, ORIGINS[2])

    def add_synthetic(self, n: int, rng: np.random.Generator) -> None:
        models = [job for job in self.jobs if job.split == "test" and job.origin in ORIGINS[:2]]
        models = [models[i] for i in rng.permutation(len(models))]
        for index, (kind, model) in enumerate(zip(_kind_turns(self._plan.kinds, n), _turns(models))):
            path = self._free_path("test", kind, f"synthetic_{index:03d}")
            self.jobs.append(_Job(path, self._category, "test", kind, model.group, ORIGINS[3], model.path))

    def _limited(
        self, split: str, samples: Sequence[Sample], n_asked: int, rng: np.random.Generator
    ) -> Sequence[Sample]:
        limit = MOST_TIMES * n_asked
        if len(samples) > n_asked:
            n_used = min(limit, len(samples))
            self._plan.notes.append(
                f"{self._category}: {len(samples)} genuine pictures for {split}, more than the {n_asked} asked for; "
                + ("all are used." if n_used == len(samples) else f"{n_used} of them are used ({MOST_TIMES} x asked).")
            )
        if len(samples) <= limit:
            return samples
        # From as many groups as possible: the first of each group, then the second, ...
        shuffled = [samples[i] for i in rng.permutation(len(samples))]
        pairs = [pair for members in _by_group(shuffled).values() for pair in enumerate(members)]
        ranked = sorted(pairs, key=lambda pair: pair[0])
        kept = {id(sample) for _, sample in ranked[:limit]}
        return [sample for sample in samples if id(sample) in kept]

    def _add(self, split: str, sample: Sample, origin: str) -> None:
        path = self._free_path(split, sample.kind, _safe(sample.image_path.stem))
        self.jobs.append(
            _Job(
                path, self._category, split, sample.kind, sample.group, origin,
                sample.image_path.as_posix(), sample.mask_path,
            )
        )  # fmt: skip

    def _free_path(self, split: str, kind: str, stem: str) -> str:
        # Calibration normals lie in train/good, as MVTec has no such folder; the manifest knows.
        folder = f"{self._folder}/{'test' if split == 'test' else 'train'}/{_safe(kind)}"
        return _unique(f"{folder}/{stem}", self._taken) + ".png"


def _turns(items: Sequence[Any]) -> Iterable[Any]:
    """Endlessly one item of each group after the other; within a group, one after the other."""
    by_group = _by_group(items)
    turn = 0
    while by_group:
        for members in by_group.values():
            yield members[turn % len(members)]
        turn += 1


def _kind_turns(kinds: Sequence[str], n: int) -> list[str]:
    """``n`` kinds in order: the report's five, the others, the report's five, and again from the start.

    >>> _kind_turns(("box", "dots", "tear"), 7)
    ['box', 'dots', 'tear', 'box', 'dots', 'box', 'dots']
    """
    of_report = [kind for kind in kinds if kind in synthesis.REPORT_KINDS]
    others = [kind for kind in kinds if kind not in synthesis.REPORT_KINDS]
    cycle = [*of_report, *others, *of_report]
    return [cycle[i % len(cycle)] for i in range(n)]


def _by_group(items: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    return dict(groups)


def _apart(sample: Sample) -> Sample:
    return replace(sample, group=f"{sample.group}~{sample.kind} {sample.image_path.stem}")


# --- reading the sources ---------------------------------------------------------------------------------------------


def _readable(samples: Sequence[Sample], max_side: int) -> tuple[list[Sample], list[tuple[Path, str]], list[str]]:
    """Samples whose files can be used, with equal pictures joined in one group; what is left out; what was decided."""
    from tqdm.auto import tqdm

    with ThreadPoolExecutor(_THREADS) as pool:
        work = pool.map(lambda sample: _checked(sample, max_side), samples)
        checks = list(tqdm(work, total=len(samples), desc="checking sources", unit="picture", delay=3))
    bad, kept, pixels = [], [], []
    for sample, (pixel_hash, problem, mask_problem) in zip(samples, checks):
        if problem:
            bad.append((sample.image_path, problem))
            continue
        if mask_problem:
            bad.append((sample.mask_path, f"{mask_problem} (the picture is kept without a mask)"))
            sample = replace(sample, mask_path=None)
        kept.append(sample)
        pixels.append((sample.category, pixel_hash))
    notes = []
    moved = sum(sample.is_anomalous and sample.split != "test" for sample in kept)
    if moved:
        notes.append(f"{moved} anomalous pictures for learning are used for testing: detectors learn from normal ones.")
    return _joined(kept, pixels), bad, notes


def _checked(sample: Sample, max_side: int) -> tuple[str, str, str]:
    """Hash of the decoded picture; problem of the picture; problem of its mask."""
    try:
        image = images.load_image(sample.image_path, max_side=max_side)
    except (images.ImageError, OSError) as error:
        return "", str(error), ""
    if min(image.shape[:2]) < MIN_SIDE:
        return "", f"{image.shape[1]} x {image.shape[0]} px at this resolution; at least {MIN_SIDE} a side needed", ""
    mask_problem = ""
    if sample.is_anomalous and sample.mask_path is not None:
        try:
            if not _mask_at(sample.mask_path, image.shape[:2]).any():
                mask_problem = "the mask is empty although the picture is anomalous"
        except (images.ImageError, OSError) as error:
            mask_problem = str(error)
    return storage.sha256_json([image.shape, _hash_of(image)]), "", mask_problem


def _hash_of(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def _joined(samples: Sequence[Sample], pixels: Sequence[tuple[str, str]]) -> list[Sample]:
    """Samples with one group name for pictures that are equal when decoded (another file name or metadata)."""
    leader: dict[str, str] = {}

    def find(group: str) -> str:
        while leader.get(group, group) != group:
            group = leader[group]
        return group

    first: dict[tuple[str, str], Sample] = {}
    for sample, key in zip(samples, pixels):
        twin = first.setdefault(key, sample)
        if twin.is_anomalous != sample.is_anomalous:
            raise DatasetError(
                f"{twin.image_path} ({twin.kind}) and {sample.image_path} ({sample.kind}) are the same picture. "
                "Delete the wrong one and run this again."
            )
        low, high = sorted((find(twin.group), find(sample.group)))
        leader[high] = low
    return [replace(sample, group=find(sample.group)) for sample in samples]


def _mask_at(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A mask at the size of its resized picture: nearest neighbour, or every touched pixel where that loses it."""
    mask = images.load_mask(path, shape)
    if mask.any():
        return mask
    whole = images.load_mask(path).astype(np.float32)
    return cv2.resize(whole, shape[::-1], interpolation=cv2.INTER_AREA) > 0


def _completed(sample: Sample) -> Sample:
    """A sample with absolute paths and with a group that names its artwork."""
    path = Path(os.path.abspath(sample.image_path))
    group = sample.group or path.stem
    group = group if group.startswith(f"{sample.category}/") else f"{sample.category}/{group}"
    mask = None if sample.mask_path is None else Path(os.path.abspath(sample.mask_path))
    return replace(sample, image_path=path, group=group, mask_path=mask)


def _fingerprint(sample: Sample) -> list[str]:
    """What of a source picture decides about the dataset; its folder does not."""
    files = [sample.image_path, *([] if sample.mask_path is None else images.mask_files(sample.mask_path))]
    hashes = [storage.sha256_file(file) if file.is_file() else "missing" for file in files]
    return [sample.category, sample.split, sample.kind, sample.group, sample.image_path.name, *hashes]


def _generator_fingerprint() -> str:
    """Hash of what the generators make of a small picture: other code or another OpenCV may make other datasets."""
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    image = cv2.resize(image, (80, 96), interpolation=cv2.INTER_CUBIC)
    made = []
    for index in range(3):
        for kind in synthesis.LOCAL_KINDS:
            made += synthesis.synthesize(image, kind, np.random.default_rng(index))[:2]
        made.append(synthesis.rephotograph(image, np.random.default_rng(index))[0])
    return storage.sha256_json([_hash_of(array) for array in made])


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_pictures(
    jobs: Sequence[_Job], folder: Path, settings_hash: str, max_side: int, seed: int
) -> list[dict[str, Any]]:
    """Write every picture that is not there yet; records in the order of the jobs."""
    from tqdm.auto import tqdm

    done = _resumed(folder, settings_hash)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _SETTINGS).exists():
        storage.write_json(folder / _SETTINGS, {"settings_hash": settings_hash})

    def work(job: _Job) -> dict[str, Any]:
        return done[job.path] if job.path in done else _make(job, folder, max_side, seed)

    with (
        open(folder / _PROGRESS, "a", encoding="utf-8") as progress,
        tqdm(total=len(jobs), desc="writing dataset", unit="picture", delay=3) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        rows: dict[str, dict[str, Any]] = {}
        # Each stage is made of pictures of the stages before it.
        for stage in ((ORIGINS[0], ORIGINS[2]), (ORIGINS[1],), (ORIGINS[3],)):
            for row in pool.map(work, [job for job in jobs if job.origin in stage]):
                if row["image_path"] not in done:
                    progress.write(json.dumps(row) + "\n")
                    progress.flush()
                rows[row["image_path"]] = row
                bar.update()
    return [rows[job.path] for job in jobs]


def _resumed(folder: Path, settings_hash: str) -> dict[str, dict[str, Any]]:
    """Records of pictures that an interrupted run has finished; its folder is emptied if its settings were others."""
    mark, progress = folder / _SETTINGS, folder / _PROGRESS
    if not folder.exists():
        return {}
    if not mark.exists() or storage.read_json(mark).get("settings_hash") != settings_hash:
        shutil.rmtree(folder)
        return {}
    done = {}
    for line in progress.read_text(encoding="utf-8").splitlines() if progress.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that the interruption cut off: its picture is made again
        if (folder / row["image_path"]).exists():
            done[row["image_path"]] = row
    storage.write_text(progress, "".join(json.dumps(row) + "\n" for row in done.values()))
    for leftover in list(folder.rglob(".*")):  # temporary names of files that were being written
        leftover.unlink()
    return done


def _make(job: _Job, folder: Path, max_side: int, seed: int) -> dict[str, Any]:
    """Make one picture (and mask) and return its record."""
    record: dict[str, Any] = {}
    mask = None
    synthesis_seed = None
    if job.origin in (ORIGINS[0], ORIGINS[2]):
        image = images.load_image(job.source, max_side=max_side)
        if job.mask_source is not None and job.kind != NORMAL_KIND:
            mask = _mask_at(job.mask_source, image.shape[:2])
    else:
        model = images.load_image(folder / job.source)
        synthesis_seed = synthesis.seed_for(seed, job.path)
        rng = np.random.default_rng(synthesis_seed)
        if job.origin == ORIGINS[1]:
            image, record["variations"] = synthesis.rephotograph(model, rng)
            image = images.resize(image, max_side)
        elif job.kind in synthesis.LOCAL_KINDS:
            image, mask, record = synthesis.synthesize(model, job.kind, rng)
        else:
            image = synthesis.vary(model, job.kind, rng)
    mask_path = None
    if mask is not None:
        artwork, _, kind, name = job.path.split("/")
        mask_path = f"{artwork}/ground_truth/{kind}/{name.removesuffix('.png')}_mask.png"
        _save(folder / mask_path, mask.astype(np.uint8) * 255)
    _save(folder / job.path, image)
    return {
        **record,
        "image_path": job.path,
        "mask_path": mask_path,
        "category": job.category,
        "split": job.split,
        "kind": job.kind,
        "group": job.group,
        "origin": job.origin,
        "source_path": job.source,
        "synthesis_seed": synthesis_seed,
    }


def _save(path: Path, array: np.ndarray) -> None:
    """PNG at compression level 1: four times as fast as the default, files about a tenth larger."""
    bgr = array if array.ndim == 2 else np.ascontiguousarray(array[:, :, ::-1])
    storage.write_bytes(path, cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())


def _finish(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    plan: _Plan,
    bad: Sequence[tuple[Path, str]],
    settings: Mapping[str, Any],
    settings_hash: str,
) -> None:
    """Records, manifest, and last ``manifest.json``."""
    samples = [
        Sample(
            folder / row["image_path"],
            row["category"],
            row["kind"] != NORMAL_KIND,
            None if row["mask_path"] is None else folder / row["mask_path"],
            row["split"],
            row["kind"],
            row["group"],
            visibility=row.get("visibility"),
            synthesis_seed=row["synthesis_seed"],
        )
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: (samples[i].category, SPLITS.index(samples[i].split), i))
    lines = [json.dumps(rows[i], ensure_ascii=False, sort_keys=True) for i in order]
    storage.write_text(folder / RECORDS, "\n".join(lines) + "\n")
    for name in (_SETTINGS, _PROGRESS):
        (folder / name).unlink()
    data.write_manifest(
        folder,
        [samples[i] for i in order],
        info={
            "made_by": "assemble.build_dataset",
            "settings": {name: value for name, value in settings.items() if name != "sources"},
            "settings_hash": settings_hash,
            "notes": plan.notes,
            "warnings": plan.warnings,
            "bad_files": [{"path": str(path), "reason": reason} for path, reason in bad],
        },
    )


def _is_complete(target: Path, settings_hash: str) -> bool:
    mark = target / data.MANIFEST_JSON
    if not mark.exists() or storage.read_json(mark).get("settings_hash") != settings_hash:
        return False
    try:
        data.open_dataset(target)
    except (FileNotFoundError, DatasetError) as error:
        print(f"The dataset is made again: {error}")
        return False
    return (target / RECORDS).exists()


def _check_target(target: Path, samples: Sequence[Sample]) -> None:
    """Refuse to replace anything but a dataset of ours."""
    mark = target / data.MANIFEST_JSON
    is_ours = mark.exists() and storage.read_json(mark).get("made_by") == "assemble.build_dataset"
    if target.exists() and not is_ours and (not target.is_dir() or any(target.iterdir())):
        raise DatasetError(f"{target} holds other files. Give an empty folder for the dataset, or move them away.")
    inside = next((s.image_path for s in samples if s.image_path.is_relative_to(target)), None)
    if inside is not None:
        raise DatasetError(f"{inside} lies in the folder of the dataset that would replace it. Choose another folder.")


def _check_settings(counts: Mapping[str, int], kinds: Sequence[str]) -> None:
    for name, n in counts.items():
        least = 0 if name == "anomalous" else 1
        if n < least:
            raise ValueError(f"{n} {name} pictures asked for; at least {least} per artwork is needed.")
    known = (*synthesis.LOCAL_KINDS, *synthesis.ANOMALOUS_VARIATIONS)
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        raise ValueError(f"Kinds {', '.join(unknown) or 'are none'}: allowed are {', '.join(known)}.")


# --- words -----------------------------------------------------------------------------------------------------------


def _print_outcome(manifest: Mapping[str, Any]) -> None:
    for note in manifest["notes"]:
        print(f"Note: {note}")
    for warning in manifest["warnings"]:
        print(f"\nWARNING: {warning}\n")
    print(_lines("Files left out", [f"{file['path']}: {file['reason']}" for file in manifest["bad_files"]]), end="")


def _described(words: str, samples: Sequence[Sample]) -> str:
    lines = [words]
    for category in sorted({sample.category for sample in samples}):
        kinds = Counter(sample.kind for sample in samples if sample.category == category)
        genuine = kinds.pop(NORMAL_KIND, 0)
        parts = [f"{genuine} genuine", *(f"{n} {kind}" for kind, n in sorted(kinds.items()))]
        lines.append(f"  {category}: {', '.join(parts)}")
    return "\n".join(lines)


def _safe(name: str) -> str:
    """A name that every file system takes: letters, digits, dot, dash, underscore; at most 60 of them."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:60] or "unnamed"


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number when it is taken; remembered in ``taken`` (file systems may ignore letter case)."""
    candidate, number = name, 1
    while candidate.lower() in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate.lower())
    return candidate


def _pictures(n: int, which: str = "genuine") -> str:
    return f"{n} {which} picture" + ("" if n == 1 else "s")


def _lines(title: str, lines: Sequence[str]) -> str:
    shown = [f"  {line}" for line in lines[:12]]
    more = [f"  ... and {len(lines) - 12} more (all in {data.MANIFEST_JSON})"] if len(lines) > 12 else []
    return "\n".join(["", f"{title}: {len(lines)}", *shown, *more]) if lines else ""
