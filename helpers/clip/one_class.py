"""Genuine pictures of one painting -> anomaly scores: five detectors (:mod:`helpers.clip.tuning` sets them up).

They are scikit-learn estimators, fitted on :class:`Rows` (which refuse test pictures), that score features: float64
``(n,)``, higher = more anomalous. scikit-learn's own mean the opposite; the sign is turned here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import LocalOutlierFactor
from sklearn.preprocessing import normalize

from helpers.clip.features import Features
from helpers.judge.metrics import image_auroc
from helpers.records import NORMAL_KIND, Sample

VIEW = "view"  # kind of another photograph of a genuine picture, never scored for a threshold
CONFIRMED = "confirmed"  # kind of an anomaly that a person confirmed, beside the synthetic kinds


@dataclass(frozen=True)
class Rows:
    """What the detectors of one painting may learn from, one row a picture. ``table`` has the columns ``category``;
    ``kind``: ``"good"``, :data:`VIEW`, or that of an anomaly; ``group``, the source picture, and its ``split``."""

    features: Features
    table: pd.DataFrame

    @staticmethod
    def of(sources: Sequence[Sample], features: Features, kinds: Sequence[str] | None = None) -> Rows:
        """Rows of genuine pictures, or of what was made from them (``kinds``); other sources are a ValueError."""
        for one in sources:
            if one.is_anomalous or one.split == "test":
                what = f"{one.image_path} is of kind {one.kind!r}, split {one.split!r}"
                raise ValueError(f"{one.category}: {what}; genuine ones of 'train' and 'calibration' only.")
        kinds = [NORMAL_KIND] * len(sources) if kinds is None else kinds
        rows = [(s.category, kind, s.group or s.sha256, s.split) for s, kind in zip(sources, kinds, strict=True)]
        return Rows.join([Rows(features, pd.DataFrame(rows, columns=["category", "kind", "group", "split"]))])

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """All rows of ``parts``, which must be of one painting."""
        table = pd.concat([part.table for part in parts], ignore_index=True)
        if table["category"].nunique() != 1:
            raise ValueError(f"A detector belongs to one painting, got {sorted(set(table['category']))}.")
        return Rows(Features.join([part.features for part in parts]), table)

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: np.ndarray) -> Rows:
        """The rows at these positions (integers, or a bool mask)."""
        return Rows(self.features.take(rows), self.table.iloc[rows].reset_index(drop=True))

    def has(self, column: str, *values: str) -> np.ndarray:
        """Bool ``(n,)``: rows with one of these values."""
        return self.table[column].isin(values).to_numpy()

    is_anomaly = property(lambda self: ~self.has("kind", NORMAL_KIND, VIEW), doc="Bool ``(n,)``.")
    category = property(lambda self: self.table["category"].iloc[0], doc="The painting.")
    n_sources = property(lambda self: self.table["group"].nunique(), doc="Number of source pictures.")


def folds(rows: Rows, n_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (to learn from, held out) of each fold; a source is never separated, but for a single one, whose
    photographs are all that can be held out."""
    groups = rows.table["group"] if rows.n_sources > 1 else rows.table.index.to_series()
    splitter = GroupKFold(min(n_folds, groups.nunique()), shuffle=True, random_state=seed)
    return list(splitter.split(groups, groups=groups))


def fuse(features: Features, cnn_weight: float) -> np.ndarray:
    """CLIP and CNN features side by side, float32: with weight ``w``, dot products of two rows are
    ``(1 - w) * cos_clip + w * cos_cnn``."""
    parts = [(1 - cnn_weight, features.clip), (cnn_weight, features.cnn)]
    return np.concatenate([math.sqrt(weight) * normalize(part) for weight, part in parts if weight > 0], axis=1)


class Detector(BaseEstimator):
    """What the five share. ``augment``: learn from views, too; ``cnn_weight``: see :func:`fuse`."""

    def fit(self, rows: Rows) -> Detector:
        normals = np.unique(fuse(self._learnt(rows), self.cnn_weight), axis=0)  # copies: an infinite density for LOF
        if len(normals) < 3:
            needs = f"{type(self).__name__} needs at least 3 different genuine pictures, got {len(normals)}"
            raise ValueError(f"{rows.category}: {needs}. Add photographs of the artwork to train/good.")
        self._fit(normals)
        return self

    def score(self, features: Features) -> np.ndarray:
        return self.look(features)[0]

    def look(self, features: Features) -> tuple[np.ndarray, Sequence]:
        """Scores, and for each picture an anomaly map (float32 ``(g, g)``, raw) or None."""
        return self._score(fuse(features, self.cnn_weight)).astype(np.float64), [None] * len(features)

    def _score(self, features: np.ndarray) -> np.ndarray:
        return -self._model.score_samples(features)

    def seconds(self, features: Features) -> np.ndarray:
        """Seconds to read each picture and of the networks whose features are used, float64 ``(n,)``."""
        return features.seconds @ np.array([1.0, self.cnn_weight < 1, self.cnn_weight > 0])

    def _learnt(self, rows: Rows) -> Features:
        return rows.features.take(rows.has("kind", NORMAL_KIND, *([VIEW] if self.augment else [])))


@dataclass(eq=False, repr=False)
class Cosine(Detector):
    """1 - mean cosine to the ``k`` nearest genuine pictures."""

    cnn_weight: float = 0.5
    k: int = 1
    augment: bool = False

    def _fit(self, normals: np.ndarray) -> None:
        self._references = normals.astype(np.float64)

    def _score(self, features: np.ndarray) -> np.ndarray:
        return 1 - np.sort(features.astype(np.float64) @ self._references.T, axis=1)[:, -self.k :].mean(axis=1)


@dataclass(eq=False, repr=False)
class Forest(Detector):
    """Isolation Forest (Liu, Ting & Zhou, ICDM 2008); contamination only moves scikit-learn's own threshold: unused."""

    cnn_weight: float = 0.5
    n_trees: int = 100
    max_samples: int | str = "auto"
    max_features: float = 1.0
    augment: bool = False
    seed: int = 0

    def _fit(self, normals: np.ndarray) -> None:
        n = self.max_samples if self.max_samples == "auto" else min(self.max_samples, len(normals))
        options = {"n_estimators": self.n_trees, "max_features": self.max_features, "random_state": self.seed}
        self._model = IsolationForest(max_samples=n, **options).fit(normals)


@dataclass(eq=False, repr=False)
class Lof(Detector):
    """Local outlier factor in novelty mode (Breunig et al., SIGMOD 2000)."""

    cnn_weight: float = 0.5
    n_neighbors: int = 5
    metric: str = "euclidean"
    augment: bool = False

    def _fit(self, normals: np.ndarray) -> None:
        n_neighbors = min(self.n_neighbors, len(normals) - 1)
        self._model = LocalOutlierFactor(n_neighbors=n_neighbors, metric=self.metric, novelty=True).fit(normals)


@dataclass(eq=False, repr=False)
class PatchKnn(Detector):
    """1 - cosine of each patch to the nearest patch of the genuine pictures: a map, and a score from its top share.

    Source: PatchCore (Roth et al., CVPR 2022), thinned at random instead of by coreset; top 1 % as in AnomalyDINO.
    """

    top_fraction: float = 0.01
    augment: bool = False
    max_bank_rows: int = 40_000
    seed: int = 0
    device: str = "cpu"
    cnn_weight = 0.0  # no choice: patches are CLIP's

    def fit(self, rows: Rows) -> PatchKnn:
        learnt = self._learnt(rows).patches
        bank = learnt.reshape(-1, learnt.shape[-1])
        if len(bank) > self.max_bank_rows:
            keep = np.random.default_rng(self.seed).choice(len(bank), self.max_bank_rows, replace=False)
            bank = bank[np.sort(keep)]
        self._bank = self._unit(bank)
        return self

    def look(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        n, height, width, _ = features.patches.shape
        nearest = [(self._unit(one.reshape(height * width, -1)) @ self._bank.T).amax(1) for one in features.patches]
        maps = np.stack([1 - one.reshape(height, width).cpu().numpy() for one in nearest])
        flat = np.sort(maps.reshape(n, -1).astype(np.float64), axis=1)
        return flat[:, -max(1, round(self.top_fraction * flat.shape[1])) :].mean(axis=1), maps

    def _unit(self, patches: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(np.array(patches)).to(self.device).float(), dim=1)


@dataclass(eq=False, repr=False)
class Head(Detector):
    """Two layers with ReLU and dropout, trained with cross-entropy on genuine pictures against synthetic anomalies.

    The score is the log odds of "anomalous". A quarter of the source pictures and a third of the kinds of anomaly are
    kept for tuning: training stops ``patience`` epochs (each one step) after the best AUROC on them, whose weights are
    restored. ``net`` begins with a frozen projection on ``n_components`` principal components.
    """

    cnn_weight: float = 0.5
    n_hidden: int = 256
    dropout: float = 0.2
    weight_decay: float = 1e-4
    learning_rate: float = 1e-3
    n_components: int = 128
    max_epochs: int = 200
    patience: int = 10
    augment: bool = True
    seed: int = 0

    def fit(self, rows: Rows) -> Head:
        learn, tune = self._parts(rows)
        normals, marks = self._learnt(learn), learn.features.take(learn.is_anomaly)
        features = fuse(Features.join([normals, marks]), self.cnn_weight).astype(np.float64)
        centred = features - features.mean(axis=0)
        _, singular, components = np.linalg.svd(centred, full_matrices=False)
        if singular[0] < 1e-6:
            raise ValueError(f"{rows.category}: the features of all training pictures are equal. Check the pictures.")
        components = components[: min(self.n_components, int((singular > 1e-6 * singular[0]).sum()))]
        # One scale for all components: dividing each by its own spread would blow up the noise of the last ones.
        components /= np.sqrt((centred @ components.T).var(axis=0).mean())
        labels = np.repeat([0, 1], [len(normals), len(marks)])
        self._train(features, labels, components, fuse(tune.features, self.cnn_weight), tune.is_anomaly)
        return self

    @torch.inference_mode()
    def _score(self, features: np.ndarray) -> np.ndarray:
        logits = self.net.eval()(torch.from_numpy(features)).double().numpy()
        return logits[:, 1] - logits[:, 0]

    def _parts(self, rows: Rows) -> tuple[Rows, Rows]:
        """Rows to train and to tune on: other pictures and other kinds. The first quarter that will do is kept."""
        kinds = np.random.default_rng(self.seed).permutation(sorted(set(rows.table["kind"][rows.is_anomaly]))).tolist()
        n_tune = max(1, len(kinds) // 3)
        to_train, to_tune = ~rows.has("kind", *kinds[:n_tune]), ~rows.has("kind", VIEW, *kinds[n_tune:])
        for learn, held in folds(rows, 4, self.seed):
            parts = rows.take(learn[to_train[learn]]), rows.take(held[to_tune[held]])
            if all(part.is_anomaly.any() and part.has("kind", NORMAL_KIND).any() for part in parts):
                return parts
        few = f"{rows.is_anomaly.sum()} synthetic anomalies of {len(kinds)} kinds from {rows.n_sources} source pictures"
        raise ValueError(f"{rows.category}: {few} cannot be parted into some to train and others to tune on.")

    def _train(self, features: np.ndarray, labels: np.ndarray, components: np.ndarray, held, is_anomaly) -> None:
        """Train with early stopping on the AUROC of ``held``; the loss weighs both classes alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = self._layers(*reversed(components.shape))
            project, layers = self.net[0], self.net[1:]
            project.weight.copy_(torch.from_numpy(components))
            project.bias.copy_(torch.from_numpy(-components @ features.mean(axis=0)))
            optimizer = torch.optim.AdamW(layers.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
            shares = len(labels) / (2 * np.bincount(labels, minlength=2))
            loss = torch.nn.CrossEntropyLoss(weight=torch.tensor(shares, dtype=torch.float32))
            rows = project(torch.from_numpy(features).float())
            best = -math.inf
            for epoch in range(1, self.max_epochs + 1):
                layers.train()
                optimizer.zero_grad()
                loss(layers(rows), torch.from_numpy(labels)).backward()
                optimizer.step()
                auroc = image_auroc(self._score(held), is_anomaly)
                if auroc > best:
                    best, best_epoch = auroc, epoch
                    best_state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
                elif epoch - best_epoch >= self.patience:
                    break
        layers.load_state_dict(best_state)

    def with_state(self, state: Mapping[str, torch.Tensor]) -> Head:
        """Take over the tensors of ``net.state_dict()`` instead of training."""
        self.net = self._layers(*reversed(state["0.weight"].shape))
        self.net.load_state_dict(state)
        return self

    def _layers(self, n_features: int, n_components: int) -> torch.nn.Sequential:
        """The projection, then the two layers with their logits "normal" and "anomalous"."""
        nn = torch.nn
        project = nn.utils.skip_init(nn.Linear, n_features, n_components).requires_grad_(False)
        hidden, last = nn.Linear(n_components, self.n_hidden), nn.Linear(self.n_hidden, 2)
        return nn.Sequential(project, hidden, nn.ReLU(), nn.Dropout(self.dropout), last)


DETECTORS: Mapping[str, Detector] = {
    "clip_resnet50": Cosine(), "clip_cross_entropy": Head(), "clip_isolation_forest": Forest(), "clip_lof": Lof(),
    "clip_patch_knn": PatchKnn(),
}  # fmt: skip
"""Row of the comparison -> its detector with default settings."""
METHODS = tuple(DETECTORS)

_MIXED = {"cnn_weight": [0.0, 0.25, 0.5, 0.75], "augment": [False, True]}
_HEAD = {"n_hidden": [128, 256, 512], "dropout": [0.0, 0.2, 0.5], "weight_decay": [0.0, 1e-4, 1e-2]}
SPACES: Mapping[str, Mapping[str, list]] = {
    # Only this row may drop CLIP altogether, as in the report's own fusion.
    "clip_resnet50": _MIXED | {"cnn_weight": [0.0, 0.25, 0.5, 0.75, 1.0], "k": [1, 3]},
    "clip_cross_entropy": _MIXED | _HEAD | {"learning_rate": [1e-3, 3e-4], "patience": [5, 10, 20]},
    "clip_isolation_forest": _MIXED | {"max_samples": [64, 128, "auto"], "max_features": [0.25, 0.5, 1.0]},
    "clip_lof": _MIXED | {"n_neighbors": [3, 5, 10, 20, 35], "metric": ["euclidean", "cosine"]},
    "clip_patch_knn": {"top_fraction": [0.01, 0.05, 0.1], "augment": [False, True]},
}
"""What :func:`helpers.clip.tuning.tune` may try."""
