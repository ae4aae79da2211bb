"""Every detector on one picture: the same numbers as in its results, or the reason why there are none."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
import torch

from helpers import files as storage
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalyclip import training as anomalyclip_training
from helpers.chat import _old_clip_features as features
from helpers.chat import _old_clip_methods as clip_methods
from helpers.chat import _old_clip_one_class as one_class
from helpers.chat import detectors as verdicts
from helpers.chat.detectors import Verdict
from helpers.clip import backbones
from helpers.data import images

SEED = 3
BASES = {
    "clip_cross_entropy": one_class.HeadSettings(n_hidden=16, n_components=8, max_epochs=15),
    "clip_lof": one_class.LofSettings(augment=True),
    "clip_isolation_forest": one_class.ForestSettings(n_trees=20),
    "clip_patch_knn": one_class.PatchKnnSettings(max_bank_rows=40),
}


def tiny_clip(seed: int = 0) -> backbones.Clip:
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(
            embed_dim=24,
            vision_cfg={"image_size": 24, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
            quick_gelu=True,
        )
    model = model.eval().requires_grad_(False)
    return backbones.Clip(
        model, open_clip.get_tokenizer("ViT-B-32"), backbones.square_preprocess(24), f"tiny/{seed}/24"
    )


def tiny_cnn() -> backbones.Cnn:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, stride=4), torch.nn.ReLU(), torch.nn.Flatten())
    return backbones.Cnn(net.eval().requires_grad_(False), backbones.square_preprocess(20), "small", 256)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_chat.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def models():
    return {"clip": tiny_clip(), "cnn": tiny_cnn()}


@pytest.fixture(scope="module")
def home(dataset, models, tmp_path_factory) -> Path:
    """What notebooks 03 and 04 leave behind."""
    home = tmp_path_factory.mktemp("home") / "mini"
    options = models | {"cache_dir": home / "features", "batch_size": 16}
    embedded = features.embed_samples(dataset.samples, **options)
    learn_from = clip_methods.trainings(dataset, embedded, **options, n_anomalies=60, seed=SEED)
    for method in one_class.METHODS:
        fitted = clip_methods.fit_all(
            method, learn_from, n_trials=1, alpha=0.2, seed=SEED, checkpoint_dir=home / "checkpoints" / method,
            base=BASES.get(method),
        )  # fmt: skip
        clip_methods.predict(
            method, fitted, dataset, embedded, alpha=0.2, results_dir=home / "results" / method, profile="mini"
        )
    clip = models["clip"]
    learners = [anomalyclip.PromptLearner(clip.model, clip.tokenizer, seed=seed) for seed in (1, 2, 3)]
    anomalyclip.save_prompts(learners[0], home / "weights" / "anomalyclip" / "published" / "model.safetensors")
    anomalyclip.save_prompts(learners[1], home / "checkpoints" / "anomalyclip" / "abc" / "prompts.safetensors")
    anomalyclip.save_prompts(learners[2], home / "checkpoints" / "anomalyclip" / "aaa" / "prompts.safetensors")
    anomalyclip_training.predict_with_prompts(
        clip, learners[1], dataset, settings=anomalyclip.DetectorSettings(image_size=32, sigma=1.0), alpha=0.2,
        profile="mini", trained_on="auxiliary", folder=home / "results" / "anomalyclip",
    )  # fmt: skip
    return home


@pytest.fixture(scope="module")
def detectors(dataset, home, models):
    return verdicts.load(dataset, home=home, seed=SEED, **models)


@pytest.fixture
def other_home(home, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(home, tmp_path / "mini")


def judge(detectors, sample, **changes) -> dict[str, Verdict]:
    given = {"sha256": sample.sha256, "category": sample.category} | changes
    found = detectors.judge(images.load_image(sample.image_path), **given)
    assert [one.method for one in found] == list(verdicts.NOTEBOOKS)
    return {one.method: one for one in found}


def test_verdicts_are_those_of_the_results(detectors, dataset, home):
    from helpers import results

    assert detectors.missing == {}
    for method in verdicts.NOTEBOOKS:
        result = results.read(home / "results" / method, dataset.samples, dataset.folder, dataset.hash)
        for prediction in result.predictions:
            one = judge(detectors, prediction.sample)[method]
            assert one.anomaly_score == pytest.approx(prediction.anomaly_score, abs=1e-4)
            assert (one.threshold, one.p_value) == (prediction.threshold, pytest.approx(prediction.p_value))
            assert one.is_predicted_anomalous == prediction.is_predicted_anomalous
            assert one.seconds > 0 and one.note == ""
            recorded = result.anomaly_map(prediction)
            assert (one.anomaly_map is None) == (recorded is None)
            if recorded is not None:
                np.testing.assert_allclose(one.anomaly_map, recorded, atol=2e-3)
                assert one.limits[0] < one.limits[1]


def test_only_two_methods_make_maps(detectors, dataset):
    found = judge(detectors, dataset.select(split="test")[0])
    assert [method for method, one in found.items() if one.anomaly_map is not None] == ["clip_patch_knn", "anomalyclip"]


def test_a_picture_that_was_learnt_from_is_not_scored(detectors, dataset):
    for split in ("train", "calibration"):
        found = judge(detectors, dataset.select(split=split)[0])
        for method in one_class.METHODS:
            assert found[method].is_predicted_anomalous is None and "learnt from this" in found[method].note
        assert found["anomalyclip"].is_predicted_anomalous is not None


def test_a_foreign_artwork_has_no_threshold(detectors, dataset):
    found = judge(detectors, dataset.select(split="test")[0], category=None)
    for method in one_class.METHODS:
        assert math.isnan(found[method].anomaly_score) and "choose one" in found[method].note
    zero_shot = found["anomalyclip"]
    assert (
        0 < zero_shot.anomaly_score < 1 and zero_shot.is_predicted_anomalous is None and "choose one" in zero_shot.note
    )


@pytest.mark.parametrize(
    ("gone", "method", "notebook"),
    [
        ("results/clip_lof", "clip_lof", "03_clip"),
        ("checkpoints/clip_isolation_forest/two.json", "clip_isolation_forest", "03_clip"),
        ("checkpoints/clip_cross_entropy/one.safetensors", "clip_cross_entropy", "03_clip"),
        ("results/anomalyclip", "anomalyclip", "04_anomalyclip"),
        ("checkpoints/anomalyclip/abc/prompts.safetensors", "anomalyclip", "04_anomalyclip"),
    ],
)
def test_what_is_missing_is_named_and_the_others_speak(dataset, other_home, models, gone, method, notebook):
    path = other_home / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = verdicts.load(dataset, home=other_home, seed=SEED, **models)
    assert set(found.missing) == {method} and notebook in found.missing[method]
    said = judge(found, dataset.select(split="test")[0])
    assert said[method].note == found.missing[method]
    assert all(one.is_predicted_anomalous is not None for name, one in said.items() if name != method)


def test_a_checkpoint_of_another_version_is_refused(dataset, other_home, models):
    path = other_home / "checkpoints" / "clip_lof" / "one.json"
    storage.write_json(path, storage.read_json(path) | {"settings": {"n_moons": 3}})
    found = verdicts.load(dataset, home=other_home, seed=SEED, **models)
    assert set(found.missing) == {"clip_lof"} and "n_moons" in found.missing["clip_lof"]


def test_without_any_result_nothing_is_embedded(dataset, models, tmp_path):
    found = verdicts.load(dataset, home=tmp_path, **models)
    assert set(found.missing) == set(verdicts.NOTEBOOKS) and list(tmp_path.iterdir()) == []
    said = judge(found, dataset.select(split="test")[0])
    assert all(one.is_predicted_anomalous is None and "run notebook" in one.note for one in said.values())


def test_results_of_other_pictures_are_refused(dataset, home, models):
    found = verdicts.load(dataclasses.replace(dataset, hash="0" * 64), home=home, seed=SEED, **models)
    assert set(found.missing) == set(verdicts.NOTEBOOKS)
    assert all("was measured on dataset" in reason for reason in found.missing.values())


@pytest.mark.parametrize("changed", [{"clip": tiny_clip(9)}, {"seed": 4}])
def test_models_that_have_changed_since_are_noticed(dataset, home, models, changed):
    found = verdicts.load(dataset, home=home, **({"seed": SEED} | models | changed))
    noticed = {name for name, reason in found.missing.items() if "have changed since" in reason}
    if "clip" in changed:
        assert {"clip_resnet50", "clip_lof", "clip_patch_knn"} <= noticed
        assert "not among 3 files: run notebook 04" in found.missing["anomalyclip"]
    else:
        assert {"clip_isolation_forest", "clip_lof"} <= noticed  # of the bank's rows the same may have been drawn
        assert noticed <= {"clip_isolation_forest", "clip_lof", "clip_patch_knn"}


def test_the_table_names_every_detector(detectors, dataset):
    found = detectors.judge(
        images.load_image(dataset.samples[0].image_path), sha256=dataset.samples[0].sha256, category="one"
    )
    table = verdicts.table(found)
    assert table.index[0] == "CLIP + CNN similarity" and len(table) == 6
    assert table.loc["CLIP LOF", "verdict"] == "–" and "learnt" in table.loc["CLIP LOF", "note"]
    assert table.loc["AnomalyCLIP", "verdict"] in ("anomalous", "normal")
