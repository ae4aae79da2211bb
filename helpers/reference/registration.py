"""Laying one picture on another: where it lies (SIFT points, robust matching, a homography), and how both differ there,
in the same light. A painting is flat, so four points tell where every other one lies. Points are (x, y) in pixels."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

MIN_INLIERS = 14  # on one homography; other paintings reach about 9 by chance
_N_POINTS, _RATIO = 1500, 0.85  # of a picture; Lowe's, of distances
_TOLERANCE = 0.008  # of the reference's longer side: how far a match may lie off its homography
_LONGEST, _SHORTEST = 640, 200  # sides in pixels at which points are sought, in small and huge pictures alike
# What good photographs differ by: lightness and colour in CIE Lab units, fine and coarse structure.
USUAL = np.float32([1.5, 1.5, 0.05, 0.05])[:, None, None]
_SCALES = (3.0, 7.0)  # Gaussian windows of the structure differences, pixels
_SHARPEST = 0.8  # both pictures are blurred by this before anything else
_RIM = 4  # pixels at the edge of a picture that are not trusted
_STEADY = 6.0  # variance of lightness below which a window is noise rather than structure
_MAX_FLOW = 3.0  # pixels by which canvas and lens may bend a picture
# By how much two lights may change L, a and b at most: by L, a, b and L squared / 100 each; at one place, in Lab units.
_MOST, _SLOW = np.array([[0.7, 0.2, 0.2, 1.0], [0.25, 0.6, 0.35, 0.5], [0.25, 0.35, 0.6, 0.5]]), 15.0


class Features(NamedTuple):
    """What can be found again of a picture."""

    points: np.ndarray  # float32 (n, 2)
    descriptors: np.ndarray  # RootSIFT, float32 unit vectors (n, 128)
    shape: tuple[int, int]  # (height, width) of the picture


def describe(image: np.ndarray) -> Features:
    """Points of a picture, uint8 RGB ``(H, W, 3)`` of any size, and what they look like; none on an empty wall."""
    shape = image.shape[:2]
    scale = min(_LONGEST / max(shape), max(1.0, _SHORTEST / min(shape)))
    size, method = [max(8, round(n * scale)) for n in shape[::-1]], cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=method)
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
    bottom, right = query.shape[0] - 1, query.shape[1] - 1
    corners = np.float64([[[0, 0], [right, 0], [right, bottom], [0, bottom]]])
    quad = cv2.perspectiveTransform(corners, matrix)[0].astype(np.float32)
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


def lab(image: np.ndarray) -> np.ndarray:
    """A picture, uint8 RGB, as CIE Lab, float32 ``(H, W, 3)``, slightly blurred."""
    return blur(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), _SHARPEST)


def is_grey(values: np.ndarray) -> bool:
    """Whether a picture in CIE Lab is black and white: what compression leaves of colour is not one."""
    return np.abs(values[..., 1:]).max() < 1.5


def differences(image: np.ndarray, matrix: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How a picture, uint8 RGB ``(H, W, 3)``, differs from a reference, :func:`lab` of it, float32 ``(h, w, 3)``, on
    which ``matrix``, float64 ``(3, 3)``, lays it: in lightness and in colour (CIE Lab units), in fine and in coarse
    structure (1 - local correlation of lightness), float32 ``(4, h, w)``, higher = more different; and where it was
    seen, float32 ``(h, w)``, 1 there. Elsewhere both are 0."""
    size, scale = reference.shape[1::-1], abs(np.linalg.det(matrix[:2, :2])) ** 0.5
    inside = cv2.warpPerspective(np.ones(image.shape[:2], np.uint8), matrix, size)
    depth = cv2.distanceTransform(np.pad(inside, 1), cv2.DIST_L2, 3)[1:-1, 1:-1] - _RIM
    both = np.float32(depth > 0)
    sharp = image if scale > 0.7 else cv2.GaussianBlur(image, (0, 0), 0.5 / scale)  # so that nothing aliases
    test = lab(cv2.warpPerspective(sharp, matrix, size, borderMode=cv2.BORDER_REPLICATE))
    has_colour = not (is_grey(test) or is_grey(reference))
    test = _in_light_of(test, reference, both)
    other = _bent(reference, test, both)
    lightness, a, b = cv2.split(test - other)
    planes = [cv2.blur(np.abs(lightness), (3, 3)), cv2.blur(cv2.magnitude(a, b), (3, 3)) * has_colour]
    planes = np.stack([*planes, *_structure(test[..., 0], other[..., 0], both)])
    return np.maximum(planes, 0) * (both * np.clip(0.4 + 0.3 * depth / _RIM, 0, 1)), both  # trusted less at the edge


def _in_light_of(test: np.ndarray, other: np.ndarray, both: np.ndarray) -> np.ndarray:
    """``test`` in the light of ``other``: a robust fit of tones and colours, then a slow change from place to place;
    both bounded, so that odd hues stay odd."""
    picked = np.flatnonzero(both)
    picked = picked[:: max(7, len(picked) // 5_000)]
    known, wanted, trust = test.reshape(-1, 3)[picked], other.reshape(-1, 3)[picked], None
    terms, off = np.c_[known, known[:, 0] ** 2 / 100], wanted - known
    for _ in range(4):  # scikit-learn's Ridge takes five times as long to check what it is given
        x, y = (one - np.average(one, axis=0, weights=trust) for one in (terms, off))
        weighted = x if trust is None else x * trust[:, None]
        slopes = np.linalg.solve(weighted.T @ x + 0.1 * len(x) * np.eye(4), weighted.T @ y)
        error = np.linalg.norm(y - x @ slopes, axis=1)
        trust = 1 / (1 + (error / max(1.5 * float(np.median(error)), 1.0)) ** 2)
    out = test + cv2.merge([test, test[..., 0] ** 2 / 100]) @ np.float32(np.clip(slopes, -_MOST.T, _MOST.T))
    out += np.median(wanted - out.reshape(-1, 3)[picked], axis=0)
    few, off = _smaller(both, 4), np.clip(_smaller(other, 4) - _smaller(out, 4), -_SLOW, _SLOW)
    return out + cv2.resize(inner_blur(off * few[..., None], few, max(both.shape) / 32), both.shape[::-1])


def _bent(reference: np.ndarray, test: np.ndarray, both: np.ndarray) -> np.ndarray:
    """The reference bent by a smooth optical flow of at most a few pixels: lens, canvas and stretcher."""
    grey = [np.uint8(np.clip(one[..., 0] * 2.55, 0, 255)) for one in (reference, test)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(*grey, None)
    flow = cv2.resize(blur(_smaller(flow, 2), 3.0), both.shape[::-1])
    x, y = cv2.split(np.clip(flow, -_MAX_FLOW, _MAX_FLOW) * both[..., None])
    x, y = np.arange(both.shape[1], dtype=np.float32) - x, np.arange(both.shape[0], dtype=np.float32)[:, None] - y
    return cv2.remap(reference, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _structure(test: np.ndarray, other: np.ndarray, both: np.ndarray) -> Iterator[np.ndarray]:
    """1 - local correlation in two Gaussian windows, the coarse one at half size; flat windows agree."""
    planes, before = [both, *(one * both for one in (test, other, test * test, other * other, test * other))], 0.0
    for scale, sigma in enumerate(_SCALES, start=1):
        planes = [blur(_smaller(one, scale), (sigma**2 - before**2) ** 0.5 / scale) for one in planes]
        weight, before = np.maximum(planes[0], 1e-2), sigma
        m_test, m_other, tests, others, products = (one / weight for one in planes[1:])
        v_test, v_other = np.maximum(tests - m_test**2, 0) + _STEADY, np.maximum(others - m_other**2, 0) + _STEADY
        yield cv2.resize(1 - (products - m_test * m_other + _STEADY) / np.sqrt(v_test * v_other), both.shape[::-1])


def _smaller(plane: np.ndarray, times: int) -> np.ndarray:
    return cv2.resize(plane, None, fx=1 / times, fy=1 / times, interpolation=cv2.INTER_AREA)


def inner_blur(plane: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a plane that is 0 outside ``weight``; nothing leaks in from there."""
    below = np.maximum(blur(weight, sigma), 1e-2)
    return blur(plane, sigma) / (below if plane.ndim == 2 else below[..., None])


def blur(plane: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, reflected at the edge."""
    return cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
