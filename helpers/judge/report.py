"""The comparison as one self-contained web page: what it shows is chosen here, how it looks is in ``templates/``.

Jinja2 escapes every value (``autoescape``); the page has no script and asks nothing of the network. Its first screen
answers what was found, where, by whom and how far to trust it; everything else is one click down.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers import data, files, results
from helpers.data import images
from helpers.judge import figures, findings, metrics, statistics
from helpers.judge.comparison import ALWAYS, GROUPS, NOTEBOOKS, RESERVED, Comparison, numbers


def write_report(comparison: Comparison, path: Path, drawn: Mapping[str, Path]) -> Path:
    """Write the page to ``path`` (returned), atomically, with the figures ``drawn`` (name -> PNG) inside."""
    pictures = _Pictures(comparison)
    page = _render(
        "report.html", comparison,
        verdict=findings.verdict(comparison), trust=findings.trust(comparison), findings=findings.findings(comparison),
        strip=pictures.strip(), tiles=pictures.tiles(), answers=pictures.answers(),
        seen_by_all=pictures.under_all_maps(),
        figures={name: (_uri(one.read_bytes(), "png"), figures.alt_text(one)) for name, one in drawn.items()},
        published=pd.read_csv(Path(__file__).parent / "templates" / "published_2024.csv").to_dict("records"),
        notebooks=NOTEBOOKS, versions=results.versions(), machine=results.machine(),
    )  # fmt: skip
    files.write_text(Path(path), page)
    return Path(path)


def table_html(comparison: Comparison) -> str:
    """The verdict matrix and the small table as HTML, for a notebook cell."""
    return _render("notebook.html", comparison)


def _render(name: str, comparison: Comparison, **values: Any) -> str:
    samples, table = comparison.dataset.samples, comparison.table
    return findings.TEMPLATES.get_template(name).render(
        c=comparison, look=numbers(table), methods=[*comparison.runs, ALWAYS], always=ALWAYS,
        paintings=sorted({sample.category for sample in comparison.samples}), wilson=statistics.wilson,
        groups=[name for name in GROUPS if (comparison.predictions.group == name).any()],
        kinds=[kind for kind in dict.fromkeys(table.kind) if kind not in RESERVED and not kind.startswith("group:")],
        n_pictures=lambda category: findings.n_pictures(table, category),
        pick=lambda category, split: [s for s in samples if (s.category, s.split) == (category, split)], **values,
    )  # fmt: skip


findings.TEMPLATES.filters |= {
    "color": lambda method: figures.METHOD_COLORS.get(method, figures.OTHER_COLOR),
    "group": lambda name: GROUPS.get(name, name),
    "json": lambda value: json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True),
    "tied": lambda text: str(text).replace(" %", "\u00a0%").replace("k-NN", "k\u2011NN"),
}


class _Pictures:
    """Chooses pictures by fixed rules (never the best ones) and shows them as every method saw them."""

    def __init__(self, comparison: Comparison) -> None:
        self.c = comparison
        self.facts = comparison.predictions[comparison.predictions.method == ALWAYS].set_index("place")
        judged = comparison.predictions[comparison.predictions.threshold.notna()]
        verdicts = judged.pivot(index="place", columns="method", values="is_predicted_anomalous").astype(bool)
        self.verdicts = verdicts[[method for method in comparison.runs if method in verdicts]]
        self.n_calls = self.verdicts.sum(axis=1).astype(int)
        rates, maps = (findings.overall(comparison, metric) for metric in ("balanced_accuracy", "pixel_auroc"))
        self.best_map = max(maps, key=lambda method: rates[method]["value"] if method in rates else 0, default="")

    @cached_property
    def limits(self) -> dict[tuple[str, str], float]:
        """(method with maps, painting) -> what its genuine pictures reach."""
        found = {}
        for (method, run), (category, rows) in itertools.product(self.c.runs.items(), self.facts.groupby("category")):
            places = rows.index if rows.is_anomalous.all() else rows.index[~rows.is_anomalous]
            maps = [run.anomaly_map(run.predictions[place]) for place in places]
            if all(one is not None for one in maps):
                found[method, category] = figures.map_scale(maps).limit
        return found

    def strip(self) -> list[dict[str, Any]]:
        """A mark, a copy and a genuine picture: of each the one that a middling number of detectors call anomalous. The
        best of those with maps marks what it raises an alarm on; specks elsewhere would read as one."""
        wanted = {"mark": ("moderate", "plain", "mark", "faint"), "copy": ("whole", "real"), "genuine": ("genuine",)}
        found = []
        for role, groups in wanted.items():
            places = next((rows.index for g in groups if len(rows := self.facts[self.facts.group == g])), ())
            places = [p for p in places if self.facts.kind[p] in ("replica", "reinterpretation")] or places
            if len(places):
                place = self._middle(places)
                is_passed = self.best_map in self.verdicts and not self.verdicts.at[place, self.best_map]
                one = self._picture(place, 520, "" if is_passed else self.best_map)
                found.append(one | {"role": role, "marked_by": self.best_map})
        return found

    def tiles(self) -> dict[str, Any]:
        """Thumbnails of the test pictures with the filters they pass; evenly thinned when there are very many."""
        filters = ["all", *GROUPS, "genuine", "missed by all", "false alarm"]
        shown = []
        for place in self.facts.index[:: math.ceil(len(self.facts) / 240)]:
            one = self._picture(place, 190, "", quality=72)
            wrong = not one["n_calls"] if one["is_anomalous"] else one["n_calls"]
            kinds = ["all", one["group"], "missed by all" if one["is_anomalous"] else "false alarm"]
            shown.append(one | {"filters": [filters.index(kind) for kind in kinds[: 3 if wrong else 2]]})
        used = {number for one in shown for number in one["filters"]}
        return {"filters": [(n, name) for n, name in enumerate(filters) if n in used], "shown": shown}

    def under_all_maps(self) -> list[dict[str, Any]]:
        """One picture of each group, and one missed by all, as every method with maps marks it."""
        methods = dict.fromkeys(method for method, _ in self.limits)
        groups = [self.facts.index[self.facts.group == name] for name in (*GROUPS, "genuine")]
        missed = self.facts.index[self.facts.is_anomalous & (self.n_calls == 0)]
        places = dict.fromkeys(self._middle(places) for places in (*groups, missed) if len(places) and methods)
        return [self._picture(place, 330, "") | {"maps": [(m, self._picture(place, 330, m)["uri"]) for m in methods]}
                for place in places]  # fmt: skip

    def answers(self) -> list[dict[str, Any]]:
        """Answers of each chat model: how often its words are right, and six of them, one a group in turn."""
        found = []
        spoken = self.c.predictions[self.c.predictions.answer != ""]
        for method, said in spoken.groupby("method", sort=False):
            told = said[said.answer.str.contains(" ")]  # sentences, where there are any
            told = told.sample(frac=1, random_state=0) if len(told) else said
            ordered = told.assign(turn=told.groupby("group").cumcount()).sort_values("turn", kind="stable")
            cards = [self._picture(row.place, 300, method) | {"answer": row.answer, "says": row.says}
                     for row in ordered.head(6).itertuples()]  # fmt: skip
            n_yes, n_unclear = sum(one is True for one in said.says), int(said.says.isna().sum())
            found.append({"method": method, "cards": cards, "n_yes": n_yes, "n_unclear": n_unclear})
        return found

    def _middle(self, places: Sequence[int]) -> int:
        """The picture with the middle number of calls; of equal ones the one in the middle of the list."""
        middle = sorted(self.n_calls[place] for place in places)[len(places) // 2]
        same = [place for place in places if self.n_calls[place] == middle]
        return same[len(same) // 2]

    def _picture(self, place: int, side: int, method: str, *, quality: int = 82) -> dict[str, Any]:
        """A picture as ``data:`` address, marked by one method, with the truth and each detector's verdict."""
        sample, anomaly_map = self.c.samples[place], None
        image = images.load_image(sample.image_path, max_side=side)
        limit = self.limits.get((method, sample.category), math.inf)
        if math.isfinite(limit):
            anomaly_map = self.c.runs[method].anomaly_map(self.c.runs[method].predictions[place])
        shown = figures.marked(image, anomaly_map, limit, data.mask_of(sample, image.shape[:2]))
        content = cv2.imencode(".jpg", shown[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        return {
            "uri": _uri(content, "jpeg"), "category": sample.category, "kind": sample.kind, "marked_by": method,
            "group": self.facts.group[place], "is_anomalous": sample.is_anomalous, "n_calls": int(self.n_calls[place]),
            "calls": [(m, bool(said) == sample.is_anomalous) for m, said in self.verdicts.loc[place].items()],  # right?
        }  # fmt: skip


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def draw_all(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw and save the figures that the results allow: name -> PNG; ``auroc_2``, ``scores_2`` ... are more pages."""
    table, scored = (f[f.method.isin([*comparison.runs])] for f in (comparison.table, comparison.predictions))
    table = table[(table.kind == "all") & (table.metric == "image_auroc")].assign(low=table.ci_low, high=table.ci_high)
    paintings, found = sorted(set(scored.category)), {}
    for name, names in _pages("auroc", paintings, 6):
        rows = table[table.category.isin(names)]
        if len(rows):
            frame = rows.assign(panel=[figures.painting_name(name, paintings, 28) for name in rows.category])
            title = f"Image AUROC with 95 % intervals. {findings.trust(comparison, 'AUROC')}"
            found[name] = figures.intervals(frame, title=title, x_label="image AUROC")
    for name, names in _pages("scores", paintings, 3):
        chosen = scored[scored.category.isin(names)]
        found[name] = figures.scores(chosen, title=_scores_title(chosen))
    words = findings.n_pictures(comparison.table, "all")
    footer = f"profile {comparison.profile} · dataset {comparison.dataset.hash[:12]} · {words}"
    return {name: figures.save_figure(fig, name, folder, footer, close=True) for name, fig in found.items()}


def _pages(name: str, paintings: Sequence[str], most: int) -> list[tuple[str, Sequence[str]]]:
    """Name of the file, and the paintings on it, at most so many."""
    starts = range(0, len(paintings), most)
    return [(f"{name}_{start // most + 1}" if start else name, paintings[start : start + most]) for start in starts]


def _scores_title(scored: pd.DataFrame) -> str:
    wrong, one = scored.is_predicted_anomalous != scored.is_anomalous, scored[scored.method == scored.method.iloc[0]]
    missed, alarms = ((wrong & (scored.is_anomalous == kind)).groupby(scored.method).sum() for kind in (True, False))
    words = f"Of {one.is_anomalous.sum()} anomalous pictures each detector misses {missed.min()} to {missed.max()}; of "
    return f"{words}{(~one.is_anomalous).sum()} genuine ones at most {alarms.max()} are called anomalous"


def robustness(frame: pd.DataFrame) -> Figure:
    """AUROC of each detector, the mean over paintings, on photographs that get worse; below each point the number of
    genuine pictures that it calls anomalous. ``frame`` has a row per picture, detector and strength: ``strength,
    method, category, is_anomalous, anomaly_score, threshold``."""
    rows = []
    for (method, strength), part in frame.groupby(["method", "strength"], sort=False):
        aurocs = [metrics.image_auroc(one.anomaly_score, one.is_anomalous) for _, one in part.groupby("category")]
        row = {"panel": results.method_label(method), "series": method, "x": strength, "value": np.nanmean(aurocs)}
        rows.append(row | {"note": str(((part.anomaly_score > part.threshold) & ~part.is_anomalous).sum())})
    points = pd.DataFrame(rows)
    last, n = points.note[points.x == points.x.max()].astype(int), (~part.is_anomalous).sum()
    title = f"False alarms (the numbers) on {n} genuine pictures: {last.min()} to {last.max()} on the worst photographs"
    return figures.lines(points, title=title, x_label="strength of the changes", y_label="AUROC")


def show(page: Path) -> None:
    """Say where the page lies; on Colab, where no file can be opened by a click, show it and offer ``results.zip``."""
    print(f"{Path(page).resolve().as_uri()}  ({Path(page).stat().st_size / 1e6:.1f} MB, opens in any browser)")
    if "google.colab" in sys.modules:
        from google.colab import files as colab_files
        from IPython.display import HTML, display

        display(HTML(f'<iframe srcdoc="{html.escape(page.read_text("utf-8"))}" width="100%" height="900"></iframe>'))
        colab_files.download(shutil.make_archive(str(page.parent.parent / "results"), "zip", page.parent))
