"""The records that travel between the notebooks: a picture, and what a method says about it. Imports no helper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "calibration", "test")
NORMAL_KIND = "good"  # of every normal picture, after MVTec AD's folder name


@dataclass(frozen=True)
class Sample:
    """One picture of a dataset, a row of ``manifest.csv``; ValueError when split, label and kind do not fit."""

    image_path: Path
    category: str  # the artwork, for example "mona_lisa"
    is_anomalous: bool  # True when the picture is not a faithful view of the artwork
    mask_path: Path | None = None  # pixel ground truth; None on an anomalous picture: no mask is known
    split: str = "test"
    kind: str = NORMAL_KIND  # "good" for normal pictures, else the kind of anomaly ("box", "face_swap")
    group: str = ""  # name of the true source picture
    sha256: str = ""  # of the picture file, lower-case hexadecimal
    visibility: float | None = None  # how visible a synthetic mark is, None when unknown
    synthesis_seed: int | None = None  # makes the picture again; None for real pictures

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"{self.image_path}: split is {self.split!r}, allowed are {', '.join(SPLITS)}.")
        if self.is_anomalous == (self.kind == NORMAL_KIND):
            label = "anomalous" if self.is_anomalous else "normal"
            raise ValueError(f"{self.image_path}: labelled {label} but its kind is {self.kind!r}.")


@dataclass(frozen=True)
class Scored:
    """What a detector says of one picture."""

    anomaly_score: float  # raw, higher = more anomalous
    anomaly_map: np.ndarray | None = None  # float32 (H, W) at the method's own resolution, raw, one scale for all
    seconds: float = 0.0  # spent on this picture, loading included, model loading not; 0: not measured
    answer: str = ""  # what a chat model said


@dataclass(frozen=True)
class Prediction:
    """One method's verdict on one picture, a row of ``predictions.csv``; ValueError for a score that is not finite."""

    sample: Sample
    anomaly_score: float
    anomaly_map: np.ndarray | None = None  # as in Scored; None, too, when it lies on disk
    threshold: float = math.nan  # fixed before any test picture was read
    p_value: float = math.nan  # conformal, of the score among calibration normals, in (0, 1]
    seconds: float = math.nan
    answer: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.anomaly_score):
            raise ValueError(f"{self.sample.image_path}: anomaly score is {self.anomaly_score}, which must be finite.")

    @property
    def is_predicted_anomalous(self) -> bool:
        """True above the threshold (equal scores stay normal, as the conformal rank requires)."""
        return self.anomaly_score > self.threshold
