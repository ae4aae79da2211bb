"""Any folder -> samples: every picture is decoded once, so that bad files and copies are known before anything runs."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from tqdm.contrib.concurrent import thread_map

from helpers import files
from helpers.data import images, layouts, manifest, names
from helpers.data.layouts import FolderReading
from helpers.data.names import DatasetError
from helpers.records import SPLITS, Sample

NEAR_DUPLICATE_LIMIT = 0.02
"""Share of differing bits up to which two pictures show one scan. On 139 paintings JPEG at quality 30, size, brightness
and noise give 0, a box over 2.5 % 0.02, other scans 0.01 up; of crops by 1 to 3 % a side 88 to 98 % are noticed."""
_ZOOMS = (1, 1.02, 1.04, 1.06)  # the whole, and its middle without 1, 2 and 3 % a side


def read_folder(folder: Path | str) -> FolderReading:
    """Understand a folder in any supported layout, decode every picture once and look for copies; write nothing.
    ``FileNotFoundError``: there is no such folder. ``DatasetError``: no normal picture can be read, a table is not
    understood, or one picture stands in two splits of an artwork or under two labels."""
    source = Path(os.path.abspath(Path(folder).expanduser()))
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. Give the folder (or CSV file) of your pictures.")
    reading, spelling, looks = layouts.read(source), {}, []  # kinds that differ in case or separators become one
    samples = [replace(s, kind=spelling.setdefault(names.plain(s.kind), s.kind)) for s in reading.samples]
    samples.sort(key=lambda s: (s.category, SPLITS.index(s.split), s.is_anomalous, s.kind))
    # Decoders release the interpreter lock; four at a time keep the memory of four largest pictures below 1 GB.
    checks = thread_map(_checked, samples, max_workers=4, desc="reading pictures", unit="file", delay=3)
    reading.samples = []
    for sample, look, left_out, notes in checks:
        reading.left_out += left_out
        for note in notes:
            reading.notes[note].append(sample.image_path.name)
        if look is not None:
            reading.samples.append(sample)
            looks.append(look)
    normal = [s for s in reading.samples if not s.is_anomalous]
    if not normal:
        way = "No normal picture is left, and detectors learn from normal ones: add some as train/good."
        expected = Path(__file__).with_name("layouts.txt").read_text(encoding="utf-8")
        raise DatasetError(f"{reading.describe()}\n{way}\n{expected}")
    forged = [s.image_path.name for s in normal if names.says_forged(s.image_path.stem)]
    reading.notes["taken for genuine, though their names say otherwise"] = forged
    kinds = [kind for kind in spelling.values() if names.meaning_of(kind).kind is None]
    reading.notes["anomalous by the names of their folders; genuine ones belong into good/"] = kinds
    _group(looks, reading)
    return reading


def build_manifest(folder: Path | str) -> Path:
    """Make ``manifest.csv`` (and ``manifest.json``) in a folder of any supported layout; print what was understood.
    Errors as :func:`read_folder`; a ``manifest.csv`` that was not made by this function is left as it is."""
    reading = read_folder(folder)
    target, mark = (reading.source / name for name in (manifest.MANIFEST_CSV, manifest.MANIFEST_JSON))
    if target.exists() and "layout" not in (files.read_json(mark) if mark.exists() else {}):
        raise DatasetError(f"{target} is a frozen dataset, or a table of yours, and is left as it is. Rename it first.")
    print(f"{reading.describe()}\nManifest: {target}")
    why = "pictures show one scan in two splits (near duplicates): optimistic numbers"
    limits = {category: f"{n} {why}." for category, n in manifest.shared_groups(reading.samples).items()}
    info = {"layout": reading.layout, "notes": reading.notes, "left_out": reading.listed(), "limits": limits}
    return manifest.write_manifest(target, reading.samples, info=info)


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Signs of the lowest 16 x 16 frequencies of a picture (uint8 RGB ``(H, W, 3)``) and three middle parts of it, int8
    ``(4, 256)``: -1, 1, or 0 for one too weak to have a sign. Source: the "pHash" of Zauner, 2010."""
    grey, hashes = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), []
    size = grey.shape[::-1]
    for zoom in _ZOOMS:
        matrix = cv2.getRotationMatrix2D(((size[0] - 1) / 2, (size[1] - 1) / 2), 0, zoom)
        small = cv2.resize(cv2.warpAffine(grey, matrix, size), (64, 64), interpolation=cv2.INTER_AREA)
        low = cv2.dct(small.astype(np.float32))[:16, :16].ravel()
        low[0] = 0  # the mean brightness has no say
        is_strong = (np.abs(low) > 0.003 * np.abs(low).max()) & (small.std() >= 2)
        hashes.append(np.where(is_strong, np.sign(low), 0))
    return np.array(hashes, np.int8)


def near_duplicates(hashes: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs ``(i, j)``, ``i < j``, of pictures that show one scan, by the :func:`perceptual_hash` of each picture."""
    whole, *parts = np.array(hashes, np.float32).reshape(-1, len(_ZOOMS), 256).swapaxes(0, 1)
    is_alike = np.zeros((len(whole), len(whole)), bool)
    for limit, view in ((NEAR_DUPLICATE_LIMIT, whole), *((0, part) for part in parts)):
        n_both, n_view = np.abs(whole) @ np.abs(view).T, np.abs(view).sum(axis=1)
        n_strong = np.maximum(np.abs(whole).sum(axis=1)[:, None], n_view)  # with a sign in one of two pictures
        differing = np.where(n_both >= 0.7 * n_strong, (n_both - whole @ view.T) / 2 / np.maximum(1, n_both), 1)
        is_alike |= (differing <= limit) & (n_both > 0)
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(is_alike | is_alike.T, 1))]


def _checked(sample: Sample) -> tuple[Sample, np.ndarray | None, list, list]:
    """The sample, its look (None when it cannot be used), files left out with why, sentences about files."""
    path, mask_path, notes, left_out = sample.image_path, sample.mask_path, [], []
    try:
        image = images.load_image(path, max_side=128, notes=notes)
        shorter, longer = sorted(image.shape[:2])
        if longer > 30 * shorter or (shorter < 24 and longer < 128):
            raise images.ImageError("is too small or too slender: give a larger picture, or cut it into parts")
    except images.ImageError as error:
        return sample, None, [(path, str(error).replace(f"{path} ", ""))], []
    try:
        if mask_path and not images.load_mask(mask_path, image.shape[:2], picture=path, notes=notes).any():
            raise images.ImageError("the mask is empty although the picture is anomalous")
    except images.ImageError as error:
        left_out, mask_path = [(mask_path, f"{error} (mask not used)".replace(f"{mask_path} ", ""))], None
    sample = replace(sample, mask_path=mask_path, sha256=files.sha256_file(path))
    return sample, perceptual_hash(image), left_out, notes


def _group(looks: Sequence[np.ndarray], reading: FolderReading) -> None:
    """Give samples their groups, as a table states, else one of each file, joined over copies; tell of copies."""
    samples, pairs = reading.samples, near_duplicates(looks)
    places = [f"{reading.short(s.image_path)} ({s.split}, {s.kind})" for s in samples]
    equal = [(i, j) for i, j in pairs if samples[i].sha256 == samples[j].sha256]
    pairs = [(i, j) for i, j in pairs if samples[i].category == samples[j].category]
    apart = [(i, j) for i, j in pairs if len({(samples[k].split, samples[k].is_anomalous) for k in (i, j)}) > 1]
    told = {pair: f"{places[pair[0]]} = {places[pair[1]]}" for pair in (*equal, *apart)}
    if wrong := [told[pair] for pair in equal if pair in apart]:
        raise DatasetError(f"Equal files in two splits or with two labels: {', '.join(wrong[:6])}. Delete one of each.")
    reading.notes["the same file more than once"] = [told[pair] for pair in equal]
    reading.notes["one scan in two splits or with two labels"] = [told[pair] for pair in apart]
    n_twins, n_pictures = Counter(index for pair in pairs for index in pair), Counter(s.category for s in samples)
    alike = {samples[i].category for i, n in n_twins.items() if n >= 7 and n > n_pictures[samples[i].category] / 2}
    why = "most pictures look the same to the duplicate test (a fixed camera, perhaps), so each counts on its own"
    reading.notes[f"{why}; give a CSV with a column `group` if some are copies"] = sorted(alike)
    keys = [(s.category, s.group or f"{s.category}/{reading.short(s.image_path)}") for s in samples]
    for i, j in pairs:
        if samples[i].category not in alike:
            keys = [keys[i] if key == keys[j] else key for key in keys]
    reading.samples = [replace(s, group=group) for s, (_, group) in zip(samples, keys)]
