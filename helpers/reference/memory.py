"""Two published detectors on DINOv2's patches, without training; higher = more anomalous.

*Memory* (AnomalyDINO, Damm et al., WACV 2025): how far is each patch from the nearest genuine one? *Subspace*
(SubspaceAD, CVPR 2026): how much of each patch lies outside the space that genuine patches span? Ours for pictures of
paintings: middle layers, and no turned copies, since a painting has one way up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

METHODS = ("dinov2_memory", "dinov2_subspace")
PATCH = 14  # side in pixels
SIGMA = 6.0  # smoothing of the map, in pixels of the picture that DINOv2 sees
TOP = 0.01  # share of the highest values whose mean is the score
VARIANCE = 0.99  # share of it that the subspace keeps


def fit(method: str, tokens: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """From patches of genuine pictures, ``(n_i, width)`` each: a ``bank`` of unit vectors, ``(n, width)``; or ``mean``
    ``(width,)`` and ``basis`` ``(rank, width)`` of the space that holds nearly all of their variance."""
    known = np.concatenate(tokens, dtype=np.float64)
    if method == "dinov2_memory":
        return {"bank": normalize(known).astype(np.float32)}
    found = PCA(VARIANCE, svd_solver="covariance_eigh").fit(known)
    return {"mean": found.mean_, "basis": found.components_}


def distances(model: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Of patches ``(n, width)``, float32 ``(n,)``: 1 - cosine to the nearest of the bank, in [0, 2], or the squared
    norm of what lies outside the space."""
    if "bank" in model:
        unit = normalize(tokens).astype(np.float32)
        nearest = [(unit[n : n + 512] @ model["bank"].T).max(axis=1) for n in range(0, len(unit), 512)]
        return np.maximum(1 - np.concatenate(nearest), 0)
    centred = tokens - model["mean"]
    return np.square(centred - (centred @ model["basis"].T) @ model["basis"]).sum(axis=1).astype(np.float32)


def picture_score(model: Mapping, tokens: np.ndarray, grid: tuple[int, int]) -> tuple[float, np.ndarray]:
    """Score of a picture of a ``grid`` of (rows, columns) patches, and its map, float32 ``(rows, columns) * 14``."""
    plane = distances(model, tokens).reshape(grid)
    anomaly_map = cv2.resize(plane, (grid[1] * PATCH, grid[0] * PATCH), interpolation=cv2.INTER_LINEAR)
    return top_mean(plane, TOP), gaussian_filter(anomaly_map, SIGMA)


def top_mean(values: np.ndarray, share: float) -> float:
    """Mean of the highest ``share`` of all values; the highest one where that is none."""
    n = max(1, int(share * values.size))
    return float(np.partition(values.ravel(), values.size - n)[-n:].mean())
