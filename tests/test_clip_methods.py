"""The CLIP methods on a tiny real dataset on disk: what is learnt from, results, what is loaded, the report of 2024."""

import collections
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_clip
from sklearn.neighbors import LocalOutlierFactor
from sklearn.preprocessing import normalize
from tiny_clip import draw

from helpers import files, results, synthesis
from helpers.clip import features, methods, one_class, report_2024, tuning
from helpers.clip.one_class import VIEW
from helpers.data import images
from helpers.judge import metrics

ALL = one_class.METHODS


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> SimpleNamespace:
    """A dataset, its networks and features, and what may be learnt from."""
    folder = tmp_path_factory.mktemp("clip")
    dataset = tiny_clip.write_dataset(folder / "data")
    models = features.Models(tiny_clip.clip(), tiny_clip.cnn(), folder / "features")
    embedded = features.embed_samples(dataset.samples, models)
    rows = methods.learning_rows(dataset, embedded, models, n_anomalies=36, seed=1)
    return SimpleNamespace(dataset=dataset, models=models, embedded=embedded, rows=rows)


def run(names, given, home, n_trials: int = 2, **changed):
    """What notebook 03 does, into a folder; ``changed``: other dataset or rows."""
    profile = SimpleNamespace(
        name="mini", device="cpu", seed=1, clip=SimpleNamespace(max_epochs=8, max_bank_rows=200),
        checkpoint_dir=(home / "checkpoints").joinpath, results_dir=(home / "results").joinpath,
    )  # fmt: skip
    what = [changed.get(name, getattr(given, name)) for name in ("dataset", "rows", "embedded")]
    return methods.fit_and_test(names, *what, profile=profile, n_trials=n_trials, alpha=0.1)


@pytest.fixture(scope="module")
def home(given, tmp_path_factory) -> Path:
    """What notebook 03 leaves behind."""
    home = tmp_path_factory.mktemp("home")
    run(ALL, given, home)
    return home


def result_of(method: str, home: Path, given) -> results.MethodResult:
    dataset = given.dataset
    return results.read(home / "results" / method, dataset.samples, dataset.folder, dataset.hash)


def test_kinds_come_equally_often_and_held_out_ones_never(given):
    held = dataclasses.replace(given.dataset, kinds_held_out=("box", "tear", "invert"))
    n = 4 * (len(synthesis.LOCAL_KINDS) - 2 + 1)
    kinds = collections.Counter(methods.deal_kinds(held, n, seed=2))
    local = {kind: n for kind, n in kinds.items() if kind in synthesis.LOCAL_KINDS}
    assert set(local) == set(synthesis.LOCAL_KINDS) - {"box", "tear"}
    assert set(local.values()) == {4} and sum(kinds.values()) == n
    assert kinds.keys() - local.keys() <= set(synthesis.ANOMALOUS_VARIATIONS) - {"invert"}
    assert methods.deal_kinds(held, n, seed=2) == methods.deal_kinds(held, n, seed=2)


def test_rows_hold_no_test_picture_every_picture_as_often_and_are_not_made_twice(given, monkeypatch):
    tested = {sample.sha256 for sample in given.dataset.select(split="test")}
    for category, rows in given.rows.items():
        assert not {key.split("/")[0] for key in rows.features.ids} & tested and rows.category == category
        assert (rows.has("kind", "good").sum(), rows.has("kind", VIEW).sum(), rows.is_anomaly.sum()) == (12, 8, 36)
        assert set(rows.table["group"][rows.is_anomaly].value_counts()) == {3}
    sample = given.dataset.select(split="train")[0]
    first, again, view = (methods.make_picture(sample, kind, 4, 1) for kind in ("box", "box", VIEW))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, view)
    monkeypatch.setattr(methods, "make_picture", None)  # it would fail
    again = methods.learning_rows(given.dataset, given.embedded, given.models, n_anomalies=36, seed=1)
    np.testing.assert_array_equal(again["harbour"].features.clip, given.rows["harbour"].features.clip)


@pytest.mark.parametrize("n_pictures", [0, 1, 9])
def test_few_or_no_genuine_pictures_beside_a_rich_painting(n_pictures, given, tmp_path, capsys):
    dataset = given.dataset
    few = [s for s in dataset.select(category="harbour", is_anomalous=False) if s.split != "test"][:n_pictures]
    kept = [s for s in dataset.samples if s.category == "portrait" or s.split == "test"]
    poor = dataclasses.replace(dataset, samples=(*few, *kept))
    rows = methods.learning_rows(poor, given.embedded, given.models, n_anomalies=30, seed=0)
    if n_pictures == 0:
        assert list(rows) == ["portrait"] and "harbour is left out" in capsys.readouterr().out
        return
    assert rows["harbour"].has("kind", "good").sum() == 12
    found = run(("clip_cross_entropy", "clip_lof", "clip_patch_knn"), given, tmp_path, dataset=poor, rows=rows)
    said = capsys.readouterr().out
    assert f"harbour: {n_pictures} genuine pictures only; {12 - n_pictures} re-photographs" in said
    assert "leaves out" not in said
    for method, result in found.items():
        facts = result.manifest["calibration"]["harbour"]
        assert (len(result.predictions), facts["n"], facts["n_sources"]) == (10, 12, n_pictures)
        kept = files.read_json(tmp_path / "checkpoints" / method / "fitted.json")
        assert bool(kept["harbour"]["trials"]) == (n_pictures >= tuning.MIN_SOURCES) and kept["portrait"]["trials"]
        assert kept["harbour"]["trials"] or kept["harbour"]["note"].startswith("harbour: ")


@pytest.mark.parametrize("method", ALL)
def test_results_are_what_the_loaded_detector_says(method, home, given):
    found = result_of(method, home, given)
    assert [p.sample for p in found.predictions] == given.dataset.select(split="test")
    assert all(0 < p.p_value <= 1 and p.seconds > 0 for p in found.predictions)
    assert (found.anomaly_map(found.predictions[0]) is not None) == (method == "clip_patch_knn")
    loaded = methods.load(given.dataset, given.models, checkpoint_dir=(home / "checkpoints").joinpath, seed=1)[method]
    for prediction in found.predictions[::3]:
        sample = prediction.sample
        (one,) = loaded.score(sample.category, [images.load_image(sample.image_path)])
        assert one.anomaly_score == pytest.approx(prediction.anomaly_score, rel=1e-4)
        assert (one.anomaly_map is not None) == (method == "clip_patch_knn")


def test_what_a_row_was_trained_on_and_what_it_found_stand_beside_it(home, given):
    result = result_of("clip_cross_entropy", home, given)
    assert result.manifest["trained_on"].startswith("genuine pictures and synthetic anomalies; settings searched")
    kinds = {kind for rows in given.rows.values() for kind in rows.table["kind"][rows.is_anomaly]}
    assert set(result.manifest["trained_on_kinds"]) == kinds
    assert result.manifest["calibration"]["harbour"]["n_sources"] == 12
    names = {path.name for path in (home / "checkpoints" / "clip_cross_entropy").iterdir()}
    assert names == {"fitted.json", "heads.safetensors"}, "no painting's name becomes a path"
    row = methods.table(result.frame()).loc[("CLIP cross-entropy head", "Harbour")]
    mine = result.frame().query("category == 'harbour'")
    n_found = int((mine["is_predicted_anomalous"] & mine["is_anomalous"]).sum())
    assert row["anomalies found"] == f"{n_found} of 2" and row["genuine passed"].endswith("of 3")
    assert row["AUROC"].startswith(f"{metrics.image_auroc(mine['anomaly_score'], mine['is_anomalous']):.3f} [")


def test_searches_and_results_are_kept_until_something_changes(given, tmp_path, monkeypatch):
    run(["clip_lof"], given, tmp_path)
    monkeypatch.setattr(tuning, "tune", None)  # a search would now fail
    monkeypatch.setattr(methods.Fitted, "score", None)  # and so would scoring
    assert len(run(["clip_lof"], given, tmp_path)["clip_lof"].predictions) == 10
    with pytest.raises(TypeError):
        run(["clip_lof"], given, tmp_path, n_trials=3)


def test_one_painting_that_cannot_be_fitted_stops_no_other(given, tmp_path, capsys):
    flat = given.rows["harbour"].features
    flat = dataclasses.replace(flat, clip=np.ones_like(flat.clip), cnn=np.ones_like(flat.cnn))
    rows = given.rows | {"harbour": dataclasses.replace(given.rows["harbour"], features=flat)}
    found = run(["clip_lof"], given, tmp_path, rows=rows)["clip_lof"]
    assert {p.sample.category for p in found.predictions} == {"portrait"}
    assert "CLIP LOF leaves out Harbour: harbour: Lof needs at least 3 different" in capsys.readouterr().out


@pytest.mark.parametrize("links", [True, False])
def test_sorted_folders_hold_every_picture_once_and_stay_inside(home, given, tmp_path, monkeypatch, links):
    found = result_of("clip_resnet50", home, given)
    found = dataclasses.replace(found, predictions=[
        dataclasses.replace(one, sample=dataclasses.replace(one.sample, category="../../evil"))
        for one in found.predictions
    ])  # fmt: skip
    if not links:  # as on Google Drive
        monkeypatch.setattr(Path, "symlink_to", Mock(side_effect=OSError("links are not supported")))
    for _ in range(2):  # the second sorting replaces the first
        folder = methods.sort_pictures(found, tmp_path / "sorted")
        sorted_ = {name: sorted((folder / name).iterdir()) for name in ("anomaly", "non_anomaly")}
        n_anomalous = sum(p.is_predicted_anomalous for p in found.predictions)
        assert (len(sorted_["anomaly"]), len(sorted_["non_anomaly"])) == (n_anomalous, 10 - n_anomalous)
    contents = sorted(path.read_bytes() for paths in sorted_.values() for path in paths)
    assert contents == sorted(p.sample.image_path.read_bytes() for p in found.predictions)
    assert all(path.is_symlink() == links and "__replica__" in path.name for path in sorted_["anomaly"][-1:])


def test_the_rules_of_2024_are_as_loose_and_as_strict_as_the_report_used_them(given):
    train, views = {"train": draw(20, 0, "n", 1), "views": None}, draw(80, 0, "n", 1)
    scores, threshold = report_2024.verdicts("clip_resnet50", **train, test=draw(30, 0, "t", 2))
    assert (scores > threshold).all()  # the 100 % row: genuine pictures that are no byte copies are all called forged
    scores, _ = report_2024.verdicts("clip_resnet50", **train, test=train["train"])
    assert scores.max() < 1e-6  # copies reach 1 up to rounding
    for shift in (0.0, 5.0):  # percentile 60 calls 60 % anomalous, whatever is shown
        scores, threshold = report_2024.verdicts("clip_isolation_forest", **train, test=draw(50, shift, "t", 2))
        assert (scores > threshold).sum() == 30
    fresh = draw(400, 0, "t", 2)
    scores, threshold = report_2024.verdicts("clip_lof", train=views, views=views, test=fresh)
    lof = LocalOutlierFactor(n_neighbors=20, contamination=0.45, novelty=True).fit(normalize(views.clip))
    np.testing.assert_array_equal(scores > threshold, lof.predict(normalize(fresh.clip)) == -1)
    assert 0.35 < np.mean(scores > threshold) < 0.7  # 46.5 % in a simulation
    found = report_2024.predictions(given.dataset, given.embedded, given.models, seed=0)
    assert list(found["method"].unique()) == list(report_2024.PRESETS.index) and len(methods.table(found)) == 8
    assert len(found) == 4 * 10 and np.isfinite(found["anomaly_score"]).all()
    assert found[found["method"] == "clip_isolation_forest"]["is_predicted_anomalous"].sum() == 6
