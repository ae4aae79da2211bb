"""Sorting further pictures: which show what the main scan of an artwork shows? By structure, as colours differ."""

import cv2
import numpy as np

from helpers.data.images import resize
from helpers.reference import photometry
from helpers.reference.registration import describe, register


def difference(scan: np.ndarray, picture: np.ndarray) -> str:
    """Why a picture is no faithful photograph of what a scan shows, both uint8 RGB ``(H, W, 3)``; "" if it is.

    Limits were set on 31 genuine and 103 altered pictures of two paintings, against two scans each: 56 of 62 genuine
    ones pass (five of the others are details), 2 of 206 altered ones; of small marks 0 of 28 plain, 34 of 44 fainter.
    """
    scan, picture = resize(scan, 384), resize(picture, 640)
    place = register(describe(picture), describe(scan))
    if place is None:
        return "it does not lie on the main scan"
    back, ones = np.linalg.inv(place[0]), np.ones(scan.shape[:2], np.float32)
    on = cv2.warpPerspective(ones, back, picture.shape[1::-1]).mean()
    (_, _, fine, _), seen = photometry.differences(picture, place[0], photometry.lab(scan))
    if on < 0.9 or seen.mean() < 0.4:
        return f"{on:.0%} of it lies on the main scan, {seen.mean():.0%} of which it shows"
    changed = (fine[seen > 0] > 0.5).mean()
    return f"{changed:.1%} of it differs from the main scan" if changed > 0.005 else ""
