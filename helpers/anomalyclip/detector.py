"""AnomalyCLIP as a detector: scores and maps of pictures, and the test pictures of a dataset."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

from helpers import files, results
from helpers.anomalyclip import model
from helpers.data import images as pictures
from helpers.judge import statistics
from helpers.records import Sample, Scored


@dataclass(frozen=True)
class Detector:
    """A ready detector: CLIP's vision tower and two text vectors ``(2, embed_dim)``, normalised, normal first.

    The maps of the ``taps`` are added (:func:`helpers.anomalyclip.model.dual_path`) and smoothed by a Gaussian of
    ``sigma`` pixels, 0 for none. ``checkpoint_hash`` is that of the prompts.
    """

    visual: nn.Module
    text: torch.Tensor
    preprocess: Callable[[np.ndarray], torch.Tensor]
    first_dual_block: int
    taps: tuple[int, ...]
    sigma: float
    model_id: str
    checkpoint_hash: str

    def detect(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of preprocessed images, float ``(B, 3, S, S)`` on the detector's device, the scores, float32 ``(B,)`` in (0,
        1), the abnormal probability; and the maps, float32 ``(B, S, S)``, raw, smoothed by SciPy's Gaussian as
        published, from 0 to the number of taps. Higher = more anomalous."""
        with torch.inference_mode():
            feature, tokens = model.dual_path(
                self.visual, images, first_dual_block=self.first_dual_block, taps=self.taps
            )
            scores = model.abnormal_probability(feature.float(), self.text)
            coarse = sum(model.abnormal_probability(one[:, 1:].float(), self.text) for one in tokens)
            maps = model.enlarge(coarse, images.shape[-1]).cpu().numpy()
        smooth = [gaussian_filter(one, self.sigma) for one in maps] if self.sigma else maps
        return scores.cpu().numpy(), np.stack(list(smooth))

    def score(self, images: Sequence[np.ndarray], *, batch_size: int = 8) -> list[Scored]:
        """What the detector says of pictures, uint8 RGB ``(H, W, 3)`` each."""
        scored = []
        for start in range(0, len(images), batch_size):
            begin = time.perf_counter()
            batch = torch.stack([self.preprocess(image) for image in images[start : start + batch_size]])
            scores, maps = self.detect(batch.to(self.text.device))
            seconds = (time.perf_counter() - begin) / len(batch)
            scored += [Scored(float(score), one, seconds) for score, one in zip(scores, maps)]
        return scored


def build_detector(
    clip: Any, learner: model.PromptLearner, *, taps: Sequence[int] = (), sigma: float = 4.0
) -> Detector:
    """Join a CLIP and prompts; the text features are computed here, once.

    V-V attention runs from block 5 of 24 on, and from the same share of other depths. ``taps`` is the last block by
    default, as the published numbers were made; the option of the paper's text is ``(6, 12, 18, 24)``.
    """
    model.check_clip(clip.model)
    n_blocks = len(clip.model.visual.transformer.resblocks)
    settings = (round(n_blocks * 5 / 24), tuple(taps) or (n_blocks,), sigma)
    text = text_features(clip, learner)
    return Detector(clip.model.visual, text, clip.preprocess, *settings, clip.model_id, model.prompts_hash(learner))


def text_features(clip: Any, learner: model.PromptLearner) -> torch.Tensor:
    """Normalised text features ``(2, embed_dim)`` of prompts, normal first."""
    with torch.inference_mode():
        return F.normalize(model.encode_text(clip.model, learner), dim=-1)


def predict(
    detector: Detector, dataset: Any, folder: Path, *, alpha: float, profile: str, trained_on: str, **kinds: Any
) -> results.MethodResult:
    """Predict the test pictures of a dataset: :func:`helpers.results.predict` with this detector.

    Thresholds are conformal, per painting, from all genuine pictures outside the test split: prompts have learnt from
    none of them; one without is a ValueError. ``manifest.settings.map_limits`` holds, per painting, the map value that
    at most ``alpha`` of them exceed anywhere. ``trained_on`` says what the prompts have seen, ``kinds`` may hold
    ``trained_on_kinds``, the synthetic marks among it.
    """

    def score(_category: str, samples: Sequence[Sample]) -> list[Scored]:
        begin = time.perf_counter()
        loaded = [pictures.load_image(sample.image_path) for sample in samples]
        reading = (time.perf_counter() - begin) / len(samples)
        return [Scored(one.anomaly_score, one.anomaly_map, one.seconds + reading) for one in detector.score(loaded)]

    scores, groups, limits = {}, {}, {}
    for category in dataset.categories:
        normals = dataset.select(category=category, is_anomalous=False)
        normals = [sample for sample in normals if sample.split in ("train", "calibration")]
        if not normals:
            raise ValueError(f"{category} has no genuine picture outside the test split. Add some and run 02 again.")
        scored = score(category, normals)
        scores[category] = [one.anomaly_score for one in scored]
        groups[category] = [sample.group for sample in normals]
        limits[category] = statistics.conformal_threshold([one.anomaly_map.max() for one in scored], alpha)
    settings = {"model": detector.model_id, "first_dual_block": detector.first_dual_block, "taps": detector.taps}
    settings |= {"sigma": detector.sigma, "map_limits": limits}
    return results.predict(
        folder, method="anomalyclip", dataset=dataset, score=score, calibration=scores, calibration_groups=groups,
        alpha=alpha, profile=profile, settings=settings, checkpoint_hash=detector.checkpoint_hash,
        trained_on=trained_on, **kinds,
    )  # fmt: skip


def load(home: Path, clip: Any) -> Callable[[str, Sequence[np.ndarray]], list[Scored]]:
    """The detector behind ``home/results/anomalyclip``, with the CLIP of notebook 04: ``score(category, images)``; a
    ``FileNotFoundError`` where that has not run, or its prompts are gone."""
    manifest = files.read_json(home / "results" / "anomalyclip" / results.MANIFEST)
    settings = {name: manifest["settings"][name] for name in ("taps", "sigma")}
    for path in home.glob("*/anomalyclip/*/*.safetensors"):
        learner = model.load_prompts(path, clip)
        if model.prompts_hash(learner) == manifest["checkpoint_hash"]:
            detector = build_detector(clip, learner, **settings)
            return lambda _category, images: detector.score(images)
    raise FileNotFoundError(f"The prompts behind results/anomalyclip are not under {home}. Run 04_anomalyclip again.")
