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

from helpers.data import names as words
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.names import ANOMALY_KIND, DatasetError, Meaning
from helpers.records import NORMAL_KIND, Sample

EXPECTED = """Understood are:
  MVTec layout: <category>/train/good, <category>/test/good, <category>/test/<kind>, <category>/ground_truth/<kind>
  the report's two trees: train/<painting>/..., test/anomaly/... and test/non_anomaly/...
    (in test/ the painting is a subfolder or stands in the file name)
  labelled folders: good/... and <kind>/... of one painting, or <painting>/good/... and <painting>/<kind>/...
  genuine pictures only: one folder per painting, or a flat folder
  CSV table (also VisA's): a row per picture with the columns image_path, category, split, label, kind, mask_path, group
    (all but image_path optional)"""
_OURS = ("manifest.csv", "manifest.json", "synthesis.jsonl")
_MASK_STEM = re.compile(
    r"[_\-. ]+(anomaly|defect)?[_\-. ]*(masks?|gt|ground[_\- ]?truth|labels?|seg(mentation)?|annotation)"
    r"([_\- ]?\d+)?$|^(masks?|gt|label|seg)[_\-. ]+",
    re.IGNORECASE,
)
_UNCLEAR = frozenset("0 1 class_0 class_1 true false yes no positive negative".split())


@dataclass
class FolderReading:
    """What was understood of a folder or table.

    Attributes:
        source, layout: the folder, absolute; what kind of folder or table it is, in words.
        is_labelled: whether splits or labels were found; all pictures count as genuine where not.
        samples: readable pictures by category, split and kind; ``group`` joins copies of one picture.
        left_out: files that are not used, and why.
        notes: everything else the user should know, a sentence each.
    """

    source: Path
    layout: str
    is_labelled: bool = True
    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Numbers of pictures and masks, then notes and files left out."""
        import pandas as pd

        rows = [(s.category, s.split, s.kind, s.mask_path is not None) for s in self.samples]
        table = pd.DataFrame(rows, columns=["artwork", "split", "kind", "masks"]).groupby(["artwork", "split", "kind"])
        lines = [f"{self.source}: {self.layout}"]
        lines += [str(table["masks"].agg(pictures="size", masks="sum"))] if rows else ["no picture can be used"]
        lines += [f"Note: {note}" for note in self.notes]
        lines += [f"Files left out: {len(self.left_out)}"] if self.left_out else []
        lines += [f"  {self.short(path)}: {reason}" for path, reason in self.left_out[:12]]
        return "\n".join(lines + ["  ..."] * (len(self.left_out) > 12))

    def short(self, path: Path) -> str:
        """A path from the source on, as text that can be printed: file systems allow names that cannot."""
        path = path.relative_to(self.source) if path.is_relative_to(self.source) else path
        return path.as_posix().encode("utf-8", "replace").decode("utf-8")

    def name_categories(self, names: Sequence[str], keys: Sequence[object]) -> None:
        """Give each sample the category of its name, safe in paths; samples of two keys never share one."""
        taken: set[str] = set()
        categories = {key: words.unique(words.clean(name), taken) for key, name in dict(zip(keys, names)).items()}
        self.samples = [replace(sample, category=categories[key]) for sample, key in zip(self.samples, keys)]


class Unclear(Exception):
    """Why a picture is left out."""


class File:
    """A file and what is said of it: ``head`` and ``tail`` are other names above and below the first split or label."""

    def __init__(self, path: Path, meanings: Sequence[Meaning]) -> None:
        steps = [step for step in meanings if any(step[1:])]
        at = next((i for i, step in enumerate(steps) if step.split or step.kind), len(steps))
        self.path = path
        self.is_mask = any(step.is_mask for step in steps)
        self.splits = {step.split for step in steps if step.split}
        self.kinds = [step.kind for step in steps if step.kind]
        self.labels = {kind == NORMAL_KIND for kind in self.kinds}
        self.first = next(((step.split, step.kind == NORMAL_KIND) for step in steps[at:]), None)
        titles = [step.told if not step.kind else "" for step in steps]
        self.head, self.tail = tuple(filter(None, titles[:at])), tuple(filter(None, titles[at:]))
        self.child = "".join(titles[at + 1 : at + 2])
        self.told = {words.plain(step.told) for step in steps} - {""}


class Tree:
    """The pictures below a folder, with the places where labels and artworks stand."""

    def __init__(self, files: Sequence[File] = (), *, has_masks: bool = False) -> None:
        self.is_labelled = has_masks or any(file.first for file in files)
        self.has_folders = any(file.head or file.first for file in files)
        self.labels: dict[tuple, set[bool]] = defaultdict(set)  # that folders have, by the folders above them
        self.artworks: dict[tuple, list[str]] = {}  # by the folders above the split or label that they stand below
        below: dict[tuple, dict] = defaultdict(lambda: defaultdict(set))
        for file in files:
            if file.first:
                split, is_good = file.first
                below[file.head][split or is_good].add(file.child)
                self.labels[file.head] |= set() if split else {is_good}
        for head, found in below.items():
            learnt = found["train"] | found["calibration"]
            if "" not in learnt and (learnt or found[True] & found[False] - {""}):
                self.artworks[head] = sorted((learnt or found[True]) - {""})

    def place(self, file: File) -> tuple[tuple[str, ...], Sample]:
        """The folder names that identify the artwork, and the picture; Unclear says why it is left out."""
        head, tail, beside = file.head, file.tail, set()
        if len(file.splits) > 1 or len(file.labels) > 1:
            raise Unclear("two things at once are said of it")
        if not file.first:  # perhaps folders with labels stand beside it
            at = next((at for at in range(len(head), -1, -1) if self.labels.get(head[:at])), None)
            if at is None and (self.is_labelled or (self.has_folders and not head)):
                raise Unclear("no folder says what it is: move it into good/, or the folder of its painting or kind")
            beside = set() if at is None else self.labels[head[:at]]
            at = 1 if at is None else at
            head, tail = head[:at], head[at:]
        artworks = self.artworks.get(head, [])
        if artworks:
            artwork = words.spoken_of([*tail, file.path.stem], artworks)
            if artwork is None:
                raise Unclear(f"which painting does it show ({', '.join(artworks)})? Write it into the file name")
            head, tail = (*head, artwork), tuple(name for name in tail if words.plain(name) != words.plain(artwork))
        split, kind = next(iter(file.splits), None), NORMAL_KIND
        decides = beside or split == "test"  # a folder without a label says a kind
        if False in file.labels:
            stated = chain(file.kinds, map(words.kind_of, tail[:1]))
            kind = next((kind for kind in stated if kind != ANOMALY_KIND), ANOMALY_KIND)
        elif not file.labels and decides and (beside == {False}) == bool(tail):
            raise Unclear("no folder says whether it is genuine: move it into good/, or the folder of its kind")
        elif not file.labels and tail and (decides or (file.first and not artworks)):
            kind = words.kind_of(tail[0])
        is_anomalous = kind != NORMAL_KIND
        split = split or ("test" if is_anomalous else "train")
        if is_anomalous and split != "test":
            raise Unclear("anomalous, so not used: detectors learn from normal pictures only")
        trusted = head if artworks or not file.first else ()
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
        steps = [meanings.get(name) for name in path.relative_to(root).parts[:-1]]
        if None in steps:
            why = "may be labels or paintings: call them good/ and anomaly/, or by titles"
            reading.left_out.append((path, f"0/ and 1/, yes/ and no/ and the like {why}"))
            continue
        file, bare = File(path, steps), _bare(path.stem)
        (masks if file.is_mask or (bare != path.stem and (path.parent, bare) in stems) else files).append(file)
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
    reading.name_categories([head[-1] if head else own_name(root) for head in heads], heads)
    _match_masks(masks, [file for file, _ in placed], reading)
    reading.is_labelled = tree.is_labelled
    if not any(file.splits for file in files):
        kind = "one folder per painting" if tree.has_folders else "flat folder"
        kind += ": all pictures count as genuine ones to learn from; there is no test/ folder"
        labelled = "labelled folders: normal pictures count as train, anomalous ones as test"
        reading.layout = labelled if tree.is_labelled else kind
        inner = sorted({"/".join(file.head[:2]) for file in files if file.head[1:]})
        reading.notes += [f"Not artworks of their own: {few(inner)}."] if inner[1:] and not tree.is_labelled else []
    elif tree.artworks:
        reading.layout = "the report's two trees"
    return reading


def few(items: Sequence[object]) -> str:
    """The first six of many, and how many more there are."""
    return ", ".join(map(str, items[:6])) + (f" and {len(items) - 6} more" if len(items) > 6 else "")


def own_name(root: Path) -> str:
    """The artwork's name when the folder given is the artwork, or its train/ or good/."""
    meaning = words.meaning_of(root.name)
    return root.parent.name if (meaning.split or meaning.kind) and root.parent.name else root.name


def _meanings(names: set[str]) -> dict[str, Meaning]:
    """What each folder name of a tree says; names that may be labels or titles are left out."""
    meanings = {name: words.meaning_of(words.repaired(name)) for name in names}
    known = {meaning.name for meaning in meanings.values()}
    for name, meaning in meanings.items():
        bare = _bare(meaning.name)
        if bare in known - {meaning.name}:  # crack_mask/ beside crack/
            meanings[name] = Meaning(meaning.name, is_mask=True, told=bare)
    unclear = {name for name in names if words.plain(name) in _UNCLEAR}
    if {name for name in names if name.isdigit()} <= {"0", "1"}:  # else they number paintings
        if any(meaning.split for meaning in meanings.values()):
            meanings |= {"0": Meaning("good", kind=NORMAL_KIND), "1": Meaning("anomaly", kind=ANOMALY_KIND)}
        elif len(unclear) > 1:
            meanings = {name: meaning for name, meaning in meanings.items() if name not in unclear}
    return meanings


def _match_masks(masks: Sequence[File], files: Sequence[File], reading: FolderReading) -> None:
    """Give each anomalous picture its mask; leave out masks that fit none, or more than one."""
    anomalous = {index for index, sample in enumerate(reading.samples) if sample.is_anomalous}
    by_stem, found = defaultdict(list), defaultdict(set)
    for index, file in enumerate(files):
        by_stem[file.path.stem].append(index)
    for mask in masks:
        path, folder, owners = mask.path, mask.path.parent, []
        tries = [(path, stem, mask.told) for stem in (path.stem, _bare(path.stem))]
        tries.append((folder, _bare(folder.name), mask.told - {words.plain(folder.name)}))  # masks of one picture
        while tries and not owners:
            (path, stem, told), *tries = tries
            same = [index for index in by_stem[stem] if files[index].told == told]
            wider = [index for index in by_stem[stem] if told < files[index].told and index in anomalous]
            owners = [index for index in same if index in anomalous] or same or wider
        if len(owners) == 1 and owners[0] in anomalous:
            found[owners[0]].add(path)
        else:
            why = "more than one picture; used for none" if len(owners) > 1 else "no anomalous picture"
            reading.left_out.append((mask.path, f"mask of {why}"))
    for index, paths in found.items():
        if len(paths) == 1:
            reading.samples[index] = replace(reading.samples[index], mask_path=paths.pop())
        reading.left_out += [(mask, "one of several masks of a picture; none is used") for mask in sorted(paths)]


def _bare(stem: str) -> str:
    """A mask's stem without what makes it a mask's: ``000.jpg_mask`` -> ``000``."""
    stem = _MASK_STEM.sub("", stem)
    return Path(stem).stem if Path(stem).suffix.lower() in IMAGE_SUFFIXES else stem


def _listed(root: Path, reading: FolderReading) -> list[Path]:
    """Pictures by their suffix, broken links among them; other files are left out. Links are followed."""
    pictures, n_hidden, seen = [], 0, set()
    for here, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(here) in seen:  # a linked folder that leads back into itself is entered once
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        n_hidden += sum(map(words.is_hidden, folders + names))
        folders[:] = sorted(name for name in folders if not words.is_hidden(name))
        for path in (Path(here, name) for name in sorted(names) if not words.is_hidden(name) and name not in _OURS):
            if str(path).encode("utf-8", "replace").decode() != str(path):
                reading.left_out.append((path, "its name is not valid UTF-8: rename it"))
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                pictures.append(path)
            else:
                reading.left_out.append((path, "no picture of a format that is read (an archive: unpack it)"))
    reading.notes += [f"Hidden files, thumbnails and the like were ignored: {n_hidden}."] if n_hidden else []
    return pictures
