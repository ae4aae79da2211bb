"""Tables of pictures: any CSV -> what each picture is. Columns that are not understood are named, never guessed."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

from helpers.data.layouts import CSV, EXPECTED, Layout, apart, own_name
from helpers.data.names import ANOMALY_KIND, DatasetError, kind_of, label_of, plain, roles_of
from helpers.records import NORMAL_KIND, SPLITS, Sample

_COLUMNS = {
    "image_path": "image_path image path file filename file_name filepath file_path img_path image_file image_name img",
    "category": "category object painting artwork cls_name",
    "split": "split phase subset",
    "label": "is_anomalous label is_anomaly",
    "kind": "kind anomaly_kind anomaly_type defect_type",
    "mask_path": "mask_path mask mask_file",
    "group": "group",
}
_EMPTY = frozenset(("", "nan", "none", "null", "n/a", "na", "-", "<na>"))
_YES = frozenset("1 1.0 true yes y t ja wahr positive pos".split())
_NO = frozenset("0 0.0 false no n f nein falsch negative neg".split())


def read_table(table: Path, root: Path, name: str = CSV) -> Layout:
    """The rows of a table; paths in it start from ``root`` (or, as VisA writes them, from the folder above).

    Raises:
        DatasetError: no column names the pictures, or other columns are there but none is understood as a label.
    """
    layout = Layout(name, table if name == CSV else root)
    rows, columns, unknown = _rows(table, layout)
    header = f"{table} has the columns {', '.join([*columns.values(), *unknown]) or 'of an empty file'}"
    if "image_path" not in columns:
        raise DatasetError(f"{header}; one must name the picture: {_COLUMNS['image_path']}.\n{EXPECTED}")
    if not {"label", "kind"} & set(columns):
        if unknown or "mask_path" in columns:
            way = "Add a column label (normal or anomaly), or remove the other columns if all pictures are genuine."
            raise DatasetError(f"{header}; none of them is understood as a label. {way}")
        layout.notes.append(f"{table.name} has no column label: all pictures count as genuine.")
    if unknown:
        layout.notes.append(f"Columns of {table.name} that were not read: {', '.join(unknown)}.")
    says_normal = any(_stated(row.get("label", "")) == NORMAL_KIND for row in rows)
    has_kinds = "kind" not in columns and says_normal  # labels like good, crack, tear
    names = [row.get("category") or own_name(root) for row in rows]
    categories = apart({name: name for name in names}, layout)
    seen: set[tuple[Path, str]] = set()
    for number, (row, category) in enumerate(zip(rows, map(categories.get, names)), start=2):
        path = _resolve(root, row["image_path"])
        try:
            if not row["image_path"] or (path, category) in seen:
                raise ValueError("named in an earlier row already" if row["image_path"] else "no picture named")
            layout.found.append(replace(_sample(row, path, root, has_kinds), category=category))
            seen.add((path, category))
        except ValueError as error:
            layout.problems.append((path, f"row {number} of {table.name}: {error}"))
    return layout


def tables_in(root: Path) -> list[Path]:
    """The tables in a folder that name pictures and say something about them, but for our own manifest."""
    found = []
    for path in sorted(root.glob("*.[ct]sv")):
        _, columns, unknown = _rows(path, Layout(CSV, path))
        says_something = not {"category", "label", "kind", "split"}.isdisjoint(columns)
        if "image_path" in columns and says_something and "sha256" not in unknown:
            found.append(path)
    return found


def _stated(value: str) -> str | None:
    """The label that a cell states."""
    value = value.casefold()
    return NORMAL_KIND if value in _NO else ANOMALY_KIND if value in _YES else label_of(value)


def _sample(row: dict[str, str], path: Path, root: Path, has_kinds: bool) -> Sample:
    """One row of a table, without its category; ValueError says which cell is wrong."""
    label, kind, mask = row.get("label", ""), row.get("kind", ""), row.get("mask_path", "")
    stated = _stated(label) if label else _stated(kind) or ANOMALY_KIND if kind else NORMAL_KIND
    if stated is None and has_kinds:
        stated, kind = ANOMALY_KIND, label
    if stated is None or ("label" in row and not label and not kind):
        raise ValueError(f"label is {label!r}; allowed are normal, anomaly, good, 0, 1, true, false")
    if kind and (_stated(kind) == NORMAL_KIND) != (stated == NORMAL_KIND):
        raise ValueError(f"label says {'normal' if stated == NORMAL_KIND else 'anomalous'} but kind is {kind!r}")
    is_anomalous = stated != NORMAL_KIND
    split = next(iter(roles_of(row["split"])), None) if row.get("split") else "test" if is_anomalous else "train"
    if split not in SPLITS:
        raise ValueError(f"split is {row['split']!r}; allowed are train, calibration (or validation) and test")
    if is_anomalous and split != "test":
        raise ValueError(f"an anomalous picture in split {split}: detectors learn from normal pictures only")
    if not is_anomalous:
        return Sample(path, "", False, None, split, NORMAL_KIND, row.get("group", ""))
    named = kind_of(kind) if kind and kind.casefold() not in _YES else ANOMALY_KIND
    return Sample(path, "", True, _resolve(root, mask) if mask else None, split, named, row.get("group", ""))


def _rows(table: Path, layout: Layout) -> tuple[list[dict[str, str]], dict[str, str], list[str]]:
    """Rows by meaning, empty cells as ""; the column of each meaning; the columns without one."""
    import pandas as pd

    content = table.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        layout.notes.append(f"{table.name} is not UTF-8; read as Windows-1252. Check names with accents.")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    separator = max(",;\t|", key=text.partition("\n")[0].count)
    long: list[list[str]] = []
    options = {"dtype": str, "keep_default_na": False, "index_col": False, "on_bad_lines": long.append}
    try:
        frame = pd.read_csv(io.StringIO(text), sep=separator, engine="python", **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise DatasetError(f"{table} cannot be read as a table ({error}).") from error
    layout.problems += [(table, f"a row with too many cells: {', '.join(cells)[:80]}") for cells in long]
    frame = frame.fillna("").map(lambda cell: "" if cell.strip().casefold() in _EMPTY else cell.strip())
    header = {plain(str(column)): column for column in frame.columns}
    aliases = {meaning: names.split() for meaning, names in _COLUMNS.items()}
    aliases["label"] += [name for name in header if label_of(name.removeprefix("is_")) == ANOMALY_KIND]  # is_defect
    columns = {meaning: header[next(filter(header.get, n))] for meaning, n in aliases.items() if set(n) & set(header)}
    unknown = [c for c in map(str, frame.columns) if c not in columns.values() and not c.startswith("Unnamed")]
    rows = frame[list(columns.values())].set_axis(list(columns), axis=1).to_dict("records")
    return rows, columns, unknown


def _resolve(root: Path, name: str) -> Path:
    """A path as a table writes it: relative to the table's folder, perhaps with Windows separators."""
    tries = [base / text for text in (name, name.replace("\\", "/")) for base in (root, root.parent)]
    found = next((path for path in tries if name and path.exists()), tries[0])
    return Path(os.path.abspath(found))
