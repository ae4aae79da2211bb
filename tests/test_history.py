"""The history of evaluations: what is kept once, and which falls are told from luck."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_comparison as tiny

from helpers import data
from helpers.judge import comparison, figures, history

N = 3  # every test picture three times: 12 normal and 12 anomalous ones of each painting
GOOD = (1, 2, 3, 4, 5, 6, 7, 8) * N
BAD = (1, 2, 3, 4, 1, 2, 3, 4) * N
THRESHOLDS = dict.fromkeys(tiny.CATEGORIES, 4.5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), repeat=N)


def evaluate(dataset: data.Dataset, folder: Path, scores=GOOD, number: int = 0) -> list[str]:
    """One evaluation, recorded in ``folder/history``; later numbers finish later."""
    scores = dict.fromkeys(tiny.CATEGORIES, scores)
    run = tiny.write_result(folder / "r" / "clip_lof", dataset, "clip_lof", scores, THRESHOLDS, seconds=1 + number)
    when = 1_700_000_000 + 86_400 * number
    os.utime(run / "manifest.json", (when, when))
    return history.record(folder / "history", comparison.compare(dataset, folder / "r", profile="mini"))


def test_an_evaluation_is_kept_once_with_its_predictions(dataset, tmp_path):
    assert evaluate(dataset, tmp_path) == ["clip_lof"]
    assert evaluate(dataset, tmp_path) == []
    kept = history.read(tmp_path / "history")
    assert kept.run.nunique() == 1 and len(kept) == 48 and set(kept.method) == {"clip_lof"}
    changed = history.changes(kept)
    assert changed.empty and "No method was evaluated twice yet" in history.describe(kept, changed)
    assert history.points(kept, changed).empty  # one evaluation makes no figure


def test_a_fall_is_named_with_both_numbers_and_ringed(dataset, tmp_path):
    for number, scores in enumerate((GOOD, BAD)):
        evaluate(dataset, tmp_path, scores, number)
    kept = history.read(tmp_path / "history")
    changed = history.changes(kept)
    assert set(changed.measure) == {"balanced accuracy", "AUROC"} and changed.is_fall.all()
    words = history.describe(kept, changed)
    assert "FALL: CLIP LOF: balanced accuracy 1.000 on 2023-11-14, now 0.500, on the 48 pictures that both" in words
    assert "CLIP LOF on Harbour: AUROC 1.000" in words
    points = history.points(kept, changed)
    assert points[points.panel == "AUROC"].ring.tolist() == [False, True]
    only_auroc = changed.assign(is_fall=changed.is_fall & (changed.measure == "AUROC"))
    ringed = history.points(kept, only_auroc)
    assert set(ringed.panel[ringed.ring]) == {"AUROC"}  # a ring stands in the panel of its measure
    assert len(figures.lines(points, title="t", x_label="evaluation").axes) == 2


def test_a_slow_decline_shows_against_the_first(dataset, tmp_path):
    """Each step loses three pictures of each painting: too few for a test, all together are not."""
    for number in range(5):
        scores = [1 if i % 8 > 3 and i // 8 + 3 * (i % 8 - 4) < 3 * number else s for i, s in enumerate(GOOD)]
        evaluate(dataset, tmp_path, tuple(scores), number)
    changed = history.changes(history.read(tmp_path / "history"))
    previous, first = (row for row in changed[changed.measure == "balanced accuracy"].itertuples())
    assert first.value_b == 1.0 and first.is_fall and not previous.is_fall
    assert first.value_a < previous.value_b < 1.0


def test_only_pictures_of_both_evaluations_are_compared_and_a_torn_copy_is_named(dataset, tmp_path):
    for number, scores in enumerate((GOOD, BAD)):
        evaluate(dataset, tmp_path, scores, number)
    path = sorted((tmp_path / "history").glob("*.csv"))[0]
    table = pd.read_csv(path)
    table.loc[0, "is_anomalous"] = not table.loc[0, "is_anomalous"]  # another label: not the same question
    table.iloc[:-8].to_csv(path, index=False)
    changed = history.changes(history.read(tmp_path / "history"))
    assert changed.iloc[0].n_images == 48 - 8 - 1
    path.write_text("torn")
    kept = history.read(tmp_path / "history")
    assert kept.run.nunique() == 1 and path.name in history.describe(kept, history.changes(kept))


def test_false_falls_are_rare_over_the_whole_report():
    """Unchanged quality, seven methods with two older evaluations: one Holm family keeps false alarms of the report."""
    rng, n_reports, n_false = np.random.default_rng(0), 60, 0
    labels = np.repeat([True, False], [68, 32])
    facts = pd.DataFrame({"sha256": np.arange(100).astype(str), "category": "harbour", "is_anomalous": labels})
    for _ in range(n_reports):
        frames = []
        for method in range(7):
            shared = rng.normal(size=100)
            for run in range(3):
                scores = 0.84 * shared + 0.55 * rng.normal(size=100) + 1.8 * labels
                frames.append(facts.assign(series=str(method), method="clip_lof", run=str(run), time=str(run),
                                           anomaly_score=scores, is_predicted_anomalous=scores > 1.6))  # fmt: skip
        n_false += history.changes(pd.concat(frames)).is_fall.any()
    assert n_false / n_reports <= 0.1
