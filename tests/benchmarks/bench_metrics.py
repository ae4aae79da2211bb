"""Pixel metrics: the pixel table against the published loop over thresholds, in seconds and in error.

python tests/benchmarks/bench_metrics.py [number of maps, default 50]; only the ratio inside one run means anything.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sklearn.metrics import roc_auc_score

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import test_metrics as exact

from helpers import results
from helpers.judge import metrics, statistics


def timed(function: Callable[[], object], repeats: int = 1) -> tuple[object, float]:
    best, value = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        value = function()
        best = min(best, time.perf_counter() - start)
    return value, best


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    maps, masks = exact.blobs(0, n=n)
    print(f"{results.machine()}, Python {platform.python_version()}; {n} maps of 256 x 256")
    table, seconds = timed(lambda: metrics.pixel_table(maps, masks), 5)
    (auroc, aupro), more = timed(lambda: metrics.pixel_metrics(table), 5)
    scores, truth = exact.flat(maps, masks)
    print(f"pixel AUROC {auroc:.6f}, error {abs(auroc - roc_auc_score(truth, scores)):.1e}")
    print(f"AUPRO       {aupro:.6f}, error {abs(aupro - exact.aupro_by_definition(maps, masks, 0.3)):.1e}")
    draws = statistics.redraws([bool(mask.any()) for mask in masks], range(n))
    _, drawn = timed(lambda: metrics.pixel_metrics(table, draws))
    _, slow = timed(lambda: exact.published_aupro(maps, masks))
    print(f"table and both metrics {seconds + more:.3f} s; 1,000 bootstrap draws {drawn:.2f} s; ", end="")
    print(f"kept per picture {table.nbytes / n / 1024:.0f} KiB; ", end="")
    print(f"published AUPRO {slow:.1f} s: {slow / (seconds + more):.0f} times")


if __name__ == "__main__":
    main()
