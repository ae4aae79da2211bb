"""What a picture in the chat is compared with: normal references, and the scale of the anomaly maps.

A map value means nothing by itself. Each :class:`References` therefore carries the threshold that maps of *other*
genuine pictures exceed anywhere in at most one of twenty, and one colour scale with this threshold in its middle; both
are fixed before a picture is chosen. Scores with references and without any lie on different scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from helpers.anomalygpt.evaluation import EvaluationSettings, draw_references
from helpers.anomalygpt.imagebind import ImageFeatures
from helpers.anomalygpt.model import AnomalyGPT
from helpers.anomalygpt.training import normals_of
from helpers.data import images
from helpers.data.manifest import Dataset
from helpers.judge import statistics as calibration
from helpers.results import category_label

NO_REFERENCES = "none"
MIN_OWN = 2
"""Own references are measured against each other, so there must be two."""

_BATCH = 16


@dataclass(frozen=True)
class References:
    """Normal pictures to compare with, and how maps of normal pictures look beside them.

    Attributes:
        label: for readers.
        category: the artwork; None when the references are not the dataset's.
        n: number of references; 0 means the decoder's map (zero-shot).
        bank: memory bank of the references, None without any.
        normal_scores: float64 ``(m,)``, highest map values of normal pictures that are not in the bank.
        threshold: conformal threshold of these; a picture is called anomalous when its map exceeds it anywhere.
        limits: ends of the colour scale, the threshold in the middle.
        members: sha256 of the references.
    """

    label: str
    category: str | None
    n: int
    bank: torch.Tensor | None
    normal_scores: np.ndarray
    threshold: float
    limits: tuple[float, float]
    members: frozenset[str] = frozenset()


def of_dataset(model: AnomalyGPT, dataset: Dataset, *, settings: EvaluationSettings) -> dict[str, References]:
    """Without references, and with those of each artwork: the same pictures as the row of the comparison.

    Args:
        model: the chain.
        dataset: its normals of split ``train`` are drawn from, those of ``calibration`` set thresholds and scales.
        settings: of notebook 07; ``row_shots`` references are drawn.
    Returns:
        :data:`NO_REFERENCES` and the artworks' names -> references.
    Raises:
        ValueError: an artwork has too few normal pictures.
    """
    tower = model.image_tower
    found, all_normals = {}, []
    for category in dataset.categories:
        normals, held_out = normals_of(dataset, category)
        if not held_out:
            raise ValueError(
                f"{category} has {len(normals)} normal pictures and none to set a threshold with. Add genuine pictures "
                "and run notebook 02 again."
            )
        chosen = draw_references(normals, settings.row_shots, 0, settings.seed)
        bank = model.bank([images.load_image(sample.image_path) for sample in chosen])
        all_normals.append(tower.embed_images([images.load_image(sample.image_path) for sample in held_out]))
        maps = _maps(model, all_normals[-1], bank)
        members = [sample.sha256 for sample in chosen]
        found[category] = _scaled(category_label(category), category, members, bank, maps, settings.alpha)
    maps = _maps(model, ImageFeatures.join(all_normals), None)
    return {NO_REFERENCES: _scaled("Nothing (no references)", None, [], None, maps, settings.alpha)} | found


def of_pictures(
    model: AnomalyGPT,
    pictures: Sequence[np.ndarray],
    *,
    label: str,
    members: Sequence[str],
    alpha: float = 0.05,
) -> References:
    """References from a user's genuine pictures; the threshold comes from each one's map beside the others.

    Args:
        model: the chain.
        pictures: uint8 RGB, of the same artwork as the picture in question.
        label: for readers.
        members: sha256 of each picture's file.
        alpha: wanted false-alarm rate; with few references the one that can be promised is larger.
    Raises:
        ValueError: fewer than :data:`MIN_OWN` pictures.
    """
    if len(pictures) < MIN_OWN:
        raise ValueError(
            f"{len(pictures)} reference given, at least {MIN_OWN} are needed: how far genuine pictures differ among "
            "themselves sets the threshold. Add another photograph of the genuine artwork."
        )
    features = model.image_tower.embed_images(list(pictures))
    everyone = range(len(pictures))
    maps = [
        _maps(model, features.take([one]), model.bank(features.take([i for i in everyone if i != one])))
        for one in everyone
    ]
    return _scaled(label, None, members, model.bank(features), np.concatenate(maps), alpha)


def table(known: Mapping[str, References]) -> pd.DataFrame:
    """One row per choice: references, normal pictures behind the threshold, threshold, and the alarm rate it keeps."""
    rows = [
        {
            "compared with": one.label,
            "references": one.n,
            "normal pictures measured": len(one.normal_scores),
            "threshold": round(one.threshold, 3),
            "of these above it": f"{(one.normal_scores > one.threshold).sum()} of {len(one.normal_scores)}",
        }
        for one in known.values()
    ]
    return pd.DataFrame(rows).set_index("compared with")


def _maps(model: AnomalyGPT, features: ImageFeatures, bank: torch.Tensor | None) -> np.ndarray:
    """float32 ``(n, 224, 224)``."""
    starts = range(0, len(features), _BATCH)
    parts = [features.take(list(range(i, min(i + _BATCH, len(features))))) for i in starts]
    return torch.cat([model.look(part, references=bank).maps for part in parts]).numpy()


def _scaled(
    label: str,
    category: str | None,
    members: Sequence[str],
    bank: torch.Tensor | None,
    normal_maps: np.ndarray,
    alpha: float,
) -> References:
    scores = normal_maps.reshape(len(normal_maps), -1).max(axis=1).astype(np.float64)
    threshold = calibration.conformal_threshold(scores, alpha)
    low = float(np.percentile(normal_maps, 1))
    limits = (low, threshold + max(threshold - low, 1e-6))
    return References(label, category, len(members), bank, scores, threshold, limits, frozenset(members))
