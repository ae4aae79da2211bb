"""Two published detectors on DINOv2's patches, without training; higher = more anomalous.

*Memory* (AnomalyDINO): how far is each patch from the nearest genuine one? *Subspace* (SubspaceAD): how much of each
patch lies outside the space that genuine patches span? The settings are ours for pictures of paintings: middle layers,
and no turned copies, since a painting has one way up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

_PATCH = 14  # side in pixels


@dataclass(frozen=True)
class Settings:
    """How patches are made and scored."""

    side: int = 448  # shorter side of the picture that DINOv2 sees, in pixels
    layers: Sequence[int] = (-4, -5)  # hidden states averaged
    sigma: float = 6.0  # smoothing of the map, in pixels of that picture
    top: float = 0.01  # share of the highest values whose mean is the score
    variance: float = 0.99  # share of it that the subspace keeps


@dataclass(frozen=True)
class PatchMemory:
    """``bank``: float32 ``(n, width)``, unit vectors of genuine patches. Source: Damm et al., WACV 2025."""

    bank: np.ndarray

    @classmethod
    def fit(cls, tokens: Sequence[np.ndarray], settings: Settings) -> PatchMemory:
        """Remember the patches of genuine pictures, float ``(n_i, width)`` each."""
        return cls(normalize(np.concatenate(tokens)).astype(np.float32))

    def distances(self, tokens: np.ndarray) -> np.ndarray:
        """1 - cosine to the nearest genuine patch, float32 ``(n,)`` in [0, 2]."""
        unit = normalize(tokens).astype(np.float32)
        nearest = [(unit[n : n + 512] @ self.bank.T).max(axis=1) for n in range(0, len(unit), 512)]
        return np.maximum(1 - np.concatenate(nearest), 0)


@dataclass(frozen=True)
class Subspace:
    """``mean``: float64 ``(width,)``; ``basis``: float64 ``(rank, width)``. Source: SubspaceAD, CVPR 2026."""

    mean: np.ndarray
    basis: np.ndarray

    @classmethod
    def fit(cls, tokens: Sequence[np.ndarray], settings: Settings) -> Subspace:
        """Keep the first principal components that together hold ``settings.variance`` of the patches' variance."""
        found = PCA(settings.variance, svd_solver="covariance_eigh").fit(np.concatenate(tokens, dtype=np.float64))
        return cls(found.mean_, found.components_)

    def distances(self, tokens: np.ndarray) -> np.ndarray:
        """Squared norm of what lies outside the subspace, float32 ``(n,)``."""
        centred = tokens - self.mean
        return np.square(centred - (centred @ self.basis.T) @ self.basis).sum(axis=1).astype(np.float32)


FITS = {"dinov2_memory": PatchMemory, "dinov2_subspace": Subspace}


def picture_score(distances: np.ndarray, grid: tuple[int, int], settings: Settings) -> tuple[float, np.ndarray]:
    """Score of a picture, and its map as DINOv2 saw it, float32 ``(rows * 14, columns * 14)``.

    Args:
        distances: float ``(rows * columns,)``, of the patches of a ``grid`` of (rows, columns).
        settings: see :class:`Settings`.
    """
    plane = np.asarray(distances, np.float32).reshape(grid)
    anomaly_map = cv2.resize(plane, (grid[1] * _PATCH, grid[0] * _PATCH), interpolation=cv2.INTER_LINEAR)
    return top_mean(plane, settings.top), gaussian_filter(anomaly_map, settings.sigma)


def top_mean(values: np.ndarray, share: float) -> float:
    """Mean of the highest ``share`` of all values; the highest one where that is none."""
    flat = np.asarray(values).ravel()
    n = max(1, int(share * flat.size))
    return float(np.partition(flat, flat.size - n)[-n:].mean())
