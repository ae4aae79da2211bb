"""Two pictures on one canvas: the light of one is made that of the other, then they are compared pixel by pixel.

Four differences, all higher = more different: lightness and colour (CIE Lab units, the least over shifts of a pixel),
and structure at a fine and a coarse scale (1 - local correlation of lightness).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from helpers.data.images import resize
from helpers.reference.registration import corners_of

SCALES = (3.0, 7.0)  # Gaussian windows of the two structure differences, pixels
_SHARPEST = 0.8  # both pictures are blurred by this before anything else
_RIM = 4  # pixels at the edge of a picture that are not trusted
_STEADY = 6.0  # variance of lightness below which a window is noise rather than structure
_MAX_FLOW = 3.0  # pixels by which canvas and lens may bend a picture
_LEAST = np.float32([0.3, 0.3, 0.005, 0.005])  # below these, levels of differences are not told apart


@dataclass(frozen=True)
class Laid:
    """A picture on the canvas: float32 Lab ``(H, W, 3)``, slightly blurred; where it is, float32 ``(H, W)``, 0 or 1."""

    lab: np.ndarray
    valid: np.ndarray


def lay(image: np.ndarray, matrix: np.ndarray, shape: tuple[int, int]) -> Laid:
    """Warp a picture onto a canvas of ``shape``; a much larger one is shrunk first, so that nothing aliases."""
    area = abs(cv2.contourArea(corners_of(matrix, image.shape[:2])))
    scale = (area / (image.shape[0] * image.shape[1])) ** 0.5
    if scale < 0.7:
        small = resize(image, max(8, round(max(image.shape) * scale * 1.2)))
        matrix = matrix @ np.diag([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0], 1.0])
        image = small
    size = (shape[1], shape[0])
    warped = cv2.warpPerspective(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpPerspective(np.ones(image.shape[:2], np.float32), matrix, size) > 0.999
    kernel = np.ones((2 * _RIM + 1,) * 2, np.uint8)
    valid = cv2.erode(inside.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    lab = cv2.cvtColor(warped.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    if np.ptp(image, axis=2).max() <= 2:  # a black-and-white picture tells nothing about colours
        lab[..., 1:] = np.nan
    return Laid(blur(lab, _SHARPEST), valid.astype(np.float32))


def least_differences(picture: Laid, references: Sequence[Laid], n_compared: int) -> np.ndarray | None:
    """The least of the differences between a picture and the references that fit it best.

    Where only a reference that fits worse was seen (a strip beyond the edge of the better ones), differences count
    less, by the ratio of the two references' own levels; and less towards the edge of what was seen.

    Returns:
        float32 ``(4, H, W)``, inf where nothing was seen; None when no reference overlaps.
    """
    fit = sorted((_misfit(picture, one), index) for index, one in enumerate(references))
    found = [differences(picture, references[index]) for misfit, index in fit[:n_compared] if np.isfinite(misfit)]
    if not found:
        return None
    levels = [(np.median(one[:, np.isfinite(one[0])], axis=1) + _LEAST)[:, None, None] for one in found]
    least = np.min(found, axis=0)
    there = np.min([np.where(np.isfinite(one[0]), level, np.inf) for one, level in zip(found, levels)], axis=0)
    is_seen = np.isfinite(least[0])
    discount = np.min(levels, axis=0) / np.where(is_seen, there, 1)
    inside = cv2.distanceTransform(np.pad(is_seen, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    towards_edge = np.clip(0.4 + 0.6 * inside / (2 * _RIM), 0, 1)
    return np.where(is_seen, np.where(is_seen, least, 0) * discount * towards_edge, np.inf).astype(np.float32)


def differences(picture: Laid, reference: Laid) -> np.ndarray:
    """Lightness, colour, fine and coarse structure: float32 ``(4, H, W)``, inf where one of the two was not seen."""
    both = picture.valid * reference.valid
    has_colour = not (np.isnan(picture.lab[0, 0, 1]) or np.isnan(reference.lab[0, 0, 1]))
    test, other = np.nan_to_num(picture.lab), np.nan_to_num(reference.lab)
    test = _matched(test, other, both)
    other = _bent(other, test, both)
    best = np.full(both.shape, np.inf, np.float32)
    lightness, colour = np.zeros_like(best), np.zeros_like(best)
    for shift in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)):
        off = test - np.roll(other, shift, axis=(0, 1))
        light, chroma = np.abs(off[..., 0]), np.hypot(off[..., 1], off[..., 2])
        error = cv2.blur(light * light + chroma * chroma, (3, 3))
        is_better = error < best
        best[is_better] = error[is_better]
        lightness[is_better], colour[is_better] = light[is_better], chroma[is_better]
    planes = [cv2.blur(lightness, (3, 3)), cv2.blur(colour, (3, 3)) * np.float32(has_colour)]
    planes += [_structure(test[..., 0], other[..., 0], both, sigma) for sigma in SCALES]
    return np.where(both > 0, np.stack(planes), np.inf).astype(np.float32)


def _matched(test: np.ndarray, other: np.ndarray, both: np.ndarray) -> np.ndarray:
    """``test`` in the light of ``other``: tone curve, colours, a slow change; bounded, so that odd hues stay odd."""
    picked = np.flatnonzero(both.ravel() > 0)
    picked = picked[:: max(7, len(picked) // 20_000)]
    known, wanted = test.reshape(-1, 3)[picked], other.reshape(-1, 3)[picked]
    balance = [_colour_balance(known, wanted[:, channel], channel) for channel in (1, 2)]
    out = cv2.transform(test, np.float32([[1, 0, 0, 0], *balance]))
    out[..., 0] = _tone_curve(known[:, 0], wanted[:, 0], test[..., 0])
    off = _quarter(np.clip(other - out, -15, 15) * both[..., None])
    return out + cv2.resize(inner_blur(off, _quarter(both), max(both.shape) / 32), both.shape[::-1])


def inner_blur(plane: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a plane that is 0 outside ``weight``; nothing leaks in from there."""
    below = np.maximum(blur(weight, sigma), 1e-2)
    return blur(plane, sigma) / (below if plane.ndim == 2 else below[..., None])


def _quarter(plane: np.ndarray) -> np.ndarray:
    return cv2.resize(plane, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)


def _tone_curve(known: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A rising curve through twelve medians, slopes between 0.3 and 2.5."""
    edges = np.unique(np.quantile(known, np.linspace(0, 1, 13)))
    parts = np.clip(np.searchsorted(edges, known, side="right") - 1, 0, max(len(edges) - 2, 0))
    knots = [(known[parts == n].mean(), np.median(wanted[parts == n])) for n in np.unique(parts)]
    x, y = np.array(knots).T
    if len(x) < 3 or np.ptp(x) < 1:
        return values + np.float32(np.median(wanted - known))
    slopes = np.clip(np.diff(y) / np.maximum(np.diff(x), 1e-3), 0.3, 2.5)
    curve = np.concatenate([[0], np.cumsum(slopes * np.diff(x))])
    curve += np.median(y - curve)
    steps = np.arange(-10, 110, 0.02)  # a table is five times as fast as interpolating each pixel
    below, above = np.minimum(steps - x[0], 0) * slopes[0], np.maximum(steps - x[-1], 0) * slopes[-1]
    table = (np.interp(steps, x, curve) + below + above).astype(np.float32)
    return table[np.clip((values + 10) * 50 + 0.5, 0, len(steps) - 1).astype(np.int32)]


def _colour_balance(known: np.ndarray, wanted: np.ndarray, channel: int) -> list[float]:
    """Weights (L, a, b) and offset of one colour channel: robust ridge regression towards "as it is"."""
    prior = np.eye(3)[channel]
    stiffness = np.array([0.3, 0.1, 0.1]) * len(known)
    low, high = np.full(3, -0.35), np.full(3, 0.35)
    low[0], high[0], low[channel], high[channel] = -0.25, 0.25, 0.5, 1.75
    trust = np.ones(len(known))
    for _ in range(5):
        mean, goal = np.average(known, axis=0, weights=trust), np.average(wanted, weights=trust)
        centred = (known - mean) * trust[:, None]
        left = centred.T @ (known - mean) + np.diag(stiffness)
        weights = np.clip(np.linalg.solve(left, centred.T @ (wanted - goal) + stiffness * prior), low, high)
        error = np.abs(wanted - goal - (known - mean) @ weights)
        trust = 1 / (1 + (error / max(1.5 * float(np.median(error)), 1.0)) ** 2)
    return [*weights, np.clip(goal - mean @ weights, -40, 40)]


def _bent(reference: np.ndarray, test: np.ndarray, both: np.ndarray) -> np.ndarray:
    """The reference bent by a smooth optical flow of at most a few pixels: lens, canvas and stretcher."""
    grey = [np.clip(one[..., 0] * 2.55, 0, 255).astype(np.uint8) for one in (reference, test)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(grey[0], grey[1], None)
    flow = np.clip(blur(flow, 6.0), -_MAX_FLOW, _MAX_FLOW) * both[..., None]
    y, x = np.mgrid[: both.shape[0], : both.shape[1]].astype(np.float32)
    return cv2.remap(reference, x - flow[..., 0], y - flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _structure(test: np.ndarray, other: np.ndarray, both: np.ndarray, sigma: float) -> np.ndarray:
    """1 - local correlation in a Gaussian window; flat windows agree."""

    def mean(values: np.ndarray) -> np.ndarray:
        return inner_blur(values * both, both, sigma)

    m_test, m_other = mean(test), mean(other)
    v_test, v_other = mean(test * test) - m_test**2, mean(other * other) - m_other**2
    common = mean(test * other) - m_test * m_other
    spread = np.sqrt((np.maximum(v_test, 0) + _STEADY) * (np.maximum(v_other, 0) + _STEADY))
    return 1 - (common + _STEADY) / spread


def _misfit(picture: Laid, reference: Laid) -> float:
    """How badly two pictures agree, on a small copy, in units of lightness; inf without overlap."""
    inside = _quarter(picture.valid * reference.valid) > 0.9
    if inside.mean() < 0.05:
        return np.inf
    test, other = (_quarter(one.lab[..., 0])[inside] for one in (picture, reference))
    return float(np.median(np.abs(_tone_curve(test, other, test) - other)) / inside.mean() ** 0.5)


def blur(plane: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, reflected at the edge."""
    return cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
