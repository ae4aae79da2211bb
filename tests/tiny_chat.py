"""A small dataset with results of two detectors, the tiny AnomalyGPT and a session over both, for the chat's tests."""

from pathlib import Path

import numpy as np

from helpers import data, results
from helpers.anomalygpt import conversations
from helpers.anomalygpt.evaluation import Bench, EvaluationSettings
from helpers.anomalygpt.model import AnomalyGPT
from helpers.chat import detectors
from helpers.chat import session as chat
from helpers.data import images
from helpers.records import Sample, Scored

SETTINGS = EvaluationSettings(
    shots=(0, 2), n_draws=1, row_shots=2, wording="short", n_sentences=1, n_controls=0,
    max_new_tokens=4, alpha=0.25,
)  # fmt: skip
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&`*_[x](javascript:alert(3))"


def redness(_category: str, pictures: list[np.ndarray]) -> list[Scored]:
    """A detector with a map: how red a pixel is; its score is the map's highest value."""
    maps = [(one[::8, ::8, 0].astype(np.float32) - one[::8, ::8, 1:].max(axis=-1)) / 255 for one in pictures]
    return [Scored(float(one.max()), one) for one in maps]


def write_results(model: AnomalyGPT, dataset: data.Dataset, home: Path) -> None:
    """Results of AnomalyGPT's map beside its references, and of :func:`redness` under AnomalyCLIP's name."""

    def look(category: str, pictures: list[np.ndarray]) -> list[Scored]:
        bank = Bench(model, dataset, SETTINGS).bank(category, SETTINGS.row_shots)
        seen = model.look(pictures, references=bank)
        return [Scored(float(score), one) for score, one in zip(seen.scores, seen.maps.numpy())]

    for method, scorer in (("anomalygpt", look), ("anomalyclip", redness)):

        def score(category: str, samples: list[Sample], scorer=scorer) -> list[Scored]:
            return scorer(category, [images.load_image(sample.image_path) for sample in samples])

        normals = {c: dataset.select(split="calibration", category=c) for c in dataset.categories}
        known = {c: [one.anomaly_score for one in score(c, held)] for c, held in normals.items()}
        options = {"alpha": SETTINGS.alpha, "settings": {}, "answers_say": conversations.answers_say}
        place = {"method": method, "dataset": dataset, "profile": "mini"}
        results.predict(home / "results" / method, score=score, calibration=known, **place, **options)


def session(model: AnomalyGPT, dataset: data.Dataset, home: Path) -> chat.ChatSession:
    """A session whose detectors are AnomalyGPT and :func:`redness`; the others are missing."""
    found = detectors.load(dataset, home / "results", {"anomalyclip": lambda: redness})
    return chat.ChatSession(model, found, settings=SETTINGS, profile="mini")
