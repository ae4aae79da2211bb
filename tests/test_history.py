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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), repeat=N)


def evaluate(dataset: data.Dataset, folder: Path, *rounds) -> list[str]:
    """Evaluations recorded in ``folder/history``, later ones finished later; the methods added by the last one."""
    for number, scores in enumerate(rounds):
        facts = dict.fromkeys(tiny.CATEGORIES, scores), dict.fromkeys(tiny.CATEGORIES, 4.5)
        run = tiny.write_result(folder / "r" / "clip_lof", dataset, "clip_lof", *facts, seconds=1 + number)
        os.utime(run / "manifest.json", (1_700_000_000 + 86_400 * number,) * 2)
        compared = comparison.compare(dataset, folder / "r", profile="mini")
        added = history.record(folder / "history", compared)
    return added


def test_an_evaluation_is_kept_once_with_its_predictions(dataset, tmp_path):
    assert evaluate(dataset, tmp_path, GOOD) == ["clip_lof"]
    assert evaluate(dataset, tmp_path, GOOD) == []
    kept = history.read(tmp_path / "history")
    assert kept.run.nunique() == 1 and len(kept) == 48 and set(kept.method) == {"clip_lof"}
    changed = history.changes(kept)
    assert changed.empty and "No method was evaluated twice yet" in history.describe(kept, changed)
    assert history.points(kept, changed).empty  # one evaluation makes no figure


def test_a_fall_is_named_and_ringed_on_the_pictures_of_both_and_a_torn_copy_is_named(dataset, tmp_path):
    evaluate(dataset, tmp_path, GOOD, BAD)
    kept = history.read(tmp_path / "history")
    changed = history.changes(kept)
    assert set(changed.measure) == {"balanced accuracy", "AUROC"} and changed.is_fall.all()
    words = history.describe(kept, changed)
    assert "FALL: CLIP LOF: balanced accuracy 1.000 on 2023-11-14, now 0.500, on the 48 pictures that both" in words
    assert "CLIP LOF on Harbour: AUROC 1.000" in words
    points = history.points(kept, changed)
    assert points[points.panel == "AUROC"].ring.tolist() == [False, True]
    ringed = history.points(kept, changed.assign(is_fall=changed.measure == "AUROC"))
    assert set(ringed.panel[ringed.ring]) == {"AUROC"}  # a ring stands in the panel of its measure
    assert len(figures.lines(points, title="t", x_label="evaluation").axes) == 2
    path = sorted((tmp_path / "history").glob("*.csv"))[0]
    table = pd.read_csv(path)
    table.loc[0, "is_anomalous"] = not table.loc[0, "is_anomalous"]  # another label: not the same question
    table.iloc[:-8].to_csv(path, index=False)
    assert history.changes(history.read(tmp_path / "history")).iloc[0].n_images == 48 - 8 - 1
    path.write_text("torn")
    kept = history.read(tmp_path / "history")
    assert kept.run.nunique() == 1 and path.name in history.describe(kept, history.changes(kept))


def test_a_slow_decline_shows_against_the_first(dataset, tmp_path):
    """Each step loses three pictures of each painting: too few for a test, all together are not."""
    steps = [[1 if i % 8 > 3 and i // 8 + 3 * (i % 8 - 4) < 3 * number else s for i, s in enumerate(GOOD)]
             for number in range(5)]  # fmt: skip
    evaluate(dataset, tmp_path, *steps)
    changed = history.changes(history.read(tmp_path / "history"))
    previous, first = (row for row in changed[changed.measure == "balanced accuracy"].itertuples())
    assert first.value_b == 1.0 and first.is_fall and not previous.is_fall
    assert first.value_a < previous.value_b < 1.0


def test_false_falls_are_rare_over_the_whole_report():
    """Unchanged quality, seven methods with two older evaluations: one Holm family keeps false alarms of the report."""
    rng, labels, n_false = np.random.default_rng(0), np.repeat([True, False], [68, 32]), 0
    facts = pd.DataFrame({"sha256": np.arange(100).astype(str), "category": "harbour", "is_anomalous": labels})
    for _ in range(25):
        frames = []
        for method in range(7):
            shared = rng.normal(size=100)
            for run in range(3):
                scores = 0.84 * shared + 0.55 * rng.normal(size=100) + 1.8 * labels
                given = {"anomaly_score": scores, "is_predicted_anomalous": scores > 1.6, "run": str(run)}
                frames.append(facts.assign(series=str(method), method="clip_lof", **given))
        n_false += history.changes(pd.concat(frames)).is_fall.any()
    assert n_false / 25 <= 0.1
