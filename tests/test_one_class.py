"""The five detectors: against plain versions and scikit-learn, what they promise, and what they must refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from tiny_clip import KINDS, QUICK, draw, features_of, rows_of, sample_of

from helpers.clip import one_class, tuning
from helpers.clip.features import Features
from helpers.clip.one_class import VIEW, Cosine, Forest, Head, Lof, PatchKnn, Rows
from helpers.judge import metrics, statistics


@pytest.fixture(scope="module")
def rows() -> Rows:
    return rows_of()


def normals_of(rows: Rows) -> Features:
    return rows.features.take(rows.has("kind", "good"))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_fused_products_are_mixed_cosines(weight):
    a, b = draw(5, 0, "a", 3), draw(4, 1, "b", 4)

    def cosine(x, y):
        return float(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))

    plain = [
        [(1 - weight) * cosine(a.clip[i], b.clip[j]) + weight * cosine(a.cnn[i], b.cnn[j]) for j in range(4)]
        for i in range(5)
    ]
    np.testing.assert_allclose(one_class.fuse(a, weight) @ one_class.fuse(b, weight).T, plain, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_cosine_is_the_plain_loop(rows, k):
    test = draw(6, 1, "t", 5)
    similarity = one_class.fuse(test, 0.25) @ one_class.fuse(normals_of(rows), 0.25).T
    plain = [1 - np.mean(sorted(row)[-k:]) for row in similarity.astype(np.float64)]
    np.testing.assert_allclose(Cosine(cnn_weight=0.25, k=k).fit(rows).score(test), plain, atol=1e-6)


def test_forest_and_lof_are_sklearns_with_the_sign_turned(rows):
    test = draw(6, 1, "t", 5)
    learnt, queries = np.unique(one_class.fuse(normals_of(rows), 0.5), axis=0), one_class.fuse(test, 0.5)
    forest = IsolationForest(n_estimators=50, max_features=0.5, random_state=4).fit(learnt)
    found = Forest(n_trees=50, max_features=0.5, seed=4).fit(rows).score(test)
    np.testing.assert_allclose(found, -forest.score_samples(queries))
    lof = LocalOutlierFactor(n_neighbors=7, novelty=True, metric="cosine").fit(learnt)
    found = Lof(n_neighbors=7, metric="cosine").fit(rows).score(test)
    np.testing.assert_allclose(found, -lof.score_samples(queries))


def test_patch_knn_is_the_plain_triple_loop():
    normals, test = draw(3, 0, "n", 6), draw(2, 1, "t", 7)
    detector = PatchKnn(top_fraction=0.2).fit(Rows.of([sample_of(i) for i in range(3)], normals))
    plain, bank = np.empty((2, 4, 4)), normals.patches.astype(np.float64).reshape(-1, 12)
    for i, y, x in np.ndindex(plain.shape):
        q = test.patches[i, y, x].astype(np.float64)
        plain[i, y, x] = min(1 - q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank)
    _, maps = detector.look(test)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, plain, atol=1e-5)
    top = [np.mean(sorted(m.ravel())[-3:]) for m in plain]  # 20 % of 16 patches
    np.testing.assert_allclose(detector.score(test), top, atol=1e-5)


def test_quick_auroc_is_the_metric():
    rng = np.random.default_rng(0)
    for _ in range(50):
        normal, anomalous = (rng.integers(-3, 4, rng.integers(1, 12)) for _ in range(2))
        labels = np.repeat([False, True], [len(normal), len(anomalous)])
        expected = metrics.image_auroc(np.concatenate([normal, anomalous]), labels)
        assert one_class.auroc_of(normal, anomalous) == pytest.approx(expected)


@pytest.mark.parametrize("method", one_class.METHODS)
def test_higher_score_means_more_anomalous_and_repeats(rows, method):
    assert all(getattr(one_class.DETECTORS[method], n) in values for n, values in one_class.SPACES[method].items())
    detector = clone(QUICK[method]).fit(rows)
    normal, anomalous = detector.score(draw(30, 0, "t", 8)), detector.score(draw(30, 4, "u", 9))
    assert normal.dtype == np.float64
    assert metrics.image_auroc(np.concatenate([normal, anomalous]), np.repeat([False, True], 30)) > 0.8
    np.testing.assert_array_equal(clone(QUICK[method]).fit(rows).score(draw(30, 0, "t", 8)), normal)


def test_a_row_is_charged_for_the_networks_it_uses():
    one = dataclasses.replace(draw(1, 0, "t", 1), seconds=np.array([[1, 20, 300]], np.float32))
    detectors = (Cosine(), Forest(cnn_weight=0.0), Cosine(cnn_weight=1.0), PatchKnn())
    assert [float(detector.seconds(one)[0]) for detector in detectors] == [321, 21, 301, 21]


@pytest.mark.parametrize("method", one_class.METHODS)
def test_false_alarms_on_exchangeable_normals_stay_near_alpha(method, n=30):
    """Datasets of 30 normals, 40 fresh ones each, at a promised rate of 10 %."""
    n_draws = 12 if method in ("clip_isolation_forest", "clip_cross_entropy") else 40
    samples, kinds = [sample_of(i) for i in range(n)], [KINDS[i % 6] for i in range(n)]
    rng, alarms = np.random.default_rng(1), []
    for number in range(n_draws):
        everything = features_of(rng.normal(size=(n + 40, 6)), "n", seed=number)
        marks = Rows.of(samples, draw(n, 3, "a", number), kinds)
        rows = Rows.join([Rows.of(samples, everything.take(range(n))), marks])
        detector = clone(QUICK[method]).set_params(augment=False)
        detector.set_params(**({"n_trees": 20} if hasattr(detector, "n_trees") else {}))
        detector, scores = tuning.calibrate(detector, rows, seed=number)
        threshold = statistics.conformal_threshold(scores[np.isfinite(scores)], 0.1)
        alarms.append(np.mean(detector.score(everything.take(range(n, n + 40))) > threshold))
    assert 0.03 < np.mean(alarms) < 0.135


def test_early_stopping_restores_the_best_weights(rows, monkeypatch):
    curve, auroc_of = [], one_class.auroc_of
    monkeypatch.setattr(one_class, "auroc_of", lambda *scores: curve.append(auroc_of(*scores)) or curve[-1])
    head = Head(n_hidden=64, dropout=0.0, learning_rate=0.05, weight_decay=0.0, patience=10, augment=False).fit(rows)
    _, tune = head._parts(rows)
    odds = head.score(tune.features)
    assert metrics.image_auroc(odds, tune.is_anomaly) == pytest.approx(max(curve))
    assert len(curve) == int(np.argmax(curve)) + 1 + 10
    assert not head.net.training


def test_head_keeps_kinds_and_pictures_for_tuning(rows):
    learn, tune = Head()._parts(rows)
    kinds = [set(part.table["kind"][part.is_anomaly]) for part in (learn, tune)]
    assert kinds[0].isdisjoint(kinds[1]) and kinds[0] | kinds[1] == set(KINDS)
    assert set(learn.table["group"]).isdisjoint(tune.table["group"])
    assert VIEW not in set(tune.table["kind"])


def test_a_stored_head_scores_as_before_by_hand(rows, tmp_path):
    head, test = clone(QUICK["clip_cross_entropy"]).fit(rows), draw(5, 1, "t", 8)
    save_file(head.net.state_dict(), tmp_path / "head.safetensors")
    state = load_file(tmp_path / "head.safetensors")
    np.testing.assert_array_equal(clone(head).with_state(state).score(test), head.score(test))
    arrays = {name: tensor.numpy().astype(np.float64) for name, tensor in state.items()}
    hidden = one_class.fuse(test, 0.5) @ arrays["0.weight"].T + arrays["0.bias"]
    hidden = np.maximum(hidden @ arrays["1.weight"].T + arrays["1.bias"], 0)
    logits = hidden @ arrays["4.weight"].T + arrays["4.bias"]
    np.testing.assert_allclose(head.score(test), logits[:, 1] - logits[:, 0], atol=1e-3)


@pytest.mark.parametrize("change", [{"split": "test"}, {"is_anomalous": True, "kind": "box"}])
def test_no_test_or_anomalous_picture_becomes_a_row(change):
    wrong = dataclasses.replace(sample_of(0), **change)
    for kinds in (None, [VIEW], ["box"]):
        with pytest.raises(ValueError, match="art: .*'train' and 'calibration' only"):
            Rows.of([wrong], draw(1, 0, "n", 1), kinds)


def test_a_detector_belongs_to_one_painting_and_needs_pictures_that_differ(rows):
    with pytest.raises(ValueError, match="one painting, got .*art.*other"):
        Rows.of([sample_of(0), sample_of(1, category="other")], draw(2, 0, "n", 1))
    same = Rows.of([sample_of(i) for i in range(6)], features_of(np.ones((6, 6)), "n"))
    for method in ("clip_resnet50", "clip_isolation_forest", "clip_lof"):
        with pytest.raises(ValueError, match="art: .* at least 3 different genuine pictures, got 1"):
            clone(QUICK[method]).fit(same)
    flat = dataclasses.replace(rows, features=features_of(np.ones((len(rows), 6)), "n"))
    with pytest.raises(ValueError, match="art: the features of all training pictures are equal"):
        clone(QUICK["clip_cross_entropy"]).fit(flat)
    with pytest.raises(ValueError, match="art: 0 synthetic anomalies of 0 kinds"):
        Head().fit(rows.take(~rows.is_anomaly))


@pytest.mark.filterwarnings("error")  # scikit-learn warns when it has to cut neighbours itself
def test_copies_do_not_blow_up_lof_and_it_cuts_its_neighbours_to_the_pictures_it_has():
    drawn = np.random.default_rng(0).normal(size=(12, 6))
    copies = features_of(np.concatenate([np.repeat(drawn[:1], 30, axis=0), drawn]), "n")
    rows = Rows.of([sample_of(i) for i in range(42)], copies)
    assert Lof(n_neighbors=5).fit(rows).score(draw(10, 0, "t", 3)).max() < 100

    rows = Rows.of([sample_of(i) for i in range(4)], draw(4, 0, "n", 1))
    assert np.isfinite(Lof(n_neighbors=20).fit(rows).score(draw(3, 0, "t", 2))).all()
