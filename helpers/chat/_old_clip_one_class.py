"""Kept until the chat uses the new room clip.

Features of one painting's normal pictures -> anomaly scores: five detectors and their thresholds.

Every detector has ``score(features) -> float64 (n,)``, higher = more anomalous. scikit-learn's detectors mean the
opposite; the sign is turned here and nowhere else. A detector belongs to one painting: the density of one painting
says nothing about another.

Nothing in this module can see a test picture. Fit, calibration and tuning (:mod:`helpers.clip.tuning`) take a
:class:`Training`, which refuses every picture that is anomalous or of the test split. What the report of 2024 did
instead (thresholds moved on the test pictures) is in :mod:`helpers.clip.report_2024`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from helpers.chat._old_clip_features import Features
from helpers.records import Sample

if TYPE_CHECKING:
    import torch

METHODS = ("clip_resnet50", "clip_cross_entropy", "clip_isolation_forest", "clip_lof", "clip_patch_knn")
MIN_CALIBRATION = 40
"""From this many calibration normals on they set the threshold alone; below, out-of-fold scores of all normals do."""

CONFIRMED = "confirmed"
"""Kind of the anomalies that a person confirmed (see :mod:`helpers.chat.feedback_loop`), beside the synthetic kinds."""

_FUSION = (0.0, 0.25, 0.5, 0.75, 1.0)


class TooFewPictures(ValueError):
    """There are not enough pictures for this detector or this way of holding some out."""


# ------------------------------------------------------------------------------------------------- settings


def _check_weight(cnn_weight: float) -> None:
    if not 0 <= cnn_weight <= 1:
        raise ValueError(f"cnn_weight is {cnn_weight}; allowed is 0 (CLIP alone) to 1 (CNN alone).")


@dataclass(frozen=True)
class CosineSettings:
    """Cosine to reference pictures.

    Attributes:
        cnn_weight: share of the CNN in the similarity, in [0, 1]; the rest is CLIP's (see :func:`fuse`).
        pooling: ``"max"`` for the nearest reference, ``"top3"`` for the mean of the three nearest.
        augment: whether new photographs of the training pictures join them (:attr:`Training.views`).
    """

    cnn_weight: float = 0.5
    pooling: str = "max"
    augment: bool = False

    def __post_init__(self) -> None:
        _check_weight(self.cnn_weight)
        if self.pooling not in ("max", "top3"):
            raise ValueError(f"pooling is {self.pooling!r}; allowed are 'max' and 'top3'.")


@dataclass(frozen=True)
class HeadSettings:
    """Two fully connected layers with ReLU and dropout, trained with cross-entropy on synthetic anomalies.

    Attributes:
        cnn_weight: share of the CNN in the input, see :func:`fuse`.
        n_hidden: width of the hidden layer.
        dropout: share of hidden units switched off in training.
        weight_decay, learning_rate: of Adam (decoupled decay).
        n_components: principal components of the training pictures that the head sees; with a few hundred pictures
            the other directions hold no variance, and without them an epoch is ten times as fast.
        max_epochs: upper limit; one epoch is one step over all pictures.
        patience: epochs without a better tuning AUROC after which training stops.
        augment: see :class:`CosineSettings`.
    """

    cnn_weight: float = 0.5
    n_hidden: int = 256
    dropout: float = 0.2
    weight_decay: float = 1e-4
    learning_rate: float = 1e-3
    n_components: int = 128
    max_epochs: int = 200
    patience: int = 10
    augment: bool = False

    def __post_init__(self) -> None:
        _check_weight(self.cnn_weight)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; allowed is 0 up to but not including 1.")
        if min(self.n_hidden, self.n_components, self.max_epochs, self.patience) < 1:
            raise ValueError(f"Widths, epochs and patience must be at least 1, got {self}.")


@dataclass(frozen=True)
class ForestSettings:
    """Isolation Forest (Liu, Ting & Zhou, ICDM 2008). Contamination only moves scikit-learn's own threshold: unused.

    Attributes:
        cnn_weight: share of the CNN in the features, see :func:`fuse`.
        n_trees, max_samples, max_features: as scikit-learn's ``n_estimators``, ``max_samples``, ``max_features``.
        augment: see :class:`CosineSettings`.
    """

    cnn_weight: float = 0.5
    n_trees: int = 100
    max_samples: int | str = "auto"
    max_features: float = 1.0
    augment: bool = False

    def __post_init__(self) -> None:
        _check_weight(self.cnn_weight)


@dataclass(frozen=True)
class LofSettings:
    """Local outlier factor in novelty mode (Breunig et al., SIGMOD 2000).

    Attributes:
        cnn_weight: share of the CNN in the features, see :func:`fuse`.
        n_neighbors: neighbours; cut to the number of training pictures less one.
        metric: ``"euclidean"`` or ``"cosine"``.
        pca: share of variance that principal components must keep, None for all of the features.
        augment: see :class:`CosineSettings`.
    """

    cnn_weight: float = 0.5
    n_neighbors: int = 5
    metric: str = "euclidean"
    pca: float | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        _check_weight(self.cnn_weight)
        if self.metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric is {self.metric!r}; allowed are 'euclidean' and 'cosine'.")


@dataclass(frozen=True)
class PatchKnnSettings:
    """Nearest patch of the normal pictures, per patch: a score and an anomaly map.

    Attributes:
        max_bank_rows: patches in the memory bank; more are thinned out at random (fixed seed).
        top_fraction: the image score is the mean over this share of the highest patch scores (at least one patch).
        chunk_rows: patches compared at a time; bounds the memory of the product.
        augment: see :class:`CosineSettings`; views and pictures share the bank's rows.
    Source: PatchCore (Roth et al., CVPR 2022) without its coreset; top 1 % as in AnomalyDINO (WACV 2025).
    """

    max_bank_rows: int = 40_000
    top_fraction: float = 0.01
    chunk_rows: int = 2_048
    augment: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1 or min(self.max_bank_rows, self.chunk_rows) < 1:
            raise ValueError(f"top_fraction must be in (0, 1], the two row limits at least 1, got {self}.")


Settings = CosineSettings | HeadSettings | ForestSettings | LofSettings | PatchKnnSettings

DEFAULTS: Mapping[str, Settings] = {
    "clip_resnet50": CosineSettings(),
    "clip_cross_entropy": HeadSettings(),
    "clip_isolation_forest": ForestSettings(),
    "clip_lof": LofSettings(),
    "clip_patch_knn": PatchKnnSettings(),
}

SPACES: Mapping[str, Mapping[str, tuple]] = {
    "clip_resnet50": {"cnn_weight": _FUSION, "pooling": ("max", "top3"), "augment": (False, True)},
    "clip_cross_entropy": {
        "cnn_weight": _FUSION[:-1],
        "n_hidden": (128, 256, 512),
        "dropout": (0.0, 0.2, 0.5),
        "weight_decay": (0.0, 1e-4, 1e-2),
        "learning_rate": (1e-3, 3e-4),
        "patience": (5, 10, 20),
        "augment": (False, True),
    },
    "clip_isolation_forest": {
        "cnn_weight": _FUSION[:-1],
        "n_trees": (25, 50, 100),
        "max_samples": (64, 128, "auto"),
        "max_features": (0.25, 0.5, 1.0),
        "augment": (False, True),
    },
    "clip_lof": {
        "cnn_weight": _FUSION[:-1],
        "n_neighbors": (3, 5, 10, 20, 35),
        "metric": ("euclidean", "cosine"),
        "pca": (None, 0.95),
        "augment": (False, True),
    },
    "clip_patch_knn": {"top_fraction": (0.005, 0.01, 0.02, 0.05, 0.1), "augment": (False, True)},
}
"""What :func:`helpers.clip.tuning.tune` may try. Only the ResNet row may drop CLIP altogether, as in the report's own
fusion."""


# ------------------------------------------------------------------------------------------------- what is learnt from


@dataclass(frozen=True)
class Training:
    """Everything a detector of one painting may learn from: normal pictures, and anomalies made from them.

    Args:
        samples: normal pictures of the splits ``train`` and ``calibration``.
        normals: their features, row by row.
        anomalies: features of synthetic anomalies, None when the method needs none.
        sources: for each anomaly the normal picture it was made from.
        kinds: for each anomaly its kind.
        views: features of new photographs (variations) of normal pictures, for detectors with ``augment``; never
            scored, only learnt from.
        view_sources: for each view the picture it was made from.
    Raises:
        ValueError: a test picture, an anomalous picture or a second painting is among the samples or sources, or
            counts differ.
    """

    samples: tuple[Sample, ...]
    normals: Features
    anomalies: Features | None = None
    sources: tuple[Sample, ...] = ()
    kinds: tuple[str, ...] = ()
    views: Features | None = None
    view_sources: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("No normal picture to learn from. Add pictures to train/good and build the dataset again.")
        n_anomalies = 0 if self.anomalies is None else len(self.anomalies)
        if len(self.normals) != len(self.samples) or not n_anomalies == len(self.sources) == len(self.kinds):
            raise ValueError(
                f"{len(self.samples)} samples with {len(self.normals)} rows of features; {n_anomalies} anomalies with "
                f"{len(self.sources)} sources and {len(self.kinds)} kinds. They must agree row by row."
            )
        if len(self.view_sources) != (0 if self.views is None else len(self.views)):
            raise ValueError(f"{len(self.view_sources)} sources of views; each view needs one.")
        everything = (*self.samples, *self.sources, *self.view_sources)
        for sample in everything:
            if sample.split == "test" or sample.is_anomalous:
                raise ValueError(
                    f"{sample.image_path} is a {'anomalous' if sample.is_anomalous else 'normal'} picture of the split "
                    f"{sample.split!r}. Detectors learn and are tuned on normal pictures of 'train' and 'calibration' "
                    "only; select those."
                )
        categories = sorted({sample.category for sample in everything})
        if len(categories) > 1:
            raise ValueError(f"A detector belongs to one painting, got {', '.join(categories)}. Fit one for each.")
        stray = {_group(sample) for sample in (*self.sources, *self.view_sources)} - set(self.groups)
        if stray:
            raise ValueError(
                f"Anomalies or views were made from pictures that are not among the samples: {sorted(stray)[:3]}."
            )

    @property
    def category(self) -> str:
        return self.samples[0].category

    @property
    def groups(self) -> tuple[str, ...]:
        """Source picture of each normal picture; pictures of one group are never separated by a fold."""
        return tuple(_group(sample) for sample in self.samples)

    def where(self, groups: set[str] | frozenset[str], *, kinds: set[str] | None = None) -> Training:
        """The part of it that stems from these groups, with anomalies of these kinds only (all by default)."""
        rows = [i for i, group in enumerate(self.groups) if group in groups]
        marks = [
            i
            for i, (source, kind) in enumerate(zip(self.sources, self.kinds, strict=True))
            if _group(source) in groups and (kinds is None or kind in kinds)
        ]
        views = [i for i, source in enumerate(self.view_sources) if _group(source) in groups]
        return Training(
            samples=tuple(self.samples[i] for i in rows),
            normals=self.normals.take(rows),
            anomalies=None if self.anomalies is None else self.anomalies.take(marks),
            sources=tuple(self.sources[i] for i in marks),
            kinds=tuple(self.kinds[i] for i in marks),
            views=None if self.views is None else self.views.take(views),
            view_sources=tuple(self.view_sources[i] for i in views),
        )

    def learnt(self, *, augment: bool) -> Features:
        """The normal pictures that a detector learns from, with their views when ``augment`` is set.

        Raises:
            ValueError: views are asked for and there are none.
        """
        if not augment:
            return self.normals
        if self.views is None:
            raise ValueError("augment=True needs views of the normal pictures. Make them with clip_methods.trainings.")
        return Features.join([self.normals, self.views])


def group_folds(groups: Sequence[str], n_folds: int, seed: int) -> list[frozenset[str]]:
    """Groups dealt into disjoint folds at random, as evenly as the sizes of the groups allow.

    Raises:
        ValueError: fewer than two groups: nothing can be held out.
    """
    names, counts = np.unique(np.asarray(groups, dtype=object).astype(str), return_counts=True)
    if len(names) < 2:
        raise TooFewPictures(
            f"{len(groups)} normal pictures come from {len(names)} source picture: nothing can be held out to set a "
            "threshold. Add photographs of the artwork from other sources to train/good."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-counts[order], kind="stable")]  # large groups first
    folds: list[list[str]] = [[] for _ in range(min(n_folds, len(names)))]
    sizes = [0] * len(folds)
    for i in order:
        smallest = sizes.index(min(sizes))
        folds[smallest].append(str(names[i]))
        sizes[smallest] += int(counts[i])
    return [frozenset(fold) for fold in folds]


def _group(sample: Sample) -> str:
    return sample.group or sample.sha256 or str(sample.image_path)


# ------------------------------------------------------------------------------------------------- detectors


class Detector(Protocol):
    """What :func:`fit` returns."""

    def score(self, features: Features) -> np.ndarray:
        """float64 ``(n,)``, higher = more anomalous."""


def fuse(features: Features, cnn_weight: float) -> np.ndarray:
    """CLIP and CNN features side by side, each of length 1, weighted so that dot products are mixed cosines.

    Args:
        cnn_weight: ``w`` in ``(1 - w) * cos_clip + w * cos_cnn``, the dot product of two rows of the result.
    Returns:
        float32 ``(n, e + c)``; only the one part when the weight is 0 or 1.
    """
    _check_weight(cnn_weight)
    parts = [(1 - cnn_weight, features.clip), (cnn_weight, features.cnn)]
    return np.concatenate([math.sqrt(weight) * unit_rows(part) for weight, part in parts if weight > 0], axis=1)


def fit(settings: Settings, training: Training, *, seed: int = 0, device: str = "cpu") -> Detector:
    """Train the detector that the settings describe.

    Args:
        settings: one of the settings of this module; its type names the method.
        training: normal pictures (and synthetic anomalies, which only the cross-entropy head uses).
        seed: of everything random.
        device: where the memory bank is compared; the others are faster on the CPU.
    Raises:
        ValueError: too few pictures, or pictures without any difference.
    """
    match settings:
        case CosineSettings():
            return CosineDetector(settings, training.learnt(augment=settings.augment))
        case HeadSettings():
            return HeadDetector(settings, training, seed)
        case ForestSettings():
            return ForestDetector(settings, training.learnt(augment=settings.augment), seed)
        case LofSettings():
            return LofDetector(settings, training.learnt(augment=settings.augment))
        case PatchKnnSettings():
            return PatchKnnDetector(settings, training.learnt(augment=settings.augment), seed, device)
    raise ValueError(f"No detector for settings of type {type(settings).__name__}.")


def fit_and_score(
    settings: Settings,
    learn: Training,
    queries: Features,
    *,
    seed: int = 0,
    device: str = "cpu",
    memo: dict[Settings, np.ndarray] | None = None,
) -> np.ndarray:
    """Scores ``(n,)`` of pictures by a detector fitted for them.

    Args:
        settings, learn, seed, device: as for :func:`fit`.
        queries: features of the pictures.
        memo: kept between calls with the same ``learn`` and ``queries``: the patch maps of one memory bank serve every
            way to make an image score of them.
    """
    if not isinstance(settings, PatchKnnSettings):
        return fit(settings, learn, seed=seed, device=device).score(queries)
    memo = {} if memo is None else memo
    bank = replace(settings, top_fraction=1.0)
    if bank not in memo:
        memo[bank] = fit(bank, learn, seed=seed, device=device).maps(queries)
    return top_mean(memo[bank], settings.top_fraction)


class CosineDetector:
    """1 - cosine to the nearest reference picture (or the mean of the three nearest)."""

    def __init__(self, settings: CosineSettings, normals: Features) -> None:
        self.settings = settings
        self._references = fuse(normals, settings.cnn_weight).astype(np.float64)

    def score(self, features: Features) -> np.ndarray:
        similarity = fuse(features, self.settings.cnn_weight).astype(np.float64) @ self._references.T
        if self.settings.pooling == "max":
            return 1.0 - similarity.max(axis=1)
        n_nearest = min(3, similarity.shape[1])
        return 1.0 - np.partition(similarity, -n_nearest, axis=1)[:, -n_nearest:].mean(axis=1)


class ForestDetector:
    """Isolation Forest on fused features."""

    def __init__(self, settings: ForestSettings, normals: Features, seed: int) -> None:
        from sklearn.ensemble import IsolationForest

        self.settings = settings
        rows = _distinct(fuse(normals, settings.cnn_weight), 2, "The Isolation Forest")
        max_samples = settings.max_samples if settings.max_samples == "auto" else min(settings.max_samples, len(rows))
        self._forest = IsolationForest(
            n_estimators=settings.n_trees,
            max_samples=max_samples,
            max_features=settings.max_features,
            random_state=seed,
        ).fit(rows)

    def score(self, features: Features) -> np.ndarray:
        return -self._forest.score_samples(fuse(features, self.settings.cnn_weight)).astype(np.float64)


class LofDetector:
    """Local outlier factor on fused features; refuses to score the pictures it was fitted on.

    In novelty mode a training picture finds itself as its nearest neighbour, so its score is too low and says nothing.
    Repeated rows are fitted once: among more copies than neighbours the local density is infinite.
    """

    def __init__(self, settings: LofSettings, normals: Features) -> None:
        from sklearn.decomposition import PCA
        from sklearn.neighbors import LocalOutlierFactor

        self.settings = settings
        self._own = frozenset(normals.ids)
        rows = _distinct(fuse(normals, settings.cnn_weight), 3, "LOF")
        self._pca = None if settings.pca is None else PCA(n_components=settings.pca, svd_solver="full").fit(rows)
        rows = rows if self._pca is None else self._pca.transform(rows)
        n_neighbors = min(settings.n_neighbors, len(rows) - 1)
        self._lof = LocalOutlierFactor(n_neighbors=n_neighbors, metric=settings.metric, novelty=True).fit(rows)

    def score(self, features: Features) -> np.ndarray:
        own = self._own.intersection(features.ids)
        if own:
            raise ValueError(
                f"{len(own)} of {len(features)} pictures are training pictures of this LOF, first {min(own)[:12]}. "
                "Their score would mean nothing; score held-out pictures (see calibrate)."
            )
        rows = fuse(features, self.settings.cnn_weight)
        rows = rows if self._pca is None else self._pca.transform(rows)
        return -self._lof.score_samples(rows).astype(np.float64)


class HeadDetector:
    """Cross-entropy head. The score is the log odds of "anomalous": argmax is score > 0, no ties at probability 1.

    A quarter of the source pictures and a third of the kinds of anomaly are kept for tuning: after each epoch the
    AUROC of tuning normals against tuning anomalies (kinds and pictures the head has not trained on) is taken;
    training stops ``patience`` epochs after the best one and its weights are restored.

    Attributes:
        history: per epoch ``{"epoch", "train_loss", "validation_auroc"}``.
        train_kinds, tune_kinds: disjoint.
    """

    def __init__(self, settings: HeadSettings, training: Training, seed: int) -> None:
        if training.anomalies is None or len(set(training.kinds)) < 2:
            raise TooFewPictures(
                "The cross-entropy head learns from synthetic anomalies of two or more kinds (one is kept for tuning), "
                f"got {sorted(set(training.kinds)) or 'none'}. Make them with clip_methods.synthetic_anomalies."
            )
        self.settings = settings
        rng = np.random.default_rng(seed)
        kinds = rng.permutation(sorted(set(training.kinds))).tolist()
        n_tune = max(1, len(kinds) // 3)
        self.tune_kinds, self.train_kinds = frozenset(kinds[:n_tune]), frozenset(kinds[n_tune:])
        learn, tune = self._split(training, seed)
        normals = learn.learnt(augment=settings.augment)
        rows = np.concatenate([self._fused(normals), self._fused(learn.anomalies)])
        self._fit_projection(rows)
        labels = np.repeat([0, 1], [len(normals), len(learn.anomalies)])
        tune_rows = self._project(np.concatenate([self._fused(tune.normals), self._fused(tune.anomalies)]))
        tune_labels = np.repeat([False, True], [len(tune.normals), len(tune.anomalies)])
        self._net, self.history = train_head(
            self._project(rows), labels, tune_rows, tune_labels, settings=settings, seed=seed
        )

    def _split(self, training: Training, seed: int) -> tuple[Training, Training]:
        """The parts to train and to tune on: other pictures and other kinds. The first quarter that will do is kept."""
        for quarter in group_folds(training.groups, 4, seed):
            learn = training.where(frozenset(training.groups) - quarter, kinds=set(self.train_kinds))
            tune = training.where(quarter, kinds=set(self.tune_kinds))
            if learn.kinds and tune.kinds:
                return learn, tune
        raise TooFewPictures(
            f"{training.category}: {len(training.kinds)} synthetic anomalies from {len(set(training.groups))} source "
            "pictures cannot be parted into some to train and others to tune on. Make more, or add normal pictures."
        )

    def score(self, features: Features) -> np.ndarray:
        return log_odds(self._net, self._project(self._fused(features)))

    @classmethod
    def from_state(cls, settings: HeadSettings, state: Mapping[str, torch.Tensor]) -> HeadDetector:
        """A head that was trained before: the inverse of :meth:`state`; its history is empty.

        Raises:
            ValueError: a tensor is missing, or does not fit the settings.
        """
        missing = {"mean", "components", "scale", "0.weight", "3.weight"} - state.keys()
        if missing:
            raise ValueError(f"The stored head lacks {', '.join(sorted(missing))}. Run notebook 03_clip again.")
        head = cls.__new__(cls)
        head.settings, head.history = settings, []
        head.tune_kinds = head.train_kinds = frozenset()
        head._mean, head._components, head._scale = (state[name].numpy() for name in ("mean", "components", "scale"))
        head._net = two_layers(len(head._components), settings.n_hidden, settings.dropout)
        try:
            head._net.load_state_dict({name: state[name] for name in head._net.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"The stored head does not fit its settings ({error}). Run notebook 03_clip again."
            ) from error
        head._net.eval()
        return head

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors, for a safetensors file: projection, scale and the two layers."""
        import torch

        projection = {"mean": self._mean, "components": self._components, "scale": self._scale}
        return {name: torch.from_numpy(np.array(array)) for name, array in projection.items()} | {
            name: tensor.detach().clone() for name, tensor in self._net.state_dict().items()
        }

    def _fused(self, features: Features) -> np.ndarray:
        return fuse(features, self.settings.cnn_weight)

    def _fit_projection(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        self._mean = rows.mean(axis=0)
        _, singular, components = np.linalg.svd(rows - self._mean, full_matrices=False)
        if singular[0] < 1e-6:
            raise ValueError("The features of all training pictures are equal. Check that the pictures differ.")
        self._components = components[: min(self.settings.n_components, int((singular > 1e-6 * singular[0]).sum()))]
        # One scale for all components: dividing each by its own spread would blow up the noise of the last ones.
        self._scale = np.float64(np.sqrt(((rows - self._mean) @ self._components.T).var(axis=0).mean()))

    def _project(self, rows: np.ndarray) -> np.ndarray:
        return ((rows - self._mean) @ self._components.T / self._scale).astype(np.float32)


def train_head(
    rows: np.ndarray,
    labels: np.ndarray,
    tune_rows: np.ndarray,
    tune_labels: np.ndarray,
    *,
    settings: HeadSettings,
    seed: int,
) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Train two layers with early stopping on the tuning AUROC; the best epoch's weights are restored.

    Args:
        rows: float32 ``(n, d)``; labels: ``(n,)``, 1 = anomalous. The loss weighs both classes alike.
        tune_rows, tune_labels: the same for tuning; bool labels.
    Returns:
        the network (two logits: normal, anomalous) in eval mode, and the history per epoch.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = two_layers(rows.shape[1], settings.n_hidden, settings.dropout)
        optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        counts = np.bincount(labels, minlength=2)
        loss = torch.nn.CrossEntropyLoss(weight=torch.tensor(len(labels) / (2 * counts), dtype=torch.float32))
        inputs, targets = torch.from_numpy(rows), torch.from_numpy(labels)
        best, best_state, best_epoch, history = -math.inf, None, 0, []
        for epoch in range(1, settings.max_epochs + 1):
            net.train()
            optimizer.zero_grad()
            value = loss(net(inputs), targets)
            value.backward()
            optimizer.step()
            odds = log_odds(net, tune_rows)
            auroc = auroc_of(odds[~tune_labels], odds[tune_labels])
            history.append({"epoch": epoch, "train_loss": float(value.detach()), "validation_auroc": auroc})
            if auroc > best:
                best, best_epoch = auroc, epoch
                best_state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            elif epoch - best_epoch >= settings.patience:
                break
    net.load_state_dict(best_state)
    return net.eval(), history


def two_layers(n_inputs: int, n_hidden: int, dropout: float) -> torch.nn.Module:
    """Linear, ReLU, dropout, linear: two logits, normal and anomalous."""
    import torch

    return torch.nn.Sequential(
        torch.nn.Linear(n_inputs, n_hidden),
        torch.nn.ReLU(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(n_hidden, 2),
    )


def log_odds(net: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    """Logit of "anomalous" less logit of "normal", float64 ``(n,)``; p(anomalous) is its sigmoid."""
    import torch

    net.eval()
    with torch.inference_mode():
        logits = net(torch.from_numpy(rows)).double().numpy()
    return logits[:, 1] - logits[:, 0]


class PatchKnnDetector:
    """1 - cosine of each patch to the nearest patch of the normal pictures.

    Tokens are normalised once and compared with the bank in one matrix product per chunk: hundreds of times as fast as
    one broadcast cosine per query, with the same numbers.
    """

    def __init__(self, settings: PatchKnnSettings, normals: Features, seed: int, device: str = "cpu") -> None:
        import torch

        self.settings = settings
        self._device = device
        rows = _patch_rows(normals)
        if len(rows) > settings.max_bank_rows:
            keep = np.random.default_rng(seed).choice(len(rows), settings.max_bank_rows, replace=False)
            rows = rows[np.sort(keep)]
        self._bank = torch.nn.functional.normalize(torch.from_numpy(rows).to(device).float(), dim=1)

    @property
    def n_bank_rows(self) -> int:
        return len(self._bank)

    def maps(self, features: Features) -> np.ndarray:
        """Anomaly maps, float32 ``(n, g, g)``, raw: 1 - cosine to the nearest normal patch."""
        import torch

        n, height, width, _ = _patches(features).shape
        queries = torch.from_numpy(_patch_rows(features))
        nearest = []
        with torch.inference_mode():
            for chunk in queries.split(self.settings.chunk_rows):
                chunk = torch.nn.functional.normalize(chunk.to(self._device).float(), dim=1)
                nearest.append((chunk @ self._bank.T).amax(dim=1).cpu())
        return (1.0 - torch.cat(nearest)).reshape(n, height, width).numpy()

    def score_maps(self, maps: np.ndarray) -> np.ndarray:
        """Image scores of maps ``(n, g, g)``: the mean of the highest patches."""
        return top_mean(maps, self.settings.top_fraction)

    def score(self, features: Features) -> np.ndarray:
        return self.score_maps(self.maps(features))


# ------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` returns.

    Attributes:
        detector: the final one.
        normal_scores: float64 ``(n,)``, normal pictures scored by detectors that had not seen them, for
            :func:`helpers.judge.statistics.conformal_threshold`.
        confirmed_scores: float64 ``(m,)``, the same for confirmed anomalies (kind :data:`CONFIRMED`); empty without.
    """

    detector: Detector
    normal_scores: np.ndarray
    confirmed_scores: np.ndarray


def learning_part(training: Training) -> Training:
    """What the final detector is fitted on: all normals, without those of ``calibration`` when they set the threshold.

    They do from :data:`MIN_CALIBRATION` pictures on, in groups of their own.
    """
    groups = np.array(training.groups)
    is_calibration = np.array([sample.split == "calibration" for sample in training.samples])
    held = frozenset(groups[is_calibration])
    if is_calibration.sum() >= MIN_CALIBRATION and held.isdisjoint(groups[~is_calibration]):
        return training.where(frozenset(groups) - held)
    return training


def calibrate(
    settings: Settings, training: Training, *, n_folds: int = 5, seed: int = 0, device: str = "cpu"
) -> Calibration:
    """Fit the final detector and score normal pictures for its threshold, each by a detector that has not seen it.

    With at least :data:`MIN_CALIBRATION` calibration pictures (in groups of their own) the detector is fitted on the
    training pictures and scores the calibration pictures: split conformal, exact for exchangeable pictures.
    Otherwise all normals are used twice: in grouped folds each picture is scored by a detector fitted on the other
    folds, and the final detector is fitted on all of them. It has seen a little more than the fold detectors, so its
    scores of fresh normals tend to be lower than the pooled ones: the threshold errs on the safe side of false
    alarms. (Vovk, Annals of Mathematics and AI 2015: cross-conformal predictors.)

    Confirmed anomalies are scored alike: with the calibration pictures, or in the fold of their group.
    """
    groups = np.array(training.groups)
    learn = learning_part(training)
    if learn is not training:
        rest = training.where(frozenset(groups) - frozenset(learn.groups))
        detector = fit(settings, learn, seed=seed, device=device)
        return Calibration(detector, detector.score(rest.normals), _confirmed_scores(detector, rest))
    normal_scores, confirmed_scores = np.full(len(groups), np.nan), []
    for fold in group_folds(training.groups, n_folds, seed):
        detector = fit(settings, training.where(frozenset(groups) - fold), seed=seed, device=device)
        rows = np.isin(groups, sorted(fold))
        normal_scores[rows] = detector.score(training.normals.take(rows))
        confirmed_scores.append(_confirmed_scores(detector, training.where(fold)))
    detector = fit(settings, training, seed=seed, device=device)
    return Calibration(detector, normal_scores, np.concatenate(confirmed_scores))


def _confirmed_scores(detector: Detector, held_out: Training) -> np.ndarray:
    rows = [i for i, kind in enumerate(held_out.kinds) if kind == CONFIRMED]
    return detector.score(held_out.anomalies.take(rows)) if rows else np.empty(0)


def auroc_of(normal: np.ndarray, anomalous: np.ndarray, *, max_fpr: float = 1.0) -> float:
    """AUROC of two lists of scores, or the area up to a false-alarm rate divided by that rate.

    The same number as :func:`metrics.image_auroc`, twenty times as fast on short lists: early stopping and
    search ask for it thousands of times. Equal scores count half.
    """
    ordered = np.sort(normal)
    n_at_least = len(ordered) - np.searchsorted(ordered, anomalous, side="left")
    n_above = len(ordered) - np.searchsorted(ordered, anomalous, side="right")
    false_alarm_rate = (n_at_least + n_above) / (2 * len(ordered))
    return float(np.clip(max_fpr - false_alarm_rate, 0, None).mean() / max_fpr)


# ------------------------------------------------------------------------------------------------- small parts


def top_mean(maps: np.ndarray, fraction: float) -> np.ndarray:
    """Mean over the highest share of each map ``(n, g, g)``, at least one patch: float64 ``(n,)``."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    n_top = max(1, round(fraction * flat.shape[1]))
    return np.partition(flat, -n_top, axis=1)[:, -n_top:].mean(axis=1)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length.

    Raises:
        ValueError: a row of length 0.
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise ValueError(f"{int((lengths == 0).sum())} pictures have features of length 0; a cosine is not defined.")
    return rows / lengths


def _distinct(rows: np.ndarray, n_needed: int, who: str) -> np.ndarray:
    """Rows without repetitions."""
    different = np.unique(rows, axis=0)
    if len(different) < n_needed:
        raise TooFewPictures(
            f"{who} needs at least {n_needed} different normal pictures, got {len(rows)} of which {len(different)} "
            "differ. Add photographs of the artwork to train/good."
        )
    return different


def _patches(features: Features) -> np.ndarray:
    if features.patches is None:
        raise ValueError("Patch k-NN needs patch tokens; embed the pictures with patches=True.")
    return features.patches


def _patch_rows(features: Features) -> np.ndarray:
    patches = _patches(features)
    return patches.reshape(-1, patches.shape[-1])
