"""The search of settings: what it may look at, what it chooses, and an estimate that does not flatter."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_one_class import KINDS, QUICK, draw, training_of

from helpers.clip import one_class, tuning
from helpers.clip.features import Features
from helpers.clip.one_class import TooFewPictures, Training
from helpers.judge import figures


@pytest.fixture(scope="module")
def training() -> Training:
    base = training_of()
    return dataclasses.replace(base, views=draw(30, 0, "v", 21), view_sources=base.samples[:30])


@dataclass(frozen=True)
class Coin:
    """Settings of a made-up method that scores at random."""

    face: int = 0


def coin_scores(settings: Coin, learn: Training, queries: Features, *, seed, device, memo) -> np.ndarray:
    throw = zlib.crc32(repr((settings.face, learn.groups)).encode())
    return np.random.default_rng(throw).normal(size=len(queries))


def tune_coin(training: Training, **options) -> tuning.Tuned:
    options = {"n_trials": 60, "default": Coin(), "space": {"face": tuple(range(60))}} | options
    return tuning.tune("coin", training, fit_and_score=coin_scores, **options)


# ------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("method", one_class.METHODS)
def test_the_best_trial_is_chosen_and_the_same_seed_chooses_it_again(training, method):
    found = tuning.tune(method, training, n_trials=3, seed=3, default=QUICK[method])
    assert len(found.trials) == 3
    best = max(found.trials, key=lambda trial: trial["auroc"])
    assert found.auroc == best["auroc"]
    assert found.default_auroc == found.trials[0]["auroc"]
    assert {name: found.trials[0][name] for name in one_class.SPACES[method]} == {
        name: getattr(QUICK[method], name) for name in one_class.SPACES[method]
    }
    kinds = [name for name in best if name.startswith("auroc_")]
    assert best["auroc"] == pytest.approx(np.mean([best[name] for name in kinds]))
    assert 0 <= found.nested_auroc <= 1 and not found.note
    assert tuning.tune(method, training, n_trials=3, seed=3, default=QUICK[method]) == found


def test_the_default_is_tried_first_and_nothing_twice(training):
    for strategy in ("random", "grid"):
        found = tuning.tune("clip_resnet50", training, n_trials=99, strategy=strategy)
        tried = [(trial["cnn_weight"], trial["pooling"], trial["augment"]) for trial in found.trials]
        assert tried[0] == (0.5, "max", False)
        assert len(tried) == len(set(tried)) == 20
    assert len(tuning.tune("clip_resnet50", training, n_trials=4, strategy="grid").trials) == 20


def test_without_views_there_is_nothing_to_augment_with():
    found = tuning.tune("clip_resnet50", training_of(), n_trials=99)
    assert not any(trial["augment"] for trial in found.trials)
    assert len(found.trials) == 10


def test_the_part_that_carries_the_signal_is_found():
    """The anomaly shows in the CNN's features only; CLIP's are noise of another picture."""
    base = training_of(shift=4.0)
    noise = np.random.default_rng(5)

    def without_clip(part: Features) -> Features:
        return dataclasses.replace(part, clip=noise.normal(size=part.clip.shape).astype(np.float32))

    training = dataclasses.replace(base, normals=without_clip(base.normals), anomalies=without_clip(base.anomalies))
    found = tuning.tune("clip_resnet50", training, n_trials=10)
    assert found.settings.cnn_weight == 1.0
    assert found.nested_auroc > found.default_auroc


def test_equals_are_told_apart_by_few_false_alarms_and_then_by_order(training):
    values = {0: (0.8, 0.1), 1: (0.8, 0.3), 2: (0.8, 0.3), 3: (0.7, 0.9)}
    table = tuning._Table(training, coin_scores, 3, 0, "cpu")
    table.by_kind = lambda settings, outer, partial=False: {"box": values[settings.face][partial]}
    assert table.best([Coin(face) for face in range(4)], None) == 1


# ------------------------------------------------------------------------------------------------- what it may see


def test_nothing_takes_test_pictures(training):
    parameters = set(inspect.signature(tuning.tune).parameters)
    assert "training" in parameters
    assert not {"test", "features", "samples", "labels", "dataset"} & parameters


def test_calibration_pictures_are_not_looked_at(training):
    """Replacing them and their anomalies by rubbish changes nothing."""
    first = tuning.tune("clip_resnet50", training, n_trials=10)
    rubbish = dataclasses.replace(
        training,
        normals=Features.join([training.normals.take(range(30)), draw(10, 50, "n", 11)]),
        anomalies=Features.join([training.anomalies.take(range(90)), draw(30, -50, "a", 12)]),
    )
    assert tuning.tune("clip_resnet50", rubbish, n_trials=10) == first


def test_a_fit_knows_nothing_of_the_folds_it_is_measured_on(training):
    seen = []

    def spy(settings, learn, queries, *, seed, device, memo):
        own = {training.normals.ids[i]: group for i, group in enumerate(training.groups)}
        own |= {key: source.group for key, source in zip(training.anomalies.ids, training.sources)}
        assert {own[key] for key in queries.ids}.isdisjoint(learn.groups)
        assert {source.group for source in learn.view_sources} <= set(learn.groups)
        seen.append(len(set(learn.groups)))
        return coin_scores(settings, learn, queries, seed=seed, device=device, memo=memo)

    tuning.tune("coin", training, n_trials=2, default=Coin(), space={"face": (0, 1)}, fit_and_score=spy)
    assert sorted(set(seen)) == [10, 20]  # of 30 source pictures: two folds left out, and one
    assert len(seen) == 2 * (3 + 3)  # each pair of folds is fitted once and measured twice


def test_what_trains_on_anomalies_is_ranked_on_other_kinds(training):
    pairs = []

    def spy(settings, learn, queries, *, seed, device, memo):
        kind_of = dict(zip(training.anomalies.ids, training.kinds))
        asked = {kind_of[key] for key in queries.ids if key in kind_of}
        pairs.append((set(learn.kinds), asked))
        return np.arange(float(len(queries)))

    tuning.tune("clip_cross_entropy", training, n_trials=2, default=QUICK["clip_cross_entropy"], fit_and_score=spy)
    assert all(learnt.isdisjoint(asked) and learnt and asked for learnt, asked in pairs)


def test_the_nested_estimate_of_a_coin_is_a_coin(training):
    """The best of 60 random rankings looks good; what the same choice gives elsewhere does not."""
    found = [tune_coin(training, seed=seed) for seed in range(4)]
    assert min(one.auroc for one in found) > 0.55
    assert abs(np.mean([one.nested_auroc for one in found]) - 0.5) < 0.05


def test_a_kind_is_measured_with_settings_chosen_without_it(training):
    """Each setting finds one kind perfectly and no other: whoever may look at the kind would choose its setting."""

    def scores(settings, learn, queries, *, seed, device, memo):
        kind_of = dict(zip(training.anomalies.ids, training.kinds))
        return np.array([float(kind_of.get(key) == KINDS[settings.face]) for key in queries.ids])

    space = {"face": tuple(range(len(KINDS)))}
    found = tuning.tune("finder", training, n_trials=9, default=Coin(), space=space, fit_and_score=scores)
    assert found.auroc == pytest.approx((1.0 + 5 * 0.5) / 6)
    assert found.nested_auroc == pytest.approx(0.5)


def test_one_thread_works_and_the_others_come_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), tuning.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- TPE


def test_tpe_begins_with_the_default_and_tries_nothing_twice():
    default, asked = one_class.DEFAULTS["clip_lof"], []

    def objective(settings):
        asked.append(settings)
        return float(settings.n_neighbors)

    values = (*range(100, 112), default.n_neighbors)
    found = tuning._Proposals(default, {"n_neighbors": values}, "tpe", 20, 0)(objective)
    assert asked[0] == found[0] == default and len(asked) == 20
    assert len(found) == len(set(found)) <= len(values)


def test_trials_search_a_thinner_memory_bank():
    settings = dataclasses.replace(one_class.DEFAULTS["clip_patch_knn"], max_bank_rows=20_000)
    assert tuning._quicker(settings).max_bank_rows == tuning.SEARCH_BANK_ROWS
    small = dataclasses.replace(settings, max_bank_rows=50)
    assert tuning._quicker(small) == small
    assert tuning._quicker(one_class.DEFAULTS["clip_lof"]) == one_class.DEFAULTS["clip_lof"]


def test_tpe_without_optuna_says_what_to_do(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="pip install optuna.*strategy='random'"):
        tune_coin(training, n_trials=3, strategy="tpe")


def test_tpe_goes_where_the_objective_is_high(training):
    pytest.importorskip("optuna", reason="TPE is optional")

    def scores(settings, learn, queries, *, seed, device, memo):
        is_anomaly = np.array([key.startswith("a") for key in queries.ids])
        noise = np.random.default_rng(0).normal(size=len(queries))
        return noise + is_anomaly * settings.face / 20

    options = {"default": Coin(10), "space": {"face": tuple(range(60))}, "fit_and_score": scores, "n_trials": 30}
    found = tuning.tune("hill", training, strategy="tpe", seed=1, **options)
    assert found.trials[0]["face"] == 10 and found.strategy == "tpe"
    later = [trial["face"] for trial in found.trials[10:]]
    assert np.mean(later) > 38, "uniform draws would give 30"
    assert tuning.tune("hill", training, strategy="tpe", seed=1, **options) == found


# ------------------------------------------------------------------------------------------------- too little


def test_few_source_pictures_give_a_choice_without_an_estimate():
    found = tuning.tune("clip_resnet50", training_of(n_train=4, n_calibration=0), n_trials=4)
    assert len(found.trials) == 4
    assert math.isnan(found.nested_auroc)
    assert "too few source pictures" in found.note


def test_a_detector_that_cannot_be_fitted_on_less_gives_no_estimate(training):
    def scores(settings, learn, queries, *, seed, device, memo):
        if len(set(learn.groups)) < 15:
            raise TooFewPictures("nothing to tune on")
        return coin_scores(settings, learn, queries, seed=seed, device=device, memo=memo)

    found = tuning.tune("coin", training, n_trials=2, default=Coin(), space={"face": (0, 1)}, fit_and_score=scores)
    assert len(found.trials) == 2 and math.isnan(found.nested_auroc) and found.note == "nothing to tune on"


def test_one_kind_cannot_be_left_out(training):
    same = dataclasses.replace(training, kinds=("box",) * len(training.kinds))
    found = tuning.tune("clip_resnet50", same, n_trials=3)
    assert math.isnan(found.nested_auroc) and "one kind" in found.note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_trials": 0}, "n_trials is 0"),
        ({"strategy": "bayes"}, "random, grid, tpe"),
        ({"method": "clip"}, "Unknown method 'clip'"),
    ],
)
def test_wrong_options_are_named(training, change, message):
    with pytest.raises(ValueError, match=message):
        tuning.tune(**({"method": "clip_lof", "training": training, "n_trials": 3} | change))


def test_missing_anomalies_are_named(training):
    bare = Training(training.samples, training.normals)
    with pytest.raises(ValueError, match="none were given"):
        tuning.tune("clip_lof", bare, n_trials=3)
    found = tuning.tune("clip_lof", bare, n_trials=1)
    assert (found.settings, found.trials) == (one_class.DEFAULTS["clip_lof"], ())


# ------------------------------------------------------------------------------------------------- the figure


def test_figure_shows_trials_default_best_and_nested():
    sets = [
        figures.TuningSet("clip_lof", "portrait", [0.6, 0.7], 0.6, 0.7, 0.65),
        figures.TuningSet("clip_resnet50", "harbour", [0.5], 0.5, 0.5, math.nan),
    ]
    fig = figures.tuning(sets, title="A finding")
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["Portrait", "Harbour"]
    drawn = [line.get_xdata() for line in fig.axes[0].lines]
    assert [list(np.atleast_1d(x)) for x in drawn] == [[0.6, 0.7], [0.6], [0.7], [0.65]]
    assert [text.get_text() for text in fig.legends[0].get_texts()][1] == "default"
