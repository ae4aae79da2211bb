"""Tests of AnomalyGPT on a tiny dataset: numbers, answers, controls, what an interruption costs, few pictures."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_anomalygpt as tiny

from helpers import data
from helpers.anomalygpt import conversations
from helpers.anomalygpt import evaluation as te
from helpers.data import images, mask_of
from helpers.judge import metrics
from helpers.synthesis import rng_for

SMALL = te.EvaluationSettings(
    shots=(0, 1), n_draws=2, row_shots=1, wording="short", n_sentences=3, n_controls=4,
    max_new_tokens=4, batch_size=4, alpha=0.25,
)  # fmt: skip
LEAN = dataclasses.replace(SMALL, shots=(0,), n_controls=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def model():
    return tiny.talker()


def run(model, dataset, folder, settings=SMALL, **more):
    return te.run(model, dataset, folder=folder, settings=settings, profile="mini", **more)


@pytest.fixture(scope="module")
def tested(model, dataset, tmp_path_factory):
    return run(model, dataset, tmp_path_factory.mktemp("r") / "anomalygpt")


def test_every_test_picture_has_a_prediction_with_map_answer_and_threshold(tested, dataset):
    predictions = tested.result.predictions
    assert [p.sample for p in predictions] == dataset.select(split="test")
    for prediction in predictions:
        found = tested.result.anomaly_map(prediction)
        assert found.shape == (224, 224) and prediction.anomaly_score == pytest.approx(found.max(), abs=2e-3)
        assert prediction.answer and np.isfinite(prediction.threshold) and 0 < prediction.p_value <= 1
    said = tested.result.manifest["answers_say"]
    assert len(said) == len(predictions) and set(said.values()) <= {True, False, None}


def test_numbers_are_those_of_the_predictions(tested):
    chosen = [p for p in tested.result.predictions if p.sample.category == "one"]
    found = tested.maps.query("category == 'one' and shots == 1 and draw == 0").set_index("metric")["value"]
    labels = np.array([p.sample.is_anomalous for p in chosen])
    assert found["image AUROC"] == metrics.image_auroc([p.anomaly_score for p in chosen], labels)
    masks = [mask_of(p.sample, (96, 120)) for p in chosen]
    kept = [i for i, mask in enumerate(masks) if mask is not None]
    assert len(kept) == 6  # the picture without a mask says nothing about pixels
    expected = metrics.pixel_auroc([tested.result.anomaly_map(chosen[i]) for i in kept], [masks[i] for i in kept])
    assert found["pixel AUROC"] == pytest.approx(expected, abs=0.01)
    right = sum(conversations.answers_say(p.answer) == label for p, label in zip(chosen, labels))
    row = te.answer_table(tested.answers.query("control == '' and shots == 1"), "painting", "control")
    assert row["right answers"]["One"].tolist() == [f"{right} of 7"]


def test_shots_draws_controls_and_sentences_are_all_there(tested):
    maps, answers = tested.maps, tested.answers
    assert set(map(tuple, maps[["shots", "draw"]].drop_duplicates().to_numpy())) == {(0, 0), (1, 0), (1, 1)}
    assert set(answers["control"]) == {"", "as it is", "blank image", "other references", "noun removed"}
    assert (answers[answers["control"] != ""].groupby(["category", "control"]).size() == 4).all()
    row = answers[(answers["shots"] == 1) & (answers["category"] == "one") & (answers["control"] == "")]
    assert row["is_sentence"].sum() == 3
    assert (row[row["is_sentence"]]["answer"].str.split().str.len() == 4).all()
    table = te.answer_table(answers[answers["control"] != ""], "painting", "control")
    assert table.shape == (8, 7) and not table.isna().any().any()


def test_an_empty_answer_is_an_unclear_one(model, dataset, tmp_path):
    silent = dataclasses.replace(model.language.tokens, decode=lambda ids: "")
    mute = dataclasses.replace(model, language=dataclasses.replace(model.language, tokens=silent))
    found = run(mute, dataset, tmp_path / "r", LEAN)
    assert set(found.answers["says"]) == {"unclear"} and set(found.answers["answer"]) == {""}
    assert (te.answer_table(found.answers.query("control == ''"), "painting", "shots")["unclear"] == 7).all()
    assert not found.answers["is_right"].any() and set(found.result.manifest["answers_say"].values()) == {None}


def test_a_complete_run_is_read_back_and_an_interrupted_one_goes_on(tested, model, dataset, tmp_path, monkeypatch):
    closed = SimpleNamespace(checkpoint_id="")  # a model that can only be asked for its checkpoint
    again = run(closed, dataset, tested.result.folder)
    pd.testing.assert_frame_equal(again.maps, tested.maps)
    pd.testing.assert_frame_equal(again.answers, tested.answers)
    asked, whole = [], type(model).ask

    def ask(*args, **options):
        asked.append(len(args[1].maps))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(type(model), "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        run(model, dataset, tmp_path / "r")
    before = sum(asked[:2])
    resumed = run(model, dataset, tmp_path / "r")
    assert sum(asked[3:]) == 6 - before  # no sentence is spoken twice
    pd.testing.assert_frame_equal(resumed.answers, tested.answers)


def test_references_are_drawn_reproducibly(dataset, monkeypatch):
    monkeypatch.setattr(te.Bench, "embed", lambda _, samples: samples)
    normals = dataset.select(split="train", category="one")
    bench = te.Bench(SimpleNamespace(bank=lambda seen: seen), dataset, SMALL)
    drawn = [bench.bank("one", 2, number) for number in range(6)]
    assert drawn[0] == tuple(normals[i] for i in rng_for(2024, "references one 2 0").permutation(4)[:2])
    assert len(set(drawn)) > 1 and len(bench.bank("one", 9)) == 4  # all there are


def test_few_genuine_pictures_are_tested_with(model, dataset, tmp_path):
    """A painting with one picture to refer to and one to set the threshold, beside a rich one; no controls."""
    dropped = [s for s in dataset.samples if s.category == "one" and not s.is_anomalous and s.split != "test"]
    dropped = [s for s in dropped if s.group not in ("one/train/0", "one/calibration/0")]
    few = data.Dataset(dataset.folder, tuple(s for s in dataset.samples if s not in dropped), "few")
    with pytest.warns(UserWarning, match="1 calibration normals"):
        found = run(model, few, tmp_path / "r", dataclasses.replace(LEAN, row_shots=4))
    assert len(found.result.predictions) == 14 and found.result.manifest["calibration"]["one"]["n_sources"] == 1


def test_maps_of_another_method_are_scored_and_spoken_about_and_noticed_when_they_change(model, dataset, tmp_path):
    for factor in (1.0, 0.5):
        maps = tiny.GivenMaps(factor)
        found = run(model, dataset, tmp_path / "r", LEAN, maps_from=maps, method="anomalygpt_aligned")
        for prediction in found.result.predictions:
            expected = maps.unit_map(images.load_image(prediction.sample.image_path), "")[0, 0]
            assert prediction.anomaly_score == pytest.approx(expected)
        assert found.result.method == "anomalygpt_aligned" and set(found.maps["shots"]) == {1}
    del maps.asked[:]
    run(model, dataset, tmp_path / "r", LEAN, maps_from=maps, method="anomalygpt_aligned")
    assert not maps.asked  # the same maps: the complete run is kept
