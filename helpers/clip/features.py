"""Pictures -> features, computed once and kept: one pass serves all methods that work on features.

The cache goes by the picture's name (a hash), the networks, their preprocessing and the layers, so that a changed
picture or network is never served old features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers import caching
from helpers.data import images
from helpers.records import Sample

if TYPE_CHECKING:
    from helpers.clip.backbones import Clip, Cnn

CACHE_FORMAT = 2
"""Part of every cache key; raise it when the meaning of a cached array changes."""
STEPS = ("read", "clip", "patches", "cnn")
"""What is timed, the columns of :attr:`Features.seconds`."""


@dataclass(frozen=True)
class Models:
    """The two networks of the room (without ``cnn`` only CLIP looks), the folder of the cache, pictures per pass."""

    clip: Clip
    cnn: Cnn | None
    cache_dir: Path
    batch_size: int = 32


@dataclass(frozen=True)
class Features:
    """Features of ``n`` pictures; row ``i`` of every array belongs to picture ``i``.

    Attributes:
        ids: name of each picture: the sha256 of its file, or how it was made.
        clip: float32 ``(n, e)``, CLIP image embedding in the joint space, not normalised.
        cnn: float32 ``(n, c)``, global average pooled features of the CNN, not normalised; ``(n, 1)`` without one.
        patches: float16 ``(n, g, g, d)``, CLIP patch tokens of the layers of :func:`patch_layers`, each layer's token
            normalised to length 1 and the layers stacked: a dot product over their number is the mean cosine.
        seconds: float32 ``(n, 4)``, time of :data:`STEPS` for each picture (its share of the batch), as measured when
            it was computed, also when the features come from the cache.
    """

    ids: tuple[str, ...]
    clip: np.ndarray
    cnn: np.ndarray
    patches: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> Features:
        """The pictures at these positions (integers, or a bool mask), in this order."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.intp)
        return Features(tuple(self.ids[i] for i in chosen), **{name: getattr(self, name)[chosen] for name in _ARRAYS})

    def of(self, samples: Sequence[Sample]) -> Features:
        """The rows of these samples, found by sha256; a KeyError names one that was not embedded."""
        rows = {key: row for row, key in enumerate(self.ids)}
        return self.take([rows[sample.sha256] for sample in samples])

    def seconds_of(self, steps: Sequence[str]) -> np.ndarray:
        """Seconds of some of :data:`STEPS`, summed: float64 ``(n,)``."""
        return self.seconds[:, [STEPS.index(step) for step in steps]].astype(np.float64).sum(axis=1)

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """All pictures of ``parts`` one after the other."""
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return Features(tuple(key for part in parts for key in part.ids), **joined)


_ARRAYS = tuple(field.name for field in fields(Features) if field.name != "ids")


def patch_layers(n_layers: int) -> tuple[int, ...]:
    """Zero-based blocks whose outputs describe patches: the middle of the tower and three quarters of it.

    The last block is trained to feed the class token only, its patch tokens are the least local ones. PatchCore and
    WinCLIP's reference memory take middle layers for the same reason.

    >>> patch_layers(24)
    (11, 17)
    """
    return tuple(sorted({max(n_layers // 2 - 1, 0), max(n_layers * 3 // 4 - 1, 0)}))


def embed_samples(samples: Sequence[Sample], models: Models) -> Features:
    """Features of pictures of a dataset, by the sha256 of their files; see :func:`embed`."""
    ids = [sample.sha256 for sample in samples]
    return embed(ids, lambda row: images.load_image(samples[row].image_path), models)


def embed(ids: Sequence[str], read: Callable[[int], np.ndarray], models: Models) -> Features:
    """Features of pictures, from the cache where it has them; an interrupted pass goes on where it stopped.

    Args:
        ids: a name for each picture, equal only for equal pictures; not empty.
        read: row -> uint8 RGB ``(H, W, 3)``; called for pictures that the cache does not know.
        models: the networks, the cache and the size of batches.
    Raises:
        ValueError: no picture, a picture without name, or features that are not finite.
    """
    if not ids or not all(ids):
        raise ValueError(f"{len(ids)} pictures to embed; at least one, and a sha256 for each, is needed.")

    def compute(rows: Sequence[int]) -> dict[str, np.ndarray]:
        return _embed_batch([ids[row] for row in rows], [_timed(read, row) for row in rows], models)

    key = {
        "format": CACHE_FORMAT,
        "clip": models.clip.model_id,
        "cnn": None if models.cnn is None else models.cnn.model_id,
        "patch_layers": list(patch_layers(len(models.clip.model.visual.transformer.resblocks))),
    }
    arrays = caching.cached_arrays(models.cache_dir, key, ids, compute, batch_size=models.batch_size)
    return Features(tuple(ids), **arrays)


def _timed(make: Callable, *values: object) -> tuple:
    start = time.perf_counter()
    made = make(*values)
    return made, time.perf_counter() - start


def _embed_batch(ids: Sequence[str], read: Sequence[tuple[np.ndarray, float]], models: Models) -> dict[str, np.ndarray]:
    """Arrays of some pictures, given with the seconds it took to read each."""
    pictures = [picture for picture, _ in read]
    (embedding, layers), clip_seconds = _timed(_look, models.clip, pictures)
    patches, patch_seconds = _timed(_stack, layers)
    pooled, cnn_seconds = _timed(_pool, models.cnn, pictures)
    for network, array in ((models.clip, embedding), (models.clip, patches), (models.cnn, pooled)):
        bad = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        if bad.any():
            raise ValueError(
                f"The features of {bad.sum()} pictures are not finite, first {ids[bad.argmax()]}. "
                f"Check the weights of {network.model_id}."
            )
    shares = np.array([clip_seconds, patch_seconds, cnn_seconds]) / len(ids)
    seconds = np.array([[spent, *shares] for _, spent in read], np.float32)
    return {"clip": embedding, "cnn": pooled, "patches": patches, "seconds": seconds}


def _look(clip: Clip, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, list]:
    """Image embeddings, float32 ``(n, e)``, and the patch tokens of :func:`patch_layers`."""
    import torch

    tower = clip.model.visual
    layers = list(patch_layers(len(tower.transformer.resblocks)))
    pixels = torch.stack([clip.preprocess(picture) for picture in pictures])
    with torch.inference_mode():
        pixels = pixels.to(next(tower.parameters()).device)
        output = tower.forward_intermediates(pixels, indices=layers, output_fmt="NLC")
    return output["image_features"].float().cpu().numpy(), output["image_intermediates"]


def _stack(layers: Sequence) -> np.ndarray:
    """Tokens of some layers, each float ``(n, g * g, d)``, to float16 ``(n, g, g, layers * d)`` with unit layers."""
    import torch

    stacked = torch.cat([torch.nn.functional.normalize(layer.float(), dim=-1) for layer in layers], dim=-1)
    n, n_tokens, width = stacked.shape
    side = round(n_tokens**0.5)
    return stacked.reshape(n, side, side, width).to(torch.float16).cpu().numpy()


def _pool(cnn: Cnn | None, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pooled features, float32 ``(n, c)``."""
    import torch

    if cnn is None:
        return np.zeros((len(pictures), 1), np.float32)
    inputs = torch.stack([cnn.preprocess(picture) for picture in pictures])
    inputs = inputs.to(next(cnn.model.parameters()).device, memory_format=torch.channels_last)
    with torch.inference_mode():
        return cnn.model(inputs).float().cpu().numpy()
