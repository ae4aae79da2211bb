"""What AnomalyGPT's head learns from: pairs of a genuine picture and a simulated anomaly of it.

Half of the anomalies are patches of other pictures blended in without an edge (NSA, as published), half are marks of
the suite, on the same photograph as the genuine picture. Every epoch draws new ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from helpers import files
from helpers.anomalygpt import conversations
from helpers.anomalygpt.model import MAP_SIZE
from helpers.data import Dataset, images, mask_of
from helpers.records import Sample
from helpers.synthesis import LOCAL_KINDS, damaged_view, nsa, seed_for

PRESETS = {f"{n}x{size}": {"n_epochs": n, "batch_size": size} for n, size in ((15, 8), (15, 16), (20, 16), (25, 16))}
"""The report's runs: epochs and batch size of :class:`HeadTraining`."""
OWN_SHARE = FEW_SHOT_SHARE = REAL_SHARE = 0.5
TUNING_SHARE = 0.2
MASK_LIMIT = 0.3
"""A pixel is anomalous above it, as published."""


@dataclass(frozen=True)
class HeadTraining:
    """How the head is trained; refuses numbers outside what is allowed with a ``ValueError``."""

    n_epochs: int = 15  # passes over the training pictures; may grow when a run is resumed
    batch_size: int = 8  # samples (pairs of pictures) per optimiser step
    micro_batch: int = 4  # pairs per forward pass, divides batch_size; may shrink when a run is resumed
    learning_rate: float = 1e-3  # highest rate of the schedule
    max_pairs: int | None = None  # pairs per epoch at most (drawn anew each epoch), None for one per training picture
    n_tuning: int = 16  # tuning pairs at most
    patience: int | None = 4  # tuning scores without improvement until training stops, None for never
    wording: str = "published"  # of the questions, see conversations.question
    checkpoint_every: int = 50  # optimiser steps between checkpoints beside the one at each epoch's end
    seed: int = 42  # of order and simulation

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.batch_size % self.micro_batch or self.learning_rate <= 0 or self.n_epochs < 1:
            raise ValueError(f"{self}: micro_batch must divide batch_size, and all must be positive.")


@dataclass(frozen=True)
class Pair:
    """A training sample: a normal picture, an anomalous one, and what is known about the latter."""

    category: str
    normal: np.ndarray  # uint8 RGB (224, 224, 3)
    anomalous: np.ndarray  # of the same kind
    mask: np.ndarray  # float32 (224, 224); nothing above 0.3 where the picture stayed normal
    cells: tuple[str, ...]  # places of the anomalies
    reference: np.ndarray | None  # another normal picture for the few-shot map, None for the decoder's map

    @property
    def answers(self) -> tuple[str, str]:
        """What is to be said of the normal and of the anomalous picture."""
        is_anomalous = bool((self.mask > MASK_LIMIT).any())
        return conversations.NORMAL_ANSWER, conversations.answer(is_anomalous, self.cells)


@dataclass(frozen=True)
class Confirmed:
    """A picture whose label the user of the chat has confirmed."""

    image_path: Path
    category: str
    cell: str | None = None  # where the anomaly is, a word of conversations.CELLS; None for a genuine picture


class PairDataset:
    """Pairs of normal and anomalous pictures, drawn anew for each epoch from (seed, epoch, index) alone.

    Half of the simulated anomalies give way to real ones of their painting, where there are some: anomalous training
    pictures with masks (the supervised setting), and confirmed ones, whose mask is their cell of the 3 x 3 grid; each
    other pair starts from a genuine ``confirmed`` picture, if there is one. ``kinds`` are those of the suite's own
    marks; ``fixed`` gives the same pairs in each epoch (for tuning). Test pictures are a ``ValueError``.
    """

    def __init__(
        self, samples: Sequence[Sample], settings: HeadTraining, *, kinds: Sequence[str] = LOCAL_KINDS,
        confirmed: Sequence[Confirmed] = (), fixed: bool = False,
    ) -> None:  # fmt: skip
        if leaked := [sample.image_path for sample in samples if sample.split == "test"]:
            raise ValueError(f"{len(leaked)} test pictures are to be learnt from, first {leaked[0]}.")
        self.normals = [(s.image_path, s.category) for s in samples if not s.is_anomalous]
        self.kinds = list(kinds)
        self._real = [s for s in samples if s.is_anomalous and s.mask_path] + [c for c in confirmed if c.cell]
        self._genuine = [(c.image_path, c.category) for c in confirmed if not c.cell]
        self._settings, self._fixed, self._epoch = settings, fixed, 0
        self._square = functools.cache(lambda path: squash(images.load_image(path)))  # 0.15 MB each

    def __len__(self) -> int:
        limit = self._settings.n_tuning if self._fixed else self._settings.max_pairs
        return min(len(self.normals), limit or len(self.normals))

    def set_epoch(self, epoch: int) -> None:
        """Draw other pictures, simulations and references from now on."""
        self._epoch = 0 if self._fixed else epoch

    def __getitem__(self, position: int) -> Pair:
        order = np.random.RandomState(self._seed(0)).permutation(len(self.normals))
        random = np.random.RandomState(self._seed(position + 1))
        path, category = self.normals[int(order[position])]
        if self._genuine and position % 2:
            path, category = self._genuine[random.randint(len(self._genuine))]
        mates = [other for other, painting in self.normals if painting == category and other != path]
        reference = None
        if mates and random.uniform() < FEW_SHOT_SHARE:
            reference = self._square(mates[random.randint(len(mates))])
        real = [one for one in self._real if one.category == category]
        if real and random.uniform() < REAL_SHARE:
            chosen = real[random.randint(len(real))]
            is_cell = isinstance(chosen, Confirmed)  # says where, not what shape
            mask = squash_mask(np.array(conversations.CELLS) == chosen.cell if is_cell else mask_of(chosen))
            cells = conversations.cells_of_mask(mask > MASK_LIMIT)
            return Pair(category, self._square(path), self._square(chosen.image_path), mask, cells, reference)
        is_own = self.kinds and random.uniform() < OWN_SHARE
        return Pair(category, *(self._own if is_own else self._blended)(path, random), reference)

    def _seed(self, number: int) -> int:
        place = f"{self._settings.seed} {'tuning' if self._fixed else self._epoch} {number}"
        return seed_for(self._settings.seed, place) % 2**32

    def _own(self, path: Path, random: np.random.RandomState) -> tuple:
        """One photograph without and with a mark of the suite, its mask, and its cell (dots are one mark)."""
        kind, seed = self.kinds[random.randint(len(self.kinds))], random.randint(2**31)
        picture = images.load_image(path, max_side=2 * MAP_SIZE)
        normal = damaged_view(picture, seed=seed)[0]
        made, drawn, _ = damaged_view(picture, seed=seed, kind=kind)
        mask = squash_mask(drawn)
        return squash(normal), squash(made), mask, (conversations.cell_of_center(mask > 0),)

    def _blended(self, path: Path, random: np.random.RandomState) -> tuple:
        """A picture without and with patches of another one (NSA), the label, and the cell of each visible patch."""
        normal, source = self._square(path), self._square(self.normals[random.randint(len(self.normals))][0])
        made = nsa.simulate_visible(normal, source, random)
        if made is None:  # for example a uniform picture: it stays normal, and is answered so
            return normal, normal, np.zeros((MAP_SIZE, MAP_SIZE), dtype=np.float32), ()
        cells = []
        for top, bottom, left, right in made.patches:
            patch = np.zeros_like(made.mask, dtype=bool)
            patch[top:bottom, left:right] = made.mask[top:bottom, left:right] > 0
            cells += [conversations.cell_of_center(patch)] if patch.any() else []
        return normal, made.image, made.label, tuple(cells)


def pairs_of(
    dataset: Dataset, settings: HeadTraining, *, confirmed: Sequence[Confirmed] = ()
) -> tuple[PairDataset, PairDataset | None]:
    """Pairs to learn from, and fixed ones to choose the best epoch with, of a fifth of the sources of each painting but
    never of the only one (None where none is left); both without the kinds that the dataset holds out."""
    learnt, tuning = [], []
    for category in dataset.categories:
        samples = dataset.select(split="train", category=category)
        groups = {sample.group for sample in samples if not sample.is_anomalous}
        n_back = max(0, min(len(groups) - 1, max(1, round(TUNING_SHARE * len(groups)))))
        back = sorted(groups, key=lambda name, category=category: files.sha256_json([category, name]))[:n_back]
        tuning += [sample for sample in samples if sample.group in back]
        learnt += [sample for sample in samples if sample.group not in back]
    kinds = [kind for kind in LOCAL_KINDS if kind not in dataset.kinds_held_out]
    fixed = PairDataset(tuning, settings, kinds=kinds, fixed=True) if tuning and settings.n_tuning else None
    return PairDataset(learnt, settings, kinds=kinds, confirmed=confirmed), fixed


def squash(image: np.ndarray) -> np.ndarray:
    """A picture resized bicubically to 224 x 224, uint8 RGB."""
    return np.asarray(Image.fromarray(image).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BICUBIC))


def squash_mask(mask: np.ndarray) -> np.ndarray:
    """A bool mask resized to 224 x 224, float32: 1 in every pixel that any anomalous pixel falls on. (Averaging, as
    published, loses thin cracks and then teaches "No" about them.)"""
    rows, columns = np.nonzero(mask)
    small = cv2.resize(mask.astype(np.float32), (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_NEAREST)
    small[rows * MAP_SIZE // mask.shape[0], columns * MAP_SIZE // mask.shape[1]] = 1.0
    return small
