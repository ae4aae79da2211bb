"""Simulated anomalies for training: patches of another picture, blended in so that no edge gives them away (NSA).

Random numbers are drawn in the published order, so the same seed gives the same picture. One fault is not copied: a
simulation whose mask came out empty counted as anomalous; here :func:`simulate_visible` draws again.

Source: Schlueter et al., Natural Synthetic Anomalies, ECCV 2022; settings of Gu et al., AnomalyGPT, AAAI 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from skimage.filters import median
from skimage.morphology import disk

VISIBLE_LABEL = 0.3
"""A pixel is anomalous where the label exceeds this."""

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, ends exclusive

_MAX_TRIES = 200
_MIN_PATCH_PIXELS = 50
_MIN_OVERLAP = 0.25
_GAMMA = (2.0, 0.05, 0.03)  # shape, scale, offset of the half-widths as shares of the side
_CHANGE_TOLERANCE = 1.0


@dataclass(frozen=True)
class NsaSettings:
    """How patches are drawn; the defaults are those for VisA and for paintings.

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
    """As :func:`simulate`, drawn again until the mask shows something (2 to 9 % of the draws do not); None when
    ``n_tries`` were in vain."""
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
    if destination.shape != source.shape or destination.dtype != np.uint8 or source.dtype != np.uint8:
        raise ValueError(
            f"Source {source.dtype} {source.shape} and destination {destination.dtype} {destination.shape} must both "
            "be uint8 RGB of one size. Resize them first."
        )
    patching = _Patching(source, destination, random, settings)
    image = destination.copy()
    pasted = np.zeros(destination.shape[:2], dtype=np.uint8)
    patches = []
    for number in range(settings.max_patches):
        drawn = None if number > 0 and random.randint(2) == 0 else patching.paste(image)
        if drawn is not None:
            image, (top, bottom, left, right), patch_mask = drawn
            pasted[top:bottom, left:right] = patch_mask  # a later patch overwrites an earlier one, as published
            patches.append((int(top), int(bottom), int(left), int(right)))

    difference = np.abs(destination.astype(np.float64) - image)
    change = (pasted[..., None] * difference).mean(axis=-1)
    changed = cv2.medianBlur((change > _CHANGE_TOLERANCE).astype(np.uint8), 5)
    strength = median((changed[..., None] * difference).mean(axis=-1), disk(5))
    k, x0 = settings.intensity
    label = changed / (1.0 + np.exp(-k * (strength - x0)))
    return Simulation(image, label.astype(np.float32), tuple(patches))


class _Patching:
    """Draws patches of one source for one destination."""

    def __init__(
        self, source: np.ndarray, destination: np.ndarray, random: np.random.RandomState, settings: NsaSettings
    ) -> None:
        self._source, self._random, self._settings = source, random, settings
        self._sides = source.shape[:2]
        self._bounds = [np.round(np.multiply(b, side)) for b, side in zip(settings.width_bounds, self._sides)]
        self._has_background = settings.background is not None
        self._objects = [self._object_mask(picture) for picture in (source, destination)]

    def paste(self, image: np.ndarray) -> tuple[np.ndarray, Box, np.ndarray] | None:
        """One patch blended into the picture so far: picture, box, mask uint8; None when no place was found."""
        shape, scale, offset = _GAMMA
        shares = [offset + self._random.gamma(shape, scale) for _ in self._sides]
        half_widths = [int(np.clip(s * side, *b)) for s, side, b in zip(shares, self._sides, self._bounds)]
        box = self._cut(half_widths)
        if box is None:
            return None
        cut = np.s_[box[0] : box[1], box[2] : box[3]]
        height, width = self._scaled_size(self._source[cut].shape[:2])
        patch, covered = (cv2.resize(part[cut], (width, height)) for part in (self._source, self._objects[0]))
        box = self._place((height, width), covered)
        blend = np.zeros((height, width), np.uint8)
        blend[1:-1, 1:-1] = 255
        if box is None or (blend > 0).sum() < _MIN_PATCH_PIXELS:
            return None
        top, bottom, left, right = box
        center = (right - (right - left) // 2, top + (bottom - top) // 2)
        blended = cv2.seamlessClone(patch, image, blend, center, cv2.NORMAL_CLONE)
        # Background pasted over background is blended in, too, but is no anomaly.
        return blended, box, covered | self._objects[1][top:bottom, left:right]

    def _object_mask(self, picture: np.ndarray) -> np.ndarray:
        """uint8 ``(H, W)``: 1 where the picture is not background."""
        if not self._has_background:
            return np.ones(picture.shape[:2], np.uint8)
        brightness, threshold = self._settings.background
        return cv2.medianBlur((np.abs(picture.mean(axis=-1) - brightness) > threshold).astype(np.uint8), 7)

    def _cut(self, half_widths: list[int]) -> Box | None:
        """Box of the patch in the source, clipped to the picture and holding some object."""
        for _ in range(_MAX_TRIES):
            limits = []
            for side, (low, _), half in zip(self._sides, self._bounds, half_widths):
                center = self._random.randint(int(low), side - int(low))
                limits += [max(center - half, 0), min(center + half, side)]
            top, bottom, left, right = limits
            if self._objects[0][top:bottom, left:right].any() or not self._has_background:
                return top, bottom, left, right
        return None

    def _scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the patch after scaling; the aspect ratio is kept within the bounds."""
        height, width = size
        scale = np.clip(self._random.normal(1, 0.5), *self._settings.resize_bounds)
        new_height = np.clip(scale * height, *self._bounds[0])
        new_width = np.clip(int(new_height / height * width), *self._bounds[1])
        new_height = np.clip(int(new_width / width * height), *self._bounds[0])  # the width may have been clipped
        return int(new_height), int(new_width)

    def _place(self, size: tuple[int, int], covered: np.ndarray) -> Box | None:
        """Box of the patch in the destination, fully inside; a quarter of its object lies over the object."""
        for _ in range(_MAX_TRIES):
            limits = []
            for side, length in zip(self._sides, size):
                center = self._random.randint(length // 2 + 1, side - length // 2 - 1)
                limits += [center - length // 2, center + (length + 1) // 2]
            top, bottom, left, right = limits
            overlap = (covered & self._objects[1][top:bottom, left:right]).sum()
            if overlap > _MIN_OVERLAP * covered.sum() or not self._has_background:
                return top, bottom, left, right
        return None
