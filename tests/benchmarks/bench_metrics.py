"""Pixel metrics: the pixel table against the published loop over thresholds, in seconds and in error.

python tests/benchmarks/bench_metrics.py; only the ratio inside one run means anything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from sklearn.metrics import roc_auc_score

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import test_metrics as exact

from helpers import results
from helpers.judge import metrics, statistics

N = 50


def timed(function: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


if __name__ == "__main__":
    maps, masks = exact.blobs(0, n=N)
    table, seconds = min((timed(lambda: metrics.pixel_table(maps, masks)) for _ in range(5)), key=lambda one: one[1])
    (auroc, aupro), more = timed(lambda: metrics.pixel_metrics(table))
    print(f"{results.machine()}; {N} maps of 256 x 256")
    print(f"pixel AUROC {auroc:.6f}, error {abs(auroc - roc_auc_score(*exact.flat(masks, maps))):.1e}")
    print(f"AUPRO       {aupro:.6f}, error {abs(aupro - exact.aupro_by_definition(maps, masks, 0.3)):.1e}")
    draws = statistics.redraws([bool(mask.any()) for mask in masks], range(N))
    drawn, slow = (timed(one)[1] for one in (lambda: metrics.pixel_metrics(table, draws),
                                             lambda: exact.published_aupro(maps, masks)))  # fmt: skip
    print(
        f"table and both metrics {seconds + more:.3f} s; 1,000 bootstrap draws {drawn:.2f} s; kept per picture "
        f"{table.nbytes / N / 1024:.0f} KiB; published AUPRO {slow:.1f} s: {slow / (seconds + more):.0f} times"
    )
