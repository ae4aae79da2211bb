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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ("mini", "full")
MIN_FULL_GPU_GB = 20
"""GPU memory from which ``full`` is chosen by itself: the 7B chain in bf16 with its batches (an L4 has 22.5 GB)."""


@dataclass(frozen=True)
class Profile:
    """Every number that differs between the profiles, and where things lie.

    Attributes:
        name: ``"mini"`` or ``"full"``.
        reason: why this profile was chosen, in words.
        home: ``$ART_HOME/<profile>``, root of everything that is written.
        data_source: the user's folder (``ART_DATA``), or None for the profile's own pictures.
        device: torch device name.
        seed: seed of every random choice.
        max_image_side: longer side in pixels of the pictures in the dataset.
        n_train, n_calibration: normal pictures per artwork to learn from and to set thresholds with.
        n_test_normal, n_test_anomalous: test pictures per artwork made by notebook 02.
        alpha: false-alarm rate that the conformal threshold aims at.
        clip_model, clip_pretrained: open_clip names (see :mod:`helpers.clip.backbones`).
        clip_image_size: side of CLIP's square input in pixels.
        cnn_model: timm name of the ImageNet network beside CLIP.
        batch_size: pictures per forward pass.
        n_trials: settings tried by each hyper-parameter search.
        max_epochs: upper limit of the cross-entropy head's training.
        llama_size: language model prepared by notebook 01: ``"7B"``, ``"13B"`` or ``"mini"``.
        weights_shard_bytes: largest weight file written.
        fuse_merge: merge straight from Meta's files, without writing the converted base.
        delete_raw_weights: delete raw weight files as soon as they are used up.
        n_synthetic: synthetic anomalies made for each painting, to train the head and to search settings.
        max_bank_rows: patches in the memory bank of the patch k-NN method.
        anomalyclip_image_size, anomalyclip_sigma: side of its square input, and smoothing of its maps, in pixels.
        anomalyclip_prompts: published prompts, by the dataset they were trained on.
        anomalyclip_row: prompts that make the row of the comparison: ``"published"``, ``"own"``, or ``"best"`` on the
            tuning pictures.
        anomalyclip_batch_size: pictures per forward pass.
        auxiliary: pictures to train own prompts on: ``"best_artworks"``, ``"packages"`` or a folder.
        auxiliary_views: crops per auxiliary picture, half of them damaged.
        auxiliary_limit: auxiliary pictures per artist.
        prompt_epochs: upper limit of the training of own prompts; 0 only tests.
        anomalygpt_checkpoint: published head that training starts from; None starts anew.
        anomalygpt_precision: of the language model.
        anomalygpt_preset: run of the source report, by epochs x batch.
        anomalygpt_training: what differs from the preset, see :class:`helpers.anomalygpt.training.HeadTraining`.
        anomalygpt_testing: see :class:`helpers.anomalygpt.evaluation.TestSettings`.
    """

    name: str
    reason: str
    home: Path
    data_source: Path | None
    device: str
    seed: int = 2024
    alpha: float = 0.05
    # data
    max_image_side: int = 1024
    n_train: int = 80
    n_calibration: int = 40
    n_test_normal: int = 16
    n_test_anomalous: int = 34
    # CLIP methods
    clip_model: str = "ViT-L-14-336-quickgelu"
    clip_pretrained: str | None = "openai"
    clip_image_size: int = 336
    cnn_model: str = "resnet50"
    batch_size: int = 32
    n_trials: int = 24
    max_epochs: int = 200
    # weights
    llama_size: str = "7B"
    weights_shard_bytes: int = 2_000_000_000
    fuse_merge: bool = True
    delete_raw_weights: bool = False
    n_synthetic: int = 600
    max_bank_rows: int = 40_000
    # AnomalyCLIP
    anomalyclip_image_size: int = 518
    anomalyclip_sigma: float = 4.0
    anomalyclip_prompts: str = "trained_on_mvtec"
    anomalyclip_row: str = "published"
    anomalyclip_batch_size: int = 8
    auxiliary: str = "best_artworks"
    auxiliary_views: int = 2
    auxiliary_limit: int = 8
    prompt_epochs: int = 15
    # AnomalyGPT
    anomalygpt_checkpoint: str | None = "train_supervised"
    anomalygpt_precision: str = "bf16"
    anomalygpt_preset: str = "15x8"
    anomalygpt_training: Mapping[str, Any] = field(
        default_factory=lambda: {"micro_batch": 4, "gradient_checkpointing": True, "precision": "bf16"}
    )
    anomalygpt_testing: Mapping[str, Any] = field(default_factory=dict)

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


_MINI = {
    "max_image_side": 288,
    "n_train": 50,
    "n_calibration": 20,
    "clip_model": "art-vit-mini",
    "clip_pretrained": None,
    "clip_image_size": 224,
    "cnn_model": "efficientnet_lite0",
    "n_trials": 8,
    "max_epochs": 120,
    "llama_size": "mini",
    "weights_shard_bytes": 120_000_000,
    "fuse_merge": False,
    "delete_raw_weights": True,
    "n_synthetic": 180,
    "max_bank_rows": 20_000,
    "anomalyclip_image_size": 224,
    "anomalyclip_sigma": 4.0,
    "anomalyclip_row": "best",
    "anomalyclip_batch_size": 16,
    "auxiliary": "packages",
    "auxiliary_views": 12,
    "prompt_epochs": 10,
    "anomalygpt_precision": "fp32",
    "anomalygpt_training": {
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
    "anomalygpt_testing": {
        "n_draws": 2,
        "wording": "short",
        "n_sentences": 8,
        "n_controls": 8,
        "max_new_tokens": 28,
    },
}


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
    profile = Profile(name, reason, home, _data_source(), device="cuda" if gpu else "cpu")
    return replace(profile, **_MINI) if name == "mini" else profile


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
