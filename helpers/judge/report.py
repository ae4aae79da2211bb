"""The comparison as one self-contained web page: no script, no request, every text escaped, every picture inlined.

Plain HTML that prints well and reads without colours. Text from folders, models and settings passes through
:func:`html.escape`; nothing here builds markup from it in any other way.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from helpers import files as storage
from helpers import results
from helpers.anomalygpt import conversations
from helpers.judge import _old_figures as figures
from helpers.judge import published, statistics
from helpers.judge.comparison import NOTEBOOKS, Comparison
from helpers.judge.findings import (
    ALWAYS,
    count_of,
    count_words,
    decimal,
    findings,
    is_single_kind,
    kind_label,
    numbers,
    percent,
    seconds_text,
)
from helpers.records import Prediction
from helpers.results import category_label, method_label

_MAX_PNG_BYTES = 200_000
_N_ANSWERS = 12

_STYLE = """
:root { color-scheme: only light; }
* { box-sizing: border-box; }
html { background: #f4f2ed; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1120px; padding: 0 40px 64px; background: #ffffff; color: #1f2328;
  font: 17px/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "DejaVu Serif", serif; }
header, h2, h3, nav, table, figcaption, .legend, .card, .note, .meta, summary, footer {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
header { padding: 56px 0 20px; border-bottom: 1px solid #d9d5cb; }
.kicker { margin: 0 0 12px; font-size: 13px; letter-spacing: .08em; text-transform: uppercase; color: #8a4b12; }
h1 { margin: 0 0 22px; font-size: 28px; line-height: 1.32; font-weight: 650; letter-spacing: -.01em; max-width: 34em;
  text-wrap: pretty; }
h2 { margin: 64px 0 12px; font-size: 24px; line-height: 1.25; letter-spacing: -.005em; }
h3 { margin: 36px 0 10px; font-size: 17.5px; line-height: 1.35; }
p, li { max-width: 44em; }
p { margin: 0 0 14px; }
li { margin: 0 0 8px; }
a { color: #0b5a8f; }
code { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; } pre { overflow-x: auto; margin: 0; }
.meta { display: flex; flex-wrap: wrap; gap: 6px 26px; margin: 0; padding: 0; list-style: none; font-size: 14px;
  color: #57606a; }
.meta li { margin: 0; } .meta b { color: #1f2328; font-weight: 600; }
nav { padding: 14px 0; font-size: 14px; border-bottom: 1px solid #d9d5cb; line-height: 2; }
nav a { margin-right: 20px; text-decoration: none; white-space: nowrap; }
.findings { padding-left: 22px; } .findings li::marker { color: #8a4b12; }
.note { margin: 22px 0; padding: 14px 20px; border-left: 4px solid #c98a2b; background: #fdf6e9; font-size: 15px;
  line-height: 1.55; }
.note p, .note li { max-width: 56em; } .note p:last-child, .note ul:last-child { margin-bottom: 0; }
.note ul { margin: 6px 0 0; padding-left: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; margin: 20px 0 8px; }
.card { padding: 16px 20px 18px; background: #f7f8f9; border: 1px solid #e3e6e9; border-radius: 8px; font-size: 14.5px;
  line-height: 1.55; break-inside: avoid; }
.card h3 { margin: 0 0 6px; font-size: 15px; } .card p { margin: 0; }
.scroll { overflow-x: auto; margin: 18px 0 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
.legend { margin: 12px 0 0; max-width: 72em; color: #57606a; font-size: 13.5px; line-height: 1.5; }
table.even { table-layout: fixed; } table.even th:first-child { width: 170px; }
table.even th:nth-child(2) { width: 76px; } table.even thead th { border-bottom-width: 4px; }
th, td { padding: 8px 8px; text-align: right; vertical-align: top; border-bottom: 1px solid #e7e9eb; }
th { font-weight: 600; } thead th { vertical-align: bottom; border-bottom: 2px solid #1f2328; font-size: 13px; }
th:first-child, td:first-child, .left { text-align: left; }
tbody th[scope=row] { font-weight: 600; } td:not(.left) { white-space: nowrap; }
table.numbers tbody th[scope=row] { white-space: nowrap; }
tr.group th { padding-top: 22px; font-size: 15px; border-bottom: 1px solid #b9bfc4; color: #1f2328; }
tr.group span { font-weight: 400; color: #57606a; font-size: 13.5px; margin-left: 8px; }
tr.trivial th, tr.trivial td, tr.absent td { color: #6a7178; white-space: nowrap; } tr.trivial { background: #f7f8f9; }
td .ci { display: block; font-size: 12px; color: #6a7178; white-space: nowrap; }
td .mark { color: #8a4b12; font-weight: 700; margin-right: 3px; }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 9px; border-radius: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.rate { background-repeat: no-repeat; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
figure { margin: 26px 0 34px; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid #e7e9eb; background: #ffffff; }
figcaption { margin-top: 8px; font-size: 14px; line-height: 1.5; color: #57606a; max-width: 52em; }
details { margin: 14px 0; border: 1px solid #e3e6e9; border-radius: 8px; padding: 0 18px; background: #ffffff; }
summary { padding: 12px 0; cursor: pointer; font-size: 15px; font-weight: 600; }
details > :last-child { margin-bottom: 16px; }
.tag { display: inline-block; padding: 1px 8px; border-radius: 10px; font-size: 12.5px; background: #eceff1;
  white-space: nowrap; }
blockquote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.apart { background: #faf7f0; border: 1px solid #e4dbc6; border-radius: 10px; padding: 4px 28px 20px;
  margin-top: 64px; }
.apart h2 { margin-top: 26px; }
footer { margin-top: 64px; padding-top: 18px; border-top: 1px solid #d9d5cb; font-size: 13px; color: #57606a; }
@media (max-width: 760px) {
  body { padding: 0 18px 40px; font-size: 16.5px; } header { padding-top: 32px; } h1 { font-size: 24px; }
  h2 { margin-top: 48px; font-size: 21px; } .wide img { max-width: none; width: 820px; }
  .apart { padding: 2px 16px 14px; } nav { line-height: 2.2; } .cards { grid-template-columns: 1fr; }
  table.numbers { min-width: 940px; } table.plain { min-width: 900px; }
}
@media print {
  html, body { background: #ffffff; } body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  h2 { break-after: avoid; } table { font-size: 8.5pt; } th, td { padding: 3pt 4pt; } .scroll { overflow: visible; }
}
"""

_HOW_TO_READ: tuple[tuple[str, str], ...] = (
    (
        "Image AUROC",
        "Show the detector one anomalous and one normal picture: how often does it give the anomalous one the higher "
        "score? 1 is perfect, 0.5 is a coin. It needs no threshold.",
    ),
    (
        "The brackets",
        "Another draw of as many pictures would give another number. The bracket is the range that such luck allows "
        "(95 %). If two brackets overlap widely, the ranking may be chance.",
    ),
    (
        "Found and passed",
        "“Found” counts anomalous pictures called anomalous (sensitivity). “Passed” counts normal pictures called "
        "normal (specificity). The threshold was set on normal pictures before any test picture was read.",
    ),
    (
        "Why accuracy misleads",
        "When most test pictures are anomalous, calling everything anomalous already looks good. That trivial rule is "
        "a row of the table. Balanced accuracy is the mean of found and passed; the trivial rule gets 0.5.",
    ),
    (
        "Pixel AUROC and AUPRO",
        "Does the map glow where the mark is? Pixel AUROC asks this of every pixel; AUPRO gives every marked region "
        "the same weight, small ones too, at up to 30 % falsely glowing pixels. Pictures without a mask are left out.",
    ),
    (
        "“Cannot tell”",
        "Both methods saw the same pictures, so they are compared picture by picture. If the difference could well be "
        "luck (p of 0.05 or more after correcting for the many pairs), the report says so instead of ranking them.",
    ),
)

_FIGURES: Mapping[str, tuple[str, str]] = {
    "auroc": ("ranking", "Image AUROC of each method on each painting. The dashed line is a coin."),
    "roc": (
        "ranking",
        "Each point of a curve is a threshold: further left means fewer false alarms, further up more anomalies found.",
    ),
    "scores": (
        "ranking",
        "How the scores of normal and anomalous pictures lie around the threshold. Each method has its own scale, and "
        "its own threshold for each painting.",
    ),
    "quality_vs_seconds": ("ranking", "Upper left is best: better and faster. Measured on the machine named below."),
    "kinds": ("kinds", "Share of each kind that was called anomalous, with 95 % interval and number of pictures."),
    "visibility": (
        "kinds",
        "Marks in quarters from least to most visible, by the colour difference and area that synthesis recorded.",
    ),
    "maps_compared": (
        "maps",
        "The same picture through every method that makes maps. Each has one fixed colour scale.",
    ),
}


def write_report(comparison: Comparison, path: Path, drawn: Mapping[str, Path]) -> Path:
    """Write the page, atomically.

    Args:
        comparison: from :func:`helpers.judge.comparison.compare`.
        path: the HTML file.
        drawn: name -> PNG, from :func:`helpers.judge.report_figures.draw_all`; they are copied into the page.
    Returns:
        ``path``.
    """
    sentences = findings(comparison)
    parts = [
        _header(comparison, sentences[0]),
        _navigation(),
        _section("findings", "What the numbers say", _findings(comparison, sentences[1:])),
        _section("table", "The table", _main_table(comparison)),
        _section("read", "How to read it", _cards()),
        _section("ranking", "Ranking, scores and time", _figure_group(drawn, "ranking")),
        _section("kinds", "What is found and what is not", _kind_table(comparison) + _figure_group(drawn, "kinds")),
        _section("maps", "Where the methods look", _maps(drawn)),
        _section("failures", "Where they fail", _failures(comparison, drawn)),
        _answers(comparison),
        _section("tests", "Which differences are real", _tests(comparison)),
        _report_2024(),
        _section("data", "The pictures", _data(comparison)),
        _section("settings", "Settings, versions, machine", _settings(comparison)),
        f"<footer>{escape(_footer(comparison))}</footer>",
    ]
    title = "Anomaly detection in artworks: comparison"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
    storage.write_text(Path(path), page)
    return Path(path)


# ------------------------------------------------------------------------------------------------------------ opening


def _header(comparison: Comparison, headline: str) -> str:
    samples = comparison.test_samples
    n_anomalous = sum(sample.is_anomalous for sample in samples)
    n_methods = sum(result.method != ALWAYS for result in comparison.methods)
    facts = (
        ("Paintings", ", ".join(category_label(name) for name in sorted({sample.category for sample in samples}))),
        ("Test pictures", f"{len(samples)} ({n_anomalous} anomalous, {len(samples) - n_anomalous} normal)"),
        ("Detectors", str(n_methods)),
        ("Profile", comparison.profile),
        ("Dataset", comparison.dataset.hash[:12]),
    )
    items = "".join(f"<li>{escape(name)}: <b>{escape(value)}</b></li>" for name, value in facts)
    return (
        '<header><p class="kicker">Anomaly detection in artworks · comparison report</p>'
        f'<h1>{escape(headline)}</h1><ul class="meta">{items}</ul></header>'
    )


def _navigation() -> str:
    names = (
        ("findings", "Findings"),
        ("table", "Table"),
        ("read", "How to read it"),
        ("ranking", "Ranking"),
        ("kinds", "Kinds"),
        ("maps", "Maps"),
        ("failures", "Failures"),
        ("tests", "Differences"),
        ("published", "The 2024 figures"),
        ("data", "Pictures"),
        ("settings", "Settings"),
    )
    return "<nav>" + "".join(f'<a href="#{anchor}">{escape(name)}</a> ' for anchor, name in names) + "</nav>"


def _section(anchor: str, title: str, content: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def _findings(comparison: Comparison, sentences: Sequence[str]) -> str:
    note = ""
    if comparison.profile == "mini":
        note = (
            '<div class="note"><p><b>Profile “mini”.</b> Small models of the suite’s own, trained on rendered scenes. '
            "The numbers are real, but they are theirs and say nothing about the published models. Run the profile "
            "“full” on a GPU for those.</p></div>"
        )
    found = f'<ul class="findings">{_items(sentences)}</ul>' if sentences else ""
    return found + note


def _cards() -> str:
    cards = "".join(
        f'<div class="card"><h3>{escape(title)}</h3><p>{escape(text)}</p></div>' for title, text in _HOW_TO_READ
    )
    return f'<div class="cards">{cards}</div>'


# ------------------------------------------------------------------------------------------------------------- tables

_COLUMNS: tuple[tuple[str, str], ...] = (
    ("image_auroc", "Image AUROC"),
    ("image_ap", "Average precision"),
    ("f1_max", "F1\N{NON-BREAKING HYPHEN}max*"),
    ("balanced_accuracy", "Balanced accuracy"),
    ("accuracy", "Accuracy"),
    ("sensitivity", "Found"),
    ("specificity", "Passed"),
    ("pixel_auroc", "Pixel AUROC"),
    ("aupro", "AUPRO"),
    ("seconds_per_image", "Seconds per image"),
)
_PIXEL = ("pixel_auroc", "aupro")
_COUNTED = ("accuracy", "sensitivity", "specificity")


def _main_table(comparison: Comparison) -> str:
    look = numbers(comparison.table)
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for _, title in _COLUMNS)
    body = []
    paintings = sorted({sample.category for sample in comparison.test_samples})
    categories = ["all", *paintings] if len(paintings) > 1 else paintings
    for category in categories:
        body.append(_group_row(comparison, category))
        marks = _leader_marks(comparison, category)
        for method in _order(comparison):
            cells = "".join(
                _cell(metric, look.get((method, category, "all", metric)), marks.get(method, ""))
                for metric, _ in _COLUMNS
            )
            kind = ' class="trivial"' if method == ALWAYS else ""
            body.append(f'<tr{kind}><th scope="row">{_swatch(method)}{escape(method_label(method))}</th>{cells}</tr>')
        if category == categories[0]:
            body += [
                f'<tr class="absent"><td class="left">{_swatch(name)}{escape(method_label(name))}</td>'
                f'<td class="left" colspan="{len(_COLUMNS)}">{escape(why)}</td></tr>'
                for name, why in {**comparison.missing, **comparison.refused}.items()
            ]
    mixed = (
        "Over all paintings, rates come from pooled verdicts, each at its own painting's threshold; AUROC, average "
        "precision, F1-max and the pixel metrics are means over the paintings, because scores of different paintings "
        "share no scale. "
        if len(paintings) > 1
        else ""
    )
    caption = (
        "Small figures are 95 % intervals and counts. ● has the highest AUROC on that painting; ≈ cannot be told apart "
        f"from it by a paired test. {mixed}* F1-max is tuned on the test labels: an upper bound, not a result."
    )
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>'
        f'<th scope="col">Method</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f'<p class="legend">{escape(caption)}</p>'
    )


def _group_row(comparison: Comparison, category: str) -> str:
    chosen = [s for s in comparison.test_samples if category in ("all", s.category)]
    n_anomalous = sum(sample.is_anomalous for sample in chosen)
    count = f"{len(chosen)} test pictures, {n_anomalous} anomalous and {len(chosen) - n_anomalous} normal"
    return (
        f'<tr class="group"><th class="left" scope="rowgroup" colspan="{len(_COLUMNS) + 1}">'
        f"{escape(category_label(category))}<span>{escape(count)}</span></th></tr>"
    )


def _cell(metric: str, row: Mapping[str, Any] | None, mark: str) -> str:
    if row is None:
        return "<td>–</td>"
    digits = 3 if metric in _PIXEL else 2
    interval = f"{row['ci_low']:.{digits}f}–{row['ci_high']:.{digits}f}" if pd.notna(row["ci_low"]) else ""
    if metric == "seconds_per_image":
        return f"<td>{escape(seconds_text(row))}</td>"
    if metric in _COUNTED:
        interval = f"{100 * row['ci_low']:.0f}–{100 * row['ci_high']:.0f} %"
        return f'<td>{escape(count_of(row))}<span class="ci">{escape(interval)}</span></td>'
    shown = f'<span class="mark">{mark}</span>' if mark and metric == "image_auroc" else ""
    return f'<td>{shown}{escape(decimal(row["value"], digits))}<span class="ci">{escape(interval)}</span></td>'


def _leader_marks(comparison: Comparison, category: str) -> dict[str, str]:
    """● for the highest AUROC of a painting, ≈ for what a paired test cannot tell from it; none over all paintings."""
    look = numbers(comparison.table)
    values = {
        method: look[method, category, "all", "image_auroc"]["value"]
        for method in _order(comparison)
        if method != ALWAYS and (method, category, "all", "image_auroc") in look
    }
    if category == "all" or not values:
        return {}
    best = max(values, key=lambda method: values[method])
    marks = {best: "●"}
    for row in comparison.tests.to_dict("records"):
        pair = {row["method_a"], row["method_b"]}
        if row["category"] == category and row["measure"] == "AUROC" and best in pair and row["p_holm"] >= 0.05:
            (other,) = pair - {best}
            if other != ALWAYS:
                marks[other] = "≈"
    return marks


def _kind_table(comparison: Comparison) -> str:
    """Found by kind, method and painting: counts with a bar behind them."""
    look = numbers(comparison.table)
    rows = comparison.table[comparison.table.metric == "sensitivity"]
    kinds = [kind for kind in dict.fromkeys(rows.kind) if kind != "all"]
    if not kinds:
        return ""
    methods = [method for method in _order(comparison) if method != ALWAYS]
    if not methods:
        return ""
    paintings = sorted({sample.category for sample in comparison.test_samples})
    groups = (
        ("Made or found", [kind for kind in kinds if kind in ("synthetic", "real")]),
        ("Kind of anomaly", [kind for kind in kinds if is_single_kind(kind)]),
        ("Visibility of the mark", [kind for kind in kinds if kind.startswith("visibility:")]),
    )
    blocks = []
    for category in ["all", *paintings] if len(paintings) > 1 else paintings:
        body = []
        for title, members in groups:
            lines = [_kind_row(look, methods, category, kind) for kind in members]
            lines = [line for line in lines if line]
            if lines:
                heading = f'<tr class="group"><th class="left" colspan="{len(methods) + 2}">{escape(title)}</th></tr>'
                body += [heading, *lines]
        heads = "".join(
            f'<th scope="col" style="border-bottom-color:{figures.method_color(method)}">'
            f"{_unbroken(method_label(method))}</th>"
            for method in methods
        )
        table = (
            '<div class="scroll"><table class="numbers even"><thead><tr>'
            f'<th scope="col">{escape(category_label(category))}</th><th scope="col">Pictures</th>{heads}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )
        if blocks:
            table = f"<details><summary>The same on {escape(category_label(category))} alone</summary>{table}</details>"
        blocks.append(table)
    opening = (
        "<p>Anomalous pictures found at the fixed threshold, with the share in small print. A handful of pictures of a "
        "kind says little: 2 of 2 still allows a true rate of 34 %.</p>"
    )
    return opening + "".join(blocks)


def _kind_row(look: Mapping[Any, Any], methods: Sequence[str], category: str, kind: str) -> str:
    cells = [look.get((method, category, kind, "sensitivity")) for method in methods]
    known = [row for row in cells if row is not None]
    if not known:
        return ""
    shown = "".join(_kind_cell(row) for row in cells)
    name = kind_label(kind.removeprefix("visibility:"))
    return f'<tr><th scope="row">{escape(name)}</th><td>{known[0]["n_images"]}</td>{shown}</tr>'


def _kind_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "<td>–</td>"
    share = round(100 * row["value"])
    style = f"background-image:linear-gradient(#dbe7ee,#dbe7ee);background-size:{share}% 100%"
    return (
        f'<td class="rate" style="{style}">{escape(count_of(row))}<span class="ci">{share} % '
        f"({100 * row['ci_low']:.0f}–{100 * row['ci_high']:.0f})</span></td>"
    )


def _tests(comparison: Comparison) -> str:
    """Counts first, then the differences that hold; the many "cannot tell" are folded."""
    if not len(comparison.tests):
        return "<p>Fewer than two methods have results, so there is nothing to compare.</p>"
    parts = [
        "<p>Every pair of methods on the same pictures: DeLong's paired test for AUROC, the exact McNemar test for "
        "verdicts, p-values corrected for the number of pairs (Holm).</p>"
    ]
    for (category, measure), rows in comparison.tests.groupby(["category", "measure"], sort=True):
        real = rows[rows.p_holm < 0.05].sort_values("p_holm")
        rest = rows[~rows.index.isin(real.index)]
        parts.append(
            f"<h3>{escape(category_label(category))}, {escape(measure)}: {len(real)} of {len(rows)} pairs can be told "
            "apart</h3>"
        )
        if len(real):
            parts.append(
                f"<details{' open' if len(real) <= 6 else ''}><summary>The {len(real)} that can</summary>"
                f"<ul>{_items(real.sentence)}</ul></details>"
            )
        if len(rest):
            parts.append(
                f"<details><summary>The {len(rest)} that cannot</summary><ul>{_items(rest.sentence)}</ul></details>"
            )
    return "".join(parts)


def _report_2024() -> str:
    """The published figures, apart from everything measured here."""
    lines = []
    for row in (*published.REPORT_2024, published.ALWAYS_2024):
        if row.correct is None or row.n_images is None:
            count, interval = "no count fits", "–"
        else:
            low, high = statistics.wilson(row.correct, row.n_images)
            count, interval = f"{row.correct}/{row.n_images}", f"{100 * low:.1f}–{100 * high:.1f} %"
        kind = ' class="trivial"' if row is published.ALWAYS_2024 else ""
        lines.append(
            f'<tr{kind}><th scope="row">{escape(row.model)}</th><td class="left">{escape(row.algorithm)}</td>'
            f"<td>{row.accuracy:g} %</td><td>{escape(count)}</td><td>{escape(interval)}</td>"
            f'<td class="left">{_text(row.remark)}</td></tr>'
        )
    heads = "".join(
        f'<th scope="col"{side}>{escape(title)}</th>'
        for title, side in (
            ("Model", ""),
            ("Algorithm", ' class="left"'),
            ("Accuracy as printed", ""),
            ("Count behind it", ""),
            ("95 % interval", ""),
            ("What it rests on", ' class="left"'),
        )
    )
    return (
        '<section id="published" class="apart"><h2>Apart: the figures published in 2024</h2>'
        f"<p>{escape(published.SUMMARY)}</p>"
        f'<div class="scroll"><table class="plain"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></div></section>"
    )


# ----------------------------------------------------------------------------------------------------------- pictures


def _figure_group(drawn: Mapping[str, Path], group: str) -> str:
    return "".join(
        _figure(drawn[name], caption)
        for name, (member_of, caption) in _FIGURES.items()
        if member_of == group and name in drawn
    )


def _maps(drawn: Mapping[str, Path]) -> str:
    panels = [name for name in drawn if name.startswith("maps_") and name != "maps_compared"]
    caption = (
        "The cyan line is the outline of the true mask. All maps of a method share one colour scale; in its middle is "
        "what pixels of normal pictures reach (99.8 % of them stay below)."
    )
    compared = _figure_group(drawn, "maps")
    return compared + "".join(_figure(drawn[name], caption) for name in panels)


def _failures(comparison: Comparison, drawn: Mapping[str, Path]) -> str:
    look = numbers(comparison.table)
    galleries = [name for name in drawn if name.startswith("failures_")]
    if not galleries:
        return ""
    caption = (
        "Misses first, those the method found most normal; then false alarms. p is the share of calibration normals "
        "that score at least as high."
    )
    parts = []
    for place, name in enumerate(galleries):
        method = name.removeprefix("failures_")
        missed, alarms = (_n_wrong(look.get((method, "all", "all", key))) for key in ("sensitivity", "specificity"))
        label = (
            f"{_swatch(method)}{escape(method_label(method))}: {missed} missed, {count_words(alarms, 'false alarm')}"
        )
        opened = " open" if place == 0 else ""
        parts.append(f"<details{opened}><summary>{label}</summary>{_figure(drawn[name], caption)}</details>")
    return "<p>The worst errors of each method. Look at them before believing any number above.</p>" + "".join(parts)


def _n_wrong(row: Mapping[str, Any] | None) -> int:
    """Pictures on the wrong side, from a rate of right ones."""
    return 0 if row is None else row["n_images"] - round(row["value"] * row["n_images"])


def _figure(path: Path, caption: str) -> str:
    alternative = figures.alt_text(path) or path.stem
    return (
        f'<figure><div class="scroll wide"><img alt="{escape(alternative)}" src="{data_uri(path)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def data_uri(path: Path) -> str:
    """The picture as a ``data:`` address: PNG as it is, or JPEG when the PNG is large (photographs)."""
    content, kind = Path(path).read_bytes(), "png"
    if len(content) > _MAX_PNG_BYTES:
        with Image.open(io.BytesIO(content)) as image:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=86, subsampling=0)
        if buffer.tell() < len(content):
            content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _answers(comparison: Comparison) -> str:
    """What the chat models said about the first test pictures."""
    blocks = []
    for result in comparison.methods:
        spoken = [prediction for prediction in result.predictions if prediction.answer]
        if not spoken:
            continue
        step = max(1, len(spoken) // _N_ANSWERS)
        lines = "".join(
            f'<tr><td class="left">{escape(category_label(p.sample.category))}</td>'
            f'<td class="left">{escape(kind_label(p.sample.kind))}</td>'
            f'<td class="left"><blockquote>{escape(p.answer)}</blockquote></td></tr>'
            for p in spoken[::step][:_N_ANSWERS]
        )
        blocks.append(
            f"<h3>{escape(method_label(result.method))}</h3><p>{_text(_words_against_truth(spoken))}</p>"
            '<div class="scroll"><table class="plain"><thead><tr><th scope="col">Painting</th>'
            '<th scope="col" class="left">Truth</th><th scope="col" class="left">Answer</th></tr></thead>'
            f"<tbody>{lines}</tbody></table></div>"
        )
    if not blocks:
        return ""
    return _section("answers", "What the chat model says", "".join(blocks))


def _words_against_truth(spoken: Sequence[Prediction]) -> str:
    """How often the words alone are right; an answer without a clear yes or no is wrong."""
    labels = [prediction.sample.is_anomalous for prediction in spoken]
    scores = conversations.score_answers([prediction.answer for prediction in spoken], labels)
    low, high = statistics.wilson(scores.n_correct, scores.n)
    return (
        f"Taken by its words alone it is right on {scores.n_correct} of {scores.n} pictures "
        f"({percent(scores.n_correct / scores.n)}, interval {100 * low:.0f}–{100 * high:.0f} %): it says yes on "
        f"{scores.n_yes}, and {scores.n_unparseable} answers have no clear yes or no and count as wrong. Always "
        f"answering yes would be right on {sum(labels)}. Below, every few pictures, its answers as they came."
    )


# ---------------------------------------------------------------------------------------------------------- the ground


def _data(comparison: Comparison) -> str:
    lines = []
    for category in sorted({sample.category for sample in comparison.dataset.samples}):
        chosen = [sample for sample in comparison.dataset.samples if sample.category == category]
        tested = [sample.kind for sample in chosen if sample.split == "test" and sample.is_anomalous]
        kinds = ", ".join(f"{kind_label(kind)} {tested.count(kind)}" for kind in sorted(set(tested)))
        n_normal = sum(sample.split == "test" and not sample.is_anomalous for sample in chosen)
        cells = (
            len({sample.group for sample in chosen}),
            sum(sample.split == "train" for sample in chosen),
            sum(sample.split == "calibration" for sample in chosen),
            n_normal,
            len(tested),
        )
        numbers_of = "".join(f"<td>{value or '–'}</td>" for value in cells)
        lines.append(
            f'<tr><th scope="row">{escape(category_label(category))}</th>{numbers_of}'
            f'<td class="left">{escape(kinds) or "–"}</td></tr>'
        )
    heads = "".join(
        f'<th scope="col">{escape(title)}</th>'
        for title in ("Painting", "Source pictures", "Learnt from", "Threshold set on", "Normal, tested", "Anomalous")
    )
    table = (
        f'<div class="scroll"><table class="plain"><thead><tr>{heads}<th scope="col" class="left">of these</th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    identity = (
        f"<p>Dataset <code>{escape(comparison.dataset.hash)}</code>. All rows of the table were measured on exactly "
        "these pictures; results on any other dataset are refused.</p>"
    )
    notes = [*_dataset_warnings(comparison), *comparison.notes]
    box = f'<div class="note"><p><b>Mind</b></p><ul>{_items(notes)}</ul></div>' if notes else ""
    return identity + table + box


def _dataset_warnings(comparison: Comparison) -> list[str]:
    """What limits every number of the report, from the counts alone."""
    found = []
    for category in sorted({sample.category for sample in comparison.test_samples}):
        chosen = [sample for sample in comparison.test_samples if sample.category == category]
        normals = [sample for sample in chosen if not sample.is_anomalous]
        if not normals:
            found.append(f"{category_label(category)} has no normal test picture: no AUROC and no false-alarm rate.")
            continue
        _, high = statistics.wilson(0, len(normals))
        found.append(
            f"{category_label(category)} is tested on {len(normals)} normal pictures: even no false alarm at "
            f"all allows a true rate of {percent(high)}."
        )
        sources = {sample.group for sample in normals}
        if len(sources) < len(normals):
            found.append(
                f"The {len(normals)} normal test pictures of {category_label(category)} come from {len(sources)} "
                "source pictures; copies of one picture are not independent, so real intervals are wider."
            )
    return found


def _settings(comparison: Comparison) -> str:
    parts = []
    for result in comparison.methods:
        manifest = result.manifest
        settings = json.dumps(manifest.get("settings", {}), indent=1, ensure_ascii=False, sort_keys=True)
        facts = [("made by", NOTEBOOKS.get(result.method, "another tool")), ("machine", manifest.get("machine", ""))]
        facts += [("weights", manifest["checkpoint_hash"][:12])] if manifest.get("checkpoint_hash") else []
        shown = " · ".join(f"{name}: {value}" for name, value in facts if value)
        parts.append(
            f"<details><summary>{_swatch(result.method)}{escape(method_label(result.method))}</summary>"
            f"<p>{escape(shown)}</p><pre><code>{escape(settings)}</code></pre></details>"
        )
    versions = " · ".join(f"{name} {version}" for name, version in results.versions().items())
    machine = f"<p>Report made on {escape(results.machine())}. {escape(versions)}.</p>"
    return "".join(parts) + machine


def _footer(comparison: Comparison) -> str:
    return (
        f"Profile {comparison.profile} · dataset {comparison.dataset.hash[:12]} · {results.machine()} · written by "
        "notebook 09_compare. This page holds everything it shows and loads nothing."
    )


# ------------------------------------------------------------------------------------------------------------- details


def _order(comparison: Comparison) -> list[str]:
    """Methods as in the table, the trivial rule last."""
    names = [result.method for result in comparison.methods]
    return [name for name in names if name != ALWAYS] + [name for name in names if name == ALWAYS]


def _swatch(method: str) -> str:
    return f'<span class="swatch" style="background-color:{figures.method_color(method)}"></span>'


def _unbroken(label: str) -> str:
    """The label escaped, with hyphens that do not break a line (k-NN)."""
    return escape(label).replace("k-NN", "k\N{NON-BREAKING HYPHEN}NN")


def _items(sentences: Iterable[str]) -> str:
    return "".join(f"<li>{_text(str(sentence))}</li>" for sentence in sentences)


def _text(words: str) -> str:
    """Escaped, with per cent signs that stay on their number's line."""
    return escape(words).replace(" %", "\N{NO-BREAK SPACE}%")
