"""Results on a tiny dataset, written the real way: scores are chosen so that metrics can be counted by hand."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiny_dataset

from helpers import data, files, results
from helpers.judge import comparison
from helpers.records import Sample, Scored

SHAPE = (36, 24)
CATEGORIES = ("harbour", "portrait")
KINDS = ("good", "good", "good", "good", "box", "box", "stain", "replica")
SCORES: Mapping[str, Mapping[str, Sequence[float]]] = {
    # harbour: anomalies beat 2, 4, 4, 0 of 4 normals -> AUROC 10/16; above 3.5: one normal, two anomalies
    # portrait: every anomaly beats every normal -> AUROC 1; above 30: no normal, three anomalies
    "clip_lof": {"harbour": (1, 2, 3, 4, 2.5, 5, 6, 0), "portrait": (10, 11, 12, 13, 50, 60, 70, 20)},
    # harbour: 4, 4, 4, 4 -> 1; portrait: 0 -> 0
    "anomalyclip": {"harbour": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "portrait": (5, 6, 7, 8, 1, 2, 3, 4)},
}
THRESHOLDS = {"clip_lof": {"harbour": 3.5, "portrait": 30.0}, "anomalyclip": {"harbour": 0.45, "portrait": 8.5}}


def make_dataset(
    folder: Path, *, kinds: Sequence[str] = KINDS, categories: Sequence[str] = CATEGORIES, repeat: int = 1
) -> data.Dataset:
    """A dataset with these kinds of test pictures, each ``repeat`` times, and three to learn from."""
    plan = {"train": ["good"] * 3, "test": [*kinds] * repeat}
    return tiny_dataset.write_dataset(folder, categories, plan, shape=SHAPE)


def write_result(
    folder: Path, dataset: data.Dataset, method: str, scores: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, float], *, with_maps: bool = False, answer: str = "", seconds: float = 0.5,
) -> Path:  # fmt: skip
    """Write a method's predictions with :func:`results.predict`; maps are the mask plus a little noise."""
    rng, left = np.random.default_rng(0), {category: list(values) for category, values in scores.items()}

    def score(category: str, samples: Sequence[Sample]) -> list[Scored]:
        return [Scored(float(left[category].pop(0)), a_map(sample), seconds, answer) for sample in samples]

    def a_map(sample: Sample) -> np.ndarray | None:
        truth = data.mask_of(sample, SHAPE) if sample.mask_path or not sample.is_anomalous else np.zeros(SHAPE)
        return truth.astype(float)[::3, ::3] + 0.1 * rng.random((12, 8)) if with_maps else None

    shutil.rmtree(folder, ignore_errors=True)
    results.predict(
        folder, method=method, dataset=dataset, score=score, alpha=0.05, profile="mini", settings={},
        calibration={category: [threshold] * 19 for category, threshold in thresholds.items()},
    )  # fmt: skip
    return folder


def compare(
    folder: Path, dataset: data.Dataset, *methods: str, maps: Collection[str] = (), answer: str = "", **facts: object
) -> comparison.Comparison:
    """The comparison of methods (by default those of :data:`SCORES`; others say what CLIP LOF says) whose results are
    written to ``folder``: those in ``maps`` have maps, AnomalyCLIP gives the answer, manifests state ``facts``."""
    for method in methods or SCORES:
        like = method if method in SCORES else "clip_lof"
        given = [{new: table[like][old] for new, old in zip(dataset.categories, CATEGORIES * 99)}
                 for table in (SCORES, THRESHOLDS)]  # fmt: skip
        said = answer if method == "anomalyclip" else ""
        path = write_result(folder / method, dataset, method, *given, with_maps=method in maps, answer=said)
        files.write_json(path / results.MANIFEST, files.read_json(path / results.MANIFEST) | facts)
    return comparison.compare(dataset, folder, profile="mini")
