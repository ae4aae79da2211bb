"""The common ground of an artwork's references: all are laid on one canvas, and what is normal there is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from helpers.reference import photometry, registration
from helpers.reference.memory import top_mean
from helpers.reference.registration import Features, Registration

_MARGIN = 0.3  # of the first reference's sides: how far other references may reach beyond it
_N_COMPARED = 5  # references that one picture is compared with, the best fitting ones
_SIGMA = 1.5  # smoothing of the map, pixels of the canvas
_TOP = 0.0075  # share of the map's highest values whose mean is the score
_NOISE_SIGMA = 4.0  # smoothing of the noise, pixels of the canvas
_FLOOR = 0.6  # least noise at a place, as a share of the noise of the whole picture
_USUAL = np.float32([1.5, 1.5, 0.05, 0.05])  # noise of good photographs, where no pair of pictures tells it
_PRIOR = 2.0  # pictures that the noise of the whole picture counts for at each place


@dataclass
class Reference:
    """A genuine picture: uint8 RGB ``image``, its ``source``, ``features``, and ``matrix``: picture -> canvas."""

    image: np.ndarray
    source: str
    features: Features
    matrix: np.ndarray
    laid: photometry.Laid | None = None


@dataclass
class Canvas:
    """References that lie on each other: one edition of the artwork, and what is normal at each of its places.

    Attributes:
        shape: (height, width).
        references: the one that most others lie on first.
        noise: float32 ``(4, H, W)``, root mean square of the differences between genuine pictures.
        level, peak: medians over genuine pictures of the middle and of the highest difference in units of the noise.
    """

    shape: tuple[int, int]
    references: list[Reference]
    noise: np.ndarray | None = None
    level: float = 1.0
    peak: float = 1.0

    def lay(self, features: Features, apart: str | None) -> tuple[Registration, np.ndarray, Reference] | None:
        """How a picture lies on a reference, its matrix onto the canvas, and that reference; none of ``apart``."""
        kept = [one for one in self.references if one.source != apart]
        found = registration.register(features, [one.features for one in kept])
        if found is None:
            return None
        # Points of two further references join in, so that the whole picture is held and not only its best part.
        best = kept.pop(found.reference)
        query = features.mirrored if found.is_mirrored else features
        points, targets = [], []
        for one in (best, *kept[:2]):
            first, second = registration.matches(query, one.features)
            if len(first):
                points.append(features.points[first])
                targets.append(registration.moved(one.features.points[second], one.matrix))
        tolerance, matrix = max(1.5, max(self.shape) / 200), best.matrix @ found.matrix
        return found, registration.refined(matrix, np.concatenate(points), np.concatenate(targets), tolerance), best

    def learn(self, rows: Sequence[np.ndarray], sources: Sequence[str]) -> list[float]:
        """Noise, level and peak from the differences ``(4, H, W)`` of genuine pictures; returns the score of each.

        A picture is scored with the noise of the other sources alone, as a new one will be.
        """
        squares, counts = self._sums(rows)
        self.noise = _noise(squares, counts)
        noises = dict.fromkeys(sources, self.noise)
        for source in noises if len(noises) > 1 else ():
            own_squares, own_counts = self._sums([row for row, other in zip(rows, sources) if other == source])
            noises[source] = _noise(squares - own_squares, counts - own_counts)
        parts = [self.measured(row, noises[source])[1:] for row, source in zip(rows, sources)]
        if parts:
            self.level = max(float(np.median([level for level, _ in parts])), 1e-6)
            self.peak = max(float(np.median([top / max(level / self.level, 1) for level, top in parts])), 1e-6)
        return [self.score(level, top) for level, top in parts]

    def _sums(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Squares of the differences, added up, and how many pictures were seen at each place."""
        squares, counts = np.zeros((4, *self.shape)), np.zeros(self.shape)
        for row in rows:
            is_seen = np.isfinite(row[0])
            squares += np.square(np.where(is_seen, row, 0).astype(np.float32))
            counts += is_seen
        return squares, counts

    def measured(self, differences: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Joint map in units of the noise, float32 ``(H, W)``; its median; its highest part."""
        is_seen = np.isfinite(differences[0])
        joint = (np.where(is_seen, differences, 0).astype(np.float32) / noise).mean(axis=0)
        plane = photometry.inner_blur(joint, is_seen.astype(np.float32), _SIGMA) * is_seen
        return plane, float(np.median(joint[is_seen])), top_mean(plane[is_seen], _TOP)

    def score(self, level: float, top: float) -> float:
        """Score of a picture, 1 for the middle genuine one; a coarser photograph is measured by its own level."""
        return max(top / max(level / self.level, 1) / self.peak, level / self.level)


def lay_on_best(
    canvases: Sequence[Canvas], image: np.ndarray, features: Features, apart: str | None = None
) -> tuple[Canvas, Registration, np.ndarray, Reference, np.ndarray] | None:
    """Lay a picture on the canvas that it fits best, away from references of source ``apart``; None: on no one.

    Returns:
        the canvas; how the picture lies on a reference; its matrix onto the canvas; that reference; and the least
        differences to the best fitting references, float32 ``(4, H, W)``, inf where none was seen.
    """
    found = [(canvas, *place) for canvas in canvases if (place := canvas.lay(features, apart)) is not None]
    if not found:
        return None
    canvas, place, matrix, reference = max(found, key=lambda one: one[1].n_inliers)
    view = photometry.lay(image, matrix, canvas.shape)
    others = [one.laid for one in canvas.references if one.source != apart]
    differences = photometry.least_differences(view, others, _N_COMPARED)
    return None if differences is None else (canvas, place, matrix, reference, differences)


def arrays_of(canvases: Sequence[Canvas]) -> dict[str, np.ndarray]:
    """Canvases as plain arrays, for ``np.savez``."""
    found = {}
    for n, canvas in enumerate(canvases):
        found |= {f"{n}/noise": canvas.noise, f"{n}/numbers": np.array([canvas.level, canvas.peak])}
        for k, one in enumerate(canvas.references):
            found |= {f"{n}/{k}/image": one.image, f"{n}/{k}/matrix": one.matrix, f"{n}/{k}/source": one.source}
    return found


def canvases_of(arrays: Mapping[str, np.ndarray]) -> list[Canvas]:
    """The canvases of :func:`arrays_of`; points of the references are found again."""
    canvases = []
    while (noise := arrays.get(f"{len(canvases)}/noise")) is not None:
        n, references, shape = len(canvases), [], noise.shape[1:]
        while (image := arrays.get(f"{n}/{len(references)}/image")) is not None:
            matrix, source = (arrays[f"{n}/{len(references)}/{name}"] for name in ("matrix", "source"))
            laid = photometry.lay(image, matrix, shape)
            references.append(Reference(image, str(source), registration.describe(image), matrix, laid))
        canvases.append(Canvas(shape, references, noise, *map(float, arrays[f"{n}/numbers"])))
    return canvases


def _noise(squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Root mean square at each place, smoothed, drawn towards the whole picture's where few pictures were seen."""
    if not counts.any():
        return np.broadcast_to(_USUAL[:, None, None], squares.shape).copy()
    overall = squares.sum(axis=(1, 2)) / counts.sum()
    *blurred, seen = (photometry.blur(plane.astype(np.float32), _NOISE_SIGMA) for plane in (*squares, counts))
    mean = (np.stack(blurred) + _PRIOR * overall[:, None, None]) / (seen + _PRIOR)
    lowest = np.maximum(_FLOOR * np.sqrt(overall), 1e-4)[:, None, None]
    return np.maximum(np.sqrt(mean), lowest).astype(np.float32)


def build_canvases(pictures: Sequence[tuple[np.ndarray, str]], side: int) -> list[Canvas]:
    """Lay the references on as few canvases as they need, each around the one that most others lie on.

    Args:
        pictures: uint8 RGB ``(H, W, 3)`` and the source of each.
        side: longer side of the artwork on the canvas, in pixels.
    """
    left = [Reference(image, source, registration.describe(image), np.eye(3)) for image, source in pictures]
    canvases = []
    while left:
        rounds = [(base, [_place(one, base) for one in left]) for base in left]
        base, places = max(rounds, key=lambda one: _agreement(one[1]))
        height, width = base.image.shape[:2]
        scale = side / max(height, width)
        members = [one for one, place in zip(left, places) if place is not None]
        for one, place in zip(left, places):
            if place is not None:
                one.matrix = np.diag([scale, scale, 1.0]) @ place.matrix
        left = [one for one, place in zip(left, places) if place is None]
        corners = np.concatenate([registration.corners_of(one.matrix, one.image.shape[:2]) for one in members])
        room = np.array([width, height]) * scale
        low = np.maximum(corners.min(axis=0), -_MARGIN * room)
        high = np.minimum(corners.max(axis=0), (1 + _MARGIN) * room)
        shape = tuple(int(length) + 2 for length in (high - low)[::-1])
        for one in members:
            one.matrix = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1]]) @ one.matrix
            one.laid = photometry.lay(one.image, one.matrix, shape)
        canvases.append(Canvas(shape, sorted(members, key=lambda one: one is not base)))
    return canvases


def _place(picture: Reference, base: Reference) -> Registration | None:
    """How one reference lies on another, the right way round."""
    if picture is base:
        return Registration(np.eye(3), 0, False, 0.0, 0)
    found = registration.register(picture.features, [base.features])
    return None if found is None or found.is_mirrored else found


def _agreement(places: Sequence[Registration | None]) -> tuple[int, float]:
    """How many pictures lie on one, and how well."""
    found = [place.n_inliers**0.5 for place in places if place is not None]
    return len(found), sum(found)
