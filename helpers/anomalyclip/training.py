"""Training of AnomalyCLIP's prompts: pictures of *other* things with masks, cached image features, tuning.

Zero-shot means that the prompts have seen nothing of the artworks under test. So they learn from auxiliary pictures:
MVTec AD or VisA, or synthetic anomalies on other pictures. Pictures of the artworks under test are refused; training
on their training split is few-shot learning, has to be asked for, and is labelled so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from helpers import files as storage
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalyclip.model import DetectorSettings, PromptLearner, PromptTraining
from helpers.records import NORMAL_KIND, Sample

if TYPE_CHECKING:
    from helpers.clip.backbones import Clip
    from helpers.data.manifest import Dataset
    from helpers.results import MethodResult
    from helpers.training_old import TrainingResult, TrainingSettings

ARTISTS_UNDER_TEST = ("vinci", "vermeer")
"""Left out of auxiliary artworks: another photograph of the same painting need not look alike to a hash."""

PACKAGE_PICTURES = {
    "skimage": "data/brick.png data/coins.png data/color.png data/grass.png data/gravel.png data/horse.png "
    "data/hubble_deep_field.jpg data/ihc.png data/moon.png data/motorcycle_left.png data/page.png data/retina.jpg "
    "data/rocket.jpg data/text.png",
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
}
"""Pictures inside installed packages. The embedded artworks are rendered from astronaut, coffee, chelsea and camera:
these four are left out here."""

MASK_RULES = ("bilinear", "any")
AUXILIARY, FEW_SHOT = "auxiliary", "few-shot"


# --- which pictures --------------------------------------------------------------------------------------------------


def auxiliary_samples(
    source: str | Path,
    target: Path,
    *,
    n_views: int,
    max_side: int,
    seed: int,
    limit: int | None = None,
) -> list[Sample]:
    """Pictures to train prompts on, split ``"train"`` to learn from and ``"calibration"`` to tune.

    Args:
        source: ``"packages"`` (pictures inside Python packages, offline), ``"best_artworks"`` (paintings of other
            artists, downloaded), or a folder in MVTec AD or VisA layout with real anomalies and masks.
        target: where made pictures go.
        n_views, max_side, seed: see :func:`make_auxiliary`; a folder's own pictures are taken as they are.
        limit: pictures per artist taken of ``"best_artworks"``.
    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if str(source) == "packages":
        pictures = package_pictures()
    elif str(source) == "best_artworks":
        from helpers.data import sources

        found = sources.best_artworks(limit=limit)
        pictures = [s for s in found if not any(name in s.category.lower() for name in ARTISTS_UNDER_TEST)]
    elif Path(source).exists():
        return published_auxiliary(Path(source), seed=seed)
    else:
        raise FileNotFoundError(
            f"{source!r} is no folder; allowed are 'packages', 'best_artworks', or a folder in MVTec AD or VisA layout."
        )
    return make_auxiliary(pictures, Path(target) / "views", n_views=n_views, max_side=max_side, seed=seed)


def package_pictures() -> list[Sample]:
    """The pictures of :data:`PACKAGE_PICTURES` that are installed, as normal pictures of category ``"auxiliary"``.

    Raises:
        FileNotFoundError: fewer than four are installed, too few for a tuning split.
    """
    from importlib.util import find_spec

    found = []
    for package, names in PACKAGE_PICTURES.items():
        spec = find_spec(package)
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        found += [] if folder is None else [folder / name for name in names.split() if (folder / name).exists()]
    if len(found) < 4:
        raise FileNotFoundError(
            f"{len(found)} pictures found inside {', '.join(PACKAGE_PICTURES)}; at least 4 are needed. Install "
            "scikit-image and scikit-learn, or give a folder in MVTec AD or VisA layout."
        )
    return [Sample(path, "auxiliary", False, split="train", group=f"{path.parent.name}/{path.stem}") for path in found]


def make_auxiliary(
    pictures: Sequence[Sample],
    target: Path,
    *,
    n_views: int,
    max_side: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    tuning_share: float = 0.25,
) -> list[Sample]:
    """Synthetic anomalies on normal pictures: photographed crops, every second one damaged, written with masks.

    Views of one picture stay in one split: ``"train"`` to learn from, ``"calibration"`` to tune. A complete folder
    with the same arguments is read, not made again.

    Args:
        pictures: normal pictures.
        target: folder to write to, in MVTec layout with ``manifest.csv``.
        n_views: views per picture, an even number, half of them damaged.
        max_side: longer side of a view in pixels.
        seed: determines crops, damages and the split.
        kinds: kinds of damage (:data:`helpers.synthesis.marks.LOCAL_KINDS` by default).
        tuning_share: share of the pictures that tune.
    Raises:
        ValueError: fewer than two pictures, an anomalous one, or an odd ``n_views``.
    """
    from helpers import data, synthesis
    from helpers.data import images

    if len(pictures) < 2 or any(sample.is_anomalous for sample in pictures):
        raise ValueError(f"{len(pictures)} pictures given; synthetic anomalies need at least two, all of them normal.")
    if n_views < 2 or n_views % 2:
        raise ValueError(f"n_views is {n_views}; an even number from 2 on is needed, half of the views are damaged.")
    kinds = tuple(synthesis.LOCAL_KINDS if kinds is None else kinds)
    key = storage.sha256_json(
        [[storage.sha256_file(sample.image_path) for sample in pictures], n_views, max_side, seed, kinds, tuning_share]
    )
    target = Path(target)
    mark = target / data.MANIFEST_JSON
    if mark.exists() and storage.read_json(mark).get("auxiliary_key") == key:
        return data.load_manifest(target / data.MANIFEST_CSV)
    mark.unlink(missing_ok=True)
    order = np.random.default_rng(seed).permutation(len(pictures))
    n_tuning = min(max(1, round(tuning_share * len(pictures))), len(pictures) - 1)
    tuning = set(order[:n_tuning].tolist())
    samples = []
    for number, source in enumerate(pictures):
        image = images.load_image(source.image_path, max_side=2 * max_side)
        split = "calibration" if number in tuning else "train"
        for view in range(n_views):
            rng = np.random.default_rng([seed, number, view])
            picture, mask, kind = _view(image, rng, max_side), None, NORMAL_KIND
            picture, _ = synthesis.rephotograph(picture, rng)  # light and camera are no anomaly
            if view % 2:
                kind = kinds[int(rng.integers(len(kinds)))]
                picture, mask, _ = synthesis.synthesize(picture, kind, rng)
            stem = f"{number:04d}_{view:02d}"
            # MVTec keeps anomalous pictures under test/; the split that counts stands in the manifest.
            phase = "test" if view % 2 else "train"
            path = target / source.category / phase / kind / f"{stem}.png"
            images.save_png(path, picture)
            mask_path = None
            if mask is not None:
                mask_path = target / source.category / "ground_truth" / kind / f"{stem}_mask.png"
                images.save_png(mask_path, mask)
            group = source.group or f"{source.category}/{source.image_path.stem}"
            samples.append(Sample(path, source.category, mask is not None, mask_path, split, kind, group))
    data.write_manifest(target / data.MANIFEST_CSV, samples, info={"auxiliary_key": key})
    return data.load_manifest(target / data.MANIFEST_CSV)


def _view(image: np.ndarray, rng: np.random.Generator, max_side: int) -> np.ndarray:
    """A crop of 60 to 100 % of each side, shrunk to ``max_side``."""
    from helpers.data import images

    height, width = image.shape[:2]
    rows, columns = int(height * rng.uniform(0.6, 1)), int(width * rng.uniform(0.6, 1))
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    return images.resize(np.ascontiguousarray(image[top : top + rows, left : left + columns]), max_side)


def published_auxiliary(folder: Path, *, tuning_share: float = 0.25, seed: int = 111) -> list[Sample]:
    """Test pictures, normal and anomalous, of a dataset in MVTec AD or VisA layout, split to learn and to tune.

    The published prompts were trained on complete test splits, because anomalous pictures are needed. The tuning
    split is drawn by group within each category and kind.

    Raises:
        ValueError: no anomalous picture in the folder's test split.
    """
    from dataclasses import replace

    from helpers import data

    samples = [sample for sample in data.read_folder(folder).samples if sample.split == "test"]
    if not any(sample.is_anomalous for sample in samples):
        raise ValueError(f"{folder} has no anomalous test picture; prompts learn from normal and anomalous ones.")
    rng = np.random.default_rng(seed)
    tuning: set[str] = set()
    for key in sorted({(sample.category, sample.kind) for sample in samples}):
        groups = sorted({sample.group for sample in samples if (sample.category, sample.kind) == key})
        tuning |= set(rng.permutation(groups)[: round(tuning_share * len(groups))].tolist())
    return [replace(sample, split="calibration" if sample.group in tuning else "train") for sample in samples]


def check_auxiliary(samples: Sequence[Sample], dataset: Dataset, *, few_shot: bool = False) -> str:
    """Refuse to train on what is tested.

    Compares files, source pictures, and looks (perceptual hash, which sees through another size or compression).

    Args:
        samples: pictures to train or tune on.
        dataset: with the artworks under test.
        few_shot: allow pictures of the training split of these artworks.
    Returns:
        ``"auxiliary"``, or ``"few-shot"`` when a picture of an artwork under test is among them.
    Raises:
        ValueError: a calibration or test picture is among them; or a training one without ``few_shot``.
    """
    from helpers import data
    from helpers.data import images

    everything = [*samples, *dataset.samples]
    looks = [data.perceptual_hash(images.load_image(sample.image_path)) for sample in everything]
    alike = {i: everything[j] for i, j in data.near_duplicates(looks) if i < len(samples) <= j}
    known = {sample.sha256: sample for sample in dataset.samples}
    groups = {sample.group: sample for sample in dataset.samples if sample.group}
    label = AUXILIARY
    for number, sample in enumerate(samples):
        twin = known.get(sample.sha256) or groups.get(sample.group or None) or alike.get(number)
        if twin is None and sample.category in dataset.categories:
            mine = [one for one in dataset.samples if one.category == sample.category]
            twin = next((one for one in mine if one.split == "train"), mine[0])
        if twin is None:
            continue
        if twin.split != "train":
            raise ValueError(
                f"{sample.image_path} shows the {twin.split} picture {twin.image_path}. Calibration and test pictures "
                "are never trained on."
            )
        if not few_shot:
            raise ValueError(
                f"{sample.image_path} is a picture of {twin.category}, which is under test: zero-shot prompts learn "
                "from other pictures. Use auxiliary pictures, or pass few_shot=True; the row is then labelled few-shot."
            )
        label = FEW_SHOT
    return label


# --- cached image features -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerFeatures(torch.utils.data.Dataset):
    """What the frozen vision tower says about each picture, on disk; the tower runs once instead of every epoch.

    Attributes:
        samples: the pictures.
        feature: float32 ``(n, embed_dim)``, class features.
        tokens: float32 or float16 ``(n, taps, P, embed_dim)``, patch tokens of each tap, memory-mapped.
        image_size: side of the masks in pixels.
        mask_rule: ``"bilinear"`` marks a pixel of the small mask that is more than half anomalous, as published, and
            loses small defects; ``"any"`` marks a pixel that is anomalous anywhere.
    """

    samples: tuple[Sample, ...]
    feature: np.ndarray
    tokens: np.ndarray
    image_size: int
    mask_rule: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        mask = training_mask(sample, self.image_size, self.mask_rule)
        return {
            "feature": torch.from_numpy(self.feature[index]),
            "tokens": torch.from_numpy(np.array(self.tokens[index])),
            "mask": torch.zeros(self.image_size, self.image_size) if mask is None else torch.from_numpy(mask).float(),
            "label": torch.tensor(int(sample.is_anomalous)),
            "has_mask": torch.tensor(mask is not None),
        }


def training_mask(sample: Sample, size: int, rule: str) -> np.ndarray | None:
    """Square mask, bool ``(size, size)``: all False for a normal picture, None for an anomalous one without a mask."""
    from PIL import Image

    from helpers.data import images

    if not sample.is_anomalous:
        return np.zeros((size, size), bool)
    if sample.mask_path is None:
        return None
    mask = images.load_mask(sample.mask_path)
    if rule == "bilinear":
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(small) > 127.5
    return cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) > 0


def tower_features(
    clip: Clip,
    samples: Sequence[Sample],
    *,
    settings: DetectorSettings,
    folder: Path,
    batch_size: int = 8,
    dtype: str = "float32",
    mask_rule: str = "bilinear",
    n_workers: int = 0,
) -> TowerFeatures:
    """Compute, or read, the vision tower's features of pictures.

    The folder's name is a hash of pictures, weights and settings, so nothing stale is read.

    Args:
        clip: whose vision tower.
        samples: the pictures.
        settings: image size, first dual block and taps.
        folder: cache; 4.2 MB per picture and tap at 518 px in float32, half in float16.
        batch_size: pictures per pass.
        dtype: ``"float32"`` trains exactly as without the cache; ``"float16"`` halves the disk space.
        mask_rule: see :class:`TowerFeatures`.
        n_workers: loading processes.
    Raises:
        ValueError: no picture, an unknown ``mask_rule`` or ``dtype``.
        OSError: the disk is too small, with the numbers.
    """
    from tqdm.auto import tqdm

    from helpers.clip.backbones import square_preprocess

    if mask_rule not in MASK_RULES or dtype not in ("float32", "float16"):
        raise ValueError(
            f"mask_rule is {mask_rule!r}, dtype {dtype!r}; allowed are {', '.join(MASK_RULES)} and float32, float16."
        )
    if not samples:
        raise ValueError("There is no picture to train on. Check the folder and its categories.")
    anomalyclip.check_clip(clip.model)
    visual = clip.model.visual
    filled = anomalyclip.filled_settings(visual, settings)
    hashes = [sample.sha256 or storage.sha256_file(sample.image_path) for sample in samples]
    used = [filled.image_size, filled.first_dual_block, filled.taps]
    key = storage.sha256_json([hashes, weights_hash(visual), used, dtype])
    target = Path(folder) / f"tower_{key[:16]}"
    ready = target / "READY.json"
    if not ready.exists():
        n_patches = (filled.image_size // visual.patch_size[0]) ** 2
        shape = (len(samples), len(filled.taps), n_patches, visual.proj.shape[1])
        _check_space(target, shape, dtype)
        device = visual.proj.device
        loader = torch.utils.data.DataLoader(
            anomalyclip.Pictures(samples, square_preprocess(filled.image_size)),
            batch_size=batch_size,
            num_workers=n_workers,
        )
        feature = np.empty((len(samples), shape[-1]), np.float32)
        with storage.atomic_path(target / "tokens.npy") as temporary:
            tokens = np.lib.format.open_memmap(temporary, "w+", dtype=dtype, shape=shape)
            with tqdm(total=len(samples), desc="image features", unit="picture") as bar, torch.inference_mode():
                for indices, pixels in loader:
                    one, tapped = anomalyclip.dual_path(
                        visual, pixels.to(device), first_dual_block=filled.first_dual_block, taps=filled.taps
                    )
                    rows = indices.numpy()
                    feature[rows] = one.float().cpu().numpy()
                    tokens[rows] = torch.stack([t[:, 1:] for t in tapped], dim=1).float().cpu().numpy()
                    bar.update(len(rows))
            tokens.flush()
            del tokens
        with storage.atomic_path(target / "feature.npy") as temporary:
            np.save(temporary, feature)
        storage.write_json(ready, {"n_pictures": len(samples), "model": clip.model_id, "shape": list(shape)})
    feature = np.load(target / "feature.npy")
    tokens = np.load(target / "tokens.npy", mmap_mode="r")
    return TowerFeatures(tuple(samples), feature, tokens, filled.image_size, mask_rule)


def _check_space(target: Path, shape: Sequence[int], dtype: str) -> None:
    needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
    free = storage.free_bytes(target)
    if needed > free:
        raise OSError(
            f"The image features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {target.parent}. Use "
            "dtype='float16', fewer pictures, or another ART_HOME."
        )


# --- training --------------------------------------------------------------------------------------------------------


def tuning_score(text: torch.Tensor, features: TowerFeatures, *, batch_size: int = 16) -> float:
    """How well text features separate the tuning pictures: mean of image-level and pixel-level AUROC.

    Args:
        text: float ``(2, embed_dim)``, normalised, normal first.
        features: of the tuning split.
    Raises:
        ValueError: the pictures are all normal or all anomalous.
    """
    from helpers.judge import metrics

    device = text.device
    scores, labels, pixels = [], [], metrics.PixelHistogram()
    loader = torch.utils.data.DataLoader(features, batch_size=batch_size)
    with torch.no_grad():
        for batch in loader:
            scores += anomalyclip.abnormal_probability(batch["feature"].to(device), text).tolist()
            labels += batch["label"].bool().tolist()
            coarse = sum(
                anomalyclip.abnormal_probability(one.to(device).float(), text) for one in batch["tokens"].unbind(dim=1)
            )
            for row, has_mask, mask in zip(coarse, batch["has_mask"].tolist(), batch["mask"]):
                if has_mask:
                    side = round(len(row) ** 0.5)
                    pixels.add(row.reshape(side, side).cpu().numpy(), mask.numpy() > 0.5)
    if len(set(labels)) < 2:
        raise ValueError(
            f"All {len(labels)} tuning pictures are {'anomalous' if labels[0] else 'normal'}: both are needed."
        )
    parts = [metrics.image_auroc(np.array(scores), np.array(labels)), pixels.auroc()]
    return float(np.nanmean(parts))  # without a single mask the image-level part stands alone


def train_prompts(
    clip: Clip,
    features: TowerFeatures,
    tuning: TowerFeatures,
    *,
    folder: Path,
    settings: TrainingSettings,
    learning_rate: float = 1e-3,
    device: str = "cpu",
    start: PromptLearner | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    on_history: Callable[[list[dict[str, Any]]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> tuple[PromptLearner, TrainingResult]:
    """Train prompts on cached features, keep the best by the tuning score, write ``prompts.safetensors``.

    Adam with betas 0.5 and 0.999 as published. The published training has no validation and keeps the last epoch.

    Args:
        clip: its text tower is frozen and trained through.
        features, tuning: see :func:`tower_features`; different pictures.
        folder: checkpoints (one folder per run) and, at the end, ``prompts.safetensors`` in the published layout.
        settings: published: 15 epochs, batch 8, seed 111.
        learning_rate: published: 1e-3.
        device: ``"cpu"`` or what accelerate chooses.
        start: prompts to go on from; random ones of ``settings.seed`` by default.
        fingerprint: further JSON values that determine the run.
        on_history, on_checkpoint: see :func:`helpers.training.train`.
    Returns:
        the best prompts, and the course of the training.
    Raises:
        ValueError: training and tuning pictures overlap.
        helpers.training.TrainingStopped: the loss became nan; the last good checkpoint is kept.
    """
    from helpers import training_old as training

    shared = _identities(features) & _identities(tuning)
    if shared:
        raise ValueError(f"{len(shared)} source pictures are in both splits, first {sorted(shared)[0]}.")
    if start is None:
        learner = PromptLearner(clip.model, clip.tokenizer, seed=settings.seed)
    else:
        n_context, n_deep = start.ctx_pos.shape[2], len(start.compound_prompts_text)
        deep_length = start.compound_prompts_text[0].shape[0]
        learner = PromptLearner(clip.model, clip.tokenizer, n_context=n_context, n_deep=n_deep, deep_length=deep_length)
        learner.load_state_dict(start.state_dict())
    module = PromptTraining(clip.model, learner)
    optimizer = torch.optim.Adam(learner.parameters(), lr=learning_rate, betas=(0.5, 0.999))
    identity = {
        "learning_rate": learning_rate,
        "model": clip.model_id,
        "pictures": storage.sha256_json([sample.sha256 for sample in features.samples]),
        "tuning": storage.sha256_json([sample.sha256 for sample in tuning.samples]),
        "shape": list(features.tokens.shape),
        "mask_rule": features.mask_rule,
        "start": None if start is None else prompts_hash(start),
        **(fingerprint or {}),
    }
    try:
        result = training.train(
            module,
            features,
            optimizer,
            folder=folder,
            settings=settings,
            device=device,
            evaluate=lambda trained: tuning_score(trained.text_features(), tuning, batch_size=settings.batch_size),
            fingerprint=identity,
            on_history=on_history,
            on_checkpoint=on_checkpoint,
            title="prompts",
        )
    finally:
        clip.model.eval()
    learner.requires_grad_(False)
    anomalyclip.save_prompts(learner, Path(folder) / "prompts.safetensors")
    return learner, result


def own_prompts(
    clip: Clip,
    samples: Sequence[Sample],
    *,
    n_epochs: int,
    folder: Path,
    features_dir: Path,
    settings: DetectorSettings,
    device: str = "cpu",
    batch_size: int = 8,
    patience: int = 4,
    on_history: Callable[[list[dict[str, Any]]], None] | None = None,
) -> tuple[dict[str, PromptLearner], TowerFeatures, list[Mapping[str, Any]]]:
    """Train prompts on pictures split ``"train"`` and tune on ``"calibration"``, as notebook 04 does.

    Each set of choices trains in a folder of its own, so a changed choice starts over and an old one is found again.
    Small defects stay in the masks (rule ``"any"``): that marks on artworks are small is the point.

    Args:
        samples: from :func:`auxiliary_samples`, checked by :func:`check_auxiliary`.
        n_epochs: upper limit; 0 trains nothing, for a test of the published prompts alone.
        folder: of the checkpoints of all such trainings.
        features_dir: cache of the tower's features.
        settings, device, batch_size, patience, on_history: see :func:`train_prompts`.
    Returns:
        ``{"own": prompts}`` or ``{}``, the features of the tuning pictures, and the history.
    """
    from helpers import training_old as training

    options = {"settings": settings, "folder": features_dir, "batch_size": batch_size, "mask_rule": "any"}
    parts = {split: [s for s in samples if s.split == split] for split in ("train", "calibration")}
    tuning = tower_features(clip, parts["calibration"], **options)
    if n_epochs == 0:
        return {}, tuning, []
    features = tower_features(clip, parts["train"], **options)
    how = training.TrainingSettings(n_epochs=n_epochs, batch_size=batch_size, patience=patience)
    key = storage.sha256_json([features.tokens.shape, [s.sha256 for s in samples], clip.model_id, batch_size])
    learner, result = train_prompts(
        clip, features, tuning, folder=Path(folder) / key[:12], settings=how, device=device, on_history=on_history
    )
    return {"own": learner}, tuning, list(result.history)


def choose_prompts(
    candidates: Mapping[str, PromptLearner], clip: Clip, tuning: TowerFeatures, *, row: str = "best"
) -> tuple[str, dict[str, float]]:
    """Which prompts make the row of the comparison, by tuning pictures alone.

    Args:
        candidates: prompts by name.
        tuning: features of the tuning pictures; no picture of the artworks under test.
        row: name of a candidate, or ``"best"`` for the highest tuning score (the first of equals).
    Returns:
        the name, and every candidate's tuning score.
    Raises:
        ValueError: ``row`` is no candidate.
    """
    if row != "best" and row not in candidates:
        raise ValueError(f"row is {row!r}; there are {', '.join(candidates)}, or 'best'.")
    scores = {name: tuning_score(prompts_text(clip, learner), tuning) for name, learner in candidates.items()}
    return (max(scores, key=scores.__getitem__) if row == "best" else row), scores


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over a model's parameter names and bytes, for checkpoints that depend on it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def prompts_hash(learner: PromptLearner) -> str:
    """SHA-256 of prompts, independent of how a file stores them."""
    return weights_hash(learner)


def prompts_text(clip: Clip, learner: PromptLearner) -> torch.Tensor:
    """Normalised text features ``(2, embed_dim)`` of prompts, normal first."""
    with torch.inference_mode():
        return F.normalize(anomalyclip.encode_text(clip.model, learner), dim=-1)


def _identities(features: TowerFeatures) -> set[str]:
    return {sample.group or str(sample.image_path) for sample in features.samples}


# --- testing what was trained ----------------------------------------------------------------------------------------


def predict_with_prompts(
    clip: Clip,
    learner: PromptLearner,
    dataset: Dataset,
    *,
    settings: DetectorSettings,
    alpha: float,
    profile: str,
    trained_on: str,
    folder: Path,
    batch_size: int = 8,
) -> MethodResult:
    """Predict the test pictures with some prompts: :func:`model.predict` with their hash and label."""
    detector = anomalyclip.build_detector(clip, learner, settings)
    return anomalyclip.predict(
        detector,
        dataset,
        folder=folder,
        profile=profile,
        checkpoint_hash=prompts_hash(learner),
        trained_on=trained_on,
        alpha=alpha,
        batch_size=batch_size,
    )
