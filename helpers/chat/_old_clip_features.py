"""Kept until the chat uses the new room clip.

Pictures -> features, computed once and kept: one pass serves all methods that work on features.

Per picture: CLIP's image embedding, CLIP's patch tokens from the middle of the tower, and a CNN's pooled features.
A cache keeps them by the picture's sha256, the models, their preprocessing and the layers, so that a changed picture
or model is never served old features.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers import files as storage
from helpers.data import images
from helpers.records import Sample

if TYPE_CHECKING:
    import torch

    from helpers.clip.backbones import Clip, Cnn

CACHE_FORMAT = 1
"""Part of every cache key; raise it when the meaning of a cached array changes."""


@dataclass(frozen=True)
class Features:
    """Features of ``n`` pictures; row ``i`` of every array belongs to picture ``i``.

    Attributes:
        ids: sha256 of each picture (of the file, or of the pixels for pictures in memory).
        clip: float32 ``(n, e)``, CLIP image embedding in the joint space, not normalised.
        cnn: float32 ``(n, c)``, global average pooled features of the CNN, not normalised; ``(n, 0)`` without one.
        patches: float16 ``(n, g, g, d)``, CLIP patch tokens of the layers of :func:`patch_layers`, each layer's token
            normalised to length 1 and the layers stacked, so that a dot product divided by the number of layers is
            the mean cosine; None when they were not asked for.
        seconds: float32 ``(n,)``, measured time to read and embed each picture (its share of the batch), as measured
            when it was computed, also when the features come from the cache.
    """

    ids: tuple[str, ...]
    clip: np.ndarray
    cnn: np.ndarray
    patches: np.ndarray | None
    seconds: np.ndarray

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is not None and len(array) != len(self.ids):
                raise ValueError(f"Features of {len(self.ids)} pictures, but {name} has {len(array)} rows.")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> Features:
        """The pictures at these positions (integers, or a bool mask), in this order."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.intp)
        return Features(
            ids=tuple(self.ids[i] for i in chosen),
            **{name: None if (array := getattr(self, name)) is None else array[chosen] for name in _ARRAYS},
        )

    def of(self, samples: Sequence[Sample]) -> Features:
        """The rows of these samples, found by sha256.

        Raises:
            KeyError: a sample was not embedded.
        """
        rows = {key: row for row, key in enumerate(self.ids)}
        missing = [sample.image_path for sample in samples if sample.sha256 not in rows]
        if missing:
            raise KeyError(f"{len(missing)} pictures have no features, first {missing[0]}. Embed them first.")
        return self.take(np.array([rows[sample.sha256] for sample in samples], dtype=np.intp))

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """All pictures of ``parts`` one after the other; patches only when every part has them."""
        joined = {}
        for name in _ARRAYS:
            arrays = [getattr(part, name) for part in parts]
            joined[name] = None if any(array is None for array in arrays) else np.concatenate(arrays)
        return Features(ids=tuple(key for part in parts for key in part.ids), **joined)


_ARRAYS = tuple(field.name for field in fields(Features) if field.name != "ids")


def patch_layers(n_layers: int) -> tuple[int, int]:
    """Zero-based blocks whose outputs describe patches: the middle of the tower and three quarters of it.

    The last block is trained to feed the class token only, its patch tokens are the least local ones; middle blocks
    still know texture and edges. PatchCore and WinCLIP's reference memory take middle layers for the same reason.

    >>> patch_layers(24)
    (11, 17)
    """
    return (max(n_layers // 2 - 1, 0), max(n_layers * 3 // 4 - 1, 0))


def embed_samples(
    samples: Sequence[Sample],
    *,
    clip: Clip,
    cnn: Cnn,
    cache_dir: Path,
    batch_size: int = 32,
    patches: bool = True,
) -> Features:
    """Features of the pictures of a dataset, from the cache where it has them.

    Each batch is written to the cache when it is done, so an interrupted pass goes on where it stopped.

    Args:
        samples: pictures with their sha256 (:func:`helpers.data.manifest.load_manifest` fills it in).
        clip, cnn: the models, see :mod:`helpers.clip.backbones`.
        cache_dir: folder of all caches, ``profile.features_dir``.
        batch_size: pictures per forward pass.
        patches: whether to compute CLIP's patch tokens.
    Returns:
        one row per sample, in their order.
    Raises:
        ValueError: no sample, or a sample without sha256.
        helpers.data.images.ImageError: a file is not a readable picture.
    """
    nameless = [sample.image_path for sample in samples if not sample.sha256]
    if nameless:
        raise ValueError(
            f"{len(nameless)} pictures have no sha256, first {nameless[0]}. Read them with data.open_dataset, "
            "which fills it in: features are kept by hash, so that a changed picture is embedded again."
        )
    pictures = ((sample.sha256, partial(images.load_image, sample.image_path)) for sample in samples)
    return _embed(
        pictures, len(samples), clip=clip, cnn=cnn, cache_dir=cache_dir, batch_size=batch_size, patches=patches
    )


def embed_images(
    pictures: Iterable[np.ndarray],
    *,
    clip: Clip,
    cnn: Cnn | None,
    cache_dir: Path | None = None,
    batch_size: int = 32,
    patches: bool = False,
    n_pictures: int | None = None,
) -> Features:
    """Features of pictures in memory (uint8 RGB ``(H, W, 3)``), for example synthetic anomalies.

    Same as :func:`embed_samples`; the key is the hash of the pixels. ``pictures`` may be a generator: only one batch
    is held at a time (``n_pictures`` tells the progress bar how many will come). Without ``cache_dir`` nothing is kept;
    without ``cnn`` only CLIP looks at the pictures.
    """
    keyed = ((image_id(picture), partial(_itself, picture)) for picture in pictures)
    return _embed(keyed, n_pictures, clip=clip, cnn=cnn, cache_dir=cache_dir, batch_size=batch_size, patches=patches)


def image_id(picture: np.ndarray) -> str:
    """Hash of a picture in memory: of its size and pixels.

    Raises:
        ValueError: not uint8 ``(H, W, 3)``.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"A picture must be uint8 RGB (H, W, 3), got {picture.dtype} {picture.shape}.")
    return hashlib.sha256(str(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()


def model_key(clip: Clip, cnn: Cnn | None, *, patches: bool) -> dict[str, object]:
    """Everything besides the picture that the features depend on, as JSON values."""
    layers = list(patch_layers(_n_layers(clip))) if patches else None
    return {
        "format": CACHE_FORMAT,
        "clip": clip.model_id,
        "cnn": None if cnn is None else cnn.model_id,
        "patch_layers": layers,
    }


def _embed(
    pictures: Iterable[tuple[str, Callable[[], np.ndarray]]],
    n_pictures: int | None,
    *,
    clip: Clip,
    cnn: Cnn | None,
    cache_dir: Path | None,
    batch_size: int,
    patches: bool,
) -> Features:
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed.")
    cache = None if cache_dir is None else _Cache(Path(cache_dir), model_key(clip, cnn, patches=patches))
    models = {"clip": clip, "cnn": cnn, "patches": patches}
    ids: list[str] = []
    shards: list[Features] = []
    known = set() if cache is None else set(cache.ids)
    pending: dict[str, tuple[np.ndarray, float]] = {}

    def flush() -> None:
        shards.append(_embed_batch(pending, **models))
        if cache is not None:
            cache.write(shards[-1])
        known.update(pending)
        pending.clear()

    for key, read in tqdm(pictures, total=n_pictures, desc="features", unit="picture", mininterval=1.0, leave=False):
        ids.append(key)
        if key in known or key in pending:
            continue
        start = time.perf_counter()
        pending[key] = (read(), time.perf_counter() - start)
        if len(pending) == batch_size:
            flush()
    if pending:
        flush()
    if not ids:
        raise ValueError("No picture to embed: the selection is empty. Check category and split.")
    computed = {key for shard in shards for key in shard.ids}
    if cache is not None:
        shards += cache.read(set(ids) - computed)
    together = Features.join(shards)
    rows = {key: row for row, key in enumerate(together.ids)}
    return together.take([rows[key] for key in ids])


def _itself(picture: np.ndarray) -> np.ndarray:
    return picture


def _embed_batch(batch: dict[str, tuple[np.ndarray, float]], *, clip: Clip, cnn: Cnn | None, patches: bool) -> Features:
    """Features of some pictures, given with the seconds it took to read each."""
    import torch

    start = time.perf_counter()
    clip_inputs = [clip.preprocess(picture) for picture, _ in batch.values()]
    device = next(clip.model.parameters()).device
    clip_input = torch.stack(clip_inputs).to(device)
    _check_size(clip, clip_input.shape[-1])
    with torch.inference_mode():
        output = clip.model.visual.forward_intermediates(
            clip_input,
            indices=sorted(set(patch_layers(_n_layers(clip)))) if patches else [0],
            output_fmt="NLC",
        )
        tokens = _stack_layers(output["image_intermediates"]) if patches else None
        pooled = torch.zeros(len(batch), 0) if cnn is None else _pool(cnn, [picture for picture, _ in batch.values()])
        found = Features(
            ids=tuple(batch),
            clip=output["image_features"].float().cpu().numpy(),
            cnn=pooled.float().cpu().numpy(),
            patches=tokens,
            seconds=np.zeros(len(batch), np.float32),
        )
    for name in ("clip", "cnn", "patches"):
        array = getattr(found, name)
        if array is not None and not np.isfinite(array).all():
            raise ValueError(
                f"The {name} features are not finite. Check the weights of {clip.model_id}, {cnn.model_id}."
            )
    found.seconds[:] = (time.perf_counter() - start) / len(batch)
    return found


def _pool(cnn: Cnn, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    import torch

    device = next(cnn.model.parameters()).device
    inputs = torch.stack([cnn.preprocess(picture) for picture in pictures])
    return cnn.model(inputs.to(device, memory_format=torch.channels_last))


def _stack_layers(layers: Sequence) -> np.ndarray:
    """Tokens of some layers, each float ``(n, g * g, d)``, to float16 ``(n, g, g, layers * d)`` with unit layers."""
    import torch

    stacked = torch.cat([torch.nn.functional.normalize(layer.float(), dim=-1) for layer in layers], dim=-1)
    n, n_tokens, width = stacked.shape
    side = round(n_tokens**0.5)
    return stacked.reshape(n, side, side, width).to(torch.float16).cpu().numpy()


def _check_size(clip: Clip, side: int) -> None:
    tower = clip.model.visual
    n_tokens, n_known = (side // tower.patch_size[0]) ** 2 + 1, len(tower.positional_embedding)
    if n_tokens != n_known:
        native = tower.image_size[0]
        raise ValueError(
            f"{clip.model_id} has positions for {n_known} tokens, an input of {side} px makes {n_tokens}. "
            f"Load it with image_size={native}."
        )


def _n_layers(clip: Clip) -> int:
    return len(clip.model.visual.transformer.resblocks)


class _Cache:
    """The cache of one pair of models: a folder with one file per batch.

    One file per picture would take longer to flush to disk than the pictures take to embed.
    """

    def __init__(self, cache_dir: Path, key: dict[str, object]) -> None:
        self._folder = cache_dir / storage.sha256_json(key)[:16]
        if not (self._folder / "model.json").exists():
            storage.write_json(self._folder / "model.json", key)
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(self._folder.glob("[!.]*.npz")):  # names with a dot are interrupted writes
            ids = _load(path, "ids")
            for row, picture in enumerate([] if ids is None else ids.tolist()):
                self._places.setdefault(picture, (path, row))

    @property
    def ids(self) -> Iterable[str]:
        return self._places.keys()

    def write(self, shard: Features) -> None:
        arrays = {name: array for name in _ARRAYS if (array := getattr(shard, name)) is not None}
        name = hashlib.sha256("".join(shard.ids).encode()).hexdigest()[:24]
        with storage.atomic_path(self._folder / f"{name}.npz") as temporary:
            np.savez(temporary, ids=np.array(shard.ids), **arrays)

    def read(self, wanted: Iterable[str]) -> list[Features]:
        by_file: dict[Path, list[int]] = {}
        for picture in wanted:
            path, row = self._places[picture]
            by_file.setdefault(path, []).append(row)
        found = []
        for path, rows in by_file.items():
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] if name in archive else None for name in _ARRAYS}
                found.append(Features(ids=tuple(archive["ids"].tolist()), **arrays).take(rows))
        return found


def _load(path: Path, name: str) -> np.ndarray | None:
    """One array of a cache file; a damaged file is named and removed, its pictures are embedded again."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"Feature cache: {path} is damaged ({error}). It is removed, its pictures are embedded again.")
        path.unlink()
        return None
