"""Finding one picture in another: SIFT points, robust matching, and the homography that lays one on the other.

A painting is flat, so four points tell where every other one lies. Points are (x, y) in pixels of the picture given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

MIN_INLIERS = 14  # on one homography; other paintings reach about 9 by chance
CLEAR_INLIERS = 60  # from here on no other reference is asked
_N_POINTS = 1500
_RATIO = 0.85  # Lowe's, of distances
_TOLERANCE = 0.008  # of the reference's longer side: how far a match may lie off its homography
_LONGEST, _SHORTEST = 640, 200  # sides in pixels at which points are sought, in small and huge pictures alike

# A SIFT descriptor is 4 x 4 places x 8 directions in the frame of its own orientation; a mirror image turns the rows
# and the sense of the directions round.
_MIRRORED = np.arange(128).reshape(4, 4, 8)[::-1][:, :, (-np.arange(8)) % 8].ravel()


@dataclass(frozen=True)
class Features:
    """Points, float32 ``(n, 2)``; RootSIFT descriptors, float32 unit vectors ``(n, 128)``; (height, width)."""

    points: np.ndarray
    descriptors: np.ndarray
    shape: tuple[int, int]

    @property
    def mirrored(self) -> Features:
        """The features that the mirror image would have, without looking at it again."""
        points = self.points * np.float32([-1, 1]) + np.float32([self.shape[1] - 1, 0])
        return Features(points, self.descriptors[:, _MIRRORED], self.shape)


@dataclass(frozen=True)
class Registration:
    """Where a picture lies on a reference.

    Attributes:
        matrix: float64 ``(3, 3)``, pixels of the picture -> pixels of the reference; flips when ``is_mirrored``.
        n_inliers: matches that agree with it.
        is_mirrored: the picture is a mirror image.
        turn: degrees, clockwise, by which the picture is turned against the reference.
        reference: index among the references.
    """

    matrix: np.ndarray
    n_inliers: int
    is_mirrored: bool
    turn: float
    reference: int


def describe(image: np.ndarray) -> Features:
    """Points of a picture, uint8 RGB ``(H, W, 3)`` of any size, and what they look like; none on an empty wall."""
    height, width = image.shape[:2]
    scale = min(_LONGEST / max(height, width), max(1.0, _SHORTEST / min(height, width)))
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    grey = cv2.createCLAHE(2.0, (8, 8)).apply(grey)
    found, descriptors = cv2.SIFT_create(_N_POINTS, contrastThreshold=0.02).detectAndCompute(grey, None)
    if descriptors is None:
        return Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32), (height, width))
    points = (np.float32([point.pt for point in found]) + 0.5) * np.float32([width / size[0], height / size[1]]) - 0.5
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9))
    return Features(points[:_N_POINTS], descriptors[:_N_POINTS].astype(np.float32), (height, width))


def matches(query: Features, reference: Features) -> tuple[np.ndarray, np.ndarray]:
    """Indices of points that are each other's nearest, and clearly nearer than the second nearest."""
    if len(query.points) < 4 or len(reference.points) < 4:
        return np.zeros(0, int), np.zeros(0, int)
    similarity = query.descriptors @ reference.descriptors.T  # |a - b|^2 = 2 - 2 a.b of unit vectors
    rows, best, back = np.arange(len(similarity)), similarity.argmax(axis=1), similarity.argmax(axis=0)
    first = similarity[rows, best]
    similarity[rows, best] = -1
    is_clear = (1 - first) < _RATIO**2 * (1 - similarity.max(axis=1))
    keep = is_clear & (back[best] == rows)
    return rows[keep], best[keep]


def register(query: Features, references: Sequence[Features]) -> Registration | None:
    """The reference on which a picture lies best, or None: it lies on no one.

    The first reference is asked first, the others only while no match is clear; then the mirror image is tried.
    """
    for is_mirrored in (False, True):
        best: Registration | None = None
        for index, reference in enumerate(references):
            found = _homography(query, reference, index, is_mirrored)
            if found is not None and (best is None or found.n_inliers > best.n_inliers):
                best = found
            if best is not None and best.n_inliers >= CLEAR_INLIERS:
                break
        if best is not None:
            return best
    return None


def _homography(query: Features, reference: Features, index: int, is_mirrored: bool) -> Registration | None:
    query = query.mirrored if is_mirrored else query
    first, second = matches(query, reference)
    tolerance = max(1.0, _TOLERANCE * max(reference.shape))
    matrix, n_inliers = _fitted(query.points[first], reference.points[second], tolerance)
    if n_inliers < MIN_INLIERS or not _is_plausible(matrix, query.shape, reference.shape):
        return None
    top_left, top_right, bottom_right, bottom_left = corners_of(matrix, query.shape)
    down = bottom_left + bottom_right - top_left - top_right
    turn = float(np.degrees(np.arctan2(down[0], down[1])))
    if is_mirrored:
        matrix = matrix @ np.array([[-1.0, 0, query.shape[1] - 1], [0, 1, 0], [0, 0, 1]])
    return Registration(matrix, n_inliers, is_mirrored, turn, index)


def _fitted(points: np.ndarray, targets: np.ndarray, tolerance: float) -> tuple[np.ndarray | None, int]:
    """Robust homography and how many points agree with it; 0 when there is none."""
    if len(points) < MIN_INLIERS:
        return None, 0
    matrix, inliers = cv2.findHomography(points, targets, cv2.USAC_MAGSAC, tolerance, maxIters=4000, confidence=0.999)
    return matrix, 0 if matrix is None else int(inliers.sum())


def _is_plausible(matrix: np.ndarray, shape: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether a camera could see it so: convex, not flipped, neither a speck nor a universe, not edge-on."""
    quad = corners_of(matrix, shape)
    if not np.isfinite(quad).all() or not cv2.isContourConvex(quad.reshape(-1, 1, 2)):
        return False
    share = cv2.contourArea(quad, oriented=True) / (target[0] * target[1])
    sides = np.linalg.norm(quad - np.roll(quad, 1, axis=0), axis=1)
    return bool(0.02 < share < 60 and sides.max() < 6 * sides.min() * max(shape) / min(shape))


def refined(matrix: np.ndarray, points: np.ndarray, targets: np.ndarray, tolerance: float) -> np.ndarray:
    """A homography fitted again to all matches near it, ``points`` -> ``targets``; the old one when few agree."""
    near = np.linalg.norm(moved(points, matrix) - targets, axis=1) < 4 * tolerance
    again, n_inliers = _fitted(points[near], targets[near], tolerance)
    return again if n_inliers and 2 * n_inliers >= near.sum() else matrix


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points ``(n, 2)``, at least one, after a homography; float32."""
    return cv2.perspectiveTransform(np.float64(points)[:, None], matrix)[:, 0].astype(np.float32)


def corners_of(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Where the corners of a picture of ``shape`` lie: float32 ``(4, 2)``, clockwise from the top left."""
    height, width = shape
    return moved(np.float32([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]), matrix)
