"""The four CLIP methods exactly as the report of 2024 used them, kept to show what tuning on test pictures buys.

Its thresholds, contamination and percentile were moved by hand until the accuracy on the *test* pictures rose. The
numbers made here never enter the comparison; notebook 03 prints them beside the sound ones. One painting also sets the
scale for the other: all paintings share one detector, as in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.clip.features import Features
from helpers.clip.one_class import fuse, log_odds, two_layers, unit_rows

NOT_STATED = "not stated in source"


@dataclass(frozen=True)
class Preset:
    """How the report used a method.

    Attributes:
        stated: values that the report gives.
        not_stated: values that the source does not state; these are ours.
        decision: when a picture is called anomalous.
        flaw: why the resulting number does not tell how the method would do on new pictures.
        published: accuracy in per cent that the report prints, with the only counts of at most 50 pictures that give
            it.
    """

    stated: Mapping[str, Any]
    not_stated: Mapping[str, Any]
    decision: str
    flaw: str
    published: str

    @property
    def values(self) -> dict[str, Any]:
        return {**self.stated, **self.not_stated}

    def describe(self) -> dict[str, str]:
        """Every value as text; those that are ours carry the note "not stated in source"."""
        ours = {name: f"{value} ({NOT_STATED})" for name, value in self.not_stated.items()}
        return {name: str(value) for name, value in self.stated.items()} | ours


PRESETS: Mapping[str, Preset] = {
    "clip_resnet50": Preset(
        stated={"similarity_at_least": 1.0, "references": "original pictures", "features": "ResNet-50 and CLIP"},
        not_stated={"cnn_weight": 0.5, "pooling": "max"},
        decision="anomalous when the cosine similarity to every original is below 1",
        flaw="says normal only to copies with the same bytes: another photograph of the painting counts as forged",
        published="100 %",
    ),
    "clip_cross_entropy": Preset(
        stated={"layers": 2, "activation": "ReLU", "optimizer": "Adam", "anomalies": "colour jitter and Gaussian blur"},
        not_stated={
            "n_hidden": 256,
            "learning_rate": 1e-3,
            "n_epochs": 10,
            "batch_size": 32,
            "jitter": (0.5, 0.5, 0.5, 0.1),
            "blur_kernel": 5,
        },
        decision="anomalous when that class has the larger logit (argmax)",
        flaw="learns to see blur and colour changes; marks, edits and reinterpretations are something else",
        published="83.67 % = 41/49",
    ),
    "clip_isolation_forest": Preset(
        stated={"contamination": 0.4, "percentile": 60},
        not_stated={"n_trees": 100, "percentile_of": "scores of the test pictures"},
        decision="anomalous below the 60th percentile of the test scores",
        flaw="calls 60 % of any test pictures anomalous: the share was fitted to the labels of the test pictures",
        published="91.11 % = 41/45",
    ),
    "clip_lof": Preset(
        stated={
            "n_neighbors": 20,
            "contamination": 0.45,
            "novelty": True,
            "batch_size": 32,
            "augmentation": "horizontal flip, rotation, colour jitter",
        },
        not_stated={"metric": "minkowski", "rotation_degrees": 10, "jitter": (0.5, 0.5, 0.5, 0.1)},
        decision="anomalous when scikit-learn's predict() says so",
        flaw="contamination 0.45 sets the threshold where 45 % of the training normals would be called anomalous",
        published="97.62 % = 41/42",
    ),
}


def altered_views(pictures: Sequence[np.ndarray] | Iterator[np.ndarray], method: str, *, seed: int) -> Iterator:
    """One altered view of each training picture, as the report made them.

    Args:
        pictures: uint8 RGB ``(H, W, 3)``, normal training pictures.
        method: ``"clip_cross_entropy"`` (its anomalies: colour jitter, then blur) or ``"clip_lof"`` (its normals:
            horizontal flip, rotation, colour jitter). The two contradict each other on what jitter means.
        seed: the global random state of torch stays as it was.
    Returns:
        uint8 RGB pictures of the same sizes.
    """
    import torch
    from torchvision.transforms import v2

    values = PRESETS[method].values
    if method == "clip_cross_entropy":
        steps = [v2.ColorJitter(*values["jitter"]), v2.GaussianBlur(values["blur_kernel"])]
    elif method == "clip_lof":
        rotation = v2.RandomRotation(values["rotation_degrees"])
        steps = [v2.RandomHorizontalFlip(), rotation, v2.ColorJitter(*values["jitter"])]
    else:
        raise ValueError(f"The report alters no training pictures for {method}; only clip_cross_entropy and clip_lof.")
    transform = v2.Compose(steps)
    for index, picture in enumerate(pictures):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            altered = transform(torch.from_numpy(picture).permute(2, 0, 1))
        yield np.ascontiguousarray(altered.permute(1, 2, 0).numpy())


def verdicts(
    method: str, *, train: Features, views: Features | None, test: Features, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Scores and threshold as the report made them. Reads the test pictures to set a threshold: that is the flaw.

    Args:
        method: a key of :data:`PRESETS`.
        train: normal training pictures of all paintings together.
        views: features of :func:`altered_views` of them for the two methods that use these, else None.
        test: all test pictures.
        seed: of trees, first weights and batches.
    Returns:
        float64 scores ``(n,)``, higher = more anomalous, and the threshold above which the report's rule says
        "anomalous".
    Raises:
        ValueError: unknown method, or ``views`` is missing.
    """
    if method not in PRESETS:
        raise ValueError(f"The report has no method {method!r}; it has {', '.join(PRESETS)}.")
    values = PRESETS[method].values
    if method == "clip_resnet50":
        # float32 as in the report: whether a copy reaches 1 hangs on the rounding.
        similarity = fuse(test, values["cnn_weight"]) @ fuse(train, values["cnn_weight"]).T
        return 1.0 - similarity.max(axis=1).astype(np.float64), 1.0 - values["similarity_at_least"]
    if method == "clip_isolation_forest":
        return _forest(train, test, values, seed)
    if views is None:
        raise ValueError(f"{method} of the report needs altered training pictures: embed altered_views of them.")
    if method == "clip_lof":
        return _lof(views, test, values), 0.0
    return _head(train, views, test, values, seed), 0.0


def _forest(train: Features, test: Features, values: Mapping[str, Any], seed: int) -> tuple[np.ndarray, float]:
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(
        n_estimators=values["n_trees"], contamination=values["contamination"], random_state=seed
    ).fit(unit_rows(train.clip))
    scores = forest.decision_function(unit_rows(test.clip))
    return -scores, -float(np.percentile(scores, values["percentile"]))


def _lof(views: Features, test: Features, values: Mapping[str, Any]) -> np.ndarray:
    from sklearn.neighbors import LocalOutlierFactor

    lof = LocalOutlierFactor(
        n_neighbors=min(values["n_neighbors"], len(views) - 1),
        contamination=values["contamination"],
        metric=values["metric"],
        novelty=values["novelty"],
    ).fit(unit_rows(views.clip))
    return -lof.decision_function(unit_rows(test.clip))


def _head(train: Features, views: Features, test: Features, values: Mapping[str, Any], seed: int) -> np.ndarray:
    import torch

    rows = torch.from_numpy(np.concatenate([unit_rows(train.clip), unit_rows(views.clip)]))
    labels = torch.from_numpy(np.repeat([0, 1], [len(train), len(views)]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = two_layers(rows.shape[1], values["n_hidden"], dropout=0.0)
        optimizer = torch.optim.Adam(net.parameters(), lr=values["learning_rate"])
        for _ in range(values["n_epochs"]):
            for batch in torch.randperm(len(rows)).split(values["batch_size"]):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(rows[batch]), labels[batch]).backward()
                optimizer.step()
    return log_odds(net, unit_rows(test.clip))
