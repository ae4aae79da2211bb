"""Intervals and tests against published numbers, plain versions from the definitions, and simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from helpers.judge import _old_metrics as metrics
from helpers.judge import _old_statistics as statistics

pytestmark = pytest.mark.filterwarnings("error")

LABELS = np.repeat([True, False], [34, 16])


def binormal(generator: np.random.Generator, auroc: float) -> np.ndarray:
    """Normal scores of 34 anomalous and 16 normal pictures with a known true AUROC."""
    return generator.normal(size=50) + np.sqrt(2) * ndtri(auroc) * LABELS


# -------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (50, 50, 92.9, 100),
        (41, 42, 87.7, 99.6),
        (41, 45, 79.3, 96.5),
        (41, 49, 71.0, 91.5),
        (64, 90, 61.0, 79.5),
        (30, 45, 52.1, 78.6),
        (34, 50, 54.2, 79.2),
        (34, 34, 89.8, 100),
        (16, 16, 80.6, 100),
    ],
)
def test_wilson_of_the_source_reports_counts(successes: int, n: int, low: float, high: float) -> None:
    assert [round(100 * limit, 1) for limit in statistics.wilson(successes, n)] == [low, high]
    mirrored = statistics.wilson(n - successes, n)
    assert [round(100 * (1 - limit), 1) for limit in mirrored] == [high, low]


def test_wilson_level_and_edges() -> None:
    assert statistics.wilson(8, 10, 0.99).low < statistics.wilson(8, 10).low < statistics.wilson(8, 10, 0.8).low
    assert statistics.wilson(7, 7).high == 1.0 and statistics.wilson(0, 7).low == 0.0
    assert all(map(math.isnan, statistics.wilson(0, 0)))
    for successes, n in ((5, 4), (-1, 4)):
        with pytest.raises(ValueError, match=f"{successes} successes among {n}"):
            statistics.wilson(successes, n)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"):
            statistics.wilson(1, 2, level)


def test_delong_variance_equals_its_definition_with_ties() -> None:
    scores = np.round(binormal(np.random.default_rng(0), 0.8), 1)
    x, y = scores[LABELS], scores[~LABELS]
    beats = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    assert (x[:, None] == y).any()
    expected = beats.mean(axis=1).var(ddof=1) / 34 + beats.mean(axis=0).var(ddof=1) / 16
    auroc, variance = statistics.delong_variance(scores, LABELS)
    assert auroc == pytest.approx(roc_auc_score(LABELS, scores), abs=1e-12)
    assert variance == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("auroc", [0.8, 0.95])
def test_logit_delong_covers_what_it_promises(auroc: float) -> None:
    """Nominal 95 % at 34 + 16; simulated elsewhere: 94.7 at 0.80, 94.9 at 0.95 (plain DeLong 91.7, 83.7)."""
    generator = np.random.default_rng(1)
    hits = []
    for _ in range(1000):
        low, high = statistics.auroc_interval(binormal(generator, auroc), LABELS)
        hits.append(low <= auroc <= high)
    assert 0.93 <= np.mean(hits) <= 0.98


def test_newcombe_covers_what_it_promises() -> None:
    """Simulated elsewhere: 97.4 at 0.98 for method 5. Used where the estimate is 1, about 8 % of these draws."""
    generator = np.random.default_rng(2)
    hits, perfect = [], 0
    for _ in range(800):
        auroc, _ = statistics.delong_variance(binormal(generator, 0.98), LABELS)
        low, high = statistics._newcombe(auroc, 34, 16, 1.959964)
        hits.append(low <= 0.98 <= high)
        perfect += auroc == 1
    assert 0.95 <= np.mean(hits) <= 1
    assert 0.04 <= perfect / 800 <= 0.13


def test_a_perfect_auroc_is_no_certainty() -> None:
    low, high = statistics.auroc_interval(LABELS.astype(float), LABELS)
    assert high == 1 and 0.85 < low < 0.95
    # At the limit the estimate is z of the limit's own standard errors away: Newcombe's equation.
    spread = (34 + 16) / 2 - 1
    variance = low * (1 - low) * (1 + spread * ((1 - low) / (2 - low) + low / (1 + low))) / (34 * 16)
    assert (1 - low) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-5)
    mirrored = statistics.auroc_interval(-LABELS.astype(float), LABELS)
    assert (mirrored.low, mirrored.high) == pytest.approx((0, 1 - low), abs=1e-9)


def test_degenerate_scores_have_wide_intervals_not_points() -> None:
    low, high = statistics.auroc_interval(np.ones(50), LABELS)  # constant: AUROC 0.5, DeLong variance 0
    assert low < 0.4 and high > 0.6 and (low + high) == pytest.approx(1)
    low, high = statistics.auroc_interval([1.0, 2.0], [0, 1])  # one picture of each class
    assert low < 0.5 and high == 1
    assert all(map(math.isnan, statistics.auroc_interval([1.0, 2.0], [1, 1])))
    with pytest.raises(ValueError, match="not finite"):
        statistics.auroc_interval([1.0, math.nan], [0, 1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-20, 20), st.booleans()), min_size=2, max_size=30))
def test_auroc_intervals_hold_the_estimate_and_ignore_the_scale(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    low, high = statistics.auroc_interval(scores, labels)
    if labels.all() or not labels.any():
        assert math.isnan(low) and math.isnan(high)
        return
    assert 0 <= low <= metrics.image_auroc(scores, labels) <= high <= 1 and low < high
    assert statistics.auroc_interval(np.exp(scores / 10), labels) == pytest.approx((low, high), abs=1e-9)
    assert statistics.auroc_interval(-scores, labels) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_balanced_accuracy_interval() -> None:
    rates = metrics.rates(LABELS, np.r_[np.ones(30), np.zeros(4), np.zeros(12), np.ones(4)])
    low, high = statistics.balanced_accuracy_interval(rates)
    assert low < rates.balanced_accuracy < high
    sensitivity, specificity = statistics.wilson(30, 34), statistics.wilson(12, 16)
    assert high - low < max(sensitivity.high - sensitivity.low, specificity.high - specificity.low)
    perfect = statistics.balanced_accuracy_interval(metrics.rates(LABELS, LABELS))
    assert perfect.high == 1 and 0.85 < perfect.low < 0.93
    assert all(map(math.isnan, statistics.balanced_accuracy_interval(metrics.rates([1, 1], [1, 1]))))


def test_balanced_accuracy_interval_covers_what_it_promises() -> None:
    generator, hits = np.random.default_rng(3), []
    for found, alarms in zip(generator.binomial(34, 0.85, 1000), generator.binomial(16, 0.1, 1000)):
        rates = metrics.Rates(int(found), int(34 - found), int(16 - alarms), int(alarms))
        low, high = statistics.balanced_accuracy_interval(rates)
        hits.append(low <= (0.85 + 0.9) / 2 <= high)
    assert 0.93 <= np.mean(hits) <= 0.985


# -------------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=200)
    low, high = statistics.stratified_bootstrap(lambda i: values[i].mean(), np.zeros(200))
    error = values.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    again = statistics.stratified_bootstrap(lambda i: values[i].mean(), np.zeros(200))
    assert again == (low, high)
    assert statistics.stratified_bootstrap(lambda i: values[i].mean(), np.zeros(200), seed=1) != (low, high)
    narrow = statistics.stratified_bootstrap(lambda i: values[i].mean(), np.zeros(200), level=0.5)
    assert low < narrow.low < narrow.high < high


def test_bootstrap_keeps_the_strata() -> None:
    seen = set()
    statistics.stratified_bootstrap(lambda i: seen.add(int(LABELS[i].sum())) or float(i[0]), LABELS, n_draws=50)
    assert seen == {34}


def test_bootstrap_draws_groups_whole_and_is_wider_for_copies() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    groups = np.repeat(np.arange(20), 10)
    sizes = set()

    def statistic(i: np.ndarray) -> float:
        sizes.update(np.bincount(groups[i]).tolist())
        return float(values[i].mean())

    alone = statistics.stratified_bootstrap(lambda i: values[i].mean(), np.zeros(200), n_draws=400)
    together = statistics.stratified_bootstrap(statistic, np.zeros(200), groups=groups, n_draws=400)
    assert all(size % 10 == 0 for size in sizes)
    assert together.high - together.low > 2.5 * (alone.high - alone.low)  # sqrt(10) in theory


def test_bootstrap_admits_what_it_does_not_know() -> None:
    perfect = LABELS.astype(float)
    interval = statistics.stratified_bootstrap(
        lambda i: metrics.average_precision(perfect[i], LABELS[i]), LABELS, n_draws=20
    )
    assert all(map(math.isnan, interval))
    assert all(map(math.isnan, statistics.stratified_bootstrap(lambda i: math.nan, LABELS, n_draws=5)))
    with pytest.warns(UserWarning, match="nan in"):
        statistics.stratified_bootstrap(lambda i: math.nan if i[0] == 3 else float(i[0]), LABELS, n_draws=200)
    for strata, groups in (([], None), ([1, 2], [1])):
        with pytest.raises(ValueError, match="one of each for every picture"):
            statistics.stratified_bootstrap(lambda i: 0.0, strata, groups=groups)


# ------------------------------------------------------------------------------------------------ two methods


def test_paired_delong_equals_its_definition() -> None:
    generator = np.random.default_rng(5)
    a = binormal(generator, 0.9)
    b = np.round(0.5 * a + binormal(generator, 0.75), 1)
    values = []
    for scores in (a, b):
        x, y = scores[LABELS], scores[~LABELS]
        values.append((x[:, None] > y) + 0.5 * (x[:, None] == y))
    gap = values[0] - values[1]
    error = math.sqrt(gap.mean(axis=1).var(ddof=1) / 34 + gap.mean(axis=0).var(ddof=1) / 16)
    test = statistics.delong_paired(a, b, LABELS)
    assert test.difference == pytest.approx(gap.mean(), abs=1e-12)
    assert test.standard_error == pytest.approx(error, rel=1e-9)
    assert test.p_value == pytest.approx(2 * (1 - binormal_cdf(abs(gap.mean()) / error)), rel=1e-6)
    swapped = statistics.delong_paired(b, a, LABELS)
    assert (swapped.difference, swapped.p_value) == pytest.approx((-test.difference, test.p_value))
    scaled = statistics.delong_paired(np.exp(a), b * 7 - 3, LABELS)
    assert scaled.p_value == pytest.approx(test.p_value)


def binormal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_paired_delong_rejects_at_its_level() -> None:
    generator, p = np.random.default_rng(6), []
    for _ in range(600):
        shared = generator.normal(size=50)
        a, b = (binormal(generator, 0.85) + 0.7 * shared for _ in range(2))
        p.append(statistics.delong_paired(a, b, LABELS).p_value)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.08


def test_paired_delong_edges() -> None:
    scores = binormal(np.random.default_rng(7), 0.8)
    same = statistics.delong_paired(scores, 3 * scores + 1, LABELS)
    assert (same.difference, same.p_value) == (0, 1)
    assert statistics.delong_paired(np.ones(50), np.zeros(50), LABELS).p_value == 1
    assert math.isnan(statistics.delong_paired([1, 2], [2, 1], [1, 1]).p_value)
    # Perfect against constant: DeLong's variance is 0. Plainly different with 50 pictures, not with 3.
    perfect = LABELS.astype(float)
    assert statistics.delong_paired(perfect, np.ones(50), LABELS).p_value < 0.01
    few = statistics.delong_paired([1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1, 0, 0])
    assert few.difference == 0.5 and few.p_value > 0.2 and math.isnan(few.standard_error)
    opposite = statistics.delong_paired([1.0, 1, 0, 0], [0.0, 0, 1, 1], [1, 1, 0, 0])
    assert 0.05 < opposite.p_value < 1  # 2 of the 16 swaps are as extreme


@pytest.mark.parametrize(("only_a", "only_b"), [(5, 0), (6, 0), (9, 2), (3, 3), (0, 0)])
def test_mcnemar_equals_the_binomial_tail(only_a: int, only_b: int) -> None:
    a = np.repeat([True, False, True, False], [only_a, only_b, 20, 4])
    b = np.repeat([False, True, True, False], [only_a, only_b, 20, 4])
    test = statistics.mcnemar_exact(a, b)
    n = only_a + only_b
    assert test.p_value == pytest.approx(min(1, 2 * binom.cdf(min(only_a, only_b), n, 0.5)))
    assert (test.p_value < 0.05) == (only_a == 6)  # six one-sided disagreements are the fewest that can tell
    assert test.difference == pytest.approx((only_a - only_b) / len(a)) and test.n_images == len(a)
    gap = a.astype(float) - b
    assert test.standard_error == pytest.approx(gap.std() / math.sqrt(len(a)), abs=1e-12)


def test_mcnemar_refuses_anything_but_verdicts() -> None:
    for a, b in (([1, 0], [1, 1]), ([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="True/False"):
            statistics.mcnemar_exact(np.array(a), np.array(b))


def test_holm() -> None:
    # Worked example: 0.005 * 4, 0.01 * 3, then 0.03 * 2, and 0.04 * 1 raised to the one before.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.02, math.nan, 0.9]), [0.04, math.nan, 0.9])
    assert statistics.holm([]).shape == (0,)
    with pytest.raises(ValueError, match="0 to 1"):
        statistics.holm([0.2, 1.2])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_nothing_and_bonferroni(p: list[float]) -> None:
    adjusted = statistics.holm(p)
    assert (adjusted >= np.array(p)).all() and (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_required_n_reaches_its_power() -> None:
    """With the n it names, a z-test with that standard error finds the difference in 80 % of the draws."""
    test = statistics.PairedTest(0.9, 0.8, 0.1, 0.06, 0.096, 50)
    n = statistics.required_n(test)
    assert n == 142
    drawn = np.random.default_rng(0).normal(0.1, 0.06 * math.sqrt(50 / n), 4000)
    assert np.mean(np.abs(drawn) / (0.06 * math.sqrt(50 / n)) > 1.96) == pytest.approx(0.8, abs=0.03)
    assert statistics.required_n(test, power=0.9) > n and statistics.required_n(test, alpha=0.01) > n
    assert statistics.required_n(statistics.PairedTest(0.9, 0.9, 0.0, 0.06, 1, 50)) is None
    assert statistics.required_n(statistics.PairedTest(1, 0.5, 0.5, math.nan, 0.3, 3)) is None


@pytest.mark.parametrize(
    ("test", "adjusted", "sentence"),
    [
        (
            (0.9, 0.8, 0.1, 0.06, 0.096, 50),
            None,
            "These 50 images cannot tell A from B (AUROC 0.900 and 0.800, p = 0.096; about 142 images would).",
        ),
        (
            (0.95, 0.7, 0.25, 0.06, 0.00003, 50),
            None,
            "A is better than B on these 50 images (AUROC 0.950 and 0.700, p < 0.001).",
        ),
        (
            (0.7, 0.95, -0.25, 0.06, 0.00003, 50),
            0.0123,
            "B is better than A on these 50 images (AUROC 0.950 and 0.700, p = 0.012).",
        ),
        (
            (0.9, 0.7, 0.2, 0.06, 0.001, 50),
            0.2,
            "These 50 images cannot tell A from B (AUROC 0.900 and 0.700, p = 0.20; a test of this one pair, planned "
            "beforehand, might).",
        ),
        ((0.9, 0.9, 0.0, 0.0, 1.0, 9), None, "These 9 images cannot tell A from B (AUROC 0.900 and 0.900, p = 1.00)."),
        (
            (math.nan, math.nan, math.nan, math.nan, math.nan, 5),
            None,
            "A and B cannot be compared in AUROC: one class of images is missing.",
        ),
    ],
)
def test_the_verdict_says_what_the_numbers_allow(test: tuple, adjusted: float | None, sentence: str) -> None:
    assert statistics.verdict("A", "B", statistics.PairedTest(*test), p_value=adjusted) == sentence


def test_the_verdict_names_another_measure() -> None:
    test = statistics.mcnemar_exact(np.array([True] * 8), np.array([False] * 8))
    assert statistics.verdict("A", "B", test, measure="accuracy") == (
        "A is better than B on these 8 images (accuracy 1.000 and 0.000, p = 0.008)."
    )
