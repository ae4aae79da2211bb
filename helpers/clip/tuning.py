"""Search of a detector's settings and its calibration, on training and calibration pictures alone.

Settings are ranked by the AUROC of held-out genuine pictures against anomalies made from held-out ones, a number that
flatters. So the search is repeated with one fold left out, and what it chose is measured there: the nested estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import ParameterGrid, ParameterSampler
from threadpoolctl import threadpool_limits

from helpers.clip.one_class import CONFIRMED, Detector, Rows, folds
from helpers.judge.metrics import image_auroc
from helpers.records import NORMAL_KIND

MIN_SOURCES = 6  # source pictures of a search: three folds of two, so that a search in a search can learn
QUICK = {"n_trees": 25, "max_bank_rows": 500}  # parameters of fits during a search, where only ranks count


def tune(
    detector: Detector, space: Mapping[str, list], rows: Rows, *, n_trials: int, strategy: str = "random", seed: int = 0
) -> dict[str, Any]:
    """Choose a detector's settings on held-out training pictures; calibration pictures take no part.

    Each fold keeps some kinds of anomaly to itself: settings are ranked, and the nested estimate is taken, on sources
    *and* kinds that the fit (for the estimate: the choice, too) has not seen.

    Args:
        detector, space: its parameters are the default settings, tried first; parameter -> values to try.
        n_trials, strategy: settings that ``"random"`` draws from the grid; ``"grid"`` tries all; 1 searches nothing.
    Returns:
        JSON values: ``parameters``, the best ones; ``auroc`` with them (flatters), ``default_auroc`` (nobody chose it)
        and ``nested_auroc``; ``trials``, every setting with its ``auroc``; ``note``, why nothing was searched.
    """
    default, rows = {name: getattr(detector, name) for name in space}, rows.take(rows.has("split", "train"))
    nothing = {"parameters": default, "auroc": None, "default_auroc": None, "nested_auroc": None, "trials": []}
    if n_trials == 1 or rows.n_sources < MIN_SOURCES:
        why = "one trial" if n_trials == 1 else f"{rows.n_sources} source pictures, a search needs {MIN_SOURCES}"
        return nothing | {"note": f"{rows.category}: {why}; the default settings are used"}
    n_all = len(ParameterGrid(space))
    n_trials = n_all if strategy == "grid" else min(n_trials, n_all)
    drawn = ParameterSampler(space, n_trials, random_state=seed)
    tried = [default, *(chosen for chosen in drawn if chosen != default)][:n_trials]

    def ranked(part: Rows, n_folds: int) -> list[float]:
        splits = _splits(part, n_folds, seed)
        return [round(float(np.mean([_auroc(detector, one, *split) for split in splits])), 9) for one in tried]

    note, nested = "", []
    with threadpool_limits(1):  # the small steps of a search wait for each other in several threads
        try:
            aurocs = ranked(rows, 3)
        except ValueError as error:
            return nothing | {"note": f"{error} The default settings are used."}
        try:
            for learn, held in _splits(rows, 3, seed):
                nested.append(_auroc(detector, tried[int(np.argmax(ranked(learn, 2)))], learn, held))
        except ValueError as error:
            note, nested = f"No nested estimate: {error}", []
    found = {"parameters": tried[int(np.argmax(aurocs))], "auroc": max(aurocs), "default_auroc": aurocs[0]}
    found["nested_auroc"] = float(np.mean(nested)) if nested else None
    trials = [{**one, "auroc": auroc} for one, auroc in zip(tried, aurocs, strict=True)]
    return found | {"trials": trials, "note": note}


def _splits(rows: Rows, n_folds: int, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows to learn from and held-out rows of each fold: of other sources, and other kinds of anomaly."""
    kinds = np.random.default_rng(seed).permutation(sorted(set(rows.table["kind"][rows.is_anomaly])))
    found = []
    for fold, (learn, held) in enumerate(folds(rows, n_folds, seed)):
        own = rows.has("kind", *kinds[fold % len(kinds) :: n_folds])
        found.append((rows.take(learn[~own[learn]]), rows.take(held[own[held] | ~rows.is_anomaly[held]])))
    return found


def _auroc(detector: Detector, parameters: Mapping[str, Any], learn: Rows, held: Rows) -> float:
    """AUROC of held-out genuine pictures (and other photographs of them) against anomalies."""
    if not 0 < held.is_anomaly.sum() < len(held):
        raise ValueError(f"{held.category}: a fold of the search holds no anomaly. Make more of them.")
    quick = {name: value for name, value in QUICK.items() if hasattr(detector, name)}
    fitted = clone(detector).set_params(**parameters, **quick).fit(learn)
    return image_auroc(fitted.score(held.features), held.is_anomaly)


def calibrate(detector: Detector, rows: Rows, *, n_folds: int = 5, seed: int = 0) -> tuple[Detector, np.ndarray]:
    """Fit the final detector, and score genuine pictures for its threshold, each by one that has not seen its source.

    In folds by source each picture is scored by a detector fitted on the other folds; the final one is fitted on all,
    scores fresh normals a little lower, which in simulations errs on the safe side of false alarms; nothing is promised
    exactly (cross-conformal; Vovk, Annals of Mathematics and AI 2015). With a single source the folds go by photograph,
    and the scores are optimistic: float64 ``(len(rows),)``, of normals and confirmed anomalies, else nan."""
    asked, scores = rows.has("kind", NORMAL_KIND, CONFIRMED), np.full(len(rows), np.nan)
    for learn, held in folds(rows, n_folds, seed):
        held = held[asked[held]]
        if len(held):
            scores[held] = clone(detector).fit(rows.take(learn)).score(rows.features.take(held))
    return clone(detector).fit(rows), scores
