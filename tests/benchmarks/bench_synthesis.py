"""Speed of synthesis at 512 x 512 on one core. Run: python tests/benchmarks/bench_synthesis.py

Seconds are CPU time of this process, so that other jobs disturb less. Goals: 500 pictures/s for the report's five drawn
kinds, 70 saved pairs of picture and mask a second.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np

from helpers.data import images
from helpers.synthesis import marks as synthesis

SIDE = 512


def per_second(work: Callable[[int], object], n: int) -> float:
    work(0)
    start = time.process_time()
    for index in range(n):
        work(index)
    return n / (time.process_time() - start)


def picture() -> np.ndarray:
    """A smooth picture with grain: PNG compresses it about as badly as a photograph of a painting."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def full_frame_blend(image: np.ndarray, seed: int) -> np.ndarray:
    """What a plain version does: one box, feathered, blended over the whole picture in float."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, SIDE - 100, 2)
    alpha = np.zeros((SIDE, SIDE), np.float32)
    alpha[y : y + 100, x : x + 100] = 1
    alpha = cv2.GaussianBlur(alpha, (0, 0), 2)[..., None]
    colour = rng.integers(0, 256, 3).astype(np.float32)
    return np.rint(image.astype(np.float32) * (1 - alpha) + colour * alpha).astype(np.uint8)


def main() -> None:
    cv2.setNumThreads(1)
    image = picture()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; OpenCV {cv2.__version__}")
    plain = per_second(lambda i: full_frame_blend(image, i), 60)
    print(f"{'plain full-frame blend':<28}{plain:8.0f} pictures/s")
    seconds = []
    for kind in synthesis.LOCAL_KINDS:
        rate = per_second(lambda i, kind=kind: synthesis.synthesize(image, kind, synthesis.rng_for(i, kind)), 100)
        seconds += [1 / rate] if kind in synthesis.REPORT_KINDS else []
        print(f"{kind:<28}{rate:8.0f} pictures/s {rate / plain:6.1f} x plain")
    drawn = len(seconds) / sum(seconds)
    print(f"{'the five drawn kinds':<28}{drawn:8.0f} pictures/s (goal 500)")

    with tempfile.TemporaryDirectory() as folder:

        def save(index: int) -> None:
            kind = synthesis.REPORT_KINDS[index % 5]
            result, mask, _ = synthesis.synthesize(image, kind, synthesis.rng_for(index, kind))
            images.save_png(Path(folder) / "picture.png", result)
            images.save_png(Path(folder) / "mask.png", mask)

        print(f"{'saved pairs (PNG)':<28}{per_second(save, 60):8.0f} pairs/s (goal 70)")


if __name__ == "__main__":
    main()
