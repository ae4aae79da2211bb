"""A picture laid on genuine pictures of the same artwork, and where the two differ more than genuine ones do.

All references are laid once on a common canvas. A new picture is registered, laid on the canvas too and compared with
the references that fit best: lightness, colour, and structure at two scales. Each difference is divided by the noise
that genuine pictures of *other* sources show at the same place. Nothing is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np

from helpers.data.images import pixel_hash, resize
from helpers.judge.statistics import conformal_threshold
from helpers.reference import photometry, registration
from helpers.reference.canvas import Canvas, Settings, best_canvas, build_canvases
from helpers.reference.registration import Features, Registration

NOT_THIS, DIFFERENT, SAME = "not this artwork", "this artwork, different here", "no difference found"
UNREGISTERED = 100.0
"""Every picture that lies on no reference scores above this; every other one below."""
_WHOLE = 50.0  # a mirrored or tilted picture: the artwork, but not as it hangs
_TILT = 10.0  # degrees off a multiple of 90
_SMALL = 64


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
        registration: how it lies, or None.
        reference: uint8 RGB ``(H, W, 3)``: the best reference in the frame of the picture, or just the first one.
        reference_hash: SHA-256 of that reference's pixels.
        notes: sentences for readers.
    """

    answer: str
    score: float
    limit: float
    picture: np.ndarray
    anomaly_map: np.ndarray
    seen: np.ndarray
    registration: Registration | None = None
    reference: np.ndarray | None = None
    reference_hash: str = ""
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
        first = {
            NOT_THIS: "Not this artwork: the picture lies on none of the references.",
            DIFFERENT: "This artwork, and it differs from every reference.",
            SAME: "This artwork; no difference was found.",
        }[self.answer]
        if self.answer == NOT_THIS and self.limit >= UNREGISTERED:
            first = "Whether this is the artwork cannot be said: the picture lies on none of the references."
        is_partly = self.answer != NOT_THIS and self.share_seen < 0.995
        seen = [f"Only {self.share_seen:.0%} of it lies on a reference, the rest is not judged."] if is_partly else []
        return " ".join([first, *seen, *self.notes])


@dataclass
class Aligned:
    """The detector of one artwork.

    Attributes:
        settings: see :class:`Settings`.
        canvases: one per edition; pictures that do not lie on each other are different editions.
        scores, groups: of genuine pictures, each compared with references of other sources, and their sources.
        is_optimistic: there was one source only: its own re-photographs had to serve.
        notes: what was found about the references, in sentences.
    """

    settings: Settings
    canvases: list[Canvas]
    scores: np.ndarray
    groups: list[str]
    is_optimistic: bool = False
    notes: list[str] = field(default_factory=list)
    limit: float = UNREGISTERED

    @property
    def is_usable(self) -> bool:
        """False when genuine pictures do not lie on each other: abstract art, low texture."""
        return len(self.scores) > 0 and self.limit < UNREGISTERED

    def compare(self, image: np.ndarray) -> Comparison:
        """Lay a picture on the references.

        Args:
            image: uint8 RGB ``(H, W, 3)`` of any size.
        """
        picture = resize(image, 2 * self.settings.side)
        features = registration.describe(picture)
        found = best_canvas(self.canvases, features)
        if found is None:
            return self._not_this(picture, features)
        canvas, place, matrix = found
        differences = canvas.differences(photometry.lay(picture, matrix, canvas.shape), None, self.settings.n_compared)
        if differences is None:
            return self._not_this(picture, features)
        is_seen = np.isfinite(differences[0])
        plane, level = canvas.normalised(differences, canvas.noise, self.settings.sigma)
        peak = canvas.highest(plane, level, is_seen, self.settings) / canvas.peak
        score = max(peak, level / canvas.level)
        if place.is_mirrored or abs((place.turn + 45) % 90 - 45) > _TILT:
            score = max(score, _WHOLE)
        score = min(score, UNREGISTERED - 1)
        anomaly_map, seen = _in_its_frame(
            plane / (max(level / canvas.level, 1) * canvas.peak), is_seen, matrix, picture
        )
        notes = _notes(place, picture)
        if score > self.limit and not (anomaly_map > self.limit).any():
            notes.append("It differs as a whole (sharpness, colours or brushwork), not in one place.")
        best = canvas.references[place.reference]
        back = np.linalg.inv(matrix) @ best.matrix
        reference = cv2.warpPerspective(best.image, back, picture.shape[1::-1], flags=cv2.INTER_AREA)
        answer = DIFFERENT if score > self.limit else SAME
        name = pixel_hash(best.image)
        return Comparison(answer, score, self.limit, picture, anomaly_map, seen, place, reference, name, tuple(notes))

    def _not_this(self, picture: np.ndarray, features: Features) -> Comparison:
        """A picture that lies nowhere."""
        notes = []
        if min(picture.shape[:2]) < _SMALL:
            notes.append(f"It has fewer than {_SMALL} pixels on one side: too few to say much.")
        if not self.is_usable:
            notes.append("Genuine pictures of it do not lie on each other either, so this says nothing: trust DINOv2.")
        everywhere = np.full(picture.shape[:2], 2 * min(self.limit, UNREGISTERED), np.float32)
        score = _strangeness(self.canvases, features)
        first = self.canvases[0].references[0].image
        reference, name = cv2.resize(first, picture.shape[1::-1], interpolation=cv2.INTER_AREA), pixel_hash(first)
        seen = everywhere < 0
        return Comparison(NOT_THIS, score, self.limit, picture, everywhere, seen, None, reference, name, tuple(notes))


def _strangeness(canvases: Sequence[Canvas], features: Features) -> float:
    """Score of a picture that lies on no reference: the fewer points agree, the higher."""
    n = max(len(registration.matches(features, one.references[0].features)[0]) for one in canvases)
    return UNREGISTERED + 100 / (10 + n)


def _in_its_frame(
    plane: np.ndarray, is_seen: np.ndarray, matrix: np.ndarray, picture: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Map and seen part in the frame of the picture; the untrusted rim takes the values next to it."""
    plane = np.where(is_seen, plane, photometry.weighted_blur(plane, is_seen.astype(np.float32), 2.0))
    is_seen = cv2.dilate(is_seen.astype(np.uint8), np.ones((13, 13), np.uint8))
    shape = picture.shape[:2]
    seen = photometry.bring_back(is_seen, matrix, shape) > 0.5
    return photometry.bring_back(plane, matrix, shape) * seen, seen


def _notes(place: Registration, picture: np.ndarray) -> list[str]:
    notes = []
    if place.is_mirrored:
        notes.append("It is a mirror image.")
    if abs(place.turn) > _TILT:
        notes.append(f"It is turned by {abs(place.turn):.0f} degrees.")
    if np.ptp(picture, axis=2).max() <= 2:
        notes.append("It is black and white: colours were not compared.")
    if min(picture.shape[:2]) < _SMALL:
        notes.append(f"It has fewer than {_SMALL} pixels on one side: small changes cannot be seen.")
    return notes


def fit(
    images: Sequence[np.ndarray], sources: Sequence[str], *, settings: Settings, alpha: float = 0.05, n_workers: int = 1
) -> Aligned:
    """Learn what genuine pictures of an artwork look like when they are laid on each other.

    Args:
        images: genuine pictures, uint8 RGB ``(H, W, 3)``.
        sources: the true source picture of each; pictures of one source are never compared with each other, unless
            there is no other.
        settings: see :class:`Settings`.
        alpha: false-alarm rate that the limit aims at.
        n_workers: threads.
    Raises:
        ValueError: no picture.
    """
    if not len(images):
        raise ValueError("The aligned comparison needs at least one genuine picture of the artwork.")
    images = [resize(image, 2 * settings.side) for image in images]
    is_alone = len(set(sources)) == 1
    sources = [f"{source} #{n}" for n, source in enumerate(sources)] if is_alone else list(sources)
    chosen = turns(images, sources, 3 if is_alone else min(settings.n_references, max(3, len(set(sources)))))
    canvases = build_canvases([(images[index], sources[index]) for index in chosen], settings.side)

    def row(index: int) -> tuple[Canvas | None, np.ndarray | float]:
        features = registration.describe(images[index])
        found = best_canvas(canvases, features, sources[index])
        if found is None:
            return None, _strangeness(canvases, features)
        canvas, _, matrix = found
        view = photometry.lay(images[index], matrix, canvas.shape)
        values = canvas.differences(view, sources[index], settings.n_compared)
        return (None, UNREGISTERED) if values is None else (canvas, values.astype(np.float16))

    genuine = turns(images, sources, settings.n_genuine)
    with ThreadPoolExecutor(n_workers) as pool:
        rows = dict(zip(genuine, pool.map(row, genuine)))
    scores = {index: value for index, (canvas, value) in rows.items() if canvas is None}
    for canvas in canvases:
        own = {index: value for index, (lain_on, value) in rows.items() if lain_on is canvas}
        scores |= dict(zip(own, canvas.learn(list(own.values()), [sources[index] for index in own], settings)))
    order = sorted(scores)
    groups = [sources[index].split(" #")[0] for index in order] if is_alone else [sources[index] for index in order]
    notes = [f"{len(canvases)} groups of genuine pictures do not lie on each other."] if len(canvases) > 1 else []
    if is_alone:
        notes.append("Only one genuine source: the limit rests on its own re-photographs and is optimistic.")
    values = np.array([scores[index] for index in order])
    if len(values) + 1 < 1 / alpha:
        notes.append(f"{len(values)} genuine scores promise a false-alarm rate of {1 / (len(values) + 1):.0%} at best.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the note
        limit = float(conformal_threshold(values, alpha)) if len(values) else UNREGISTERED
    if limit >= UNREGISTERED:
        notes.append("Too few genuine pictures lie on each other: trust the rows of DINOv2 for this artwork.")
    return Aligned(settings, canvases, values, groups, is_alone, notes, limit)


def turns(images: Sequence[np.ndarray], sources: Sequence[str], n: int) -> list[int]:
    """Up to ``n`` indices: of each source the sharpest picture, then of each the next one, and so on."""
    sharpness = [cv2.Laplacian(resize(image, 256), cv2.CV_32F).std() for image in images]
    ranks: dict[str, int] = {}
    order = []
    for index in sorted(range(len(images)), key=lambda index: -sharpness[index]):
        ranks[sources[index]] = ranks.get(sources[index], -1) + 1
        order.append((ranks[sources[index]], index))
    return [index for _, index in sorted(order)[:n]]
