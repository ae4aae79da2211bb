"""The records that travel between the notebooks: a picture of the dataset, and what a method says about it.

This module imports no other helper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "calibration", "test")
NORMAL_KIND = "good"
"""The kind of every normal picture, after MVTec AD's folder name."""


@dataclass(frozen=True)
class Sample:
    """One picture of a dataset: a row of ``manifest.csv``.

    Args:
        image_path: where the picture lies.
        category: the artwork, for example ``"mona_lisa"``.
        is_anomalous: True when the picture is not a faithful view of the artwork.
        mask_path: pixel ground truth; None on an anomalous picture means that no mask is known.
        split: ``"train"``, ``"calibration"`` or ``"test"``.
        kind: ``"good"`` for normal pictures, else the kind of anomaly (``"box"``, ``"face_swap"``).
        group: name of the source picture; pictures of one group never stand in two splits.
        sha256: hash of the picture file, lower-case hexadecimal.
        visibility: how visible a synthetic mark is (see :func:`helpers.synthesis.marks.visibility`), None when unknown.
        synthesis_seed: seed that makes the picture again, None for real pictures.
    Raises:
        ValueError: the split is unknown, or label and kind contradict each other.
    """

    image_path: Path
    category: str
    is_anomalous: bool
    mask_path: Path | None = None
    split: str = "test"
    kind: str = NORMAL_KIND
    group: str = ""
    sha256: str = ""
    visibility: float | None = None
    synthesis_seed: int | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"{self.image_path}: split is {self.split!r}, allowed are {', '.join(SPLITS)}.")
        if self.is_anomalous == (self.kind == NORMAL_KIND):
            label = "anomalous" if self.is_anomalous else "normal"
            raise ValueError(
                f"{self.image_path}: labelled {label} but its kind is {self.kind!r}. "
                f"Normal pictures have kind {NORMAL_KIND!r}, anomalous ones any other."
            )


@dataclass(frozen=True)
class Scored:
    """What a detector says of one picture.

    Args:
        anomaly_score: raw, higher = more anomalous.
        anomaly_map: float32 ``(H, W)`` at the method's own resolution, raw, higher = more anomalous; None without one.
        seconds: time spent on this picture, loading included, model loading not; 0 when it was not measured.
        answer: what a chat model said, empty for the others.
    """

    anomaly_score: float
    anomaly_map: np.ndarray | None = None
    seconds: float = 0.0
    answer: str = ""


@dataclass(frozen=True)
class Prediction:
    """One method's verdict on one picture: a row of ``predictions.csv``.

    Args:
        sample: the picture.
        anomaly_score: raw, higher = more anomalous, finite.
        anomaly_map: float32 ``(H, W)`` at the method's own resolution, raw, one scale for the whole run; None
            when the method has no map or the map lies on disk.
        threshold: fixed before any test picture was read; the picture is called anomalous above it.
        p_value: conformal p-value of the score among calibration normals, in (0, 1].
        seconds: time spent on this picture, loading included, model loading not.
        answer: what a chat model said, empty for the others.
    Raises:
        ValueError: the score is not finite.
    """

    sample: Sample
    anomaly_score: float
    anomaly_map: np.ndarray | None = None
    threshold: float = math.nan
    p_value: float = math.nan
    seconds: float = math.nan
    answer: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.anomaly_score):
            raise ValueError(
                f"{self.sample.image_path}: anomaly score is {self.anomaly_score}. A score must be finite; "
                "check the checkpoint for nan values and train it again."
            )

    @property
    def is_predicted_anomalous(self) -> bool:
        """True above the threshold (equal scores stay normal, as the conformal rank requires)."""
        return self.anomaly_score > self.threshold
