"""Tests of AnomalyGPT on a tiny dataset: numbers, answers, controls, what an interruption costs, few pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
SMALL = te.EvaluationSettings(
    shots=(0, 1), n_draws=2, row_shots=1, answered_shots=(0, 1), wording=None, n_sentences=3, n_controls=4,
    max_new_tokens=4, batch_size=4, alpha=0.25,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def model():
    return tiny.talkative(tiny.build(FIXTURE)[0])


@pytest.fixture(scope="module")
def tested(model, dataset, tmp_path_factory):
    return te.run(model, dataset, folder=tmp_path_factory.mktemp("r") / "anomalygpt", settings=SMALL, profile="mini")


def value(evaluation, **where):
    chosen = evaluation
    for column, wanted in where.items():
        chosen = chosen[chosen[column] == wanted]
    assert len(chosen) == 1, (where, len(chosen))
    return chosen["value"].iloc[0]


def test_every_test_picture_has_a_prediction_with_map_answer_and_threshold(tested, dataset):
    predictions = tested.result.predictions
    assert [p.sample for p in predictions] == dataset.select(split="test")
    for prediction in predictions:
        assert tested.result.anomaly_map(prediction).shape == (224, 224)
        assert prediction.answer and np.isfinite(prediction.threshold) and 0 < prediction.p_value <= 1
        assert prediction.anomaly_score == pytest.approx(tested.result.anomaly_map(prediction).max(), abs=2e-3)
    said = tested.result.manifest["answers_say"]
    assert len(said) == len(predictions) and set(said.values()) <= {True, False, None}


def test_numbers_are_those_of_the_predictions(tested):
    chosen = [p for p in tested.result.predictions if p.sample.category == "one"]
    where = {"category": "one", "shots": 1, "draw": 0, "control": "none"}
    labels = np.array([p.sample.is_anomalous for p in chosen])
    expected = metrics.image_auroc([p.anomaly_score for p in chosen], labels)
    assert value(tested.evaluation, metric="image AUROC", **where) == expected
    masks = [mask_of(p.sample, (96, 120)) for p in chosen]
    kept = [i for i, mask in enumerate(masks) if mask is not None]
    assert len(kept) == 6  # the picture without a mask says nothing about pixels
    maps = [tested.result.anomaly_map(chosen[i]) for i in kept]
    expected = metrics.pixel_auroc(maps, [masks[i] for i in kept])
    assert value(tested.evaluation, metric="pixel AUROC", **where) == pytest.approx(expected, abs=0.01)
    says = [conversations.answers_say(p.answer) for p in chosen]
    right = sum(said == label for said, label in zip(says, labels))
    row = te.answer_table(tested).query("painting == 'One' and references == 1")
    assert row["right answers"].tolist() == [f"{right} of 7"]


def test_shots_draws_controls_and_sentences_are_all_there(tested):
    evaluation, answers = tested.evaluation, tested.answers
    assert set(map(tuple, evaluation[["shots", "draw"]].drop_duplicates().to_numpy())) == {(0, 0), (1, 0), (1, 1)}
    assert set(evaluation["control"]) == {"none", "blank image", "swapped reference", "noun removed"}
    row = answers[(answers["shots"] == 1) & (answers["category"] == "one")]
    assert row["is_sentence"].sum() == 3
    assert (row[row["is_sentence"]]["answer"].str.split().str.len() == 4).all()


def test_tables_have_no_holes(tested):
    for table in (te.table(tested), te.table(tested, controls=True), te.answer_table(tested)):
        assert len(table) >= 4 and not table.isna().any().any()
    frame, title = te.shot_lines(tested)
    assert len(frame) == 4 and not frame.isna().any().any() and "One" in title and "→" in title


def test_an_empty_answer_is_an_unclear_one(model, dataset, tmp_path):
    mute = dataclasses.replace(model, language=dataclasses.replace(model.language, tokens=dataclasses.replace(
        model.language.tokens, decode=lambda ids: "")))  # fmt: skip
    run = te.run(mute, dataset, folder=tmp_path / "r", settings=SMALL, profile="mini")
    assert set(run.answers["says"]) == {"unclear"} and set(run.answers["answer"]) == {""}
    assert (te.answer_table(run)["unclear"] == 7).all()
    assert set(run.result.manifest["answers_say"].values()) == {None}


def test_a_complete_run_is_read_back_and_an_interrupted_one_goes_on(tested, model, dataset, tmp_path):
    again = te.run(None_that_answers(), dataset, folder=tested.result.folder, settings=SMALL, profile="mini")
    pd.testing.assert_frame_equal(again.evaluation, tested.evaluation)
    pd.testing.assert_frame_equal(again.answers, tested.answers)
    asked = []

    def ask(*args, **options):
        asked.append(len(args[0]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return type(model).ask(model, *args, **options)

    broken = Spy(model, ask)
    with pytest.raises(KeyboardInterrupt):
        te.run(broken, dataset, folder=tmp_path / "r", settings=SMALL, profile="mini")
    before = sum(asked[:2])
    resumed = te.run(broken, dataset, folder=tmp_path / "r", settings=SMALL, profile="mini")
    assert sum(asked[3:]) == 6 - before  # no sentence is spoken twice
    pd.testing.assert_frame_equal(resumed.answers, tested.answers)


class Spy:
    """A model whose ``ask`` is watched."""

    def __init__(self, model, ask):
        self._model, self.ask = model, ask

    def __getattr__(self, name):
        return getattr(self._model, name)


def None_that_answers():
    """A model that can only be asked for its checkpoint."""
    return type("Closed", (), {"checkpoint_id": ""})()


def test_references_are_drawn_reproducibly(dataset):
    normals = dataset.select(split="train", category="one")
    first = te.draw_references(normals, 2, 0, 2024)
    assert first == te.draw_references(normals, 2, 0, 2024) and len(first) == 2
    assert first == [normals[i] for i in rng_for(2024, "references one 2 0").permutation(4)[:2]]
    assert len({tuple(s.image_path for s in te.draw_references(normals, 2, draw, 2024)) for draw in range(6)}) > 1
    assert len(te.draw_references(normals, 9, 0, 2024)) == 4  # all there are


def test_few_genuine_pictures_are_tested_with(model, dataset, tmp_path):
    """One painting with two genuine pictures and no calibration split, beside a rich one."""
    kept = {s.image_path for s in dataset.select(split="train", category="one")[:2]}
    few = [s for s in dataset.samples if s.category == "two" or s.split == "test" or s.image_path in kept]
    poor = data.Dataset(dataset.folder, tuple(few), "few")
    settings = dataclasses.replace(SMALL, shots=(0, 4), row_shots=4, answered_shots=(4,), n_controls=0)
    run = te.run(model, poor, folder=tmp_path / "r", settings=settings, profile="mini")
    assert len(run.result.predictions) == 14
    facts = run.result.manifest["calibration"]["one"]
    assert len(facts["scores"]) == 1 and facts["n_sources"] == 1
    alone = data.Dataset(dataset.folder, tuple(s for s in few if s.image_path != max(kept)), "one")
    with pytest.raises(ValueError, match="one has no calibration scores"):
        te.run(model, alone, folder=tmp_path / "a", settings=settings, profile="mini")


def test_a_map_of_another_method_is_scored_and_spoken_about(model, dataset, tmp_path):
    def map_of(picture, category):
        return np.full((224, 224), picture[..., 1:].min() / 255, dtype=np.float32)

    run = te.run(
        model, dataset, folder=tmp_path / "anomalygpt_aligned", settings=SMALL, profile="mini", map_of=map_of,
        method="anomalygpt_aligned",
    )  # fmt: skip
    for prediction in run.result.predictions:
        expected = map_of(images.load_image(prediction.sample.image_path), "")[0, 0]
        assert prediction.anomaly_score == pytest.approx(expected)
    assert run.result.method == "anomalygpt_aligned" and set(run.evaluation["shots"]) == {1}


def test_answers_before_and_after_are_those_of_the_first_words(model, dataset):
    table = te.answers_before_after(model, dataset, SMALL)
    assert len(table) == 14 and set(table["says"]) <= {"yes", "no", "unclear"}
    pd.testing.assert_frame_equal(table, te.answers_before_after(model, dataset, SMALL))


def test_wrong_and_right_answers_are_shown_in_turns(tested):
    def shown(says: dict[int, str], n: int) -> list[str]:
        """Captions when the pictures of both paintings (3 genuine, 4 anomalous) are said to be ..."""
        answers = tested.answers[tested.answers["shots"] == 1].reset_index(drop=True)
        answers = answers.assign(is_sentence=True, place="", answer="a", says=[says[i % 7] for i in range(14)])
        run = te.TestRun(tested.evaluation, answers, tested.result)
        return [panel["caption"] for panel in te.answer_panels(run, n=n)]

    found = shown({0: "no", 1: "yes", 2: "unclear", 3: "yes", 4: "no", 5: "no", 6: "yes"}, 6)
    assert found[:3] == ["genuine: “a” ✗ wrong", "genuine: “a” ✗ wrong", "genuine: “a” ✗ unclear"]
    assert found[3:] == ["box: “a” ✓ right"] * 3
    assert shown(dict.fromkeys(range(7), "unclear"), 4) == ["genuine: “a” ✗ unclear"] * 2


@pytest.mark.parametrize("change", [{"row_shots": 2}, {"answered_shots": (0,)}, {"shots": (0,)}])
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match="row_shots"):
        dataclasses.replace(SMALL, **change)
