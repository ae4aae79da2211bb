"""Training of AnomalyGPT's head: image decoder and prompt learner, everything else frozen.

The loss is the answer's cross-entropy plus, for each tap, focal and dice loss of the map. Genuine pictures are enough,
see :mod:`helpers.anomalygpt.pairs`.

Source: Gu et al., AnomalyGPT, AAAI 2024; code CASIA-IVA-Lab/AnomalyGPT at f21c51b.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader

from helpers import files, training
from helpers.anomalygpt import conversations, language
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt.model import AnomalyGPT, AnomalyHead
from helpers.anomalygpt.pairs import MASK_LIMIT, Confirmed, HeadTraining, Pair, PairDataset, pairs_of
from helpers.data import Dataset

IGNORED = -100
"""Target of tokens that the model is not asked to predict."""
_FOCAL_CLAMP = 1e-5


class MapSource(Protocol):
    """Another method's maps, from which prompts can be made."""

    identity: str  # hash of all that the maps come from, code too: where it changes, nothing made with them is kept

    def unit_map(self, image: np.ndarray, category: str) -> np.ndarray:
        """Picture uint8 RGB -> float32 ``(224, 224)`` in [0, 1], 0.5 where genuine pictures end."""


def focal_loss(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Focal loss with gamma 2, mean over pixels: probability ``(B, 2, H, W)``, target 0/1 ``(B, H, W)``."""
    hot = torch.stack([1 - target, target], dim=1).clamp(_FOCAL_CLAMP, 1 - _FOCAL_CLAMP)
    right = (hot * probability).sum(dim=1) + _FOCAL_CLAMP
    return (-((1 - right) ** 2) * right.log()).mean()


def dice_loss(abnormal: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice loss per picture, mean over pictures: probability ``(B, H, W)``, target 0/1 ``(B, H, W)``."""
    overlap = (abnormal * target).flatten(1).sum(dim=1)
    total = abnormal.flatten(1).sum(dim=1) + target.flatten(1).sum(dim=1)
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def answer_loss(
    speaker: language.Language, image_tokens: torch.Tensor, prompts: torch.Tensor, ids: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Mean cross-entropy over the answers' tokens, and the share of these that were the most likely ones. Only
    positions that predict an answer token, some twenty of a hundred, go through the output layer."""
    before, after = (part.expand(len(ids), -1, -1) for part in speaker.surroundings)
    text = speaker.model.get_input_embeddings()(ids)
    embeds = torch.cat([before, image_tokens.to(text), after, prompts.to(text), text], dim=1)
    n_prefix = embeds.shape[1] - ids.shape[1]
    mask = torch.cat([ids.new_ones(len(ids), n_prefix), (ids != speaker.tokens.pad_id).long()], dim=1)
    states = speaker.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    asked = targets != IGNORED  # position n_prefix + t - 1 predicts text token t
    logits = speaker.model.get_output_embeddings()(states[:, n_prefix - 1 : -1][asked]).float()
    return nn.functional.cross_entropy(logits, targets[asked]), (logits.argmax(1) == targets[asked]).float().mean()


def head_loss(model: AnomalyGPT, head: AnomalyHead, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses of a batch of :func:`batch_of` (``few_shot`` may be missing); gradients reach the head only. ``focal`` and
    ``dice`` are sums over the taps, ``loss`` is the sum of all but ``token_accuracy``."""
    logits = head.image_decoder(batch["taps"], model.text.to(batch["taps"].device))
    probability = anomalygpt.probabilities(logits, model.image_tower.grid)
    maps = probability[:, :, 1].mean(dim=0)
    if "few_shot" in batch:
        few_shot = batch["few_shot"].float()
        chosen = few_shot.flatten(1).isfinite().all(dim=1)[:, None, None]
        maps = torch.where(chosen, anomalygpt.enlarge(few_shot.nan_to_num()[:, None])[:, 0], maps)
    image_tokens = model.projection(batch["embedding"].to(model.projection.weight))[:, None]
    prompts = head.prompt_learner(maps)
    answer, accuracy = answer_loss(model.language, image_tokens, prompts, batch["ids"], batch["targets"])
    target = (batch["masks"].float() > MASK_LIMIT).float()
    focal = sum(focal_loss(tap, target) for tap in probability)
    dice = sum(dice_loss(tap[:, 1], target) for tap in probability)
    losses = {"loss": answer + focal + dice, "answer": answer, "focal": focal, "dice": dice}
    return losses | {"token_accuracy": accuracy}


def warm_up_and_decay(step: int, *, n_steps: int) -> float:
    """Factor of the learning rate: logarithmic warm-up over a tenth of the steps (at least 10, at most a third), then
    linear decay to 0 (DeepSpeed's WarmupDecayLR, but its wasted first step).

    >>> [round(warm_up_and_decay(s, n_steps=30), 2) for s in (0, 9, 20, 30)]
    [0.29, 1.0, 0.5, 0.0]
    """
    warm_up = max(1, min(max(10, n_steps // 10), n_steps // 3))
    if step < warm_up:
        return math.log(step + 2) / math.log(warm_up + 1) if step < warm_up - 1 else 1.0
    return max(0.0, (n_steps - step) / max(1, n_steps - warm_up))


def question_and_answer(tokens: language.ChatTokens, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a training conversation and its targets; only the answer (with its end mark) is asked for."""
    asked = tokens.encode(language.prompt_text(question))
    said = tokens.encode(f"{tokens.answer_prefix}{answer}{language.ANSWER_END}")
    return asked + said, [IGNORED] * len(asked) + said


def pad_texts(texts: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets of :func:`question_and_answer` as int64 ``(B, L)``, padded on the right."""
    ids, targets = (
        nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
        for rows, fill in zip(zip(*texts), (pad_id, IGNORED))
    )
    return ids, targets


def batch_of(
    pairs: Sequence[Pair], model: AnomalyGPT, wording: str, maps_from: MapSource | None = None
) -> dict[str, torch.Tensor]:
    """What :func:`head_loss` reads of pairs, normal and anomalous pictures in turn: ``embedding (B, J)``, ``taps (T, B,
    N, W)``, ``masks (B, 224, 224)``, ``ids`` and ``targets (B, L)``, and ``few_shot``, the maps that prompts are made
    of: those of ``maps_from``, or ``(B, rows, columns)`` against the pairs' references in four rotations, nan where
    there is none (the decoder's map)."""
    tokens, tower = model.language.tokens, model.image_tower
    features = tower.embed_images([picture for pair in pairs for picture in (pair.normal, pair.anomalous)])
    texts, maps = [], []
    for number, pair in enumerate(pairs):
        question = conversations.question(pair.category, wording=wording)
        texts += [question_and_answer(tokens, question, answer) for answer in pair.answers]
        if maps_from:
            shown = (pair.normal, pair.anomalous)
            maps += [torch.from_numpy(maps_from.unit_map(picture, pair.category)) for picture in shown]
        elif pair.reference is None:
            maps += torch.full((2, *tower.grid), math.nan, device=features.taps.device)
        else:
            turned = tower.features(anomalygpt.rotations(tower.preprocess(pair.reference)[None]))
            taps = features.taps[:, 2 * number : 2 * number + 2]
            similarity = anomalygpt.bank_similarity(taps, anomalygpt.build_bank(turned.taps))
            maps += 1.0 - similarity.mean(dim=0).unflatten(1, tower.grid)
    ids, targets = pad_texts(texts, tokens.pad_id)
    masks = torch.from_numpy(np.stack([mask for pair in pairs for mask in (np.zeros_like(pair.mask), pair.mask)]))
    batch = {"embedding": features.embedding, "taps": features.taps, "masks": masks, "ids": ids, "targets": targets}
    return {**batch, "few_shot": torch.stack(maps)}


def train_head(
    model: AnomalyGPT, dataset: Dataset, *, folder: Path, settings: HeadTraining, confirmed: Sequence[Confirmed] = (),
    maps_from: MapSource | None = None, on_checkpoint: Callable[[Path], None] | None = None,
) -> training.TrainingResult:  # fmt: skip
    """Train the head of ``model`` on genuine pictures; resume if ``folder`` holds a checkpoint of the same run.

    ``model.head``, the start, then holds the best parameters of the tuning pairs (early stopping), ``folder`` the 21
    published tensors in ``model.safetensors`` (float16), and ``training.json``. ``maps_from`` gives what prompts are
    made of, in place of the published few-shot map; with other maps training starts anew. For the rest see
    :func:`helpers.anomalygpt.pairs.pairs_of` and, with what is raised, :func:`helpers.training.train`.
    """
    from safetensors.torch import save_file

    folder, (pairs, tuning) = Path(folder), pairs_of(dataset, settings, confirmed=confirmed)
    collate = partial(batch_of, model=model, wording=settings.wording, maps_from=maps_from)
    evaluate = _tuning_score(model, tuning, collate, settings.micro_batch) if tuning else None
    before = [{"epoch": 0, "step": 0, "score": evaluate(model.head)}] if evaluate else []
    n_steps = settings.n_epochs * math.ceil(len(pairs) / settings.batch_size)
    optimizer = torch.optim.AdamW(
        model.head.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=1e-3
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_up_and_decay, n_steps=n_steps))
    # What changes the mathematics: a checkpoint with other values is not resumed.
    free = ("n_epochs", "micro_batch", "patience", "checkpoint_every")
    identity = {
        "settings": {key: value for key, value in asdict(settings).items() if key not in free}, "kinds": pairs.kinds,
        "dataset": dataset.hash, "start": model.checkpoint_id, "map_of": maps_from.identity if maps_from else False,
        "language": [model.language.hidden, str(model.language.embed([0]).dtype)],
    }  # fmt: skip
    steps = folder / (f"steps_{maps_from.identity[:12]}" if maps_from else "steps")
    with (
        contextlib.nullcontext() if model.device.type == "cpu" else recomputing(model.language.model),
        language.memory_errors("a smaller micro_batch or precision '8bit' or '4bit'"),
    ):
        result = training.train(
            model.head, partial(head_loss, model), pairs, optimizer, folder=steps, n_epochs=settings.n_epochs,
            batch_size=settings.micro_batch, n_accumulation=settings.batch_size // settings.micro_batch,
            scheduler=schedule, collate=collate, evaluate=evaluate, patience=settings.patience, max_grad_norm=1.0,
            checkpoint_every=settings.checkpoint_every, seed=settings.seed, device=model.device.type,
            identity=identity, on_checkpoint=on_checkpoint, title="AnomalyGPT head",
        )  # fmt: skip
    result = replace(result, history=[*before, *result.history])
    state = {key: tensor.detach().half().cpu().contiguous() for key, tensor in model.head.state_dict().items()}
    with files.atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    facts = {name: getattr(result, name) for name in ("best_score", "best_epoch", "n_steps", "reason", "history")}
    facts |= {"settings": asdict(settings), "n_train": len(pairs), "kinds": pairs.kinds}
    files.write_json(folder / "training.json", facts | {"sha256": files.sha256_file(folder / "model.safetensors")})
    return result


def _tuning_score(
    model: AnomalyGPT, pairs: PairDataset, collate: Callable[[list[Pair]], Any], size: int
) -> Callable[[AnomalyHead], float]:
    """Minus the mean loss on fixed pairs, seen once: higher is better, and smoother than an AUROC of few pairs."""
    loader = DataLoader(pairs, batch_size=size, collate_fn=collate)
    batches = [send_to_device(batch, model.device) for batch in loader]

    @torch.no_grad()
    def score(head: AnomalyHead) -> float:
        total = sum(float(head_loss(model, head, batch)["loss"]) * (len(batch["ids"]) // 2) for batch in batches)
        return -total / len(pairs)

    return score


@contextlib.contextmanager
def recomputing(speaker: nn.Module) -> Iterator[None]:
    """Inside, a language model's activations are computed again in the backward pass instead of being kept."""
    # transformers calls it so from 5.20 on
    kind = "activation" if hasattr(speaker, "activation_checkpointing_enable") else "gradient"
    getattr(speaker, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    speaker.train()  # it is done in train mode only
    try:
        yield
    finally:
        getattr(speaker, f"{kind}_checkpointing_disable")()
        speaker.eval()


def told(result: training.TrainingResult) -> str:
    """What the held-out pairs say of a training, in one sentence."""
    held_out = [row["score"] for row in result.history if "score" in row]
    if not held_out:
        return "Too few genuine pictures to keep some back: nothing says whether the training paid"
    words = "The held-out loss falls" if result.best_score > held_out[0] else "The training did not pay: the loss goes"
    return f"{words} from {-held_out[0]:.2f} to {-result.best_score:.2f}; epoch {result.best_epoch} is kept"
