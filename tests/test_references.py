"""What chat pictures are compared with: the row's references, thresholds from other normals, one colour scale."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_chat

from helpers.anomalygpt import evaluation as te
from helpers.anomalygpt.model import build_bank
from helpers.chat import references
from helpers.chat.references import NO_REFERENCES
from helpers.data import images
from helpers.judge import statistics as calibration


@pytest.fixture(scope="module")
def model():
    return tiny_chat.build_model()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_chat.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def known(model, dataset):
    return references.of_dataset(model, dataset, settings=tiny_chat.SETTINGS)


def pictures(samples):
    return [images.load_image(sample.image_path) for sample in samples]


def test_without_references_all_held_out_normals_set_the_threshold(model, dataset, known):
    one = known[NO_REFERENCES]
    normals = pictures(dataset.select(split="calibration"))
    assert (one.n, one.bank, one.category) == (0, None, None)
    np.testing.assert_allclose(np.sort(one.normal_scores), np.sort(model.look(normals).scores), atol=1e-3)
    assert one.threshold == calibration.conformal_threshold(one.normal_scores, 0.25)


def test_an_artwork_is_measured_on_its_own_normals(model, dataset, known):
    one = known["two"]
    chosen = [s for s in dataset.select(split="train", category="two") if s.sha256 in one.members]
    assert one.n == len(one.members) == len(chosen) == 2
    normals = pictures(dataset.select(split="calibration", category="two"))
    np.testing.assert_allclose(one.normal_scores, model.look(normals, references=pictures(chosen)).scores, atol=1e-3)
    assert one.label == "Two"


def test_the_threshold_lies_in_the_middle_of_the_scale(known):
    for one in known.values():
        low, high = one.limits
        assert low < one.threshold < high
        assert one.threshold - low == pytest.approx(high - one.threshold)


def test_scores_and_thresholds_are_those_of_the_comparison(model, dataset, known, tmp_path):
    run = te.run(model, dataset, folder=tmp_path / "anomalygpt", settings=tiny_chat.SETTINGS, profile="mini")
    for prediction in run.result.predictions:
        one = known[prediction.sample.category]
        look = model.look(pictures([prediction.sample]), references=one.bank)
        assert look.scores[0] == pytest.approx(prediction.anomaly_score, abs=1e-3)  # features were kept in float16
        assert one.threshold == pytest.approx(prediction.threshold, abs=1e-3)


def test_own_references_are_measured_against_each_other(model, dataset):
    arrays = pictures(dataset.select(split="train", category="one"))
    one = references.of_pictures(model, arrays, label="mine", members=["a", "b", "c"], alpha=0.25)
    for i, score in enumerate(one.normal_scores):
        others = [array for j, array in enumerate(arrays) if j != i]
        assert score == pytest.approx(model.look([arrays[i]], references=others).scores[0], abs=1e-5)
    assert one.threshold == max(one.normal_scores)
    taps = model.image_tower.embed_images(arrays).taps
    np.testing.assert_allclose(one.bank.numpy(), build_bank(taps).numpy(), atol=1e-5)
    assert (one.n, one.category, one.members) == (3, None, {"a", "b", "c"})


def test_one_reference_cannot_set_a_threshold(model, dataset):
    with pytest.raises(ValueError, match="1 reference given, at least 2"):
        references.of_pictures(model, pictures(dataset.samples[:1]), label="mine", members=["a"])


def test_the_table_counts_what_lies_above(known):
    table = references.table(known)
    assert list(table["references"]) == [0, 2, 2]
    for one in known.values():
        row = table.loc[one.label]
        assert row["normal pictures measured"] == len(one.normal_scores)
        assert row["of these above it"].startswith(f"{sum(one.normal_scores > one.threshold)} of")
