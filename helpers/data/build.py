"""Source pictures -> one frozen dataset: splits by source picture, re-photographs, anomalies with masks.
Everything is saved as PNG: JPEG would change pixels outside the mask, and a detector could learn the compression."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.contrib.concurrent import thread_map

from helpers import files, results, synthesis
from helpers.data import images, manifest
from helpers.data.layouts import FolderReading
from helpers.data.manifest import Dataset
from helpers.data.names import DatasetError, clean, unique
from helpers.records import NORMAL_KIND, SPLITS, Sample

RECORDS = "synthesis.jsonl"  # how each picture of the dataset came about, in the manifest's order
ORIGINS = GENUINE, REPHOTOGRAPHED, REAL, SYNTHETIC = "genuine", "rephotographed", "real anomaly", "synthetic anomaly"
TEST_KINDS = synthesis.LOCAL_KINDS + synthesis.REPORT_VARIATIONS  # of synthetic anomalies in a test set by default
MIN_SIDE = 64  # pixels of a scroll's shorter side, at up to four times the longer side of the others
CALIBRATION_SHARE = 0.3  # of the source pictures set thresholds, when there are test pictures of its own
OWN_TEST_SHARES = (0.2, 0.3)  # of calibration and test when there are none; the rest is learnt from
_KINDS = (*synthesis.LOCAL_KINDS, *synthesis.ANOMALOUS_VARIATIONS)


def build_dataset(
    source: FolderReading, target: Path | str, sizes: Any, *, seed: int, kinds: Sequence[str] = TEST_KINDS,
    kinds_held_out: Sequence[str] = synthesis.HELD_OUT_KINDS,
) -> Path:  # fmt: skip
    """Make and freeze a dataset in the MVTec layout; returns the path of ``manifest.csv``.
    A frozen one of the same source and settings is kept, whatever library or machine made it; else it is made again,
    and that is said. Pictures of one source picture (``group``) stay in one split; where they are too few, ``limits``
    in ``manifest.json`` says so. Damage is done to test normals only, and the source's own anomalies are all kept.
    ``sizes`` is a :class:`helpers.profiles.DataSettings`; ``kinds`` are what the test set shows, ``kinds_held_out``
    what of it no training may use (``ValueError``: unknown). ``DatasetError``: ``target`` holds something else."""
    unknown = [kind for kind in (*kinds, *kinds_held_out) if kind not in _KINDS]
    if unknown or not kinds:
        raise ValueError(f"Kinds {', '.join(unknown) or 'are none'}: allowed are {', '.join(_KINDS)}.")
    settings = {**asdict(sizes), "seed": seed, "count_real": source.count_real, "kinds": list(kinds)}
    settings["kinds_held_out"] = sorted(kinds_held_out, key=_KINDS.index)
    target, here = Path(os.path.abspath(target)), {**results.versions(), "machine": results.machine()}
    identity = source.identity or manifest.dataset_hash(source.samples)
    info = {"settings": settings, "sources_hash": identity, "machine": here}
    why = _why_made(target, info)
    print(why or f"{target} is complete: nothing to do.")
    if why:
        _write(source, target, info)
    made = files.read_json(target / manifest.MANIFEST_JSON)
    # On another machine the same plan may draw pixels a grey level apart.
    other = [f"{name} {was}, here {here[name]}" for name, was in made["machine"].items() if was != here.get(name, was)]
    notes = [f"it was made with {'; '.join(other)}, and is kept as it is"] if other else []
    for note in (*notes, *made["notes"], *made["limits"].values()):
        print(f"Note: {note}")
    return target / manifest.MANIFEST_CSV


def _why_made(target: Path, info: Mapping[str, Any]) -> str:
    """A sentence on why the dataset is made (again); "" when the frozen one is to be kept."""
    mark = target / manifest.MANIFEST_JSON
    old = files.read_json(mark) if mark.exists() else {}
    if "sources_hash" not in old:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DatasetError(f"{target} holds other files. Give an empty folder for the dataset, or move them away.")
        return f"The dataset is made in {target}."
    was, now = ({**one["settings"], "hash of the source pictures": one["sources_hash"]} for one in (old, info))
    changed = [f"{name} was {was.get(name)}, is {value}" for name, value in now.items() if was.get(name) != value]
    try:
        manifest.open_dataset(target)
    except (FileNotFoundError, DatasetError) as error:
        changed.append(str(error).rstrip("."))
    return f"The dataset in {target} is made again: {'; '.join(changed)}." if changed else ""


@dataclass(frozen=True)
class Job(Sample):
    """A picture to write: its path in the dataset, its source's mask, and the file or picture that it is made of."""

    origin: str = GENUINE
    source_path: str = ""


def plan(samples: Sequence[Sample], settings: Mapping[str, Any]) -> tuple[list[Job], list[str], dict[str, str]]:
    """All pictures to make of usable source pictures, notes, and a sentence on the limits of each artwork with few."""
    jobs, notes, limits, folders = [], [], {}, set()
    samples = [replace(s, group=f"{s.category}/{s.group.removeprefix(f'{s.category}/')}") for s in samples]
    for category in sorted({sample.category for sample in samples}):
        mine = sorted((s for s in samples if s.category == category), key=lambda s: (s.group, s.split != "test"))
        normals, real = ([s for s in mine if s.is_anomalous == is_anomalous] for is_anomalous in (False, True))
        if not normals:
            notes.append(f"{category} is left out: {len(real)} anomalous pictures and no genuine one to learn from.")
            continue
        copied = {sample.group for sample in real}
        groups = _split(normals, copied, settings["seed"])
        parts = {split: [s for s in normals if s.group in groups[split]] for split in SPLITS}
        n_train, n_calibration, n_test = map(len, groups.values())
        is_shared = not (n_calibration and n_test) or copied & {*groups["train"], *groups["calibration"]}
        words = "test pictures show what is learnt from, so every number is optimistic"
        words = words if is_shared else "thresholds and false-alarm rates are rough"
        if is_shared or min(n_calibration, n_test) < 3:
            found = f"{n_train} to learn from, {n_calibration} for thresholds, {n_test} to test"
            limits[category] = f"{results.category_label(category)} has few genuine pictures ({found}): {words}."
        jobs += _jobs(unique(clean(category), folders), parts, real, settings)
    return jobs, notes, limits


def _split(normals: Sequence[Sample], copied: set[str], seed: int) -> dict[str, list[str]]:
    """Source pictures of each split. What a test picture shows, or an anomalous one (``copied``), is tested on, if two
    others are left to learn from. A split without pictures of its own takes a share of those to learn from."""
    first = min((s.split for s in normals), key=SPLITS.index)  # learnt from, whatever it is called
    uses = [(s.group, "train" if s.split == first else s.split) for s in normals]
    learnt_first = {group: use for split in reversed(SPLITS) for group, use in uses if use == split}
    shown = {group for group, use in uses if use == "test"} | (copied & {*learnt_first})
    tested_first = learnt_first | dict.fromkeys(shown, "test")
    where = tested_first if [*tested_first.values()].count("train") >= 2 else learnt_first
    train, calibration, test = (sorted(group for group in where if where[group] == split) for split in SPLITS)
    train = [train[i] for i in synthesis.rng_for(seed, f"{normals[0].category}/splits").permutation(len(train))]
    n, share = len(train), CALIBRATION_SHARE if test else OWN_TEST_SHARES[0]
    n_calibration = 0 if calibration else min(max(1, round(share * n)), n - 1)
    n_test = 0 if test else min(max(1, round(OWN_TEST_SHARES[1] * n)), n - 1 - n_calibration)
    calibration, test = calibration or train[:n_calibration], test or train[n_calibration : n_calibration + n_test]
    if not calibration:  # one picture to learn from beside test pictures
        lent = min(max(1, round(CALIBRATION_SHARE * len(test))), len(test) - 1)
        calibration = [group for group in test if group not in copied][:lent]
    test = [group for group in test if group not in calibration]
    return {"train": train[n_calibration + n_test :], "calibration": calibration, "test": test}


def _jobs(folder: str, parts: dict[str, list[Sample]], real: list[Sample], settings: Mapping[str, Any]) -> list[Job]:
    """Every picture of one artwork: genuine ones, re-photographs, real anomalies, synthetic anomalies."""
    category, jobs, taken = next(s.category for found in parts.values() for s in found), [], set()

    def add(made_of: Sample, origin: str, split: str, kind: str, stem: str, mask: Path | None = None) -> None:
        # Calibration normals lie in train/good, as MVTec has no such folder; the manifest knows.
        path = unique(f"{folder}/{'test' if split == 'test' else 'train'}/{clean(kind)}/{stem}", taken)
        known = (category, kind != NORMAL_KIND, mask, split, kind, made_of.group)
        jobs.append(Job(Path(f"{path}.png"), *known, origin=origin, source_path=made_of.image_path.as_posix()))

    for split, found in parts.items():
        for sample in found:
            add(sample, GENUINE, split, NORMAL_KIND, clean(sample.image_path.stem))
    genuine = {split: [job for job in jobs if job.split == split] for split in SPLITS}
    lender = next(found for found in reversed(genuine.values()) if found)  # for a split without a picture of its own
    for (split, found), n_asked in zip(genuine.items(), ("n_train", "n_calibration", "n_test_normal")):
        for index, model in enumerate(_turns(found or lender, settings[n_asked] - len(found))):
            add(model, REPHOTOGRAPHED, split, NORMAL_KIND, f"{model.image_path.stem}~{index:03d}")
    for sample in sorted(real, key=lambda s: (s.kind, s.image_path)):
        add(sample, REAL, "test", sample.kind, clean(sample.image_path.stem), sample.mask_path)
    models = [job for job in jobs if job.split == "test" and not job.is_anomalous]
    order = synthesis.rng_for(settings["seed"], f"{category}/damage").permutation(len(models))
    n_made = settings["n_test_anomalous"] - len(real) * settings["count_real"]
    of_report = [kind for kind in settings["kinds"] if kind in synthesis.REPORT_KINDS]
    kinds = cycle([*settings["kinds"], *of_report])  # the report's have the largest share
    for index, model in enumerate(_turns([models[i] for i in order], n_made)):
        add(model, SYNTHETIC, "test", next(kinds), f"synthetic_{index:03d}")
    return jobs


def _turns(items: Sequence[Job], n: int) -> list[Job]:
    """``n`` items, one of each group after the other, again and again; within a group, one after the other."""
    groups = dict.fromkeys(item.group for item in items)
    cycles = [cycle([item for item in items if item.group == group]) for group in groups]
    return [next(one) for one in islice(cycle(cycles), max(0, n))]


def _write(source: FolderReading, target: Path, info: dict[str, Any]) -> None:
    """Make every picture in a folder beside ``target``, then records, manifest and mark; put it in the place."""
    work, made = target.with_name(f"{target.name}.partial"), {}
    jobs, notes, limits = plan(source.samples, info["settings"])
    shutil.rmtree(work, ignore_errors=True)
    make = partial(_make, folder=work, max_side=info["settings"]["max_image_side"], seed=info["settings"]["seed"])
    for origin in ORIGINS:  # each is made of pictures of those before it
        todo = [job for job in jobs if job.origin == origin]
        made |= zip(todo, thread_map(make, todo, max_workers=4, desc=f"writing {origin}", unit="picture", delay=10))
    pairs = [made[job] for job in sorted(jobs, key=lambda job: (job.category, SPLITS.index(job.split)))]
    files.write_text(work / RECORDS, "".join(f"{json.dumps(record, sort_keys=True)}\n" for _, record in pairs))
    info |= {"kinds_held_out": info["settings"]["kinds_held_out"], "left_out": source.listed()}
    manifest.write_manifest(work, [sample for sample, _ in pairs], info={**info, "notes": notes, "limits": limits})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work, target)


def _make(job: Job, folder: Path, max_side: int, seed: int) -> tuple[Sample, dict[str, Any]]:
    """Make one picture (and mask); how it came about is its record."""
    record, path = {"origin": job.origin, "source_path": job.source_path}, folder / job.image_path
    own_seed = mask = mask_path = None
    if job.origin in (GENUINE, REAL):
        image = images.load_image(job.source_path, max_side=max_side)
        if min(image.shape[:2]) < MIN_SIDE:
            image = images.load_image(job.source_path, max_side=4 * max_side)
            image = images.resize(image, max(max_side, round(MIN_SIDE * max(image.shape) / min(image.shape[:2]))))
        if job.mask_path is not None:
            mask = images.load_mask(job.mask_path, image.shape[:2], picture=Path(job.source_path))
    else:
        own_seed = synthesis.seed_for(seed, job.image_path.as_posix())
        rng, image = np.random.default_rng(own_seed), images.load_image(folder / job.source_path)
        if job.origin == REPHOTOGRAPHED:
            image, record["variations"] = synthesis.rephotograph(image, rng)
        elif job.kind in synthesis.LOCAL_KINDS:
            image, mask, more = synthesis.synthesize(image, job.kind, rng)
            record |= more
        else:
            image = synthesis.vary(image, job.kind, rng)
    images.save_png(path, image)
    if mask is not None and mask.any():
        mask_path = path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        images.save_png(mask_path, mask)
    made = {"synthesis_seed": own_seed, "visibility": record.get("visibility")}
    return replace(job, image_path=path, mask_path=mask_path, **made), record


def read_records(dataset: Dataset) -> pd.DataFrame:
    """A row for every picture: the fields of its :class:`~helpers.records.Sample`, ``origin``, ``source_path`` (what it
    was copied from or made of), ``variations`` of a re-photograph, and what ``synthesize`` says of an anomaly."""
    lines = (dataset.folder / RECORDS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) | vars(sample) for line, sample in zip(lines, dataset.samples)]
    return pd.DataFrame(rows).assign(source_path=[dataset.folder / row["source_path"] for row in rows])
