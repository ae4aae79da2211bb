"""New pictures in a folder: each scored once, bad ones named, torn lines harmless."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_comparison as tiny

from helpers import files as storage
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import inbox
from helpers.records import Prediction


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


class Scorer:
    """Scores the number in the file name, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, samples):
        for sample in samples:
            self.asked.append(sample.image_path.name)
            yield Prediction(sample, float(sample.image_path.stem), threshold=10.0, p_value=0.5)


def drop(folder: Path, place: str, seed: int) -> Path:
    images.save_png(folder / place, tiny.picture(seed))
    return folder / place


def look(folder: Path, dataset, score, **changes) -> inbox.Round:
    return inbox.look(folder, dataset, **({"method": "clip_lof", "detector": "d1", "score": score} | changes))


def test_only_new_hashes_are_scored(dataset, tmp_path):
    score = Scorer()
    drop(tmp_path, "harbour/good/5.png", 100)
    drop(tmp_path, "harbour/box/15.png", 101)
    drop(tmp_path, "portrait/7.png", 102)
    first = look(tmp_path, dataset, score)
    assert score.asked == ["15.png", "5.png", "7.png"]
    assert first.new["kind"].tolist() == ["box", "good", ""]
    assert first.new["is_predicted_anomalous"].tolist() == [True, False, False]
    assert first.new["anomaly_score"].tolist() == [15.0, 5.0, 7.0]
    assert set(first.new["threshold"]) == {10.0} and set(first.new["p_value"]) == {0.5}
    assert first.describe() == "3 new pictures scored, 3 in all; of 2 with a label 2 were called rightly."
    drop(tmp_path, "harbour/good/25.png", 103)
    drop(tmp_path, "harbour/good/26.png", 103)  # a copy
    second = look(tmp_path, dataset, score)
    assert score.asked[3:] == ["25.png"]
    assert (len(second.new), len(second.all)) == (1, 4)
    assert second.describe() == "1 new pictures scored, 4 in all; of 3 with a label 2 were called rightly."
    assert look(tmp_path, dataset, score).new.empty
    drop(tmp_path, "harbour/good/5.png", 104)  # the same name, another picture
    look(tmp_path, dataset, score)
    assert score.asked[4:] == ["5.png"]


def test_another_detector_scores_everything_again(dataset, tmp_path):
    drop(tmp_path, "harbour/good/5.png", 100)
    for changes in ({}, {"detector": "d2"}, {"method": "anomalyclip"}):
        score = Scorer()
        found = look(tmp_path, dataset, score, **changes)
        assert score.asked == ["5.png"]
        assert len(found.all) == 1


def test_what_cannot_be_scored_is_named_and_stops_nothing(dataset, tmp_path):
    score = Scorer()
    drop(tmp_path, "sunflowers/1.png", 100)
    (tmp_path / "harbour").mkdir()
    (tmp_path / "harbour" / "2.png").write_bytes(b"")
    known = dataset.select(split="train", category="harbour")[0]
    (tmp_path / "harbour" / "3.png").write_bytes(known.image_path.read_bytes())
    (tmp_path / "harbour" / "notes.txt").write_text("no picture")
    drop(tmp_path, "harbour/._4.png", 102)  # such files lie beside pictures that come from a Mac
    drop(tmp_path, "harbour/4.png", 101)
    found = look(tmp_path, dataset, score)
    assert score.asked == ["4.png"]
    words = found.describe()
    assert "sunflowers/1.png: the dataset has no painting 'sunflowers'" in words
    assert "harbour/2.png: " in words
    assert "harbour/3.png: it is a picture of the dataset, split train" in words
    assert len(found.left_out) == 3


def test_an_interrupted_look_goes_on_where_it_stopped(dataset, tmp_path):
    for number in range(3):
        drop(tmp_path, f"harbour/{number}.png", 100 + number)

    def dies(samples):
        yield from list(Scorer()(samples))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(tmp_path, dataset, dies)
    path = tmp_path / inbox.SCORES
    path.write_bytes(path.read_bytes()[:-20])  # and the second line did not reach the disk
    score = Scorer()
    found = look(tmp_path, dataset, score)
    assert score.asked == ["1.png", "2.png"]
    assert sorted(found.all["image_path"]) == ["harbour/0.png", "harbour/1.png", "harbour/2.png"]


def test_a_missing_folder_and_another_version_are_named(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder for each painting"):
        look(tmp_path / "none", dataset, Scorer())
    (tmp_path / inbox.SCORES).write_text("a,b\n")
    with pytest.raises(ValueError, match="Move it aside"):
        look(tmp_path, dataset, Scorer())


def test_a_trial_inbox_is_half_damaged_and_the_same_each_time(dataset, tmp_path):
    normals = dataset.select(split="train", category="harbour")
    hashes = []
    for name in "ab":
        written = inbox.fill(tmp_path / name, normals, n=2, seed=1)
        assert [path.parent.name == "good" for path in written] == [True, False]
        assert {path.parent.parent.name for path in written} == {"harbour"}
        hashes.append([storage.sha256_file(path) for path in written])
    assert hashes[0] == hashes[1]
