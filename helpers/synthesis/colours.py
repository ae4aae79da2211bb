"""Colour as the eye measures it: CIE Lab (D65), CIEDE2000 and the palette of a picture."""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image
from skimage.color import deltaE_ciede2000 as delta_e2000
from skimage.color import lab2rgb
from skimage.color import rgb2lab as rgb_to_lab

__all__ = ["delta_e2000", "lab_to_rgb", "palette", "rgb_to_lab", "sample_pixels"]


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE Lab ``(..., 3)`` to uint8 sRGB; colours that sRGB lacks are clipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scikit-image reports clipped colours
        return np.rint(lab2rgb(np.asarray(lab, float)) * 255).astype(np.uint8)


def palette(image: np.ndarray, n_colours: int = 8) -> np.ndarray:
    """The main colours (equal ones if few) by median cut, dark to light: CIE Lab, float64 ``(n_colours, 3)``."""
    reduced = Image.fromarray(sample_pixels(image, 1024)[None]).quantize(n_colours)
    found = np.array(reduced.getpalette()[: 3 * n_colours], np.uint8).reshape(-1, 3)
    lab = rgb_to_lab(np.resize(found, (n_colours, 3)))
    return lab[np.argsort(lab[:, 0], kind="stable")]


def sample_pixels(image: np.ndarray, n: int) -> np.ndarray:
    """At most ``n`` pixels of a picture, evenly spaced in reading order: uint8 ``(m, 3)``."""
    pixels = image.reshape(-1, 3)
    return pixels[np.unique(np.linspace(0, len(pixels) - 1, n).astype(int))]
