"""AnomalyGPT: anomaly maps from ImageBind's patches, prompts made of the map, and a language model that answers.

Where paper and published code differ, the code is followed, because its weights were trained with it: logits are
enlarged before the softmax, the four maps are averaged, and the few-shot map replaces the decoder's map.

Source: Gu et al., AnomalyGPT, AAAI 2024; code CASIA-IVA-Lab/AnomalyGPT at f21c51b.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from accelerate.utils import release_memory
from torch import nn

from helpers import files, weights
from helpers.anomalygpt import imagebind, language
from helpers.anomalygpt.imagebind import ImageBind, ImageFeatures
from helpers.anomalygpt.language import Language

MAP_SIZE = 224
"""Side of every anomaly map in pixels; the prompt learner's last convolution fits no other."""
N_BASE_PROMPTS = 9
LOGIT_SCALE = 100.0
PROMPT_CHANNELS = (4, 16, 64, 256, 1024)
CHECKPOINTS = ("train_mvtec", "train_visa", "train_supervised")
"""The published checkpoints by the folder names of their authors."""


class ImageDecoder(nn.Module):
    """One linear layer per tap takes patch tokens (``width``) to the space of the text features (``joint_width``)."""

    def __init__(self, width: int, joint_width: int) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, joint_width) for _ in range(imagebind.N_TAPS))

    def forward(self, taps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Taps ``(T, B, N, W)``, text ``(2, J)``, unit norm, normal first -> logits ``(T, B, N, 2)``: 100 x cosine."""
        weight = self.fc[0].weight
        patches = torch.stack([layer(tap.to(weight.dtype)) for layer, tap in zip(self.fc, taps, strict=True)])
        return LOGIT_SCALE * nn.functional.normalize(patches, dim=-1) @ text.to(patches).T


class PromptLearner(nn.Module):
    """18 soft prompts of width ``hidden``: 9 learnt ones and 9 that convolutions make of the anomaly map."""

    def __init__(self, hidden: int, channels: Sequence[int] = PROMPT_CHANNELS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([1, *channels]):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.meta_net = nn.Sequential(*layers, nn.Conv2d(channels[-1], hidden, 5))
        self.base_prompts = nn.Parameter(torch.randn(N_BASE_PROMPTS, hidden))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps float ``(B, 224, 224)`` -> prompts ``(B, 18, hidden)``, the learnt ones first."""
        tokens = self.meta_net(maps[:, None].to(self.base_prompts.dtype)).flatten(2).transpose(1, 2)  # (B, 9, hidden)
        return torch.cat([self.base_prompts.expand(len(maps), -1, -1), tokens], dim=1)


class AnomalyHead(nn.Module):
    """All that is trained: image decoder and prompt learner. Its state dict has the 21 published keys."""

    def __init__(self, width: int, joint_width: int, hidden: int, channels: Sequence[int] = PROMPT_CHANNELS) -> None:
        super().__init__()
        self.image_decoder = ImageDecoder(width, joint_width)
        self.prompt_learner = PromptLearner(hidden, channels)

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> AnomalyHead:
        """The head of a checkpoint, in float32, sizes read from its tensors; a ``ValueError`` where they do not fit."""
        try:
            joint_width, width = state["image_decoder.fc.0.weight"].shape
            *channels, hidden = (len(state[f"prompt_learner.meta_net.{3 * n}.weight"]) for n in range(6))
            with torch.device("meta"):
                head = cls(width, joint_width, hidden, channels)
            head.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
        except (KeyError, RuntimeError) as error:
            hint = "Prepare it again with notebook 01, or train it with notebook 06."
            raise ValueError(f"This is no AnomalyGPT head: {' '.join(str(error).split())[:300]} {hint}") from None
        return head


def probabilities(logits: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Patch logits ``(T, B, N, 2)`` -> pixel probabilities ``(T, B, 2, 224, 224)`` of normal and abnormal. The softmax
    comes after the interpolation; the other order differs by up to 0.14."""
    planes = logits.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (T * B, 2, rows, columns)
    return enlarge(planes.float()).softmax(dim=1).unflatten(0, logits.shape[:2])


def enlarge(planes: torch.Tensor) -> torch.Tensor:
    """Planes float ``(B, C, rows, columns)`` -> ``(B, C, 224, 224)``, bilinear, corner on corner."""
    return nn.functional.interpolate(planes, size=(MAP_SIZE, MAP_SIZE), mode="bilinear", align_corners=True)


def build_bank(taps: torch.Tensor) -> torch.Tensor:
    """Raw tokens ``(T, k, N, W)`` of k normal pictures -> memory bank ``(T, k * N, W)``, rows of unit norm."""
    return nn.functional.normalize(taps.float(), dim=-1).flatten(1, 2).to(taps.dtype)


def bank_similarity(taps: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Cosine of each patch to the nearest normal patch: taps ``(T, B, N, W)``, bank ``(T, M, W)`` -> ``(T, B, N)``."""
    queries = nn.functional.normalize(taps.float(), dim=-1).to(bank.dtype)
    similarity = queries.flatten(1, 2) @ bank.transpose(1, 2)  # (T, B * N, M), one product per tap
    return similarity.amax(dim=-1).float().unflatten(1, queries.shape[1:3])


def rotations(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures ``(B, 3, S, S)`` turned by 0, 90, 180 and 270 degrees: ``(4 * B, 3, S, S)``, for banks in training."""
    return torch.cat([pixels.rot90(quarter, (2, 3)) for quarter in range(4)])


class Look(NamedTuple):
    """What AnomalyGPT sees in a batch of pictures: computed once, asked about many times."""

    maps: torch.Tensor  # float32 (B, 224, 224) on the CPU, higher = more anomalous
    image_tokens: torch.Tensor  # (B, 1, hidden), projected image embeddings
    prompts: torch.Tensor  # (B, 18, hidden), made of the maps

    @property
    def scores(self) -> np.ndarray:
        """Image scores, float64 ``(B,)``: the maximum of each map, as published."""
        return self.maps.flatten(1).amax(dim=1).double().numpy()

    def take(self, chosen: slice | Sequence[int]) -> Look:
        """The look at some of the pictures."""
        return Look(*(part[chosen] for part in self))


@dataclass(frozen=True)
class AnomalyGPT:
    """The whole chain, ready to look at pictures and to answer."""

    image_tower: ImageBind
    head: AnomalyHead
    projection: nn.Linear  # image embedding -> image token, frozen (PandaGPT)
    language: Language  # Vicuna with PandaGPT's LoRA
    text: torch.Tensor  # float32 (2, J): features of "a photo of a flawless object" and "... a damaged object"
    checkpoint_id: str = ""  # hash of the head's weights
    device = property(lambda self: self.projection.weight.device)

    def __str__(self) -> str:
        speaks, head = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (self.language.model, self.head))
        stand_in = "" if self.language.hidden in (4096, 5120) else "; stand-ins for the published weights"
        return f"language model with {speaks:,.0f} million frozen numbers, head with {head:,.1f} million{stand_in}"

    def bank(self, references: Sequence[np.ndarray] | ImageFeatures) -> torch.Tensor:
        """Memory bank ``(T, k * N, W)`` of k normal pictures, uint8 RGB or their features."""
        return build_bank(self._features(references).taps)

    @torch.no_grad()
    def look(
        self, images: Sequence[np.ndarray] | ImageFeatures, *,
        references: Sequence[np.ndarray] | torch.Tensor | None = None, maps: np.ndarray | None = None,
    ) -> Look:  # fmt: skip
        """Maps and prompts of pictures, uint8 RGB of any sizes or their features. The map is the decoder's; with
        references (normal pictures, or a bank from :meth:`bank`) the few-shot map, in [0, 2]: 1 - similarity, mean of
        the taps; or one made elsewhere, ``maps`` float32 ``(B, 224, 224)``."""
        features, grid = self._features(images), self.image_tower.grid
        if maps is not None:
            found = torch.as_tensor(maps, dtype=torch.float32).to(self.device)
        elif references is None:
            logits = self.head.image_decoder(features.taps, self.text.to(self.device))
            found = probabilities(logits, grid)[:, :, 1].mean(dim=0)
        else:
            bank = references if isinstance(references, torch.Tensor) else self.bank(references)
            similarity = bank_similarity(features.taps, bank.to(self.device)).mean(dim=0)
            found = 1.0 - enlarge(similarity.unflatten(1, grid)[:, None])[:, 0]
        tokens = self.projection(features.embedding.to(self.projection.weight))[:, None]
        return Look(found.float().cpu(), tokens, self.head.prompt_learner(found))

    def ask(
        self, look: Look, question: str, *, history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:  # fmt: skip
        """Cleaned answers to one question, one per picture; they may be empty. ``history`` has earlier turns
        ``(question, answer)``; ``on_text`` gets the answer about a single picture each time it grows. Raises
        :class:`~helpers.anomalygpt.language.PromptTooLong`."""
        read = lambda ids: language.clean_answer(self.language.tokens.decode(ids))  # noqa: E731
        show = on_text and (lambda ids: on_text(read(ids)))
        rows = self.prompt_rows(look, question, history=history)
        return [
            read(ids) for ids in language.generate(self.language, rows, max_new_tokens=max_new_tokens, on_tokens=show)
        ]

    def first_token(self, look: Look, question: str) -> tuple[np.ndarray, list[str]]:
        """What the answers begin with: logit(Yes) - logit(No), float64 ``(B,)``, higher = more anomalous, and the text
        of each most likely first token."""
        logits = language.next_logits(self.language, self.prompt_rows(look, question)).double()
        tokens = self.language.tokens
        scores = logits[:, tokens.yes_id] - logits[:, tokens.no_id]
        return scores.cpu().numpy(), [tokens.decode([best]).strip() for best in logits.argmax(dim=1).tolist()]

    def prompt_rows(self, look: Look, question: str, *, history: Sequence[tuple[str, str]] = ()) -> list[torch.Tensor]:
        """Input embeddings ``(S, hidden)`` per picture, see :mod:`helpers.anomalygpt.language` for the layout."""
        before, after = self.language.surroundings
        text = self.language.embed(self.language.tokens.encode(language.prompt_text(question, history)))
        pairs = zip(look.image_tokens.to(text), look.prompts.to(text), strict=True)
        return [torch.cat([before, token, after, prompts, text]) for token, prompts in pairs]

    def _features(self, images: Sequence[np.ndarray] | ImageFeatures) -> ImageFeatures:
        return images.to(self.device) if isinstance(images, ImageFeatures) else self.image_tower.embed_images(images)


_loaded: weakref.WeakSet[AnomalyGPT] = weakref.WeakSet()


def load(
    weights_dir: Path, *, checkpoint: str | Path | None = "train_supervised", device: str = "cpu",
    precision: str = "fp32",
) -> AnomalyGPT:  # fmt: skip
    """Load the chain that notebook 01 prepared, with the head of :func:`load_head` or, for None, a new one (none is
    published for 13B). A chain that was loaded before is emptied first: two would fit no GPU."""
    for previous in _loaded:  # a notebook may still hold it (``Out[3]``, the last error)
        for part in (previous.language.model, previous.image_tower.visual, previous.head, previous.projection):
            for parameter in part.parameters():
                parameter.data = parameter.data.new_empty(0)
    release_memory()
    vicuna, eyes, lora = (weights.require(weights_dir, name) for name in ("vicuna", "imagebind", "pandagpt"))
    tower, text = imagebind.load_imagebind(eyes, device=device)
    speaker = language.load_language(vicuna, lora=lora, precision=precision, device=device)
    if checkpoint is None:
        torch.manual_seed(0)
        head, checkpoint_id = AnomalyHead(tower.width, tower.joint_width, speaker.hidden), "new head"
    else:
        head, checkpoint_id = load_head(weights_dir, checkpoint)
    projection = language.load_projection(lora).to(device)
    model = AnomalyGPT(tower, head.eval().to(device), projection, speaker, text, checkpoint_id)
    _loaded.add(model)
    return model


def with_head(model: AnomalyGPT, weights_dir: Path, checkpoint: str | Path) -> AnomalyGPT:
    """A loaded chain with another head beside its own one: nothing else is loaded again, see :func:`load_head`."""
    head, checkpoint_id = load_head(weights_dir, checkpoint)
    return replace(model, head=head.eval().to(model.device), checkpoint_id=checkpoint_id)


def load_head(weights_dir: Path, checkpoint: str | Path) -> tuple[AnomalyHead, str]:
    """The head of a published checkpoint (a name of :data:`CHECKPOINTS`) or of a folder of notebook 06, and its hash; a
    ``FileNotFoundError`` names the notebook that makes it."""
    from safetensors.torch import load_file

    folder = weights.require(weights_dir, f"anomalygpt/{checkpoint}") if checkpoint in CHECKPOINTS else checkpoint
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"No trained head in {folder}. Run notebook 06_anomalygpt_train, or use a published one: {CHECKPOINTS}."
        )
    return AnomalyHead.from_state(load_file(path)), files.sha256_file(path)


def check_memory(weights_dir: Path, *, device: str, precision: str, batch_size: int, training: bool = False) -> str:
    """What the chain needs, in words, before anything is loaded; a ``ValueError`` with three knobs where the device has
    less memory in all. Estimates: the weights by their files; a picture of ``batch_size`` (a training pair is two)
    takes 0.15 GB of keys, values and taps beside a 7B model, in training, where activations are recomputed, 0.1 GB."""
    total = psutil.virtual_memory().total if device == "cpu" else torch.cuda.get_device_properties(0).total_memory
    vicuna, eyes = (
        sum(file.stat().st_size for file in weights.require(weights_dir, name).glob("*.safetensors")) / 1e9
        for name in ("vicuna", "imagebind")
    )
    speaks = vicuna * language.BYTES_PER_WEIGHT[precision] / 2  # the files are float16
    parts = {
        f"language model in {precision}": speaks, "image tower": eyes * 0.64,  # without the text tower
        "head": 0.45 * (4 if training else 1),
        "pictures": batch_size * (0.1 if training else 0.15) * min(1.0, speaks / 13.5),
        "reserve": 1.5,  # CUDA's own, and what fragments
    }  # fmt: skip
    needed, total = sum(parts.values()), total / 1e9
    told = ", ".join(f"{name} {gigabytes:.1f}" for name, gigabytes in parts.items())
    told = f"{needed:.1f} GB of {total:.1f} GB ({told})"
    if needed > total:
        raise ValueError(
            f"AnomalyGPT needs about {told}. Three knobs: precision '8bit' (half) or '4bit' (a third); fewer pictures "
            f"at a time (now {batch_size}); a GPU with more memory (A100: 40 GB)."
        )
    return f"Memory: about {told}"
