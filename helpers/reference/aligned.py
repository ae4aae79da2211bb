"""A picture laid on genuine pictures of the same artwork, and where it differs from them more than they do.

It is compared with a few references. Each difference is divided by the noise that genuine pictures of *other* sources
show at the same place; back in the frame of the picture the least one counts. Nothing is trained.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd

from helpers.data.images import pixel_hash, resize
from helpers.judge.statistics import conformal_threshold
from helpers.reference import photometry, registration
from helpers.reference.memory import top_mean

NOT_THIS, DIFFERENT, SAME = "not this artwork", "this artwork, different here", "no difference found"
UNREGISTERED = 100.0
"""Every picture that lies on no reference scores above this; every other one below."""
_N_COMPARED = 5  # references that one picture is compared with
_N_GENUINE = 60  # genuine pictures that noise and limit are learnt from
_LEAST_SEEN = 0.05  # share of a reference that must be seen
_SIGMA, _NOISE_SIGMA = 1.5, 4.0  # smoothing of the map and of the noise, pixels of a reference
_TOP = 0.0075  # share of the map's highest values whose mean is the score
_FLOOR = 0.6  # least noise at a place, as a share of the noise of the whole picture
_PRIOR = 2.0  # pictures that the noise of the whole picture counts for at each place
_WHOLE, _TILT = 50.0, 10.0  # least score of a picture that is mirrored, or tilted by so many degrees
_SMALL = 64  # pixels


@dataclass(frozen=True)
class Settings:
    """``side``: longer side in pixels of the references; ``n_references``: genuine pictures kept to compare with."""

    side: int = 384
    n_references: int = 10


@dataclass(frozen=True)
class Comparison:
    """What is found when a picture is laid on its references."""

    answer: str  # NOT_THIS, DIFFERENT or SAME
    words: str  # the answer in sentences, with what was seen and everything that limits it
    score: float  # higher = more anomalous; above UNREGISTERED when it lies on no reference
    limit: float  # conformal threshold of the score, from genuine pictures
    picture: np.ndarray  # uint8 RGB (H, W, 3), the picture under test, at most twice as large as the references
    anomaly_map: np.ndarray  # float32 (H, W) in its frame; values above ``limit`` make a difference
    seen: np.ndarray  # bool (H, W), what was seen on a reference; the rest is not judged
    reference: np.ndarray  # uint8 RGB (H, W, 3), the best reference in the frame of the picture, or just the first one
    reference_hash: str  # SHA-256 of that reference's pixels

    @property
    def unit_map(self) -> np.ndarray:
        """The map in [0, 1], 0.5 at the limit; near 1 all over when the picture lies on no reference, as its score."""
        plane = np.maximum(self.anomaly_map, self.score) if self.score > UNREGISTERED else self.anomaly_map
        return plane / (plane + self.limit)


@dataclass
class Reference:
    """A genuine picture, uint8 RGB, its source, and the ``noise`` of genuine differences there, float32
    ``(4, H, W)``."""

    image: np.ndarray
    source: str
    noise: np.ndarray

    @functools.cached_property
    def features(self) -> registration.Features:
        return registration.describe(self.image)

    @functools.cached_property
    def lab(self) -> np.ndarray:
        return photometry.lab(self.image)


class Look(NamedTuple):
    """A picture on one reference, see :func:`registration.register`."""

    reference: int
    matrix: np.ndarray
    n_inliers: int
    turn: float
    differs: np.ndarray  # float16 (4, H, W) in the frame of the reference, inf: not seen


@dataclass
class Aligned:
    """The detector of one artwork."""

    settings: Settings
    references: list[Reference]
    level: float = 1.0  # medians over genuine pictures of the middle and of the highest part of their maps
    peak: float = 1.0
    scores: list[float] = field(default_factory=list)  # of genuine pictures, each without its own source
    groups: list[str] = field(default_factory=list)  # and their sources
    limit: float = 2 * UNREGISTERED  # conformal threshold of the scores
    notes: list[str] = field(default_factory=list)  # what was found about the genuine pictures, in sentences

    @property
    def is_usable(self) -> bool:
        """False when genuine pictures do not lie on each other: abstract art, low texture."""
        return self.limit < UNREGISTERED

    def looks(self, picture: np.ndarray, apart: str | None = None) -> list[Look]:
        """A picture on the references, of sources other than ``apart``, that it fits best."""
        query, found = registration.describe(picture), []
        kept = {n: one for n, one in enumerate(self.references) if one.source != apart}
        places = {n: place for n, one in kept.items() if (place := registration.register(query, one.features))}
        for n in sorted(places, key=lambda n: -places[n][1])[:_N_COMPARED]:
            differs = photometry.differences(picture, places[n][0], kept[n].lab).astype(np.float16)
            if np.isfinite(differs[0]).mean() > _LEAST_SEEN:
                found.append(Look(n, *places[n], differs))
        return found

    def measured(
        self, looks: Sequence[Look], noises: Sequence[np.ndarray], shape: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, float, float]:
        """The least difference in units of the noise, in the frame of a picture of ``shape``, float32 ``(H, W)``; where
        it was seen, bool; its median; its highest part."""
        least, there, best = np.full((*shape, 4), np.inf, np.float32), np.full(shape, np.inf, np.float32), np.inf
        for one, noise in zip(looks, noises):
            is_seen, back = np.isfinite(one.differs[0]).astype(np.float32), np.linalg.inv(one.matrix)
            planes = np.where(is_seen > 0, one.differs, 0).astype(np.float32) / noise
            level = max(float(np.median(planes[:, is_seen > 0])), 1e-6)  # 0 when it is the reference itself
            planes = photometry.inner_blur(np.moveaxis(planes, 0, 2), is_seen, _SIGMA)
            inside = cv2.warpPerspective(is_seen, back, shape[::-1]) > 0.5
            planes = cv2.warpPerspective(planes, back, shape[::-1])
            least = np.where(inside[..., None], np.minimum(least, planes), least)
            there, best = np.where(inside, np.minimum(there, level), there), min(best, level)
        least = least.mean(axis=2) * np.where(np.isfinite(there), best / there, 1)  # a strip seen on a worse one alone
        is_seen = np.isfinite(least)
        plane, values = np.where(is_seen, least, 0), least[is_seen]
        wider = cv2.dilate(is_seen.astype(np.uint8), np.ones((13, 13), np.uint8)) > 0
        rim = photometry.inner_blur(plane, is_seen.astype(np.float32), 2.0) * wider  # takes the values next to it
        return np.where(is_seen, plane, rim), wider, float(np.median(values)), top_mean(values, _TOP)

    def score(self, level: float, top: float) -> float:
        """Score of a picture, 1 for the middle genuine one; a coarser photograph is measured by its own level."""
        return max(top / max(level / self.level, 1) / self.peak, level / self.level)

    def compare(self, image: np.ndarray) -> Comparison:
        """Lay a picture, uint8 RGB ``(H, W, 3)`` of any size, on the references; one that lies nowhere is mirrored."""
        picture = resize(image, 2 * self.settings.side)
        shape, looks, flip = picture.shape[:2], self.looks(picture), 1
        if not looks:
            looks, flip = self.looks(np.ascontiguousarray(picture[:, ::-1])), -1
        shown, turn, score = self.references[0].image, 0.0, 2 * UNREGISTERED
        plane, seen = np.full(shape, 2 * min(self.limit, UNREGISTERED), np.float32), np.zeros(shape, bool)
        view = cv2.resize(shown, shape[::-1], interpolation=cv2.INTER_AREA)
        if looks:
            noises = [self.references[one.reference].noise for one in looks]
            plane, seen, level, top = self.measured(looks, noises, shape)
            plane /= max(level / self.level, 1) * self.peak
            best = max(looks, key=lambda one: one.n_inliers)
            shown, turn = self.references[best.reference].image, abs(best.turn)
            view = cv2.warpPerspective(shown, np.linalg.inv(best.matrix), shape[::-1], flags=cv2.INTER_AREA)
            plane, seen, view = plane[:, ::flip], seen[:, ::flip], view[:, ::flip]
            is_odd = flip < 0 or abs((turn + 45) % 90 - 45) > _TILT
            score = min(max(self.score(level, top), _WHOLE * is_odd), UNREGISTERED - 1)
        is_different, is_elsewhere = bool(looks) and score > self.limit, not looks and self.is_usable
        sentences = {
            "Not this artwork: the picture lies on none of the references.": is_elsewhere,
            "Whether this is the artwork cannot be said: the picture lies on none of the references, but genuine "
            "pictures do not lie on each other either. Trust DINOv2.": not looks and not is_elsewhere,
            "This artwork, and it differs from every reference.": is_different,
            "This artwork; no difference was found.": looks and not is_different,
            f"Only {seen.mean():.0%} of it lies on a reference, the rest is not judged.": 0 < seen.mean() < 0.995,
            f"It has fewer than {_SMALL} pixels on one side: too few to say much.": min(shape) < _SMALL,
            "It is a mirror image.": looks and flip < 0,
            f"It is turned by {turn:.0f} degrees.": turn > _TILT,
            "It is black and white: colours were not compared.": looks and np.ptp(picture, axis=2).max() <= 2,
            "It differs as a whole (sharpness, colours or brushwork), not in one place.":
                is_different and plane.max() <= self.limit,
        }  # fmt: skip
        answer = (DIFFERENT if is_different else SAME) if looks else NOT_THIS
        words = " ".join(sentence for sentence, applies in sentences.items() if applies)
        return Comparison(answer, words, score, self.limit, picture, plane, seen, view, pixel_hash(shown))


def fit(images: Sequence[np.ndarray], sources: Sequence[str], *, settings: Settings, alpha: float = 0.05) -> Aligned:
    """Learn how genuine pictures of an artwork, uint8 RGB ``(H, W, 3)``, differ when they are laid on each other.

    ``sources`` names the true source of each: pictures of one are never compared with each other, unless there is no
    other. ``alpha`` is the false-alarm rate that the limit aims at. ``ValueError``: no picture.
    """
    if not len(images):
        raise ValueError("The aligned comparison needs at least one genuine picture of the artwork.")
    images, n_sources = [resize(image, 2 * settings.side) for image in images], len(set(sources))
    apart = sources if n_sources > 1 else [str(n) for n in range(len(images))]
    chosen = turns(images, apart, min(settings.n_references, max(3, n_sources)))  # few sources: one picture of each
    shown = {n: resize(images[n], settings.side) for n in chosen}
    model = Aligned(settings, [Reference(image, apart[n], np.ones(1)) for n, image in shown.items()])
    genuine = sorted(turns(images, apart, _N_GENUINE))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = dict(zip(genuine, pool.map(lambda n: model.looks(images[n], apart[n]), genuine)))

    @functools.cache
    def noise(k: int, without: str | None = None) -> np.ndarray:
        known = [one for n, found in looks.items() if apart[n] != without for one in found if one.reference == k]
        return _noise([one.differs for one in known], model.references[k].image.shape[:2])

    for k, one in enumerate(model.references):
        one.noise = noise(k)
    parts = {}  # a genuine picture is judged by the noise of other sources, as a new one will be
    for n, found in looks.items():
        if found:
            noises = [noise(one.reference, apart[n]) for one in found]
            parts[n] = model.measured(found, noises, images[n].shape[:2])[2:]
    if parts:
        levels, tops = np.array(list(parts.values())).T
        model.level = max(float(np.median(levels)), 1e-6)
        model.peak = max(float(np.median(tops / np.maximum(levels / model.level, 1))), 1e-6)
    model.scores = [model.score(*parts[n]) if n in parts else 2 * UNREGISTERED for n in genuine]
    model.groups = [sources[n] for n in genuine]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the notes
        model.limit = conformal_threshold(model.scores, alpha)
    least = 1 / (len(genuine) + 1)
    notes = {
        "Only one genuine source: the limit rests on its own re-photographs and is optimistic.": n_sources == 1,
        f"{len(genuine)} genuine scores promise a false-alarm rate of {least:.0%} at best.": least > alpha,
        "Too few genuine pictures lie on each other: trust the rows of DINOv2 for this artwork.": not model.is_usable,
    }
    model.notes = [words for words, applies in notes.items() if applies]
    return model


def _noise(known: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """What differences are usual at each place: squared mean of their roots, so that the odd bad pair counts little;
    smoothed; drawn towards the whole picture's where few pictures were seen, and towards the usual where none was."""
    roots, counts = np.zeros((4, *shape), np.float32), np.zeros(shape, np.float32)
    for differs in known:
        is_seen = np.isfinite(differs[0])
        roots += np.sqrt(np.where(is_seen, differs, 0).astype(np.float32))
        counts += is_seen
    overall = np.sqrt(photometry.USUAL)
    if counts.any():
        overall = roots.sum(axis=(1, 2), keepdims=True) / counts.sum()
    smooth = np.stack([photometry.blur(plane, _NOISE_SIGMA) for plane in roots])
    mean = (smooth + _PRIOR * overall) / (photometry.blur(counts, _NOISE_SIGMA) + _PRIOR)
    return np.square(np.maximum(mean, np.maximum(_FLOOR**0.5 * overall, 1e-2)))


def turns(images: Sequence[np.ndarray], sources: Sequence[str], n: int) -> list[int]:
    """Up to ``n`` indices: of each source the sharpest picture, then of each the next one, and so on."""
    sharpness = pd.Series([cv2.Laplacian(resize(image, 256), cv2.CV_32F).std() for image in images])
    ranks = sharpness.groupby(list(sources)).rank(method="first", ascending=False)
    return ranks.sort_values(kind="stable").index[:n].tolist()
