"""All methods on the same pictures: one tidy table of numbers with intervals, the paired tests, and what limits them.

``comparison.csv`` holds one number a row, columns :data:`COLUMNS`.

- ``category`` is a painting or ``"all"``. A score of one painting means nothing on another (each has its own detector
  and threshold), so scores are never pooled: on ``"all"`` the *rates* come from pooled verdicts, each made at its own
  painting's threshold, and every *ranking* metric (AUROC, AP, pixel AUROC, AUPRO) is the plain mean over the paintings.
- ``kind`` is ``"all"``; one kind of anomaly against the genuine pictures of its painting; ``"synthetic"`` or
  ``"found"`` (made by notebook 02, or not); ``"seen"`` or ``"unseen"`` (synthetic kinds that the method was trained on,
  or not); or a group of pictures, ``"group:faint"``, see :data:`GROUPS`. A kind of the dataset that bears one of these
  names is written ``"kind:found"``.
- ``n_images`` and ``n_anomalous`` are the pictures behind that very number: the denominator of a rate.

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
"""Groups of anomalous pictures. *Real* are only those that the user brought, *whole* those that differ as a whole;
marks go by the fixed limits of :data:`helpers.synthesis.marks.VISIBILITY_BINS`."""
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
_ESTIMATE = ("value", "ci_low", "ci_high")
_NAN = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Attributes:
        dataset, profile: the dataset all rows share, and the profile's name.
        runs: method -> its results, for maps and settings; without the trivial rule.
        missing, refused: method -> the notebook that makes it, or why its results are not compared.
        predictions: one row a method and test picture (``place`` in :attr:`samples`), see ``_facts`` and ``_frame``.
        table, tests: the tidy table, see the module's text; and :func:`paired_tests`.
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


def numbers(table: pd.DataFrame) -> dict[tuple[str, str, str, str], Mapping[str, Any]]:
    """The table for look-up: (method, category, kind, metric) -> row."""
    return {(row["method"], row["category"], row["kind"], row["metric"]): row for row in table.to_dict("records")}


def compare(dataset: data.Dataset, results_dir: Path, *, profile: str) -> Comparison:
    """Read every method's results on this dataset's test pictures and compute the whole comparison.

    ``results_dir`` holds a results folder per method; complete results in folders of unknown name join as further rows.
    ``profile`` is written into every row. ``ValueError``: the dataset has no test picture.
    """
    samples = dataset.select(split="test")
    if not samples:
        raise ValueError(f"{dataset.folder} has no test picture; run 02_synthesize_anomalies again.")
    runs, missing, refused = _read_all(Path(results_dir), samples, dataset)
    facts = _facts(samples, dataset)
    always = facts.assign(method=ALWAYS, anomaly_score=1.0, threshold=0.0, is_predicted_anomalous=True,
                          p_value=math.nan, seconds=math.nan, answer="", says=None, has_says=False)  # fmt: skip
    frames = [_frame(run, facts, dataset.folder) for run in runs.values()]
    predictions = pd.concat([*frames, always], ignore_index=True)
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
    files.write_text(Path(folder) / "paired_tests.csv", comparison.tests.to_csv(index=False))
    files.write_text(Path(folder) / "comparison.csv", comparison.table.to_csv(index=False))
    return Path(folder) / "comparison.csv"


def read(path: Path) -> pd.DataFrame:
    """Read a ``comparison.csv``; an error names the notebook that writes it, or the columns that it should have."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist. Run 09_compare, which writes it.")
    empty = {name: [""] for name in ("ci_low", "ci_high", "value")}
    table = pd.read_csv(path, keep_default_na=False, na_values=empty, float_precision="round_trip")
    if tuple(table.columns) != COLUMNS:
        raise ValueError(f"{path} has columns {', '.join(table.columns)}; expected {', '.join(COLUMNS)}.")
    return table


# -------------------------------------------------------------------------------------------------------- predictions


def _read_all(results_dir: Path, samples: Sequence[Sample], dataset: data.Dataset) -> tuple[dict, dict, dict]:
    """Runs in the order of the table, what is missing, and what is refused."""
    others = sorted(path.parent.name for path in results_dir.glob(f"[!.]*/{results.MANIFEST}"))
    runs, missing, refused = {}, {}, {}
    for method in dict.fromkeys((*METHODS, *others)):
        if method == ALWAYS:
            continue
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
    """One row a test picture."""
    facts = pd.DataFrame([vars(s) for s in samples])[["sha256", "category", "kind", "is_anomalous"]]
    rendered = dataset.folder.name == "embedded"
    return facts.assign(
        place=range(len(samples)),
        group=[picture_group(sample, rendered=rendered) for sample in samples],
        source=[sample.group or str(place) for place, sample in enumerate(samples)],
        is_synthetic=[sample.synthesis_seed is not None for sample in samples],
        has_truth=[not sample.is_anomalous or sample.mask_path is not None for sample in samples],
        is_limited=[sample.category in dataset.limits for sample in samples],
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
    """The facts with a method's verdicts."""
    given = run.frame().drop(columns=["category", "kind", "is_anomalous"])
    said = run.manifest.get("answers_say", {})
    says = [said.get(results.relative_path(prediction.sample, folder)) for prediction in run.predictions]
    return facts.join(given).assign(says=pd.Series(says, dtype=object), has_says=bool(said))


# ----------------------------------------------------------------------------------------------------------- the table


def _method_rows(
    frame: pd.DataFrame, run: MethodResult | None, samples: Sequence[Sample], notes: list[str]
) -> list[dict[str, Any]]:
    """Rows of one method: over all paintings first, then painting by painting."""
    trained_on = () if run is None else run.manifest.get("trained_on_kinds", ())
    rows = [row | {"category": "all"} for row in _rates(frame, trained_on)]
    for category, part in frame.groupby("category"):
        found = *_rates(part, trained_on), *_rankings(part, trained_on), *_pixels(part, run, samples, notes)
        rows += [row | {"category": category} for row in found]
    table = pd.DataFrame(rows)
    for (kind, metric), part in table[table.metric.isin(_RANKINGS)].groupby(["kind", "metric"], sort=False):
        mean = statistics.mover(part[["value", "ci_low", "ci_high"]].to_numpy())
        counts = part[["n_images", "n_anomalous"]].sum()
        rows.append({"category": "all", "kind": kind, "metric": metric, **dict(zip(_ESTIMATE, mean)), **counts})
    return sorted(rows, key=lambda row: (row["category"] != "all", row["category"], METRICS.index(row["metric"])))


def _subsets(frame: pd.DataFrame, trained_on: Sequence[str]) -> Iterator[tuple[str, pd.Series]]:
    """Name and rows of each group of anomalous pictures that is not empty."""
    made = frame.is_anomalous & frame.is_synthetic
    found = {"synthetic": made, "found": frame.is_anomalous & ~frame.is_synthetic}
    if trained_on:
        found |= {"seen": made & frame.kind.isin(trained_on), "unseen": made & ~frame.kind.isin(trained_on)}
    for kind in sorted(set(frame.kind[frame.is_anomalous])):  # the table's own words are kept apart
        is_own = kind in _RESERVED or kind.startswith(("group:", "kind:"))
        found[f"kind:{kind}" if is_own else kind] = frame.kind == kind
    found |= {f"group:{name}": frame.group == name for name in GROUPS}
    return ((name, chosen) for name, chosen in found.items() if chosen.any())


def is_single_kind(kind: str) -> bool:
    """True for rows about one kind of anomaly, False for "all" and groups."""
    return kind not in _RESERVED and not kind.startswith("group:")


def _row(kind: str, metric: str, estimate: Sequence[float], frame: pd.DataFrame) -> dict[str, Any]:
    """A row of the table: value and ends of the interval, and the pictures behind them."""
    counts = {"n_images": len(frame), "n_anomalous": int(frame.is_anomalous.sum())}
    return {"kind": kind, "metric": metric, **dict(zip(_ESTIMATE, map(float, estimate))), **counts}


def _rate(kind: str, metric: str, right: pd.Series, frame: pd.DataFrame) -> dict[str, Any]:
    """A rate over some pictures; of paintings with few sources each source counts as one picture."""
    chosen = frame.loc[right.index]
    paintings = [(len(part), part.source.nunique(), part.is_limited.any()) for _, part in chosen.groupby("category")]
    n = sum(sources if is_limited else pictures for pictures, sources, is_limited in paintings)
    one_source = any(is_limited and sources < 2 for _, sources, is_limited in paintings)
    interval = _NAN if one_source else statistics.wilson(right.mean() * n, n)
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
    """AUROC of one painting for all anomalous pictures and each group of them; average precision for all."""
    if frame.is_anomalous.all() or not frame.is_anomalous.any():
        return
    for name, chosen in [("all", frame.is_anomalous), *_subsets(frame, trained_on)]:
        kept = frame[chosen | ~frame.is_anomalous]
        scores, labels = kept.anomaly_score.to_numpy(), kept.is_anomalous.to_numpy()
        sources = kept.source.tolist() if kept.is_limited.any() else None
        interval = statistics.auroc_interval(scores, labels, sources=sources)
        yield _row(name, "image_auroc", (metrics.image_auroc(scores, labels), *interval), kept)
        if name == "all":
            drawn = metrics.average_precisions(scores, labels, _redraws(tuple(labels), tuple(kept.source)))
            yield _row(name, "image_ap", _bootstrap(metrics.average_precision(scores, labels), drawn, kept), kept)


def _pixels(
    frame: pd.DataFrame, run: MethodResult | None, samples: Sequence[Sample], notes: list[str]
) -> Iterator[dict[str, Any]]:
    """Pixel AUROC and AUPRO over genuine pictures and anomalous ones with a known mask."""
    usable = frame[frame.has_truth]
    maps = [] if run is None else [run.anomaly_map(run.predictions[place]) for place in usable.place]
    n_maps, name = sum(one is not None for one in maps), category_label(frame.category.iloc[0])
    if not n_maps or not usable.is_anomalous.any():
        return
    if n_maps < len(usable):
        which = f"{method_label(run.method)} has maps for {n_maps} of {len(usable)} pictures of {name}"
        notes.append(f"{which}, so it has no pixel metrics there.")
        return
    if len(usable) < len(frame):
        share = f"{len(frame) - len(usable)} of {frame.is_anomalous.sum()} anomalous test pictures"
        notes.append(f"{name}: pixel metrics leave out {share}, which have no mask because the whole picture differs.")
    chosen = [samples[place] for place in usable.place]
    masks = (images.load_mask(one.mask_path) if one.is_anomalous else np.zeros((1, 1)) for one in chosen)
    table = metrics.pixel_table(maps, masks)
    draws = _redraws(tuple(usable.is_anomalous), tuple(usable.source))
    drawn = np.array([metrics.pixel_metrics(table, counts) for counts in draws])
    for metric, value, values in zip(("pixel_auroc", "aupro"), metrics.pixel_metrics(table), drawn.T):
        if math.isfinite(value):
            yield _row("all", metric, _bootstrap(value, values, usable), usable)


def _bootstrap(value: float, drawn: np.ndarray, frame: pd.DataFrame) -> tuple[float, float, float]:
    """The value with the interval of its draws; one source gives none."""
    return (value, *(_NAN if frame.source.nunique() < 2 else statistics.percentile_interval(drawn)))


@lru_cache(maxsize=128)
def _redraws(labels: tuple[bool, ...], sources: tuple[str, ...]) -> np.ndarray:
    """The draws of a painting's pictures, the same for every method."""
    return statistics.redraws(labels, sources)


# -------------------------------------------------------------------------------------------------------- paired tests


def paired_tests(predictions: pd.DataFrame) -> pd.DataFrame:
    """Every pair of detectors on the same pictures: DeLong on the scores, exact McNemar on the verdicts.

    Over all paintings DeLong's test is stratified by painting and verdicts are pooled. One Holm family per question:
    which detectors rank better, which are right more often, and both again painting by painting. Methods without a
    threshold have no row for accuracy.
    """
    paintings = sorted(set(predictions.category))
    rows = []
    for scope, measure in itertools.product((["all"], paintings if len(paintings) > 1 else []), ("AUROC", "accuracy")):
        family = [row for category in scope for row in _pairs(predictions, category, measure)]
        adjusted = statistics.holm([row["p_value"] for row in family])
        rows += [row | {"p_holm": float(p_holm)} for row, p_holm in zip(family, adjusted)]
    names = "category measure method_a method_b value_a value_b difference p_value n_images p_holm sentence".split()
    return pd.DataFrame([row | {"sentence": _sentence(row)} for row in rows], columns=names)


def _pairs(predictions: pd.DataFrame, category: str, measure: str) -> Iterator[dict[str, Any]]:
    frame = predictions if category == "all" else predictions[predictions.category == category]
    by_method = {method: part.sort_values("place") for method, part in frame.groupby("method", sort=False)}
    for (a, x), (b, y) in itertools.combinations(by_method.items(), 2):
        if measure == "AUROC":
            labels, paintings = x.is_anomalous.to_numpy(), x.category.to_numpy()
            test = statistics.delong_paired(x.anomaly_score, y.anomaly_score, labels, paintings)
        elif x.threshold.notna().all() and y.threshold.notna().all():
            right = [(part.is_predicted_anomalous == part.is_anomalous).to_numpy(bool) for part in (x, y)]
            test = statistics.mcnemar_exact(*right)
        else:
            continue
        yield {"category": category, "measure": measure, "method_a": a, "method_b": b, **vars(test)}


def _sentence(row: Mapping[str, Any]) -> str:
    """The test in words, "cannot tell" and ties included."""
    names, values = [method_label(row[key]) for key in ("method_a", "method_b")], [row["value_a"], row["value_b"]]
    place = "" if row["category"] == "all" else f" on {category_label(row['category'])}"
    if math.isnan(row["p_holm"]):
        return f"{names[0]} and {names[1]} cannot be compared in {row['measure']}{place}: one class is missing."
    if abs(row["difference"]) < 1e-12:
        return f"{names[0]} and {names[1]} are tied{place} ({row['measure']} {values[0]:.3f} both)."
    if row["difference"] < 0:
        names, values = names[::-1], values[::-1]
    p_text = "p < 0.001" if row["p_holm"] < 0.001 else f"p = {row['p_holm']:.{2 if row['p_holm'] >= 0.0995 else 3}f}"
    shown = f"({row['measure']} {values[0]:.3f} and {values[1]:.3f}, {p_text})"
    if row["p_holm"] < 0.05:
        return f"{names[0]} is better than {names[1]}{place} on these {row['n_images']} images {shown}."
    return f"These {row['n_images']} images cannot tell {names[0]} from {names[1]}{place} {shown}."
