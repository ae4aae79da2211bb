"""What AnomalyGPT's head learns from: pairs of a genuine picture and a simulated anomaly of it.

Half of the anomalies are patches of other pictures blended in without an edge (NSA, as published), half are marks of
the suite, on the same photograph as the genuine picture. Every epoch draws new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.anomalygpt import conversations
from helpers.anomalygpt.model import MAP_SIZE
from helpers.data import images, mask_of
from helpers.records import Sample
from helpers.synthesis import LOCAL_KINDS, damaged_view, nsa, seed_for

PRESETS = {"15x8": (15, 8), "15x16": (15, 16), "20x16": (20, 16), "25x16": (25, 16)}
"""The report's runs: epochs and batch size."""
OWN_SHARE = FEW_SHOT_SHARE = 0.5
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
    wording: str | None = "published"  # of the questions, see conversations.question
    checkpoint_every: int = 50  # optimiser steps between checkpoints beside the one at each epoch's end
    seed: int = 42  # of order and simulation

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch is {self.micro_batch}, batch_size {self.batch_size}: it must be at least 1 and divide it."
            )
        if self.learning_rate <= 0 or self.n_epochs < 1:
            raise ValueError("learning_rate must be positive and n_epochs at least 1.")


def from_preset(preset: str, **changes: Any) -> HeadTraining:
    """Settings of a run of the report, with changes.

    >>> from_preset("20x16", micro_batch=2).n_epochs
    20

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; the report's runs are {', '.join(PRESETS)}.")
    n_epochs, batch_size = PRESETS[preset]
    return HeadTraining(**{"n_epochs": n_epochs, "batch_size": batch_size, **changes})


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
    def is_anomalous(self) -> bool:
        return bool((self.mask > MASK_LIMIT).any())


@dataclass(frozen=True)
class Confirmed:
    """A picture whose label the user of the chat has confirmed."""

    image_path: Path
    category: str
    cell: str | None = None  # where the anomaly is, a word of conversations.CELLS; None for a genuine picture


class PairDataset:
    """Pairs of normal and anomalous pictures, drawn anew for each epoch from (seed, epoch, index) alone.

    Half of the simulated anomalies give way to real ones of their painting, where there are some: anomalous training
    pictures with masks (the supervised setting), and confirmed ones, whose mask is their cell of the 3 x 3 grid.

    Args:
        samples: training pictures.
        settings: see :class:`HeadTraining`.
        kinds: kinds of the suite's own marks to learn from.
        confirmed: pictures of the feedback; each other pair starts from a genuine one, if there is one.
        fixed: always the same pairs (for tuning).
    Raises:
        ValueError: no normal picture, or test pictures among them.
    """

    def __init__(
        self, samples: Sequence[Sample], settings: HeadTraining, *, kinds: Sequence[str] = LOCAL_KINDS,
        confirmed: Sequence[Confirmed] = (), fixed: bool = False,
    ) -> None:  # fmt: skip
        leaked = [sample.image_path for sample in samples if sample.split == "test"]
        if leaked:
            raise ValueError(f"{len(leaked)} test pictures among the training pictures, first {leaked[0]}.")
        self.normals = [(s.image_path, s.category) for s in samples if not s.is_anomalous]
        if not self.normals:
            raise ValueError("There is no normal training picture. Make the dataset with notebook 02.")
        self._real = [s for s in samples if s.is_anomalous and s.mask_path] + [c for c in confirmed if c.cell]
        self._genuine = [(c.image_path, c.category) for c in confirmed if not c.cell]
        self._settings, self._kinds, self._fixed, self._epoch = settings, tuple(kinds), fixed, 0
        self._squares: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        limit = self._settings.n_tuning if self._fixed else self._settings.max_pairs
        return min(len(self.normals), limit or len(self.normals))

    def set_epoch(self, epoch: int) -> None:
        """Draw other pictures, simulations and references from now on."""
        self._epoch = 0 if self._fixed else epoch

    def square(self, path: Path) -> np.ndarray:
        """The picture squashed to 224 x 224, uint8 RGB; kept in memory (0.15 MB each)."""
        if path not in self._squares:
            self._squares[path] = squash(images.load_image(path))
        return self._squares[path]

    def __getitem__(self, position: int) -> Pair:
        order = np.random.RandomState(self._seed(0)).permutation(len(self.normals))
        random = np.random.RandomState(self._seed(position + 1))
        path, category = self.normals[int(order[position])]
        if self._genuine and position % 2:
            path, category = self._genuine[random.randint(len(self._genuine))]
        mates = [other for other, painting in self.normals if painting == category and other != path]
        reference = None
        if mates and random.uniform() < FEW_SHOT_SHARE:
            reference = self.square(mates[random.randint(len(mates))])
        return Pair(category, *self._anomaly(path, category, random), reference)

    def _seed(self, number: int) -> int:
        place = f"{self._settings.seed} {'tuning' if self._fixed else self._epoch} {number}"
        return seed_for(self._settings.seed, place) % 2**32

    def _anomaly(
        self, path: Path, category: str, random: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
        """Normal picture, anomalous picture, mask and places."""
        real = [one for one in self._real if one.category == category]
        if real and random.uniform() < 0.5:
            chosen = real[random.randint(len(real))]
            mask = _cell_mask(chosen.cell) if isinstance(chosen, Confirmed) else squash_mask(mask_of(chosen))
            cells = conversations.cells_of_mask(mask > MASK_LIMIT)
            return self.square(path), self.square(chosen.image_path), mask, cells
        if self._kinds and random.uniform() < OWN_SHARE:
            kind, seed = self._kinds[random.randint(len(self._kinds))], random.randint(2**31)
            picture = images.load_image(path, max_side=2 * MAP_SIZE)
            normal = damaged_view(picture, seed=seed)[0]  # the same photograph without the mark
            made, drawn, _ = damaged_view(picture, seed=seed, kind=kind)
            mask = squash_mask(drawn)
            return squash(normal), squash(made), mask, (conversations.cell_of_center(mask > 0),)  # dots are one mark
        normal = self.square(path)
        source = self.square(self.normals[random.randint(len(self.normals))][0])
        simulated = nsa.simulate_visible(normal, source, random)
        if simulated is None:  # for example a uniform picture: it stays normal, and is answered so
            return normal, normal, np.zeros((MAP_SIZE, MAP_SIZE), dtype=np.float32), ()
        return normal, simulated.image, simulated.label, _cells_of_patches(simulated)


def _cells_of_patches(simulation: nsa.Simulation) -> tuple[str, ...]:
    """Cell of each patch that left a visible change."""
    cells = []
    for top, bottom, left, right in simulation.patches:
        patch = np.zeros_like(simulation.mask, dtype=bool)
        patch[top:bottom, left:right] = simulation.mask[top:bottom, left:right] > 0
        cells += [conversations.cell_of_center(patch)] if patch.any() else []
    return tuple(cells)


def _cell_mask(cell: str) -> np.ndarray:
    """A cell of the 3 x 3 grid as a float32 mask: it says where, not what shape."""
    number = [name for row in conversations.CELLS for name in row].index(cell)
    edges = [round(third * MAP_SIZE / 3) for third in range(4)]
    mask = np.zeros((MAP_SIZE, MAP_SIZE), dtype=np.float32)
    mask[edges[number // 3] : edges[number // 3 + 1], edges[number % 3] : edges[number % 3 + 1]] = 1.0
    return mask


def squash(image: np.ndarray) -> np.ndarray:
    """A picture resized bicubically to 224 x 224, uint8 RGB."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BICUBIC))


def squash_mask(mask: np.ndarray) -> np.ndarray:
    """A bool mask resized to 224 x 224, float32: 1 in every pixel that any anomalous pixel falls on.

    Thin cracks survive; averaging, as published, loses them and then teaches "No" about an anomalous picture.
    """
    import cv2

    rows, columns = np.nonzero(mask)
    small = cv2.resize(mask.astype(np.float32), (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_NEAREST)
    small[rows * MAP_SIZE // mask.shape[0], columns * MAP_SIZE // mask.shape[1]] = 1.0
    return small
