"""Source pictures -> one frozen dataset: splits by source picture, re-photographs, anomalies with masks; its tables.

Everything is saved as PNG: JPEG would change pixels outside the mask, and a detector could learn the compression."""

import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import PIL
import skimage
from tqdm.auto import tqdm

from helpers import files, synthesis
from helpers.data import images, manifest, sources
from helpers.data.layouts import FolderReading
from helpers.data.manifest import Dataset, mask_of
from helpers.data.names import DatasetError, clean, unique
from helpers.data.reading import read_folder
from helpers.records import NORMAL_KIND, SPLITS, Sample
from helpers.results import category_label, confirm

RECORDS = "synthesis.jsonl"  # how each picture of the dataset came about, in the manifest's order
ORIGINS = GENUINE, REPHOTOGRAPHED, REAL, SYNTHETIC = "genuine", "rephotographed", "real anomaly", "synthetic anomaly"
TEST_KINDS = synthesis.LOCAL_KINDS + synthesis.REPORT_VARIATIONS  # of synthetic anomalies in a test set by default
MIN_SIDE = 64  # pixels of a scroll's shorter side, at up to four times the longer side of the others
MOST_TIMES = 3  # genuine pictures beyond this many times the number asked for are left out, at random
CALIBRATION_SHARE = 0.3  # of the source pictures set thresholds, when there are test pictures of its own
OWN_TEST_SHARES = (0.2, 0.3)  # of calibration and test when there are none; the rest is learnt from
_KINDS = (*synthesis.LOCAL_KINDS, *synthesis.ANOMALOUS_VARIATIONS)
_MACHINE = {module.__name__: module.__version__ for module in (cv2, np, PIL, skimage)}
_MACHINE |= {"python": platform.python_version(), "machine": platform.processor() or platform.machine()}


def source_for(
    data_source: Path | str | None, *, builtin: str, target: Path, max_side: int, seed: int,
    difference: sources.Difference,
) -> FolderReading:  # fmt: skip
    """The user's pictures (a folder or CSV file), or built-in ones, written to ``target``, when there are none:
    ``"embedded"`` (two paintings; ``max_side`` pixels and ``seed`` are of their photographs) or ``"wikimedia"`` (Mona
    Lisa and Girl with a Pearl Earring, from the network; ``difference`` sorts further pictures of them)."""
    if data_source is not None:
        return read_folder(data_source)
    if builtin == "embedded":
        return sources.embedded_artworks(target, max_side=max_side, seed=seed)
    return sources.wikimedia(target, difference)


def build_dataset(
    source: FolderReading, target: Path | str, sizes: Any, *, seed: int, kinds: Sequence[str] = TEST_KINDS,
    kinds_held_out: Sequence[str] = synthesis.HELD_OUT_KINDS,
) -> Path:  # fmt: skip
    """Make and freeze a dataset in the MVTec layout; returns the path of ``manifest.csv``.

    A frozen one of the same source and settings is kept, whatever library or machine made it; it is made again, and
    that is said, when source pictures or settings changed or a file is gone. Pictures of one source picture (``group``)
    stay in one split; with one or two of them splits share one, and ``limits`` in ``manifest.json`` says so. Damage is
    done to test normals only, to each source picture about equally often; the source's own anomalies are all kept.

    Args:
        sizes: :class:`helpers.profiles.DataSettings`; the report's five kinds have the largest share of anomalies.
        kinds, kinds_held_out: what the test set shows, and what of it no training may use (``ValueError``: unknown).
    Raises:
        DatasetError: ``target`` holds something else."""
    unknown = [kind for kind in (*kinds, *kinds_held_out) if kind not in _KINDS]
    if unknown or not kinds:
        raise ValueError(f"Kinds {', '.join(unknown) or 'are none'}: allowed are {', '.join(_KINDS)}.")
    settings = {**asdict(sizes), "seed": seed, "count_real": source.count_real, "kinds": list(kinds)}
    settings["kinds_held_out"] = sorted(kinds_held_out, key=_KINDS.index)
    target, identity = Path(os.path.abspath(target)), source.identity or manifest.dataset_hash(source.samples)
    info = {"made_by": "build_dataset", "settings": settings, "sources_hash": identity, "machine": _MACHINE}
    reason = _reason_to_make(target, info)
    if reason is None:
        print(f"{target} is complete: nothing to do.")
    else:
        print(f"The dataset in {target} is made again: {reason}." if reason else f"The dataset is made in {target}.")
        _write(source, target, info)
    made = files.read_json(target / manifest.MANIFEST_JSON)
    # On another machine the same plan may draw pixels a grey level apart.
    other = [f"{name} {was}, here {_MACHINE[name]}" for name, was in made["machine"].items() if was != _MACHINE[name]]
    lines = [f"It was made with {'; '.join(other)}, and is kept as it is."] if other else []
    lines += [f"Note: {note}" for note in made["notes"]] + [f"Limit: {limit}" for limit in made["limits"].values()]
    print(*lines, sep="\n", end="\n" * bool(lines))
    return target / manifest.MANIFEST_CSV


def _reason_to_make(target: Path, info: Mapping[str, Any]) -> str | None:
    """None when the frozen dataset is to be kept, "" when there is none, else why it is made again."""
    mark = target / manifest.MANIFEST_JSON
    old = files.read_json(mark) if mark.exists() else {}
    if "sources_hash" not in old:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DatasetError(f"{target} holds other files. Give an empty folder for the dataset, or move them away.")
        return ""
    was, now = ({**one["settings"], "hash of the source pictures": one["sources_hash"]} for one in (old, info))
    changed = [f"{name} was {was.get(name)}, is {value}" for name, value in now.items() if was.get(name) != value]
    try:
        manifest.open_dataset(target)
        (target / RECORDS).stat()
    except (FileNotFoundError, DatasetError) as error:
        changed.append(str(error).rstrip("."))
    return "; ".join(changed) or None


@dataclass(frozen=True)
class Job(Sample):
    """A picture to write: its path in the dataset, its source's mask, and the file or picture that it is made of."""

    origin: str = GENUINE
    source_path: str = ""


def plan(samples: Sequence[Sample], settings: Mapping[str, Any]) -> tuple[list[Job], list[str], dict[str, str]]:
    """All pictures to make of usable source pictures, notes, and a sentence on the limits of each artwork with few;
    ``settings`` are those of ``manifest.json``, and the same input gives the same plan."""
    jobs, notes, limits, taken = [], [], {}, set()
    samples = [replace(s, group=f"{s.category}/{s.group.removeprefix(f'{s.category}/')}") for s in samples]
    for category in sorted({sample.category for sample in samples}):
        mine = sorted((s for s in samples if s.category == category), key=lambda s: (s.group, s.split != "test"))
        normals, real = ([s for s in mine if s.is_anomalous == is_anomalous] for is_anomalous in (False, True))
        if not normals:
            notes.append(f"{category} is left out: {len(real)} anomalous pictures and no genuine one to learn from.")
            continue
        copied = {sample.group for sample in real}
        groups = _split(normals, copied, settings["seed"])
        n_train, n_calibration, n_test = map(len, groups.values())
        words = "thresholds and false-alarm rates are rough" if min(n_calibration, n_test) < 3 else ""
        if copied & {*groups["train"], *groups["calibration"]}:
            words = "test pictures show what is learnt from, so every number is optimistic"
        elif not n_calibration or not n_test:
            words = "re-photographs of the same ones stand in for others, so numbers are optimistic"
        if words:
            found = f"{n_train} to learn from, {n_calibration} for thresholds, {n_test} to test"
            limits[category] = f"{category_label(category)} has few genuine pictures ({found}): {words}."
        parts = {split: [s for s in normals if s.group in groups[split]] for split in SPLITS}
        jobs += _jobs(parts, real, settings, notes, taken)
    return jobs, notes, limits


def _split(normals: Sequence[Sample], copied: set[str], seed: int) -> dict[str, list[str]]:
    """Source pictures of each split; ``copied`` are those that anomalous pictures show.

    What a test picture shows is tested on, if two others are left to learn from. A split without pictures of its own
    takes a share of those to learn from, at least one where one stays."""
    first = min((s.split for s in normals), key=SPLITS.index)  # learnt from, whatever it is called
    uses = [(s.group, "train" if s.split == first else s.split) for s in normals]
    learnt_first = {group: use for split in reversed(SPLITS) for group, use in uses if use == split}
    shown = {group for group, use in uses if use == "test"} | (copied & {*learnt_first})
    tested_first = learnt_first | dict.fromkeys(shown, "test")
    where = tested_first if [*tested_first.values()].count("train") >= 2 else learnt_first
    train, calibration, test = (sorted(group for group in where if where[group] == split) for split in SPLITS)

    def part(share: float, n: int, most: int) -> int:
        return int(np.clip(round(share * n), 1, most))

    rng, n = synthesis.rng_for(seed, f"{normals[0].category}/splits"), len(train)
    train = [train[index] for index in rng.permutation(n)]
    share = CALIBRATION_SHARE if test else OWN_TEST_SHARES[0]
    n_calibration = 0 if calibration else part(share, n, n - 1)
    n_test = 0 if test else part(OWN_TEST_SHARES[1], n, n - 1 - n_calibration)
    calibration, test = calibration or train[:n_calibration], test or train[n_calibration : n_calibration + n_test]
    if not calibration:  # one picture to learn from beside test pictures
        calibration = [group for group in test if group not in copied]
        calibration = calibration[: part(CALIBRATION_SHARE, len(test), len(test) - 1)]
    test = [group for group in test if group not in calibration]
    return {"train": train[n_calibration + n_test :], "calibration": calibration, "test": test}


def _jobs(
    parts: Mapping[str, Sequence[Sample]], real: Sequence[Sample], settings: Mapping[str, Any], notes: list[str],
    taken: set[str],
) -> list[Job]:  # fmt: skip
    """Every picture of one artwork: genuine ones, re-photographs, real anomalies, synthetic anomalies."""
    category = next(s.category for found in parts.values() for s in found)
    jobs, folder = [], unique(clean(category), taken)

    def add(made_of: Sample, origin: str, split: str, kind: str, stem: str, mask: Path | None = None) -> None:
        # Calibration normals lie in train/good, as MVTec has no such folder; the manifest knows.
        path = unique(f"{folder}/{'test' if split == 'test' else 'train'}/{clean(kind)}/{stem}", taken)
        known = (category, kind != NORMAL_KIND, mask, split, kind, made_of.group)
        jobs.append(Job(Path(f"{path}.png"), *known, origin=origin, source_path=made_of.image_path.as_posix()))

    n_asked = {split: settings[name] for split, name in zip(SPLITS, ("n_train", "n_calibration", "n_test_normal"))}
    rng = synthesis.rng_for(settings["seed"], f"{category}/limits")
    for split, found in parts.items():
        most = MOST_TIMES * n_asked[split]
        if len(found) > most:
            notes.append(f"{category}: {most} of {len(found)} genuine pictures for {split} are used.")
        for index in sorted(rng.permutation(len(found))[:most]):
            add(found[index], GENUINE, split, NORMAL_KIND, clean(found[index].image_path.stem))
    genuine = {split: [job for job in jobs if job.split == split] for split in SPLITS}
    lender = next(found for found in reversed(genuine.values()) if found)  # for a split without a picture of its own
    for split, found in genuine.items():
        for index, model in enumerate(_turns(found or lender, n_asked[split] - len(found))):
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
    partial, made = target.with_name(f"{target.name}.partial"), {}
    jobs, notes, limits = plan(source.samples, info["settings"])
    shutil.rmtree(partial, ignore_errors=True)
    with ThreadPoolExecutor(4) as pool:
        for origin in ORIGINS:  # each is made of pictures of those before it
            todo = [job for job in jobs if job.origin == origin]
            results = pool.map(_make, todo, repeat(partial), repeat(info["settings"]))
            made |= zip(todo, tqdm(results, desc=f"writing {origin}", total=len(todo), unit="picture", delay=10))
    pairs = [made[job] for job in sorted(jobs, key=lambda job: (job.category, SPLITS.index(job.split)))]
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) for _, record in pairs]
    files.write_text(partial / RECORDS, "\n".join(lines) + "\n")
    about = {"kinds_held_out": info["settings"]["kinds_held_out"], "notes": notes, "limits": limits}
    about["left_out"] = source.listed()
    manifest.write_manifest(partial, [sample for sample, _ in pairs], info=info | about)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def _make(job: Job, folder: Path, settings: Mapping[str, Any]) -> tuple[Sample, dict[str, Any]]:
    """Make one picture (and mask); how it came about is its record."""
    record = {name: getattr(job, name) for name in ("category", "split", "kind", "group", "origin", "source_path")}
    record["image_path"], path = job.image_path.as_posix(), folder / job.image_path
    seed = mask = mask_path = None
    if job.origin in (GENUINE, REAL):
        image = images.load_image(job.source_path, max_side=settings["max_image_side"])
        if min(image.shape[:2]) < MIN_SIDE:
            image = images.load_image(job.source_path, max_side=4 * settings["max_image_side"])
            side = round(MIN_SIDE * max(image.shape) / min(image.shape[:2]))
            image = images.resize(image, max(settings["max_image_side"], side))
        if job.mask_path is not None:
            mask = images.load_mask(job.mask_path, image.shape[:2], picture=Path(job.source_path))
    else:
        seed = synthesis.seed_for(settings["seed"], record["image_path"])
        rng, image = np.random.default_rng(seed), images.load_image(folder / job.source_path)
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
    seen = record.get("visibility")
    return replace(job, image_path=path, mask_path=mask_path, visibility=seen, synthesis_seed=seed), record


def read_records(dataset: Dataset) -> pd.DataFrame:
    """How each picture came about, a row for each ``sample``: ``origin``, ``source_path`` (the file it was copied from,
    or, relative to the dataset, the picture it was made of), ``variations`` of a re-photograph, and what
    :func:`helpers.synthesis.synthesize` says of a synthetic anomaly."""
    lines = (dataset.folder / RECORDS).read_text(encoding="utf-8").splitlines()
    return pd.DataFrame(map(json.loads, lines)).assign(sample=dataset.samples)


def gallery(samples: Iterable[Sample], *, n: int) -> list[tuple[str, np.ndarray]]:
    """Caption and picture (uint8 RGB, at most 512 pixels a side) of the first ``n`` of each artwork and kind."""
    table = pd.DataFrame([(s.category, s.kind, s) for s in samples], columns=["category", "kind", "sample"])
    shown = table.groupby(["category", "kind"]).head(n)["sample"]
    captions = [f"{s.kind}, {s.category}".replace("_", " ") if s.is_anomalous else s.image_path.stem for s in shown]
    return [(caption, images.load_image(s.image_path, max_side=512)) for caption, s in zip(captions, shown)]


def kind_examples(dataset: Dataset, *, category: str) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """One synthetic anomaly of each kind of an artwork, of middle visibility: kind, original and anomalous picture
    (uint8 RGB), mask (bool, None for a change of the whole picture)."""
    table, examples = read_records(dataset).sort_values("visibility", kind="stable"), []
    made = table[(table["category"] == category) & (table["origin"] == SYNTHETIC)]
    for kind in TEST_KINDS:
        mine = made[made["kind"] == kind]
        for row in mine[len(mine) // 2 :][:1].itertuples():
            original = images.load_image(dataset.folder / row.source_path)
            examples.append((kind, original, images.load_image(row.sample.image_path), mask_of(row.sample)))
    return examples


def zoomed(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The square around a mask, with as much again around it: uint8 RGB ``(h, w, 3)``, cut at the border."""
    rows, columns = np.nonzero(mask)
    middle = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) // 2
    half = max(24, round(0.75 * max(np.ptp(rows), np.ptp(columns))))
    top, left = np.maximum(np.minimum(middle - half, np.array(mask.shape) - 2 * half), 0)
    return image[top : top + 2 * half, left : left + 2 * half]


def summary(dataset: Dataset) -> pd.DataFrame:
    """Pictures per artwork and split: a column per origin, and the true number of genuine sources."""
    rows = read_records(dataset)
    table = pd.crosstab([rows["category"], rows["split"]], rows["origin"])
    order = [(category, split) for category in dataset.categories for split in SPLITS]
    table = table.reindex(order, columns=list(ORIGINS), fill_value=0).rename_axis(["artwork", "split"])
    table["source pictures"] = [dataset.n_sources(category, split) for category, split in order]
    return table.rename_axis(None, axis=1)


def check_dataset(dataset: Dataset) -> None:
    """Check on the files what later notebooks rely on, a line each; what does not hold is an AssertionError."""
    records, n_changed = read_records(dataset), 0
    made = [row for row in records[records["origin"] == SYNTHETIC].itertuples() if row.sample.mask_path]
    for row in made:
        before, after = map(images.load_image, (dataset.folder / row.source_path, row.sample.image_path))
        n_changed += int((before != after)[~mask_of(row.sample)].sum())
    places = {(s.category, s.sha256, s.split) for s in dataset.samples}
    confirm(
        {
            "no file stands in two splits": len(places) == len({place[:2] for place in places}),
            "every local damage has a mask": all(
                s.mask_path for s in dataset.samples if s.kind in synthesis.LOCAL_KINDS
            ),
            f"outside the masks of {len(made)} damaged pictures no pixel differs": n_changed == 0,
        }
    )
