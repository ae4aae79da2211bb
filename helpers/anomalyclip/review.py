"""Reading AnomalyCLIP's results: tables per painting, and pictures of what its maps mark, rightly and wrongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from helpers import results
from helpers.anomalyclip import model as anomalyclip
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import figures, metrics, statistics
from helpers.judge.statistics import conformal_threshold
from helpers.records import Prediction, Sample
from helpers.results import MethodResult

if TYPE_CHECKING:
    import pandas as pd

REPORT_THRESHOLD = 0.5
"""The report states no threshold for AnomalyCLIP; the published scores are probabilities of the abnormal prompt, so
the rule that needs no threshold is: anomalous when that prompt is the likelier one."""


def per_painting(found: Mapping[str, MethodResult]) -> pd.DataFrame:
    """Image and pixel metrics of each run on each painting, accuracies with counts and 95 % intervals.

    Pixel metrics use normal pictures and anomalous ones with a mask. ``always anomaly`` is the accuracy of calling
    every picture anomalous.
    """
    import pandas as pd

    rows = []
    for name, result in found.items():
        for category, chosen in _by_category(result.predictions).items():
            scores = np.array([p.anomaly_score for p in chosen])
            labels = np.array([p.sample.is_anomalous for p in chosen])
            pixels = metrics.PixelHistogram()
            for prediction in chosen:
                mask = _mask(prediction)
                if mask is not None:
                    pixels.add(result.anomaly_map(prediction), mask)
            auroc = _with_interval(metrics.image_auroc(scores, labels), statistics.auroc_interval(scores, labels))
            rows.append(
                {
                    "prompts": name,
                    "painting": results.category_label(category),
                    "normal + anomalous": f"{(~labels).sum()} + {labels.sum()}",
                    "image AUROC": auroc,
                    "image AP": f"{metrics.average_precision(scores, labels):.3f}",
                    "pixel AUROC": f"{pixels.auroc():.3f}",
                    "AUPRO": f"{pixels.aupro():.3f}",
                    "accuracy, conformal threshold": _accuracy(labels, [p.is_predicted_anomalous for p in chosen]),
                    f"accuracy, score > {REPORT_THRESHOLD}": _accuracy(labels, scores > REPORT_THRESHOLD),
                    "always anomaly": _accuracy(labels, np.ones(len(labels), bool)),
                }
            )
    return pd.DataFrame(rows).set_index(["prompts", "painting"])


def map_thresholds(result: MethodResult, *, alpha: float) -> dict[str, float]:
    """Map value above which a pixel counts as marked, by artwork: at most ``alpha`` of normal pictures have one.

    It is the conformal threshold of the highest map values of the calibration pictures, so no test picture is used.
    """
    return {
        category: conformal_threshold(one.map_maxima, alpha)
        for category, one in anomalyclip.read_calibration(result.folder).items()
    }


def map_limits(result: MethodResult, thresholds: Mapping[str, float]) -> tuple[float, float]:
    """One colour scale for all maps of a run: :func:`figures.map_limits`, widened to show every threshold."""
    low, high = figures.map_limits(result.anomaly_map(prediction) for prediction in result.predictions)
    return min([low, *thresholds.values()]), max([high, *(1.02 * value for value in thresholds.values())])


def marks(result: MethodResult, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """What the maps mark, per painting, counted in pictures.

    Rows: genuine pictures, anomalies whose place is known, anomalies without a mask. ``on the anomaly`` and ``highest
    point on it`` need a known place; ``elsewhere`` is a marked pixel outside the anomaly, for a genuine picture
    anywhere, and for an anomaly of unknown place any marked pixel counts as ``somewhere``.
    """
    import pandas as pd

    columns = ["pictures", "on the anomaly", "highest point on it", "elsewhere", "somewhere"]
    rows: dict[tuple[str, str], dict[str, int | None]] = {}
    for prediction in result.predictions:
        sample, anomaly_map, mask = prediction.sample, result.anomaly_map(prediction), _mask(prediction)
        threshold = thresholds[sample.category]
        if mask is None:
            group, found = "anomaly, place unknown", {"somewhere": anomaly_map.max() > threshold}
        else:
            resized = metrics.resize_map(anomaly_map, mask.shape)
            group, found = "genuine", {"elsewhere": (resized[~mask] > threshold).any()}
            if sample.is_anomalous:
                group = "anomaly with mask"
                found["on the anomaly"] = (resized[mask] > threshold).any()
                found["highest point on it"] = mask.flat[resized.argmax()]
        row = rows.setdefault((results.category_label(sample.category), group), dict.fromkeys(columns))
        for name, value in {"pictures": True, **found}.items():
            row[name] = (row[name] or 0) + int(value)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype("Int64").sort_index()
    table.index = pd.MultiIndex.from_tuples(table.index, names=["painting", "pictures of"])
    return table


def detections(result: MethodResult, category: str, thresholds: Mapping[str, float]) -> list[figures.Panel]:
    """Panels of one painting: an anomaly whose map marks it, one that it misses, and the most marked normal picture.

    Of the hits and of the misses the one with the middle score is shown, not the best; a kind of error that did not
    happen is left out. The last panel answers whether a part of the genuine painting itself is marked.
    """
    hits, misses, normals = [], [], []
    for prediction in _by_category(result.predictions)[category]:
        mask = _mask(prediction)
        anomaly_map = result.anomaly_map(prediction)
        if mask is None:
            continue
        if not prediction.sample.is_anomalous:
            normals.append((float(anomaly_map.max()), prediction))
        elif metrics.resize_map(anomaly_map, mask.shape)[mask].max() > thresholds[category]:
            hits.append((prediction.anomaly_score, prediction))
        else:
            misses.append((prediction.anomaly_score, prediction))
    panels = []
    for words, found, at in (("marked", hits, 0.5), ("missed", misses, 0.5), ("genuine, most marked", normals, 1.0)):
        if found:
            found.sort(key=lambda pair: pair[0])
            prediction = found[round(at * (len(found) - 1))][1]
            kind = f"{prediction.sample.kind}, " if prediction.sample.is_anomalous else ""
            verdict = "anomalous" if prediction.is_predicted_anomalous else "normal"
            panels.append(_panel(result, prediction, f"{kind}{words}; picture called {verdict}"))
    return panels


def score_sets(result: MethodResult) -> list[figures.ScoreSet]:
    """Scores, labels and threshold of each painting for :func:`helpers.judge.figures.score_histograms`."""
    sets = []
    for category, chosen in _by_category(result.predictions).items():
        scores = np.array([p.anomaly_score for p in chosen])
        labels = np.array([p.sample.is_anomalous for p in chosen])
        auroc = (metrics.image_auroc(scores, labels), *statistics.auroc_interval(scores, labels))
        sets.append(figures.ScoreSet(result.method, category, scores, labels, chosen[0].threshold, auroc))
    return sets


def auxiliary_panels(samples: Sequence[Sample], *, n: int) -> list[figures.Panel]:
    """Some pictures that prompts learn from, spread over all of them, captioned with kind and split."""
    role = {"train": "to learn", "calibration": "to tune"}
    return [
        figures.Panel(
            images.load_image(samples[i].image_path, max_side=256),
            caption=f"{samples[i].kind}, {role[samples[i].split]}",
        )
        for i in np.linspace(0, len(samples) - 1, min(n, len(samples))).round().astype(int)
    ]


def _by_category(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    found: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        found.setdefault(prediction.sample.category, []).append(prediction)
    return dict(sorted(found.items()))


def _mask(prediction: Prediction) -> np.ndarray | None:
    """Mask at the picture's size; None for an anomalous picture whose anomaly has no known place."""
    sample = prediction.sample
    if sample.is_anomalous and sample.mask_path is None:
        return None
    return data.mask_of(sample, images.load_image(sample.image_path).shape[:2])


def _panel(result: MethodResult, prediction: Prediction, caption: str) -> figures.Panel:
    picture = images.load_image(prediction.sample.image_path, max_side=512)
    mask = data.mask_of(prediction.sample, picture.shape[:2])
    return figures.Panel(picture, mask, result.anomaly_map(prediction), caption)


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _accuracy(labels: np.ndarray, predicted: Sequence[bool] | np.ndarray) -> str:
    rate = metrics.rates(labels, predicted).accuracy
    low, high = statistics.wilson(*rate)
    return f"{rate.successes}/{rate.n} = {rate.value:.1%} [{low:.0%}, {high:.0%}]"
