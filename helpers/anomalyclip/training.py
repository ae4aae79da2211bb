"""Training of AnomalyCLIP's prompts on pictures of *other* things, and the choice between prompts.

Zero-shot means that the prompts have seen nothing of the artworks under test, so they learn from auxiliary pictures:
MVTec AD or VisA, or synthetic marks on other pictures. Pictures of the artworks under test are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from helpers import caching, data, files, synthesis, training
from helpers.anomalyclip import model
from helpers.anomalyclip.detector import build_detector, text_features
from helpers.anomalyclip.model import PromptLearner
from helpers.data import images, names, reading
from helpers.judge import metrics
from helpers.records import NORMAL_KIND, Sample

ARTISTS_UNDER_TEST = ("vinci", "vermeer")
PACKAGE_PICTURES = (
    "brick.png coins.png color.png grass.png gravel.png horse.png hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png page.png retina.jpg rocket.jpg text.png"
)
"""Of scikit-image, without those that the embedded artworks are made of; artists under test are left out, too."""

LEARNING_RATE, PATIENCE, TUNING_SHARE = 1e-3, 4, 0.25
_LAMBDA, _LABEL_SMOOTHING = 4.0, 1e-5


def auxiliary_samples(
    source: str, target: Path, *, n_views: int, max_side: int, seed: int, limit: int, kinds: Sequence[str]
) -> list[Sample]:
    """Pictures to train prompts on, split ``"train"`` to learn from and ``"calibration"`` to tune.

    Args:
        source: ``"packages"`` (pictures inside Python packages, offline), ``"best_artworks"`` (paintings of other
            artists, downloaded, ``limit`` each), or a folder in MVTec AD or VisA layout with real anomalies.
        target: where made pictures go; a complete folder with the same arguments is read, not made again.
        n_views: views per picture: photographed crops, every second one damaged by one of ``kinds``.
        max_side: longer side of a view in pixels.
    """
    if source == "packages":
        folder = Path(skimage.__file__).parent / "data"
        found = [folder / name for name in PACKAGE_PICTURES.split() if (folder / name).exists()]
        found += [Path(path) for path in load_sample_images().filenames]
        pictures = [Sample(path, "auxiliary", False, group=path.stem) for path in found]
    elif source == "best_artworks":
        found = best_artworks(limit=limit)
        pictures = [s for s in found if not any(name in s.category.lower() for name in ARTISTS_UNDER_TEST)]
    else:  # read_folder names a folder that is not there
        return _split([sample for sample in data.read_folder(source).samples if sample.split == "test"], seed)
    settings = [[files.sha256_file(s.image_path) for s in pictures], n_views, max_side, seed, list(kinds), "views 2"]
    table, key = target / "views" / "manifest.csv", files.sha256_json(settings)
    described = table.with_suffix(".json")
    if not (described.exists() and files.read_json(described).get("auxiliary_key") == key):
        described.unlink(missing_ok=True)
        views = [view for number in range(len(pictures)) for view in _views(pictures, number, target, settings)]
        data.write_manifest(table, views, info={"auxiliary_key": key})
    return _split(data.load_manifest(table), seed)


def best_artworks(*, limit: int) -> list[Sample]:
    """*Best Artworks of All Time*: pictures by 50 painters (their categories), ``limit`` of each, all normal. Folder
    names with broken encoding are repaired; pictures that lie there twice, by their repaired names, are taken once."""
    name = "ikarus777/best-artworks-of-all-time"
    print(f"Best Artworks of All Time: about 2 GB; the licence stands on https://www.kaggle.com/datasets/{name}")
    try:
        import kagglehub

        folder = Path(kagglehub.dataset_download(name))
    except Exception as error:  # kagglehub lets its own, requests' and the system's errors through
        why = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"Kaggle gave no dataset ({why}). Try again later.") from error
    found = {names.repaired(f"{path.parent.name}/{path.stem}"): path for path in folder.glob("images/images/*/*.jpg")}
    taken: dict[str, list[Sample]] = {}
    for group, path in sorted(found.items()):
        artist = group.partition("/")[0]
        taken.setdefault(artist, []).append(Sample(path, artist, False, split="train", group=group))
    return [sample for samples in taken.values() for sample in samples[:limit]]


def _views(pictures: Sequence[Sample], number: int, target: Path, settings: Sequence[Any]) -> list[Sample]:
    """Photographed crops of one picture, 60 to 100 % of each side; every second one is damaged, with its mask."""
    _, n_views, max_side, seed, kinds, _ = settings
    source, made = pictures[number], []
    image = images.load_image(source.image_path, max_side=2 * max_side)
    for view in range(n_views):
        rng = np.random.default_rng([seed, number, view])
        height, width = image.shape[:2]
        rows, columns = int(height * rng.uniform(0.6, 1)), int(width * rng.uniform(0.6, 1))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        crop = images.resize(np.ascontiguousarray(image[top : top + rows, left : left + columns]), max_side)
        kind = kinds[int(rng.integers(len(kinds)))] if view % 2 else None
        picture, mask, _ = synthesis.damaged_view(crop, seed=int(rng.integers(2**31)), kind=kind)
        path = target / "views" / (kind or NORMAL_KIND) / f"{number:04d}_{view:02d}.png"
        images.save_png(path, picture)
        mask_path = None
        if mask is not None:
            mask_path = path.with_name(f"{path.stem}_mask.png")
            images.save_png(mask_path, mask)
        group = source.group or f"{source.category}/{source.image_path.stem}"
        made.append(Sample(path, source.category, mask is not None, mask_path, "train", kind or NORMAL_KIND, group))
    return made


def _split(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Pictures of a quarter of the source pictures tune, of each category and kind of layout folders alike."""
    if not {True, False} <= {sample.is_anomalous for sample in samples}:
        raise ValueError(f"{len(samples)} auxiliary pictures, but prompts learn from normal and anomalous ones.")
    groups = sorted({sample.group for sample in samples})
    rng = np.random.default_rng(seed)
    tuning = set(rng.permutation(groups)[: max(1, round(TUNING_SHARE * len(groups)))].tolist())
    return [replace(s, split="calibration" if s.group in tuning else "train") for s in samples]


def check_auxiliary(samples: Sequence[Sample], dataset: data.Dataset) -> None:
    """Refuse (ValueError) to train on what is tested: the same file, source picture, artwork or look."""
    everything = [*samples, *dataset.samples]
    looks = [reading.perceptual_hash(images.load_image(sample.image_path)) for sample in everything]
    alike = {i: everything[j] for i, j in reading.near_duplicates(looks) if i < len(samples) <= j}
    known = {sample.sha256: sample for sample in dataset.samples}
    groups = {sample.group: sample for sample in dataset.samples if sample.group}
    for number, sample in enumerate(samples):
        twin = known.get(sample.sha256) or groups.get(sample.group or None) or alike.get(number)
        if twin is not None or sample.category in dataset.categories:
            shown = sample.category if twin is None else twin.image_path
            raise ValueError(f"{sample.image_path} shows {shown}, which is under test: leave it out of what is learnt.")


@dataclass(frozen=True)
class TowerFeatures(torch.utils.data.Dataset):
    """What the frozen vision tower says about each picture, on disk; the tower runs once instead of every epoch.

    ``feature`` is float32 ``(n, embed_dim)``, ``tokens`` float32 ``(n, taps, P, embed_dim)``, memory-mapped; masks are
    squares of ``side`` pixels, as the maps are.
    """

    samples: tuple[Sample, ...]
    feature: np.ndarray
    tokens: np.ndarray
    side: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample, mask = self.samples[index], np.zeros((self.side, self.side), np.float32)
        if sample.mask_path is not None:  # what is anomalous anywhere stays so: marks on artworks are small
            full = images.load_mask(sample.mask_path).astype(np.float32)
            mask = cv2.resize(full, mask.shape, interpolation=cv2.INTER_AREA)
        return {
            "feature": torch.from_numpy(np.array(self.feature[index])),
            "tokens": torch.from_numpy(np.array(self.tokens[index])),
            "mask": torch.from_numpy(mask > 0).float(),
            "label": torch.tensor(int(sample.is_anomalous)),
            "has_mask": torch.tensor(not sample.is_anomalous or sample.mask_path is not None),
        }


def tower_features(clip: Any, samples: Sequence[Sample], folder: Path) -> TowerFeatures:
    """Compute, or read, the vision tower's features of pictures (4.2 MB each at 518 px)."""
    detector = build_detector(clip, PromptLearner(clip.model, clip.tokenizer))
    how = {"taps": detector.taps, "first_dual_block": detector.first_dual_block}

    def compute(indices: Sequence[int]) -> dict[str, np.ndarray]:
        batch = torch.stack([clip.preprocess(images.load_image(samples[i].image_path)) for i in indices])
        with torch.inference_mode():
            feature, tapped = model.dual_path(detector.visual, batch.to(detector.text.device), **how)
        tokens = torch.stack([one[:, 1:] for one in tapped], dim=1)
        return {"feature": feature.float().cpu().numpy(), "tokens": tokens.float().cpu().numpy()}

    ids = [sample.sha256 or files.sha256_file(sample.image_path) for sample in samples]
    arrays = caching.cached_arrays(folder, {"model": clip.model_id} | how, ids, compute, batch_size=8)
    side = clip.preprocess(np.zeros((8, 8, 3), np.uint8)).shape[-1]
    return TowerFeatures(tuple(samples), arrays["feature"], arrays["tokens"], side)


def focal_loss(p_abnormal: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Focal loss (gamma 2, label smoothing 1e-5) of pixel probabilities: float ``(B, H, W)`` twice -> ``(B,)``."""
    p_true = torch.where(masks > 0.5, p_abnormal, 1 - p_abnormal)
    smoothed = (1 - _LABEL_SMOOTHING) * p_true + _LABEL_SMOOTHING * (1 - p_true) + _LABEL_SMOOTHING
    return -((1 - smoothed) ** 2 * smoothed.log()).flatten(1).mean(dim=1)


def dice_loss(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Dice loss per image: float ``(B, H, W)`` twice -> ``(B,)``; 1 is added above and below."""
    overlap, total = (probabilities * masks).flatten(1).sum(dim=1), (probabilities + masks).flatten(1).sum(dim=1)
    return 1 - (2 * overlap + 1) / (total + 1)


def prompt_losses(text: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The training loss of text features ``(2, embed_dim)`` on a batch of :class:`TowerFeatures`, and its parts.

    ``loss`` = ``image`` + 4 * (``focal`` + ``dice_abnormal`` + ``dice_normal``), summed over the taps, means over the
    images. An anomalous image without a known mask counts in the image loss alone: an empty mask would teach that its
    defect is normal. Source: Zhou et al., ICLR 2024, section 3; train.py, loss.py.
    """
    masks, weight = batch["mask"].to(text.dtype), batch["has_mask"].to(text.dtype)
    pixel = dict.fromkeys(("focal", "dice_abnormal", "dice_normal"), text.new_zeros(()))
    for tokens in batch["tokens"].unbind(dim=1):
        p_abnormal = model.enlarge(model.abnormal_probability(tokens.to(text.dtype), text), masks.shape[-1])
        per_image = {
            "focal": focal_loss(p_abnormal, masks),
            "dice_abnormal": dice_loss(p_abnormal, masks),
            "dice_normal": dice_loss(1 - p_abnormal, 1 - masks),
        }
        pixel = {name: pixel[name] + (weight * value).mean() for name, value in per_image.items()}
    logits = F.normalize(batch["feature"].to(text.dtype), dim=-1) @ text.T / model.TEMPERATURE
    image = F.cross_entropy(logits, batch["label"])
    return {"loss": _LAMBDA * sum(pixel.values()) + image, "image": image, **pixel}


def prompts_loss(clip: Any) -> Callable[[PromptLearner, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """``loss_of`` for :func:`helpers.training.train`: prompts through the frozen text tower, on cached features."""
    clip.model.requires_grad_(False)
    return lambda learner, batch: prompt_losses(F.normalize(model.encode_text(clip.model, learner), dim=-1), batch)


def tuning_score(text: torch.Tensor, tuning: TowerFeatures) -> float:
    """How well text features ``(2, embed_dim)`` separate tuning pictures: mean of image- and pixel-level AUROC."""
    device, scores, maps, masks = text.device, [], [], []
    for index in range(len(tuning)):
        row = tuning[index]
        with torch.no_grad():
            scores.append(float(model.abnormal_probability(row["feature"].to(device), text)))
            coarse = sum(model.abnormal_probability(one.to(device), text) for one in row["tokens"]).cpu().numpy()
        if row["has_mask"]:
            grid = round(len(coarse) ** 0.5)
            maps.append(coarse.reshape(grid, grid))
            masks.append(row["mask"].numpy() > 0.5)
    image = metrics.image_auroc(scores, [sample.is_anomalous for sample in tuning.samples])
    return float(np.nanmean([image, metrics.pixel_auroc(maps, masks)]))


def train_prompts(
    clip: Any, samples: Sequence[Sample], *, n_epochs: int, folder: Path, features_dir: Path, device: str = "cpu",
    batch_size: int = 8,
) -> tuple[PromptLearner | None, TowerFeatures, list[dict[str, Any]]]:  # fmt: skip
    """Train prompts on pictures split ``"train"``, keep the best on ``"calibration"``; Adam 1e-3 (0.5, 0.999).

    Each set of choices trains in a folder of its own, so a changed choice starts over and an old one is found again.

    Args:
        samples: from :func:`auxiliary_samples`, checked by :func:`check_auxiliary`.
        n_epochs: upper limit (published: 15); 0 trains nothing. Stops after 4 epochs without a better tuning score.
        folder, features_dir: of all such trainings (``<key>/prompts.safetensors`` in the published layout), and cache.
        device, batch_size: see :func:`helpers.training.train`, which names the errors, too.
    Returns:
        the best prompts (None without training), the features of the tuning pictures, and the history.
    """
    parts = {split: [s for s in samples if s.split == split] for split in ("train", "calibration")}
    tuning = tower_features(clip, parts["calibration"], features_dir)
    if n_epochs == 0:
        return None, tuning, []
    features = tower_features(clip, parts["train"], features_dir)
    pictures = [[s.split, s.sha256 or str(s.image_path)] for s in samples]
    identity = {"model": clip.model_id, "pictures": files.sha256_json(pictures), "batch_size": batch_size}
    identity["shape"] = list(features.tokens.shape[1:])
    learner = PromptLearner(clip.model, clip.tokenizer)
    target = folder / files.sha256_json(identity)[:12]
    optimizer = torch.optim.Adam(learner.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.999))
    result = training.train(
        learner, prompts_loss(clip), features, optimizer, folder=target, n_epochs=n_epochs, batch_size=batch_size,
        patience=PATIENCE, evaluate=lambda trained: tuning_score(text_features(clip, trained), tuning),
        device=device, identity=identity, title="prompts",
    )  # fmt: skip
    files.write_bytes(target / "prompts.safetensors", model.as_bytes(learner.requires_grad_(False)))
    return learner, tuning, list(result.history)


def choose_prompts(
    candidates: Mapping[str, PromptLearner], clip: Any, tuning: TowerFeatures, *, row: str = "best"
) -> tuple[str, dict[str, float]]:
    """Which prompts make the row of the comparison (a candidate's name, or ``"best"`` by tuning pictures alone), and
    every candidate's tuning score."""
    scores = {name: tuning_score(text_features(clip, learner), tuning) for name, learner in candidates.items()}
    if row != "best" and row not in candidates:
        raise ValueError(f"row is {row!r}; there are {', '.join(candidates)}, or 'best'.")
    return (max(scores, key=scores.__getitem__) if row == "best" else row), scores
