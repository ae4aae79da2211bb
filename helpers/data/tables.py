"""Tables of pictures: any CSV -> what each picture is. Columns that are not understood are named, never guessed."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from helpers.data.layouts import File, FolderReading, Tree, Unclear
from helpers.data.names import ANOMALY_KIND, DatasetError, Meaning, kind_of, meaning_of, plain, vocabulary
from helpers.records import NORMAL_KIND

_COLUMNS = ("image_path", "category", "split", "label", "kind", "mask_path", "group")


def read_table(table: Path) -> FolderReading:
    """The rows of a table; paths in it start from its folder (or, as VisA writes them, from the folder above).

    ``DatasetError``: no column names the pictures, or others are there but none is understood as a label.
    """
    reading = FolderReading(table.parent, f"CSV table {table.name}")
    frame, unknown = _frame(table, reading)
    header = f"{table} has the columns {', '.join([*frame.columns, *unknown])}"
    if "image_path" not in frame:
        raise DatasetError(f"{header}; one must name the picture: {', '.join(vocabulary()['column image_path'])}.")
    if not {"label", "kind"} & set(frame.columns):
        if unknown or "mask_path" in frame:
            way = "Add a column label (normal or anomaly), or remove the other columns if all pictures are genuine."
            raise DatasetError(f"{header}; none of them is understood as a label. {way}")
        reading.notes.append(f"{table.name} has no column label: all pictures count as genuine.")
    if unknown:
        reading.notes.append(f"Columns of {table.name} that were not read: {', '.join(unknown)}.")
    if "label" not in frame:
        frame["kind"] = [kind or NORMAL_KIND for kind in frame.get("kind", [""] * len(frame))]
    elif "kind" not in frame and NORMAL_KIND in set(map(_stated, frame["label"])):  # labels like good, crack, tear
        frame = frame.rename(columns={"label": "kind"})
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(frame.reindex(columns=_COLUMNS, fill_value="").to_dict("records"), start=2):
        path, key = _resolved(table.parent, row["image_path"]), (row["image_path"], row["category"])
        try:
            if key in seen or not row["image_path"]:
                raise Unclear("named in an earlier row already" if row["image_path"] else "no picture named")
            _, sample = Tree().place(File(path, _meanings(row)))
            mask = _resolved(table.parent, row["mask_path"]) if sample.is_anomalous and row["mask_path"] else None
            reading.samples.append(replace(sample, category=row["category"], mask_path=mask, group=row["group"]))
            seen.add(key)
        except (Unclear, DatasetError) as error:
            reading.left_out.append((path, f"row {number} of {table.name}: {error}"))
    names = [sample.category or table.parent.name for sample in reading.samples]
    reading.name_categories(names, names)
    return reading


def tables_in(root: Path) -> list[Path]:
    """The tables in a folder that name pictures and say something about them, but for our own manifest."""
    found = []
    for path in sorted(root.glob("*.[ct]sv")):
        frame, unknown = _frame(path, FolderReading(path, ""))
        if "image_path" in frame and {"category", "label", "kind", "split"} & {*frame} and "sha256" not in unknown:
            found.append(path)
    return found


def _stated(value: str) -> str | None:
    """The label or kind that a cell states."""
    for label in (NORMAL_KIND, ANOMALY_KIND):
        if value.casefold() in vocabulary()[f"cell {label}"]:
            return label
    return meaning_of(value).kind


def _meanings(row: dict[str, str]) -> list[Meaning]:
    """A row like the names of the folders above a picture."""
    split, label, kind = row["split"], row["label"], row["kind"]
    said = [kind and (_stated(kind) or kind_of(kind)), _stated(label)]
    if split and not meaning_of(split).split:
        raise Unclear(f"split is {split!r}; allowed are train, calibration (or validation) and test")
    if not any(said) or (label and not said[1]):
        raise Unclear(f"label is {label!r}; allowed are normal, anomaly, good, 0, 1, true, false")
    return [Meaning("", split=meaning_of(split).split), *(Meaning("", kind=stated) for stated in said if stated)]


def _frame(table: Path, reading: FolderReading) -> tuple[pd.DataFrame, list[str]]:
    """Columns that are understood, by their meaning: stripped text, empty cells as ""; the names of other columns."""
    content = table.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        reading.notes.append(f"{table.name} is not UTF-8; read as Windows-1252. Check names with accents.")
    separator = max(",;\t|", key="".join(text.splitlines()[:1]).count)
    long: list[list[str]] = []
    options = {"dtype": str, "keep_default_na": False, "index_col": False, "on_bad_lines": long.append}
    try:
        frame = pd.read_csv(io.StringIO(text, newline=None), sep=separator, engine="python", **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise DatasetError(f"{table} cannot be read as a table ({error}).") from error
    reading.left_out += [(table, f"a row with too many cells: {', '.join(cells)[:80]}") for cells in long]
    frame = frame.fillna("").map(str.strip).map(lambda cell: cell * (cell.casefold() not in vocabulary()["cell empty"]))
    header = {plain(str(column)): column for column in reversed(frame.columns)}  # the first of equal ones
    aliases = {meaning: list(vocabulary()[f"column {meaning}"]) for meaning in _COLUMNS}
    aliases["label"] += [name for name in header if meaning_of(name.removeprefix("is_")).kind]  # is_defect
    known = {
        meaning: header[next(filter(header.get, names))] for meaning, names in aliases.items() if {*names} & {*header}
    }
    unknown = [name for name in map(str, frame) if name not in known.values() and not name.startswith("Unnamed")]
    return frame[[*known.values()]].set_axis([*known], axis=1), unknown


def _resolved(root: Path, name: str) -> Path:
    """A path as a table writes it: relative to the table's folder, perhaps with Windows separators."""
    tries = [base / text for text in (name, name.replace("\\", "/")) for base in (root, root.parent)]
    found = next((path for path in tries if name and path.exists()), tries[0])
    return Path(os.path.abspath(found))
