"""What each picture of a folder or table is, from the names above it or the cells beside it. No pixel is looked at.

A folder's name, or a cell, says a split (``train``), a label (``good``, ``fake``), masks (``ground_truth``), nothing
(``images``), or it is any other name: the artwork above split and label, a kind of anomaly below, at any depth."""

import io
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from helpers.data import names
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.names import ANOMALY_KIND, DatasetError, Meaning
from helpers.records import NORMAL_KIND, Sample

GENUINE_ONLY = "genuine pictures only, all to learn from; there is no test/ folder"
_COLUMNS = ("image_path", "category", "split", "label", "kind", "mask_path", "group")
_OURS = ("manifest.csv", "manifest.json", "synthesis.jsonl")
_MASK_STEM = re.compile(
    r"(?i)[_\-. ]+(anomaly|defect)?[_\-. ]*(masks?|gt|ground.?truth|labels?|seg(mentation)?|annotation)([_ -]?\d+)?$"
    r"|^(masks?|gt|label|seg)[_\-. ]+"
)


@dataclass
class FolderReading:
    """What was understood of a folder or table: readable pictures (``group`` joins copies of one), files that are not
    used and why, and sentences with the files, folders or columns that each is about."""

    source: Path
    layout: str
    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    notes: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    count_real: bool = False  # for a dataset, its anomalous pictures count towards the number asked for
    identity: str = ""  # what a frozen dataset is compared by, instead of pictures, labels, masks and groups

    def describe(self) -> str:
        """Numbers of pictures and masks, then notes and files left out."""
        rows = [(s.category, s.split, s.kind, s.mask_path is not None) for s in self.samples]
        table = pd.DataFrame(rows, columns=["artwork", "split", "kind", "masks"]).groupby(["artwork", "split", "kind"])
        lines = [f"{self.source}: {self.layout}"]
        lines += [table["masks"].agg(pictures="size", masks="sum").to_string()] if rows else ["no picture can be used"]
        for note, items in self.notes.items():
            more = f" and {len(items) - 6} more" if len(items) > 6 else ""
            lines += [f"Note: {', '.join(items[:6])}{more}: {note}."] if items else []
        lines += [f"Files left out: {len(self.left_out)}"] if self.left_out else []
        lines += [f"  {one['path']}: {one['reason']}" for one in self.listed()[:12]]
        return "\n".join(lines + ["  ... (all: manifest.json)"] * (len(self.left_out) > 12))

    def short(self, path: Path) -> str:
        """A path from the source on, as text that can be printed: file systems allow names that cannot."""
        text = path.as_posix().removeprefix(f"{self.source.as_posix()}/")
        return text.encode("utf-8", "replace").decode("utf-8")

    def listed(self) -> list[dict[str, str]]:
        """The files left out, for JSON."""
        return [{"path": self.short(path), "reason": reason} for path, reason in self.left_out]


@dataclass
class File:
    """A picture and what the folders above it, or the cells of its row, say. ``head``, ``tail`` are other names above
    and below the ``first`` split or label: "train" ..., True for normal, False for anomalous, None where is neither."""

    path: Path
    said: Sequence[Meaning]
    where: str = ""  # the row
    mask: Path | None = None
    group: str = ""

    def __post_init__(self) -> None:
        said = [one for one in self.said if any(one)]
        at = next((i for i, one in enumerate(said) if one.split or one.kind), len(said))
        titles = ["" if one.kind else one.told for one in said]
        self.head, self.tail = tuple(filter(None, titles[:at])), tuple(filter(None, titles[at:]))
        self.first = next((one.split or one.kind == NORMAL_KIND for one in said[at:]), None)
        self.child = "".join(titles[at + 1 : at + 2])  # directly below the first
        self.splits, self.kinds = {one.split for one in said if one.split}, [one.kind for one in said if one.kind]
        self.told = {names.plain(one.told) for one in said} - {""}


class Tree:
    """Places of pictures: where labels and artworks stand, by the other names above them."""

    def __init__(self, files: Sequence[File], *, has_masks: bool = False) -> None:
        self.files, self.is_labelled = files, has_masks or any(file.first is not None for file in files)
        self.has_folders = any(file.head or file.first is not None for file in files)
        self.labels, self.artworks = {}, {}
        for head in {file.head for file in files if file.first is not None}:
            below = defaultdict(set)  # first split or label -> names below it
            for file in files:
                if file.head == head:
                    below[file.first].add(file.child)
            self.labels[head] = {True, False} & {*below}
            learnt = below["train"] | below["calibration"]
            if "" not in learnt and (learnt or below[True] & below[False] - {""}):
                self.artworks[head] = sorted((learnt or below[True]) - {""})

    def place(self, file: File) -> tuple[tuple[str, ...], Sample]:
        """The names that identify the artwork, and the picture without its category; DatasetError: it is not used."""
        head, tail, beside, is_lost = file.head, file.tail, set(), False
        labels = {kind == NORMAL_KIND for kind in file.kinds}
        if len(file.splits) > 1 or len(labels) > 1:
            raise DatasetError("two things at once are said of it")
        if file.first is None:  # perhaps folders with labels stand beside it
            above = next((head[:at] for at in range(len(head), -1, -1) if self.labels.get(head[:at])), None)
            is_lost = above is None and (self.is_labelled or (self.has_folders and not head))
            beside, above = self.labels.get(above, set()), head[:1] if above is None else above
            head, tail = above, head[len(above) :]
        artworks = self.artworks.get(head, [])
        if artworks:
            artwork = names.spoken_of([*tail, file.path.stem], artworks)
            if artwork is None:
                raise DatasetError(f"which painting does it show ({', '.join(artworks)})? Write it into the file name")
            head, tail = (*head, artwork), tuple(name for name in tail if names.plain(name) != names.plain(artwork))
        split, kind = next(iter(file.splits), None), NORMAL_KIND
        decides = beside or split == "test"  # a folder without a label says a kind
        if is_lost or (decides and not labels and (beside == {False}) == bool(tail)):
            raise DatasetError("no folder says what it is: move it into good/, or the folder of its painting or kind")
        if False in labels:
            stated = (*file.kinds, *map(names.kind_of, tail[:1]))
            kind = next((kind for kind in stated if kind != ANOMALY_KIND), ANOMALY_KIND)
        elif not labels and tail and (decides or (file.first is not None and not artworks)):
            kind = names.kind_of(tail[0])
        is_anomalous, unlabelled = kind != NORMAL_KIND, head if artworks or file.first is None else ()
        split = split or ("test" if is_anomalous else "train")
        if is_anomalous and split != "test":
            raise DatasetError("anomalous, so not used: detectors learn from normal pictures only")
        if is_anomalous and not file.where and _MASK_STEM.search(file.path.stem):
            raise DatasetError("named like a mask, but its picture is not beside it")
        stems = () if labels or file.where else (file.path.stem,)
        if not is_anomalous and any(map(names.says_forged, (*unlabelled, *tail, *stems))):
            raise DatasetError("its name or a folder above it says otherwise than genuine: rename that, or use good/")
        return head, Sample(file.path, "", is_anomalous, file.mask if is_anomalous else None, split, kind, file.group)

    def read_into(self, reading: FolderReading) -> list[File]:
        """Add every picture to ``reading``, with its category, or to its files left out; the files that were added."""
        placed, taken = {}, set()
        for file in self.files:
            try:
                head, sample = self.place(file)
                if (head, file.path) in placed:
                    raise DatasetError("named in an earlier row already")
                placed[head, file.path] = file, sample
            except DatasetError as reason:
                reading.left_out.append((file.path, f"{file.where}{reason}"))
        # Two artworks never share a category, which is safe in paths.
        titles = {head: head[-1] if head else reading.source.name for head, _ in placed}
        categories = {head: names.unique(names.clean(title), taken) for head, title in titles.items()}
        reading.samples = [replace(sample, category=categories[head]) for (head, _), (_, sample) in placed.items()]
        return [file for file, _ in placed.values()]


def read(source: Path) -> FolderReading:
    """What every picture of a folder or table is, as far as names tell. ``DatasetError``: it is neither."""
    if source.is_file() and source.suffix.lower() not in (".csv", ".tsv"):
        raise DatasetError(f"{source} is neither a folder nor a CSV (an archive: unpack it).")
    if source.is_file():
        return read_table(source)
    reading, tables = read_tree(source), []
    if reading.layout == GENUINE_ONLY:  # folders with labels say more than a table that was not asked for
        for path in sorted({*source.glob("*.[ct]sv")} - {source / name for name in _OURS}):
            with suppress(DatasetError):
                tables.append(read_table(path))
    if tables[1:]:
        raise DatasetError(f"{source} holds several tables: {[one.layout for one in tables]}. Give the path of one.")
    return tables[0] if tables else reading


def read_tree(root: Path) -> FolderReading:
    """What every picture below a folder is, from the names of folders and files."""
    reading = FolderReading(root, "labelled folders; where no name says a split, normal pictures are learnt from")
    paths = _listed(root, reading)
    folders = {name for path in paths for name in path.relative_to(root).parts[:-1]}
    meanings = {name: names.meaning_of(names.repaired(name)) for name in folders}
    beside = {name: _bare(name) for name in folders if _bare(name) in folders - {name}}  # crack_mask/ beside crack/
    meanings |= {name: Meaning(is_mask=True, told=bare) for name, bare in beside.items()}
    unclear = {name for name in folders if names.plain(name) in names.vocabulary()["unclear"]}
    if {name for name in folders if name.isdigit()} <= {"0", "1"}:  # else they number paintings
        if any(meaning.split for meaning in meanings.values()):
            meanings |= {"0": Meaning(kind=NORMAL_KIND), "1": Meaning(kind=ANOMALY_KIND)}
        elif len(unclear) > 1:
            meanings |= dict.fromkeys(unclear)  # labels or titles
    stems, files, masks = {(path.parent, path.stem) for path in paths}, [], []
    for path in paths:
        said, bare = [meanings[name] for name in path.relative_to(root).parts[:-1]], _bare(path.stem)
        if None in said:
            reading.left_out += [(path, "0/ and 1/ (before/, after/ ...) may be labels or paintings: say good/, bad/")]
        elif any(one.is_mask for one in said) or (bare != path.stem and (path.parent, bare) in stems):
            masks.append(File(path, said))
        else:
            files.append(File(path, said))
    tree = Tree(files, has_masks=bool(masks))
    _match_masks(masks, tree.read_into(reading), reading)
    if not tree.is_labelled:
        reading.layout = GENUINE_ONLY
        inner = sorted({"/".join(file.head[:2]) for file in files if file.head[1:]})
        reading.notes["not artworks of their own"] = inner if len({file.head[:2] for file in files}) > 1 else []
    return reading


def _match_masks(masks: Sequence[File], files: Sequence[File], reading: FolderReading) -> None:
    """Give each anomalous picture its mask; leave out masks that fit none, or several, or are several."""
    by_stem, found = defaultdict(list), defaultdict(list)
    for index, file in enumerate(files):
        if reading.samples[index].is_anomalous:
            by_stem[file.path.stem].append(index)
    for mask in masks:
        near = [index for stem in {mask.path.stem, _bare(mask.path.stem)} for index in by_stem[stem]]
        fits = [i for i in near if files[i].told == mask.told] or [i for i in near if files[i].told > mask.told]
        found[fits[0] if len(fits) == 1 else None].append(mask.path)
    for index, paths in found.items():
        if index is not None and len(paths) == 1:
            reading.samples[index] = replace(reading.samples[index], mask_path=paths[0])
        else:
            reading.left_out += [(path, "not used: not the one mask of one anomalous picture") for path in paths]


def _bare(stem: str) -> str:
    """A mask's stem without what makes it a mask's: ``000.jpg_mask`` -> ``000``."""
    stem = _MASK_STEM.sub("", stem)
    return Path(stem).stem if Path(stem).suffix.lower() in IMAGE_SUFFIXES else stem


def _listed(root: Path, reading: FolderReading) -> list[Path]:
    """Pictures by their suffix, broken links among them; other files are left out. Links are followed."""
    pictures, hidden, seen = [], reading.notes["hidden files, thumbnails and the like, ignored"], set()
    for here, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(here) in seen:  # a linked folder that leads back into itself
            folders[:], files = [], []
        seen.add(os.path.realpath(here))
        hidden += [name for name in sorted([*files, *folders]) if names.is_hidden(name)]
        folders[:] = sorted({*folders} - {*hidden})
        for path in (Path(here, name) for name in sorted({*files} - {*hidden, *_OURS})):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                reading.left_out.append((path, "no picture of a format that is read (an archive: unpack it)"))
            elif reading.short(path) != path.relative_to(root).as_posix():
                reading.left_out.append((path, "its name is not valid UTF-8: rename it"))
            else:
                pictures.append(path)
    return pictures


def read_table(table: Path) -> FolderReading:
    """The rows of a table; paths in it start from its folder (or, as VisA writes them, from the folder above).
    ``DatasetError``: no column names the pictures, or others are there but none is understood as a label."""
    reading, files = FolderReading(table.parent, f"CSV table {table.name}"), []
    frame, unknown = _frame(table, reading)
    columns, has_labels = f"{table} has the columns {', '.join([*frame, *unknown])}", {"label", "kind"} & {*frame}
    if "image_path" not in frame:
        known = ", ".join(names.vocabulary()["column image_path"])
        raise DatasetError(f"{columns}; one must name the picture: {known}.")
    if not has_labels and (unknown or "mask_path" in frame):
        raise DatasetError(f"{columns}; none of them is understood as a label: name one so, or give paths alone.")
    reading.notes["no column label: all pictures count as genuine"] = [] if has_labels else [table.name]
    reading.notes["columns that were not read"] = unknown
    rows = frame.reindex(columns=_COLUMNS, fill_value="")
    if "label" not in frame:
        rows["kind"] = rows["kind"].replace("", NORMAL_KIND)
    elif "kind" not in frame and NORMAL_KIND in {names.meaning_of(cell).kind for cell in rows["label"]}:
        rows = rows.rename(columns={"label": "kind", "kind": "label"})  # labels like good, crack, tear
    for number, row in enumerate(rows.to_dict("records"), start=2):
        path, mask = (_resolved(table.parent, row[name]) for name in ("image_path", "mask_path"))
        where, mask = f"row {number} of {table.name}: ", mask if row["mask_path"] else None
        try:
            kinds, split = [names.kind_of(row["kind"])] if row["kind"] else [], names.meaning_of(row["split"]).split
            kinds += [names.meaning_of(row["label"]).kind] if row["label"] or not kinds else []
            if None in kinds or (row["split"] and not split):
                allowed = "allowed are normal, anomaly, good, 0, 1 ..., and train, calibration, test"
                raise DatasetError(f"label is {row['label'] or row['kind']!r}, split is {row['split']!r}; {allowed}")
            said = [Meaning(told=row["category"] or table.parent.name), Meaning(split)]
            said += [Meaning(kind=kind) for kind in kinds]
            files.append(File(path, said, where, mask, row["group"]))
        except DatasetError as error:
            reading.left_out.append((path, f"{where}{error}"))
    Tree(files).read_into(reading)
    return reading


def _frame(table: Path, reading: FolderReading) -> tuple[pd.DataFrame, list[str]]:
    """Columns that are understood, by their meaning: stripped text, empty cells as "", labels like 0 and no as words;
    and the names of other columns."""
    content, words = table.read_bytes(), names.vocabulary()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        reading.notes["not UTF-8; read as Windows-1252, so check names with accents"] = [table.name]
    separator = max(",;\t|", key="".join(text.splitlines()[:1]).count)
    options = {"dtype": str, "keep_default_na": False, "index_col": False}
    try:
        frame = pd.read_csv(io.StringIO(text, newline=None), sep=separator, engine="python", **options).fillna("")
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise DatasetError(f"{table} cannot be read as a table ({error}).") from error
    columns = {names.plain(str(column)): column for column in reversed(frame.columns)}  # the first of equal ones
    aliases = {meaning: list(words[f"column {meaning}"]) for meaning in _COLUMNS}
    aliases["label"] += [name for name in columns if names.meaning_of(name.removeprefix("is_")).kind]  # is_defect
    known = {meaning: columns[name] for meaning, found in aliases.items() for name in found[::-1] if name in columns}
    unknown = [name for name in map(str, frame) if name not in known.values() and not name.startswith("Unnamed")]
    frame = frame[[*known.values()]].set_axis([*known], axis=1)
    frame = frame.map(lambda cell: cell.strip() * (cell.strip().casefold() not in words["cell empty"]))
    for column in {"label", "kind"} & {*frame}:
        is_turned = names.meaning_of(names.plain(str(known[column])).removeprefix("is_")).kind == NORMAL_KIND
        order = (ANOMALY_KIND, NORMAL_KIND) if is_turned else (NORMAL_KIND, ANOMALY_KIND)  # "genuine: yes" is good
        good, bad = (words[f"cell {label}"] for label in order)
        said = dict.fromkeys(good, NORMAL_KIND) | dict.fromkeys(bad, ANOMALY_KIND)
        frame[column] = [said.get(cell.casefold(), cell) for cell in frame[column]]
    return frame, unknown


def _resolved(root: Path, name: str) -> Path:
    """A path as a table writes it: relative to the table's folder, perhaps with Windows separators."""
    tries = [base / text for text in (name, name.replace("\\", "/")) for base in (root, root.parent)]
    return Path(os.path.abspath(next((path for path in tries if path.is_file()), tries[0])))
