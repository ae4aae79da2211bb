"""The kinds of local anomaly: what each paints where, for :func:`helpers.synthesis.synthesize`.

The five kinds of the source report (drawn marks), ageing (scratch, craquelure, stain, fade, tear) and tampering
(pasted, blended, erased, moved parts). A mark's colour comes from the picture's own palette, at a drawn distance from
its surroundings in Lab: a palette colour farther away is mixed with them, so that marks range from hidden to plain.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from helpers.synthesis import colours

Rng = np.random.Generator
Window = tuple[int, int, int, int]  # x, y, width, height

GREY = np.array([0.299, 0.587, 0.114], np.float32)
_TARGETS = (6.0, 60.0)  # distance in Lab between a mark and its surroundings, drawn log-uniformly


class Edit(NamedTuple):
    """Paint over a window: ``alpha`` uint8 ``(h, w)``; ``paint`` is one RGB colour ``(3,)`` or ``(h, w, 3)``."""

    window: Window
    alpha: np.ndarray
    paint: np.ndarray


def crop(image: np.ndarray, window: Window) -> np.ndarray:
    """The part of a picture or mask inside a window (a view)."""
    x, y, width, height = window
    return image[y : y + height, x : x + width]


def place(rng: Rng, image: np.ndarray, width: int, height: int) -> Window:
    """A window of this size somewhere in the picture."""
    rows, columns = image.shape[:2]
    x, y = rng.integers(0, max(1, columns - width + 1)), rng.integers(0, max(1, rows - height + 1))
    return int(x), int(y), width, height


def grown(window: Window, margin: int, image: np.ndarray) -> Window:
    """A window with a margin around it, cut at the picture's border."""
    x, y, width, height = window
    left, top = max(0, x - margin), max(0, y - margin)
    right, bottom = min(image.shape[1], x + width + margin), min(image.shape[0], y + height + margin)
    return left, top, right - left, bottom - top


def _length(rng: Rng, image: np.ndarray, low: float, high: float, at_least: int = 3) -> int:
    """A length in pixels, as a share of the shorter side, drawn log-uniformly (small marks are the common ones)."""
    share = np.exp(rng.uniform(np.log(low), np.log(high)))
    shorter = min(image.shape[:2])
    return int(min(max(at_least, round(share * shorter)), shorter - 2))


def _window(rng: Rng, image: np.ndarray, low: float, high: float, at_least: int = 3) -> Window:
    """A window inside the picture whose sides are drawn by :func:`_length`."""
    width, height = _length(rng, image, low, high, at_least), _length(rng, image, low, high, at_least)
    return place(rng, image, width, height)


def _local_lab(image: np.ndarray, window: Window) -> np.ndarray:
    return colours.rgb_to_lab(colours.sample_pixels(crop(image, window), 64)).mean(axis=0)


def _mark_colour(image: np.ndarray, window: Window, rng: Rng, *, lightness: int = 0) -> np.ndarray:
    """uint8 RGB; ``lightness`` is 1 for lighter than the surroundings, -1 for darker, 0 for either."""
    local, palette = _local_lab(image, window), colours.palette(image)
    target = float(np.exp(rng.uniform(*np.log(_TARGETS))))
    candidates = palette[lightness * (palette[:, 0] - local[0]) > 0] if lightness else palette
    distances = np.linalg.norm(candidates - local, axis=1)
    far = np.flatnonzero(distances >= target)
    if not len(far) and (not len(distances) or distances.max() < _TARGETS[0]):
        # The picture has no such colour: a lighter or darker tone of the surroundings.
        sign = lightness or (1 if local[0] < 50 else -1)
        return colours.lab_to_rgb(local + np.array([sign * target, 0, 0]))
    pick = int(rng.choice(far)) if len(far) else int(distances.argmax())
    return colours.lab_to_rgb(local + (candidates[pick] - local) * min(1.0, target / distances[pick]))


def _noise(rng: Rng, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth value noise in [0, 1], float32 ``(h, w)``: a coarse random grid, enlarged (much faster than Perlin)."""
    grid = rng.random((max(2, round(height / cell) + 2), max(2, round(width / cell) + 2)), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _blob(rng: Rng, height: int, width: int, roughness: float) -> np.ndarray:
    """Irregular patch: float32 ``(h, w)``, positive inside, up to 1 in the middle, zero at its outline."""
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    size = max(height, width)
    rough = 0.7 * _noise(rng, height, width, size / 4) + 0.3 * _noise(rng, height, width, size / 12)
    return 1 - np.sqrt(x * x + y * y) - roughness * rough


def _soft(depth: np.ndarray, width: float) -> np.ndarray:
    """uint8 alpha that rises from 0 at the outline to 255 at depth ``width``."""
    return (np.clip(depth / width, 0, 1) * 255).astype(np.uint8)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey levels, rounded and limited: uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _box(alpha: np.ndarray, opacity: int, rng: Rng) -> None:
    x, y, width, height = _window(rng, alpha, 0.03, 0.3)
    thickness = -1
    if rng.random() < 0.4:
        thickness = max(1, min(_length(rng, alpha, 0.006, 0.03, 1), (min(width, height) - 1) // 2))
    cv2.rectangle(alpha, (x, y), (x + width - 1, y + height - 1), opacity, thickness)


def _line(alpha: np.ndarray, opacity: int, rng: Rng) -> None:
    length, angle = _length(rng, alpha, 0.15, 0.9), rng.uniform(0, np.pi)
    middle = rng.random(2) * alpha.shape[::-1]
    half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
    ends = np.rint([middle - half, middle + half]).astype(int).tolist()
    cv2.line(alpha, ends[0], ends[1], opacity, _length(rng, alpha, 0.004, 0.025, 1), cv2.LINE_AA)


def _letter(alpha: np.ndarray, opacity: int, rng: Rng) -> None:
    """A word of one to four capitals in the font inside Pillow, which is the same on every machine."""
    text = "".join(chr(65 + int(code)) for code in rng.integers(0, 26, rng.integers(1, 5)))
    size, boldness = _length(rng, alpha, 0.1, 0.42, 10), rng.uniform(0, 0.05)
    while True:  # smaller until the word fits
        font, stroke = ImageFont.load_default(size), round(boldness * size)
        left, top, right, bottom = (int(side) for side in font.getbbox(text, stroke_width=stroke))
        if size <= 6 or (right - left <= alpha.shape[1] and bottom - top <= alpha.shape[0]):
            break
        size = int(size * 0.8)
    x, y, *_ = place(rng, alpha, right - left, bottom - top)
    canvas = Image.fromarray(alpha)
    ImageDraw.Draw(canvas).text((x - left, y - top), text, fill=opacity, font=font, stroke_width=stroke)
    alpha[:] = np.asarray(canvas)


def _circle(alpha: np.ndarray, opacity: int, rng: Rng) -> None:
    radius = max(1, _length(rng, alpha, 0.015, 0.16, 2))
    thickness = -1 if rng.random() < 0.5 else min(_length(rng, alpha, 0.005, 0.025, 1), radius)
    side = 2 * (radius + max(thickness, 0) // 2 + 1) + 1
    x, y, *_ = place(rng, alpha, side, side)
    cv2.circle(alpha, (x + side // 2, y + side // 2), radius, opacity, thickness, cv2.LINE_AA)


def _dots(alpha: np.ndarray, opacity: int, rng: Rng) -> None:
    """A spray of small dots of one colour inside a window."""
    n, radius = int(rng.integers(5, 31)), _length(rng, alpha, 0.004, 0.016, 1)
    x, y, width, height = _window(rng, alpha, 0.2, 0.8, 12)
    radii = np.maximum(1, np.rint(radius * rng.uniform(0.6, 1.5, n))).astype(int)
    room = np.maximum(np.array([width, height]) - 1 - 2 * radii[:, None], 0)
    centres = np.array([x, y]) + radii[:, None] + (rng.random((n, 2)) * room).astype(int)  # whole dots
    for centre, dot in zip(centres.tolist(), radii.tolist()):
        cv2.circle(alpha, centre, dot, opacity, -1, cv2.LINE_AA)


def _scratch(image: np.ndarray, rng: Rng) -> list[Edit]:
    """Thin, slightly bent, broken strokes, nearly parallel; mostly light, where the ground shows."""
    angle, length = rng.uniform(0, np.pi), _length(rng, image, 0.2, 0.7, 8)
    middle = rng.uniform(0.15, 0.85, 2) * image.shape[1::-1]
    thickness = max(1, round(min(image.shape[:2]) / 350 * rng.uniform(0.8, 1.6)))
    alpha, t = np.zeros(image.shape[:2], np.uint8), np.linspace(-0.5, 0.5, 48)
    for _ in range(rng.integers(1, 5)):
        turn = angle + rng.normal(0, 0.06)
        along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
        reach = length * rng.uniform(0.5, 1)
        bend = rng.normal(0, 0.06) * reach * 4 * t * t + rng.normal(0, 0.0004 * min(image.shape[:2]), len(t)).cumsum()
        start = middle + across * rng.normal(0, 0.03) * min(image.shape[:2]) + along * rng.normal(0, 0.1) * length
        points = np.rint(start + t[:, None] * reach * along + bend[:, None] * across).astype(int).tolist()
        for k in np.flatnonzero(rng.random(len(points) - 1) < 0.88):  # the tool skips
            bold = thickness + int(thickness > 1 and 12 < k < 36)
            cv2.line(alpha, points[k], points[k + 1], 235, bold, cv2.LINE_AA)
    window = cv2.boundingRect(alpha)
    wear = 0.45 + 0.55 * _noise(rng, window[3], window[2], max(4, min(image.shape[:2]) / 40))
    paint = _mark_colour(image, window, rng, lightness=1 if rng.random() < 0.8 else -1)
    return [Edit(window, (crop(alpha, window) * wear).astype(np.uint8), paint)]


def _craquelure(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A net of fine dark cracks: borders of Voronoi cells, bent by noise, some of them missing."""
    window = _window(rng, image, 0.25, 0.75, 14)
    width, height = window[2:]
    cell = max(5.0, min(image.shape[:2]) * rng.uniform(0.03, 0.07))
    steps = max(2, round(height / cell)), max(2, round(width / (cell * rng.uniform(0.7, 1.4))))  # along the grain
    grid = np.moveaxis(np.indices(steps), 0, -1)
    seeds = ((grid + rng.uniform(0.1, 0.9, grid.shape)) / steps * [height, width]).astype(int).reshape(-1, 2)
    ground = np.ones((height, width), np.uint8)
    ground[seeds[:, 0], seeds[:, 1]] = 0
    labels = cv2.distanceTransformWithLabels(ground, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    rows, columns = np.indices((height, width), dtype=np.float32)
    map_x, map_y = (axis + (_noise(rng, height, width, cell * 0.8) - 0.5) * 0.7 * cell for axis in (columns, rows))
    bent = cv2.remap(labels.astype(np.float32), map_x, map_y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    cracks = cv2.morphologyEx(bent, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    cracks &= _noise(rng, height, width, cell) > rng.uniform(0.2, 0.35)
    alpha = cracks.astype(np.uint8) * 255
    if min(image.shape[:2]) > 400:
        alpha = cv2.dilate(alpha, np.ones((2, 2), np.uint8), iterations=round(min(image.shape[:2]) / 500))
    alpha = cv2.max(alpha // 5 * 4, cv2.GaussianBlur(alpha, (3, 3), 0.6))
    fading = np.clip((_blob(rng, height, width, 0.35) + 0.25) / 0.3, 0, 1) * rng.uniform(0.6, 0.95)
    return [Edit(window, (alpha * fading).astype(np.uint8), _mark_colour(image, window, rng, lightness=-1))]


def _stain(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A dried drop: a thin glaze with a darker rim; on dark paint a pale bloom."""
    window = _window(rng, image, 0.12, 0.45, 12)
    width, height = window[2:]
    inside = crop(image, window).astype(np.float32)
    if _local_lab(image, window)[0] < 30:
        paint = inside + (np.array([205, 200, 190]) + rng.normal(0, 10, 3) - inside) * 0.45
    else:
        paint = inside * (np.array([128, 96, 52]) + rng.normal(0, 10, 3)) / 255
    shape = _blob(rng, height, width, rng.uniform(0.35, 0.6))
    rim = np.exp(-(((shape - 0.05) / 0.045) ** 2))
    patches = 0.75 + 0.25 * _noise(rng, height, width, max(4, width / 6))
    alpha = np.clip(shape / 0.05, 0, 1) * rng.uniform(0.3, 0.85) * (0.62 * patches + 0.38 * rim)
    return [Edit(window, (alpha * 255).astype(np.uint8), to_bytes(paint))]


def _fade(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A part bleached by light: less colour, lighter, with soft borders; a patch, or a rectangle as left by a mat."""
    window = _window(rng, image, 0.2, 0.6, 12)
    width, height = window[2:]
    inside = crop(image, window).astype(np.float32)
    paint = inside + ((inside @ GREY)[..., None] - inside) * rng.uniform(0.5, 1.0)
    paint += (np.array([236, 229, 215]) - paint) * rng.uniform(0.15, 0.5)
    if rng.random() < 0.4:
        rows, columns = np.arange(height)[:, None], np.arange(width)[None]
        to_border = np.minimum(np.minimum(rows, rows[::-1]) / height, np.minimum(columns, columns[:, ::-1]) / width)
        alpha = _soft(to_border + 0.01, 0.06)
    else:
        alpha = _soft(_blob(rng, height, width, 0.3), 0.3)
    return [Edit(window, alpha, to_bytes(paint))]


def _tear(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A jagged rip, mostly from the border inwards: frayed pale lips and the dark (or bare) gap between them."""
    rows, columns = image.shape[:2]
    length, widest = _length(rng, image, 0.2, 0.55, 8), _length(rng, image, 0.012, 0.05, 2)
    from_border = rng.random() < 0.7
    side, share = int(rng.integers(0, 4)), rng.uniform(0.1, 0.9, 2)
    start, angle = share * [columns, rows], rng.uniform(-np.pi, np.pi)
    if from_border:  # 0 to 3: from the left, the top, the right, the bottom
        start[side % 2] = -2 if side < 2 else image.shape[1 - side % 2] + 1
        angle = side * np.pi / 2 + rng.normal(0, 0.35)
    n = max(8, length // max(3, min(image.shape[:2]) // 80))
    headings = angle + np.clip(rng.normal(0, 0.22, n).cumsum() * 0.5, -0.7, 0.7) + rng.normal(0, 0.35, n)
    spine = start + (length / n * np.stack([np.cos(headings), np.sin(headings)], axis=1)).cumsum(axis=0)
    t = np.linspace(0, 1, n)
    profile = (1 - t) ** 0.7 if from_border else np.sin(np.pi * t) ** 0.7
    across = np.array([-np.sin(angle), np.cos(angle)])

    def ripped(extra: float) -> np.ndarray:
        reach = (widest / 2 * profile + extra * (0.3 + profile))[:, None] * rng.uniform(0.55, 1.25, (n, 2))
        outline = np.concatenate([spine + reach[:, :1] * across, (spine - reach[:, 1:] * across)[::-1]])
        alpha = np.zeros((rows, columns), np.uint8)
        return cv2.fillPoly(alpha, [np.rint(outline).astype(np.int32)], 255, cv2.LINE_AA)

    lips, gap = ripped(max(1.0, widest * 0.35)), ripped(0.0)
    window = cv2.boundingRect(cv2.max(lips, gap))
    fibres = rng.random((window[3], window[2]), dtype=np.float32) * 0.5 + 0.45
    light, a, b = _local_lab(image, window)
    pale = colours.lab_to_rgb([min(92.0, light + rng.uniform(18, 45)), a * 0.4, b * 0.4 + 6])
    hole = [rng.uniform(60, 75), 3, 14] if light < 25 else [light * rng.uniform(0.1, 0.45), 1, 3]
    return [
        Edit(window, (crop(lips, window) * fibres).astype(np.uint8), pale),
        Edit(window, crop(gap, window), colours.lab_to_rgb(hole)),
    ]


def _elsewhere(image: np.ndarray, window: Window, rng: Rng) -> np.ndarray:
    """A part of the same size: of four places drawn, the one that differs most in colour."""
    windows = [place(rng, image, *window[2:]) for _ in range(4)]
    here = _local_lab(image, window)
    return crop(image, max(windows, key=lambda other: float(np.abs(_local_lab(image, other) - here).sum())))


def _cutpaste(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A rectangle cut out elsewhere, perhaps mirrored, slightly other in tone, hard edges (CutPaste, CVPR 2021)."""
    window = _window(rng, image, 0.08, 0.32, 6)
    patch = _elsewhere(image, window, rng)
    patch = patch[:, ::-1] if rng.random() < 0.5 else patch
    return [Edit(window, np.full(patch.shape[:2], 255, np.uint8), to_bytes(patch * rng.uniform(0.85, 1.15, 3)))]


def _poisson(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A part from elsewhere blended in without a seam (Perez et al., 2003; the idea of NSA, ECCV 2022)."""
    window = _window(rng, image, 0.12, 0.35, 10)
    shape = _blob(rng, window[3], window[2], 0.25) > 0.05
    if shape.sum() < 9:
        shape[2:-2, 2:-2] = True
    # OpenCV leaves the outermost three pixels of a shape out, which would be all of a small one.
    enlarged = [round(side * max(1.0, 48 / min(window[2:]))) for side in window[2:]]
    parts = (_elsewhere(image, window, rng), crop(image, window), shape * np.uint8(255))
    patch, target, solid = (
        cv2.copyMakeBorder(cv2.resize(part, enlarged, interpolation=cv2.INTER_LINEAR), 6, 6, 6, 6, border)
        for part, border in zip(parts, (cv2.BORDER_REFLECT_101, cv2.BORDER_REFLECT_101, cv2.BORDER_CONSTANT))
    )
    solid[solid > 0] = 255
    x, y, width, height = cv2.boundingRect(solid)  # its centre is the point that OpenCV puts the patch at
    blended = cv2.seamlessClone(patch, target, solid, (x + width // 2, y + height // 2), cv2.NORMAL_CLONE)
    blended = cv2.resize(blended[6:-6, 6:-6], window[2:], interpolation=cv2.INTER_AREA)
    return [Edit(window, shape.astype(np.uint8) * 255, blended)]


def _part(image: np.ndarray, rng: Rng, high: float, at_least: int) -> tuple[Window, np.ndarray]:
    """An irregular part and its uint8 alpha: of eight places the one with most contrast, as flat ones hide nothing."""
    width, height = _window(rng, image, 0.1, high, at_least)[2:]
    windows = [place(rng, image, width, height) for _ in range(8)]
    window = max(windows, key=lambda other: float(crop(image, other).std(axis=(0, 1)).sum()))
    alpha = _soft(_blob(rng, height, width, 0.25), 0.12)
    if not (alpha >= 26).any():
        alpha[height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
    return window, alpha


def _filled(image: np.ndarray, window: Window, hole: np.ndarray, rng: Rng) -> np.ndarray:
    """The window with ``hole`` filled from around (Telea, 2004), with grain; large ones reduced, as it is smooth."""
    x, y, width, height = window
    whole = grown(window, 6, image)
    known, mask = crop(image, whole), np.zeros(whole[3:1:-1], np.uint8)
    inner = (x - whole[0], y - whole[1], width, height)
    crop(mask, inner)[:] = hole
    scale = min(1.0, 72 / max(mask.shape))
    size = [max(8, round(side * scale)) for side in whole[2:]]
    small_mask = (cv2.resize(mask * 255, size, interpolation=cv2.INTER_AREA) > 0).astype(np.uint8)
    small = cv2.inpaint(cv2.resize(known, size, interpolation=cv2.INTER_AREA), small_mask, 4, cv2.INPAINT_TELEA)
    filled = crop(cv2.resize(small, whole[2:], interpolation=cv2.INTER_CUBIC), inner)
    grey = cv2.cvtColor(np.ascontiguousarray(crop(image, window)), cv2.COLOR_RGB2GRAY).astype(np.float32)
    fine = min(float(np.median(np.abs(grey - cv2.blur(grey, (3, 3))))), 6.0)
    return to_bytes(filled + fine * rng.standard_normal(filled.shape[:2], dtype=np.float32)[..., None])


def _erased(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A part painted over with its surroundings."""
    window, alpha = _part(image, rng, 0.3, 8)
    return [Edit(window, alpha, _filled(image, window, alpha > 0, rng))]


def _moved(image: np.ndarray, rng: Rng) -> list[Edit]:
    """A part shifted; what it leaves behind is filled in. The mask covers the old and the new place."""
    window, alpha = _part(image, rng, 0.28, 6)
    x, y, width, height = window
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.3)
    new_x = int(np.clip(round(x + reach * width * np.cos(angle)), 0, image.shape[1] - width))
    new_y = int(np.clip(round(y + reach * height * np.sin(angle)), 0, image.shape[0] - height))
    hole = Edit(window, alpha, _filled(image, window, alpha > 0, rng))
    return [hole, Edit((new_x, new_y, width, height), alpha, crop(image, window).copy())]


_DRAWN = {"box": (_box, 3), "line": (_line, 4), "letter": (_letter, 1), "circle": (_circle, 3), "dots": (_dots, 1)}
_PAINTED = (_scratch, _craquelure, _stain, _fade, _tear, _cutpaste, _poisson, _erased, _moved)
_MAKERS = {make.__name__[1:]: make for make in _PAINTED}
REPORT_KINDS = tuple(_DRAWN)
"""Marks that the source report drew with OpenCV."""
LOCAL_KINDS = (*_DRAWN, *_MAKERS)
"""Every kind of local damage; all have a mask."""


def edits_of(kind: str, image: np.ndarray, rng: Rng) -> list[Edit]:
    """What a kind paints; of a drawn one (``draw, most``) there are one to ``most`` marks, each of its own colour."""
    if kind in _MAKERS:
        return _MAKERS[kind](image, rng)
    edits, (draw, most) = [], _DRAWN[kind]
    for _ in range(rng.integers(1, most + 1)):
        alpha = np.zeros(image.shape[:2], np.uint8)
        draw(alpha, int(rng.integers(200, 256)), rng)
        window = cv2.boundingRect(alpha)
        edits.append(Edit(window, crop(alpha, window), _mark_colour(image, window, rng)))
    return edits
