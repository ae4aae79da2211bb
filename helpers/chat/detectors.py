"""What every detector says about one picture, with the thresholds that the notebooks wrote into their results.

A detector whose notebook has not run on these pictures is named with the reason; the others still speak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import results
from helpers.data import Dataset
from helpers.judge import figures, statistics
from helpers.records import Scored
from helpers.results import MethodResult

Scorer = Callable[[str, Sequence[np.ndarray]], Sequence[Scored]]
"""``score(category, pictures uint8 RGB) -> one Scored each``: what each method's room gives."""

CHAT = "anomalygpt"  # the method that talks; its look at the picture is made once, by the session
NOTEBOOKS = {method: "03_clip" for method in results.METHODS if method.startswith("clip_")} | {
    "anomalyclip": "04_anomalyclip",
    **dict.fromkeys(("aligned", "dinov2_memory", "dinov2_subspace"), "05_reference"),
    CHAT: "07_anomalygpt_test",
}
"""Method -> the notebook that saves it, in the order of the comparison."""
LEARNT = "It has learnt from this very picture: a score would say nothing."


@dataclass(frozen=True)
class Verdict:
    """What one detector says about one picture; nan and a ``note`` with the reason where it says nothing. ``p_value``
    is the conformal one among genuine calibration pictures, ``limit`` the map value that genuine ones stay below."""

    method: str
    anomaly_score: float = math.nan
    threshold: float = math.nan
    p_value: float = math.nan
    anomaly_map: np.ndarray | None = None
    limit: float = math.inf
    note: str = ""

    @property
    def is_anomalous(self) -> bool | None:
        """True above the threshold; None without a score."""
        return None if math.isnan(self.anomaly_score) else self.anomaly_score > self.threshold


@dataclass(frozen=True)
class Detectors:
    """The detectors that were found on ``dataset``: results and scorers by method, the map value that their maps of
    genuine test pictures stay below, and why others are missing."""

    dataset: Dataset
    results: Mapping[str, MethodResult]
    scorers: Mapping[str, Scorer]
    limits: Mapping[str, float]
    missing: Mapping[str, str]

    def verdict(self, method: str, category: str, scored: Scored) -> Verdict:
        """A score as a verdict, by the calibration scores of the method's results."""
        manifest = self.results[method].manifest
        normals = manifest["calibration"][category]["scores"]
        threshold = statistics.conformal_threshold(normals, manifest["settings"]["alpha"])
        p_value = float(statistics.p_values(normals, [scored.anomaly_score])[0])
        shown = (scored.anomaly_map, self.limits.get(method, math.inf), scored.answer)
        return Verdict(method, scored.anomaly_score, threshold, p_value, *shown)

    def scores(self, image: np.ndarray, category: str) -> dict[str, float]:
        """Anomaly score of a picture, uint8 RGB ``(H, W, 3)``, by each detector but the chat's own."""
        return {method: ask(category, [image])[0].anomaly_score for method, ask in self.scorers.items()}

    def judge(self, image: np.ndarray, category: str, *, sha256: str, own: Scored) -> list[Verdict]:
        """Every detector's verdict on a picture uint8 RGB ``(H, W, 3)`` that should show ``category``, in the order of
        the comparison; missing ones with their reason. ``sha256``: of its file; a picture that the detectors learnt
        from is not judged by them. ``own``: what AnomalyGPT's map says."""
        learnt = sha256 in {sample.sha256 for sample in self.dataset.samples if sample.split != "test"}
        found = []
        for method in NOTEBOOKS:
            reason = self.missing.get(method) or (LEARNT if learnt and method != CHAT else "")
            if reason:
                found.append(Verdict(method, note=reason))
                continue
            try:
                scored = own if method == CHAT else self.scorers[method](category, [image])[0]
                found.append(self.verdict(method, category, scored))
            except (ValueError, KeyError) as error:
                found.append(Verdict(method, note=f"It cannot judge this picture: {error}"))
        return found


def load(dataset: Dataset, results_dir: Path, openers: Mapping[str, Callable[[], Scorer]]) -> Detectors:
    """Open the detectors of the method rooms (all but the chat's own) and join them with their results on ``dataset``
    in ``results_dir``. ``openers``: method -> function that loads its scorer; what fails is missing, and why."""
    found, scorers, limits, missing = {}, {}, {}, {}
    for method, notebook in NOTEBOOKS.items():
        try:
            found[method] = results.read(results_dir / method, dataset.samples, dataset.folder, dataset.hash)
            if method != CHAT:
                scorers[method] = openers[method]()
        except (OSError, ImportError, KeyError, ValueError) as error:  # a file, a package or the hub is away
            missing[method] = f"It cannot be opened for these pictures: run notebook {notebook}. ({error})"
            continue
        maps = (found[method].anomaly_map(one) for one in found[method].predictions if not one.sample.is_anomalous)
        limits[method] = figures.map_scale(one for one in maps if one is not None).limit
    return Detectors(dataset, found, scorers, limits, missing)


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per detector, for readers."""
    rows = {}
    for one in verdicts:
        words = {True: "anomalous", False: "genuine", None: "–"}[one.is_anomalous]
        numbers = (f"{one.anomaly_score:.3f} / {one.threshold:.3f}", f"{one.p_value:.2f}")
        numbers = ("–", "–") if one.is_anomalous is None else numbers
        rows[results.method_label(one.method)] = [words, *numbers, one.note]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["verdict", "score / limit", "p-value", "note"])
