"""Synthetic anomalies: a normal picture -> the same picture with one local change, its mask and a record.

The five kinds of the source report (drawn marks), ageing (scratch, craquelure, stain, fade, tear) and tampering
(pasted, blended, erased, moved parts). Colours come from the picture's own palette and are matched in Lab to a random
distance from their surroundings, so that marks range from hidden to plain. Changes of the whole picture stand in
:mod:`helpers.synthesis.photographs` (its public names are also here).

What a mask means: True on every pixel that the change covers by at least a tenth (:data:`MIN_COVERAGE`). Pixels outside
are bit for bit those of the input; a pixel inside may by chance keep its colour. This is why datasets are stored as
PNG: JPEG recodes blocks of 8 or 16 pixels and would change pixels outside the mask (and leave traces of double
compression that a detector can learn instead of the mark).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from helpers.synthesis import colours
from helpers.synthesis.photographs import (
    ANOMALOUS_VARIATIONS,
    NORMAL_VARIATIONS,
    VARIATIONS,
    Variation,
    rephotograph,
    variations_table,
    vary,
)

__all__ = [
    "ANOMALOUS_VARIATIONS",
    "LOCAL_KINDS",
    "MIN_SIDE",
    "NORMAL_VARIATIONS",
    "PLACES",
    "REPORT_KINDS",
    "VARIATIONS",
    "VISIBILITY_BINS",
    "Variation",
    "Visibility",
    "place_of",
    "rephotograph",
    "rng_for",
    "seed_for",
    "synthesize",
    "variations_table",
    "vary",
    "visibility",
    "visibility_bin",
]

REPORT_KINDS = ("box", "line", "letter", "circle", "dots")
"""Marks that the source report drew with OpenCV."""
_AGEING = ("scratch", "craquelure", "stain", "fade", "tear")
_TAMPERING = ("cutpaste", "poisson", "erased", "moved")
LOCAL_KINDS = REPORT_KINDS + _AGEING + _TAMPERING
"""Every kind that :func:`synthesize` makes; all have a mask."""

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""The cells of a 3 x 3 grid in words, row by row."""

VISIBILITY_BINS = {"faint": 5.0, "moderate": 15.0, "plain": float("inf")}
"""Upper limit of each bin of :func:`visibility`. A mark of one per cent of the picture (a tenth of each side) has
its mean CIEDE2000 difference as value: below 5 it is found only by comparing with the original side by side, above 15
it is seen at a glance. The square root makes four times the area count as twice the difference."""

MIN_SIDE = 16
"""Shortest side in pixels that a mark can be drawn into."""
MIN_COVERAGE = 0.1
"""Share of a pixel that a change must cover to belong to the mask; weaker fringes are not painted at all."""
MIN_DELTA_E = 2.0
"""Least mean CIEDE2000 difference inside a mask: what nobody can see must not be labelled anomalous."""

_ATTEMPTS = 6
_MAX_SEEN_PIXELS = 512
_TARGETS = (6.0, 60.0)  # distance in Lab between a mark and its surroundings, drawn log-uniformly


# ------------------------------------------------------------------------------------------------------- public


@dataclass(frozen=True)
class Visibility:
    """How visible a change is.

    Attributes:
        delta_e: mean CIEDE2000 difference inside the mask.
        area: share of the picture inside the mask, in (0, 1].
        value: ``delta_e * sqrt(area in per cent)``.
    """

    delta_e: float
    area: float
    value: float


def synthesize(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Put one anomaly into a picture.

    Args:
        image: uint8 RGB ``(H, W, 3)``, both sides at least :data:`MIN_SIDE`; it is not changed.
        kind: one of :data:`LOCAL_KINDS`.
        rng: source of all randomness; the same state gives the same bytes (see :func:`rng_for`).
    Returns:
        the anomalous picture, uint8 ``(H, W, 3)``; its mask, bool ``(H, W)``, never empty; a record of JSON values:
        ``kind``, ``colours`` (RGB), ``colour_names``, ``place`` (one of :data:`PLACES`), ``bbox`` (x, y, width,
        height of the mask), ``parameters``, ``delta_e``, ``area``, ``visibility``, ``visibility_bin``.
    Raises:
        ValueError: unknown kind, or not such a picture.
    """
    if kind not in _MAKERS:
        raise ValueError(f"Unknown kind of anomaly {kind!r}; allowed are {', '.join(LOCAL_KINDS)}.")
    image = _checked(image)
    for attempt in range(1, _ATTEMPTS + 1):  # noqa: B007 (the record tells how many)
        change = _MAKERS[kind](image, rng)
        result, mask = _composed(image, change.edits)
        if mask.any():
            seen = visibility(image, result, mask)
            if seen.delta_e >= MIN_DELTA_E:
                break
    else:  # a picture of one colour hides what is moved, pasted or erased in it: tint the place instead
        result, mask = _tinted(image, mask)
        seen = visibility(image, result, mask)
        change.parameters["tinted"] = True
    paints = change.colours or [[round(float(v)) for v in result[mask].mean(axis=0)]]
    record = {
        "kind": kind,
        "colours": paints,
        "colour_names": sorted(set(colours.colour_names(paints))),
        "place": place_of(mask),
        "bbox": [int(value) for value in cv2.boundingRect(mask.view(np.uint8))],
        "parameters": change.parameters | {"attempts": attempt},
        "delta_e": round(seen.delta_e, 4),
        "area": round(seen.area, 8),
        "visibility": round(seen.value, 4),
        "visibility_bin": visibility_bin(seen.value),
    }
    return result, mask, record


def visibility(original: np.ndarray, anomalous: np.ndarray, mask: np.ndarray) -> Visibility:
    """How visible a change is: colour difference times the square root of the area.

    Args:
        original, anomalous: uint8 RGB ``(H, W, 3)``.
        mask: bool ``(H, W)`` with at least one True pixel. The difference is the mean over at most 512 evenly spaced
            pixels of it.
    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    if original.shape != anomalous.shape or mask.shape != original.shape[:2]:
        raise ValueError(f"Shapes differ: original {original.shape}, anomalous {anomalous.shape}, mask {mask.shape}.")
    inside = np.flatnonzero(mask)
    if len(inside) == 0:
        raise ValueError("The mask is empty: a change without pixels has no visibility.")
    looked_at = inside[:: -(-len(inside) // _MAX_SEEN_PIXELS)]
    before = colours.rgb_to_lab(original.reshape(-1, 3)[looked_at])
    after = colours.rgb_to_lab(anomalous.reshape(-1, 3)[looked_at])
    delta_e = float(colours.delta_e2000(before, after).mean())
    area = len(inside) / mask.size
    return Visibility(delta_e, area, delta_e * (100 * area) ** 0.5)


def visibility_bin(value: float) -> str:
    """Name of the bin of :data:`VISIBILITY_BINS` that a visibility falls into.

    >>> visibility_bin(4.9), visibility_bin(5.0), visibility_bin(80.0)
    ('faint', 'moderate', 'plain')
    """
    return next(name for name, limit in VISIBILITY_BINS.items() if value < limit)


def place_of(mask: np.ndarray) -> str:
    """The cell of a 3 x 3 grid, in words, that holds the centre of mass of a mask, bool ``(H, W)``."""
    x, y, box_width, box_height = cv2.boundingRect(mask.view(np.uint8))
    if box_width == 0:
        raise ValueError("The mask is empty: it has no place.")
    box = mask[y : y + box_height, x : x + box_width]
    rows, columns = box.sum(axis=1), box.sum(axis=0)
    height, width = mask.shape
    row = min(int((y + 0.5 + np.arange(box_height) @ rows / rows.sum()) * 3 / height), 2)
    column = min(int((x + 0.5 + np.arange(box_width) @ columns / columns.sum()) * 3 / width), 2)
    return PLACES[3 * row + column]


def seed_for(seed: int, name: str) -> int:
    """Seed of one picture, from the run's seed and the picture's name; the same in every process and on every machine.

    >>> seed_for(2024, "mona_lisa/box_001.png") == seed_for(2024, "mona_lisa/box_001.png")
    True
    """
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: fits a signed integer column


def rng_for(seed: int, name: str) -> np.random.Generator:
    """Generator of one picture (see :func:`seed_for`)."""
    return np.random.default_rng(seed_for(seed, name))


# -------------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True)
class _Edit:
    """Paint over a window: ``alpha`` uint8 ``(h, w)`` at ``(x, y)``; ``paint`` is one colour or uint8 ``(h, w, 3)``."""

    x: int
    y: int
    alpha: np.ndarray
    paint: np.ndarray


@dataclass(frozen=True)
class _Change:
    edits: Sequence[_Edit]
    parameters: dict[str, Any]
    colours: list[list[int]] = field(default_factory=list)


_Window = tuple[int, int, int, int]  # x, y, width, height


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A picture is uint8 RGB (H, W, 3); this is {image.dtype} {image.shape}.")
    if min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(f"The picture is {image.shape[:2]}; both sides must have at least {MIN_SIDE} pixels.")
    return np.ascontiguousarray(image)


def _composed(image: np.ndarray, edits: Sequence[_Edit]) -> tuple[np.ndarray, np.ndarray]:
    """Blend the edits one over the other, touching covered pixels only: 50 times faster than whole frames."""
    result, mask = image.copy(), np.zeros(image.shape[:2], bool)
    pixels, marked, width = result.reshape(-1, 3), mask.reshape(-1), image.shape[1]
    for edit in edits:
        inside = np.flatnonzero(edit.alpha >= round(255 * MIN_COVERAGE))
        rows, columns = np.divmod(inside, edit.alpha.shape[1])
        here = (rows + edit.y) * width + (columns + edit.x)
        share = edit.alpha.reshape(-1)[inside].astype(np.float32)[:, None] * np.float32(1 / 255)
        paint = edit.paint if edit.paint.ndim == 1 else edit.paint.reshape(-1, 3)[inside]
        old = pixels[here].astype(np.float32)
        pixels[here] = np.rint(old + (paint.astype(np.float32) - old) * share).astype(np.uint8)
        marked[here] = True
    return result, mask


def _tinted(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lighten (dark) or darken (light) the masked place, or a square in the middle when the mask is empty."""
    height, width = mask.shape
    if not mask.any():
        mask = np.zeros((height, width), bool)
        mask[height // 2 - 3 : height // 2 + 3, width // 2 - 3 : width // 2 + 3] = True
    lab = colours.rgb_to_lab(image[mask])
    lab[:, 0] += np.where(lab[:, 0].mean() > 50, -12, 12)
    result = image.copy()
    result[mask] = colours.lab_to_rgb(lab)
    return result, mask


# ------------------------------------------------------------------------------------------- place, size, colour


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    """Integer from ``low`` to ``high``, both included."""
    return int(rng.integers(low, high + 1))


def _unit(image: np.ndarray) -> int:
    return min(image.shape[:2])


def _length(rng: np.random.Generator, image: np.ndarray, low: float, high: float, at_least: int = 3) -> int:
    """A length in pixels, as a share of the shorter side, drawn log-uniformly (small marks are the common ones)."""
    share = np.exp(rng.uniform(np.log(low), np.log(high)))
    return int(min(max(at_least, round(share * _unit(image))), _unit(image) - 2))


def _place(rng: np.random.Generator, image: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """Upper left corner (x, y) of a window that lies inside the picture."""
    rows, columns = image.shape[:2]
    return _between(rng, 0, max(0, columns - width)), _between(rng, 0, max(0, rows - height))


def _around(points: np.ndarray, margin: int, image: np.ndarray) -> _Window:
    """Window that holds points (n, 2) of x, y with a margin, cut at the picture's border."""
    rows, columns = image.shape[:2]
    low = np.clip(np.floor(points.min(axis=0)).astype(int) - margin, 0, [columns - 1, rows - 1])
    high = np.clip(np.ceil(points.max(axis=0)).astype(int) + margin + 1, low + 1, [columns, rows])
    return int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])


def _crop(image: np.ndarray, window: _Window) -> np.ndarray:
    x, y, width, height = window
    return image[y : y + height, x : x + width]


def _local_lab(image: np.ndarray, window: _Window) -> np.ndarray:
    return colours.rgb_to_lab(colours.sample_pixels(_crop(image, window), 64)).mean(axis=0)


def _mark_colour(
    image: np.ndarray, palette: np.ndarray, window: _Window, rng: np.random.Generator, *, lightness: int = 0
) -> tuple[np.ndarray, float]:
    """A colour of the picture's own palette at a drawn distance in Lab from what the mark will lie on.

    A palette colour farther away than drawn is mixed with the surroundings; the result stays between two colours of
    the picture, which is what lets a mark hide.

    Args:
        palette: Lab colours ``(n, 3)`` of the whole picture.
        lightness: 1 for lighter than the surroundings, -1 for darker, 0 for either.
    Returns:
        float32 RGB ``(3,)`` and the distance drawn.
    """
    local = _local_lab(image, window)
    target = float(np.exp(rng.uniform(*np.log(_TARGETS))))
    candidates = palette
    if lightness:
        candidates = candidates[lightness * (candidates[:, 0] - local[0]) > 0]
    distances = np.linalg.norm(candidates - local, axis=1)
    far = np.flatnonzero(distances >= target)
    if len(far):
        pick = int(far[_between(rng, 0, len(far) - 1)])
    elif len(distances) and distances.max() >= _TARGETS[0]:
        pick = int(distances.argmax())
    else:  # the picture has no such colour: a lighter or darker tone of the surroundings
        sign = lightness or (1 if local[0] < 50 else -1)
        if not 0 <= local[0] + sign * target <= 100:
            sign = -sign if max(local[0], 100 - local[0]) >= target and not lightness else sign
        return colours.lab_to_rgb(local + np.array([sign * target, 0, 0])).astype(np.float32), target
    mixed = local + (candidates[pick] - local) * min(1.0, target / distances[pick])
    return colours.lab_to_rgb(mixed).astype(np.float32), target


def _listed(colour: np.ndarray) -> list[int]:
    return [int(value) for value in colour]


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth value noise in [0, 1], float32 ``(h, w)``: a coarse random grid, enlarged (much faster than Perlin)."""
    grid = rng.random((max(2, round(height / cell) + 2), max(2, round(width / cell) + 2)), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _blob(rng: np.random.Generator, height: int, width: int, roughness: float) -> np.ndarray:
    """Irregular patch: float32 ``(h, w)``, positive inside, up to 1 in the middle, zero at its outline."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    size = max(height, width)
    rough = 0.7 * _noise(rng, height, width, size / 4) + 0.3 * _noise(rng, height, width, size / 12)
    return 1 - np.sqrt(x * x + y * y) - roughness * rough


def _soft(field_: np.ndarray, width: float, opacity: float = 1.0) -> np.ndarray:
    """uint8 alpha that rises from 0 at the outline to ``opacity`` at depth ``width``."""
    return (np.clip(field_ / width, 0, 1) * (255 * opacity)).astype(np.uint8)


# --------------------------------------------------------------------------------------- the report's drawn kinds


def _box(image: np.ndarray, rng: np.random.Generator) -> _Change:
    edits, details, paints, palette = [], [], [], colours.palette(image)
    for _ in range(_between(rng, 1, 3)):
        width, height = _length(rng, image, 0.03, 0.3), _length(rng, image, 0.03, 0.3)
        x, y = _place(rng, image, width, height)
        colour, target = _mark_colour(image, palette, (x, y, width, height), rng)
        alpha = np.full((height, width), _between(rng, 200, 255), np.uint8)
        thickness = 0
        if rng.random() < 0.4:
            thickness = min(_length(rng, image, 0.006, 0.03, 1), (min(width, height) - 1) // 2)
            alpha[thickness : height - thickness, thickness : width - thickness] = 0 if thickness else alpha[0, 0]
        edits.append(_Edit(x, y, alpha, colour))
        paints.append(_listed(colour))
        details.append({"x": x, "y": y, "width": width, "height": height, "thickness": thickness, "target": target})
    return _Change(edits, {"boxes": details}, paints)


def _line(image: np.ndarray, rng: np.random.Generator) -> _Change:
    edits, details, paints, palette = [], [], [], colours.palette(image)
    rows, columns = image.shape[:2]
    for _ in range(_between(rng, 1, 4)):
        length, angle = _length(rng, image, 0.15, 0.9), _uniform(rng, 0, np.pi)
        thickness = _length(rng, image, 0.004, 0.025, 1)
        middle = np.array([_uniform(rng, 0, columns), _uniform(rng, 0, rows)])
        half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
        ends = np.array([middle - half, middle + half])
        window = _around(ends, thickness, image)
        colour, target = _mark_colour(image, palette, window, rng)
        alpha = np.zeros(window[3::-1][:2], np.uint8)
        start, end = np.rint(ends - window[:2]).astype(int).tolist()
        cv2.line(alpha, start, end, _between(rng, 200, 255), thickness, cv2.LINE_AA)
        edits.append(_Edit(window[0], window[1], alpha, colour))
        paints.append(_listed(colour))
        details.append({"ends": np.rint(ends).astype(int).tolist(), "thickness": thickness, "target": target})
    return _Change(edits, {"lines": details}, paints)


_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX)


def _letter(image: np.ndarray, rng: np.random.Generator) -> _Change:
    text = "".join(chr(65 + int(code)) for code in rng.integers(0, 26, _between(rng, 1, 4)))
    font, height = _FONTS[_between(rng, 0, len(_FONTS) - 1)], _length(rng, image, 0.07, 0.3, 8)
    thickness = max(1, round(height * _uniform(rng, 0.06, 0.16)))
    (text_width, text_height), below = cv2.getTextSize(text, font, height / 22, thickness)
    margin = thickness + below + 4
    alpha = np.zeros((text_height + 2 * margin, text_width + 2 * margin), np.uint8)
    opacity = _between(rng, 200, 255)
    cv2.putText(alpha, text, (margin, margin + text_height), font, height / 22, opacity, thickness, cv2.LINE_AA)
    x, y, width, height = cv2.boundingRect(alpha)
    alpha = alpha[y : y + height, x : x + width]
    fit = min(1.0, (image.shape[1] - 2) / width, (image.shape[0] - 2) / height)
    if fit < 1:
        size = (max(1, int(width * fit)), max(1, int(height * fit)))
        alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA)
    height, width = alpha.shape
    x, y = _place(rng, image, width, height)
    colour, target = _mark_colour(image, colours.palette(image), (x, y, width, height), rng)
    details = {"text": text, "x": x, "y": y, "height": height, "thickness": thickness, "target": target}
    return _Change([_Edit(x, y, alpha, colour)], details, [_listed(colour)])


def _circle(image: np.ndarray, rng: np.random.Generator) -> _Change:
    edits, details, paints, palette = [], [], [], colours.palette(image)
    for _ in range(_between(rng, 1, 3)):
        radius = max(1, _length(rng, image, 0.015, 0.16, 2))
        thickness = -1 if rng.random() < 0.5 else min(_length(rng, image, 0.005, 0.025, 1), radius)
        reach = radius + max(thickness, 0) // 2 + 1
        side = min(2 * reach + 1, _unit(image))
        x, y = _place(rng, image, side, side)
        colour, target = _mark_colour(image, palette, (x, y, side, side), rng)
        alpha = np.zeros((side, side), np.uint8)
        cv2.circle(alpha, (side // 2, side // 2), radius, _between(rng, 200, 255), thickness, cv2.LINE_AA)
        edits.append(_Edit(x, y, alpha, colour))
        paints.append(_listed(colour))
        details.append({"x": x, "y": y, "radius": radius, "thickness": thickness, "target": target})
    return _Change(edits, {"circles": details}, paints)


def _dots(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A spray of small dots of one colour inside a window."""
    n, radius = _between(rng, 5, 30), _length(rng, image, 0.004, 0.016, 1)
    rows, columns = image.shape[:2]
    width = min(columns, _length(rng, image, 0.2, 0.8, 12))
    height = min(rows, _length(rng, image, 0.2, 0.8, 12))
    x, y = _place(rng, image, width, height)
    colour, target = _mark_colour(image, colours.palette(image), (x, y, width, height), rng)
    alpha, opacity = np.zeros((height, width), np.uint8), _between(rng, 200, 255)
    radii = np.maximum(1, np.rint(radius * rng.uniform(0.6, 1.5, n))).astype(int)
    room = np.array([width, height]) - 1 - 2 * radii[:, None]
    centres = radii[:, None] + (rng.random((n, 2)) * np.maximum(room, 0)).astype(int)  # whole dots
    for centre, dot in zip(centres.tolist(), radii.tolist()):
        cv2.circle(alpha, centre, dot, opacity, -1, cv2.LINE_AA)
    details = {"n": n, "radius": radius, "x": x, "y": y, "width": width, "height": height, "target": target}
    return _Change([_Edit(x, y, alpha, colour)], details, [_listed(colour)])


# --------------------------------------------------------------------------------------------------------- ageing


def _scratch(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """Thin, slightly bent, broken strokes, nearly parallel; mostly light, where the ground shows."""
    rows, columns = image.shape[:2]
    angle, length = _uniform(rng, 0, np.pi), _length(rng, image, 0.2, 0.7, 8)
    middle = np.array([_uniform(rng, 0.15, 0.85) * columns, _uniform(rng, 0.15, 0.85) * rows])
    thickness = max(1, round(_unit(image) / 350 * _uniform(rng, 0.8, 1.6)))
    n, t, strokes = _between(rng, 1, 4), np.linspace(-0.5, 0.5, 48), []
    for _ in range(n):
        turn = angle + rng.normal(0, 0.06)
        along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
        reach = length * _uniform(rng, 0.5, 1)
        bend = rng.normal(0, 0.06) * reach * (4 * t * t) + rng.normal(0, 0.0025 * _unit(image), len(t)).cumsum() * 0.15
        start = middle + across * rng.normal(0, 0.03) * _unit(image) + along * rng.normal(0, 0.1) * length
        strokes.append(start + t[:, None] * reach * along + bend[:, None] * across)
    window = _around(np.concatenate(strokes), thickness + 1, image)
    alpha = np.zeros((window[3], window[2]), np.uint8)
    for stroke in strokes:
        points = np.rint(stroke - window[:2]).astype(np.int32)
        pressed = rng.random(len(points)) < 0.88  # the tool skips
        for k in range(len(points) - 1):
            if pressed[k]:
                bold = thickness + (thickness > 1 and 12 < k < 36)
                cv2.line(alpha, points[k].tolist(), points[k + 1].tolist(), 235, int(bold), cv2.LINE_AA)
    wear = 0.45 + 0.55 * _noise(rng, *alpha.shape, cell=max(4, _unit(image) / 40))
    alpha = (alpha * wear).astype(np.uint8)
    lightness = 1 if rng.random() < 0.8 else -1
    colour, target = _mark_colour(image, colours.palette(image), window, rng, lightness=lightness)
    details = {"n": n, "length": length, "angle": round(float(np.degrees(angle)), 1), "thickness": thickness}
    return _Change([_Edit(window[0], window[1], alpha, colour)], details | {"target": target}, [_listed(colour)])


def _craquelure(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A net of fine dark cracks: borders of Voronoi cells, bent by noise, some of them missing."""
    rows, columns = image.shape[:2]
    width = min(columns, _length(rng, image, 0.25, 0.75, 14))
    height = min(rows, _length(rng, image, 0.25, 0.75, 14))
    x, y = _place(rng, image, width, height)
    cell = max(5.0, _unit(image) * _uniform(rng, 0.03, 0.07))
    stretch = _uniform(rng, 0.7, 1.4)  # panels crack along the grain
    steps = max(2, round(height / cell)), max(2, round(width / (cell * stretch)))
    grid = np.stack(np.meshgrid(np.arange(steps[0]), np.arange(steps[1]), indexing="ij"), axis=-1)
    seeds = ((grid + rng.uniform(0.1, 0.9, grid.shape)) / steps * [height, width]).astype(int).reshape(-1, 2)
    ground = np.ones((height, width), np.uint8)
    ground[seeds[:, 0], seeds[:, 1]] = 0
    labels = cv2.distanceTransformWithLabels(ground, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    bend = 0.7 * cell
    map_x = np.arange(width, dtype=np.float32)[None] + (_noise(rng, height, width, cell * 0.8) - 0.5) * bend
    map_y = np.arange(height, dtype=np.float32)[:, None] + (_noise(rng, height, width, cell * 0.8) - 0.5) * bend
    bent = cv2.remap(labels.astype(np.float32), map_x, map_y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    bent = bent.astype(np.int64)
    cracks = np.zeros((height, width), bool)
    lost = _uniform(rng, 0.1, 0.3)
    for here, there, line in (
        (bent[:, :-1], bent[:, 1:], cracks[:, :-1]),
        (bent[:-1], bent[1:], cracks[:-1]),
    ):
        pair = np.minimum(here, there) * 7919 + np.maximum(here, there) * 104729
        line |= (here != there) & ((pair % 1009) / 1009 >= lost)
    alpha = cracks.astype(np.uint8) * 255
    if _unit(image) > 400:
        alpha = cv2.dilate(alpha, np.ones((2, 2), np.uint8), iterations=round(_unit(image) / 500))
    alpha = cv2.max(alpha // 5 * 4, cv2.GaussianBlur(alpha, (3, 3), 0.6))
    fading = np.clip((_blob(rng, height, width, 0.35) + 0.25) / 0.3, 0, 1)
    alpha = (alpha * fading * _uniform(rng, 0.6, 0.95)).astype(np.uint8)
    colour, target = _mark_colour(image, colours.palette(image), (x, y, width, height), rng, lightness=-1)
    details = {"x": x, "y": y, "width": width, "height": height, "cell": round(cell, 1), "target": target}
    return _Change([_Edit(x, y, alpha, colour)], details, [_listed(colour)])


def _stain(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A dried drop: a thin glaze with a darker rim; on dark paint a pale bloom."""
    width, height = _length(rng, image, 0.12, 0.45, 12), _length(rng, image, 0.12, 0.45, 12)
    x, y = _place(rng, image, width, height)
    inside = _crop(image, (x, y, width, height)).astype(np.float32)
    is_dark = _local_lab(image, (x, y, width, height))[0] < 30
    strength = _uniform(rng, 0.3, 0.85)
    tone = np.array([205, 200, 190] if is_dark else [128, 96, 52], np.float32) + rng.normal(0, 10, 3).astype(np.float32)
    paint = inside + (tone - inside) * (0.45 if is_dark else 0) if is_dark else inside * tone / 255
    shape = _blob(rng, height, width, _uniform(rng, 0.35, 0.6))
    rim = np.exp(-(((shape - 0.05) / 0.045) ** 2))
    patches = 0.75 + 0.25 * _noise(rng, height, width, max(4, width / 6))
    alpha = np.clip(shape / 0.05, 0, 1) * strength * (0.62 * patches + 0.38 * rim)
    edit = _Edit(x, y, (alpha * 255).astype(np.uint8), np.clip(np.rint(paint), 0, 255).astype(np.uint8))
    details = {"x": x, "y": y, "width": width, "height": height, "strength": round(strength, 3), "bloom": bool(is_dark)}
    return _Change([edit], details)


def _fade(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A part bleached by light: less colour, lighter, with soft borders; a patch, or a rectangle as left by a mat."""
    width, height = _length(rng, image, 0.2, 0.6, 12), _length(rng, image, 0.2, 0.6, 12)
    x, y = _place(rng, image, width, height)
    inside = _crop(image, (x, y, width, height)).astype(np.float32)
    bleach, lighten = _uniform(rng, 0.5, 1.0), _uniform(rng, 0.15, 0.5)
    grey = (inside @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    paint = inside + (grey - inside) * bleach
    paint += (np.array([236, 229, 215], np.float32) - paint) * lighten
    is_rectangle = rng.random() < 0.4
    if is_rectangle:
        rows = np.minimum(np.arange(height), np.arange(height)[::-1])[:, None] / height
        columns = np.minimum(np.arange(width), np.arange(width)[::-1])[None] / width
        alpha = _soft(np.minimum(rows, columns) + 0.01, 0.06)
    else:
        alpha = _soft(_blob(rng, height, width, 0.3), 0.3)
    edit = _Edit(x, y, alpha, np.rint(paint).astype(np.uint8))
    shape = "rectangle" if is_rectangle else "patch"
    details = {"x": x, "y": y, "width": width, "height": height, "shape": shape}
    return _Change([edit], details | {"bleach": round(bleach, 3), "lighten": round(lighten, 3)})


def _tear(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A jagged rip, mostly from the border inwards: frayed pale lips and the dark (or bare) gap between them."""
    rows, columns = image.shape[:2]
    length, widest = _length(rng, image, 0.2, 0.55, 8), _length(rng, image, 0.012, 0.05, 2)
    from_border = rng.random() < 0.7
    if from_border:
        side, along = _between(rng, 0, 3), _uniform(rng, 0.1, 0.9)
        start, inwards = (
            (np.array([along * columns, -2.0]), np.pi / 2),
            (np.array([columns + 1.0, along * rows]), np.pi),
            (np.array([along * columns, rows + 1.0]), -np.pi / 2),
            (np.array([-2.0, along * rows]), 0.0),
        )[side]
    else:
        start, inwards = np.array([_uniform(rng, 0.2, 0.8) * columns, _uniform(rng, 0.2, 0.8) * rows]), 0.0
        inwards = _uniform(rng, -np.pi, np.pi)
    angle = inwards + rng.normal(0, 0.35)
    n = max(8, length // max(3, _unit(image) // 80))
    t = np.linspace(0, 1, n)
    headings = angle + np.clip(rng.normal(0, 0.22, n).cumsum() * 0.5, -0.7, 0.7) + rng.normal(0, 0.35, n)
    steps = length / n * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    spine = start + np.concatenate([np.zeros((1, 2)), steps.cumsum(axis=0)[:-1]])
    profile = (1 - t) ** 0.7 if from_border else np.sin(np.pi * t) ** 0.7
    across = np.array([-np.sin(angle), np.cos(angle)])

    def outline(extra: float) -> np.ndarray:
        left = (widest / 2 * profile + extra * (0.3 + profile)) * rng.uniform(0.55, 1.25, n)
        right = (widest / 2 * profile + extra * (0.3 + profile)) * rng.uniform(0.55, 1.25, n)
        return np.concatenate([spine + left[:, None] * across, (spine - right[:, None] * across)[::-1]])

    lips, gap = outline(max(1.0, widest * 0.35)), outline(0.0)
    window = _around(lips, 2, image)
    lip_alpha, gap_alpha = (np.zeros((window[3], window[2]), np.uint8) for _ in range(2))
    cv2.fillPoly(lip_alpha, [np.rint(lips - window[:2]).astype(np.int32)], 255, cv2.LINE_AA)
    cv2.fillPoly(gap_alpha, [np.rint(gap - window[:2]).astype(np.int32)], 255, cv2.LINE_AA)
    fibres = rng.random(lip_alpha.shape, dtype=np.float32) * 0.5 + 0.45
    lip_alpha = (lip_alpha * fibres).astype(np.uint8)
    local = _local_lab(image, window)
    pale = colours.lab_to_rgb([min(92.0, local[0] + _uniform(rng, 18, 45)), local[1] * 0.4, local[2] * 0.4 + 6])
    is_dark = local[0] < 25
    hole = [_uniform(rng, 60, 75), 3, 14] if is_dark else [local[0] * _uniform(rng, 0.1, 0.45), 1, 3]
    dark = colours.lab_to_rgb(np.array(hole))
    edits = [_Edit(window[0], window[1], lip_alpha, pale), _Edit(window[0], window[1], gap_alpha, dark)]
    details = {"length": length, "width": widest, "from_border": bool(from_border), "start": np.rint(start).tolist()}
    return _Change(edits, details, [_listed(dark), _listed(pale)])


# ------------------------------------------------------------------------------------------------------ tampering


def _elsewhere(image: np.ndarray, window: _Window, rng: np.random.Generator) -> tuple[int, int]:
    """Corner of another window of the same size: of four drawn, the one that differs most in colour."""
    here = _local_lab(image, window)
    places = [_place(rng, image, window[2], window[3]) for _ in range(4)]
    differences = [np.abs(_local_lab(image, (*place, window[2], window[3])) - here).sum() for place in places]
    return places[int(np.argmax(differences))]


def _cutpaste(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A rectangle cut out elsewhere, perhaps mirrored, slightly other in tone, hard edges (CutPaste, CVPR 2021)."""
    width, height = _length(rng, image, 0.08, 0.32, 6), _length(rng, image, 0.08, 0.32, 6)
    x, y = _place(rng, image, width, height)
    source = _elsewhere(image, (x, y, width, height), rng)
    patch = _crop(image, (*source, width, height))
    mirrored = rng.random() < 0.5
    patch = patch[:, ::-1] if mirrored else patch
    gain = rng.uniform(0.85, 1.15, 3).astype(np.float32)
    patch = np.clip(np.rint(patch * gain), 0, 255).astype(np.uint8)
    details = {"x": x, "y": y, "width": width, "height": height, "source": list(source), "mirrored": bool(mirrored)}
    return _Change([_Edit(x, y, np.full((height, width), 255, np.uint8), patch)], details)


# Pixels. OpenCV's Poisson solver takes 1 ms at 64 pixels a side and 37 ms at 256, and leaves the outermost three out,
# which would be all of a small shape.
_MIN_CLONE, _MAX_CLONE = 48, 96


def _poisson(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A part from elsewhere blended in without a seam (Perez et al., 2003; the idea of NSA, ECCV 2022)."""
    width, height = (_length(rng, image, 0.12, 0.35, 10) for _ in range(2))
    x, y = _place(rng, image, width, height)
    source = _elsewhere(image, (x, y, width, height), rng)
    target, patch = _crop(image, (x, y, width, height)), _crop(image, (*source, width, height))
    shape = _blob(rng, height, width, 0.25) > 0.05
    shape[[0, 1, -2, -1]], shape[:, [0, 1, -2, -1]] = False, False
    if shape.sum() < 9:
        shape[2:-2, 2:-2] = True
    blended = _cloned(np.ascontiguousarray(patch), np.ascontiguousarray(target), shape)
    details = {"x": x, "y": y, "width": width, "height": height, "source": list(source)}
    return _Change([_Edit(x, y, shape.astype(np.uint8) * 255, blended)], details)


def _cloned(patch: np.ndarray, target: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Gradients of ``patch`` inside ``shape``, border values of ``target``; solved at a size of 48 to 96 pixels.

    Seamless cloning adds a smooth correction to the patch, so the correction can be computed at another size.
    """
    height, width = shape.shape
    longer = max(height, width)
    scale = min(max(longer, _MIN_CLONE), _MAX_CLONE) / longer
    if scale != 1:
        size = (max(8, round(width * scale)), max(8, round(height * scale)))
        small = [cv2.resize(array, size, interpolation=cv2.INTER_AREA) for array in (patch, target)]
        small_shape = cv2.resize(shape.view(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
        small_shape[[0, -1]], small_shape[:, [0, -1]] = False, False
        correction = _cloned(*small, small_shape).astype(np.float32) - small[0]
        correction[~small_shape] = (small[1].astype(np.float32) - small[0])[~small_shape]
        enlarged = cv2.resize(correction, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.clip(np.rint(patch + enlarged), 0, 255).astype(np.uint8)
    # OpenCV centres the bounding box of the shape on a point; cutting both to that box keeps shape and place aligned.
    x, y, box_width, box_height = cv2.boundingRect(shape.view(np.uint8))
    left, top = max(0, x - 1), max(0, y - 1)
    right, bottom = min(width, x + box_width + 1), min(height, y + box_height + 1)
    window = (slice(top, bottom), slice(left, right))
    padded = cv2.copyMakeBorder(target[window], 2, 2, 2, 2, cv2.BORDER_REPLICATE)
    source = cv2.copyMakeBorder(patch[window], 2, 2, 2, 2, cv2.BORDER_REPLICATE)
    mask = cv2.copyMakeBorder(shape[window].astype(np.uint8) * 255, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=0)
    x, y, box_width, box_height = cv2.boundingRect(mask)
    centre = (x + box_width // 2, y + box_height // 2)
    result = target.copy()
    result[window] = cv2.seamlessClone(source, padded, mask, centre, cv2.NORMAL_CLONE)[2:-2, 2:-2]
    return result


def _filled(image: np.ndarray, window: _Window, shape: np.ndarray) -> np.ndarray:
    """The window with ``shape`` filled from its surroundings (Telea, 2004), with the grain of those surroundings.

    Above 72 pixels the filling is computed at reduced size: it is smooth, and Telea's cost grows with the area.
    """
    rows, columns = image.shape[:2]
    x, y, width, height = window
    left, top = max(0, x - 6), max(0, y - 6)
    right, bottom = min(columns, x + width + 6), min(rows, y + height + 6)
    known = np.ascontiguousarray(image[top:bottom, left:right])
    hole = np.zeros(known.shape[:2], np.uint8)
    hole[y - top : y - top + height, x - left : x - left + width] = shape
    scale = min(1.0, 72 / max(hole.shape))
    if scale < 1:
        size = (max(8, round(hole.shape[1] * scale)), max(8, round(hole.shape[0] * scale)))
        grown = cv2.dilate(hole, np.ones((3, 3), np.uint8), iterations=max(1, round(0.5 / scale)))
        small_hole = (cv2.resize(grown * 255, size, interpolation=cv2.INTER_AREA) > 0).astype(np.uint8)
        small = cv2.inpaint(cv2.resize(known, size, interpolation=cv2.INTER_AREA), small_hole, 4, cv2.INPAINT_TELEA)
        filled = cv2.resize(small, hole.shape[::-1], interpolation=cv2.INTER_CUBIC)
    else:
        filled = cv2.inpaint(known, hole, 4, cv2.INPAINT_TELEA)
    return filled[y - top : y - top + height, x - left : x - left + width]


def _with_grain(paint: np.ndarray, around: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise as strong as the finest texture around: a perfectly smooth patch would give itself away."""
    grey = cv2.cvtColor(np.ascontiguousarray(around), cv2.COLOR_RGB2GRAY).astype(np.float32)
    fine = float(np.median(np.abs(grey - cv2.blur(grey, (3, 3)))))
    grain = rng.standard_normal(paint.shape[:2], dtype=np.float32)[..., None] * min(fine, 6.0)
    return np.clip(np.rint(paint + grain), 0, 255).astype(np.uint8)


def _detailed_place(image: np.ndarray, width: int, height: int, rng: np.random.Generator) -> tuple[int, int]:
    """Of eight places, the one with most contrast: taking away what is flat leaves nothing to see."""
    places = [_place(rng, image, width, height) for _ in range(8)]
    contrast = [colours.sample_pixels(_crop(image, (*place, width, height)), 256).std(axis=0).sum() for place in places]
    return places[int(np.argmax(contrast))]


def _part(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 alpha of an irregular, softly cut part that fills its window."""
    alpha = _soft(_blob(rng, height, width, 0.25), 0.12)
    if not (alpha >= 255 * MIN_COVERAGE).any():
        alpha[height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
    return alpha


def _erased(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A part painted over with its surroundings."""
    width, height = _length(rng, image, 0.1, 0.3, 8), _length(rng, image, 0.1, 0.3, 8)
    x, y = _detailed_place(image, width, height, rng)
    alpha = _part(rng, height, width)
    window = (x, y, width, height)
    paint = _with_grain(_filled(image, window, alpha > 0), _crop(image, window), rng)
    return _Change([_Edit(x, y, alpha, paint)], {"x": x, "y": y, "width": width, "height": height})


def _moved(image: np.ndarray, rng: np.random.Generator) -> _Change:
    """A part shifted; what it leaves behind is filled in. The mask covers the old and the new place."""
    rows, columns = image.shape[:2]
    width, height = _length(rng, image, 0.1, 0.28, 6), _length(rng, image, 0.1, 0.28, 6)
    x, y = _detailed_place(image, width, height, rng)
    alpha, window = _part(rng, height, width), (x, y, width, height)
    hole = _with_grain(_filled(image, window, alpha > 0), _crop(image, window), rng)
    angle, reach = _uniform(rng, 0, 2 * np.pi), _uniform(rng, 0.4, 1.3)
    new_x = int(np.clip(round(x + reach * width * np.cos(angle)), 0, columns - width))
    new_y = int(np.clip(round(y + reach * height * np.sin(angle)), 0, rows - height))
    part = _crop(image, window).copy()
    edits = [_Edit(x, y, alpha, hole), _Edit(new_x, new_y, alpha, part)]
    details = {"x": x, "y": y, "width": width, "height": height, "to": [new_x, new_y]}
    return _Change(edits, details)


_MAKERS: dict[str, Callable[[np.ndarray, np.random.Generator], _Change]] = {
    "box": _box,
    "line": _line,
    "letter": _letter,
    "circle": _circle,
    "dots": _dots,
    "scratch": _scratch,
    "craquelure": _craquelure,
    "stain": _stain,
    "fade": _fade,
    "tear": _tear,
    "cutpaste": _cutpaste,
    "poisson": _poisson,
    "erased": _erased,
    "moved": _moved,
}
