"""Paintings from photographs, and photographs of paintings: the embedded artworks of :mod:`helpers.data.sources`.

A picture is painted in layers of brush strokes from broad to fine, which follow the forms and pile up paint, on woven
canvas under yellowed varnish. :func:`photograph` then takes a picture of it as a visitor, a scanner or a museum would.
All randomness comes from the ``rng`` arguments.
Source of the layers: Hertzmann, "Painterly rendering with curved brush strokes of multiple sizes", SIGGRAPH 1998.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

CANVAS_SIDE = 512
"""Longer side in pixels of a painted canvas; photographs of it are smaller."""


@dataclass(frozen=True)
class Hand:
    """How a painter works.

    Attributes:
        brush: size of all brushes, 1 = the original's.
        hue, saturation, lightness: the palette: turn in degrees, factor, factor.
        colour_jitter: spread of a stroke's colour around the motif's, in grey levels.
        drift: how far forms stray from the motif, as a share of the longer side.
        detail: share of the finest strokes that are set, in [0, 1].
        glaze: weight of the last thin layer, which brings back fine forms, in [0, 1].
        varnish: colour of the varnish (RGB factors).
    """

    brush: float = 1.0
    hue: float = 0.0
    saturation: float = 1.08
    lightness: float = 1.0
    colour_jitter: float = 7.0
    drift: float = 0.0
    detail: float = 1.0
    glaze: float = 0.3
    varnish: tuple[float, float, float] = (1.0, 0.965, 0.87)


def paint(motif: np.ndarray, *, rng: np.random.Generator, hand: Hand) -> np.ndarray:
    """Paint a motif on canvas.

    Args:
        motif: uint8 RGB ``(H, W, 3)``, the photograph to paint from.
        rng: source of every stroke.
        hand: who paints.
    Returns:
        uint8 RGB, longer side :data:`CANVAS_SIDE`.
    """
    scale = CANVAS_SIDE / max(motif.shape[:2])
    height, width = round(motif.shape[0] * scale), round(motif.shape[1] * scale)
    motif = cv2.resize(motif, (width, height), interpolation=cv2.INTER_CUBIC)
    motif = _palette(_strayed(motif, rng, hand.drift), hand)
    ground = np.array([168, 142, 112], np.float32)  # a warm underpainting shows through between strokes
    canvas = np.clip(ground + rng.normal(0, 6, (height, width, 1)), 0, 255).astype(np.uint8)
    relief = np.full((height, width), 128, np.uint8)
    for radius, tolerance, share in ((15, 0, 1.0), (8, 16, 1.0), (4, 18, 1.0), (2, 20, hand.detail)):
        _layer(canvas, relief, motif, radius * hand.brush, tolerance, share, rng, hand.colour_jitter)
    canvas = cv2.addWeighted(canvas, 1 - hand.glaze, cv2.GaussianBlur(motif, (0, 0), 0.8), hand.glaze, 0)
    return _finish(canvas, relief, rng, hand)


def photograph(painting: np.ndarray, *, max_side: int, rng: np.random.Generator) -> np.ndarray:
    """One reproduction of a painting: its own crop, stand, light, camera and compression.

    Args:
        painting: uint8 RGB ``(H, W, 3)``.
        max_side: largest longer side in pixels of the result (the session's own may be up to 15 % smaller).
        rng: source of the session.
    Returns:
        uint8 RGB.
    """
    height, width = painting.shape[:2]
    scale = max_side * rng.uniform(0.85, 1.0) / max(height, width)
    size = round(width * scale), round(height * scale)
    corners = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
    crop = rng.uniform(0.0, 0.045, 4) * (1, 1, -1, -1)  # left, top, right, bottom: frame cut away
    cropped = corners + np.float32([[crop[0], crop[1]], [crop[2], crop[1]], [crop[2], crop[3]], [crop[0], crop[3]]]) * (
        width,
        height,
    )
    stand = cropped + rng.normal(0, 0.006, (4, 2)) * (width, height)
    target = np.float32([[0, 0], [size[0], 0], [size[0], size[1]], [0, size[1]]])
    blurred = cv2.GaussianBlur(painting, (0, 0), max(0.35 / scale, 0.3))  # what the smaller sensor cannot resolve
    matrix = cv2.getPerspectiveTransform(stand.astype(np.float32), target)
    image = cv2.warpPerspective(blurred, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    image = _light(image.astype(np.float32) / 255, rng)
    sharpness = rng.uniform(0.0, 0.75)
    if sharpness > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), sharpness)
    image += np.float32(rng.uniform(0.002, 0.014)) * rng.standard_normal(image.shape, np.float32)
    image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return _jpeg(image, quality=int(rng.integers(62, 96)))


# --- other works after the same motif --------------------------------------------------------------------------------


def mosaic(image: np.ndarray, rng: np.random.Generator, n_tiles: int = 1500) -> np.ndarray:
    """The picture laid in irregular tiles with dark joints."""
    height, width = image.shape[:2]
    step = (height * width / n_tiles) ** 0.5
    ys, xs = np.mgrid[step / 2 : height : step, step / 2 : width : step].reshape(2, -1)
    points = np.stack([xs, ys], axis=1) + rng.uniform(-0.35, 0.35, (len(xs), 2)) * step
    points = np.clip(np.rint(points), 0, [width - 1, height - 1]).astype(int)
    seeds = np.ones((height, width), np.uint8)
    seeds[points[:, 1], points[:, 0]] = 0
    distance, cells = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    flat = cells.ravel()
    n_pixels = np.maximum(np.bincount(flat), 1)
    means = np.stack([np.bincount(flat, image[..., c].ravel()) / n_pixels for c in range(3)], axis=1)
    means += rng.normal(0, 9, (len(means), 1))
    joints = cv2.morphologyEx(cells.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    tiles = means[cells] * (1.1 - 0.25 * distance[..., None] / distance.max())
    tiles[joints] = (52, 46, 42)
    return np.clip(tiles, 0, 255).astype(np.uint8)


def poster(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A screen print: few flat colours in another order, black contours."""
    smooth = cv2.bilateralFilter(image, 9, 60, 9)
    grey = cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY)
    inks = np.array([[28, 24, 66], [196, 34, 84], [246, 148, 44], [250, 222, 92], [252, 246, 226]], np.uint8)
    inks = np.roll(inks[:, rng.permutation(3)], int(rng.integers(0, 2)), axis=0)
    levels = np.digitize(grey, np.quantile(grey, [0.2, 0.42, 0.64, 0.84]))
    edges = cv2.dilate(cv2.Canny(cv2.GaussianBlur(grey, (0, 0), 2), 30, 80), np.ones((3, 3), np.uint8)) > 0
    print_ = inks[cv2.medianBlur(levels.astype(np.uint8), 5)]
    print_[edges] = (20, 18, 22)
    return print_


def recoloured(image: np.ndarray, degrees: float) -> np.ndarray:
    """All hues turned, lights and darks kept."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(degrees / 2)) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def with_part(
    motif: np.ndarray, part: np.ndarray, center: tuple[float, float], semi_axes: tuple[float, float]
) -> np.ndarray:
    """The motif with an ellipse replaced by another picture, soft at the edge, brought to the light of the place.

    Args:
        motif, part: uint8 RGB; ``part`` is stretched over the ellipse's box.
        center: (x, y) as shares of width and height.
        semi_axes: (x, y) as shares of width and height.
    """
    height, width = motif.shape[:2]
    x, y = center[0] * width, center[1] * height
    a, b = semi_axes[0] * width, semi_axes[1] * height
    left, top, right, bottom = (round(v) for v in (x - a, y - b, x + a, y + b))
    pasted = motif.copy()
    inside = np.s_[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    patch = cv2.resize(part, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    patch = patch[max(-top, 0) :, max(-left, 0) :][: pasted[inside].shape[0], : pasted[inside].shape[1]]
    old, new = motif[inside].astype(np.float32), patch.astype(np.float32)
    gain = 0.5 + 0.5 * (old.std() + 1) / (new.std() + 1)
    pasted[inside] = np.clip((new - new.mean()) * gain + 0.5 * (new.mean() + old.mean()), 0, 255).astype(np.uint8)
    weight = np.zeros((height, width), np.float32)
    cv2.ellipse(weight, (round(x), round(y)), (round(a * 0.9), round(b * 0.9)), 0, 0, 360, 1.0, -1)
    weight = cv2.GaussianBlur(weight, (0, 0), max(a, b) * 0.07)[..., None]
    return np.rint(pasted * weight + motif * (1 - weight)).astype(np.uint8)


# --- strokes ---------------------------------------------------------------------------------------------------------


def _layer(
    canvas: np.ndarray,
    relief: np.ndarray,
    motif: np.ndarray,
    radius: float,
    tolerance: float,
    share: float,
    rng: np.random.Generator,
    colour_jitter: float,
) -> None:
    """Set one brush size: strokes along the forms wherever the canvas is still off by more than ``tolerance``."""
    height, width = motif.shape[:2]
    seen = cv2.GaussianBlur(motif, (0, 0), max(radius * 0.45, 0.6))
    step = max(radius * 0.95, 1.8)
    ys, xs = np.mgrid[step / 2 : height : step, step / 2 : width : step].reshape(2, -1)
    xs, ys = xs + rng.uniform(-0.5, 0.5, len(xs)) * step, ys + rng.uniform(-0.5, 0.5, len(ys)) * step
    xs, ys = np.clip(xs, 0, width - 1), np.clip(ys, 0, height - 1)
    error = cv2.blur(cv2.absdiff(seen, canvas).astype(np.float32).sum(axis=2), (max(3, int(radius)),) * 2)
    wanted = (error[ys.astype(int), xs.astype(int)] > 3 * tolerance * 0.55) & (rng.random(len(xs)) < share)
    order = rng.permutation(np.flatnonzero(wanted))
    xs, ys = xs[order], ys[order]
    colours = seen[ys.astype(int), xs.astype(int)].astype(np.float32)
    colours += rng.normal(0, colour_jitter, (len(xs), 1)) + rng.normal(0, colour_jitter * 0.45, (len(xs), 3))
    colours = np.clip(colours, 0, 255)
    paths = _traced(motif, xs, ys, radius, rng)
    if radius < 3:
        paths = paths[:, ::2]  # a short stroke needs no more bends
    thickness = max(1, round(radius * 1.45))
    heights = rng.integers(70, 190, len(xs))
    bodies = zip(_fixed(paths[:, None]), colours.tolist(), heights.tolist())
    for stroke, colour, thick in bodies:
        cv2.polylines(canvas, stroke, False, colour, thickness, cv2.LINE_8, shift=_SHIFT)
        cv2.polylines(relief, stroke, False, thick, thickness, cv2.LINE_8, shift=_SHIFT)
    # Bristles leave grooves along the stroke; drawn after the bodies, so that fine strokes stay smooth.
    bristles = np.linspace(-0.4, 0.4, min(4, int(radius / 1.9))) * radius if radius >= 3 else np.empty(0)
    along = paths[:, -1] - paths[:, 0]
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-6)
    depths = np.clip(heights[:, None] + rng.normal(0, 26, (len(xs), len(bristles))), 0, 255)
    for bristle, depth in zip(bristles, depths.T.tolist()):
        for stroke, value in zip(_fixed((paths + bristle * across[:, None])[:, None]), depth):
            cv2.polylines(relief, stroke, False, value, 1, cv2.LINE_8, shift=_SHIFT)


_SHIFT = 3
"""Fractional bits of the coordinates handed to OpenCV."""


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.rint(points * (1 << _SHIFT)).astype(np.int32)


def _traced(motif: np.ndarray, xs: np.ndarray, ys: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Stroke paths, float ``(N, 5, 2)``: five steps along the forms from each starting point."""
    grey = cv2.GaussianBlur(cv2.cvtColor(motif, cv2.COLOR_RGB2GRAY), (0, 0), 1.2).astype(np.float32)
    gx, gy = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    spread = 2.0 + 1.5 * radius
    xx, yy, xy = (cv2.GaussianBlur(product, (0, 0), spread) for product in (gx * gx, gy * gy, gx * gy))
    angle = 0.5 * np.arctan2(2 * xy, xx - yy) + np.pi / 2  # across the mean gradient
    height, width = grey.shape
    turn = rng.normal(0, 0.16, len(xs))
    reach = radius * rng.uniform(0.9, 1.9, len(xs))
    points = np.empty((len(xs), 5, 2))
    x, y = xs.astype(float), ys.astype(float)
    heading: np.ndarray | None = None
    for step in range(5):
        points[:, step] = np.stack([x, y], axis=1)
        inside = np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)
        along = angle[inside] + turn
        direction = np.stack([np.cos(along), np.sin(along)], axis=1)
        if heading is not None:  # the field has no sign: keep going forward
            direction *= np.where((direction * heading).sum(axis=1, keepdims=True) < 0, -1, 1)
        heading = direction
        x, y = x + direction[:, 0] * reach, y + direction[:, 1] * reach
    return points


def _strayed(motif: np.ndarray, rng: np.random.Generator, drift: float) -> np.ndarray:
    """Forms shifted smoothly by up to about ``drift`` of the longer side: what a copyist's eye gets wrong."""
    if drift == 0:
        return motif
    height, width = motif.shape[:2]
    coarse = rng.normal(0, 0.6 * drift * max(height, width), (5, 5, 2)).astype(np.float32)
    shift = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    return cv2.remap(motif, xs + shift[..., 0], ys + shift[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _palette(motif: np.ndarray, hand: Hand) -> np.ndarray:
    lab = cv2.cvtColor(motif.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
    turn = np.deg2rad(hand.hue)
    a, b = lab[..., 1].copy(), lab[..., 2].copy()
    lab[..., 1] = (a * np.cos(turn) - b * np.sin(turn)) * hand.saturation
    lab[..., 2] = (a * np.sin(turn) + b * np.cos(turn)) * hand.saturation
    lab[..., 0] = np.clip(50 + (lab[..., 0] - 50) * hand.lightness, 0, 100)
    return np.rint(np.clip(cv2.cvtColor(lab, cv2.COLOR_Lab2RGB), 0, 1) * 255).astype(np.uint8)


def _finish(canvas: np.ndarray, relief: np.ndarray, rng: np.random.Generator, hand: Hand) -> np.ndarray:
    """Raking light over paint and weave, and the varnish."""
    height, width = relief.shape
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    waver = cv2.GaussianBlur(rng.normal(0, 1, (height, width)).astype(np.float32), (0, 0), 6) * 10
    weave = np.sin((xs + waver) * (2 * np.pi / 5.3)) + np.sin((ys - waver) * (2 * np.pi / 5.1))
    surface = cv2.GaussianBlur(relief.astype(np.float32), (0, 0), 0.8) + 5.0 * weave
    slope = cv2.Sobel(surface, cv2.CV_32F, 1, 0) + cv2.Sobel(surface, cv2.CV_32F, 0, 1)  # light from the upper left
    lit = canvas.astype(np.float32) * (1 - np.clip(slope / 2600, -0.16, 0.16))[..., None]
    lit += np.clip(-slope - 260, 0, 400)[..., None] * 0.045  # wet glints on the steepest ridges
    lit = 255 * (np.clip(lit, 0, 255) / 255) ** 1.04 * np.float32(hand.varnish)
    return np.rint(np.clip(lit + 3, 0, 255)).astype(np.uint8)


# --- photographs -----------------------------------------------------------------------------------------------------


def _light(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure, white balance, saturation and uneven light of one session; float RGB in [0, 1]."""
    height, width = image.shape[:2]
    ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    falloff = 1 + rng.uniform(0, 0.09) * (np.cos(angle) * xs + np.sin(angle) * ys)
    falloff -= rng.uniform(0, 0.13) * (xs * xs + ys * ys) / 2
    gains = np.exp(rng.normal(0, 0.035, 3)) * np.exp(rng.normal(0, 0.075))
    image = np.clip(image * np.float32(gains) * falloff[..., None], 0, 1) ** np.float32(rng.uniform(0.9, 1.12))
    grey = image.mean(axis=2, keepdims=True)
    return grey + (image - grey) * np.float32(rng.uniform(0.86, 1.1))


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """The picture after JPEG compression."""
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
