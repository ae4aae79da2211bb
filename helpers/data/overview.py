"""What notebook 02 shows of a dataset: pictures, tables, and the checks that every later notebook relies on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import synthesis
from helpers.data import images
from helpers.data.build import RECORDS, TEST_KINDS, Source
from helpers.data.manifest import Dataset, mask_of
from helpers.data.splits import ORIGINS, SYNTHETIC
from helpers.records import SPLITS

if TYPE_CHECKING:
    import pandas as pd


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
    shown = []
    for category in sorted({sample.category for sample in source.samples}):
        mine = [s for s in source.samples if s.category == category and not s.is_anomalous]
        shown += [(s.image_path.stem, images.load_image(s.image_path, max_side=max_side)) for s in mine[:n]]
    return shown


def kind_examples(dataset: Dataset, *, category: str) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """One synthetic anomaly of each kind of an artwork, of middle visibility.

    Returns:
        kind, original and anomalous picture (uint8 RGB), mask (bool, None for a change of the whole picture).
    """
    records = read_records(dataset)
    made = [s for s in dataset.select(category=category) if records[s.image_path]["origin"] == SYNTHETIC]
    examples = []
    for kind in (kind for kind in TEST_KINDS if any(s.kind == kind for s in made)):
        ranked = sorted((s for s in made if s.kind == kind), key=lambda s: s.visibility or 0)
        sample = ranked[len(ranked) // 2]
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
    shown = {}
    for sample in dataset.select(is_anomalous=True):
        if sample.mask_path is None:
            shown.setdefault((sample.category, sample.kind), sample)
    named = (((kind, category.replace("_", " ")), sample) for (category, kind), sample in sorted(shown.items()))
    return [(", ".join(name).replace("_", " "), images.load_image(s.image_path)) for name, s in named]


def visibility_table(dataset: Dataset) -> pd.DataFrame:
    """Synthetic test anomalies by kind and bin of :data:`helpers.synthesis.VISIBILITY_BINS`."""
    import pandas as pd

    made = [s for s in dataset.select(split="test", is_anomalous=True) if s.visibility is not None]
    bins = pd.Categorical([synthesis.visibility_bin(s.visibility) for s in made], list(synthesis.VISIBILITY_BINS))
    kinds = pd.Categorical([s.kind for s in made], list(synthesis.LOCAL_KINDS))
    return pd.crosstab(kinds, bins, rownames=["kind"], colnames=["visibility"], dropna=False, margins=True)


def summary(dataset: Dataset) -> pd.DataFrame:
    """Pictures per artwork and split: a column per origin (:data:`ORIGINS`), and the true number of genuine sources."""
    import pandas as pd

    rows = pd.DataFrame(list(read_records(dataset).values()))
    keys = [rows["category"].rename("artwork"), pd.Categorical(rows["split"], SPLITS, ordered=True)]
    table = pd.crosstab(keys, pd.Categorical(rows["origin"], ORIGINS), dropna=False).loc[lambda t: t.sum(axis=1) > 0]
    table["source pictures"] = [dataset.n_sources(category, split) for category, split in table.index]
    table.columns.name = None
    return table.rename_axis(["artwork", "split"])


def check_dataset(dataset: Dataset) -> bool:
    """Check on the files what later notebooks rely on; a line for each.

    Raises:
        AssertionError: the line that does not hold.
    """
    records = read_records(dataset)
    by_path = {sample.image_path: sample for sample in dataset.samples}
    files = [{(s.category, s.sha256) for s in dataset.select(split=split)} for split in SPLITS]
    lines = {"no file stands in two splits": not (files[0] & files[1] or files[0] & files[2] or files[1] & files[2])}
    shared = {
        category
        for category in dataset.categories
        for group in {s.group for s in dataset.select(category=category)}
        if len({s.split for s in dataset.select(category=category) if s.group == group}) > 1
    }
    lines["no source picture stands in two splits, unless a limit says so"] = shared <= set(dataset.limits)
    made = [s for s in dataset.samples if records[s.image_path]["origin"] == SYNTHETIC and s.mask_path is not None]
    lines["every local damage has a mask"] = all(
        sample.mask_path is not None for sample in dataset.samples if sample.kind in synthesis.LOCAL_KINDS
    )
    changed_outside = 0
    for sample in made:
        model = by_path[dataset.folder / records[sample.image_path]["source_path"]]
        before, after = images.load_image(model.image_path), images.load_image(sample.image_path)
        changed_outside += int((before != after)[~mask_of(sample)].sum())
    lines[f"outside the masks of {len(made)} damaged pictures no pixel differs"] = changed_outside == 0
    for words, holds in lines.items():
        assert holds, f"does not hold: {words}"
        print(f"✓ {words}")
    return True
