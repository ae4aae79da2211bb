"""Source pictures -> the plan of a dataset: which picture goes into which split, and what is made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helpers import synthesis
from helpers.data.names import clean
from helpers.records import NORMAL_KIND, SPLITS, Sample
from helpers.results import category_label

ORIGINS = GENUINE, REPHOTOGRAPHED, REAL, SYNTHETIC = "genuine", "rephotographed", "real anomaly", "synthetic anomaly"
"""How a picture of the dataset came about; ``origin`` in the records."""
CALIBRATION_SHARE = 0.3
"""Share of the source pictures that set thresholds, when there are test pictures of its own."""
OWN_TEST_SHARES = (0.2, 0.3)
"""Shares of calibration and test source pictures when there are no normal test pictures; the rest is learnt from."""
MOST_TIMES = 3
"""Genuine pictures beyond this many times the number asked for are left out, at random."""


class Job(NamedTuple):
    """One picture to write: what it is, and the file or the picture of the dataset that it is made of."""

    image_path: str
    category: str
    split: str
    kind: str
    group: str
    origin: str
    source_path: str
    mask_source: Path | None = None


def plan(samples: Sequence[Sample], settings: Mapping[str, Any]) -> tuple[list[Job], list[str], dict[str, str]]:
    """All pictures of a dataset, notes, and a sentence on the limits of artworks with few source pictures.

    Args:
        samples: readable source pictures with absolute paths and groups.
        settings: of :func:`helpers.data.build.build_dataset`; the same input gives the same plan.
    """
    jobs, notes, limits, taken = [], [], {}, set()
    for category in sorted({sample.category for sample in samples}):
        mine = [sample for sample in samples if sample.category == category]
        normals, real = ([s for s in mine if s.is_anomalous == label] for label in (False, True))
        if not normals:
            notes.append(f"{category} is left out: {len(real)} anomalous pictures and no genuine one to learn from.")
            continue
        rng = synthesis.rng_for(settings["seed"], f"{category}/splits")
        parts, borrowed, limit = _split(category, normals, real, rng, notes)
        if limit:
            limits[category] = limit
        jobs += _jobs(category, _unique(clean(category), taken), parts, borrowed, real, settings, notes)
    return jobs, notes, limits


def _split(
    category: str, normals: Sequence[Sample], real: Sequence[Sample], rng: np.random.Generator, notes: list[str]
) -> tuple[dict[str, list[Sample]], dict[str, str], str]:
    """Genuine pictures by split, whose re-photographs fill an empty split, and what that means for the numbers."""
    train, calibration, test = (_by_group(s for s in normals if s.split == split) for split in SPLITS)
    if not train and not calibration:
        notes.append(f"{category}: no pictures to learn from; the source's normal test pictures are split.")
        train, test = test, {}
    calibration = {group: members for group, members in calibration.items() if group not in train}
    if not test or not train:
        train, calibration = {**train, **calibration}, {}
    shared = ({s.group for s in real} | set(test)) & (set(train) | set(calibration))
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
    n_calibration, n_test = _group_counts(len(order), has_calibration=bool(calibration), has_test=bool(test))
    calibration |= {group: train.pop(group) for group in order[:n_calibration]}
    test |= {group: train.pop(group) for group in order[n_calibration : n_calibration + n_test]}
    if not calibration and len(test) >= 2:  # one picture to learn from beside test pictures
        n_calibration = max(1, round(CALIBRATION_SHARE * len(test)))
        free = sorted(set(test) - {s.group for s in real} - set(train))
        calibration |= {group: test.pop(group) for group in free[:n_calibration] if len(test) > 1}
    groups = dict(zip(SPLITS, (train, calibration, test)))
    lender = next(split for split in ("test", "calibration", "train") if groups[split])
    borrowed = {split: lender for split in SPLITS if not groups[split]}
    parts = {split: [s for group in sorted(found) for s in found[group]] for split, found in groups.items()}
    return (
        parts,
        borrowed,
        _limit(category_label(category), [len(found) for found in groups.values()], borrowed, bool(shared)),
    )


def _group_counts(n: int, *, has_calibration: bool, has_test: bool) -> tuple[int, int]:
    """How many of ``n`` source pictures to learn from go to calibration and to test; at least one is learnt from.

    >>> [_group_counts(10, has_calibration=False, has_test=known) for known in (False, True)]
    [(2, 3), (3, 0)]
    >>> [_group_counts(n, has_calibration=False, has_test=False) for n in (1, 2, 3, 4)]
    [(0, 0), (1, 0), (1, 1), (1, 1)]
    """
    test = 0 if has_test else max(round(OWN_TEST_SHARES[1] * n), 1)
    share = CALIBRATION_SHARE if has_test else OWN_TEST_SHARES[0]
    calibration = min(0 if has_calibration else max(round(share * n), 1), n - 1)
    return calibration, max(0, min(test, n - 1 - calibration))


def _limit(name: str, n_groups: Sequence[int], borrowed: Mapping[str, str], is_shared: bool) -> str:
    """What few source pictures mean for the numbers; "" when there are enough. Only shared ones make *optimistic*."""
    n, (n_train, n_calibration, n_test) = sum(n_groups), n_groups
    if is_shared:
        words = "shows the same photographs in training and test and has no others: every number is optimistic"
    elif "train" in borrowed.values():
        words = (
            "has only 1 genuine picture: thresholds and test pictures come from re-photographs of the picture that is "
            "learnt from, so every number is optimistic"
        )
    elif borrowed:
        words = (
            f"has only {n} genuine pictures: thresholds and normal test pictures come from re-photographs of one that "
            "is not learnt from, so false-alarm rates are optimistic"
        )
    elif min(n_calibration, n_test) < 3:
        words = (
            f"has only {n} genuine pictures: {n_train} are learnt from, thresholds rest on {n_calibration} and "
            f"false-alarm rates on {n_test} independent ones, so both are rough"
        )
    else:
        return ""
    return f"{name} {words}."


def _jobs(
    category: str,
    folder: str,
    parts: Mapping[str, Sequence[Sample]],
    borrowed: Mapping[str, str],
    real: Sequence[Sample],
    settings: Mapping[str, Any],
    notes: list[str],
) -> list[Job]:
    """Every picture of one artwork: genuine ones, re-photographs, real anomalies, synthetic anomalies."""
    jobs, taken = [], set()
    rng = synthesis.rng_for(settings["seed"], f"{category}/limits")

    def add(
        split: str, kind: str, stem: str, group: str, origin: str, source: object, mask: Path | None = None
    ) -> None:
        # Calibration normals lie in train/good, as MVTec has no such folder; the manifest knows.
        path = f"{folder}/{'test' if split == 'test' else 'train'}/{clean(kind)}/{stem}"
        jobs.append(Job(_unique(path, taken) + ".png", category, split, kind, group, origin, str(source), mask))

    n_asked = {
        "train": settings["n_train"],
        "calibration": settings["n_calibration"],
        "test": settings["n_test_normal"],
    }
    for split in SPLITS:
        limit = MOST_TIMES * n_asked[split]
        if len(parts[split]) > limit:
            notes.append(f"{category}: {limit} of {len(parts[split])} genuine pictures for {split} are used.")
        for sample in _limited(parts[split], limit, rng):
            add(split, NORMAL_KIND, clean(sample.image_path.stem), sample.group, GENUINE, sample.image_path)
    genuine = list(jobs)
    for split in SPLITS:
        n_more = n_asked[split] - sum(job.split == split for job in genuine)
        models = [job for job in genuine if job.split == borrowed.get(split, split)]
        for index, model in zip(range(n_more), _turns(models)):
            stem = f"{Path(model.image_path).stem}~{index:03d}"
            add(split, NORMAL_KIND, stem, model.group, REPHOTOGRAPHED, model.image_path)
    for sample in sorted(real, key=lambda s: (s.kind, s.image_path)):
        add("test", sample.kind, clean(sample.image_path.stem), sample.group, REAL, sample.image_path, sample.mask_path)
    n_made = settings["n_test_anomalous"] - (len(real) if settings["count_real"] else 0)
    models = [job for job in jobs if job.split == "test" and job.kind == NORMAL_KIND]
    rng = synthesis.rng_for(settings["seed"], f"{category}/damage")
    models = [models[i] for i in rng.permutation(len(models))]
    for index, (kind, model) in enumerate(zip(_kind_turns(settings["kinds"], n_made), _turns(models))):
        add("test", kind, f"synthetic_{index:03d}", model.group, SYNTHETIC, model.image_path)
    return jobs


def _limited(samples: Sequence[Sample], limit: int, rng: np.random.Generator) -> Sequence[Sample]:
    """At most ``limit`` pictures, of as many source pictures as possible: the first of each, then the second, ..."""
    if len(samples) <= limit:
        return samples
    groups = _by_group(samples[i] for i in rng.permutation(len(samples)))
    ranked = sorted((pair for members in groups.values() for pair in enumerate(members)), key=lambda pair: pair[0])
    kept = {sample.image_path for _, sample in ranked[:limit]}
    return [sample for sample in samples if sample.image_path in kept]


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
    cycle = [*of_report, *(kind for kind in kinds if kind not in of_report), *of_report]
    return [cycle[i % len(cycle)] for i in range(n)]


def _by_group(items: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    return dict(groups)


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number when it is taken; remembered in ``taken`` (file systems may ignore letter case)."""
    candidate, number = name, 1
    while candidate.lower() in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate.lower())
    return candidate
