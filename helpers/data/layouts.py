"""Folder layouts: which picture is which, read from exact folder names or from a CSV. No pixel is looked at here.

:func:`recognise` tells the layouts apart and refuses in words what it does not understand. Names are compared whole,
after lower-casing and turning spaces and hyphens into underscores: ``non_anomaly`` contains ``anomaly``, so parts of
names decide nothing about labels.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.data.images import IMAGE_SUFFIXES
from helpers.records import NORMAL_KIND

SPLIT_NAMES = {
    "train": frozenset(("train", "training", "train_data", "training_data", "train_set")),
    "calibration": frozenset(("calibration", "validation", "val", "valid")),
    "test": frozenset(("test", "testing", "test_data", "test_set", "test_public")),
}
NORMAL_NAMES = frozenset(
    "good normal normals non_anomaly non_anomalies non_anomalous nonanomaly no_anomaly not_anomalous ok genuine "
    "original originals 0 false".split()
)
ANOMALY_NAMES = frozenset("anomaly anomalies anomalous abnormal bad defect 1 true".split())
MASK_NAMES = frozenset(("ground_truth", "groundtruth", "masks"))
ANOMALY_KIND = "anomaly"
"""Kind of anomalous pictures whose folder says no more than that."""

MVTEC, VISA, REPORT, CSV, LABELLED, PER_PAINTING, FLAT = (
    "MVTec layout",
    "VisA layout",
    "the report's two trees",
    "CSV table",
    "labelled folders",
    "one folder per painting",
    "flat folder",
)
EXPECTED = f"""Understood are:
  {MVTEC}: <category>/train/good, <category>/test/good, <category>/test/<kind>, <category>/ground_truth/<kind>
  {REPORT}: train/<painting>/..., test/anomaly/... and test/non_anomaly/...
    (in test/ the painting is a subfolder or stands in the file name)
  {LABELLED}: good/... and <kind>/... of one painting, or <painting>/good/... and <painting>/<kind>/...
  {PER_PAINTING}: <painting>/... with genuine pictures only
  {FLAT}: genuine pictures of one painting
  {VISA}: split_csv/1cls.csv beside the category folders
  {CSV}: a row per picture with the columns image_path, category, split, label, kind, mask_path
    (all but image_path optional)"""

_COLUMNS = {
    "image_path": ("image_path", "image", "path", "file", "filename", "file_name", "img_path"),
    "category": ("category", "object", "painting", "artwork", "class", "cls_name"),
    "split": ("split", "phase", "subset"),
    "label": ("is_anomalous", "label", "anomaly", "is_anomaly"),
    "kind": ("kind", "type", "defect"),
    "mask_path": ("mask_path", "mask"),
    "group": ("group", "source"),
    "visibility": ("visibility",),
    "synthesis_seed": ("synthesis_seed",),
}
_MASK_ENDING = re.compile(r"[_-](mask|gt|ground_?truth)$", re.IGNORECASE)
_STOP_WORDS = frozenset("a an and at by for from in la le of on the to with".split())


class DatasetError(ValueError):
    """A folder that cannot be used; the message says what was seen, what is expected and what to do."""


@dataclass(frozen=True)
class Found:
    """One picture that a layout names; whether it can be read is another question."""

    image_path: Path
    category: str
    split: str
    kind: str = NORMAL_KIND
    mask_path: Path | None = None
    group: str = ""
    visibility: float | None = None
    synthesis_seed: int | None = None


@dataclass
class Layout:
    """What :func:`recognise` understood.

    Attributes:
        name: one of the layouts' names in this module.
        found: the pictures, ordered.
        problems: files that cannot be used and why.
        notes: everything else the user should know, a sentence each.
    """

    name: str
    found: list[Found] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def recognise(source: Path) -> Layout:
    """Find out how a folder (or CSV file) is laid out.

    Raises:
        FileNotFoundError: there is no such folder.
        DatasetError: no layout fits; the message shows the tree that was seen and the ones that are understood.
    """
    source = Path(os.path.abspath(source))
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. Give the folder (or CSV file) of your pictures.")
    if source.is_file():
        if source.suffix.lower() not in (".csv", ".tsv"):
            what = "an archive: unpack it first" if source.suffix.lower() in _ARCHIVES else "neither a folder nor a CSV"
            raise DatasetError(f"{source} is {what}. {EXPECTED}")
        return _from_csv(source)
    splits = _split_folders(source)
    if (table := _visa_table(source)) is not None:
        return _from_csv(table, name=VISA, root=source)
    if splits and _is_category(splits):
        return _from_mvtec({clean(source.name): source})
    if "train" in splits:
        return _from_report(source, splits)
    categories = {clean(folder.name): folder for folder in _folders(source) if _is_category(_split_folders(folder))}
    if categories:
        return _from_mvtec(categories, ignored=[f for f in _folders(source) if f not in categories.values()])
    if (table := _only_table(source)) is not None:
        return _from_csv(table)
    return _from_simple_folders(source)


def plain(name: str) -> str:
    """A name for comparison: ``"Non-Anomaly "`` -> ``"non_anomaly"``."""
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", name).strip().casefold())


def clean(name: str) -> str:
    """A name for categories and kinds: composed Unicode (macOS stores it decomposed), no spaces.

    >>> clean(" Mona Lisa ")
    'Mona_Lisa'
    """
    return re.sub(r"\s+", "_", unicodedata.normalize("NFC", name).strip())


def label_of(name: str) -> str | None:
    """``"good"`` for a name that says normal, ``"anomaly"`` for one that says anomalous, else None.

    >>> label_of("non_anomaly"), label_of("Anomaly"), label_of("box")
    ('good', 'anomaly', None)
    """
    word = plain(name)
    return NORMAL_KIND if word in NORMAL_NAMES else ANOMALY_KIND if word in ANOMALY_NAMES else None


def kind_of(name: str) -> str:
    """The kind that a folder's name states: ``"good"``, ``"anomaly"``, or the name itself.

    Raises:
        DatasetError: the name only begins like a normal one; it would be guessed wrong either way.

    >>> kind_of("Non-Anomaly"), kind_of("face swap")
    ('good', 'face_swap')
    """
    if re.fullmatch(r"(non?|not|normal|good|genuine)(_.*|\d+)", plain(name)) and label_of(name) is None:
        raise DatasetError(
            f"The name {name!r} may mean normal pictures or a kind of anomaly. Call it good (or non_anomaly) if its "
            "pictures are normal; else give it a name that does not begin like this."
        )
    return label_of(name) or clean(name)


def outline(folder: Path, depth: int = 3, limit: int = 24) -> str:
    """The tree below a folder in words, for messages: folders with the number of pictures directly in them."""
    lines: list[str] = []

    def walk(here: Path, level: int) -> None:
        if len(lines) < limit:
            lines.append(f"{'  ' * level}{here.name or here}/  ({len(list(_pictures_in(here)))} pictures)")
        if level < depth:
            for child in _folders(here):
                walk(child, level + 1)

    walk(folder, 0)
    return "\n".join(lines) + ("\n  ..." if len(lines) == limit else "")


# --- the layouts -----------------------------------------------------------------------------------------------------


def _from_mvtec(categories: dict[str, Path], ignored: Iterable[Path] = ()) -> Layout:
    layout = Layout(MVTEC)
    for folder in ignored:
        if any(_pictures_below(folder)):
            layout.notes.append(f"{folder.name}/ has neither train/good nor test/good below it and was not read.")
    for category, root in categories.items():
        for split, folder in _split_folders(root).items():
            masks = [m for base in (root, folder) for m in _folders(base) if plain(m.name) in MASK_NAMES]
            for path in _pictures_in(folder):
                if split == "test":
                    layout.problems.append((path, "lies directly in test/: move it to test/good or test/<kind>"))
                else:
                    layout.found.append(Found(path, category, split))
            for kind_folder in _folders(folder):
                if plain(kind_folder.name) in MASK_NAMES:
                    continue
                kind = kind_of(kind_folder.name)
                pictures = list(_pictures_below(kind_folder))
                if kind == NORMAL_KIND or split == "test":
                    found_masks = {} if kind == NORMAL_KIND else _masks_of_kind(masks, kind_folder.name)
                    for path in pictures:
                        layout.found.append(Found(path, category, split, kind, found_masks.pop(path.stem, None)))
                    for orphan in found_masks.values():
                        layout.problems.append((orphan, f"mask without a picture in {split}/{kind_folder.name}/"))
                elif pictures:
                    layout.notes.append(
                        f"{category}/{folder.name}/{kind_folder.name}/: {len(pictures)} pictures not used, because "
                        "detectors learn from normal pictures only. Move them to test/."
                    )
    return layout


def _from_report(root: Path, splits: dict[str, Path]) -> Layout:
    layout = Layout(REPORT)
    categories: list[str] = []
    for split in ("train", "calibration"):
        for folder in _folders(splits[split]) if split in splits else ():
            categories.append(clean(folder.name))
            for path in _pictures_below(folder):
                if ANOMALY_KIND in map(label_of, path.relative_to(folder).parts[:-1]):
                    layout.problems.append((path, "anomalous, so not used: detectors learn from normal pictures only"))
                else:
                    layout.found.append(Found(path, clean(folder.name), split))
    categories = sorted(set(categories))
    if not categories:
        raise _refusal(root, "train/ holds neither pictures, nor good/, nor a folder per painting.")
    by_name = {plain(category): category for category in categories}
    for outer in _folders(splits["test"]) if "test" in splits else ():
        for path in _pictures_below(outer):
            folders = [outer.name, *path.relative_to(outer).parts[:-1]]
            try:
                layout.found.append(_found_in_test_tree(path, folders, by_name))
            except _Unclear as reason:
                layout.problems.append((path, str(reason)))
    if "test" in splits:
        loose = list(_pictures_in(splits["test"]))
        layout.problems += [(path, "lies directly in test/: move it to anomaly/ or non_anomaly/") for path in loose]
    return layout


class _Unclear(Exception):
    """Why one picture's place does not say what it is."""


def _found_in_test_tree(path: Path, folders: list[str], by_name: dict[str, str]) -> Found:
    """A test picture of the report's tree, from the names of the folders above it; ``by_name`` knows the paintings."""
    named = [by_name[plain(name)] for name in folders if plain(name) in by_name]
    kinds = [kind_of(name) for name in folders if plain(name) not in by_name]
    category = named[0] if named else category_from_name(path.stem, [*by_name.values()])
    if category is None:
        raise _Unclear(
            f"cannot tell which painting it shows ({', '.join(by_name.values())}): put it into a subfolder of that "
            "name or write the name into the file name"
        )
    if not kinds:
        raise _Unclear("is neither below anomaly/ nor non_anomaly/")
    if (kinds[0] == NORMAL_KIND) != (NORMAL_KIND in kinds):
        raise _Unclear(f"{'/'.join(folders)} says anomalous and normal at once")
    # anomaly/replica/x.jpg says more than anomaly/x.jpg; non_anomaly/louvre/x.jpg stays normal.
    kind = kinds[-1] if kinds[0] == ANOMALY_KIND else kinds[0]
    return Found(path, category, "test", kind)


def _from_simple_folders(root: Path) -> Layout:
    """Labelled folders of one or more paintings, a folder per painting, or pictures directly in the folder."""
    loose = list(_pictures_in(root))
    folders = [folder for folder in _folders(root) if any(_pictures_below(folder))]
    if not folders and not loose:
        raise _refusal(root, "There is no picture in it." + _other_files(root))
    for folder in folders:
        if splits := _split_folders(folder):
            names = ", ".join(f"{path.name}/" for path in splits.values())
            raise _refusal(root, f"{folder.name}/ holds {names}: if that is the dataset, give {folder} instead.")
    if not folders:
        notes = [f"All pictures count as genuine ones of one painting, {clean(root.name)}."]
        return Layout(FLAT, [Found(path, clean(root.name), "train") for path in loose], notes=notes)
    if _is_labelled(root):
        layout = _from_labelled([root])
    elif any(label_of(folder.name) for folder in folders):
        raise _refusal(root, "There is a folder of anomalous pictures but none of normal ones (good/ or non_anomaly/).")
    elif labelled := [folder for folder in folders if _is_labelled(folder)]:
        layout = _from_labelled(labelled)
        others = [folder.name for folder in folders if folder not in labelled]
        layout.notes += [f"{name}/ has no good/ below it and was not read." for name in others]
    else:
        layout = Layout(PER_PAINTING)
        for folder in folders:
            layout.found += [Found(path, clean(folder.name), "train") for path in _pictures_below(folder)]
        layout.notes.append("All pictures count as genuine ones to learn from; there is no test/ folder.")
    if loose:
        layout.notes.append(f"{len(loose)} pictures directly in {root.name}/ were not read, first {loose[0].name}.")
    return layout


def _is_labelled(folder: Path) -> bool:
    return any(label_of(child.name) == NORMAL_KIND for child in _folders(folder))


def _from_labelled(categories: list[Path]) -> Layout:
    layout = Layout(LABELLED, notes=["No train/ and test/: normal pictures count as train, anomalous ones as test."])
    for root in categories:
        masks = [folder for folder in _folders(root) if plain(folder.name) in MASK_NAMES]
        for folder in _folders(root):
            if folder in masks:
                continue
            kind = kind_of(folder.name)
            found_masks = {} if kind == NORMAL_KIND else _masks_of_kind(masks, folder.name)
            split = "train" if kind == NORMAL_KIND else "test"
            for path in _pictures_below(folder):
                layout.found.append(Found(path, clean(root.name), split, kind, found_masks.get(path.stem)))
    return layout


def _from_csv(table: Path, *, name: str = CSV, root: Path | None = None) -> Layout:
    layout = Layout(name)
    root = root or table.parent
    rows, columns = _read_table(table, layout)
    if "image_path" not in columns:
        raise DatasetError(
            f"{table} has the columns {', '.join(rows[0]) if rows else 'of an empty file'}; one must name the picture: "
            f"{', '.join(_COLUMNS['image_path'])}. {EXPECTED}"
        )
    seen: set[tuple[Path, str]] = set()
    for number, row in enumerate(rows, start=2):
        values = {key: (row.get(column) or "").strip() for key, column in columns.items()}
        path = _resolve(root, values["image_path"])
        try:
            found = _found_in_row(values, path, root, default_category=clean(root.name))
            if (path, found.category) in seen:
                raise ValueError("named in an earlier row already")
        except ValueError as error:
            layout.problems.append((path, f"row {number} of {table.name}: {error}"))
            continue
        seen.add((path, found.category))
        layout.found.append(found)
    return layout


def _found_in_row(values: dict[str, str], path: Path, root: Path, *, default_category: str) -> Found:
    """One row of a table; ValueError says which cell is wrong."""
    if not values["image_path"]:
        raise ValueError("no picture named")
    kind, label = values.get("kind", ""), values.get("label", "")
    if kind:
        kind_of(kind)
    stated = label_of(label) if label else label_of(kind) if kind else NORMAL_KIND
    if stated is None and label:
        raise ValueError(f"label is {label!r}; allowed are normal, anomaly, good, 0, 1, true, false")
    is_normal = stated == NORMAL_KIND
    if is_normal and kind and label_of(kind) != NORMAL_KIND:
        raise ValueError(f"label says normal but kind is {kind!r}")
    if label and not is_normal and kind and label_of(kind) == NORMAL_KIND:
        raise ValueError(f"label says anomalous but kind is {kind!r}")
    split = "train" if is_normal else "test"
    if values.get("split"):
        split = next((s for s, names in SPLIT_NAMES.items() if plain(values["split"]) in names), "")
        if not split:
            raise ValueError(f"split is {values['split']!r}; allowed are train, calibration (or validation) and test")
    if not is_normal and split != "test":
        raise ValueError(f"an anomalous picture in split {split}: detectors learn from normal pictures only")
    mask = values.get("mask_path", "")
    return Found(
        path,
        clean(values.get("category", "")) or default_category,
        split,
        NORMAL_KIND if is_normal else clean(kind) or ANOMALY_KIND,
        _resolve(root, mask) if mask and not is_normal else None,
        values.get("group", ""),
        float(values["visibility"]) if values.get("visibility") else None,
        int(values["synthesis_seed"]) if values.get("synthesis_seed") else None,
    )


def category_from_name(stem: str, categories: list[str]) -> str | None:
    """Which painting a file name speaks of; None when it names none of them, or two.

    First the whole name, with or without separators; then the words that only one painting's name has.

    >>> names = ["girl_with_a_pearl_earring", "mona_lisa"]
    >>> category_from_name("MonaLisa-07", names), category_from_name("fake pearl 3", names)
    ('mona_lisa', 'girl_with_a_pearl_earring')
    >>> category_from_name("IMG_2041", names) is None
    True
    """
    if len(categories) == 1:
        return categories[0]
    spoken = plain(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", stem))
    joined = spoken.replace("_", "")
    whole = [c for c in categories if plain(c).replace("_", "") in joined]
    whole = [c for c in whole if not any(c != other and plain(c) in plain(other) for other in whole)]
    if whole:
        return whole[0] if len(whole) == 1 else None
    words = {c: set(re.findall(r"[^\W\d_]{2,}", plain(c))) - _STOP_WORDS for c in categories}
    said = set(re.findall(r"[^\W\d_]{2,}", spoken))
    hits = [c for c in categories if said & words[c] - set().union(*(words[o] for o in categories if o != c))]
    return hits[0] if len(hits) == 1 else None


# --- small readers ---------------------------------------------------------------------------------------------------

_ARCHIVES = frozenset((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz"))


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Entries in natural order, without hidden ones and what macOS and Windows leave behind."""
    with os.scandir(folder) as entries:
        names = [e for e in entries if e.name[0] != "." and e.name not in ("__MACOSX", "Thumbs.db", "desktop.ini")]
    return iter(sorted(names, key=lambda entry: [*_natural(entry.name)]))


def _natural(name: str) -> Iterator[tuple[int, int, str]]:
    """Sort key that puts 9.png before 10.png."""
    for digits, text in re.findall(r"(\d+)|(\D+)", name):
        yield (0, int(digits), "") if digits else (1, 0, text)


def _folders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _visible(folder) if entry.is_dir()]


def _pictures_in(folder: Path) -> Iterator[Path]:
    """Files that claim to be pictures by their suffix, broken links among them, directly in a folder."""
    for entry in _visible(folder):
        if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir():
            yield folder / entry.name


def _pictures_below(folder: Path, seen: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The same at any depth; a linked folder that leads back into itself is entered once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    yield from _pictures_in(folder)
    for child in _folders(folder):
        yield from _pictures_below(child, seen | {real})


def _split_folders(folder: Path) -> dict[str, Path]:
    """The train, calibration and test folders directly in a folder."""
    found: dict[str, Path] = {}
    for child in _folders(folder):
        for split, names in SPLIT_NAMES.items():
            if plain(child.name) in names:
                if split in found:
                    raise DatasetError(
                        f"{folder} has both {found[split].name}/ and {child.name}/, which mean the same ({split}). "
                        "Keep one of them."
                    )
                found[split] = child
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _is_category(splits: dict[str, Path]) -> bool:
    """True for the inside of one MVTec category: normal pictures straight below train/ (or test/)."""
    first = splits.get("train") or splits.get("test")
    if first is None:
        return False
    return any(_pictures_in(first)) or any(label_of(child.name) == NORMAL_KIND for child in _folders(first))


def _masks_of_kind(mask_roots: list[Path], kind_name: str) -> dict[str, Path]:
    """Mask file (or folder of masks) by the stem of its picture."""
    found: dict[str, Path] = {}
    for root in mask_roots:
        for folder in _folders(root):
            if plain(folder.name) == plain(kind_name):
                for path in (*_pictures_in(folder), *_folders(folder)):
                    found[_MASK_ENDING.sub("", path.name if path.is_dir() else path.stem)] = path
    return found


def _visa_table(root: Path) -> Path | None:
    folder = root / "split_csv"
    tables = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    return folder / "1cls.csv" if folder / "1cls.csv" in tables else tables[0] if tables else None


def _only_table(root: Path) -> Path | None:
    """The one CSV in a folder that has a column of pictures."""
    tables = []
    for entry in _visible(root):
        if Path(entry.name).suffix.lower() in (".csv", ".tsv") and entry.is_file():
            _, columns = _read_table(root / entry.name, Layout(CSV))
            if "image_path" in columns and {"category", "label", "kind", "split"} & set(columns):
                tables.append(root / entry.name)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise DatasetError(f"{root} holds several tables of pictures: {names}. Give the path of the one to use.")
    return tables[0] if tables else None


def _read_table(table: Path, layout: Layout) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows, and for each meaning the column that carries it."""
    content = table.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        layout.notes.append(f"{table.name} is not UTF-8; read as Windows-1252. Check names with accents.")
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="_more"))
    header = {plain(name): name for name in (rows[0] if rows else head.strip().split(delimiter)) if name != "_more"}
    columns = {
        meaning: next(header[name] for name in names if name in header)
        for meaning, names in _COLUMNS.items()
        if any(name in header for name in names)
    }
    return rows, columns


def _resolve(root: Path, name: str) -> Path:
    """A path as a table writes it: relative to the table's folder, perhaps with Windows separators."""
    path = root / name
    if "\\" in name and not path.exists():
        path = root / name.replace("\\", "/")
    return Path(os.path.abspath(path))


def _other_files(root: Path) -> str:
    archives = [entry.name for entry in _visible(root) if Path(entry.name).suffix.lower() in _ARCHIVES]
    return f" Unpack {', '.join(archives[:3])} first." if archives else ""


def _refusal(root: Path, reason: str) -> DatasetError:
    return DatasetError(f"{root} is not understood. {reason}\nSeen:\n{outline(root)}\n{EXPECTED}")
