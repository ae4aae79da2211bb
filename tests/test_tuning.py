"""Search and calibration: what may be seen by what, what the nested estimate is worth, and few source pictures."""

from __future__ import annotations

import dataclasses
import zlib
from typing import ClassVar

import numpy as np
import pytest
from sklearn.base import clone
from tiny_clip import KINDS, QUICK, draw, features_of, rows_of, sample_of

from helpers.clip import one_class, tuning
from helpers.clip.features import Features
from helpers.clip.one_class import CONFIRMED, Cosine, Detector, Rows


@pytest.fixture(scope="module")
def rows() -> Rows:
    return rows_of()


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


def facts_of(rows: Rows) -> dict[str, tuple[str, str]]:
    return dict(zip(rows.features.ids, zip(rows.table["group"], rows.table["kind"], strict=True), strict=True))


@pytest.mark.parametrize("method", one_class.METHODS)
def test_the_best_trial_is_chosen_and_the_same_seed_chooses_it_again(rows, method):
    space = one_class.SPACES[method]
    found = tuning.tune(QUICK[method], space, rows, n_trials=3, seed=3)
    values = [trial["auroc"] for trial in found["trials"]]
    assert len(values) == 3 and found["auroc"] == max(values) and found["default_auroc"] == values[0]
    default = {n: getattr(QUICK[method], n) for n in space}
    assert found["trials"][0] == default | {"auroc": values[0]}
    assert found["parameters"] == {n: v for n, v in found["trials"][int(np.argmax(values))].items() if n != "auroc"}
    assert 0 <= found["nested_auroc"] <= 1 and not found["note"]
    assert tuning.tune(QUICK[method], space, rows, n_trials=3, seed=3) == found


@pytest.mark.parametrize("strategy", ["random", "grid"])
def test_the_default_is_tried_first_and_nothing_twice(rows, strategy):
    options = {"n_trials": 99 if strategy == "random" else 4, "strategy": strategy}
    found = tuning.tune(Cosine(), one_class.SPACES["clip_resnet50"], rows, **options)
    tried = [(trial["cnn_weight"], trial["k"], trial["augment"]) for trial in found["trials"]]
    assert tried[0] == (0.5, 1, False)
    assert len(tried) == len(set(tried)) == 20


def test_the_part_that_carries_the_signal_is_found():
    """The anomaly shows in the CNN's features only; CLIP's are noise."""
    rows = rows_of(shift=4.0)
    noise = np.random.default_rng(5).normal(size=rows.features.clip.shape).astype(np.float32)
    rows = dataclasses.replace(rows, features=dataclasses.replace(rows.features, clip=noise))
    found = tuning.tune(Cosine(), {"cnn_weight": [0.0, 0.25, 0.5, 1.0]}, rows, n_trials=9)
    assert found["parameters"] == {"cnn_weight": 1.0}
    assert found["nested_auroc"] > found["default_auroc"]


def test_a_fit_knows_neither_sources_nor_kinds_of_what_it_is_measured_on(rows):
    known = facts_of(rows)
    Coin.seen.clear()
    tuning.tune(Coin(), {"face": [0, 1]}, rows, n_trials=2)
    assert len(Coin.seen) == 2 * 3 + 3 * (2 * 2 + 1)
    for learnt, asked in Coin.seen:
        groups, kinds = (set(values) for values in zip(*(known[key] for key in asked.ids), strict=True))
        assert groups.isdisjoint(learnt.table["group"])
        assert kinds & set(KINDS) and (kinds & set(KINDS)).isdisjoint(learnt.table["kind"])
        assert set(learnt.table["kind"]) & set(KINDS)
        assert "calibration" not in set(learnt.table["split"])


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
    assert len(detector._references) == 10  # the final one knows all, each once


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


@pytest.mark.parametrize("method", one_class.METHODS)
@pytest.mark.parametrize("n_sources", [1, 2, 5, 9])
def test_few_sources_search_or_say_why_not_and_always_get_a_threshold(method, n_sources):
    rows = rows_of(n_train=20, n_calibration=0, n_sources=n_sources)
    found = tuning.tune(QUICK[method], one_class.SPACES[method], rows, n_trials=2)
    if n_sources < tuning.MIN_SOURCES:
        assert found["note"].startswith(f"art: {n_sources} source pictures") and not found["trials"]
        assert found["parameters"] == {n: getattr(QUICK[method], n) for n in one_class.SPACES[method]}
    else:
        assert len(found["trials"]) == 2 and 0 <= found["nested_auroc"] <= 1
    detector, scores = tuning.calibrate(clone(QUICK[method]).set_params(**found["parameters"]), rows)
    assert np.isfinite(scores).sum() == 20
    assert np.isfinite(detector.score(draw(5, 1, "t", 8))).all()
