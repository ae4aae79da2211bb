"""After a comparison: the history of evaluations (what is kept once, which falls are told from luck), and new pictures
in the inbox (each scored once, labels in the words of any dataset folder, bad ones named)."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_comparison as tiny

from helpers import data
from helpers.data import images
from helpers.judge import comparison, figures, history, inbox
from helpers.records import Scored

N = 3  # every test picture three times: 12 normal and 12 anomalous ones of each painting
GOOD = (1, 2, 3, 4, 5, 6, 7, 8) * N
BAD = (1, 2, 3, 4, 1, 2, 3, 4) * N


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), repeat=N)


def evaluate(dataset: data.Dataset, folder: Path, *rounds) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluations recorded in ``folder/history``, later ones finished later: the history and its changes."""
    for number, scores in enumerate(rounds):
        facts = dict.fromkeys(tiny.CATEGORIES, scores), dict.fromkeys(tiny.CATEGORIES, 4.5)
        run = tiny.write_result(folder / "r" / "clip_lof", dataset, "clip_lof", *facts, seconds=1 + number)
        os.utime(run / "manifest.json", (1_700_000_000 + 86_400 * number,) * 2)
        compared = comparison.compare(dataset, folder / "r", profile="mini")
        for _ in range(2):
            history.record(folder / "history", compared)
            assert len(list((folder / "history").iterdir())) == number + 1  # kept once
    kept = history.read(folder / "history")
    return kept, history.changes(kept)


def test_a_fall_is_named_and_ringed_on_the_pictures_of_both_and_a_torn_copy_is_named(dataset, tmp_path):
    kept, changed = evaluate(dataset, tmp_path, GOOD)
    assert kept.run.nunique() == 1 and len(kept) == 48 and set(kept.method) == {"clip_lof"}
    assert changed.empty and "No method was evaluated twice yet" in history.describe(kept, changed)
    assert history.points(kept, changed).empty  # one evaluation makes no figure
    kept, changed = evaluate(dataset, tmp_path / "2", GOOD, BAD)
    assert set(changed.measure) == {"balanced accuracy", "AUROC"} and changed.is_fall.all()
    words = history.describe(kept, changed)
    assert "FALL: CLIP LOF: balanced accuracy 1.000 on 2023-11-14, now 0.500, on the 48 pictures that both" in words
    assert "CLIP LOF on Harbour: AUROC 1.000" in words
    points = history.points(kept, changed)
    assert points[points.panel == "AUROC"].ring.tolist() == [False, True]
    ringed = history.points(kept, changed.assign(is_fall=changed.measure == "AUROC"))
    assert set(ringed.panel[ringed.ring]) == {"AUROC"}  # a ring stands in the panel of its measure
    assert len(figures.lines(points, title="t", x_label="evaluation").axes) == 2
    path = sorted((tmp_path / "2" / "history").glob("*.csv"))[0]
    table = pd.read_csv(path)
    table.loc[0, "is_anomalous"] = not table.loc[0, "is_anomalous"]  # another label: not the same question
    table.iloc[:-8].to_csv(path, index=False)
    assert history.changes(history.read(path.parent)).iloc[0].n_images == 48 - 8 - 1
    path.write_text("torn")
    kept = history.read(path.parent)
    assert kept.run.nunique() == 1 and path.name in history.describe(kept, history.changes(kept))


def test_a_slow_decline_shows_against_the_first(dataset, tmp_path):
    """Each step loses three pictures of each painting: too few for a test, all together are not."""
    steps = [[1 if i % 8 > 3 and i // 8 + 3 * (i % 8 - 4) < 3 * number else s for i, s in enumerate(GOOD)]
             for number in (0, 1, 3, 4)]  # fmt: skip
    _, changed = evaluate(dataset, tmp_path, *steps)
    previous, first = changed[changed.measure == "balanced accuracy"].itertuples()
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


def drop(folder: Path, **scores: int) -> None:
    """Pictures whose red value is their score; ``__`` in a name stands for a slash."""
    for name, score in scores.items():
        images.save_png(folder / f"{name.replace('__', '/')}.png", np.full((20, 30, 3), score, np.uint8))


def look(folder: Path, dataset, detector: str = "d1"):
    """Rows, sentences, and the scores that were asked for."""
    asked = []

    def score(category, pictures):
        asked.extend(float(picture[0, 0, 0]) for picture in pictures)
        return [Scored(one) for one in asked[-len(pictures) :]]

    normal = {category: range(1, 20) for category in dataset.categories}
    return *inbox.score_new(folder, dataset, detector=detector, score=score, normal_scores=normal), asked


def test_only_new_pictures_are_scored_and_labels_are_understood(dataset, tmp_path):
    drop(tmp_path, harbour__genuine__a=5, harbour__box__b=90, portrait__c=7)
    first, left_out, asked = look(tmp_path, dataset)
    assert sorted(asked) == [5, 7, 90] and not left_out and set(first.threshold) == {19.0}
    rows = first.set_index("image_path")
    assert rows.label.to_dict() == {"harbour/genuine/a.png": "genuine", "harbour/box/b.png": "anomalous",
                                    "portrait/c.png": ""}  # fmt: skip
    assert rows.is_predicted_anomalous["harbour/box/b.png"] and rows.p_value["harbour/box/b.png"] == 1 / 20
    drop(tmp_path, harbour__good__d=25, harbour__good__e=25)  # a copy
    second, _, asked = look(tmp_path, dataset)
    assert asked == [25] and second.is_new.sum() == 1
    assert inbox.describe(second, []) == "1 new pictures scored, 4 in all; of 3 with a label 2 were called rightly."
    assert not look(tmp_path, dataset)[0].is_new.any()
    assert look(tmp_path, dataset, "d2")[0].is_new.sum() == 4  # another detector scores all again


def test_folders_are_understood_as_everywhere_and_what_cannot_be_scored_is_named_and_stops_nothing(dataset, tmp_path):
    places = ("Good", "non_anomaly", "normal", "fake", "good_2", "masks", "@eaDir", ".ipynb_checkpoints")
    drop(tmp_path, **{f"Harbour__{place}__a": score for score, place in enumerate(places)}, sunflowers__1=1)
    (tmp_path / "Harbour" / "._4.png").write_bytes(b"such files lie beside pictures that come from a Mac")
    (tmp_path / "Harbour" / "2.png").write_bytes(b"")
    known = dataset.select(split="train", category="harbour")[0]
    (tmp_path / "Harbour" / "3.png").write_bytes(known.image_path.read_bytes())
    scored, left_out, _ = look(tmp_path, dataset)
    assert list(scored.sort_values("anomaly_score").label) == ["genuine", "genuine", "genuine", "anomalous"]
    words = inbox.describe(scored, left_out)
    assert len(left_out) == 4 and "good_2" in words and "Harbour/2.png: " in words
    assert "sunflowers/1.png: the dataset has no painting 'sunflowers'" in words
    assert "Harbour/3.png: it is a picture of the dataset, split train" in words
