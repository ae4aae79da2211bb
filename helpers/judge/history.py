"""Every finished evaluation as a line of ``history.csv``, and falls in quality that are more than luck.

The predictions behind each line are kept in ``history/<run>.csv``, so that two evaluations can be compared picture by
picture, also when the dataset has changed in between: the test uses the pictures that both have.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import files as journal
from helpers import files as storage
from helpers import results
from helpers.judge import _old_figures as figures
from helpers.judge import comparison, statistics
from helpers.judge.comparison import Comparison
from helpers.judge.findings import ALWAYS, numbers
from helpers.results import MethodResult, category_label, method_label

FILE = "history.csv"
FOLDER = "history"
METRICS = (
    "image_auroc",
    "balanced_accuracy",
    "accuracy",
    "sensitivity",
    "specificity",
    "answer_accuracy",
    "pixel_auroc",
    "aupro",
)
"""Numbers over all paintings, as :mod:`helpers.judge.comparison` defines them; empty where one is not defined."""
COLUMNS = (
    "time",
    "method",
    "profile",
    "dataset_hash",
    "checkpoint_hash",
    "settings_hash",
    "n_images",
    "n_anomalous",
    *METRICS,
    "run",
)
"""``run`` comes last and has a fixed length: a line that was cut anywhere is recognised."""
ALPHA = 0.05
_RUN_LENGTH = 16


@dataclass(frozen=True)
class History:
    """The evaluations so far.

    Attributes:
        folder: where ``history.csv`` lies.
        table: one row per evaluation, oldest first, columns :data:`COLUMNS`.
        skipped: lines that are no evaluation, with their numbers; they stay in the file.
    """

    folder: Path
    table: pd.DataFrame
    skipped: tuple[str, ...] = ()


def record(folder: Path | str, compared: Comparison) -> list[str]:
    """Append the evaluations of a comparison that are not in the history yet, and keep their predictions.

    Args:
        folder: ``profile.report_dir``.
        compared: from :func:`helpers.judge.comparison.compare`.
    Returns:
        the methods that were added. The trivial rule is left out: it never changes.
    Raises:
        ValueError: as :func:`read`.
    """
    folder = Path(folder)
    known = set(read(folder).table["run"])
    added = []
    for result in sorted(compared.methods, key=_finished):
        run = _run_of(result)
        if result.method == ALWAYS or run in known:
            continue
        storage.write_bytes(folder / FOLDER / f"{run}.csv", (result.folder / results.PREDICTIONS).read_bytes())
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(_values(compared, result, run))
        journal.append_line(folder / FILE, line.getvalue(), header=",".join(COLUMNS))
        added.append(result.method)
    return added


def read(folder: Path | str) -> History:
    """Read ``history.csv``; a file that is not there is an empty history.

    Raises:
        ValueError: the file has other columns (it was written by another version); the message says what to do.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return History(Path(folder), pd.DataFrame(columns=list(COLUMNS)))
    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if header != ",".join(COLUMNS):
        raise ValueError(
            f"{path} has the columns {header[:200]!r}; this suite reads and writes {','.join(COLUMNS)!r}. "
            "It was written by another version: move it aside to start a new history."
        )
    rows, skipped = [], []
    for number, line in enumerate(lines, start=2):
        values = next(csv.reader([line]), [])
        row = dict(zip(COLUMNS, values))
        if len(values) == len(COLUMNS) and len(row["run"]) == _RUN_LENGTH:
            rows.append(row | {name: float(row[name] or "nan") for name in METRICS})
        elif line:
            skipped.append(f"line {number} of {path.name} is torn ({len(line)} characters): its writer was stopped")
    table = pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates("run")
    return History(Path(folder), table, tuple(skipped))


def _finished(result: MethodResult) -> float:
    return (result.folder / results.MANIFEST).stat().st_mtime


def _run_of(result: MethodResult) -> str:
    """Names an evaluation by its predictions, measured seconds included: the same run again gives another name."""
    return storage.sha256_file(result.folder / results.PREDICTIONS)[:_RUN_LENGTH]


def _values(compared: Comparison, result: MethodResult, run: str) -> list[Any]:
    look = numbers(compared.table)
    values = {
        "time": datetime.fromtimestamp(_finished(result), UTC).isoformat(timespec="seconds"),
        "method": result.method,
        "profile": compared.profile,
        "dataset_hash": result.dataset_hash,
        "checkpoint_hash": result.manifest["checkpoint_hash"],
        "settings_hash": storage.sha256_json(result.manifest["settings"])[:_RUN_LENGTH],
        "n_images": len(result.predictions),
        "n_anomalous": sum(p.sample.is_anomalous for p in result.predictions),
        "run": run,
    }
    for metric in METRICS:
        row = look.get((result.method, "all", "all", metric))
        values[metric] = "" if row is None else repr(float(row["value"]))
    return [values[name] for name in COLUMNS]


# ------------------------------------------------------------------------------------------------- falls


def changes(history: History) -> pd.DataFrame:
    """The last evaluation of every method against the one before and against its first, on the pictures both have.

    Ranking is tested for each painting (DeLong), verdicts over all (exact test of balanced accuracy); p-values are
    corrected over the tests of a method (Holm).

    Returns:
        one row per test: ``method, against, measure, category, then, now, p_holm, n_images, is_fall, sentence``.
        ``against`` is the time of the older evaluation. Evaluations whose predictions are gone have no row.
    """
    rows: list[dict[str, Any]] = []
    for _, runs in history.table.groupby(["method", "profile"], sort=False):
        last, *older = runs.to_dict("records")[::-1]
        mine = [row for then in _compared_with(older) for row in _tests(history.folder, last, then)]
        for row, p_holm in zip(mine, statistics.holm([row["p_value"] for row in mine]), strict=True):
            is_fall = bool(p_holm < ALPHA and row["now"] < row["then"])
            rows.append(row | {"p_holm": float(p_holm), "is_fall": is_fall})
    columns = ["method", "against", "measure", "category", "then", "now", "p_holm", "n_images", "is_fall", "sentence"]
    for row in rows:
        row["sentence"] = _sentence(row)
    return pd.DataFrame(rows, columns=columns).astype({"is_fall": bool})


def describe(history: History, changed: pd.DataFrame) -> str:
    """How many evaluations there are, and every fall, in sentences."""
    n = len(history.table)
    lines = [f"{n} evaluations of {history.table['method'].nunique()} methods in {history.folder / FILE}."]
    lines += [f"Left out: {reason}." for reason in history.skipped]
    falls = changed[changed["is_fall"]]
    if changed.empty:
        lines.append("No method was evaluated twice yet, so nothing can have fallen.")
    elif falls.empty:
        lines.append(f"No fall in {len(changed)} paired tests of {changed['method'].nunique()} methods.")
    return "\n".join([*lines, *(f"FALL: {sentence}" for sentence in falls["sentence"])])


def points(history: History, changed: pd.DataFrame, metric: str) -> list[figures.HistoryPoint]:
    """One metric of all evaluations, for :func:`helpers.judge.figures.history`."""
    fallen = set(changed.loc[changed["is_fall"], "method"])
    found = []
    for method, runs in history.table.groupby("method", sort=False):
        rows = runs.to_dict("records")
        for number, row in enumerate(rows, start=1):
            is_fall = method in fallen and number == len(rows)
            found.append(figures.HistoryPoint(method, number, row[metric], row["dataset_hash"], is_fall))
    return [point for point in found if math.isfinite(point.value)]


def _compared_with(older: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The previous evaluation and the first: the one shows a jump, the other a slow decline."""
    return [older[0], older[-1]] if len(older) > 1 else older


def _tests(folder: Path, last: dict[str, Any], then: dict[str, Any]) -> Iterator[dict[str, Any]]:
    both = _both(folder, last["run"], then["run"])
    if both is None or both.empty:
        return
    head = {"method": last["method"], "against": then["time"]}
    labels = both["is_anomalous"].to_numpy(bool)
    correct = [both[f"is_predicted_anomalous_{when}"].to_numpy(bool) == labels for when in ("now", "then")]
    test = comparison.balanced_accuracy_test(*correct, labels)
    found = [("balanced accuracy", "all", test)]
    for category, rows in both.groupby("category"):
        scores = [rows[f"anomaly_score_{when}"] for when in ("now", "then")]
        found.append(("AUROC", category, statistics.delong_paired(*scores, rows["is_anomalous"].to_numpy(bool))))
    for measure, category, test in found:
        if math.isfinite(test.p_value):
            yield head | {
                "measure": measure,
                "category": category,
                "then": test.value_b,
                "now": test.value_a,
                "p_value": test.p_value,
                "n_images": test.n_images,
            }


def _both(folder: Path, now: str, then: str) -> pd.DataFrame | None:
    """The pictures that both evaluations have with the same label; None when predictions are gone."""
    paths = [folder / FOLDER / f"{run}.csv" for run in (now, then)]
    if not all(path.exists() for path in paths):
        return None
    keys = ["sha256", "category", "is_anomalous"]
    columns = [*keys, "anomaly_score", "is_predicted_anomalous"]
    tables = [pd.read_csv(path, usecols=columns, float_precision="round_trip").drop_duplicates(keys) for path in paths]
    return tables[0].merge(tables[1], on=keys, suffixes=("_now", "_then"), validate="one_to_one")


def _sentence(row: dict[str, Any]) -> str:
    place = "" if row["category"] == "all" else f" on {category_label(row['category'])}"
    return (
        f"{method_label(row['method'])}{place}: {row['measure']} {row['then']:.3f} on {row['against'][:10]}, now "
        f"{row['now']:.3f}, on the {row['n_images']} pictures that both evaluations have (corrected p = "
        f"{row['p_holm']:.3g})."
    )
