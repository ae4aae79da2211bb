"""Pixel metrics: the pixel table against the published loop over thresholds, in seconds and in error.

python tests/benchmarks/bench_metrics.py; only the ratio inside one run means anything.
"""

from __future__ import annotations

import sys
from pathlib import Path
from timeit import repeat

from sklearn.metrics import roc_auc_score

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import test_metrics as exact

from helpers import results
from helpers.judge import metrics, statistics

if __name__ == "__main__":
    maps, masks = exact.blobs(0, n=50)
    table = metrics.pixel_table(maps, masks)
    draws = statistics.redraws([bool(mask.any()) for mask in masks], range(50))
    ours = min(repeat(lambda: metrics.pixel_metrics(metrics.pixel_table(maps, masks)), number=1, repeat=5))
    (drawn,) = repeat(lambda: metrics.pixel_metrics(table, draws), number=1, repeat=1)
    (published,) = repeat(lambda: exact.published_aupro(maps, masks), number=1, repeat=1)
    auroc, aupro = metrics.pixel_metrics(table)
    print(f"{results.machine()}; 50 maps of 256 x 256")
    print(f"pixel AUROC {auroc:.6f}, error {abs(auroc - roc_auc_score(*exact.flat(masks, maps))):.1e}")
    print(f"AUPRO       {aupro:.6f}, error {abs(aupro - exact.aupro_by_definition(maps, masks, 0.3)):.1e}")
    print(f"table and both metrics {ours:.3f} s; 1,000 bootstrap draws {drawn:.2f} s; kept per picture", end=" ")
    print(f"{table.nbytes / 50 / 1024:.0f} KiB; published AUPRO {published:.1f} s: {published / ours:.0f} times")
