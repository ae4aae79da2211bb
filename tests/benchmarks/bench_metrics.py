"""Pixel metrics: the streaming form against the textbook loop, in seconds and in error.

    python tests/benchmarks/bench_metrics.py [--maps 50] [--size 256]

The textbook loop is written here from its description: at each of 200 thresholds it labels every mask again and sums
every region's pixels. Only the ratio inside one run means anything; the machine is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import measure
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.judge import metrics


def make_maps(n: int, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Smooth maps with moderate success on a few blobs of each mask; every fourth picture is normal."""
    generator = np.random.default_rng(0)
    maps, masks = [], []
    for i in range(n):
        field = ndimage.gaussian_filter(generator.normal(size=(size, size)), size / 20)
        mask = field > np.quantile(field, 0.97) if i % 4 else np.zeros((size, size), bool)
        noise = ndimage.gaussian_filter(generator.normal(size=(size, size)), 4)
        maps.append((noise / noise.std() + 1.2 * mask).astype(np.float32))
        masks.append(mask)
    return maps, masks


def textbook_aupro(maps: list[np.ndarray], masks: list[np.ndarray], n_thresholds: int = 200) -> float:
    scores, truth = np.stack(maps), np.stack(masks)
    low, high = scores.min(), scores.max()
    rates, overlaps = [], []
    for step in range(n_thresholds):
        found = scores > low + step * (high - low) / n_thresholds
        covered = []
        for picture, mask in zip(found, truth):
            for region in measure.regionprops(measure.label(mask)):
                rows, columns = region.coords.T
                covered.append(picture[rows, columns].sum() / region.area)
        overlaps.append(np.mean(covered))
        rates.append((found & ~truth).sum() / (~truth).sum())
    rates, overlaps = np.array(rates)[::-1], np.array(overlaps)[::-1]
    kept = rates < 0.3
    rates = (rates[kept] - rates[kept].min()) / (rates[kept].max() - rates[kept].min())
    return float(np.trapezoid(overlaps[kept], rates))


def exact_aupro(maps: list[np.ndarray], masks: list[np.ndarray], limit: float = 0.3) -> float:
    """The definition with every score as a threshold: one sort of all pixels, nothing binned."""
    scores, truth, weight = [], [], []
    n_regions = 0
    for anomaly_map, mask in zip(maps, masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        area = np.bincount(labels.ravel())
        scores.append(anomaly_map.ravel())
        truth.append(mask.ravel())
        weight.append(np.where(mask, 1 / area[labels], 0).ravel())
        n_regions += count
    scores, truth, weight = map(np.concatenate, (scores, truth, weight))
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    rate = np.append(0, (np.cumsum(~truth[order]) / (~truth).sum())[last])
    overlap = np.append(0, (np.cumsum(weight[order]) / n_regions)[last])
    inside = rate <= limit
    return float(np.trapezoid([*overlap[inside], np.interp(limit, rate, overlap)], [*rate[inside], limit]) / limit)


def timed(function: Callable[[], object], repeats: int) -> tuple[object, float]:
    best, value = np.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        value = function()
        best = min(best, time.perf_counter() - start)
    return value, best


def all_metrics(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    histogram = metrics.PixelHistogram()
    for anomaly_map, mask in zip(maps, masks):
        histogram.add(anomaly_map, mask)
    return {
        "pixel AUROC": histogram.auroc(),
        "AUPRO": histogram.aupro(),
        "pixel AP": histogram.average_precision(),
        "F1 max": histogram.f1_max().value,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--maps", type=int, default=50)
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    maps, masks = make_maps(arguments.maps, arguments.size)
    print(f"machine: {os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"NumPy {np.__version__}; {arguments.maps} maps of {arguments.size} x {arguments.size}")

    scores, truth = np.concatenate([m.ravel() for m in maps]), np.concatenate([k.ravel() for k in masks])
    exact = {
        "pixel AUROC": roc_auc_score(truth, scores),
        "AUPRO": exact_aupro(maps, masks),
        "pixel AP": average_precision_score(truth, scores),
    }
    streamed, seconds = timed(lambda: all_metrics(maps, masks), 9)
    capacity = metrics._Summary.CAPACITY
    metrics._Summary.CAPACITY = scores.size // 4  # less memory than the set needs: summaries are merged
    merged, merged_seconds = timed(lambda: all_metrics(maps, masks), 9)
    metrics._Summary.CAPACITY = capacity
    reference, reference_seconds = timed(lambda: metrics.aupro_reference(maps, masks), 3)
    textbook, textbook_seconds = timed(lambda: textbook_aupro(maps, masks), 1)

    print(f"{'':34}{'seconds':>9}{'ratio':>8}")
    for name, took in (
        ("textbook AUPRO loop", textbook_seconds),
        ("aupro_reference (same value)", reference_seconds),
        ("PixelHistogram, four metrics", seconds),
        ("PixelHistogram, merged summaries", merged_seconds),
    ):
        print(f"{name:34}{took:9.3f}{textbook_seconds / took:7.0f}x")
    print(f"textbook {textbook:.6f}, aupro_reference {reference:.6f}, difference {abs(textbook - reference):.1e}")
    for name, value in exact.items():
        errors = abs(streamed[name] - value), abs(merged[name] - value)
        print(f"{name:12} exact {value:.6f}  error streamed {errors[0]:.1e}, merged {errors[1]:.1e}")
        assert max(errors) < 1e-4, name
    ratio = textbook_seconds / seconds
    print(f"goal: at least 100x, error below 1e-4: {'reached' if ratio >= 100 else 'NOT reached'} ({ratio:.0f}x)")


if __name__ == "__main__":
    main()
