"""The five detectors, the search of their settings and their calibration: against plain versions and scikit-learn, what
they promise, what may be seen by what, and what they must refuse."""

import dataclasses
import zlib
from typing import ClassVar

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from tiny_clip import KINDS, QUICK, draw, features_of, rows_of, sample_of

from helpers.clip import one_class, tuning
from helpers.clip.features import Features
from helpers.clip.one_class import CONFIRMED, SPACES, VIEW, Cosine, Detector, Forest, Head, Lof, PatchKnn, Rows
from helpers.judge import metrics, statistics

METHODS = one_class.METHODS


@pytest.fixture(scope="module")
def rows() -> Rows:
    return rows_of()


def defaults(method: str) -> dict:
    return {name: getattr(QUICK[method], name) for name in SPACES[method]}


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_fused_products_are_mixed_cosines(weight):
    a, b = draw(5, 0, "a", 3), draw(4, 1, "b", 4)
    cosines = [x @ y.T / np.outer(*(np.linalg.norm(z, axis=1) for z in (x, y)))
               for x, y in ((a.clip, b.clip), (a.cnn, b.cnn))]  # fmt: skip
    plain = (1 - weight) * cosines[0] + weight * cosines[1]
    np.testing.assert_allclose(one_class.fuse(a, weight) @ one_class.fuse(b, weight).T, plain, atol=1e-5)


def test_cosine_forest_and_lof_are_the_plain_loop_and_sklearns_with_the_sign_turned(rows):
    test, normals = draw(6, 1, "t", 5), rows.features.take(rows.has("kind", "good"))
    similarity = one_class.fuse(test, 0.25) @ one_class.fuse(normals, 0.25).T
    for k in (1, 3):
        plain = [1 - np.mean(sorted(row)[-k:]) for row in similarity.astype(np.float64)]
        np.testing.assert_allclose(Cosine(cnn_weight=0.25, k=k).fit(rows).score(test), plain, atol=1e-6)
    learnt, queries = np.unique(one_class.fuse(normals, 0.5), axis=0), one_class.fuse(test, 0.5)
    forest = IsolationForest(n_estimators=50, max_features=0.5, random_state=4)
    lof = LocalOutlierFactor(n_neighbors=7, novelty=True, metric="cosine")
    ours = Forest(n_trees=50, max_features=0.5, seed=4), Lof(n_neighbors=7, metric="cosine")
    for one, plain in zip(ours, (forest, lof)):
        np.testing.assert_allclose(one.fit(rows).score(test), -plain.fit(learnt).score_samples(queries))


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


@pytest.mark.parametrize("method", METHODS)
def test_higher_score_means_more_anomalous_and_repeats(rows, method):
    assert all(getattr(one_class.DETECTORS[method], n) in values for n, values in SPACES[method].items())
    detector = clone(QUICK[method]).fit(rows)
    normal, anomalous = detector.score(draw(30, 0, "t", 8)), detector.score(draw(30, 4, "u", 9))
    assert normal.dtype == np.float64
    assert metrics.image_auroc(np.concatenate([normal, anomalous]), np.repeat([False, True], 30)) > 0.8
    np.testing.assert_array_equal(clone(QUICK[method]).fit(rows).score(draw(30, 0, "t", 8)), normal)


def test_a_row_is_charged_for_the_networks_it_uses():
    one = dataclasses.replace(draw(1, 0, "t", 1), seconds=np.array([[1, 20, 300]], np.float32))
    detectors = (Cosine(), Forest(cnn_weight=0.0), Cosine(cnn_weight=1.0), PatchKnn())
    assert [float(detector.seconds(one)[0]) for detector in detectors] == [321, 21, 301, 21]


@pytest.mark.parametrize("method", METHODS)
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
        detector, scores = tuning.calibrate(detector, rows, seed=number)
        threshold = statistics.conformal_threshold(scores[np.isfinite(scores)], 0.1)
        alarms.append(np.mean(detector.score(everything.take(range(n, n + 40))) > threshold))
    assert 0.03 < np.mean(alarms) < 0.135


def test_the_head_stops_early_on_other_kinds_and_pictures_and_restores_its_best_weights(rows, monkeypatch):
    curve = []
    monkeypatch.setattr(one_class, "image_auroc", lambda *one: curve.append(metrics.image_auroc(*one)) or curve[-1])
    head = Head(n_hidden=64, dropout=0.0, learning_rate=0.05, weight_decay=0.0, patience=10, augment=False).fit(rows)
    learn, tune = head._parts(rows)
    assert metrics.image_auroc(head.score(tune.features), tune.is_anomaly) == pytest.approx(max(curve))
    assert len(curve) == int(np.argmax(curve)) + 1 + 10 and not head.net.training
    kinds = [set(part.table["kind"][part.is_anomaly]) for part in (learn, tune)]
    assert kinds[0].isdisjoint(kinds[1]) and kinds[0] | kinds[1] == set(KINDS) and not tune.has("kind", VIEW).any()
    assert set(learn.table["group"]).isdisjoint(tune.table["group"])


def test_a_stored_head_scores_as_before_by_hand(rows, tmp_path):
    head, test = clone(QUICK["clip_cross_entropy"]).fit(rows), draw(5, 1, "t", 8)
    save_file(head.net.state_dict(), tmp_path / "head.safetensors")
    state = load_file(tmp_path / "head.safetensors")
    np.testing.assert_array_equal(clone(head).with_state(state).score(test), head.score(test))
    values = one_class.fuse(test, 0.5)
    for layer in (0, 1, 4):
        values = values @ state[f"{layer}.weight"].numpy().astype(np.float64).T + state[f"{layer}.bias"].numpy()
        values = np.maximum(values, 0) if layer == 1 else values
    np.testing.assert_allclose(head.score(test), values[:, 1] - values[:, 0], atol=1e-3)


def test_rows_refuse_test_and_anomalous_pictures_and_a_detector_those_of_two_paintings_or_all_alike(rows):
    for change in ({"split": "test"}, {"is_anomalous": True, "kind": "box"}):
        for kinds in (None, [VIEW], ["box"]):
            with pytest.raises(ValueError, match="art: .*'train' and 'calibration' only"):
                Rows.of([dataclasses.replace(sample_of(0), **change)], draw(1, 0, "n", 1), kinds)
    with pytest.raises(ValueError, match="one painting, got .*art.*other"):
        Rows.of([sample_of(0), sample_of(1, category="other")], draw(2, 0, "n", 1))
    same = Rows.of([sample_of(i) for i in range(6)], features_of(np.ones((6, 6)), "n"))
    flat = dataclasses.replace(rows, features=features_of(np.ones((len(rows), 6)), "n"))
    few = "art: .* at least 3 different genuine pictures, got 1"
    for method, given, words in (
        ("clip_resnet50", same, few), ("clip_isolation_forest", same, few), ("clip_lof", same, few),
        ("clip_cross_entropy", flat, "art: the features of all training pictures are equal"),
        ("clip_cross_entropy", rows.take(~rows.is_anomaly), "art: 0 synthetic anomalies of 0 kinds"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            clone(QUICK[method]).fit(given)


@pytest.mark.filterwarnings("error")  # scikit-learn warns when it has to cut neighbours itself
def test_copies_do_not_blow_up_lof_and_it_cuts_its_neighbours_to_the_pictures_it_has():
    drawn = np.random.default_rng(0).normal(size=(12, 6))
    copies = features_of(np.concatenate([np.repeat(drawn[:1], 30, axis=0), drawn]), "n")
    rows = Rows.of([sample_of(i) for i in range(42)], copies)
    assert Lof(n_neighbors=5).fit(rows).score(draw(10, 0, "t", 3)).max() < 100
    rows = Rows.of([sample_of(i) for i in range(4)], draw(4, 0, "n", 1))
    assert np.isfinite(Lof(n_neighbors=20).fit(rows).score(draw(3, 0, "t", 2))).all()


@dataclasses.dataclass(eq=False, repr=False)
class Coin(Detector):
    """A made-up detector that scores at random, and remembers what it was fitted and asked on."""

    face: int = 0
    seen: ClassVar[list[tuple[Rows, Features]]] = []

    def fit(self, rows):
        self._rows = rows
        return self

    def score(self, features):
        self.seen.append((self._rows, features))
        throw = zlib.crc32(repr((self.face, sorted(set(self._rows.table["group"])))).encode())
        return np.random.default_rng(throw).normal(size=len(features))


@pytest.mark.parametrize("method", METHODS)
def test_the_best_trial_is_chosen_and_the_same_seed_chooses_it_again(rows, method):
    found = tuning.tune(QUICK[method], SPACES[method], rows, n_trials=2, seed=3)
    values = [trial["auroc"] for trial in found["trials"]]
    assert len(values) == 2 and found["auroc"] == max(values) and found["default_auroc"] == values[0]
    assert found["trials"][0] == defaults(method) | {"auroc": values[0]}
    assert found["parameters"] | {"auroc": max(values)} == found["trials"][int(np.argmax(values))]
    assert 0 <= found["nested_auroc"] <= 1 and not found["note"]
    assert tuning.tune(QUICK[method], SPACES[method], rows, n_trials=2, seed=3) == found


@pytest.mark.parametrize("options", [{"n_trials": 99}, {"n_trials": 4, "strategy": "grid"}])
def test_the_default_is_tried_first_and_nothing_twice(rows, options):
    found = tuning.tune(Cosine(), SPACES["clip_resnet50"], rows, **options)
    tried = [(trial["cnn_weight"], trial["k"], trial["augment"]) for trial in found["trials"]]
    assert tried[0] == (0.5, 1, False) and len(tried) == len(set(tried)) == 20


def test_a_fit_knows_neither_sources_nor_kinds_of_what_it_is_measured_on(rows):
    facts = rows.table.set_axis(rows.features.ids)
    Coin.seen.clear()
    tuning.tune(Coin(), {"face": [0, 1]}, rows, n_trials=2)
    assert len(Coin.seen) == 2 * 3 + 3 * (2 * 2 + 1)
    for learnt, asked in Coin.seen:
        known, measured = (set(table["kind"]) & set(KINDS) for table in (learnt.table, facts.loc[list(asked.ids)]))
        assert known and measured and known.isdisjoint(measured) and not learnt.has("split", "calibration").any()
        assert set(facts.loc[list(asked.ids), "group"]).isdisjoint(learnt.table["group"])


def test_the_nested_estimate_of_a_coin_is_a_coin(rows):
    """The best of 60 random rankings looks good; what the same choice gives elsewhere does not."""
    found = [tuning.tune(Coin(), {"face": list(range(60))}, rows, n_trials=60, seed=seed) for seed in range(4)]
    assert min(one["auroc"] for one in found) > 0.55
    assert abs(np.mean([one["nested_auroc"] for one in found]) - 0.5) < 0.06


def test_a_picture_is_never_scored_by_a_detector_of_its_source():
    """Twins (one source) with equal features would score 0 if one of them stayed among the references."""
    drawn = np.random.default_rng(0).normal(size=(10, 6))
    twins = features_of(np.concatenate([drawn, drawn]), "n")
    rows = Rows.of([sample_of(i, group=f"g{i % 10}") for i in range(20)], twins)
    detector, scores = tuning.calibrate(Cosine(), rows)
    assert np.isfinite(scores).all() and scores.min() > 1e-4
    assert np.abs(detector.score(twins)).max() < 1e-6  # the final one knows all


def test_normals_and_confirmed_anomalies_are_scored_out_of_fold_and_nothing_else(rows):
    table = rows.table.copy()
    table.loc[table.index[rows.is_anomaly][::7], "kind"] = CONFIRMED
    marked = dataclasses.replace(rows, table=table)
    _, scores = tuning.calibrate(Cosine(), marked, n_folds=3, seed=2)
    np.testing.assert_array_equal(np.isfinite(scores), marked.has("kind", "good", CONFIRMED))
    for learn, held in one_class.folds(marked, 3, 2):
        asked = held[marked.has("kind", "good", CONFIRMED)[held]]
        expected = Cosine().fit(marked.take(learn)).score(marked.features.take(asked))
        np.testing.assert_allclose(scores[asked], expected)
        assert set(table["group"][learn]).isdisjoint(table["group"][held])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_sources", [1, 2, 5, 9])
def test_few_sources_search_or_say_why_not_and_always_get_a_threshold(method, n_sources):
    rows = rows_of(n_train=20, n_calibration=0, n_sources=n_sources)
    found = tuning.tune(QUICK[method], SPACES[method], rows, n_trials=2)
    if n_sources < tuning.MIN_SOURCES:
        assert found["note"].startswith(f"art: {n_sources} source pictures") and not found["trials"]
        assert found["parameters"] == defaults(method)
    else:
        assert len(found["trials"]) == 2 and 0 <= found["nested_auroc"] <= 1
    detector, scores = tuning.calibrate(clone(QUICK[method]).set_params(**found["parameters"]), rows)
    assert np.isfinite(scores).sum() == 20
    assert np.isfinite(detector.score(draw(5, 1, "t", 8))).all()
