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


def drop(folder: Path, **scores: int) -> None:
    """Pictures whose red value is their score; ``__`` in a name stands for a slash."""
    for name, score in scores.items():
        images.save_png(folder / f"{name.replace('__', '/')}.png", np.full((20, 30, 3), score, np.uint8))


def look(folder: Path, dataset, detector: str = "d1"):
    """Rows, sentences, and the scores that were asked for."""
    asked = []

    def score(category, pictures):
        found = [float(picture[0, 0, 0]) for picture in pictures]
        asked.extend(found)
        return [Scored(one) for one in found]

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


def test_what_cannot_be_scored_is_named_and_stops_nothing(dataset, tmp_path):
    drop(tmp_path, sunflowers__1=1, harbour__4=4)
    (tmp_path / "harbour" / "._4.png").write_bytes(b"such files lie beside pictures that come from a Mac")
    (tmp_path / "harbour" / "2.png").write_bytes(b"")
    known = dataset.select(split="train", category="harbour")[0]
    (tmp_path / "harbour" / "3.png").write_bytes(known.image_path.read_bytes())
    found, left_out, asked = look(tmp_path, dataset)
    words = inbox.describe(found, left_out)
    assert asked == [4] and len(left_out) == 3
    assert "sunflowers/1.png: the dataset has no painting 'sunflowers'" in words and "harbour/2.png: " in words
    assert "harbour/3.png: it is a picture of the dataset, split train" in words


def test_folders_are_understood_as_everywhere(dataset, tmp_path):
    places = ("Good", "non_anomaly", "normal", "fake", "good_2", "masks", "@eaDir", ".ipynb_checkpoints")
    drop(tmp_path, **{f"Harbour__{place}__a": score for score, place in enumerate(places)})
    scored, left_out, _ = look(tmp_path, dataset)
    assert list(scored.sort_values("anomaly_score").label) == ["genuine", "genuine", "genuine", "anomalous"]
    assert len(left_out) == 1 and "good_2" in left_out[0]
