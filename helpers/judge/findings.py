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
from helpers.judge.comparison import GROUPS, NOTEBOOKS, Comparison, numbers
from helpers.records import NORMAL_KIND
from helpers.results import METHODS, category_label, method_label


def verdict(comparison: Comparison) -> str:
    """The headline: what was found, in one or two plain sentences without brackets."""
    detectors, look = comparison.methods, numbers(comparison.table)
    n = len(comparison.samples)
    rates = {m: look[m, "all", "all", "balanced_accuracy"]["value"] for m in detectors
             if (m, "all", "all", "balanced_accuracy") in look}  # fmt: skip
    if not rates:
        return f"No detector has verdicts on these {n} test pictures yet: run the notebooks named below."
    best = max(rates, key=rates.get)
    if look[best, "all", "all", "balanced_accuracy"]["ci_low"] <= 0.5:
        return f"No detector is shown to be better than guessing on these {n} pictures."
    counts = {m: tuple(look[m, "all", "all", key]["value"] for key in ("sensitivity", "specificity")) for m in rates}
    same = [method for method in rates if counts[method] == counts[best]]
    level = [method for method in rates if abs(rates[method] - rates[best]) < 1e-9 and method not in same]
    found, passed = (look[best, "all", "all", key] for key in ("sensitivity", "specificity"))
    alarms = passed["n_images"] - round(passed["value"] * passed["n_images"])
    finds, raises = ("finds", "raises") if len(same) == 1 else ("each find", "raise")
    sentence = (
        f"{listed(map(method_label, same))} {finds} {words_of(found)} forged or altered pictures and {raises} "
        f"{count_words(alarms, 'false alarm') if alarms else 'no false alarm'} on {passed['n_images']} genuine ones."
    )
    if level:
        sentence += f" Level with that in balanced accuracy: {listed(map(method_label, level))}."
    return f"{sentence} {_missed(comparison, [*same, *level])}".strip()


def trust(comparison: Comparison) -> str:
    """How much these pictures can decide, in a sentence or two."""
    n, tests = len(comparison.samples), comparison.tests
    pooled = tests[(tests.category == "all") & (tests.measure == "accuracy")]
    opening = f"The {n} test pictures come from {len({s.group for s in comparison.samples})} source pictures."
    if not len(pooled):
        return opening
    n_sure = int((pooled.p_holm < 0.05).sum())
    return (
        f"{opening} They can tell {n_sure or 'none'} of {len(pooled)} pairs of detectors apart; the rest may be luck."
    )


def _missed(comparison: Comparison, methods: Sequence[str]) -> str:
    """Groups of pictures of which a detector misses more than half; empty without any, or with several detectors."""
    look = numbers(comparison.table)
    rows = {name: look.get((methods[0], "all", f"group:{name}", "sensitivity")) for name in GROUPS}
    parts = [
        f"{row['n_images'] - round(row['value'] * row['n_images'])} of {row['n_images']} {_GROUP_WORDS[name]}"
        for name, row in rows.items()
        if row is not None and row["value"] < 0.5
    ]
    return f"It misses {listed(parts)}." if parts and len(methods) == 1 else ""


_GROUP_WORDS = {
    "whole": "copies and new versions", "real": "real alterations", "plain": "plain marks",
    "moderate": "moderate marks", "faint": "faint marks", "mark": "marks",
}  # fmt: skip


def findings(comparison: Comparison) -> list[str]:
    """What else the numbers allow to say, in sentences."""
    if not comparison.methods:
        return []
    sentences = [*_told_apart(comparison), *_groups(comparison), *_false_alarms(comparison), *_unseen(comparison)]
    look = numbers(comparison.table)
    rows = {m: look.get((m, "all", "all", "image_auroc")) for m in comparison.methods}
    chance = [method for method, row in rows.items() if row is not None and row["ci_low"] <= 0.5]
    if chance:
        sentences.append(
            f"{listed(map(method_label, chance))} may rank no better than chance: the AUROC interval reaches 0.5."
        )
    return sentences


def _told_apart(comparison: Comparison) -> list[str]:
    """Who is right more often and who ranks better, by the tests over all paintings."""
    sentences = []
    for measure, words in (("accuracy", "right more often than"), ("AUROC", "better at ranking than")):
        tests = comparison.tests
        tests = tests[(tests.category == "all") & (tests.measure == measure)]
        if not len(tests):
            continue
        sure = tests[tests.p_holm < 0.05]
        behind: dict[str, list[str]] = {}
        for row in sure.itertuples():
            better, worse = (row.method_a, row.method_b) if row.difference > 0 else (row.method_b, row.method_a)
            behind.setdefault(worse, []).append(better)
        parts = [f"{listed(map(method_label, better))} {'is' if len(better) == 1 else 'are'} {words} "
                 f"{method_label(worse)}" for worse, better in behind.items()]  # fmt: skip
        opening = f"{len(sure)} of {len(tests)} pairs of detectors can be told apart by {measure}"
        sentences.append(f"{opening}: {'; '.join(parts)}." if parts else f"{opening.replace('0 of', 'None of')}.")
    return sentences


def _groups(comparison: Comparison) -> list[str]:
    """For each group of pictures the most and the fewest that a detector finds."""
    look, sentences = numbers(comparison.table), []
    for name in GROUPS:
        rows = {m: look.get((m, "all", f"group:{name}", "sensitivity")) for m in comparison.methods}
        rows = {method: row for method, row in rows.items() if row is not None}
        if not rows:
            continue
        n = next(iter(rows.values()))["n_images"]
        counts = {method: round(row["value"] * n) for method, row in rows.items()}
        most, least = max(counts.values()), min(counts.values())
        first, last = ([m for m, count in counts.items() if count == end] for end in (most, least))
        if most == least:
            sentences.append(f"Of {n} {_GROUP_WORDS[name]} every detector finds {most or 'none'}.")
            continue
        sentences.append(
            f"Of {n} {_GROUP_WORDS[name]} {_few(first)} {'finds' if len(first) == 1 else 'find'} {most}, {_few(last)} "
            f"{least or 'none'}."
        )
    return sentences


def _few(methods: Sequence[str]) -> str:
    return listed(map(method_label, methods)) if len(methods) <= 3 else f"{len(methods)} detectors"


def _false_alarms(comparison: Comparison) -> list[str]:
    look = numbers(comparison.table)
    rows = [row for m in comparison.methods if (row := look.get((m, "all", "all", "specificity"))) is not None]
    if not rows:
        return []
    n = rows[0]["n_images"]
    most, high = n - round(min(row["value"] for row in rows) * n), 1 - min(row["ci_low"] for row in rows)
    reach = f" (so few pictures allow a true rate of up to {percent(high)})" if math.isfinite(high) else ""
    if most == 0:
        return [f"No detector raised a false alarm on {n} genuine pictures{reach}."]
    return [f"False alarms: at most {most} of {n} genuine pictures for any detector{reach}."]


def _unseen(comparison: Comparison) -> list[str]:
    """Detectors that learnt from synthetic marks: what they find of kinds they knew and of kinds they did not."""
    look, sentences = numbers(comparison.table), []
    for method in comparison.methods:
        seen, unseen = (look.get((method, "all", kind, "sensitivity")) for kind in ("seen", "unseen"))
        name = method_label(method)
        if seen is not None and unseen is not None:
            sentences.append(
                f"{name} was trained on some kinds of marks: it finds {words_of(seen)} of those kinds and "
                f"{words_of(unseen)} of kinds it never saw."
            )
        elif seen is not None:
            sentences.append(f"{name} was trained on every kind of mark in this test; on new kinds it may find less.")
    return sentences


# -------------------------------------------------------------------------------------------------- numbers as words


def summary(table: pd.DataFrame, category: str = "all") -> pd.DataFrame:
    """The main numbers as readers see them, a row a method, for text, README and notebook."""
    look = numbers(table)
    methods = list(dict.fromkeys(table.method))
    heads = {
        "image AUROC": ("image_auroc", estimate), "found": ("sensitivity", count_of),
        "genuine passed": ("specificity", count_of), "balanced accuracy": ("balanced_accuracy", estimate),
        "accuracy": ("accuracy", count_of), "pixel AUROC": ("pixel_auroc", short), "AUPRO": ("aupro", short),
        "s/image": ("seconds_per_image", seconds_text),
    }  # fmt: skip
    cells = [[show(look.get((m, category, "all", key))) for key, show in heads.values()] for m in methods]
    return pd.DataFrame(cells, columns=list(heads), index=[method_label(method) for method in methods])


def as_text(path: Path) -> str:
    """The comparison for a terminal: one block over all paintings and one per painting.

    Args:
        path: ``comparison.csv``; methods of the suite without rows are named with the notebook that makes them.
    Raises:
        FileNotFoundError, ValueError: see :func:`helpers.judge.comparison.read`.
    """
    table = compared.read(path)
    blocks = [
        f"{category_label(category)} ({n_pictures(table, category)})\n{summary(table, category).to_string()}"
        for category in dict.fromkeys(table.category)
    ]
    ends = ["[ ] = 95 % interval. Thresholds were set on genuine pictures before any test picture was read."]
    absent = [method for method in METHODS if method not in set(table.method)]
    ends += [f"missing: {method_label(method)} (run {NOTEBOOKS[method]})" for method in absent]
    ends += [f"profile {table.profile.iloc[0]}, dataset {str(table.dataset_hash.iloc[0])[:12]}"]
    return "\n\n".join([*blocks, "\n".join(ends)]) + "\n"


def n_pictures(table: pd.DataFrame, category: str) -> str:
    """``"100 test pictures, 68 anomalous"``."""
    rows = table[(table.category == category) & (table.kind == "all") & (table.metric == "accuracy")]
    return f"{rows.n_images.iloc[0]} test pictures, {rows.n_anomalous.iloc[0]} anomalous"


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
    return "–" if row is None else f"{round(row['value'] * row['n_images'])}/{row['n_images']}"


def seconds_text(row: Mapping[str, Any] | None) -> str:
    """Seconds to two significant digits; a dash when unknown."""
    if row is None:
        return "–"
    return f"{row['value']:.0f}" if row["value"] >= 100 else f"{row['value']:.2g}"


def kind_label(kind: str) -> str:
    """A kind or group as readers see it: ``"cut_and_paste"`` -> ``"cut and paste"``, ``"good"`` -> ``"genuine"``."""
    if kind.startswith("group:"):
        return GROUPS[kind.removeprefix("group:")]
    return "genuine" if kind == NORMAL_KIND else kind.removeprefix("kind:").replace("_", " ")


def words_of(row: Mapping[str, Any]) -> str:
    """``"27 of 34"`` of a rate."""
    return count_of(row).replace("/", " of ")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def count_words(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    names = list(names)
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"
