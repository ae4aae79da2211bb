"""The condition sheet: what a conservator writes by hand before and after a loan, as one HTML page."""

import base64
import datetime
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np
from skimage.measure import label, regionprops

from helpers.data.images import pixel_hash, resize
from helpers.reference.aligned import DIFFERENT, Comparison

_LEAST_AREA, _MOST = 2e-4, 12  # share of the picture below which specks are not listed; places that are


class Difference(NamedTuple):
    """A place that differs."""

    place: str  # third of the picture, in words
    area: float  # share of the picture
    strength: float  # highest value, as a multiple of the limit
    mask: np.ndarray  # bool (H, W)


def differences(comparison: Comparison) -> list[Difference]:
    """The connected places above the limit, strongest first; none where the answer is not "different"."""
    strength = comparison.anomaly_map / comparison.limit
    above = np.uint8(strength > 1) * (comparison.answer == DIFFERENT)
    labels, found = label(cv2.morphologyEx(above, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))), []
    for region in regionprops(labels, strength):
        down, across = (int(3 * middle / side) for middle, side in zip(region.centroid, strength.shape))
        words = f"{('top', '', 'bottom')[down]} {('left', '', 'right')[across]}".strip() or "centre"
        found.append(Difference(words, region.area / strength.size, region.intensity_max, labels == region.label))
    return sorted((one for one in found if one.area >= _LEAST_AREA), key=lambda one: -one.strength)[:_MOST]


def html(page: str, comparison: Comparison, **more: Any) -> str:
    """A comparison as HTML without script: the ``"blink"`` of picture and reference, which take turns; the picture with
    its differences ``"marked"``; or the condition ``"sheet"``, with a ``title`` and what ``others`` say, a list of
    ``{"detector", "score", "limit", "verdict"}``."""
    found, date = differences(comparison), datetime.date.today().isoformat()
    return _PAGES.get_template(f"{page}.html").render(comparison=comparison, found=found, date=date, **more)


def _uri(image: np.ndarray, side: int) -> str:
    """A picture, its longer side at most ``side`` pixels, as the address of an ``<img>``."""
    encoded = cv2.imencode(".jpg", resize(image, side)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    wider = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))  # a little outside
    return [line[:, 0] for line in cv2.findContours(wider, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]]


_PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
_PAGES.filters |= {"uri": _uri, "pixel_hash": pixel_hash, "outlines": _outlines}
