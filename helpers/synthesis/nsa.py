"""Simulated anomalies for training: patches of another picture, blended in so that no edge gives them away (NSA).

A patch of the source picture is scaled, moved and blended into the destination with Poisson blending; where the
picture changed visibly is the anomaly. Random numbers are drawn in the published order, so the same seed gives the
same picture. One fault is not copied: a simulation whose mask came out empty counted as anomalous; here it is told
apart, and :func:`simulate_visible` draws again.

Source: Schlueter et al., Natural Synthetic Anomalies, ECCV 2022; settings of Gu et al., AnomalyGPT, AAAI 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VISIBLE_LABEL = 0.3
"""A pixel is anomalous where the label exceeds this."""

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, ends exclusive
Bounds = Sequence[np.ndarray]  # smallest and largest half-width in pixels, for rows and columns
Objects = tuple[np.ndarray, np.ndarray] | None  # where source and destination are no background, uint8 (H, W)

_MAX_TRIES = 200
_MIN_PATCH_PIXELS = 50
_MIN_OVERLAP = 0.25
_GAMMA = (2.0, 0.05, 0.03)  # shape, scale, offset of the half-widths as shares of the side
_CHANGE_TOLERANCE = 1.0


@dataclass(frozen=True)
class NsaSettings:
    """How patches are drawn.

    Attributes:
        width_bounds: smallest and largest half-width of a patch as shares of the side, for rows and columns.
        intensity: (k, x0) of the logistic function from the mean change in grey levels to the label.
        background: (brightness, threshold): the object is where the mean colour is farther than ``threshold`` from
            ``brightness``; None takes the whole picture for the object.
        resize_bounds: smallest and largest scale of a patch.
        max_patches: patches tried; the first always, each other one with probability 1/2.
    """

    width_bounds: tuple[tuple[float, float], tuple[float, float]] = ((0.03, 0.40), (0.03, 0.40))
    intensity: tuple[float, float] = (1 / 12, 24.0)
    background: tuple[float, float] | None = None
    resize_bounds: tuple[float, float] = (0.5, 2.0)
    max_patches: int = 2


ART_SETTINGS = NsaSettings()
"""For paintings, as for all of VisA: no background rule."""


@dataclass(frozen=True)
class Simulation:
    """A picture with simulated anomalies.

    Attributes:
        image: uint8 RGB ``(H, W, 3)``; the destination itself when no patch could be placed.
        label: float32 ``(H, W)`` in [0, 1], strength of the change.
        patches: each pasted patch as (top, bottom, left, right) in pixels, ends exclusive.
    """

    image: np.ndarray
    label: np.ndarray
    patches: tuple[Box, ...]

    @property
    def mask(self) -> np.ndarray:
        """bool ``(H, W)``, True where the change is visible; all False means that nothing is to be seen."""
        return self.label > VISIBLE_LABEL


def simulate_visible(
    destination: np.ndarray,
    source: np.ndarray,
    random: np.random.RandomState,
    *,
    settings: NsaSettings = ART_SETTINGS,
    n_tries: int = 10,
) -> Simulation | None:
    """As :func:`simulate`, drawn again until the mask shows something; None when ``n_tries`` were in vain.

    In the published settings 2 to 9 % of the draws are invisible.
    """
    for _ in range(n_tries):
        simulation = simulate(destination, source, random, settings=settings)
        if simulation.mask.any():
            return simulation
    return None


def simulate(
    destination: np.ndarray,
    source: np.ndarray,
    random: np.random.RandomState,
    *,
    settings: NsaSettings = ART_SETTINGS,
) -> Simulation:
    """Blend one or two patches of ``source`` into ``destination``.

    Args:
        destination, source: uint8 RGB ``(H, W, 3)`` of the same size.
        random: numpy's legacy generator, whose stream the published code used.
        settings: see :class:`NsaSettings`.
    Raises:
        ValueError: the pictures differ in size or are not uint8 RGB.
    """
    import cv2
    from skimage.filters import median
    from skimage.morphology import disk

    if destination.shape != source.shape or destination.dtype != np.uint8 or source.dtype != np.uint8:
        raise ValueError(
            f"Source {source.dtype} {source.shape} and destination {destination.dtype} {destination.shape} must both "
            "be uint8 RGB of one size. Resize them first."
        )
    objects = None
    if settings.background is not None:
        objects = tuple(_object_mask(picture, settings.background) for picture in (source, destination))
    image = destination.copy()
    pasted = np.zeros(destination.shape[:2], dtype=np.uint8)
    patches = []
    for number in range(settings.max_patches):
        if number > 0 and random.randint(2) == 0:
            continue
        drawn = _paste(image, source, objects, random, settings)
        if drawn is None:
            continue
        image, (top, bottom, left, right), patch_mask = drawn
        pasted[top:bottom, left:right] = patch_mask  # a later patch overwrites an earlier one, as published
        patches.append((int(top), int(bottom), int(left), int(right)))

    inside = pasted[..., None].astype(np.float64)
    change = np.abs(inside * destination - inside * image).mean(axis=-1)
    changed = cv2.medianBlur((change > _CHANGE_TOLERANCE).astype(np.uint8), 5)
    shown = changed[..., None].astype(np.float64)
    strength = median(np.abs(shown * destination - shown * image).mean(axis=-1), disk(5))
    k, x0 = settings.intensity
    label = changed / (1.0 + np.exp(-k * (strength - x0)))
    return Simulation(image, label.astype(np.float32), tuple(patches))


def _object_mask(picture: np.ndarray, background: tuple[float, float]) -> np.ndarray:
    """uint8 ``(H, W)``: 1 where the picture is not background."""
    import cv2

    brightness, threshold = background
    return cv2.medianBlur((np.abs(picture.mean(axis=-1) - brightness) > threshold).astype(np.uint8), 7)


def _paste(
    image: np.ndarray, source: np.ndarray, objects: Objects, random: np.random.RandomState, settings: NsaSettings
) -> tuple[np.ndarray, Box, np.ndarray] | None:
    """One patch: (blended picture, its box, its mask uint8), or None when no place was found."""
    import cv2

    sides = image.shape[:2]
    bounds = [np.round(np.multiply(shares, side)) for shares, side in zip(settings.width_bounds, sides)]
    shape, scale, offset = _GAMMA
    half_widths = [int(np.clip((offset + random.gamma(shape, scale)) * side, *b)) for side, b in zip(sides, bounds)]
    box = _cut(sides, bounds, half_widths, objects, random)
    if box is None:
        return None
    patch = source[box[0] : box[1], box[2] : box[3]]
    height, width = _scaled_size(patch.shape[:2], bounds, random, settings.resize_bounds)
    patch = cv2.resize(patch, (width, height))
    covered = np.ones((height, width), dtype=np.uint8)
    if objects is not None:
        covered = cv2.resize(objects[0][box[0] : box[1], box[2] : box[3]], (width, height))
    box = _place(sides, (height, width), covered, objects, random)
    if box is None:
        return None
    top, bottom, left, right = box
    blend = np.full((height, width), 255, np.uint8)
    blend[[0, -1], :] = 0
    blend[:, [0, -1]] = 0
    if (blend > 0).sum() < _MIN_PATCH_PIXELS:
        return None
    center = (right - (right - left) // 2, top + (bottom - top) // 2)
    blended = cv2.seamlessClone(patch, image, blend, center, cv2.NORMAL_CLONE)
    if objects is not None:  # background pasted over background is blended in, too, but is no anomaly
        covered = covered | objects[1][top:bottom, left:right]
    return blended, box, covered


def _cut(
    sides: Sequence[int], bounds: Bounds, half_widths: Sequence[int], objects: Objects, random: np.random.RandomState
) -> Box | None:
    """Box of the patch in the source, clipped to the picture and holding some object."""
    for _ in range(_MAX_TRIES):
        limits = []
        for side, (low, _), half in zip(sides, bounds, half_widths):
            center = random.randint(int(low), side - int(low))
            limits += [max(center - half, 0), min(center + half, side)]
        top, bottom, left, right = limits
        if objects is None or objects[0][top:bottom, left:right].any():
            return top, bottom, left, right
    return None


def _scaled_size(
    size: tuple[int, int], bounds: Bounds, random: np.random.RandomState, resize_bounds: tuple[float, float]
) -> tuple[int, int]:
    """Height and width of the patch after scaling; the aspect ratio is kept within the bounds."""
    height, width = size
    new_height = np.clip(np.clip(random.normal(1, 0.5), *resize_bounds) * height, *bounds[0])
    new_width = np.clip(int(new_height / height * width), *bounds[1])
    new_height = np.clip(int(new_width / width * height), *bounds[0])  # the width may have been clipped
    return int(new_height), int(new_width)


def _place(
    sides: Sequence[int], size: Sequence[int], patch: np.ndarray, objects: Objects, random: np.random.RandomState
) -> Box | None:
    """Box of the patch in the destination, fully inside; more than a quarter of its object lies over the object."""
    for _ in range(_MAX_TRIES):
        limits = []
        for side, length in zip(sides, size):
            center = random.randint(length // 2 + 1, side - length // 2 - 1)
            limits += [center - length // 2, center + (length + 1) // 2]
        top, bottom, left, right = limits
        if objects is None or (patch & objects[1][top:bottom, left:right]).sum() > _MIN_OVERLAP * patch.sum():
            return top, bottom, left, right
    return None
