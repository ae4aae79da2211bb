"""Numbers as readers see them, and the sentences that a comparison allows; their wording is in ``templates/``.
No sentence claims more than a paired test or an interval supports; counts are said as counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from helpers.judge import comparison as compared
from helpers.judge.comparison import ALWAYS, GROUPS, NOTEBOOKS, Comparison, numbers
from helpers.records import NORMAL_KIND
from helpers.results import METHODS, category_label, method_label

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), undefined=jinja2.StrictUndefined,
    autoescape=jinja2.select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
"""Sentences (plain text) and pages (every value is escaped)."""
_MANY = {name: f"{words}s" for name, words in GROUPS.items()} | {"whole": "pictures that differ as a whole"}


def verdict(comparison: Comparison) -> str:
    """The headline: what was found, in one or two plain sentences without brackets."""
    rates, found, passed = (overall(comparison, m) for m in ("balanced_accuracy", "sensitivity", "specificity"))
    best = max(rates, key=lambda method: rates[method]["value"], default="")
    level = [method for method in rates if abs(rates[method]["value"] - rates[best]["value"]) < 1e-9]
    same = [m for m in level if all(rows[m]["value"] == rows[best]["value"] for rows in (found, passed))]
    groups = {name: overall(comparison, "sensitivity", f"group:{name}").get(best) for name in GROUPS}
    missed = [f"{row['n_images'] - _count(row)} of {row['n_images']} {_MANY[name]}"
              for name, row in groups.items() if row is not None and row["value"] < 0.5]  # fmt: skip
    facts = {"n": len(comparison.samples), "found": found.get(best), "passed": passed.get(best), "missed": missed}
    is_guessing, others = bool(rates) and rates[best]["ci_low"] <= 0.5, [m for m in level if m not in same]
    return " ".join(say("verdict", same=same, level=others, is_guessing=is_guessing, **facts))


def trust(comparison: Comparison, measure: str = "accuracy") -> str:
    """How much these pictures can decide by a measure of the paired tests, in words."""
    samples, (n_pairs, sure) = comparison.samples, _told(comparison, measure)
    sources = {sample.group for sample in samples}
    facts = {"n": len(samples), "n_sources": len(sources), "n_pairs": n_pairs, "n_told": len(sure)}
    return " ".join(say("trust", measure=measure, **facts))


def findings(comparison: Comparison) -> list[str]:
    """What else the numbers allow to say, in sentences."""
    told, groups = [], []
    for measure in ("accuracy", "AUROC"):
        n_pairs, sure = _told(comparison, measure)
        behind: dict[str, list[str]] = {}
        for row in sure.itertuples():
            better, worse = (row.method_a, row.method_b) if row.difference > 0 else (row.method_b, row.method_a)
            behind.setdefault(worse, []).append(better)
        told.append((measure, n_pairs, len(sure), behind))
    for name in GROUPS:
        rows = overall(comparison, "sensitivity", f"group:{name}")
        counts = {method: _count(row) for method, row in rows.items()}
        ends = [(end, [m for m in counts if counts[m] == end]) for end in sorted({*counts.values()}, reverse=True)]
        if ends:
            groups.append((_MANY[name], next(iter(rows.values()))["n_images"], *ends[0], *ends[-1]))
    passed = list(overall(comparison, "specificity").values())
    seen, unseen = (overall(comparison, "sensitivity", kind) for kind in ("seen", "unseen"))
    return say(
        "findings", told=told, groups=groups,
        worst=min(passed, key=lambda row: row["value"], default=None),
        reach=1 - min((row["ci_low"] for row in passed), default=0),
        is_split=bool(seen.keys() & unseen.keys()),
        all_seen=[method for method in seen if method not in unseen],
        chance=[method for method, row in overall(comparison, "image_auroc").items() if row["ci_low"] <= 0.5],
    )  # fmt: skip


def pairs(tests: pd.DataFrame) -> list[str]:
    """Each of the paired tests in a sentence, "cannot tell" and ties included."""
    return [" ".join(say("pair", row=row)) for row in tests.to_dict("records")]


def say(about: str, **facts: Any) -> list[str]:
    """The sentences that ``templates/sentences.txt`` makes of some facts."""
    return TEMPLATES.get_template("sentences.txt").render(about=about, **facts).splitlines()


def _told(comparison: Comparison, measure: str) -> tuple[int, pd.DataFrame]:
    """How many pairs of detectors were tested over all paintings, and the tests that tell a pair apart."""
    tests = comparison.tests[(comparison.tests.category == "all") & (comparison.tests.measure == measure)]
    return len(tests), tests[tests.p_holm < 0.05]


def overall(comparison: Comparison, metric: str, kind: str = "all") -> dict[str, Mapping[str, Any]]:
    """A number of each detector that has it, over all paintings."""
    look = numbers(comparison.table)
    return {method: look[key] for method in comparison.runs if (key := (method, "all", kind, metric)) in look}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers over all paintings as texts, a row per method."""
    look, methods = numbers(table), list(dict.fromkeys(table.method))
    heads = {
        "image AUROC": ("image_auroc", estimate), "found": ("sensitivity", count_of),
        "genuine passed": ("specificity", count_of), "balanced accuracy": ("balanced_accuracy", estimate),
        "accuracy": ("accuracy", count_of), "pixel AUROC": ("pixel_auroc", short), "AUPRO": ("aupro", short),
        "s/image": ("seconds_per_image", seconds_text),
    }  # fmt: skip
    cells = [[show(look.get((m, "all", "all", key))) for key, show in heads.values()] for m in methods]
    return pd.DataFrame(cells, columns=list(heads), index=[method_label(method) for method in methods])


def as_text(path: Path) -> str:
    """``comparison.csv`` for a terminal: the numbers over all paintings, and which rows are missing."""
    table = compared.read(path)
    head = f"{category_label('all')} ({n_pictures(table, 'all')}; thresholds set on genuine pictures; [ ] = 95 %)"
    absent = [f"missing: {method_label(m)} (run {NOTEBOOKS[m]})" for m in METHODS if m not in set(table.method)]
    foot = f"profile {table.profile.iloc[0]}, dataset {str(table.dataset_hash.iloc[0])[:12]}"
    return "\n".join([head, summary(table).to_string(), *absent, foot])


def n_pictures(table: pd.DataFrame, category: str) -> str:
    """``"100 test pictures, 68 anomalous"``."""
    row = numbers(table)[ALWAYS, category, "all", "accuracy"]
    return f"{row['n_images']} test pictures, {row['n_anomalous']} anomalous"


def decimal(value: float) -> str:
    """A number rounded to two digits, but never up to a perfect 1.

    >>> decimal(0.934), decimal(0.9996), decimal(1.0)
    ('0.93', '>0.99', '1.00')
    """
    text = f"{value:.2f}"
    return ">0.99" if text == "1.00" and value < 1 else text


def short(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None else decimal(row["value"])


def estimate(row: Mapping[str, Any] | None) -> str:
    """``"0.93 [0.85, 0.97]"``; no brackets without interval, a dash when there is no such number."""
    if row is None or not math.isfinite(row["ci_low"]):
        return short(row)
    return f"{decimal(row['value'])} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"


def count_of(row: Mapping[str, Any] | None) -> str:
    """``"27/34"`` of a rate; a dash when there is no such number."""
    return "–" if row is None else f"{_count(row)}/{row['n_images']}"


def _count(row: Mapping[str, Any]) -> int:
    return round(row["value"] * row["n_images"])


def seconds_text(row: Mapping[str, Any] | None) -> str:
    """Seconds to two significant digits; a dash when unknown."""
    return "–" if row is None else f"{row['value']:.0f}" if row["value"] >= 100 else f"{row['value']:.2g}"


def kind_label(kind: str) -> str:
    """A kind as readers see it: ``"cut_and_paste"`` -> ``"cut and paste"``, ``"good"`` -> ``"genuine"``."""
    return "genuine" if kind == NORMAL_KIND else kind.removeprefix("kind:").replace("_", " ")


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    names = list(names)
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def _named(methods: Sequence[str]) -> str:
    return listed(map(method_label, methods)) if len(methods) <= 4 else f"{len(methods)} detectors"


TEMPLATES.filters |= {
    "method": method_label, "category": category_label, "kind": kind_label, "short": short, "count": count_of,
    "seconds": seconds_text, "percent": lambda value: f"{100 * value:.1f} %", "listed": listed, "named": _named,
}  # fmt: skip
