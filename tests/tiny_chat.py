"""A small dataset, the tiny AnomalyGPT and a session over both, for the tests of the chat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_anomalygpt as tiny

from helpers.anomalygpt import evaluation as te
from helpers.anomalygpt.model import AnomalyGPT
from helpers.chat import references
from helpers.chat import session as chat
from helpers.data import images
from helpers.data import manifest as data
from helpers.records import Sample

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
SETTINGS = te.EvaluationSettings(
    shots=(0, 2), n_draws=1, row_shots=2, answered_shots=(0, 2), wording="short", n_sentences=1, n_controls=0,
    max_new_tokens=4, alpha=0.25,
)  # fmt: skip
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&`*_[x](javascript:alert(3))"


def build_model() -> AnomalyGPT:
    """The tiny chain with a vocabulary that takes any text."""
    return tiny.talkative(tiny.build(FIXTURE)[0])


def write_dataset(folder: Path) -> data.Dataset:
    """Two artworks: 3 train and 4 calibration normals, 2 normal test pictures, a box and a replica."""
    random = np.random.default_rng(1)
    samples = []
    for category in ("one", "two"):
        base = random.integers(60, 200, (8, 10, 3), dtype=np.uint8).repeat(12, axis=0).repeat(12, axis=1)
        for split, kinds in (
            ("train", ["good"] * 3),
            ("calibration", ["good"] * 4),
            ("test", ["good", "good", "box", "replica"]),
        ):
            for i, kind in enumerate(kinds):
                picture = np.clip(base.astype(int) + random.integers(-9, 9, base.shape), 0, 255).astype(np.uint8)
                if kind == "box":
                    picture[10:45, 20:60] = (250, 10, 10)
                elif kind == "replica":
                    picture = picture[:, ::-1]
                path = folder / f"{category}_{split}_{i}.png"
                images.save_png(path, picture)
                samples.append(Sample(path, category, kind != "good", None, split, kind, f"{category}{split}{i}"))
    data.write_manifest(folder / "manifest.csv", samples)
    return data.open_dataset(folder)


def session(model: AnomalyGPT, known: dict[str, references.References]) -> chat.ChatSession:
    return chat.ChatSession(model, known, wording="short", max_new_tokens=4, profile="mini")
