"""ImageBind's image and text towers, run inside open_clip's CLIP modules.

ImageBind-huge differs from open_clip's ViT-H-14 in names only, once the LayerNorms' epsilon is 1e-6 (set by the
configuration file that notebook 01 writes). AnomalyGPT reads the raw tokens of four image blocks, the image embedding,
and the text features of "a photo of a flawless / damaged object", with which the released weights were trained.

Source: Girdhar et al., ImageBind, CVPR 2023; Gu et al., AnomalyGPT, AAAI 2024 (prompt ensemble and taps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from helpers import files

N_TAPS = 4
STATES = (  # normal and abnormal
    ("{}", "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect", "{} without damage"),
    ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage"),
)
TEMPLATES = ("a photo of a {}.", "a photo of the {}.")


@dataclass(frozen=True)
class ImageFeatures:
    """What AnomalyGPT reads of a batch of pictures."""

    embedding: torch.Tensor  # float (B, J), unit norm
    taps: torch.Tensor  # float (T, B, N, W), raw patch tokens of the tapped blocks, from the top left, no class token

    def to(self, device: torch.device | str) -> ImageFeatures:
        """On a device: taps stay in half precision on a GPU and become float32 on a CPU, which computes in it."""
        taps = self.taps.to(device)
        return ImageFeatures(self.embedding.to(device), taps if taps.is_cuda else taps.float())


@dataclass(frozen=True)
class ImageBind:
    """ImageBind's image tower with its preprocessing."""

    visual: nn.Module  # open_clip's vision transformer, eval mode, frozen
    taps: tuple[int, ...]  # zero-based blocks whose output tokens are read
    image_size = property(lambda self: int(self.visual.image_size[0]))  # side of the square input in pixels
    grid = property(lambda self: tuple(self.visual.grid_size))  # patches per column and row
    width = property(lambda self: self.visual.class_embedding.shape[0])  # of the tapped tokens
    joint_width = property(lambda self: self.visual.proj.shape[1])  # of the embedding that images and texts share

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``, see :func:`preprocess`."""
        return preprocess(image, self.image_size)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> ImageFeatures:
        """Embedding and taps of preprocessed pictures, float ``(B, 3, S, S)``, in one pass; no gradients."""
        weight = self.visual.class_embedding
        pixels = pixels.to(weight.device, weight.dtype)
        out = self.visual.forward_intermediates(pixels, indices=list(self.taps), output_fmt="NLC")
        embedding = nn.functional.normalize(out["image_features"].float(), dim=-1)
        return ImageFeatures(embedding, torch.stack(out["image_intermediates"]))

    def embed_images(self, images: Sequence[np.ndarray], *, batch_size: int = 32) -> ImageFeatures:
        """Features of pictures uint8 RGB ``(H, W, 3)`` of any sizes, in batches."""
        starts = range(0, len(images), batch_size)
        batches = (torch.stack([self.preprocess(i) for i in images[start : start + batch_size]]) for start in starts)
        parts = [self.features(batch) for batch in batches]
        return ImageFeatures(torch.cat([p.embedding for p in parts]), torch.cat([p.taps for p in parts], dim=1))


def preprocess(image: np.ndarray, size: int, *, mode: str = "squash") -> torch.Tensor:
    """uint8 RGB ``(H, W, 3)`` -> float32 ``(3, size, size)``: resized bicubically and normalised as CLIP does.

    ``mode="squash"`` resizes both sides (training and demo of the published code; nothing is cut off a tall painting),
    ``"shortest"`` the short one and cuts the centre (its benchmark scripts). Equal to ImageBind's bit for bit.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A picture must be uint8 RGB (H, W, 3), got {image.dtype} {image.shape}. Use load_image.")
    transform = image_transform_v2(PreprocessCfg(size=size, resize_mode=mode), is_train=False)
    return transform(Image.fromarray(image))


def load_imagebind(folder: Path, *, device: str = "cpu") -> tuple[ImageBind, torch.Tensor]:
    """The image tower that notebook 01 prepared, and the text features of "object", float32 ``(2, J)`` on the CPU.

    The tower is float32 on a CPU and as stored (float16) on a GPU. The text tower, float32, is let go.
    """
    import open_clip
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    kept = {key for key in state if device != "cpu" and key.startswith("visual.")}
    state = {key: tensor if key in kept else tensor.float() for key, tensor in state.items()}
    model = build_clip(files.read_json(folder / "config.json"), state).to(device)
    tokens = [open_clip.get_tokenizer("ViT-H-14")(group).to(device) for group in sentences("object")]
    return image_tower(model), encode_text_pair(model, tokens).cpu()


def image_tower(model: nn.Module) -> ImageBind:
    """The image tower of an ``open_clip.CLIP``; AnomalyGPT taps the last block of each quarter."""
    quarter = model.visual.transformer.layers // N_TAPS
    return ImageBind(model.visual, tuple(quarter * (number + 1) - 1 for number in range(N_TAPS)))


def build_clip(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
    """``open_clip.CLIP(**config)`` that holds these very tensors, frozen; errors where they do not fit."""
    import open_clip

    found = {config[tower].get("norm_kwargs", {}).get("eps", 1e-5) for tower in ("vision_cfg", "text_cfg")}
    if found != {1e-6}:
        raise ValueError(f"The LayerNorms have eps {found}; ImageBind has 1e-6. Run notebook 01 again, it writes it.")
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    model.load_state_dict(state, assign=True)
    length = config["text_cfg"]["context_length"]
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)  # the causal mask is no weight
    return model.eval().requires_grad_(False)


def sentences(name: str) -> list[list[str]]:
    """The 14 normal and 10 abnormal sentences of a name, in the published order."""
    return [[template.format(state.format(name)) for state in states for template in TEMPLATES] for states in STATES]


@torch.no_grad()
def encode_text_pair(model: nn.Module, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokenised sentences, int64 ``(14, L)`` and ``(10, L)`` -> unit features float32 ``(2, J)``, normal first."""
    means = [model.encode_text(group, normalize=True).float().mean(dim=0) for group in tokens]
    return nn.functional.normalize(torch.stack(means), dim=-1)
