"""Every figure of the suite: few kinds, one style, one colour per method, one language on pictures.

Functions take frames and arrays, the caller's title says the finding; :func:`save_figure` writes the figure with a
sentence for readers who cannot see it (alt text) inside the PNG.

On pictures the painting keeps its colours. A *verdict* is a tint with a solid outline, only where an anomaly map
exceeds its limit; the *truth* is a thin dashed line. A map is never stretched by its own range, which would paint a
defect on every genuine picture: take the scale once per method with :func:`map_scale`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager, ft2font
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from helpers import data, files
from helpers.data.images import load_image
from helpers.results import MethodResult, category_label, method_label

METHOD_COLORS: Mapping[str, str] = {
    "clip_resnet50": "#0072b2", "clip_cross_entropy": "#e69f00", "clip_isolation_forest": "#009e73",
    "clip_lof": "#b8589b", "clip_patch_knn": "#4fb3e8", "anomalyclip": "#d55e00", "aligned": "#8a1538",
    "dinov2_memory": "#3f3d9e", "dinov2_subspace": "#8d86d6", "anomalygpt": "#222222",
    "anomalygpt_aligned": "#6f7a3a", "always_anomaly": "#9a9a9a",
}  # fmt: skip
"""One colour per method, after Okabe and Ito (2008): distinguishable with every common kind of colour blindness."""
OTHER_COLOR = "#7a5195"  # of methods that the suite does not know
VERDICT_COLOR = (214, 0, 110)
"""RGB of what exceeds a limit: a magenta that paintings seldom use."""

_MARKERS = dict(zip(METHOD_COLORS, "osD^vPh<>*dX"))
_GENUINE_COLOR, _ANOMALOUS_COLOR, _INK, _MUTED = "#5b7f95", "#c1440e", "#1f2328", "#667077"
_CJK_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "WenQuanYi Zen Hei", "Droid Sans Fallback",
              "IPAGothic", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS")  # fmt: skip
plt.style.use(Path(__file__).parent / "templates" / "figures.mplstyle")


def save_figure(fig: Figure, name: str, folder: Path, footer: str = "", *, close: bool = False) -> Path:
    """Write the figure as ``folder/name.png`` (returned), atomically, with its alt text inside and a small ``footer``
    below. ``close`` frees the figure; notebooks leave it open, so that the cell shows it."""
    if footer:
        fig.text(0.01, -0.01, footer, fontsize=8.5, color=_MUTED, va="top")
    path = Path(folder) / f"{name}.png"
    with files.atomic_path(path) as temporary:
        words = {"Description": fig.get_label() or name.replace("_", " ")}
        fig.savefig(temporary, format="png", metadata=words, bbox_inches="tight", pad_inches=0.12)
    if close:
        plt.close(fig)
    return path


def alt_text(path: Path) -> str:
    """The sentence stored in a PNG by :func:`save_figure`; empty for other pictures."""
    with Image.open(path) as image:
        return str(image.info.get("Description", ""))


@cache
def _glyphs() -> frozenset[int]:
    """Code points of the fonts in use; a CJK font joins when the machine has one."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    plt.rcParams["font.family"] = found = ["DejaVu Sans", *[name for name in _CJK_FONTS if name in known][:1]]
    return frozenset().union(*(ft2font.FT2Font(font_manager.findfont(name)).get_charmap() for name in found))


def painting_name(category: str, categories: Sequence[str], width: int = 26) -> str:
    """The painting's label on a figure, wrapped; where no font has its letters its number in the page's last table.

    >>> painting_name("mona_lisa", ["mona_lisa"])
    'Mona Lisa'
    """
    label = category_label(category)
    if not all(ord(letter) in _glyphs() for letter in label):
        return f"painting {sorted(set(categories) - {'all'}).index(category) + 1}"
    return _wrap(textwrap.shorten(label, 3 * width, placeholder=" …"), width)


@dataclass(frozen=True)
class Panel:
    """One picture with what a method saw in it."""

    image: np.ndarray  # uint8 RGB (H, W, 3)
    mask: np.ndarray | None = None  # bool (h, w), True = anomalous; None when unknown, all False on genuine pictures
    anomaly_map: np.ndarray | None = None  # float (h, w), raw, any resolution; None when the method makes none
    caption: str = ""  # at the left of the row or below the picture


class Scale(NamedTuple):
    """Colour scale of a method's maps: ``limit``, what genuine pictures reach, lies between ``low`` and ``high``."""

    low: float
    limit: float
    high: float


def map_scale(genuine_maps: Iterable[np.ndarray]) -> Scale:
    """One scale for all maps of a method, from its maps of genuine pictures: its limit is what 99.8 % of their pixels
    stay below. A scale over all pictures would be set by the loudest forgery, and every small mark would stay dark."""
    flat = [np.asarray(one, dtype=np.float32).ravel() for one in genuine_maps]
    if not flat:
        return Scale(0.0, 0.5, 1.0)
    values = np.concatenate([one[:: max(1, math.ceil(one.size / 4096))] for one in flat])
    low, limit = map(float, np.percentile(values, [1.0, 99.8]))
    limit = limit if limit > low else low + 0.5
    return Scale(low, limit, 2 * limit - low)


def marked(
    image: np.ndarray, anomaly_map: np.ndarray | None, limit: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """The picture in its own colours with the verdict (tint and solid outline, only above ``limit`` of the map, see
    :func:`map_scale`) and, when known, the truth (dashed): uint8 RGB. Arguments as in :class:`Panel`."""
    out, size = image.copy(), (image.shape[1], image.shape[0])
    width = max(1, round(max(size) / 170))
    if anomaly_map is not None:
        above = cv2.resize(np.asarray(anomaly_map, dtype=np.float32), size) > limit
        out[above] = (0.62 * out[above] + 0.38 * np.array(VERDICT_COLOR)).astype(np.uint8)
        for color, thickness in (((255, 255, 255), width + 2), (VERDICT_COLOR, width)):
            cv2.drawContours(out, _outlines(above), -1, color, thickness, cv2.LINE_AA)
    if mask is not None and mask.any() and not mask.all():
        thin, dash = max(1, width // 2), 7 * width
        for outline in _outlines(cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)):
            for start in range(0, len(outline), dash):
                for color, end in ((255, dash), (0, dash // 2)):  # light and dark: readable on any ground
                    cv2.polylines(out, [outline[start : start + end + 1, 0]], False, [color] * 3, thin, cv2.LINE_AA)
    return out


def zoomed(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The square of a picture around its mask, half as large again but at least 48 pixels where there are as many."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    side = min(max(48, 3 * max(width, height) // 2), *mask.shape)
    left = min(max(0, x + (width - side) // 2), mask.shape[1] - side)
    top = min(max(0, y + (height - side) // 2), mask.shape[0] - side)
    return image[top : top + side, left : left + side]


def _outlines(mask: np.ndarray) -> Sequence[np.ndarray]:
    return cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]


def map_rows(panels: Sequence[Panel], *, scale: Scale, title: str) -> Figure:
    """Rows of picture | anomaly map | marked picture, all maps on one colour scale."""
    heights = [min(1.5, panel.image.shape[0] / panel.image.shape[1]) for panel in panels]
    size = (9.6, 0.8 + sum(2.25 * height + 0.1 for height in heights))
    fig, axes = plt.subplots(len(panels), 3, figsize=size, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, (left, middle, right) in zip(panels, axes):
        height, width = panel.image.shape[:2]
        _bare(left).imshow(panel.image)
        left.set_ylabel(_wrap(panel.caption, 24), rotation=0, ha="right", va="center", labelpad=8, fontsize=10)
        _bare(right).imshow(marked(panel.image, panel.anomaly_map, scale.limit, panel.mask))
        limits = {"vmin": scale.low, "vmax": scale.high, "extent": (0, width, height, 0)}
        drawn = _bare(middle).imshow(panel.anomaly_map, cmap="inferno", **limits)
    for ax, name in zip(axes[0], ("picture", "anomaly map", "marked (dashed: truth)")):
        ax.set_title(name, fontsize=10.5, loc="center")
    bar = fig.colorbar(drawn, ax=axes, shrink=min(1.0, 2.5 / len(panels)), aspect=26, pad=0.015, extend="both")
    bar.outline.set_visible(False)
    bar.ax.axhline(scale.limit, color="white", linewidth=3.2)
    bar.ax.axhline(scale.limit, color=_INK, linewidth=1.4)
    bar.set_label("line: 99.8 % of genuine pixels lie below")
    return _finish(fig, title, f"{len(panels)} rows of picture, anomaly map and marked picture.")


def map_examples(result: MethodResult, category: str) -> tuple[list[Panel], Scale]:
    """Panels for :func:`map_rows`: a find (a marked place inside the mask), a miss and the most marked genuine picture
    of a painting, and the scale. Of finds and misses the middle score is shown, not the best."""
    mine = sorted((p for p in result.predictions if p.sample.category == category), key=lambda p: p.anomaly_score)
    pairs = [(p, result.anomaly_map(p)) for p in mine]
    genuine = [pair for pair in pairs if not pair[0].sample.is_anomalous]
    scale = map_scale(one for _, one in genuine)
    groups: dict[str, list[tuple[Any, np.ndarray]]] = {"found": [], "missed": []}
    for p, one in [pair for pair in pairs if pair[0].sample.is_anomalous and pair[0].sample.mask_path]:
        mask = data.mask_of(p.sample)
        inside = cv2.resize(one, mask.shape[::-1])[mask].max()
        groups["found" if inside > scale.limit else "missed"].append((p, one))
    groups["genuine, most marked"] = sorted(genuine, key=lambda pair: -pair[1].max())[:1]
    panels = []
    for words, found in groups.items():
        for p, one in found[len(found) // 2 : len(found) // 2 + 1]:
            kind = f"{p.sample.kind.replace('_', ' ')}, " if p.sample.is_anomalous else ""
            caption = f"{kind}{words}; called {'anomalous' if p.is_predicted_anomalous else 'genuine'}"
            image = load_image(p.sample.image_path, max_side=512)
            panels.append(Panel(image, data.mask_of(p.sample, image.shape[:2]), one, caption))
    return panels, scale


def picture_grid(panels: Sequence[Panel], *, title: str, n_columns: int = 5, limit: float = math.inf) -> Figure:
    """Pictures with captions below; what a map holds above ``limit`` is tinted, the truth is dashed."""
    n_columns = min(n_columns, len(panels))
    side = min(3.6, 11.0 / n_columns)
    ratio = min(1.5, max(panel.image.shape[0] / panel.image.shape[1] for panel in panels))
    captions = [_wrap(panel.caption, int(10.5 * side)) for panel in panels]
    height = side * ratio + 0.2 * max(caption.count("\n") + 1 for caption in captions)
    fig, axes = _grid(len(panels), n_columns, (side, height), (0, 0.5))
    for ax, panel, caption in zip(axes, panels, captions):
        _bare(ax).imshow(marked(panel.image, panel.anomaly_map, limit, panel.mask))
        ax.set_xlabel(caption, fontsize=9.5, loc="left", linespacing=1.25)
    return _finish(fig, title, f"{len(panels)} pictures with captions.")


def scores(frame: pd.DataFrame, *, title: str) -> Figure:
    """A dot for each picture, genuine above anomalous, and the threshold: a row per method, a column per painting; dots
    on the wrong side are ringed. Each panel has its own axis, because scores have no common scale. ``frame`` has a row
    per picture and method: ``method, category, anomaly_score, is_anomalous, threshold`` (nan: none)."""
    methods, categories = (list(dict.fromkeys(frame[name])) for name in ("method", "category"))
    size = (2.4 + 4.2 * len(categories), 0.9 + 0.95 * len(methods))
    fig, axes = plt.subplots(len(methods), len(categories), figsize=size, squeeze=False)
    jitter = np.random.default_rng(0)
    for (row, column), ax in np.ndenumerate(axes):
        mine = frame[(frame.method == methods[row]) & (frame.category == categories[column])]
        threshold = mine.threshold.max()
        for is_anomalous, y, color in ((False, 1, _GENUINE_COLOR), (True, 0, _ANOMALOUS_COLOR)):
            x = mine.anomaly_score[mine.is_anomalous == is_anomalous].to_numpy(float)
            heights = y + jitter.uniform(-0.26, 0.26, len(x))
            ax.plot(x, heights, "o", color=color, alpha=0.55, markersize=5, markeredgewidth=0)
            wrong = ((x > threshold) != is_anomalous) & math.isfinite(threshold)
            ax.plot(x[wrong], heights[wrong], "o", color=_INK, fillstyle="none", markersize=6.5, markeredgewidth=1.1)
        ax.axvline(threshold, color=_INK, linewidth=1.5)
        ax.set_ylim(-0.5, 1.5)
        ax.set_yticks([1, 0], ["", ""] if column else ["genuine", "anomalous"], fontsize=9)
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        ax.tick_params(axis="x", labelsize=8.5)
    for ax, category in zip(axes[0], categories):
        ax.set_title(painting_name(category, categories, 34))
    for ax, method in zip(axes[:, 0], methods):
        ax.set_ylabel(_wrap(method_label(method), 15), rotation=0, ha="right", va="center", fontweight="bold")
    fig.supxlabel("anomaly score (each method's own scale); line: threshold, ring: wrong side", fontsize=10)
    return _finish(fig, title, f"Scores of genuine and anomalous pictures with the threshold, {len(methods)} methods.")


def intervals(frame: pd.DataFrame, *, title: str, x_label: str) -> Figure:
    """Value and interval: a panel per group, a row per method; a dotted line at 0.5, chance. ``frame`` has columns
    ``panel, method, value, low, high``; values in [0, 1], nan ends draw no interval."""
    methods, panels = (list(dict.fromkeys(frame[name])) for name in ("method", "panel"))
    fig, axes = _grid(len(panels), 3, (3.2, 0.9 + 0.36 * len(methods)), (2.6, 0.7), sharey=True)
    for ax, panel in zip(axes, panels):
        for row in frame[frame.panel == panel].itertuples():
            y, color = methods.index(row.method), METHOD_COLORS.get(row.method, OTHER_COLOR)
            ax.plot([row.low, row.high], [y, y], color=color, linewidth=3.2, alpha=0.45, solid_capstyle="round")
            ax.plot(row.value, y, _MARKERS.get(row.method, "o"), color=color, markersize=8, clip_on=False, zorder=3)
        ax.axvline(0.5, color=_MUTED, linewidth=1.2, linestyle=(0, (2, 3)))
        left = min(0.4, *frame.low.fillna(1), *frame.value) - 0.02
        ax.set(title=_wrap(panel, 28), xlim=(left, 1.0), ylim=(len(methods) - 0.4, -0.6), xlabel=x_label)
        ax.set_yticks(range(len(methods)), [_wrap(method_label(method), 26) for method in methods])
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    return _finish(fig, title, f"{x_label}: {len(methods)} methods, {len(panels)} panels.")


def lines(frame: pd.DataFrame, *, title: str, x_label: str, y_label: str = "") -> Figure:
    """Values along an axis (epoch, strength, evaluation): a panel per measure, a line per method or name. ``frame`` has
    columns ``series, x, value``; optional ``panel``, ``low`` and ``high`` (interval), ``part`` (points of different
    parts are not joined), ``ring`` (bool, encircled) and ``note`` (text below the point)."""
    optional = {"panel": "", "low": math.nan, "high": math.nan, "part": 0, "ring": False, "note": ""}
    frame = frame.assign(**{key: value for key, value in optional.items() if key not in frame})
    panels, series = (list(dict.fromkeys(frame[name])) for name in ("panel", "series"))
    others = [name for name in series if name not in METHOD_COLORS]
    colors = dict(zip(others, [_INK] if len(others) == 1 else METHOD_COLORS.values())) | dict(METHOD_COLORS)
    size = (4.0, 3.5 if len(panels) < 4 else 2.4)
    fig, axes = _grid(len(panels), 3, size, (2.2, 0.6), sharey=bool(y_label))
    for ax, panel in zip(axes, panels):
        for name, rows in frame[frame.panel == panel].groupby("series", sort=False):
            color, marker = colors.get(name, OTHER_COLOR), _MARKERS.get(name, "o") if len(rows) <= 24 else ""
            for place, (_, part) in enumerate(rows.groupby("part", sort=False)):
                label = None if place else method_label(name)
                ax.plot(part.x, part.value, color=color, marker=marker, markersize=6, label=label)
                ax.vlines(part.x, part.low, part.high, color=color, linewidth=1.2, alpha=0.7)
            ringed = rows[rows.ring.astype(bool)]
            ax.plot(ringed.x, ringed.value, "o", markersize=15, color=_INK, fillstyle="none", markeredgewidth=1.6)
            for x, y, note in zip(rows.x, rows.value, rows.note):
                ax.annotate(note, (x, y), (0, -15), textcoords="offset points", ha="center", fontsize=9.5)
        ax.set(title=_wrap(panel, 36), xlabel=x_label, ylabel=y_label, ymargin=0.25 if frame.note.any() else 0.05)
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())
               if label != ax.get_title(loc="left")}  # fmt: skip
    if len(handles) > 1:
        fig.legend(handles.values(), handles.keys(), loc="outside right center")
    return _finish(fig, title, f"{y_label or ', '.join(panels)} against {x_label}, {len(series)} lines.")


def _grid(
    n: int, most: int, cell: tuple[float, float], frame: tuple[float, float], **options: Any
) -> tuple[Figure, list]:
    n_columns = min(most, n)
    n_rows = math.ceil(n / n_columns)
    size = (frame[0] + cell[0] * n_columns, frame[1] + cell[1] * n_rows)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:n])


def _finish(fig: Figure, title: str, words: str) -> Figure:
    _glyphs()
    fig.suptitle(_wrap(title, int(fig.get_figwidth() * 9)), x=0.01, ha="left", fontsize=13, fontweight="bold")
    fig.set_label(f"{words} {title}".strip())
    return fig


def _wrap(text: str, width: int) -> str:
    return "\n".join(line for part in str(text).split("\n") for line in textwrap.wrap(part, width) or [""])


def _bare(ax: Any) -> Any:
    ax.set(xticks=[], yticks=[], frame_on=False)
    ax.grid(visible=False)
    return ax
