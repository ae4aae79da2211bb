"""The three rows of notebook 05 as detectors: fitted on a dataset, saved, loaded, asked for scores and maps."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.utils._pytree import tree_map

from helpers import files, results
from helpers.data import Dataset
from helpers.data.images import load_image
from helpers.records import Sample, Scored
from helpers.reference import aligned, dino, memory

_FILE = "detector.pt"


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


@dataclass
class Detector:
    """A fitted row."""

    method: str
    settings: aligned.Settings | memory.Settings
    models: dict[str, Any]  # category -> Aligned, or what memory.fit gives
    network: dino.Dino | None = None  # for the rows of DINOv2
    calibration: dict[str, list[float]] = field(default_factory=dict)  # category -> scores of genuine pictures
    groups: dict[str, list[str]] = field(default_factory=dict)  # and the source of each
    identity: str = ""  # of a loaded row: hash of what its scores and maps come from

    def score(self, category: str, images: Sequence[np.ndarray]) -> list[Scored]:
        """Score, map and (for ``aligned``) answer in words of each picture, uint8 RGB ``(H, W, 3)``."""
        model, said = self.models[category], []
        for image in images:
            start, words = time.perf_counter(), ""
            if self.method == "aligned":
                found = model.compare(image)
                score, plane, words = found.score, found.anomaly_map, found.words
            else:
                values, grid, seconds = self.network.patches(image, self.settings)
                start = time.perf_counter() - seconds
                score, plane = memory.picture_score(model, values, grid, self.settings)
            said.append(Scored(score, plane, time.perf_counter() - start, words))
        return said

    def unit_map(self, image: np.ndarray, category: str) -> np.ndarray:
        """What ``aligned`` finds, float32 ``(224, 224)`` in [0, 1]; 0.5 is the limit of genuine pictures."""
        return cv2.resize(self.models[category].compare(image).unit_map, (224, 224), interpolation=cv2.INTER_AREA)

    def predict(self, dataset: Dataset, folder: Path, *, alpha: float, profile: str) -> results.MethodResult:
        """Score all test pictures, one thread, into a results folder."""

        def score(category: str, samples: Sequence[Sample]) -> list[Scored]:
            with one_thread():
                found = self.score(category, [load_image(sample.image_path) for sample in samples])
            return [replace(one, answer="") for one in found]  # in results, answers are what chat models said

        return results.predict(
            folder, method=self.method, dataset=dataset, score=score, calibration=self.calibration,
            calibration_groups=self.groups, alpha=alpha, profile=profile, settings=asdict(self.settings),
            checkpoint_hash=_identity(getattr(self.network, "weights_hash", "")), batch_size=8,
            trained_on="genuine pictures of the artwork only",
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write what :func:`load` reads, one file."""
        models = {c: asdict(one) if self.method == "aligned" else one for c, one in self.models.items()}
        state = {"method": self.method, "settings": asdict(self.settings), "models": models}
        content = io.BytesIO()  # the same bytes for the same numbers; a file's name would be in them
        torch.save(tree_map(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, state), content)
        files.write_bytes(folder / _FILE, content.getvalue())


def load(folder: Path, network: dino.Dino | None = None) -> Detector:
    """A detector as notebook 05 saved it in ``checkpoints/<method>``; DINOv2's rows need their ``network``.

    Raises:
        FileNotFoundError: notebook 05 has not run.
    """
    if not (folder / _FILE).exists():
        raise FileNotFoundError(f"No fitted detector in {folder}. Run notebook 05_reference.")
    state = torch.load(folder / _FILE, weights_only=True)
    state = tree_map(lambda v: v.numpy() if isinstance(v, torch.Tensor) else v, state)
    method, models = state["method"], state["models"]
    settings = (aligned.Settings if method == "aligned" else memory.Settings)(**state["settings"])
    for category, one in models.items() if method == "aligned" else ():
        references = [aligned.Reference(**each) for each in one["references"]]
        models[category] = aligned.Aligned(**one | {"settings": settings, "references": references})
    return Detector(method, settings, models, network, identity=_identity(files.sha256_file(folder / _FILE)))


def _identity(numbers: str) -> str:
    """Hash of what scores and maps come from: numbers, by their hash, and the code of this room."""
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return files.sha256_json([numbers, *code])


def fit_aligned(dataset: Dataset, settings: aligned.Settings, *, alpha: float) -> Detector:
    """Learn from all genuine pictures of training and calibration; each is scored without its own source."""
    row = Detector("aligned", settings, {})
    for category in dataset.categories:
        images, sources = _genuine(dataset, category, "train", "calibration", max_side=2 * settings.side)
        with one_thread():
            model = aligned.fit(images, sources, settings=settings, alpha=alpha)
        row.models[category], row.calibration[category], row.groups[category] = model, model.scores, model.groups
    return row


def fit_dino(dataset: Dataset, network: dino.Dino, settings: memory.Settings, *, n_bank: int) -> list[Detector]:
    """Both rows of DINOv2, from up to ``n_bank`` training pictures per artwork, of as many sources as there are."""
    rows = [Detector(method, settings, {}, network) for method in memory.METHODS]
    for category in dataset.categories:
        images, sources = _genuine(dataset, category, "train")
        tokens = [network.patches(images[n], settings)[0] for n in aligned.turns(images, sources, n_bank)]
        held_out, groups = _genuine(dataset, category, "calibration")
        for row in rows:
            row.models[category] = memory.fit(row.method, tokens, settings)
            row.calibration[category] = [one.anomaly_score for one in row.score(category, held_out)]
            row.groups[category] = groups
    return rows


def _genuine(dataset: Dataset, category: str, *splits: str, max_side: int | None = None) -> tuple[list, list[str]]:
    """Genuine pictures, and the source of each."""
    samples = [s for split in splits for s in dataset.select(split=split, category=category, is_anomalous=False)]
    images = [load_image(sample.image_path, max_side=max_side) for sample in samples]
    return images, [sample.group or str(sample.image_path) for sample in samples]
