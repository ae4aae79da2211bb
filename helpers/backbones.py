"""CLIP models through open_clip, each with its own preprocessing, so that the two cannot drift apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

ART_VIT_MINI = "art-vit-mini"
"""Name of the small tower of the ``mini`` profile: open_clip modules, quick GELU, 14 x 14 patches at 112 px."""

ART_VIT_MINI_CONFIG = {
    "embed_dim": 192,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 112, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}


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
        model = _art_vit_mini()
        tokenizer = open_clip.get_tokenizer("ViT-B-32")
        weights = "seed 0"
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


def square_preprocess(image_size: int) -> Callable[[np.ndarray], torch.Tensor]:
    """CLIP's preprocessing without its centre crop: a tall painting is squashed, not beheaded."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    config = PreprocessCfg(size=(image_size, image_size), resize_mode="squash", interpolation="bicubic")
    transform = image_transform_v2(config, is_train=False)
    return lambda image: transform(Image.fromarray(image))


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over a model's parameter names and bytes, for checkpoints that depend on it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _art_vit_mini() -> torch.nn.Module:
    """The small tower with random weights of a fixed seed; the global random state stays as it was."""
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.CLIP(**ART_VIT_MINI_CONFIG)
