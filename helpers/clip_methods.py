"""The CLIP methods on a dataset: synthetic anomalies, one detector per painting, results on disk, sorted folders.

Joins :mod:`helpers.features` and :mod:`helpers.one_class` with datasets and results; notebook 03 calls it. The order is
the argument: detectors and thresholds are made from training and calibration pictures in :func:`fit_all`, which gets
no test picture; :func:`predict` reads the test pictures afterwards and can change nothing any more.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from helpers import (
    calibration,
    data,
    features,
    figures,
    images,
    metrics,
    one_class,
    report_2024,
    results,
    statistics,
    storage,
    synthesis,
)
from helpers.features import Features
from helpers.one_class import Search, Settings, Training
from helpers.records import NORMAL_KIND, Prediction, Sample
from helpers.results import MethodResult

if TYPE_CHECKING:
    from helpers.backbones import Clip, Cnn

SORTED_FOLDERS = ("anomaly", "non_anomaly")
"""The report's two output folders."""

GLOBAL_KIND = "global"
"""Family of all changes of the whole picture (blur, inversion, colours): one family, so that it weighs no more than a
kind of mark."""


# ------------------------------------------------------------------------------------------------- what is learnt from


def synthetic_anomalies(
    samples: Sequence[Sample], *, n_anomalies: int, seed: int
) -> Iterator[tuple[np.ndarray, Sample, str]]:
    """Anomalies made from normal pictures: every picture and every kind as often as the others, give or take one.

    Kinds are those of :data:`helpers.synthesis.LOCAL_KINDS` and, as one more, the anomalous changes of the whole
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
        dataset: from :func:`helpers.data.open_dataset`.
        embedded: features of its pictures, from :func:`helpers.features.embed_samples`.
        clip, cnn, cache_dir, batch_size: as for :func:`helpers.features.embed_images`.
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
        anomalies = features.embed_images(
            _noting(synthetic_anomalies(normals, n_anomalies=n_anomalies, seed=seed), sources, kinds),
            clip=clip,
            cnn=cnn,
            cache_dir=cache_dir,
            batch_size=batch_size,
            patches=True,
            n_pictures=n_anomalies,
        )
        found[category] = Training(tuple(normals), embedded.of(normals), anomalies, tuple(sources), tuple(kinds))
    return found


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
        search: how its settings were chosen.
        detector: see :mod:`helpers.one_class`.
        normal_scores: float64 ``(n,)``, scores of normal pictures by detectors that had not seen them.
        threshold: conformal threshold of these scores.
        seconds: time to search, fit and calibrate.
    """

    search: Search
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
    checkpoint_dir: Path,
    base: Settings | None = None,
    device: str = "cpu",
) -> dict[str, Fitted]:
    """Search, fit and calibrate one method for every painting.

    The outcome of each search is kept in ``checkpoint_dir/<painting>.json`` and taken up again when pictures, features
    and options are the same; a trained head is written beside it as safetensors.

    Args:
        method: one of :data:`helpers.one_class.METHODS`.
        learn_from: painting -> what its detector may learn from, see :func:`trainings`.
        n_trials, seed, base: as for :func:`helpers.one_class.search`.
        alpha: false-alarm rate that the thresholds aim at.
        checkpoint_dir: ``profile.checkpoint_dir(method)``.
        device: torch device of the memory bank.
    """
    fitted = {}
    for category, training in learn_from.items():
        start = time.perf_counter()
        base_settings = base or one_class.DEFAULTS[method]
        key = _search_key(method, training, n_trials=n_trials, seed=seed, base=base_settings)
        path = Path(checkpoint_dir) / f"{category}.json"
        search = _kept_search(path, key, type(base_settings))
        if search is None:
            search = one_class.search(method, training, n_trials=n_trials, seed=seed, base=base_settings)
        calibrated = one_class.calibrate(search.settings, training, seed=seed, device=device)
        detector, normal_scores = calibrated.detector, calibrated.normal_scores
        threshold = calibration.conformal_threshold(normal_scores, alpha)
        seconds = time.perf_counter() - start
        fitted[category] = Fitted(search, detector, normal_scores, threshold, seconds)
        if isinstance(detector, one_class.HeadDetector):
            _write_head(path.with_suffix(".safetensors"), detector)
        storage.write_json(
            path,
            {
                "key": key,
                "method": method,
                "settings": asdict(search.settings),
                "auroc": _or_none(search.auroc),
                "unseen_auroc": _or_none(search.unseen_auroc),
                "trials": [dict(trial) for trial in search.trials],
                "alpha": alpha,
                "threshold": threshold,
                "normal_scores": normal_scores.tolist(),
            },
        )
    return fitted


def _search_key(method: str, training: Training, *, n_trials: int, seed: int, base: Settings) -> str:
    """Hash of everything a search depends on; features by their values, so that another backbone counts."""
    rows = [training.normals.clip, training.normals.cnn]
    rows += [] if training.anomalies is None else [training.anomalies.clip, training.anomalies.cnn]
    return storage.sha256_json(
        {
            "method": method,
            "pictures": [(s.sha256, s.split, s.group) for s in training.samples],
            "anomalies": [(s.sha256, kind) for s, kind in zip(training.sources, training.kinds, strict=True)],
            "features": [float(np.abs(part).astype(np.float64).sum()) for part in rows],
            "options": [n_trials, seed, asdict(base), one_class.SPACES[method]],
        }
    )


def _kept_search(path: Path, key: str, settings_type: type) -> Search | None:
    if not path.exists():
        return None
    kept = storage.read_json(path)
    if kept["key"] != key:
        return None
    auroc, unseen = (math.nan if kept[name] is None else kept[name] for name in ("auroc", "unseen_auroc"))
    return Search(settings_type(**kept["settings"]), auroc, unseen, tuple(kept["trials"]))


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
            **asdict(one.search.settings),
            "threshold": one.threshold,
            "alpha": alpha,
            "n_calibration_scores": len(one.normal_scores),
            "search_auroc": _or_none(one.search.auroc),
            "search_unseen_auroc": _or_none(one.search.unseen_auroc),
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


def _test_samples(dataset: data.Dataset) -> list[Sample]:
    samples = dataset.select(split="test")
    if not samples:
        raise ValueError(f"{dataset.folder} has no test picture. Add some below <painting>/test and run notebook 02.")
    return samples


# ------------------------------------------------------------------------------------------------- the report of 2024


def run_report_2024(
    method: str,
    dataset: data.Dataset,
    embedded: Features,
    *,
    clip: Clip,
    cache_dir: Path,
    batch_size: int,
    seed: int,
    results_dir: Path,
    profile: str,
) -> MethodResult:
    """One method as the report of 2024 used it, thresholds from the test pictures included; see
    :mod:`helpers.report_2024`.

    ``results_dir`` must not lie directly in the folder that the comparison reads (``results/report_2024/<method>`` is
    fine): these rows are no honest competitors.
    """
    preset = report_2024.PRESETS[method]
    samples = _test_samples(dataset)
    settings = {"preset": "report_2024", "decision": preset.decision, "flaw": preset.flaw, "seed": seed}
    settings |= preset.describe()
    if not results.is_complete(results_dir, dataset_hash=dataset.hash, settings=settings):
        train = dataset.select(split="train", is_anomalous=False)
        views = None
        if method in ("clip_cross_entropy", "clip_lof"):
            pictures = (images.load_image(sample.image_path) for sample in train)
            views = features.embed_images(
                report_2024.altered_views(pictures, method, seed=seed),
                clip=clip,
                cnn=None,
                cache_dir=cache_dir,
                batch_size=batch_size,
                n_pictures=len(train),
            )
        start = time.perf_counter()
        test = embedded.of(samples)
        scores, threshold = report_2024.verdicts(method, train=embedded.of(train), views=views, test=test, seed=seed)
        spent = (time.perf_counter() - start) / len(samples) + test.seconds
        with results.Writer(
            results_dir,
            method=method,
            samples=samples,
            dataset_dir=dataset.folder,
            dataset_hash=dataset.hash,
            profile=profile,
            settings=settings,
        ) as writer:
            for sample, score, seconds in zip(samples, scores, spent, strict=True):
                if sample.image_path not in writer.done:
                    writer.add(Prediction(sample, float(score), threshold=threshold, seconds=float(seconds)))
    return results.read(results_dir, samples, dataset.folder, dataset.hash)


# ------------------------------------------------------------------------------------------------- tables and figures


def search_table(fitted: Mapping[str, Mapping[str, Fitted]]) -> pd.DataFrame:
    """What each search chose, what it expects of unseen kinds of anomaly, and the threshold.

    Returns:
        one row per method and painting; ``chosen`` lists the searched fields only.
    """
    rows = []
    for method, paintings in fitted.items():
        for category, one in paintings.items():
            chosen = {name: getattr(one.search.settings, name) for name in one_class.SPACES[method]}
            rows.append(
                {
                    "method": method,
                    "painting": category,
                    "chosen": ", ".join(f"{name} {value}" for name, value in chosen.items()) or "nothing to choose",
                    "AUROC, tuned kinds": one.search.auroc,
                    "AUROC, unseen kinds": one.search.unseen_auroc,
                    "normals behind the threshold": len(one.normal_scores),
                    "threshold": one.threshold,
                    "seconds": one.seconds,
                }
            )
    return pd.DataFrame(rows).set_index(["method", "painting"]).round(3)


def side_by_side(report: Mapping[str, MethodResult], sound: Mapping[str, MethodResult]) -> pd.DataFrame:
    """Rates of the report's presets and of the sound defaults on the same test pictures, with their counts.

    Returns:
        one row per method and preset: accuracy with its 95 % interval, anomalies found, normals called normal.
    """
    rows = []
    for method, result in sound.items():
        for preset, one in (("report_2024", report.get(method)), ("sound", result)):
            if one is not None:
                rows.append({"method": method, "preset": preset, **_rates_in_words(one.predictions)})
    return pd.DataFrame(rows).set_index(["method", "preset"])


def per_painting(found: Mapping[str, MethodResult], fitted: Mapping[str, Mapping[str, Fitted]]) -> pd.DataFrame:
    """AUROC and rates of each method and painting, with the AUROC that the search expected on unseen kinds."""
    rows = []
    for method, result in found.items():
        for category in sorted({p.sample.category for p in result.predictions}):
            chosen = [p for p in result.predictions if p.sample.category == category]
            scores, labels = [p.anomaly_score for p in chosen], [p.sample.is_anomalous for p in chosen]
            value = metrics.image_auroc(scores, labels)
            low, high = statistics.auroc_interval(scores, labels)
            one = fitted[method][category]
            rows.append(
                {
                    "method": method,
                    "painting": category,
                    "AUROC": f"{value:.3f} [{low:.3f}, {high:.3f}]",
                    "expected (unseen kinds)": _or_words(one.search.unseen_auroc),
                    **_rates_in_words(chosen),
                    "seconds to fit": round(one.seconds, 1),
                }
            )
    return pd.DataFrame(rows).set_index(["method", "painting"])


def score_sets(found: Mapping[str, MethodResult]) -> list[figures.ScoreSet]:
    """Scores, labels and thresholds by method and painting, for :func:`helpers.figures.score_histograms`."""
    sets = []
    for method, result in found.items():
        for category in sorted({p.sample.category for p in result.predictions}):
            chosen = [p for p in result.predictions if p.sample.category == category]
            scores = np.array([p.anomaly_score for p in chosen])
            labels = np.array([p.sample.is_anomalous for p in chosen])
            auroc = (metrics.image_auroc(scores, labels), *statistics.auroc_interval(scores, labels))
            sets.append(figures.ScoreSet(method, category, scores, labels, chosen[0].threshold, auroc))
    return sets


def map_examples(result: MethodResult, *, n_per_painting: int = 3) -> list[figures.Panel]:
    """Pictures with mask and map: for each painting a normal one and the middle one of some kinds, by score.

    The middle one, not the best: a figure of successes would flatter.
    """
    panels = []
    for category in sorted({p.sample.category for p in result.predictions}):
        by_kind: dict[str, list[Prediction]] = {}
        for prediction in sorted(result.predictions, key=lambda p: p.anomaly_score):
            if prediction.sample.category == category:
                by_kind.setdefault(prediction.sample.kind, []).append(prediction)
        normal = by_kind.pop(NORMAL_KIND, [])
        with_mask = sorted(kind for kind, found in by_kind.items() if found[0].sample.mask_path is not None)
        kinds = with_mask or sorted(by_kind)
        spread = np.linspace(0, len(kinds) - 1, min(n_per_painting, len(kinds))).round().astype(int)
        for group in [normal, *(by_kind[kinds[i]] for i in spread)]:
            if group:
                panels.append(_panel(result, group[len(group) // 2]))
    return panels


def _panel(result: MethodResult, prediction: Prediction) -> figures.Panel:
    sample = prediction.sample
    picture = images.load_image(sample.image_path, max_side=512)
    verdict = "called anomalous" if prediction.is_predicted_anomalous else "called normal"
    return figures.Panel(
        picture,
        data.mask_of(sample, picture.shape[:2]),
        result.anomaly_map(prediction),
        f"{results.category_label(sample.category)}: {sample.kind}, {verdict}",
    )


def show_anomalies(samples: Sequence[Sample], *, n: int, seed: int) -> list[figures.Panel]:
    """``n`` synthetic anomalies, one from each of the first pictures, captioned with their kinds."""
    made = synthetic_anomalies(samples[:n], n_anomalies=n, seed=seed)
    return [figures.Panel(picture, caption=kind) for picture, _, kind in made]


def _or_words(value: float) -> str:
    return "not searched" if math.isnan(value) else f"{value:.3f}"


def _rates_in_words(predictions: Sequence[Prediction]) -> dict[str, str]:
    labels = [p.sample.is_anomalous for p in predictions]
    rates = metrics.rates(labels, [p.is_predicted_anomalous for p in predictions])
    low, high = statistics.wilson(*rates.accuracy)
    accuracy = f"{rates.accuracy.value:.1%} = {rates.accuracy.successes}/{rates.accuracy.n} [{low:.1%}, {high:.1%}]"
    counted = {"anomalies found": rates.sensitivity, "normals passed": rates.specificity}
    return {"accuracy": accuracy} | {name: f"{rate.successes}/{rate.n}" for name, rate in counted.items()}


# ------------------------------------------------------------------------------------------------- sorted folders


def sort_pictures(result: MethodResult, target: Path) -> Path:
    """Put every test picture into ``target/anomaly`` or ``target/non_anomaly``, by verdict, as the report did.

    Links where the disk allows them, else copies (Google Drive and Windows have no links). The name says painting and
    true kind, so that errors can be read off a folder listing. An older sorting is replaced.

    Returns:
        ``target``.
    """
    target = Path(target)
    for name in SORTED_FOLDERS:
        shutil.rmtree(target / name, ignore_errors=True)
        (target / name).mkdir(parents=True)
    for prediction in result.predictions:
        sample = prediction.sample
        folder = target / SORTED_FOLDERS[not prediction.is_predicted_anomalous]
        name = f"{sample.category}__{sample.kind}__{sample.sha256[:8]}_{Path(sample.image_path).name}"
        _link_or_copy(Path(sample.image_path), folder / name)
    return target


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.symlink_to(os.path.relpath(source, target.parent))
    except OSError:
        shutil.copyfile(source, target)
