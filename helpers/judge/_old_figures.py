"""Every figure of the suite: one style, one colour per method, one colour scale per anomaly map.

The functions take arrays and return a matplotlib figure; :func:`save_figure` writes it. No function reads a file, a
profile or a model. Titles say the finding and are given by the caller; every figure carries a sentence for readers
who cannot see it (alt text), which travels inside the saved PNG.

Anomaly maps are never stretched by their own range: that paints a defect on every normal picture. Take the limits
once per method with :func:`map_limits` and pass them to every panel.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from helpers import files as storage
from helpers.results import category_label, method_label

METHOD_COLORS: Mapping[str, str] = {
    "clip_resnet50": "#0072b2",
    "clip_cross_entropy": "#e69f00",
    "clip_isolation_forest": "#009e73",
    "clip_lof": "#b8589b",
    "clip_patch_knn": "#4fb3e8",
    "anomalyclip": "#d55e00",
    "aligned": "#00457c",
    "dinov2_memory": "#8f1d1d",
    "dinov2_subspace": "#d8d060",
    "anomalygpt": "#222222",
    "anomalygpt_aligned": "#5e3a8c",
    "always_anomaly": "#8c8c8c",
}
"""One colour per method, after Okabe and Ito (2008): distinguishable with every common kind of colour blindness."""

_MARKERS = dict(zip(METHOD_COLORS, "osD^vPphd*<X"))
_DASHES: Mapping[str, Any] = {
    "clip_resnet50": "-",
    "clip_cross_entropy": (0, (5, 1.5)),
    "clip_isolation_forest": (0, (3, 1, 1, 1)),
    "clip_lof": (0, (1, 1)),
    "clip_patch_knn": "-",
    "anomalyclip": "-",
    "aligned": (0, (3, 1, 1, 1)),
    "dinov2_memory": (0, (5, 1.5)),
    "dinov2_subspace": (0, (1, 1)),
    "anomalygpt": (0, (7, 2)),
    "anomalygpt_aligned": "-",
}
OTHER_COLOR = "#7a5195"
NORMAL_COLOR = "#5b7f95"
ANOMALOUS_COLOR = "#c1440e"
INK = "#1f2328"
MUTED = "#667077"
MAP_COLORS = "inferno"
"""Colour map of all anomaly maps: dark to bright, readable in grey print."""

STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # never transparent: dark pages would swallow the black text
    "axes.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 144,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # names come from folders; a "$" in one is a dollar sign
    "axes.edgecolor": "#b6bdc3",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2.0,
}
plt.rcParams.update(STYLE)

_TITLE_SIZE = 13
_ALT_KEY = "Description"


# ---------------------------------------------------------------------------------------------------------- saving


def method_color(method: str) -> str:
    """The method's colour everywhere; one violet for rows the suite does not know."""
    return METHOD_COLORS.get(method, OTHER_COLOR)


def save_figure(fig: Figure, name: str, folder: Path, footer: str = "", *, close: bool = False) -> Path:
    """Write the figure as ``folder/name.png``, atomically, on white.

    Args:
        fig: the figure; its alt text (if any) is stored in the PNG, see :func:`alt_text`.
        name: file name without suffix.
        folder: created when missing.
        footer: small line below, for example profile, dataset hash and number of images.
        close: free the figure. Notebooks leave it open, so that the cell shows it.
    Returns:
        path of the PNG.
    """
    if footer:
        _add_footer(fig, footer)
    path = Path(folder) / f"{name}.png"
    with storage.atomic_path(path) as temporary:
        fig.savefig(temporary, format="png", metadata={_ALT_KEY: fig.get_label() or name.replace("_", " ")})
    if close:
        plt.close(fig)
    return path


def alt_text(path: Path) -> str:
    """The sentence stored in a PNG by :func:`save_figure`; empty for other pictures."""
    with Image.open(path) as image:
        return str(image.info.get(_ALT_KEY, ""))


# ------------------------------------------------------------------------------------------------------ anomaly maps


@dataclass(frozen=True)
class Panel:
    """One picture with what a method saw in it.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        mask: bool ``(H, W)``, True = anomalous; None when unknown, all False on normal pictures.
        anomaly_map: float ``(h, w)``, raw, any resolution; None when the method makes none.
        caption: shown at the left of the row or below the picture.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    anomaly_map: np.ndarray | None = None
    caption: str = ""


def map_limits(anomaly_maps: Iterable[np.ndarray]) -> tuple[float, float]:
    """One colour scale for all maps of a method: 1st to 99.8th percentile over every picture.

    Reads the maps one by one; each gives at most 4,096 values, so memory stays small for any number of maps.

    Returns:
        ``(low, high)`` with ``low < high``; ``(0, 1)`` without any map.
    """
    values = []
    for anomaly_map in anomaly_maps:
        flat = np.asarray(anomaly_map, dtype=np.float32).ravel()
        values.append(flat[:: max(1, math.ceil(flat.size / 4096))])
    if not values:
        return 0.0, 1.0
    low, high = np.percentile(np.concatenate(values), [1.0, 99.8])
    return float(low), float(high if high > low else low + 1.0)


def overlay(
    image: np.ndarray, anomaly_map: np.ndarray, limits: tuple[float, float], *, opacity: float = 0.85
) -> np.ndarray:
    """The picture in grey with the map in colour: more opaque where the map is higher.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        anomaly_map: float ``(h, w)``, raw; resized bilinearly to the picture.
        limits: the method's fixed scale, see :func:`map_limits`.
        opacity: of the highest values, in [0, 1].
    Returns:
        uint8 RGB ``(H, W, 3)``.
    """
    height, width = image.shape[:2]
    resized = Image.fromarray(np.asarray(anomaly_map, dtype=np.float32)).resize((width, height), Image.BILINEAR)
    level = np.clip(Normalize(*limits)(np.asarray(resized)).filled(0.0), 0.0, 1.0)
    colors = mpl.colormaps[MAP_COLORS](level)[..., :3] * 255.0
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    weight = (opacity * level)[..., None]
    return np.clip(grey * (1 - weight) + colors * weight, 0, 255).astype(np.uint8)


def map_panels(
    panels: Sequence[Panel],
    *,
    limits: tuple[float, float],
    title: str,
    threshold: float | None = None,
    threshold_label: str = "threshold",
    unit: str = "anomaly score of the pixel (raw)",
) -> Figure:
    """Rows of input | mask | map | overlay, all maps on one colour scale.

    Args:
        panels: one row each; at most 8 read well.
        limits: fixed scale of the method, see :func:`map_limits`.
        title: the finding.
        threshold: marked on the colour bar when given (only where it is on the map's scale).
        threshold_label: what the mark says.
        unit: label of the colour bar.
    """
    if not panels:
        raise ValueError("map_panels got no panel; choose at least one picture.")
    heights = [min(1.5, panel.image.shape[0] / panel.image.shape[1]) for panel in panels]
    fig, axes = plt.subplots(
        len(panels), 4, figsize=(10.2, 0.95 + sum(1.72 * height + 0.14 for height in heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for row, (panel, line) in enumerate(zip(panels, axes)):
        _show_panel(line, panel, limits)
        if row == 0:
            for ax, name in zip(line, ("input", "mask (truth)", "anomaly map", "overlay")):
                ax.set_title(name, fontsize=10, loc="center")
        line[0].set_ylabel(_wrap(panel.caption, 27), rotation=0, ha="right", va="center", labelpad=8, fontsize=9.5)
    scale = ScalarMappable(Normalize(*limits), cmap=MAP_COLORS)
    bar = fig.colorbar(scale, ax=axes, shrink=min(1.0, 4.0 / len(panels) ** 1.2), aspect=28, pad=0.015, extend="both")
    bar.set_label(unit)
    bar.outline.set_visible(False)
    if threshold is not None and limits[0] <= threshold <= limits[1]:
        bar.ax.axhline(threshold, color="white", linewidth=3.2)
        bar.ax.axhline(threshold, color=INK, linewidth=1.4)
        bar.ax.annotate(
            threshold_label, (1.0, threshold), xycoords=("axes fraction", "data"), xytext=(-16, 0),
            textcoords="offset points", ha="right", va="center", fontsize=8, rotation=90, color=INK,
        )  # fmt: skip
    _title(fig, title)
    return _with_alt(fig, f"{len(panels)} rows of input, true mask, anomaly map and overlay. {title}")


def _show_panel(line: Sequence[Any], panel: Panel, limits: tuple[float, float]) -> None:
    """Fill one row; what is unknown is said in words, not drawn as black."""
    for ax in line:
        _bare(ax)
    line[0].imshow(panel.image)
    ratio = panel.image.shape[0] / panel.image.shape[1]
    if panel.mask is None:
        _words(line[1], "no mask known", ratio)
    else:
        line[1].imshow(panel.mask, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if not panel.mask.any():
            line[1].text(0.5, 0.5, "nothing\nanomalous", transform=line[1].transAxes, color="white", ha="center",
                         va="center", fontsize=9)  # fmt: skip
    if panel.anomaly_map is None:
        _words(line[2], "method makes\nno map", ratio)
        _words(line[3], "", ratio)
        return
    height, width = panel.image.shape[:2]
    line[2].imshow(panel.anomaly_map, cmap=MAP_COLORS, vmin=limits[0], vmax=limits[1], extent=(0, width, height, 0))
    line[3].imshow(overlay(panel.image, panel.anomaly_map, limits))
    if panel.mask is not None and panel.mask.any() and not panel.mask.all():
        line[3].contour(
            panel.mask, levels=[0.5], colors=["#00e5ff"], linewidths=0.9,
            extent=(0, width, 0, height) if panel.mask.shape != (height, width) else None,
        )  # fmt: skip


def map_comparison(
    image: np.ndarray,
    mask: np.ndarray | None,
    maps: Mapping[str, tuple[np.ndarray, tuple[float, float]]],
    *,
    title: str,
) -> Figure:
    """One picture seen by several methods: input, mask, then one overlay per method on that method's own scale.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        mask: bool ``(H, W)`` or None.
        maps: method -> (raw map, the method's fixed limits).
        title: the finding.
    """
    n = 2 + len(maps)
    ratio = min(1.6, image.shape[0] / image.shape[1])
    fig, axes = plt.subplots(1, n, figsize=(2.1 * n, 0.9 + 2.05 * ratio), squeeze=False)
    line = axes[0]
    for ax in line:
        _bare(ax)
    line[0].imshow(image)
    line[0].set_title("input", loc="center")
    if mask is None:
        _words(line[1], "no mask known", image.shape[0] / image.shape[1])
    else:
        line[1].imshow(mask, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    line[1].set_title("mask (truth)", loc="center")
    for ax, (method, (anomaly_map, limits)) in zip(line[2:], maps.items()):
        ax.imshow(overlay(image, anomaly_map, limits))
        if mask is not None and mask.any() and not mask.all():
            ax.contour(mask, levels=[0.5], colors=["#00e5ff"], linewidths=0.9)
        ax.set_title(_wrap(method_label(method), 16), loc="center", color=_text_color(method))
    _title(fig, title)
    return _with_alt(fig, f"One picture, its mask and the overlays of {len(maps)} methods. {title}")


# ------------------------------------------------------------------------------------------------------ scores, rates


@dataclass(frozen=True)
class ScoreSet:
    """Scores of one method on one painting.

    Args:
        method: row of the comparison.
        category: the painting.
        scores: float ``(n,)``, raw, higher = more anomalous.
        labels: bool ``(n,)``, True = anomalous.
        threshold: called anomalous above it; nan when there is none.
        auroc: (value, low, high) of the image-level AUROC, for legends; nan when unknown.
    """

    method: str
    category: str
    scores: np.ndarray
    labels: np.ndarray
    threshold: float = math.nan
    auroc: tuple[float, float, float] = (math.nan, math.nan, math.nan)


def roc(score_sets: Sequence[ScoreSet], *, title: str) -> Figure:
    """ROC curves: one panel per painting, one line per method, chance line, AUROC with interval in the legend."""
    categories = list(dict.fromkeys(item.category for item in score_sets))
    n_columns = min(3, max(1, len(categories)))
    n_rows = max(1, math.ceil(len(categories) / n_columns))
    most = max((sum(item.category == name for item in score_sets) for name in categories), default=1)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(4.7 * n_columns, (4.9 + 0.22 * most) * n_rows), squeeze=False)
    for ax in axes.flat[len(categories) :]:
        ax.set_visible(False)
    for ax, category in zip(axes.flat, categories):
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (2, 3)), label="chance  0.50")
        members = [item for item in score_sets if item.category == category]
        for item in members:
            x, y = _roc_points(item.scores, item.labels)
            label = f"{method_label(item.method)}  {_estimate(*item.auroc)}"
            style = _DASHES.get(item.method, "-")
            ax.plot(x, y, color=method_color(item.method), linestyle=style, label=label, clip_on=False)
        n_normal = int(sum(~np.asarray(members[0].labels, dtype=bool)))
        ax.set_title(f"{category_label(category)}\n{len(members[0].labels) - n_normal} anomalous, {n_normal} normal")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set_xlabel("false-alarm rate (normal pictures called anomalous)")
        ax.set_ylabel("share of anomalous pictures found")
        ax.legend(loc="upper left", bbox_to_anchor=(0.0, -0.16), title="AUROC [95 % interval]", alignment="left")
    _title(fig, title)
    return _with_alt(fig, f"ROC curves of {len({s.method for s in score_sets})} methods. {title}")


def score_histograms(score_sets: Sequence[ScoreSet], *, title: str) -> Figure:
    """Histograms of normal and anomalous scores with the threshold: a row per method, a column per painting.

    Each panel has its own axis, because the methods' scores have no common scale.
    """
    methods = list(dict.fromkeys(item.method for item in score_sets))
    categories = list(dict.fromkeys(item.category for item in score_sets))
    fig, axes = plt.subplots(
        len(methods), len(categories), figsize=(2.6 + 4.0 * len(categories), 1.1 + 1.75 * len(methods)), squeeze=False
    )
    by_place = {(item.method, item.category): item for item in score_sets}
    for row, method in enumerate(methods):
        for column, category in enumerate(categories):
            ax = axes[row, column]
            if row == 0:
                ax.set_title(category_label(category), pad=18)
            item = by_place.get((method, category))
            if item is None:
                _words(_bare(ax), "not measured", 0.5)
            else:
                _histogram(ax, item, legend=row == 0 and column == len(categories) - 1)
            if column == 0:
                ax.set_ylabel(_wrap(method_label(method), 16), rotation=0, ha="right", va="center", labelpad=12,
                              color=_text_color(method), fontweight="bold")  # fmt: skip
            if row == len(methods) - 1:
                ax.set_xlabel("anomaly score (raw, the method's own scale)")
    _title(fig, title)
    return _with_alt(fig, f"Score histograms of normal and anomalous pictures, {len(methods)} methods. {title}")


def _histogram(ax: Any, item: ScoreSet, *, legend: bool) -> None:
    scores, labels = np.asarray(item.scores, dtype=float), np.asarray(item.labels, dtype=bool)
    reach = np.append(scores, item.threshold) if math.isfinite(item.threshold) else scores
    low, high = float(reach.min()), float(reach.max())
    pad = 0.03 * (high - low) or 0.5
    bins = np.linspace(low - pad, high + pad, 25)
    for group, color, name in ((~labels, NORMAL_COLOR, "normal"), (labels, ANOMALOUS_COLOR, "anomalous")):
        ax.hist(scores[group], bins=bins, color=color, alpha=0.62, label=name, edgecolor="white", linewidth=0.5)
    ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(3, integer=True))
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    ax.grid(axis="x", visible=False)
    if math.isfinite(item.threshold):
        ax.axvline(item.threshold, color=INK, linewidth=1.4, linestyle=(0, (4, 2)), label="threshold")
    if legend:
        ax.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=3, columnspacing=1.0, handlelength=1.2)


@dataclass(frozen=True)
class Rate:
    """A rate with its interval.

    Args:
        method: row of the comparison.
        group: what it was measured on: a kind of anomaly, a visibility bin.
        value, low, high: in [0, 1].
        n: number of pictures.
    """

    method: str
    group: str
    value: float
    low: float
    high: float
    n: int


def kind_bars(rates: Sequence[Rate], *, title: str, x_label: str = "found (%)") -> Figure:
    """Bars with intervals: a column per method, a row per kind with its n."""
    methods = list(dict.fromkeys(rate.method for rate in rates))
    groups = list(dict.fromkeys(rate.group for rate in rates))
    n_by_group = {rate.group: rate.n for rate in rates}
    fig, axes = plt.subplots(
        1, len(methods), figsize=(2.2 + 1.75 * len(methods), 1.5 + 0.36 * len(groups)), squeeze=False, sharey=True
    )
    for ax, method in zip(axes[0], methods):
        color = method_color(method)
        for rate in (rate for rate in rates if rate.method == method):
            y = groups.index(rate.group)
            ax.barh(y, rate.value, height=0.62, color=color, alpha=0.45)
            ax.plot([rate.low, rate.high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
            ax.plot(rate.value, y, "o", color=color, markersize=4.5, clip_on=False, zorder=3)
        ax.set(xlim=(0, 1), ylim=(len(groups) - 0.5, -0.5))
        ax.set_xticks([0, 0.5, 1], ["0", "50", "100"], fontsize=9)
        ax.set_xlabel(x_label, fontsize=9)
        names = [_shorten(name.replace("_", " "), 26) for name in groups]
        ax.set_yticks(range(len(groups)), [f"{name}  (n = {n_by_group[key]})" for name, key in zip(names, groups)])
        ax.set_title(_wrap(method_label(method), 15), color=_text_color(method), fontsize=9.5)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    _title(fig, title)
    return _with_alt(fig, f"Share of pictures called anomalous, by kind and method. {title}")


def interval_plot(rates: Sequence[Rate], *, title: str, x_label: str, chance: float | None = None) -> Figure:
    """Value and interval: a panel per group (painting), a row per method."""
    methods = list(dict.fromkeys(rate.method for rate in rates))
    groups = list(dict.fromkeys(rate.group for rate in rates))
    fig, axes = plt.subplots(
        1, len(groups), figsize=(3.0 + 3.4 * len(groups), 1.5 + 0.42 * len(methods)), squeeze=False, sharey=True
    )
    for ax, group in zip(axes[0], groups):
        members = {rate.method: rate for rate in rates if rate.group == group}
        for method, rate in members.items():
            y, color = methods.index(method), method_color(method)
            ax.plot([rate.low, rate.high], [y, y], color=color, linewidth=3.2, alpha=0.45, solid_capstyle="round")
            ax.plot(rate.value, y, _MARKERS.get(method, "o"), color=color, markersize=8, clip_on=False, zorder=3)
        if chance is not None:
            ax.axvline(chance, color=MUTED, linewidth=1.2, linestyle=(0, (2, 3)))
            ax.annotate("chance", (chance, 0), xycoords=("data", "axes fraction"), xytext=(4, 4),
                        textcoords="offset points", fontsize=8.5, color=MUTED)  # fmt: skip
        n = max(rate.n for rate in members.values())
        ax.set_title(f"{group} (n = {n})")
        ax.set(xlim=(min([0.4, *(rate.low for rate in rates)]) - 0.02, 1.0), ylim=(len(methods) - 0.4, -0.6))
        ax.set_yticks(range(len(methods)), [method_label(method) for method in methods])
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel(x_label)
    _title(fig, title)
    return _with_alt(fig, f"{x_label}: {len(methods)} methods, {len(groups)} groups. {title}")


def visibility_histogram(values: Sequence[float], *, bins: Mapping[str, float]) -> Figure:
    """How visible the synthetic marks of a test set are; the title counts them per bin.

    Args:
        values: visibility of each mark.
        bins: upper limit of each named bin, in order; the last one infinite.
    """
    if not len(values):
        raise ValueError("visibility_histogram got no value; the dataset has no synthetic anomaly.")
    limits = [0.0, *bins.values()]
    counts = np.histogram(values, bins=limits)[0]
    fig, ax = plt.subplots(figsize=(8.6, 3.4))
    edges = np.linspace(0, max(values) * 1.02, 25)
    ax.hist(values, bins=edges, color=MUTED, edgecolor="white", linewidth=0.8)
    for name, low, high in zip(bins, limits, limits[1:]):
        if low > 0:
            ax.axvline(low, color="black", linewidth=1.0, linestyle=":")
        middle = (low + min(high, edges[-1])) / 2
        ax.text(middle, 1.02, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=9.5)
    ax.set(xlabel="visibility (mean CIEDE2000 difference times the root of the area in percent)", ylabel="marks")
    ax.set_xlim(0, edges[-1])
    words = ", ".join(f"{count} {name}" for name, count in zip(bins, counts))
    _title(fig, f"{len(values)} synthetic marks: {words}\n")
    return _with_alt(fig, f"Histogram of the visibility of {len(values)} marks: {words}.")


def visibility_curve(rates: Sequence[Rate], *, title: str) -> Figure:
    """Share found against visibility of the mark: one line per method over the bins, with intervals and n."""
    methods = list(dict.fromkeys(rate.method for rate in rates))
    groups = list(dict.fromkeys(rate.group for rate in rates))
    n_by_group = {rate.group: rate.n for rate in rates}
    fig, ax = plt.subplots(figsize=(8.6, 4.6))
    for index, method in enumerate(methods):
        members = [rate for rate in rates if rate.method == method]
        offset = (index - (len(methods) - 1) / 2) * min(0.09, 0.6 / max(1, len(methods)))
        x = np.array([groups.index(rate.group) for rate in members]) + offset
        color = method_color(method)
        ax.plot(x, [rate.value for rate in members], color=color, marker=_MARKERS.get(method, "o"), markersize=6.5,
                label=method_label(method), clip_on=False, linestyle=_DASHES.get(method, "-"))  # fmt: skip
        for place, rate in zip(x, members):
            ax.plot([place, place], [rate.low, rate.high], color=color, linewidth=1.2, alpha=0.75)
    ax.set_xticks(range(len(groups)), [f"{name}\nn = {n_by_group[name]}" for name in groups])
    ax.set(xlim=(-0.6, len(groups) - 0.4), ylim=(0, 1))
    ax.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0, symbol=" %"))
    ax.set_xlabel("visibility of the mark (colour difference and area, weakest to strongest)")
    ax.set_ylabel("share of marked pictures found")
    ax.grid(axis="x", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    _title(fig, title)
    return _with_alt(fig, f"Share found against visibility of the mark. {title}")


@dataclass(frozen=True)
class Point:
    """One method in the quality-against-time figure: quality with interval, seconds per image."""

    method: str
    value: float
    low: float
    high: float
    seconds: float


def quality_vs_seconds(points: Sequence[Point], *, title: str, y_label: str) -> Figure:
    """Quality against seconds per image on a logarithmic axis; the best place is the upper left."""
    fig, ax = plt.subplots(figsize=(8.6, 4.6))
    for point, x in zip(points, _side_by_side([point.seconds for point in points])):
        color = method_color(point.method)
        ax.plot([x, x], [point.low, point.high], color=color, linewidth=1.6)
        ax.plot(x, point.value, _MARKERS.get(point.method, "o"), color=color, markersize=9,
                label=f"{method_label(point.method)}  {point.seconds:.2g} s", clip_on=False)  # fmt: skip
    if points:
        ax.set_xscale("log")
        seconds = [point.seconds for point in points]
        ax.set_xlim(min(seconds) / 2, max(seconds) * 2)
        ax.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    ax.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=(0, (2, 3)))
    ax.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
                ha="right", fontsize=9, color=MUTED)  # fmt: skip
    ax.set_ylim(min([0.4, *(point.low for point in points)]) - 0.02, 1.0)
    ax.set_xlabel("seconds per image (logarithmic; equal times side by side; model loading not counted)")
    ax.set_ylabel(y_label)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=0.8)
    _title(fig, title)
    return _with_alt(fig, f"Quality against seconds per image, {len(points)} methods. {title}")


# ----------------------------------------------------------------------------------------------------------- pictures


def picture_grid(panels: Sequence[Panel], *, title: str, n_columns: int = 5, caption_width: int = 26) -> Figure:
    """Pictures with captions below, for example the worst misses and false alarms."""
    if not panels:
        raise ValueError("picture_grid got no picture; choose at least one.")
    n_columns = min(n_columns, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    ratio = min(1.5, max(panel.image.shape[0] / panel.image.shape[1] for panel in panels))
    lines = max(_wrap(panel.caption, caption_width).count("\n") + 1 for panel in panels)
    fig, axes = plt.subplots(
        n_rows, n_columns, figsize=(2.15 * n_columns, 0.8 + n_rows * (2.05 * ratio + 0.19 * lines)), squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels):
        _bare(ax).imshow(panel.image)
        if panel.mask is not None and panel.mask.any() and not panel.mask.all():
            ax.contour(panel.mask, levels=[0.5], colors=["#00e5ff"], linewidths=0.9)
        ax.set_xlabel(_wrap(panel.caption, caption_width), fontsize=8.8, loc="left", linespacing=1.3)
    _title(fig, title)
    return _with_alt(fig, f"{len(panels)} pictures with captions. {title}")


def kind_grid(
    examples: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], *, title: str, n_blocks: int = 2
) -> Figure:
    """Original | anomalous | mask for every kind.

    Args:
        examples: (kind, original uint8 RGB, anomalous uint8 RGB, mask bool), one each.
        title: the finding.
        n_blocks: kinds side by side.
    """
    if not examples:
        raise ValueError("kind_grid got no example; give at least one kind.")
    n_blocks = min(n_blocks, len(examples))
    n_rows = math.ceil(len(examples) / n_blocks)
    ratio = min(1.4, max(original.shape[0] / original.shape[1] for _, original, _, _ in examples))
    fig, axes = plt.subplots(  # every fourth column is a gap between two kinds
        n_rows, 4 * n_blocks - 1, figsize=(5.2 * n_blocks, 0.8 + n_rows * (1.58 * ratio + 0.24)), squeeze=False,
        gridspec_kw={"width_ratios": ([1, 1, 1, 0.1] * n_blocks)[:-1], "wspace": 0.0, "hspace": 0.0},
    )  # fmt: skip
    for ax in axes.flat:
        _bare(ax).set_visible(False)
    for index, (kind, original, anomalous, mask) in enumerate(examples):
        line = axes[index // n_blocks, 4 * (index % n_blocks) : 4 * (index % n_blocks) + 3]
        for ax in line:
            ax.set_visible(True)
        line[0].imshow(original)
        line[1].imshow(anomalous)
        line[2].imshow(mask, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_title(kind.replace("_", " "))
        if index < n_blocks:
            for ax, name in zip(line, ("original", "anomalous", "mask")):
                ax.set_title(name, loc="right", fontweight="normal", color=MUTED, fontsize=9.5)
    _title(fig, title)
    return _with_alt(fig, f"Original, anomalous picture and mask for {len(examples)} kinds. {title}")


# ----------------------------------------------------------------------------------------------------------- training


def shots_curve(points: Mapping[str, Mapping[int, Sequence[float]]], *, title: str, y_label: str) -> Figure:
    """A measure against the number of normal references: a panel per painting, a dot per draw, a line through means.

    Args:
        points: painting -> number of references -> values of all draws.
        title: the finding.
        y_label: name of the measure, in [0, 1].
    """
    fig, axes = plt.subplots(1, max(1, len(points)), figsize=(1.2 + 3.6 * max(1, len(points)), 3.3), squeeze=False,
                             sharey=True)  # fmt: skip
    color = method_color("anomalygpt")
    for ax, (category, by_shots) in zip(axes[0], points.items()):
        shots = sorted(by_shots)
        means = [float(np.mean(by_shots[k])) for k in shots]
        ax.plot(range(len(shots)), means, color=color, linewidth=2)
        for x, k in enumerate(shots):
            ax.plot([x] * len(by_shots[k]), by_shots[k], "o", color=color, markersize=5, alpha=0.55)
        ax.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=(0, (2, 3)))
        ax.set_xticks(range(len(shots)), [str(k) for k in shots])
        ax.set_title(category_label(category))
        ax.set_xlabel("normal references")
    axes[0][0].set_ylabel(y_label)
    _title(fig, title)
    return _with_alt(fig, f"{y_label} by number of normal references. {title}")


@dataclass(frozen=True)
class HistoryPoint:
    """One evaluation of a method.

    Args:
        method: row of the comparison.
        number: 1 for the method's first evaluation.
        value: the metric, in [0, 1].
        dataset_hash: evaluations of different datasets are not joined by a line.
        is_fall: significantly lower than before.
    """

    method: str
    number: int
    value: float
    dataset_hash: str
    is_fall: bool = False


def history(metrics: Mapping[str, Sequence[HistoryPoint]], *, title: str) -> Figure:
    """A metric against the number of the evaluation: a panel per metric, a line per method and dataset."""
    fig, axes = plt.subplots(1, len(metrics), figsize=(1.0 + 4.6 * len(metrics), 3.9), squeeze=False, sharex=True)
    for ax, (name, points) in zip(axes[0], metrics.items()):
        for method in dict.fromkeys(point.method for point in points):
            mine = [point for point in points if point.method == method]
            for dataset_hash in dict.fromkeys(point.dataset_hash for point in mine):
                line = [point for point in mine if point.dataset_hash == dataset_hash]
                is_first = line[0] is mine[0]
                ax.plot([p.number for p in line], [p.value for p in line], marker=_MARKERS.get(method, "o"),
                        color=method_color(method), label=method_label(method) if is_first else None)  # fmt: skip
            falls = [point for point in mine if point.is_fall]
            ax.plot([p.number for p in falls], [p.value for p in falls], "o", markersize=15, color=INK,
                    fillstyle="none", markeredgewidth=1.6)  # fmt: skip
        ax.set(title=name, xlabel="evaluation", ylim=(0, 1.02))
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center")
    _title(fig, title)
    return _with_alt(fig, f"{', '.join(metrics)} of each method by evaluation; a ring marks a fall. {title}")


@dataclass(frozen=True)
class TuningSet:
    """One search of settings.

    Args:
        method: row of the comparison.
        category: the painting.
        trials: AUROC of every setting tried.
        default, chosen: AUROC of the default settings and of the best ones.
        nested: what the choice is worth on pictures and kinds it did not know; nan when unknown.
    """

    method: str
    category: str
    trials: Sequence[float]
    default: float
    chosen: float
    nested: float


def tuning(sets: Sequence[TuningSet], *, title: str) -> Figure:
    """Settings tried, default, best and nested estimate: a panel per painting, a row per method."""
    methods = list(dict.fromkeys(item.method for item in sets))
    categories = list(dict.fromkeys(item.category for item in sets))
    fig, axes = plt.subplots(
        1, len(categories), figsize=(3.0 + 3.4 * len(categories), 1.8 + 0.5 * len(methods)), squeeze=False, sharey=True
    )
    for ax, category in zip(axes[0], categories):
        for item in (item for item in sets if item.category == category):
            y, color = methods.index(item.method), method_color(item.method)
            ax.plot(item.trials, [y] * len(item.trials), "o", color=color, alpha=0.3, markersize=6, clip_on=False)
            ax.plot(item.default, y, "|", color=INK, markersize=15, markeredgewidth=1.8, zorder=3)
            ax.plot(item.chosen, y, "o", color=color, markersize=9, clip_on=False, zorder=3)
            ax.plot(item.nested, y, "D", color="white", markeredgecolor=INK, markersize=7, zorder=4)
        ax.set_title(category_label(category))
        ax.set(ylim=(len(methods) - 0.4, -0.6), xlabel="AUROC on held-out training pictures")
        ax.set_yticks(range(len(methods)), [method_label(method) for method in methods])
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    marks = [
        mpl.lines.Line2D([], [], linestyle="", marker="o", color=MUTED, alpha=0.4, label="tried"),
        mpl.lines.Line2D([], [], linestyle="", marker="|", color=INK, markersize=12, label="default"),
        mpl.lines.Line2D([], [], linestyle="", marker="o", color=MUTED, markersize=9, label="best (flatters)"),
        mpl.lines.Line2D([], [], linestyle="", marker="D", color="white", markeredgecolor=INK, label="nested estimate"),
    ]
    fig.legend(handles=marks, loc="outside lower center", ncols=4)
    _title(fig, title)
    return _with_alt(fig, f"AUROC of the settings tried, of the default and of the best, by method. {title}")


def loss_curve(history: Sequence[Mapping[str, float]], *, title: str, x_key: str = "epoch") -> Figure:
    """Losses, and in a second panel everything else, against epoch or step.

    Args:
        history: one mapping per epoch or step with ``x_key`` and any named numbers, for example
            ``{"epoch": 3, "train_loss": 0.41, "validation_loss": 0.52, "validation_auroc": 0.88}``. Keys that contain
            ``loss`` go to the left panel. Missing keys leave gaps.
        title: the finding, or what is running.
        x_key: name of the horizontal axis.
    """
    keys = list(dict.fromkeys(key for row in history for key in row if key != x_key))
    losses = [key for key in keys if "loss" in key]
    groups = [names for names in (losses, [key for key in keys if key not in losses]) if names] or [[]]
    fig, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 3.5), squeeze=False)
    colors = list(METHOD_COLORS.values())
    for ax, names in zip(axes[0], groups):
        for index, key in enumerate(names):
            points = [(row[x_key], row[key]) for row in history if row.get(key) is not None]
            x, y = zip(*points) if points else ((), ())
            ax.plot(x, y, color=colors[index % len(colors)], label=key.replace("_", " "),
                    marker="o" if len(points) < 30 else None, markersize=4)  # fmt: skip
        ax.set_xlabel(x_key)
        ax.set_ylabel("loss" if names and names[0] in losses else "value")
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
        if names:
            ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, columnspacing=1.2, handlelength=1.4)
    _title(fig, title)
    return _with_alt(fig, f"Training curves: {', '.join(keys)}. {title}")


def live_loss_curve(title: str) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """A callback for :func:`helpers.training.train` that redraws one loss figure whenever an epoch ends."""
    from helpers.training import by_epoch

    state: dict[str, Any] = {"handle": None, "n_scores": 0, "epoch": 1}

    def show(history: Sequence[Mapping[str, Any]]) -> None:
        n_scores, epoch = sum("score" in row for row in history), history[-1]["epoch"]
        if (n_scores, epoch) != (state["n_scores"], state["epoch"]):
            finished = [row for row in by_epoch(history) if row["epoch"] < epoch or "score" in history[-1]]
            state["handle"] = show_live(loss_curve(finished, title=title), state["handle"])
            state.update(n_scores=n_scores, epoch=epoch)

    return show


def show_live(fig: Figure, handle: Any = None) -> Any:
    """Show the figure in a notebook, replacing the one shown before: one figure per training, not one per epoch.

    Use in a loop: ``handle = show_live(loss_curve(history, title=...), handle)``. Does nothing outside IPython.

    Args:
        fig: drawn figure; it is closed, so that the cell does not show it again.
        handle: what the previous call returned, None on the first.
    Returns:
        handle for the next call, None outside IPython.
    """
    plt.close(fig)
    try:
        from IPython import display, get_ipython
    except ImportError:
        return None
    if get_ipython() is None:
        return None
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100)
    picture = display.Image(buffer.getvalue(), alt=fig.get_label())
    if handle is None:
        return display.display(picture, display_id=True)
    handle.update(picture)
    return handle


# ------------------------------------------------------------------------------------------------------------ details


def _roc_points(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every distinct score; ties make slanted pieces, as AUROC counts them."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits, alarms = np.cumsum(labels[order])[last_of_ties], np.cumsum(~labels[order])[last_of_ties]
    return np.append(0.0, alarms / max(1, alarms[-1])), np.append(0.0, hits / max(1, hits[-1]))


def _side_by_side(seconds: Sequence[float], step: float = 1.06) -> list[float]:
    """Positions on a logarithmic axis at which points of nearly equal time do not cover each other."""
    places: dict[int, float] = {}
    for index in sorted(range(len(seconds)), key=lambda index: seconds[index]):
        last = max(places.values(), default=0.0)
        places[index] = max(seconds[index], last * step)
    return [places[index] for index in range(len(seconds))]


def _text_color(method: str) -> str:
    """The method's colour, dark enough to read as text on white."""
    return mpl.colors.to_hex(0.72 * np.array(mpl.colors.to_rgb(method_color(method))))


def _estimate(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "not defined"
    return f"{value:.2f}" if not math.isfinite(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _bare(ax: Any) -> Any:
    """No ticks, frame or grid: the axes of a picture."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def _words(ax: Any, words: str, ratio: float) -> None:
    """Words where a picture would be, on a pale field of the picture's shape."""
    ax.imshow(np.full((max(1, round(100 * ratio)), 100, 3), 243, dtype=np.uint8))
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=9)


def _title(fig: Figure, title: str) -> None:
    """Left-aligned heading, wrapped to the figure's width."""
    width = int(fig.get_figwidth() * 72 / (_TITLE_SIZE * 0.62))
    fig.suptitle(_wrap(title, width), x=0.012, ha="left", fontsize=_TITLE_SIZE, fontweight="bold", color=INK)


def _add_footer(fig: Figure, footer: str) -> None:
    """A small grey line at the bottom, in room taken from the layout so that it covers nothing."""
    text = _wrap(footer, int(fig.get_figwidth() * 72 / (8 * 0.58)))
    room = (8 * 1.45 * (text.count("\n") + 1) + 5) / 72 / fig.get_figheight()
    layout = fig.get_layout_engine()
    if layout is not None:
        layout.set(rect=(0, room, 1, 1 - room))
    fig.text(0.012, 3 / 72 / fig.get_figheight(), text, fontsize=8, color=MUTED, ha="left", va="bottom")


def _with_alt(fig: Figure, words: str) -> Figure:
    fig.set_label(" ".join(words.split()))
    return fig


def _wrap(text: str, width: int) -> str:
    """Wrap at blanks; line breaks of the caller stay."""
    return "\n".join(textwrap.fill(line, max(8, width)) for line in str(text).split("\n"))


def _shorten(text: str, width: int) -> str:
    text = str(text)
    return text if len(text) <= width else text[: width - 1] + "…"
