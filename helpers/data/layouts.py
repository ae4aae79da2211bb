"""Folder layouts: what each picture is, from the names of the folders above it. No pixel is looked at here.

One rule for every tree: a folder's name says a split (``train``), a label (``good``, ``fake``), masks
(``ground_truth``), nothing (``images``), or it is any other name: the artwork above split and label, a kind of anomaly
below. Deeper folders count like these; what is not used is listed.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from helpers.data import names as words
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.names import ANOMALY_KIND, DatasetError
from helpers.records import NORMAL_KIND, SPLITS, Sample

MVTEC, VISA, REPORT = "MVTec layout", "VisA layout", "the report's two trees"
CSV, LABELLED, PER_PAINTING, FLAT = "CSV table", "labelled folders", "one folder per painting", "flat folder"
EXPECTED = f"""Understood are:
  {MVTEC}: <category>/train/good, <category>/test/good, <category>/test/<kind>, <category>/ground_truth/<kind>
  {REPORT}: train/<painting>/..., test/anomaly/... and test/non_anomaly/...
    (in test/ the painting is a subfolder or stands in the file name)
  {LABELLED}: good/... and <kind>/... of one painting, or <painting>/good/... and <painting>/<kind>/...
  {PER_PAINTING} or {FLAT}: genuine pictures only
  {CSV} (also VisA's): a row per picture with the columns image_path, category, split, label, kind, mask_path, group
    (all but image_path optional)"""
_OURS = ("manifest.csv", "manifest.json", "synthesis.jsonl")
_MASK_STEM = re.compile(
    r"[_\-. ]+(anomaly|defect)?[_\-. ]*(masks?|gt|ground[_\- ]?truth|labels?|seg(mentation)?|annotation)"
    r"([_\- ]?\d+)?$|^(masks?|gt|label|seg)[_\-. ]+",
    re.IGNORECASE,
)
_UNCLEAR = frozenset("0 1 class_0 class_1 true false yes no positive negative".split())
_LABELS = frozenset((NORMAL_KIND, ANOMALY_KIND))

_Steps = list[tuple[str, str | None]]  # folder names with their roles, from the top; one with two roles stands twice
_Names = tuple[str, ...]


@dataclass
class Layout:
    """What was understood of a folder.

    Attributes:
        name: one of the layouts' names in this module.
        source: the folder or table, absolute.
        found: the pictures, ordered; ``group`` is set only where a table states it.
        problems: files that are not used and why.
        notes: everything else the user should know, a sentence each.
    """

    name: str
    source: Path
    found: list[Sample] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_tree(root: Path) -> Layout:
    """What every picture below a folder is.

    Raises:
        DatasetError: it is not clear which pictures are genuine; the message shows the folders that were seen.
    """
    pictures, others, n_hidden = _listed(root)
    if not pictures:
        archives = [path.name for path in others if path.suffix.lower() in (".zip", ".tar", ".gz", ".7z", ".rar")]
        raise refusal(root, "There is no picture in it." + (f" Unpack {archives[0]} first." if archives else ""))
    names = {path: [words.repaired(name) for name in path.relative_to(root).parts[:-1]] for path in pictures}
    known = {name for found in names.values() for name in found}
    meanings: dict[str, _Steps] = {name: [(name, role) for role in words.roles_of(name)] for name in known}
    meanings |= {name: [(name, "mask"), (_bare(name), None)] for name in known if _bare(name) in known - {name}}
    if {name for name in known if name.isdigit()} <= {"0", "1"}:
        unclear = sorted(name for name in known if words.plain(name) in _UNCLEAR)
        if any(role in SPLITS for steps in meanings.values() for _, role in steps):
            meanings |= {"0": [("0", NORMAL_KIND)], "1": [("1", ANOMALY_KIND)]}
        elif len(unclear) > 1:
            where = "/ and ".join(unclear)
            raise refusal(root, f"{where}/ may be labels or paintings: call them good/ and anomaly/, or by titles.")
    steps = {path: [step for name in found for step in meanings[name]] for path, found in names.items()}
    layout = _Tree(root, steps).read()
    layout.problems += [(path, "no picture of a format that is read") for path in others]
    layout.notes += [f"Hidden files, thumbnails and the like were ignored: {n_hidden}."] if n_hidden else []
    return layout


def has_roles(root: Path) -> bool:
    """True when the name of any folder in a tree says a split or a label."""
    below = (os.path.basename(here) for here, *_ in os.walk(root) if here != str(root))
    return any(role not in (None, "mask") for name in below for role in words.roles_of(name))


def apart(names: dict[Hashable, str], layout: Layout) -> dict[Hashable, str]:
    """A safe category for each key, of the name that it is given; two keys never share one, and it is said."""
    categories: dict[Hashable, str] = {}
    for key, name in names.items():
        taken = {category.casefold() for category in categories.values()}
        tries = [words.clean(name), *(f"{words.clean(name)}_{number}" for number in range(2, len(names) + 2))]
        categories[key] = next(candidate for candidate in tries if candidate.casefold() not in taken)
        if categories[key] != tries[0]:
            layout.notes.append(f"{name} is called {categories[key]}: {tries[0]} is the name of another artwork.")
    return categories


def own_name(root: Path) -> str:
    """The artwork's name when the folder given is the artwork, or its train/ or good/."""
    return root.name if words.roles_of(root.name) in ([], [None]) or not root.parent.name else root.parent.name


def refusal(root: Path, reason: str) -> DatasetError:
    """The error for a folder that is not understood, with the folders in it."""
    folders = sorted(Path(here).relative_to(root).as_posix() for here, *_ in os.walk(root))
    seen = "".join(f"\n  {name}/" for name in folders[1:20]) or " no folders in it."
    return DatasetError(f"{root} is not understood. {reason}\nSeen:{seen}\n{EXPECTED}")


class _Unclear(Exception):
    """Why one picture's place does not say what it is."""


class _Tree:
    """The pictures below a folder, with what the names of the folders above each of them say."""

    def __init__(self, root: Path, steps: dict[Path, _Steps]) -> None:
        stems = {(path.parent, path.stem) for path in steps}
        self._root = root
        self._masks: dict[Path, _Steps] = {}
        self._pictures: dict[Path, _Steps] = {}
        for path, names in steps.items():
            bare = _bare(path.stem)
            is_mask = any(role == "mask" for _, role in names) or (bare != path.stem and (path.parent, bare) in stems)
            (self._masks if is_mask else self._pictures)[path] = names
        self._roles = {role for names in self._pictures.values() for _, role in names}
        self._labels: dict[_Names, set[str]] = defaultdict(set)  # that folders have, by the folders above them
        self._artworks: dict[_Names, list[str]] = {}  # by the folders above the split or label that they stand below
        self._odd: dict[str, list[str]] = defaultdict(list)
        self._learn()

    def _learn(self) -> None:
        """Where labels stand, and whether artworks stand below ``train/``, or below both ``good/`` and ``fake/``."""
        below: dict[_Names, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for steps in self._pictures.values():
            names = tuple(name for name, _ in steps)
            for i, (_, role) in enumerate(steps):
                if role in _LABELS:
                    self._labels[names[:i]].add(role)
            at = _first(steps)
            if at is not None:
                child, role = steps[at + 1] if at + 1 < len(steps) else ("", "")
                below[names[:at]][steps[at][1]].add(child if role is None else "")
        for above, found in below.items():
            learnt = found["train"] | found["calibration"]
            both = found[NORMAL_KIND] & found[ANOMALY_KIND] - {""}
            if (learnt and "" not in learnt) or (not learnt and both):
                self._artworks[above] = sorted((learnt or found[NORMAL_KIND]) - {""})

    def read(self) -> Layout:
        """Every picture in its place, then the masks; refuses what may be read two ways."""
        if self._masks and not self._roles - {None}:
            first = next(iter(self._masks)).relative_to(self._root)
            raise refusal(self._root, f"There are masks ({first}), but no folder says what is genuine (good/).")
        name = FLAT if not self._roles else PER_PAINTING if self._roles == {None} else LABELLED
        layout = Layout((REPORT if self._artworks else MVTEC) if self._roles & set(SPLITS) else name, self._root)
        keys: dict[Path, _Names] = {}
        for path, steps in self._pictures.items():
            try:
                keys[path], sample = self._place(path, steps)
                layout.found.append(sample)
            except _Unclear as reason:
                layout.problems.append((path, str(reason)))
        categories = apart({key: key[-1] if key else own_name(self._root) for key in keys.values()}, layout)
        layout.found = [replace(sample, category=categories[keys[sample.image_path]]) for sample in layout.found]
        self._match_masks(layout)
        self._note(layout)
        return layout

    def _place(self, path: Path, steps: _Steps) -> tuple[_Names, Sample]:
        """The folder names that identify the artwork, and the picture."""
        names, roles = tuple(name for name, _ in steps), {role for _, role in steps}
        splits, labels = roles & set(SPLITS), roles & _LABELS
        if len(splits) > 1 or len(labels) > 1:
            raise _Unclear(f"{'/'.join(names)} says two things at once")
        at, beside = _first(steps), set()
        if at is None:  # no split and no label above it, but perhaps folders with labels beside it
            at = next((depth for depth in range(len(names), -1, -1) if names[:depth] in self._labels), None)
            if at is None and self._roles - {None}:
                raise _Unclear("is neither below train/ or test/ nor below good/: move it there")
            if at is None and not names and self._roles:
                raise _Unclear("lies beside the folders of the paintings: move it into one of them")
            if at is None:
                return tuple(map(self._trusted, names[:1])), self._sample(path, NORMAL_KIND, None, names[1:])
            beside = self._labels[names[:at]]
        split, above = next(iter(splits), None), names[:at]
        below = [name for name, role in steps[at:] if role is None]
        is_report = above in self._artworks
        if is_report:
            artwork, below = _spoken(path, self._artworks[above], below)
            above = (*above, self._trusted(artwork))
        kind = NORMAL_KIND
        if ANOMALY_KIND in labels:
            stated = [name for name, role in steps if role == ANOMALY_KIND and not name.isdigit()]
            kind = next((k for k in map(words.kind_of, (*stated, *below[:1])) if k != ANOMALY_KIND), ANOMALY_KIND)
        elif beside == {ANOMALY_KIND} and below:
            reason = "there is a folder of anomalous pictures but none of normal ones (good/)."
            raise refusal(self._root, f"Beside {below[0]}/ {reason}")
        elif beside == {ANOMALY_KIND}:
            self._odd["lie beside a folder of anomalous pictures and count as genuine"].append(path.name)
        elif not labels and not below and (beside or split == "test"):
            where = "beside good/" if beside else "directly in test/"
            raise _Unclear(f"lies {where}: move it into good/ or the folder of its kind")
        elif not labels and below and (beside or split == "test" or not is_report):
            kind = words.kind_of(below[0])
        return above, self._sample(path, kind, split, below)

    def _trusted(self, name: str) -> str:
        """The name of a folder whose pictures count as genuine ones of an artwork without a label that says so."""
        if words.says_forged(name):
            way = "Put genuine pictures into <artwork>/good and others into <artwork>/<kind>."
            raise refusal(self._root, f"{name}/ would be learnt as genuine, but its name says otherwise. {way}")
        return name

    def _sample(self, path: Path, kind: str, split: str | None, below: Sequence[str]) -> Sample:
        """The picture, unless a name contradicts what it is taken for."""
        is_anomalous = kind != NORMAL_KIND
        if is_anomalous and split not in (None, "test"):
            raise _Unclear("anomalous, so not used: detectors learn from normal pictures only")
        if is_anomalous and _MASK_STEM.search(path.stem):
            raise _Unclear("named like a mask, but its picture is not beside it")
        if not is_anomalous and any(map(words.says_forged, below)):
            raise _Unclear("would be taken for genuine, but a folder above it says otherwise: rename or move that")
        if not is_anomalous and words.says_forged(path.stem):
            self._odd["are taken for genuine, though their names say otherwise"].append(path.name)
        return Sample(path, "", is_anomalous, None, split or ("test" if is_anomalous else "train"), kind)

    def _match_masks(self, layout: Layout) -> None:
        """Give each anomalous picture its mask; list masks that fit none, or more than one."""
        by_stem: dict[str, list[tuple[set[str], int]]] = defaultdict(list)
        for index, sample in enumerate(layout.found):
            by_stem[sample.image_path.stem].append((_telling(self._pictures[sample.image_path]), index))
        anomalous = {index for index, sample in enumerate(layout.found) if sample.is_anomalous}
        masks: dict[int, set[Path]] = defaultdict(set)
        for path, steps in self._masks.items():
            owners, mask, where, folder = [], path, _telling(steps), path.parent
            above = where - {words.plain(folder.name)}  # a folder of masks has the name of their picture
            tries = (path, path.stem, where), (path, _bare(path.stem), where), (folder, _bare(folder.name), above)
            while not owners and tries:
                (mask, stem, names), *tries = tries
                same = [index for found, index in by_stem[stem] if found == names]
                wider = [index for found, index in by_stem[stem] if names < found and index in anomalous]
                owners = [index for index in same if index in anomalous] or same or wider
            if len(owners) == 1 and owners[0] in anomalous:
                masks[owners[0]].add(mask)
            else:
                why = "more than one picture; used for none" if len(owners) > 1 else "no anomalous picture"
                layout.problems.append((path, f"mask of {why}"))
        for index, found in masks.items():
            if len(found) == 1:
                layout.found[index] = replace(layout.found[index], mask_path=found.pop())
            layout.problems += [(mask, "one of several masks of a picture; none is used") for mask in sorted(found)]

    def _note(self, layout: Layout) -> None:
        if layout.name == LABELLED:
            layout.notes.append("No train/ and test/: normal pictures count as train, anomalous ones as test.")
        if layout.name in (PER_PAINTING, FLAT):
            layout.notes.append("All pictures count as genuine ones to learn from; there is no test/ folder.")
            inner = sorted({"/".join(name for name, _ in steps[:2]) for steps in self._pictures.values() if steps[1:]})
            layout.notes += [f"Not artworks of their own: {', '.join(inner[:6])}."] if len(inner) > 1 else []
        kinds = dict.fromkeys(s.kind for s in layout.found if words.label_of(s.kind) is None)
        if kinds:
            named = ", ".join(kinds)
            layout.notes.append(f"Anomalous by the names of their folders: {named}. Genuine ones belong into good/.")
        for what, names in self._odd.items():
            layout.notes.append(f"{len(names)} pictures {what}, first {names[0]}.")


def _first(steps: _Steps) -> int | None:
    return next((i for i, (_, role) in enumerate(steps) if role), None)


def _spoken(path: Path, artworks: Sequence[str], below: list[str]) -> tuple[str, list[str]]:
    """Which of the artworks the folders or the file name speak of, and the folders that do not."""
    for name in below:
        hits = [a for a in artworks if a == name] or [a for a in artworks if words.plain(a) == words.plain(name)]
        if len(hits) == 1:
            return hits[0], [other for other in below if other != name]
    artwork = words.spoken_of(path.stem, artworks)
    if artwork is None:
        raise _Unclear(f"cannot tell which painting it shows ({', '.join(artworks)}): write it into the file name")
    return artwork, below


def _telling(steps: _Steps) -> set[str]:
    """The folder names that a mask has in common with its picture: artwork and kind."""
    named = {name for name, role in steps if role in (None, NORMAL_KIND)}
    told = {name for name, role in steps if role == ANOMALY_KIND and not name.isdigit() and words.kind_of(name) != role}
    return {words.plain(name) for name in named | told}


def _bare(stem: str) -> str:
    """A mask's stem without what makes it a mask's: ``000.jpg_mask`` -> ``000``."""
    stem = _MASK_STEM.sub("", stem)
    return Path(stem).stem if Path(stem).suffix.lower() in IMAGE_SUFFIXES else stem


def _listed(root: Path) -> tuple[list[Path], list[Path], int]:
    """Pictures by their suffix, broken links among them; other files; the number of hidden ones. Links are followed."""
    pictures, others, n_hidden, seen = [], [], 0, set()
    for here, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(here) in seen:  # a linked folder that leads back into itself is entered once
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        for name in filter(words.is_hidden, folders):
            n_hidden += sum(len(inside) for *_, inside in os.walk(os.path.join(here, name)))
        n_hidden += sum(map(words.is_hidden, names))
        folders[:] = sorted((name for name in folders if not words.is_hidden(name)), key=_natural)
        for path in (Path(here, name) for name in sorted(names, key=_natural) if not words.is_hidden(name)):
            if path.name not in _OURS:
                (pictures if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return pictures, others, n_hidden


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts 9.png before 10.png."""
    return [(0, int(digits), "") if digits else (1, 0, text) for digits, text in re.findall(r"(\d+)|(\D+)", name)]
