"""Small real datasets on disk for the tests of every method: the one builder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers import data, files
from helpers.data import images
from helpers.records import Sample

PLAN = {"train": ["good"] * 3, "calibration": ["good"] * 4, "test": ["good", "good", "box", "replica"]}


def write_pictures(
    folder: Path, category: str, plan: Mapping[str, Sequence[str]] = PLAN, *, shape: tuple[int, int] = (96, 120),
    seed: int = 0,
) -> list[Sample]:  # fmt: skip
    """Photographs of one blocky picture, which ``seed`` chooses, with grain. ``plan`` lists the kinds of each split:
    ``good``, ``replica`` (mirrored, no mask), ``bare`` (a mark without mask); any other has a red mark and its mask."""
    random, samples = np.random.default_rng(seed), []
    blocks = random.integers(60, 200, (8, 10, 3), dtype=np.uint8)
    base = cv2.resize(blocks, shape[::-1], interpolation=cv2.INTER_NEAREST).astype(int)
    height, width = (side // 4 for side in shape)
    for split, kinds in plan.items():
        marks = [i for i, kind in enumerate(kinds) if kind not in ("good", "replica")]
        for i, kind in enumerate(kinds):
            picture, path, made = base + random.integers(-9, 10, base.shape), folder / f"{split}_{i:02d}.png", {}
            if i in marks:
                mask, place = np.zeros(shape, dtype=bool), marks.index(i) % 4
                mask[height // 3 + place * height // 2 :, width * (2 + 2 * place) // 3 :][:height, :width] = True
                picture[mask] = (250, 10, 10)
                if kind != "bare":
                    images.save_png(path.with_suffix(".mask.png"), mask)
                    made = {"mask_path": path.with_suffix(".mask.png"), "synthesis_seed": i, "visibility": 16.0 + i}
            picture = np.clip(picture, 0, 255).astype(np.uint8)
            images.save_png(path, picture[:, ::-1] if kind == "replica" else picture)
            facts = {"split": split, "kind": kind, "group": f"{category}/{split}/{i}", "is_anomalous": kind != "good"}
            samples.append(Sample(path, category, sha256=files.sha256_file(path), **facts, **made))
    return samples


def write_dataset(
    folder: Path, categories: Sequence[str] = ("one", "two"), plan: Mapping[str, Sequence[str]] = PLAN, **options: Any
) -> data.Dataset:
    """A dataset of such paintings, opened; their names may be any text, for folders are numbered."""
    samples: list[Sample] = []
    for n, category in enumerate(categories):
        samples += write_pictures(folder / f"painting_{n}", category, plan, seed=n, **options)
    data.write_manifest(folder / "manifest.csv", samples)
    return data.open_dataset(folder)
