"""The comparison's figures: picks the numbers and pictures, words the finding, and calls :mod:`helpers.judge.figures`.

Every function takes a :class:`comparison.Comparison` and returns a figure, or None when there is nothing to
show (no marks with a visibility, no maps, no failure). :func:`draw_all` saves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import _old_figures as figures
from helpers.judge.comparison import VISIBILITY_BINS, Comparison
from helpers.judge.findings import (
    ALWAYS,
    count_words,
    estimate,
    hard_and_easy,
    is_single_kind,
    kind_label,
    listed,
    numbers,
    percent,
)
from helpers.records import Prediction
from helpers.results import MethodResult, category_label, map_path, method_label

_PICTURE_SIDE = 360
_N_WORST = 5


def draw_all(comparison: Comparison, folder: Path, *, footer: str = "") -> dict[str, Path]:
    """Save every figure that has something to show; name -> PNG, in the order of the report."""
    drawn: dict[str, Figure | None] = {
        "auroc": auroc(comparison),
        "roc": roc(comparison),
        "scores": scores(comparison),
        "quality_vs_seconds": quality_vs_seconds(comparison),
        "kinds": kinds(comparison),
        "visibility": visibility(comparison),
        "maps_compared": maps_compared(comparison),
    }
    paths = {}
    for name, fig in drawn.items():
        if fig is not None:
            paths[name] = figures.save_figure(fig, name, folder, footer, close=True)
    for result in comparison.methods:
        for name, draw in (("maps", map_panels), ("failures", failures)):
            fig = draw(comparison, result.method)
            if fig is not None:
                key = f"{name}_{result.method}"
                paths[key] = figures.save_figure(fig, key, folder, footer, close=True)
    return paths


def footer(comparison: Comparison) -> str:
    """The line below each figure: where its numbers come from."""
    n = len(comparison.test_samples)
    n_anomalous = sum(sample.is_anomalous for sample in comparison.test_samples)
    return (
        f"profile {comparison.profile} · dataset {comparison.dataset.hash[:12]} · {n} test pictures, {n_anomalous} "
        "anomalous · intervals 95 %"
    )


# ------------------------------------------------------------------------------------------------------------ numbers


def auroc(comparison: Comparison) -> Figure | None:
    """Image AUROC with interval: one panel per painting, one row per method."""
    look = numbers(comparison.table)
    rates = [
        figures.Rate(method, category_label(category), row["value"], row["ci_low"], row["ci_high"], row["n_images"])
        for category in _categories(comparison)
        for method in _detectors(comparison)
        for row in [look.get((method, category, "all", "image_auroc"))]
        if row is not None
    ]
    if not rates:
        return None
    return figures.interval_plot(rates, title=_who_leads(rates), x_label="image AUROC with 95 % interval", chance=0.5)


def _who_leads(rates: Sequence[figures.Rate]) -> str:
    """Who is first on each painting, and how many other intervals overlap with the first one's."""
    places: dict[str, list[str]] = {}
    overlaps = []
    groups = list(dict.fromkeys(rate.group for rate in rates))
    for group in groups:
        members = [rate for rate in rates if rate.group == group]
        best = max(members, key=lambda rate: rate.value)
        places.setdefault(best.method, []).append(group)
        overlaps.append(sum(rate is not best and rate.high >= best.low for rate in members))
    leaders = [
        f"{method_label(method)} is first on {listed(names) if len(places) > 1 else 'every painting'}"
        for method, names in places.items()
    ]
    if len(groups) == 1:
        leaders = [f"{method_label(method)} is first" for method in places]
    few, many = min(overlaps), max(overlaps)
    if many == 0:
        return f"{listed(leaders)}; no other interval overlaps"
    span = f"{many}" if few == many else f"{few} to {many}"
    return f"{listed(leaders)}; {span} other intervals overlap with that"


def score_sets(comparison: Comparison) -> list[figures.ScoreSet]:
    """Scores, labels, threshold and AUROC per method and painting; the trivial rule left out."""
    look = numbers(comparison.table)
    found = []
    for result in _results(comparison):
        for category in _categories(comparison):
            chosen = [p for p in result.predictions if p.sample.category == category]
            row = look.get((result.method, category, "all", "image_auroc"))
            thresholds = {p.threshold for p in chosen}
            found.append(
                figures.ScoreSet(
                    result.method,
                    category,
                    np.array([p.anomaly_score for p in chosen]),
                    np.array([p.sample.is_anomalous for p in chosen]),
                    threshold=thresholds.pop() if len(thresholds) == 1 else math.nan,
                    auroc=(row["value"], row["ci_low"], row["ci_high"]) if row else (math.nan,) * 3,
                )
            )
    return found


def roc(comparison: Comparison) -> Figure | None:
    sets = [item for item in score_sets(comparison) if 0 < item.labels.sum() < len(item.labels)]
    if not sets:
        return None
    best = max(sets, key=lambda item: item.auroc[0])
    title = (
        f"The highest curve is {method_label(best.method)} on {category_label(best.category)}; curves of a few dozen "
        "pictures are coarse"
    )
    return figures.roc(sets, title=title)


def scores(comparison: Comparison) -> Figure | None:
    sets = score_sets(comparison)
    if not sets:
        return None
    below = sum(int((item.scores[item.labels] <= item.threshold).sum()) for item in sets)
    above = sum(int((item.scores[~item.labels] > item.threshold).sum()) for item in sets)
    n_anomalous, n_normal = (sum(int((item.labels == wanted).sum()) for item in sets) for wanted in (True, False))
    title = (
        f"Left of the thresholds stay {below} of {n_anomalous} anomalous pictures; right of them lie {above} of "
        f"{n_normal} normal ones (all methods together)"
    )
    return figures.score_histograms(sets, title=title)


def quality_vs_seconds(comparison: Comparison) -> Figure | None:
    look = numbers(comparison.table)
    points = []
    for method in _detectors(comparison):
        quality = look.get((method, "all", "all", "image_auroc"))
        seconds = look.get((method, "all", "all", "seconds_per_image"))
        if quality and seconds and seconds["value"] > 0:
            points.append(
                figures.Point(method, quality["value"], quality["ci_low"], quality["ci_high"], seconds["value"])
            )
    if not points:
        return None
    best, fast = max(points, key=lambda point: point.value), min(points, key=lambda point: point.seconds)
    if best.method == fast.method:
        title = f"{method_label(best.method)} is both the fastest and the first in AUROC"
    else:
        title = (
            f"{method_label(best.method)}, first in AUROC, takes {best.seconds / fast.seconds:.2g} times as long as "
            f"{method_label(fast.method)}, the fastest"
        )
    return figures.quality_vs_seconds(points, title=title, y_label="image AUROC, mean over paintings")


def kinds(comparison: Comparison) -> Figure | None:
    """Share found by kind of anomaly, pooled over paintings."""
    rates = _found(comparison, is_single_kind)
    if not rates:
        return None
    means = {}
    for name in dict.fromkeys(rate.group for rate in rates):
        means[name] = float(np.mean([rate.value for rate in rates if rate.group == name]))
    order = sorted(means, key=lambda name: -means[name])
    rates.sort(key=lambda rate: order.index(rate.group))
    sentence = hard_and_easy(comparison.table)
    title = sentence[0] if sentence else "Too few pictures of each kind to say which are found"
    return figures.kind_bars(rates, title=title, x_label="found (%)")


def visibility(comparison: Comparison) -> Figure | None:
    """Share found by visibility of the mark; None without recorded visibilities."""
    rates = _found(comparison, lambda kind: kind.startswith("visibility:"))
    if not rates:
        return None
    rates = [figures.Rate(r.method, r.group.split(":")[1], r.value, r.low, r.high, r.n) for r in rates]
    rates.sort(key=lambda rate: VISIBILITY_BINS.index(rate.group))
    faint, strong = (
        float(np.mean([rate.value for rate in rates if rate.group == name]))
        for name in (rates[0].group, rates[-1].group)
    )
    title = (
        f"Of the {rates[0].group} quarter of the marks {percent(faint)} are found, of the {rates[-1].group} quarter "
        f"{percent(strong)} (mean over the methods)"
    )
    return figures.visibility_curve(rates, title=title)


def _found(comparison: Comparison, wanted: Callable[[str], bool]) -> list[figures.Rate]:
    rows = comparison.table.to_dict("records")
    return [
        figures.Rate(row["method"], row["kind"], row["value"], row["ci_low"], row["ci_high"], row["n_images"])
        for row in rows
        if row["metric"] == "sensitivity"
        and row["category"] == "all"
        and row["method"] != ALWAYS
        and wanted(row["kind"])
    ]


# ----------------------------------------------------------------------------------------------------------- pictures


def map_panels(comparison: Comparison, method: str) -> Figure | None:
    """Input | mask | map | overlay for four pictures of a method: clearest hit, median, worst miss, worst normal."""
    result = _result(comparison, method)
    mapped = [p for p in result.predictions if map_path(result.folder, p.sample).exists()]
    if not mapped:
        return None
    marked = sorted(
        (p for p in mapped if p.sample.is_anomalous and p.sample.mask_path is not None), key=_suspicion, reverse=True
    )
    normals = sorted((p for p in mapped if not p.sample.is_anomalous), key=_suspicion, reverse=True)
    chosen = [("clearest mark", p) for p in marked[:1]]
    chosen += [("middle mark", p) for p in marked[len(marked) // 2 : len(marked) // 2 + 1] if len(marked) > 2]
    chosen += [("least noticed mark", p) for p in marked[-1:] if len(marked) > 1]
    chosen += [("highest normal", p) for p in normals[:1]]
    if not chosen:
        return None
    panels = [
        figures.Panel(
            *_picture(p), result.anomaly_map(p), f"{role}\n{_where(p)}\nscore {p.anomaly_score:.3g}\n{_verdict(p)}"
        )
        for role, p in chosen
    ]
    row = numbers(comparison.table).get((method, "all", "all", "pixel_auroc"))
    finding = "where it looks" if row is None else f"pixel AUROC {estimate(row)}"
    low, high = limits = _limits(result)
    return figures.map_panels(
        panels,
        limits=limits,
        title=f"{method_label(method)}: {finding}",
        threshold=(low + high) / 2,
        threshold_label="normal pictures end here",
    )


def maps_compared(comparison: Comparison) -> Figure | None:
    """One marked picture seen by every method that makes maps; None with fewer than two of them."""
    with_maps = [
        result
        for result in _results(comparison)
        if any(map_path(result.folder, p.sample).exists() for p in result.predictions)
    ]
    marked = [s for s in comparison.test_samples if s.is_anomalous and s.mask_path is not None]
    if len(with_maps) < 2 or not marked:
        return None
    areas = [float(data.mask_of(sample).mean()) for sample in marked]
    sample = marked[int(np.argsort(areas)[len(areas) // 2])]  # a mark of middle size, chosen without looking at maps
    maps = {}
    for result in with_maps:
        prediction = next(p for p in result.predictions if p.sample.image_path == sample.image_path)
        anomaly_map = result.anomaly_map(prediction)
        if anomaly_map is not None:
            maps[result.method] = (anomaly_map, _limits(result))
    title = f"One “{kind_label(sample.kind)}” of middle size on {category_label(sample.category)}, seen by each method"
    image, mask = _picture(Prediction(sample, 0.0))
    return figures.map_comparison(image, mask, maps, title=title)


def failures(comparison: Comparison, method: str) -> Figure | None:
    """The worst misses and false alarms of a method, with score, threshold and p-value."""
    result = _result(comparison, method)
    if method == ALWAYS:
        return None
    wrong = [
        p
        for p in result.predictions
        if math.isfinite(p.threshold) and p.is_predicted_anomalous != p.sample.is_anomalous
    ]
    misses = sorted((p for p in wrong if p.sample.is_anomalous), key=_suspicion)
    alarms = sorted((p for p in wrong if not p.sample.is_anomalous), key=_suspicion, reverse=True)
    shown = [*misses[:_N_WORST], *alarms[:_N_WORST]]
    if not shown:
        return None
    panels = []
    for p in shown:
        name = f"missed: {kind_label(p.sample.kind)}" if p.sample.is_anomalous else "false alarm"
        p_text = f"p = {p.p_value:.2g}" if math.isfinite(p.p_value) else "p unknown"
        score = f"score {p.anomaly_score:.3g}, limit {p.threshold:.3g}"
        caption = f"{name}\n{category_label(p.sample.category)}\n{score}\n{p_text}"
        panels.append(figures.Panel(*_picture(p), caption=caption))
    title = f"{method_label(method)}: {len(misses)} missed and {count_words(len(alarms), 'false alarm')}"
    if len(wrong) > len(shown):
        title += f"; the worst {min(_N_WORST, len(misses))} and {min(_N_WORST, len(alarms))} are shown"
    return figures.picture_grid(panels, title=title, n_columns=5)


def _picture(prediction: Prediction) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture at figure size and its mask (None when unknown)."""
    image = images.load_image(prediction.sample.image_path, max_side=_PICTURE_SIDE)
    mask = data.mask_of(prediction.sample, image.shape[:2])
    return image, mask


def _limits(result: MethodResult) -> tuple[float, float]:
    """One colour scale for all of a method's maps, read one by one: what normal pictures reach lies in its middle.

    A scale over all pictures would be set by the loudest forgery, and every small mark would stay dark.
    """
    normals = [p for p in result.predictions if not p.sample.is_anomalous] or list(result.predictions)
    maps = (result.anomaly_map(p) for p in normals)
    low, top = figures.map_limits(anomaly_map for anomaly_map in maps if anomaly_map is not None)
    return low, top + (top - low)


def _suspicion(prediction: Prediction) -> tuple[float, float]:
    """How anomalous the method holds the picture: first by p-value, which compares over paintings, then by score."""
    p_value = prediction.p_value if math.isfinite(prediction.p_value) else 1.0
    limit = prediction.threshold if math.isfinite(prediction.threshold) else 0.0
    return -p_value, prediction.anomaly_score - limit


def _where(prediction: Prediction) -> str:
    return f"{category_label(prediction.sample.category)}, {kind_label(prediction.sample.kind)}"


def _verdict(prediction: Prediction) -> str:
    if not math.isfinite(prediction.threshold):
        return "no threshold"
    word = "called anomalous" if prediction.is_predicted_anomalous else "called normal"
    return f"limit {prediction.threshold:.3g}\n{word}"


def _results(comparison: Comparison) -> Sequence[MethodResult]:
    return [result for result in comparison.methods if result.method != ALWAYS]


def _detectors(comparison: Comparison) -> list[str]:
    return [result.method for result in _results(comparison)]


def _result(comparison: Comparison, method: str) -> MethodResult:
    for result in comparison.methods:
        if result.method == method:
            return result
    names = ", ".join(result.method for result in comparison.methods)
    raise ValueError(f"{method!r} has no results in this comparison; there are {names}.")


def _categories(comparison: Comparison) -> list[str]:
    return sorted({sample.category for sample in comparison.test_samples})


def show(drawn: Mapping[str, Path], *names: str) -> None:
    """Show saved figures in a notebook, with their alt text; says so in words where there is nothing to show."""
    from IPython.display import Image, display

    for name in names:
        if name in drawn:
            display(Image(filename=str(drawn[name]), alt=figures.alt_text(drawn[name]), width=900))
        else:
            print(f"Nothing to show for “{name}”: no method in this comparison has what it needs.")
