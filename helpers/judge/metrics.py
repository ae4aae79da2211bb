"""How well scores find anomalous pictures, and how well anomaly maps find anomalous pixels.

Scores and maps are raw, higher = more anomalous. A metric that is not defined (only one class, no anomalous pixel) is
nan; a score or map that is not finite is an error. A picture that differs as a whole has no pixel ground truth.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import ArrayLike

SIDE = 256
"""Maps and masks are compared at this many pixels a side: a large photograph weighs no more than a small one."""
_N_BINS = 2048


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: how often an anomalous picture scores above a genuine one (ties count half), in [0, 1].

    Scores are float ``(n,)``, higher = more anomalous, labels bool or 0/1 ``(n,)``, True = anomalous; nan when one
    class is missing. ``ValueError``: lengths differ, a label is not 0/1, or a score is not finite.

    >>> image_auroc([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1])
    0.875
    """
    scores, labels = checked_scores(scores, labels)
    if labels.all() or not labels.any():
        return float("nan")
    places = [np.searchsorted(np.sort(scores[~labels]), scores[labels], side=side) for side in ("left", "right")]
    return float(np.mean(places) / (~labels).sum())


def average_precisions(scores: ArrayLike, labels: ArrayLike, counts: np.ndarray) -> np.ndarray:
    """Average precision of many draws of the same pictures: float64 ``(draws,)``, nan where a draw lacks a class.

    Precision at each anomalous picture, weighted by the step in recall; chance is the share of anomalous pictures.
    Arguments and errors as :func:`image_auroc`; ``counts``, ``(draws, n)``, says how often each draw has each picture.
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


def pixel_table(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> np.ndarray:
    """Pixels counted by picture and score: all that pixel metrics and their bootstrap need.

    Maps and masks are brought to 256 x 256 (maps bilinearly, masks by the share of covered area). The bins hold equal
    shares of the pixels, half of them of the anomalous ones: any monotone map of the scores gives the same table, and
    against the exact values AUROC is off by 2e-6 and AUPRO by 2e-5.

    Args:
        maps: float ``(h, w)`` for each picture, raw, one scale for all; sizes may differ, generators are welcome.
        masks: bool or 0/1 ``(H, W)`` for each picture, True = anomalous; all False on a genuine picture.
    Returns:
        float64 ``(3, pictures, bins)``, from the highest scores down: genuine pixels; anomalous pixels; those weighing
        1 / area of their region (8-connected). ``ValueError``: no picture, too few masks, a mask or map that is none.
    """
    sorted_pixels, pools = [], ([], [])
    for anomaly_map, mask in zip(maps, masks, strict=True):
        small, marked = _small_map(anomaly_map), _small_mask(mask)
        region = cv2.connectedComponents(marked.view(np.uint8))[1][marked]
        weight = 1 / np.maximum(np.bincount(region, minlength=1), 1)[region]
        found = small[marked]
        order = np.argsort(found)
        anomalous = found[order]
        genuine = np.sort(np.where(marked, np.inf, small), axis=None)[: small.size - len(found)]
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


def pixel_metrics(table: np.ndarray, counts: np.ndarray | None = None, fpr_limit: float = 0.3) -> np.ndarray:
    """Pixel AUROC and AUPRO of a :func:`pixel_table`: float64 ``(2,)`` in [0, 1], ``(draws, 2)`` when ``counts``,
    ``(draws, pictures)``, says how often each draw has each picture; nan without anomalous or without genuine pixels.

    AUPRO is the area under the per-region-overlap curve up to a false-positive rate (``fpr_limit`` in (0, 1], where it
    is interpolated), divided by that rate. Source: Bergmann et al., IJCV 2021 (MVTec AD), per-region overlap.
    """
    taken = np.ones((1, table.shape[1])) if counts is None else counts.astype(np.float64)
    curves = np.cumsum(np.matmul(taken, table), axis=2)  # (3, draws, bins)
    with np.errstate(invalid="ignore"):
        fpr, *found = np.insert(curves / curves[:, :, -1:], 0, 0, axis=2)
    steps, areas = np.diff(fpr, axis=1), []
    for y, limit in zip(found, (1.0, fpr_limit)):
        inside = np.diff(np.minimum(fpr, limit), axis=1)  # the part of each step that counts
        share = np.divide(inside, steps, out=np.zeros_like(steps), where=steps > 0)
        areas.append((inside * (y[:, :-1] + np.diff(y, axis=1) * share / 2)).sum(axis=1) / limit)
    return np.stack(areas, axis=1) if counts is not None else np.array(areas)[:, 0]


def pixel_auroc(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> float:
    """Pixel-level AUROC over all pixels of all pictures; arguments and errors as :func:`pixel_table`.

    >>> mask = np.kron([[0, 1], [0, 0]], np.ones((128, 128)))
    >>> pixel_auroc([2 * mask + 1], [mask]), aupro([2 * mask + 1], [mask])
    (1.0, 1.0)
    """
    return float(pixel_metrics(pixel_table(maps, masks))[0])


def aupro(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray], fpr_limit: float = 0.3) -> float:
    """Standard AUPRO, see :func:`pixel_metrics`; arguments and errors as :func:`pixel_table`."""
    return float(pixel_metrics(pixel_table(maps, masks), fpr_limit=fpr_limit)[1])


def _small_map(anomaly_map: np.ndarray) -> np.ndarray:
    values = np.asarray(anomaly_map, dtype=np.float32)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        what = f"shape {values.shape} has {(~np.isfinite(values)).sum()} values that are not finite"
        raise ValueError(f"An anomaly map of {what}; expected numbers (H, W), one map for each picture.")
    return cv2.resize(np.ascontiguousarray(values), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)


def _small_mask(mask: np.ndarray) -> np.ndarray:
    if np.ndim(mask) != 2 or not (np.asarray(mask) == np.asarray(mask, dtype=bool)).all():
        what = "None" if mask is None else f"of shape {np.shape(mask)} with values up to {np.max(mask)}"
        raise ValueError(f"A mask is {what}; expected False and True (H, W). Leave pictures without a mask out.")
    covered = cv2.resize(np.asarray(mask, dtype=np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    small = covered >= 0.5
    return small if small.any() or not np.any(mask) else covered > 0  # a hair-thin mark must not vanish
