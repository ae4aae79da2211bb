"""The three rows of notebook 05 as detectors: fitted on a dataset, saved, loaded, asked for scores and maps."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from helpers import files, results
from helpers.data.images import load_image, pixel_hash, resize
from helpers.records import Sample, Scored
from helpers.reference import aligned, dino, memory

UNIT_SIDE = 224
_FILE = "detector.npz"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Everything inside runs on one core: how times are measured, and quicker on a busy machine."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        cv2.setNumThreads(before)


class Patches:
    """DINOv2's patches of pictures, computed once for both rows: image -> (tokens, grid, seconds)."""

    def __init__(self, network: dino.Dino, settings: memory.Settings) -> None:
        self._network, self._settings = network, settings
        self._known: dict[str, tuple[np.ndarray, tuple[int, int], float]] = {}

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int], float]:
        name = pixel_hash(image)
        if name not in self._known:
            start = time.perf_counter()
            values, grid = dino.tokens(self._network, image, side=self._settings.side, layers=self._settings.layers)
            self._known[name] = (values.astype(np.float16), grid, time.perf_counter() - start)
        values, grid, seconds = self._known[name]
        return values.astype(np.float32), grid, seconds


@dataclass
class Detector:
    """A fitted row: one model per artwork, and the scores of genuine pictures that set its thresholds.

    Attributes:
        method: name of the row.
        settings: of the models.
        models: category -> :class:`~helpers.reference.aligned.Aligned`, or a memory or subspace.
        calibration, groups: category -> scores of genuine pictures, and the source of each.
        weights_hash: of DINOv2, empty for ``aligned``.
        patches: of pictures, for the rows of DINOv2.
    """

    method: str
    settings: aligned.Settings | memory.Settings
    models: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, list[float]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    weights_hash: str = ""
    patches: Patches | None = None

    def score(self, category: str, images: Sequence[np.ndarray]) -> list[Scored]:
        """Score, map and (for ``aligned``) answer in words of each picture, uint8 RGB ``(H, W, 3)``."""
        return [self._score(self.models[category], image) for image in images]

    def _score(self, model: Any, image: np.ndarray) -> Scored:
        start = time.perf_counter()
        if self.method == "aligned":
            found = model.compare(image)
            return Scored(found.score, found.anomaly_map, time.perf_counter() - start, found.describe())
        values, grid, seconds = self.patches(image)
        start = time.perf_counter()
        score, anomaly_map = memory.picture_score(model.distances(values), grid, self.settings)
        return Scored(score, anomaly_map, seconds + time.perf_counter() - start)

    def compare(self, category: str, image: np.ndarray) -> aligned.Comparison:
        """The picture laid on the artwork's references (``aligned`` alone)."""
        return self.models[category].compare(image)

    def unit_map(self, image: np.ndarray, category: str) -> np.ndarray:
        """What differs, float32 ``(224, 224)`` in [0, 1]; 0.5 is the conformal limit of genuine pictures."""
        unit = self.compare(category, image).unit_map
        return cv2.resize(unit, (UNIT_SIDE, UNIT_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)

    def predict(self, dataset: Any, folder: Path, *, alpha: float, profile: str) -> results.MethodResult:
        """Score all test pictures, one thread, into a results folder."""

        def score(category: str, samples: Sequence[Sample]) -> list[Scored]:
            with one_thread():
                found = self.score(category, [load_image(sample.image_path) for sample in samples])
            return [replace(one, answer="") for one in found]  # in results, answers are what chat models said

        return results.predict(
            folder, method=self.method, dataset=dataset, score=score, calibration=self.calibration,
            calibration_groups=self.groups, alpha=alpha, profile=profile, settings=asdict(self.settings),
            checkpoint_hash=self.weights_hash, trained_on="genuine pictures of the artwork only", batch_size=8,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write what :func:`load` reads, one file."""
        head = {name: getattr(self, name) for name in ("method", "calibration", "groups", "weights_hash")}
        arrays = {"head": np.array(json.dumps({**head, "settings": asdict(self.settings)}))}
        for category, model in self.models.items():
            kept = model.arrays() if self.method == "aligned" else vars(model)
            arrays |= {f"{category}/{name}": value for name, value in kept.items()}
        with files.atomic_path(folder / _FILE) as temporary:
            np.savez(temporary, **arrays)


def load(folder: Path, network: dino.Dino | None = None) -> Detector:
    """A detector as notebook 05 saved it.

    Args:
        folder: ``checkpoints/<method>``.
        network: DINOv2, for its two rows.
    Raises:
        FileNotFoundError: notebook 05 has not run.
    """
    if not (folder / _FILE).exists():
        raise FileNotFoundError(f"No fitted detector in {folder}. Run notebook 05_reference.")
    with np.load(folder / _FILE, allow_pickle=False) as found:
        arrays = dict(found)
    head = json.loads(str(arrays["head"]))
    is_aligned = head["method"] == "aligned"
    head["settings"] = (aligned.Settings if is_aligned else memory.Settings)(**head["settings"])
    detector = Detector(**head, patches=Patches(network, head["settings"]) if network else None)
    for category in detector.calibration:
        start = f"{category}/"
        own = {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
        detector.models[category] = (
            aligned.Aligned.of_arrays(detector.settings, own) if is_aligned else memory.FITS[detector.method](**own)
        )
    return detector


def fit_aligned(dataset: Any, settings: aligned.Settings, *, alpha: float) -> Detector:
    """Learn from all genuine pictures of training and calibration; each is scored without its own source."""
    detector = Detector("aligned", settings)
    for category in dataset.categories:
        samples = _genuine(dataset, category, "train") + _genuine(dataset, category, "calibration")
        images = [load_image(sample.image_path, max_side=2 * settings.side) for sample in samples]
        with one_thread():
            model = aligned.fit(images, _sources(samples), settings=settings, alpha=alpha)
        detector.models[category] = model
        detector.calibration[category], detector.groups[category] = model.scores, model.groups
    return detector


def fit_dino(dataset: Any, network: dino.Dino, settings: memory.Settings, *, n_bank: int) -> list[Detector]:
    """Both rows of DINOv2, from up to ``n_bank`` training pictures per artwork, of as many sources as there are."""
    patches = Patches(network, settings)
    rows = [Detector(name, settings, weights_hash=network.weights_hash, patches=patches) for name in memory.FITS]
    for category in dataset.categories:
        samples, normal = _genuine(dataset, category, "train"), _genuine(dataset, category, "calibration")
        images = [load_image(sample.image_path) for sample in samples]
        tokens = [patches(images[index])[0] for index in aligned.turns(images, _sources(samples), n_bank)]
        held_out = [load_image(sample.image_path) for sample in normal]
        for row in rows:
            row.models[category] = memory.FITS[row.method].fit(tokens, settings)
            row.calibration[category] = [one.anomaly_score for one in row.score(category, held_out)]
            row.groups[category] = _sources(normal)
    return rows


def own_picture(
    genuine: Sequence[np.ndarray], suspect: np.ndarray, *, settings: aligned.Settings, alpha: float,
    patch_settings: memory.Settings, network: dino.Dino | None = None,
) -> tuple[aligned.Comparison, pd.DataFrame]:  # fmt: skip
    """Ten or so genuine photographs and one suspect: every detector that can be fitted on so few, in seconds.

    Each genuine photograph counts as a source of its own; each limit is the largest score of a genuine photograph
    among the others.

    Returns:
        the suspect laid on its references, and a table: detector, score, limit, verdict.
    """
    genuine = [resize(image, 2 * settings.side) for image in genuine]
    with one_thread():
        model = aligned.fit(genuine, [str(n) for n in range(len(genuine))], settings=settings, alpha=alpha)
        found = model.compare(suspect)
    rows = [(results.method_label("aligned"), found.score, found.limit, found.describe())]
    if network is not None and len(genuine) > 1:
        patches = Patches(network, patch_settings)
        seen = [patches(image)[:2] for image in (*genuine, suspect)]
        for method, kind in memory.FITS.items():
            scores = []
            for n, (values, grid) in enumerate(seen):  # each beside all other genuine photographs
                known = [tokens for k, (tokens, _) in enumerate(seen[:-1]) if k != n]
                distances = kind.fit(known, patch_settings).distances(values)
                scores.append(memory.picture_score(distances, grid, patch_settings)[0])
            limit, value = max(scores[:-1]), scores[-1]
            verdict = "more unusual than every genuine photograph" if value > limit else "like the genuine photographs"
            rows.append((results.method_label(method), value, limit, verdict))
    return found, pd.DataFrame(rows, columns=["detector", "score", "limit", "verdict"])


def _genuine(dataset: Any, category: str, split: str) -> list[Sample]:
    return dataset.select(split=split, category=category, is_anomalous=False)


def _sources(samples: Sequence[Sample]) -> list[str]:
    return [sample.group or str(sample.image_path) for sample in samples]
