"""Source pictures -> one frozen dataset: splits by source picture, re-photographs, anomalies with masks.

The dataset is written in the MVTec layout with ``manifest.csv``; ``synthesis.jsonl`` beside it says how each picture
came about. Everything is saved as PNG: JPEG would change pixels outside the mask, and a detector could learn the
compression instead of the damage.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files, synthesis
from helpers.data import images, manifest, sources
from helpers.data.names import DatasetError
from helpers.data.reading import read_folder
from helpers.data.splits import ORIGINS, Job, Picture, plan
from helpers.records import NORMAL_KIND, SPLITS, Sample

if TYPE_CHECKING:
    pass

RECORDS = "synthesis.jsonl"
TEST_KINDS = synthesis.LOCAL_KINDS + synthesis.REPORT_VARIATIONS
"""Kinds of synthetic anomalies in a test set by default."""

MIN_SIDE = 64
"""Shorter side in pixels that slender pictures (scrolls) keep, at up to four times the longer side of the others."""
_MADE_BY = ("build_dataset", "assemble.build_dataset")
_THREADS = 4


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
    """The user's pictures, or built-in ones when there are none.

    Args:
        data_source: the user's folder or CSV file, or None.
        builtin: used when ``data_source`` is None: ``"embedded"`` (two painted pictures, offline) or ``"wikimedia"``
            (the Mona Lisa and Girl with a Pearl Earring, network).
        target: folder that the built-in pictures are written to.
        max_side: longer side of embedded pictures in pixels.
        seed: of the embedded pictures.
        is_genuine: see :func:`helpers.data.sources.wikimedia`.
    Raises:
        FileNotFoundError, DatasetError: the folder is missing or not understood (:func:`helpers.data.read_folder`).
        helpers.data.sources.SourceError: the network is missing.
        ValueError: unknown ``builtin``.
    """
    if data_source is not None:
        reading = read_folder(data_source)
        return Source(reading.samples, reading.describe(), reading.notes)
    if builtin == "embedded":
        found = sources.embedded_artworks(target, max_side=max_side, seed=seed)
        words = "two painted pictures that ship with the suite, each photographed by 30 simulated cameras"
        return Source(tuple(found), _described(words, found), count_real=True, identity=f"embedded {max_side} {seed}")
    if builtin == "wikimedia":
        found = sources.wikimedia(target, is_genuine=is_genuine)
        words = "public-domain reproductions from Wikimedia Commons"
        return Source(tuple(found), _described(words, found), identity="wikimedia")
    raise ValueError(f"No built-in pictures {builtin!r}; there are 'embedded' and 'wikimedia'. Or set ART_DATA.")


def build_dataset(
    source: Source,
    target: Path | str,
    sizes: Any,
    *,
    seed: int,
    kinds: Sequence[str] = TEST_KINDS,
    kinds_held_out: Sequence[str] = synthesis.HELD_OUT_KINDS,
    remake: bool = False,
) -> Path:
    """Make and freeze a dataset. A frozen one of the same source and settings is kept, whatever library or machine
    made it; it is made again, and that is said, when the source pictures or settings changed or a file is gone.

    Pictures of one source picture (``group``) stay in one split. Where there are fewer genuine pictures than asked
    for, they are photographed again; where there are more, up to :data:`MOST_TIMES` as many are used. Damage is done
    to test normals only, genuine and re-photographed, to each source picture about equally often, so that an anomalous
    picture differs from a normal one by the damage. The source's own anomalous pictures are all kept, for testing
    only. With one or two genuine pictures of an artwork, splits share a source picture: ``limits`` in
    ``manifest.json`` says so in a sentence per artwork. An artwork that cannot be used is left out by name.

    Args:
        source: see :class:`Source`.
        target: folder of the dataset.
        sizes: has ``max_image_side`` (pixels) and, per artwork, ``n_train``, ``n_calibration``, ``n_test_normal`` and
            ``n_test_anomalous``: synthetic anomalies, spread over ``kinds``, the report's five with the largest share.
        seed: decides about splits and every synthetic picture.
        kinds: local kinds, and anomalous changes of the whole picture (which have no mask).
        kinds_held_out: local kinds that no training may use (recorded for the later notebooks).
        remake: make it again in any case.
    Returns:
        path of ``manifest.csv``.
    Raises:
        ValueError: a count is out of range or a kind is unknown.
        DatasetError: no genuine picture can be read, one picture is labelled normal and anomalous, or ``target``
            holds something else.
    """
    settings = _settings(sizes, seed, kinds, kinds_held_out, source.count_real)
    target = Path(os.path.abspath(target))
    pictures = [_completed(sample) for sample in source.samples]
    identity = source.identity or files.sha256_json(sorted(_fingerprints(pictures)))
    reason = "asked for" if remake and target.exists() else _reason_to_make(target, pictures, settings, identity)
    if reason is None:
        info = files.read_json(target / manifest.MANIFEST_JSON)
        print(f"{target} is complete: nothing to do.{_other_machine(info)}")
        _print_outcome(info)
        return target / manifest.MANIFEST_CSV
    if reason:
        print(f"The dataset in {target} is made again: {reason}.")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    readable, left_out = _read(pictures, partial / "_source", sizes.max_image_side)
    jobs, notes, limits = plan(readable, settings)
    if not jobs:
        listed = "\n".join(f"  {path}: {why}" for path, why in left_out[:12])
        shutil.rmtree(partial, ignore_errors=True)
        raise DatasetError(
            f"None of the {len(pictures)} source pictures is a readable normal one, so there is nothing to learn "
            f"from. Left out: {len(left_out)}\n{listed}"
        )
    rows = _write_pictures(jobs, partial, seed, sizes.max_image_side)
    info = {
        "made_by": _MADE_BY[0],
        "settings": settings,
        "sources_hash": identity,
        "kinds_held_out": settings["kinds_held_out"],
        "training_kinds": [kind for kind in synthesis.LOCAL_KINDS if kind not in kinds_held_out],
        "test_kinds": settings["kinds"],
        "notes": [*source.notes, *notes],
        "limits": limits,
        "left_out": [{"path": str(path), "reason": why} for path, why in left_out],
        "machine": _machine(),
    }
    _freeze(partial, rows, info)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    _print_outcome(info)
    return target / manifest.MANIFEST_CSV


# --- is there anything to do? ----------------------------------------------------------------------------------------


def _settings(
    sizes: Any, seed: int, kinds: Sequence[str], kinds_held_out: Sequence[str], count_real: bool
) -> dict[str, Any]:
    counts = {name: getattr(sizes, name) for name in ("n_train", "n_calibration", "n_test_normal", "n_test_anomalous")}
    for name, n in counts.items():
        least = 0 if name == "n_test_anomalous" else 1
        if n < least:
            raise ValueError(f"{name} is {n}; at least {least} per artwork is needed.")
    known = (*synthesis.LOCAL_KINDS, *synthesis.ANOMALOUS_VARIATIONS)
    unknown = [kind for kind in (*kinds, *kinds_held_out) if kind not in known]
    if unknown or not kinds:
        raise ValueError(f"Kinds {', '.join(unknown) or 'are none'}: allowed are {', '.join(known)}.")
    held_out = sorted(kinds_held_out, key=known.index)
    more = {"max_image_side": sizes.max_image_side, "seed": seed, "count_real": count_real}
    return {**counts, **more, "kinds": list(kinds), "kinds_held_out": held_out}


def _fingerprints(samples: Sequence[Sample]) -> Iterator[list[Any]]:
    """What of each source picture decides about the dataset: neither its folder nor the names of groups do, but
    which pictures share a group does."""
    first: dict[str, str] = {}
    for sample in sorted(samples, key=lambda s: (s.image_path.name, s.image_path)):
        masks = [] if sample.mask_path is None else images.mask_files(sample.mask_path)
        hashes = [files.sha256_file(p) if p.is_file() else "missing" for p in (sample.image_path, *masks)]
        leader = first.setdefault(sample.group, hashes[0])
        yield [sample.category, sample.split, sample.kind, sample.image_path.name, leader, *hashes]


def _reason_to_make(target: Path, samples: Sequence[Sample], settings: Mapping[str, Any], identity: str) -> str | None:
    """None when the frozen dataset is to be kept, "" when there is none, else why it is made again."""
    inside = next((s.image_path for s in samples if s.image_path.is_relative_to(target)), None)
    if inside is not None:
        raise DatasetError(f"{inside} lies in the folder of the dataset that would replace it. Choose another folder.")
    mark = target / manifest.MANIFEST_JSON
    info = files.read_json(mark) if mark.exists() else {}
    if info.get("made_by") not in _MADE_BY:
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
    """Versions and machine: the same plan on another one may draw pixels a grey level apart."""
    import cv2
    import PIL
    import skimage

    versions = {module.__name__: module.__version__ for module in (cv2, np, PIL, skimage)}
    return {**versions, "python": platform.python_version(), "machine": platform.machine(), "cpu": _cpu()}


def _cpu() -> str:
    found = (
        re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return found[1] if found else platform.processor()


def _other_machine(info: Mapping[str, Any]) -> str:
    then, now = info.get("machine", {}), _machine()
    other = [f"{name} {then[name]}, here {value}" for name, value in now.items() if then.get(name, value) != value]
    return f" (Made with {'; '.join(other)}: it is kept as it is.)" if other else ""


# --- reading and writing ---------------------------------------------------------------------------------------------


def _read(samples: Sequence[Sample], folder: Path, max_side: int) -> tuple[list[Picture], list[tuple[Path, str]]]:
    """Source pictures at the dataset's resolution, written to ``folder``; files left out and why."""
    from tqdm.auto import tqdm

    def read(numbered: tuple[int, Sample]) -> tuple[Path, str, str, str]:
        staged, sample = folder / f"{numbered[0]:05d}.png", numbered[1]
        try:
            image = _at_resolution(sample.image_path, max_side)
            images.save_png(staged, image)
        except (images.ImageError, OSError) as error:
            return staged, "", str(error), ""
        return staged, images.pixel_hash(image), "", _stage_mask(sample, staged, image.shape[:2])

    with ThreadPoolExecutor(_THREADS) as pool:
        work = pool.map(read, enumerate(samples))
        done = list(tqdm(work, total=len(samples), desc="reading sources", unit="picture", delay=3))
    left_out, kept, first, leader = [], [], {}, {}
    for sample, (staged, pixels, problem, mask_problem) in zip(samples, done):
        if problem:
            left_out.append((sample.image_path, problem))
            continue
        if mask_problem:
            left_out.append((sample.mask_path, mask_problem))
        twin = first.setdefault((sample.category, pixels), sample)  # the same pixels in another file format
        if twin.is_anomalous != sample.is_anomalous:
            raise DatasetError(
                f"{twin.image_path} ({twin.kind}) and {sample.image_path} ({sample.kind}) are the same picture. "
                "Delete the wrong one and run this again."
            )
        leader[sample.group] = leader.get(twin.group, twin.group)
        kept.append(Picture(sample, staged))
    return [Picture(replace(sample, group=leader[sample.group]), staged) for sample, staged in kept], left_out


def _stage_mask(sample: Sample, staged: Path, shape: tuple[int, int]) -> str:
    """Write the mask beside the staged picture, if there is one; say what is wrong with it."""
    if not sample.is_anomalous or sample.mask_path is None:
        return ""
    try:
        mask = images.load_mask(sample.mask_path, shape, picture=sample.image_path)
    except (images.ImageError, OSError) as error:
        return f"{error} (the picture is kept without a mask)"
    if not mask.any():
        return "the mask is empty although the picture is anomalous (the picture is kept without a mask)"
    images.save_png(_mask_beside(staged), mask)
    return ""


def _mask_beside(staged: Path | str) -> Path:
    return Path(staged).with_name(f"{Path(staged).stem}_mask.png")


def _at_resolution(path: Path, max_side: int) -> np.ndarray:
    """The picture with its longer side at ``max_side``; a slender one larger, so that its shorter side is kept."""
    image = images.load_image(path, max_side=max_side)
    if min(image.shape[:2]) < MIN_SIDE:
        image = images.load_image(path, max_side=4 * max_side)
        slender = max(image.shape[:2]) / min(image.shape[:2])
        image = images.resize(image, max(max_side, round(MIN_SIDE * slender)))
    if min(image.shape[:2]) < MIN_SIDE // 2:
        height, width = image.shape[:2]
        raise images.ImageError(
            f"{path} is {width} x {height} px here; at least {MIN_SIDE // 2} a side are needed. Give a larger "
            "picture, or cut a long scroll into parts."
        )
    return image


def _write_pictures(jobs: Sequence[Job], folder: Path, seed: int, max_side: int) -> list[dict[str, Any]]:
    """Write every picture; records in the order of the jobs."""
    from tqdm.auto import tqdm

    rows: dict[str, dict[str, Any]] = {}
    with (
        tqdm(total=len(jobs), desc="writing dataset", unit="picture", delay=3) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        # Each stage is made of pictures of the stages before it.
        for stage in ((ORIGINS[0], ORIGINS[2]), (ORIGINS[1],), (ORIGINS[3],)):
            todo = [job for job in jobs if job.origin in stage]
            for row in pool.map(lambda job: _make(job, folder, seed, max_side), todo):
                rows[row["image_path"]] = row
                bar.update()
    shutil.rmtree(folder / "_source")
    return [rows[job.path] for job in jobs]


def _make(job: Job, folder: Path, seed: int, max_side: int) -> dict[str, Any]:
    """Make one picture (and mask) and return its record."""
    record: dict[str, Any] = {}
    mask = synthesis_seed = mask_path = None
    if job.kind != NORMAL_KIND:
        artwork, _, kind, name = job.path.split("/")
        mask_path = f"{artwork}/ground_truth/{kind}/{name.removesuffix('.png')}_mask.png"
    if job.origin in (ORIGINS[0], ORIGINS[2]):
        _move(Path(job.source), folder / job.path)
        mask_path = mask_path if mask_path and _move(_mask_beside(job.source), folder / mask_path) else None
    else:
        model = images.load_image(folder / job.source)
        synthesis_seed = synthesis.seed_for(seed, job.path)
        rng = np.random.default_rng(synthesis_seed)
        if job.origin == ORIGINS[1]:
            image, record["variations"] = synthesis.rephotograph(model, rng)
        elif job.kind in synthesis.LOCAL_KINDS:
            image, mask, record = synthesis.synthesize(model, job.kind, rng)
        else:
            image = synthesis.vary(model, job.kind, rng)
        images.save_png(folder / job.path, image)
        if mask is None:
            mask_path = None
        else:
            images.save_png(folder / mask_path, mask)
    return {
        **record,
        "image_path": job.path,
        "mask_path": mask_path,
        "category": job.category,
        "split": job.split,
        "kind": job.kind,
        "group": job.group,
        "origin": job.origin,
        "source_path": job.original or job.source,
        "synthesis_seed": synthesis_seed,
    }


def _move(source: Path, target: Path) -> bool:
    """Move a file, if it is there, into a folder that may be new."""
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    return target.exists()


def _freeze(folder: Path, rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> None:
    """Records, manifest, and last ``manifest.json``."""
    rows = sorted(rows, key=lambda row: (row["category"], SPLITS.index(row["split"])))
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    files.write_text(folder / RECORDS, "\n".join(lines) + "\n")
    samples = [
        Sample(
            image_path=folder / row["image_path"],
            category=row["category"],
            is_anomalous=row["kind"] != NORMAL_KIND,
            mask_path=None if row["mask_path"] is None else folder / row["mask_path"],
            split=row["split"],
            kind=row["kind"],
            group=row["group"],
            visibility=row.get("visibility"),
            synthesis_seed=row["synthesis_seed"],
        )
        for row in rows
    ]
    manifest.write_manifest(folder, samples, info=info)


def _completed(sample: Sample) -> Sample:
    """A sample with absolute paths and with a group that names its artwork."""
    path = Path(os.path.abspath(sample.image_path))
    group = sample.group or path.stem
    group = group if group.startswith(f"{sample.category}/") else f"{sample.category}/{group}"
    mask = None if sample.mask_path is None else Path(os.path.abspath(sample.mask_path))
    return replace(sample, image_path=path, group=group, mask_path=mask)


# --- words -----------------------------------------------------------------------------------------------------------


def _print_outcome(info: Mapping[str, Any]) -> None:
    for note in info["notes"]:
        print(f"Note: {note}")
    for category, limit in info["limits"].items():
        print(f"Limit of {category}: {limit}")
    left_out = info["left_out"]
    print(*[f"Left out: {file['path']}: {file['reason']}" for file in left_out[:12]], sep="\n", end="")
    if len(left_out) > 12:
        print(f"\n... and {len(left_out) - 12} more files left out (all in {manifest.MANIFEST_JSON})")


def _described(words: str, samples: Sequence[Sample]) -> str:
    lines = [words]
    for category in sorted({sample.category for sample in samples}):
        kinds = Counter(sample.kind for sample in samples if sample.category == category)
        genuine = kinds.pop(NORMAL_KIND, 0)
        lines.append(f"  {category}: " + ", ".join([f"{genuine} genuine", *(f"{n} {k}" for k, n in kinds.items())]))
    return "\n".join(lines)
