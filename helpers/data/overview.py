"""What notebook 02 shows of a dataset: pictures, tables, and the checks that every later notebook relies on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import results, synthesis
from helpers.data import images
from helpers.data.build import ORIGINS, RECORDS, SYNTHETIC, TEST_KINDS, Source
from helpers.data.manifest import Dataset, mask_of
from helpers.records import SPLITS


def read_records(dataset: Dataset) -> dict[Path, dict[str, Any]]:
    """How each picture of a dataset came about, by absolute path.

    Every record has ``image_path`` (relative), ``category``, ``split``, ``kind``, ``group``, ``origin`` (one of
    :data:`ORIGINS`) and ``source_path``: the file it was copied from, or, relative to the dataset, the picture it was
    made of. Re-photographs have ``variations``; synthetic anomalies the record of :func:`helpers.synthesis.synthesize`.
    """
    rows = map(json.loads, (dataset.folder / RECORDS).read_text(encoding="utf-8").splitlines())
    return {dataset.folder / row["image_path"]: row for row in rows}


def gallery(source: Source, *, n: int, max_side: int = 512) -> list[tuple[str, np.ndarray]]:
    """File name and picture (uint8 RGB) of the first ``n`` genuine pictures of each artwork."""
    rows = pd.DataFrame([(s.category, s.image_path) for s in source.samples if not s.is_anomalous])
    paths = rows.sort_values(0, kind="stable").groupby(0).head(n)[1]
    return [(path.stem, images.load_image(path, max_side=max_side)) for path in paths]


def kind_examples(dataset: Dataset, *, category: str) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """One synthetic anomaly of each kind of an artwork, of middle visibility.

    Returns:
        kind, original and anomalous picture (uint8 RGB), mask (bool, None for a change of the whole picture).
    """
    records, examples = read_records(dataset), []
    for kind in TEST_KINDS:
        mine = dataset.select(category=category, is_anomalous=True)
        made = [s for s in mine if s.kind == kind and records[s.image_path]["origin"] == SYNTHETIC]
        for sample in sorted(made, key=lambda s: s.visibility or 0)[len(made) // 2 :][:1]:
            original = images.load_image(dataset.folder / records[sample.image_path]["source_path"])
            examples.append((kind, original, images.load_image(sample.image_path), mask_of(sample)))
    return examples


def zoomed(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The square around a mask, with as much again around it: uint8 RGB ``(h, w, 3)``, cut at the border."""
    rows, columns = np.nonzero(mask)
    middle = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) // 2
    half = max(24, round(0.75 * max(np.ptp(rows), np.ptp(columns))))
    top, left = np.maximum(np.minimum(middle - half, np.array(mask.shape) - 2 * half), 0)
    return image[top : top + 2 * half, left : left + 2 * half]


def whole_pictures(dataset: Dataset) -> list[tuple[str, np.ndarray]]:
    """Caption and picture (uint8 RGB) of one anomaly without a mask for each kind and artwork."""
    whole = [s for s in dataset.select(is_anomalous=True) if s.mask_path is None]
    first = {(s.category, s.kind): s.image_path for s in reversed(whole)}
    return [
        (f"{kind}, {category}".replace("_", " "), images.load_image(path))
        for (category, kind), path in sorted(first.items())
    ]


def visibility_table(dataset: Dataset) -> pd.DataFrame:
    """Synthetic test anomalies by kind and bin of :data:`helpers.synthesis.VISIBILITY_BINS`."""
    made = [s for s in dataset.select(split="test", is_anomalous=True) if s.visibility is not None]
    bins = pd.Categorical([synthesis.visibility_bin(s.visibility) for s in made], list(synthesis.VISIBILITY_BINS))
    kinds = pd.Categorical([s.kind for s in made], list(synthesis.LOCAL_KINDS))
    return pd.crosstab(kinds, bins, rownames=["kind"], colnames=["visibility"], dropna=False, margins=True)


def summary(dataset: Dataset) -> pd.DataFrame:
    """Pictures per artwork and split: a column per origin (:data:`ORIGINS`), and the true number of genuine sources."""
    rows = pd.DataFrame(list(read_records(dataset).values()))
    table = rows.pivot_table("image_path", ["category", "split"], "origin", "count", fill_value=0)
    order = [(category, split) for category in dataset.categories for split in SPLITS]
    table = table.reindex(order, columns=list(ORIGINS), fill_value=0)
    table["source pictures"] = [dataset.n_sources(category, split) for category, split in order]
    table.columns.name = None
    return table.rename_axis(["artwork", "split"])


def check_dataset(dataset: Dataset) -> None:
    """Check on the files what later notebooks rely on; a line for each.

    Raises:
        AssertionError: the line that does not hold.
    """
    records = read_records(dataset)
    rows = pd.DataFrame(
        [(s.category, s.split, s.sha256, s.group) for s in dataset.samples],
        columns=["category", "split", "file", "group"],
    )
    n_splits = {name: rows.groupby(["category", name])["split"].nunique() for name in ("file", "group")}
    shared = n_splits["group"][n_splits["group"] > 1].index.get_level_values("category")
    made = [s for s in dataset.samples if records[s.image_path]["origin"] == SYNTHETIC and s.mask_path is not None]
    changed_outside = 0
    for sample in made:
        before = images.load_image(dataset.folder / records[sample.image_path]["source_path"])
        changed_outside += int((before != images.load_image(sample.image_path))[~mask_of(sample)].sum())
    results.confirm(
        {
            "no file stands in two splits": n_splits["file"].max() == 1,
            "no source picture stands in two splits, unless a limit says so": set(shared) <= set(dataset.limits),
            "every local damage has a mask": all(
                s.mask_path is not None for s in dataset.samples if s.kind in synthesis.LOCAL_KINDS
            ),
            f"outside the masks of {len(made)} damaged pictures no pixel differs": changed_outside == 0,
        }
    )
