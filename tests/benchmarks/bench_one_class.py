"""Memory bank: normalise once and multiply, against one broadcast cosine per query as in the public code.

Run: ``python tests/benchmarks/bench_one_class.py`` (about 20 s). Prints milliseconds, the ratio, and the largest
difference of the two results.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.clip import one_class
from helpers.clip.features import Features
from helpers.records import Sample

SHAPES = {
    "mini: 196 tokens, bank 6,000 x 384": (1, 14, 6_000, 384),
    "AnomalyGPT: 256 tokens, bank 1,024 x 1,280": (1, 16, 1_024, 1_280),
    "ViT-L/14@336: 576 tokens, bank 2,304 x 1,024": (1, 24, 2_304, 1_024),
}


def main() -> None:
    for name, shape in SHAPES.items():
        measure(name, *shape)


def measure(name: str, n: int, side: int, n_bank: int, width: int) -> None:
    import torch

    rng = np.random.default_rng(0)
    n_pictures = -(-n_bank // side**2)
    normals = _features(rng.normal(size=(n_pictures, side, side, width)), "n")
    test = _features(rng.normal(size=(n, side, side, width)), "t")
    samples = [Sample(Path(f"{i}.png"), "a", False, split="train", group=str(i)) for i in range(n_pictures)]
    detector = one_class.PatchKnn(max_bank_rows=n_bank).fit(one_class.Rows.of(samples, normals))
    bank = detector._bank
    few = torch.from_numpy(test.patches.reshape(-1, width)).float()[:16]  # the broadcast is slow: 16, scaled up

    def broadcast() -> torch.Tensor:
        return torch.stack([torch.nn.functional.cosine_similarity(query[None], bank).max() for query in few])

    ours = _best(lambda: detector.look(test), 5)
    theirs = _best(broadcast, 2) * n * side**2 / len(few)
    error = np.abs(1 - broadcast().numpy() - detector.look(test)[1].ravel()[: len(few)]).max()
    times = f"{ours * 1e3:.1f} ms, broadcast {theirs * 1e3:.0f} ms, ratio {theirs / ours:.0f}"
    print(f"{name}: {times}, largest difference {error:.1e}")


def _features(patches: np.ndarray, tag: str) -> Features:
    n = len(patches)
    part = np.ones((n, 2), np.float32)
    return Features(tuple(f"{tag}{i}" for i in range(n)), part, part, patches.astype(np.float16), part)


def _best(function, n_repeats: int) -> float:
    times = []
    for _ in range(n_repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
