"""Thresholds from normal pictures alone: conformal ranks and p-values.

No test picture and no anomaly is needed. With ``n`` exchangeable normal scores the conformal rank keeps the expected
false-alarm rate at or below ``alpha``; a plain quantile does not (with 20 normals it nearly doubles the rate).
Source: Vovk et al., Algorithmic Learning in a Random World, 2005; Bates et al., Annals of Statistics 2023.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike


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
    scores = _checked(normal_scores)
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
    normals = np.sort(_checked(normal_scores))
    n_at_least = len(normals) - np.searchsorted(normals, np.asarray(scores, dtype=np.float64), side="left")
    return (1.0 + n_at_least) / (len(normals) + 1.0)


def _checked(normal_scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(list(normal_scores) if isinstance(normal_scores, range) else normal_scores, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"Calibration needs a list of normal scores, got shape {scores.shape}. Add normal pictures.")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} calibration scores are not finite.")
    return scores
