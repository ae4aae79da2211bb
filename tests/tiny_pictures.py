"""Small pictures, masks and trees of folders for tests: no two pictures look alike."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SHAPE = (30, 44)
MARKED = 24
"""Pixels that are True in every mask of :func:`mask`."""


def picture(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """A smooth random landscape, uint8 ``(H, W, 3)``."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def mask(value: int = 255, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    values = np.zeros(shape, np.uint8)
    values[10:14, 20:26] = value
    return values


def put(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def tree(root: Path, *places: str, start: int = 0) -> Path:
    """Pictures named in words: ``"mona/good 6"`` is six pictures, ``"mask/crack m2"`` two masks; or one file's name."""
    seed = start
    for place in places:
        folder, _, n = place.rpartition(" ")
        names = [f"{i:03d}.png" for i in range(int(n.strip("m")))] if n.strip("m").isdigit() and folder else []
        for name in names:
            seed += 1
            put(root / folder / name, mask() if n.startswith("m") else picture(seed))
        if not names and Path(place).suffix not in (".png", ".jpg"):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_bytes(b"no picture")
        elif not names:
            seed += 1
            put(root / place, mask() if "mask" in Path(place).name else picture(seed))
    return root
