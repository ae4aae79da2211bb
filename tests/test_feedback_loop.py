"""The feedback loop on a tiny real dataset: what is learnt from, what is refused, and what is measured on what."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_clip

from helpers.chat import _old_clip_one_class as one_class
from helpers.chat import _old_clip_tuning as tuning
from helpers.chat import feedback, feedback_loop
from helpers.chat.feedback_loop import Loop
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import statistics as calibration

METHODS = ("clip_resnet50", "clip_patch_knn", "clip_cross_entropy")
FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
BASES = {"clip_cross_entropy": one_class.HeadSettings(n_hidden=16, n_components=8, max_epochs=15)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny_clip.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def loop(dataset, tmp_path_factory) -> Loop:
    folder = tmp_path_factory.mktemp("home")
    return feedback_loop.open_loop(
        dataset,
        models=vars(tiny_clip.models(folder / "features")),
        checkpoint_dir=lambda method: folder / "checkpoints" / method,
        n_anomalies=45,
        n_trials=2,
        alpha=0.1,
        seed=0,
        bases=BASES,
        methods=METHODS,
    )


def simulate(loop: Loop, folder: Path, **changes) -> feedback.FeedbackLog:
    return feedback_loop.simulate_user(loop, folder / "simulated.jsonl", **({"n_pictures": 12, "seed": 3} | changes))


@pytest.fixture(scope="module")
def log(loop, tmp_path_factory) -> feedback.FeedbackLog:
    return simulate(loop, tmp_path_factory.mktemp("feedback"))


# ------------------------------------------------------------------------------------------------- the simulated user


def test_the_simulated_user_looks_at_new_pictures_that_no_test_picture_knows(loop, log, dataset):
    assert len(log.entries) == 24
    tested = {sample.group for sample in dataset.select(split="test")}
    for category in dataset.categories:
        mine = [entry for entry in log.entries if entry.category == category]
        assert [entry.label for entry in mine] == ["normal", "anomalous"] * 6
        assert tested.isdisjoint(entry.context["group"] for entry in mine)
    found = feedback.sort_out(log, dataset)
    assert (len(found.confirmed), found.refused, found.unused) == (24, (), ())


def test_the_simulated_user_is_always_right(log):
    for entry in log.entries:
        predicted = entry.context["score"] > entry.context["threshold"]
        assert entry.context["is_predicted_anomalous"] == predicted
        assert (entry.verdict == "correct") == (predicted == (entry.label == "anomalous"))
        assert (entry.region is None) == (entry.label == "normal")


def test_the_same_seed_gives_the_same_feedback(loop, log, tmp_path):
    pixels = [entry.pixels_sha256 for entry in log.entries]
    again = simulate(loop, tmp_path)
    assert [entry.pixels_sha256 for entry in again.entries] == pixels
    once_more = simulate(loop, tmp_path)  # replaces the first log
    assert [entry.pixels_sha256 for entry in once_more.entries] == pixels
    assert [entry.pixels_sha256 for entry in simulate(loop, tmp_path, seed=4).entries] != pixels


def test_a_real_users_log_is_never_replaced(loop, tmp_path):
    path = tmp_path / "simulated.jsonl"
    feedback.record(path, image_path=None, image=np.zeros((4, 4, 3), np.uint8), verdict="unsure")
    with pytest.raises(ValueError, match="1 judgements of a real user"):
        simulate(loop, tmp_path)
    assert len(feedback.read(path).entries) == 1


def test_the_cell_is_where_most_of_the_mask_is():
    mask = np.zeros((30, 60), bool)
    mask[25:, 50:] = mask[0, 0] = True
    assert feedback_loop._cell(mask) == 8


# ------------------------------------------------------------------------------------------------- applying it


def test_confirmed_pictures_join_bank_training_and_tuning(loop, log, monkeypatch):
    searched = {}
    tune = tuning.tune

    def spy(method, training, **options):
        searched[method, training.category] = training
        return tune(method, training, **options)

    monkeypatch.setattr(tuning, "tune", spy)
    outcome = feedback_loop.apply_feedback(loop, log)
    for category, training in loop.learn_from.items():
        with_feedback = searched["clip_resnet50", category]
        assert len(with_feedback.samples) == len(training.samples) + 6
        assert with_feedback.kinds.count(one_class.CONFIRMED) == 6
        bank = outcome.fitted["clip_resnet50"][category].detector._references
        assert len(bank) == len(loop.fitted["clip_resnet50"][category].detector._references) + 6
        for sample, group in zip(with_feedback.samples[-6:], with_feedback.groups[-6:], strict=True):
            assert group in training.groups
            assert sample.split in {s.split for s in training.samples if s.group == group}
        confirmed = [one for one in outcome.confirmed if one.category == category]
        hashes = {
            label: [one.entry.pixels_sha256 for one in confirmed if one.is_anomalous == label]
            for label in (False, True)
        }
        assert list(with_feedback.normals.ids[-6:]) == hashes[False] == [s.sha256 for s in with_feedback.samples[-6:]]
        assert list(with_feedback.anomalies.ids[-6:]) == hashes[True]
        groups = [one.group for one in confirmed if one.is_anomalous]
        assert [source.group for source in with_feedback.sources[-6:]] == groups


def test_keeping_the_settings_is_possible(loop, log, monkeypatch):
    monkeypatch.setattr(tuning, "tune", None)  # a search would fail
    outcome = feedback_loop.apply_feedback(loop, log, n_trials=1)
    for method, paintings in outcome.fitted.items():
        for category, one in paintings.items():
            before = loop.fitted[method][category]
            assert one.tuned.settings == before.tuned.settings
            assert len(one.normal_scores) == len(before.normal_scores) + 6


def test_the_table_counts_verdicts_on_the_frozen_test_set(loop, log, dataset):
    outcome = feedback_loop.apply_feedback(loop, log, n_trials=1)
    test = dataset.select(split="test")
    for method in METHODS:
        for when, fitted in (("before", loop.fitted), ("after", outcome.fitted)):
            found = passed = 0
            for sample in test:
                one = fitted[method][sample.category]
                called = one.detector.score(loop.embedded.of([sample]))[0] > one.threshold
                found += called and sample.is_anomalous
                passed += not called and not sample.is_anomalous
            row = outcome.table.loc[method]
            assert (row[f"found {when}"], row[f"passed {when}"]) == (f"{found}/4", f"{passed}/6")
            assert row[when] == pytest.approx((found / 4 + passed / 6) / 2)
    words = outcome.describe()
    assert "Learnt from 24 confirmed pictures, 12 of them anomalous." in words
    assert "on 10 frozen test pictures" in words
    before, after = outcome.table["before"].mean(), outcome.table["after"].mean()
    assert words.endswith(f"Mean over 3 methods: balanced accuracy {before:.3f} before, {after:.3f} after.")


def test_feedback_on_test_pictures_is_named_and_changes_nothing(loop, dataset, tmp_path):
    sample = dataset.select(split="test", category="harbour")[0]
    picture = images.load_image(sample.image_path)
    context = {"category": "harbour"}
    path = tmp_path / "log.jsonl"
    feedback.record(
        path, image_path=sample.image_path, image=picture, verdict="wrong", label="anomalous", context=context
    )
    outcome = feedback_loop.apply_feedback(loop, feedback.read(path))
    assert outcome.fitted == {method: dict(paintings) for method, paintings in loop.fitted.items()}
    assert (outcome.table["difference"] == 0).all()
    assert f"Refused: {sample.image_path.name} is the test picture" in outcome.describe()
    assert ": no difference.\n" in outcome.describe()


def test_only_paintings_with_feedback_change(loop, log, tmp_path):
    shutil.copy(log.path, tmp_path / "log.jsonl")
    lines = [line for line in log.path.read_text().splitlines() if '"category": "harbour"' in line]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    outcome = feedback_loop.apply_feedback(loop, feedback.read(tmp_path / "log.jsonl"), n_trials=1)
    for method in METHODS:
        assert outcome.fitted[method]["portrait"] is loop.fitted[method]["portrait"]
        assert outcome.fitted[method]["harbour"] is not loop.fitted[method]["harbour"]


# ------------------------------------------------------------------------------------------------- the threshold


NORMAL = np.arange(20.0)  # conformal thresholds: 19 at 5 %, 18 at 10 %, 15 at 25 %


def test_the_threshold_lies_in_the_middle_of_the_best_gap():
    confirmed = np.array([17.5, 17.6, 18.5, 30.0, 40.0])
    # Above 17: 2 of 20 normals and all 5 anomalies; the gap reaches from 17 to 17.5.
    assert feedback_loop.feedback_threshold(NORMAL, confirmed, alpha=0.05) == 17.25


def test_among_equal_thresholds_the_one_with_the_fewest_false_alarms_is_taken():
    confirmed = np.array([17.5, 18.5, 19.5, *[30.0] * 17])  # each step up costs one anomaly and saves one normal
    assert feedback_loop.feedback_threshold(NORMAL, confirmed, alpha=0.05) == 19.0  # 25, kept below the careful one


def test_the_threshold_stays_between_two_promises():
    low = feedback_loop.feedback_threshold(NORMAL, np.full(9, 2.5), alpha=0.05, max_alpha=0.25)
    assert low == calibration.conformal_threshold(NORMAL, 0.25)
    high = feedback_loop.feedback_threshold(NORMAL, np.full(9, 99.0), alpha=0.05)
    assert high == calibration.conformal_threshold(NORMAL, 0.05) == 19.0
    with pytest.raises(ValueError, match="at least alpha"):
        feedback_loop.feedback_threshold(NORMAL, np.full(9, 2.5), alpha=0.3, max_alpha=0.25)


def test_a_handful_of_anomalies_is_needed():
    confirmed = np.array([15.5] * (feedback_loop.MIN_CONFIRMED - 1))
    assert feedback_loop.feedback_threshold(NORMAL, confirmed, alpha=0.05) == 19.0
    assert feedback_loop.feedback_threshold(NORMAL, np.append(confirmed, 15.5), alpha=0.05) == 15.25


def test_verdict_in_words(loop, log):
    table = feedback_loop.apply_feedback(loop, log, n_trials=1).table
    row = table.iloc[0].copy()
    for difference, p_value, words in (
        (0.1, 0.01, "better than luck"),
        (-0.1, 0.01, "worse than luck"),
        (0.1, 0.2, "can show"),
    ):
        row["difference"], row["p_holm"] = difference, p_value
        assert words in feedback_loop._sentence("clip_lof", row)
