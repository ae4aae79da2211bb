"""Training of AnomalyGPT's head: image decoder and prompt learner, everything else frozen.

Normal pictures are enough. Each training sample is a pair: a normal picture with the answer "No, ...", and a
simulated anomaly of it with the answer "Yes, ... at the <place> ...". The loss is the answer's cross-entropy plus, for
each tap, focal and dice loss of the map. What is frozen is computed once: text features, features of the normal
pictures, memory banks.

Source: Gu et al., AnomalyGPT, AAAI 2024; code CASIA-IVA-Lab/AnomalyGPT at f21c51b; the presets are the runs of the
source report (``spec/report.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from helpers import files as storage
from helpers import training_old as training
from helpers.anomalygpt import conversations, language
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt.imagebind import ImageBind, ImageFeatures
from helpers.anomalygpt.language import Language
from helpers.anomalygpt.model import MAP_SIZE, AnomalyGPT, AnomalyHead
from helpers.data import images
from helpers.data import manifest as data
from helpers.records import Sample
from helpers.synthesis import marks as synthesis
from helpers.synthesis import nsa

IGNORED = -100
"""Target of tokens that the model is not asked to predict."""

SEED_STRIDE = 1_000_003
_MASK_LIMIT = 0.3
_FOCAL_CLAMP = 1e-5


@dataclass(frozen=True)
class Preset:
    """One training run of the source report.

    Attributes:
        n_epochs: passes over the training pictures.
        batch_size: samples (pairs of pictures) per optimiser step.
        learning_rate: highest rate of the schedule.
        max_length: longest text in tokens.
    """

    n_epochs: int
    batch_size: int
    learning_rate: float = 1e-3
    max_length: int = 1024


PRESETS = {"15x8": Preset(15, 8), "15x16": Preset(15, 16), "20x16": Preset(20, 16), "25x16": Preset(25, 16)}
"""The report's runs by epochs x batch."""


@dataclass(frozen=True)
class HeadTraining:
    """How the head is trained.

    Args:
        n_epochs, batch_size, learning_rate, max_length: see :class:`Preset`.
        micro_batch: pairs per forward pass; must divide ``batch_size``, the rest is gradient accumulation.
        max_pairs: pairs per epoch at most (drawn anew each epoch), None for one per training picture.
        own_share: share of simulated anomalies made by the suite's own synthesis instead of NSA.
        few_shot_share: share of pairs whose prompts are made of a few-shot map, as at a test with references.
        wording: of the questions, see :func:`conversations.question`; None asks without naming the artwork.
        weight_decay: of AdamW.
        precision: of the trained part: ``"fp32"``, or autocast ``"bf16"`` / ``"fp16"``.
        gradient_checkpointing: recompute the language model's activations instead of keeping them.
        tuning_share: share of the source pictures (groups) kept back for early stopping.
        n_tuning: tuning pairs at most.
        patience: tuning scores without improvement until training stops, None for never.
        checkpoint_every: optimiser steps between checkpoints beside the one at each epoch's end.
        seed: of order and simulation.
    Raises:
        ValueError: a number outside what is allowed.
    """

    n_epochs: int = 15
    batch_size: int = 8
    learning_rate: float = 1e-3
    max_length: int = 1024
    micro_batch: int = 2
    max_pairs: int | None = None
    own_share: float = 0.5
    few_shot_share: float = 0.5
    wording: str | None = "published"
    weight_decay: float = 1e-3
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    tuning_share: float = 0.2
    n_tuning: int = 16
    patience: int | None = 4
    checkpoint_every: int = 50
    seed: int = 42

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch is {self.micro_batch}, batch_size {self.batch_size}: it must be at least 1 and divide it."
            )
        for name in ("own_share", "few_shot_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share between 0 and 1 is allowed.")
        if not 0 < self.tuning_share < 1:
            raise ValueError(f"tuning_share is {self.tuning_share}; it must lie between 0 and 1.")
        if self.learning_rate <= 0 or self.max_length < 8:
            raise ValueError("learning_rate must be positive and max_length at least 8 tokens.")


def from_preset(preset: str, **changes: Any) -> HeadTraining:
    """Settings of a run of the report, with changes.

    >>> from_preset("20x16", micro_batch=4).n_epochs
    20

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; the report's runs are {', '.join(PRESETS)}.")
    return HeadTraining(**(asdict(PRESETS[preset]) | changes))


# --- losses ----------------------------------------------------------------------------------------------------------


def binary_target(masks: torch.Tensor) -> torch.Tensor:
    """Masks float or bool ``(B, H, W)`` -> float32 0/1: anomalous above 0.3."""
    return (masks.float() > _MASK_LIMIT).float()


def focal_loss(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Focal loss with gamma 2, mean over pixels.

    Args:
        probability: ``(B, 2, H, W)``, normal and abnormal.
        target: 0/1 ``(B, H, W)``.
    """
    hot = torch.stack([1 - target, target], dim=1).clamp(_FOCAL_CLAMP, 1 - _FOCAL_CLAMP)
    right = (hot * probability).sum(dim=1) + _FOCAL_CLAMP
    return (-((1 - right) ** 2) * right.log()).mean()


def dice_loss(abnormal: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice loss per picture, mean over pictures.

    Args:
        abnormal: probability ``(B, H, W)``.
        target: 0/1 ``(B, H, W)``.
    """
    overlap = (abnormal * target).flatten(1).sum(dim=1)
    total = abnormal.flatten(1).sum(dim=1) + target.flatten(1).sum(dim=1)
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def answer_loss(
    speaker: Language, image_tokens: torch.Tensor, prompts: torch.Tensor, ids: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers' tokens, and how many were the most likely ones.

    Only the positions that predict an answer token go through the output layer: of 1024 positions with 32001 logits
    each a training batch needs some twenty.

    Args:
        speaker: the language model.
        image_tokens: ``(B, 1, hidden)``.
        prompts: ``(B, 18, hidden)``, with gradients.
        ids: int64 ``(B, L)``, question and answer, padded on the right with ``pad_id``.
        targets: int64 ``(B, L)``, ids of the answer, :data:`IGNORED` elsewhere.
    Returns:
        mean loss over the answer tokens of the batch, and their accuracy.
    """
    tokens, n_images = speaker.tokens, len(ids)
    dtype = speaker.model.get_input_embeddings().weight.dtype
    before = speaker.embed([tokens.bos_id, *tokens.encode(language.BEFORE_IMAGE)]).expand(n_images, -1, -1)
    after = speaker.embed(tokens.encode(language.AFTER_IMAGE)).expand(n_images, -1, -1)
    text = speaker.model.get_input_embeddings()(ids)
    embeds = torch.cat([before, image_tokens.to(dtype), after, prompts.to(dtype), text], dim=1)
    n_prefix = embeds.shape[1] - ids.shape[1]
    mask = torch.cat([ids.new_ones(n_images, n_prefix), (ids != tokens.pad_id).long()], dim=1)
    states = speaker.model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    # Position n_prefix + t - 1 predicts text token t.
    asked = targets != IGNORED
    logits = speaker.model.lm_head(states[:, n_prefix - 1 : -1][asked]).float()
    wanted = targets[asked]
    return nn.functional.cross_entropy(logits, wanted), (logits.argmax(dim=1) == wanted).float().mean()


def shown_maps(
    head: AnomalyHead, batch: Mapping[str, torch.Tensor], grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's pixel probabilities, and the maps that prompts are made of.

    Args:
        head: image decoder and prompt learner.
        batch: see :meth:`HeadLoss.forward`.
        grid: patches per column and row.
    Returns:
        float ``(T, B, 2, 224, 224)``, and float ``(B, 224, 224)``: the few-shot map of a picture that has one, else the
        decoder's.
    """
    probability = anomalygpt.probabilities(head.image_decoder(batch["taps"], batch["text"]), grid)
    maps = anomalygpt.decoder_map(probability)
    if "few_shot" not in batch:
        return probability, maps
    planes = batch["few_shot"][:, None].float()
    few_shot = nn.functional.interpolate(planes, size=(MAP_SIZE, MAP_SIZE), mode="bilinear", align_corners=True)
    chosen = planes.flatten(1).isfinite().all(dim=1)
    return probability, torch.where(chosen[:, None, None], few_shot[:, 0].nan_to_num(), maps)


class HeadLoss(nn.Module):
    """Loss of the head on a batch: what the training loop calls. Only the head is trained.

    Args:
        head: image decoder and prompt learner.
        speaker: frozen language model.
        projection: frozen projection of the image embedding.
        grid: patches per column and row.
        max_length: texts are cut to this many tokens.
    """

    def __init__(
        self,
        head: AnomalyHead,
        speaker: Language,
        projection: nn.Linear,
        grid: tuple[int, int],
        *,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        self.head = head.requires_grad_(True)
        self.speaker_model = speaker.model.requires_grad_(False)
        self.projection = projection.requires_grad_(False)
        self.speaker, self._grid, self._max_length = speaker, grid, max_length

    def forward(self, batch: Mapping[str, torch.Tensor], *, with_pixels: bool = True) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            batch: ``embedding (B, J)``, ``taps (T, B, N, W)``, ``text (B, 2, J)``, ``masks (B, H, W)``, ``ids`` and
                ``targets (B, L)``; optional ``few_shot (B, rows, columns)``, nan for pictures without: 1 - similarity.
            with_pixels: False leaves the map losses out, as for ordinary instruction data.
        Returns:
            ``loss``, ``answer``, ``focal``, ``dice`` (sums over the taps), ``token_accuracy``.
        """
        probability, maps = shown_maps(self.head, batch, self._grid)
        prompts = self.head.prompt_learner(maps)
        image_tokens = self.projection(batch["embedding"].to(self.projection.weight.dtype))[:, None]
        ids, targets = batch["ids"][:, : self._max_length], batch["targets"][:, : self._max_length]
        answer, accuracy = answer_loss(self.speaker, image_tokens, prompts, ids, targets)
        if not with_pixels:
            return {"loss": answer, "answer": answer, "token_accuracy": accuracy}
        target = binary_target(batch["masks"])
        focal = sum(focal_loss(tap, target) for tap in probability)
        dice = sum(dice_loss(tap[:, 1], target) for tap in probability)
        return {
            "loss": answer + focal + dice,
            "answer": answer,
            "focal": focal,
            "dice": dice,
            "token_accuracy": accuracy,
        }


def warm_up_and_decay(step: int, *, n_steps: int, warm_up: int) -> float:
    """Factor of the learning rate: logarithmic warm-up, then linear decay to 0 (DeepSpeed's WarmupDecayLR).

    >>> [round(warm_up_and_decay(s, n_steps=20, warm_up=10), 2) for s in (0, 9, 15, 20)]
    [0.29, 1.0, 0.5, 0.0]
    """
    if step < warm_up:
        # The published schedule starts at log(1) = 0 and wastes its first step; here the first step counts, too.
        return math.log(step + 2) / math.log(warm_up + 1) if step < warm_up - 1 else 1.0
    return max(0.0, (n_steps - step) / max(1, n_steps - warm_up))


def n_warm_up(n_steps: int) -> int:
    """Steps of the warm-up: a tenth of all, at least 10, at most a third (short runs of ``mini``)."""
    return max(1, min(max(10, n_steps // 10), n_steps // 3))


# --- data ------------------------------------------------------------------------------------------------------------


def question_and_answer(
    speaker: Language, question: str, answer: str, *, max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids of a training conversation and its targets; only the answer (with its end mark) is asked for.

    Raises:
        ValueError: the question alone fills ``max_length``, so that nothing would be learnt.
    """
    tokens = speaker.tokens
    asked = tokens.encode(language.prompt_text(question))
    said = tokens.encode(f"{tokens.answer_prefix}{answer}{language.ANSWER_END}")
    if len(asked) >= max_length:
        raise ValueError(
            f"The question has {len(asked)} tokens, max_length is {max_length}: no answer would be left to learn from. "
            "Shorten the question or raise max_length."
        )
    return (asked + said)[:max_length], ([IGNORED] * len(asked) + said)[:max_length]


def pad_texts(texts: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets of :func:`question_and_answer` as int64 ``(B, L)``, padded on the right."""
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.full((len(texts), longest), pad_id, dtype=torch.long)
    targets = torch.full((len(texts), longest), IGNORED, dtype=torch.long)
    for row, (row_ids, row_targets) in enumerate(texts):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        targets[row, : len(row_targets)] = torch.tensor(row_targets)
    return ids, targets


@dataclass(frozen=True)
class Pair:
    """A training sample: a normal picture, an anomalous one, and what is known about the latter.

    Attributes:
        index: of the normal picture.
        reference: index of another normal picture of the artwork for the few-shot map, None for the decoder's map.
        anomalous: uint8 RGB ``(224, 224, 3)``.
        mask: float32 ``(224, 224)``; nothing above 0.3 where the picture stayed normal.
        cells: places of the anomalies.
    """

    index: int
    reference: int | None
    anomalous: np.ndarray
    mask: np.ndarray
    cells: tuple[str, ...]

    @property
    def is_anomalous(self) -> bool:
        return bool((self.mask > _MASK_LIMIT).any())


class PairDataset:
    """Pairs of normal and anomalous pictures, drawn anew for each epoch from (seed, epoch, index) alone.

    Anomalous training pictures with masks, where a dataset has some (the supervised setting), take the place of half
    of the simulated ones of their category.

    Args:
        samples: training pictures; normal ones of every category that occurs.
        settings: see :class:`HeadTraining`.
        fixed: always the same pairs (for tuning).
    Raises:
        ValueError: no normal picture, or test pictures among them.
    """

    def __init__(self, samples: Sequence[Sample], settings: HeadTraining, *, fixed: bool = False) -> None:
        leaked = [sample.image_path for sample in samples if sample.split == "test"]
        if leaked:
            raise ValueError(f"{len(leaked)} test pictures among the training pictures, first {leaked[0]}.")
        self.normals = [sample for sample in samples if not sample.is_anomalous]
        if not self.normals:
            raise ValueError("There is no normal training picture. Make the dataset with notebook 02.")
        self._anomalous = [sample for sample in samples if sample.is_anomalous and sample.mask_path is not None]
        self._settings, self._fixed, self._epoch = settings, fixed, 0
        self._pictures: dict[Path, np.ndarray] = {}
        self._by_category: dict[str, list[int]] = {}
        for index, sample in enumerate(self.normals):
            self._by_category.setdefault(sample.category, []).append(index)

    def __len__(self) -> int:
        limit = self._settings.n_tuning if self._fixed else self._settings.max_pairs
        return min(len(self.normals), limit or len(self.normals))

    def set_epoch(self, epoch: int) -> None:
        """Draw other pictures, simulations and references from now on."""
        self._epoch = 0 if self._fixed else epoch

    def picture(self, sample: Sample) -> np.ndarray:
        """The picture squashed to 224 x 224, uint8 RGB; kept in memory (0.15 MB each)."""
        if sample.image_path not in self._pictures:
            self._pictures[sample.image_path] = squash(images.load_image(sample.image_path))
        return self._pictures[sample.image_path]

    def __getitem__(self, position: int) -> Pair:
        order = np.random.RandomState(self._seed(0)).permutation(len(self.normals))
        random = np.random.RandomState(self._seed(position + 1))
        index = int(order[position])
        normal = self.normals[index]
        mates = [i for i in self._by_category[normal.category] if i != index]
        reference = None
        if mates and random.uniform() < self._settings.few_shot_share:
            reference = int(mates[random.randint(len(mates))])
        anomalous, mask, cells = self._anomaly(normal, mates, random)
        return Pair(index, reference, anomalous, mask, cells)

    def _seed(self, number: int) -> int:
        place = f"{self._settings.seed} {'tuning' if self._fixed else self._epoch} {number}"
        return synthesis.seed_for(self._settings.seed, place) % 2**32

    def _anomaly(
        self, normal: Sample, mates: Sequence[int], random: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        picture = self.picture(normal)
        real = [sample for sample in self._anomalous if sample.category == normal.category]
        if real and random.uniform() < 0.5:
            chosen = real[random.randint(len(real))]
            mask = squash_mask(data.mask_of(chosen))
            return self.picture(chosen), mask, conversations.cells_of_mask(mask > _MASK_LIMIT)
        if random.uniform() < self._settings.own_share:
            kind = synthesis.LOCAL_KINDS[random.randint(len(synthesis.LOCAL_KINDS))]
            made, mask, _ = synthesis.synthesize(picture, kind, np.random.default_rng(random.randint(2**31)))
            return made, mask.astype(np.float32), (conversations.cell_of_center(mask),)  # twenty dots are one mark
        source = self.normals[random.randint(len(self.normals))]
        made = nsa.simulate_visible(picture, self.picture(source), random)
        if made is None:  # for example a uniform picture: it stays normal, and is answered so
            return picture, np.zeros((MAP_SIZE, MAP_SIZE), dtype=np.float32), ()
        return made.image, made.label, _cells_of_patches(made)


def _cells_of_patches(simulation: nsa.Simulation) -> tuple[str, ...]:
    """Cell of each patch that left a visible change."""
    height, width = simulation.mask.shape
    cells = []
    for top, bottom, left, right in simulation.patches:
        rows, columns = np.nonzero(simulation.mask[top:bottom, left:right])
        if len(rows):
            cells.append(
                conversations.cell_of((top + rows.mean() + 0.5) / height, (left + columns.mean() + 0.5) / width)
            )
    return tuple(cells)


def squash(image: np.ndarray, size: int = MAP_SIZE) -> np.ndarray:
    """A picture resized bicubically to a square, uint8 RGB."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def squash_mask(mask: np.ndarray, size: int = MAP_SIZE) -> np.ndarray:
    """A bool mask resized to a square, float32: 1 in every pixel that any anomalous pixel falls on.

    Thin cracks survive; averaging, as published, loses them and then teaches "No" about an anomalous picture.
    """
    rows, columns = np.nonzero(mask)
    small = np.zeros((size, size), dtype=np.float32)
    small[rows * size // mask.shape[0], columns * size // mask.shape[1]] = 1.0
    if mask.shape[0] < size or mask.shape[1] < size:  # enlarging leaves gaps
        import cv2

        enlarged = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_NEAREST)
        small = np.maximum(small, enlarged)
    return small


class Collate:
    """Pairs -> the batch of :class:`HeadLoss`; frozen features of normal pictures and banks are kept in memory.

    Args:
        model: the chain, for its image tower, tokens and text features.
        dataset: where the normal pictures come from.
        settings: see :class:`HeadTraining`.
    """

    def __init__(self, model: AnomalyGPT, dataset: PairDataset, settings: HeadTraining) -> None:
        self._model, self._dataset, self._settings = model, dataset, settings
        self._eyes: ImageBind = model.eyes
        self._normal: dict[int, ImageFeatures] = {}
        self._banks: dict[int, torch.Tensor] = {}

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        fresh = self._eyes.embed_images([pair.anomalous for pair in pairs])
        features, texts, masks, few_shot, names = [], [], [], [], []
        for number, pair in enumerate(pairs):
            category = self._dataset.normals[pair.index].category
            for picture, mask in ((self._of_normal(pair.index), None), (fresh.take([number]), pair.mask)):
                is_anomalous = mask is not None and pair.is_anomalous
                features.append(picture)
                masks.append(np.zeros((MAP_SIZE, MAP_SIZE), np.float32) if mask is None else mask)
                texts.append(self._text(category, is_anomalous, pair.cells))
                names.append("object")
                few_shot.append(self._few_shot(picture, pair.reference))
        joined = ImageFeatures.join(features)
        ids, targets = pad_texts(texts, self._model.language.tokens.pad_id)
        return {
            "embedding": joined.embedding,
            "taps": joined.taps,
            "text": torch.stack([self._model.text_pair_of(name) for name in names]),
            "masks": torch.from_numpy(np.stack(masks)),
            "ids": ids,
            "targets": targets,
            "few_shot": torch.stack(few_shot),
        }

    def _text(self, category: str, is_anomalous: bool, cells: Sequence[str]) -> tuple[list[int], list[int]]:
        question = ask_about(category, self._settings.wording)
        answer = conversations.answer(is_anomalous, cells)
        return question_and_answer(self._model.language, question, answer, max_length=self._settings.max_length)

    def _of_normal(self, index: int) -> ImageFeatures:
        if index not in self._normal:
            picture = self._dataset.picture(self._dataset.normals[index])
            self._normal[index] = self._eyes.embed_images([picture])
        return self._normal[index]

    def _few_shot(self, features: ImageFeatures, reference: int | None) -> torch.Tensor:
        """``(rows, columns)``: 1 - similarity to the reference in four rotations; nan without one."""
        if reference is None:
            return torch.full(self._eyes.grid, math.nan, device=features.taps.device)
        if reference not in self._banks:
            pixels = self._eyes.preprocess(self._dataset.picture(self._dataset.normals[reference]))[None]
            self._banks[reference] = anomalygpt.build_bank(self._eyes.features(anomalygpt.rotations(pixels)).taps)
        similarity = anomalygpt.bank_similarity(features.taps, self._banks[reference])
        return 1.0 - similarity.mean(dim=0)[0].unflatten(0, self._eyes.grid)


def normals_of(dataset: data.Dataset, category: str) -> tuple[list[Sample], list[Sample]]:
    """Normal pictures to learn from or refer to, and others to set thresholds with.

    Industrial folders have no calibration split: the last third of their normals is kept for it, in training, too.
    """
    normals = dataset.select(split="train", category=category, is_anomalous=False)
    held_out = dataset.select(split="calibration", category=category, is_anomalous=False)
    if held_out or len(normals) < 2:
        return normals, held_out
    cut = max(1, len(normals) * 2 // 3)
    return normals[:cut], normals[cut:]


def training_samples(dataset: data.Dataset) -> list[Sample]:
    """Pictures to train on: normals that set no threshold, and anomalous ones of split ``train`` if there are any."""
    normals = [sample for category in dataset.categories for sample in normals_of(dataset, category)[0]]
    return normals + dataset.select(split="train", is_anomalous=True)


def split_for_tuning(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Training and tuning pictures; pictures of one group stay together, every category keeps both parts.

    Which groups are kept back depends on their names only. A category with a single group gives none away.
    """
    groups: dict[str, list[str]] = {}
    for sample in samples:
        names = groups.setdefault(sample.category, [])
        group = sample.group or str(sample.image_path)
        if group not in names:
            names.append(group)
    kept_back: set[tuple[str, str]] = set()
    for category, names in groups.items():
        shuffled = sorted(names, key=lambda name: storage.sha256_json([category, name]))
        n_back = min(len(shuffled) - 1, max(1, round(share * len(shuffled)))) if len(shuffled) > 1 else 0
        kept_back |= {(category, name) for name in shuffled[:n_back]}
    is_tuning = [(sample.category, sample.group or str(sample.image_path)) in kept_back for sample in samples]
    return (
        [sample for sample, tuning in zip(samples, is_tuning) if not tuning],
        [sample for sample, tuning in zip(samples, is_tuning) if tuning],
    )


def ask_about(category: str, wording: str | None) -> str:
    """The question about a picture of a category; ``wording`` None asks without naming it."""
    return conversations.question(None) if wording is None else conversations.question(category, wording=wording)


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedHead:
    """What a training leaves behind.

    Attributes:
        folder: holds ``model.safetensors`` (21 tensors as published, float16) and ``training.json``.
        result: history, best score and reason to stop.
        n_train, n_tuning: pairs.
    """

    folder: Path
    result: training.TrainingResult
    n_train: int
    n_tuning: int


def train_head(
    model: AnomalyGPT,
    samples: Sequence[Sample],
    *,
    folder: Path,
    settings: HeadTraining,
    on_history: Callable[[list[dict[str, Any]]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    restart: bool = False,
) -> TrainedHead:
    """Train the head of ``model`` on normal pictures; resume if ``folder`` holds a checkpoint of the same run.

    After it, ``model.head`` holds the best parameters of the tuning split (early stopping).

    Args:
        model: the chain; its head is the start and is changed in place.
        samples: training pictures (split ``train``); see :class:`PairDataset`.
        folder: checkpoints go to ``folder/steps``, the result to ``folder``.
        settings: see :class:`HeadTraining`.
        on_history, on_checkpoint, restart: see :func:`helpers.training.train`.
    Raises:
        helpers.training.TrainingStopped: a loss became nan or infinite.
        RuntimeError: GPU memory ran out; names what to change.
        ValueError: pictures or settings that cannot be trained with; other settings than the checkpoint's.
    """
    folder = Path(folder)
    learning, tuning = split_for_tuning(samples, settings.tuning_share)
    dataset = PairDataset(learning, settings)
    tuning_set = PairDataset(tuning, settings, fixed=True) if any(not s.is_anomalous for s in tuning) else None
    module = HeadLoss(model.head, model.language, model.projection, model.eyes.grid, max_length=settings.max_length).to(
        model.device
    )
    if settings.gradient_checkpointing:
        model.language.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    n_steps = settings.n_epochs * math.ceil(len(dataset) / settings.batch_size)
    optimizer = torch.optim.AdamW(
        model.head.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    warm_up = n_warm_up(n_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_and_decay(step, n_steps=n_steps, warm_up=warm_up)
    )
    head_before = model.checkpoint_id
    evaluate = None if tuning_set is None else _TuningScore(model, tuning_set, settings)
    try:
        with language.memory_errors("a smaller micro_batch, gradient_checkpointing=True or precision '4bit'"):
            result = training.train(
                module,
                dataset,
                optimizer,
                folder=folder / "steps",
                settings=training.TrainingSettings(
                    n_epochs=settings.n_epochs, batch_size=settings.micro_batch,
                    n_accumulation=settings.batch_size // settings.micro_batch, precision=settings.precision,
                    max_grad_norm=1.0, seed=settings.seed, patience=settings.patience,
                    checkpoint_every=settings.checkpoint_every,
                ),
                device=str(model.device),
                collate=Collate(model, dataset, settings),
                scheduler=scheduler,
                evaluate=evaluate,
                fingerprint={
                    "settings": {k: v for k, v in asdict(settings).items() if k not in ("patience", "micro_batch")},
                    "pictures": storage.sha256_json(sorted(sample.sha256 for sample in samples)),
                    "eyes": model.eyes.weights_id, "start": head_before, "hidden": model.language.hidden,
                },
                restart=restart,
                on_history=on_history,
                on_checkpoint=on_checkpoint,
                title="AnomalyGPT head",
            )  # fmt: skip
    finally:
        if settings.gradient_checkpointing:
            model.language.model.gradient_checkpointing_disable()
        module.eval()
    _export(model.head, folder, settings, result, len(dataset))
    return TrainedHead(folder, result, len(dataset), 0 if tuning_set is None else len(tuning_set))


class _TuningScore:
    """Minus the mean loss on fixed simulated pairs: higher is better, and smooth even with few pairs (an AUROC of
    four pairs moves in steps of 1/16, and early stopping would follow its luck)."""

    def __init__(self, model: AnomalyGPT, dataset: PairDataset, settings: HeadTraining) -> None:
        self._collate, self._dataset = Collate(model, dataset, settings), dataset
        self._device, self._size = model.device, settings.micro_batch

    def __call__(self, module: nn.Module) -> float:
        total = 0.0
        for start in range(0, len(self._dataset), self._size):
            pairs = [self._dataset[i] for i in range(start, min(start + self._size, len(self._dataset)))]
            batch = {name: tensor.to(self._device) for name, tensor in self._collate(pairs).items()}
            total += float(module(batch)["loss"]) * len(pairs)
        return -total / len(self._dataset)


def _export(
    head: AnomalyHead, folder: Path, settings: HeadTraining, result: training.TrainingResult, n_train: int
) -> None:
    """``model.safetensors`` in the published layout, and what it came from, written last."""
    from safetensors.torch import save_file

    state = {key: tensor.detach().half().cpu().contiguous() for key, tensor in head.state_dict().items()}
    with storage.atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    storage.write_json(
        folder / "training.json",
        {
            "settings": asdict(settings),
            "best_score": result.best_score,
            "best_epoch": result.best_epoch,
            "n_steps": result.n_steps,
            "n_train": n_train,
            "reason": result.reason,
            "sha256": storage.sha256_file(folder / "model.safetensors"),
            "history": list(result.history),
        },
    )
