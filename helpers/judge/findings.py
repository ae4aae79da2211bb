"""Numbers as readers see them, and the sentences that a comparison allows.

No sentence claims more than a paired test or an interval supports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from helpers.records import NORMAL_KIND
from helpers.results import method_label

if TYPE_CHECKING:
    from helpers.judge.comparison import Comparison

ALWAYS = "always_anomaly"
"""The trivial rule's row."""
RESERVED_KINDS = ("all", "synthetic", "real")
"""Values of the table's ``kind`` that are not kinds of anomaly."""


def numbers(table: pd.DataFrame) -> dict[tuple[str, str, str, str], Mapping[str, Any]]:
    """The table for look-up: (method, category, kind, metric) -> row."""
    return {(row["method"], row["category"], row["kind"], row["metric"]): row for row in table.to_dict("records")}


def findings(comparison: Comparison) -> list[str]:
    """What the numbers allow to say, in sentences; the first is the headline."""
    table, look = comparison.table, numbers(comparison.table)
    n_paintings = len({sample.category for sample in comparison.test_samples})
    n = len(comparison.test_samples)
    aurocs = {
        result.method: look[result.method, "all", "all", "image_auroc"]
        for result in comparison.methods
        if result.method != ALWAYS and (result.method, "all", "all", "image_auroc") in look
    }
    if not aurocs:
        return [f"No detector has been measured yet on these {n} test pictures: run the notebooks named below."]
    ranked = sorted(aurocs, key=lambda method: -aurocs[method]["value"])
    best = ranked[0]
    rivals = [method for method in ranked[1:] if not _is_told_apart(comparison.tests, best, method)]
    where = f"{n} test pictures of {count_words(n_paintings, 'painting')}"
    reached = f"image AUROC {estimate(aurocs[best])}"
    if aurocs[best]["ci_low"] <= 0.5:
        who = f"the first, {method_label(best)}," if ranked[1:] else method_label(best)
        sentences = [f"On {where}, no detector is shown to be better than a coin: {who} reaches {reached}."]
    elif not ranked[1:]:
        sentences = [f"On {where}, {method_label(best)} reaches {reached}. No other detector has been measured yet."]
    elif rivals:
        names = listed(map(method_label, rivals))
        sentences = [
            f"On {where}, {method_label(best)} ranks first: {reached}. But these pictures cannot tell it from {names}."
        ]
    else:
        sentences = [
            f"On {where}, {method_label(best)} ranks first: {reached}, and the pictures are enough to tell it "
            "from every other method."
        ]
    sentences += _trivial_rule(look, ranked)
    chance = [method for method in ranked if aurocs[method]["ci_low"] <= 0.5]
    if chance and aurocs[best]["ci_low"] > 0.5:
        sentences.append(
            f"{listed(map(method_label, chance))} may be no better than chance here: the AUROC interval reaches 0.5."
        )
    sentences += _made_and_found(look, best)
    sentences += hard_and_easy(table)
    sentences += _false_alarms(look, ranked)
    return sentences


def _is_told_apart(tests: pd.DataFrame, best: str, other: str) -> bool:
    """At least as good an AUROC on every painting, and significantly better on one."""
    rows = [
        row
        for row in tests.to_dict("records")
        if row["measure"] == "AUROC" and {row["method_a"], row["method_b"]} == {best, other}
    ]
    leads = [(row["difference"] if row["method_a"] == best else -row["difference"], row["p_holm"]) for row in rows]
    return all(lead >= 0 for lead, _ in leads) and any(lead > 0 and p_value < 0.05 for lead, p_value in leads)


def _trivial_rule(look: Mapping[Any, Mapping[str, Any]], ranked: Sequence[str]) -> list[str]:
    trivial = look.get((ALWAYS, "all", "all", "accuracy"))
    accuracies = {m: look[m, "all", "all", "accuracy"] for m in ranked if (m, "all", "all", "accuracy") in look}
    if trivial is None or not accuracies:
        return []
    opening = f"Calling every picture anomalous is right on {count_of(trivial)} ({percent(trivial['value'])})"
    below = [method for method, row in accuracies.items() if row["value"] <= trivial["value"]]
    if not below:
        return [f"{opening}; every detector is more accurate than that at its fixed threshold."]
    if len(below) == len(accuracies):
        return [f"{opening}; no detector is more accurate than that at its fixed threshold."]
    verb = "is" if len(below) == 1 else "are"
    return [f"{opening}; {listed(map(method_label, below))} {verb} not more accurate than that at the fixed threshold."]


def _made_and_found(look: Mapping[Any, Mapping[str, Any]], best: str) -> list[str]:
    made, found = (look.get((best, "all", kind, "image_auroc")) for kind in ("synthetic", "real"))
    if made is None or found is None:
        return []
    return [
        f"{method_label(best)} reaches AUROC {estimate(made)} on {made['n_anomalous']} pictures with synthetic marks "
        f"and {estimate(found)} on {found['n_anomalous']} real anomalies: read the two apart."
    ]


def hard_and_easy(table: pd.DataFrame) -> list[str]:
    """The kinds found least and most, by mean sensitivity over the detectors; empty when nothing can be said.

    Kinds with fewer than three test pictures are left out.
    """
    rows = table[(table.metric == "sensitivity") & (table.category == "all") & (table.method != ALWAYS)]
    rows = rows[np.array([is_single_kind(kind) for kind in rows.kind], dtype=bool)]  # an empty list would pick columns
    rows = rows[rows.n_images >= 3]
    means = rows.groupby("kind").value.mean().sort_values() if len(rows) else pd.Series(dtype=float)
    if len(means) < 2 or means.iloc[0] == means.iloc[-1]:
        return []
    return [
        f"Found least: {_kinds_at(means, means.iloc[0])}. Found most: {_kinds_at(means, means.iloc[-1])}. (Mean over "
        "the detectors.)"
    ]


def _kinds_at(means: pd.Series, share: float) -> str:
    """The kinds with this share found, at most three by name."""
    names = [f"“{kind_label(kind)}”" for kind in means.index[means == share]]
    shown = listed(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more kinds"
    return f"{shown} ({percent(share)})"


def _false_alarms(look: Mapping[Any, Mapping[str, Any]], ranked: Sequence[str]) -> list[str]:
    rows = {m: look[m, "all", "all", "specificity"] for m in ranked if (m, "all", "all", "specificity") in look}
    if not rows:
        return []
    worst = min(rows, key=lambda method: rows[method]["value"])
    row = rows[worst]
    n_alarms = row["n_images"] - round(row["value"] * row["n_images"])
    if n_alarms == 0:
        upper = 1 - row["ci_low"]
        return [
            f"No detector raised a false alarm on {row['n_images']} normal pictures (up to {percent(upper)} may be)."
        ]
    return [f"Most false alarms: {method_label(worst)}, on {n_alarms} of {row['n_images']} normal pictures."]


def kind_label(kind: str) -> str:
    """A kind as readers see it: ``"cut_and_paste"`` -> ``"cut and paste"``, ``"good"`` -> ``"normal"``."""
    return "normal" if kind == NORMAL_KIND else kind.replace("_", " ")


def decimal(value: float, digits: int = 2) -> str:
    """A number rounded, but never up to a perfect 1.

    >>> decimal(0.934), decimal(0.9996), decimal(1.0)
    ('0.93', '>0.99', '1.00')
    """
    text = f"{value:.{digits}f}"
    return f">{1 - 10**-digits:.{digits}f}" if float(text) == 1 and value < 1 else text


def estimate(row: Mapping[str, Any] | None, digits: int = 2) -> str:
    """``"0.93 [0.85, 0.97]"``; a dash when there is no such number."""
    if row is None:
        return "–"
    if not math.isfinite(row["ci_low"]):
        return decimal(row["value"], digits)
    return f"{decimal(row['value'], digits)} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def count_of(row: Mapping[str, Any] | None) -> str:
    """``"27/34"`` of a rate; a dash when there is no such number."""
    return "–" if row is None else f"{round(row['value'] * row['n_images'])}/{row['n_images']}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def seconds_text(row: Mapping[str, Any] | None) -> str:
    """Seconds to two significant digits; a dash when unknown."""
    if row is None:
        return "–"
    return f"{row['value']:.0f}" if row["value"] >= 100 else f"{row['value']:.2g}"


def count_words(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def is_single_kind(kind: str) -> bool:
    """True for rows about one kind of anomaly, False for "all", groups and visibility bins."""
    return kind not in RESERVED_KINDS and not kind.startswith("visibility:")
