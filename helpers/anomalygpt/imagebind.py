"""ImageBind's image and text towers, run inside open_clip's CLIP modules.

ImageBind-huge differs from open_clip's ViT-H-14 in names only, once the LayerNorms' epsilon is 1e-6 (set by the
configuration file that notebook 01 writes). AnomalyGPT reads the raw tokens of four image blocks, the image embedding,
and the text features of "a photo of a flawless / damaged ..." sentences. The text features of a name never change:
they are computed once, kept on disk, and the text tower is not loaded again.

Source: Girdhar et al., ImageBind, CVPR 2023; Gu et al., AnomalyGPT, AAAI 2024 (prompt ensemble and taps).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files as storage

if TYPE_CHECKING:
    import torch

    from helpers.records import Sample

N_TAPS = 4
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESS_MODES = ("squash", "crop")

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ABNORMAL_STATES = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
TEMPLATES = ("a photo of a {}.", "a photo of the {}.")

PUBLISHED_NAMES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper", "object", "candle", "cashew", "chewinggum", "fryum", "macaroni",
    "pcb", "pipe fryum",
)  # fmt: skip
"""Names that the published test code looks for in the question, in its order."""


@dataclass(frozen=True)
class ImageFeatures:
    """What AnomalyGPT reads of a batch of pictures.

    Attributes:
        embedding: float ``(B, J)``, unit norm.
        taps: float ``(T, B, N, W)``, raw patch tokens after the tapped blocks, row-major from the top left, class
            token dropped.
    """

    embedding: torch.Tensor
    taps: torch.Tensor

    def __len__(self) -> int:
        return self.embedding.shape[0]

    def take(self, indices: Sequence[int] | torch.Tensor) -> ImageFeatures:
        """The features of some pictures."""
        return ImageFeatures(self.embedding[indices], self.taps[:, indices])

    @staticmethod
    def join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Batches one after the other."""
        import torch

        return ImageFeatures(torch.cat([p.embedding for p in parts]), torch.cat([p.taps for p in parts], dim=1))


@dataclass(frozen=True)
class ImageBind:
    """ImageBind's image tower with its preprocessing.

    Attributes:
        visual: ``open_clip`` vision transformer, eval mode, frozen.
        image_size: side of the square input in pixels.
        taps: zero-based blocks whose output tokens are read.
        weights_id: hash of the weights, part of cache keys.
    """

    visual: torch.nn.Module
    image_size: int
    taps: tuple[int, ...]
    weights_id: str = ""

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

    @property
    def device(self) -> torch.device:
        return self.visual.class_embedding.device

    def preprocess(self, image: np.ndarray, *, mode: str = "squash") -> torch.Tensor:
        """uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``; see :func:`preprocess`."""
        return preprocess(image, self.image_size, mode=mode)

    def features(self, pixels: torch.Tensor) -> ImageFeatures:
        """Embedding and taps of preprocessed pictures, float ``(B, 3, S, S)``, in one pass; no gradients."""
        import torch

        with torch.no_grad():
            pixels = pixels.to(self.device, self.visual.class_embedding.dtype)
            out = self.visual.forward_intermediates(pixels, indices=list(self.taps), output_fmt="NLC")
            embedding = torch.nn.functional.normalize(out["image_features"].float(), dim=-1)
            return ImageFeatures(embedding, torch.stack(out["image_intermediates"]))

    def embed_images(
        self, images: Sequence[np.ndarray], *, mode: str = "squash", batch_size: int = 32
    ) -> ImageFeatures:
        """Features of pictures uint8 RGB ``(H, W, 3)`` of any sizes, in batches."""
        import torch

        parts = []
        for start in range(0, len(images), batch_size):
            chosen = images[start : start + batch_size]
            parts.append(self.features(torch.stack([self.preprocess(image, mode=mode) for image in chosen])))
        return ImageFeatures.join(parts)


class FeatureCache:
    """Features of pictures on disk, one file per picture, computed once for training, tests and chat.

    Taps are kept in float16, as the published chain computes them (2.6 MB per picture at full size).

    Args:
        eyes: the image tower.
        folder: where the files go; a folder per weights, input size and mode is made in it. None keeps nothing.
        mode: preprocessing.
        batch_size: pictures per pass.
    """

    def __init__(self, eyes: ImageBind, folder: Path | None, *, mode: str = "squash", batch_size: int = 16) -> None:
        self._eyes, self._mode, self._batch_size = eyes, mode, batch_size
        key = f"imagebind_{eyes.weights_id[:16]}_{eyes.image_size}_{mode}"
        self._folder = None if folder is None else Path(folder) / key

    def features(self, samples: Sequence[Sample]) -> tuple[ImageFeatures, np.ndarray]:
        """Features of pictures on the CPU, taps float16, and the seconds each one took when it was computed.

        Raises:
            helpers.data.images.ImageError: a picture cannot be read.
        """
        import torch
        from safetensors.torch import load_file
        from tqdm.auto import tqdm

        rows: list[dict[str, torch.Tensor]] = [{} for _ in samples]
        missing = []
        for number, sample in enumerate(samples):
            path = self._path(sample)
            if path is not None and path.exists():
                rows[number] = load_file(path)
            else:
                missing.append(number)
        starts = range(0, len(missing), self._batch_size)
        for start in tqdm(starts, desc="image features", unit="batch", disable=len(starts) < 2):
            chosen = missing[start : start + self._batch_size]
            for number, row in zip(chosen, self._compute([samples[i] for i in chosen])):
                rows[number] = row
        joined = ImageFeatures(
            torch.stack([row["embedding"] for row in rows]), torch.stack([row["taps"] for row in rows], dim=1)
        )
        return joined, np.array([float(row["seconds"]) for row in rows])

    def _compute(self, samples: Sequence[Sample]) -> list[dict[str, torch.Tensor]]:
        import torch
        from safetensors.torch import save_file

        from helpers.data import images

        started = time.perf_counter()
        features = self._eyes.embed_images([images.load_image(s.image_path) for s in samples], mode=self._mode)
        seconds = torch.tensor((time.perf_counter() - started) / len(samples))
        rows = []
        for number, sample in enumerate(samples):
            row = {
                "embedding": features.embedding[number].cpu().contiguous(),
                "taps": features.taps[:, number].half().cpu().contiguous(),
                "seconds": seconds,
            }
            path = self._path(sample)
            if path is not None:
                with storage.atomic_path(path) as temporary:
                    save_file(row, temporary)
            rows.append(row)
        return rows

    def _path(self, sample: Sample) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{(sample.sha256 or storage.sha256_file(sample.image_path))[:32]}.safetensors"


def preprocess(image: np.ndarray, size: int, *, mode: str = "squash") -> torch.Tensor:
    """Resize bicubically and normalise as CLIP does.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        size: side S of the output in pixels.
        mode: ``"squash"`` resizes both sides to S (training and demo of the published code; nothing is cut off a tall
            painting); ``"crop"`` resizes the short side to S and cuts the centre (its benchmark scripts).
    Returns:
        float32 ``(3, S, S)``.
    Raises:
        ValueError: ``mode`` is neither, or the picture is not uint8 RGB.
    """
    from PIL import Image
    from torchvision.transforms import InterpolationMode, functional

    if mode not in PREPROCESS_MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(PREPROCESS_MODES)}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A picture must be uint8 RGB (H, W, 3), got {image.dtype} {image.shape}. Use load_image.")
    picture = Image.fromarray(image)
    target = [size, size] if mode == "squash" else size
    picture = functional.resize(picture, target, InterpolationMode.BICUBIC)
    if mode == "crop":
        picture = functional.center_crop(picture, [size, size])
    return functional.normalize(functional.to_tensor(picture), MEAN, STD)


def load_imagebind(folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> ImageBind:
    """Load the image tower that notebook 01 prepared (``imagebind/`` of the weights folder).

    Args:
        folder: holds ``config.json`` (arguments of ``open_clip.CLIP``) and ``model.safetensors``.
        device: torch device name.
        dtype: of the weights; default float32 on a CPU, as stored (float16) on a GPU.
    Raises:
        FileNotFoundError: the folder is incomplete; names notebook 01.
        ValueError: keys or shapes are not those of the configuration.
    """
    import torch
    from safetensors.torch import load_file

    config, path = _prepared(folder)
    state = {key: tensor for key, tensor in load_file(path).items() if key.startswith("visual.")}
    dtype = dtype or (torch.float32 if device == "cpu" else None)
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    model = build_clip(config, state, part="visual")
    return image_tower(model, device=device, weights_id=_weights_id(folder))


def image_tower(model: torch.nn.Module, *, device: str = "cpu", weights_id: str = "") -> ImageBind:
    """The image tower of an ``open_clip.CLIP`` with the taps of AnomalyGPT: the last block of each quarter."""
    visual = model.visual.eval().requires_grad_(False).to(device)
    return ImageBind(visual, int(visual.image_size[0]), tap_blocks(visual.transformer.layers), weights_id)


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


def build_clip(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, part: str = "all") -> torch.nn.Module:
    """``open_clip.CLIP`` holding ``state``, without random initialisation and without a second copy in memory.

    Args:
        config: arguments of ``open_clip.CLIP``; both towers need ``norm_kwargs={"eps": 1e-6}``.
        state: tensors under open_clip's names.
        part: ``"all"``, or ``"visual"`` / ``"text"`` when the other tower is not wanted (it stays on ``meta``).
    Raises:
        ValueError: an epsilon other than 1e-6, or keys or shapes differ.
    """
    import open_clip
    import torch

    for tower in ("vision_cfg", "text_cfg"):
        epsilon = config[tower].get("norm_kwargs", {}).get("eps")
        if epsilon != 1e-6:
            raise ValueError(
                f"{tower} has LayerNorm eps {epsilon or 'of open_clip, 1e-5'}; ImageBind has 1e-6. "
                "Run notebook 01 again, it writes norm_kwargs into config.json."
            )
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items() if _belongs(key, part)}
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    reshaped = [k for k in wanted.keys() & state.keys() if wanted[k] != state[k].shape]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"These are not the ImageBind weights of this configuration: missing {missing[:3]} ({len(missing)}), "
            f"unexpected {unexpected[:3]} ({len(unexpected)}), other shape {sorted(reshaped)[:3]}. "
            "Run notebook 01 again."
        )
    model.load_state_dict(dict(state), strict=part == "all", assign=True)
    length = config["text_cfg"]["context_length"]
    # The causal mask is no weight, so it was left on the meta device.
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)
    return model.eval().requires_grad_(False)


def sentences(name: str) -> tuple[list[str], list[str]]:
    """The 14 normal and 10 abnormal sentences of a name, in the published order."""
    normal = [template.format(state.format(name)) for state in NORMAL_STATES for template in TEMPLATES]
    abnormal = [template.format(state.format(name)) for state in ABNORMAL_STATES for template in TEMPLATES]
    return normal, abnormal


def published_name(prompt: str) -> str:
    """The name whose text features the published test code takes for a question: the first one that occurs in it.

    Art questions hold none, which gives ``"object"``; the released weights were most likely trained with that name.

    >>> published_name("This is a photo of many small capsules for anomaly detection")
    'capsule'
    >>> published_name("This is a painting.")
    'object'
    """
    return next((name for name in PUBLISHED_NAMES if name in prompt), "object")


def encode_text_pair(model: torch.nn.Module, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Text features of one name.

    Args:
        model: ``open_clip.CLIP`` with its text tower.
        tokens: int64 ``(14, L)`` and ``(10, L)``: tokenised normal and abnormal sentences.
    Returns:
        float32 ``(2, J)``, unit norm, normal first. (ImageBind's text scale cancels in the normalisation.)
    """
    import torch

    with torch.no_grad():
        means = [model.encode_text(group, normalize=True).float().mean(dim=0) for group in tokens]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def text_pairs(
    folder: Path, names: Sequence[str], *, cache_dir: Path | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Normal and abnormal text features of names, from the cache where it has them.

    Args:
        folder: prepared ImageBind weights; the text tower is loaded only for names that the cache lacks.
        names: what the pictures show, for example ``"object"`` or ``"metal nut"``; underscores become spaces.
        cache_dir: where the features are kept, one file per weights.
        device: where missing ones are computed.
    Returns:
        name as asked -> float32 ``(2, J)`` on the CPU.
    """
    from safetensors.torch import load_file, save_file

    spelled = {name: name.replace("_", " ") for name in names}
    path = None if cache_dir is None else Path(cache_dir) / f"imagebind_text_{_weights_id(folder)[:16]}.safetensors"
    known = load_file(path) if path is not None and path.exists() else {}
    missing = sorted(set(spelled.values()) - known.keys())
    if missing:
        known |= _encode_names(folder, missing, device)
        if path is not None:
            with storage.atomic_path(path) as temporary:
                save_file(known, temporary)
    return {name: known[spelling] for name, spelling in spelled.items()}


def _encode_names(folder: Path, names: Sequence[str], device: str) -> dict[str, torch.Tensor]:
    import open_clip
    from safetensors.torch import load_file

    config, path = _prepared(folder)
    state = {key: tensor.float() for key, tensor in load_file(path).items() if not key.startswith("visual.")}
    model = build_clip(config, state, part="text")
    model.visual = None  # on meta
    model = model.to(device)
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    pairs = {}
    for name in names:
        tokens = [tokenizer(group).to(device) for group in sentences(name)]
        pairs[name] = encode_text_pair(model, tokens).cpu().contiguous()
    return pairs


def _prepared(folder: Path) -> tuple[dict[str, Any], Path]:
    folder = Path(folder)
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"No prepared ImageBind weights in {folder}. Run notebook 01_prepare_weights.")
    return json.loads((folder / "config.json").read_text()), folder / "model.safetensors"


def _weights_id(folder: Path) -> str:
    """Hash of the weights: from ``READY.json`` where notebook 01 recorded it, else of the file."""
    ready = Path(folder) / "READY.json"
    if ready.exists():
        return storage.read_json(ready)["files"]["model.safetensors"]["sha256"]
    return storage.sha256_file(Path(folder) / "model.safetensors")


def _belongs(key: str, part: str) -> bool:
    return part == "all" or key.startswith("visual.") == (part == "visual")
