"""What every detector says about one picture, with the models and thresholds that notebooks 03 and 04 saved.

Nothing is trained here. A detector whose notebook has not run on these pictures is named with the reason, never left
out in silence; the others still speak. AnomalyGPT's verdict comes from the chat itself (:mod:`helpers.chat.session`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from helpers import files as storage
from helpers import results
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalyclip import training as anomalyclip_training
from helpers.chat import _old_clip_features as features
from helpers.chat import _old_clip_methods as clip_methods
from helpers.chat import _old_clip_one_class as one_class
from helpers.chat._old_clip_features import Features
from helpers.data import images
from helpers.data.manifest import Dataset
from helpers.judge import figures
from helpers.judge import statistics as calibration
from helpers.records import Prediction, Sample
from helpers.results import MethodResult

if TYPE_CHECKING:
    from helpers.clip.backbones import Clip, Cnn

ANOMALYCLIP = "anomalyclip"
NOTEBOOKS = dict.fromkeys(one_class.METHODS, "03_clip") | {ANOMALYCLIP: "04_anomalyclip"}
"""Method -> the notebook that saves it, in the order of the comparison."""

_N_PROBES = 4

FOREIGN = "It knows the artworks of the dataset only: choose one under “Compared with”."
LEARNT = "It has learnt from this very picture; a score would say nothing."
NO_THRESHOLD = "Its threshold belongs to the artworks of the dataset: choose one under “Compared with”."


@dataclass(frozen=True)
class Verdict:
    """What one detector says about one picture, or why it says nothing.

    Attributes:
        method: row of the comparison.
        anomaly_score: raw, higher = more anomalous; nan when there is none.
        threshold: called anomalous above it; nan when there is none.
        p_value: conformal p-value of the score among normal pictures, in (0, 1].
        anomaly_map: float32 ``(h, w)``, raw; None when the method makes none.
        limits: ends of the method's colour scale.
        seconds: time for this picture, with all models loaded.
        note: why there is no verdict.
    """

    method: str
    anomaly_score: float = math.nan
    threshold: float = math.nan
    p_value: float = math.nan
    anomaly_map: np.ndarray | None = None
    limits: tuple[float, float] = (0.0, 1.0)
    seconds: float = math.nan
    note: str = ""

    @property
    def is_predicted_anomalous(self) -> bool | None:
        """True above the threshold; None without a score or a threshold."""
        if math.isnan(self.anomaly_score) or math.isnan(self.threshold):
            return None
        return self.anomaly_score > self.threshold


@dataclass(frozen=True)
class ClipMethod:
    """A method of notebook 03 on one artwork: detector, its scores of normal pictures, threshold, colour scale."""

    method: str
    detector: one_class.Detector
    normal_scores: np.ndarray
    threshold: float
    limits: tuple[float, float]

    def judge(self, row: Features) -> Verdict:
        """The verdict on a picture, given its features (one row)."""
        start = time.perf_counter()
        anomaly_map = None
        if isinstance(self.detector, one_class.PatchKnnDetector):
            maps = self.detector.maps(row)
            anomaly_map, scores = maps[0], self.detector.score_maps(maps)
        else:
            scores = self.detector.score(row)
        seconds = time.perf_counter() - start + float(row.seconds[0])
        p_value = float(calibration.p_values(self.normal_scores, scores)[0])
        score = float(scores[0])
        return Verdict(self.method, score, self.threshold, p_value, anomaly_map, self.limits, seconds)


@dataclass(frozen=True)
class Prompted:
    """AnomalyCLIP with the prompts that made its row, and its scores of the normal pictures of each artwork."""

    detector: anomalyclip.Detector
    normal_scores: Mapping[str, np.ndarray]
    alpha: float
    limits: tuple[float, float]

    def judge(self, image: np.ndarray, category: str | None) -> Verdict:
        """The verdict on a picture uint8 RGB; without an artwork there is a score, but no threshold."""
        start = time.perf_counter()
        pixels = self.detector.preprocess(image)[None].to(self.detector.text.device)
        scores, maps = anomalyclip.detect(self.detector, pixels)
        verdict = Verdict(ANOMALYCLIP, float(scores[0]), anomaly_map=maps[0], limits=self.limits)
        verdict = replace(verdict, seconds=time.perf_counter() - start)
        if category not in self.normal_scores:
            return replace(verdict, note=NO_THRESHOLD)
        normal = self.normal_scores[category]
        return replace(
            verdict,
            threshold=calibration.conformal_threshold(normal, self.alpha),
            p_value=float(calibration.p_values(normal, scores)[0]),
        )


@dataclass(frozen=True)
class Detectors:
    """All detectors that were found.

    Attributes:
        clip_methods: method -> artwork -> detector.
        prompted: AnomalyCLIP, None when it is missing.
        missing: method -> why it cannot speak and what changes that.
        embed: picture -> features, for the CLIP methods.
        learnt_from: sha256 of the pictures that the CLIP methods were fitted on.
    """

    clip_methods: Mapping[str, Mapping[str, ClipMethod]]
    prompted: Prompted | None
    missing: Mapping[str, str]
    embed: Callable[[np.ndarray], Features]
    learnt_from: frozenset[str]

    def judge(self, image: np.ndarray, *, sha256: str, category: str | None) -> list[Verdict]:
        """Every detector's verdict, in the order of the comparison; missing ones with their reason.

        Args:
            image: uint8 RGB ``(H, W, 3)``.
            sha256: of its file; a picture that the CLIP methods learnt from is not scored by them.
            category: the artwork it should show, None when it is none of the dataset's.
        """
        silent = FOREIGN if category is None else LEARNT if sha256 in self.learnt_from else ""
        row = self.embed(image) if self.clip_methods and not silent else None
        found = []
        for method in NOTEBOOKS:
            if method in self.missing:
                found.append(Verdict(method, note=self.missing[method]))
            elif method == ANOMALYCLIP:
                found.append(self.prompted.judge(image, category))
            else:
                found.append(Verdict(method, note=silent) if silent else self.clip_methods[method][category].judge(row))
        return found


def load(
    dataset: Dataset, *, home: Path, clip: Clip, cnn: Cnn, batch_size: int = 32, device: str = "cpu", seed: int = 0
) -> Detectors:
    """Load what notebooks 03 and 04 saved for this dataset.

    Each detector first scores some test pictures; if these are not the scores in its results, the models have changed
    since, and the detector counts as missing.

    Args:
        dataset: the pictures that the notebooks ran on.
        home: ``profile.home``, with ``checkpoints/``, ``results/``, ``features/`` and ``weights/``.
        clip, cnn: the models of notebook 03.
        batch_size: pictures per pass.
        device: torch device name.
        seed: of the profile; forests and memory banks are made again with it.
    """
    home = Path(home)
    models = {"clip": clip, "cnn": cnn, "batch_size": batch_size}
    source = _Source(dataset, home, models, device, seed)
    found: dict[str, dict[str, ClipMethod]] = {}
    missing: dict[str, str] = {}
    prompted = None
    for method, notebook in NOTEBOOKS.items():
        try:
            result = results.read(home / "results" / method, dataset.samples, dataset.folder, dataset.hash)
            if method == ANOMALYCLIP:
                prompted = _load_prompted(result, home, clip)
            else:
                found[method] = _load_clip_method(result, source)
        except FileNotFoundError:
            missing[method] = f"Nothing saved for these pictures: run notebook {notebook}."
        except ValueError as error:
            missing[method] = str(error)

    def embed(image: np.ndarray) -> Features:
        return features.embed_images([image], patches=True, **models)

    return Detectors(found, prompted, missing, embed, frozenset(sample.sha256 for sample in source.normals))


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per detector: verdict, score, threshold, p-value, seconds, note."""
    words = {True: "anomalous", False: "normal", None: "–"}
    rows = [
        {
            "detector": results.method_label(one.method),
            "verdict": words[one.is_predicted_anomalous],
            "score": one.anomaly_score,
            "threshold": one.threshold,
            "p-value": one.p_value,
            "seconds": one.seconds,
            "note": one.note,
        }
        for one in verdicts
    ]
    return pd.DataFrame(rows).set_index("detector").round(3)


def _probes(result: MethodResult) -> dict[Sample, float]:
    """Some test pictures of each artwork with their recorded scores."""
    by_category: dict[str, list[Prediction]] = {}
    for prediction in result.predictions:
        by_category.setdefault(prediction.sample.category, []).append(prediction)
    chosen = (found[:: math.ceil(len(found) / _N_PROBES)] for found in by_category.values())
    return {one.sample: one.anomaly_score for found in chosen for one in found}


def _limits(result: MethodResult) -> tuple[float, float]:
    maps = (result.anomaly_map(prediction) for prediction in result.predictions)
    return figures.map_limits(one for one in maps if one is not None)


@dataclass(frozen=True)
class _Source:
    """What the CLIP methods are fitted on again; embedded (or read from the cache) when the first one asks."""

    dataset: Dataset
    home: Path
    models: Mapping[str, Any]
    device: str
    seed: int

    @cached_property
    def normals(self) -> list[Sample]:
        return [s for s in self.dataset.samples if not s.is_anomalous and s.split != "test"]

    @cached_property
    def embedded(self) -> Features:
        samples = [*self.normals, *self.dataset.select(split="test")]
        return features.embed_samples(samples, cache_dir=self.home / "features", **self.models)

    def training(self, category: str, *, augment: bool) -> one_class.Training:
        """Normal pictures of an artwork, with the views of notebook 03 where a detector learnt from them."""
        own = tuple(sample for sample in self.normals if sample.category == category)
        views, sources = None, ()
        if augment:
            cache_dir = self.home / "features"
            views, sources = clip_methods.embed_views(own, cache_dir=cache_dir, seed=self.seed, **self.models)
        whole = one_class.Training(own, self.embedded.of(own), views=views, view_sources=sources)
        return one_class.learning_part(whole)


def _load_clip_method(result: MethodResult, source: _Source) -> dict[str, ClipMethod]:
    """The detectors of all artworks: a stored head, or the others fitted again on the same normal pictures."""
    from safetensors.torch import load_file

    limits, found = _limits(result), {}
    for category in source.dataset.categories:
        path = source.home / "checkpoints" / result.method / f"{category}.json"
        kept = storage.read_json(path)
        try:
            settings = type(one_class.DEFAULTS[result.method])(**kept["settings"])
        except TypeError as error:
            raise ValueError(f"{path} is of another version ({error}). Run notebook 03_clip again.") from error
        if isinstance(settings, one_class.HeadSettings):
            detector = one_class.HeadDetector.from_state(settings, load_file(path.with_suffix(".safetensors")))
        else:
            learnt = source.training(category, augment=settings.augment)
            detector = one_class.fit(settings, learnt, seed=source.seed, device=source.device)
        scores = np.array(kept["normal_scores"])
        found[category] = ClipMethod(result.method, detector, scores, float(kept["threshold"]), limits)
    for sample, recorded in _probes(result).items():
        row = source.embedded.of([sample])
        _compare(result.method, found[sample.category].judge(row).anomaly_score, recorded)
    return found


def _load_prompted(result: MethodResult, home: Path, clip: Clip) -> Prompted:
    """AnomalyCLIP with the prompts whose hash stands in the results."""
    made = result.manifest["settings"]
    settings = anomalyclip.DetectorSettings(
        made["image_size"], made["first_dual_block"], tuple(made["taps"]), made["sigma"]
    )
    files = [*home.glob("weights/anomalyclip/*/model.safetensors")]
    files += [*home.glob("checkpoints/anomalyclip/*/prompts.safetensors")]
    wanted = result.manifest["checkpoint_hash"]
    fitting = (one for one in _prompts(files, clip) if anomalyclip_training.prompts_hash(one) == wanted)
    learner = next(fitting, None)
    if learner is None:
        raise ValueError(f"The prompts of its results are not among {len(files)} files: run notebook 04_anomalyclip.")
    measured = anomalyclip.read_calibration(result.folder)
    found = Prompted(
        anomalyclip.build_detector(clip, learner, settings),
        {category: one.scores for category, one in measured.items()},
        made["alpha"],
        _limits(result),
    )
    for sample, recorded in _probes(result).items():
        now = found.judge(images.load_image(sample.image_path), sample.category).anomaly_score
        _compare(ANOMALYCLIP, now, recorded)
    return found


def _prompts(files: Sequence[Path], clip: Clip) -> Iterator[anomalyclip.PromptLearner]:
    for path in sorted(files):
        try:
            yield anomalyclip.load_prompts(path, clip)
        except ValueError:  # of another CLIP, left from an earlier training: not the one that is wanted
            continue


def _compare(method: str, now: float, recorded: float) -> None:
    if not math.isclose(now, recorded, rel_tol=1e-3, abs_tol=1e-5):
        raise ValueError(
            f"It scores a test picture {now:.4f} now and {recorded:.4f} in its results: models or settings have "
            f"changed since. Run notebook {NOTEBOOKS[method]} again."
        )
