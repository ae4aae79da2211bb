"""Anomalies with pixel masks, and variations of a picture: one picture in, one picture out.

Local anomalies (:data:`LOCAL_KINDS`) change a part and leave every pixel outside their mask untouched, bit for bit.
Their colours come from the artwork's own palette, at a drawn distance in Lab from the colour of the place, so that
some marks hide and others stand out; :func:`visibility` puts a number on it. Variations (:data:`VARIATIONS`) change
the whole picture; the table says which of them a faithful photograph may show and which it may not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    import pandas as pd

REPORT_KINDS = ("box", "line", "letter", "circle", "dots")
"""The five kinds of the source report."""

LOCAL_KINDS = (
    *REPORT_KINDS,
    "scratch",
    "craquelure",
    "stain",
    "fade",
    "tear",
    "cutpaste",
    "poisson",
    "erased",
    "moved",
)
"""All kinds of anomaly that :func:`synthesize` makes: the report's, then ageing, then tampering."""

PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""Cells of a 3 x 3 grid over the picture, row by row."""

COLOURS = {
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "red": (190, 40, 40),
    "green": (50, 130, 60),
    "blue": (50, 80, 180),
    "yellow": (220, 190, 60),
    "brown": (110, 70, 40),
}
"""Names and RGB of the basic colours."""

VISIBILITY_BINS = (("faint", 0.0), ("moderate", 10.0), ("plain", 25.0))
"""Names and lower limits of :func:`visibility`. A colour difference of 10 is seen at a glance, over 1 % of the picture
it scores 10; below that one has to look for the mark. 25 is the same mark with a colour from another region."""

MIN_SIDE = 16
_TRIES = 16


@dataclass(frozen=True)
class Variation:
    """A change of the whole picture.

    Attributes:
        name: what :func:`vary` takes.
        is_anomalous: True when a faithful photograph of the artwork could not look so.
        reason: why it counts as it does.
    """

    name: str
    is_anomalous: bool
    reason: str


VARIATIONS = (
    Variation("lighting", False, "gallery light falls off towards one side"),
    Variation("colour_jitter", False, "white balance and exposure differ from camera to camera"),
    Variation("crop", False, "frames and hands cut off up to a tenth of each side"),
    Variation("perspective", False, "the camera stands a little off the axis"),
    Variation("jpeg", False, "pictures are compressed again and again on their way through the web"),
    Variation("soft_focus", False, "slight blur of a handheld photograph"),
    Variation("blur", True, "details that make the work are gone: a poor copy or a forger's wash"),
    Variation("invert", True, "a negative is no view of the painting"),
    Variation("tilt", True, "a work hung or printed askew by 10 to 25 degrees is not its faithful image"),
    Variation("saturation", True, "colours far from the pigments: a poster or a filter"),
    Variation("flip", True, "a mirrored Mona Lisa looks the other way"),
)
"""The report's transformations; the normal ones multiply training pictures, the anomalous ones are for testing."""

NORMAL_VARIATIONS = tuple(variation.name for variation in VARIATIONS if not variation.is_anomalous)
ANOMALOUS_VARIATIONS = tuple(variation.name for variation in VARIATIONS if variation.is_anomalous)


class Visibility(NamedTuple):
    """How visible a mark is.

    Attributes:
        delta_e: mean CIE76 colour difference inside the mask.
        area: share of the picture inside the mask, in (0, 1].
        value: ``delta_e * sqrt(100 * area)``: the difference that a mark of one percent would need to look as strong.
    """

    delta_e: float
    area: float
    value: float


def seed_for(seed: int, name: str) -> int:
    """Seed of 63 bits that depends on a seed and a name alone, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def rng_for(seed: int, name: str) -> np.random.Generator:
    """Random generator of :func:`seed_for`."""
    return np.random.default_rng(seed_for(seed, name))


def synthesize(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Damage a picture.

    Args:
        image: uint8 RGB ``(H, W, 3)``, both sides at least 16 px.
        kind: one of :data:`LOCAL_KINDS`.
        rng: source of every choice.
    Returns:
        the damaged picture; the mask, bool ``(H, W)``, never empty, outside of which no pixel differs (inside it a
        pixel may keep its colour by chance); and a record of JSON values: ``kind``, ``colours`` and ``colour_name``
        inside the mask, ``place`` (a cell of :data:`PLACES`), ``bbox`` (left, top, width, height in pixels),
        ``delta_e``, ``area``, ``visibility`` and its bin (see :class:`Visibility`).
    Raises:
        ValueError: unknown kind, or not such a picture.
    """
    if kind not in _MAKERS:
        raise ValueError(f"{kind!r} is no kind of local anomaly; there are {', '.join(LOCAL_KINDS)}.")
    _check(image)
    for _ in range(_TRIES):
        damaged, mask = _MAKERS[kind](image, rng)
        if mask.any() and (damaged[mask] != image[mask]).any():
            break
    else:  # on a constant picture nothing can be moved, erased or pasted: a box of another shade stands in
        damaged, mask = _box(image, rng)
    result = image.copy()
    result[mask] = damaged[mask]
    return result, mask, _record(image, result, mask, kind)


def visibility(image: np.ndarray, damaged: np.ndarray, mask: np.ndarray) -> Visibility:
    """How visible a mark is: mean colour difference inside the mask times the root of its area in percent.

    Args:
        image, damaged: uint8 RGB ``(H, W, 3)``.
        mask: bool ``(H, W)``, not empty.
    """
    delta_e = float(np.linalg.norm(_lab(image[mask]) - _lab(damaged[mask]), axis=1).mean())
    area = float(mask.mean())
    return Visibility(delta_e, area, delta_e * float(np.sqrt(100 * area)))


def visibility_bin(value: float) -> str:
    """Name of the bin that a visibility falls into.

    >>> visibility_bin(3.0), visibility_bin(10.0), visibility_bin(80.0)
    ('faint', 'moderate', 'plain')
    """
    return next(name for name, low in reversed(VISIBILITY_BINS) if value >= low)


def vary(image: np.ndarray, variation: str, rng: np.random.Generator) -> np.ndarray:
    """Change the whole picture.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        variation: a name of :data:`VARIATIONS`.
        rng: source of every choice.
    Returns:
        uint8 RGB, of the same shape but for ``crop``.
    Raises:
        ValueError: unknown variation, or not such a picture.
    """
    if variation not in _VARIERS:
        raise ValueError(f"{variation!r} is no variation; there are {', '.join(_VARIERS)}.")
    _check(image)
    return np.ascontiguousarray(_VARIERS[variation](image, rng))


def rephotograph(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Another faithful photograph of the same picture.

    Returns:
        uint8 RGB, and the two or three normal variations that were applied, in order.
    """
    names = [str(name) for name in rng.permutation(NORMAL_VARIATIONS)[: rng.integers(2, 4)]]
    for name in names:
        image = vary(image, name, rng)
    return image, names


def variations_table() -> pd.DataFrame:
    """:data:`VARIATIONS` as a table: ``variation, counts as, because``."""
    import pandas as pd

    return pd.DataFrame(
        [(v.name, "anomalous" if v.is_anomalous else "normal", v.reason) for v in VARIATIONS],
        columns=["variation", "counts as", "because"],
    )


# ------------------------------------------------------------------------------------------------ colours


def _lab(rgb: np.ndarray) -> np.ndarray:
    """RGB ``(..., 3)`` in [0, 255] -> Lab ``(n, 3)`` float32."""
    return cv2.cvtColor(np.asarray(rgb, np.float32).reshape(-1, 1, 3) / 255, cv2.COLOR_RGB2LAB)[:, 0]


def _colour(image: np.ndarray, y: float, x: float, rng: np.random.Generator) -> np.ndarray:
    """A colour of the picture's palette, at a drawn rank of distance from the colour at (y, x); float RGB ``(3,)``."""
    height, width = image.shape[:2]
    here = _lab(image[int(np.clip(y, 0, height - 1)), int(np.clip(x, 0, width - 1))])[0]
    palette = _lab(image.reshape(-1, 3)[rng.integers(height * width, size=48)])
    by_distance = palette[np.argsort(np.linalg.norm(palette - here, axis=1), kind="stable")]
    lab = by_distance[int(rng.beta(1.4, 1.0) * 47.999)].copy()
    if np.linalg.norm(lab - here) < 5:  # the same colour would be no mark at all
        lab[0] += 9 if here[0] < 60 else -9
    return _rgb(lab)


def _rgb(lab: np.ndarray) -> np.ndarray:
    rgb = cv2.cvtColor(np.asarray(lab, np.float32).reshape(1, 1, 3), cv2.COLOR_LAB2RGB)[0, 0]
    return np.clip(rgb * 255, 0, 255)


# ------------------------------------------------------------------------------------------- drawn marks

_Made = tuple[np.ndarray, np.ndarray]
_Maker = Callable[[np.ndarray, np.random.Generator], _Made]


def _place(image: np.ndarray, rng: np.random.Generator, margin: float = 0.1) -> tuple[float, float]:
    height, width = image.shape[:2]
    return rng.uniform(margin, 1 - margin) * height, rng.uniform(margin, 1 - margin) * width


def _blend(image: np.ndarray, cover: np.ndarray, colour: np.ndarray, opacity: float) -> _Made:
    """Paint a colour through a cover, uint8 ``(H, W)``; only the covered region is computed."""
    left, top, width, height = cv2.boundingRect(cover)
    damaged, mask = image.copy(), cover > 0
    region = np.s_[top : top + height, left : left + width]
    alpha = cover[region].astype(np.float32)[..., None] * (opacity / 255)
    damaged[region] = np.rint(image[region] * (1 - alpha) + np.asarray(colour, np.float32) * alpha).astype(np.uint8)
    return damaged, mask


def _drawn(draw: Callable[[np.ndarray, float, float, int, np.random.Generator], None]) -> _Maker:
    """Maker of a mark of one colour: ``draw(cover, y, x, side, rng)`` draws it with 255 into the cover."""

    def make(image: np.ndarray, rng: np.random.Generator) -> _Made:
        y, x = _place(image, rng)
        cover = np.zeros(image.shape[:2], np.uint8)
        draw(cover, y, x, min(image.shape[:2]), rng)
        return _blend(image, cover, _colour(image, y, x, rng), rng.uniform(0.8, 1.0))

    return make


def _thickness(side: int, rng: np.random.Generator, low: float, high: float) -> int:
    return max(1, round(side * rng.uniform(low, high)))


def _point(x: float, y: float) -> tuple[int, int]:
    return round(float(x)), round(float(y))


def _draw_box(cover: np.ndarray, y: float, x: float, side: int, rng: np.random.Generator) -> None:
    half = rng.uniform(0.025, 0.1, 2) * side
    thickness = -1 if rng.random() < 0.7 else _thickness(side, rng, 0.006, 0.02)
    cv2.rectangle(cover, _point(x - half[0], y - half[1]), _point(x + half[0], y + half[1]), 255, thickness)


def _draw_line(cover: np.ndarray, y: float, x: float, side: int, rng: np.random.Generator) -> None:
    angle, reach = rng.uniform(0, np.pi), rng.uniform(0.08, 0.3) * side
    dx, dy = reach * np.cos(angle), reach * np.sin(angle)
    thickness = _thickness(side, rng, 0.008, 0.03)
    cv2.line(cover, _point(x - dx, y - dy), _point(x + dx, y + dy), 255, thickness, cv2.LINE_AA)


def _draw_letter(cover: np.ndarray, y: float, x: float, side: int, rng: np.random.Generator) -> None:
    text = "".join(chr(ord("A") + letter) for letter in rng.integers(0, 26, rng.integers(1, 4)))
    font = int(rng.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX]))
    scale, thickness = side * rng.uniform(0.0035, 0.008), _thickness(side, rng, 0.008, 0.018)
    (width, height), _ = cv2.getTextSize(text, font, scale, thickness)
    cv2.putText(cover, text, _point(x - width / 2, y + height / 2), font, scale, 255, thickness, cv2.LINE_AA)


def _draw_circle(cover: np.ndarray, y: float, x: float, side: int, rng: np.random.Generator) -> None:
    thickness = -1 if rng.random() < 0.6 else _thickness(side, rng, 0.008, 0.02)
    cv2.circle(cover, _point(x, y), _thickness(side, rng, 0.03, 0.1), 255, thickness, cv2.LINE_AA)


def _draw_dots(cover: np.ndarray, y: float, x: float, side: int, rng: np.random.Generator) -> None:
    for dy, dx in rng.normal(0, 0.09 * side, (int(rng.integers(5, 16)), 2)):
        cv2.circle(cover, _point(x + dx, y + dy), _thickness(side, rng, 0.006, 0.022), 255, -1, cv2.LINE_AA)


def _draw_scratch(cover: np.ndarray, y: float, x: float, side: int, rng: np.random.Generator) -> None:
    """A long thin line that wavers a little and is interrupted where the tool jumped."""
    angle, point = rng.uniform(0, np.pi), np.array([x, y])
    for _ in range(int(rng.integers(8, 20))):
        angle += rng.normal(0, 0.09)
        end = point + 0.03 * side * np.array([np.cos(angle), np.sin(angle)])
        if rng.random() < 0.88:
            cv2.line(cover, _point(*point), _point(*end), 255, _thickness(side, rng, 0.003, 0.009), cv2.LINE_AA)
        point = end


def _draw_craquelure(cover: np.ndarray, y: float, x: float, side: int, rng: np.random.Generator) -> None:
    """A net of fine cracks: the borders between the cells of scattered points."""
    reach = rng.uniform(0.1, 0.22) * side
    radius = int(np.ceil(reach))
    height, width = cover.shape
    top, left = max(0, int(y) - radius), max(0, int(x) - radius)
    rows, columns = np.mgrid[top : min(height, int(y) + radius), left : min(width, int(x) + radius)]
    seeds = rng.uniform(-reach, reach, (int(rng.integers(18, 40)), 2)) + np.array([y, x])
    wobble = rng.normal(0, 0.03 * reach, (2, *rows.shape))
    wobble = np.stack([cv2.GaussianBlur(one, (0, 0), max(0.8, 0.05 * reach)) for one in wobble]) * 6
    at = np.stack([rows + wobble[0], columns + wobble[1]], axis=-1)
    distances = np.sort(np.linalg.norm(at[..., None, :] - seeds, axis=-1), axis=-1)
    crack = distances[..., 1] - distances[..., 0] < max(0.9, side * 0.004)
    inside = np.hypot(rows - y, columns - x) < reach * (1 - 0.25 * rng.random())
    cover[top : top + rows.shape[0], left : left + rows.shape[1]][crack & inside] = 255


def _tear(image: np.ndarray, rng: np.random.Generator) -> _Made:
    """A jagged slit through which the pale ground or the dark back shows."""
    y, x = _place(image, rng, 0.2)
    side = min(image.shape[:2])
    angle = rng.uniform(0, np.pi)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    position = np.linspace(-0.5, 0.5, 14) * rng.uniform(0.25, 0.5) * side
    width = np.sin(np.linspace(0, np.pi, 14)) * rng.uniform(0.01, 0.035) * side + 0.8
    middle = (x, y) + position[:, None] * along + rng.normal(0, 0.008 * side, (14, 1)) * across
    outline = np.concatenate([middle + width[:, None] * across, (middle - width[:, None] * across)[::-1]])
    cover = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(cover, [np.rint(outline).astype(np.int32)], 255, cv2.LINE_AA)
    colour = np.array([228, 218, 198]) if rng.random() < 0.6 else np.array([28, 23, 20])
    return _blend(image, cover, colour, 1.0)


# -------------------------------------------------------------------------------------- ageing, tampering


def _blob(image: np.ndarray, rng: np.random.Generator, low: float, high: float) -> tuple[np.ndarray, float, float]:
    """An irregular region, float32 ``(H, W)``: above 0 inside, growing towards the middle; and its centre."""
    height, width = image.shape[:2]
    y, x = _place(image, rng)
    radius = rng.uniform(low, high) * min(height, width)
    rows = (np.arange(height, dtype=np.float32)[:, None] - y) * rng.uniform(0.75, 1.3)
    columns = (np.arange(width, dtype=np.float32) - x) * rng.uniform(0.75, 1.3)
    noise = rng.normal(0, 0.22, (9, 9)).astype(np.float32)
    noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return 1 - np.sqrt(rows**2 + columns**2) / radius + noise, y, x


def _stain(image: np.ndarray, rng: np.random.Generator) -> _Made:
    """A translucent spot with a darker rim, as a drop leaves it."""
    depth, y, x = _blob(image, rng, 0.07, 0.17)
    rim = np.exp(-((depth - 0.08) ** 2) / 0.006)
    opacity = (rng.uniform(0.3, 0.6) + 0.3 * rim) * np.clip(depth / 0.06, 0, 1)
    return _blend(image, np.rint(255 * np.clip(opacity, 0, 1)).astype(np.uint8), _colour(image, y, x, rng), 1.0)


def _fade(image: np.ndarray, rng: np.random.Generator) -> _Made:
    """A region bleached by light: less saturated, lifted towards the ground's pale tone."""
    depth, _, _ = _blob(image, rng, 0.1, 0.2)
    amount = (np.clip(depth / 0.35, 0, 1) * rng.uniform(0.5, 0.9))[..., None]
    grey = image.mean(axis=2, keepdims=True)
    faded = image * (1 - amount) + (0.6 * grey + 0.4 * np.array([205, 198, 182])) * amount
    return np.clip(np.rint(faded), 0, 255).astype(np.uint8), amount[..., 0] > 0.02


def _patch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """A rectangle cut out elsewhere, turned or mirrored, and the top left corner where it goes."""
    height, width = image.shape[:2]
    h, w = (max(8, round(min(height, width) * share)) for share in rng.uniform(0.08, 0.24, 2))
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    patch = image[top : top + h, left : left + w]
    patch = patch[::-1] if rng.random() < 0.5 else patch[:, ::-1]
    return np.ascontiguousarray(patch), int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))


def _cutpaste(image: np.ndarray, rng: np.random.Generator) -> _Made:
    patch, top, left = _patch(image, rng)
    damaged, mask = image.copy(), np.zeros(image.shape[:2], bool)
    region = np.s_[top : top + patch.shape[0], left : left + patch.shape[1]]
    damaged[region], mask[region] = patch, True
    return damaged, mask


def _poisson(image: np.ndarray, rng: np.random.Generator) -> _Made:
    """A patch blended in by its gradients (Poisson image editing), so that no edge betrays it."""
    patch, top, left = _patch(image, rng)
    height, width = patch.shape[:2]
    # seamlessClone needs pixels around the patch: work in a copy with a border.
    padded = cv2.copyMakeBorder(image, 4, 4, 4, 4, cv2.BORDER_REFLECT_101)
    cover = np.zeros((height, width), np.uint8)
    cover[1:-1, 1:-1] = 255
    centre = (left + 4 + width // 2, top + 4 + height // 2)
    blended = np.asarray(cv2.seamlessClone(patch, padded, cover, centre, cv2.NORMAL_CLONE))[4:-4, 4:-4]
    changed = np.abs(blended.astype(np.int16) - image).max(axis=2) > 3
    return blended, changed


def _fill(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Paint over a hole from its surroundings (Telea's inpainting), looking at its neighbourhood only."""
    left, top, width, height = cv2.boundingRect(hole.astype(np.uint8))
    margin = 8
    region = np.s_[max(0, top - margin) : top + height + margin, max(0, left - margin) : left + width + margin]
    filled = image.copy()
    part, part_hole = np.ascontiguousarray(image[region]), np.ascontiguousarray(hole[region].astype(np.uint8))
    filled[region] = cv2.inpaint(part, part_hole, 4, cv2.INPAINT_TELEA)
    return filled


def _erased(image: np.ndarray, rng: np.random.Generator) -> _Made:
    depth, _, _ = _blob(image, rng, 0.06, 0.12)
    mask = depth > 0
    return _fill(image, mask), mask


def _moved(image: np.ndarray, rng: np.random.Generator) -> _Made:
    """A part taken from its place, which is painted over, and set down elsewhere."""
    depth, _, _ = _blob(image, rng, 0.06, 0.12)
    part = depth > 0
    height, width = part.shape
    down, right = (rng.choice([-1, 1], 2) * rng.uniform(0.12, 0.3, 2) * min(height, width)).astype(int)
    source = part[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    arrived = np.zeros_like(part)
    arrived[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = source
    damaged = _fill(image, part)
    damaged[arrived] = np.roll(image, (down, right), axis=(0, 1))[arrived]
    return damaged, part | arrived


_box = _drawn(_draw_box)
_MAKERS: dict[str, _Maker] = {
    "box": _box,
    "line": _drawn(_draw_line),
    "letter": _drawn(_draw_letter),
    "circle": _drawn(_draw_circle),
    "dots": _drawn(_draw_dots),
    "scratch": _drawn(_draw_scratch),
    "craquelure": _drawn(_draw_craquelure),
    "stain": _stain,
    "fade": _fade,
    "tear": _tear,
    "cutpaste": _cutpaste,
    "poisson": _poisson,
    "erased": _erased,
    "moved": _moved,
}


# -------------------------------------------------------------------------------------------- variations


def _lighting(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.28)
    rows, columns = np.linspace(-0.5, 0.5, height)[:, None], np.linspace(-0.5, 0.5, width)
    light = 1 + strength * (rows * np.sin(angle) + columns * np.cos(angle))
    return _to_uint8(image * light[..., None])


def _colour_jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    balance, exposure = np.exp(rng.normal(0, 0.04, 3)), np.exp(rng.normal(0, 0.08))
    grey = image.mean(axis=2, keepdims=True)
    return _to_uint8((grey + (image - grey) * rng.uniform(0.85, 1.15)) * balance * exposure)


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    top, bottom, left, right = rng.uniform(0, 0.08, 4) * (height, height, width, width)
    return image[int(top) : height - int(bottom), int(left) : width - int(right)]


def _perspective(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    inward = rng.uniform(0, 0.05, (4, 2)) * (width, height) * [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    matrix = cv2.getPerspectiveTransform(corners + inward.astype(np.float32), corners)
    return cv2.warpPerspective(image, matrix, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(45, 90))])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]


def _blur_by(low: float, high: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Gaussian blur with a sigma drawn as a share of the shorter side."""
    return lambda image, rng: cv2.GaussianBlur(image, (0, 0), rng.uniform(low, high) * min(image.shape[:2]))


def _tilt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    angle = rng.choice([-1, 1]) * rng.uniform(10, 25)
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), float(angle), 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _saturation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grey = image.mean(axis=2, keepdims=True)
    factor = rng.uniform(0.0, 0.25) if rng.random() < 0.5 else rng.uniform(2.2, 3.5)
    return _to_uint8(grey + (image - grey) * factor)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


_VARIERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "lighting": _lighting,
    "colour_jitter": _colour_jitter,
    "crop": _crop,
    "perspective": _perspective,
    "jpeg": _jpeg,
    "soft_focus": _blur_by(0.001, 0.003),
    "blur": _blur_by(0.02, 0.04),
    "invert": lambda image, rng: 255 - image,
    "tilt": _tilt,
    "saturation": _saturation,
    "flip": lambda image, rng: image[:, ::-1],
}


# ----------------------------------------------------------------------------------------------- records


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"The picture is {image.dtype} {image.shape}; uint8 RGB (H, W, 3) of at least {MIN_SIDE} px a side is "
            "needed. Load it with helpers.images.load_image."
        )


def _record(image: np.ndarray, damaged: np.ndarray, mask: np.ndarray, kind: str) -> dict[str, Any]:
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    seen = visibility(image, damaged, mask)
    colour = damaged[mask].mean(axis=0)
    return {
        "kind": kind,
        "colours": [[round(float(value)) for value in colour]],
        "colour_name": colour_name(colour),
        "place": place_of(mask),
        "bbox": [left, top, width, height],
        "area": round(seen.area, 6),
        "delta_e": round(seen.delta_e, 3),
        "visibility": round(seen.value, 3),
        "visibility_bin": visibility_bin(seen.value),
        "parameters": {},
    }


def colour_name(rgb: np.ndarray) -> str:
    """The basic colour of :data:`COLOURS` nearest in Lab.

    >>> colour_name(np.array([200, 30, 30]))
    'red'
    """
    distances = np.linalg.norm(_lab(np.array(list(COLOURS.values()))) - _lab(rgb), axis=1)
    return list(COLOURS)[int(distances.argmin())]


def place_of(mask: np.ndarray) -> str:
    """The cell of :data:`PLACES` that holds the centre of a mask.

    Args:
        mask: bool ``(H, W)``, not empty.
    """
    rows, columns = np.nonzero(mask)
    row = min(int(3 * (rows.mean() + 0.5) / mask.shape[0]), 2)
    return PLACES[3 * row + min(int(3 * (columns.mean() + 0.5) / mask.shape[1]), 2)]
