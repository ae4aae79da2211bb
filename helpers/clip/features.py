"""Pictures -> features, computed once and kept: one pass serves all methods that work on features.

The cache goes by the picture's name (a hash), the networks, their preprocessing and the layers, so that a changed
picture or network is never served old features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from helpers import caching
from helpers.clip.backbones import Network
from helpers.data import images
from helpers.records import Sample

CACHE_FORMAT = 3  # part of every cache key; raised when the meaning of a cached array changes
STEPS = ("read", "clip", "cnn")  # what is timed: the columns of Features.seconds


@dataclass(frozen=True)
class Models:
    """The two networks of the room, the folder of the cache, pictures per pass."""

    clip: Network
    cnn: Network
    cache_dir: Path
    batch_size: int = 32


@dataclass(frozen=True)
class Features:
    """Features of ``n`` pictures; row ``i`` of every array belongs to picture ``i``.

    Attributes:
        ids: name of each picture: the sha256 of its file, or how it was made.
        clip: float32 ``(n, e)``, CLIP image embedding in the joint space, not normalised.
        cnn: float32 ``(n, c)``, global average pooled features of the CNN, not normalised.
        patches: float16 ``(n, g, g, d)``, CLIP patch tokens of the layers of :func:`patch_layers`, each layer's token
            normalised to length 1 and the layers stacked: a dot product over their number is the mean cosine.
        seconds: float32 ``(n, 3)``, time of :data:`STEPS`, each picture's share of its batch, when it was computed.
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
        chosen = np.arange(len(self))[indices]
        return Features(tuple(self.ids[i] for i in chosen), **{name: getattr(self, name)[chosen] for name in _ARRAYS})

    def of(self, samples: Sequence[Sample]) -> Features:
        """The rows of these samples, found by sha256; a KeyError names one that was not embedded."""
        rows = {key: row for row, key in enumerate(self.ids)}
        return self.take([rows[sample.sha256] for sample in samples])

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """All pictures of ``parts`` one after the other."""
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return Features(tuple(key for part in parts for key in part.ids), **joined)


_ARRAYS = tuple(field.name for field in fields(Features) if field.name != "ids")


def patch_layers(n_layers: int) -> tuple[int, ...]:
    """Zero-based blocks whose outputs describe patches: the middle of the tower and three quarters of it, as PatchCore
    and WinCLIP's memory take them; the last block is trained to feed the class token only.

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

    ``ids`` name the pictures, equal only for equal ones; ``read``, row -> uint8 RGB ``(H, W, 3)``, is called for those
    that are new. ValueError: no picture, a picture without name, or features that are not finite.
    """
    if not ids or not all(ids):
        raise ValueError(f"{len(ids)} pictures to embed; at least one, and a sha256 for each, is needed.")

    def compute(rows: Sequence[int]) -> dict[str, np.ndarray]:
        pictures, reading = zip(*(_timed(read, row) for row in rows), strict=True)
        return _embed_batch([ids[row] for row in rows], pictures, np.array(reading), models)

    layers = list(patch_layers(len(models.clip.model.visual.transformer.resblocks)))
    names = {"clip": models.clip.model_id, "cnn": models.cnn.model_id}
    key = {"format": CACHE_FORMAT, "patch_layers": layers, **names}
    arrays = caching.cached_arrays(models.cache_dir, key, ids, compute, batch_size=models.batch_size)
    return Features(tuple(ids), **arrays)


def _timed(make: Callable, *values: object) -> tuple:
    start = time.perf_counter()
    made = make(*values)
    return made, time.perf_counter() - start


def _embed_batch(ids: Sequence[str], pictures: Sequence[np.ndarray], reading: np.ndarray, models: Models) -> dict:
    """Arrays of some pictures, given with the seconds it took to read each."""
    (embedding, patches), clip_seconds = _timed(_look, models.clip, pictures)
    pooled, cnn_seconds = _timed(_pool, models.cnn, pictures)
    for network, array in ((models.clip, embedding), (models.clip, patches), (models.cnn, pooled)):
        bad = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        if bad.any():
            which = f"The features of {bad.sum()} pictures are not finite, first {ids[bad.argmax()]}."
            raise ValueError(f"{which} Check the weights of {network.model_id}.")
    shares = [np.full(len(ids), seconds / len(ids)) for seconds in (clip_seconds, cnn_seconds)]
    seconds = np.stack([reading, *shares], axis=1).astype(np.float32)
    return {"clip": embedding, "cnn": pooled, "patches": patches, "seconds": seconds}


@torch.inference_mode()
def _look(clip: Network, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Image embeddings, float32 ``(n, e)``, and patch tokens, float16 ``(n, g, g, layers * d)`` with unit layers."""
    tower = clip.model.visual
    pixels = torch.stack([clip.preprocess(picture) for picture in pictures]).to(next(tower.parameters()).device)
    layers = list(patch_layers(len(tower.transformer.resblocks)))
    output = tower.forward_intermediates(pixels, indices=layers, output_fmt="NLC")
    tokens = [torch.nn.functional.normalize(layer.float(), dim=-1) for layer in output["image_intermediates"]]
    stacked = torch.cat(tokens, dim=-1)  # (n, g * g, layers * d)
    side = round(stacked.shape[1] ** 0.5)
    patches = stacked.unflatten(1, (side, side)).to(torch.float16)
    return output["image_features"].float().cpu().numpy(), patches.cpu().numpy()


@torch.inference_mode()
def _pool(cnn: Network, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pooled features, float32 ``(n, c)``."""
    inputs = torch.stack([cnn.preprocess(picture) for picture in pictures])
    inputs = inputs.to(next(cnn.model.parameters()).device, memory_format=torch.channels_last)
    return cnn.model(inputs).float().cpu().numpy()
