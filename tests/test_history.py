"""The history of evaluations: what is appended once, what survives, and which falls are told from luck."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_comparison as tiny

from helpers.data import manifest as data
from helpers.judge import _old_figures as figures
from helpers.judge import comparison, history

N = 3  # every test picture three times: 12 normal and 12 anomalous ones of each painting
GOOD = (1, 2, 3, 4, 5, 6, 7, 8) * N
BAD = (1, 2, 3, 4, 1, 2, 3, 4) * N
THRESHOLDS = dict.fromkeys(tiny.CATEGORIES, 4.5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), repeat=N)


def evaluate(dataset: data.Dataset, results_dir: Path, scores=GOOD, seconds: float = 0.5) -> comparison.Comparison:
    scores = dict.fromkeys(tiny.CATEGORIES, scores)
    tiny.write_result(results_dir / "clip_lof", dataset, "clip_lof", scores, THRESHOLDS, seconds=seconds)
    return comparison.compare(dataset, results_dir, profile="mini")


@pytest.fixture(scope="module")
def fallen(dataset, tmp_path_factory) -> Path:
    """A good evaluation and then a bad one."""
    folder = tmp_path_factory.mktemp("report")
    for scores in (GOOD, BAD):
        history.record(folder, evaluate(dataset, tmp_path_factory.mktemp("results"), scores))
    return folder


def test_an_evaluation_is_appended_once_with_its_numbers_and_predictions(dataset, tmp_path):
    compared = evaluate(dataset, tmp_path / "results")
    assert history.record(tmp_path, compared) == ["clip_lof"]
    assert history.record(tmp_path, compared) == []
    table = history.read(tmp_path).table
    (row,) = table.to_dict("records")
    assert (row["method"], row["profile"], row["dataset_hash"]) == ("clip_lof", "mini", dataset.hash)
    assert (row["image_auroc"], row["balanced_accuracy"], row["n_images"]) == (1.0, 1.0, "48")
    assert np.isnan(row["answer_accuracy"])
    kept = tmp_path / "history" / f"{row['run']}.csv"
    assert kept.read_bytes() == (tmp_path / "results" / "clip_lof" / "predictions.csv").read_bytes()
    history.record(tmp_path, evaluate(dataset, tmp_path / "results", seconds=0.7))
    assert len(history.read(tmp_path).table) == 2
    lines = (tmp_path / history.FILE).read_text()
    (tmp_path / history.FILE).write_text(lines + lines.splitlines()[1] + "\n")  # two sessions wrote it at once
    assert len(history.read(tmp_path).table) == 2


def test_a_fall_is_named_with_both_numbers(fallen):
    kept = history.read(fallen)
    changed = history.changes(kept)
    assert set(changed["measure"]) == {"balanced accuracy", "AUROC"}
    assert changed["is_fall"].all()
    row = changed[changed["measure"] == "balanced accuracy"].iloc[0]
    assert (row["then"], row["now"], row["n_images"]) == (1.0, 0.5, 48)
    words = history.describe(kept, changed)
    assert "FALL: CLIP LOF: balanced accuracy 1.000 on " in words
    assert ", now 0.500, on the 48 pictures that both evaluations have" in words
    assert "CLIP LOF on Harbour: AUROC 1.000" in words


def test_a_rise_and_a_repetition_are_no_falls(dataset, tmp_path):
    for number, scores in enumerate((BAD, GOOD, GOOD)):
        history.record(tmp_path, evaluate(dataset, tmp_path / "results", scores, seconds=1 + number))
    kept = history.read(tmp_path)
    changed = history.changes(kept)
    assert not changed["is_fall"].any()
    assert len(changed) == 6  # against the previous and against the first
    assert "No fall in 6 paired tests of 1 methods" in history.describe(kept, changed)


def test_a_slow_decline_shows_against_the_first(dataset, tmp_path):
    """Each step loses three pictures of each painting: too few for a test, all together are not."""
    for number in range(5):
        scores = [1 if i % 8 > 3 and i // 8 + 3 * (i % 8 - 4) < 3 * number else s for i, s in enumerate(GOOD)]
        history.record(tmp_path, evaluate(dataset, tmp_path / "results", tuple(scores), seconds=1 + number))
    changed = history.changes(history.read(tmp_path))
    rates = changed[changed["measure"] == "balanced accuracy"]
    previous, first = rates.iloc[0], rates.iloc[1]
    assert first["then"] == 1.0 and first["is_fall"]
    assert first["now"] < previous["then"] < 1.0 and not previous["is_fall"]


def test_only_pictures_of_both_evaluations_are_compared(dataset, fallen, tmp_path):
    shutil.copytree(fallen, tmp_path / "report")
    first = history.read(tmp_path / "report").table["run"].iloc[0]
    path = tmp_path / "report" / "history" / f"{first}.csv"
    table = pd.read_csv(path)
    table.loc[0, "is_anomalous"] = not table.loc[0, "is_anomalous"]  # another label: not the same question
    table.iloc[:-8].to_csv(path, index=False)
    changed = history.changes(history.read(tmp_path / "report"))
    assert changed.iloc[0]["n_images"] == 48 - 8 - 1
    path.unlink()
    assert history.changes(history.read(tmp_path / "report")).empty


@pytest.mark.parametrize("cut", [1, 30, 5])
def test_a_torn_line_is_reported_and_costs_nothing_else(dataset, tmp_path, cut):
    compared = evaluate(dataset, tmp_path / "results")
    history.record(tmp_path, compared)
    path = tmp_path / history.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: -cut - 1])
    kept = history.read(tmp_path)
    assert kept.table.empty
    assert "line 2 of history.csv is torn" in kept.skipped[0]
    history.record(tmp_path, compared)
    kept = history.read(tmp_path)
    assert len(kept.table) == len(kept.skipped) == 1
    assert "Left out: line 2" in history.describe(kept, history.changes(kept))


def test_another_version_is_refused(dataset, tmp_path):
    (tmp_path / history.FILE).write_text("time,method\n")
    with pytest.raises(ValueError, match="another version: move it aside"):
        history.record(tmp_path, evaluate(dataset, tmp_path / "results"))
    assert (tmp_path / history.FILE).read_text() == "time,method\n"


def test_no_history_is_an_empty_one(tmp_path):
    kept = history.read(tmp_path)
    changed = history.changes(kept)
    assert kept.table.empty and changed.empty
    assert "No method was evaluated twice yet" in history.describe(kept, changed)


def test_figure_joins_one_dataset_and_rings_the_fall(fallen):
    kept = history.read(fallen)
    points = history.points(kept, history.changes(kept), "balanced_accuracy")
    assert [(point.number, point.value, point.is_fall) for point in points] == [(1, 1.0, False), (2, 0.5, True)]
    other = figures.HistoryPoint("clip_lof", 3, 0.7, "another dataset")
    fig = figures.history({"balanced accuracy": [*points, other]}, title="A finding")
    drawn = [(list(line.get_xdata()), line.get_marker()) for line in fig.axes[0].lines]
    assert [x for x, _ in drawn] == [[1, 2], [3], [2]]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["CLIP LOF"]
