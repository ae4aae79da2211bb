"""Tests of AnomalyGPT on a tiny dataset, and the memory plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_anomalygpt as tiny

from helpers.anomalygpt import conversations, plan
from helpers.anomalygpt import evaluation as te
from helpers.anomalygpt import review as anomalygpt_review
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import metrics
from helpers.records import Sample

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
SMALL = te.TestSettings(
    shots=(0, 1), n_draws=2, row_shots=1, answered_shots=(0, 1), wording=None, n_sentences=3, n_controls=4,
    max_new_tokens=4, batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two artworks: 4 train and 4 calibration normals, 3 normal and 4 anomalous test pictures (one without mask)."""
    folder = tmp_path_factory.mktemp("dataset")
    random = np.random.default_rng(1)
    samples = []
    for category in ("one", "two"):
        base = random.integers(60, 200, (8, 10, 3), dtype=np.uint8).repeat(12, axis=0).repeat(12, axis=1)
        for split, n in (("train", 4), ("calibration", 4), ("test", 7)):
            for i in range(n):
                picture = np.clip(base.astype(int) + random.integers(-9, 9, base.shape), 0, 255).astype(np.uint8)
                is_anomalous = split == "test" and i >= 3
                mask_path = None
                if is_anomalous:
                    top, left = 10 + 15 * (i - 3), 20 + 20 * (i - 3)
                    picture[top : top + 25, left : left + 25] = (250, 10, 10)
                    if i < 6:
                        mask = np.zeros(picture.shape[:2], dtype=bool)
                        mask[top : top + 25, left : left + 25] = True
                        mask_path = folder / f"{category}_{i}_mask.png"
                        images.save_png(mask_path, mask)
                path = folder / f"{category}_{split}_{i}.png"
                images.save_png(path, picture)
                kind = "box" if is_anomalous else "good"
                samples.append(Sample(path, category, is_anomalous, mask_path, split, kind, f"{category}{split}{i}"))
    data.write_manifest(folder / "manifest.csv", samples)
    return data.open_dataset(folder)


@pytest.fixture(scope="module")
def model():
    return tiny.talkative(tiny.build(FIXTURE)[0])


@pytest.fixture(scope="module")
def tested(model, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "anomalygpt"
    cache = tmp_path_factory.mktemp("features")
    return te.run(model, dataset, folder=folder, settings=SMALL, profile="mini", cache_dir=cache), folder, cache


def value(evaluation, **where):
    chosen = evaluation
    for column, wanted in where.items():
        chosen = chosen[chosen[column] == wanted]
    assert len(chosen) == 1, (where, len(chosen))
    return chosen["value"].iloc[0]


def test_every_test_picture_has_a_prediction_with_map_answer_and_threshold(tested, dataset):
    run = tested[0]
    predictions = run.result.predictions
    assert [p.sample for p in predictions] == dataset.select(split="test")
    for prediction in predictions:
        assert run.result.anomaly_map(prediction).shape == (224, 224)
        assert prediction.answer and np.isfinite(prediction.threshold) and 0 < prediction.p_value <= 1
        assert prediction.anomaly_score == pytest.approx(run.result.anomaly_map(prediction).max(), abs=2e-3)


def test_numbers_are_those_of_the_predictions(tested, dataset):
    run = tested[0]
    chosen = [p for p in run.result.predictions if p.sample.category == "one"]
    where = {"category": "one", "shots": 1, "draw": 0, "control": "none"}
    labels = [p.sample.is_anomalous for p in chosen]
    scores = [p.anomaly_score for p in chosen]
    assert value(run.evaluation, metric="image_auroc", **where) == metrics.image_auroc(scores, labels)
    masks = [data.mask_of(p.sample, (96, 120)) for p in chosen]
    kept = [i for i, mask in enumerate(masks) if mask is not None]
    assert len(kept) == 6  # the picture without a mask says nothing about pixels
    maps = [run.result.anomaly_map(chosen[i]) for i in kept]
    expected = metrics.pixel_auroc(maps, [masks[i] for i in kept])
    assert value(run.evaluation, metric="pixel_auroc", **where) == pytest.approx(expected, abs=0.01)
    counted = conversations.score_answers([p.answer for p in chosen], labels)
    assert value(run.evaluation, metric="answer_accuracy", **where) == counted.accuracy


def test_shots_draws_and_controls_are_all_there(tested):
    evaluation = tested[0].evaluation
    assert set(map(tuple, evaluation[["shots", "draw"]].drop_duplicates().to_numpy())) == {(0, 0), (1, 0), (1, 1)}
    assert set(evaluation["control"]) == set(te.CONTROLS)
    assert te.overview(evaluation).shape[0] == 4 and te.control_table(evaluation).shape[0] == 8
    one = evaluation[(evaluation["category"] == "one") & (evaluation["metric"] == "image_auroc")]
    assert len(one) == 3


def test_wrong_and_right_sentences_are_shown():
    rows = [
        # (is_anomalous, verdict, is_sentence): what is read back from a file are texts
        *[("True", "no", "True")] * 4,
        ("False", "no", "True"),
        ("True", "yes", "False"),  # one word
        ("True", "yes", "True"),
        ("False", "unparseable", "True"),
    ]
    answers = pd.DataFrame(rows, columns=["is_anomalous", "verdict", "is_sentence"]).assign(
        category="harbour", answer=[f"answer {number}" for number in range(len(rows))], place_is_right=np.nan
    )
    shown = anomalygpt_review.sentences(SimpleNamespace(answers=answers), n=4)
    assert shown["answer"].tolist() == ["answer 0", "answer 1", "answer 6", "answer 4"]
    assert shown["truth"].tolist() == ["anomalous"] * 3 + ["normal"] and set(shown["place_right"]) == {"-"}
    without_right = answers[answers["verdict"] != "yes"][lambda rows: rows["is_anomalous"] == "True"]
    assert len(anomalygpt_review.sentences(SimpleNamespace(answers=without_right), n=4)) == 2
    two = pd.concat([answers, answers.assign(category="mill")])
    assert (
        anomalygpt_review.sentences(SimpleNamespace(answers=two), n=4)["category"].tolist() == ["harbour", "mill"] * 2
    )
    unclear = anomalygpt_review.sentences(SimpleNamespace(answers=answers.tail(1)), n=4)
    assert unclear["verdict"].tolist() == ["unparseable"]


def test_sentences_and_first_tokens_are_told_apart(tested):
    answers = tested[0].answers
    row = answers[(answers["shots"] == 1) & (answers["category"] == "one")]
    assert (row["is_sentence"].astype(str) == "True").sum() == 3
    assert (row[row["is_sentence"].astype(str) == "True"]["answer"].str.split().str.len() == 4).all()


def test_a_complete_run_is_read_back(tested, dataset, model):
    run, folder, cache = tested
    before = (folder / "manifest.json").stat().st_mtime_ns
    again = te.run(model, dataset, folder=folder, settings=SMALL, profile="mini", cache_dir=cache)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(again.evaluation, run.evaluation)


def test_references_are_drawn_reproducibly_and_never_from_the_test(dataset):
    normals = dataset.select(split="train", category="one")
    first = te.draw_references(normals, 2, 0, SMALL)
    assert first == te.draw_references(normals, 2, 0, SMALL)
    assert len({tuple(te.draw_references(normals, 2, draw, SMALL)) for draw in range(6)}) > 1
    published = dataclasses.replace(SMALL, protocol="published")
    assert te.draw_references(normals[::-1], 2, 0, published) == [3, 2]  # file order
    with pytest.raises(ValueError, match="4 normal pictures"):
        te.draw_references(normals, 5, 0, SMALL)


def test_published_protocol_runs_on_an_mvtec_category_and_stands_beside_the_paper(model, dataset, tmp_path):
    renamed = [
        dataclasses.replace(s, category="bottle", split="train" if s.split == "calibration" else s.split)
        for s in dataset.samples
        if s.category == "one"
    ]
    bottle = data.Dataset(dataset.folder, tuple(renamed), data.dataset_hash(renamed, dataset.folder))
    settings = dataclasses.replace(SMALL, protocol="published", shots=(0, 1), n_draws=1, n_controls=0)
    named = dataclasses.replace(model, text_pair_of=lambda name: tiny_pair(name))
    run = te.run(named, bottle, folder=tmp_path / "r", settings=settings, profile="mini")
    table = te.beside_published(run.evaluation)
    assert set(table["benchmark"]) == {"MVTec AD"} and set(table["n_categories"]) == {"0 of 15", "1 of 15"}
    one_shot = table[(table["shots"] == 1) & (table["metric"] == "pixel_auroc")]
    assert one_shot["paper"].iloc[0] == 95.3 and 0 <= one_shot["ours"].iloc[0] <= 100
    assert "bottle for anomaly detection" in run.answers["question"].iloc[0]


def tiny_pair(name):
    assert name == "bottle"  # the published rule finds the name in the question
    return tiny.build(FIXTURE)[2]["text.feats_bottle"][0]


def test_art_has_no_published_numbers(tested):
    assert te.beside_published(tested[0].evaluation).empty


def test_pictures_that_set_thresholds_are_not_trained_on(dataset):
    from helpers.anomalygpt import training as t

    train = [s for s in dataset.samples if s.split == "train"]
    industrial = data.Dataset(dataset.folder, tuple(train), "hash")
    learnt = t.training_samples(industrial)
    learnt_from, held_out = t.normals_of(industrial, "one")
    assert len(learnt_from) == 2 and len(held_out) == 2
    assert not {s.image_path for s in held_out} & {s.image_path for s in learnt}
    assert t.training_samples(dataset) == train  # the artworks have a calibration split of their own


@pytest.mark.parametrize(
    "change", [{"protocol": "mine"}, {"row_shots": 2}, {"answered_shots": (0,)}, {"n_draws": 0}, {"shots": (-1, 0, 1)}]
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError):
        dataclasses.replace(SMALL, **change)


def test_too_few_normals_are_refused(model, dataset, tmp_path):
    settings = dataclasses.replace(SMALL, shots=(0, 9), row_shots=9, answered_shots=(9,))
    with pytest.raises(ValueError, match="4 normal pictures to refer to"):
        te.run(model, dataset, folder=tmp_path / "r", settings=settings, profile="mini")


# --- memory and cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [("bf16", 15.5, 17.0), ("8bit", 9.0, 11.0), ("4bit", 6.0, 8.0)],  # specification 7.6
)
def test_memory_of_7b(precision, low, high):
    assert low < plan.memory_plan(plan.VICUNA_7B, plan.Load(precision)).total_gb < high


def test_sizes_count_every_parameter():
    assert plan.VICUNA_7B.n_blocks + plan.VICUNA_7B.n_vocabulary == 6_738_423_808
    assert plan.VICUNA_13B.n_blocks + plan.VICUNA_13B.n_vocabulary == 13_015_874_560


def test_what_does_not_fit_is_refused_with_what_does():
    load = plan.Load("bf16", n_images=16, n_tokens=1024, train=True)
    with pytest.raises(plan.DoesNotFit, match="n_images=2, gradient_checkpointing=True") as refusal:
        plan.require_fit(plan.memory_plan(plan.VICUNA_7B, load), 22.5)
    assert "4bit" in str(refusal.value)
    small = plan.memory_plan(plan.VICUNA_7B, plan.Load("4bit"))
    assert plan.require_fit(small, 15.0) is small
    with pytest.raises(plan.DoesNotFit, match="larger machine"):
        plan.require_fit(small, 2.0)


def test_training_plan_reacts_to_its_knobs():
    full = plan.memory_plan(plan.VICUNA_7B, plan.Load("bf16", n_images=8, n_tokens=512, train=True))
    less = plan.memory_plan(
        plan.VICUNA_7B, plan.Load("bf16", n_images=8, n_tokens=512, train=True, gradient_checkpointing=True)
    )
    assert less.parts["activations"] < 0.2 * full.parts["activations"]
    assert "together" in str(full)


def test_compute_units_are_labelled_an_estimate():
    assert plan.estimate_compute_units(3600, "L4").startswith("estimate: 1.7")
    assert "no rate" in plan.estimate_compute_units(3600, "abacus")
