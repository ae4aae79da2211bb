"""Trains the embedded backbone, the small CLIP of the ``mini`` profile (a maintainer's tool, not part of ``run``).

    python -m helpers.backbone_training --folder workspace/backbone --steps 800     # train, or resume
    python -m helpers.backbone_training --folder workspace/backbone --export        # write helpers/assets/

In-batch contrastive learning does not start at this size on a CPU. What does: classifying scenes through the text
embeddings of factored captions (flawless or damaged; kind; colour; place), a patch loss against the masks, and
distilling the maps of an ImageNet-trained EfficientNet-Lite0 into the patch tokens.
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
from torch import nn

from helpers import anomalyclip, backbones, scenes, synthesis, training

TEMPERATURE = 0.07
_NOUNS = ("object", "painting", "picture", "portrait", "photo", "surface", "texture", "artwork")
_STATES = (
    ("{}", "damaged {}"),
    ("flawless {}", "broken {}"),
    ("perfect {}", "{} with flaw"),
    ("unblemished {}", "{} with defect"),
    ("{} without flaw", "{} with damage"),
    ("{} without defect", "damaged {}"),
    ("{} without damage", "altered {}"),
)
"""Words for a flawless and a damaged thing, those of AnomalyGPT's prompt ensemble among them."""
_TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "{}.", "x x x x x x x x x x x x {}.")
_KIND_WORDS = {
    "cutpaste": "pasted patch",
    "poisson": "blended patch",
    "erased": "erased part",
    "craquelure": "cracks",
    "fade": "faded area",
}
_TEACHER_STAGES = (2, 4)
"""EfficientNet stages whose maps are distilled: strides 8 and 16, into the middle and the last block's tokens."""


class SceneDataset(torch.utils.data.Dataset):
    """Scenes by (seed, epoch, index): every epoch draws fresh ones.

    Args:
        n: scenes per epoch.
        seed: of the run.
        clip_size, teacher_size: input sides in pixels of the student and of the teacher.
    """

    def __init__(self, n: int, *, seed: int, clip_size: int, teacher_size: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0
        self.preprocess = backbones.square_preprocess(clip_size)
        self.teacher_size = teacher_size

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = scenes.make_scene((self.seed, self.epoch, index), size=self.teacher_size)
        return {
            "image": self.preprocess(scene.image),
            "raw": torch.from_numpy(scene.image.transpose(2, 0, 1).copy()),
            "mask": torch.from_numpy(scene.mask),
            "labels": torch.tensor([int(scene.kind >= 0), scene.kind, scene.colour, scene.place]),
        }


class BackboneLoss(nn.Module):
    """The student with its losses; ``forward(batch)`` returns them.

    Args:
        clip: ``open_clip.CLIP``, trained.
        teacher: the frozen CNN.
        kinds: trained kinds of damage, in the order of the scenes' labels.
    """

    def __init__(self, clip: nn.Module, teacher: backbones.Cnn, kinds: Sequence[str]) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(True)
        clip.logit_scale.requires_grad_(False)
        self._teacher = [teacher.model]  # in a list: neither trained nor saved with the student
        config = teacher.model.pretrained_cfg
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        width = clip.visual.conv1.out_channels
        channels = [teacher.model.feature_info[stage]["num_chs"] for stage in _TEACHER_STAGES]
        self.to_teacher = nn.ModuleList(nn.Linear(width, n) for n in channels)
        self.to_pooled = nn.Linear(width, teacher.n_features)
        tokenizer = backbones.clip_tokenizer()
        self.captions = nn.Buffer(tokenizer(_factored_captions(kinds)), persistent=False)
        self.sizes = (len(kinds), len(synthesis.COLOURS), len(synthesis.PLACES))
        self.states = nn.Buffer(tokenizer(_state_captions()), persistent=False)  # (2 * S, 77), normal then damaged

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = vision_tokens(self.clip.visual, batch["image"])
        labels = batch["labels"]
        texts, pairs = self._texts(labels.device)
        parts = {
            "image": sum(_state_loss(tokens[name], pairs, labels[:, 0]) for name in ("pooled", "pooled_raw")),
            "patch": sum(_patch_loss(tokens[name], pairs, batch["mask"]) for name in ("patches", "patches_vv")),
            "factors": self._factor_loss(tokens["pooled"], texts, labels),
            "distil": self._distil_loss(tokens, batch["raw"]),
        }
        return {"loss": parts["image"] + 2 * parts["patch"] + 0.5 * parts["factors"] + 2 * parts["distil"], **parts}

    def _texts(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Factored captions ``(C, D)``, and two random pairs (normal, damaged) ``(2, 2, D)``; unit vectors."""
        n_states = len(self.states) // 2
        chosen = torch.randint(n_states, (2,)).to(device)
        ids = torch.cat([self.captions, self.states[chosen], self.states[chosen + n_states]])
        texts = self.clip.encode_text(ids, normalize=True)
        pairs = texts[len(self.captions) :].view(2, 2, -1).transpose(0, 1)
        return texts[: len(self.captions)], pairs

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

    def _distil_loss(self, tokens: Mapping[str, torch.Tensor], raw: torch.Tensor) -> torch.Tensor:
        """1 - cosine between the student's tokens and the teacher's maps, per place, and for the pooled features."""
        teacher = self._teacher[0]
        with torch.no_grad():
            final, maps = teacher.forward_intermediates((raw.float() - self.mean) / self.std, indices=_TEACHER_STAGES)
            pooled = teacher.forward_head(final, pre_logits=True)
        grid = math.isqrt(tokens["last"].shape[1])
        loss = 1 - F.cosine_similarity(self.to_pooled(tokens["class"]), pooled, dim=-1).mean()
        for linear, name, target in zip(self.to_teacher, ("middle", "last"), maps, strict=True):
            target = F.adaptive_avg_pool2d(target, grid).flatten(2).transpose(1, 2)
            target = target - target.mean(dim=(0, 1))
            loss = loss + 1 - F.cosine_similarity(linear(tokens[name]), target, dim=-1).mean()
        return loss


def vision_tokens(visual: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """One pass through both of AnomalyCLIP's streams with everything that the losses look at.

    Args:
        visual: open_clip's ``VisionTransformer`` at its native size.
        images: float32 ``(N, 3, S, S)``.
    Returns:
        ``pooled`` and ``pooled_raw`` ``(N, D)``, the class token with and without the last norm, projected;
        ``patches`` and ``patches_vv`` ``(N, P, D)``, projected tokens of the standard and the V-V stream; ``middle``,
        ``last`` ``(N, P, W)`` and ``class`` ``(N, W)``, unprojected.
    """
    blocks = visual.transformer.resblocks
    first_dual = anomalyclip.default_first_dual_block(len(blocks))
    x = anomalyclip._embed(visual, images)
    for number, block in enumerate(blocks):
        if number == first_dual:
            vv = x
        if number >= first_dual:
            x, side = anomalyclip._dual_block(block, x, class_only=False, with_vv=True)
            vv = vv + side
        else:
            x = block(x)
        if number + 1 == len(blocks) // 2:
            middle = x[:, 1:]
    normed = visual.ln_post(x)
    return {
        "pooled": normed[:, 0] @ visual.proj,
        "pooled_raw": x[:, 0] @ visual.proj,
        "patches": normed[:, 1:] @ visual.proj,
        "patches_vv": visual.ln_post(vv[:, 1:]) @ visual.proj,
        "middle": middle,
        "last": normed[:, 1:],
        "class": normed[:, 0],
    }


def train(folder: Path, *, n_steps: int, batch_size: int, seed: int, n_workers: int) -> nn.Module:
    """Train, or resume, the backbone.

    Args:
        folder: of the checkpoints.
        n_steps: optimiser steps in all; the learning rate follows a cosine over them.
        batch_size: scenes per step.
        seed: of weights and scenes.
        n_workers: processes that render scenes.
    Returns:
        the trained ``open_clip.CLIP``.
    """
    clip = backbones.art_vit_mini(trained=False)
    kinds = scenes.trained_kinds()
    module = BackboneLoss(clip, backbones.load_cnn(backbones.EFFICIENTNET_LITE0, device="cpu"), kinds)
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0}], 1e-3
    )
    warm_up = max(1, n_steps // 16)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, warm_up, n_steps))
    steps_per_epoch = min(50, n_steps)
    dataset = SceneDataset(
        steps_per_epoch * batch_size, seed=seed, clip_size=clip.visual.image_size[0], teacher_size=224
    )
    settings = training.TrainingSettings(
        n_epochs=math.ceil(n_steps / steps_per_epoch),
        batch_size=batch_size,
        max_grad_norm=1.0,
        seed=seed,
        n_workers=n_workers,
        log_every=5,
    )
    training.train(
        module,
        dataset,
        optimizer,
        folder=folder,
        settings=settings,
        scheduler=scheduler,
        fingerprint={"n_steps": n_steps, "kinds": kinds, "config": backbones.ART_VIT_MINI_CONFIG},
        title="backbone",
    )
    return clip.eval().requires_grad_(False)


@torch.inference_mode()
def evaluate(clip: nn.Module, kinds: Sequence[str], *, n: int, seed: int) -> dict[str, float]:
    """Quality on fresh scenes: image and pixel AUROC of "damaged object" against "object".

    Args:
        clip: the backbone.
        kinds: kinds of damage to show.
        n: scenes.
        seed: of the scenes; not the seed of training.
    Returns:
        ``image_auroc``, ``pixel_auroc`` (standard tokens) and ``pixel_auroc_vv`` (AnomalyCLIP's stream).
    """
    from helpers import metrics

    tokenizer = backbones.clip_tokenizer()
    text = F.normalize(clip.encode_text(tokenizer(["a photo of a object.", "a photo of a damaged object."])), dim=-1)
    preprocess = backbones.square_preprocess(clip.visual.image_size[0])
    labels, scores, masks, maps = [], [], [], {"patches": [], "patches_vv": []}
    for index in range(n):
        scene = scenes.make_scene((seed, index), kinds=kinds)
        tokens = vision_tokens(clip.visual, preprocess(scene.image)[None])
        labels.append(scene.kind >= 0)
        scores.append(anomalyclip.abnormal_probability(tokens["pooled"], text).item())
        masks.append(scene.mask)
        for name, found in maps.items():
            probability = anomalyclip.abnormal_probability(tokens[name][0], text)
            found.append(probability.view(math.isqrt(len(probability)), -1).numpy())
    return {
        "image_auroc": metrics.image_auroc(np.array(scores), np.array(labels)),
        "pixel_auroc": metrics.pixel_auroc(maps["patches"], masks),
        "pixel_auroc_vv": metrics.pixel_auroc(maps["patches_vv"], masks),
    }


def export(clip: nn.Module, path: Path) -> None:
    """Write the backbone as float16 safetensors: of the token table only the rows that training touched.

    :func:`helpers.backbones.load_clip` puts the rows back into a table of zeros.
    """
    from safetensors.torch import save_file

    from helpers import storage

    state = {name: tensor.half().contiguous() for name, tensor in clip.state_dict().items() if name != "attn_mask"}
    tokenizer = backbones.clip_tokenizer()
    used = torch.cat([tokenizer(_factored_captions(scenes.trained_kinds())), tokenizer(_state_captions())]).unique()
    state["token_embedding.row_ids"] = used.to(torch.int32)
    state["token_embedding.rows"] = state.pop("token_embedding.weight")[used].contiguous()
    with storage.atomic_path(path) as temporary:
        save_file(state, temporary)


def _learning_rate(step: int, warm_up: int, n_steps: int) -> float:
    """Share of the highest learning rate: a linear start, then half a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, n_steps - warm_up))))


def _factored_captions(kinds: Sequence[str]) -> list[str]:
    """One caption per kind, colour and place, in the order of the scenes' labels."""
    return [
        *(f"a painting with a {_KIND_WORDS.get(kind, kind)}." for kind in kinds),
        *(f"a painting with a {colour} mark." for colour in synthesis.COLOURS),
        *(f"a painting with damage at the {place}." for place in synthesis.PLACES),
    ]


def _state_captions() -> list[str]:
    """Normal captions, then as many damaged ones with the same noun and template."""
    pairs = [
        (template.format(normal.format(noun)), template.format(damaged.format(noun)))
        for noun in _NOUNS
        for template in _TEMPLATES
        for normal, damaged in _STATES
    ]
    return [normal for normal, _ in pairs] + [damaged for _, damaged in pairs]


def _state_loss(pooled: torch.Tensor, pairs: torch.Tensor, is_damaged: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of flawless against damaged, mean over the text pairs.

    Args:
        pooled: ``(N, D)``.
        pairs: ``(T, 2, D)`` unit vectors, flawless first.
        is_damaged: int64 ``(N,)``.
    """
    logits = torch.einsum("nd,tcd->ntc", F.normalize(pooled, dim=-1), pairs) / TEMPERATURE
    return F.cross_entropy(logits.flatten(0, 1), is_damaged.repeat_interleave(len(pairs)))


def _patch_loss(patches: torch.Tensor, pairs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Focal loss plus dice of the damaged probability of each patch against the share of it that is damaged."""
    grid = math.isqrt(patches.shape[1])
    target = F.adaptive_max_pool2d(F.avg_pool2d(mask[:, None].float(), 4), grid).flatten(1)[:, None]  # (N, 1, P)
    difference = pairs[:, 1] - pairs[:, 0]
    logits = torch.einsum("npd,td->ntp", F.normalize(patches, dim=-1), difference) / TEMPERATURE
    target = target.expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (entropy * (target - probability).abs().detach().pow(1.5)).mean() * 4
    overlap = 2 * (probability * target).sum(-1) + 1
    return focal + (1 - overlap / (probability.sum(-1) + target.sum(-1) + 1)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded backbone.")
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints; an interrupted run resumes from them")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--export", type=Path, help="write the trained backbone to this file")
    options = parser.parse_args()
    clip = train(
        options.folder,
        n_steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        n_workers=options.workers,
    )
    for name, kinds in (("trained kinds", scenes.trained_kinds()), ("held-out kinds", scenes.HELD_OUT_KINDS)):
        quality: dict[str, Any] = evaluate(clip, kinds, n=200, seed=options.seed + 1)
        print(name, {key: round(value, 3) for key, value in quality.items()}, flush=True)
    if options.export is not None:
        export(clip, options.export)
        print(f"{options.export}: {options.export.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
