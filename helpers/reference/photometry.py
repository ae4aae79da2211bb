"""Two pictures in one frame: the light of one is made that of the other, then they are compared pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

USUAL = np.float32([1.5, 1.5, 0.05, 0.05])[:, None, None]
"""What good photographs differ by: lightness and colour in CIE Lab units, fine and coarse structure."""
_SCALES = (3.0, 7.0)  # Gaussian windows of the structure differences, pixels
_SHARPEST = 0.8  # both pictures are blurred by this before anything else
_RIM = 4  # pixels at the edge of a picture that are not trusted
_STEADY = 6.0  # variance of lightness below which a window is noise rather than structure
_MAX_FLOW = 3.0  # pixels by which canvas and lens may bend a picture
# By how much two lights may change L, a and b at most: by L, a, b and L squared / 100 each; at one place, in Lab units.
_MOST = np.array([[0.7, 0.2, 0.2, 1.0], [0.25, 0.6, 0.35, 0.5], [0.25, 0.35, 0.6, 0.5]])
_SLOW = 15.0


def lab(image: np.ndarray) -> np.ndarray:
    """A picture, uint8 RGB, as CIE Lab, float32 ``(H, W, 3)``, slightly blurred; a and b are nan without any colour."""
    values = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    if is_grey(image):  # tells nothing about colours
        values[..., 1:] = np.nan
    return blur(values, _SHARPEST)


def is_grey(image: np.ndarray) -> bool:
    """Whether a picture, uint8 RGB, is black and white: what compression leaves of colour is not one."""
    red, green, blue = cv2.split(image)
    return max(cv2.norm(red, green, cv2.NORM_INF), cv2.norm(green, blue, cv2.NORM_INF)) <= 2


def differences(image: np.ndarray, matrix: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How a picture differs from a reference that it lies on: in lightness and in colour (CIE Lab units), in fine and
    in coarse structure (1 - local correlation of lightness).

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        matrix: float64 ``(3, 3)``, its pixels -> pixels of the reference.
        reference: :func:`lab` of it, ``(h, w, 3)``.
    Returns:
        float32 ``(4, h, w)``, higher = more different; ``(h, w)``, 1 where the picture reaches. Elsewhere both are 0.
    """
    size, scale = reference.shape[1::-1], abs(np.linalg.det(matrix[:2, :2])) ** 0.5
    inside = cv2.warpPerspective(np.ones(image.shape[:2], np.uint8), matrix, size)
    depth = cv2.distanceTransform(np.pad(inside, 1), cv2.DIST_L2, 3)[1:-1, 1:-1] - _RIM
    both = np.float32(depth > 0)
    sharp = image if scale > 0.7 else cv2.GaussianBlur(image, (0, 0), 0.5 / scale)  # so that nothing aliases
    test = lab(cv2.warpPerspective(sharp, matrix, size, borderMode=cv2.BORDER_REPLICATE))
    has_colour = not np.isnan(test[0, 0, 1] + reference[0, 0, 1])
    test, other = (one if has_colour else np.nan_to_num(one) for one in (test, reference))
    test = _matched(test, other, both)
    other = _bent(other, test, both)
    lightness, a, b = cv2.split(test - other)
    planes = [cv2.blur(np.abs(lightness), (3, 3)), cv2.blur(cv2.magnitude(a, b), (3, 3)) * has_colour]
    planes = np.stack([*planes, *_structure(test[..., 0], other[..., 0], both)])
    return np.maximum(planes, 0) * (both * np.clip(0.4 + 0.3 * depth / _RIM, 0, 1)), both  # trusted less at the edge


def _matched(test: np.ndarray, other: np.ndarray, both: np.ndarray) -> np.ndarray:
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
