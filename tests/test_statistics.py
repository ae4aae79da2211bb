"""Intervals and tests against published numbers, plain versions from the definitions, and simulated truth."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from helpers.judge import metrics, statistics

pytestmark = pytest.mark.filterwarnings("error")

LABELS = np.repeat([True, False], [34, 16])


def binormal(generator: np.random.Generator, auroc: float) -> np.ndarray:
    """Normal scores of 34 anomalous and 16 normal pictures with a known true AUROC."""
    return generator.normal(size=50) + np.sqrt(2) * ndtri(auroc) * LABELS


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(50, 50, 92.9, 100), (41, 42, 87.7, 99.6), (41, 45, 79.3, 96.5), (41, 49, 71.0, 91.5), (64, 90, 61.0, 79.5),
     (30, 45, 52.1, 78.6), (34, 50, 54.2, 79.2), (34, 34, 89.8, 100), (16, 16, 80.6, 100)],
)  # fmt: skip
def test_wilson_of_the_source_reports_counts(successes: int, n: int, low: float, high: float) -> None:
    assert [round(100 * limit, 1) for limit in statistics.wilson(successes, n)] == [low, high]
    mirrored = statistics.wilson(n - successes, n)
    assert [round(100 * (1 - limit), 1) for limit in mirrored] == [high, low]
    assert (statistics.wilson(n, n).high, statistics.wilson(0, n).low) == (1, 0)
    assert all(map(math.isnan, statistics.wilson(0, 0)))
    with pytest.raises(ValueError, match="5 successes among 4"):
        statistics.wilson(5, 4)


@pytest.mark.parametrize("auroc", [0.8, 0.95, 0.98])
def test_auroc_intervals_cover_what_they_promise(auroc: float) -> None:
    """Nominal 95 % at 34 + 16; simulated elsewhere: 94.7 at 0.80, 94.9 at 0.95, 97.3 at 0.98, where Newcombe's interval
    joins for the draws that are perfect (plain DeLong: 91.7, 83.7, 76)."""
    generator = np.random.default_rng(1)
    intervals = [statistics.auroc_interval(binormal(generator, auroc), LABELS) for _ in range(500)]
    assert 0.93 <= np.mean([low <= auroc <= high for low, high in intervals]) <= 0.99
    assert 0.04 <= np.mean([high == 1 for _, high in intervals]) <= 0.13 or auroc < 0.98


def errors_away(auroc: float, limit: float, n_anomalous: int, n_normal: int) -> float:
    """Newcombe's equation, method 5: the distance from a limit in standard errors at that limit."""
    variance = limit * (1 - limit) / (n_anomalous * n_normal)
    spread = (n_anomalous + n_normal) / 2 - 1
    variance *= 1 + spread * ((1 - limit) / (2 - limit) + limit / (1 + limit))
    return abs(auroc - limit) / math.sqrt(variance)


def test_perfect_and_degenerate_scores_and_few_sources_have_wide_intervals_not_points() -> None:
    low, high = statistics.auroc_interval(LABELS.astype(float), LABELS)
    assert high == 1 and 0.85 < low < 0.95 and errors_away(1, low, 34, 16) == pytest.approx(1.959964, abs=1e-5)
    assert statistics.auroc_interval(-LABELS.astype(float), LABELS) == pytest.approx((0, 1 - low), abs=1e-9)
    low, high = statistics.auroc_interval(np.ones(50), LABELS)  # constant: AUROC 0.5, DeLong variance 0
    assert low < 0.4 and high > 0.6 and (low + high) == pytest.approx(1)
    low, high = statistics.auroc_interval([1.0, 2.0], [0, 1])  # one picture of each class
    assert low < 0.5 and high == 1
    assert all(map(math.isnan, statistics.auroc_interval([1.0, 2.0], [1, 1])))
    with pytest.raises(ValueError, match="not finite"):
        statistics.auroc_interval([1.0, math.nan], [0, 1])
    scores = binormal(np.random.default_rng(9), 0.9)  # photographs of few sources: as if a source were one picture
    few = statistics.auroc_interval(scores, LABELS, sources=(np.arange(50) % 5).tolist())
    away = [errors_away(metrics.image_auroc(scores, LABELS), limit, 5, 5) for limit in few]
    assert away == pytest.approx([1.959964] * 2, abs=1e-5)
    assert few.high - few.low > 1.5 * np.ptp(statistics.auroc_interval(scores, LABELS))
    assert all(map(math.isnan, statistics.auroc_interval(scores, LABELS, sources=["one"] * 50)))


def test_paired_delong_equals_its_definition() -> None:
    generator = np.random.default_rng(5)
    a = binormal(generator, 0.9)
    b = np.round(0.5 * a + binormal(generator, 0.75), 1)
    wins = [(s[LABELS][:, None] > s[~LABELS]) + 0.5 * (s[LABELS][:, None] == s[~LABELS]) for s in (a, b)]
    gap = wins[0] - wins[1]
    error = math.sqrt(gap.mean(axis=1).var(ddof=1) / 34 + gap.mean(axis=0).var(ddof=1) / 16)
    test = statistics.delong_paired(a, b, LABELS)
    assert test.difference == pytest.approx(gap.mean(), abs=1e-12)
    assert test.p_value == pytest.approx(2 * ndtr(-abs(gap.mean()) / error), rel=1e-6)
    swapped = statistics.delong_paired(b, a, LABELS)
    assert (swapped.difference, swapped.p_value) == pytest.approx((-test.difference, test.p_value))
    assert statistics.delong_paired(np.exp(a), b * 7 - 3, LABELS).p_value == pytest.approx(test.p_value)


def test_paired_delong_rejects_at_its_level_and_knows_its_edges() -> None:
    generator, p = np.random.default_rng(6), []
    for _ in range(400):
        shared = generator.normal(size=50)
        a, b = (binormal(generator, 0.85) + 0.7 * shared for _ in range(2))
        p.append(statistics.delong_paired(a, b, LABELS).p_value)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.08
    scores = binormal(np.random.default_rng(7), 0.8)
    same = statistics.delong_paired(scores, 3 * scores + 1, LABELS)
    assert (same.difference, same.p_value) == (0, 1)
    assert statistics.delong_paired(np.ones(50), np.zeros(50), LABELS).p_value == 1
    assert math.isnan(statistics.delong_paired([1, 2], [2, 1], [1, 1]).p_value)
    # Perfect against constant: DeLong's variance is 0. Plainly different with 50 pictures, not with 3.
    assert statistics.delong_paired(LABELS.astype(float), np.ones(50), LABELS).p_value < 0.01
    few = statistics.delong_paired([1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1, 0, 0])
    assert few.difference == 0.5 and few.p_value > 0.2
    opposite = statistics.delong_paired([1.0, 1, 0, 0], [0.0, 0, 1, 1], [1, 1, 0, 0])
    assert 0.05 < opposite.p_value < 1  # 2 of the 16 swaps are as extreme


def test_over_paintings_the_differences_average_and_their_variances_add() -> None:
    generator = np.random.default_rng(8)
    paintings = np.repeat(["a", "b"], 50)
    a, b = (np.concatenate([binormal(generator, 0.9), binormal(generator, 0.8) * 100]) for _ in range(2))
    labels = np.concatenate([LABELS, LABELS])
    whole = statistics.delong_paired(a, b, labels, paintings)
    parts = [statistics.delong_paired(a[rows], b[rows], LABELS) for rows in (slice(0, 50), slice(50, 100))]
    assert whole.difference == pytest.approx(np.mean([part.difference for part in parts])) and whole.n_images == 100
    errors = [abs(part.difference) / -ndtri(part.p_value / 2) for part in parts]
    expected = math.erfc(abs(whole.difference) / (np.hypot(*errors) / 2) / math.sqrt(2))
    assert whole.p_value == pytest.approx(expected, rel=1e-6)
    alone = statistics.delong_paired(a, b, np.concatenate([LABELS, np.ones(50, bool)]), paintings)
    assert alone.n_images == 50  # a painting with one class only is left out
    assert statistics.delong_paired(labels * 1.0, np.ones(100), labels, paintings).p_value < 0.001


@pytest.mark.parametrize(("only_a", "only_b"), [(5, 0), (6, 0), (9, 2), (3, 3), (0, 0)])
def test_mcnemar_equals_the_binomial_tail(only_a: int, only_b: int) -> None:
    a = np.repeat([True, False, True, False], [only_a, only_b, 20, 4])
    b = np.repeat([False, True, True, False], [only_a, only_b, 20, 4])
    test = statistics.accuracy_test(a, b)
    assert test.p_value == pytest.approx(min(1, 2 * binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))
    assert (test.p_value < 0.05) == (only_a == 6)  # six one-sided disagreements are the fewest that can tell
    assert test.difference == pytest.approx((only_a - only_b) / len(a)) and test.n_images == len(a)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_balanced_accuracy_test_counts_every_fall_of_the_coins(drawn: st.DataObject) -> None:
    n = drawn.draw(st.integers(3, 7))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    labels, a, b = (np.array(drawn.draw(flags)) for _ in range(3))
    labels[:2] = True, False

    def gap(x: np.ndarray, y: np.ndarray) -> float:
        return sum((x[rows].mean() - y[rows].mean()) / 2 for rows in (labels, ~labels))

    falls = [gap(np.where(swap, b, a), np.where(swap, a, b)) for swap in itertools.product([False, True], repeat=n)]
    test = statistics.accuracy_test(a, b, labels)
    assert test.difference == pytest.approx(gap(a, b))
    assert test.p_value == pytest.approx(np.mean(np.abs(falls) >= abs(test.difference) - 1e-12))


def test_holm() -> None:
    # Worked example: 0.005 * 4, 0.01 * 3, then 0.03 * 2, and 0.04 * 1 raised to the one before; nan is no test.
    found = statistics.holm([0.01, 0.04, math.nan, 0.03, 0.005])
    np.testing.assert_allclose(found, [0.03, 0.06, math.nan, 0.06, 0.02])
    assert statistics.holm([]).shape == (0,)


def test_mean_of_independent_estimates_covers_what_it_promises() -> None:
    """Balanced accuracy from the Wilson intervals of 34 and 16 pictures."""
    generator, hits = np.random.default_rng(3), []
    for found, passed in zip(generator.binomial(34, 0.85, 1000), generator.binomial(16, 0.9, 1000)):
        parts = [(k / n, *statistics.wilson(int(k), n)) for k, n in ((found, 34), (passed, 16))]
        _, low, high = statistics.mover(parts)
        hits.append(low <= (0.85 + 0.9) / 2 <= high)
    assert 0.93 <= np.mean(hits) <= 0.985
    assert statistics.mover([(0.8, 0.6, 0.9)]) == pytest.approx((0.8, 0.6, 0.9))
    assert all(map(math.isnan, statistics.mover([(0.8, 0.6, 0.9), (1.0, math.nan, math.nan)])[1:]))


def test_draws_keep_sources_whole_and_strata_apart() -> None:
    labels, groups = [True] * 6 + [False] * 4, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    counts = statistics.redraws(labels, groups, n_draws=200)
    assert (counts[:, ::2] == counts[:, 1::2]).all() and (counts[:, :6].sum(axis=1) == 6).all()
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    alone, together = (
        statistics.percentile_interval(statistics.redraws([0] * 200, names) @ values / 200)
        for names in (list(range(200)), np.repeat(np.arange(20), 10).tolist())
    )
    assert together.high - together.low > 2.5 * (alone.high - alone.low)  # sqrt(10) in theory
    error = values.std() / math.sqrt(200)
    assert alone == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)
    assert all(map(math.isnan, statistics.percentile_interval([1.0, 1.0, math.nan])))


@pytest.mark.parametrize(
    ("n", "alpha", "rank"),
    [(19, 0.05, 19), (20, 0.05, 20), (39, 0.05, 38), (50, 0.05, 49), (100, 0.05, 96), (9, 0.1, 9)],
)
def test_threshold_is_the_conformal_rank(n: int, alpha: float, rank: int) -> None:
    """Ranks by hand: ceil((n + 1)(1 - alpha)); too few normals warn with the rate that they can promise."""
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert statistics.conformal_threshold(scores, alpha) == rank
    with pytest.warns(UserWarning, match=f"promises {1 / (n + 1):.1%}"):
        assert statistics.conformal_threshold(scores, 0.5 / (n + 1)) == n


def test_false_alarm_rate_is_kept_on_average_and_a_quantile_breaks_it() -> None:
    draws = np.random.default_rng(1).normal(size=(4000, 21))
    conformal = [row[-1] > statistics.conformal_threshold(row[:20], 0.05) for row in draws]
    plain = [row[-1] > np.quantile(row[:20], 0.95) for row in draws]
    assert np.mean(conformal) == pytest.approx(1 / 21, abs=0.012) and np.mean(plain) > 0.075


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5]),
)
def test_p_value_and_threshold_agree(normals: list[float], scores: list[float], alpha: float) -> None:
    """With enough normals a score is above the threshold exactly when its p-value is at most alpha."""
    p = statistics.p_values(normals, scores)
    naive = [(1 + sum(n >= s for n in normals)) / (len(normals) + 1) for s in scores]
    np.testing.assert_allclose(p, naive, rtol=1e-12)
    if 1 / (len(normals) + 1) <= alpha:
        threshold = statistics.conformal_threshold(normals, alpha)
        np.testing.assert_array_equal(np.asarray(scores) > threshold, p <= alpha + 1e-12)
