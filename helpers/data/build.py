"""Source pictures -> one frozen dataset: splits by source picture, re-photographs, anomalies with masks.

The dataset is written in the MVTec layout with ``manifest.csv``; ``synthesis.jsonl`` beside it says how each picture
came about. Everything is saved as PNG: JPEG would change pixels outside the mask, and a detector could learn the
compression instead of the damage.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import skimage
from tqdm.auto import tqdm

from helpers import files, synthesis
from helpers.data import images, manifest, sources, splits
from helpers.data.names import DatasetError
from helpers.data.reading import read_folder
from helpers.records import NORMAL_KIND, SPLITS, Sample

RECORDS = "synthesis.jsonl"
TEST_KINDS = synthesis.LOCAL_KINDS + synthesis.REPORT_VARIATIONS
"""Kinds of synthetic anomalies in a test set by default."""
MIN_SIDE = 64
"""Shorter side in pixels that slender pictures (scrolls) keep, at up to four times the longer side of the others."""


@dataclass(frozen=True)
class Source:
    """Pictures to make a dataset of.

    Attributes:
        samples: absolute paths; splits as the source has them.
        description: the source in words, several lines.
        notes: what the user should know about it.
        count_real: True when the source's anomalous pictures count towards the number of anomalies asked for.
        identity: what stands for the pictures when a frozen dataset is compared with its source; by default the
            files' hashes. Built-in pictures have a name, so that no other machine or library remakes a dataset.
    """

    samples: tuple[Sample, ...]
    description: str = ""
    notes: tuple[str, ...] = ()
    count_real: bool = False
    identity: str = ""


def source_for(
    data_source: Path | str | None,
    *,
    builtin: str,
    target: Path | str,
    max_side: int,
    seed: int,
    is_genuine: Callable[[np.ndarray, np.ndarray], bool] | None = None,
) -> Source:
    """The user's pictures (a folder or CSV file), or built-in ones, written to ``target``, when there are none.

    Args:
        builtin: ``"embedded"`` (two paintings, offline; ``max_side`` pixels and ``seed`` are of their photographs) or
            ``"wikimedia"`` (the Mona Lisa and Girl with a Pearl Earring, network).
        is_genuine: see :func:`helpers.data.sources.wikimedia`.
    Raises:
        FileNotFoundError, DatasetError: the folder is missing or not understood (:func:`helpers.data.read_folder`).
        helpers.data.sources.SourceError: the network is missing.
    """
    if data_source is not None:
        reading = read_folder(data_source)
        return Source(reading.samples, reading.describe(), reading.notes)
    if builtin == "embedded":
        found = sources.embedded_artworks(target, max_side=max_side, seed=seed)
        words = "two painted pictures that ship with the suite, photographed by simulated cameras"
        identity = f"embedded {max_side} {seed}"
    else:
        found = sources.wikimedia(target, is_genuine=is_genuine)
        asked_for = [[work.file for work in sources.WORKS], is_genuine is not None]  # what Commons holds may drift
        words, identity = "public-domain reproductions from Wikimedia Commons", files.sha256_json(asked_for)
    for category in sorted({sample.category for sample in found}):
        kinds = Counter("genuine" if s.kind == NORMAL_KIND else s.kind for s in found if s.category == category)
        words += f"\n  {category}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return Source(tuple(found), words, count_real=builtin == "embedded", identity=identity)


def build_dataset(
    source: Source,
    target: Path | str,
    sizes: Any,
    *,
    seed: int,
    kinds: Sequence[str] = TEST_KINDS,
    kinds_held_out: Sequence[str] = synthesis.HELD_OUT_KINDS,
) -> Path:
    """Make and freeze a dataset. A frozen one of the same source and settings is kept, whatever library or machine
    made it; it is made again, and that is said, when source pictures or settings changed or a file is gone.

    Pictures of one source picture (``group``) stay in one split; with one or two of them splits share one, and
    ``limits`` in ``manifest.json`` says so. Damage is done to test normals only, to each source picture about equally
    often, so that an anomalous picture differs from a normal one by the damage. The source's own anomalous pictures
    are all kept, for testing only. An artwork or a file that cannot be used is left out by name.

    Args:
        sizes: has ``max_image_side`` (pixels) and, per artwork, ``n_train``, ``n_calibration``, ``n_test_normal`` and
            ``n_test_anomalous``: synthetic anomalies, spread over ``kinds``, the report's five with the largest share.
        seed: decides about splits and every synthetic picture.
        kinds: local kinds, and anomalous changes of the whole picture (which have no mask).
        kinds_held_out: local kinds that no training may use (recorded for the later notebooks).
    Returns:
        path of ``manifest.csv``.
    Raises:
        ValueError: a kind is unknown.
        DatasetError: there is no readable genuine picture, or ``target`` holds something else.
    """
    settings = _settings(sizes, seed, kinds, kinds_held_out, source.count_real)
    target = Path(os.path.abspath(target))
    samples = [_completed(sample) for sample in source.samples]
    identity = source.identity or files.sha256_json(_fingerprints(samples))
    reason = _reason_to_make(target, samples, settings, identity)
    if reason is None:
        print(f"{target} is complete: nothing to do.")
        _print_outcome(files.read_json(target / manifest.MANIFEST_JSON))
        return target / manifest.MANIFEST_CSV
    if reason:
        print(f"The dataset in {target} is made again: {reason}.")
    problems = list(_in_threads(lambda sample: _problem(sample, sizes.max_image_side), samples, "reading sources"))
    left_out = [{"path": str(s.image_path), "reason": why} for s, why in zip(samples, problems) if why]
    jobs, notes, limits = splits.plan([s for s, why in zip(samples, problems) if not why], settings)
    if not jobs:
        raise DatasetError(
            f"None of the {len(samples)} source pictures is a readable normal one, so there is nothing to learn from."
            + "".join(f"\n  {file['path']}: {file['reason']}" for file in left_out[:12])
        )
    training_kinds = [kind for kind in synthesis.LOCAL_KINDS if kind not in kinds_held_out]
    info = {"made_by": "build_dataset", "settings": settings, "sources_hash": identity, "machine": _machine()}
    info |= {"kinds_held_out": settings["kinds_held_out"], "training_kinds": training_kinds, "test_kinds": list(kinds)}
    info |= {"notes": notes, "source_notes": list(source.notes), "limits": limits, "left_out": left_out}
    _write(jobs, target, info)
    _print_outcome(info)
    return target / manifest.MANIFEST_CSV


def _settings(
    sizes: Any, seed: int, kinds: Sequence[str], kinds_held_out: Sequence[str], count_real: bool
) -> dict[str, Any]:
    names = ("max_image_side", "n_train", "n_calibration", "n_test_normal", "n_test_anomalous")
    settings = {name: getattr(sizes, name) for name in names}
    known = (*synthesis.LOCAL_KINDS, *synthesis.ANOMALOUS_VARIATIONS)
    unknown = [kind for kind in (*kinds, *kinds_held_out) if kind not in known]
    if unknown or not kinds:
        raise ValueError(f"Kinds {', '.join(unknown) or 'are none'}: allowed are {', '.join(known)}.")
    held_out = sorted(kinds_held_out, key=known.index)
    return settings | {"seed": seed, "count_real": count_real, "kinds": list(kinds), "kinds_held_out": held_out}


def _completed(sample: Sample) -> Sample:
    """A sample with absolute paths and with a group that names its artwork."""
    group = f"{sample.category}/{(sample.group or sample.image_path.stem).removeprefix(f'{sample.category}/')}"
    mask = sample.mask_path and Path(os.path.abspath(sample.mask_path))
    return replace(sample, image_path=Path(os.path.abspath(sample.image_path)), group=group, mask_path=mask)


def _fingerprints(samples: Sequence[Sample]) -> list[list[Any]]:
    """What of the source pictures decides about the dataset: not folders or names of groups, but who shares one."""
    first: dict[str, str] = {}
    rows = []
    for sample in sorted(samples, key=lambda s: (s.image_path.name, s.image_path)):
        masks = [] if sample.mask_path is None else images.mask_files(sample.mask_path)
        hashes = [files.sha256_file(p) if p.is_file() else "missing" for p in (sample.image_path, *masks)]
        leader = first.setdefault(sample.group, hashes[0])
        rows.append([sample.category, sample.split, sample.kind, sample.image_path.name, leader, *hashes])
    return sorted(rows)


def _reason_to_make(target: Path, samples: Sequence[Sample], settings: Mapping[str, Any], identity: str) -> str | None:
    """None when the frozen dataset is to be kept, "" when there is none, else why it is made again."""
    inside = next((s.image_path for s in samples if s.image_path.is_relative_to(target)), None)
    if inside is not None:
        raise DatasetError(f"{inside} lies in the folder of the dataset that would replace it. Choose another folder.")
    mark = target / manifest.MANIFEST_JSON
    info = files.read_json(mark) if mark.exists() else {}
    if not str(info.get("made_by")).endswith("build_dataset"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DatasetError(f"{target} holds other files. Give an empty folder for the dataset, or move them away.")
        return ""
    try:
        manifest.open_dataset(target)
        files.sha256_file(target / RECORDS)
    except (FileNotFoundError, DatasetError) as error:
        return str(error).rstrip(".")
    old = info["settings"]
    changed = [f"{name} was {old.get(name)}, is {new}" for name, new in settings.items() if old.get(name) != new]
    if changed:
        return f"other settings ({'; '.join(changed)})"
    if info.get("sources_hash") != identity:
        return "the source pictures (files, labels, masks or groups) are not those it was made of"
    return None


def _machine() -> dict[str, str]:
    """Versions and machine: on another one, the same plan may draw pixels a grey level apart."""
    versions = {module.__name__: module.__version__ for module in (cv2, np, PIL, skimage)}
    return {**versions, "python": platform.python_version(), "machine": platform.processor() or platform.machine()}


def _print_outcome(info: Mapping[str, Any]) -> None:
    now, left_out = _machine(), info["left_out"]
    other = [f"{name} {value}, here {now[name]}" for name, value in info["machine"].items() if now[name] != value]
    lines = [f"It was made with {'; '.join(other)}, and is kept as it is."] if other else []
    lines += [f"Note: {note}" for note in info["notes"]] + [f"Limit: {limit}" for limit in info["limits"].values()]
    lines += [f"Left out: {file['path']}: {file['reason']}" for file in left_out[:12]]
    lines += [f"... and {len(left_out) - 12} more (all in {manifest.MANIFEST_JSON})"] if len(left_out) > 12 else []
    for line in lines:
        print(line)


def _in_threads(work: Callable[[Any], Any], items: Sequence[Any], words: str) -> Iterable[Any]:
    with ThreadPoolExecutor(4) as pool:
        yield from tqdm(pool.map(work, items), total=len(items), desc=words, unit="picture", delay=10)


def _problem(sample: Sample, max_side: int) -> str:
    """Why a picture cannot be used at the dataset's resolution; "" when it can."""
    try:
        _at_resolution(sample.image_path, max_side)
    except (images.ImageError, OSError) as error:
        return str(error)
    return ""


def _at_resolution(path: Path | str, max_side: int) -> np.ndarray:
    """The picture with its longer side at ``max_side``; a slender one larger, so that its shorter side is kept."""
    image = images.load_image(path, max_side=max_side)
    if min(image.shape[:2]) < MIN_SIDE:
        image = images.load_image(path, max_side=4 * max_side)
        slender = max(image.shape[:2]) / min(image.shape[:2])
        image = images.resize(image, max(max_side, round(MIN_SIDE * slender)))
    if min(image.shape[:2]) < MIN_SIDE // 2:
        raise images.ImageError(
            f"{path} is {image.shape[1]} x {image.shape[0]} px here; at least {MIN_SIDE // 2} a side are needed. Give "
            "a larger picture, or cut a long scroll into parts."
        )
    return image


def _write(jobs: Sequence[splits.Job], target: Path, info: Mapping[str, Any]) -> None:
    """Make every picture in a folder beside ``target``, then records, manifest and mark; put it in the place."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows = {}
    # Each stage is made of pictures of the stages before it.
    for stage in ((splits.GENUINE, splits.REAL), (splits.REPHOTOGRAPHED,), (splits.SYNTHETIC,)):
        todo = [job for job in jobs if job.origin in stage]
        for row in _in_threads(lambda job: _make(job, partial, info["settings"]), todo, f"writing {stage[0]}"):
            rows[row["image_path"]] = row
    ordered = sorted((rows[job.image_path] for job in jobs), key=lambda r: (r["category"], SPLITS.index(r["split"])))
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in ordered]
    files.write_text(partial / RECORDS, "\n".join(lines) + "\n")
    manifest.write_manifest(partial, [_sample(row, partial) for row in ordered], info=info)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


def _sample(row: Mapping[str, Any], folder: Path) -> Sample:
    same = {name: row[name] for name in ("category", "split", "kind", "group", "synthesis_seed")}
    mask = row["mask_path"] and folder / row["mask_path"]
    is_anomalous = row["kind"] != NORMAL_KIND
    return Sample(
        folder / row["image_path"], is_anomalous=is_anomalous, mask_path=mask, **same, visibility=row.get("visibility")
    )


def _make(job: splits.Job, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make one picture (and mask) and return its record."""
    record: dict[str, Any] = {**job._asdict(), "mask_source": None, "synthesis_seed": None, "mask_path": None}
    mask = None
    if job.origin in (splits.GENUINE, splits.REAL):
        image = _at_resolution(job.source_path, settings["max_image_side"])
        if job.mask_source is not None:
            mask = images.load_mask(job.mask_source, image.shape[:2], picture=job.source_path)
    else:
        record["synthesis_seed"] = synthesis.seed_for(settings["seed"], job.image_path)
        rng = np.random.default_rng(record["synthesis_seed"])
        image = images.load_image(folder / job.source_path)
        if job.origin == splits.REPHOTOGRAPHED:
            image, record["variations"] = synthesis.rephotograph(image, rng)
        elif job.kind in synthesis.LOCAL_KINDS:
            image, mask, more = synthesis.synthesize(image, job.kind, rng)
            record |= more
        else:
            image = synthesis.vary(image, job.kind, rng)
    images.save_png(folder / job.image_path, image)
    if mask is not None and mask.any():
        artwork, _, kind, name = job.image_path.split("/")
        record["mask_path"] = f"{artwork}/ground_truth/{kind}/{name.removesuffix('.png')}_mask.png"
        images.save_png(folder / record["mask_path"], mask)
    return record
