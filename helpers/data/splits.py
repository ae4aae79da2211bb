"""Source pictures -> the plan of a dataset: which picture goes into which split, and what is made of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helpers import synthesis
from helpers.records import NORMAL_KIND, SPLITS, Sample

ORIGINS = ("genuine", "rephotographed", "real anomaly", "synthetic anomaly")
"""How a picture of the dataset came about; ``origin`` in the records."""
CALIBRATION_SHARE = 0.3
"""Share of the source pictures that set thresholds, when there are test pictures of its own."""
OWN_TEST_SHARES = (0.2, 0.3)
"""Shares of calibration and test source pictures when there are no normal test pictures; the rest is learnt from."""
MOST_TIMES = 3
"""Genuine pictures beyond this many times the number asked for are left out, at random."""


class Picture(NamedTuple):
    """A readable source picture and where its copy at the dataset's resolution waits."""

    sample: Sample
    staged: Path
    """The picture; its mask, where it has one, lies beside it as ``*_mask.png``."""

    @property
    def group(self) -> str:
        return self.sample.group


@dataclass(frozen=True)
class Job:
    """One picture to write: what it is, and what it is made of (a staged copy, or a picture of the dataset)."""

    path: str
    category: str
    split: str
    kind: str
    group: str
    origin: str
    source: str
    original: str = ""


class _Splits(NamedTuple):
    """Source pictures of an artwork by split; ``borrowed`` names the split whose pictures fill an empty one."""

    pictures: dict[str, list[Picture]]
    borrowed: dict[str, str]
    limit: str


def plan(pictures: Sequence[Picture], settings: Mapping[str, Any]) -> tuple[list[Job], list[str], dict[str, str]]:
    """All pictures of the dataset, notes, and limits by artwork; the same input gives the same plan."""
    jobs, notes, limits, taken = [], [], {}, set()
    for category in sorted({picture.sample.category for picture in pictures}):
        mine = [picture for picture in pictures if picture.sample.category == category]
        normals = [picture for picture in mine if not picture.sample.is_anomalous]
        real = [picture for picture in mine if picture.sample.is_anomalous]
        if not normals:
            notes.append(f"{category} is left out: {len(real)} anomalous pictures and no genuine one to learn from.")
            continue
        rng = synthesis.rng_for(settings["seed"], f"{category}/splits")
        splits = _split(category, normals, real, rng, notes)
        if splits.limit:
            limits[category] = splits.limit
        writer = _Artwork(category, _unique(_safe(category), taken), settings, notes)
        writer.add_normals(splits, synthesis.rng_for(settings["seed"], f"{category}/limits"))
        writer.add_real(real)
        writer.add_synthetic(synthesis.rng_for(settings["seed"], f"{category}/damage"))
        jobs += writer.jobs
    return jobs, notes, limits


def _split(
    category: str, normals: Sequence[Picture], real: Sequence[Picture], rng: np.random.Generator, notes: list[str]
) -> _Splits:
    """Each source picture to one split. With one or two of them, a split is filled with re-photographs of another's."""
    train, calibration, test = (_by_group(p for p in normals if p.sample.split == split) for split in SPLITS)
    if not train and not calibration:
        notes.append(f"{category}: no pictures to learn from; the source's normal test pictures are split.")
        train, test = test, {}
    calibration = {group: members for group, members in calibration.items() if group not in train}
    if not test or not train:
        train, calibration = {**train, **calibration}, {}
    shared = ({p.group for p in real} | set(test)) & (set(train) | set(calibration))
    if shared and len(set(train) - shared) >= 2:
        notes.append(
            f"{category}: {len(shared)} source pictures for learning became test pictures, because a test picture "
            "shows the same photograph (or is named as its copy)."
        )
        for pool in (train, calibration):
            for group in sorted(shared & set(pool)):
                test.setdefault(group, []).extend(pool.pop(group))
        shared = set()
    order = [sorted(train)[i] for i in rng.permutation(len(train))]
    n_calibration, n_test = _group_counts(len(order), has_calibration=bool(calibration), n_test=len(test))
    for group in order[:n_calibration]:
        calibration[group] = train.pop(group)
    for group in order[n_calibration : n_calibration + n_test]:
        test[group] = train.pop(group)
    if not calibration and len(test) >= 2:  # one picture to learn from beside test pictures
        for group in sorted(test)[: max(1, round(CALIBRATION_SHARE * len(test)))]:
            calibration[group] = test.pop(group)
    groups = dict(zip(SPLITS, (train, calibration, test)))
    others = [split for split in ("test", "calibration") if groups[split]]
    borrowed = {split: (others or ["train"])[0] for split in SPLITS if not groups[split]}
    chosen = {split: [p for group in sorted(found) for p in found[group]] for split, found in groups.items()}
    limit = _limit(*map(len, groups.values()), borrowed, bool(shared))
    return _Splits(chosen, borrowed, limit)


def _group_counts(n: int, *, has_calibration: bool, n_test: int) -> tuple[int, int]:
    """How many of ``n`` source pictures to learn from go to calibration and to test; at least one is learnt from.

    >>> _group_counts(10, has_calibration=False, n_test=0), _group_counts(10, has_calibration=False, n_test=5)
    ((2, 3), (3, 0))
    >>> [_group_counts(n, has_calibration=False, n_test=0) for n in (1, 2, 3, 4)]
    [(0, 0), (1, 0), (1, 1), (1, 1)]
    """
    test = 0 if n_test else max(round(OWN_TEST_SHARES[1] * n), 1)
    share = CALIBRATION_SHARE if n_test else OWN_TEST_SHARES[0]
    calibration = 0 if has_calibration else max(round(share * n), 1)
    calibration = min(calibration, n - 1)
    return calibration, max(0, min(test, n - 1 - calibration))


def _limit(n_train: int, n_calibration: int, n_test: int, borrowed: Mapping[str, str], is_shared: bool) -> str:
    """What few source pictures mean for the numbers; "" when there are enough. Only shared ones make *optimistic*."""
    if is_shared:
        return (
            "Pictures to learn from and test pictures show the same photographs, and there are no others, so every "
            "number is optimistic."
        )
    if "train" in borrowed.values():
        return (
            "Only 1 genuine picture: thresholds and test pictures come from re-photographs of the picture that is "
            "learnt from, so every number is optimistic."
        )
    if borrowed:
        return (
            f"Only {n_train + n_calibration + n_test} genuine pictures: thresholds and normal test pictures come from "
            "re-photographs of one that is not learnt from, so false-alarm rates are optimistic."
        )
    if min(n_calibration, n_test) < 3:
        return (
            f"Few genuine pictures: {n_train} are learnt from, thresholds rest on {n_calibration} and false-alarm "
            f"rates on {n_test} independent ones, so both are rough."
        )
    return ""


class _Artwork:
    """The jobs of one artwork."""

    def __init__(self, category: str, folder: str, settings: Mapping[str, Any], notes: list[str]) -> None:
        self._category, self._folder, self._settings, self._notes = category, folder, settings, notes
        self._taken: set[str] = set()
        self.jobs: list[Job] = []

    def add_normals(self, splits: _Splits, rng: np.random.Generator) -> None:
        for split in SPLITS:
            n_asked = self._settings["n_test_normal" if split == "test" else f"n_{split}"]
            for picture in self._limited(split, splits.pictures[split], n_asked, rng):
                self._add(split, picture, ORIGINS[0])
        genuine = list(self.jobs)
        for split in SPLITS:
            n_asked = self._settings["n_test_normal" if split == "test" else f"n_{split}"]
            n_there = sum(job.split == split for job in genuine)
            models = [job for job in genuine if job.split == splits.borrowed.get(split, split)]
            for index, model in zip(range(n_asked - n_there), _turns(models)):
                path = self._free_path(split, NORMAL_KIND, f"{Path(model.path).stem}~{index:03d}")
                self.jobs.append(Job(path, self._category, split, NORMAL_KIND, model.group, ORIGINS[1], model.path))

    def add_real(self, pictures: Sequence[Picture]) -> None:
        for picture in sorted(pictures, key=lambda p: (p.sample.kind, p.sample.image_path)):
            self._add("test", picture, ORIGINS[2])

    def add_synthetic(self, rng: np.random.Generator) -> None:
        n_real = sum(job.origin == ORIGINS[2] for job in self.jobs)
        n = self._settings["n_test_anomalous"] - (n_real if self._settings["count_real"] else 0)
        models = [job for job in self.jobs if job.split == "test" and job.kind == NORMAL_KIND]
        models = [models[i] for i in rng.permutation(len(models))]
        for index, (kind, model) in enumerate(zip(_kind_turns(self._settings["kinds"], n), _turns(models))):
            path = self._free_path("test", kind, f"synthetic_{index:03d}")
            self.jobs.append(Job(path, self._category, "test", kind, model.group, ORIGINS[3], model.path))

    def _limited(
        self, split: str, pictures: Sequence[Picture], n_asked: int, rng: np.random.Generator
    ) -> Sequence[Picture]:
        limit = MOST_TIMES * n_asked
        if len(pictures) <= limit:
            return pictures
        self._notes.append(f"{self._category}: {limit} of {len(pictures)} genuine pictures for {split} are used.")
        # From as many source pictures as possible: the first of each, then the second, ...
        shuffled = [pictures[i] for i in rng.permutation(len(pictures))]
        pairs = [pair for members in _by_group(shuffled).values() for pair in enumerate(members)]
        kept = {picture.staged for _, picture in sorted(pairs, key=lambda pair: pair[0])[:limit]}
        return [picture for picture in pictures if picture.staged in kept]

    def _add(self, split: str, picture: Picture, origin: str) -> None:
        sample = picture.sample
        path = self._free_path(split, sample.kind, _safe(sample.image_path.stem))
        self.jobs.append(
            Job(
                *(path, self._category, split, sample.kind, sample.group, origin, str(picture.staged)),
                original=sample.image_path.as_posix(),
            )
        )

    def _free_path(self, split: str, kind: str, stem: str) -> str:
        # Calibration normals lie in train/good, as MVTec has no such folder; the manifest knows.
        folder = f"{self._folder}/{'test' if split == 'test' else 'train'}/{_safe(kind)}"
        return _unique(f"{folder}/{stem}", self._taken) + ".png"


def _turns(items: Sequence[Any]) -> Iterator[Any]:
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
