"""Numbers as readers see them, and the sentences that a comparison allows.

No sentence claims more than a paired test or an interval supports; counts are said as counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.judge import comparison as compared
from helpers.judge.comparison import ALWAYS, GROUPS, NOTEBOOKS, Comparison, numbers
from helpers.records import NORMAL_KIND
from helpers.results import METHODS, category_label, method_label

_MANY = {name: f"{words}s" for name, words in GROUPS.items()} | {"whole": "copies and new versions"}


def verdict(comparison: Comparison) -> str:
    """The headline: what was found, in one or two plain sentences without brackets."""
    look, n = numbers(comparison.table), len(comparison.samples)
    rows = {m: look.get((m, "all", "all", "balanced_accuracy")) for m in comparison.methods}
    rates = {method: row["value"] for method, row in rows.items() if row is not None}
    if not rates:
        return f"No detector has verdicts on these {n} test pictures yet: run the notebooks named below."
    best = max(rates, key=rates.get)
    if rows[best]["ci_low"] <= 0.5:
        return f"No detector is shown to be better than guessing on these {n} pictures."
    counts = {m: tuple(look[m, "all", "all", key]["value"] for key in ("sensitivity", "specificity")) for m in rates}
    same = [method for method in rates if counts[method] == counts[best]]
    level = [method for method in rates if abs(rates[method] - rates[best]) < 1e-9 and method not in same]
    found, passed = (look[best, "all", "all", key] for key in ("sensitivity", "specificity"))
    finds, raises = ("finds", "raises") if len(same) == 1 else ("each find", "raise")
    sentence = (
        f"{_named(same)} {finds} {words_of(found)} forged or altered pictures and {raises} {_alarms(passed)} on "
        f"{passed['n_images']} genuine ones."
    )
    if level:
        return f"{sentence} Level with that in balanced accuracy: {_named(level)}."
    groups = {name: look.get((best, "all", f"group:{name}", "sensitivity")) for name in GROUPS}
    missed = [
        f"{row['n_images'] - _count(row)} of {row['n_images']} {_MANY[name]}"
        for name, row in groups.items()
        if row is not None and row["value"] < 0.5
    ]
    return f"{sentence} It misses {listed(missed)}." if missed and len(same) == 1 else sentence


def trust(comparison: Comparison) -> str:
    """How much these pictures can decide, in a sentence or two."""
    samples, tests = comparison.samples, comparison.tests
    pooled = tests[(tests.category == "all") & (tests.measure == "accuracy")]
    opening = f"The {len(samples)} test pictures come from {len({s.group for s in samples})} source pictures."
    if not len(pooled):
        return opening
    told = f"They can tell {(pooled.p_holm < 0.05).sum() or 'none'} of {len(pooled)} pairs of detectors apart"
    return f"{opening} {told}; the order of the others may be luck."


def findings(comparison: Comparison) -> list[str]:
    """What else the numbers allow to say, in sentences."""
    look, methods, sentences = numbers(comparison.table), comparison.methods, []
    for measure, words in (("accuracy", "right more often than"), ("AUROC", "better at ranking than")):
        tests = comparison.tests
        tests = tests[(tests.category == "all") & (tests.measure == measure)]
        behind: dict[str, list[str]] = {}
        for row in tests[tests.p_holm < 0.05].itertuples():
            better, worse = (row.method_a, row.method_b) if row.difference > 0 else (row.method_b, row.method_a)
            behind.setdefault(worse, []).append(better)
        parts = [f"{_named(names)} {'is' if len(names) == 1 else 'are'} {words} {method_label(worse)}"
                 for worse, names in behind.items()]  # fmt: skip
        n_sure = sum(map(len, behind.values()))
        if len(tests):
            opening = f"{n_sure or 'None'} of {len(tests)} pairs of detectors can be told apart by {measure}"
            sentences.append(
                f"{opening}: {'; '.join(parts[:3])}{'; more below' * (len(parts) > 3)}." if parts else f"{opening}."
            )
    for name in GROUPS:
        rows = {m: look[key] for m in methods if (key := (m, "all", f"group:{name}", "sensitivity")) in look}
        counts = {method: _count(row) for method, row in rows.items()}
        most, least = max(counts.values(), default=0), min(counts.values(), default=0)
        first, last = ([m for m, count in counts.items() if count == end] for end in (most, least))
        if counts:
            opening = f"Of {rows[first[0]]['n_images']} {_MANY[name]}"
            verb = "finds" if len(first) == 1 else "find"
            sentences.append(
                f"{opening} {_named(first)} {verb} {most}, {_named(last)} {least or 'none'}." if most > least
                else f"{opening} every detector finds {most or 'none'}."
            )  # fmt: skip
    passed = [look[key] for m in methods if (key := (m, "all", "all", "specificity")) in look]
    if passed:
        worst, high = min(passed, key=lambda row: row["value"]), 1 - min(row["ci_low"] for row in passed)
        reach = f" (so few pictures allow a true rate of up to {percent(high)})" if math.isfinite(high) else ""
        sentences.append(f"At most {_alarms(worst)} of any detector on {worst['n_images']} genuine pictures{reach}.")
    all_seen = []
    for method in methods:
        seen, unseen = (look.get((method, "all", kind, "sensitivity")) for kind in ("seen", "unseen"))
        if seen is not None and unseen is not None:
            pair = f"{words_of(seen)} of those kinds and {words_of(unseen)} of kinds it never saw"
            sentences.append(f"{method_label(method)} was trained on some kinds of marks: it finds {pair}.")
        elif seen is not None:
            all_seen.append(method)
    if all_seen:
        sentences.append(f"Trained on every kind of mark in this test, may find less of new kinds: {_named(all_seen)}.")
    rows = [(m, look[key]) for m in methods if (key := (m, "all", "all", "image_auroc")) in look]
    chance = [method for method, row in rows if row["ci_low"] <= 0.5]
    if chance:
        sentences.append(f"{_named(chance)} may rank no better than chance: the AUROC interval reaches 0.5.")
    return sentences


def _named(methods: Sequence[str]) -> str:
    return listed(map(method_label, methods)) if len(methods) <= 4 else f"{len(methods)} detectors"


def _count(row: Mapping[str, Any]) -> int:
    return round(row["value"] * row["n_images"])


def _alarms(passed: Mapping[str, Any]) -> str:
    n = passed["n_images"] - _count(passed)
    return "no false alarm" if n == 0 else "1 false alarm" if n == 1 else f"{n} false alarms"


# -------------------------------------------------------------------------------------------------- numbers as words


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The main numbers over all paintings as readers see them, a row a method, for text and README."""
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
    absent = [method for method in METHODS if method not in set(table.method)]
    return "\n".join([
        f"{category_label('all')} ({n_pictures(table, 'all')}; thresholds set on genuine pictures; [ ] = 95 %)",
        summary(table).to_string(),
        *(f"missing: {method_label(method)} (run {NOTEBOOKS[method]})" for method in absent),
        f"profile {table.profile.iloc[0]}, dataset {str(table.dataset_hash.iloc[0])[:12]}",
    ])  # fmt: skip


def n_pictures(table: pd.DataFrame, category: str) -> str:
    """``"100 test pictures, 68 anomalous"``."""
    row = numbers(table)[ALWAYS, category, "all", "accuracy"]
    return f"{row['n_images']} test pictures, {row['n_anomalous']} anomalous"


def decimal(value: float, digits: int = 2) -> str:
    """A number rounded, but never up to a perfect 1.

    >>> decimal(0.934), decimal(0.9996), decimal(1.0)
    ('0.93', '>0.99', '1.00')
    """
    text = f"{value:.{digits}f}"
    return f">{1 - 10**-digits:.{digits}f}" if float(text) == 1 and value < 1 else text


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


def words_of(row: Mapping[str, Any]) -> str:
    return f"{_count(row)} of {row['n_images']}"


def seconds_text(row: Mapping[str, Any] | None) -> str:
    """Seconds to two significant digits; a dash when unknown."""
    return "–" if row is None else f"{row['value']:.0f}" if row["value"] >= 100 else f"{row['value']:.2g}"


def kind_label(kind: str) -> str:
    """A kind as readers see it: ``"cut_and_paste"`` -> ``"cut and paste"``, ``"good"`` -> ``"genuine"``."""
    return "genuine" if kind == NORMAL_KIND else kind.removeprefix("kind:").replace("_", " ")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    names = list(names)
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"
