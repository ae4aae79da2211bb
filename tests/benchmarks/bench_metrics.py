"""Pixel metrics: the pixel table against the textbook loop, in seconds and in error.

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
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.judge import metrics, statistics


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--maps", type=int, default=50)
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    maps, masks = make_maps(arguments.maps, arguments.size)
    print(f"machine: {os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"NumPy {np.__version__}; {arguments.maps} maps of {arguments.size} x {arguments.size}")
    table, seconds = timed(lambda: metrics.pixel_table(maps, masks), 5)
    (auroc, aupro), more = timed(lambda: metrics.pixel_metrics(table), 5)
    scores, truth = np.concatenate([m.ravel() for m in maps]), np.concatenate([k.ravel() for k in masks])
    print(f"pixel AUROC {auroc:.6f}, error {abs(auroc - roc_auc_score(truth, scores)):.1e}")
    print(f"AUPRO       {aupro:.6f}, error {abs(aupro - exact_aupro(maps, masks)):.1e}")
    draws = statistics.redraws([bool(mask.any()) for mask in masks], range(len(masks)))
    _, drawn = timed(lambda: [metrics.pixel_metrics(table, counts) for counts in draws], 1)
    _, slow = timed(lambda: textbook_aupro(maps, masks), 1)
    print(
        f"table and both metrics {seconds + more:.3f} s; 1,000 bootstrap draws {drawn:.2f} s; kept per picture ", end=""
    )
    print(
        f"{table.nbytes / len(maps) / 1024:.0f} KiB; textbook AUPRO {slow:.1f} s: {slow / (seconds + more):.0f} times"
    )


if __name__ == "__main__":
    main()
