"""All methods on the same pictures: one tidy table of numbers with intervals, the paired tests, and what limits them.

``comparison.csv`` holds one number a row: ``method, category, kind, metric, value, ci_low, ci_high, n_images,
n_anomalous, profile, dataset_hash``.

- ``category`` is a painting or ``"all"``. A score of one painting means nothing on another (each has its own detector
  and threshold), so scores are never pooled: on ``"all"`` the *rates* come from pooled verdicts, each made at its own
  painting's threshold, and every *ranking* metric (AUROC, AP, pixel AUROC, AUPRO) is the plain mean over the paintings.
- ``kind`` is ``"all"``; one kind of anomaly against the genuine pictures of its painting; ``"synthetic"`` or
  ``"found"`` (made by notebook 02, or not); ``"seen"`` or ``"unseen"`` (synthetic kinds that the method was trained on,
  or not); or a group of pictures, ``"group:faint"``, see :data:`GROUPS`. A kind of the dataset that bears one of these
  names is written ``"kind:found"``.
- ``n_images`` and ``n_anomalous`` are the pictures behind that very number: the denominator of a rate.

Intervals are 95 %: Wilson for rates, their MOVER combination for balanced accuracy, logit-DeLong (Newcombe at 0 and
1) for image AUROC, bootstrap over source pictures for the rest; means over paintings combine the paintings' intervals
by MOVER. Of a painting named in ``dataset.limits`` (few sources) sources count, not pictures, and one source gives no
interval. A number that is not defined has no row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import data, files, results
from helpers.data import images
from helpers.judge import metrics, statistics
from helpers.records import Sample
from helpers.results import METHODS, MethodResult, category_label, method_label
from helpers.synthesis.marks import VISIBILITY_BINS

ALWAYS = "always_anomaly"
"""The trivial rule's row."""
COLUMNS = (
    "method", "category", "kind", "metric", "value", "ci_low", "ci_high", "n_images", "n_anomalous", "profile",
    "dataset_hash",
)  # fmt: skip
METRICS = (
    "image_auroc", "image_ap", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "answer_accuracy",
    "pixel_auroc", "aupro", "seconds_per_image",
)  # fmt: skip
GROUPS: Mapping[str, str] = {
    "whole": "whole picture (copy, new version)",
    "real": "real alteration",
    "plain": "plain mark",
    "moderate": "moderate mark",
    "faint": "faint mark",
    "mark": "mark",
}
"""Groups of anomalous pictures. *Real* are only pictures that the user brought; those that ``mini`` renders are
whole pictures; marks go by the fixed limits of :data:`helpers.synthesis.marks.VISIBILITY_BINS`."""
NOTEBOOKS: Mapping[str, str] = {
    **{method: "03_clip" for method in METHODS if method.startswith("clip_")},
    "anomalyclip": "04_anomalyclip",
    **dict.fromkeys(("aligned", "dinov2_memory", "dinov2_subspace"), "05_reference"),
    **dict.fromkeys(("anomalygpt", "anomalygpt_aligned"), "07_anomalygpt_test"),
    ALWAYS: "09_compare",
}
"""Which notebook writes a method's predictions."""

_RESERVED = ("all", "synthetic", "found", "seen", "unseen")
_RATES = {"accuracy": (True, False), "sensitivity": (True,), "specificity": (False,)}
_RANKINGS = ("image_auroc", "image_ap", "pixel_auroc", "aupro")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Attributes:
        dataset: the dataset all rows share.
        profile: name of the profile.
        runs: method -> its results, for maps and settings; without the trivial rule.
        missing: method -> sentence with the notebook that makes it.
        refused: method -> why its results are not compared (another dataset, other pictures).
        predictions: one row a method and test picture: ``method, sha256, category, kind, group, source, is_anomalous,
            anomaly_score, threshold, is_predicted_anomalous, p_value, seconds, answer, says`` and ``place``, the
            picture's position in :attr:`samples`.
        table: the tidy table, see the module's text.
        tests: one row a pair of detectors, painting (or all) and measure: ``category, measure, method_a, method_b,
            value_a, value_b, difference, p_value, p_holm, n_images, sentence``.
        notes: what a reader should know, in sentences.
    """

    dataset: data.Dataset
    profile: str
    runs: Mapping[str, MethodResult]
    missing: Mapping[str, str]
    refused: Mapping[str, str]
    predictions: pd.DataFrame
    table: pd.DataFrame
    tests: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> list[Sample]:
        return self.dataset.select(split="test")

    @property
    def methods(self) -> list[str]:
        """Detectors in the order of the table, without the trivial rule."""
        return list(self.runs)

    def number(self, method: str, category: str, kind: str, metric: str) -> pd.Series | None:
        """One row of the table; None when that number is not defined."""
        return numbers(self.table).get((method, category, kind, metric))


def numbers(table: pd.DataFrame) -> dict[tuple[str, str, str, str], pd.Series]:
    """The table for look-up: (method, category, kind, metric) -> row."""
    keys = zip(table.method, table.category, table.kind, table.metric)
    return dict(zip(keys, table.to_dict("records")))


def compare(dataset: data.Dataset, results_dir: Path, *, profile: str) -> Comparison:
    """Read every method's results on this dataset and compute the whole comparison.

    Folders of unknown name directly in ``results_dir`` that hold complete results join as further rows.

    Args:
        dataset: from :func:`helpers.data.open_dataset`; only its test split is scored.
        results_dir: folder with one results folder per method.
        profile: name written into every row.
    Raises:
        ValueError: the dataset has no test picture.
    """
    samples = dataset.select(split="test")
    if not samples:
        raise ValueError(f"{dataset.folder} has no test picture; run 02_synthesize_anomalies again.")
    runs, missing, refused = _read_all(Path(results_dir), samples, dataset)
    facts = _facts(samples, dataset)
    predictions = pd.concat(
        [_frame(run, facts, dataset.folder) for run in runs.values()] + [_always(facts)], ignore_index=True
    )
    notes: list[str] = [*dataset.limits.values()]
    rows = []
    for method, frame in predictions.groupby("method", sort=False):
        if frame.threshold.isna().any():
            notes.append(f"{method_label(method)} gave no threshold, so it has no accuracy, sensitivity, specificity.")
        kinds = tuple(runs[method].manifest.get("trained_on_kinds", ())) if method in runs else ()
        rows += [{"method": method, **row} for row in _method_rows(frame, runs.get(method), samples, kinds, notes)]
    table = pd.DataFrame(rows).assign(profile=profile, dataset_hash=dataset.hash)[list(COLUMNS)]
    tests = paired_tests(predictions[~predictions.is_limited & (predictions.method != ALWAYS)])
    if dataset.limits and runs:
        left_out = ", ".join(map(category_label, dataset.limits))
        notes.append(f"The paired tests leave out {left_out}: photographs of a few sources are not independent.")
    return Comparison(dataset, profile, runs, missing, refused, predictions, table, tests, tuple(dict.fromkeys(notes)))


def write(comparison: Comparison, folder: Path) -> Path:
    """Write ``comparison.csv`` (returned) and ``paired_tests.csv``, atomically."""
    files.write_text(Path(folder) / "paired_tests.csv", comparison.tests.to_csv(index=False))
    files.write_text(Path(folder) / "comparison.csv", comparison.table.to_csv(index=False))
    return Path(folder) / "comparison.csv"


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


# -------------------------------------------------------------------------------------------------------- predictions


def _read_all(
    results_dir: Path, samples: Sequence[Sample], dataset: data.Dataset
) -> tuple[dict[str, MethodResult], dict[str, str], dict[str, str]]:
    others = sorted(path.parent.name for path in results_dir.glob(f"[!.]*/{results.MANIFEST}"))
    runs, missing, refused = {}, {}, {}
    for method in dict.fromkeys((*METHODS, *others)):
        if method == ALWAYS:
            continue
        try:
            run = results.read(results_dir / method, samples, dataset.folder, dataset.hash)
            by_path = {prediction.sample.image_path: prediction for prediction in run.predictions}
            absent = [sample for sample in samples if sample.image_path not in by_path]
            if absent:
                raise ValueError(
                    f"{run.method} has predictions for {len(samples) - len(absent)} of {len(samples)} test pictures. "
                    "Rows on different pictures are not compared: run the method's notebook again."
                )
            in_order = [by_path[sample.image_path] for sample in samples]
            runs[method] = MethodResult(method, run.folder, run.manifest, in_order)
        except FileNotFoundError:
            missing[method] = f"{method_label(method)} has no results yet: run {NOTEBOOKS[method]}."
        except (ValueError, KeyError) as error:
            refused[method] = str(error)
    return runs, missing, refused


def _facts(samples: Sequence[Sample], dataset: data.Dataset) -> pd.DataFrame:
    rendered = dataset.folder.name == "embedded"
    rows = [
        {
            "place": place,
            "sha256": sample.sha256,
            "category": sample.category,
            "kind": sample.kind,
            "group": picture_group(sample, rendered=rendered),
            "source": sample.group or str(place),
            "is_anomalous": sample.is_anomalous,
            "is_synthetic": sample.synthesis_seed is not None,
            "has_truth": not sample.is_anomalous or sample.mask_path is not None,
            "is_limited": sample.category in dataset.limits,
        }
        for place, sample in enumerate(samples)
    ]
    return pd.DataFrame(rows)


def picture_group(sample: Sample, *, rendered: bool) -> str:
    """The picture's group, a key of :data:`GROUPS`, or ``"genuine"``.

    Args:
        sample: a test picture.
        rendered: the dataset's unmade anomalies were rendered by the suite, not photographed or brought by the user.
    """
    if not sample.is_anomalous:
        return "genuine"
    if sample.synthesis_seed is None and not rendered:
        return "real"
    if sample.mask_path is None:
        return "whole"
    if sample.visibility is None or not math.isfinite(sample.visibility):
        return "mark"
    return next(name for name, limit in VISIBILITY_BINS.items() if sample.visibility < limit)


def _frame(run: MethodResult, facts: pd.DataFrame, folder: Path) -> pd.DataFrame:
    names = ("anomaly_score", "threshold", "is_predicted_anomalous", "p_value", "seconds", "answer")
    columns = {name: [getattr(prediction, name) for prediction in run.predictions] for name in names}
    said = run.manifest.get("answers_say", {})
    paths = [results.relative_path(prediction.sample, folder) for prediction in run.predictions]
    says = pd.Series([said.get(path) for path in paths], index=facts.index, dtype=object)
    return facts.assign(method=run.method, **columns, says=says, has_says=bool(said))


def _always(facts: pd.DataFrame) -> pd.DataFrame:
    """The trivial rule as a method like any other: whatever a detector is worth must show beside it."""
    return facts.assign(
        method=ALWAYS, anomaly_score=1.0, threshold=0.0, is_predicted_anomalous=True, p_value=math.nan,
        seconds=math.nan, answer="", says=None, has_says=False,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the table


def _method_rows(
    frame: pd.DataFrame,
    run: MethodResult | None,
    samples: Sequence[Sample],
    trained_on: Sequence[str],
    notes: list[str],
) -> list[dict[str, Any]]:
    """Rows of one method: over all paintings first, then painting by painting."""
    single = []
    for category, part in frame.groupby("category"):
        rows = [*_rates(part, trained_on), *_rankings(part, trained_on)]
        rows += [] if run is None else _pixels(part, run, samples, notes)
        single += [{"category": category, **row} for row in rows]
    combined = list(_rates(frame, trained_on))
    of_paintings = pd.DataFrame(single)
    ranked = of_paintings[of_paintings.metric.isin(_RANKINGS)]
    for (kind, metric), part in ranked.groupby(["kind", "metric"], sort=False):
        value, low, high = statistics.mover(part[["value", "ci_low", "ci_high"]].to_numpy())
        combined.append(_row(kind, metric, value, (low, high), part.n_images.sum(), part.n_anomalous.sum()))
    order = {metric: place for place, metric in enumerate(METRICS)}
    rows = [{"category": "all", **row} for row in combined] + single
    return sorted(rows, key=lambda row: (row["category"] != "all", row["category"], order[row["metric"]]))


def _subsets(frame: pd.DataFrame, trained_on: Sequence[str]) -> Iterator[tuple[str, pd.Series]]:
    """Name and rows of each group of anomalous pictures that is not empty."""
    made = frame.is_anomalous & frame.is_synthetic
    found = {"synthetic": made, "found": frame.is_anomalous & ~frame.is_synthetic}
    if trained_on:
        found |= {"seen": made & frame.kind.isin(trained_on), "unseen": made & ~frame.kind.isin(trained_on)}
    found |= {kind_name(kind): frame.kind == kind for kind in sorted(set(frame.kind[frame.is_anomalous]))}
    found |= {f"group:{name}": frame.group == name for name in GROUPS}
    return ((name, chosen) for name, chosen in found.items() if chosen.any())


def kind_name(kind: str) -> str:
    """The kind as the table writes it: the table's own words are kept apart.

    >>> kind_name("box"), kind_name("found")
    ('box', 'kind:found')
    """
    return f"kind:{kind}" if kind in _RESERVED or kind.startswith(("group:", "kind:")) else kind


def is_single_kind(kind: str) -> bool:
    """True for rows about one kind of anomaly, False for "all" and groups."""
    return kind not in _RESERVED and not kind.startswith("group:")


def _row(
    kind: str, metric: str, value: float, interval: Sequence[float], n_images: int, n_anomalous: int
) -> dict[str, Any]:
    return {
        "kind": kind, "metric": metric, "value": float(value), "ci_low": float(interval[0]),
        "ci_high": float(interval[1]), "n_images": int(n_images), "n_anomalous": int(n_anomalous),
    }  # fmt: skip


def _rate(kind: str, metric: str, right: pd.Series, frame: pd.DataFrame) -> dict[str, Any]:
    """A rate over some pictures; of paintings with few sources each source counts as one picture."""
    chosen = frame.loc[right.index]
    sizes = [(part.source.nunique() if part.is_limited.any() else len(part)) for _, part in chosen.groupby("category")]
    few = chosen.is_limited.any() and min(part.source.nunique() for _, part in chosen.groupby("category")) < 2
    interval = (math.nan, math.nan) if few else statistics.wilson(right.mean() * sum(sizes), sum(sizes))
    return _row(kind, metric, right.mean(), interval, len(right), chosen.is_anomalous.sum())


def _rates(frame: pd.DataFrame, trained_on: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rates of the fixed-threshold verdicts, of the words of a chat model, and seconds; one painting or several."""
    if frame.threshold.notna().all():
        right = frame.is_predicted_anomalous == frame.is_anomalous
        found = {
            metric: _rate("all", metric, right[frame.is_anomalous.isin(labels)], frame)
            for metric, labels in _RATES.items()
            if frame.is_anomalous.isin(labels).any()
        }
        yield from found.values()
        if len(found) == len(_RATES):
            both = [[found[m][key] for key in ("value", "ci_low", "ci_high")] for m in ("sensitivity", "specificity")]
            value, low, high = statistics.mover(both)
            yield _row("all", "balanced_accuracy", value, (low, high), len(frame), frame.is_anomalous.sum())
        for name, chosen in _subsets(frame, trained_on):
            yield _rate(name, "sensitivity", right[chosen], frame)
    if frame.has_says.all():  # words without a clear yes or no are wrong
        yield _rate("all", "answer_accuracy", frame.says == frame.is_anomalous, frame)
    known = frame.seconds.notna()
    if known.any():
        values = (frame.seconds.mean(), (math.nan, math.nan), known.sum(), frame.is_anomalous[known].sum())
        yield _row("all", "seconds_per_image", *values)


def _rankings(frame: pd.DataFrame, trained_on: Sequence[str]) -> Iterator[dict[str, Any]]:
    """AUROC of one painting for all anomalous pictures and each group of them; average precision for all."""
    if frame.is_anomalous.all():
        return
    for name, chosen in [("all", frame.is_anomalous), *_subsets(frame, trained_on)]:
        kept = frame[chosen | ~frame.is_anomalous]
        scores, labels = kept.anomaly_score.to_numpy(), kept.is_anomalous.to_numpy()
        if not labels.any():
            continue
        sources = kept.source.tolist() if kept.is_limited.any() else None
        interval = statistics.auroc_interval(scores, labels, sources=sources)
        yield _row(name, "image_auroc", metrics.image_auroc(scores, labels), interval, len(kept), labels.sum())
        if name == "all":
            draws = statistics.redraws(labels.tolist(), kept.source.tolist())
            interval = statistics.percentile_interval(metrics.average_precisions(scores, labels, draws))
            value = metrics.average_precision(scores, labels)
            yield _row(name, "image_ap", value, _unless_one_source(kept, interval), len(kept), labels.sum())


def _pixels(
    frame: pd.DataFrame, run: MethodResult, samples: Sequence[Sample], notes: list[str]
) -> Iterator[dict[str, Any]]:
    """Pixel AUROC and AUPRO over genuine pictures and anomalous ones with a known mask."""
    usable = frame[frame.has_truth]
    maps = [run.anomaly_map(run.predictions[place]) for place in usable.place]
    n_maps = sum(anomaly_map is not None for anomaly_map in maps)
    if not n_maps or not usable.is_anomalous.any():
        return
    name = category_label(frame.category.iloc[0])
    if n_maps < len(usable):
        notes.append(
            f"{method_label(run.method)} has maps for {n_maps} of {len(usable)} pictures of {name}, so it has no pixel "
            "metrics there."
        )
        return
    left_out = int((~frame.has_truth).sum())
    if left_out:
        notes.append(
            f"{name}: pixel metrics leave out {left_out} of {frame.is_anomalous.sum()} anomalous test pictures, which "
            "have no mask because the whole picture differs."
        )
    table = metrics.pixel_table(maps, (_mask(samples[place]) for place in usable.place))
    draws = statistics.redraws(usable.is_anomalous.tolist(), usable.source.tolist())
    drawn = np.array([metrics.pixel_metrics(table, counts) for counts in draws])
    for metric, value, values in zip(("pixel_auroc", "aupro"), metrics.pixel_metrics(table), drawn.T):
        if math.isfinite(value):
            interval = _unless_one_source(usable, statistics.percentile_interval(values))
            yield _row("all", metric, value, interval, len(usable), usable.is_anomalous.sum())


def _unless_one_source(frame: pd.DataFrame, interval: statistics.Interval) -> Sequence[float]:
    return (math.nan, math.nan) if frame.source.nunique() < 2 else interval


def _mask(sample: Sample) -> np.ndarray:
    """Ground truth; all False on a genuine picture."""
    return images.load_mask(sample.mask_path) if sample.is_anomalous else np.zeros((1, 1), bool)


# -------------------------------------------------------------------------------------------------------- paired tests


def paired_tests(predictions: pd.DataFrame) -> pd.DataFrame:
    """Every pair of detectors on the same pictures: DeLong on the scores, exact McNemar on the verdicts.

    Over all paintings DeLong's test is stratified by painting and verdicts are pooled. One Holm family per question:
    which detectors rank better, which are right more often, and both again painting by painting.

    Returns:
        columns as in :class:`Comparison`; methods without a threshold have no row for accuracy.
    """
    names = ["category", "measure", "method_a", "method_b", "value_a", "value_b", "difference", "p_value", "p_holm"]
    paintings = sorted(set(predictions.category))
    rows = []
    for scope in (["all"], paintings if len(paintings) > 1 else []):
        for measure in ("AUROC", "accuracy"):
            family = [
                {"category": category, "measure": measure, "method_a": a, "method_b": b, **vars(test)}
                for category in scope
                for a, b, test in _pairs(predictions, category, measure)
            ]
            adjusted = statistics.holm([row["p_value"] for row in family])
            rows += [row | {"p_holm": float(p_holm)} for row, p_holm in zip(family, adjusted)]
    return pd.DataFrame([row | {"sentence": _sentence(row)} for row in rows], columns=[*names, "n_images", "sentence"])


def _pairs(predictions: pd.DataFrame, category: str, measure: str) -> Iterator[tuple[str, str, statistics.PairedTest]]:
    frame = predictions if category == "all" else predictions[predictions.category == category]
    by_method = {method: part.sort_values("place") for method, part in frame.groupby("method", sort=False)}
    for (a, x), (b, y) in itertools.combinations(by_method.items(), 2):
        if measure == "AUROC":
            labels, paintings = x.is_anomalous.to_numpy(), x.category.to_numpy()
            yield a, b, statistics.delong_paired(x.anomaly_score, y.anomaly_score, labels, paintings)
        elif x.threshold.notna().all() and y.threshold.notna().all():
            right = [(part.is_predicted_anomalous == part.is_anomalous).to_numpy(bool) for part in (x, y)]
            yield a, b, statistics.mcnemar_exact(*right)


def _sentence(row: Mapping[str, Any]) -> str:
    """The test in words, "cannot tell" and ties included."""
    names = [method_label(row["method_a"]), method_label(row["method_b"])]
    values = [row["value_a"], row["value_b"]]
    place = "" if row["category"] == "all" else f" on {category_label(row['category'])}"
    if math.isnan(row["p_holm"]):
        return f"{names[0]} and {names[1]} cannot be compared in {row['measure']}{place}: one class is missing."
    if abs(row["difference"]) < 1e-12:
        return f"{names[0]} and {names[1]} are tied{place} ({row['measure']} {values[0]:.3f} both)."
    p_text = "p < 0.001" if row["p_holm"] < 0.001 else f"p = {row['p_holm']:.{2 if row['p_holm'] >= 0.0995 else 3}f}"
    if row["difference"] < 0:
        names, values = names[::-1], values[::-1]
    shown = f"({row['measure']} {values[0]:.3f} and {values[1]:.3f}, {p_text})"
    if row["p_holm"] < 0.05:
        return f"{names[0]} is better than {names[1]}{place} on these {row['n_images']} images {shown}."
    return f"These {row['n_images']} images cannot tell {names[0]} from {names[1]}{place} {shown}."
