"""Source pictures -> the plan of a dataset: which picture goes into which split, and what is made of it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
_LIMITS = {
    "shared": "shows the same photographs in training and test and has no others: every number is optimistic",
    "one": "has only 1 genuine picture: thresholds and test pictures come from re-photographs of the picture that is "
    "learnt from, so every number is optimistic",
    "two": "has only {n} genuine pictures: thresholds and normal test pictures come from re-photographs of one that is "
    "not learnt from, so false-alarm rates are optimistic",
    "few": "has only {n} genuine pictures: {train} are learnt from, thresholds rest on {calibration} and false-alarm "
    "rates on {test} independent ones, so both are rough",
}


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
        groups, is_shared = _split(normals, real, category, settings["seed"], notes)
        limit, lender = _limit({split: len(found) for split, found in groups.items()}, is_shared)
        if limit:
            limits[category] = f"{category_label(category)} {limit}."
        parts = {split: [s for group in sorted(found) for s in found[group]] for split, found in groups.items()}
        jobs += _jobs(category, _unique(clean(category), taken), parts, lender, real, settings, notes)
    return jobs, notes, limits


def _split(
    normals: Sequence[Sample], real: Sequence[Sample], category: str, seed: int, notes: list[str]
) -> tuple[dict[str, dict[str, list[Sample]]], bool]:
    """Genuine pictures by split and source picture; whether a test picture shows what is learnt from."""
    train, calibration, test = (_by_group(s for s in normals if s.split == split) for split in SPLITS)
    if not train and not calibration:
        notes.append(f"{category}: no pictures to learn from; the source's normal test pictures are split.")
        train, test = test, {}
    calibration = {group: members for group, members in calibration.items() if group not in train}
    if not (train and test):
        train, calibration = train | calibration, {}
    tested = {s.group for s in real} | set(test)
    shared = tested & (set(train) | set(calibration))
    if shared and len(set(train) - tested) >= 2:
        notes.append(
            f"{category}: {len(shared)} source pictures for learning became test pictures, because a test picture "
            "shows the same photograph (or is named as its copy)."
        )
        for group in sorted(shared):
            test.setdefault(group, []).extend(train.pop(group, []) + calibration.pop(group, []))
        shared = set()
    # A split without pictures of its own takes a share of those to learn from; at least one stays.
    order = [sorted(train)[i] for i in synthesis.rng_for(seed, f"{category}/splits").permutation(len(train))]
    share = CALIBRATION_SHARE if test else OWN_TEST_SHARES[0]
    n_calibration = 0 if calibration else min(max(round(share * len(order)), 1), len(order) - 1)
    n_test = 0 if test else min(max(round(OWN_TEST_SHARES[1] * len(order)), 1), len(order) - 1 - n_calibration)
    calibration |= {group: train.pop(group) for group in order[:n_calibration]}
    test |= {group: train.pop(group) for group in order[n_calibration : n_calibration + n_test]}
    if not calibration:  # one picture to learn from beside test pictures
        free = sorted(set(test) - {s.group for s in real} - set(train))
        n_calibration = min(max(round(CALIBRATION_SHARE * len(test)), 1), len(test) - 1)
        calibration = {group: test.pop(group) for group in free[: max(0, n_calibration)]}
    return dict(zip(SPLITS, (train, calibration, test))), bool(shared)


def _limit(n_groups: Mapping[str, int], is_shared: bool) -> tuple[str, str]:
    """What few source pictures mean for the numbers, "" when there are enough, and the split that empty ones are filled
    from, by re-photographs."""
    lender = next(split for split in reversed(SPLITS) if n_groups[split])
    if is_shared:
        words = "shared"
    elif min(n_groups.values()) == 0:
        words = "one" if lender == "train" else "two"
    else:
        words = "few" if min(n_groups["calibration"], n_groups["test"]) < 3 else ""
    return _LIMITS.get(words, "").format(n=sum(n_groups.values()), **n_groups), lender


def _jobs(
    category: str,
    folder: str,
    parts: Mapping[str, Sequence[Sample]],
    lender: str,
    real: Sequence[Sample],
    settings: Mapping[str, Any],
    notes: list[str],
) -> list[Job]:
    """Every picture of one artwork: genuine ones, re-photographs, real anomalies, synthetic anomalies."""
    jobs, taken = [], set()

    def add(
        split: str, kind: str, stem: str, group: str, origin: str, source: object, mask: Path | None = None
    ) -> None:
        # Calibration normals lie in train/good, as MVTec has no such folder; the manifest knows.
        path = f"{folder}/{'test' if split == 'test' else 'train'}/{clean(kind)}/{stem}"
        jobs.append(Job(_unique(path, taken) + ".png", category, split, kind, group, origin, str(source), mask))

    n_asked = dict(zip(SPLITS, (settings[name] for name in ("n_train", "n_calibration", "n_test_normal"))))
    rng = synthesis.rng_for(settings["seed"], f"{category}/limits")
    for split in SPLITS:
        limit = MOST_TIMES * n_asked[split]
        if len(parts[split]) > limit:
            notes.append(f"{category}: {limit} of {len(parts[split])} genuine pictures for {split} are used.")
        kept = rng.permutation(len(parts[split]))[:limit] if len(parts[split]) > limit else range(len(parts[split]))
        for sample in (parts[split][i] for i in sorted(kept)):
            add(split, NORMAL_KIND, clean(sample.image_path.stem), sample.group, GENUINE, sample.image_path)
    genuine = {split: [job for job in jobs if job.split == split] for split in SPLITS}
    for split in SPLITS:
        models = _turns(genuine[split] or genuine[lender])
        for index, model in zip(range(n_asked[split] - len(genuine[split])), models):
            stem = f"{Path(model.image_path).stem}~{index:03d}"
            add(split, NORMAL_KIND, stem, model.group, REPHOTOGRAPHED, model.image_path)
    for sample in sorted(real, key=lambda s: (s.kind, s.image_path)):
        add("test", sample.kind, clean(sample.image_path.stem), sample.group, REAL, sample.image_path, sample.mask_path)
    n_made = settings["n_test_anomalous"] - (len(real) if settings["count_real"] else 0)
    models = [job for job in jobs if job.split == "test" and job.kind == NORMAL_KIND]
    order = synthesis.rng_for(settings["seed"], f"{category}/damage").permutation(len(models))
    turns = _turns([models[i] for i in order])
    for index, (kind, model) in enumerate(zip(_kind_turns(settings["kinds"], n_made), turns)):
        add("test", kind, f"synthetic_{index:03d}", model.group, SYNTHETIC, model.image_path)
    return jobs


def _turns(items: Sequence[Any]) -> Iterator[Any]:
    """Endlessly one item of each group after the other; within a group, one after the other."""
    cycles = [itertools.cycle(members) for members in _by_group(items).values()]
    return (next(cycle) for cycle in itertools.cycle(cycles))


def _kind_turns(kinds: Sequence[str], n: int) -> list[str]:
    """``n`` kinds in order: the report's five, the others, the report's five, and again from the start.

    >>> _kind_turns(("box", "dots", "tear"), 7)
    ['box', 'dots', 'tear', 'box', 'dots', 'box', 'dots']
    """
    of_report = [kind for kind in kinds if kind in synthesis.REPORT_KINDS]
    cycle = [*of_report, *(kind for kind in kinds if kind not in of_report), *of_report]
    return list(itertools.islice(itertools.cycle(cycle), max(0, n)))


def _by_group(items: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    return dict(groups)


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number when it is taken; remembered in ``taken`` (file systems may ignore letter case)."""
    candidate = next(c for c in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if c.lower() not in taken)
    taken.add(candidate.lower())
    return candidate
