"""How far a number measured on a few dozen pictures can be trusted: intervals, paired tests, and a plain verdict.

At 34 anomalous and 16 normal pictures the usual intervals fail where good detectors live: plain DeLong and the
percentile bootstrap cover 76 to 80 % instead of 95 % at an AUROC of 0.98. The ones used here cover 95 to 97 %.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from helpers.judge._old_metrics import checked_scores

if TYPE_CHECKING:
    from helpers.judge._old_metrics import Rates


class Interval(NamedTuple):
    """A confidence interval; nan at both ends where none is defined."""

    low: float
    high: float


_UNDEFINED = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class PairedTest:
    """Two methods compared on the same pictures.

    Args:
        value_a: AUROC or accuracy of the first method.
        value_b: the same of the second.
        difference: ``value_a - value_b``.
        standard_error: of the difference; nan when unknown.
        p_value: two-sided, for the hypothesis of no difference; nan when a class is missing.
        n_images: pictures compared.
    """

    value_a: float
    value_b: float
    difference: float
    standard_error: float
    p_value: float
    n_images: int


# ------------------------------------------------------------------------------------------------- intervals


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a rate: never empty at 0 or ``n`` successes.

    Args:
        successes: how often it happened, 0 to ``n``.
        n: how often it could have happened.
        level: confidence level in (0, 1).
    Returns:
        limits in [0, 1]; nan when ``n`` is 0.
    Raises:
        ValueError: ``successes`` is not within 0 to ``n``, or ``level`` outside (0, 1).
    Source: Wilson, JASA 1927.

    >>> [round(100 * limit, 1) for limit in wilson(41, 49)]
    [71.0, 91.5]
    """
    z = _z(level)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n}; allowed are 0 to {n}.")
    if n == 0:
        return _UNDEFINED
    rate = successes / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At the ends the limit is exactly 0 or 1; rounding would leave it a hair beside.
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def balanced_accuracy_interval(rates: Rates, level: float = 0.95) -> Interval:
    """Interval of the balanced accuracy from the Wilson intervals of sensitivity and specificity.

    The two rates come from different pictures, so the squared distances to their limits add (method of variance
    estimates recovery).

    Args:
        rates: counts, see :func:`helpers.judge._old_metrics.rates`.
        level: confidence level in (0, 1).
    Returns:
        limits in [0, 1]; nan when a class is missing.
    Source: Newcombe, Statistics in Medicine 1998; Zou and Donner, Statistics in Medicine 2008.
    """
    parts = (rates.sensitivity, rates.specificity)
    limits = [wilson(*part, level) for part in parts]
    below = math.hypot(*(part.value - limit.low for part, limit in zip(parts, limits))) / 2
    above = math.hypot(*(limit.high - part.value for part, limit in zip(parts, limits))) / 2
    return Interval(rates.balanced_accuracy - below, rates.balanced_accuracy + above)


def auroc_interval(scores: ArrayLike, labels: ArrayLike, level: float = 0.95) -> Interval:
    """Confidence interval of the AUROC that holds near 1 and for few pictures.

    DeLong's variance on the logit scale. Where that variance says nothing (AUROC 0 or 1, constant scores, fewer than
    two pictures of a class) Newcombe's score interval, method 5, so that a perfect AUROC never prints [1, 1].

    Args:
        scores: float ``(n,)``, higher = more anomalous.
        labels: bool or 0/1 ``(n,)``, True = anomalous.
        level: confidence level in (0, 1).
    Returns:
        limits in [0, 1]; nan when one class is missing, since the AUROC is then not defined.
    Raises:
        ValueError: as :func:`helpers.judge._old_metrics.image_auroc`; or ``level`` outside (0, 1).
    Source: DeLong et al., Biometrics 1988; Newcombe, Statistics in Medicine 2006, part 2, method 5.
    """
    z = _z(level)
    scores, labels = checked_scores(scores, labels)
    auroc, variance = delong_variance(scores, labels)
    if math.isnan(auroc):
        return _UNDEFINED
    if 0 < auroc < 1 and variance > 0:
        centre = math.log(auroc / (1 - auroc))
        half = z * math.sqrt(variance) / (auroc * (1 - auroc))
        return Interval(*(1 / (1 + math.exp(-limit)) for limit in (centre - half, centre + half)))
    return _newcombe(auroc, int(labels.sum()), int((~labels).sum()), z)


def delong_variance(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """AUROC and DeLong's estimate of its variance.

    Args and Raises: as :func:`auroc_interval`.

    Returns:
        AUROC (nan when a class is missing) and variance (nan when a class has fewer than two pictures).
    Source: DeLong et al., Biometrics 1988, by mid-ranks (Sun and Xu, 2014).
    """
    scores, labels = checked_scores(scores, labels)
    aurocs, covariance = _delong([scores], labels)
    return float(aurocs[0]), float(covariance[0, 0])


def stratified_bootstrap(
    statistic: Callable[[np.ndarray], float],
    strata: Sequence[Hashable],
    *,
    groups: Sequence[Hashable] | None = None,
    n_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of any statistic, by drawing pictures again within each stratum.

    For what has no formula: average precision, pixel AUROC and AUPRO by pictures. It is too narrow near the end of a
    statistic's range (at 50 pictures some 80 to 90 % coverage of a nominal 95 %), so use :func:`auroc_interval` for
    image AUROC and :func:`wilson` for rates.

    Args:
        statistic: int array of picture positions (with repeats) -> number.
        strata: ``(n,)``, for example the labels: each draw keeps their counts.
        groups: ``(n,)``, the source picture of each: copies of one picture are drawn together, because they are not
            independent. Groups are drawn among the groups with the same set of strata, so counts may then vary.
        n_draws: number of draws.
        level: confidence level in (0, 1).
        seed: of the draws.
    Returns:
        nan at both ends when the statistic of the pictures themselves is nan, or when all draws give one number
        (average precision 1): the draws then know nothing about the error.
    Raises:
        ValueError: lengths differ, no picture, or ``level`` outside (0, 1).
    Warns:
        UserWarning: some draws gave nan and were left out.
    Source: Efron and Tibshirani, 1993, chapters 8 and 13.
    """
    _z(level)
    groups = range(len(strata)) if groups is None else groups
    if len(strata) == 0 or len(strata) != len(groups):
        raise ValueError(f"{len(strata)} strata and {len(groups)} groups; pass one of each for every picture.")
    if math.isnan(statistic(np.arange(len(strata)))):
        return _UNDEFINED
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    pools: dict[frozenset, list[np.ndarray]] = {}
    for positions in members.values():
        pools.setdefault(frozenset(strata[i] for i in positions), []).append(np.array(positions))
    generator = np.random.default_rng(seed)
    values = np.array(
        [
            statistic(np.concatenate([pool[i] for pool in pools.values() for i in _redraw(generator, len(pool))]))
            for _ in range(n_draws)
        ]
    )
    n_undefined = int(np.isnan(values).sum())
    if n_undefined:
        warnings.warn(f"The statistic was nan in {n_undefined} of {n_draws} draws; they were left out.", stacklevel=2)
    values = values[~np.isnan(values)]
    if len(values) == 0 or values.min() == values.max():
        return _UNDEFINED
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


# ------------------------------------------------------------------------------------------------- two methods


def delong_paired(scores_a: ArrayLike, scores_b: ArrayLike, labels: ArrayLike) -> PairedTest:
    """Do two methods differ in AUROC on the same pictures?

    DeLong's test. Where the variance of the difference is 0 or unknown although the AUROCs differ (perfect against
    constant scores, one picture of a class) the normal distribution would claim certainty; a permutation test that
    swaps the two methods' ranks picture by picture (9,999 draws) is used there.

    Args:
        scores_a: float ``(n,)`` of the first method, higher = more anomalous; any scale.
        scores_b: float ``(n,)`` of the second, same pictures in the same order.
        labels: bool or 0/1 ``(n,)``, True = anomalous.
    Returns:
        the test; its values and ``p_value`` are nan when one class is missing; ``p_value`` is 1 for equal rankings.
    Raises:
        ValueError: as :func:`helpers.judge._old_metrics.image_auroc`.
    Source: DeLong et al., Biometrics 1988; Bandos et al., Statistics in Medicine 2005 (permutation).
    """
    scores_a, labels = checked_scores(scores_a, labels)
    scores_b, _ = checked_scores(scores_b, labels)
    (auroc_a, auroc_b), covariance = _delong([scores_a, scores_b], labels)
    difference = auroc_a - auroc_b
    # Equal rankings leave rounding dust of some 1e-17 in the variance: not a standard error to divide by.
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    error = math.sqrt(variance) if variance > 1e-14 else (math.nan if math.isnan(variance) else 0.0)
    if math.isnan(difference):
        p_value = math.nan
    elif error > 0:
        p_value = math.erfc(abs(difference) / error / math.sqrt(2))
    elif abs(difference) < 1e-12:
        p_value = 1.0
    else:
        p_value = _permutation(scores_a, scores_b, labels)
    return PairedTest(float(auroc_a), float(auroc_b), float(difference), error, p_value, len(labels))


def mcnemar_exact(correct_a: ArrayLike, correct_b: ArrayLike) -> PairedTest:
    """Do two methods differ in accuracy on the same pictures? Exact McNemar test.

    Only pictures on which exactly one of them is right count; fewer than six of those can never reach 5 %.

    Args:
        correct_a: bool ``(n,)``, True where the first method's verdict is right.
        correct_b: bool ``(n,)`` of the second, same pictures in the same order.
    Returns:
        the test, with accuracies as values; ``p_value`` is 1 when both are right and wrong on the same pictures.
    Raises:
        ValueError: lengths differ, no picture, or values other than bool.
    Source: McNemar, Psychometrika 1947; binomial tail with probability 1/2.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"correct_a is {a.dtype} {a.shape}, correct_b {b.dtype} {b.shape}; pass two lists of True/False "
            "(verdict == label), one value for each picture."
        )
    only_a, only_b, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    difference = (only_a - only_b) / n
    error = math.sqrt(max(only_a + only_b - (only_a - only_b) ** 2 / n, 0)) / n
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return PairedTest(float(a.mean()), float(b.mean()), difference, error, float(p_value), n)


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values adjusted for testing several pairs at once: compare them with 5 % as they are.

    Args:
        p_values: float ``(m,)`` in [0, 1] or nan.
    Returns:
        float64 ``(m,)``, same order, at least the given ones; a nan stays nan and is not counted as a test.
    Raises:
        ValueError: a value outside [0, 1].
    Source: Holm, Scandinavian Journal of Statistics 1979.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(given))
    if ((given[known] < 0) | (given[known] > 1)).any():
        raise ValueError(f"p-values lie between {np.nanmin(given)} and {np.nanmax(given)}; allowed are 0 to 1.")
    order = known[np.argsort(given[known], kind="stable")]
    adjusted = np.full(given.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def required_n(test: PairedTest, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """About how many pictures would show a difference as large as the one seen.

    ``n * ((z(1 - alpha/2) + z(power)) * standard error / difference)^2``, rounded up: the error shrinks with the
    root of the pictures, with the same share of anomalies. An order of magnitude, since the difference seen is
    itself uncertain, not a plan.

    Args:
        test: from :func:`delong_paired` or :func:`mcnemar_exact`.
        alpha: two-sided error rate in (0, 1).
        power: wanted chance of showing the difference, in (0, 1).
    Returns:
        number of pictures; None when there is no difference or no standard error to extrapolate.
    """
    from scipy.special import ndtri

    if not abs(test.difference) > 1e-12 or not test.standard_error > 0:
        return None
    z = ndtri(1 - alpha / 2) + ndtri(power)
    return math.ceil(test.n_images * (z * test.standard_error / test.difference) ** 2)


def verdict(
    name_a: str,
    name_b: str,
    test: PairedTest,
    *,
    p_value: float | None = None,
    alpha: float = 0.05,
    measure: str = "AUROC",
) -> str:
    """The comparison in one sentence, "cannot tell" included.

    Args:
        name_a: first method of the test, as the reader knows it.
        name_b: second method.
        test: from :func:`delong_paired` or :func:`mcnemar_exact`.
        p_value: the adjusted one from :func:`holm` when several pairs are compared; by default the test's own.
        alpha: error rate below which a difference is called real.
        measure: what the values are, for example ``"accuracy"``.

    >>> verdict("A", "B", PairedTest(0.90, 0.80, 0.10, 0.06, 0.096, 50))
    'These 50 images cannot tell A from B (AUROC 0.900 and 0.800, p = 0.096; about 142 images would).'
    """
    p_value = test.p_value if p_value is None else p_value
    if math.isnan(p_value):
        return f"{name_a} and {name_b} cannot be compared in {measure}: one class of images is missing."
    numbers = f"{measure} {test.value_a:.3f} and {test.value_b:.3f}, {_p_in_words(p_value)}"
    if p_value < alpha and test.difference != 0:
        better, worse = (name_a, name_b) if test.difference > 0 else (name_b, name_a)
        if test.difference < 0:
            numbers = f"{measure} {test.value_b:.3f} and {test.value_a:.3f}, {_p_in_words(p_value)}"
        return f"{better} is better than {worse} on these {test.n_images} images ({numbers})."
    needed = required_n(test, alpha=alpha)
    if needed is None:
        hint = ""
    elif needed > test.n_images:
        hint = f"; about {needed:,} images would"
    else:  # significant alone, but not among all the pairs that were tested
        hint = "; a test of this one pair, planned beforehand, might"
    return f"These {test.n_images} images cannot tell {name_a} from {name_b} ({numbers}{hint})."


# ------------------------------------------------------------------------------------------------- inside


def _delong(scores: Sequence[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of each score list ``(k,)`` and DeLong's covariance ``(k, k)`` between them; nan where undefined."""
    from scipy.stats import rankdata

    n_anomalous, n_normal = int(labels.sum()), int((~labels).sum())
    k = len(scores)
    if not n_anomalous or not n_normal:
        return np.full(k, np.nan), np.full((k, k), np.nan)
    of_anomalous, of_normal = np.empty((k, n_anomalous)), np.empty((k, n_normal))
    for row, values in enumerate(scores):
        ranks = rankdata(values)
        # Share of the other class that each picture beats, ties half.
        of_anomalous[row] = (ranks[labels] - rankdata(values[labels])) / n_normal
        of_normal[row] = 1 - (ranks[~labels] - rankdata(values[~labels])) / n_anomalous
    aurocs = of_anomalous.mean(axis=1)
    if min(n_anomalous, n_normal) < 2:
        return aurocs, np.full((k, k), np.nan)
    covariance = np.cov(of_anomalous).reshape(k, k) / n_anomalous + np.cov(of_normal).reshape(k, k) / n_normal
    return aurocs, covariance


def _newcombe(auroc: float, n_anomalous: int, n_normal: int, z: float) -> Interval:
    """Newcombe's method 5: the values of AUROC whose own standard error puts the estimate ``z`` errors away."""
    from scipy.optimize import brentq

    spread = (n_anomalous + n_normal) / 2 - 1

    def excess(value: float) -> float:
        variance = value * (1 - value) * (1 + spread * ((1 - value) / (2 - value) + value / (1 + value)))
        return (auroc - value) ** 2 - z**2 * variance / (n_anomalous * n_normal)

    # At 0 and 1 the variance is 0 and at the estimate the distance is: one sign change on either side.
    low = brentq(excess, 0.0, auroc) if 0 < auroc < 1 else (0.0 if auroc == 0 else brentq(excess, 0.0, 1 - 1e-12))
    high = brentq(excess, auroc, 1.0) if 0 < auroc < 1 else (1.0 if auroc == 1 else brentq(excess, 1e-12, 1.0))
    return Interval(float(low), float(high))


def _permutation(scores_a: np.ndarray, scores_b: np.ndarray, labels: np.ndarray, n_draws: int = 9999) -> float:
    """Share of swaps between two methods' ranks, picture by picture, with an AUROC difference at least as large."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(scores_a), rankdata(scores_b)])
    swap = np.random.default_rng(0).random((n_draws, len(labels))) < 0.5
    a, b = np.where(swap, ranks[1], ranks[0]), np.where(swap, ranks[0], ranks[1])
    observed = abs(_mean_auroc(ranks[:1], labels) - _mean_auroc(ranks[1:], labels))[0]
    drawn = abs(_mean_auroc(a, labels) - _mean_auroc(b, labels))
    return float((1 + (drawn >= observed - 1e-12).sum()) / (n_draws + 1))


def _mean_auroc(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC of each row ``(r, n)``, ties half."""
    from scipy.stats import rankdata

    n_anomalous, n_normal = labels.sum(), (~labels).sum()
    return (rankdata(values, axis=1)[:, labels].sum(axis=1) / n_anomalous - (n_anomalous + 1) / 2) / n_normal


def _redraw(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.integers(0, n, size=n)


def _z(level: float) -> float:
    from scipy.special import ndtri

    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a confidence level between 0 and 1 is allowed, for example 0.95.")
    return float(ndtri((1 + level) / 2))


def _p_in_words(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.{2 if p_value >= 0.0995 else 3}f}"


def smallest_alpha(n_normals: int) -> float:
    """Smallest false-alarm rate that ``n_normals`` calibration scores can promise: ``1 / (n + 1)``."""
    return 1.0 / (n_normals + 1)


def conformal_threshold(normal_scores: ArrayLike, alpha: float = 0.05) -> float:
    """Threshold above which a score is called anomalous.

    Args:
        normal_scores: float ``(n,)``, scores of normal pictures the detector has not learnt from, higher = more
            anomalous.
        alpha: wanted false-alarm rate, in (0, 1).
    Returns:
        the ``ceil((n + 1)(1 - alpha))``-th smallest score; the largest one, with a warning that names the rate
        that can be promised, when ``n`` is too small for ``alpha``.
    Raises:
        ValueError: no score, a score that is not finite, or ``alpha`` outside (0, 1).

    >>> conformal_threshold(range(1, 20), alpha=0.05)
    19.0
    >>> conformal_threshold(range(1, 100), alpha=0.05)
    95.0
    """
    scores = _checked_normals(normal_scores)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; a false-alarm rate between 0 and 1 is allowed, for example 0.05.")
    # The small term keeps 20 * 0.95 = 19.000000000000004 from becoming rank 20.
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    if rank > len(scores):
        warnings.warn(
            f"{len(scores)} calibration normals cannot promise a false-alarm rate of {alpha:.1%}; the largest score "
            f"is used, which promises {smallest_alpha(len(scores)):.1%}. Add normal pictures of this artwork.",
            stacklevel=2,
        )
        rank = len(scores)
    return float(np.sort(scores)[rank - 1])


def p_values(normal_scores: ArrayLike, scores: ArrayLike) -> np.ndarray:
    """Conformal p-value of each score: how often a normal picture scores at least as high.

    Args:
        normal_scores: float ``(n,)``, calibration scores.
        scores: float ``(m,)``.
    Returns:
        float64 ``(m,)``: ``(1 + #{normal >= score}) / (n + 1)``, in (0, 1].

    >>> p_values([1.0, 2.0, 3.0], [2.5, 9.0])
    array([0.5 , 0.25])
    """
    normals = np.sort(_checked_normals(normal_scores))
    n_at_least = len(normals) - np.searchsorted(normals, np.asarray(scores, dtype=np.float64), side="left")
    return (1.0 + n_at_least) / (len(normals) + 1.0)


def _checked_normals(normal_scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(list(normal_scores) if isinstance(normal_scores, range) else normal_scores, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"Calibration needs a list of normal scores, got shape {scores.shape}. Add normal pictures.")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} calibration scores are not finite.")
    return scores
