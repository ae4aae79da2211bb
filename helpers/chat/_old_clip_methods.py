"""Kept until the chat uses the new room clip.

The CLIP methods on a dataset: synthetic anomalies, one detector per painting, results on disk, sorted folders.

Joins :mod:`features` and :mod:`helpers.clip.one_class` with datasets and results; notebook 03 calls it. The order is
the argument: detectors and thresholds are made from training and calibration pictures in :func:`fit_all`, which gets
no test picture; :func:`predict` reads the test pictures afterwards and can change nothing any more.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files as storage
from helpers import results, synthesis
from helpers.chat import _old_clip_features as features
from helpers.chat import _old_clip_one_class as one_class
from helpers.chat import _old_clip_tuning as tuning
from helpers.chat._old_clip_features import Features
from helpers.chat._old_clip_one_class import Settings, Training
from helpers.chat._old_clip_tuning import Tuned
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import statistics as calibration
from helpers.records import Prediction, Sample
from helpers.results import MethodResult

if TYPE_CHECKING:
    from helpers.clip.backbones import Clip, Cnn

SORTED_FOLDERS = ("anomaly", "non_anomaly")
"""The report's two output folders."""

SEARCH_FORMAT = 2
"""Part of the key of every kept search; raised when the same options search otherwise."""
_AUROCS = ("auroc", "default_auroc", "nested_auroc")

GLOBAL_KIND = "global"
"""Family of all changes of the whole picture (blur, inversion, colours): one family, so that it weighs no more than a
kind of mark."""


# ------------------------------------------------------------------------------------------------- what is learnt from


def synthetic_anomalies(
    samples: Sequence[Sample], *, n_anomalies: int, seed: int
) -> Iterator[tuple[np.ndarray, Sample, str]]:
    """Anomalies made from normal pictures: every picture and every kind as often as the others, give or take one.

    Kinds are those of :data:`helpers.synthesis.marks.LOCAL_KINDS` and, as one more, the anomalous changes of the whole
    picture. They are dealt to the pictures like cards from shuffled decks: counted through in order, pictures of one
    group would get the same kinds again and again. The same seed and pictures give the same anomalies.

    Args:
        samples: normal pictures of the splits ``train`` and ``calibration``.
        n_anomalies: anomalies made in all.
        seed: of everything random.
    Returns:
        uint8 RGB picture, the sample it was made from, and the kind; ordered by sample.
    Raises:
        ValueError: a sample is anomalous or a test picture.
    """
    wrong = [sample for sample in samples if sample.is_anomalous or sample.split == "test"]
    if wrong:
        raise ValueError(
            f"{wrong[0].image_path} is an anomalous or test picture. Anomalies to train on are made from normal "
            "pictures of 'train' and 'calibration' only."
        )
    deck = _deck([*synthesis.LOCAL_KINDS, GLOBAL_KIND], seed)
    for i, sample in enumerate(samples):
        n_here = len(range(i, n_anomalies, len(samples)))
        picture = images.load_image(sample.image_path) if n_here else None
        rng = synthesis.rng_for(seed, sample.sha256)
        for kind in itertools.islice(deck, n_here):
            if kind == GLOBAL_KIND:
                yield synthesis.vary(picture, str(rng.choice(synthesis.ANOMALOUS_VARIATIONS)), rng), sample, kind
            else:
                yield synthesis.synthesize(picture, kind, rng)[0], sample, kind


def _deck(kinds: Sequence[str], seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(kinds).tolist()


def trainings(
    dataset: data.Dataset,
    embedded: Features,
    *,
    clip: Clip,
    cnn: Cnn,
    cache_dir: Path,
    batch_size: int,
    n_anomalies: int,
    seed: int,
) -> dict[str, Training]:
    """What each painting's detectors may learn from: its normals outside the test split, and anomalies made from them.

    Args:
        dataset: from :func:`helpers.data.manifest.open_dataset`.
        embedded: features of its pictures, from :func:`helpers.clip.features.embed_samples`.
        clip, cnn, cache_dir, batch_size: as for :func:`helpers.clip.features.embed_images`.
        n_anomalies, seed: as for :func:`synthetic_anomalies`, for each painting.
    Raises:
        ValueError: a painting has no normal picture to learn from.
    """
    found = {}
    for category in dataset.categories:
        normals = [s for s in dataset.select(category=category, is_anomalous=False) if s.split != "test"]
        if not normals:
            raise ValueError(
                f"{category} has no normal picture outside the test split. Put genuine pictures of it into "
                f"{category}/train/good and run notebook 02 again."
            )
        sources: list[Sample] = []
        kinds: list[str] = []
        models = {"clip": clip, "cnn": cnn, "cache_dir": cache_dir, "batch_size": batch_size}
        views, view_sources = embed_views(normals, **models, seed=seed)
        anomalies = features.embed_images(
            _noting(synthetic_anomalies(normals, n_anomalies=n_anomalies, seed=seed), sources, kinds),
            **models,
            patches=True,
            n_pictures=n_anomalies,
        )
        found[category] = Training(
            tuple(normals), embedded.of(normals), anomalies, tuple(sources), tuple(kinds), views, view_sources
        )
    return found


def embed_views(
    normals: Sequence[Sample], *, clip: Clip, cnn: Cnn, cache_dir: Path, batch_size: int, seed: int
) -> tuple[Features | None, tuple[Sample, ...]]:
    """One more photograph of each training picture (other light, crop, stand, compression) for ``augment``.

    Args:
        normals: normal pictures; those of split ``calibration`` get none.
        clip, cnn, cache_dir, batch_size: as for :func:`helpers.clip.features.embed_images`.
        seed: of the photographs; the same seed and picture give the same view.
    Returns:
        features with patches, and the picture each was made from; None and () without training pictures.
    """
    learnt = tuple(sample for sample in normals if sample.split == "train")
    if not learnt:
        return None, ()
    pictures = (
        synthesis.rephotograph(images.load_image(s.image_path), synthesis.rng_for(seed, f"view/{s.sha256}"))[0]
        for s in learnt
    )
    models = {"clip": clip, "cnn": cnn, "cache_dir": cache_dir, "batch_size": batch_size}
    return features.embed_images(pictures, **models, patches=True, n_pictures=len(learnt)), learnt


def _noting(
    made: Iterator[tuple[np.ndarray, Sample, str]], sources: list[Sample], kinds: list[str]
) -> Iterator[np.ndarray]:
    for picture, source, kind in made:
        sources.append(source)
        kinds.append(kind)
        yield picture


# ------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Fitted:
    """A painting's detector, ready for test pictures.

    Attributes:
        tuned: how its settings were chosen.
        detector: see :mod:`helpers.clip.one_class`.
        normal_scores: float64 ``(n,)``, scores of normal pictures by detectors that had not seen them.
        threshold: conformal threshold of these scores.
        seconds: time to tune, fit and calibrate.
    """

    tuned: Tuned
    detector: one_class.Detector
    normal_scores: np.ndarray
    threshold: float
    seconds: float


def fit_all(
    method: str,
    learn_from: Mapping[str, Training],
    *,
    n_trials: int,
    alpha: float,
    seed: int,
    checkpoint_dir: Path | None,
    strategy: str = "random",
    base: Settings | None = None,
    device: str = "cpu",
) -> dict[str, Fitted]:
    """Tune, fit and calibrate one method for every painting.

    The outcome of each search is kept in ``checkpoint_dir/<painting>.json`` and taken up again when pictures, features
    and options are the same; a trained head is written beside it as safetensors.

    Args:
        method: one of :data:`helpers.clip.one_class.METHODS`.
        learn_from: painting -> what its detector may learn from, see :func:`trainings`.
        n_trials, strategy, seed: as for :func:`helpers.clip.tuning.tune`; one trial takes the default settings.
        alpha: false-alarm rate that the thresholds aim at.
        checkpoint_dir: ``profile.checkpoint_dir(method)``; None keeps nothing.
        base: the default settings, and the values of fields that are not searched.
        device: torch device of the memory bank.
    """
    fitted = {}
    default = base or one_class.DEFAULTS[method]
    options = {"n_trials": n_trials, "strategy": strategy, "seed": seed}
    for category, training in learn_from.items():
        start = time.perf_counter()
        key = _search_key(method, training, default, options)
        path = None if checkpoint_dir is None else Path(checkpoint_dir) / f"{category}.json"
        tuned = None if path is None else _kept_search(path, key, type(default))
        if tuned is None:
            tuned = tuning.tune(method, training, default=default, device=device, **options)
        with tuning.one_thread():
            calibrated = one_class.calibrate(tuned.settings, training, seed=seed, device=device)
        threshold = calibration.conformal_threshold(calibrated.normal_scores, alpha)
        seconds = time.perf_counter() - start
        fitted[category] = Fitted(tuned, calibrated.detector, calibrated.normal_scores, threshold, seconds)
        if path is not None:
            _keep(path, key, method, fitted[category], alpha)
    return fitted


def _keep(path: Path, key: str, method: str, one: Fitted, alpha: float) -> None:
    if isinstance(one.detector, one_class.HeadDetector):
        _write_head(path.with_suffix(".safetensors"), one.detector)
    tuned = one.tuned
    storage.write_json(
        path,
        {
            "key": key,
            "method": method,
            "settings": asdict(tuned.settings),
            **{name: _or_none(getattr(tuned, name)) for name in _AUROCS},
            "strategy": tuned.strategy,
            "note": tuned.note,
            "trials": [dict(trial) for trial in tuned.trials],
            "alpha": alpha,
            "threshold": one.threshold,
            "normal_scores": one.normal_scores.tolist(),
        },
    )


def _search_key(method: str, training: Training, default: Settings, options: Mapping[str, Any]) -> str:
    """Hash of everything a search depends on; features by their values, so that another backbone counts."""
    parts = [training.normals, training.anomalies, training.views]
    rows = [row for part in parts if part is not None for row in (part.clip, part.cnn, part.patches) if row is not None]
    return storage.sha256_json(
        {
            "format": SEARCH_FORMAT,
            "method": method,
            "pictures": [(s.sha256, s.split, s.group) for s in training.samples],
            "anomalies": [(s.sha256, kind) for s, kind in zip(training.sources, training.kinds, strict=True)],
            "features": [float(np.abs(row).sum(dtype=np.float64)) for row in rows],
            "options": [dict(options), asdict(default), one_class.SPACES[method]],
        }
    )


def _kept_search(path: Path, key: str, settings_type: type) -> Tuned | None:
    if not path.exists():
        return None
    kept = storage.read_json(path)
    if kept["key"] != key:
        return None
    aurocs = {name: math.nan if kept[name] is None else kept[name] for name in _AUROCS}
    settings = settings_type(**kept["settings"])
    return Tuned(settings, **aurocs, strategy=kept["strategy"], trials=tuple(kept["trials"]), note=kept["note"])


def _write_head(path: Path, detector: one_class.HeadDetector) -> None:
    from safetensors.torch import save_file

    with storage.atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in detector.state().items()}, temporary)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


# ------------------------------------------------------------------------------------------------- predict


def predict(
    method: str,
    fitted: Mapping[str, Fitted],
    dataset: data.Dataset,
    embedded: Features,
    *,
    alpha: float,
    results_dir: Path,
    profile: str,
) -> MethodResult:
    """Score the test pictures and write ``results/<method>/``; nothing is done when they are there already.

    Args:
        method: name of the row.
        fitted: from :func:`fit_all`, a detector for every painting of the test split.
        dataset, embedded: the dataset and its features.
        alpha: recorded with the thresholds.
        results_dir: ``profile.results_dir(method)``.
        profile: name of the profile, recorded.
    Returns:
        the results as the comparison reads them.
    """
    samples = _test_samples(dataset)
    settings = {
        category: {
            **asdict(one.tuned.settings),
            "threshold": one.threshold,
            "alpha": alpha,
            "n_calibration_scores": len(one.normal_scores),
            **{f"search_{name}": _or_none(getattr(one.tuned, name)) for name in _AUROCS},
        }
        for category, one in fitted.items()
    }
    if not results.is_complete(results_dir, dataset_hash=dataset.hash, settings=settings):
        with results.Writer(
            results_dir,
            method=method,
            samples=samples,
            dataset_dir=dataset.folder,
            dataset_hash=dataset.hash,
            profile=profile,
            settings=settings,
        ) as writer:
            for category in sorted({sample.category for sample in samples}):
                chosen = [s for s in samples if s.category == category and s.image_path not in writer.done]
                for prediction in predictions(fitted[category], chosen, embedded.of(chosen)):
                    writer.add(prediction)
    return results.read(results_dir, samples, dataset.folder, dataset.hash)


def predictions(one: Fitted, samples: Sequence[Sample], rows: Features) -> Iterator[Prediction]:
    """A detector's verdicts on pictures of its painting, one by one, written nowhere.

    Args:
        one: the painting's detector.
        samples: the pictures.
        rows: their features, row by row.
    """
    if not samples:
        return
    start = time.perf_counter()
    maps: Sequence[np.ndarray | None] = [None] * len(samples)
    if isinstance(one.detector, one_class.PatchKnnDetector):
        maps = one.detector.maps(rows)
        scores = one.detector.score_maps(maps)
    else:
        scores = one.detector.score(rows)
    p_values = calibration.p_values(one.normal_scores, scores)
    seconds = (time.perf_counter() - start) / len(samples) + rows.seconds
    for values in zip(samples, scores, maps, p_values, seconds, strict=True):
        sample, score, anomaly_map, p_value, spent = values
        yield Prediction(sample, float(score), anomaly_map, one.threshold, float(p_value), float(spent))


def scorer(fitted: Mapping[str, Fitted], **models: Any) -> Callable[[Sequence[Sample]], Iterator[Prediction]]:
    """A function that embeds and scores any pictures of the paintings, for :func:`helpers.judge.inbox.look`.

    Args:
        fitted: from :func:`fit_all`.
        models: ``clip, cnn, cache_dir, batch_size``, as for :func:`helpers.clip.features.embed_samples`.
    """

    def score(samples: Sequence[Sample]) -> Iterator[Prediction]:
        for category in sorted({sample.category for sample in samples}):
            chosen = [sample for sample in samples if sample.category == category]
            yield from predictions(fitted[category], chosen, features.embed_samples(chosen, **models))

    return score


def fitted_id(fitted: Mapping[str, Fitted]) -> str:
    """Identifies detectors by settings, calibration scores and thresholds: 16 hexadecimal digits."""
    parts = [
        (category, asdict(one.tuned.settings), one.threshold, np.round(one.normal_scores, 6).tolist())
        for category, one in sorted(fitted.items())
    ]
    return storage.sha256_json(parts)[:16]


def _test_samples(dataset: data.Dataset) -> list[Sample]:
    samples = dataset.select(split="test")
    if not samples:
        raise ValueError(f"{dataset.folder} has no test picture. Add some below <painting>/test and run notebook 02.")
    return samples
