"""Conformal thresholds keep their promise where a plain quantile does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.judge import statistics as calibration


@pytest.mark.parametrize(
    ("n", "alpha", "rank"),
    [(19, 0.05, 19), (20, 0.05, 20), (39, 0.05, 38), (50, 0.05, 49), (100, 0.05, 96), (9, 0.1, 9)],
)
def test_threshold_is_the_conformal_rank(n: int, alpha: float, rank: int) -> None:
    """Ranks by hand: ceil((n + 1)(1 - alpha))."""
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert calibration.conformal_threshold(scores, alpha) == rank


@pytest.mark.parametrize("n", [1, 8, 18])
def test_too_few_normals_warn_with_the_rate_they_can_promise(n: int) -> None:
    with pytest.warns(UserWarning, match=f"promises {1 / (n + 1):.1%}"):
        assert calibration.conformal_threshold(np.arange(n), 0.05) == n - 1


def test_false_alarm_rate_is_kept_on_average_and_a_quantile_breaks_it() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(4000, 21))
    conformal = [row[-1] > calibration.conformal_threshold(row[:20], 0.05) for row in draws]
    plain = [row[-1] > np.quantile(row[:20], 0.95) for row in draws]
    assert np.mean(conformal) == pytest.approx(1 / 21, abs=0.012)
    assert np.mean(plain) > 0.075


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5]),
)
def test_p_value_and_threshold_agree(normals: list[float], scores: list[float], alpha: float) -> None:
    """With enough normals a score is above the threshold exactly when its p-value is at most alpha."""
    p = calibration.p_values(normals, scores)
    naive = [(1 + sum(n >= s for n in normals)) / (len(normals) + 1) for s in scores]
    np.testing.assert_allclose(p, naive, rtol=1e-12)
    if calibration.smallest_alpha(len(normals)) <= alpha:
        threshold = calibration.conformal_threshold(normals, alpha)
        np.testing.assert_array_equal(np.asarray(scores) > threshold, p <= alpha + 1e-12)


@pytest.mark.parametrize(
    ("scores", "alpha", "message"),
    [([], 0.05, "got shape"), ([1.0, math.nan], 0.05, "1 of 2 calibration"), ([1.0], 1.0, "between 0 and 1")],
)
def test_impossible_calibration_is_refused(scores: list[float], alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration.conformal_threshold(scores, alpha)
