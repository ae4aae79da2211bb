"""ImageBind's image and text towers, run inside open_clip's CLIP modules.

ImageBind-huge differs from open_clip's ViT-H-14 in names only, once the LayerNorms' epsilon is 1e-6 (set by the
configuration file that notebook 01 writes). AnomalyGPT reads the raw tokens of four image blocks, the image embedding,
and the text features of "a photo of a flawless / damaged ..." sentences. The text features of a name never change:
they are computed once, kept on disk, and the text tower is not loaded again.

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
_WITHOUT = [f"{{}} without {what}" for what in ("flaw", "defect", "damage")]
NORMAL_STATES = ("{}", "flawless {}", "perfect {}", "unblemished {}", *_WITHOUT)
ABNORMAL_STATES = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
TEMPLATES = ("a photo of a {}.", "a photo of the {}.")


@dataclass(frozen=True)
class ImageFeatures:
    """What AnomalyGPT reads of a batch of pictures."""

    embedding: torch.Tensor  # float (B, J), unit norm
    taps: torch.Tensor  # float (T, B, N, W), raw patch tokens of the tapped blocks, from the top left, no class token

    def __len__(self) -> int:
        return self.embedding.shape[0]

    def take(self, indices: Sequence[int]) -> ImageFeatures:
        """The features of some pictures."""
        chosen = list(indices)
        return ImageFeatures(self.embedding[chosen], self.taps[:, chosen])

    def to(self, device: torch.device | str) -> ImageFeatures:
        """On a device: taps stay in half precision on a GPU and become float32 on a CPU, which computes in it."""
        taps = self.taps.to(device)
        return ImageFeatures(self.embedding.to(device), taps if taps.is_cuda else taps.float())

    @staticmethod
    def join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Batches one after the other."""
        return ImageFeatures(torch.cat([p.embedding for p in parts]), torch.cat([p.taps for p in parts], dim=1))


@dataclass(frozen=True)
class ImageBind:
    """ImageBind's image tower with its preprocessing."""

    visual: nn.Module  # open_clip's vision transformer, eval mode, frozen
    taps: tuple[int, ...]  # zero-based blocks whose output tokens are read
    weights_id: str = ""  # hash of the weights

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return int(self.visual.image_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row."""
        return tuple(self.visual.grid_size)

    @property
    def width(self) -> int:
        """Width of the tapped tokens."""
        return self.visual.class_embedding.shape[0]

    @property
    def joint_width(self) -> int:
        """Width of the embedding that images and texts share."""
        return self.visual.proj.shape[1]

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``, see :func:`preprocess`."""
        return preprocess(image, self.image_size)

    def features(self, pixels: torch.Tensor) -> ImageFeatures:
        """Embedding and taps of preprocessed pictures, float ``(B, 3, S, S)``, in one pass; no gradients."""
        with torch.no_grad():
            weight = self.visual.class_embedding
            pixels = pixels.to(weight.device, weight.dtype)
            out = self.visual.forward_intermediates(pixels, indices=list(self.taps), output_fmt="NLC")
            embedding = nn.functional.normalize(out["image_features"].float(), dim=-1)
            return ImageFeatures(embedding, torch.stack(out["image_intermediates"]))

    def embed_images(self, images: Sequence[np.ndarray], *, batch_size: int = 32) -> ImageFeatures:
        """Features of pictures uint8 RGB ``(H, W, 3)`` of any sizes, in batches."""
        starts = range(0, len(images), batch_size)
        batches = (torch.stack([self.preprocess(i) for i in images[start : start + batch_size]]) for start in starts)
        return ImageFeatures.join([self.features(batch) for batch in batches])


def preprocess(image: np.ndarray, size: int, *, mode: str = "squash") -> torch.Tensor:
    """Resize bicubically and normalise as CLIP does (open_clip's own transform; equal to ImageBind's bit for bit).

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        size: side S of the output in pixels.
        mode: ``"squash"`` resizes both sides to S (training and demo of the published code; nothing is cut off a tall
            painting); ``"shortest"`` resizes the short side to S and cuts the centre (its benchmark scripts).
    Returns:
        float32 ``(3, S, S)``.
    Raises:
        ValueError: the picture is not uint8 RGB.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A picture must be uint8 RGB (H, W, 3), got {image.dtype} {image.shape}. Use load_image.")
    transform = image_transform_v2(PreprocessCfg(size=size, resize_mode=mode), is_train=False)
    return transform(Image.fromarray(image))


def load_imagebind(folder: Path, *, device: str = "cpu") -> ImageBind:
    """Load the image tower that notebook 01 prepared: float32 on a CPU, as stored (float16) on a GPU.

    Raises:
        FileNotFoundError: the folder is incomplete; names notebook 01.
        ValueError: keys or shapes are not those of ``config.json`` (arguments of ``open_clip.CLIP``).
    """
    config, state = _prepared(folder, visual=True)
    if device == "cpu":
        state = {key: tensor.float() for key, tensor in state.items()}
    return image_tower(build_clip(config, state, part="visual"), device=device, weights_id=_weights_id(folder))


def image_tower(model: nn.Module, *, device: str = "cpu", weights_id: str = "") -> ImageBind:
    """The image tower of an ``open_clip.CLIP`` with the taps of AnomalyGPT: the last block of each quarter."""
    visual = model.visual.eval().requires_grad_(False).to(device)
    return ImageBind(visual, tap_blocks(visual.transformer.layers), weights_id)


def tap_blocks(n_blocks: int) -> tuple[int, ...]:
    """Zero-based blocks whose tokens AnomalyGPT reads: the last one of each quarter.

    >>> tap_blocks(32)
    (7, 15, 23, 31)

    Raises:
        ValueError: 4 does not divide the number of blocks.
    """
    if n_blocks % N_TAPS:
        raise ValueError(f"The image tower has {n_blocks} blocks; AnomalyGPT taps quarters, so 4 must divide it.")
    return tuple(n_blocks // N_TAPS * (quarter + 1) - 1 for quarter in range(N_TAPS))


def build_clip(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, part: str) -> nn.Module:
    """``open_clip.CLIP`` holding ``state`` in one tower, without random initialisation and second copy in memory.

    Args:
        config: arguments of ``open_clip.CLIP``; both towers need ``norm_kwargs={"eps": 1e-6}``.
        state: tensors of the wanted tower under open_clip's names.
        part: ``"visual"`` or ``"text"``; the other tower has no weights.
    Raises:
        ValueError: an epsilon other than 1e-6, or keys or shapes differ.
    """
    import open_clip

    for tower in ("vision_cfg", "text_cfg"):
        epsilon = config[tower].get("norm_kwargs", {}).get("eps")
        if epsilon != 1e-6:
            raise ValueError(
                f"{tower} has LayerNorm eps {epsilon or 'of open_clip, 1e-5'}; ImageBind has 1e-6. "
                "Run notebook 01 again, it writes norm_kwargs into config.json."
            )
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    if part == "visual":
        state = {key.removeprefix("visual."): tensor for key, tensor in state.items()}
        load_strictly(model.visual, state, "ImageBind's image tower", "Run notebook 01 again.")
    else:
        model.visual = None
        load_strictly(model, state, "ImageBind's text tower", "Run notebook 01 again.")
        length = config["text_cfg"]["context_length"]
        # the causal mask is no weight, so it was left on the meta device
        model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)
    return model.eval().requires_grad_(False)


def load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], what: str, hint: str) -> None:
    """Let a module hold these very tensors, every key accounted for.

    Raises:
        ValueError: torch's list of missing, unexpected and misshapen keys, in one line, and the hint.
    """
    try:
        module.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        told = " ".join(str(error).partition(":\n")[2].split())
        raise ValueError(f"These are not the weights of {what}: {told[:300]} {hint}") from None


def sentences(name: str) -> tuple[list[str], list[str]]:
    """The 14 normal and 10 abnormal sentences of a name, in the published order."""
    normal = [template.format(state.format(name)) for state in NORMAL_STATES for template in TEMPLATES]
    abnormal = [template.format(state.format(name)) for state in ABNORMAL_STATES for template in TEMPLATES]
    return normal, abnormal


def encode_text_pair(model: nn.Module, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokenised sentences, int64 ``(14, L)`` and ``(10, L)`` -> features float32 ``(2, J)``, normal first, unit norm.

    ImageBind's text scale cancels in the normalisation.
    """
    with torch.no_grad():
        means = [model.encode_text(group, normalize=True).float().mean(dim=0) for group in tokens]
        return nn.functional.normalize(torch.stack(means), dim=-1)


def text_pair(folder: Path, *, cache_dir: Path, device: str = "cpu") -> torch.Tensor:
    """Text features of "object", float32 ``(2, J)`` on the CPU: the released weights were most likely trained with it.

    They are kept in ``cache_dir``; the text tower in ``folder`` is loaded only where they are not known.
    """
    import open_clip
    from safetensors.torch import load_file, save_file

    path = Path(cache_dir) / f"imagebind_text_{_weights_id(folder)[:16]}_object.safetensors"
    if not path.exists():
        config, state = _prepared(folder, visual=False)
        model = build_clip(config, {key: tensor.float() for key, tensor in state.items()}, part="text").to(device)
        tokens = [open_clip.get_tokenizer("ViT-H-14")(group).to(device) for group in sentences("object")]
        with files.atomic_path(path) as temporary:
            save_file({"pair": encode_text_pair(model, tokens).cpu().contiguous()}, temporary)
    return load_file(path)["pair"]


def _prepared(folder: Path, *, visual: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration, and the tensors of one tower."""
    from safetensors import safe_open

    config, path = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    if not config.exists() or not path.exists():
        raise FileNotFoundError(f"No prepared ImageBind weights in {folder}. Run notebook 01_prepare_weights.")
    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys() if key.startswith("visual.") == visual}
    return files.read_json(config), state


def _weights_id(folder: Path) -> str:
    """Hash of the weights: from ``READY.json`` where notebook 01 recorded it, else of the file."""
    ready = Path(folder) / "READY.json"
    if ready.exists():
        return files.read_json(ready)["files"]["model.safetensors"]["sha256"]
    return files.sha256_file(Path(folder) / "model.safetensors")
