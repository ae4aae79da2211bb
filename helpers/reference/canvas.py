"""The common ground of an artwork's references: all are laid on one canvas, and what is normal there is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from helpers.reference import photometry, registration
from helpers.reference.memory import top_mean
from helpers.reference.registration import Features, Registration

_MARGIN = 0.3  # of the first reference's sides: how far other references may reach beyond it
_NOISE_SIGMA = 4.0  # smoothing of the noise, pixels of the canvas
_USUAL = np.float32([1.5, 1.5, 0.05, 0.05])  # noise of good photographs, where no pair of pictures tells it
_PRIOR = 2.0  # pictures that the noise of the whole picture counts for at each place


@dataclass(frozen=True)
class Settings:
    """What decides scores.

    Attributes:
        side: longer side in pixels of the artwork on the canvas.
        n_references: genuine pictures kept to compare with, of as many sources as there are.
        n_compared: references that one picture is compared with, the best fitting ones.
        n_genuine: genuine pictures that noise and threshold are learnt from.
        floor: least noise at a place, as a share of the noise of the whole picture.
        sigma: smoothing of the map, in pixels of the canvas.
        top: share of the highest values whose mean is the score.
    """

    side: int = 384
    n_references: int = 10
    n_compared: int = 5
    n_genuine: int = 60
    floor: float = 0.6
    sigma: float = 1.5
    top: float = 0.0075


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
        references: those that most others lie on first.
        noise: float32 ``(4, H, W)``, root mean square of the differences between genuine pictures.
        level, peak: medians over genuine pictures of the middle and of the highest difference in units of the noise.
    """

    shape: tuple[int, int]
    references: list[Reference]
    noise: np.ndarray | None = None
    level: float = 1.0
    peak: float = 1.0

    def lay(self, features: Features, apart: str | None = None) -> tuple[Registration, np.ndarray] | None:
        """Registration of a picture and its matrix onto the canvas; references of source ``apart`` are not used."""
        kept = [index for index, one in enumerate(self.references) if one.source != apart]
        found = registration.register(features, [one.features for one in self.references], kept)
        if found is None:
            return None
        # Points of two further references join in, so that the whole picture is held and not only its best part.
        asked = [self.references[i] for i in (found.reference, *[i for i in kept if i != found.reference][:2])]
        query = features.mirrored if found.is_mirrored else features
        pairs = [(one, *registration.matches(query, one.features)) for one in asked]
        points = np.concatenate([features.points[first] for _, first, _ in pairs])
        targets = [registration.moved(one.features.points[second], one.matrix) for one, _, second in pairs]
        matrix = asked[0].matrix @ found.matrix
        tolerance = max(1.5, max(self.shape) / 200)
        return found, registration.refined(matrix, points, np.concatenate(targets), tolerance)

    def differences(self, view: photometry.Laid, apart: str | None, n_compared: int) -> np.ndarray | None:
        """Least differences to the best fitting references: float32 ``(4, H, W)``, inf where none was seen."""
        others = [one.laid for one in self.references if one.source != apart]
        return photometry.least_differences(view, others, n_compared)

    def learn(self, rows: Sequence[np.ndarray], sources: Sequence[str], settings: Settings) -> list[float]:
        """Noise, level and peak from the differences of genuine pictures; returns the score of each.

        A picture is scored with the noise of the other sources alone, as a new one will be.
        """
        sums = {source: [np.zeros((4, *self.shape)), np.zeros(self.shape)] for source in sources}
        for row, source in zip(rows, sources):
            is_seen = np.isfinite(row[0])
            sums[source][0] += np.square(np.where(is_seen, row, 0).astype(np.float32))
            sums[source][1] += is_seen
        squares, counts = (sum(one[n] for one in sums.values()) + np.zeros(self.shape) for n in (0, 1))
        self.noise = _noise(np.broadcast_to(squares, (4, *self.shape)), counts, settings.floor)
        apart = dict.fromkeys(sums, self.noise)
        for source, own in sums.items() if len(sums) > 1 else ():
            apart[source] = _noise(squares - own[0], counts - own[1], settings.floor)
        parts = [
            (*self.normalised(row, apart[source], settings.sigma), np.isfinite(row[0]))
            for row, source in zip(rows, sources)
        ]
        if not parts:
            return []
        self.level = max(float(np.median([level for _, level, _ in parts])), 1e-6)
        peaks = [self.highest(plane, level, is_seen, settings) for plane, level, is_seen in parts]
        self.peak = max(float(np.median(peaks)), 1e-6)
        return [max(peak / self.peak, level / self.level) for peak, (_, level, _) in zip(peaks, parts)]

    def normalised(self, differences: np.ndarray, noise: np.ndarray, sigma: float) -> tuple[np.ndarray, float]:
        """Joint map in units of the noise, float32 ``(H, W)``, and the picture's own level, its median."""
        is_seen = np.isfinite(differences[0])
        joint = (np.where(is_seen, differences, 0).astype(np.float32) / noise).mean(axis=0)
        level = float(np.median(joint[is_seen]))
        return photometry.weighted_blur(joint, is_seen.astype(np.float32), sigma) * is_seen, level

    def highest(self, plane: np.ndarray, level: float, is_seen: np.ndarray, settings: Settings) -> float:
        """Mean of the highest part of the map; a coarser photograph is measured by its own level."""
        return top_mean(plane[is_seen], settings.top) / max(level / self.level, 1)


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


def _noise(squares: np.ndarray, counts: np.ndarray, floor: float) -> np.ndarray:
    """Root mean square at each place, smoothed, drawn towards the whole picture's where few pictures were seen."""
    if not counts.any():
        return np.broadcast_to(_USUAL[:, None, None], squares.shape).copy()
    overall = squares.sum(axis=(1, 2)) / max(counts.sum(), 1)
    blurred = [photometry.blur(plane.astype(np.float32), _NOISE_SIGMA) for plane in (*squares, counts)]
    mean = (np.stack(blurred[:-1]) + _PRIOR * overall[:, None, None]) / (blurred[-1] + _PRIOR)
    lowest = np.maximum(floor * np.sqrt(overall), 1e-4)[:, None, None]
    return np.maximum(np.sqrt(mean), lowest).astype(np.float32)


def build_canvases(pictures: Sequence[tuple[np.ndarray, str]], side: int) -> list[Canvas]:
    """Lay the references on as few canvases as they need, around the one that most others lie on."""
    left = [Reference(image, source, registration.describe(image), np.eye(3)) for image, source in pictures]
    canvases = []
    while left:
        tried = []
        for base in left:
            found = [None if one is base else registration.register(one.features, [base.features]) for one in left]
            places = [
                np.eye(3) if one is base else None if place is None or place.is_mirrored else place.matrix
                for one, place in zip(left, found)
            ]
            n_inliers = sum(place.n_inliers**0.5 for place in found if place is not None)
            tried.append((sum(place is not None for place in places), n_inliers, base, places))
        _, _, base, places = max(tried, key=lambda one: one[:2])
        height, width = base.image.shape[:2]
        scale = np.diag([side / max(height, width)] * 2 + [1.0])
        members = [(one, scale @ place) for one, place in zip(left, places) if place is not None]
        left = [one for one, place in zip(left, places) if place is None]
        corners = np.concatenate([registration.corners_of(matrix, one.image.shape[:2]) for one, matrix in members])
        room = np.array([width, height]) * scale[0, 0]
        low = np.maximum(corners.min(axis=0), -_MARGIN * room)
        high = np.minimum(corners.max(axis=0), (1 + _MARGIN) * room)
        shift = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1]])
        shape = tuple(int(length) + 2 for length in (high - low)[::-1])
        for one, matrix in members:
            one.matrix = shift @ matrix
            one.laid = photometry.lay(one.image, one.matrix, shape)
        members.sort(key=lambda one: one[0] is not base)
        canvases.append(Canvas(shape, [one for one, _ in members]))
    return canvases


def best_canvas(
    canvases: Sequence[Canvas], features: Features, apart: str | None = None
) -> tuple[Canvas, Registration, np.ndarray] | None:
    """The canvas on which a picture lies best, how it lies on a reference, and its matrix onto the canvas."""
    found = [(canvas, canvas.lay(features, apart)) for canvas in canvases]
    laid = [(canvas, *place) for canvas, place in found if place is not None]
    return max(laid, key=lambda one: one[1].n_inliers) if laid else None
