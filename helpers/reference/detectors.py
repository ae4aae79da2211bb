"""The three rows of notebook 05 as detectors: fitted on a dataset, saved, loaded, asked for scores and maps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from helpers import files, results
from helpers.data.images import IMAGE_SUFFIXES, ImageError, load_image, pixel_hash, resize
from helpers.judge import metrics
from helpers.records import Sample, Scored
from helpers.reference import aligned, canvas, dino, memory

UNIT_SIDE = 224
METHODS = ("aligned", *memory.METHODS)
_READY = "READY.json"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Everything inside runs on one core: how times are measured, and quicker on a busy machine."""
    import torch

    n_cv, n_torch = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        cv2.setNumThreads(n_cv)
        torch.set_num_threads(n_torch)


@dataclass
class Detector:
    """A fitted row: one model per artwork, and the scores of genuine pictures that set its thresholds.

    Attributes:
        method: name of the row.
        models: category -> :class:`~helpers.reference.aligned.Aligned`, or a memory or subspace.
        settings: of the models.
        calibration, groups: category -> scores of genuine pictures, and the source of each.
        weights_hash: of DINOv2, empty for ``aligned``.
        patches: image -> (tokens, grid, seconds) for the rows of DINOv2.
    """

    method: str
    models: dict[str, Any]
    settings: aligned.Settings | memory.Settings
    calibration: dict[str, list[float]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    weights_hash: str = ""
    patches: Callable | None = None

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
        """Write what :func:`load` reads; ``READY.json`` comes last."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _READY).unlink(missing_ok=True)
        facts = {}
        for category, model in self.models.items():
            is_aligned = self.method == "aligned"
            with files.atomic_path(folder / f"{category}.npz") as temporary, open(temporary, "wb") as file:
                np.savez(file, **(canvas.arrays_of(model.canvases) if is_aligned else vars(model)))
            facts[category] = [model.is_optimistic, model.notes, model.limit] if is_aligned else []
        head = {"method": self.method, "settings": asdict(self.settings), "facts": facts}
        kept = {"calibration": self.calibration, "groups": self.groups, "weights_hash": self.weights_hash}
        files.write_json(folder / _READY, head | kept)


def load(folder: Path, network: dino.Dino | None = None) -> Detector:
    """A detector as notebook 05 saved it.

    Args:
        folder: ``checkpoints/<method>``.
        network: DINOv2, for its two rows.
    Raises:
        FileNotFoundError: notebook 05 has not run.
    """
    if not (folder / _READY).exists():
        raise FileNotFoundError(f"No fitted detector in {folder}. Run notebook 05_reference.")
    head = files.read_json(folder / _READY)
    method, scores, groups = head["method"], head["calibration"], head["groups"]
    kind = aligned.Settings if method == "aligned" else memory.Settings
    settings = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in head["settings"].items()})
    models = {}
    for category, facts in head["facts"].items():
        with np.load(folder / f"{category}.npz", allow_pickle=False) as found:
            arrays = dict(found)
        if method == "aligned":
            found = canvas.canvases_of(arrays)
            models[category] = aligned.Aligned(settings, found, np.array(scores[category]), groups[category], *facts)
        else:
            models[category] = memory.FITS[method](**arrays)
    patches = None if network is None else Patches(network, settings)
    return Detector(method, models, settings, scores, groups, head["weights_hash"], patches)


class Patches:
    """DINOv2's patches of pictures, computed once for both rows: image -> (tokens, grid, seconds)."""

    def __init__(self, network: dino.Dino, settings: memory.Settings) -> None:
        self._network, self._settings = network, settings
        self._known: dict[str, tuple[np.ndarray, tuple[int, int], float]] = {}

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int], float]:
        name = pixel_hash(image)
        if name not in self._known:
            start, one = time.perf_counter(), self._settings
            values, grid = dino.tokens(self._network, image, side=one.side, layers=one.layers, fit=one.fit)
            self._known[name] = (values.astype(np.float16), grid, time.perf_counter() - start)
        values, grid, seconds = self._known[name]
        return values.astype(np.float32), grid, seconds


def fit_aligned(dataset: Any, settings: aligned.Settings, *, alpha: float, n_workers: int = 2) -> Detector:
    """Learn from all genuine pictures of training and calibration; each is scored without its own source."""
    detector = Detector("aligned", {}, settings)
    for category in dataset.categories:
        samples = _genuine(dataset, category, "train") + _genuine(dataset, category, "calibration")
        images = [load_image(sample.image_path, max_side=2 * settings.side) for sample in samples]
        with one_thread():
            model = aligned.fit(images, _sources(samples), settings=settings, alpha=alpha, n_workers=n_workers)
        detector.models[category] = model
        detector.calibration[category], detector.groups[category] = model.scores.tolist(), model.groups
    return detector


def fit_dino(dataset: Any, network: dino.Dino, settings: dict[str, memory.Settings], *, n_bank: int) -> list[Detector]:
    """Both rows of DINOv2, from up to ``n_bank`` training pictures per artwork, of as many sources as there are."""
    shared: dict[tuple, Patches] = {}
    detectors = []
    for method, one in settings.items():
        patches = shared.setdefault((one.side, one.layers, one.fit), Patches(network, one))
        detector = Detector(method, {}, one, weights_hash=network.weights_hash, patches=patches)
        for category in dataset.categories:
            samples = _genuine(dataset, category, "train")
            images = [load_image(sample.image_path) for sample in samples]
            chosen = [images[index] for index in aligned.turns(images, _sources(samples), n_bank)]
            tokens = [patches(copy)[0] for image in chosen for copy in memory.turned(image, one.turns)]
            detector.models[category] = memory.FITS[method].fit(tokens, one.variance)
            normal = _genuine(dataset, category, "calibration")
            found = detector.score(category, [load_image(sample.image_path) for sample in normal])
            detector.calibration[category] = [score.anomaly_score for score in found]
            detector.groups[category] = _sources(normal)
        detectors.append(detector)
    return detectors


def own_picture(
    genuine: Sequence[np.ndarray], suspect: np.ndarray, *, settings: aligned.Settings, alpha: float,
    network: dino.Dino | None = None, patch_settings: dict[str, memory.Settings] | None = None,
) -> tuple[aligned.Comparison, pd.DataFrame]:  # fmt: skip
    """Ten or so genuine photographs and one suspect: every detector that can be fitted on so few, in seconds.

    Each genuine photograph counts as a source of its own; each limit is the largest score of a genuine photograph
    among the others.

    Returns:
        the suspect laid on its references, and a table: detector, score, limit, verdict.
    """
    genuine = [resize(image, 2 * settings.side) for image in genuine]
    names = [str(n) for n in range(len(genuine))]
    with one_thread():
        model = aligned.fit(genuine, names, settings=settings, alpha=alpha, n_workers=2)
        found = model.compare(suspect)
    rows = [(results.method_label("aligned"), found.score, found.limit, found.describe())]
    for method, one in (patch_settings or {}).items() if network is not None and len(genuine) > 1 else ():
        patches = Patches(network, one)
        tokens = [patches(image)[0] for image in genuine]

        def score(image: np.ndarray, known: list[np.ndarray], one=one, method=method, patches=patches) -> float:
            values, grid, _ = patches(image)
            fitted = memory.FITS[method].fit(known, one.variance)
            return memory.picture_score(fitted.distances(values), grid, one)[0]

        limit = max(score(image, tokens[:n] + tokens[n + 1 :]) for n, image in enumerate(genuine))
        value = score(suspect, tokens)
        verdict = "more unusual than every genuine photograph" if value > limit else "like the genuine photographs"
        rows.append((results.method_label(method), value, limit, verdict))
    return found, pd.DataFrame(rows, columns=["detector", "score", "limit", "verdict"])


def own_files(folder: str, suspect: str, *, max_side: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The pictures of a folder and one more; files that cannot be read are named and left out.

    Raises:
        ValueError: no genuine picture could be read.
        ImageError: the suspect could not.
    """
    genuine = []
    for path in sorted(Path(folder).expanduser().iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and path != Path(suspect).expanduser():
            try:
                genuine.append(load_image(path, max_side=max_side))
            except ImageError as error:
                print(f"left out: {error}")
    if not genuine:
        raise ValueError(f"No picture in {folder} could be read. Put some genuine photographs of the artwork there.")
    return genuine, load_image(Path(suspect).expanduser())


def table(done: Mapping[str, results.MethodResult]) -> pd.DataFrame:
    """What the test pictures say, a row per painting and method."""
    rows = {}
    for method, result in done.items():
        for category, part in result.frame().groupby("category", sort=False):
            truth, called = part.is_anomalous.to_numpy(bool), part.is_predicted_anomalous.to_numpy(bool)
            rows[results.category_label(category), results.method_label(method)] = {
                "AUROC": round(metrics.image_auroc(part.anomaly_score, truth), 3),
                "found": f"{(called & truth).sum()} of {truth.sum()}",
                "false alarms": f"{(called & ~truth).sum()} of {(~truth).sum()}",
                "s a picture": round(part.seconds.mean(), 2),
            }
    return pd.DataFrame(rows).T.sort_index(level=0, sort_remaining=False)


def _genuine(dataset: Any, category: str, split: str) -> list[Sample]:
    return dataset.select(split=split, category=category, is_anomalous=False)


def _sources(samples: Sequence[Sample]) -> list[str]:
    return [sample.group or str(sample.image_path) for sample in samples]
