"""AnomalyGPT: anomaly maps from ImageBind's patches, prompts made of the map, and a language model that answers.

Three frozen parts (ImageBind's image tower, the projection and LoRA of PandaGPT, Vicuna) and one trained part, the
:class:`AnomalyHead`: image decoder and prompt learner. Where paper and published code differ, the code is followed,
because its weights were trained with it: logits are enlarged before the softmax, the four maps are averaged, and in
few-shot mode the memory-bank map replaces the decoder's map.

Source: Gu et al., AnomalyGPT, AAAI 2024; code CASIA-IVA-Lab/AnomalyGPT at f21c51b.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from helpers import weights
from helpers.anomalygpt import imagebind, language
from helpers.anomalygpt.imagebind import ImageBind, ImageFeatures
from helpers.anomalygpt.language import Language

MAP_SIZE = 224
"""Side of every anomaly map in pixels; the prompt learner's last convolution fits no other."""

N_BASE_PROMPTS = 9
TEMPERATURE = 100.0
PROMPT_CHANNELS = (4, 16, 64, 256, 1024)
CHECKPOINTS = ("train_mvtec", "train_visa", "train_supervised")
"""The published checkpoints by the folder names of their authors."""

_look_numbers = itertools.count()


class ImageDecoder(nn.Module):
    """One linear layer per tap takes patch tokens to the space of the text features.

    Args:
        width: width of the tapped tokens.
        joint_width: width of the text features.
        n_taps: number of taps.
    """

    def __init__(self, width: int, joint_width: int, n_taps: int = imagebind.N_TAPS) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, joint_width) for _ in range(n_taps))

    def forward(self, taps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Logits of normal and abnormal per patch.

        Args:
            taps: ``(T, B, N, W)``, class token dropped.
            text: ``(2, J)`` for all pictures or ``(B, 2, J)``, unit norm, normal first.
        Returns:
            float ``(T, B, N, 2)``: 100 x cosine.
        """
        weight = self.fc[0].weight
        patches = torch.stack([layer(tap.to(weight.dtype)) for layer, tap in zip(self.fc, taps, strict=True)])
        patches = nn.functional.normalize(patches, dim=-1)
        return TEMPERATURE * patches @ text.to(patches).transpose(-1, -2)


class PromptLearner(nn.Module):
    """18 soft prompts for the language model: 9 learnt ones and 9 made of the anomaly map.

    Args:
        hidden: width of the language model.
        channels: widths of the convolutions before the last one.
    """

    def __init__(self, hidden: int, channels: Sequence[int] = PROMPT_CHANNELS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise([1, *channels]):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.meta_net = nn.Sequential(*layers, nn.Conv2d(channels[-1], hidden, 5))
        self.base_prompts = nn.Parameter(torch.randn(N_BASE_PROMPTS, hidden))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps float ``(B, 224, 224)`` -> prompts ``(B, 18, hidden)``, the learnt ones first."""
        tokens = self.meta_net(maps[:, None].to(self.base_prompts.dtype)).flatten(2).transpose(1, 2)  # (B, 9, hidden)
        return torch.cat([self.base_prompts.expand(len(maps), -1, -1), tokens], dim=1)


class AnomalyHead(nn.Module):
    """All that is trained: image decoder and prompt learner. Its state dict has the 21 published keys.

    Args:
        width: width of the image tower's tokens.
        joint_width: width of the text features.
        hidden: width of the language model.
        channels: see :class:`PromptLearner`.
        n_taps: number of tapped blocks.
    """

    def __init__(
        self,
        width: int,
        joint_width: int,
        hidden: int,
        channels: Sequence[int] = PROMPT_CHANNELS,
        n_taps: int = imagebind.N_TAPS,
    ) -> None:
        super().__init__()
        self.image_decoder = ImageDecoder(width, joint_width, n_taps)
        self.prompt_learner = PromptLearner(hidden, channels)

    @property
    def hidden(self) -> int:
        """Width of the language model that the prompts are made for."""
        return self.prompt_learner.base_prompts.shape[1]

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> AnomalyHead:
        """The head of a checkpoint, in float32; all sizes are read from the tensors.

        Raises:
            ValueError: a key is missing, unknown, or has a shape that does not fit the others.
        """
        try:
            joint_width, width = state["image_decoder.fc.0.weight"].shape
            hidden = state["prompt_learner.base_prompts"].shape[1]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"This is no AnomalyGPT checkpoint: {error} is missing or misshapen among {len(state)} tensors, first "
                f"{sorted(state)[:3]}. Expected are image_decoder.* and prompt_learner.* (notebook 01 prepares them)."
            ) from error
        convolutions = sorted(
            (int(key.split(".")[2]), tensor.shape[0])
            for key, tensor in state.items()
            if key.startswith("prompt_learner.meta_net.") and key.endswith(".weight")
        )
        n_taps = sum(key.startswith("image_decoder.fc.") and key.endswith(".weight") for key in state)
        with torch.device("meta"):
            head = cls(width, joint_width, hidden, [n for _, n in convolutions[:-1]] or PROMPT_CHANNELS, n_taps)
        wanted = {key: tensor.shape for key, tensor in head.state_dict().items()}
        missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        reshaped = [
            f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key])}"
            for key in sorted(wanted.keys() & state.keys())
            if wanted[key] != state[key].shape
        ]
        if missing or unexpected or reshaped:
            raise ValueError(
                f"The AnomalyGPT checkpoint does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, other "
                f"shape {reshaped[:3]}. Prepare it again with notebook 01, or train it with notebook 06."
            )
        head.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
        return head.requires_grad_(True)


def probabilities(logits: torch.Tensor, grid: tuple[int, int], size: int = MAP_SIZE) -> torch.Tensor:
    """Patch logits -> pixel probabilities of normal and abnormal.

    Args:
        logits: ``(T, B, N, 2)`` from :class:`ImageDecoder`.
        grid: patches per column and row, N = rows * columns.
        size: side of the maps in pixels.
    Returns:
        float ``(T, B, 2, size, size)``. The softmax comes after the interpolation; the other order differs by up to
        0.14.
    """
    n_taps, n_images = logits.shape[:2]
    planes = logits.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (T * B, 2, rows, columns)
    planes = nn.functional.interpolate(planes.float(), size=(size, size), mode="bilinear", align_corners=True)
    return planes.softmax(dim=1).unflatten(0, (n_taps, n_images))


def decoder_map(probability: torch.Tensor) -> torch.Tensor:
    """The zero-shot anomaly map ``(B, S, S)`` in [0, 1]: abnormal probability, averaged over the taps."""
    return probability[:, :, 1].mean(dim=0)


def build_bank(taps: torch.Tensor) -> torch.Tensor:
    """Memory bank of normal pictures.

    Args:
        taps: ``(T, k, N, W)``, raw tokens of k normal pictures.
    Returns:
        ``(T, k * N, W)`` with rows of unit norm, in the dtype of ``taps``.
    """
    return nn.functional.normalize(taps.float(), dim=-1).flatten(1, 2).to(taps.dtype)


def bank_similarity(taps: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each patch to the nearest normal patch.

    Args:
        taps: ``(T, B, N, W)``, raw tokens of the pictures.
        bank: ``(T, M, W)`` for all pictures or ``(T, B, M, W)``, from :func:`build_bank`.
    Returns:
        float32 ``(T, B, N)`` in [-1, 1].
    """
    queries = nn.functional.normalize(taps.float(), dim=-1).to(bank.dtype)
    if bank.dim() == 3:  # one matrix product per tap: no copy of the bank per picture
        flat = queries.flatten(1, 2) @ bank.transpose(1, 2)  # (T, B * N, M)
        return flat.amax(dim=-1).float().unflatten(1, queries.shape[1:3])
    return (queries @ bank.transpose(-1, -2)).amax(dim=-1).float()


def few_shot_map(taps: torch.Tensor, bank: torch.Tensor, grid: tuple[int, int], size: int = MAP_SIZE) -> torch.Tensor:
    """The few-shot anomaly map: 1 - similarity to the bank, averaged over the taps, enlarged.

    Args:
        taps: ``(T, B, N, W)``.
        bank: see :func:`bank_similarity`.
        grid: patches per column and row.
        size: side of the map in pixels.
    Returns:
        float32 ``(B, size, size)`` in [0, 2]; another scale than the decoder's map.
    """
    similarity = bank_similarity(taps, bank).mean(dim=0).unflatten(1, grid)[:, None]
    enlarged = nn.functional.interpolate(similarity, size=(size, size), mode="bilinear", align_corners=True)
    return 1.0 - enlarged[:, 0]


def rotations(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures ``(B, 3, S, S)`` turned by 0, 90, 180 and 270 degrees: ``(4 * B, 3, S, S)``, for banks in training."""
    return torch.cat([pixels.rot90(quarter, (2, 3)) for quarter in range(4)])


@dataclass(frozen=True)
class Look:
    """What AnomalyGPT sees in a batch of pictures: computed once, asked about many times.

    Attributes:
        maps: float32 ``(B, 224, 224)`` on the CPU, higher = more anomalous; decoder map, or few-shot map with
            references (another scale).
        image_tokens: ``(B, 1, hidden)``, projected image embeddings.
        prompts: ``(B, 18, hidden)``, made of the maps.
        features: of the pictures, to look again with other references.
        numbers: one number per picture and look, so that a cached prompt prefix is never mixed up.
    """

    maps: torch.Tensor
    image_tokens: torch.Tensor
    prompts: torch.Tensor
    features: ImageFeatures
    numbers: tuple[int, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def scores(self) -> np.ndarray:
        """Image scores, float64 ``(B,)``: the maximum of each map, as published."""
        return self.maps.flatten(1).amax(dim=1).double().numpy()

    def take(self, indices: Sequence[int]) -> Look:
        """The look at some of the pictures."""
        chosen = list(indices)
        numbers = tuple(self.numbers[i] for i in chosen)
        return Look(
            self.maps[chosen], self.image_tokens[chosen], self.prompts[chosen], self.features.take(chosen), numbers
        )


@dataclass(frozen=True)
class AnomalyGPT:
    """The whole chain, ready to look at pictures and to answer.

    Attributes:
        eyes: ImageBind's image tower.
        head: image decoder and prompt learner.
        projection: image embedding -> image token, frozen (PandaGPT).
        language: Vicuna with PandaGPT's LoRA merged, and its tokens.
        text_pair_of: name -> float32 ``(2, J)`` text features (cached).
        checkpoint_id: hash of the head's weights.
    """

    eyes: ImageBind
    head: AnomalyHead
    projection: nn.Linear
    language: Language
    text_pair_of: Callable[[str], torch.Tensor]
    checkpoint_id: str = ""

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    def bank(self, references: Sequence[np.ndarray] | ImageFeatures) -> torch.Tensor:
        """Memory bank ``(T, k * N, W)`` of k normal pictures, uint8 RGB or their features."""
        return build_bank(self._features(references).taps)

    def look(
        self,
        images: Sequence[np.ndarray] | ImageFeatures,
        *,
        references: Sequence[np.ndarray] | torch.Tensor | None = None,
        name: str = "object",
        mode: str = "squash",
    ) -> Look:
        """Maps and prompts of pictures, one pass of the image tower; no gradients.

        Args:
            images: uint8 RGB pictures of any sizes, or their features.
            references: normal pictures, or a bank from :meth:`bank`: the few-shot map replaces the decoder's map.
            name: what the text features speak of; ``"object"`` for art.
            mode: preprocessing, see :func:`helpers.anomalygpt.imagebind.preprocess`.
        """
        with torch.no_grad():
            features = self._features(images, mode=mode)
            taps = features.taps
            if references is None:
                text = self.text_pair_of(name).to(taps.device)
                maps = decoder_map(probabilities(self.head.image_decoder(taps, text), self.eyes.grid))
            else:
                bank = references if isinstance(references, torch.Tensor) else self.bank(references)
                maps = few_shot_map(taps, bank.to(taps.device), self.eyes.grid)
            embedding = features.embedding.to(self.projection.weight)
            tokens = self.projection(embedding)[:, None]
            numbers = tuple(next(_look_numbers) for _ in range(len(features)))
            return Look(maps.float().cpu(), tokens, self.head.prompt_learner(maps), features, numbers)

    def ask(
        self,
        look: Look,
        question: str | Sequence[str],
        *,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 64,
        top_p: float = 0.01,
        temperature: float = 1.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
        memory: language.PrefixMemory | None = None,
    ) -> list[str]:
        """Answers about the pictures, one prompt batch.

        Args:
            look: the pictures.
            question: one for all, or one per picture.
            history: earlier turns ``(question, answer)`` of a single picture.
            max_new_tokens: length limit of the answers.
            top_p: nucleus; with 0.01 and below, or temperature 0, the most likely token is taken (greedy).
            temperature: of the sampling.
            seed: of the sampling.
            on_text: gets the text of the first answer each time it grows.
            memory: of a chat about one picture, so that only what is new of the prompt is computed.
        Returns:
            cleaned answers, one per picture.
        Raises:
            helpers.anomalygpt.language.PromptTooLong: prompt and answer do not fit the language model's context.
        """
        rows, keys = self.prompt_rows(look, question, history=history)
        tokens = self.language.tokens
        show = None if on_text is None else lambda ids: on_text(language.clean_answer(tokens.decode(ids)))
        answers = language.generate(
            self.language, rows, max_new_tokens=max_new_tokens, top_p=top_p, temperature=temperature, seed=seed,
            on_tokens=show, memory=memory, keys=keys[0] if memory is not None else None,
        )  # fmt: skip
        return [language.clean_answer(tokens.decode(ids)) for ids in answers]

    def yes_no(self, look: Look, question: str | Sequence[str]) -> np.ndarray:
        """Score of the answer without decoding: logit(Yes) - logit(No) at the first answer position.

        Returns:
            float64 ``(B,)``, higher = more anomalous; one prefill for all pictures.
        """
        return self.first_token(look, question)[0]

    def first_token(self, look: Look, question: str | Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Scores as :meth:`yes_no`, and the text of each picture's most likely first token."""
        rows, _ = self.prompt_rows(look, question)
        logits = language.next_logits(self.language, rows).double()
        tokens = self.language.tokens
        scores = logits[:, tokens.yes_id] - logits[:, tokens.no_id]
        texts = [tokens.decode([best]).strip() for best in logits.argmax(dim=1).tolist()]
        return scores.cpu().numpy(), texts

    def prompt_rows(
        self, look: Look, question: str | Sequence[str], *, history: Sequence[tuple[str, str]] = ()
    ) -> tuple[list[torch.Tensor], list[list[Any]]]:
        """Input embeddings ``(S_i, hidden)`` per picture, and what stands at each position (for cached prefixes)."""
        questions = [question] * len(look) if isinstance(question, str) else list(question)
        if len(questions) != len(look):
            raise ValueError(f"{len(questions)} questions for {len(look)} pictures; give one, or one per picture.")
        rows, keys = [], []
        for i, text in enumerate(questions):
            ids = self.language.tokens.encode(language.prompt_text(text, history))
            rows.append(language.input_row(self.language, look.image_tokens[i], look.prompts[i], ids))
            n_soft = look.image_tokens.shape[1] + look.prompts.shape[1]
            keys.append(language.position_keys(self.language, look.numbers[i], n_soft, ids))
        return rows, keys

    def _features(self, images: Sequence[np.ndarray] | ImageFeatures, *, mode: str = "squash") -> ImageFeatures:
        """Features on the model's device, in a type that it computes in: caches keep them in float16 on the CPU."""
        if not isinstance(images, ImageFeatures):
            return self.eyes.embed_images(images, mode=mode)
        taps = images.taps.to(self.device)
        return ImageFeatures(images.embedding.to(self.device), taps if taps.is_cuda else taps.float())


def load(
    weights_dir: Path,
    *,
    checkpoint: str | Path | None = "train_supervised",
    device: str = "cpu",
    precision: str = "fp32",
    cache_dir: Path | None = None,
    seed: int = 0,
) -> AnomalyGPT:
    """Load the chain that notebook 01 prepared.

    Args:
        weights_dir: with ``vicuna/``, ``imagebind/``, ``pandagpt/`` and ``anomalygpt/``.
        checkpoint: one of :data:`CHECKPOINTS`, a folder with ``model.safetensors`` of notebook 06, or None for a new
            head (the only choice for 13B, for which no head is published).
        device: torch device name.
        precision: of the language model: ``"fp32"``, ``"bf16"``, ``"fp16"``, or on a GPU ``"8bit"`` or ``"4bit"``.
        cache_dir: where text features are kept.
        seed: of a new head.
    Raises:
        FileNotFoundError: weights are missing; names the notebook that makes them.
        ValueError: weights that do not fit each other.
    """
    folder = weights.require(weights_dir, "imagebind")
    eyes = imagebind.load_imagebind(folder, device=device)
    lora = weights.require(weights_dir, "pandagpt")
    speaker = language.load_language(
        weights.require(weights_dir, "vicuna"), lora=lora, precision=precision, device=device
    )
    projection = language.load_projection(lora, device=device)
    if checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = AnomalyHead(eyes.width, eyes.joint_width, speaker.hidden)
        checkpoint_id = f"new head, seed {seed}"
    else:
        head, checkpoint_id = load_head(weights_dir, checkpoint)
    check_widths(eyes, head, projection, speaker.hidden)
    known: dict[str, torch.Tensor] = {}

    def text_pair_of(name: str) -> torch.Tensor:
        if name not in known:
            known.update(imagebind.text_pairs(folder, [name], cache_dir=cache_dir, device=device))
        return known[name]

    return AnomalyGPT(eyes, head.eval().to(device), projection, speaker, text_pair_of, checkpoint_id)


def load_head(weights_dir: Path, checkpoint: str | Path) -> tuple[AnomalyHead, str]:
    """The head of a published checkpoint (by name) or of a folder of notebook 06, and its hash.

    Raises:
        FileNotFoundError: it is not there; names notebook 01 or 06.
    """
    from safetensors.torch import load_file

    from helpers import files as storage

    if checkpoint in CHECKPOINTS:
        path = weights.require(weights_dir, f"anomalygpt/{checkpoint}") / "model.safetensors"
    else:
        path = Path(checkpoint) / "model.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"No trained head in {checkpoint}. Run notebook 07_anomalygpt_train, or use one of the published "
                f"checkpoints: {', '.join(CHECKPOINTS)}."
            )
    return AnomalyHead.from_state(load_file(path)), storage.sha256_file(path)


def check_widths(eyes: ImageBind, head: AnomalyHead, projection: nn.Linear, hidden: int) -> None:
    """Refuse weights that were made for other models.

    Raises:
        ValueError: names the two numbers that differ and what to do.
    """
    decoder = head.image_decoder.fc[0]
    pairs = (
        ("the image decoder reads tokens of width", decoder.in_features, "the image tower makes", eyes.width),
        ("the image decoder writes width", decoder.out_features, "the text features have", eyes.joint_width),
        ("the prompt learner writes width", head.hidden, "the language model has hidden width", hidden),
        ("PandaGPT's projection writes width", projection.out_features, "the language model has hidden width", hidden),
        ("PandaGPT's projection reads width", projection.in_features, "the image embedding has", eyes.joint_width),
    )
    wrong = [f"{left} {a}, {right} {b}" for left, a, right, b in pairs if a != b]
    if wrong:
        raise ValueError(
            f"These weights do not belong together: {'; '.join(wrong)}. The published AnomalyGPT heads fit Vicuna-7B "
            "only (4096). For another language model prepare its PandaGPT weights in notebook 01 and train a new head "
            "in notebook 06 (checkpoint=None)."
        )
