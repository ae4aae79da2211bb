"""What notebook 02 shows of a dataset: pictures, tables, and the checks that every later notebook relies on."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from helpers import results, synthesis
from helpers.data import images
from helpers.data.build import ORIGINS, RECORDS, SYNTHETIC, TEST_KINDS
from helpers.data.manifest import Dataset, mask_of
from helpers.records import SPLITS, Sample


def read_records(dataset: Dataset) -> pd.DataFrame:
    """How each picture came about, a row for each ``sample``: ``origin`` (one of :data:`ORIGINS`), ``source_path`` (the
    file it was copied from, or, relative to the dataset, the picture it was made of), ``variations`` of a
    re-photograph, and what :func:`helpers.synthesis.synthesize` says of a synthetic anomaly."""
    lines = (dataset.folder / RECORDS).read_text(encoding="utf-8").splitlines()
    return pd.DataFrame(map(json.loads, lines)).assign(sample=dataset.samples)


def gallery(samples: Iterable[Sample], *, n: int) -> list[tuple[str, np.ndarray]]:
    """Caption and picture (uint8 RGB, at most 512 pixels a side) of the first ``n`` of each artwork and kind."""
    table = pd.DataFrame([(s.category, s.kind, s) for s in samples], columns=["category", "kind", "sample"])
    shown = table.groupby(["category", "kind"]).head(n)["sample"]
    captions = [f"{s.kind}, {s.category}".replace("_", " ") if s.is_anomalous else s.image_path.stem for s in shown]
    return [(caption, images.load_image(s.image_path, max_side=512)) for caption, s in zip(captions, shown)]


def kind_examples(dataset: Dataset, *, category: str) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """One synthetic anomaly of each kind of an artwork, of middle visibility: kind, original and anomalous picture
    (uint8 RGB), mask (bool, None for a change of the whole picture)."""
    table, examples = read_records(dataset).sort_values("visibility", kind="stable"), []
    made = table[(table["category"] == category) & (table["origin"] == SYNTHETIC)]
    for kind in TEST_KINDS:
        mine = made[made["kind"] == kind]
        for row in mine[len(mine) // 2 :][:1].itertuples():
            original = images.load_image(dataset.folder / row.source_path)
            examples.append((kind, original, images.load_image(row.sample.image_path), mask_of(row.sample)))
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
    rows = read_records(dataset).dropna(subset="visibility_bin")
    table = pd.crosstab(rows["kind"], rows["visibility_bin"].rename("visibility"), margins=True)
    return table.reindex(columns=[*synthesis.VISIBILITY_BINS, "All"], fill_value=0)


def summary(dataset: Dataset) -> pd.DataFrame:
    """Pictures per artwork and split: a column per origin (:data:`ORIGINS`), and the true number of genuine sources."""
    rows = read_records(dataset)
    table = pd.crosstab([rows["category"], rows["split"]], rows["origin"])
    order = [(category, split) for category in dataset.categories for split in SPLITS]
    table = table.reindex(order, columns=list(ORIGINS), fill_value=0).rename_axis(["artwork", "split"])
    table["source pictures"] = [dataset.n_sources(category, split) for category, split in order]
    return table.rename_axis(None, axis=1)


def check_dataset(dataset: Dataset) -> None:
    """Check on the files what later notebooks rely on, a line each; what does not hold is an AssertionError."""
    changed_outside, masked = 0, {s.image_path for s in dataset.samples if s.mask_path is not None}
    table = read_records(dataset)
    local = [row for row in table[table["origin"] == SYNTHETIC].itertuples() if row.sample.image_path in masked]
    for row in local:
        before, after = map(images.load_image, (dataset.folder / row.source_path, row.sample.image_path))
        changed_outside += int((before != after)[~mask_of(row.sample)].sum())
    files = {(s.category, s.sha256, s.split) for s in dataset.samples}
    is_marked = [s.mask_path is not None for s in dataset.samples if s.kind in synthesis.LOCAL_KINDS]
    results.confirm(
        {
            "no file stands in two splits": len(files) == len({file[:2] for file in files}),
            "every local damage has a mask": all(is_marked),
            f"outside the masks of {len(local)} damaged pictures no pixel differs": changed_outside == 0,
        }
    )
