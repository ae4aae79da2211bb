"""Folders of pictures: what each picture is, from the names of the folders above it. No pixel is looked at here.

One rule for every tree: a folder's name says a split (``train``), a label (``good``, ``fake``), masks
(``ground_truth``), nothing (``images``), or it is any other name: the artwork above split and label, a kind of anomaly
below. Deeper folders count like these; what is not used is left out by name.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import pandas as pd

from helpers.data import names as words
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.names import ANOMALY_KIND, DatasetError, Meaning
from helpers.records import NORMAL_KIND, Sample

_OURS = ("manifest.csv", "manifest.json", "synthesis.jsonl")
_MASK_STEM = re.compile(
    r"[_\-. ]+(anomaly|defect)?[_\-. ]*(masks?|gt|ground[_\- ]?truth|labels?|seg(mentation)?|annotation)([_\- ]?\d+)?$"
    r"|^(masks?|gt|label|seg)[_\-. ]+",
    re.IGNORECASE,
)


@dataclass
class FolderReading:
    """What was understood of a folder or table: readable pictures (``group`` joins copies of one), files that are not
    used and why, and sentences on everything else. Without splits and labels all pictures count as genuine."""

    source: Path
    layout: str
    is_labelled: bool = True
    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Numbers of pictures and masks, then notes and files left out."""
        rows = [(s.category, s.split, s.kind, s.mask_path is not None) for s in self.samples]
        table = pd.DataFrame(rows, columns=["artwork", "split", "kind", "masks"]).groupby(["artwork", "split", "kind"])
        lines = [f"{self.source}: {self.layout}"]
        lines += [table["masks"].agg(pictures="size", masks="sum").to_string()] if rows else ["no picture can be used"]
        lines += [f"Note: {note}" for note in self.notes]
        lines += [f"Files left out: {len(self.left_out)}"] if self.left_out else []
        lines += [f"  {self.short(path)}: {reason}" for path, reason in self.left_out[:12]]
        return "\n".join(lines + ["  ... (all: manifest.json)"] * (len(self.left_out) > 12))

    def short(self, path: Path) -> str:
        """A path from the source on, as text that can be printed: file systems allow names that cannot."""
        path = path.relative_to(self.source) if path.is_relative_to(self.source) else path
        return path.as_posix().encode("utf-8", "replace").decode("utf-8")

    def name_categories(self, names: Sequence[str], keys: Sequence[object]) -> None:
        """Give each sample the category of its name, safe in paths; samples of two keys never share one."""
        taken: set[str] = set()
        categories = {key: words.unique(words.clean(name), taken) for key, name in dict(zip(keys, names)).items()}
        self.samples = [replace(sample, category=categories[key]) for sample, key in zip(self.samples, keys)]


def few(items: Sequence[object]) -> str:
    """The first six of many, and how many more there are."""
    return ", ".join(map(str, items[:6])) + (f" and {len(items) - 6} more" if len(items) > 6 else "")


class Unclear(Exception):
    """Why a picture is left out."""


class File:
    """A file and what is said of it: ``head`` and ``tail`` are other names above and below the first split or label."""

    def __init__(self, path: Path, meanings: Sequence[Meaning]) -> None:
        steps = [step for step in meanings if any(step[1:])]
        at = next((i for i, step in enumerate(steps) if step.split or step.kind), len(steps))
        self.path, self.is_mask = path, any(step.is_mask for step in steps)
        self.splits = {step.split for step in steps if step.split}
        self.kinds = [step.kind for step in steps if step.kind]
        self.labels = {kind == NORMAL_KIND for kind in self.kinds}
        self.first = next((step.split or step.kind == NORMAL_KIND for step in steps[at:]), None)
        titles = [step.told if not step.kind else "" for step in steps]
        self.head, self.tail = tuple(filter(None, titles[:at])), tuple(filter(None, titles[at:]))
        self.child = "".join(titles[at + 1 : at + 2])
        self.told = {words.plain(step.told) for step in steps} - {""}


class Tree:
    """The pictures below a folder, with the places where labels and artworks stand, by the other names above them."""

    def __init__(self, files: Sequence[File] = (), *, has_masks: bool = False) -> None:
        self.is_labelled = has_masks or any(file.first is not None for file in files)
        self.has_folders = any(file.head or file.first is not None for file in files)
        below: dict[tuple, dict] = defaultdict(lambda: defaultdict(set))  # first split or label -> names below it
        for file in files:
            if file.first is not None:
                below[file.head][file.first].add(file.child)
        self.labels = {head: {True, False} & set(found) for head, found in below.items() if {True, False} & set(found)}
        self.artworks = {}
        for head, found in below.items():
            learnt = found["train"] | found["calibration"]
            if "" not in learnt and (learnt or found[True] & found[False] - {""}):
                self.artworks[head] = sorted((learnt or found[True]) - {""})

    def place(self, file: File) -> tuple[tuple[str, ...], Sample]:
        """The names that identify the artwork, and the picture without its category; or :class:`Unclear`."""
        head, tail, beside, is_lost = file.head, file.tail, set(), False
        if len(file.splits) > 1 or len(file.labels) > 1:
            raise Unclear("two things at once are said of it")
        if file.first is None:  # perhaps folders with labels stand beside it
            above = next((head[:at] for at in range(len(head), -1, -1) if head[:at] in self.labels), None)
            is_lost = above is None and (self.is_labelled or (self.has_folders and not head))
            beside, above = self.labels.get(above, set()), head[:1] if above is None else above
            head, tail = above, head[len(above) :]
        artworks = self.artworks.get(head, [])
        if artworks:
            artwork = words.spoken_of([*tail, file.path.stem], artworks)
            if artwork is None:
                raise Unclear(f"which painting does it show ({', '.join(artworks)})? Write it into the file name")
            head, tail = (*head, artwork), tuple(name for name in tail if words.plain(name) != words.plain(artwork))
        split, kind = next(iter(file.splits), None), NORMAL_KIND
        decides = beside or split == "test"  # a folder without a label says a kind
        if is_lost or (decides and not file.labels and (beside == {False}) == bool(tail)):
            raise Unclear("no folder says what it is: move it into good/, or the folder of its painting or kind")
        if False in file.labels:
            stated = chain(file.kinds, map(words.kind_of, tail[:1]))
            kind = next((kind for kind in stated if kind != ANOMALY_KIND), ANOMALY_KIND)
        elif not file.labels and tail and (decides or (file.first is not None and not artworks)):
            kind = words.kind_of(tail[0])
        is_anomalous, trusted = kind != NORMAL_KIND, head if artworks or file.first is None else ()
        split = split or ("test" if is_anomalous else "train")
        if is_anomalous and split != "test":
            raise Unclear("anomalous, so not used: detectors learn from normal pictures only")
        if not is_anomalous and any(map(words.says_forged, (*trusted, *tail))):
            raise Unclear("would be taken for genuine, but a folder above it says otherwise: rename or move that")
        return head, Sample(file.path, "", is_anomalous, None, split, kind)


def read_tree(root: Path) -> FolderReading:
    """What every picture below a folder is, as far as names tell."""
    reading = FolderReading(root, "MVTec layout")
    paths = _listed(root, reading)
    meanings = _meanings({name for path in paths for name in path.relative_to(root).parts[:-1]})
    stems = {(path.parent, path.stem) for path in paths}
    files, masks, placed = [], [], []
    for path in paths:
        steps, bare = [meanings[name] for name in path.relative_to(root).parts[:-1]], _bare(path.stem)
        file = File(path, [step for step in steps if step])
        if None in steps:
            reading.left_out.append(
                (path, "0/ and 1/ (yes/ and no/ ...) may be labels or paintings: say good/ and bad/")
            )
        elif file.is_mask or (bare != path.stem and (path.parent, bare) in stems):
            masks.append(file)
        else:
            files.append(file)
    tree = Tree(files, has_masks=bool(masks))
    for file in files:
        try:
            head, sample = tree.place(file)
            if sample.is_anomalous and _MASK_STEM.search(file.path.stem):
                raise Unclear("named like a mask, but its picture is not beside it")
            placed.append((file, head))
            reading.samples.append(sample)
        except (Unclear, DatasetError) as reason:
            reading.left_out.append((file.path, str(reason)))
    heads = [head for _, head in placed]
    reading.name_categories([head[-1] if head else root.name for head in heads], heads)
    _match_masks(masks, [file for file, _ in placed], reading)
    reading.is_labelled = tree.is_labelled
    if not tree.is_labelled:
        reading.layout = "genuine pictures only, all to learn from; there is no test/ folder"
        inner = sorted({"/".join(file.head[:2]) for file in files if file.head[1:]})
        reading.notes += [f"Not artworks of their own: {few(inner)}."] if inner[1:] else []
    elif not any(file.splits for file in files):
        reading.layout = "labelled folders: normal pictures count as train, anomalous ones as test"
    elif tree.artworks:
        reading.layout = "the report's two trees"
    return reading


def _meanings(names: set[str]) -> dict[str, Meaning | None]:
    """What each folder name of a tree says; None for names that may be labels or titles."""
    meanings = {name: words.meaning_of(words.repaired(name)) for name in names}
    known = {meaning.name for meaning in meanings.values()}
    for name, meaning in meanings.items():
        bare = _bare(meaning.name)
        if bare in known - {meaning.name}:  # crack_mask/ beside crack/
            meanings[name] = Meaning(meaning.name, is_mask=True, told=bare)
    unclear = {name for name in names if words.plain(name) in words.vocabulary()["unclear"]}
    if {name for name in names if name.isdigit()} <= {"0", "1"}:  # else they number paintings
        if any(meaning.split for meaning in meanings.values()):
            meanings |= {"0": Meaning("good", kind=NORMAL_KIND), "1": Meaning("anomaly", kind=ANOMALY_KIND)}
        elif len(unclear) > 1:
            meanings |= dict.fromkeys(unclear)
    return meanings


def _match_masks(masks: Sequence[File], files: Sequence[File], reading: FolderReading) -> None:
    """Give each anomalous picture its mask; leave out masks that fit none, or more than one."""
    by_stem, found = defaultdict(list), defaultdict(list)
    for index, (file, sample) in enumerate(zip(files, reading.samples)):
        by_stem[file.path.stem].append((index, file.told, sample.is_anomalous))
    for mask in masks:
        near = [one for stem in {mask.path.stem, _bare(mask.path.stem)} for one in by_stem[stem]]
        same = [(index, is_anomalous) for index, told, is_anomalous in near if told == mask.told]
        wider = [(index, True) for index, told, is_anomalous in near if told > mask.told and is_anomalous]
        owners = [owner for owner in same if owner[1]] or same or wider
        if len(owners) == 1 and owners[0][1]:
            found[owners[0][0]].append(mask.path)
        else:
            why = "more than one picture; used for none" if len(owners) > 1 else "no anomalous picture"
            reading.left_out.append((mask.path, f"mask of {why}"))
    for index, paths in found.items():
        if len(paths) == 1:
            reading.samples[index] = replace(reading.samples[index], mask_path=paths[0])
        else:
            reading.left_out += [(mask, "one of several masks of a picture; none is used") for mask in paths]


def _bare(stem: str) -> str:
    """A mask's stem without what makes it a mask's: ``000.jpg_mask`` -> ``000``."""
    stem = _MASK_STEM.sub("", stem)
    return Path(stem).stem if Path(stem).suffix.lower() in IMAGE_SUFFIXES else stem


def _listed(root: Path, reading: FolderReading) -> list[Path]:
    """Pictures by their suffix, broken links among them; other files are left out. Links are followed."""
    pictures, n_hidden, seen = [], 0, set()
    for here, folders, names in os.walk(root, followlinks=True):
        n_hidden += sum(map(words.is_hidden, folders + names))
        is_new = os.path.realpath(here) not in seen  # a linked folder that leads back into itself is entered once
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if is_new and not words.is_hidden(name))
        kept = sorted(name for name in names if is_new and not words.is_hidden(name) and name not in _OURS)
        for path in (Path(here, name) for name in kept):
            if str(path).encode("utf-8", "replace").decode() != str(path):
                reading.left_out.append((path, "its name is not valid UTF-8: rename it"))
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                pictures.append(path)
            else:
                reading.left_out.append((path, "no picture of a format that is read (an archive: unpack it)"))
    reading.notes += [f"Hidden files, thumbnails and the like were ignored: {n_hidden}."] if n_hidden else []
    return pictures
