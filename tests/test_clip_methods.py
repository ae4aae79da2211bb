"""The CLIP methods on a tiny real dataset on disk: thresholds before test pictures, results, resume, sorted folders."""

from __future__ import annotations

import collections
import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_clip
import torch

from helpers import results, synthesis
from helpers.clip import features, one_class, tuning
from helpers.clip import methods as clip_methods
from helpers.data import manifest as data
from helpers.judge import metrics

QUICK = {
    "clip_cross_entropy": one_class.HeadSettings(n_hidden=16, n_components=8, max_epochs=15),
    "clip_isolation_forest": one_class.ForestSettings(n_trees=20),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    return tiny_clip.models(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny_clip.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def embedded(dataset, models) -> features.Features:
    return features.embed_samples(dataset.samples, **models)


@pytest.fixture(scope="module")
def learn_from(dataset, embedded, models) -> dict[str, one_class.Training]:
    return clip_methods.trainings(dataset, embedded, **models, n_anomalies=60, seed=1)


def fit(method: str, learn_from, folder: Path | None, **changes):
    options = {"n_trials": 3, "alpha": 0.1, "seed": 0, "base": QUICK.get(method)} | changes
    return clip_methods.fit_all(method, learn_from, checkpoint_dir=folder, **options)


def predict(method: str, fitted, dataset, embedded, folder: Path) -> results.MethodResult:
    return clip_methods.predict(method, fitted, dataset, embedded, alpha=0.1, results_dir=folder, profile="mini")


# ------------------------------------------------------------------------------------------------- synthetic anomalies


def test_kinds_and_pictures_come_equally_often(dataset):
    normals = dataset.select(category="harbour", split="train")
    made = list(clip_methods.synthetic_anomalies(normals, n_anomalies=45, seed=2))
    kinds = collections.Counter(kind for _, _, kind in made)
    assert set(kinds) == {*synthesis.LOCAL_KINDS, clip_methods.GLOBAL_KIND}
    assert set(kinds.values()) == {3}
    sources = collections.Counter(sample.image_path for _, sample, _ in made)
    assert set(sources.values()) == {5, 6}
    assert all(picture.dtype == np.uint8 for picture, _, _ in made)
    again = clip_methods.synthetic_anomalies(normals, n_anomalies=45, seed=2)
    assert all((a == b).all() for (a, _, _), (b, _, _) in zip(made, again, strict=True))


def test_kinds_do_not_repeat_with_the_groups(dataset):
    """4 per picture of 15 kinds, counted through, gave the pictures of one group the same 4 kinds each time."""
    normals = (dataset.select(category="harbour", split="train") * 8)[:60]
    made = clip_methods.synthetic_anomalies(normals, n_anomalies=240, seed=2)
    by_place = collections.defaultdict(set)
    for i, (_, _, kind) in enumerate(made):
        by_place[i // 4 % 15].add(kind)
    assert min(map(len, by_place.values())) > 4


@pytest.mark.parametrize("wrong", [{"split": "test", "is_anomalous": False}, {"split": "test", "is_anomalous": True}])
def test_anomalies_are_never_made_from_test_pictures(dataset, wrong):
    with pytest.raises(ValueError, match="anomalous or test picture"):
        next(clip_methods.synthetic_anomalies(dataset.select(**wrong), n_anomalies=3, seed=0))


def test_trainings_hold_no_test_picture(learn_from, dataset):
    tested = {sample.sha256 for sample in dataset.select(split="test")}
    for category, training in learn_from.items():
        assert tested.isdisjoint(training.normals.ids)
        assert tested.isdisjoint(training.anomalies.ids)
        assert (len(training.samples), len(training.kinds)) == (12, 60)
        assert training.category == category


def test_painting_without_normals_is_named(tmp_path, models):
    complete = tiny_clip.write_dataset(tmp_path, ("harbour",))
    data.write_manifest(tmp_path / "manifest.csv", complete.select(split="test"))
    dataset = data.open_dataset(tmp_path)
    embedded = features.embed_samples(dataset.samples, **models)
    with pytest.raises(ValueError, match="harbour has no normal picture outside the test split"):
        clip_methods.trainings(dataset, embedded, **models, n_anomalies=5, seed=0)


# ------------------------------------------------------------------------------------------------- fit and predict


def test_fitting_has_no_way_to_see_test_pictures():
    assert not {"dataset", "embedded", "samples", "test"} & set(inspect.signature(clip_methods.fit_all).parameters)


@pytest.mark.parametrize("method", one_class.METHODS)
def test_results_are_read_back_as_the_detector_scored(method, learn_from, dataset, embedded, tmp_path):
    fitted = fit(method, learn_from, tmp_path / "checkpoints")
    found = predict(method, fitted, dataset, embedded, tmp_path / "results")
    assert [p.sample for p in found.predictions] == dataset.select(split="test")
    for category, one in fitted.items():
        chosen = [p for p in found.predictions if p.sample.category == category]
        scores = one.detector.score(embedded.of([p.sample for p in chosen]))
        np.testing.assert_allclose([p.anomaly_score for p in chosen], scores, rtol=1e-6)
        assert {p.threshold for p in chosen} == {one.threshold}
        assert all(0 < p.p_value <= 1 and p.seconds > 0 for p in chosen)
        assert len(one.normal_scores) == 12
    has_map = found.anomaly_map(found.predictions[0]) is not None
    assert has_map == (method == "clip_patch_knn")
    assert found.manifest["settings"]["harbour"]["threshold"] == fitted["harbour"].threshold


def test_a_negative_of_the_painting_is_found(learn_from, dataset, embedded, tmp_path):
    found = predict("clip_resnet50", fit("clip_resnet50", learn_from, tmp_path), dataset, embedded, tmp_path / "r")
    replicas = [p for p in found.predictions if p.sample.kind == "replica"]
    assert len(replicas) == 2
    assert all(p.is_predicted_anomalous for p in replicas)


def test_search_is_kept_until_something_changes(learn_from, tmp_path, monkeypatch):
    first = fit("clip_lof", learn_from, tmp_path)
    monkeypatch.setattr(tuning, "tune", None)  # a search would now fail
    again = fit("clip_lof", learn_from, tmp_path)
    for category in first:
        np.testing.assert_equal(dataclasses.asdict(again[category].tuned), dataclasses.asdict(first[category].tuned))
        assert again[category].threshold == first[category].threshold
    for change in ({"seed": 1}, {"n_trials": 2}):
        with pytest.raises(TypeError):
            fit("clip_lof", learn_from, tmp_path, **change)


def test_complete_results_are_not_made_again(learn_from, dataset, embedded, tmp_path):
    fitted = fit("clip_resnet50", learn_from, tmp_path / "c")
    predict("clip_resnet50", fitted, dataset, embedded, tmp_path / "r")
    before = (tmp_path / "r" / results.MANIFEST).stat().st_mtime_ns
    predict("clip_resnet50", fitted, dataset, embedded, tmp_path / "r")
    assert (tmp_path / "r" / results.MANIFEST).stat().st_mtime_ns == before
    other = fit("clip_resnet50", learn_from, tmp_path / "c", alpha=0.5)
    found = predict("clip_resnet50", other, dataset, embedded, tmp_path / "r")
    assert found.predictions[0].threshold == other["harbour"].threshold != fitted["harbour"].threshold


def test_trained_head_lies_beside_its_record(learn_from, tmp_path):
    from safetensors.torch import load_file

    fitted = fit("clip_cross_entropy", learn_from, tmp_path)
    state = load_file(tmp_path / "harbour.safetensors")
    for name, tensor in fitted["harbour"].detector.state().items():
        assert torch.equal(state[name], tensor)


# ------------------------------------------------------------------------------------------------- report, tables


@pytest.mark.parametrize("method", ["clip_resnet50", "clip_cross_entropy", "clip_isolation_forest", "clip_lof"])
def test_report_rows_are_written_apart(method, dataset, embedded, models, tmp_path):
    options = {name: value for name, value in models.items() if name != "cnn"}
    folder = tmp_path / "results" / "report_2024" / method
    found = clip_methods.run_report_2024(
        method, dataset, embedded, **options, seed=0, results_dir=folder, profile="mini"
    )
    assert len(found.predictions) == 10
    assert found.manifest["settings"]["preset"] == "report_2024"
    assert any("not stated in source" in str(value) for value in found.manifest["settings"].values())
    if method == "clip_isolation_forest":
        assert sum(p.is_predicted_anomalous for p in found.predictions) == 6


def test_tables_count_what_was_predicted(learn_from, dataset, embedded, models, tmp_path):
    fitted = {"clip_resnet50": fit("clip_resnet50", learn_from, tmp_path / "c")}
    found = {"clip_resnet50": predict("clip_resnet50", fitted["clip_resnet50"], dataset, embedded, tmp_path / "r")}
    right = sum(p.is_predicted_anomalous == p.sample.is_anomalous for p in found["clip_resnet50"].predictions)
    table = clip_methods.side_by_side({}, found)
    assert f"= {right}/10 [" in table.loc[("clip_resnet50", "sound"), "accuracy"]
    assert table.loc[("clip_resnet50", "sound"), "normals passed"].endswith("/6")
    assert list(clip_methods.per_painting(found, fitted).index.get_level_values("painting")) == ["harbour", "portrait"]
    assert len(clip_methods.search_table(fitted)) == 2
    sets = clip_methods.score_sets(found)
    assert [(s.category, len(s.scores), int(s.labels.sum())) for s in sets] == [("harbour", 5, 2), ("portrait", 5, 2)]


def test_map_examples_show_a_normal_and_masked_pictures(learn_from, dataset, embedded, tmp_path):
    fitted = fit("clip_patch_knn", learn_from, tmp_path / "c")
    found = predict("clip_patch_knn", fitted, dataset, embedded, tmp_path / "r")
    panels = clip_methods.map_examples(found, n_per_painting=3)
    assert [panel.caption.split(", ")[0] for panel in panels] == [
        "Harbour: good",
        "Harbour: box",
        "Portrait: good",
        "Portrait: box",
    ]
    assert all(panel.anomaly_map.shape == (4, 4) for panel in panels)
    assert not panels[0].mask.any()
    assert panels[1].mask.any()


@pytest.mark.parametrize("links", [True, False])
def test_sorted_folders_hold_every_picture_once(learn_from, dataset, embedded, tmp_path, monkeypatch, links):
    fitted = fit("clip_resnet50", learn_from, tmp_path / "c")
    found = predict("clip_resnet50", fitted, dataset, embedded, tmp_path / "r")
    if not links:  # as on Google Drive

        def refuse(self, target, target_is_directory=False):
            raise OSError("links are not supported")

        monkeypatch.setattr(Path, "symlink_to", refuse)
    for _ in range(2):  # the second sorting replaces the first
        folder = clip_methods.sort_pictures(found, tmp_path / "sorted")
        files = {name: sorted((folder / name).iterdir()) for name in clip_methods.SORTED_FOLDERS}
        n_anomalous = sum(p.is_predicted_anomalous for p in found.predictions)
        assert (len(files["anomaly"]), len(files["non_anomaly"])) == (n_anomalous, 10 - n_anomalous)
    contents = sorted(path.read_bytes() for paths in files.values() for path in paths)
    assert contents == sorted(p.sample.image_path.read_bytes() for p in found.predictions)
    assert all(path.is_symlink() == links for path in files["anomaly"])
    assert any(path.name.startswith("harbour__replica__") for path in files["anomaly"])


# ------------------------------------------------------------------------------------------------- tuning, new pictures


def test_tuned_is_measured_against_default_on_the_test_pictures(learn_from, dataset, embedded, tmp_path):
    tuned = {"clip_lof": fit("clip_lof", learn_from, tmp_path, n_trials=6)}
    default = {"clip_lof": fit("clip_lof", learn_from, None, n_trials=1)}
    bought = clip_methods.what_tuning_bought(default, tuned, dataset, embedded)
    for (_, category), row in bought.iterrows():
        samples = dataset.select(split="test", category=category)
        labels = [sample.is_anomalous for sample in samples]
        for name, found in (("tuned", tuned), ("default", default)):
            scores = found["clip_lof"][category].detector.score(embedded.of(samples))
            assert row[name] == pytest.approx(metrics.image_auroc(scores, labels))
        assert row["difference"] == pytest.approx(row["tuned"] - row["default"])
    assert default["clip_lof"]["harbour"].tuned.settings == one_class.DEFAULTS["clip_lof"]
    assert len(clip_methods.tuning_sets(tuned)) == 2 and not clip_methods.tuning_sets(default)


def test_tuning_verdict_says_what_the_table_shows():
    index = pd.MultiIndex.from_product([["clip_lof", "clip_resnet50"], ["a", "b"]], names=["method", "painting"])
    bought = pd.DataFrame({"difference": [0.1, -0.02, -0.3, 0.1], "p_holm": [0.01, 0.9, 0.02, 0.5]}, index=index)
    words = clip_methods.tuning_verdict(bought)
    assert "in 1 of 2 methods (CLIP LOF)" in words
    assert "Of 4 comparisons, 1 are better and 1 worse than luck explains." in words


def test_scorer_scores_any_picture_of_its_paintings(learn_from, dataset, embedded, models, tmp_path):
    fitted = fit("clip_resnet50", learn_from, tmp_path)
    samples = [*dataset.select(split="test", category="portrait"), *dataset.select(split="test", category="harbour")]
    found = {p.sample.sha256: p for p in clip_methods.scorer(fitted, **models)(samples)}
    for sample in samples:
        one = fitted[sample.category]
        assert found[sample.sha256].anomaly_score == pytest.approx(one.detector.score(embedded.of([sample]))[0])
        assert found[sample.sha256].threshold == one.threshold
    again = fit("clip_resnet50", learn_from, tmp_path)
    assert clip_methods.fitted_id(again) == clip_methods.fitted_id(fitted)
    other = fit("clip_resnet50", learn_from, tmp_path, alpha=0.4)
    assert clip_methods.fitted_id(other) != clip_methods.fitted_id(fitted)
