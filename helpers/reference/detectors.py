"""The three rows of notebook 05: fitted on a dataset, saved, loaded, asked for scores and maps."""

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils._pytree import tree_map

from helpers import files, results
from helpers.data import Dataset
from helpers.data.images import load_image
from helpers.records import Sample, Scored
from helpers.reference import aligned, dino

_FILE = "detector.pt"


@dataclass
class Detector:
    """A fitted row."""

    method: str
    models: dict[str, Any]  # category -> Aligned, or what dino.fit gives
    settings: dict[str, Any]  # for the record
    network: dino.Dino | None = None  # for the rows of DINOv2
    calibration: dict[str, list[float]] = field(default_factory=dict)  # category -> scores of genuine pictures
    groups: dict[str, list[str]] = field(default_factory=dict)  # and the source of each
    identity: str = ""  # of a loaded row: hash of what its scores and maps come from

    def score(self, category: str, images: Sequence[np.ndarray]) -> list[Scored]:
        """Score, map and (for ``aligned``) answer in words of each picture, uint8 RGB ``(H, W, 3)``."""
        model, said = self.models[category], []
        if self.method == "aligned":
            return [Scored(one.score, one.anomaly_map, answer=one.words) for one in map(model.compare, images)]
        for image in images:
            values, grid, seconds = self.network.patches(image)
            start = time.perf_counter() - seconds
            said.append(Scored(*dino.picture_score(model, values, grid), time.perf_counter() - start))
        return said

    def unit_map(self, image: np.ndarray, category: str) -> np.ndarray:
        """What ``aligned`` finds, float32 ``(224, 224)`` in [0, 1]; 0.5 is the limit of genuine pictures."""
        return cv2.resize(self.models[category].compare(image).unit_map, (224, 224), interpolation=cv2.INTER_AREA)

    def predict(self, dataset: Dataset, folder: Path, *, alpha: float, profile: str) -> results.MethodResult:
        """Score all test pictures into a results folder."""

        def score(category: str, samples: Sequence[Sample]) -> list[Scored]:
            found = self.score(category, [load_image(sample.image_path) for sample in samples])
            return [replace(one, answer="") for one in found]  # in results, answers are what chat models said

        return results.predict(
            folder, method=self.method, dataset=dataset, score=score, calibration=self.calibration,
            calibration_groups=self.groups, alpha=alpha, profile=profile, settings=self.settings,
            checkpoint_hash=_identity(getattr(self.network, "weights_hash", "")), batch_size=8,
            trained_on="genuine pictures of the artwork only",
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write what :func:`load` reads, one file."""
        models = {c: asdict(one) if self.method == "aligned" else one for c, one in self.models.items()}
        state = {"method": self.method, "models": models, "settings": self.settings}
        content = io.BytesIO()  # the same bytes for the same numbers; a file's name would be in them
        torch.save(tree_map(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, state), content)
        files.write_bytes(folder / _FILE, content.getvalue())


def load(folder: Path, network: dino.Dino | None = None) -> Detector:
    """A detector as notebook 05 saved it in ``checkpoints/<method>``; DINOv2's rows need their ``network``.
    ``FileNotFoundError``: notebook 05 has not run, or with another version of this code."""
    path = folder / _FILE
    try:
        state = tree_map(lambda v: v.numpy() if isinstance(v, torch.Tensor) else v, torch.load(path, weights_only=True))
        if state["method"] == "aligned":
            state["models"] = {category: aligned.Aligned(**one) for category, one in state["models"].items()}
    except (FileNotFoundError, TypeError) as error:
        raise FileNotFoundError(f"No detector of this version in {folder}. Run notebook 05_reference.") from error
    return Detector(**state, network=network, identity=_identity(files.sha256_file(path)))


def _identity(numbers: str) -> str:
    """Hash of what scores and maps come from: numbers, by their hash, and the code of this room."""
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return files.sha256_json([numbers, *code])


def fit_aligned(dataset: Dataset, *, side: int, n_references: int, alpha: float) -> Detector:
    """Learn from all genuine pictures of training and calibration; each is scored without its own source. For ``side``,
    ``n_references`` and ``alpha`` see :func:`aligned.fit`."""
    row = Detector("aligned", {}, {"side": side, "n_references": n_references})
    for category in dataset.categories:
        images, sources = _genuine(dataset, category, "train", "calibration", max_side=2 * side)
        model = aligned.fit(images, sources, side=side, n_references=n_references, alpha=alpha)
        row.models[category], row.calibration[category], row.groups[category] = model, model.scores, model.groups
    return row


def fit_dino(dataset: Dataset, network: dino.Dino, *, n_bank: int) -> list[Detector]:
    """Both rows of DINOv2, from up to ``n_bank`` training pictures per artwork, of as many sources as there are."""
    own = {"layers": dino.LAYERS, "sigma": dino.SIGMA, "top": dino.TOP, "variance": dino.VARIANCE}
    rows = [Detector(name, {}, {"side": network.side} | own, network) for name in ("dinov2_memory", "dinov2_subspace")]
    for category in dataset.categories:
        images, sources = _genuine(dataset, category, "train")
        tokens = [network.patches(images[n])[0] for n in aligned.turns(images, sources, n_bank)]
        held_out, groups = _genuine(dataset, category, "calibration")
        for row in rows:
            row.models[category], row.groups[category] = dino.fit(row.method, tokens), groups
            row.calibration[category] = [one.anomaly_score for one in row.score(category, held_out)]
    return rows


def _genuine(dataset: Dataset, category: str, *splits: str, max_side: int | None = None) -> tuple[list, list[str]]:
    samples = [s for split in splits for s in dataset.select(split=split, category=category, is_anomalous=False)]
    images = [load_image(sample.image_path, max_side=max_side) for sample in samples]
    return images, [sample.group or str(sample.image_path) for sample in samples]
