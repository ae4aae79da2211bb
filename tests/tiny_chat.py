"""A small dataset with results of two detectors, the tiny AnomalyGPT and a session over both, for the chat's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_anomalygpt as tiny

from helpers import data, files, results
from helpers.anomalygpt import conversations
from helpers.anomalygpt.evaluation import Bench, EvaluationSettings
from helpers.anomalygpt.model import AnomalyGPT
from helpers.chat import detectors
from helpers.chat import session as chat
from helpers.data import images
from helpers.records import Sample, Scored

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
SETTINGS = EvaluationSettings(
    shots=(0, 2), n_draws=1, row_shots=2, wording="short", n_sentences=1, n_controls=0,
    max_new_tokens=4, alpha=0.25,
)  # fmt: skip
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&`*_[x](javascript:alert(3))"


def build_model() -> AnomalyGPT:
    """The tiny chain with a vocabulary that takes any text."""
    return tiny.talkative(tiny.build(FIXTURE)[0])


def write_dataset(folder: Path) -> data.Dataset:
    """Two artworks: 3 train and 4 calibration normals, 2 normal test pictures, a box and a replica."""
    random, samples = np.random.default_rng(1), []
    for category in ("one", "two"):
        base = random.integers(60, 200, (8, 10, 3), dtype=np.uint8).repeat(12, axis=0).repeat(12, axis=1)
        for split, kinds in (("train", "good " * 3), ("calibration", "good " * 4), ("test", "good good box replica")):
            for i, kind in enumerate(kinds.split()):
                picture = np.clip(base.astype(int) + random.integers(-9, 9, base.shape), 0, 255).astype(np.uint8)
                mask_path = None
                if kind == "box":
                    picture[10:45, 20:60] = (250, 10, 10)
                    mask, mask_path = np.zeros(picture.shape[:2], bool), folder / f"{category}_{i}_mask.png"
                    mask[10:45, 20:60] = True
                    images.save_png(mask_path, mask)
                elif kind == "replica":
                    picture = picture[:, ::-1]
                path = folder / f"{category}_{split}_{i}.png"
                images.save_png(path, picture)
                hashed, group = files.sha256_file(path), f"{category}{split}{i}"
                samples.append(Sample(path, category, kind != "good", mask_path, split, kind, group, hashed))
    data.write_manifest(folder / "manifest.csv", samples)
    return data.open_dataset(folder)


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
