"""All methods on the same pictures: the table, the paired tests, and what may be said about them.

``comparison.csv`` holds one number a row: ``method, category, kind, metric, value, ci_low, ci_high, n_images,
n_anomalous, profile, dataset_hash``.

- ``category`` is a painting or ``"all"``. A score of one painting means nothing on another (each has its own detector
  and threshold), so scores are never pooled: on ``"all"`` the *rates* (accuracy, sensitivity, specificity, balanced
  accuracy) come from pooled verdicts, each made at its own painting's threshold, and every *ranking* metric (AUROC,
  AP, F1-max, pixel AUROC, AUPRO) is the plain mean over the paintings where it is defined.
- ``kind`` is ``"all"``; one kind of anomaly against the normal pictures of its painting; ``"synthetic"`` or ``"real"``
  (made by notebook 02, or found); or ``"visibility:faint"`` to ``"visibility:strong"``, quarters of the marked test
  pictures by the visibility that synthesis recorded. A kind of the dataset that bears one of these names is written
  ``"kind:real"``.
- ``n_images`` and ``n_anomalous`` are the pictures behind that very number: the denominator of a rate.

Intervals are 95 %: Wilson for rates, their MOVER combination for balanced accuracy, logit-DeLong (Newcombe at 0 and
1) for image AUROC, bootstrap over source pictures for the rest; means over paintings combine the paintings' intervals
by MOVER (Zou and Donner, Statistics in Medicine 2008). A number that is not defined has no row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from helpers import files as storage
from helpers import results
from helpers.anomalygpt import conversations
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import _old_metrics as metrics
from helpers.judge import _old_statistics as statistics
from helpers.judge.findings import ALWAYS, RESERVED_KINDS, count_of, decimal, estimate, numbers, seconds_text
from helpers.records import Prediction, Sample
from helpers.results import METHODS, MethodResult, category_label, method_label

COLUMNS = (
    "method",
    "category",
    "kind",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n_images",
    "n_anomalous",
    "profile",
    "dataset_hash",
)
METRICS = (
    "image_auroc",
    "image_ap",
    "f1_max",
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "answer_accuracy",
    "pixel_auroc",
    "aupro",
    "seconds_per_image",
)
VISIBILITY_BINS = ("faint", "weak", "clear", "strong")
NOTEBOOKS: Mapping[str, str] = {
    **{method: "03_clip" for method in METHODS if method.startswith("clip_")},
    "anomalyclip": "04_anomalyclip",
    **dict.fromkeys(("aligned", "dinov2_memory", "dinov2_subspace"), "05_reference"),
    **dict.fromkeys(("anomalygpt", "anomalygpt_aligned"), "07_anomalygpt_test"),
    ALWAYS: "09_compare",
}
"""Which notebook writes a method's predictions."""

_POOLED = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "answer_accuracy", "seconds_per_image")
_N_DRAWS = 1000
_MIN_FOR_BINS = 8
_BOOTSTRAP_SIDE = 128


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Attributes:
        dataset: the dataset all rows share.
        profile: name of the profile.
        methods: results of the methods that have them, predictions in the order of the test pictures.
        missing: method -> sentence with the notebook that makes it.
        refused: method -> why its results are not compared (another dataset, other pictures).
        table: the tidy table, see the module's text.
        tests: one row per pair, painting and measure: ``category, measure, method_a, method_b, value_a, value_b,
            difference, p_value, p_holm, n_images, sentence``.
        notes: what a reader should know, in sentences.
    """

    dataset: data.Dataset
    profile: str
    methods: tuple[MethodResult, ...]
    missing: Mapping[str, str]
    refused: Mapping[str, str]
    table: pd.DataFrame
    tests: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def test_samples(self) -> list[Sample]:
        return self.dataset.select(split="test")


# ------------------------------------------------------------------------------------------------------- the main job


def compare(dataset: data.Dataset, results_dir: Path, *, profile: str) -> Comparison:
    """Read every method's results on this dataset and compute the whole comparison.

    Adds the trivial rule ``always_anomaly`` to ``results_dir`` when it is not there. Folders of unknown name directly
    in ``results_dir`` that hold complete results join as further rows. Anomaly maps are read one by one.

    Args:
        dataset: from :func:`helpers.data.manifest.open_dataset`; only its test split is scored.
        results_dir: folder with one results folder per method.
        profile: name written into every row.
    Raises:
        ValueError: the dataset has no test picture.
    """
    samples = [sample for sample in dataset.samples if sample.split == "test"]
    if not samples:
        raise ValueError(f"{dataset.folder} has no test picture; run 02_synthesize_anomalies again.")
    write_always_anomaly(Path(results_dir) / ALWAYS, dataset, profile=profile)
    methods, missing, refused = _read_all(Path(results_dir), samples, dataset)
    rows, notes = [], []
    bins = visibility_bins(samples)
    for result in methods:
        for row in _method_rows(result, bins, notes):
            rows.append({"method": result.method, **row, "profile": profile, "dataset_hash": dataset.hash})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return Comparison(
        dataset, profile, tuple(methods), missing, refused, table, paired_tests(methods), tuple(dict.fromkeys(notes))
    )


def write(comparison: Comparison, folder: Path) -> Path:
    """Write ``comparison.csv`` (returned) and ``paired_tests.csv``, atomically."""
    folder = Path(folder)
    storage.write_text(folder / "paired_tests.csv", comparison.tests.to_csv(index=False))
    storage.write_text(folder / "comparison.csv", comparison.table.to_csv(index=False))
    return folder / "comparison.csv"


def read(path: Path) -> pd.DataFrame:
    """Read a ``comparison.csv``.

    Raises:
        FileNotFoundError: there is none; the message names the notebook.
        ValueError: its columns are not :data:`COLUMNS`.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist. Run 09_compare, which writes it.")
    empty = {name: [""] for name in ("ci_low", "ci_high", "value")}
    table = pd.read_csv(path, keep_default_na=False, na_values=empty, float_precision="round_trip")
    if tuple(table.columns) != COLUMNS:
        raise ValueError(f"{path} has columns {', '.join(table.columns)}; expected {', '.join(COLUMNS)}.")
    return table


def write_always_anomaly(folder: Path, dataset: data.Dataset, *, profile: str) -> Path:
    """The trivial rule as a method like any other: score 1 for every picture, threshold 0.

    Whatever a detector is worth must show beside it. It takes no time and has no map.
    """
    samples = [sample for sample in dataset.samples if sample.split == "test"]
    settings = {"rule": "every picture is called anomalous", "threshold": 0.0}
    if results.is_complete(folder, dataset_hash=dataset.hash, settings=settings):
        return Path(folder)
    with results.Writer(
        folder,
        method=ALWAYS,
        samples=samples,
        dataset_dir=dataset.folder,
        dataset_hash=dataset.hash,
        profile=profile,
        settings=settings,
    ) as writer:
        for sample in samples:
            if sample.image_path not in writer.done:
                writer.add(Prediction(sample, 1.0, threshold=0.0))
    return Path(folder)


def _read_all(
    results_dir: Path, samples: Sequence[Sample], dataset: data.Dataset
) -> tuple[list[MethodResult], dict[str, str], dict[str, str]]:
    others = sorted(path.parent.name for path in results_dir.glob(f"[!.]*/{results.MANIFEST}"))
    found, missing, refused = [], {}, {}
    for method in (*METHODS, *(name for name in others if name not in METHODS)):
        try:
            result = results.read(results_dir / method, samples, dataset.folder, dataset.hash)
            found.append(_in_order(result, samples))
        except FileNotFoundError:
            missing[method] = f"{method_label(method)} has no results yet: run {NOTEBOOKS[method]}."
        except (ValueError, KeyError) as error:
            refused[method] = str(error)
    return found, missing, refused


def _in_order(result: MethodResult, samples: Sequence[Sample]) -> MethodResult:
    """The predictions in the order of the test pictures; refuses a run that does not cover all of them."""
    by_path = {prediction.sample.image_path: prediction for prediction in result.predictions}
    absent = [sample for sample in samples if sample.image_path not in by_path]
    if absent:
        raise ValueError(
            f"{result.method} has predictions for {len(samples) - len(absent)} of {len(samples)} test pictures. Rows "
            "on different pictures are not compared: run the method's notebook again."
        )
    return MethodResult(
        result.method, result.folder, result.manifest, [by_path[sample.image_path] for sample in samples]
    )


# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class _Scored:
    """One method's numbers on the test pictures of one painting."""

    scores: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    seconds: np.ndarray
    samples: Sequence[Sample]
    has_threshold: bool = True
    subsets: Mapping[str, np.ndarray] = field(default_factory=dict)
    answers: Sequence[str] = ()


def kind_name(kind: str) -> str:
    """The kind as the table writes it: the table's own words (all, synthetic, real, visibility) are kept apart.

    >>> kind_name("box"), kind_name("real")
    ('box', 'kind:real')
    """
    return f"kind:{kind}" if kind in RESERVED_KINDS or kind.startswith(("visibility:", "kind:")) else kind


def visibility_bins(samples: Sequence[Sample]) -> dict[Path, str]:
    """Quarters of the marked test pictures by visibility: picture -> name of its bin.

    Empty when fewer than eight pictures have a visibility, or all have the same.
    """
    marked = [s for s in samples if s.is_anomalous and s.visibility is not None and math.isfinite(s.visibility)]
    values = np.array([sample.visibility for sample in marked])
    if len(marked) < _MIN_FOR_BINS or values.min() == values.max():
        return {}
    edges = np.quantile(values, [0.25, 0.5, 0.75])
    return {sample.image_path: VISIBILITY_BINS[np.searchsorted(edges, sample.visibility)] for sample in marked}


def _scored(predictions: Sequence[Prediction], bins: Mapping[Path, str]) -> _Scored:
    samples = [prediction.sample for prediction in predictions]
    anomalous = np.array([sample.is_anomalous for sample in samples])
    synthetic = np.array([sample.synthesis_seed is not None for sample in samples])
    subsets = {"synthetic": anomalous & synthetic, "real": anomalous & ~synthetic}
    for kind in sorted({sample.kind for sample in samples if sample.is_anomalous}):
        subsets[kind_name(kind)] = np.array([sample.is_anomalous and sample.kind == kind for sample in samples])
    for name in VISIBILITY_BINS:
        subsets[f"visibility:{name}"] = np.array([bins.get(sample.image_path) == name for sample in samples])
    return _Scored(
        scores=np.array([prediction.anomaly_score for prediction in predictions]),
        labels=anomalous,
        predicted=np.array([prediction.is_predicted_anomalous for prediction in predictions]),
        seconds=np.array([prediction.seconds for prediction in predictions]),
        samples=samples,
        has_threshold=all(math.isfinite(prediction.threshold) for prediction in predictions),
        subsets={name: chosen for name, chosen in subsets.items() if chosen.any()},
        answers=[prediction.answer for prediction in predictions],
    )


def _method_rows(result: MethodResult, bins: Mapping[Path, str], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one method: "all" first, then painting by painting."""
    by_category: dict[str, list[Prediction]] = {}
    for prediction in result.predictions:
        by_category.setdefault(prediction.sample.category, []).append(prediction)
    scored = {category: _scored(by_category[category], bins) for category in sorted(by_category)}
    if not all(item.has_threshold for item in scored.values()):
        notes.append(
            f"{method_label(result.method)} gave no threshold, so it has no accuracy, sensitivity, specificity."
        )
    rows = {category: list(_painting_rows(item)) for category, item in scored.items()}
    for category in scored:
        rows[category] += list(_pixel_rows(result, by_category[category], notes))
    combined = _all_rows(rows, scored)
    for category, lines in (("all", combined), *rows.items()):
        for line in sorted(lines, key=_row_order):
            yield {"category": category, **line}


def _row(kind: str, metric: str, value: float, interval: Sequence[float], n: int, n_anomalous: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "metric": metric,
        "value": float(value),
        "ci_low": float(interval[0]),
        "ci_high": float(interval[1]),
        "n_images": int(n),
        "n_anomalous": int(n_anomalous),
    }


def _row_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = row["kind"]
    if kind in RESERVED_KINDS:
        place: tuple[Any, ...] = (0, RESERVED_KINDS.index(kind))
    elif kind.startswith("visibility:"):
        place = (2, VISIBILITY_BINS.index(kind.split(":")[1]))
    else:
        place = (1, kind)
    return (*place, METRICS.index(row["metric"]))


def _painting_rows(item: _Scored) -> Iterator[dict[str, Any]]:
    """Image-level rows of one painting; undefined numbers give none."""
    yield from _rate_rows(item)
    yield from _answer_rows(item)
    yield from _seconds_rows(item)
    n, n_anomalous = len(item.labels), int(item.labels.sum())
    yield from _auroc_rows("all", item.scores, item.labels)
    if 0 < n_anomalous < n:
        groups = [sample.group or str(index) for index, sample in enumerate(item.samples)]
        redrawn = _Redrawn(item.scores, item.labels)
        for metric, value, statistic in (
            ("image_ap", metrics.average_precision(item.scores, item.labels), redrawn.average_precision),
            ("f1_max", metrics.f1_max(item.scores, item.labels).value, redrawn.f1_max),
        ):
            interval = statistics.stratified_bootstrap(statistic, item.labels.tolist(), groups=groups, n_draws=_N_DRAWS)
            yield _row("all", metric, value, interval, n, n_anomalous)
    for kind, chosen in item.subsets.items():
        kept = chosen | ~item.labels
        yield from _auroc_rows(kind, item.scores[kept], item.labels[kept])


class _Redrawn:
    """Average precision and F1-max of any redraw of the pictures, sorted once and counted from there."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        self._order = np.argsort(-scores, kind="stable")
        self._labels = labels[self._order]
        self._last_of_ties = np.append(np.flatnonzero(np.diff(scores[self._order])), len(scores) - 1)

    def average_precision(self, chosen: np.ndarray) -> float:
        hits, alarms = self._counts(chosen)
        if not hits[-1] or not alarms[-1]:
            return math.nan
        precision = hits / np.maximum(hits + alarms, 1)
        return float(np.diff(hits, prepend=0) @ precision / hits[-1])

    def f1_max(self, chosen: np.ndarray) -> float:
        hits, alarms = self._counts(chosen)
        if not hits[-1] or not alarms[-1]:
            return math.nan
        return float((2 * hits / (hits + alarms + hits[-1])).max())

    def _counts(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Anomalous and normal pictures called anomalous at every distinct score, from the highest down."""
        taken = np.bincount(chosen, minlength=len(self._labels))[self._order]
        return np.cumsum(taken * self._labels)[self._last_of_ties], np.cumsum(taken * ~self._labels)[self._last_of_ties]


def _auroc_rows(kind: str, scores: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, Any]]:
    value = metrics.image_auroc(scores, labels)
    if math.isfinite(value):
        interval = statistics.auroc_interval(scores, labels)
        yield _row(kind, "image_auroc", value, interval, len(labels), labels.sum())


def _rate_rows(item: _Scored) -> Iterator[dict[str, Any]]:
    """Rates of the fixed-threshold verdicts: of one painting, or pooled over several."""
    if not item.has_threshold:
        return
    rates = metrics.rates(item.labels, item.predicted)
    denominators = {
        "accuracy": (rates.n_images, rates.n_anomalous),
        "sensitivity": (rates.n_anomalous, rates.n_anomalous),
        "specificity": (rates.n_images - rates.n_anomalous, 0),
    }
    for metric, (n, n_anomalous) in denominators.items():
        rate = getattr(rates, metric)
        if n:
            yield _row("all", metric, rate.value, statistics.wilson(*rate), n, n_anomalous)
    if math.isfinite(rates.balanced_accuracy):
        interval = statistics.balanced_accuracy_interval(rates)
        yield _row("all", "balanced_accuracy", rates.balanced_accuracy, interval, rates.n_images, rates.n_anomalous)
    for kind, chosen in item.subsets.items():
        n = int(chosen.sum())
        found = int(item.predicted[chosen].sum())
        yield _row(kind, "sensitivity", found / n, statistics.wilson(found, n), n, n)


def _answer_rows(item: _Scored) -> Iterator[dict[str, Any]]:
    """How often the words of a chat model are right, without any threshold; unclear ones are wrong."""
    if item.answers and all(item.answers):
        counted = conversations.score_answers(item.answers, item.labels.tolist())
        interval = statistics.wilson(counted.n_correct, counted.n)
        yield _row("all", "answer_accuracy", counted.accuracy, interval, counted.n, counted.n_anomalous)


def _seconds_rows(item: _Scored) -> Iterator[dict[str, Any]]:
    known = np.isfinite(item.seconds)
    if known.any():
        seconds, labels = item.seconds[known], item.labels[known]
        interval = statistics.stratified_bootstrap(
            lambda chosen: float(seconds[chosen].mean()), [True] * len(seconds), n_draws=_N_DRAWS
        )
        yield _row("all", "seconds_per_image", seconds.mean(), interval, len(seconds), labels.sum())


def _all_rows(rows: Mapping[str, Sequence[dict[str, Any]]], scored: Mapping[str, _Scored]) -> list[dict[str, Any]]:
    """Rows over all paintings: rates from pooled verdicts, the others as means over paintings."""
    pooled = _pool(list(scored.values()))
    combined = [*_rate_rows(pooled), *_answer_rows(pooled), *_seconds_rows(pooled)]
    by_number: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in itertools.chain.from_iterable(rows.values()):
        if row["metric"] not in _POOLED:
            by_number.setdefault((row["kind"], row["metric"]), []).append(row)
    for (kind, metric), lines in by_number.items():
        value, interval = mean_with_interval([(line["value"], line["ci_low"], line["ci_high"]) for line in lines])
        n, n_anomalous = (sum(line[key] for line in lines) for key in ("n_images", "n_anomalous"))
        combined.append(_row(kind, metric, value, interval, n, n_anomalous))
    return combined


def _pool(items: Sequence[_Scored]) -> _Scored:
    """Verdicts and times of several paintings in one; scores are pooled only to be ignored."""
    names = dict.fromkeys(name for item in items for name in item.subsets)
    return _Scored(
        scores=np.concatenate([item.scores for item in items]),
        labels=np.concatenate([item.labels for item in items]),
        predicted=np.concatenate([item.predicted for item in items]),
        seconds=np.concatenate([item.seconds for item in items]),
        samples=[sample for item in items for sample in item.samples],
        answers=[answer for item in items for answer in item.answers],
        has_threshold=all(item.has_threshold for item in items),
        subsets={
            name: np.concatenate([item.subsets.get(name, np.zeros(len(item.labels), bool)) for item in items])
            for name in names
        },
    )


def mean_with_interval(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, tuple[float, float]]:
    """Mean of independent estimates with the interval that follows from theirs (MOVER).

    Args:
        estimates: (value, low, high) each.
    Returns:
        mean and (low, high); nan at both ends when one of the intervals is unknown.
    Source: Zou and Donner, Statistics in Medicine 2008.

    >>> mean_with_interval([(0.5, 0.2, 0.6), (0.9, 0.5, 0.9)])
    (0.7, (0.45, 0.75))
    """
    values, lows, highs = np.array(estimates, dtype=float).T
    mean = float(values.mean())
    below = math.sqrt(float(((values - lows) ** 2).sum())) / len(values)
    above = math.sqrt(float(((highs - values) ** 2).sum())) / len(values)
    return mean, (round(mean - below, 12), round(mean + above, 12))


# ------------------------------------------------------------------------------------------------------------- pixels


class _Pictures(Sequence):
    """Maps or masks of a list of predictions, read from disk each time one is asked for."""

    def __init__(self, read_one: Any, predictions: Sequence[Prediction]) -> None:
        self._read_one = read_one
        self._predictions = predictions

    def __len__(self) -> int:
        return len(self._predictions)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._read_one(self._predictions[index])


def _pixel_rows(result: MethodResult, predictions: Sequence[Prediction], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Pixel AUROC and AUPRO over normal pictures and anomalous ones with a known mask; maps are read one by one."""
    usable = [p for p in predictions if not p.sample.is_anomalous or p.sample.mask_path is not None]
    with_map = [p for p in usable if results.map_path(result.folder, p.sample).exists()]
    n_masked = sum(p.sample.is_anomalous for p in usable)
    if not with_map or not n_masked:
        return
    category = predictions[0].sample.category
    if len(with_map) < len(usable):
        notes.append(
            f"{method_label(result.method)} has maps for {len(with_map)} of {len(usable)} pictures of {category}, so "
            "it has no pixel metrics there."
        )
        return
    left_out = sum(p.sample.is_anomalous for p in predictions) - n_masked
    if left_out:
        notes.append(
            f"{category_label(category)}: pixel metrics leave out {left_out} of {left_out + n_masked} anomalous test "
            "pictures, which have no mask because the whole picture differs."
        )
    histogram = metrics.PixelHistogram()
    for prediction in usable:
        histogram.add(result.anomaly_map(prediction), _mask(prediction.sample))
    rough = metrics.image_histograms(
        _Pictures(result.anomaly_map, usable), _Pictures(lambda p: _mask(p.sample, _BOOTSTRAP_SIDE), usable)
    )
    labels = [p.sample.is_anomalous for p in usable]
    groups = [p.sample.group or str(index) for index, p in enumerate(usable)]
    for metric, value, statistic in (
        ("pixel_auroc", histogram.auroc(), rough.auroc),
        ("aupro", histogram.aupro(), rough.aupro),
    ):
        if not math.isfinite(value):
            continue
        low, high = statistics.stratified_bootstrap(
            lambda chosen, statistic=statistic: statistic(np.bincount(chosen, minlength=len(labels))),
            labels,
            groups=groups,
            n_draws=_N_DRAWS,
        )
        # The draws use coarser masks; their interval is kept around the exact value.
        yield _row("all", metric, value, (min(low, value), max(high, value)), len(usable), n_masked)


def _mask(sample: Sample, max_side: int | None = None) -> np.ndarray:
    """Ground truth at the picture's size; all False on a normal picture."""
    if sample.is_anomalous:
        mask = data.mask_of(sample)
    else:
        mask = np.zeros(_picture_shape(sample.image_path), bool)
    if max_side is None:
        return mask
    small = images.resize(mask, max_side)
    return small if small.any() == mask.any() else mask  # a hair-thin mark must not vanish


def _picture_shape(path: Path) -> tuple[int, int]:
    """(H, W) as the loader would return it, from the file's head."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5
    return (width, height) if turned else (height, width)


# -------------------------------------------------------------------------------------------------------- paired tests


def paired_tests(methods: Sequence[MethodResult]) -> pd.DataFrame:
    """Every pair of methods on every painting: DeLong on the scores, exact McNemar on the verdicts.

    P-values are adjusted by Holm over the pairs of one painting and measure. Paintings are tested apart, because the
    scores of a method are on another scale for each.

    Returns:
        columns as in :class:`Comparison`; methods without a threshold have no McNemar row.
    """
    rows: list[dict[str, Any]] = []
    categories = sorted({p.sample.category for result in methods for p in result.predictions})
    for category, measure in itertools.product(categories, ("AUROC", "accuracy")):
        family = []
        for a, b in itertools.combinations(methods, 2):
            test = _pair(a, b, category, measure)
            if test is not None:
                family.append((a.method, b.method, test))
        adjusted = statistics.holm([test.p_value for _, _, test in family]) if family else []
        for (a_name, b_name, test), p_holm in zip(family, adjusted):
            sentence = statistics.verdict(
                method_label(a_name), method_label(b_name), test, p_value=float(p_holm), measure=measure
            )
            rows.append(
                {
                    "category": category,
                    "measure": measure,
                    "method_a": a_name,
                    "method_b": b_name,
                    "value_a": test.value_a,
                    "value_b": test.value_b,
                    "difference": test.difference,
                    "p_value": test.p_value,
                    "p_holm": float(p_holm),
                    "n_images": test.n_images,
                    "sentence": sentence,
                }
            )
    names = ["category", "measure", "method_a", "method_b", "value_a", "value_b", "difference", "p_value", "p_holm"]
    return pd.DataFrame(rows, columns=[*names, "n_images", "sentence"])


def balanced_accuracy_test(correct_a: np.ndarray, correct_b: np.ndarray, labels: np.ndarray) -> statistics.PairedTest:
    """Do two rounds of verdicts on the same pictures differ in balanced accuracy? Exact.

    McNemar's idea for both classes at once: only pictures on which exactly one of the two is right count, each of them
    as likely for the one as for the other when there is no difference. The p-value is the probability, over all ways
    the coins could fall, of a difference in balanced accuracy at least as large.

    Args:
        correct_a: bool ``(n,)``, True where the first verdict is right.
        correct_b: bool ``(n,)`` of the second, same pictures in the same order.
        labels: bool ``(n,)``, True = anomalous.
    Returns:
        the test with balanced accuracies as values; all nan when one class is missing; no standard error.
    Raises:
        ValueError: lengths differ, or values other than bool.
    Source: McNemar, Psychometrika 1947; two independent binomials, one for each class.
    """
    from scipy.stats import binom

    a, b, labels = (np.asarray(values) for values in (correct_a, correct_b, labels))
    if not a.shape == b.shape == labels.shape or any(values.dtype != bool for values in (a, b, labels)):
        raise ValueError(f"Pass three lists of True/False of one length; got {a.shape}, {b.shape}, {labels.shape}.")
    n = len(labels)
    if labels.all() or not labels.any():
        return statistics.PairedTest(math.nan, math.nan, math.nan, math.nan, math.nan, n)
    values = [(c[labels].mean() + c[~labels].mean()) / 2 for c in (a, b)]
    differences, chances = [], []
    for chosen in (labels, ~labels):
        n_apart = int((a[chosen] != b[chosen]).sum())
        counts = np.arange(n_apart + 1)
        differences.append((2 * counts - n_apart) / (2 * chosen.sum()))
        chances.append(binom.pmf(counts, n_apart, 0.5))
    total = np.abs(differences[0][:, None] + differences[1][None, :])
    chance = chances[0][:, None] * chances[1][None, :]
    p_value = min(1.0, float(chance[total >= abs(values[0] - values[1]) - 1e-12].sum()))
    return statistics.PairedTest(*map(float, values), float(values[0] - values[1]), math.nan, p_value, n)


def _pair(a: MethodResult, b: MethodResult, category: str, measure: str) -> statistics.PairedTest | None:
    chosen_a = [p for p in a.predictions if p.sample.category == category]
    chosen_b = [p for p in b.predictions if p.sample.category == category]
    labels = np.array([p.sample.is_anomalous for p in chosen_a])
    if measure == "AUROC":
        return statistics.delong_paired(
            [p.anomaly_score for p in chosen_a], [p.anomaly_score for p in chosen_b], labels
        )
    if any(not math.isfinite(p.threshold) for p in (*chosen_a, *chosen_b)):
        return None
    return statistics.mcnemar_exact(
        np.array([p.is_predicted_anomalous for p in chosen_a]) == labels,
        np.array([p.is_predicted_anomalous for p in chosen_b]) == labels,
    )


# -------------------------------------------------------------------------------------------------- text and markdown


def as_text(path: Path) -> str:
    """The comparison for a terminal: one block over all paintings and one per painting, at most 118 characters wide.

    Args:
        path: ``comparison.csv``; methods of the suite without rows are named with the notebook that makes them.
    Raises:
        FileNotFoundError, ValueError: see :func:`read`.
    """
    table = read(path)
    look = numbers(table)
    methods = _methods_in(table)
    heads = ("method", "image AUROC", "bal. accuracy", "accuracy", "found", "normals ok", "pix AUROC", "AUPRO", "s/img")
    lines = []
    for category in _categories_in(table):
        rows = [heads]
        for method in methods:
            get = {metric: look.get((method, category, "all", metric)) for metric in METRICS}
            rows.append(
                (
                    method_label(method),
                    estimate(get["image_auroc"]),
                    estimate(get["balanced_accuracy"]),
                    count_of(get["accuracy"]),
                    count_of(get["sensitivity"]),
                    count_of(get["specificity"]),
                    _short(get["pixel_auroc"]),
                    _short(get["aupro"]),
                    seconds_text(get["seconds_per_image"]),
                )
            )
        lines += ["", f"{category_label(category)} ({_pictures(look, methods, category)})", *_columns(rows)]
    lines += ["", "[ ] = 95 % interval. Thresholds were set on normal pictures before any test picture was read."]
    lines += [f"missing: {method_label(name)} (run {NOTEBOOKS[name]})" for name in METHODS if name not in methods]
    if len(table):
        lines.append(f"profile {table.profile.iloc[0]}, dataset {str(table.dataset_hash.iloc[0])[:12]}")
    return "\n".join(lines).strip("\n") + "\n"


def as_markdown(path: Path) -> str:
    """The results table of the README: one row per method, AUROC per painting, pooled rates.

    Args:
        path: ``comparison.csv``.
    Raises:
        FileNotFoundError, ValueError: see :func:`read`.
    """
    table = read(path)
    look = numbers(table)
    methods = _methods_in(table)
    paintings = [category for category in _categories_in(table) if category != "all"]
    heads = ["method", *(f"image AUROC, {category_label(name)}" for name in paintings)]
    heads += ["balanced accuracy", "anomalies found", "normals passed", "pixel AUROC", "AUPRO", "s/image"]
    lines = [heads, ["---"] * len(heads)]
    for method in methods:
        get = {metric: look.get((method, "all", "all", metric)) for metric in METRICS}
        aurocs = [estimate(look.get((method, name, "all", "image_auroc"))) for name in paintings]
        rates = [estimate(get["balanced_accuracy"]), count_of(get["sensitivity"]), count_of(get["specificity"])]
        pixels = [_short(get["pixel_auroc"]), _short(get["aupro"]), seconds_text(get["seconds_per_image"])]
        lines.append([method_label(method), *aurocs, *rates, *pixels])
    absent = [name for name in METHODS if name not in methods]
    lines += [[f"{method_label(name)} (run `{NOTEBOOKS[name]}`)", *["–"] * (len(heads) - 1)] for name in absent]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    if not len(table):
        return text + "\n"
    note = (
        f"\n\nProfile `{table.profile.iloc[0]}`, {_pictures(look, methods, 'all')}, dataset "
        f"`{str(table.dataset_hash.iloc[0])[:12]}`. Brackets are 95 % intervals; thresholds were set on normal "
        "pictures before any test picture was read.\n"
    )
    return text + note


def _short(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None else decimal(row["value"])


def _pictures(look: Mapping[Any, Mapping[str, Any]], methods: Sequence[str], category: str) -> str:
    """``"100 test pictures, 68 anomalous"``."""
    rows = [look[key] for method in methods for key in [(method, category, "all", "accuracy")] if key in look]
    if not rows:
        return "no verdicts"
    return f"{rows[0]['n_images']} test pictures, {rows[0]['n_anomalous']} anomalous"


def _methods_in(table: pd.DataFrame) -> list[str]:
    """Methods with rows, in the order of the comparison; the trivial rule last."""
    present = list(dict.fromkeys(table.method))
    known = [method for method in METHODS if method in present and method != ALWAYS]
    others = [method for method in present if method not in METHODS]
    return [*known, *others, *([ALWAYS] if ALWAYS in present else [])]


def _categories_in(table: pd.DataFrame) -> list[str]:
    present = list(dict.fromkeys(table.category))
    return [name for name in ["all"] if name in present] + sorted(name for name in present if name != "all")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned columns, a rule below the first; the first column is cut at 26 characters."""
    cut = [[(cell if len(cell) <= 26 else cell[:25] + "…") for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in cut) for index in range(len(cut[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cut
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
