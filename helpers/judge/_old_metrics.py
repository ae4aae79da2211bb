"""How well scores find anomalous pictures, and how well anomaly maps find anomalous pixels.

Scores and maps are raw, higher = more anomalous. A metric that is not defined (only one class, no anomalous pixel) is
nan; a score or map that is not finite is an error. Errors of measurement (intervals, tests) are in
:mod:`helpers.judge.statistics`.

Pixel metrics are computed over the pictures that the caller passes. Pass normal pictures with an all-False mask, and
of the anomalous pictures only those with a mask: a picture that is anomalous as a whole (inverted, another painting)
has no pixel ground truth, and calling all its pixels normal would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike

# ------------------------------------------------------------------------------------------------- pictures


class Rate(NamedTuple):
    """A share with its counts, so that no percentage is printed without its denominator.

    Attributes:
        successes: number of right verdicts.
        n: number of pictures they are counted among.
    """

    successes: int
    n: int

    @property
    def value(self) -> float:
        """``successes / n``; nan when ``n`` is 0."""
        return self.successes / self.n if self.n else float("nan")


class F1Max(NamedTuple):
    """The largest F1 over all thresholds.

    Attributes:
        value: F1 in [0, 1]; nan when nothing is anomalous.
        threshold: scores strictly above it are called anomalous; ``-inf`` calls everything anomalous. It was picked
            with the labels in hand: report it, never use it as a detector's threshold.
    """

    value: float
    threshold: float


@dataclass(frozen=True)
class Rates:
    """Verdicts counted against labels.

    Args:
        true_positives: anomalous pictures called anomalous.
        false_negatives: anomalous pictures called normal.
        true_negatives: normal pictures called normal.
        false_positives: normal pictures called anomalous.
    """

    true_positives: int
    false_negatives: int
    true_negatives: int
    false_positives: int

    @property
    def n_anomalous(self) -> int:
        return self.true_positives + self.false_negatives

    @property
    def n_images(self) -> int:
        return self.n_anomalous + self.true_negatives + self.false_positives

    @property
    def accuracy(self) -> Rate:
        """Right verdicts among all pictures. With 34 anomalous of 50, always saying "anomalous" gives 0.68."""
        return Rate(self.true_positives + self.true_negatives, self.n_images)

    @property
    def sensitivity(self) -> Rate:
        """Anomalous pictures that were found, among the anomalous ones."""
        return Rate(self.true_positives, self.n_anomalous)

    @property
    def specificity(self) -> Rate:
        """Normal pictures left in peace, among the normal ones."""
        return Rate(self.true_negatives, self.n_images - self.n_anomalous)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of sensitivity and specificity, 0.5 for any blind rule; nan when a class is missing."""
        return (self.sensitivity.value + self.specificity.value) / 2


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: how often an anomalous picture scores above a normal one (ties count half).

    Args:
        scores: float ``(n,)``, higher = more anomalous.
        labels: bool or 0/1 ``(n,)``, True = anomalous.
    Returns:
        float in [0, 1]; nan when one class is missing.
    Raises:
        ValueError: lengths differ, a label is not 0/1, or a score is not finite.

    >>> image_auroc([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1])
    0.875
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = checked_scores(scores, labels)
    return float(roc_auc_score(labels, scores)) if _has_both(labels) else float("nan")


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision: precision at each anomalous picture, weighted by the step in recall (no interpolation).

    Chance is the share of anomalous pictures, so values of sets with different shares do not compare.

    Args and Raises: as :func:`image_auroc`.

    Returns:
        float in (0, 1]; nan when one class is missing (with no normal picture it would be 1 for any scores).
    """
    from sklearn.metrics import average_precision_score

    scores, labels = checked_scores(scores, labels)
    return float(average_precision_score(labels, scores)) if _has_both(labels) else float("nan")


def f1_max(scores: ArrayLike, labels: ArrayLike) -> F1Max:
    """The best F1 that any threshold reaches on these labels: an upper bound, not a result of a detector.

    Args and Raises: as :func:`image_auroc`.

    >>> f1_max([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1])
    F1Max(value=0.8, threshold=0.1)
    """
    scores, labels = checked_scores(scores, labels)
    ranking = _rank(_sorted_points(scores[~labels]), _sorted_points(scores[labels]))
    return ranking.f1_max()


def rates(labels: ArrayLike, predicted: ArrayLike) -> Rates:
    """Count verdicts against labels.

    Args:
        labels: bool or 0/1 ``(n,)``, True = anomalous.
        predicted: bool or 0/1 ``(n,)``, True = called anomalous.
    Raises:
        ValueError: lengths differ, or a value is not 0/1.

    >>> rates([1, 1, 1, 0], [1, 1, 0, 0]).accuracy
    Rate(successes=3, n=4)
    """
    labels, predicted = _checked_labels(labels), _checked_labels(predicted)
    if len(labels) != len(predicted):
        raise ValueError(f"{len(labels)} labels but {len(predicted)} verdicts; pass one verdict for each picture.")
    return Rates(
        true_positives=int((labels & predicted).sum()),
        false_negatives=int((labels & ~predicted).sum()),
        true_negatives=int((~labels & ~predicted).sum()),
        false_positives=int((~labels & predicted).sum()),
    )


def checked_scores(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 ``(n,)`` and labels as bool ``(n,)``, or a ``ValueError`` that says what is wrong."""
    scores, labels = np.asarray(scores, dtype=np.float64), _checked_labels(labels)
    if scores.ndim != 1 or len(scores) != len(labels):
        raise ValueError(f"Scores have shape {scores.shape}, labels {labels.shape}; pass one score for each label.")
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite, first at position "
            f"{int(np.argmin(np.isfinite(scores)))}. Find out why before measuring."
        )
    return scores, labels


# ------------------------------------------------------------------------------------------------- pixels


def resize_map(anomaly_map: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """An anomaly map at the size of its mask.

    Bilinear, pixel centres aligned as in ``torch.nn.functional.interpolate(align_corners=False)`` and OpenCV. When
    it shrinks a map it does not average, so make maps no larger than the masks if that matters.

    Args:
        anomaly_map: float ``(h, w)`` of any float type.
        shape: wanted ``(H, W)``.
    Returns:
        float32 ``(H, W)`` (float64 for a float64 map); the map's own memory when nothing had to change.
    Raises:
        ValueError: the map is not two-dimensional, is empty, or has a value that is not finite.
    """
    anomaly_map = np.asarray(anomaly_map)
    if anomaly_map.ndim != 2 or anomaly_map.size == 0:
        raise ValueError(f"An anomaly map has shape {anomaly_map.shape}; expected (H, W), one map for each picture.")
    values = anomaly_map.astype(np.float64 if anomaly_map.dtype == np.float64 else np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError(
            f"An anomaly map of shape {values.shape} has {(~np.isfinite(values)).sum()} values that are not finite. "
            "Find out why before measuring (float16 overflows above 65504)."
        )
    if values.shape == tuple(shape):
        return values
    return cv2.resize(np.ascontiguousarray(values), (int(shape[1]), int(shape[0])), interpolation=cv2.INTER_LINEAR)


class PixelHistogram:
    """Pixel metrics of any number of pictures in one pass and bounded memory.

    No score range has to be known. Pixels are kept as they are up to 4 million of a class (results are then exact);
    after that the sorted scores are replaced by a histogram whose bins hold equal *shares of pixels*, not equal
    score intervals: 16,384 equal shares, and towards the highest scores ever finer ones (a thousandth of the pixels
    above), because precision and low false-positive rates live there. A score shared by many pixels keeps a bin of
    its own. Histograms of equal weight are merged pairwise, so their number grows with the logarithm of the pixels
    and a pixel is binned only that often; nothing depends on the order, the scale or the outliers of the scores, and
    any monotone map of the scores gives the same result. Each of the ``log2(pixels / 4 million)`` merges moves a
    rank by at most 1/16,384 of the pixels; measured errors are some 1e-6 (``tests/benchmarks/bench_metrics.py``).

    The per-region overlap (PRO) needs no region at query time: a pixel carries the weight 1 / (area of its region),
    and the mean overlap over regions at a threshold is the weight above it / number of regions. Regions are
    8-connected components of a mask.

    >>> histogram = PixelHistogram()
    >>> histogram.add(np.array([[0.1, 0.9], [0.2, 0.3]]), np.array([[False, True], [False, False]]))
    >>> histogram.auroc(), histogram.aupro()
    (1.0, 1.0)
    """

    def __init__(self) -> None:
        self._normal = _Summary(n_columns=1)
        self._anomalous = _Summary(n_columns=2)
        self._cached: _Ranking | None = None
        self.n_images = 0
        self.n_pixels = 0
        self.n_anomalous_pixels = 0
        self.n_regions = 0

    def add(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Count one picture.

        Args:
            anomaly_map: float ``(h, w)``, raw; brought to the mask's size by :func:`resize_map`.
            mask: bool or 0/1 ``(H, W)``, True = anomalous; all False on a normal picture.
        Raises:
            ValueError: no mask (None), a mask with other values than 0 and 1, a map that is not finite.
        """
        mask, region_of, area = _regions(mask)
        values = resize_map(anomaly_map, mask.shape)
        if len(area):
            self._anomalous.add(values[mask], 1.0 / area[region_of])
            self._normal.add(values[~mask])
        else:
            self._normal.add(values.flatten())  # a copy: the caller may reuse its array
        self._cached = None
        self.n_images += 1
        self.n_pixels += mask.size
        self.n_anomalous_pixels += len(region_of)
        self.n_regions += len(area)

    def auroc(self) -> float:
        """Pixel-level AUROC in [0, 1]; nan when all pixels are normal or all anomalous."""
        return self._ranking().auroc()

    def aupro(self, fpr_limit: float = 0.3) -> float:
        """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate: in [0, 1].

        The curve is interpolated linearly at the limit. nan without an anomalous or without a normal pixel.

        Args:
            fpr_limit: largest pixel false-positive rate integrated, in (0, 1].
        Raises:
            ValueError: ``fpr_limit`` is outside (0, 1].
        Source: Bergmann et al., IJCV 2021 (MVTec AD), per-region overlap.
        """
        return self._ranking().aupro(fpr_limit)

    def average_precision(self) -> float:
        """Pixel-level average precision in (0, 1]; nan when a class is missing."""
        return self._ranking().average_precision()

    def f1_max(self) -> F1Max:
        """The best pixel-level F1 over all thresholds, an upper bound chosen with the masks in hand."""
        return self._ranking().f1_max()

    def _ranking(self) -> _Ranking:
        if self._cached is None:
            self._cached = _rank(self._normal.points(), self._anomalous.points())
        return self._cached


def pixel_auroc(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> float:
    """Pixel-level AUROC over all pixels of all pictures.

    Args:
        maps: float ``(h, w)`` for each picture, raw, one scale for all; sizes may differ, generators are welcome.
        masks: bool ``(H, W)`` for each picture; leave out anomalous pictures without a mask.
    Returns:
        float in [0, 1]; nan when all pixels are normal or all anomalous.
    Raises:
        ValueError: see :meth:`PixelHistogram.add`; or there are more maps than masks or the reverse.
    """
    return _histogram(maps, masks).auroc()


def aupro(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray], fpr_limit: float = 0.3) -> float:
    """Standard AUPRO, see :meth:`PixelHistogram.aupro`; arguments and errors as :func:`pixel_auroc`."""
    _check_limit(fpr_limit)
    return _histogram(maps, masks).aupro(fpr_limit)


def aupro_reference(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """AUPRO as AnomalyCLIP's public code computes it, to compare with that paper's tables only.

    It is not the standard metric and reads lower: 200 thresholds from the smallest score (included) to the largest
    (excluded), points with a false-positive rate below 0.3 kept without interpolating at 0.3, and their rates
    stretched to [0, 1] before the trapezoid rule. Never print it in one table with :func:`aupro`.

    Args:
        maps: float ``(h, w)`` for each picture, read twice (a list, an array, or a lazy sequence; no generator).
        masks: bool ``(H, W)`` for each picture.
    Returns:
        float in [0, 1]; nan without an anomalous or a normal pixel, with constant maps, or with fewer than two
        different false-positive rates below 0.3.
    Raises:
        ValueError: see :func:`pixel_auroc`; or ``maps`` or ``masks`` can be read only once.
    Source: zqhang/AnomalyCLIP, metrics; same value as relabelling at each threshold.
    """
    if iter(maps) is maps or iter(masks) is masks:
        raise ValueError("aupro_reference reads maps and masks twice; pass a list or a sequence, not a generator.")
    # First pass: the range. The second pass sorts each picture once and looks the thresholds up.
    ends = [(values.min(), values.max()) for values in (resize_map(m, np.shape(k)) for m, k in _pairs(maps, masks))]
    low, high = (min(end[0] for end in ends), max(end[1] for end in ends)) if ends else (0.0, 0.0)
    thresholds = low + np.arange(200) * ((high - low) / 200)
    false_positives, overlap = np.zeros(200), np.zeros(200)
    n_normal = n_regions = 0
    for anomaly_map, mask in _pairs(maps, masks):
        mask, region_of, area = _regions(mask)
        values = resize_map(anomaly_map, mask.shape)
        normal = np.sort(values[~mask])
        false_positives += len(normal) - np.searchsorted(normal, thresholds, side="right")
        order = np.argsort(values[mask])
        weights = np.concatenate([[0.0], np.cumsum(1.0 / area[region_of][order])])
        overlap += weights[-1] - weights[np.searchsorted(values[mask][order], thresholds, side="right")]
        n_normal, n_regions = n_normal + len(normal), n_regions + len(area)
    if not n_normal or not n_regions:
        return float("nan")
    rate, overlap = false_positives[::-1] / n_normal, overlap[::-1] / n_regions
    rate, overlap = rate[rate < 0.3], overlap[rate < 0.3]
    if len(rate) == 0 or rate[-1] == rate[0]:
        return float("nan")
    rate = (rate - rate[0]) / (rate[-1] - rate[0])
    return float(np.trapezoid(overlap, rate))


@dataclass(frozen=True)
class ImageHistograms:
    """Score histograms of each picture over common bins: pixel metrics of any resample of the pictures, at once.

    For intervals by bootstrap over pictures; its point values differ by some 1e-4 from :class:`PixelHistogram`.

    Args:
        normal: float32 ``(n_images, n_bins)``, normal pixels, bins from low to high scores.
        anomalous: float32 ``(n_images, n_bins)``, anomalous pixels.
        region: float32 ``(n_images, n_bins)``, anomalous pixels, each weighing 1 / area of its region.
    """

    normal: np.ndarray
    anomalous: np.ndarray
    region: np.ndarray

    @property
    def n_images(self) -> int:
        return len(self.normal)

    def auroc(self, counts: ArrayLike | None = None) -> float:
        """Pixel AUROC of the pictures, picture ``i`` taken ``counts[i]`` times (once by default); nan as always."""
        return self._ranking(counts).auroc()

    def aupro(self, counts: ArrayLike | None = None, fpr_limit: float = 0.3) -> float:
        """Standard AUPRO of the pictures, picture ``i`` taken ``counts[i]`` times (once by default)."""
        return self._ranking(counts).aupro(fpr_limit)

    def _ranking(self, counts: ArrayLike | None) -> _Ranking:
        taken = np.ones(self.n_images) if counts is None else np.asarray(counts, dtype=np.float64)
        if taken.shape != (self.n_images,):
            raise ValueError(f"counts has shape {taken.shape}; pass one count for each of {self.n_images} pictures.")
        normal, anomalous, region = taken @ self.normal, taken @ self.anomalous, taken @ self.region
        at_least = np.cumsum(normal[::-1])[::-1]
        values = np.arange(len(normal))
        return _Ranking(values, anomalous, region, at_least - normal, at_least, float(at_least[0]), values - 1.0)


def image_histograms(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, n_bins: int = 1024) -> ImageHistograms:
    """Histograms of each picture for :class:`ImageHistograms`.

    The bins hold equal shares of all pixels, half of the edges taken from the normal and half from the anomalous
    ones, so the result does not depend on the scale of the scores.

    Args:
        maps: float ``(h, w)`` for each picture, read twice (no generator).
        masks: bool ``(H, W)`` for each picture.
        n_bins: number of bins; memory is ``12 * n_images * n_bins`` bytes.
    Raises:
        ValueError: see :func:`aupro_reference`; or no picture.
    """
    if iter(maps) is maps or iter(masks) is masks:
        raise ValueError("image_histograms reads maps and masks twice; pass a list or a sequence, not a generator.")
    whole = _histogram(maps, masks)
    if whole.n_images == 0:
        raise ValueError("image_histograms got no picture; pass at least one map with its mask.")
    classes = [points for points in (whole._normal.points(), whole._anomalous.points()) if len(points.values)]
    shares = np.linspace(0, 1, n_bins // len(classes), endpoint=False)
    cuts = [points.values[np.searchsorted(points.below[1:, 0], shares * points.below[-1, 0])] for points in classes]
    edges = np.unique(np.concatenate(cuts))[1:]  # pixels below the first cut do not exist
    rows = []
    for anomaly_map, mask in _pairs(maps, masks):
        mask, region_of, area = _regions(mask)
        values = resize_map(anomaly_map, mask.shape)
        points = _sorted_points(values[~mask]), _sorted_points(values[mask], 1.0 / area[region_of])
        places = [np.concatenate([[0], np.searchsorted(p.values, edges), [len(p.values)]]) for p in points]
        normal, anomalous = (np.diff(p.below[place], axis=0) for p, place in zip(points, places))
        rows.append(np.stack([normal[:, 0], anomalous[:, 0], anomalous[:, 1]]))
    table = np.stack(rows, axis=1).astype(np.float32)
    return ImageHistograms(normal=table[0], anomalous=table[1], region=table[2])


# ------------------------------------------------------------------------------------------------- inside


class _Points(NamedTuple):
    """Scores of one class in ascending order, with the weight below each: ``values (n,)``, ``below (n + 1, c)``."""

    values: np.ndarray
    below: np.ndarray


class _Ranking(NamedTuple):
    """What all threshold metrics need: the anomalous scores, and the normal weight above each of them."""

    values: np.ndarray  # (n,) anomalous scores, ascending
    count: np.ndarray  # (n,) anomalous pixels with this score
    region: np.ndarray  # (n,) the same, each pixel weighing 1 / area of its region
    above: np.ndarray  # (n,) normal pixels with a higher score
    at_least: np.ndarray  # (n,) normal pixels with this or a higher score
    n_normal: float
    next_lower: np.ndarray  # (n,) the next lower score of any pixel

    def auroc(self) -> float:
        n_anomalous = self.count.sum()
        if not n_anomalous or not self.n_normal:
            return float("nan")
        false_rate = (self.above + self.at_least) / (2 * self.n_normal)  # ties count half
        return float(np.clip(1 - self.count @ false_rate / n_anomalous, 0, 1))

    def aupro(self, fpr_limit: float) -> float:
        _check_limit(fpr_limit)
        n_regions = self.region.sum()
        if not n_regions or not self.n_normal:
            return float("nan")
        # A pixel adds its weight to the curve from the false-positive rate at which its score is reached. Where it
        # ties with normal pixels the curve rises linearly from `start` to `end`; the limit may cut that rise.
        start, end = self.above / self.n_normal, self.at_least / self.n_normal
        rise = np.maximum(end - start, np.finfo(float).tiny)
        cut = np.maximum(fpr_limit - start, 0) ** 2 / (2 * rise)
        area = np.where(end <= fpr_limit, fpr_limit - (start + end) / 2, cut)
        return float(np.clip(self.region @ area / (n_regions * fpr_limit), 0, 1))

    def average_precision(self) -> float:
        n_anomalous = self.count.sum()
        if not n_anomalous or not self.n_normal:
            return float("nan")
        found = self._found()
        return float(np.clip(self.count @ (found / (found + self.at_least)) / n_anomalous, 0, 1))

    def f1_max(self) -> F1Max:
        n_anomalous = self.count.sum()
        if not n_anomalous:
            return F1Max(float("nan"), float("nan"))
        found = self._found()
        f1 = 2 * found / (found + self.at_least + n_anomalous)
        best = int(np.argmax(f1))
        return F1Max(float(f1[best]), float(self.next_lower[best]))

    def _found(self) -> np.ndarray:
        """Anomalous pixels with this or a higher score: all of a tie, wherever it is cut."""
        below = np.concatenate([[0.0], np.cumsum(self.count)])
        return below[-1] - below[np.searchsorted(self.values, self.values, side="left")]


class _Summary:
    """Weighted scores of one class: raw up to a number of pixels, then equal-share histograms merged like a counter.

    Source of the merging scheme: Munro and Paterson, 1980; of finer bins at an end: Dunning's t-digest.
    """

    CAPACITY = 2**22
    SHARES = 2**14
    TAIL = 2**10

    def __init__(self, n_columns: int) -> None:
        self._n_columns = n_columns
        self._raw: list[tuple[np.ndarray, ...]] = []
        self._n_raw = 0
        self._levels: list[_Points | None] = []

    def add(self, values: np.ndarray, *weights: np.ndarray) -> None:
        self._raw.append((values, *weights))
        self._n_raw += len(values)
        if self._n_raw >= self.CAPACITY:
            carried = self._compressed(self._raw_points())
            self._raw, self._n_raw = [], 0
            for level, waiting in enumerate(self._levels):
                if waiting is None:
                    self._levels[level] = carried
                    return
                carried = self._compressed(_merged([waiting, carried]))
                self._levels[level] = None
            self._levels.append(carried)

    def points(self) -> _Points:
        return _merged([self._raw_points(), *(points for points in self._levels if points is not None)])

    def _raw_points(self) -> _Points:
        if not self._raw:
            return _Points(np.empty(0, np.float32), np.zeros((1, self._n_columns)))
        return _sorted_points(*(np.concatenate(parts) for parts in zip(*self._raw)))

    def _compressed(self, points: _Points) -> _Points:
        values, below = points
        total = below[-1]
        cuts = np.outer(np.arange(self.SHARES) / self.SHARES, total)
        tail = total[0] * (1 - np.exp(-np.arange(self.TAIL * np.log(total[0])) / self.TAIL))
        at = [np.searchsorted(below[1:, column], cuts[:, column], side="right") for column in range(len(total))]
        at = np.concatenate([*at, np.searchsorted(below[1:, 0], tail, side="right")])
        # A bin begins at the first pixel with the cut's score and one ends after the last: equal scores stay in one
        # bin, and a score with a large share gets a bin of its own.
        # Marks instead of np.unique, which hashes and took 5/6 of the time.
        mark = np.zeros(len(values) + 1, dtype=bool)
        mark[np.minimum(at, len(values) - 1)] = True
        cut = values[mark[:-1]]
        mark[:] = False
        for side in ("left", "right"):
            mark[np.searchsorted(values, cut, side=side)] = True
        mark[[0, len(values)]] = True
        bounds = np.flatnonzero(mark)
        below = below[bounds]
        middle = (bounds[:-1] + bounds[1:] - 1) // 2
        return _Points(values[middle], below)


def _sorted_points(values: np.ndarray, *weights: np.ndarray) -> _Points:
    """Scores in ascending order; the first weight column counts pixels, further ones are given."""
    counted = np.arange(len(values) + 1, dtype=np.float64)[:, None]
    if not weights:
        return _Points(np.sort(values), counted)  # several times faster than sorting with an index
    order = np.argsort(values)
    columns = [np.concatenate([[0.0], np.cumsum(column[order])]) for column in weights]
    return _Points(values[order], np.column_stack([counted, *columns]))


def _merged(parts: Sequence[_Points]) -> _Points:
    parts = [points for points in parts if len(points.values)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    values = np.concatenate([points.values for points in parts])
    weights = np.concatenate([np.diff(points.below, axis=0) for points in parts])
    order = np.argsort(values, kind="stable")
    below = np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(weights[order], axis=0)])
    return _Points(values[order], below)


def _rank(normal: _Points, anomalous: _Points) -> _Ranking:
    n_normal = normal.below[-1, 0]
    left = np.searchsorted(normal.values, anomalous.values, side="left")
    right = np.searchsorted(normal.values, anomalous.values, side="right")
    weights = np.diff(anomalous.below, axis=0)
    own_left = np.searchsorted(anomalous.values, anomalous.values, side="left")
    return _Ranking(
        values=anomalous.values,
        count=weights[:, 0],
        region=weights[:, -1],
        above=n_normal - normal.below[right, 0],
        at_least=n_normal - normal.below[left, 0],
        n_normal=float(n_normal),
        next_lower=np.maximum(_before(normal.values, left), _before(anomalous.values, own_left)),
    )


def _before(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The value before each place in a sorted array; ``-inf`` before the first."""
    if not len(values):
        return np.full(len(places), -np.inf)
    return np.where(places > 0, values[np.maximum(places - 1, 0)], -np.inf)


def _regions(mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask as bool, the region number of each anomalous pixel in row order, and the area of each region."""
    if mask is None:
        raise ValueError(
            "A mask is None. Pass an all-False mask for a normal picture, and leave an anomalous picture without a "
            "mask out of the pixel metrics."
        )
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"A mask has shape {mask.shape}; expected (H, W), one mask for each picture.")
    if mask.dtype != bool:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"A mask holds values from {mask.min()} to {mask.max()}; allowed are False and True (or 0 and 1). "
                "Read masks with helpers.data.images.load_mask, which states its threshold."
            )
        mask = mask.astype(bool)
    if not mask.any():
        return mask, np.empty(0, np.intp), np.empty(0, np.intp)
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    region_of = labels[mask] - 1
    return mask, region_of, np.bincount(region_of)


def _histogram(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> PixelHistogram:
    histogram = PixelHistogram()
    for anomaly_map, mask in _pairs(maps, masks):
        histogram.add(anomaly_map, mask)
    return histogram


_MISSING = object()


def _pairs(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    for position, (anomaly_map, mask) in enumerate(zip_longest(maps, masks, fillvalue=_MISSING)):
        if anomaly_map is _MISSING or mask is _MISSING:
            more = "masks than maps" if anomaly_map is _MISSING else "maps than masks"
            raise ValueError(f"There are more {more}: only {position} have both. Pass one mask for each map.")
        yield anomaly_map, mask


def _check_limit(fpr_limit: float) -> None:
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit is {fpr_limit}; a rate above 0 and at most 1 is allowed, for example 0.3.")


def _checked_labels(labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or (labels.dtype != bool and not np.isin(labels, (0, 1)).all()):
        raise ValueError(
            f"Labels and verdicts must be a list of False/True or 0/1, got shape {labels.shape}, type {labels.dtype}."
        )
    return labels.astype(bool)


def _has_both(labels: np.ndarray) -> bool:
    return bool(labels.any() and not labels.all())
