"""comparison, wording and published: numbers counted by hand, rows refused in words, text tables."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_comparison as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import results
from helpers.data import manifest as data
from helpers.judge import _old_metrics as metrics
from helpers.judge import _old_statistics as statistics
from helpers.judge import comparison, published
from helpers.judge import findings as wording


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def results_dir(dataset: data.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("results"), dataset)


@pytest.fixture(scope="module")
def compared(dataset: data.Dataset, results_dir: Path) -> comparison.Comparison:
    return comparison.compare(dataset, results_dir, profile="mini")


@pytest.fixture
def csv(compared: comparison.Comparison, tmp_path: Path) -> Path:
    return comparison.write(compared, tmp_path)


def value(compared: comparison.Comparison, *key: str) -> float:
    return wording.numbers(compared.table)[key]["value"]


@pytest.mark.parametrize(
    ("key", "expected", "n", "n_anomalous"),
    [
        # harbour: anomalies beat 2, 4, 4 and 0 of the 4 normals
        (("clip_lof", "harbour", "all", "image_auroc"), 10 / 16, 8, 4),
        # recall steps at 6, 5 (precision 1), then 4 and 3 false, 2.5: 3/5, then two normals, 0: 4/8
        (("clip_lof", "harbour", "all", "image_ap"), (1 + 1 + 3 / 5 + 4 / 8) / 4, 8, 4),
        (("clip_lof", "harbour", "all", "f1_max"), 2 / 3, 8, 4),
        (("clip_lof", "harbour", "all", "accuracy"), 5 / 8, 8, 4),
        (("clip_lof", "harbour", "all", "sensitivity"), 2 / 4, 4, 4),
        (("clip_lof", "harbour", "all", "specificity"), 3 / 4, 4, 0),
        (("clip_lof", "harbour", "all", "balanced_accuracy"), 5 / 8, 8, 4),
        # kinds against the normals of their painting
        (("clip_lof", "harbour", "box", "image_auroc"), 6 / 8, 6, 2),
        (("clip_lof", "harbour", "box", "sensitivity"), 1 / 2, 2, 2),
        (("clip_lof", "harbour", "replica", "image_auroc"), 0.0, 5, 1),
        (("clip_lof", "harbour", "synthetic", "image_auroc"), 10 / 12, 7, 3),
        (("clip_lof", "harbour", "real", "sensitivity"), 0.0, 1, 1),
        # over the paintings: rates from pooled verdicts, rankings as means
        (("clip_lof", "all", "all", "accuracy"), 12 / 16, 16, 8),
        (("clip_lof", "all", "all", "sensitivity"), 5 / 8, 8, 8),
        (("clip_lof", "all", "all", "image_auroc"), (10 / 16 + 1) / 2, 16, 8),
        (("clip_lof", "all", "box", "sensitivity"), 3 / 4, 4, 4),
        (("anomalyclip", "all", "all", "image_auroc"), 0.5, 16, 8),
        (("clip_lof", "all", "all", "seconds_per_image"), 0.5, 16, 8),
        # the trivial rule
        (("always_anomaly", "all", "all", "accuracy"), 8 / 16, 16, 8),
        (("always_anomaly", "all", "all", "sensitivity"), 1.0, 8, 8),
        (("always_anomaly", "all", "all", "specificity"), 0.0, 8, 0),
        (("always_anomaly", "harbour", "all", "image_auroc"), 0.5, 8, 4),
    ],
)
def test_numbers_counted_by_hand(
    compared: comparison.Comparison, key: tuple[str, ...], expected: float, n: int, n_anomalous: int
) -> None:
    row = wording.numbers(compared.table)[key]
    assert row["value"] == pytest.approx(expected)
    assert (row["n_images"], row["n_anomalous"]) == (n, n_anomalous)


def test_scores_of_two_paintings_are_not_pooled(compared: comparison.Comparison) -> None:
    """Pooled, clip_lof's portrait normals (10 to 13) would outrank harbour's anomalies: 40/64 instead of the mean."""
    pooled = metrics.image_auroc(
        [*tiny.SCORES["clip_lof"]["harbour"], *tiny.SCORES["clip_lof"]["portrait"]],
        [kind != "good" for kind in tiny.KINDS] * 2,
    )
    assert pooled != pytest.approx(0.8125)
    assert value(compared, "clip_lof", "all", "all", "image_auroc") == pytest.approx(0.8125)


def test_intervals_are_the_stated_ones(compared: comparison.Comparison) -> None:
    look = wording.numbers(compared.table)
    accuracy = look["clip_lof", "all", "all", "accuracy"]
    np.testing.assert_allclose([accuracy["ci_low"], accuracy["ci_high"]], statistics.wilson(12, 16))
    auroc = look["clip_lof", "harbour", "all", "image_auroc"]
    labels = [kind != "good" for kind in tiny.KINDS]
    expected = statistics.auroc_interval(tiny.SCORES["clip_lof"]["harbour"], labels)
    np.testing.assert_allclose([auroc["ci_low"], auroc["ci_high"]], expected)


def test_pixel_metrics_leave_out_pictures_without_a_mask(
    compared: comparison.Comparison, dataset: data.Dataset, results_dir: Path
) -> None:
    row = wording.numbers(compared.table)["anomalyclip", "harbour", "all", "pixel_auroc"]
    assert (row["n_images"], row["n_anomalous"]) == (7, 3)
    samples = dataset.select(split="test")
    result = results.read(results_dir / "anomalyclip", samples, dataset.folder, dataset.hash)
    used = [p for p in result.predictions if p.sample.category == "harbour" and p.sample.kind != "replica"]
    expected = metrics.pixel_auroc(
        [result.anomaly_map(p) for p in used], [data.mask_of(p.sample, tiny.SHAPE) for p in used]
    )
    assert row["value"] == pytest.approx(expected)
    assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert not any(key[0] == "clip_lof" and key[3] == "aupro" for key in wording.numbers(compared.table))
    assert any("leave out 1 of 4 anomalous" in note for note in compared.notes)


def test_the_csv_is_tidy_and_comes_back(compared: comparison.Comparison, csv: Path) -> None:
    table = comparison.read(csv)
    assert tuple(table.columns) == comparison.COLUMNS
    assert not table.duplicated(["method", "category", "kind", "metric"]).any()
    assert set(table.metric) <= set(comparison.METRICS)
    assert table.value.notna().all()
    pd.testing.assert_frame_equal(table, compared.table, check_dtype=False)
    assert (csv.parent / "paired_tests.csv").exists()


def test_reading_says_which_notebook_writes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="09_compare"):
        comparison.read(tmp_path / "comparison.csv")
    (tmp_path / "comparison.csv").write_text("method,accuracy\nx,1\n")
    with pytest.raises(ValueError, match="columns method, accuracy"):
        comparison.read(tmp_path / "comparison.csv")


# ------------------------------------------------------------------------------------------------- refused and missing


def test_results_on_another_dataset_are_refused_by_name(
    compared: comparison.Comparison, results_dir: Path, tmp_path: Path
) -> None:
    other = tiny.make_dataset(tmp_path / "other", categories=("portrait",))
    mixed = comparison.compare(other, shutil.copytree(results_dir, tmp_path / "results"), profile="mini")
    assert set(mixed.refused) == {"clip_lof", "anomalyclip"}
    assert "run the method's notebook again" in mixed.refused["clip_lof"]
    assert compared.dataset.hash[:12] in mixed.refused["clip_lof"]
    assert {result.method for result in mixed.methods} == {"always_anomaly"}
    assert wording.findings(mixed)[0].startswith("No detector has been measured yet")


def test_a_run_over_a_part_of_the_pictures_is_refused(dataset: data.Dataset, tmp_path: Path) -> None:
    part = data.Dataset(dataset.folder, tuple(dataset.select(category="harbour")), dataset.hash)
    tiny.write_result(tmp_path / "clip_lof", part, "clip_lof", tiny.SCORES["clip_lof"], tiny.THRESHOLDS["clip_lof"])
    found = comparison.compare(dataset, tmp_path, profile="mini")
    assert "8 of 16 test pictures" in found.refused["clip_lof"]


def test_missing_methods_are_named_with_their_notebook(compared: comparison.Comparison, csv: Path) -> None:
    assert compared.missing["anomalygpt"] == "AnomalyGPT has no results yet: run 07_anomalygpt_test."
    assert set(compared.missing) == set(results.METHODS) - {"clip_lof", "anomalyclip", "always_anomaly"}
    assert "missing: AnomalyGPT (run 07_anomalygpt_test)" in comparison.as_text(csv)
    assert "| AnomalyGPT (run `07_anomalygpt_test`) | – |" in comparison.as_markdown(csv)


def test_results_of_another_tool_join_as_a_row(dataset: data.Dataset, tmp_path: Path) -> None:
    scores, thresholds = tiny.SCORES["clip_lof"], tiny.THRESHOLDS["clip_lof"]
    tiny.write_result(tmp_path / "my_detector", dataset, "my_detector", scores, thresholds)
    found = comparison.compare(dataset, tmp_path, profile="mini")
    assert value(found, "my_detector", "harbour", "all", "image_auroc") == pytest.approx(0.625)
    assert "my_detector" in comparison.as_text(comparison.write(found, tmp_path))


def test_a_method_without_threshold_has_scores_but_no_rates(dataset: data.Dataset, tmp_path: Path) -> None:
    nowhere = dict.fromkeys(tiny.CATEGORIES, math.nan)
    tiny.write_result(tmp_path / "clip_lof", dataset, "clip_lof", tiny.SCORES["clip_lof"], nowhere)
    found = comparison.compare(dataset, tmp_path, profile="mini")
    measured = set(found.table[found.table.method == "clip_lof"].metric)
    assert "image_auroc" in measured and not measured & {"accuracy", "sensitivity", "specificity", "balanced_accuracy"}
    assert any("CLIP LOF gave no threshold" in note for note in found.notes)
    assert not ((found.tests.measure == "accuracy") & (found.tests.method_a == "clip_lof")).any()
    assert "CLIP LOF" in wording.findings(found)[0]


def test_always_anomaly_is_written_once(results_dir: Path, dataset: data.Dataset) -> None:
    folder = results_dir / "always_anomaly"
    before = (folder / results.MANIFEST).stat().st_mtime_ns
    comparison.write_always_anomaly(folder, dataset, profile="mini")
    assert (folder / results.MANIFEST).stat().st_mtime_ns == before


# ----------------------------------------------------------------------------------------------- kinds and visibility


def test_kinds_named_like_the_tables_own_words_are_kept_apart(tmp_path: Path) -> None:
    kinds = ("good", "good", "real", "all")
    dataset = tiny.make_dataset(tmp_path / "data", kinds=kinds, categories=("harbour",))
    tiny.write_result(
        tmp_path / "results" / "clip_lof", dataset, "clip_lof", {"harbour": (1, 2, 3, 0)}, {"harbour": 2.5}
    )
    found = comparison.compare(dataset, tmp_path / "results", profile="mini")
    assert value(found, "clip_lof", "harbour", "kind:real", "sensitivity") == 1.0
    assert value(found, "clip_lof", "harbour", "kind:all", "sensitivity") == 0.0
    assert value(found, "clip_lof", "harbour", "all", "sensitivity") == 0.5
    assert ("clip_lof", "harbour", "real", "sensitivity") not in wording.numbers(found.table)


def test_visibility_bins_are_quarters_of_the_marked_pictures(tmp_path: Path) -> None:
    dataset = tiny.make_dataset(tmp_path / "data", categories=("harbour",), repeat=3)
    bins = comparison.visibility_bins(dataset.select(split="test"))
    assert len(bins) == 9
    counts = [list(bins.values()).count(name) for name in comparison.VISIBILITY_BINS]
    assert counts == [3, 2, 2, 2]
    by_name = {path: sample.visibility for sample in dataset.samples for path in [sample.image_path] if path in bins}
    faintest = max(by_name[path] for path, name in bins.items() if name == "faint")
    assert faintest < min(by_name[path] for path, name in bins.items() if name == "weak")


def test_few_marks_make_no_visibility_bins(dataset: data.Dataset) -> None:
    assert comparison.visibility_bins(dataset.select(split="test")) == {}


# --------------------------------------------------------------------------------------------------------- statistics


@given(st.data())
def test_redrawn_pictures_give_the_metric_of_those_pictures(drawn: st.DataObject) -> None:
    n = drawn.draw(st.integers(4, 12))
    scores = np.array(drawn.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=float)
    labels = np.array(drawn.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    chosen = np.array(drawn.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    redrawn = comparison._Redrawn(scores, labels)
    np.testing.assert_allclose(
        [redrawn.average_precision(chosen), redrawn.f1_max(chosen)],
        [
            metrics.average_precision(scores[chosen], labels[chosen]),
            metrics.f1_max(scores[chosen], labels[chosen]).value if 0 < labels[chosen].sum() < n else math.nan,
        ],
    )


def test_mean_of_one_painting_keeps_its_interval() -> None:
    mean, interval = comparison.mean_with_interval([(0.8, 0.6, 0.9)])
    assert mean == 0.8
    np.testing.assert_allclose(interval, (0.6, 0.9))


def test_an_unknown_interval_leaves_the_mean_without_one() -> None:
    _, interval = comparison.mean_with_interval([(0.8, 0.6, 0.9), (1.0, math.nan, math.nan)])
    assert all(math.isnan(end) for end in interval)


def test_every_pair_is_tested_on_every_painting_and_corrected(compared: comparison.Comparison) -> None:
    tests = compared.tests
    assert len(tests) == 2 * 2 * 3  # paintings, measures, pairs of three methods
    family = tests[(tests.category == "portrait") & (tests.measure == "AUROC")]
    np.testing.assert_allclose(family.p_holm, statistics.holm(family.p_value))
    row = tests[(tests.category == "harbour") & (tests.measure == "accuracy") & (tests.method_b == "anomalyclip")].iloc[
        0
    ]
    # clip_lof errs on 3 of 8 pictures where anomalyclip is right, never the other way round: p = 2 / 2^3
    assert row.p_value == pytest.approx(0.25)
    assert "cannot tell CLIP LOF from AnomalyCLIP" in row.sentence


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_balanced_accuracy_test_counts_every_fall_of_the_coins(drawn: st.DataObject) -> None:
    n = drawn.draw(st.integers(3, 9))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    labels, a, b = (np.array(drawn.draw(flags)) for _ in range(3))
    labels[:2] = True, False

    def balanced(correct: np.ndarray) -> float:
        return (correct[labels].mean() + correct[~labels].mean()) / 2

    falls = [
        balanced(np.where(swap, b, a)) - balanced(np.where(swap, a, b))
        for swap in itertools.product([False, True], repeat=n)
    ]
    test = comparison.balanced_accuracy_test(a, b, labels)
    assert test.difference == pytest.approx(balanced(a) - balanced(b))
    assert test.p_value == pytest.approx(np.mean(np.abs(falls) >= abs(test.difference) - 1e-12))


def test_balanced_accuracy_needs_both_classes_and_equal_lengths() -> None:
    yes = np.ones(4, bool)
    assert math.isnan(comparison.balanced_accuracy_test(yes, ~yes, yes).p_value)
    with pytest.raises(ValueError, match="three lists of True/False"):
        comparison.balanced_accuracy_test(yes, yes, np.ones(5, bool))
    with pytest.raises(ValueError, match="three lists of True/False"):
        comparison.balanced_accuracy_test(yes, yes.astype(int), yes)


# ----------------------------------------------------------------------------------------------------------- sentences


def test_headline_names_the_first_and_what_cannot_be_told(dataset: data.Dataset, tmp_path: Path) -> None:
    flat = dict.fromkeys(tiny.CATEGORIES, (1, 2, 3, 4, 5, 6, 7, 3.5))
    for method in ("clip_lof", "anomalyclip"):
        tiny.write_result(tmp_path / method, dataset, method, flat, dict.fromkeys(flat, 4.5))
    headline = wording.findings(comparison.compare(dataset, tmp_path, profile="mini"))[0]
    assert headline.startswith("On 16 test pictures of 2 paintings, CLIP LOF ranks first: image AUROC 0.94 [")
    assert headline.endswith("But these pictures cannot tell it from AnomalyCLIP.")


def test_a_lead_on_one_painting_and_a_loss_on_the_other_is_no_lead(compared: comparison.Comparison) -> None:
    """LOF beats AnomalyCLIP on the portrait (p < 0.05) and loses on the harbour."""
    assert "cannot tell it from AnomalyCLIP" in wording.findings(compared)[0]


def test_findings_weigh_every_method_against_the_trivial_rule(compared: comparison.Comparison) -> None:
    sentence = next(text for text in wording.findings(compared) if text.startswith("Calling every picture"))
    assert "8/16 (50.0 %)" in sentence and "every detector is more accurate" in sentence


def test_a_first_place_at_chance_level_is_no_finding(dataset: data.Dataset, tmp_path: Path) -> None:
    level = dict.fromkeys(tiny.CATEGORIES, (1, 2, 3, 4, 1, 2, 3, 4))
    tiny.write_result(tmp_path / "clip_lof", dataset, "clip_lof", level, dict.fromkeys(level, 9.0))
    sentences = wording.findings(comparison.compare(dataset, tmp_path, profile="mini"))
    assert sentences[0].startswith("On 16 test pictures of 2 paintings, no detector is shown to be better than a coin")
    assert "no detector is more accurate than that" in sentences[1]


def test_equally_hard_kinds_are_named_together(compared: comparison.Comparison) -> None:
    """Means over both detectors: replica 0.25 (n < 3, left out), box 0.625, stain 0.75 (n < 3, left out)."""
    assert not any("Found least" in text for text in wording.findings(compared))
    means = pd.Series({"box": 0.0, "dots": 0.0, "cut_and_paste": 0.5})
    assert wording._kinds_at(means, 0.0) == "“box” and “dots” (0.0 %)"
    assert wording._kinds_at(means, 0.5) == "“cut and paste” (50.0 %)"


@pytest.mark.parametrize(("number", "text"), [(0.9996, ">0.99"), (1.0, "1.00"), (0.934, "0.93"), (0.0, "0.00")])
def test_no_number_is_rounded_up_to_perfection(number: float, text: str) -> None:
    assert wording.decimal(number) == text


def test_text_table_is_aligned_and_narrow_enough(csv: Path) -> None:
    text = comparison.as_text(csv)
    assert max(map(len, text.splitlines())) <= 118
    assert "All paintings (16 test pictures, 8 anomalous)" in text
    line = next(line for line in text.splitlines() if line.startswith("CLIP LOF"))
    assert "0.81 [" in line and "12/16" in line and "5/8" in line and "7/8" in line
    assert "mini" in text and "\x1b" not in text


def test_markdown_table_has_the_same_width_in_every_row(csv: Path) -> None:
    lines = [line for line in comparison.as_markdown(csv).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {10}
    assert len(lines) == 2 + len(results.METHODS)
    assert "Profile `mini`, 16 test pictures, 8 anomalous" in comparison.as_markdown(csv)


def test_published_counts_give_the_printed_accuracies() -> None:
    rows = [row for row in (*published.REPORT_2024, published.ALWAYS_2024) if row.correct is not None]
    assert len(rows) == 6
    for row in rows:
        assert round(100 * row.correct / row.n_images, 2) == row.accuracy
    assert {row.n_images for row in rows} == {50, 49, 45, 42, 90}
