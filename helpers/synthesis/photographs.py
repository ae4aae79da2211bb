"""Changes of a whole picture: which are other photographs of the same artwork, and which are anomalies.

The source report treats blur, inversion, tilt and saturation as training variations in one place and as anomalies in
another. Here :data:`VARIATIONS` decides once, with a reason for each; notebook 02 shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np

from helpers.synthesis import marks
from helpers.synthesis.kinds import GREY, Rng, to_bytes


class Variation(NamedTuple):
    """``apply(uint8 RGB (H, W, 3), rng)`` gives RGB in grey levels, of any size; ``what`` says what is done and why."""

    apply: Callable[[np.ndarray, Rng], np.ndarray]
    what: str


def vary(image: np.ndarray, variation: str, rng: Rng, strength: float = 1.0) -> np.ndarray:
    """A picture (uint8 RGB ``(H, W, 3)``) after one of :data:`VARIATIONS`: uint8 RGB, perhaps of another size; one of
    :data:`RETAKES` may go ``strength`` times as far. ``ValueError``: unknown name, or not such a picture."""
    if variation not in VARIATIONS:
        raise ValueError(f"Unknown variation {variation!r}; allowed are {', '.join(VARIATIONS)}.")
    further = {} if strength == 1 else {"strength": strength}
    return np.ascontiguousarray(to_bytes(VARIATIONS[variation].apply(marks.checked(image, 1), rng, **further)))


def rephotograph(
    image: np.ndarray, rng: Rng, *, changes: Sequence[str] | None = None, strength: float = 1.0
) -> tuple[np.ndarray, list[str]]:
    """Another photograph of the same artwork, uint8 RGB, and the names of what was done to it, in order: ``changes``
    (those in :data:`RETAKES` at any ``strength``), or two to four normal variations that ``rng`` draws."""
    if changes is None:
        n = int(rng.integers(2, 5))
        chosen = np.sort(rng.choice(len(NORMAL_VARIATIONS), n, replace=False))  # the table's order: JPEG last
        changes = [NORMAL_VARIATIONS[index] for index in chosen]
    for name in changes:
        image = vary(image, name, rng, strength)
    return image, list(changes)


def damaged_view(
    image: np.ndarray, *, seed: int, kind: str | None = None
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Another photograph of a genuine picture (uint8 RGB ``(H, W, 3)``), damaged when ``kind`` is a local kind or an
    anomalous change of the whole picture: what detectors are trained and tuned on. Returns uint8 RGB; the mask, bool
    ``(H, W)``, None unless a local kind was given; a record of JSON values with ``variations`` and, when damaged,
    ``kind`` and what :func:`helpers.synthesis.synthesize` tells."""
    rng = np.random.default_rng(seed)
    view, names = rephotograph(image, rng)
    if kind is None:
        return view, None, {"variations": names}
    if kind in ANOMALOUS_VARIATIONS:
        return vary(view, kind, rng), None, {"variations": names, "kind": kind}
    damaged, mask, record = marks.synthesize(view, kind, rng)
    return damaged, mask, {"variations": names, **record}


def _crop(image: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    height, width = image.shape[:2]
    top, bottom = (rng.uniform(0, 0.05 * strength, 2) * height).astype(int)
    left, right = (rng.uniform(0, 0.05 * strength, 2) * width).astype(int)
    return image[top : height - bottom, left : width - right]


def _perspective(image: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    height, width = image.shape[:2]
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float32)
    seen = corners + inwards * (rng.uniform(0, 0.04 * strength, (4, 2)) * [width, height]).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(seen, corners)
    return cv2.warpPerspective(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


def _turned(image: np.ndarray, rng: Rng, limits: tuple[float, float]) -> np.ndarray:
    height, width = image.shape[:2]  # up to 5 degrees enlarged so that no border shows, else with a mirrored border
    degrees = rng.uniform(*limits) * rng.choice([-1, 1])
    ratio = min(max(height / width, width / height), 4.0)
    zoom = np.cos(np.radians(degrees)) + ratio * np.sin(np.radians(abs(degrees))) if limits[1] <= 5 else 1.0
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, zoom)
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)


def _saturated(image: np.ndarray, rng: Rng, limits: Sequence[tuple[float, float]]) -> np.ndarray:
    low, high = limits[0] if len(limits) == 1 or rng.random() < 0.5 else limits[1]
    grey = (image @ GREY)[..., None]
    return grey + (image - grey) * np.float32(rng.uniform(low, high))


def _colour_jitter(image: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    balance, rest = ((1 - far * strength, 1 + far * strength) for far in (0.06, 0.1))
    gain = rng.uniform(*balance, 3).astype(np.float32) * np.float32(rng.uniform(*rest))
    mean = np.float32(image.mean())
    return ((image - mean) * np.float32(rng.uniform(*rest)) + mean) * gain


def _different_colour(image: np.ndarray, rng: Rng) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + int(rng.integers(40, 140))) % 180
    hsv[..., 1] = np.maximum(hsv[..., 1], 40)  # a grey picture has no hue to turn
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _lighting(image: np.ndarray, rng: Rng) -> np.ndarray:
    height, width = image.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    slope = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) / np.float32(2**0.5)
    return image * (1 + np.float32(rng.uniform(0.05, 0.2)) * slope)[..., None]


def _frame(image: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    side = round(rng.uniform(0.01, 0.02) * strength * min(image.shape[:2]))
    return cv2.copyMakeBorder(image, side, side, side, side, cv2.BORDER_CONSTANT, value=(92, 64, 38))


def _glare(image: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    (height, width), (x, y) = image.shape[:2], rng.uniform(0.1, 0.9, 2)
    far = (np.arange(height)[:, None] / height - y) ** 2 + (np.arange(width)[None] / width - x) ** 2
    return image + (40 * strength * np.exp(-40 * far)).astype(np.float32)[..., None]


def _blurred(image: np.ndarray, rng: Rng, limits: tuple[float, float], strength: float = 1.0) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), max(0.3, rng.uniform(*limits) * strength * min(image.shape[:2])))


def _jpeg(image: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    quality = min(95, int(rng.integers(45, 90) / strength))
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]


_GENUINE = {
    "crop": (_crop, "up to 5 % of each side cut off: photographs rarely show the exact edge"),
    "perspective": (_perspective, "corners shifted by up to 4 %: the camera did not stand straight in front"),
    "tilt": (partial(_turned, limits=(0.5, 2.5)), "turned by 0.5 to 2.5 degrees: the camera was held askew"),
    "lighting": (_lighting, "5 to 20 % darker towards one side: gallery light comes from one side"),
    "colour_jitter": (_colour_jitter, "brightness, contrast +-10 %, white balance +-6 %: cameras differ"),
    "saturation": (partial(_saturated, limits=[(0.8, 1.2)]), "colour strength x 0.8 to 1.2: screens differ"),
    "blur": (partial(_blurred, limits=(0.001, 0.003)), "blurred by 0.1 to 0.3 % of the shorter side: focus differs"),
    "jpeg": (_jpeg, "JPEG at quality 45 to 89: pictures on the web are compressed"),
}
_ANOMALOUS = {
    "different_colour": (_different_colour, "hues turned by 80 to 280 degrees: an anomaly in the 2024 study"),
    "fuzziness": (partial(_blurred, limits=(0.015, 0.04)), "blurred by 1.5 to 4 %: an anomaly in the 2024 study"),
    "invert": (lambda image, rng: 255 - image, "negative: no photograph of the genuine artwork looks so"),
    "flip": (lambda image, rng: image[:, ::-1] if rng.random() < 0.7 else image[::-1], "mirrored or upside down"),
    "strong_tilt": (partial(_turned, limits=(12, 35)), "turned by 12 to 35 degrees: no longer upright"),
    "strong_saturation": (partial(_saturated, limits=[(0.0, 0.2), (2.2, 3.5)]), "colour strength below 0.2, above 2.2"),
}
_ROUND_IT = {"frame": (_frame, "a brown frame, 1 to 2 % wide"), "glare": (_glare, "a lamp reflected in the varnish")}
VARIATIONS = {name: Variation(*row) for name, row in (_GENUINE | _ANOMALOUS | _ROUND_IT).items()}
"""Every change of a whole picture by name; the one place that says which counts as what."""
RETAKES = ("perspective", "crop", "frame", "glare", "colour_jitter", "blur", "jpeg")
"""What a worse photograph of the same artwork shows, in this order; the two new ones are in no dataset."""
NORMAL_VARIATIONS, ANOMALOUS_VARIATIONS = tuple(_GENUINE), tuple(_ANOMALOUS)
REPORT_VARIATIONS = ("different_colour", "fuzziness")
"""What the source report names among its anomalies and changes the whole picture; part of the default test set."""
