"""The condition sheet: what a conservator writes by hand before and after a loan, as one HTML page."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np

from helpers import files
from helpers.data.images import pixel_hash
from helpers.reference.aligned import DIFFERENT, Comparison

_INK = (193, 68, 14)
_LEAST_AREA = 2e-4  # share of the picture; smaller specks are not listed
_MOST = 12


@dataclass(frozen=True)
class Difference:
    """A place that differs: ``mask``, bool ``(H, W)``, and the highest value there, as a multiple of the limit."""

    mask: np.ndarray
    strength: float

    @property
    def area(self) -> float:
        """Share of the picture."""
        return float(self.mask.mean())

    @property
    def place(self) -> str:
        """The cell of a 3 x 3 grid that the middle of the mask lies in, in words."""
        (y, x), (height, width) = np.argwhere(self.mask).mean(axis=0), self.mask.shape
        words = (("top", "", "bottom")[int(3 * y / height)], ("left", "", "right")[int(3 * x / width)])
        return " ".join(filter(None, words)) or "centre"


def differences(comparison: Comparison) -> list[Difference]:
    """The connected places above the limit, strongest first; none where the answer is not "different"."""
    if comparison.answer != DIFFERENT:
        return []
    above = (comparison.anomaly_map > comparison.limit).astype(np.uint8)
    n, labels = cv2.connectedComponents(cv2.morphologyEx(above, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)))
    masks = [labels == label for label in range(1, n)]
    found = [Difference(mask, float(comparison.anomaly_map[mask].max() / comparison.limit)) for mask in masks]
    return sorted((one for one in found if one.area >= _LEAST_AREA), key=lambda one: -one.strength)[:_MOST]


def marked(comparison: Comparison, found: Sequence[Difference], *, side: int = 900) -> np.ndarray:
    """The picture in its own colours, enlarged, with a numbered outline around each difference; uint8 RGB."""
    height, width = comparison.picture.shape[:2]
    scale = max(1.0, side / max(height, width))
    size = (round(width * scale), round(height * scale))
    out = cv2.resize(comparison.picture, size, interpolation=cv2.INTER_CUBIC)
    for number, one in enumerate(found, start=1):
        mask = cv2.resize(one.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        mask = cv2.dilate(mask, np.ones((9, 9), np.uint8))
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        x, y, wide, _ = cv2.boundingRect(mask)
        corner = (min(x + wide + 4, size[0] - 40), max(y - 4, 26))
        for colour, thick in (((255, 255, 255), 5), (_INK, 2)):
            cv2.drawContours(out, outlines, -1, colour, thick, cv2.LINE_AA)
            cv2.putText(out, str(number), corner, cv2.FONT_HERSHEY_SIMPLEX, 0.9, colour, thick + 1, cv2.LINE_AA)
    return out


def blink_html(comparison: Comparison, *, side: int = 420) -> str:
    """Suspect and reference on top of each other, taking turns; a still pair where a page moves nothing. No script."""
    return _PAGES.get_template("blink.html").render(comparison=comparison, side=side)


def write(path: Path, comparison: Comparison, *, title: str, others: Sequence[dict] = ()) -> Path:
    """Write the condition sheet of a comparison.

    Args:
        path: the HTML file.
        comparison: of the suspect picture.
        title: name of the artwork.
        others: what other detectors say: ``{"detector": ..., "score": ..., "limit": ..., "verdict": ...}`` each.
    Returns:
        ``path``.
    """
    found, date = differences(comparison), datetime.date.today().isoformat()
    page = _PAGES.get_template("sheet.html").render(
        title=title, date=date, comparison=comparison, found=found, marked=marked(comparison, found), others=others
    )
    files.write_text(path, page)
    return path


def _uri(image: np.ndarray, side: int) -> str:
    """A picture of this longer side as the address of an ``<img>``."""
    scale = side / max(image.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=method)
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


_PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
_PAGES.filters |= {"uri": _uri, "pixel_hash": pixel_hash}
