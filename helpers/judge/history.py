"""Every finished evaluation, and falls in quality that are more than luck.

An evaluation is a copy of its predictions in ``history/``, named by method, time and content; the table is read off
the copies, so that no second file can disagree or be torn. Two evaluations are compared picture by picture, on the
pictures that both have, also when the dataset has changed in between.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import files, results
from helpers.judge import metrics, statistics
from helpers.judge.comparison import Comparison
from helpers.results import category_label, method_label

_KEYS = ["sha256", "category", "is_anomalous"]


def record(folder: Path, compared: Comparison) -> list[str]:
    """Keep the evaluations of a comparison that the history does not have yet.

    Args:
        folder: for example ``profile.report_dir / "history"``.
        compared: from :func:`helpers.judge.comparison.compare`.
    Returns:
        the methods that were added.
    """
    added = []
    for method, run in compared.runs.items():
        source = run.folder / results.PREDICTIONS
        content = files.sha256_file(source)[:16]
        if not list(Path(folder).glob(f"*__*_{content}.csv")):
            finished = datetime.fromtimestamp((run.folder / results.MANIFEST).stat().st_mtime, UTC)
            name = f"{compared.profile}.{method}__{finished:%Y-%m-%dT%H%M%S}_{content}.csv"
            files.write_bytes(Path(folder) / name, source.read_bytes())
            added.append(method)
    return added


def read(folder: Path) -> pd.DataFrame:
    """All predictions of all evaluations: ``series, method, time, run`` and the columns of ``predictions.csv``.

    Copies that cannot be read are left out with their name in ``frame.attrs["skipped"]``.
    """
    frames, skipped = [], []
    for path in sorted(Path(folder).glob("*__*.csv")):
        series, _, when = path.stem.partition("__")
        try:
            frame = pd.read_csv(path, float_precision="round_trip").drop_duplicates(_KEYS)
            frame = frame.astype({"is_anomalous": bool, "is_predicted_anomalous": bool, "anomaly_score": float})
        except (ValueError, KeyError) as error:
            skipped.append(f"{path.name}: {error}")
            continue
        method = series.partition(".")[2]
        frames.append(frame.assign(series=series, method=method, time=when.partition("_")[0], run=when))
    columns = ["series", "method", "time", "run", *_KEYS, "anomaly_score", "is_predicted_anomalous"]
    history = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    history.attrs["skipped"] = skipped
    return history


def changes(history: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of each method against the one before and against its first, on the pictures both have.

    Ranking is tested for each painting (DeLong), verdicts over all (exact test of balanced accuracy); p-values are
    corrected (Holm) over *all* tests of the report, because one false alarm among many methods is still one.

    Returns:
        ``method, against, measure, category, value_a`` (now), ``value_b`` (then), ``difference, p_value, n_images,
        p_holm, is_fall``.
    """
    rows = []
    for _, runs in history.groupby("series", sort=False):
        last, *older = sorted(runs.run.unique(), reverse=True)
        for then in dict.fromkeys(older[:1] + older[-1:]):
            now_then = [runs[runs.run == run] for run in (last, then)]
            both = now_then[0].merge(now_then[1], on=_KEYS, suffixes=("", "_then"), validate="one_to_one")
            labels = both.is_anomalous.to_numpy(bool)
            right = [(both[name] == both.is_anomalous).to_numpy(bool)
                     for name in ("is_predicted_anomalous", "is_predicted_anomalous_then")]  # fmt: skip
            tests = {("balanced accuracy", "all"): statistics.balanced_accuracy_test(*right, labels)}
            for category, part in both.groupby("category"):
                scores = part.anomaly_score, part.anomaly_score_then
                tests["AUROC", category] = statistics.delong_paired(*scores, part.is_anomalous.to_numpy(bool))
            head = {"method": runs.method.iloc[0], "against": then[:10]}
            rows += [head | {"measure": measure, "category": category, **vars(test)}
                     for (measure, category), test in tests.items() if math.isfinite(test.p_value)]  # fmt: skip
    names = ["method", "against", "measure", "category", "value_a", "value_b", "difference", "p_value", "n_images"]
    table = pd.DataFrame(rows, columns=names)
    table["p_holm"] = statistics.holm(table.p_value.astype(float))
    table["is_fall"] = (table.p_holm < 0.05) & (table.difference < 0)
    return table


def describe(history: pd.DataFrame, changed: pd.DataFrame) -> str:
    """How many evaluations there are, and every fall, in sentences."""
    lines = [f"{history.run.nunique()} evaluations of {history.method.nunique()} methods are kept."]
    lines += [f"Left out: {reason}" for reason in history.attrs.get("skipped", ())]
    if changed.empty:
        return "\n".join([*lines, "No method was evaluated twice yet, so nothing can have fallen."])
    for row in changed[changed.is_fall].itertuples():
        place = "" if row.category == "all" else f" on {category_label(row.category)}"
        lines.append(
            f"FALL: {method_label(row.method)}{place}: {row.measure} {row.value_b:.3f} on {row.against}, now "
            f"{row.value_a:.3f}, on the {row.n_images} pictures that both have (corrected p = {row.p_holm:.3g})."
        )
    if not changed.is_fall.any():
        lines.append(f"No fall in {len(changed)} paired tests of {changed.method.nunique()} methods.")
    return "\n".join(lines)


def points(history: pd.DataFrame, changed: pd.DataFrame) -> pd.DataFrame:
    """Each method by evaluation for :func:`helpers.judge.figures.lines`; a fall is ringed in its own panel.

    Evaluations on different pictures are not joined. Empty until a method was evaluated twice.
    """
    rows = []
    for _, runs in history.groupby("series", sort=False):
        falls = changed[(changed.method == runs.method.iloc[0]) & changed.is_fall]
        each = runs.groupby("run")
        for number, (_, run) in enumerate(each, start=1):
            labels = run.is_anomalous
            right = run.is_predicted_anomalous == labels
            by_painting = [metrics.image_auroc(part.anomaly_score, part.is_anomalous)
                           for _, part in run.groupby("category")]  # fmt: skip
            values = {"AUROC": np.nanmean([*by_painting, np.nan]) if any(map(math.isfinite, by_painting)) else np.nan,
                      "balanced accuracy": (right[labels].mean() + right[~labels].mean()) / 2}  # fmt: skip
            for measure, value in values.items():
                ring = number == each.ngroups and (falls.measure == measure).any()
                rows.append({"panel": measure, "series": run.method.iloc[0], "x": number, "value": value, "ring": ring,
                             "part": hash(tuple(sorted(run.sha256)))})  # fmt: skip
    found = pd.DataFrame(rows, columns=["panel", "series", "x", "value", "ring", "part"])
    return found[found.value.notna()] if (found.x > 1).any() else found.iloc[:0]
