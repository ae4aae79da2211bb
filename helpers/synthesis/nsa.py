"""Simulated anomalies for training: patches of another picture, blended in so that no edge gives them away (NSA).

Random numbers are drawn in the published order, so the same seed gives the same picture. One fault is not copied: a
simulation whose mask came out empty counted as anomalous; here :func:`simulate_visible` draws again.

Source: Schlueter et al., Natural Synthetic Anomalies, ECCV 2022; settings of Gu et al., AnomalyGPT, AAAI 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from skimage.filters import median
from skimage.morphology import disk

VISIBLE_LABEL = 0.3
"""A pixel is anomalous where the label exceeds this."""

_MAX_PATCHES = 2  # the first is always tried, the other with probability 1/2
_MAX_TRIES, _MIN_PATCH_PIXELS, _MIN_OVERLAP = 200, 50, 0.25
_HALF_WIDTHS = (0.03, 0.40)  # smallest and largest half-width of a patch as shares of the side
_GAMMA = (2.0, 0.05)  # shape, scale of their distribution above the smallest
_SCALES = (0.5, 2.0)  # smallest and largest scale of a patch
_CHANGE_TOLERANCE = 1.0
_INTENSITY = (1 / 12, 24.0)  # k, x0 of the logistic function from the mean change in grey levels to the label


class Simulation(NamedTuple):
    """A picture with simulated anomalies."""

    image: np.ndarray  # uint8 RGB (H, W, 3); the destination itself when no patch could be placed
    label: np.ndarray  # float32 (H, W) in [0, 1], strength of the change
    patches: tuple[tuple[int, int, int, int], ...]  # top, bottom, left, right in pixels, ends exclusive

    @property
    def mask(self) -> np.ndarray:
        """bool ``(H, W)``, True where the change is visible; all False means that nothing is to be seen."""
        return self.label > VISIBLE_LABEL


def simulate_visible(
    destination: np.ndarray, source: np.ndarray, random: np.random.RandomState, *, n_tries: int = 10
) -> Simulation | None:
    """As :func:`simulate`, drawn again until the mask shows something (2 to 9 % of the draws do not); None when
    ``n_tries`` were in vain."""
    drawn = (simulate(destination, source, random) for _ in range(n_tries))
    return next((simulation for simulation in drawn if simulation.mask.any()), None)


def simulate(destination: np.ndarray, source: np.ndarray, random: np.random.RandomState) -> Simulation:
    """Blend one or two patches of ``source`` into ``destination``.

    Both are uint8 RGB ``(H, W, 3)`` of one size, else ``ValueError``; the settings are those for VisA and paintings.
    ``random`` is numpy's legacy generator, whose stream the published code used.
    """
    if destination.shape != source.shape or destination.dtype != np.uint8 or source.dtype != np.uint8:
        found = f"{source.dtype} {source.shape} and {destination.dtype} {destination.shape}"
        raise ValueError(f"Source and destination are {found}; both must be uint8 RGB of one size. Resize them first.")
    objects = _object(source), _object(destination)
    image, patches = destination.copy(), []
    pasted = np.zeros(destination.shape[:2], np.uint8)
    for number in range(_MAX_PATCHES):
        drawn = None if number and random.randint(2) == 0 else _patch(source, objects, random)
        if drawn is not None:
            patch, covered, (rows, columns) = drawn
            inner = np.zeros(covered.shape, np.uint8)
            inner[1:-1, 1:-1] = 255
            center = columns.stop - covered.shape[1] // 2, rows.start + covered.shape[0] // 2
            image = cv2.seamlessClone(patch, image, inner, center, cv2.NORMAL_CLONE)
            # Background over background is no anomaly. A later patch overwrites an earlier one, as published.
            pasted[rows, columns] = covered | objects[1][rows, columns]
            patches.append((rows.start, rows.stop, columns.start, columns.stop))
    difference = np.abs(destination.astype(np.float64) - image)
    change = (pasted[..., None] * difference).mean(axis=-1)
    changed = cv2.medianBlur((change > _CHANGE_TOLERANCE).astype(np.uint8), 5)
    strength = median((changed[..., None] * difference).mean(axis=-1), disk(5))
    k, x0 = _INTENSITY
    label = changed / (1.0 + np.exp(-k * (strength - x0)))
    return Simulation(image, label.astype(np.float32), tuple(patches))


def _object(picture: np.ndarray) -> np.ndarray:
    """uint8 ``(H, W)``: 1 on the object, 0 on background, which a painting does not have."""
    return np.ones(picture.shape[:2], np.uint8)


def _patch(
    source: np.ndarray, objects: Sequence[np.ndarray], random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray, tuple[slice, slice]] | None:
    """A scaled part of the source with some object, its object, and its place over the other object; None: no place."""
    sides = source.shape[:2]
    bounds = [np.round(np.multiply(_HALF_WIDTHS, side)) for side in sides]
    halves = [_HALF_WIDTHS[0] + random.gamma(*_GAMMA) for _ in sides]
    halves = [int(np.clip(half * side, *bound)) for half, side, bound in zip(halves, sides, bounds)]
    for _ in range(_MAX_TRIES):
        centers = [random.randint(int(low), side - int(low)) for side, (low, _) in zip(sides, bounds)]
        cut = tuple(slice(max(c - half, 0), min(c + half, side)) for c, half, side in zip(centers, halves, sides))
        if objects[0][cut].any():
            break
    else:
        return None
    height, width = objects[0][cut].shape
    scale = np.clip(random.normal(1, 0.5), *_SCALES)
    new_height = np.clip(scale * height, *bounds[0])  # the aspect ratio is kept within the bounds
    new_width = np.clip(int(new_height / height * width), *bounds[1])
    size = int(np.clip(int(new_width / width * height), *bounds[0])), int(new_width)
    patch, covered = (cv2.resize(part[cut], size[::-1]) for part in (source, objects[0]))
    for _ in range(_MAX_TRIES):
        centers = [random.randint(n // 2 + 1, side - n // 2 - 1) for n, side in zip(size, sides)]
        place = tuple(slice(c - n // 2, c + (n + 1) // 2) for c, n in zip(centers, size))
        if (covered & objects[1][place]).sum() > _MIN_OVERLAP * covered.sum():
            return (patch, covered, place) if (size[0] - 2) * (size[1] - 2) >= _MIN_PATCH_PIXELS else None
    return None
