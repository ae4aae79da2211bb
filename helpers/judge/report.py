"""The comparison as one self-contained web page: what it shows is chosen here, how it looks is in ``templates/``.

Jinja2 escapes every value (``autoescape``); the page has no script and asks nothing of the network. Its first screen
answers what was found, where, by whom and how far to trust it; everything else is one click down.
"""

from __future__ import annotations

import base64
import html
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pandas as pd

from helpers import data, files, results
from helpers.data import images
from helpers.judge import figures, findings, statistics
from helpers.judge.comparison import ALWAYS, GROUPS, NOTEBOOKS, Comparison, is_single_kind, numbers, read
from helpers.results import category_label, method_label

TEMPLATES = Path(__file__).parent / "templates"
_N_TILES = 240
_SHORT_GROUPS = {"whole": "copy or new version", "real": "real alteration", "plain": "plain mark",
                 "moderate": "moderate mark", "faint": "faint mark", "mark": "mark", "genuine": "genuine"}  # fmt: skip


def write_report(comparison: Comparison, path: Path, drawn: Mapping[str, Path]) -> Path:
    """Write the page, atomically.

    Args:
        comparison: from :func:`helpers.judge.comparison.compare`.
        path: the HTML file (returned).
        drawn: name -> PNG, from :func:`draw_all`; they are copied into the page.
    """
    pictures = _Pictures(comparison)
    shown = {
        name: {"uri": _png_uri(picture), "alt": figures.alt_text(picture) or name} for name, picture in drawn.items()
    }
    page = _environment().get_template("report.html").render(
        **_numbers(comparison),
        verdict=findings.verdict(comparison),
        trust=findings.trust(comparison),
        findings=findings.findings(comparison),
        strip=pictures.strip(),
        tiles=pictures.tiles(),
        seen_by_all=pictures.under_all_maps(),
        answers=pictures.answers(),
        figures=shown,
        published=_published(),
        mind=_mind(comparison),
        settings=[(method, run.manifest, NOTEBOOKS.get(method, "another tool"))
                  for method, run in comparison.runs.items()],
        versions=results.versions(),
        machine=results.machine(),
    )  # fmt: skip
    files.write_text(Path(path), page)
    return Path(path)


def table_html(comparison: Comparison) -> str:
    """The verdict matrix and the small table as HTML, for a notebook cell."""
    return _environment().get_template("notebook.html").render(**_numbers(comparison))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "method": method_label, "category": category_label, "kind": findings.kind_label, "color": figures.method_color,
        "short": findings.short, "count": findings.count_of, "seconds": findings.seconds_text,
        "estimate": findings.estimate, "group": lambda name: _SHORT_GROUPS[name],
        "json": lambda value: json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True),
        "tied": lambda text: str(text).replace(" %", "\u00a0%").replace("k-NN", "k\u2011NN"),
    }  # fmt: skip
    return environment


# -------------------------------------------------------------------------------------------------------------- numbers


def _numbers(comparison: Comparison) -> dict[str, Any]:
    """What the tables of the page and of the notebook need."""
    kinds = dict.fromkeys(kind for kind in comparison.table.kind if is_single_kind(kind))
    paintings = sorted({sample.category for sample in comparison.samples})
    return {
        "c": comparison,
        "look": numbers(comparison.table),
        "methods": [*comparison.methods, ALWAYS],
        "always": ALWAYS,
        "paintings": paintings,
        "groups": [name for name in GROUPS if (comparison.predictions.group == name).any()],
        "kinds": list(kinds),
        "thresholds": _thresholds(comparison),
        "n_pictures": {name: findings.n_pictures(comparison.table, name) for name in ("all", *paintings)},
        "dataset_rows": [_painting(comparison, place, name) for place, name in enumerate(paintings, start=1)],
    }


def _painting(comparison: Comparison, place: int, category: str) -> dict[str, Any]:
    chosen = [sample for sample in comparison.dataset.samples if sample.category == category]
    tested = [sample.kind for sample in chosen if sample.split == "test" and sample.is_anomalous]
    splits = [sum(sample.split == split for sample in chosen) for split in ("train", "calibration")]
    normal = sum(sample.split == "test" and not sample.is_anomalous for sample in chosen)
    kinds = ", ".join(f"{findings.kind_label(kind)} {tested.count(kind)}" for kind in sorted(set(tested)))
    sources = len({sample.group for sample in chosen})
    return {"place": place, "name": category, "cells": [sources, *splits, normal, len(tested)], "kinds": kinds}


def _thresholds(comparison: Comparison) -> str:
    """On how many genuine pictures, of how many sources, the thresholds rest."""
    counts = {}
    for category in sorted({sample.category for sample in comparison.samples}):
        stated = [run.manifest.get("calibration", {}).get(category, {}) for run in comparison.runs.values()]
        known = [(one["n"], one["n_sources"]) for one in stated if "n_sources" in one]
        samples = comparison.dataset.select(split="calibration", category=category)
        known = known or [(len(samples), len({sample.group for sample in samples}))]
        counts[category] = min(known, key=lambda pair: pair[1])
    n, n_sources = min(counts.values(), key=lambda pair: pair[1]) if counts else (0, 0)
    if not n:
        return "No genuine picture was set aside for thresholds."
    where = "each painting" if len(set(counts.values())) == 1 else "the painting with the fewest"
    return f"Thresholds rest on {n} genuine pictures of {n_sources} sources ({where})."


def _mind(comparison: Comparison) -> list[str]:
    """What limits every number of the page."""
    found = []
    for category in sorted({sample.category for sample in comparison.samples}):
        name = category_label(category)
        normals = [s for s in comparison.dataset.select(split="test", category=category) if not s.is_anomalous]
        n_sources = len({sample.group for sample in normals})
        if not normals:
            found.append(f"{name} has no genuine test picture: no AUROC and no false-alarm rate.")
            continue
        high = findings.percent(statistics.wilson(0, len(normals)).high)
        found.append(f"{name} is tested on {len(normals)} genuine pictures: no false alarm still allows {high}.")
        if n_sources < len(normals):
            found.append(f"They come from {n_sources} source pictures: real intervals are somewhat wider.")
    return [*dict.fromkeys(found), *comparison.notes]


def _published() -> list[dict[str, Any]]:
    """The figures that the source report printed in 2024, kept apart from everything measured here.

    Source: "Sandia Laboratories Project-AnomalyGPT", team SAM, Georgia Institute of Technology, 2024; the fractions
    are the only ones of plausible size that round to the printed values.
    """
    rows = pd.read_csv(TEMPLATES / "published_2024.csv").to_dict("records")
    for row in rows:
        known = not math.isnan(row["correct"])
        low, high = statistics.wilson(row["correct"], row["n_images"]) if known else (math.nan, math.nan)
        row["count"] = f"{row['correct']:.0f}/{row['n_images']:.0f}" if known else "no count fits"
        row["interval"] = f"{100 * low:.1f}–{100 * high:.1f} %" if known else "–"
    return rows


# ------------------------------------------------------------------------------------------------------------- pictures


class _Pictures:
    """Chooses pictures by fixed rules (never the best ones) and shows them as every method saw them."""

    def __init__(self, comparison: Comparison) -> None:
        self.c = comparison
        verdicts = comparison.predictions[comparison.predictions.method != ALWAYS]
        verdicts = verdicts[verdicts.threshold.notna()]
        self.verdicts = verdicts.pivot(index="place", columns="method", values="is_predicted_anomalous")
        self.verdicts = self.verdicts.reindex(columns=[m for m in comparison.methods if m in self.verdicts])
        self.facts = comparison.predictions[comparison.predictions.method == ALWAYS].set_index("place")
        self.n_calls = self.verdicts.reindex(self.facts.index).fillna(False).astype(int).sum(axis=1)

    @cached_property
    def scales(self) -> dict[tuple[str, str], figures.Scale]:
        """Scale of each method's maps on each painting, for the methods that have maps."""
        found = {}
        for method, run in self.c.runs.items():
            for category, rows in self.facts.groupby("category"):
                places = rows.index[~rows.is_anomalous] if not rows.is_anomalous.all() else rows.index
                maps = [run.anomaly_map(run.predictions[place]) for place in places]
                if maps and all(one is not None for one in maps):
                    found[method, category] = figures.map_scale(maps)
        return found

    @cached_property
    def best_map(self) -> str:
        """The method whose maps find the most marked pixels; empty without maps."""
        rows = self.c.table[(self.c.table.metric == "pixel_auroc") & (self.c.table.category == "all")]
        return str(rows.method.loc[rows.value.idxmax()]) if len(rows) else ""

    def strip(self) -> list[dict[str, Any]]:
        """A mark, a copy and a genuine picture: of each the one that a middling number of detectors call anomalous."""
        wanted = {"mark": ("moderate", "plain", "mark", "faint"), "copy": ("whole", "real"), "genuine": ("genuine",)}
        found = []
        for role, groups in wanted.items():
            group = next((name for name in groups if (self.facts.group == name).any()), None)
            if group is not None:
                place = self._middle(self.facts.index[self.facts.group == group])
                found.append({"role": role, **self._picture(place, 520, self.best_map)})
        return found

    def tiles(self) -> dict[str, Any]:
        """Thumbnails of the test pictures with the filters they pass; evenly thinned when there are very many."""
        places = self.facts.index[:: max(1, math.ceil(len(self.facts) / _N_TILES))]
        filters = {"all": "all"} | {
            name: _SHORT_GROUPS[name] for name in (*GROUPS, "genuine") if (self.facts.group == name).any()
        }
        filters |= {"missed": "missed by all", "alarm": "false alarm"}
        shown = []
        for place in places:
            row, n_calls = self.facts.loc[place], int(self.n_calls[place])
            names = ["all", row.group]
            names += ["missed"] if row.is_anomalous and not n_calls else []
            names += ["alarm"] if not row.is_anomalous and n_calls else []
            shown.append({"filters": names, **self._picture(place, 190, "", quality=72)})
        filters = {key: words for key, words in filters.items() if any(key in one["filters"] for one in shown)}
        for one in shown:
            one["numbers"] = [number for number, key in enumerate(filters, start=1) if key in one["filters"]]
        return {"filters": filters, "shown": shown, "n_all": len(self.facts)}

    def under_all_maps(self) -> list[dict[str, Any]]:
        """One picture of each group, and one missed by all, as every method with maps marks it."""
        methods = list(dict.fromkeys(method for method, _ in self.scales))
        places = [self._middle(rows.index) for name in (*GROUPS, "genuine")
                  if len(rows := self.facts[self.facts.group == name])]  # fmt: skip
        missed = self.facts.index[self.facts.is_anomalous & (self.n_calls == 0)]
        places += [place for place in missed[len(missed) // 2 : len(missed) // 2 + 1] if place not in places]
        return [
            self._picture(place, 330, "") | {"maps": [(m, self._picture(place, 330, m)["uri"]) for m in methods]}
            for place in (places if methods else [])
        ]

    def answers(self) -> list[dict[str, Any]]:
        """Answers of each chat model: how often its words are right, and six of them, one a group in turn."""
        found = []
        for method in self.c.methods:
            spoken = self.c.predictions[(self.c.predictions.method == method) & (self.c.predictions.answer != "")]
            if not len(spoken):
                continue
            ordered = spoken.assign(turn=spoken.groupby("group").cumcount()).sort_values(["turn", "place"])
            cards = [
                self._picture(row.place, 300, method)
                | {"answer": row.answer, "is_right": None if row.says is None else row.says == row.is_anomalous}
                for row in ordered.head(6).itertuples()
            ]
            n_yes, n_unclear = int((spoken.says == True).sum()), int(spoken.says.isna().sum())  # noqa: E712
            found.append({"method": method, "cards": cards, "n": len(spoken), "n_yes": n_yes, "n_unclear": n_unclear})
        return found

    def _middle(self, places: Sequence[int]) -> int:
        """The picture with the middle number of calls; of equal ones the one in the middle of the list."""
        ordered = sorted(places, key=lambda place: self.n_calls[place])
        middle = self.n_calls[ordered[len(ordered) // 2]]
        same = [place for place in places if self.n_calls[place] == middle]
        return same[len(same) // 2]

    def _picture(self, place: int, side: int, method: str, *, quality: int = 82) -> dict[str, Any]:
        """A picture as ``data:`` address, marked by one method, with the truth and every detector's verdict."""
        sample, row = self.c.samples[place], self.facts.loc[place]
        image = images.load_image(sample.image_path, max_side=side)
        scale = 2 if max(image.shape) < side // 2 + 1 else 1
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else image
        mask = data.mask_of(sample, image.shape[:2])
        anomaly_map, limit = None, math.inf
        if (method, sample.category) in self.scales:
            run = self.c.runs[method]
            anomaly_map, limit = run.anomaly_map(run.predictions[place]), self.scales[method, sample.category].limit
        calls = [] if place not in self.verdicts.index else [
            {"method": name, "is_anomalous": bool(said), "is_right": bool(said) == sample.is_anomalous}
            for name, said in self.verdicts.loc[place].items()
        ]  # fmt: skip
        return {
            "uri": _jpeg_uri(figures.marked(image, anomaly_map, limit, mask), quality),
            "category": sample.category, "kind": sample.kind, "group": row.group, "is_anomalous": sample.is_anomalous,
            "calls": calls, "n_calls": sum(call["is_anomalous"] for call in calls), "marked_by": method,
        }  # fmt: skip


def _jpeg_uri(image: np.ndarray, quality: int) -> str:
    content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"


def _png_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode('ascii')}"


# -------------------------------------------------------------------------------------------------------------- figures


def draw_all(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw and save every figure of the comparison that its results allow.

    Returns:
        name -> PNG; with more paintings than fit on a figure, pages ``auroc_2``, ``scores_2`` ...
    """
    table = comparison.table[(comparison.table.kind == "all") & (comparison.table.method != ALWAYS)]
    scored = comparison.predictions[comparison.predictions.method != ALWAYS]
    paintings = sorted(set(scored.category))
    found: dict[str, Any] = {}
    for page, names in enumerate(_pages(paintings), start=1):
        end = "" if page == 1 else f"_{page}"
        rows = table[(table.metric == "image_auroc") & table.category.isin(names)]
        panels = [figures.painting_name(name, paintings, 34) for name in rows.category]
        frame = rows.assign(panel=panels, low=rows.ci_low, high=rows.ci_high)
        if len(rows):
            title, label = _auroc_title(comparison), "image AUROC, 95 % interval"
            found[f"auroc{end}"] = figures.intervals(frame, title=title, x_label=label, chance=0.5)
    for page, names in enumerate(_pages(paintings, 3), start=1):
        if len(scored):
            chosen = scored[scored.category.isin(names)]
            found["scores" + ("" if page == 1 else f"_{page}")] = figures.scores(chosen, title=_scores_title(chosen))
    times = table[(table.metric == "seconds_per_image") & (table.category == "all") & (table.value > 0)]
    quality = table[(table.metric == "image_auroc") & (table.category == "all")]
    both = times.merge(quality, on="method", suffixes=("_x", ""))
    if len(both):
        frame = both.assign(series=both.method, x=both.value_x, low=both.ci_low, high=both.ci_high)
        title = f"A picture takes {both.value_x.min():.2g} to {both.value_x.max():.2g} seconds on this machine"
        names = {"x_label": "seconds per image", "y_label": "image AUROC, mean over paintings"}
        found["time"] = figures.lines(frame, title=title, log_x=True, **names)
    return {name: figures.save_figure(fig, name, folder, footer(comparison), close=True) for name, fig in found.items()}


def draw_robustness(path: Path, folder: Path) -> dict[str, Path]:
    """Draw ``robustness.csv`` (``method, strength, auroc, false_alarms``) when there is one: name -> PNG."""
    if not Path(path).exists():
        return {}
    table = pd.read_csv(path)
    panels = {"image AUROC": "auroc", "share of genuine pictures called anomalous": "false_alarms"}
    frame = pd.concat([table.assign(panel=panel, value=table[name]) for panel, name in panels.items()])
    frame = frame.assign(series=frame.method, x=frame.strength)
    title = "The same pictures photographed worse and worse"
    fig = figures.lines(frame, title=title, x_label="strength of the change", y_limits=(0, 1.02))
    return {"robustness": figures.save_figure(fig, "robustness", folder)}


def footer(comparison: Comparison) -> str:
    """The line below each figure: where its numbers come from."""
    words = findings.n_pictures(comparison.table, "all")
    return f"profile {comparison.profile} · dataset {comparison.dataset.hash[:12]} · {words} · intervals 95 %"


def _pages(paintings: Sequence[str], size: int = figures.PAINTINGS_PER_PAGE) -> Iterable[Sequence[str]]:
    return [paintings[start : start + size] for start in range(0, len(paintings), size)]


def _auroc_title(comparison: Comparison) -> str:
    tests = comparison.tests[(comparison.tests.measure == "AUROC") & (comparison.tests.category == "all")]
    if not len(tests):
        return "How well each detector ranks the pictures"
    n_sure = int((tests.p_holm < 0.05).sum())
    return f"By AUROC {n_sure or 'none'} of {len(tests)} pairs of detectors can be told apart"


def _scores_title(scored: pd.DataFrame) -> str:
    right = scored.is_predicted_anomalous == scored.is_anomalous
    by_method = pd.DataFrame({"method": scored.method, "missed": ~right & scored.is_anomalous,
                              "alarm": ~right & ~scored.is_anomalous}).groupby("method").sum()  # fmt: skip
    one = scored[scored.method == scored.method.iloc[0]]
    return (
        f"Of {one.is_anomalous.sum()} anomalous pictures each misses {by_method.missed.mean():.0f} on average, of "
        f"{(~one.is_anomalous).sum()} genuine ones at most {by_method.alarm.max()} are called anomalous"
    )


# -------------------------------------------------------------------------------------------------------- the notebook


def show(page: Path) -> None:
    """Say where the page lies; on Colab, where no file can be opened by a click, show it and offer ``results.zip``."""
    print(f"{Path(page).resolve().as_uri()}  ({Path(page).stat().st_size / 1e6:.1f} MB, opens in any browser)")
    if "google.colab" in sys.modules:
        from google.colab import files as colab_files
        from IPython.display import HTML, display

        display(HTML(f'<iframe srcdoc="{html.escape(page.read_text("utf-8"))}" width="100%" height="900"></iframe>'))
        archive = shutil.make_archive(str(page.parent.parent / "results"), "zip", page.parent)
        colab_files.download(archive)


def check(comparison: Comparison, csv: Path, page: Path) -> None:
    """Print a line for each thing that must hold of what notebook 09 wrote.

    Raises:
        AssertionError: one does not hold.
    """
    table, text = read(csv), page.read_text(encoding="utf-8")
    requests = ("<script", 'src="http', 'href="http', "@import", "url(")
    results.confirm({
        "the trivial rule is a row": ALWAYS in set(table.method),
        "all rows share one dataset": set(table.dataset_hash) == {comparison.dataset.hash},
        "every number has its count": bool((table.n_images > 0).all() and table.value.notna().all()),
        "the page runs no script and asks nothing of the network": not any(word in text for word in requests),
    })  # fmt: skip
