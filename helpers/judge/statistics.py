"""How far a number measured on a few dozen pictures can be trusted: thresholds, 95 % intervals and paired tests.

At 34 anomalous and 16 genuine pictures the usual intervals fail where good detectors live: plain DeLong and the
percentile bootstrap cover 76 to 80 % instead of 95 % at an AUROC of 0.98. The ones used here cover 95 to 97 %.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import binom, permutation_test, rankdata

from helpers.judge.metrics import checked_scores


class Interval(NamedTuple):
    """A 95 % confidence interval; nan at both ends where none is defined."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Two methods or evaluations compared on the same ``n_images`` pictures; ``p_value`` is two-sided, nan unknown."""

    value_a: float
    value_b: float
    difference: float
    p_value: float
    n_images: int


_UNDEFINED = Interval(math.nan, math.nan)
_Z = 1.959963984540054  # of a two-sided interval of 95 %


def conformal_threshold(normal_scores: ArrayLike, alpha: float = 0.05) -> float:
    """Threshold above which a score is called anomalous: the ``ceil((n + 1)(1 - alpha))``-th smallest of the ``(n,)``
    scores of genuine pictures; when they are too few for ``alpha`` the largest, with a warning that names the rate.

    On average at most ``alpha`` of new genuine pictures lie above it, if all are exchangeable and one detector that
    learnt from none of them scored them. Photographs of few sources are not (a nominal 5 % was measured as 6 to 7 %
    with 10 sources of 4 each, 7 to 10 % with 5 of 8); scores by detectors of several folds promise nothing exactly (3
    to 5 % measured). ``ValueError``: no score, one that is not finite, or ``alpha`` outside (0, 1).

    >>> conformal_threshold(range(1, 20), alpha=0.05), conformal_threshold(range(1, 100), alpha=0.05)
    (19.0, 95.0)
    """
    scores = _checked_normals(normal_scores)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; a false-alarm rate between 0 and 1 is allowed, for example 0.05.")
    # The small term keeps 20 * 0.95 = 19.000000000000004 from becoming rank 20.
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    if rank > len(scores):
        words = f"{len(scores)} calibration normals cannot promise a false-alarm rate of {alpha:.1%}; the largest score"
        reached = f"is used, which promises {1 / (len(scores) + 1):.1%}. Add normal pictures of this artwork."
        warnings.warn(f"{words} {reached}", stacklevel=2)
    return float(scores[min(rank, len(scores)) - 1])


def p_values(normal_scores: ArrayLike, scores: ArrayLike) -> np.ndarray:
    """Conformal p-value of each score, ``(1 + #{normal >= score}) / (n + 1)``: float64 ``(m,)`` in (0, 1].

    >>> p_values([1.0, 2.0, 3.0], [2.5, 9.0])
    array([0.5 , 0.25])
    """
    normals = _checked_normals(normal_scores)
    n_at_least = len(normals) - np.searchsorted(normals, np.asarray(scores, dtype=np.float64), side="left")
    return (1.0 + n_at_least) / (len(normals) + 1.0)


def _checked_normals(normal_scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(list(normal_scores), dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0 or not np.isfinite(scores).all():
        got = f"got shape {scores.shape}, {(~np.isfinite(scores)).sum()} of them not finite"
        raise ValueError(f"Calibration needs a list of normal scores; {got}. Add normal pictures.")
    return np.sort(scores)


def wilson(successes: float, n: float) -> Interval:
    """Wilson score interval of a rate (JASA 1927), in [0, 1]: never empty at 0 or ``n`` successes; nan when ``n`` is 0.

    ``successes`` (0 to ``n``, else ``ValueError``) need not be whole: a rate times the number of sources.

    >>> [round(100 * limit, 1) for limit in wilson(41, 49)]
    [71.0, 91.5]
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n}; allowed are 0 to {n}.")
    if n == 0:
        return _UNDEFINED
    rate, square = successes / n, _Z**2
    centre = (rate + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(rate * (1 - rate) / n + square / (4 * n**2))
    # At the ends the limit is exactly 0 or 1; rounding would leave it a hair beside.
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def mover(estimates: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of independent estimates, (value, low, high) each, with the interval that follows from theirs.

    For balanced accuracy and for means over paintings; nan at both ends when one of the intervals is unknown. Source:
    method of variance estimates recovery; Zou and Donner, Statistics in Medicine 2008.

    >>> mover([(0.5, 0.2, 0.6), (0.9, 0.5, 0.9)])
    (0.7, 0.45, 0.75)
    """
    values, lows, highs = np.array(estimates, dtype=float).T
    mean = float(values.mean())
    below, above = (math.sqrt(float((gap**2).sum())) / len(values) for gap in (values - lows, highs - values))
    return mean, round(mean - below, 12), round(mean + above, 12)


def auroc_interval(scores: ArrayLike, labels: ArrayLike, *, sources: Sequence[Hashable] | None = None) -> Interval:
    """Confidence interval of the AUROC that holds near 1 and for few pictures; nan when one class is missing.

    DeLong's variance on the logit scale. Where that variance says nothing (AUROC 0 or 1, constant scores, fewer than
    two pictures of a class) Newcombe's score interval, method 5, so that a perfect AUROC never prints [1, 1].

    Args:
        scores, labels: as :func:`helpers.judge.metrics.image_auroc`, errors too.
        sources: ``(n,)``, the source of each picture, where all are photographs of a handful: then Newcombe's interval
            with the number of *sources* of each class, as if a source were one picture; nan for a single source.
    Source: DeLong et al., Biometrics 1988; Newcombe, Statistics in Medicine 2006, part 2, method 5. With 50 pictures
        of 17 sources Obuchowski's clustered error was 1.03 times DeLong's: ordinary sets need no ``sources``.
    """
    scores, labels = checked_scores(scores, labels)
    aurocs, covariance = _delong([scores], labels)
    auroc, variance = float(aurocs[0]), float(covariance[0, 0])
    if math.isnan(auroc) or (sources is not None and len(set(sources)) < 2):
        return _UNDEFINED
    if sources is None and 0 < auroc < 1 and variance > 0:
        centre, half = math.log(auroc / (1 - auroc)), _Z * math.sqrt(variance) / (auroc * (1 - auroc))
        return Interval(*(1 / (1 + math.exp(-limit)) for limit in (centre - half, centre + half)))
    counted = range(len(labels)) if sources is None else sources
    sizes = [len({one for one, label in zip(counted, labels) if label == wanted}) for wanted in (True, False)]
    return _newcombe(auroc, *sizes)


def redraws(strata: Sequence[Hashable], groups: Sequence[Hashable], *, n_draws: int = 1000) -> np.ndarray:
    """Bootstrap draws of pictures by source, for what has no formula: average precision, pixel AUROC, AUPRO.

    Groups (sources, ``(n,)``) are drawn among the groups with the same set of ``strata`` (labels, ``(n,)``), copies of
    one picture together: int64 ``(n_draws, n)``, how often each draw has each picture, the same each time. Percentile
    intervals are too narrow near the end of a range (80 to 90 % coverage at 50 pictures): not for AUROC and rates.
    """
    source = pd.factorize(np.asarray(groups, dtype=object))[0]
    kind = pd.factorize(pd.Series(strata).groupby(source).agg(frozenset))[0]
    pools = [np.flatnonzero(kind == one) for one in np.unique(kind)]
    generator = np.random.default_rng(0)
    counts = np.zeros((n_draws, len(kind)), dtype=np.int64)
    for row in counts:
        for pool in pools:
            np.add.at(row, pool[generator.integers(0, len(pool), size=len(pool))], 1)
    return counts[:, source]


def percentile_interval(values: ArrayLike) -> Interval:
    """2.5th to 97.5th percentile of bootstrap values; nan when they are all the same (they know nothing then)."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) == 0 or known.min() == known.max():
        return _UNDEFINED
    return Interval(*map(float, np.quantile(known, [0.025, 0.975])))


def delong_paired(
    scores_a: ArrayLike, scores_b: ArrayLike, labels: ArrayLike, strata: Sequence[Hashable] | None = None
) -> PairedTest:
    """Do two methods differ in AUROC on the same pictures? DeLong's test.

    With ``strata`` (``(n,)``, the painting of each picture, whose scores share no scale) it compares the means over the
    strata of each one's AUROC; their variances add; strata with one class only are left out. Where the variance of a
    difference is 0 or unknown although the AUROCs differ (perfect against constant scores, one picture of a class) the
    normal distribution would claim certainty; a permutation test that swaps the two methods' ranks picture by picture
    (9,999 draws) is used there.

    Scores, float ``(n,)``, are of the same pictures in the same order, on any scales; labels and errors as
    :func:`helpers.judge.metrics.image_auroc`. All nan when one class is missing; ``p_value`` is 1 for equal rankings.
    Source: DeLong et al., Biometrics 1988; Bandos et al., Statistics in Medicine 2005 (permutation).
    """
    scores_a, labels = checked_scores(scores_a, labels)
    scores_b, _ = checked_scores(scores_b, labels)
    strata = np.zeros(len(labels), int) if strata is None else np.asarray(strata)
    chosen = [strata == stratum for stratum in np.unique(strata)]
    chosen = [rows for rows in chosen if labels[rows].any() and not labels[rows].all()]
    if not chosen:
        return PairedTest(math.nan, math.nan, math.nan, math.nan, len(labels))
    parts = [_delong([scores_a[rows], scores_b[rows]], labels[rows]) for rows in chosen]
    value_a, value_b = map(float, np.mean([aurocs for aurocs, _ in parts], axis=0))
    difference = value_a - value_b
    variances = [cov[0, 0] + cov[1, 1] - 2 * cov[0, 1] for _, cov in parts]
    # Equal rankings leave rounding dust of some 1e-17 in the variance: not a standard error to divide by.
    known = [variance > 1e-14 or abs(a - b) < 1e-12 for variance, ((a, b), _) in zip(variances, parts)]
    if abs(difference) < 1e-12:
        p_value = 1.0
    elif all(known):
        p_value = math.erfc(abs(difference) * len(parts) / math.sqrt(2 * np.nansum(variances)))
    else:
        p_value = _permutation(scores_a, scores_b, labels, chosen)
    return PairedTest(value_a, value_b, difference, p_value, int(np.sum(chosen)))


def accuracy_test(correct_a: ArrayLike, correct_b: ArrayLike, labels: ArrayLike | None = None) -> PairedTest:
    """Do two rounds of verdicts (True where right) on the same pictures differ in accuracy? Exact McNemar test.

    Only pictures on which exactly one of the two is right count, each as likely for the one as for the other when there
    is no difference: the p-value is the probability, over all ways these coins could fall, of a difference at least as
    large. Fewer than six such pictures never reach 5 %. Verdicts of several paintings may be pooled, each made at its
    own threshold. With ``labels`` it compares balanced accuracies; all is nan when one class is missing.
    Source: McNemar, Psychometrika 1947.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    labels = None if labels is None else np.asarray(labels, dtype=bool)
    classes = [np.ones(len(a), bool)] if labels is None else [labels, ~labels]
    if not all(chosen.any() for chosen in classes):
        return PairedTest(math.nan, math.nan, math.nan, math.nan, len(a))
    values = [float(np.mean([c[chosen].mean() for chosen in classes])) for c in (a, b)]
    differences, chances = np.zeros(1), np.ones(1)  # of every way to fall, class by class
    for chosen in classes:
        n_apart = int((a[chosen] != b[chosen]).sum())
        counts = np.arange(n_apart + 1)
        gaps = (2 * counts - n_apart) / (len(classes) * chosen.sum())
        differences = np.add.outer(differences, gaps).ravel()
        chances = np.multiply.outer(chances, binom.pmf(counts, n_apart, 0.5)).ravel()
    far = np.abs(differences) >= abs(values[0] - values[1]) - 1e-12
    return PairedTest(*values, values[0] - values[1], min(1.0, float(chances[far].sum())), len(a))


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values adjusted for asking one question of several pairs (Holm, Scandinavian Journal of Statistics 1979).

    Float64 ``(m,)`` in the same order, to compare with 5 % as they are; a nan stays nan and is not counted as a test.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    adjusted = np.full(given.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def _delong(scores: Sequence[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC ``(k,)`` and DeLong's covariance ``(k, k)``, nan where undefined; by mid-ranks (Sun and Xu, 2014)."""
    scores, n_anomalous, n_normal, k = np.array(scores), int(labels.sum()), int((~labels).sum()), len(scores)
    if not n_anomalous or not n_normal:
        return np.full(k, np.nan), np.full((k, k), np.nan)
    ranks = rankdata(scores, axis=1)
    # Share of the other class that each picture beats, ties half.
    of_anomalous = (ranks[:, labels] - rankdata(scores[:, labels], axis=1)) / n_normal
    of_normal = 1 - (ranks[:, ~labels] - rankdata(scores[:, ~labels], axis=1)) / n_anomalous
    aurocs = of_anomalous.mean(axis=1)
    if min(n_anomalous, n_normal) < 2:
        return aurocs, np.full((k, k), np.nan)
    covariance = np.cov(of_anomalous).reshape(k, k) / n_anomalous + np.cov(of_normal).reshape(k, k) / n_normal
    return aurocs, covariance


def _newcombe(auroc: float, n_anomalous: int, n_normal: int) -> Interval:
    """Newcombe's method 5: the values of AUROC whose own standard error puts the estimate 1.96 errors away."""
    spread = (n_anomalous + n_normal) / 2 - 1

    def excess(value: float) -> float:
        variance = value * (1 - value) * (1 + spread * ((1 - value) / (2 - value) + value / (1 + value)))
        return (auroc - value) ** 2 - _Z**2 * variance / (n_anomalous * n_normal)

    # At 0 and 1 the variance is 0 and at the estimate the distance is: one sign change on either side.
    low = 0.0 if auroc == 0 else brentq(excess, 0.0, auroc if auroc < 1 else 1 - 1e-12)
    high = 1.0 if auroc == 1 else brentq(excess, auroc if auroc > 0 else 1e-12, 1.0)
    return Interval(float(low), float(high))


def _permutation(a: np.ndarray, b: np.ndarray, labels: np.ndarray, strata: Sequence[np.ndarray]) -> float:
    """Share of swaps between two methods' ranks, picture by picture, with an AUROC difference at least as large."""
    ranks = np.zeros((2, len(labels)))
    for rows in strata:
        ranks[:, rows] = rankdata([a[rows], b[rows]], axis=1)

    def difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        total = 0.0
        for rows in strata:
            gaps = rankdata(x[..., rows], axis=-1) - rankdata(y[..., rows], axis=-1)
            total = total + gaps[..., labels[rows]].sum(axis=-1) / (labels[rows].sum() * (~labels[rows]).sum())
        return total

    draws = {"permutation_type": "samples", "n_resamples": 9999, "vectorized": True, "rng": 0}
    return float(permutation_test(list(ranks), difference, **draws).pvalue)
