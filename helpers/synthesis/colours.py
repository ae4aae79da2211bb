"""Colour as the eye measures it: CIE Lab (D65), CIEDE2000, the palette of a picture and names of colours.

Written in numpy on few pixels, so that the bytes of a synthetic picture do not hang on OpenCV's Lab tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

COLOUR_NAMES = {
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "white": (240, 240, 240),
    "red": (190, 40, 40),
    "orange": (225, 130, 40),
    "yellow": (225, 200, 60),
    "green": (60, 130, 60),
    "blue": (50, 85, 180),
    "purple": (120, 60, 140),
    "pink": (230, 150, 170),
    "brown": (110, 70, 40),
    "beige": (215, 190, 150),
}
"""Plain words for colours and the RGB value that stands for each."""

_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_TO_RGB = np.linalg.inv(_TO_XYZ)
_WHITE = np.array([0.95047, 1.0, 1.08883])
_TO_RATIOS = (_TO_XYZ / _WHITE[:, None]).T
_EPSILON, _KAPPA = 216 / 24389, 24389 / 27
_CURVE = np.arange(256) / 255
_LINEAR = np.where(_CURVE > 0.04045, ((_CURVE + 0.055) / 1.055) ** 2.4, _CURVE / 12.92)


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB to CIE Lab under D65.

    Args:
        rgb: uint8 ``(..., 3)``.
    Returns:
        float64 ``(..., 3)``: L in [0, 100], a and b about [-128, 128].
    Source: CIE 15:2004; sRGB curve of IEC 61966-2-1.
    """
    xyz = _LINEAR[rgb] @ _TO_RATIOS
    f = np.where(xyz > _EPSILON, np.cbrt(xyz), (_KAPPA * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE Lab ``(..., 3)`` to uint8 sRGB; colours that sRGB lacks are clipped."""
    lab = np.asarray(lab, float)
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f**3 > _EPSILON, f**3, (116 * f - 16) / _KAPPA) * _WHITE
    linear = np.clip(xyz @ _TO_RGB.T, 0, 1)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.rint(curve * 255).astype(np.uint8)


def delta_e2000(lab_a: np.ndarray, lab_b: np.ndarray) -> np.ndarray:
    """CIEDE2000 difference of two colours (1 is about the least that is noticed side by side).

    Args:
        lab_a, lab_b: float ``(..., 3)``.
    Returns:
        float64 ``(...)``.
    Source: Sharma, Wu, Dalal, Color Research & Application 30 (2005), equations 2 to 22, weights 1.
    """
    l1, a1, b1 = np.moveaxis(np.asarray(lab_a, float), -1, 0)
    l2, a2, b2 = np.moveaxis(np.asarray(lab_b, float), -1, 0)
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 1.5 - 0.5 * np.sqrt(c7 / (c7 + 25.0**7))
    a1, a2 = a1 * g, a2 * g
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.arctan2(b1, a1) % (2 * np.pi), np.arctan2(b2, a2) % (2 * np.pi)
    is_grey = c1 * c2 == 0
    turn = h2 - h1
    turn = np.where(is_grey, 0, turn - 2 * np.pi * (turn > np.pi) + 2 * np.pi * (turn < -np.pi))
    d_l, d_c, d_h = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(turn / 2)
    l_mean, c_mean = (l1 + l2) / 2, (c1 + c2) / 2
    h_sum = h1 + h2
    around = np.where(h_sum < 2 * np.pi, h_sum / 2 + np.pi, h_sum / 2 - np.pi)
    h_mean = np.where(is_grey, h_sum, np.where(np.abs(h1 - h2) <= np.pi, h_sum / 2, around))
    t = (
        1
        - 0.17 * np.cos(h_mean - np.pi / 6)
        + 0.24 * np.cos(2 * h_mean)
        + 0.32 * np.cos(3 * h_mean + np.pi / 30)
        - 0.20 * np.cos(4 * h_mean - 63 * np.pi / 180)
    )
    l_50 = (l_mean - 50) ** 2
    s_l = 1 + 0.015 * l_50 / np.sqrt(20 + l_50)
    s_c, s_h = 1 + 0.045 * c_mean, 1 + 0.015 * c_mean * t
    c7 = c_mean**7
    angle = np.pi / 3 * np.exp(-(((np.degrees(h_mean) - 275) / 25) ** 2))
    rotation = -2 * np.sqrt(c7 / (c7 + 25.0**7)) * np.sin(angle)
    l_part, c_part, h_part = d_l / s_l, d_c / s_c, d_h / s_h
    return np.sqrt(np.maximum(l_part**2 + c_part**2 + h_part**2 + rotation * c_part * h_part, 0))


def palette(image: np.ndarray, n_colours: int = 8) -> np.ndarray:
    """The main colours of a picture in Lab, by median cut over at most 256 evenly spaced pixels.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        n_colours: colours returned; equal ones occur when the picture has fewer.
    Returns:
        float64 ``(n_colours, 3)``, dark to light.
    """
    boxes = [rgb_to_lab(sample_pixels(image, 256))]
    spans = [np.ptp(boxes[0], axis=0)]
    while len(boxes) < n_colours:
        widest = max(range(len(boxes)), key=lambda i: spans[i].max())
        box, axis = boxes[widest], int(spans[widest].argmax())
        order = box[:, axis].argsort(kind="stable")
        half = len(box) // 2
        parts = [box[order[:half]], box[order[half:]]] if half else [box, box]
        boxes[widest : widest + 1] = parts
        spans[widest : widest + 1] = [part.max(axis=0) - part.min(axis=0) for part in parts]
    centres = np.array([box.mean(axis=0) for box in boxes])
    return centres[np.argsort(centres[:, 0], kind="stable")]


def sample_pixels(image: np.ndarray, n: int) -> np.ndarray:
    """About ``n`` pixels of a picture on an even grid: uint8 ``(m, 3)``, m from 1 to ``n``."""
    height, width = image.shape[:2]
    step = max(1, int(np.ceil((height * width / n) ** 0.5)))
    pixels = image[step // 2 % height :: step, step // 2 % width :: step].reshape(-1, 3)
    if len(pixels) == 0:  # thinner than one step
        pixels = image.reshape(-1, 3)
    return pixels[:: max(1, -(-len(pixels) // n))]


def colour_names(rgb: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
    """The word of :data:`COLOUR_NAMES` nearest by CIEDE2000 to each RGB value ``(n, 3)``.

    >>> colour_names([[200, 30, 30], [5, 5, 8]])
    ['red', 'black']
    """
    names, lab = _named()
    nearest = delta_e2000(rgb_to_lab(np.asarray(rgb, np.uint8))[:, None], lab).argmin(axis=1)
    return [names[index] for index in nearest]


@cache
def _named() -> tuple[tuple[str, ...], np.ndarray]:
    return tuple(COLOUR_NAMES), rgb_to_lab(np.array(list(COLOUR_NAMES.values()), np.uint8))
