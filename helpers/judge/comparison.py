"""All methods on the same pictures: one tidy table of numbers with intervals, the paired tests, and what limits them.

In ``comparison.csv`` (one number a row, columns :data:`COLUMNS`) ``category`` is a painting or ``"all"``. Scores of one
painting mean nothing on another and are never pooled: over all, *rates* come from pooled verdicts, each at its own
painting's threshold, and *rankings* (AUROC, AP, pixel AUROC, AUPRO) are plain means over the paintings.
``kind`` is ``"all"``; one kind of anomaly against the genuine pictures of its painting; ``"synthetic"`` or ``"found"``
(made by notebook 02, or not); ``"seen"`` or ``"unseen"`` (synthetic kinds that the method was trained on, or not); or
a group of pictures, ``"group:faint"``, see :data:`GROUPS`. A kind that bears one of these names is ``"kind:found"``.
``n_images`` and ``n_anomalous`` are the pictures behind that very number: the denominator of a rate.

Intervals are 95 %: Wilson for rates, their MOVER combination for balanced accuracy and means over paintings,
logit-DeLong (Newcombe at 0 and 1) for image AUROC, bootstrap over source pictures for the rest. Of a painting named in
``dataset.limits`` (few sources) sources count, not pictures, and one source gives no interval.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
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
COLUMNS = tuple("method category kind metric value ci_low ci_high n_images n_anomalous profile dataset_hash".split())
METRICS = tuple(
    "image_auroc image_ap accuracy balanced_accuracy sensitivity specificity answer_accuracy pixel_auroc aupro "
    "seconds_per_image".split()
)
GROUPS: Mapping[str, str] = {
    "whole": "whole picture", "real": "real alteration", "plain": "plain mark", "moderate": "moderate mark",
    "faint": "faint mark", "mark": "mark",
}  # fmt: skip
"""Groups of anomalous pictures: *real* are only those that the user brought, *whole* those that differ as a whole."""
NOTEBOOKS: Mapping[str, str] = {
    **{method: "03_clip" for method in METHODS if method.startswith("clip_")},
    "anomalyclip": "04_anomalyclip",
    **dict.fromkeys(("aligned", "dinov2_memory", "dinov2_subspace"), "05_reference"),
    **dict.fromkeys(("anomalygpt", "anomalygpt_aligned"), "07_anomalygpt_test"),
    ALWAYS: "09_compare",
}
"""Which notebook writes a method's predictions."""
RESERVED = ("all", "synthetic", "found", "seen", "unseen")
"""Words in the column ``kind`` that are no kind."""

_RATES = {"accuracy": (True, False), "sensitivity": (True,), "specificity": (False,)}
_RANKINGS = ("image_auroc", "image_ap", "pixel_auroc", "aupro")
_ESTIMATE = ["value", "ci_low", "ci_high"]
_COUNTS = ["n_images", "n_anomalous"]
_NAN = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns."""

    dataset: data.Dataset  # that all rows share
    profile: str
    runs: Mapping[str, MethodResult]  # by detector, in the order of the table; without the trivial rule
    missing: Mapping[str, str]  # method -> the notebook that makes it, in a sentence
    refused: Mapping[str, str]  # method -> why its results are not compared
    predictions: pd.DataFrame  # a row per method and test picture (``place`` in ``samples``): ``_facts`` and ``_frame``
    table: pd.DataFrame  # the tidy table, see the module's text
    tests: pd.DataFrame  # see :func:`paired_tests`
    notes: tuple[str, ...] = ()  # what a reader should know, in sentences

    @property
    def samples(self) -> list[Sample]:
        return self.dataset.select(split="test")


def numbers(table: pd.DataFrame) -> dict[tuple[str, str, str, str], Mapping[str, Any]]:
    """The table for look-up: (method, category, kind, metric) -> row."""
    return {(row["method"], row["category"], row["kind"], row["metric"]): row for row in table.to_dict("records")}


def compare(dataset: data.Dataset, results_dir: Path, *, profile: str) -> Comparison:
    """Read every method's results on this dataset's test pictures and compute the whole comparison. ``results_dir``
    holds a folder per method; complete results in folders of unknown name join as further rows. ``profile`` is written
    into every row. ``ValueError``: the dataset has no test picture."""
    samples = dataset.select(split="test")
    if not samples:
        raise ValueError(f"{dataset.folder} has no test picture; run 02_synthesize_anomalies again.")
    runs, missing, refused = _read_all(Path(results_dir), samples, dataset)
    facts = _facts(samples, dataset)
    always = facts.assign(method=ALWAYS, anomaly_score=1.0, threshold=0.0, is_predicted_anomalous=True,
                          p_value=math.nan, seconds=math.nan, answer="", says=None, has_says=False)  # fmt: skip
    predictions = pd.concat([*(_frame(run, facts, dataset.folder) for run in runs.values()), always], ignore_index=True)
    notes, rows = [*dataset.limits.values()], []
    for method, frame in predictions.groupby("method", sort=False):
        if frame.threshold.isna().any():
            notes.append(f"{method_label(method)} gave no threshold, so it has no accuracy, sensitivity, specificity.")
        rows += [row | {"method": method} for row in _method_rows(frame, runs.get(method), samples, notes)]
    table = pd.DataFrame(rows).assign(profile=profile, dataset_hash=dataset.hash)[list(COLUMNS)]
    tests = paired_tests(predictions[~predictions.is_limited & (predictions.method != ALWAYS)])
    if dataset.limits and runs:
        left_out = ", ".join(map(category_label, dataset.limits))
        notes.append(f"The paired tests leave out {left_out}: photographs of a few sources are not independent.")
    return Comparison(dataset, profile, runs, missing, refused, predictions, table, tests, tuple(dict.fromkeys(notes)))


def write(comparison: Comparison, folder: Path) -> Path:
    """Write ``comparison.csv`` (returned) and ``paired_tests.csv``, atomically."""
    for name, table in (("paired_tests", comparison.tests), ("comparison", comparison.table)):
        files.write_text(folder / f"{name}.csv", table.to_csv(index=False))
    return folder / "comparison.csv"


def read(path: Path) -> pd.DataFrame:
    """The table of a ``comparison.csv``; a painting or kind called "nan" is a name."""
    empty = {name: [""] for name in _ESTIMATE}
    return pd.read_csv(path, keep_default_na=False, na_values=empty)


def _read_all(results_dir: Path, samples: Sequence[Sample], dataset: data.Dataset) -> tuple[dict, dict, dict]:
    others = sorted(path.parent.name for path in results_dir.glob(f"[!.]*/{results.MANIFEST}"))
    runs, missing, refused = {}, {}, {}
    for method in dict.fromkeys(one for one in (*METHODS, *others) if one != ALWAYS):
        try:
            run = results.read(results_dir / method, samples, dataset.folder, dataset.hash)
            by_path = {prediction.sample.image_path: prediction for prediction in run.predictions}
            if len(by_path) < len(samples):
                share = f"{len(by_path)} of {len(samples)} test pictures"
                raise ValueError(f"{method_label(method)} has predictions for {share}: run its notebook again.")
            in_order = [by_path[sample.image_path] for sample in samples]
            runs[method] = dataclasses.replace(run, method=method, predictions=in_order)
        except FileNotFoundError:
            missing[method] = f"{method_label(method)} has no results yet: run {NOTEBOOKS[method]}."
        except (ValueError, KeyError) as error:
            refused[method] = str(error)
    return runs, missing, refused


def _facts(samples: Sequence[Sample], dataset: data.Dataset) -> pd.DataFrame:
    facts = pd.DataFrame([vars(s) for s in samples])[["sha256", "category", "kind", "is_anomalous"]]
    rendered = dataset.folder.name == "embedded"
    return facts.assign(
        place=range(len(samples)),
        group=[picture_group(sample, rendered=rendered) for sample in samples],
        source=[sample.group or str(place) for place, sample in enumerate(samples)],
        is_synthetic=[sample.synthesis_seed is not None for sample in samples],
        has_truth=[not sample.is_anomalous or sample.mask_path is not None for sample in samples],
        is_limited=facts.category.isin(dataset.limits),
    )


def picture_group(sample: Sample, *, rendered: bool) -> str:
    """The picture's group, a key of :data:`GROUPS`, or ``"genuine"``; ``rendered``: the suite made the copies."""
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
    given = run.frame().drop(columns=["category", "kind", "is_anomalous"])
    said = run.manifest.get("answers_say", {})
    says = [said.get(results.relative_path(prediction.sample, folder)) for prediction in run.predictions]
    return facts.join(given).assign(says=pd.Series(says, dtype=object), has_says=bool(said))


def _method_rows(
    frame: pd.DataFrame, run: MethodResult | None, samples: Sequence[Sample], notes: list[str]
) -> list[dict[str, Any]]:
    trained_on = () if run is None else run.manifest.get("trained_on_kinds", ())
    rows = [row | {"category": "all"} for row in _rates(frame, trained_on)]
    for category, part in frame.groupby("category"):
        found = *_rates(part, trained_on), *_rankings(part, trained_on), *_pixels(part, run, samples, notes)
        rows += [row | {"category": category} for row in found]
    table = pd.DataFrame(rows)
    for (kind, metric), part in table[table.metric.isin(_RANKINGS)].groupby(["kind", "metric"], sort=False):
        mean = dict(zip(_ESTIMATE, statistics.mover(part[_ESTIMATE].to_numpy())))
        rows.append({"category": "all", "kind": kind, "metric": metric, **mean, **part[_COUNTS].sum()})
    return sorted(rows, key=lambda row: (row["category"] != "all", row["category"], METRICS.index(row["metric"])))


def _subsets(frame: pd.DataFrame, trained_on: Sequence[str]) -> Iterator[tuple[str, pd.Series]]:
    made = frame.is_anomalous & frame.is_synthetic
    found = {"synthetic": made, "found": frame.is_anomalous & ~frame.is_synthetic}
    if trained_on:
        found |= {"seen": made & frame.kind.isin(trained_on), "unseen": made & ~frame.kind.isin(trained_on)}
    for kind in sorted(set(frame.kind[frame.is_anomalous])):  # the table's own words are kept apart
        is_own = kind in RESERVED or kind.startswith(("group:", "kind:"))
        found[f"kind:{kind}" if is_own else kind] = frame.kind == kind
    found |= {f"group:{name}": frame.group == name for name in GROUPS}
    return ((name, chosen) for name, chosen in found.items() if chosen.any())


def _row(kind: str, metric: str, estimate: Sequence[float], frame: pd.DataFrame) -> dict[str, Any]:
    counts = dict(zip(_COUNTS, (len(frame), int(frame.is_anomalous.sum()))))
    return {"kind": kind, "metric": metric, **dict(zip(_ESTIMATE, map(float, estimate))), **counts}


def _rate(kind: str, metric: str, right: pd.Series, frame: pd.DataFrame) -> dict[str, Any]:
    """A rate over some pictures; of paintings with few sources each source counts as one picture."""
    chosen = frame.loc[right.index]
    few = chosen[chosen.is_limited].groupby("category").source.nunique()
    n = (~chosen.is_limited).sum() + few.sum()
    interval = _NAN if (few < 2).any() else statistics.wilson(right.mean() * n, n)
    return _row(kind, metric, (right.mean(), *interval), chosen)


def _rates(frame: pd.DataFrame, trained_on: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rates of the fixed-threshold verdicts, of the words of a chat model, and seconds; one painting or several."""
    if frame.threshold.notna().all():
        right = frame.is_predicted_anomalous == frame.is_anomalous
        chosen = {metric: frame.is_anomalous.isin(labels) for metric, labels in _RATES.items()}
        found = {metric: _rate("all", metric, right[rows], frame) for metric, rows in chosen.items() if rows.any()}
        yield from found.values()
        if len(found) == len(_RATES):
            both = [[found[metric][key] for key in _ESTIMATE] for metric in ("sensitivity", "specificity")]
            yield _row("all", "balanced_accuracy", statistics.mover(both), frame)
        for name, rows in _subsets(frame, trained_on):
            yield _rate(name, "sensitivity", right[rows], frame)
    if frame.has_says.all():  # words without a clear yes or no are wrong
        yield _rate("all", "answer_accuracy", frame.says == frame.is_anomalous, frame)
    known = frame[frame.seconds.notna()]
    if len(known):
        yield _row("all", "seconds_per_image", (known.seconds.mean(), *_NAN), known)


def _rankings(frame: pd.DataFrame, trained_on: Sequence[str]) -> Iterator[dict[str, Any]]:
    if frame.is_anomalous.all() or not frame.is_anomalous.any():
        return
    for name, chosen in [("all", frame.is_anomalous), *_subsets(frame, trained_on)]:
        kept = frame[chosen | ~frame.is_anomalous]
        sources = kept.source.tolist() if kept.is_limited.any() else None
        interval = statistics.auroc_interval(kept.anomaly_score, kept.is_anomalous, sources=sources)
        value = metrics.image_auroc(kept.anomaly_score, kept.is_anomalous)
        yield _row(name, "image_auroc", (value, *interval), kept)
    draws = _draws(tuple(frame.is_anomalous), tuple(frame.source))
    precisions = metrics.average_precisions(frame.anomaly_score, frame.is_anomalous, draws)
    yield _row("all", "image_ap", (precisions[0], *statistics.percentile_interval(precisions[1:])), frame)


def _pixels(
    frame: pd.DataFrame, run: MethodResult | None, samples: Sequence[Sample], notes: list[str]
) -> Iterator[dict[str, Any]]:
    usable = frame[frame.has_truth]
    maps = [] if run is None else [run.anomaly_map(run.predictions[place]) for place in usable.place]
    if not usable.is_anomalous.any() or not maps or any(one is None for one in maps):
        return
    if len(usable) < len(frame):
        share = f"{len(frame) - len(usable)} of {frame.is_anomalous.sum()} anomalous test pictures"
        words = f"pixel metrics leave out {share}, which have no mask because the whole picture differs."
        notes.append(f"{category_label(frame.category.iloc[0])}: {words}")
    chosen = [samples[place] for place in usable.place]
    masks = (images.load_mask(one.mask_path) if one.is_anomalous else np.zeros((1, 1)) for one in chosen)
    table = metrics.pixel_table(maps, masks)
    drawn = metrics.pixel_metrics(table, _draws(tuple(usable.is_anomalous), tuple(usable.source)))
    for metric, values in zip(("pixel_auroc", "aupro"), drawn.T):
        if math.isfinite(values[0]):
            yield _row("all", metric, (values[0], *statistics.percentile_interval(values[1:])), usable)


@lru_cache(maxsize=128)
def _draws(labels: tuple[bool, ...], sources: tuple[str, ...]) -> np.ndarray:
    """How often each picture is taken: once in the first row, in the others as the bootstrap draws them."""
    return np.vstack([np.ones(len(labels), int), statistics.redraws(labels, sources)])


def paired_tests(predictions: pd.DataFrame) -> pd.DataFrame:
    """Every pair of detectors on the same pictures: DeLong on the scores, exact McNemar on the verdicts.

    Over all paintings DeLong's test is stratified by painting and verdicts are pooled. One Holm family per question:
    which detectors rank better, which are right more often (given a threshold), and both again painting by painting.
    """
    paintings = sorted(set(predictions.category))
    rows = []
    for scope, measure in itertools.product((["all"], paintings if len(paintings) > 1 else []), ("AUROC", "accuracy")):
        family = [row for category in scope for row in _pairs(predictions, category, measure)]
        adjusted = statistics.holm([row["p_value"] for row in family])
        rows += [row | {"p_holm": float(p_holm)} for row, p_holm in zip(family, adjusted)]
    names = "category measure method_a method_b value_a value_b difference p_value n_images p_holm".split()
    return pd.DataFrame(rows, columns=names)


def _pairs(predictions: pd.DataFrame, category: str, measure: str) -> Iterator[dict[str, Any]]:
    frame = predictions if category == "all" else predictions[predictions.category == category]
    by_method = {method: part.sort_values("place") for method, part in frame.groupby("method", sort=False)}
    for (a, x), (b, y) in itertools.combinations(by_method.items(), 2):
        if measure == "AUROC":
            test = statistics.delong_paired(x.anomaly_score, y.anomaly_score, x.is_anomalous, x.category)
        elif x.threshold.notna().all() and y.threshold.notna().all():
            right = [(part.is_predicted_anomalous == part.is_anomalous).to_numpy(bool) for part in (x, y)]
            test = statistics.accuracy_test(*right)
        else:
            continue
        yield {"category": category, "measure": measure, "method_a": a, "method_b": b, **vars(test)}
