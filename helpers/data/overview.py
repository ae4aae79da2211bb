"""What notebook 02 shows of a dataset: pictures, tables, and the checks that every later notebook relies on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import results, synthesis
from helpers.data import images
from helpers.data.build import ORIGINS, RECORDS, SYNTHETIC, TEST_KINDS
from helpers.data.manifest import Dataset, mask_of
from helpers.records import NORMAL_KIND, SPLITS, Sample


def read_records(dataset: Dataset) -> dict[Path, dict[str, Any]]:
    """How each picture of a dataset came about, by absolute path: ``origin`` (one of :data:`ORIGINS`), ``source_path``
    (the file it was copied from, or, relative to the dataset, the picture it was made of), ``variations`` of a
    re-photograph, and what :func:`helpers.synthesis.synthesize` says of a synthetic anomaly."""
    rows = map(json.loads, (dataset.folder / RECORDS).read_text(encoding="utf-8").splitlines())
    return {dataset.folder / row["image_path"]: row for row in rows}


def gallery(samples: Iterable[Sample], *, n: int) -> list[tuple[str, np.ndarray]]:
    """Caption and picture (uint8 RGB, at most 512 pixels a side) of the first ``n`` of each artwork and kind."""
    seen, shown = Counter(), []
    for s in samples:
        seen[s.category, s.kind] += 1
        if seen[s.category, s.kind] <= n:
            caption = s.image_path.stem if s.kind == NORMAL_KIND else f"{s.kind}, {s.category}".replace("_", " ")
            shown.append((caption, images.load_image(s.image_path, max_side=512)))
    return shown


def kind_examples(dataset: Dataset, *, category: str) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """One synthetic anomaly of each kind of an artwork, of middle visibility: kind, original and anomalous picture
    (uint8 RGB), mask (bool, None for a change of the whole picture)."""
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


def visibility_table(dataset: Dataset) -> pd.DataFrame:
    """Synthetic test anomalies by kind and bin of :data:`helpers.synthesis.VISIBILITY_BINS`."""
    rows = pd.DataFrame(read_records(dataset).values()).dropna(subset="visibility_bin")
    table = pd.crosstab(rows["kind"], rows["visibility_bin"].rename("visibility"), margins=True)
    return table.reindex(columns=[*synthesis.VISIBILITY_BINS, "All"], fill_value=0)


def summary(dataset: Dataset) -> pd.DataFrame:
    """Pictures per artwork and split: a column per origin (:data:`ORIGINS`), and the true number of genuine sources."""
    rows = pd.DataFrame(read_records(dataset).values())
    table = rows.pivot_table("image_path", ["category", "split"], "origin", "count", fill_value=0)
    order = [(category, split) for category in dataset.categories for split in SPLITS]
    table = table.reindex(order, columns=list(ORIGINS), fill_value=0)
    table["source pictures"] = [dataset.n_sources(category, split) for category, split in order]
    return table.rename_axis(["artwork", "split"]).rename_axis(None, axis=1)


def check_dataset(dataset: Dataset) -> None:
    """Check on the files what later notebooks rely on, a line each; what does not hold is an AssertionError."""
    records, changed_outside = read_records(dataset), 0
    local = [s for s in dataset.samples if records[s.image_path]["origin"] == SYNTHETIC and s.mask_path is not None]
    for sample in local:
        before = images.load_image(dataset.folder / records[sample.image_path]["source_path"])
        changed_outside += int((before != images.load_image(sample.image_path))[~mask_of(sample)].sum())
    files = {(s.category, s.sha256, s.split) for s in dataset.samples}
    has_masks = [s.mask_path is not None for s in dataset.samples if s.kind in synthesis.LOCAL_KINDS]
    results.confirm(
        {
            "no file stands in two splits": len(files) == len({file[:2] for file in files}),
            "every local damage has a mask": all(has_masks),
            f"outside the masks of {len(local)} damaged pictures no pixel differs": changed_outside == 0,
        }
    )
