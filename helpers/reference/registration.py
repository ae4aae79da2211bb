"""Finding one picture in another: SIFT points, robust matching, and the homography that lays one on the other.

A painting is flat, so four points tell where every other one lies. Points are (x, y) in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

MIN_INLIERS = 14  # on one homography; other paintings reach about 9 by chance
_N_POINTS = 1500
_RATIO = 0.85  # Lowe's, of distances
_TOLERANCE = 0.008  # of the reference's longer side: how far a match may lie off its homography
_LONGEST, _SHORTEST = 640, 200  # sides in pixels at which points are sought, in small and huge pictures alike


class Features(NamedTuple):
    """What can be found again of a picture."""

    points: np.ndarray  # float32 (n, 2)
    descriptors: np.ndarray  # RootSIFT, float32 unit vectors (n, 128)
    shape: tuple[int, int]  # (height, width) of the picture


def describe(image: np.ndarray) -> Features:
    """Points of a picture, uint8 RGB ``(H, W, 3)`` of any size, and what they look like; none on an empty wall."""
    shape = image.shape[:2]
    scale = min(_LONGEST / max(shape), max(1.0, _SHORTEST / min(shape)))
    size = [max(8, round(length * scale)) for length in shape[::-1]]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    grey = cv2.createCLAHE(2.0, (8, 8)).apply(grey)
    found, descriptors = cv2.SIFT_create(_N_POINTS, contrastThreshold=0.02).detectAndCompute(grey, None)
    if descriptors is None:
        return Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32), shape)
    points = (cv2.KeyPoint.convert(found) + 0.5) * np.float32(shape[::-1]) / np.float32(size) - 0.5
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9))
    return Features(points[:_N_POINTS], descriptors[:_N_POINTS], shape)


def register(query: Features, reference: Features) -> tuple[np.ndarray, int, float] | None:
    """Where a picture lies on a reference: float64 ``(3, 3)``, its pixels -> pixels of the reference; how many matches
    agree; degrees, clockwise, by which it is turned. None: nowhere, or only as no camera could see it."""
    points, targets = _matches(query, reference)
    if len(points) < MIN_INLIERS:
        return None
    tolerance = max(1.0, _TOLERANCE * max(reference.shape))
    matrix, inliers = cv2.findHomography(points, targets, cv2.USAC_MAGSAC, tolerance, maxIters=4000, confidence=0.999)
    if matrix is None or inliers.sum() < MIN_INLIERS:
        return None
    quad = corners_of(matrix, query.shape)
    share = cv2.contourArea(quad, oriented=True) / (reference.shape[0] * reference.shape[1])  # negative: flipped
    sides = np.linalg.norm(quad - np.roll(quad, 1, axis=0), axis=1)
    is_even = sides.max() < 6 * sides.min() * max(query.shape) / min(query.shape)
    down = quad[2:].sum(axis=0) - quad[:2].sum(axis=0)
    is_seen = 0.02 < share < 60 and is_even and cv2.isContourConvex(quad)
    return (matrix, int(inliers.sum()), float(np.degrees(np.arctan2(*down)))) if is_seen else None


def _matches(query: Features, reference: Features) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of points ``(n, 2)`` that are each other's nearest, and clearly nearer than the second nearest."""
    if min(len(query.points), len(reference.points)) < MIN_INLIERS:
        return query.points[:0], reference.points[:0]
    similarity = query.descriptors @ reference.descriptors.T  # |a - b|^2 = 2 - 2 a.b of unit vectors
    rows, best = np.arange(len(similarity)), similarity.argmax(axis=1)
    first = similarity[rows, best]
    similarity[rows, best] = -1
    clear = np.flatnonzero(1 - first < _RATIO**2 * (1 - similarity.max(axis=1)))
    similarity[rows, best] = first
    keep = clear[similarity[:, best[clear]].argmax(axis=0) == clear]
    return query.points[keep], reference.points[best[keep]]


def corners_of(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Where the corners of a picture of ``shape`` lie: float32 ``(4, 2)``, clockwise from the top left."""
    right, bottom = shape[1] - 1, shape[0] - 1
    corners = np.float64([[[0, 0], [right, 0], [right, bottom], [0, bottom]]])
    return cv2.perspectiveTransform(corners, matrix)[0].astype(np.float32)
