"""The four CLIP methods as the report of 2024 used them, kept to show what tuning on test pictures buys.

Its thresholds, contamination and percentile were moved by hand until the accuracy on the *test* pictures rose. These
numbers never enter the comparison. All paintings share one detector, as in the report. Rules, values and printed
numbers lie in ``report_2024.csv``; the strength of its alterations is not stated in the source and is ours.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import normalize
from torchvision.transforms import v2

from helpers.clip import features
from helpers.clip.features import Features, Models
from helpers.clip.one_class import fuse
from helpers.data import Dataset, images

PRESETS = pd.read_csv(Path(__file__).with_suffix(".csv"), index_col="method")
"""A row per method: rule, why it misleads, what the report printed, values, and which of them are ours."""


def altered(picture: np.ndarray, method: str, seed: int) -> np.ndarray:
    """A training picture as the report altered it, uint8 RGB: to an anomaly for the head, to a normal for LOF. The two
    contradict each other on what colour jitter means; how strong it was is not stated in the source."""
    jitter = v2.ColorJitter(0.5, 0.5, 0.5, 0.1)
    blurred, turned = [jitter, v2.GaussianBlur(5)], [v2.RandomHorizontalFlip(), v2.RandomRotation(10), jitter]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        change = v2.Compose(blurred if method == "clip_cross_entropy" else turned)
        return np.ascontiguousarray(change(torch.from_numpy(picture).permute(2, 0, 1)).permute(1, 2, 0).numpy())


def predictions(dataset: Dataset, embedded: Features, models: Models, *, seed: int) -> pd.DataFrame:
    """Scores, thresholds and verdicts of all test pictures by all four methods; nothing is written."""
    train, test = dataset.select(split="train", is_anomalous=False), dataset.select(split="test")
    facts = pd.DataFrame([(s.category, s.is_anomalous) for s in test], columns=["category", "is_anomalous"])
    found, views, pictures = [], None, [images.load_image(sample.image_path) for sample in train]
    for method in PRESETS.index:
        if method in ("clip_cross_entropy", "clip_lof"):
            ids = [f"{sample.sha256}/report_2024/{method}/{seed + row}" for row, sample in enumerate(train)]
            views = features.embed(ids, lambda row, how=method: altered(pictures[row], how, seed + row), models)
        scores, threshold = verdicts(method, train=embedded.of(train), views=views, test=embedded.of(test), seed=seed)
        called = {"method": method, "anomaly_score": scores, "threshold": threshold}
        found.append(facts.assign(**called, is_predicted_anomalous=scores > threshold))
    return pd.concat(found, ignore_index=True)


def verdicts(method: str, *, train: Features, views: Features | None, test: Features, seed: int = 0) -> tuple:
    """Scores ``(n,)``, higher = more anomalous, and the threshold of the report's rule, which reads the test pictures;
    ``train`` and ``test`` are of all paintings, ``views`` the :func:`altered` training pictures, if the method asks."""
    values, queries = json.loads(PRESETS.loc[method, "values"]), normalize(test.clip)
    if method == "clip_resnet50":
        # float32 as in the report: whether a copy reaches 1 hangs on the rounding.
        similarity = fuse(test, values["cnn_weight"]) @ fuse(train, values["cnn_weight"]).T
        return 1.0 - similarity.max(axis=1).astype(np.float64), 1.0 - values["similarity_at_least"]
    if method == "clip_isolation_forest":
        percentile = values.pop("percentile")
        scores = IsolationForest(**values, random_state=seed).fit(normalize(train.clip)).decision_function(queries)
        return -scores, -float(np.percentile(scores, percentile))
    with warnings.catch_warnings(action="ignore"):  # few pictures for so many neighbours, few epochs to converge
        if method == "clip_lof":
            lof = LocalOutlierFactor(**values, novelty=True).fit(normalize(views.clip))
            return -lof.decision_function(queries), 0.0
        # Two layers with ReLU and cross-entropy, trained with Adam.
        rows = normalize(np.concatenate([train.clip, views.clip]))
        net = MLPClassifier(**values, alpha=0.0, random_state=seed)
        net.fit(rows, np.repeat([0, 1], [len(train), len(views)]))
    return net.predict_proba(queries)[:, 1].astype(np.float64) - 0.5, 0.0
