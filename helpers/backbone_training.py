"""Trains the embedded backbone, the small CLIP of the ``mini`` profile. A maintainer's tool, not part of ``run``:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m helpers.backbone_training --folder workspace/backbone

trains, or resumes, in two processes of one thread (faster than one of two threads), then measures and exports.
In-batch contrastive learning of captions does not start at this size on a CPU. What does: classifying scenes through
the text embeddings of factored captions (flawless or damaged; kind; colour; place), a patch loss against the masks,
comparing the patches of two photographs of the same thing, and distilling the maps of an ImageNet-trained
EfficientNet-Lite0 into the patch tokens. See ``helpers/assets/README.md`` for data, time and results.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn

from helpers import (
    anomalyclip,
    anomalygpt,
    backbones,
    colours,
    imagebind,
    images,
    scenes,
    standins,
    storage,
    synthesis,
    training,
)
from helpers.records import NORMAL_KIND, Sample

TEMPERATURE = 0.07
STEPS_PER_EPOCH = 50

_NOUNS = ("object", "painting", "picture", "portrait", "photo", "surface", "texture", "artwork")
# The words of AnomalyGPT's prompt ensemble and AnomalyCLIP's "damaged {}" are among them.
_STATES = (
    ("{}", "damaged {}"),
    ("flawless {}", "broken {}"),
    ("perfect {}", "{} with flaw"),
    ("unblemished {}", "{} with defect"),
    ("{} without flaw", "{} with damage"),
    ("{} without defect", "damaged {}"),
    ("{} without damage", "altered {}"),
)
_TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "{}.", "X X X X X X X X X X X X {}.")
_KIND_WORDS = {
    "cutpaste": "pasted patch",
    "poisson": "blended patch",
    "erased": "erased part",
    "craquelure": "cracks",
    "fade": "faded area",
}
_TEACHER_STAGES = (2, 3)
"""EfficientNet stages whose maps are distilled: strides 8 and 16, into the middle and the last block's tokens."""
_WEIGHTS = {
    "direct": 2.0, "image": 1.0, "patch": 2.0, "reference": 2.0, "factors": 0.3, "distil": 0.5, "instance": 0.3,
}  # fmt: skip
_LEARNING_RATE = 7e-4
_MAX_POSITIVE_WEIGHT = 30.0


class SceneDataset(torch.utils.data.Dataset):
    """Scenes by (seed, epoch, index): every epoch draws fresh ones.

    Args:
        maker: makes them.
        n: scenes per epoch.
        seed: of the run.
    """

    def __init__(self, maker: scenes.SceneMaker, n: int, *, seed: int) -> None:
        self.maker, self.n, self.seed, self.epoch = maker, n, seed, 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = self.maker(self.seed, self.epoch, index)
        pair = np.stack([scene.reference, scene.image]).transpose(0, 3, 1, 2)
        return {
            "pair": torch.from_numpy(np.ascontiguousarray(pair)),  # uint8 (2, 3, S, S), flawless first
            "target": patch_target(torch.from_numpy(scene.mask)),
            "labels": torch.tensor([int(scene.is_damaged), scene.kind, scene.colour, scene.place]),
        }


def patch_target(mask: torch.Tensor, grid: int = 14) -> torch.Tensor:
    """How much a patch should be marked: ``(P,)`` in [0, 1], 1 where damage covers two fifths of a quarter patch.

    A share of the whole patch would tell the tower to overlook lines and dots.
    """
    cell = mask.shape[-1] // (4 * grid)
    share = F.avg_pool2d(mask[None, None].float(), cell)
    return (2.5 * F.adaptive_max_pool2d(share, grid)).clamp(max=1).flatten()


class BackboneLoss(nn.Module):
    """The student with its losses; ``forward(batch)`` returns them.

    Args:
        clip: ``open_clip.CLIP``, trained; its token table is cut to the words of the captions.
        teacher: the frozen CNN.
        kinds: kinds of damage, in the order of the scenes' labels.
    """

    def __init__(self, clip: nn.Module, teacher: backbones.Cnn, kinds: Sequence[str]) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(True)
        clip.logit_scale.requires_grad_(False)
        self._teacher = [teacher.model]  # in a list: neither trained nor saved with the student
        self._normalise = {"clip": (imagebind.MEAN, imagebind.STD)}
        self._normalise["cnn"] = tuple(teacher.model.pretrained_cfg[name] for name in ("mean", "std"))
        width = clip.visual.conv1.out_channels
        channels = [teacher.model.feature_info[stage]["num_chs"] for stage in _TEACHER_STAGES]
        self.to_teacher = nn.ModuleList(nn.Linear(width, n) for n in channels)
        self.to_pooled = nn.Linear(width, teacher.n_features)
        # Two plain classifiers. Without them nothing starts: texts of flawless and damaged things are alike at first,
        # so they teach the patches nothing, and patches that know nothing teach the texts nothing.
        self.patch_head = nn.Linear(clip.visual.proj.shape[1], 1)
        self.image_head = nn.Linear(clip.visual.proj.shape[1], 1)
        # Scale and shift that turn distances into logits: patches of either comparison, pictures, embeddings.
        self.scales = nn.Parameter(torch.tensor([[10.0, 2.0], [10.0, 2.0], [10.0, 2.5], [10.0, 1.0]]))
        self.sizes = (len(kinds), len(colours.COLOUR_NAMES), len(synthesis.PLACES))
        captions, states = _tokenized(factored_captions(kinds)), _tokenized(state_captions())
        self.row_ids = nn.Buffer(torch.cat([captions, states]).unique(), persistent=False)
        # The end mark has the highest id in either table, so CLIP's argmax still finds it.
        self.captions = nn.Buffer(torch.searchsorted(self.row_ids, captions), persistent=False)
        self.states = nn.Buffer(torch.searchsorted(self.row_ids, states), persistent=False)  # normal, then damaged
        clip.token_embedding = nn.Embedding.from_pretrained(clip.token_embedding.weight[self.row_ids], freeze=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self._draw_activation()
        n = len(batch["pair"])
        pixels = batch["pair"].transpose(0, 1).flatten(0, 1)  # (2n, 3, S, S), flawless ones first
        tokens = {k: v.float() for k, v in vision_tokens(self.clip.visual, self._scaled(pixels, "clip")).items()}
        labels, target = batch["labels"], batch["target"]
        is_damaged = torch.cat([torch.zeros_like(labels[:, 0]), labels[:, 0]])
        targets = torch.cat([torch.zeros_like(target), target])
        texts, pairs = self._texts()
        parts = {
            "direct": self._direct_loss(tokens, is_damaged, targets),
            "image": sum(_state_loss(tokens[name], pairs, is_damaged) for name in ("pooled", "pooled_raw")),
            "patch": sum(_patch_loss(tokens[name], pairs, targets) for name in ("patches", "patches_vv")),
            "reference": self._reference_loss(tokens["blocks"].unflatten(1, (2, n)), labels[:, 0], target),
            "factors": self._factor_loss(tokens["pooled"][n:], texts, labels),
            "distil": self._distil_loss(tokens, pixels[: (n + 1) // 2]),
            "instance": self._instance_loss(tokens["pooled"], labels[:, 0]),
        }
        return {"loss": sum(weight * parts[name] for name, weight in _WEIGHTS.items()), **parts}

    def _draw_activation(self) -> None:
        """Quick GELU or GELU by chance: the weights serve as OpenAI's CLIP (quick) and as ImageBind (exact)."""
        if not self.training:
            return
        activation = nn.GELU() if torch.rand(()) < 0.5 else quick_gelu()
        for block in (*self.clip.visual.transformer.resblocks, *self.clip.transformer.resblocks):
            block.mlp.gelu = activation

    def _scaled(self, pixels: torch.Tensor, model: str) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in self._normalise[model])
        return (pixels.float() / 255 - mean) / std

    def _texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factored captions ``(C, D)``, and two random pairs (normal, damaged) ``(2, 2, D)``; unit vectors."""
        n_states = len(self.states) // 2
        chosen = torch.randint(n_states, (2,))
        ids = torch.cat([self.captions, self.states[chosen], self.states[chosen + n_states]])
        texts = self._encode(ids)
        pairs = texts[len(self.captions) :].view(2, 2, -1).transpose(0, 1)
        return texts[: len(self.captions)], pairs

    def _encode(self, ids: torch.Tensor) -> torch.Tensor:
        """``encode_text`` of short texts, unit vectors: what follows the end mark is cut off, it has no effect."""
        clip, ends = self.clip, ids.argmax(dim=-1)
        length = int(ends.max()) + 1
        hidden = clip.token_embedding(ids[:, :length]) + clip.positional_embedding[:length]
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        return F.normalize(hidden[torch.arange(len(ids)), ends].float() @ clip.text_projection, dim=-1)

    def _direct_loss(
        self, tokens: Mapping[str, torch.Tensor], is_damaged: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Damaged or not, for patches and pictures, by two linear classifiers instead of texts."""
        loss = targets.new_zeros(())
        for name in ("patches", "patches_vv"):
            unit = F.normalize(tokens[name], dim=-1) / TEMPERATURE
            loss = loss + _balanced_entropy(self.patch_head(unit)[..., 0], targets)
        for name in ("pooled", "pooled_raw"):
            unit = F.normalize(tokens[name], dim=-1) / TEMPERATURE
            logits = self.image_head(unit)[:, 0]
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(
                logits, is_damaged.float(), pos_weight=_ratio(is_damaged)
            )
        return loss

    def _reference_loss(self, blocks: torch.Tensor, is_damaged: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Patches of the second photograph against their nearest ones in the first, as the memory banks compare them.

        Args:
            blocks: ``(L, 2, n, P, W)``, tokens after every second block, flawless photographs first.
        """
        unit = F.normalize(blocks, dim=-1)
        cosines = unit[:, 1] @ unit[:, 0].transpose(-1, -2)  # (L, n, P, P)
        anomalygpt_distance = 1 - cosines.amax(dim=-1).mean(dim=0)  # the nearest in each tap, then the mean
        patch_knn_distance = 1 - cosines[1:3].mean(dim=0).amax(dim=-1)  # the nearest in two blocks together
        loss = blocks.new_zeros(())
        for distance, (scale, shift) in zip((anomalygpt_distance, patch_knn_distance), self.scales):
            loss = loss + _balanced_entropy(scale * distance - shift, target)
            highest = distance.topk(3, dim=-1).values.mean(dim=-1)
            logits = self.scales[2, 0] * highest - self.scales[2, 1]
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(logits, is_damaged.float())
        return loss

    def _instance_loss(self, pooled: torch.Tensor, is_damaged: torch.Tensor) -> torch.Tensor:
        """Each photograph finds the other one of the same thing; a damaged one lies farther from it."""
        first, second = F.normalize(pooled, dim=-1).chunk(2)
        cosines = first @ second.T
        match = F.cross_entropy(cosines / 0.1, torch.arange(len(first)))
        logits = self.scales[3, 0] * (1 - cosines.diagonal()) - self.scales[3, 1]
        return match + F.binary_cross_entropy_with_logits(logits, is_damaged.float())

    def _factor_loss(self, pooled: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Kind, colour and place of the damage by the captions nearest to the picture; damaged scenes only."""
        damaged = labels[:, 0] == 1
        if not damaged.any():
            return pooled.sum() * 0
        logits = F.normalize(pooled[damaged], dim=-1) @ texts.T / TEMPERATURE
        return sum(
            F.cross_entropy(part, labels[damaged, column])
            for column, part in enumerate(logits.split(self.sizes, dim=1), start=1)
        )

    def _distil_loss(self, tokens: Mapping[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
        """1 - cosine between the student's tokens and the teacher's maps, per place, and for the pooled features.

        Args:
            tokens: of all photographs.
            pixels: the first ``n`` of them, uint8 ``(n, 3, S, S)``; the teacher looks at these only, it is slow.
        """
        teacher, n = self._teacher[0], len(pixels)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            inputs = self._scaled(pixels, "cnn").to(memory_format=torch.channels_last)
            final, maps = teacher.forward_intermediates(inputs, indices=_TEACHER_STAGES)
            pooled = teacher.forward_head(final, pre_logits=True)
        grid = math.isqrt(tokens["patches"].shape[1])
        loss = 1 - F.cosine_similarity(self.to_pooled(tokens["class"][:n]), pooled, dim=-1).mean()
        middle, last = tokens["blocks"][1, :n], tokens["last"][:n]
        for linear, student, wanted in zip(self.to_teacher, (middle, last), maps, strict=True):
            wanted = F.adaptive_avg_pool2d(wanted, grid).flatten(2).transpose(1, 2)
            wanted = wanted - wanted.mean(dim=(0, 1))
            loss = loss + 1 - F.cosine_similarity(linear(student), wanted, dim=-1).mean()
        return loss


def vision_tokens(visual: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """One pass through both of AnomalyCLIP's streams with everything that the losses look at.

    Args:
        visual: open_clip's ``VisionTransformer`` at its native size.
        images: float32 ``(N, 3, S, S)``.
    Returns:
        ``pooled`` and ``pooled_raw`` ``(N, D)``, the class token with and without the last norm, projected;
        ``patches`` and ``patches_vv`` ``(N, P, D)``, projected tokens of the standard and the V-V stream; ``blocks``
        ``(L, N, P, W)``, patch tokens after the last block of each quarter; ``last`` ``(N, P, W)`` and ``class``
        ``(N, W)``, after the last norm.
    """
    blocks = visual.transformer.resblocks
    quarters = imagebind.tap_blocks(len(blocks))
    first_dual = anomalyclip.default_first_dual_block(len(blocks))
    x = anomalyclip.embed_patches(visual, images)
    kept = []
    for number, block in enumerate(blocks):
        if number == first_dual:
            vv = x
        if number >= first_dual:
            x, side = anomalyclip.dual_block(block, x, class_only=False, with_vv=True)
            vv = vv + side
        else:
            x = block(x)
        if number in quarters:
            kept.append(x[:, 1:])
    normed = visual.ln_post(x)
    return {
        "pooled": normed[:, 0] @ visual.proj,
        "pooled_raw": x[:, 0] @ visual.proj,
        "patches": normed[:, 1:] @ visual.proj,
        "patches_vv": visual.ln_post(vv[:, 1:]) @ visual.proj,
        "blocks": torch.stack(kept),
        "last": normed[:, 1:],
        "class": normed[:, 0],
    }


def quick_gelu() -> nn.Module:
    """The activation of OpenAI's CLIP."""
    from open_clip.transformer import QuickGELU

    return QuickGELU()


@torch.no_grad()
def start_from_pictures(visual: nn.Module, maker: scenes.SceneMaker, *, seed: int, n_pictures: int = 150) -> None:
    """A start that need not be learnt: whitened principal components of patches, sines and cosines of places.

    Random filters see little but a patch's mean colour, since most of a picture's variance lies there; after
    whitening, edges weigh as much. With a few ten thousand pictures to learn from, this decides.

    Args:
        visual: open_clip's ``VisionTransformer``; patch embedding and positional embedding are overwritten.
        maker: makes the pictures.
        seed: of the pictures.
        n_pictures: pictures whose patches are counted.
    """
    width, patch = visual.conv1.out_channels, visual.patch_size[0]
    preprocess = backbones.square_preprocess(maker.size)
    pictures = torch.stack([preprocess(maker(seed, index).image) for index in range(n_pictures)])
    patches = F.unfold(pictures, patch, stride=patch).transpose(1, 2).flatten(0, 1)  # (n * P, 3 * patch**2)
    variances, axes = torch.linalg.eigh(torch.cov(patches.T.double()))
    variances, axes = variances[-width:], axes[:, -width:]
    visual.conv1.weight.copy_((axes / (variances + variances[0]).sqrt()).T.reshape_as(visual.conv1.weight))
    side = visual.grid_size[0]
    angles = torch.arange(side)[:, None] / 30 ** torch.linspace(0, 1, width // 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    places = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], dim=2)
    visual.positional_embedding[1:] = 0.3 * places.flatten(0, 1)


def train(folder: Path, *, n_steps: int, batch_size: int, seed: int, precision: str) -> BackboneLoss:
    """Train, or resume, the backbone.

    Args:
        folder: of checkpoints and painted pictures.
        n_steps: optimiser steps in all; the learning rate follows a cosine over them.
        batch_size: scenes (pairs of photographs) per step and process.
        seed: of weights and scenes.
        precision: ``"bf16"`` where the CPU multiplies it in hardware (AMX), else ``"fp32"``.
    Returns:
        the trained student with its losses.
    """
    maker = scenes.SceneMaker(folder)
    clip = backbones.art_vit_mini(weights=None)
    start_from_pictures(clip.visual, maker, seed=seed)
    teacher = backbones.load_cnn(backbones.EFFICIENTNET_LITE0, device="cpu")
    module = BackboneLoss(clip, teacher, maker.kinds)
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0}], _LEARNING_RATE
    )
    warm_up = max(1, n_steps // 16)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, warm_up, n_steps))
    steps_per_epoch = min(STEPS_PER_EPOCH, n_steps)
    settings = training.TrainingSettings(
        n_epochs=math.ceil(n_steps / steps_per_epoch),
        batch_size=batch_size,
        precision=precision,
        max_grad_norm=1.0,
        seed=seed,
        log_every=5,
    )
    training.train(
        module,
        SceneDataset(maker, steps_per_epoch * batch_size * PartialState(cpu=True).num_processes, seed=seed),
        optimizer,
        folder=folder / "steps",
        settings=settings,
        scheduler=scheduler,
        fingerprint={"n_steps": n_steps, "kinds": maker.kinds, "config": backbones.ART_VIT_MINI_CONFIG},
        title="backbone",
    )
    return module.eval().requires_grad_(False)


def export(module: BackboneLoss, path: Path) -> None:
    """Write the backbone as float16 safetensors: of the token table only the rows that training touched.

    :func:`helpers.backbones.art_vit_mini` puts the rows back into a table of zeros.
    """
    from safetensors.torch import save_file

    state = {name: tensor.half().contiguous() for name, tensor in module.clip.state_dict().items()}
    state["token_embedding.rows"] = state.pop("token_embedding.weight")
    state["token_embedding.row_ids"] = module.row_ids.to(torch.int32)
    with storage.atomic_path(path) as temporary:
        save_file(state, temporary)


@torch.inference_mode()
def evaluate(clip: nn.Module, maker: scenes.SceneMaker, *, n: int, seed: int) -> dict[str, float]:
    """Quality on fresh scenes, by the words "object" and "damaged object" and by comparison with one reference.

    Args:
        clip: the backbone.
        maker: makes the scenes; of part ``"held_out"`` for an honest number.
        n: scenes.
        seed: of the scenes; not the seed of training.
    Returns:
        ``image_auroc`` (class token), ``pixel_auroc`` (patch tokens), ``pixel_auroc_vv`` (AnomalyCLIP's stream);
        ``reference_image_auroc`` and ``reference_pixel_auroc`` (distance to the flawless photograph, as AnomalyGPT
        measures it); ``colour_accuracy`` and ``place_accuracy`` of the captions.
    """
    from helpers import metrics

    text = F.normalize(clip.encode_text(_tokenized(["a photo of a object.", "a photo of a damaged object."])), dim=-1)
    factors = clip.encode_text(_tokenized(factored_captions(maker.kinds)), normalize=True)
    sizes = (len(maker.kinds), len(colours.COLOUR_NAMES), len(synthesis.PLACES))
    preprocess = backbones.square_preprocess(maker.size)
    labels, masks, hits = [], [], []
    scores: dict[str, list[float]] = {"image": [], "reference": []}
    maps: dict[str, list[np.ndarray]] = {"patches": [], "patches_vv": [], "reference": []}
    for index in range(n):
        scene = maker(seed, index)
        tokens = vision_tokens(clip.visual, torch.stack([preprocess(scene.reference), preprocess(scene.image)]))
        labels.append(scene.is_damaged)
        masks.append(scene.mask)
        scores["image"].append(anomalyclip.abnormal_probability(tokens["pooled"][1:], text).item())
        found = {name: anomalyclip.abnormal_probability(tokens[name][1], text) for name in ("patches", "patches_vv")}
        bank = anomalygpt.build_bank(tokens["blocks"][:, :1])
        found["reference"] = 1 - anomalygpt.bank_similarity(tokens["blocks"][:, 1:], bank).mean(dim=0)[0]
        scores["reference"].append(found["reference"].topk(3).values.mean().item())
        for name, values in found.items():
            maps[name].append(values.view(math.isqrt(len(values)), -1).numpy())
        if scene.is_damaged:
            nearest = [part.argmax().item() for part in (tokens["pooled"][1] @ factors.T).split(sizes)]
            hits.append([nearest[1] == scene.colour, nearest[2] == scene.place])
    truth, (colour, place) = np.array(labels), np.mean(hits, axis=0)
    return {
        "image_auroc": metrics.image_auroc(np.array(scores["image"]), truth),
        "pixel_auroc": metrics.pixel_auroc(maps["patches"], masks),
        "pixel_auroc_vv": metrics.pixel_auroc(maps["patches_vv"], masks),
        "reference_image_auroc": metrics.image_auroc(np.array(scores["reference"]), truth),
        "reference_pixel_auroc": metrics.pixel_auroc(maps["reference"], masks),
        "colour_accuracy": float(colour),
        "place_accuracy": float(place),
    }


def train_prompts(
    path: Path, folder: Path, *, n_scenes: int = 800, n_epochs: int = 8, batch_size: int = 8, seed: int = 3
) -> float:
    """Train AnomalyCLIP's prompts for the exported backbone on scenes, and write what was learnt of them.

    Args:
        path: safetensors file to write: contexts and deep prompts, float32.
        folder: of scenes, features and checkpoints.
        n_scenes: a fifth of them tunes.
        n_epochs, batch_size, seed: of the training.
    Returns:
        the tuning score, see :func:`helpers.anomalyclip_training.tuning_score`.
    """
    from safetensors.torch import save_file

    from helpers import anomalyclip_training

    maker = scenes.SceneMaker(folder)
    clip = backbones.load_clip(backbones.ART_VIT_MINI, pretrained=None, image_size=maker.size, device="cpu")
    learners, tuning, _ = anomalyclip_training.own_prompts(
        clip,
        save_scenes(maker, folder / "scenes", n=n_scenes, seed=seed),
        n_epochs=n_epochs,
        folder=folder / "prompts",
        features_dir=folder / "prompts",
        settings=anomalyclip.DetectorSettings(image_size=maker.size),
        batch_size=batch_size,
    )
    learner = learners["own"]
    with storage.atomic_path(path) as temporary:
        save_file({name: parameter.detach() for name, parameter in learner.named_parameters()}, temporary)
    return anomalyclip_training.tuning_score(anomalyclip_training.prompts_text(clip, learner), tuning)


def save_scenes(maker: scenes.SceneMaker, folder: Path, *, n: int, seed: int) -> list[Sample]:
    """Scenes as PNG files with masks; every fifth is of split ``"calibration"``, to tune with."""
    samples = []
    for index in range(n):
        scene = maker(seed, index)
        path, mask_path = folder / f"{index:05d}.png", folder / f"{index:05d}_mask.png" if scene.is_damaged else None
        images.save_png(path, scene.image)
        if mask_path is not None:
            images.save_png(mask_path, scene.mask)
        kind = maker.kinds[scene.kind] if scene.is_damaged else NORMAL_KIND
        split = "train" if index % 5 else "calibration"
        samples.append(
            Sample(path, "scene", scene.is_damaged, mask_path, split, kind, str(index), storage.sha256_file(path))
        )
    return samples


def factored_captions(kinds: Sequence[str]) -> list[str]:
    """One caption per kind, colour and place, in the order of the scenes' labels."""
    return [
        *(f"a painting with a {_KIND_WORDS.get(kind, kind)}." for kind in kinds),
        *(f"a painting with a {colour} mark." for colour in colours.COLOUR_NAMES),
        *(f"a painting with damage at the {place}." for place in synthesis.PLACES),
    ]


def state_captions() -> list[str]:
    """Normal captions, then as many damaged ones with the same noun and template."""
    pairs = [
        (template.format(normal.format(noun)), template.format(damaged.format(noun)))
        for noun in _NOUNS
        for template in _TEMPLATES
        for normal, damaged in _STATES
    ]
    return [normal for normal, _ in pairs] + [damaged for _, damaged in pairs]


def _tokenized(texts: Sequence[str]) -> torch.Tensor:
    return backbones.clip_tokenizer()(list(texts))


def _learning_rate(step: int, warm_up: int, n_steps: int) -> float:
    """Share of the highest learning rate: a linear start, then half a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, n_steps - warm_up))))


def _state_loss(pooled: torch.Tensor, pairs: torch.Tensor, is_damaged: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of flawless against damaged, mean over the text pairs; both labels weigh the same.

    Args:
        pooled: ``(N, D)``.
        pairs: ``(T, 2, D)`` unit vectors, flawless first.
        is_damaged: int64 ``(N,)``.
    """
    logits = torch.einsum("nd,tcd->ntc", F.normalize(pooled, dim=-1), pairs) / TEMPERATURE
    weight = torch.stack([1 / _ratio(is_damaged), torch.ones(())])
    return F.cross_entropy(logits.flatten(0, 1), is_damaged.repeat_interleave(len(pairs)), weight=weight)


def _ratio(is_damaged: torch.Tensor) -> torch.Tensor:
    """Flawless pictures per damaged one."""
    n_damaged = is_damaged.sum().clamp(min=1)
    return (len(is_damaged) - n_damaged).clamp(min=1) / n_damaged


def _patch_loss(patches: torch.Tensor, pairs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """:func:`_balanced_entropy` of the damaged probability of each patch by the text pairs."""
    difference = pairs[:, 1] - pairs[:, 0]
    logits = torch.einsum("npd,td->ntp", F.normalize(patches, dim=-1), difference) / TEMPERATURE
    return _balanced_entropy(logits, target[:, None].expand_as(logits))


def _balanced_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over patches ``(..., P)``, in which the few damaged ones weigh as much as the many others.

    Focal and dice losses, with which prompts and decoders are trained, start slower here: one patch in fifty is
    damaged, and both first learn to mark none.
    """
    n_damaged = target.sum().clamp(min=1)
    weight = ((target.numel() - n_damaged) / n_damaged).clamp(max=_MAX_POSITIVE_WEIGHT)
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, measure and export the embedded backbone.")
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints; an interrupted run resumes from them")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=16, help="scenes per process, each of two pictures")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="fp32 on a CPU without AMX")
    parser.add_argument("--export", type=Path, default=backbones.ART_VIT_MINI_WEIGHTS)
    options = parser.parse_args()
    module = train(
        options.folder,
        n_steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        precision=options.precision,
    )
    if not PartialState(cpu=True).is_main_process:
        return
    export(module, options.export)
    print(f"{options.export}: {options.export.stat().st_size / 1e6:.1f} MB")
    clip = backbones.art_vit_mini(weights=options.export).eval()
    for name, kinds in (("trained kinds", scenes.TRAINED_KINDS), ("held-out kinds", scenes.HELD_OUT_KINDS)):
        maker = scenes.SceneMaker(options.folder, part="held_out", kinds=kinds)
        quality: dict[str, Any] = evaluate(clip, maker, n=200, seed=options.seed + 1)
        print(name, {key: round(value, 3) for key, value in quality.items()}, flush=True)
    if options.export == backbones.ART_VIT_MINI_WEIGHTS:
        score = train_prompts(standins.ASSETS / "anomalyclip.safetensors", options.folder)
        print(f"AnomalyCLIP prompts: tuning score {score:.3f}")


if __name__ == "__main__":
    main()
