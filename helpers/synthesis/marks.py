"""Synthetic anomalies: a genuine picture -> the same picture with one local change, its mask and a record.

A mask is True on every pixel that the change covers by at least a tenth (:data:`MIN_COVERAGE`). Pixels outside are bit
for bit those of the input; a pixel inside may by chance keep its colour. What the kinds paint stands in
:mod:`helpers.synthesis.kinds`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from helpers.synthesis import colours, kinds
from helpers.synthesis.kinds import LOCAL_KINDS, Edit

HELD_OUT_KINDS = ("letter", "circle", "scratch", "tear", "moved")
"""A third of the local kinds, some of each family: by default tested on and never trained on, so that the comparison
shows what a detector makes of damage it has not seen. The shipped CLIP of ``mini`` never saw four of them."""

VISIBILITY_BINS = {"faint": 5.0, "moderate": 15.0, "plain": float("inf")}
"""Upper limit of each bin of :func:`visibility`. A mark of one per cent of the picture (a tenth of each side) has
its mean CIEDE2000 difference as value: below 5 it is found only by comparing with the original side by side, above 15
it is seen at a glance. The square root makes four times the area count as twice the difference."""

MIN_SIDE = 16  # shortest side in pixels that a mark can be drawn into
MIN_COVERAGE = 0.1  # share of a pixel that a change must cover to belong to the mask; weaker fringes are not painted
MIN_DELTA_E = 2.0  # least mean CIEDE2000 difference in a mask: what nobody can see must not be labelled anomalous


def synthesize(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Put one anomaly into a picture.

    Args:
        image: uint8 RGB ``(H, W, 3)``, both sides at least :data:`MIN_SIDE`; it is not changed.
        kind: one of :data:`LOCAL_KINDS`; ``ValueError`` for another, and for no such picture.
        rng: source of all randomness; the same state gives the same picture (see :func:`rng_for`).
    Returns:
        the anomalous picture, uint8 ``(H, W, 3)``; its mask, bool ``(H, W)``, never empty; a record of JSON values:
        ``kind``, ``delta_e`` (mean CIEDE2000 inside the mask), ``visibility``, ``visibility_bin``, and ``tinted``:
        True where a picture of one colour hid the change, so that the place was made lighter or darker instead.
    """
    if kind not in LOCAL_KINDS:
        raise ValueError(f"Unknown kind of anomaly {kind!r}; allowed are {', '.join(LOCAL_KINDS)}.")
    image, tinted = checked(image, MIN_SIDE), False
    for _ in range(6):
        result, mask = _composed(image, kinds.edits_of(kind, image, rng), rng)
        if mask.any() and visibility(image, result, mask)[0] >= MIN_DELTA_E:
            break
    else:
        (result, mask), tinted = _tinted(image, mask), True
    delta_e, seen = visibility(image, result, mask)
    record = {"kind": kind, "delta_e": round(delta_e, 4), "visibility": round(seen, 4)}
    return result, mask, {**record, "visibility_bin": visibility_bin(seen), "tinted": tinted}


def checked(image: np.ndarray, min_side: int) -> np.ndarray:
    """The picture, contiguous; ``ValueError`` if it is not uint8 RGB ``(H, W, 3)`` of such sides."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A picture is uint8 RGB (H, W, 3); this is {image.dtype} {image.shape}.")
    if min(image.shape[:2]) < min_side:
        raise ValueError(f"The picture is {image.shape[:2]}; both sides must have at least {min_side} pixels.")
    return np.ascontiguousarray(image)


def visibility(original: np.ndarray, anomalous: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Mean CIEDE2000 difference of two pictures (uint8 RGB ``(H, W, 3)``) inside a mask (bool ``(H, W)``, not empty),
    and how visible the change is: that difference times the root of the mask's area in per cent."""
    before, after = colours.rgb_to_lab(np.stack([original[mask], anomalous[mask]]))
    delta_e = float(colours.delta_e2000(before, after).mean())
    return delta_e, delta_e * float(100 * mask.mean()) ** 0.5


def visibility_bin(value: float) -> str:
    """Name of the bin of :data:`VISIBILITY_BINS` that a visibility falls into: 4.9 is faint, 5.0 moderate."""
    return next(name for name, limit in VISIBILITY_BINS.items() if value < limit)


def seed_for(seed: int, name: str) -> int:
    """Seed of one picture from the run's seed and the picture's name, the same in every process and machine."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: fits a signed integer column


def rng_for(seed: int, name: str) -> np.random.Generator:
    """Generator of one picture."""
    return np.random.default_rng(seed_for(seed, name))


def _composed(image: np.ndarray, edits: Sequence[Edit], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blend the edits one over the other, touching covered pixels only; one colour is given the picture's grain."""
    result, mask = image.copy(), np.zeros(image.shape[:2], bool)
    for edit in edits:
        inside = edit.alpha >= round(255 * MIN_COVERAGE)
        share = edit.alpha[inside].astype(np.float32)[:, None] / 255
        if edit.paint.ndim == 1:
            paint = edit.paint + _grain(image, edit.window, inside, rng)[inside]
        else:
            paint = edit.paint[inside].astype(np.float32)
        here = kinds.crop(result, edit.window)
        old = here[inside].astype(np.float32)
        here[inside] = kinds.to_bytes(old + (paint - old) * share)
        kinds.crop(mask, edit.window)[inside] = True
    return result, mask


def _grain(image: np.ndarray, window: kinds.Window, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fine detail of another place, float32 ``(h, w, 3)``: of four drawn, the one as rough as around the mark."""
    x, y, width, height = window
    margin = max(4, min(image.shape[:2]) // 24)
    around = kinds.grown(window, margin, image)
    outside = np.ones(around[3:1:-1], bool)
    outside[y - around[1] :, x - around[0] :][:height, :width] = ~inside
    wanted = float(np.abs(_fine(kinds.crop(image, around))[outside]).mean()) if outside.any() else 0.0
    drawn = [_fine(kinds.crop(image, kinds.place(rng, image, width, height))) for _ in range(4)]
    levels = np.array([np.abs(detail).mean() for detail in drawn])
    best = int(np.abs(levels - wanted).argmin())
    if levels[best] < 0.05:  # flat everywhere, as in a rendered picture
        return np.zeros_like(drawn[best])
    # Strokes are cut down to twice the mean, so that no contour of the motif shows.
    detail = np.clip(drawn[best], -2 * levels[best], 2 * levels[best])
    return detail * min(wanted / float(np.abs(detail).mean()), 3.0)


def _fine(image: np.ndarray) -> np.ndarray:
    image = image.astype(np.float32)
    return image - cv2.GaussianBlur(image, (0, 0), 1.0)


def _tinted(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lighten (dark) or darken (light) the masked place, or a square in the middle when the mask is empty."""
    if not mask.any():
        row, column = np.array(mask.shape) // 2
        mask[row - 3 : row + 3, column - 3 : column + 3] = True
    lab = colours.rgb_to_lab(image[mask])
    lab[:, 0] += np.where(lab[:, 0].mean() > 50, -12, 12)
    result = image.copy()
    result[mask] = colours.lab_to_rgb(lab)
    return result, mask
