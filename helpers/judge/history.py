"""Every finished evaluation (a copy of its predictions, named by profile, method, time and content), and falls in
quality that are more than luck, on the pictures that two evaluations share."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from helpers import files, results
from helpers.judge import metrics, statistics
from helpers.judge.comparison import Comparison
from helpers.judge.findings import say

_KEYS = ["sha256", "category", "is_anomalous"]


def record(folder: Path, compared: Comparison) -> None:
    """Keep the evaluations that ``folder`` (``profile.report_dir / "history"``) does not have yet."""
    for method, run in compared.runs.items():
        source = run.folder / results.PREDICTIONS
        content = files.sha256_file(source)[:16]
        if not list(Path(folder).glob(f"*__*_{content}.csv")):
            finished = datetime.fromtimestamp((run.folder / results.MANIFEST).stat().st_mtime, UTC)
            name = f"{compared.profile}.{method}__{finished:%Y-%m-%dT%H%M%S}_{content}.csv"
            files.write_bytes(Path(folder) / name, source.read_bytes())


def read(folder: Path) -> pd.DataFrame:
    """All predictions of all evaluations, with ``series`` (profile and method), ``method`` and ``run`` (time); copies
    that cannot be read are left out and named in ``frame.attrs["skipped"]``."""
    frames, skipped = [pd.DataFrame(columns=["series", "method", "run", *_KEYS])], []
    types = {"is_anomalous": bool, "is_predicted_anomalous": bool, "anomaly_score": float}
    for path in sorted(Path(folder).glob("*__*.csv")):
        series, _, run = path.stem.partition("__")
        try:
            frame = pd.read_csv(path).drop_duplicates(_KEYS).astype(types)
            frames.append(frame.assign(series=series, method=series.partition(".")[2], run=run))
        except (ValueError, KeyError) as error:
            skipped.append(f"{path.name}: {error}")
    history = pd.concat(frames[1:] or frames, ignore_index=True)
    history.attrs["skipped"] = skipped
    return history


def changes(history: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of each method (``value_a``) against the one before and its first (``value_b``): ranking for
    each painting (DeLong), verdicts over all (exact test of balanced accuracy). P-values are corrected (Holm) over
    *all* tests of the report: one false alarm among many methods is still one."""
    rows = []
    for _, runs in history.groupby("series", sort=False):
        last, *older = sorted(runs.run.unique(), reverse=True)
        for then in dict.fromkeys(older[:1] + older[-1:]):
            both = runs[runs.run == last].merge(runs[runs.run == then], on=_KEYS, suffixes=("", "_then"))
            labels = both.is_anomalous.to_numpy(bool)
            verdicts = both.is_predicted_anomalous, both.is_predicted_anomalous_then
            right = [said.to_numpy(bool) == labels for said in verdicts]
            tests = {("balanced accuracy", "all"): statistics.accuracy_test(*right, labels)}
            for category, part in both.groupby("category"):
                scores = part.anomaly_score, part.anomaly_score_then
                tests["AUROC", category] = statistics.delong_paired(*scores, part.is_anomalous.to_numpy(bool))
            head = {"method": runs.method.iloc[0], "against": then[:10]}
            rows += [head | {"measure": m, "category": c, **vars(test)} for (m, c), test in tests.items()]
    names = "method against measure category value_a value_b difference p_value n_images".split()
    table = pd.DataFrame(rows, columns=names).dropna(subset="p_value", ignore_index=True)
    table["p_holm"] = statistics.holm(table.p_value.astype(float))
    return table.assign(is_fall=(table.p_holm < 0.05) & (table.difference < 0))


def describe(history: pd.DataFrame, changed: pd.DataFrame) -> str:
    """How many evaluations there are, and every fall, in sentences."""
    counts = {"n_runs": history.run.nunique(), "n_methods": history.method.nunique(), "n_tests": len(changed)}
    skipped, falls = history.attrs.get("skipped", ()), changed[changed.is_fall].to_dict("records")
    return "\n".join(say("history", skipped=skipped, falls=falls, n_tested=changed.method.nunique(), **counts))


def points(history: pd.DataFrame, changed: pd.DataFrame) -> pd.DataFrame:
    """Each method by evaluation for :func:`helpers.judge.figures.lines`; empty until a method was evaluated twice.
    Evaluations on different pictures are not joined; a fall is ringed in the panel of its own measure."""
    rows = []
    for _, runs in history.groupby("series", sort=False):
        method, each = runs.method.iloc[0], list(runs.groupby("run"))
        fallen = set(changed.measure[(changed.method == method) & changed.is_fall])
        for number, (_, run) in enumerate(each, start=1):
            right = run.is_predicted_anomalous == run.is_anomalous
            paintings = [metrics.image_auroc(p.anomaly_score, p.is_anomalous) for _, p in run.groupby("category")]
            measured = {"AUROC": pd.Series(paintings), "balanced accuracy": right.groupby(run.is_anomalous).mean()}
            head = {"series": method, "x": number, "part": ",".join(sorted(run.sha256))}
            for measure, values in measured.items():
                ring = number == len(each) and measure in fallen
                rows.append(head | {"panel": measure, "value": values.mean(), "ring": ring})
    found = pd.DataFrame(rows, columns=["series", "x", "part", "panel", "value", "ring"]).dropna(subset="value")
    return found if (found.x > 1).any() else found.iloc[:0]
