"""Detectors, search and calibration: against plain versions and scikit-learn, and what they must refuse."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.clip import one_class, report_2024
from helpers.clip.features import Features
from helpers.clip.one_class import (
    CosineSettings,
    ForestSettings,
    HeadSettings,
    LofSettings,
    PatchKnnSettings,
    Training,
)
from helpers.judge import metrics
from helpers.judge import statistics as calibration
from helpers.records import Sample

KINDS = ("box", "line", "letter", "stain", "tear", "global")
QUICK = {
    "clip_resnet50": CosineSettings(),
    "clip_cross_entropy": HeadSettings(n_hidden=32, n_components=16, max_epochs=40),
    "clip_isolation_forest": ForestSettings(n_trees=50),
    "clip_lof": LofSettings(),
    "clip_patch_knn": PatchKnnSettings(),
}


def features_of(rows: np.ndarray, tag: str, seed: int = 0) -> Features:
    """Features whose three parts all carry ``rows`` ``(n, 6)`` in different directions."""
    rng = np.random.default_rng(99)
    noise = np.random.default_rng(seed)
    clip = 20.0 + rows @ rng.normal(size=(6, 24))
    cnn = 20.0 + rows @ rng.normal(size=(6, 40))
    patches = 3.0 + noise.normal(size=(len(rows), 4, 4, 12)) + 0.5 * (rows @ rng.normal(size=(6, 12)))[:, None, None]
    return Features(
        tuple(f"{tag}{i}" for i in range(len(rows))),
        clip.astype(np.float32),
        cnn.astype(np.float32),
        patches.astype(np.float16),
        np.full(len(rows), 0.01, np.float32),
    )


def draw(n: int, shift: float, tag: str, seed: int) -> Features:
    rows = np.random.default_rng(seed).normal(size=(n, 6))
    rows[:, 0] += shift
    return features_of(rows, tag, seed)


def sample_of(i: int, *, split: str = "train", group: str | None = None, category: str = "art") -> Sample:
    return Sample(Path(f"{i}.png"), category, False, split=split, sha256=f"n{i}", group=group or f"g{i}")


def training_of(n_train: int = 30, n_calibration: int = 10, n_per_picture: int = 3, shift: float = 3.0) -> Training:
    n = n_train + n_calibration
    samples = tuple(sample_of(i, split="train" if i < n_train else "calibration") for i in range(n))
    n_anomalies = n * n_per_picture
    return Training(
        samples,
        draw(n, 0, "n", 1),
        draw(n_anomalies, shift, "a", 2),
        tuple(samples[i // n_per_picture] for i in range(n_anomalies)),
        tuple(KINDS[i % len(KINDS)] for i in range(n_anomalies)),
    )


@pytest.fixture(scope="module")
def training() -> Training:
    return training_of()


# ------------------------------------------------------------------------------------------------- plain versions


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


@pytest.mark.parametrize(("pooling", "n_nearest"), [("max", 1), ("top3", 3)])
def test_cosine_detector_is_the_plain_loop(training, pooling, n_nearest):
    test = draw(6, 1, "t", 5)
    detector = one_class.fit(CosineSettings(cnn_weight=0.25, pooling=pooling), training)
    similarity = one_class.fuse(test, 0.25) @ one_class.fuse(training.normals, 0.25).T
    plain = [1 - np.mean(sorted(row)[-n_nearest:]) for row in similarity.astype(np.float64)]
    np.testing.assert_allclose(detector.score(test), plain, atol=1e-6)


def test_forest_and_lof_are_sklearns_with_the_sign_turned(training):
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor

    test = draw(6, 1, "t", 5)
    rows, queries = one_class.fuse(training.normals, 0.5), one_class.fuse(test, 0.5)
    order = np.unique(rows, axis=0)
    forest = IsolationForest(n_estimators=50, max_features=0.5, random_state=4).fit(order)
    found = one_class.fit(ForestSettings(n_trees=50, max_features=0.5), training, seed=4).score(test)
    np.testing.assert_allclose(found, -forest.score_samples(queries))
    lof = LocalOutlierFactor(n_neighbors=7, novelty=True, metric="cosine").fit(order)
    found = one_class.fit(LofSettings(n_neighbors=7, metric="cosine"), training).score(test)
    np.testing.assert_allclose(found, -lof.score_samples(queries))


@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_patch_knn_is_the_plain_triple_loop(chunk_rows):
    normals, test = draw(3, 0, "n", 6), draw(2, 1, "t", 7)
    training = Training(tuple(sample_of(i) for i in range(3)), normals)
    detector = one_class.fit(PatchKnnSettings(chunk_rows=chunk_rows, top_fraction=0.2), training)
    plain = np.empty((2, 4, 4))
    bank = normals.patches.astype(np.float64).reshape(-1, 12)
    for i in range(2):
        for y in range(4):
            for x in range(4):
                q = test.patches[i, y, x].astype(np.float64)
                plain[i, y, x] = min(1 - q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank)
    maps = detector.maps(test)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, plain, atol=1e-5)
    top = [np.mean(sorted(m.ravel())[-3:]) for m in plain]  # 20 % of 16 patches
    np.testing.assert_allclose(detector.score(test), top, atol=1e-5)


def test_patch_bank_is_thinned_to_its_limit():
    training = Training(tuple(sample_of(i) for i in range(5)), draw(5, 0, "n", 6))
    assert one_class.fit(PatchKnnSettings(max_bank_rows=33), training).n_bank_rows == 33
    assert one_class.fit(PatchKnnSettings(), training).n_bank_rows == 5 * 16


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_quick_auroc_is_the_metric(normal, anomalous):
    found = one_class.auroc_of(np.array(normal), np.array(anomalous))
    labels = np.repeat([False, True], [len(normal), len(anomalous)])
    assert found == pytest.approx(metrics.image_auroc(normal + anomalous, labels))


def test_partial_auroc_is_sklearns_before_its_rescaling():
    from sklearn.metrics import auc, roc_curve

    rng = np.random.default_rng(0)
    normal, anomalous = rng.normal(size=40), rng.normal(1, 1, size=30)
    fpr, tpr, _ = roc_curve(np.repeat([0, 1], [40, 30]), np.concatenate([normal, anomalous]), drop_intermediate=False)
    inside = fpr <= 0.1 + 1e-9
    found = one_class.auroc_of(normal, anomalous, max_fpr=0.1)
    assert found == pytest.approx(auc(fpr[inside], tpr[inside]) / 0.1)


# ------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("method", one_class.METHODS)
def test_higher_score_means_more_anomalous(training, method):
    detector = one_class.fit(QUICK[method], training)
    normal, anomalous = detector.score(draw(30, 0, "t", 8)), detector.score(draw(30, 4, "u", 9))
    assert normal.dtype == np.float64
    assert metrics.image_auroc(np.concatenate([normal, anomalous]), np.repeat([False, True], 30)) > 0.8


@pytest.mark.parametrize("method", one_class.METHODS)
def test_same_seed_same_scores(training, method):
    test = draw(8, 1, "t", 8)
    first, again = (one_class.fit(QUICK[method], training, seed=5).score(test) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("method", ["clip_cross_entropy", "clip_isolation_forest"])
def test_the_seed_matters(training, method):
    test = draw(8, 1, "t", 8)
    first, other = (one_class.fit(QUICK[method], training, seed=seed).score(test) for seed in (5, 6))
    assert np.abs(first - other).max() > 1e-6


def test_fitting_leaves_torchs_random_state_alone(training):
    import torch

    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    one_class.fit(QUICK["clip_cross_entropy"], training)
    assert torch.equal(torch.rand(2), expected)


def test_lof_never_scores_its_own_pictures(training):
    detector = one_class.fit(LofSettings(), training)
    mixed = Features.join([draw(2, 0, "t", 8), training.normals.take([3])])
    with pytest.raises(ValueError, match="1 of 3 pictures are training pictures"):
        detector.score(mixed)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30), st.integers(2, 6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_folds_are_a_partition_of_the_groups(groups, n_folds, seed):
    if len(set(groups)) < 2:
        with pytest.raises(ValueError, match="nothing can be held out"):
            one_class.group_folds(groups, n_folds, seed)
        return
    folds = one_class.group_folds(groups, n_folds, seed)
    assert sorted(group for fold in folds for group in fold) == sorted(set(groups))
    assert len(folds) == min(n_folds, len(set(groups)))
    assert all(folds)
    assert folds == one_class.group_folds(groups, n_folds, seed)


def test_folds_have_even_sizes():
    folds = one_class.group_folds(["big"] * 10 + [f"g{i}" for i in range(10)], 2, seed=0)
    assert sorted(map(len, folds)) == [1, 10]


def test_a_picture_is_never_scored_by_a_detector_of_its_group(monkeypatch):
    """Twins (same group) with equal features would score 0 if one of them stayed among the references."""
    rows = np.random.default_rng(0).normal(size=(10, 6))
    samples = tuple(sample_of(i, group=f"g{i % 10}") for i in range(20))
    training = Training(samples, features_of(np.concatenate([rows, rows]), "n"))
    scores = one_class.calibrate(CosineSettings(), training, n_folds=5).normal_scores
    assert np.isfinite(scores).all()
    assert scores.min() > 1e-4


def test_few_calibration_pictures_use_every_normal_once(training):
    found = one_class.calibrate(CosineSettings(), training)
    detector, scores = found.detector, found.normal_scores
    assert len(scores) == 40
    assert detector._references.shape[0] == 40


def test_many_calibration_pictures_are_kept_out_of_the_detector():
    training = training_of(n_train=20, n_calibration=40, n_per_picture=1)
    found = one_class.calibrate(CosineSettings(), training)
    detector, scores = found.detector, found.normal_scores
    assert len(scores) == 40
    assert detector._references.shape[0] == 20
    held_out = training.normals.take(range(20, 60))
    np.testing.assert_allclose(scores, detector.score(held_out))
    assert one_class.learning_part(training).samples == training.samples[:20]


def test_groups_that_span_the_splits_are_not_held_out():
    training = training_of(n_train=20, n_calibration=40, n_per_picture=1)
    shared = dataclasses.replace(training.samples[-1], group=training.samples[0].group)
    mixed = dataclasses.replace(
        training, samples=(*training.samples[:-1], shared), anomalies=None, sources=(), kinds=()
    )
    assert one_class.learning_part(mixed) is mixed
    assert len(one_class.calibrate(CosineSettings(), mixed).normal_scores) == 60


@pytest.mark.parametrize("method", ["clip_resnet50", "clip_lof", "clip_patch_knn"])
@pytest.mark.parametrize("n_calibration", [10, 60])
def test_false_alarms_on_exchangeable_normals_stay_near_alpha(method, n_calibration):
    """60 datasets of 60 or 110 normals, 40 fresh ones each: 2,400 fresh pictures at a promised rate of 10 %."""
    rng = np.random.default_rng(1)
    alarms = []
    for draw_number in range(60):
        n = 50 + n_calibration
        samples = tuple(sample_of(i, split="train" if i < 50 else "calibration") for i in range(n))
        rows = rng.normal(size=(n + 40, 6))
        everything = features_of(rows, "n", seed=draw_number)
        training = Training(samples, everything.take(range(n)))
        found = one_class.calibrate(QUICK[method], training, seed=draw_number)
        threshold = calibration.conformal_threshold(found.normal_scores, 0.1)
        alarms.append(np.mean(found.detector.score(everything.take(range(n, n + 40))) > threshold))
    assert 0.05 < np.mean(alarms) < 0.12


@pytest.mark.parametrize("n_calibration", [10, 40])
def test_confirmed_anomalies_are_scored_where_their_group_was_held_out(n_calibration):
    training = training_of(n_train=20, n_calibration=n_calibration, n_per_picture=1)
    kinds = tuple(one_class.CONFIRMED if i % 7 == 0 else kind for i, kind in enumerate(training.kinds))
    training = dataclasses.replace(training, kinds=kinds)
    found = one_class.calibrate(CosineSettings(), training, n_folds=3)
    expected = []
    if n_calibration == 40:  # split conformal: those of the calibration groups
        rows = [i for i in range(20, 60) if i % 7 == 0]
        expected = found.detector.score(training.anomalies.take(rows))
    else:
        for fold in one_class.group_folds(training.groups, 3, 0):
            detector = one_class.fit(CosineSettings(), training.where(frozenset(training.groups) - fold))
            rows = [i for i in range(30) if i % 7 == 0 and training.groups[i] in fold]
            expected.extend(detector.score(training.anomalies.take(rows)) if rows else [])
    np.testing.assert_allclose(found.confirmed_scores, expected)
    assert len(found.confirmed_scores) == (6 if n_calibration == 40 else 5)


# ------------------------------------------------------------------------------------------------- the head


def test_early_stopping_restores_the_best_weights():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 8)).astype(np.float32)
    labels = np.repeat([0, 1], 20)
    rows[labels == 1, 0] += 1
    tune = rng.normal(size=(40, 8)).astype(np.float32)
    tune[20:, 0] += 0.7
    tune_labels = np.repeat([False, True], 20)
    options = HeadSettings(n_hidden=64, dropout=0.0, learning_rate=0.05, weight_decay=0.0, patience=10)
    net, history = one_class.train_head(rows, labels, tune, tune_labels, settings=options, seed=0)
    curve = [epoch["validation_auroc"] for epoch in history]
    best = int(np.argmax(curve))
    odds = one_class.log_odds(net, tune)
    assert metrics.image_auroc(odds, tune_labels) == pytest.approx(max(curve))
    assert curve[-1] < max(curve), "the case is only a test when the last epoch is not the best"
    assert len(history) == best + 1 + 10
    assert not net.training


def test_head_keeps_kinds_and_pictures_for_tuning(training):
    detector = one_class.fit(QUICK["clip_cross_entropy"], training)
    assert detector.train_kinds.isdisjoint(detector.tune_kinds)
    assert detector.train_kinds | detector.tune_kinds == set(KINDS)


def test_head_state_is_all_that_a_score_needs(training):
    detector = one_class.fit(QUICK["clip_cross_entropy"], training)
    state = {name: tensor.numpy() for name, tensor in detector.state().items()}
    test = draw(5, 1, "t", 8)
    rows = one_class.fuse(test, 0.5)
    hidden = ((rows - state["mean"]) @ state["components"].T / state["scale"]).astype(np.float32)
    hidden = np.maximum(hidden @ state["0.weight"].T + state["0.bias"], 0)
    logits = hidden @ state["3.weight"].T + state["3.bias"]
    np.testing.assert_allclose(detector.score(test), logits[:, 1] - logits[:, 0], atol=1e-4)


def test_a_stored_head_scores_as_before(training, tmp_path):
    from safetensors.torch import load_file, save_file

    detector = one_class.fit(QUICK["clip_cross_entropy"], training)
    save_file({name: tensor.contiguous() for name, tensor in detector.state().items()}, tmp_path / "head.safetensors")
    state = load_file(tmp_path / "head.safetensors")
    again = one_class.HeadDetector.from_state(detector.settings, state)
    test = draw(5, 1, "t", 8)
    np.testing.assert_array_equal(again.score(test), detector.score(test))
    with pytest.raises(ValueError, match="does not fit its settings"):
        one_class.HeadDetector.from_state(dataclasses.replace(detector.settings, n_hidden=8), state)
    del state["scale"]
    with pytest.raises(ValueError, match="lacks scale"):
        one_class.HeadDetector.from_state(detector.settings, state)


@pytest.mark.parametrize(
    ("field", "value"), [("dropout", 0.5), ("weight_decay", 1.0), ("learning_rate", 1e-2), ("n_hidden", 8)]
)
def test_each_option_of_the_head_matters(training, field, value):
    base = QUICK["clip_cross_entropy"]
    test = draw(5, 1, "t", 8)
    first = one_class.fit(base, training).score(test)
    other = one_class.fit(dataclasses.replace(base, **{field: value}), training).score(test)
    assert np.abs(first - other).max() > 1e-4


# ------------------------------------------------------------------------------------------------- no test pictures


def test_no_function_takes_test_pictures_and_training_refuses_them(training):
    for function in (one_class.calibrate, one_class.fit):
        assert {"training"} <= set(inspect.signature(function).parameters)
        assert not {"test", "features", "samples", "labels"} & set(inspect.signature(function).parameters)
    test_sample = dataclasses.replace(training.samples[0], split="test")
    anomalous = dataclasses.replace(training.samples[0], is_anomalous=True, kind="box")
    for wrong in (test_sample, anomalous):
        with pytest.raises(ValueError, match="'train' and 'calibration'"):
            dataclasses.replace(training, samples=(wrong, *training.samples[1:]))
        with pytest.raises(ValueError, match="'train' and 'calibration'"):
            dataclasses.replace(training, sources=(wrong, *training.sources[1:]))
        with pytest.raises(ValueError, match="'train' and 'calibration'"):
            dataclasses.replace(training, views=training.normals.take([0]), view_sources=(wrong,))


# ------------------------------------------------------------------------------------------------- views


def test_views_follow_their_picture_and_join_what_is_learnt(training):
    views = dataclasses.replace(training, views=draw(30, 0, "v", 21), view_sources=training.samples[:30])
    part = views.where(frozenset(["g2", "g5", "g35"]))
    assert part.views.ids == ("v2", "v5")
    assert part.learnt(augment=True).ids == ("n2", "n5", "n35", "v2", "v5")
    assert part.learnt(augment=False).ids == ("n2", "n5", "n35")
    with pytest.raises(ValueError, match="needs views"):
        training.learnt(augment=True)
    with pytest.raises(ValueError, match="each view needs one"):
        dataclasses.replace(views, view_sources=())
    with pytest.raises(ValueError, match="not among the samples"):
        dataclasses.replace(views, view_sources=(*views.view_sources[1:], sample_of(99)))


@pytest.mark.parametrize("method", one_class.METHODS)
def test_augmentation_changes_what_a_detector_knows(training, method):
    views = dataclasses.replace(training, views=draw(30, 0, "v", 21), view_sources=training.samples[:30])
    test = draw(5, 1, "t", 8)
    plain, more = (dataclasses.replace(QUICK[method], augment=augment) for augment in (False, True))
    assert np.abs(one_class.fit(plain, views).score(test) - one_class.fit(more, views).score(test)).max() > 1e-6


def test_maps_of_one_bank_serve_every_image_score(training):
    memo = {}
    test = draw(5, 1, "t", 8)
    for top_fraction in (0.1, 0.5):
        settings_ = PatchKnnSettings(top_fraction=top_fraction)
        expected = one_class.fit(settings_, training).score(test)
        np.testing.assert_allclose(one_class.fit_and_score(settings_, training, test, memo=memo), expected)
    assert len(memo) == 1
    one_class.fit_and_score(PatchKnnSettings(max_bank_rows=9), training, test, memo=memo)
    assert len(memo) == 2


# ------------------------------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize("method", one_class.METHODS)
def test_one_picture_cannot_set_a_threshold(method):
    training = training_of(n_train=1, n_calibration=0, n_per_picture=6)
    with pytest.raises(ValueError, match=r"(nothing can be held out|at least \d different)"):
        one_class.calibrate(QUICK[method], training)


@pytest.mark.parametrize(("method", "words"), [("clip_isolation_forest", "at least 2"), ("clip_lof", "at least 3")])
def test_equal_pictures_are_refused(method, words):
    training = Training(tuple(sample_of(i) for i in range(6)), features_of(np.ones((6, 6)), "n"))
    with pytest.raises(ValueError, match=f"{words} different normal pictures, got 6 of which 1"):
        one_class.fit(QUICK[method], training)


def test_equal_pictures_teach_the_head_nothing():
    training = training_of()
    flat = dataclasses.replace(
        training, normals=features_of(np.ones((40, 6)), "n"), anomalies=features_of(np.ones((120, 6)), "a")
    )
    with pytest.raises(ValueError, match="all training pictures are equal"):
        one_class.fit(QUICK["clip_cross_entropy"], flat)


def test_copies_do_not_blow_up_lof():
    rows = np.random.default_rng(0).normal(size=(12, 6))
    copies = np.concatenate([np.repeat(rows[:1], 30, axis=0), rows])
    training = Training(tuple(sample_of(i) for i in range(42)), features_of(copies, "n"))
    assert one_class.fit(LofSettings(n_neighbors=5), training).score(draw(10, 0, "t", 3)).max() < 100


@pytest.mark.filterwarnings("error")  # scikit-learn warns when it has to cut them itself
def test_lof_cuts_its_neighbours_to_the_pictures_it_has():
    training = Training(tuple(sample_of(i) for i in range(4)), draw(4, 0, "n", 1))
    assert np.isfinite(one_class.fit(LofSettings(n_neighbors=20), training).score(draw(3, 0, "t", 2))).all()


def test_empty_and_mixed_categories_are_refused():
    with pytest.raises(ValueError, match="No normal picture to learn from"):
        Training((), draw(0, 0, "n", 1))
    with pytest.raises(ValueError, match="belongs to one painting, got art, other"):
        Training((sample_of(0), sample_of(1, category="other")), draw(2, 0, "n", 1))
    with pytest.raises(ValueError, match="must agree row by row"):
        Training((sample_of(0),), draw(2, 0, "n", 1))
    with pytest.raises(ValueError, match="not among the samples"):
        Training((sample_of(0),), draw(1, 0, "n", 1), draw(1, 0, "a", 1), (sample_of(7),), ("box",))


def test_features_of_length_zero_are_refused():
    empty = dataclasses.replace(draw(2, 0, "n", 1), clip=np.zeros((2, 24), np.float32))
    with pytest.raises(ValueError, match="2 pictures have features of length 0"):
        one_class.fuse(empty, 0.5)


def test_missing_parts_are_named(training):
    bare = Training(training.samples, dataclasses.replace(training.normals, patches=None))
    with pytest.raises(ValueError, match="patches=True"):
        one_class.fit(PatchKnnSettings(), bare)
    with pytest.raises(ValueError, match="two or more kinds"):
        one_class.fit(QUICK["clip_cross_entropy"], bare)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CosineSettings(cnn_weight=1.5),
        lambda: CosineSettings(pooling="mean"),
        lambda: HeadSettings(dropout=1.0),
        lambda: HeadSettings(patience=0),
        lambda: LofSettings(metric="manhattan"),
        lambda: PatchKnnSettings(top_fraction=0.0),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(ValueError, match="is |must be"):
        make()


# ------------------------------------------------------------------------------------------------- the report of 2024


def test_similarity_of_one_accepts_copies_only():
    """The report's 100 % row: genuine pictures that are not byte copies are all called forged."""
    train, fresh = draw(20, 0, "n", 1), draw(30, 0, "t", 2)
    scores, threshold = report_2024.verdicts("clip_resnet50", train=train, views=None, test=fresh)
    assert (scores > threshold).all()
    scores, _ = report_2024.verdicts("clip_resnet50", train=train, views=None, test=train)
    assert scores.max() < 1e-6  # copies reach 1 up to rounding, and some of them exactly


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_percentile_60_calls_60_per_cent_anomalous_whatever_is_shown(shift):
    scores, threshold = report_2024.verdicts(
        "clip_isolation_forest", train=draw(40, 0, "n", 1), views=None, test=draw(50, shift, "t", 2)
    )
    assert (scores > threshold).sum() == 30


def test_contamination_045_is_sklearns_predict_and_flags_normals():
    from sklearn.neighbors import LocalOutlierFactor

    views, fresh = draw(80, 0, "n", 1), draw(400, 0, "t", 2)
    scores, threshold = report_2024.verdicts("clip_lof", train=views, views=views, test=fresh)
    lof = LocalOutlierFactor(n_neighbors=20, contamination=0.45, novelty=True).fit(one_class.unit_rows(views.clip))
    np.testing.assert_array_equal(scores > threshold, lof.predict(one_class.unit_rows(fresh.clip)) == -1)
    assert 0.35 < np.mean(scores > threshold) < 0.7  # 46.5 % in the specification's simulation


def test_report_head_is_argmax_and_repeats():
    train, views, test = draw(40, 0, "n", 1), draw(40, 3, "v", 2), draw(30, 3, "t", 3)
    first, threshold = report_2024.verdicts("clip_cross_entropy", train=train, views=views, test=test)
    again, _ = report_2024.verdicts("clip_cross_entropy", train=train, views=views, test=test)
    np.testing.assert_array_equal(first, again)
    assert threshold == 0.0
    assert np.mean(first > 0) > 0.5


@pytest.mark.parametrize("method", ["clip_cross_entropy", "clip_lof"])
def test_altered_views_are_changed_repeatable_pictures(method):
    import torch

    rng = np.random.default_rng(0)
    pictures = [rng.integers(60, 200, (20, 31, 3), dtype=np.uint8) for _ in range(2)]
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    first = list(report_2024.altered_views(pictures, method, seed=1))
    assert torch.equal(torch.rand(1), expected)
    for view, again, picture in zip(first, report_2024.altered_views(pictures, method, seed=1), pictures, strict=True):
        np.testing.assert_array_equal(view, again)
        assert view.shape == picture.shape
        assert view.dtype == np.uint8
        assert (view != picture).any()


def test_report_says_what_its_source_does_not_state():
    for preset in report_2024.PRESETS.values():
        described = preset.describe()
        assert set(described) == set(preset.stated) | set(preset.not_stated)
        assert all("not stated in source" in described[name] for name in preset.not_stated)
    lof, forest = report_2024.PRESETS["clip_lof"].values, report_2024.PRESETS["clip_isolation_forest"].values
    assert (lof["n_neighbors"], lof["contamination"], forest["contamination"], forest["percentile"]) == (
        20,
        0.45,
        0.4,
        60,
    )


def test_report_refuses_what_it_does_not_have():
    rows = draw(3, 0, "n", 1)
    with pytest.raises(ValueError, match="no method 'clip_patch_knn'"):
        report_2024.verdicts("clip_patch_knn", train=rows, views=None, test=rows)
    with pytest.raises(ValueError, match="altered training pictures"):
        report_2024.verdicts("clip_lof", train=rows, views=None, test=rows)
    with pytest.raises(ValueError, match="alters no training pictures"):
        list(report_2024.altered_views([], "clip_isolation_forest", seed=0))
