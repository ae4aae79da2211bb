"""Trains what the ``mini`` profile ships for AnomalyGPT. A maintainer's tool, not part of ``run``:

    python -m helpers.anomalygpt_pretraining --weights workspace/mini/weights --folder workspace/pretraining

In ``full`` these weights are published: PandaGPT's projection and LoRA, AnomalyGPT's image decoder and prompt learner.
Here all four are trained for SmolLM2 and the embedded backbone, on rendered scenes: each scene is a question ("Is there
any anomaly in the image?"), an answer with a place, and a mask. Half of the time the prompts are made of the map
against 1 to 3 flawless photographs (few-shot), else of the decoder's map.

Trained at once, the answers follow the image vector and never look at the map. Therefore the head learns first, without
the language model: the nine prompts made of the map are to be words, the name of their ninth of the picture where it is
damaged and "normal" elsewhere, so that what is left to learn is reading. Half of the time the image vector is hidden,
and a quarter of the maps are cleared of doubt. What is exported has the published layout; notebook 05 then trains the
head on with the user's own pictures.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from helpers import (
    anomalygpt,
    anomalygpt_training,
    backbones,
    conversations,
    imagebind,
    language,
    scenes,
    standins,
    storage,
    training,
    weights,
)

RANK = 8
CHANNELS = (4, 16, 32, 64, 128)
"""Widths of the prompt learner's convolutions; the published ones end in 1024 and would take 35 MB here."""
PLAYED_NAMES = ("the storm", "portrait of a lady", "old town", "still life", "the harbour", "lady in blue", "the mill")
WORDINGS = (None, "short", "short", "published")
"""Of the questions, each as often as it stands here; None asks without naming the artwork."""
_BEGUN_ANSWER = conversations.answer(True, ["top"]).partition(" top ")[0]
"""What is said before the place."""
MAX_LENGTH = 160
CLEARED_SHARE = 0.25
"""Share of the few-shot maps in which only the damage is left: they teach reading, the others teach doubt."""
CALM_WORD = "normal"


class SceneConversations(torch.utils.data.Dataset):
    """Looked-at scenes with question and answer; what is frozen is computed once, questions are drawn per epoch.

    A batch has one wording of the question, that of its first scene: texts of one length need no padding.

    Args:
        eyes: the image tower.
        maker: makes the scenes.
        speaker: for its tokens.
        text_pair: text features of "object", float32 ``(2, J)``.
        n: scenes.
        seed: of the scenes; scene i is a function of (seed, i).
    """

    def __init__(
        self,
        eyes: imagebind.ImageBind,
        maker: scenes.SceneMaker,
        speaker: language.Language,
        text_pair: torch.Tensor,
        *,
        n: int,
        seed: int,
    ) -> None:
        self._speaker, self._text_pair, self._seed, self._epoch = speaker, text_pair, seed, 0
        self._rows = [_looked_at(eyes, maker, seed, index) for index in _progress(n)]

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self._seed, self._epoch, index))
        row = self._rows[index]
        few_shot = row["few_shot"]
        if rng.random() < 0.5:
            few_shot = torch.full_like(few_shot, math.nan)
        elif rng.random() < CLEARED_SHARE:
            few_shot = cleared(few_shot, row["mask"])
        embedding = row["embedding"] if rng.random() < 0.5 else torch.zeros_like(row["embedding"])
        return row | {
            "few_shot": few_shot,
            "embedding": embedding,
            "name": PLAYED_NAMES[rng.integers(len(PLAYED_NAMES))],
            "wording": WORDINGS[rng.integers(len(WORDINGS))],
        }

    @property
    def labels(self) -> np.ndarray:
        """bool ``(n,)``, True for damaged scenes."""
        return np.array([bool(row["mask"].any()) for row in self._rows])

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """An item with everything that is known of the scene, nothing hidden."""
        return self[index] | self._rows[index]

    def text(self, item: Mapping[str, Any], wording: str | None) -> tuple[list[int], list[int]]:
        """Ids and targets of the conversation about an item, asked in one of :data:`WORDINGS`."""
        mask = item["mask"].numpy()
        cells = (conversations.cell_of_center(mask),) if mask.any() else ()
        answer = conversations.answer(bool(cells), cells)
        question = anomalygpt_training.ask_about(item["name"], wording)
        return anomalygpt_training.question_and_answer(self._speaker, question, answer, max_length=MAX_LENGTH)

    def collate(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Items -> the batch of :class:`helpers.anomalygpt_training.HeadLoss`."""
        texts = [self.text(item, items[0]["wording"]) for item in items]
        ids, targets = anomalygpt_training.pad_texts(texts, self._speaker.tokens.pad_id)
        return {
            "embedding": torch.stack([item["embedding"] for item in items]),
            "taps": torch.stack([item["taps"] for item in items], dim=1).float(),
            "text": self._text_pair.expand(len(items), -1, -1),
            "masks": torch.stack([item["mask"] for item in items]),
            "ids": ids,
            "targets": targets,
            "few_shot": torch.stack([item["few_shot"] for item in items]),
        }


def cleared(few_shot: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A few-shot map without doubt: high where the mask is, at most the median elsewhere; ``(rows, columns)``."""
    damaged = nn.functional.adaptive_max_pool2d(mask[None].float(), few_shot.shape)[0] > 0
    return torch.where(damaged, few_shot.max() + 0.2, few_shot.clamp(max=few_shot.median()))


def _progress(n: int) -> Iterable[int]:
    from tqdm.auto import tqdm

    return tqdm(range(n), desc="looking at scenes", unit="scene", mininterval=5)


def _looked_at(eyes: imagebind.ImageBind, maker: scenes.SceneMaker, seed: int, index: int) -> dict[str, torch.Tensor]:
    """``embedding (J,)``, ``taps (T, N, W)`` float16, ``mask (S, S)``, ``few_shot`` (rows, columns): 1 - similarity to
    one to three flawless photographs."""
    scene = maker(seed, index)
    references = [scene.reference, *maker.photographs(index % 3, seed, index)]
    features = eyes.embed_images([scene.image, *references])
    picture, bank = features.take([0]), anomalygpt.build_bank(features.taps[:, 1:])
    distance = 1 - anomalygpt.bank_similarity(picture.taps, bank).mean(dim=0)[0]
    return {
        "embedding": picture.embedding[0],
        "taps": picture.taps[:, 0].half(),
        "mask": torch.from_numpy(scene.mask),
        "few_shot": distance.unflatten(0, eyes.grid),
    }


class HeadStart(nn.Module):
    """Decoder and prompt learner without a language model: focal and dice loss, and each of the nine prompts made of
    the map is to be the word for its ninth of the picture.

    Args:
        head: trained.
        grid: patches per column and row.
        words: float32 ``(9, hidden)``, what the prompts are to be where there is damage.
        calm: float32 ``(hidden,)``, what they are to be elsewhere.
    """

    def __init__(
        self, head: anomalygpt.AnomalyHead, grid: tuple[int, int], words: torch.Tensor, calm: torch.Tensor
    ) -> None:
        super().__init__()
        self.head, self._grid = head, grid
        self.words, self.calm = nn.Buffer(words, persistent=False), nn.Buffer(calm, persistent=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        probability, maps = anomalygpt_training.shown_maps(self.head, batch, self._grid)
        target = anomalygpt_training.binary_target(batch["masks"])
        focal = sum(anomalygpt_training.focal_loss(tap, target) for tap in probability)
        dice = sum(anomalygpt_training.dice_loss(tap[:, 1], target) for tap in probability)
        prompts = self.head.prompt_learner(maps)[:, anomalygpt.N_BASE_PROMPTS :]
        share = nn.functional.adaptive_avg_pool2d(target[:, None], 3).flatten(1)
        is_damaged = (share > 0.002)[..., None]
        wanted = torch.where(is_damaged, self.words, self.calm)
        # Relative to the size of words, which are short vectors; about a quarter of the ninths is damaged.
        error = (prompts - wanted).square() / wanted.square().mean()
        cells = (error * torch.where(is_damaged, 4.0, 1.0)).mean()
        return {"loss": 2 * cells + focal + dice, "cells": cells, "focal": focal, "dice": dice}


def word_vectors(speaker: language.Language) -> tuple[torch.Tensor, torch.Tensor]:
    """Input embeddings of the nine places ``(9, hidden)``, means over their tokens, and of :data:`CALM_WORD`."""
    table = speaker.model.get_input_embeddings().weight.detach().float()
    names = [name for row in conversations.CELLS for name in row]
    *words, calm = (table[speaker.tokens.encode(f" {name}")].mean(dim=0) for name in (*names, CALM_WORD))
    return torch.stack(words), calm


def new_chain(weights_dir: Path, *, seed: int) -> tuple[anomalygpt_training.HeadLoss, imagebind.ImageBind]:
    """Language model with a fresh LoRA, fresh projection and head, on the embedded backbone; and its image tower.

    Args:
        weights_dir: with the ``vicuna/`` that notebook 01 prepared.
        seed: of the fresh parts.
    """
    import peft

    eyes = imagebind.image_tower(backbones.art_vit_mini())
    speaker = language.load_language(weights.require(weights_dir, "vicuna"))
    size = speaker.model.get_input_embeddings().weight.std().item()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = anomalygpt.AnomalyHead(eyes.width, eyes.joint_width, speaker.hidden, CHANNELS)
        with torch.no_grad():
            head.prompt_learner.base_prompts.mul_(size)  # as long as the embeddings of words
        projection = nn.Linear(eyes.joint_width, speaker.hidden)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        )
        peft.get_peft_model(speaker.model, config)  # puts LoRA into the model itself
    module = anomalygpt_training.HeadLoss(head, speaker, projection, eyes.grid, max_length=MAX_LENGTH)
    for name, parameter in module.speaker_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    module.projection.requires_grad_(True)
    return module, eyes


def train(
    weights_dir: Path,
    folder: Path,
    *,
    n_scenes: int,
    n_head_steps: int,
    n_steps: int,
    batch_size: int,
    seed: int,
    precision: str,
) -> tuple[anomalygpt_training.HeadLoss, dict[str, float]]:
    """Train, or resume, projection, LoRA, decoder and prompt learner.

    Args:
        weights_dir: of notebook 01 in ``mini``.
        folder: of checkpoints and painted pictures.
        n_scenes: different scenes; they come round about ``n_steps * batch_size / n_scenes`` times.
        n_head_steps: optimiser steps of the head alone.
        n_steps: optimiser steps with the language model.
        batch_size: scenes per step.
        seed: of scenes and fresh weights.
        precision: ``"bf16"`` where the CPU multiplies it in hardware (AMX), else ``"fp32"``.
    Returns:
        the trained parts, and :func:`evaluate` on scenes over pictures that training never showed.
    """
    module, eyes = new_chain(weights_dir, seed=seed)
    speaker = module.speaker
    clip = backbones.art_vit_mini()
    tokens = [backbones.clip_tokenizer()(group) for group in imagebind.sentences("object")]
    text_pair = imagebind.encode_text_pair(clip, tokens)
    sets = {
        part: SceneConversations(
            eyes, scenes.SceneMaker(folder, part=part), speaker, text_pair, n=n, seed=seed + number
        )
        for number, (part, n) in enumerate((("train", n_scenes), ("held_out", 120)))
    }
    settings = {"batch_size": batch_size, "max_grad_norm": 1.0, "seed": seed}
    identity = {"n_scenes": n_scenes, "backbone": storage.sha256_file(backbones.ART_VIT_MINI_WEIGHTS)}
    steps_per_epoch = math.ceil(n_scenes / batch_size)
    start = HeadStart(module.head, eyes.grid, *word_vectors(speaker))
    training.train(
        start,
        sets["train"],
        torch.optim.AdamW(start.parameters(), lr=1e-3, weight_decay=1e-3),
        folder=folder / "head_steps",
        settings=training.TrainingSettings(
            n_epochs=math.ceil(n_head_steps / steps_per_epoch), log_every=20, **settings
        ),
        collate=sets["train"].collate,
        fingerprint=identity,
        title="head",
    )
    lora = [p for n, p in module.named_parameters() if p.requires_grad and "lora_" in n]
    others = [p for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": 1e-3}, {"params": lora, "lr": 5e-4}], betas=(0.9, 0.95), weight_decay=1e-3
    )
    warm_up = anomalygpt_training.n_warm_up(n_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: anomalygpt_training.warm_up_and_decay(step, n_steps=n_steps, warm_up=warm_up)
    )
    training.train(
        module,
        sets["train"],
        optimizer,
        folder=folder / "steps",
        settings=training.TrainingSettings(
            n_epochs=math.ceil(n_steps / steps_per_epoch), precision=precision, log_every=5, **settings
        ),
        collate=sets["train"].collate,
        scheduler=scheduler,
        fingerprint=identity | {"n_steps": n_steps, "n_head_steps": n_head_steps},
        title="answers",
    )
    module.eval().requires_grad_(False)
    return module, evaluate(module, sets["held_out"])


@torch.inference_mode()
def evaluate(module: anomalygpt_training.HeadLoss, dataset: SceneConversations) -> dict[str, float]:
    """Answers and maps on scenes, with and without references.

    Returns:
        per map (``few_shot``, ``decoder``): ``<map>_answer_accuracy`` (sign of logit(Yes) - logit(No) at the first
        answer token), ``<map>_answer_auroc``, ``<map>_pixel_auroc``, and ``<map>_place_accuracy`` (of damaged scenes:
        the cell that the model names when the answer's beginning is given).
    """
    from helpers import metrics

    tokens, labels, found = module.speaker.tokens, dataset.labels, {}
    asked = tokens.encode(language.prompt_text(anomalygpt_training.ask_about("the mill", "short")))
    begun = tokens.encode(f"{tokens.answer_prefix}{_BEGUN_ANSWER}")
    for kind in ("few_shot", "decoder"):
        scores, maps, masks, hits = [], [], [], []
        for start in range(0, len(dataset), 16):
            numbers = range(start, min(start + 16, len(dataset)))
            batch = dataset.collate([dataset.row(i) for i in numbers])
            grid = batch["few_shot"].shape[1:]
            if kind == "decoder":
                batch["few_shot"] = torch.full_like(batch["few_shot"], math.nan)
            _, shown = anomalygpt_training.shown_maps(module.head, batch, grid)
            maps += list(shown.numpy())
            masks += list(batch["masks"].numpy())
            image_tokens = module.projection(batch["embedding"])[:, None]
            rows = [
                language.input_row(module.speaker, token, prompt, asked)
                for token, prompt in zip(image_tokens, module.head.prompt_learner(shown))
            ]
            logits = language.next_logits(module.speaker, rows)
            scores += (logits[:, tokens.yes_id] - logits[:, tokens.no_id]).tolist()
            damaged = [i for i, label in enumerate(labels[numbers]) if label]
            rows = [torch.cat([rows[i], module.speaker.embed(begun)]) for i in damaged]
            named = language.generate(module.speaker, rows, max_new_tokens=3) if rows else []
            for i, ids in zip(damaged, named):
                cells = conversations.parse_answer(f"{_BEGUN_ANSWER} {tokens.decode(ids)}").cells
                hits.append(cells == {conversations.cell_of_center(masks[start + i])})
        found |= {
            f"{kind}_answer_accuracy": float(((np.array(scores) > 0) == labels).mean()),
            f"{kind}_answer_auroc": metrics.image_auroc(np.array(scores), labels),
            f"{kind}_pixel_auroc": metrics.pixel_auroc(maps, masks),
            f"{kind}_place_accuracy": float(np.mean(hits)),
        }
    return found


def export(module: anomalygpt_training.HeadLoss, folder: Path) -> list[Path]:
    """Write ``pandagpt.safetensors`` and ``anomalygpt.safetensors`` in the published layouts, float16."""
    from safetensors.torch import save_file

    lora = {
        f"llama_model.base_model.model.{name}": parameter
        for name, parameter in module.speaker_model.named_parameters()
        if "lora_" in name
    }
    lora |= {f"llama_proj.{name}": parameter for name, parameter in module.projection.named_parameters()}
    written = []
    for name, state in (("pandagpt", lora), ("anomalygpt", module.head.state_dict())):
        path = folder / f"{name}.safetensors"
        with storage.atomic_path(path) as temporary:
            save_file({key: tensor.detach().half().contiguous() for key, tensor in state.items()}, temporary)
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export mini's PandaGPT and AnomalyGPT weights.")
    parser.add_argument("--weights", type=Path, required=True, help="weights folder of notebook 01 in mini")
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints; an interrupted run resumes from them")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--head-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=504)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="fp32 on a CPU without AMX")
    parser.add_argument("--export", type=Path, default=standins.ASSETS)
    options = parser.parse_args()
    module, quality = train(
        options.weights,
        options.folder,
        n_scenes=options.scenes,
        n_head_steps=options.head_steps,
        n_steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        precision=options.precision,
    )
    for path in export(module, options.export):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    print({key: round(value, 3) for key, value in quality.items()})


if __name__ == "__main__":
    main()
