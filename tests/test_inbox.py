"""New pictures in a folder: each scored once, labels in the words of any dataset folder, bad ones named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_comparison as tiny

from helpers import data
from helpers.data import images
from helpers.judge import inbox
from helpers.records import Scored


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


class Scorer:
    """Scores the red value of the first pixel, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, category, pictures):
        found = [float(picture[0, 0, 0]) for picture in pictures]
        self.asked += found
        return [Scored(score) for score in found]


def drop(folder: Path, place: str, score: int) -> Path:
    images.save_png(folder / place, np.full((20, 30, 3), score, np.uint8))
    return folder / place


def look(folder: Path, dataset, score, **changes):
    normal = {category: range(1, 20) for category in dataset.categories}
    given = {"detector": "d1", "score": score, "normal_scores": normal} | changes
    return inbox.score_new(folder, dataset, **given)


def test_only_new_pictures_are_scored_and_labels_are_understood(dataset, tmp_path):
    score = Scorer()
    drop(tmp_path, "harbour/genuine/a.png", 5)
    drop(tmp_path, "harbour/box/b.png", 90)
    drop(tmp_path, "portrait/c.png", 7)
    first, left_out = look(tmp_path, dataset, score)
    assert sorted(score.asked) == [5, 7, 90] and not left_out
    by_name = first.set_index("image_path")
    assert by_name.label.to_dict() == {"harbour/genuine/a.png": "genuine", "harbour/box/b.png": "anomalous",
                                       "portrait/c.png": ""}  # fmt: skip
    assert by_name.is_predicted_anomalous.to_dict()["harbour/box/b.png"] and set(first.threshold) == {19.0}
    assert by_name.p_value["harbour/box/b.png"] == pytest.approx(1 / 20)
    drop(tmp_path, "harbour/good/d.png", 25)
    drop(tmp_path, "harbour/good/e.png", 25)  # a copy
    second, _ = look(tmp_path, dataset, score)
    assert score.asked[3:] == [25] and second.is_new.sum() == 1
    assert inbox.describe(second, []) == "1 new pictures scored, 4 in all; of 3 with a label 2 were called rightly."
    assert not look(tmp_path, dataset, score)[0].is_new.any()
    assert look(tmp_path, dataset, score, detector="d2")[0].is_new.sum() == 4  # another detector scores all again


def test_what_cannot_be_scored_is_named_and_stops_nothing(dataset, tmp_path):
    score = Scorer()
    drop(tmp_path, "sunflowers/1.png", 1)
    drop(tmp_path, "harbour/._4.png", 4)  # such files lie beside pictures that come from a Mac
    drop(tmp_path, "harbour/4.png", 4)
    (tmp_path / "harbour" / "2.png").write_bytes(b"")
    known = dataset.select(split="train", category="harbour")[0]
    (tmp_path / "harbour" / "3.png").write_bytes(known.image_path.read_bytes())
    found, left_out = look(tmp_path, dataset, score)
    words = inbox.describe(found, left_out)
    assert score.asked == [4] and len(left_out) == 3
    assert "sunflowers/1.png: the dataset has no painting 'sunflowers'" in words and "harbour/2.png: " in words
    assert "harbour/3.png: it is a picture of the dataset, split train" in words
    with pytest.raises(FileNotFoundError, match="a folder for each painting"):
        look(tmp_path / "none", dataset, score)


def test_folders_are_understood_as_everywhere(dataset, tmp_path):
    places = ("Good", "non_anomaly", "normal", "fake", "good_2", "masks", "@eaDir", ".ipynb_checkpoints")
    for score, place in enumerate(places):
        drop(tmp_path, f"Harbour/{place}/a.png", score)
    scored, left_out = look(tmp_path, dataset, Scorer())
    assert list(scored.sort_values("anomaly_score").label) == ["genuine", "genuine", "genuine", "anomalous"]
    assert len(left_out) == 1 and "good_2" in left_out[0]
