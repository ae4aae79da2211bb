"""comparison, findings: numbers counted by hand, rows refused in words, sentences that a test supports."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import record_results
import tiny_comparison as tiny

from helpers import data, results
from helpers.judge import comparison, findings, metrics, statistics
from helpers.judge.comparison import Comparison
from helpers.records import Sample


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compared(dataset: data.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny.compare(tmp_path_factory.mktemp("results"), dataset, maps=["anomalyclip"])


def row(found: Comparison, key: str) -> dict:
    return comparison.numbers(found.table)[tuple(key.split())]


def interval(row: dict) -> tuple[float, float]:
    return row["ci_low"], row["ci_high"]


@pytest.mark.parametrize(
    ("key", "expected", "n", "n_anomalous"),
    [
        # harbour: anomalies beat 2, 4, 4 and 0 of the 4 normals
        ("clip_lof harbour all image_auroc", 10 / 16, 8, 4),
        # recall steps at 6, 5 (precision 1), then 4 and 3 false, 2.5: 3/5, then two normals, 0: 4/8
        ("clip_lof harbour all image_ap", (1 + 1 + 3 / 5 + 4 / 8) / 4, 8, 4),
        ("clip_lof harbour all accuracy", 5 / 8, 8, 4),
        ("clip_lof harbour all sensitivity", 2 / 4, 4, 4),
        ("clip_lof harbour all specificity", 3 / 4, 4, 0),
        ("clip_lof harbour all balanced_accuracy", 5 / 8, 8, 4),
        # kinds and groups against the normals of their painting
        ("clip_lof harbour box image_auroc", 6 / 8, 6, 2),
        ("clip_lof harbour box sensitivity", 1 / 2, 2, 2),
        ("clip_lof harbour replica image_auroc", 0.0, 5, 1),
        ("clip_lof harbour synthetic image_auroc", 10 / 12, 7, 3),
        ("clip_lof harbour found sensitivity", 0.0, 1, 1),
        ("clip_lof harbour group:plain sensitivity", 2 / 3, 3, 3),
        ("clip_lof harbour group:real sensitivity", 0.0, 1, 1),
        # over the paintings: rates from pooled verdicts, rankings as means
        ("clip_lof all all accuracy", 12 / 16, 16, 8),
        ("clip_lof all all sensitivity", 5 / 8, 8, 8),
        ("clip_lof all all image_auroc", (10 / 16 + 1) / 2, 16, 8),
        ("clip_lof all box sensitivity", 3 / 4, 4, 4),
        ("anomalyclip all all image_auroc", 0.5, 16, 8),
        ("clip_lof all all seconds_per_image", 0.5, 16, 8),
        # the trivial rule
        ("always_anomaly all all accuracy", 8 / 16, 16, 8),
        ("always_anomaly all all specificity", 0.0, 8, 0),
        ("always_anomaly harbour all image_auroc", 0.5, 8, 4),
    ],
)
def test_numbers_counted_by_hand(compared: Comparison, key: str, expected: float, n: int, n_anomalous: int) -> None:
    found = row(compared, key)
    assert found["value"] == pytest.approx(expected)
    assert (found["n_images"], found["n_anomalous"]) == (n, n_anomalous)
    if key == "clip_lof harbour all image_auroc":
        labels = [kind != "good" for kind in tiny.KINDS]
        assert interval(found) == statistics.auroc_interval(tiny.SCORES["clip_lof"]["harbour"], labels)
    elif key.endswith(("accuracy", "sensitivity", "specificity")) and "balanced" not in key:
        assert interval(found) == pytest.approx(statistics.wilson(expected * n, n))


def test_pixel_metrics_leave_out_pictures_without_a_mask_and_have_their_own_interval(compared: Comparison) -> None:
    found = row(compared, "anomalyclip harbour all aupro")
    assert (found["n_images"], found["n_anomalous"]) == (7, 3)
    run = compared.runs["anomalyclip"]
    used = [p for p in run.predictions if p.sample.category == "harbour" and p.sample.kind != "replica"]
    table = metrics.pixel_table([run.anomaly_map(p) for p in used], [data.mask_of(p.sample, tiny.SHAPE) for p in used])
    assert found["value"] == pytest.approx(metrics.pixel_metrics(table)[1])
    draws = statistics.redraws([p.sample.is_anomalous for p in used], [p.sample.group for p in used])
    drawn = statistics.percentile_interval(metrics.pixel_metrics(table, draws)[:, 1])
    assert interval(found) == pytest.approx(drawn)  # of the same quantity as the value
    assert not any(key[0] == "clip_lof" and key[3] == "aupro" for key in comparison.numbers(compared.table))
    assert any("leave out 1 of 4 anomalous" in note for note in compared.notes)


def test_the_csv_is_tidy_and_every_table_shows_its_numbers(compared: Comparison, tmp_path: Path) -> None:
    csv = comparison.write(compared, tmp_path)
    table = comparison.read(csv)
    assert tuple(table.columns) == comparison.COLUMNS and set(table.metric) <= set(comparison.METRICS)
    assert not table.duplicated(["method", "category", "kind", "metric"]).any() and table.value.notna().all()
    pd.testing.assert_frame_equal(table, compared.table, check_dtype=False)
    text = findings.as_text(csv)
    line = next(line for line in text.splitlines() if line.startswith("CLIP LOF"))
    assert "0.81 [" in line and "12/16" in line and "5/8" in line and "7/8" in line
    lines = [line for line in record_results.as_markdown(csv).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(results.METHODS)
    assert set(compared.missing) == set(results.METHODS) - {"clip_lof", "anomalyclip", "always_anomaly"}
    for words in (compared.missing["anomalygpt"], text, lines[-2].replace("`", "")):
        assert "AnomalyGPT" in words and "run 07_anomalygpt_test" in words


def test_results_on_another_dataset_are_refused_by_name(dataset: data.Dataset, tmp_path: Path) -> None:
    tiny.compare(tmp_path / "results", dataset)
    other = tiny.make_dataset(tmp_path / "other", categories=("portrait",))
    mixed = comparison.compare(other, tmp_path / "results", profile="mini")
    assert set(mixed.refused) == {"clip_lof", "anomalyclip"} and not mixed.runs
    assert dataset.hash[:12] in mixed.refused["clip_lof"]
    assert findings.verdict(mixed).startswith("No detector has verdicts")


def test_results_of_another_tool_join_and_without_threshold_have_no_rates(dataset, tmp_path: Path) -> None:
    tiny.compare(tmp_path, dataset, "my_detector", "clip_lof")
    path = tmp_path / "my_detector" / "predictions.csv"
    pd.read_csv(path).assign(threshold=math.nan, is_predicted_anomalous=False).to_csv(path, index=False)
    found = comparison.compare(dataset, tmp_path, profile="mini")
    assert row(found, "my_detector harbour all image_auroc")["value"] == pytest.approx(0.625)
    measured = set(found.table[found.table.method == "my_detector"].metric)
    assert not measured & {"accuracy", "sensitivity", "specificity", "balanced_accuracy"}
    assert any("my_detector gave no threshold" in note for note in found.notes)
    assert set(found.tests.measure) == {"AUROC"}


def test_kinds_named_like_the_tables_own_words_are_kept_apart(tmp_path: Path) -> None:
    kinds = ("good", "good", "found", "all")
    dataset = tiny.make_dataset(tmp_path / "data", kinds=kinds, categories=("harbour",))
    tiny.write_result(tmp_path / "r" / "clip_lof", dataset, "clip_lof", {"harbour": (1, 2, 3, 0)}, {"harbour": 2.5})
    found = comparison.compare(dataset, tmp_path / "r", profile="mini")
    for kind, value in {"kind:found": 1.0, "kind:all": 0.0, "all": 0.5}.items():
        assert row(found, f"clip_lof harbour {kind} sensitivity")["value"] == value
    assert ("clip_lof", "harbour", "found", "sensitivity") not in comparison.numbers(found.table)


@pytest.mark.parametrize(
    ("group", "rendered", "change"),
    [
        ("plain", True, {}),
        ("faint", True, {"visibility": 4.9}),
        ("moderate", True, {"visibility": 5.0}),
        ("mark", True, {"visibility": None}),
        ("whole", True, {"mask_path": None}),
        ("whole", True, {"mask_path": None, "synthesis_seed": None}),  # rendered by the suite: never called real
        ("real", False, {"mask_path": None, "synthesis_seed": None}),
        ("genuine", True, {"is_anomalous": False, "kind": "good"}),
    ],
)
def test_groups_of_pictures(group: str, rendered: bool, change: dict) -> None:
    facts = {"mask_path": Path("m.png"), "kind": "box", "visibility": 30.0, "synthesis_seed": 1} | change
    sample = Sample(Path("p.png"), "harbour", **{"is_anomalous": True} | facts)
    assert comparison.picture_group(sample, rendered=rendered) == group


def test_few_sources_count_as_sources_and_one_gives_no_interval(dataset: data.Dataset, tmp_path: Path) -> None:
    words = "Harbour has one genuine picture: its numbers are optimistic."

    def limited(n_sources: int) -> Comparison:
        samples = [dataclasses.replace(s, group=str(place % n_sources)) if s.category == "harbour" else s
                   for place, s in enumerate(dataset.samples)]  # fmt: skip
        few = dataclasses.replace(dataset, samples=tuple(samples), limits={"harbour": words})
        return tiny.compare(tmp_path / str(n_sources), few, "clip_lof", "clip_patch_knn")

    one, two = limited(1), limited(2)
    rows = one.table[(one.table.category == "harbour") & (one.table.method == "clip_lof")]
    assert rows.ci_low.isna().all() and words in one.notes
    assert math.isnan(row(one, "clip_lof all all accuracy")["ci_low"])
    assert interval(row(two, "clip_lof harbour all accuracy")) == pytest.approx(statistics.wilson(5 / 8 * 2, 2))
    assert len(one.tests) == 2 and (one.tests.n_images == 8).all()  # the paired tests are of the other painting only


def test_seen_kinds_and_what_a_chat_model_says_come_from_the_manifest(dataset: data.Dataset, tmp_path: Path) -> None:
    paths = [results.relative_path(sample, dataset.folder) for sample in dataset.select(split="test")]
    says = dict.fromkeys(paths, True) | {paths[0]: None}  # the first is genuine; unclear words are wrong
    found = tiny.compare(tmp_path, dataset, "clip_lof", trained_on_kinds=["box"], answers_say=says)
    assert row(found, "clip_lof all seen sensitivity")["value"] == 3 / 4
    assert row(found, "clip_lof all unseen sensitivity")["value"] == 1.0
    assert any("counted apart" in text for text in findings.findings(found))
    assert row(found, "clip_lof all all answer_accuracy")["value"] == 8 / 16
    assert not ((found.table.method == "always_anomaly") & (found.table.metric == "answer_accuracy")).any()


def test_pairs_are_of_detectors_only_with_one_family_a_question(compared: Comparison) -> None:
    tests = compared.tests.assign(sentence=findings.pairs(compared.tests))
    assert len(tests) == 2 * 3  # measures, and all paintings or each of two
    assert "always_anomaly" not in {*tests.method_a, *tests.method_b}
    each = tests[(tests.category != "all") & (tests.measure == "AUROC")]
    np.testing.assert_allclose(each.p_holm, statistics.holm(each.p_value))
    # clip_lof errs on 3 of 8 pictures where anomalyclip is right, never the other way round: p = 2 / 2^3
    found, whole = (tests[(tests.category == c) & (tests.measure == "accuracy")].iloc[0] for c in ("harbour", "all"))
    assert found.p_value == pytest.approx(0.25) and whole.n_images == 16
    assert "cannot tell AnomalyCLIP from CLIP LOF" in found.sentence and "p = 0.50" in found.sentence  # two paintings


def test_the_sentences_say_what_the_numbers_allow(compared: Comparison, dataset: data.Dataset, tmp_path: Path) -> None:
    words = "CLIP LOF finds 5 of 8 forged or altered pictures and raises 1 false alarm on 8 genuine ones."
    assert findings.verdict(compared) == f"{words} Level with that in balanced accuracy: AnomalyCLIP."
    text = " ".join(findings.findings(compared))
    assert "None of 1 pairs" in text and "At most 1 false alarm" in text and "no better than chance" in text
    tied = tiny.compare(tmp_path / "tied", dataset, "clip_lof", "clip_patch_knn")
    assert all("are tied" in words for words in findings.pairs(tied.tests)) and (tied.tests.p_holm == 1).all()
    assert findings.verdict(tied).startswith("CLIP LOF and CLIP patch k-NN each find 5 of 8")
    level = dict.fromkeys(tiny.CATEGORIES, (1, 2, 3, 4, 1, 2, 3, 4))
    tiny.write_result(tmp_path / "level" / "clip_lof", dataset, "clip_lof", level, dict.fromkeys(level, 9.0))
    guessing = comparison.compare(dataset, tmp_path / "level", profile="mini")
    assert findings.verdict(guessing).startswith("No detector is shown to be better than guessing")
