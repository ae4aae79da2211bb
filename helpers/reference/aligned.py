"""A picture laid on genuine pictures of the same artwork, and where the two differ more than genuine ones do.

All references are laid once on a common canvas. A new picture is registered, laid on the canvas too and compared with
the references that fit best: lightness, colour, and structure at two scales. Each difference is divided by the noise
that genuine pictures of *other* sources show at the same place. Nothing is trained.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from helpers.data.images import pixel_hash, resize
from helpers.judge.statistics import conformal_threshold
from helpers.reference import photometry, registration
from helpers.reference.canvas import Canvas, arrays_of, build_canvases, canvases_of, lay_on_best
from helpers.reference.registration import Features, Registration

NOT_THIS, DIFFERENT, SAME = "not this artwork", "this artwork, different here", "no difference found"
UNREGISTERED = 100.0
"""Every picture that lies on no reference scores above this; every other one below."""
_N_GENUINE = 60  # genuine pictures that noise and limit are learnt from
_WHOLE = 50.0  # a mirrored or tilted picture: the artwork, but not as it hangs
_TILT = 10.0  # degrees off a multiple of 90
_SMALL = 64  # pixels
_KEPT = ("scores", "groups", "limit", "notes")


@dataclass(frozen=True)
class Settings:
    """``side``: longer side in pixels of the artwork on the canvas; ``n_references``: pictures kept to compare with."""

    side: int = 384
    n_references: int = 10


@dataclass(frozen=True)
class Comparison:
    """What is found when a picture is laid on its references.

    Attributes:
        answer: one of :data:`NOT_THIS`, :data:`DIFFERENT`, :data:`SAME`.
        score: higher = more anomalous; above :data:`UNREGISTERED` when it lies on no reference.
        limit: conformal threshold of the score, from genuine pictures.
        picture: uint8 RGB ``(H, W, 3)``, the picture under test, at most twice as large as the canvas.
        anomaly_map: float32 ``(H, W)`` in its frame; values above ``limit`` make a difference.
        seen: bool ``(H, W)``, what was seen on a reference; the rest is not judged.
        reference: uint8 RGB ``(H, W, 3)``: the best reference in the frame of the picture, or just the first one.
        reference_hash: SHA-256 of that reference's pixels.
        registration: how it lies, or None.
        notes: sentences for readers.
    """

    answer: str
    score: float
    limit: float
    picture: np.ndarray
    anomaly_map: np.ndarray
    seen: np.ndarray
    reference: np.ndarray
    reference_hash: str
    registration: Registration | None = None
    notes: tuple[str, ...] = ()

    @property
    def share_seen(self) -> float:
        return float(self.seen.mean())

    @property
    def unit_map(self) -> np.ndarray:
        """The map in [0, 1], 0.5 at the limit."""
        return self.anomaly_map / (self.anomaly_map + self.limit)

    def describe(self) -> str:
        """The answer in words, with what was seen and everything that limits it."""
        words = {
            NOT_THIS: "Not this artwork: the picture lies on none of the references.",
            DIFFERENT: "This artwork, and it differs from every reference.",
            SAME: "This artwork; no difference was found.",
        }[self.answer]
        if self.answer == NOT_THIS and self.limit >= UNREGISTERED:
            words = (
                "Whether this is the artwork cannot be said: the picture lies on none of the references, but genuine "
                "pictures do not lie on each other either. Trust DINOv2."
            )
        if self.answer != NOT_THIS and self.share_seen < 0.995:
            words += f" Only {self.share_seen:.0%} of it lies on a reference, the rest is not judged."
        return " ".join([words, *self.notes])


@dataclass
class Aligned:
    """The detector of one artwork.

    Attributes:
        settings: see :class:`Settings`.
        canvases: one per edition; pictures that do not lie on each other are different editions.
        scores, groups: of genuine pictures, each compared with references of other sources, and their sources.
        limit: conformal threshold of the scores.
        notes: what was found about the references, in sentences.
    """

    settings: Settings
    canvases: list[Canvas]
    scores: list[float]
    groups: list[str]
    limit: float
    notes: list[str]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but the settings as plain arrays, for ``np.savez``."""
        return {name: np.array(getattr(self, name)) for name in _KEPT} | arrays_of(self.canvases)

    @classmethod
    def of_arrays(cls, settings: Settings, arrays: Mapping[str, np.ndarray]) -> Aligned:
        """The model of :meth:`arrays`."""
        return cls(settings, canvases_of(arrays), *(arrays[name].tolist() for name in _KEPT))

    @property
    def is_usable(self) -> bool:
        """False when genuine pictures do not lie on each other: abstract art, low texture."""
        return self.limit < UNREGISTERED

    def compare(self, image: np.ndarray) -> Comparison:
        """Lay a picture on the references.

        Args:
            image: uint8 RGB ``(H, W, 3)`` of any size.
        """
        picture = resize(image, 2 * self.settings.side)
        features = registration.describe(picture)
        found = lay_on_best(self.canvases, picture, features)
        if found is None:
            return self._not_this(picture, features)
        canvas, place, matrix, best, differences = found
        plane, level, top = canvas.measured(differences, canvas.noise)
        score = canvas.score(level, top)
        if place.is_mirrored or abs((place.turn + 45) % 90 - 45) > _TILT:
            score = max(score, _WHOLE)
        score = min(score, UNREGISTERED - 1)
        plane /= max(level / canvas.level, 1) * canvas.peak
        anomaly_map, seen = _in_its_frame(plane, np.isfinite(differences[0]), matrix, picture)
        notes = _notes(place, picture)
        if score > self.limit and not (anomaly_map > self.limit).any():
            notes.append("It differs as a whole (sharpness, colours or brushwork), not in one place.")
        back = np.linalg.inv(matrix) @ best.matrix
        reference = cv2.warpPerspective(best.image, back, picture.shape[1::-1], flags=cv2.INTER_AREA)
        return Comparison(
            DIFFERENT if score > self.limit else SAME, score, self.limit, picture, anomaly_map, seen, reference,
            pixel_hash(best.image), place, tuple(notes),
        )  # fmt: skip

    def _not_this(self, picture: np.ndarray, features: Features) -> Comparison:
        """A picture that lies nowhere; beside it the first reference as it is."""
        first = self.canvases[0].references[0].image
        everywhere = np.full(picture.shape[:2], 2 * min(self.limit, UNREGISTERED), np.float32)
        return Comparison(
            NOT_THIS, _strangeness(self.canvases, features), self.limit, picture, everywhere, everywhere < 0,
            cv2.resize(first, picture.shape[1::-1], interpolation=cv2.INTER_AREA), pixel_hash(first),
            notes=tuple(_notes(None, picture)),
        )  # fmt: skip


def _strangeness(canvases: Sequence[Canvas], features: Features) -> float:
    """Score of a picture that lies on no reference: the fewer points agree, the higher."""
    n = max(len(registration.matches(features, one.references[0].features)[0]) for one in canvases)
    return UNREGISTERED + 100 / (10 + n)


def _in_its_frame(
    plane: np.ndarray, is_seen: np.ndarray, matrix: np.ndarray, picture: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Map and seen part in the frame of the picture; the untrusted rim takes the values next to it."""
    plane = np.where(is_seen, plane, photometry.inner_blur(plane, is_seen.astype(np.float32), 2.0))
    is_seen = cv2.dilate(is_seen.astype(np.uint8), np.ones((13, 13), np.uint8))
    back, size = np.linalg.inv(matrix), picture.shape[1::-1]
    seen = cv2.warpPerspective(is_seen.astype(np.float32), back, size) > 0.5
    return cv2.warpPerspective(plane, back, size) * seen, seen


def _notes(place: Registration | None, picture: np.ndarray) -> list[str]:
    """What limits the answer, in sentences."""
    limits = {f"It has fewer than {_SMALL} pixels on one side: too few to say much.": min(picture.shape[:2]) < _SMALL}
    if place is not None:
        limits |= {
            "It is a mirror image.": place.is_mirrored,
            f"It is turned by {abs(place.turn):.0f} degrees.": abs(place.turn) > _TILT,
            "It is black and white: colours were not compared.": np.ptp(picture, axis=2).max() <= 2,
        }
    return [words for words, applies in limits.items() if applies]


def fit(images: Sequence[np.ndarray], sources: Sequence[str], *, settings: Settings, alpha: float = 0.05) -> Aligned:
    """Learn what genuine pictures of an artwork look like when they are laid on each other.

    Args:
        images: genuine pictures, uint8 RGB ``(H, W, 3)``.
        sources: the true source picture of each; pictures of one source are never compared with each other, unless
            there is no other.
        settings: see :class:`Settings`.
        alpha: false-alarm rate that the limit aims at.
    Raises:
        ValueError: no picture.
    """
    if not len(images):
        raise ValueError("The aligned comparison needs at least one genuine picture of the artwork.")
    images = [resize(image, 2 * settings.side) for image in images]
    groups, n_sources = sources, len(set(sources))
    if n_sources == 1:
        sources = [str(n) for n in range(len(images))]
    n_references = 3 if n_sources == 1 else min(settings.n_references, max(3, n_sources))
    chosen = turns(images, sources, n_references)
    canvases = build_canvases([(images[index], sources[index]) for index in chosen], settings.side)

    def row(index: int) -> tuple[Canvas | None, np.ndarray | float]:
        features = registration.describe(images[index])
        found = lay_on_best(canvases, images[index], features, sources[index])
        return (None, _strangeness(canvases, features)) if found is None else (found[0], found[-1].astype(np.float16))

    genuine = sorted(turns(images, sources, _N_GENUINE))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = dict(zip(genuine, pool.map(row, genuine)))
    scores = {index: value for index, (canvas, value) in rows.items() if canvas is None}
    for canvas in canvases:
        own = {index: value for index, (lain_on, value) in rows.items() if lain_on is canvas}
        scores |= dict(zip(own, canvas.learn(list(own.values()), [sources[index] for index in own])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the notes
        limit = conformal_threshold(list(scores.values()), alpha)
    notes = {
        f"{len(canvases)} groups of genuine pictures do not lie on each other.": len(canvases) > 1,
        "Only one genuine source: the limit rests on its own re-photographs and is optimistic.": n_sources == 1,
        f"{len(scores)} genuine scores promise a false-alarm rate of {1 / (len(scores) + 1):.0%} at best.":
            len(scores) + 1 < 1 / alpha,
        "Too few genuine pictures lie on each other: trust the rows of DINOv2 for this artwork.": limit >= UNREGISTERED,
    }  # fmt: skip
    said = [words for words, applies in notes.items() if applies]
    in_order = [scores[index] for index in genuine]
    return Aligned(settings, canvases, in_order, [groups[index] for index in genuine], limit, said)


def turns(images: Sequence[np.ndarray], sources: Sequence[str], n: int) -> list[int]:
    """Up to ``n`` indices: of each source the sharpest picture, then of each the next one, and so on."""
    sharpness = pd.Series([cv2.Laplacian(resize(image, 256), cv2.CV_32F).std() for image in images])
    ranks = sharpness.groupby(list(sources)).rank(method="first", ascending=False)
    return ranks.sort_values(kind="stable").index[:n].tolist()
