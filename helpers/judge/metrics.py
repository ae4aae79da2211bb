"""How well scores find anomalous pictures, and how well anomaly maps find anomalous pixels.

Scores and maps are raw, higher = more anomalous. A metric that is not defined (only one class, no anomalous pixel) is
nan; a score or map that is not finite is an error. Intervals and tests are in :mod:`helpers.judge.statistics`.

Pixel metrics count the pictures that are passed: genuine ones with an all-False mask, and of the anomalous ones only
those with a mask. A picture that is anomalous as a whole (mirrored, another hand) has no pixel ground truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import cv2
import numpy as np
from numpy.typing import ArrayLike

SIDE = 256
"""Maps and masks are compared at this many pixels a side: a large photograph weighs no more than a small one."""
_N_BINS = 2048


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: how often an anomalous picture scores above a genuine one (ties count half).

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
    return float(roc_auc_score(labels, scores)) if labels.any() and not labels.all() else float("nan")


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Precision at each anomalous picture, weighted by the step in recall; chance is the share of anomalous pictures.

    Arguments and errors as :func:`image_auroc`; in (0, 1], nan when one class is missing.
    """
    return float(average_precisions(scores, labels, np.ones((1, len(scores)), int))[0])


def average_precisions(scores: ArrayLike, labels: ArrayLike, counts: np.ndarray) -> np.ndarray:
    """Average precision of many draws of the same pictures: float64 ``(draws,)``, nan where a draw lacks a class.

    ``counts``, int ``(draws, n)``, says how often each draw has each picture, see
    :func:`helpers.judge.statistics.redraws`.
    """
    scores, labels = checked_scores(scores, labels)
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    taken = counts[:, order].astype(np.float64)
    hits = np.cumsum(taken * labels[order], axis=1)[:, last_of_ties]
    alarms = np.cumsum(taken * ~labels[order], axis=1)[:, last_of_ties]
    precision = hits / np.maximum(hits + alarms, 1)
    total = np.where((hits[:, -1] > 0) & (alarms[:, -1] > 0), hits[:, -1], np.nan)
    return (np.diff(hits, axis=1, prepend=0) * precision).sum(axis=1) / total


def checked_scores(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 ``(n,)`` and labels as bool ``(n,)``, or a ``ValueError`` that says what is wrong."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape or not np.isin(labels, (0, 1)).all():
        shapes = f"Scores have shape {scores.shape}, labels {labels.shape}"
        raise ValueError(f"{shapes}; pass one score and one label (False/True or 0/1) for each picture.")
    if not np.isfinite(scores).all():
        first = f"first at position {int(np.argmin(np.isfinite(scores)))}"
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite, {first}.")
    return scores, labels.astype(bool)


def pixel_table(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray | None]) -> np.ndarray:
    """Pixels counted by picture and score: all that pixel metrics and their bootstrap need.

    Maps and masks are brought to 256 x 256 (maps bilinearly, masks by the share of covered area). The bins hold equal
    shares of the pixels, half of them of the anomalous ones, so that no range has to be known and any monotone map of
    the scores gives the same table; against the exact values AUROC is off by 2e-6 and AUPRO by 2e-5.

    Args:
        maps: float ``(h, w)`` for each picture, raw, one scale for all; sizes may differ, generators are welcome.
        masks: bool or 0/1 ``(H, W)`` for each picture, True = anomalous; all False on a genuine picture.
    Returns:
        float64 ``(3, pictures, bins)``, from the highest scores down: genuine pixels; anomalous pixels; anomalous
        pixels, each weighing 1 / area of its region (8-connected), which makes every region count the same.
    Raises:
        ValueError: no picture, a mask that is None or holds other values than 0 and 1, a map that is not finite, more
            maps than masks or the reverse.
    """
    missing = object()
    sorted_pixels, pools = [], ([], [])
    for place, (anomaly_map, mask) in enumerate(zip_longest(maps, masks, fillvalue=missing)):
        if anomaly_map is missing or mask is missing:
            raise ValueError(f"Pass one mask for each map: only {place} pictures have both.")
        small, marked = _small_map(anomaly_map), _small_mask(mask)
        region = cv2.connectedComponents(marked.astype(np.uint8))[1][marked]
        weight = 1 / np.maximum(np.bincount(region, minlength=1), 1)[region]
        order = np.argsort(small[marked])
        genuine, anomalous = np.sort(small[~marked]), small[marked][order]
        sorted_pixels.append((genuine, anomalous, np.append(0, np.cumsum(weight[order]))))
        for pool, pixels in zip(pools, (genuine, anomalous)):
            pool.append(pixels[:: max(1, len(pixels) // _N_BINS)])
    if not sorted_pixels:
        raise ValueError("Pixel metrics need at least one picture; pass maps with their masks.")
    shares = np.linspace(0, 1, _N_BINS // 2)
    cuts = [np.sort(np.concatenate(pool)) for pool in pools]
    edges = np.unique(np.concatenate([cut[(shares * (len(cut) - 1)).astype(int)] for cut in cuts if len(cut)]))
    rows = []
    for genuine, anomalous, weights in sorted_pixels:
        below, found = (np.append(np.searchsorted(pixels, edges), len(pixels)) for pixels in (genuine, anomalous))
        rows.append([np.diff(counted, prepend=0) for counted in (below, found, weights[found])])
    return np.moveaxis(np.array(rows, np.float64), 1, 0)[:, :, ::-1]


def pixel_metrics(table: np.ndarray, counts: ArrayLike | None = None, fpr_limit: float = 0.3) -> tuple[float, float]:
    """Pixel AUROC and AUPRO of a :func:`pixel_table`, in [0, 1]; nan without anomalous or without genuine pixels.

    AUPRO is the area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    Args:
        table: from :func:`pixel_table`.
        counts: ``(pictures,)``, take picture ``i`` that often (a bootstrap draw); once each by default.
        fpr_limit: largest pixel false-positive rate integrated, in (0, 1]; the curve is interpolated there.
    Raises:
        ValueError: ``fpr_limit`` is outside (0, 1].
    Source: Bergmann et al., IJCV 2021 (MVTec AD), per-region overlap.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit is {fpr_limit}; a rate above 0 and at most 1 is allowed, for example 0.3.")
    taken = np.ones(table.shape[1]) if counts is None else np.asarray(counts, dtype=np.float64)
    genuine, anomalous, region = np.cumsum(taken @ table, axis=1)
    if not genuine[-1] or not anomalous[-1]:
        return float("nan"), float("nan")
    fpr = np.append(0, genuine / genuine[-1])

    def area(values: np.ndarray, limit: float) -> float:
        y, inside = np.append(0, values / values[-1]), fpr <= limit
        ends = np.append(fpr[inside], limit), np.append(y[inside], np.interp(limit, fpr, y))
        return float(np.trapezoid(ends[1], ends[0]) / limit)

    return area(anomalous, 1.0), area(region, fpr_limit)


def pixel_auroc(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> float:
    """Pixel-level AUROC over all pixels of all pictures; arguments and errors as :func:`pixel_table`.

    >>> mask = np.kron([[0, 1], [0, 0]], np.ones((128, 128)))
    >>> pixel_auroc([2 * mask + 1], [mask]), aupro([2 * mask + 1], [mask])
    (1.0, 1.0)
    """
    return pixel_metrics(pixel_table(maps, masks))[0]


def aupro(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray], fpr_limit: float = 0.3) -> float:
    """Standard AUPRO, see :func:`pixel_metrics`; arguments and errors as :func:`pixel_table`."""
    return pixel_metrics(pixel_table(maps, masks), fpr_limit=fpr_limit)[1]


def _small_map(anomaly_map: np.ndarray) -> np.ndarray:
    values = np.asarray(anomaly_map, dtype=np.float32)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"An anomaly map of shape {values.shape} has {(~np.isfinite(values)).sum()} values that are not finite; "
            "expected (H, W) and numbers, one map for each picture (float16 overflows above 65504)."
        )
    return cv2.resize(np.ascontiguousarray(values), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)


def _small_mask(mask: np.ndarray | None) -> np.ndarray:
    if mask is None or np.ndim(mask) != 2 or not np.isin(mask, (0, 1)).all():
        what = "None" if mask is None else f"of shape {np.shape(mask)} with values up to {np.max(mask)}"
        raise ValueError(
            f"A mask is {what}; expected (H, W) of False and True, all False for a genuine picture. Leave anomalous "
            "pictures without a mask out, and read masks with helpers.data.images.load_mask."
        )
    covered = cv2.resize(np.asarray(mask, dtype=np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    small = covered >= 0.5
    return small if small.any() or not np.any(mask) else covered > 0  # a hair-thin mark must not vanish
