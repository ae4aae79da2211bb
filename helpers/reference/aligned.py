"""A picture laid on genuine pictures of the same artwork, and where it differs from them more than they do.

Each difference from a reference is divided by the noise that genuine pictures of *other* sources show at the same
place; back in the frame of the picture the least one counts. Nothing is trained.
"""

import functools
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import jinja2
import numpy as np
import pandas as pd

from helpers.data.images import pixel_hash, resize
from helpers.judge.statistics import conformal_threshold
from helpers.reference import registration
from helpers.reference.dino import top_mean

SAME, DIFFERENT, NOT_THIS, UNSURE = "same", "different", "not this artwork", "unsure"
UNREGISTERED = 100.0  # every picture that lies on no reference scores above this, every other one below
_N_GENUINE, _LEAST_SEEN = 60, 0.05  # pictures that noise and limit are learnt from; share of a reference to be seen
_SIGMA, _NOISE_SIGMA = 1.5, 4.0  # smoothing of the map and of the noise, pixels of a reference
_TOP = 0.003  # share of the map's highest values whose mean is the score
_ALONE = 1 / 3  # the least of n differences is about n to this power times as small as one alone, in the highest part
_FLOOR, _PRIOR = 0.6, 2.0  # of the whole picture's noise: least share of it at a place; pictures that it counts for
_WHOLE, _TILT = 50.0, 10.0  # least score of a picture that is mirrored, or tilted by so many degrees
_WORDS = jinja2.Template((Path(__file__).parent / "templates" / "words.txt").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Comparison:
    """What is found when a picture is laid on its references."""

    answer: str  # SAME, DIFFERENT, NOT_THIS or UNSURE
    words: str  # the answer, what was seen and everything that limits it, in sentences
    score: float  # higher = more anomalous; above UNREGISTERED when it lies on no reference
    limit: float  # conformal threshold of the score, from genuine pictures
    picture: np.ndarray  # uint8 RGB (H, W, 3), the picture under test, at most twice as large as the references
    anomaly_map: np.ndarray  # float32 (H, W) in its frame; values above ``limit`` make a difference
    seen: np.ndarray  # bool (H, W), what was seen on a reference; the rest is not judged
    reference: np.ndarray  # uint8 RGB (H, W, 3), the best reference in the frame of the picture, or just the first one
    reference_hash: str  # SHA-256 of that reference's pixels

    @property
    def unit_map(self) -> np.ndarray:
        """The map in [0, 1], 0.5 at the limit; its highest part is the score, so that both tell the same pictures."""
        plane = self.anomaly_map * (self.score / max(top_mean(self.anomaly_map, _TOP), 1e-6))
        return 1 / (1 + self.limit / np.clip(plane, 1e-6, self.score))


class Look(NamedTuple):
    """A picture on one reference, see :func:`registration.register` and :func:`registration.differences`."""

    reference: int
    matrix: np.ndarray
    n_inliers: int
    turn: float
    differs: np.ndarray  # float (4, h, w) in the frame of the reference
    seen: np.ndarray  # float32 (h, w)


@dataclass
class Aligned:
    """The detector of one artwork."""

    side: int  # longer side of the references, in pixels
    references: list[np.ndarray]  # genuine pictures, uint8 RGB (h, w, 3)
    sources: list[str]  # and the true source of each
    noises: list[np.ndarray] = field(default_factory=list)  # of genuine differences there, float32 (4, h, w)
    level: float = 1.0  # middle of the map of the middle genuine picture
    coarse: float = 1.0  # nine of ten genuine pictures have one at most so many times as high,
    peak: float = 1.0  # and at most so high a highest part
    scores: list[float] = field(default_factory=list)  # of genuine pictures, each without its own source
    groups: list[str] = field(default_factory=list)  # and their sources
    limit: float = 2 * UNREGISTERED  # conformal threshold of the scores
    notes: list[str] = field(default_factory=list)  # what was found about the genuine pictures, in sentences

    @property
    def is_usable(self) -> bool:
        """False when genuine pictures do not lie on each other: abstract art, low texture."""
        return self.limit < UNREGISTERED

    @functools.cached_property
    def _known(self) -> list[tuple[registration.Features, np.ndarray]]:
        return [(registration.describe(one), registration.lab(one)) for one in self.references]

    def looks(self, picture: np.ndarray, apart: str | None = None) -> list[Look]:
        """A picture on those references, of sources other than ``apart``, that it lies on; the best first."""
        query, known = registration.describe(picture), self._known

        def look(n: int) -> Look | None:
            place = registration.register(query, known[n][0])
            found = place and Look(n, *place, *registration.differences(picture, place[0], known[n][1]))
            return found if found and found.seen.mean() > _LEAST_SEEN else None

        with ThreadPoolExecutor(max(1, cv2.getNumThreads())) as pool:
            found = pool.map(look, (n for n, source in enumerate(self.sources) if source != apart))
        return sorted(filter(None, found), key=lambda one: -one.n_inliers)

    def measured(self, looks: Sequence[Look], noises: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple:
        """The least difference in units of the ``noises`` of all references, in the frame of a picture of ``shape``,
        float32 ``(H, W)``; where it was seen, bool; its median; its highest part, each a float."""
        least, there = np.full((4, *shape), np.inf, np.float32), np.full(shape, np.inf, np.float32)
        n_seen, best, size = np.zeros(shape, np.float32), np.inf, shape[::-1]
        for one in looks:
            back, below = np.linalg.inv(one.matrix), np.maximum(registration.blur(one.seen, _SIGMA), 1e-2)
            inside = cv2.warpPerspective(one.seen, back, size) > 0.5
            planes = one.differs / noises[one.reference]
            level = max(float(np.median(planes[:, ::3, ::3][:, one.seen[::3, ::3] > 0])), 1e-6)  # 0: the same picture
            for plane, lowest in zip(planes, least):
                plane = cv2.warpPerspective(registration.blur(plane, _SIGMA) / below, back, size)
                np.minimum(lowest, plane, out=lowest, where=inside)
            np.minimum(there, level, out=there, where=inside)
            n_seen, best = n_seen + inside, min(best, level)
        # A strip seen on few references, or on a worse one alone, differs more.
        is_seen, fair = n_seen > 0, best / there * (n_seen / len(looks)) ** _ALONE
        plane = np.where(is_seen, least.mean(axis=0), 0) * fair
        wider = cv2.dilate(is_seen.astype(np.uint8), np.ones((13, 13), np.uint8)) > 0
        rim = registration.inner_blur(plane, is_seen.astype(np.float32), 2.0) * wider  # takes the values next to it
        return np.where(is_seen, plane, rim), wider, float(np.median(plane[is_seen])), top_mean(plane[is_seen], _TOP)

    def score(self, level: float, top: float) -> float:
        """Score of a picture, up to 1 for most genuine ones; a coarser photograph is measured by its own level."""
        coarse = level / self.level
        return max(top / max(coarse, 1) / self.peak, coarse / self.coarse)

    def compare(self, image: np.ndarray) -> Comparison:
        """Lay a picture, uint8 RGB ``(H, W, 3)`` of any size, on the references; one that lies nowhere is mirrored."""
        picture = resize(image, 2 * self.side)
        shape, looks, flip = picture.shape[:2], self.looks(picture), 1
        if not looks:
            looks, flip = self.looks(np.ascontiguousarray(picture[:, ::-1])), -1
        shown, turn, score = self.references[0], 0.0, 2 * UNREGISTERED
        plane, seen = np.full(shape, 2 * min(self.limit, UNREGISTERED), np.float32), np.zeros(shape, bool)
        view, answer = cv2.resize(shown, shape[::-1]), NOT_THIS if self.is_usable else UNSURE
        if looks:
            plane, seen, level, top = self.measured(looks, self.noises, shape)
            plane /= max(level / self.level, 1) * self.peak
            shown, turn, back = self.references[looks[0].reference], abs(looks[0].turn), np.linalg.inv(looks[0].matrix)
            view = cv2.warpPerspective(shown, back, shape[::-1], flags=cv2.INTER_AREA)
            plane, seen, view = plane[:, ::flip], seen[:, ::flip], view[:, ::flip]
            is_odd = flip < 0 or abs((turn + 45) % 90 - 45) > _TILT
            score = min(max(self.score(level, top), _WHOLE * is_odd), UNREGISTERED - 1)
            answer = DIFFERENT if score > self.limit else SAME
        words = _WORDS.render(
            answer=answer, seen=seen.mean(), shape=shape, is_mirrored=looks and flip < 0, turn=turn,
            is_grey=registration.is_grey(registration.lab(picture)), highest=plane.max(), limit=self.limit,
        ).split()  # fmt: skip
        return Comparison(answer, " ".join(words), score, self.limit, picture, plane, seen, view, pixel_hash(shown))


def fit(
    images: Sequence[np.ndarray], sources: Sequence[str], *, side: int, n_references: int = 10, alpha: float = 0.05
) -> Aligned:
    """Learn how genuine pictures of an artwork, uint8 RGB ``(H, W, 3)``, differ when they are laid on each other.

    ``sources`` names the true source of each: pictures of one are never compared with each other, unless there is no
    other. ``n_references`` are kept, ``side`` pixels long. ``alpha`` is the false-alarm rate that the limit aims at;
    where the sources are too few for it, each counts with its highest score. ``ValueError``: no picture.
    """
    if not len(images):
        raise ValueError("The reference comparison needs at least one genuine picture of the artwork.")
    images, n_sources = [resize(image, 2 * side) for image in images], len(set(sources))
    apart = list(sources) if n_sources > 1 else [str(n) for n in range(len(images))]
    chosen = turns(images, apart, min(n_references, max(3, n_sources)))  # few sources: one picture of each
    model, looks = Aligned(side, [resize(images[n], side) for n in chosen], [apart[n] for n in chosen]), {}
    for n in sorted(turns(images, apart, _N_GENUINE)):
        found = model.looks(images[n], apart[n])
        looks[n] = [one._replace(differs=one.differs.astype(np.float16)) for one in found]  # all are kept for a while

    def roots(k: int, among: Iterable[int]) -> np.ndarray:
        total = np.zeros((5, *model.references[k].shape[:2]), np.float32)  # of the four, and how many were seen
        for one in (one for n in among for one in looks[n] if one.reference == k):
            total[:4] += np.sqrt(one.differs, dtype=np.float32)
            total[4] += one.seen
        return total

    totals, parts = [roots(k, looks) for k in range(len(chosen))], {}
    model.noises = [_noise(total) for total in totals]
    for source in set(apart):  # a genuine picture is judged by the noise of other sources, as a new one will be
        own = [n for n in looks if apart[n] == source]
        noises = [_noise(total - roots(k, own)) for k, total in enumerate(totals)]
        parts |= {n: model.measured(looks[n], noises, images[n].shape[:2])[2:] for n in own if looks[n]}
    if parts:
        levels, tops = np.array(list(parts.values())).T
        model.level = max(float(np.median(levels)), 1e-6)
        coarse = levels / model.level
        most = np.quantile([coarse, tops / np.maximum(coarse, 1)], 0.9, axis=1)
        model.coarse, model.peak = np.maximum(most, 1e-6).tolist()
    scores = pd.Series({n: model.score(*parts[n]) for n in parts}, index=list(looks), dtype=float)
    scores.index = [sources[n] for n in looks]
    if n_sources + 1 < 1 / alpha:  # these say little about the next one, however many photographs there are of each
        scores = scores.groupby(level=0).max()
    model.scores, model.groups = scores.fillna(2 * UNREGISTERED).tolist(), scores.index.tolist()
    with warnings.catch_warnings(record=True, action="always") as said:
        model.limit = conformal_threshold(model.scores, alpha)
    model.notes = [str(one.message) for one in said]
    if n_sources == 1:
        model.notes += ["Only one source: the limit rests on its own re-photographs and is optimistic."]
    if not model.is_usable:
        model.notes += ["Too few genuine pictures lie on each other: trust the rows of DINOv2 for this artwork."]
    return model


def _noise(total: np.ndarray) -> np.ndarray:
    """What differences are usual at each place: squared mean of their roots, so that the odd bad pair counts little;
    smoothed; drawn towards the whole picture's where few pictures were seen, and towards the usual where none was."""
    sums, counts, overall = total[:4], total[4], np.sqrt(registration.USUAL)
    if counts.any():
        overall = sums.sum(axis=(1, 2), keepdims=True) / counts.sum()
    smooth = np.stack([registration.blur(plane, _NOISE_SIGMA) for plane in sums])
    mean = (smooth + _PRIOR * overall) / (registration.blur(counts, _NOISE_SIGMA) + _PRIOR)
    return np.square(np.maximum(mean, np.maximum(_FLOOR**0.5 * overall, 1e-2)))


def turns(images: Sequence[np.ndarray], sources: Sequence[str], n: int) -> list[int]:
    """Up to ``n`` indices: of each source the sharpest picture, then of each the next one, and so on."""
    sharpness = pd.Series([cv2.Laplacian(resize(image, 256), cv2.CV_32F).std() for image in images])
    ranks = sharpness.groupby(list(sources)).rank(method="first", ascending=False)
    return ranks.sort_values(kind="stable").index[:n].tolist()


def why_not_genuine(scan: np.ndarray, picture: np.ndarray) -> str:
    """Why a picture is no faithful photograph of what a scan shows, both uint8 RGB ``(H, W, 3)``; "" if it is.

    Limits were set on 31 genuine and 103 altered pictures of two paintings, against two scans each: 56 of 62 genuine
    ones pass (five of the others are details), 2 of 206 altered ones; of small marks 0 of 28 plain, 34 of 44 fainter.
    """
    scan, picture = resize(scan, 384), resize(picture, 640)
    looks = Aligned(384, [scan], ["main"]).looks(picture)
    if not looks:
        return "it does not lie on the main scan"
    back, seen, fine = np.linalg.inv(looks[0].matrix), looks[0].seen, looks[0].differs[2]
    on = cv2.warpPerspective(np.ones(scan.shape[:2], np.float32), back, picture.shape[1::-1]).mean()
    if on < 0.9 or seen.mean() < 0.4:
        return f"{on:.0%} of it lies on the main scan, {seen.mean():.0%} of which it shows"
    changed = (fine[seen > 0] > 0.5).mean()
    return f"{changed:.1%} of it differs from the main scan" if changed > 0.005 else ""
