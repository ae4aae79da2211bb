"""Two published detectors on DINOv2's patches, without training; higher = more anomalous.

*Memory* (AnomalyDINO): how far is each patch from the nearest genuine one? *Subspace* (SubspaceAD): how much of each
patch lies outside the space that genuine patches span? :data:`PUBLISHED` holds the papers' settings, :data:`OURS` what
suits pictures of paintings: middle layers, and no turned copies, since a painting has one way up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter


@dataclass(frozen=True)
class Settings:
    """How patches are made and scored."""

    side: int = 448  # shorter side of the picture that DINOv2 sees, in pixels
    layers: tuple[int, ...] = (-4, -5)  # hidden states averaged; none: the last block, normalised
    fit: str = "round"  # or "crop" or "square", see helpers.reference.dino.prepare
    sigma: float = 6.0  # smoothing of the map, in pixels of that picture
    top: float = 0.01  # share of the highest values whose mean is the score
    pixels: bool = False  # take them from the smoothed map (SubspaceAD), not from the patches (AnomalyDINO)
    turns: tuple[int, ...] = (0,)  # degrees by which copies of the references are turned
    variance: float = 0.99  # share of it that the subspace keeps


PUBLISHED: Mapping[str, Settings] = {
    "dinov2_memory": Settings(layers=(), fit="crop", sigma=4.0, turns=tuple(range(0, 360, 45))),
    "dinov2_subspace": Settings(side=672, fit="square", sigma=4.0, pixels=True, turns=tuple(range(0, 360, 12))),
}
"""AnomalyDINO (its mask of the foreground is for objects and left out) and SubspaceAD (layers of the small models)."""
OURS: Mapping[str, Settings] = {"dinov2_memory": Settings(), "dinov2_subspace": Settings()}
METHODS = tuple(OURS)


@dataclass(frozen=True)
class PatchMemory:
    """``bank``: float32 ``(n, width)``, unit vectors of genuine patches. Source: Damm et al., WACV 2025."""

    bank: np.ndarray

    @classmethod
    def fit(cls, tokens: Sequence[np.ndarray], variance: float = 1.0) -> PatchMemory:
        """Remember the patches ``(n_i, width)`` of genuine pictures; ``variance`` is not used."""
        return cls(np.concatenate([_unit(values) for values in tokens]).astype(np.float32))

    def distances(self, tokens: np.ndarray) -> np.ndarray:
        """1 - cosine to the nearest genuine patch, float32 ``(n,)`` in [0, 2]."""
        unit = _unit(tokens).astype(np.float32)
        nearest = [(unit[n : n + 512] @ self.bank.T).max(axis=1) for n in range(0, len(unit), 512)]
        return np.maximum(1 - np.concatenate(nearest), 0)


@dataclass(frozen=True)
class Subspace:
    """``mean``: float64 ``(width,)``; ``basis``: float64 ``(width, rank)``. Source: SubspaceAD, CVPR 2026."""

    mean: np.ndarray
    basis: np.ndarray

    @classmethod
    def fit(cls, tokens: Sequence[np.ndarray], variance: float = 0.99) -> Subspace:
        """Keep the first principal components that together hold ``variance`` of the patches' variance."""
        n = sum(len(values) for values in tokens)
        mean = sum(values.sum(axis=0, dtype=np.float64) for values in tokens) / n
        covariance = sum((values - mean).T @ (values - mean) for values in tokens) / max(n - 1, 1)
        values, vectors = np.linalg.eigh(covariance)
        share = np.cumsum(np.maximum(values[::-1], 0)) / max(np.maximum(values, 0).sum(), 1e-12)
        rank = int(np.searchsorted(share, variance) + 1)
        return cls(mean, np.ascontiguousarray(vectors[:, ::-1][:, :rank]))

    def distances(self, tokens: np.ndarray) -> np.ndarray:
        """Squared norm of what lies outside the subspace, float32 ``(n,)``."""
        centred = tokens - self.mean
        return np.square(centred - (centred @ self.basis) @ self.basis.T).sum(axis=1).astype(np.float32)


FITS = {"dinov2_memory": PatchMemory, "dinov2_subspace": Subspace}


def picture_score(
    distances: np.ndarray, grid: tuple[int, int], settings: Settings, patch: int = 14
) -> tuple[float, np.ndarray]:
    """Score of a picture, and its map as DINOv2 saw it, float32 ``(rows * patch, columns * patch)``.

    Args:
        distances: float ``(rows * columns,)``, of the patches of a ``grid`` of (rows, columns).
        settings: see :class:`Settings`.
        patch: pixels of a patch's side.
    """
    plane = np.asarray(distances, np.float32).reshape(grid)
    anomaly_map = cv2.resize(plane, (grid[1] * patch, grid[0] * patch), interpolation=cv2.INTER_LINEAR)
    if settings.pixels:
        anomaly_map = cv2.GaussianBlur(anomaly_map, (3, 3), settings.sigma)
        return top_mean(anomaly_map, settings.top), anomaly_map
    return top_mean(plane, settings.top), gaussian_filter(anomaly_map, settings.sigma)


def top_mean(values: np.ndarray, share: float) -> float:
    """Mean of the highest ``share`` of all values; the highest one where that is none."""
    flat = np.asarray(values).ravel()
    n = max(1, int(share * flat.size))
    return float(np.partition(flat, flat.size - n)[-n:].mean())


def turned(image: np.ndarray, degrees: Sequence[int]) -> Iterator[np.ndarray]:
    """Copies of a picture turned about its centre, corners filled by reflection."""
    height, width = image.shape[:2]
    for angle in degrees:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
        yield image if angle == 0 else cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)


def _unit(tokens: np.ndarray) -> np.ndarray:
    return tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
