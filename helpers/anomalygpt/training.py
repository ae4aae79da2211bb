"""Training of AnomalyGPT's head: image decoder and prompt learner, everything else frozen.

Normal pictures are enough. Each training sample is a pair: a normal picture with the answer "No, ...", and a simulated
anomaly of it with the answer "Yes, ... at the <place> ...". Half of the anomalies are patches of other pictures blended
in without an edge (NSA, as published), half are marks of the suite, on the same photograph as the normal picture. The
loss is the answer's cross-entropy plus, for each tap, focal and dice loss of the map.

Source: Gu et al., AnomalyGPT, AAAI 2024; code CASIA-IVA-Lab/AnomalyGPT at f21c51b; the presets are the report's runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from helpers import files, training
from helpers.anomalygpt import conversations, language
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt.model import MAP_SIZE, AnomalyGPT, AnomalyHead
from helpers.anomalygpt.pairs import MASK_LIMIT, Confirmed, HeadTraining, Pair, PairDataset
from helpers.data import Dataset
from helpers.records import Sample
from helpers.synthesis import LOCAL_KINDS

IGNORED = -100
"""Target of tokens that the model is not asked to predict."""
TUNING_SHARE = 0.2
MAX_LENGTH = 1024
_FOCAL_CLAMP = 1e-5
MapOf = Callable[[np.ndarray, str], np.ndarray]


# --- losses ----------------------------------------------------------------------------------------------------------


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
    """Mean cross-entropy over the answers' tokens, and the share of these that were the most likely ones.

    Only the positions that predict an answer token go through the output layer: of 1024 positions with 32001 logits
    each a training batch needs some twenty.

    Args:
        speaker: the language model.
        image_tokens, prompts: ``(B, 1, hidden)``, ``(B, 18, hidden)`` with gradients.
        ids, targets: int64 ``(B, L)``, see :func:`pad_texts`.
    """
    tokens, n_images = speaker.tokens, len(ids)
    before = speaker.embed([tokens.bos_id, *tokens.encode(language.BEFORE_IMAGE)]).expand(n_images, -1, -1)
    after = speaker.embed(tokens.encode(language.AFTER_IMAGE)).expand(n_images, -1, -1)
    text = speaker.model.get_input_embeddings()(ids)
    embeds = torch.cat([before, image_tokens.to(text.dtype), after, prompts.to(text.dtype), text], dim=1)
    n_prefix = embeds.shape[1] - ids.shape[1]
    mask = torch.cat([ids.new_ones(n_images, n_prefix), (ids != tokens.pad_id).long()], dim=1)
    states = speaker.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    asked = targets != IGNORED  # position n_prefix + t - 1 predicts text token t
    logits = speaker.model.get_output_embeddings()(states[:, n_prefix - 1 : -1][asked]).float()
    return nn.functional.cross_entropy(logits, targets[asked]), (logits.argmax(1) == targets[asked]).float().mean()


def head_loss(model: AnomalyGPT, head: AnomalyHead, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses of a batch; gradients reach the head only.

    Args:
        model: the chain, for its frozen parts.
        head: what is trained.
        batch: ``embedding (B, J)``, ``taps (T, B, N, W)``, ``masks (B, 224, 224)``, ``ids`` and ``targets (B, L)``;
            optional ``few_shot (B, rows, columns)``: the map that prompts are made of in place of the decoder's, nan
            for pictures without.
    Returns:
        ``loss``, ``answer``, ``focal``, ``dice`` (sums over the taps), ``token_accuracy``.
    """
    logits = head.image_decoder(batch["taps"], model.text.to(batch["taps"].device))
    probability = anomalygpt.probabilities(logits, model.image_tower.grid)
    maps = anomalygpt.decoder_map(probability)
    if "few_shot" in batch:
        few_shot = batch["few_shot"].float()
        chosen = few_shot.flatten(1).isfinite().all(dim=1)[:, None, None]
        maps = torch.where(chosen, anomalygpt.enlarge(few_shot.nan_to_num()[:, None])[:, 0], maps)
    image_tokens = model.projection(batch["embedding"].to(model.projection.weight.dtype))[:, None]
    prompts = head.prompt_learner(maps)
    answer, accuracy = answer_loss(model.language, image_tokens, prompts, batch["ids"], batch["targets"])
    target = (batch["masks"].float() > MASK_LIMIT).float()
    focal = sum(focal_loss(tap, target) for tap in probability)
    dice = sum(dice_loss(tap[:, 1], target) for tap in probability)
    return {
        "loss": answer + focal + dice, "answer": answer, "focal": focal, "dice": dice, "token_accuracy": accuracy,
    }  # fmt: skip


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
    """Token ids of a training conversation and its targets; only the answer (with its end mark) is asked for.

    Raises:
        ValueError: the question alone fills :data:`MAX_LENGTH`, so that nothing would be learnt.
    """
    asked = tokens.encode(language.prompt_text(question))
    said = tokens.encode(f"{tokens.answer_prefix}{answer}{language.ANSWER_END}")
    if len(asked) >= MAX_LENGTH:
        raise ValueError(
            f"The question has {len(asked)} tokens of at most {MAX_LENGTH}; nothing is left for an answer."
        )
    return (asked + said)[:MAX_LENGTH], ([IGNORED] * len(asked) + said)[:MAX_LENGTH]


def pad_texts(texts: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets of :func:`question_and_answer` as int64 ``(B, L)``, padded on the right."""
    padded = [
        nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
        for rows, fill in zip(zip(*texts), (pad_id, IGNORED))
    ]
    return padded[0], padded[1]


class Collate:
    """Pairs -> the batch of :func:`head_loss`, on the model's device; nothing is kept between batches.

    Args:
        model: the chain, for its image tower and tokens.
        wording: of the questions.
        map_of: makes the few-shot maps, see :func:`train_head`; None compares with the pair's reference.
    """

    def __init__(self, model: AnomalyGPT, wording: str | None, map_of: MapOf | None = None) -> None:
        self._model, self._wording, self._map_of = model, wording, map_of

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        tokens, tower = self._model.language.tokens, self._model.image_tower
        features = tower.embed_images([picture for pair in pairs for picture in (pair.normal, pair.anomalous)])
        texts, masks, maps = [], [], []
        for number, pair in enumerate(pairs):
            question = conversations.question(pair.category, wording=self._wording)
            for answer in (conversations.answer(False), conversations.answer(pair.is_anomalous, pair.cells)):
                texts.append(question_and_answer(tokens, question, answer))
            masks += [np.zeros((MAP_SIZE, MAP_SIZE), np.float32), pair.mask]
            maps.append(self._few_shot(pair, features.taps[:, 2 * number : 2 * number + 2]))
        ids, targets = pad_texts(texts, tokens.pad_id)
        return {
            "embedding": features.embedding, "taps": features.taps, "few_shot": torch.cat(maps), "ids": ids,
            "targets": targets, "masks": torch.from_numpy(np.stack(masks)),
        }  # fmt: skip

    def _few_shot(self, pair: Pair, taps: torch.Tensor) -> torch.Tensor:
        """``(2, rows, columns)``: 1 - similarity to the reference in four rotations; nan without one."""
        if self._map_of is not None:
            return torch.from_numpy(np.stack([self._map_of(p, pair.category) for p in (pair.normal, pair.anomalous)]))
        tower = self._model.image_tower
        if pair.reference is None:
            return torch.full((2, *tower.grid), math.nan, device=taps.device)
        turned = anomalygpt.rotations(tower.preprocess(pair.reference)[None])
        similarity = anomalygpt.bank_similarity(taps, anomalygpt.build_bank(tower.features(turned).taps))
        return 1.0 - similarity.mean(dim=0).unflatten(1, tower.grid)


# --- the run ---------------------------------------------------------------------------------------------------------


def normals_of(dataset: Dataset, category: str) -> tuple[list[Sample], list[Sample]]:
    """Normal pictures to learn from or refer to, and others to set thresholds with.

    Industrial folders have no calibration split: the last third of their normals is kept for it, in training, too.
    """
    normals = dataset.select(split="train", category=category, is_anomalous=False)
    held_out = dataset.select(split="calibration", category=category, is_anomalous=False)
    if held_out or len(normals) < 2:
        return normals, held_out
    cut = max(1, len(normals) * 2 // 3)
    return normals[:cut], normals[cut:]


def training_samples(dataset: Dataset) -> tuple[list[Sample], list[Sample]]:
    """Pictures to train on, and others to choose the best epoch with: a fifth of the sources of each painting.

    Sources (groups) stay together, and which are kept back depends on their names only. A painting with a single
    source gives none away.
    """
    learnt, tuning = [], []
    for category in dataset.categories:
        normals = normals_of(dataset, category)[0]
        marked = dataset.select(split="train", category=category, is_anomalous=True)
        groups = sorted({s.group for s in normals}, key=lambda name: files.sha256_json([category, name]))
        n_back = min(len(groups) - 1, max(1, round(TUNING_SHARE * len(groups))))
        for sample in normals + marked:
            (tuning if sample.group in groups[: max(0, n_back)] else learnt).append(sample)
    return learnt, tuning


def map_or_say(load: Callable[[Path], Any], folder: Path) -> MapOf | None:
    """``unit_map`` of the detector that ``load(folder)`` gives; None and a printed sentence where it was not fitted."""
    try:
        return load(folder).unit_map
    except FileNotFoundError as error:
        print(f"Left out, it is optional: {error}")
        return None


def train_head(
    model: AnomalyGPT,
    dataset: Dataset,
    *,
    folder: Path,
    settings: HeadTraining,
    confirmed: Sequence[Confirmed] = (),
    map_of: MapOf | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> training.TrainingResult:
    """Train the head of ``model`` on genuine pictures; resume if ``folder`` holds a checkpoint of the same run.

    ``model.head`` then holds the best parameters of the tuning pairs (early stopping), ``folder`` the 21 published
    tensors in ``model.safetensors`` (float16), and ``training.json``.

    Args:
        model: the chain; its head is the start and is changed in place.
        dataset, settings: its training pictures without the kinds it holds out; see :class:`HeadTraining`.
        folder: checkpoints go to ``folder/steps``, the result to ``folder``.
        confirmed: pictures of the feedback, see :func:`learn_from_feedback`.
        map_of: (picture uint8 RGB, category) -> float32 ``(224, 224)`` in [0, 1], 0.5 where genuine pictures end: the
            map that prompts are made of, in place of the published few-shot map.
        on_checkpoint: see :func:`helpers.training.train`.
    Raises:
        RuntimeError: a loss became nan or infinite, or GPU memory ran out.
        ValueError: pictures that cannot be trained with; other settings than the checkpoint's.
    """
    folder, (learnt, kept_back) = Path(folder), training_samples(dataset)
    kinds = [kind for kind in LOCAL_KINDS if kind not in dataset.kinds_held_out]
    pairs = PairDataset(learnt, settings, kinds=kinds, confirmed=confirmed)
    collate = Collate(model, settings.wording, map_of)
    evaluate, before = None, []
    if kept_back and settings.n_tuning:
        fixed = PairDataset(kept_back, settings, kinds=kinds, fixed=True)
        evaluate = _TuningScore(model, fixed, collate, settings.micro_batch)
        before = [{"epoch": 0, "step": 0, "score": evaluate(model.head)}]
    optimizer, schedule = _optimiser(model.head, settings, len(pairs))
    identity = _identity(model, settings, learnt + kept_back, confirmed)
    identity |= {"kinds": kinds, "map_of": map_of is not None}
    if model.device.type == "cuda":
        _recompute(model.language.model, True)
    try:
        with language.memory_errors("a smaller micro_batch or precision '8bit' or '4bit'"):
            result = training.train(
                model.head, lambda head, batch: head_loss(model, head, batch), pairs, optimizer,
                folder=folder / "steps", n_epochs=settings.n_epochs, batch_size=settings.micro_batch,
                n_accumulation=settings.batch_size // settings.micro_batch, scheduler=schedule, collate=collate,
                evaluate=evaluate, patience=settings.patience, max_grad_norm=1.0,
                checkpoint_every=settings.checkpoint_every, seed=settings.seed, device=model.device.type,
                on_checkpoint=on_checkpoint, identity=identity, title="AnomalyGPT head",
            )  # fmt: skip
    finally:
        if model.device.type == "cuda":
            _recompute(model.language.model, False)
        model.head.eval()
    return _export(model.head, folder, settings, replace(result, history=[*before, *result.history]), len(pairs), kinds)


def _optimiser(head: AnomalyHead, settings: HeadTraining, n_pairs: int) -> tuple[Any, Any]:
    """AdamW as published, and its schedule."""
    n_steps = settings.n_epochs * math.ceil(n_pairs / settings.batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, n_steps=n_steps))
    return optimizer, rate


def _identity(
    model: AnomalyGPT, settings: HeadTraining, samples: Sequence[Sample], confirmed: Sequence[Confirmed]
) -> dict[str, Any]:
    """What changes the mathematics of a run; a checkpoint with other values is not resumed."""
    free = ("n_epochs", "micro_batch", "patience", "checkpoint_every")
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key not in free},
        "pictures": files.sha256_json(sorted(s.sha256 for s in samples)),
        "confirmed": files.sha256_json(_taught(confirmed)),
        "image_tower": model.image_tower.weights_id, "start": model.checkpoint_id,
        "language": [model.language.hidden, str(model.language.embed([0]).dtype)],
    }  # fmt: skip


def _taught(confirmed: Sequence[Confirmed]) -> list[list[str]]:
    return sorted([files.sha256_file(one.image_path), one.category, one.cell or ""] for one in confirmed)


def _recompute(speaker: nn.Module, on: bool) -> None:
    """Recompute the language model's activations in the backward pass instead of keeping them, or not."""
    # transformers calls it so from 5.20 on
    kind = "activation" if hasattr(speaker, "activation_checkpointing_enable") else "gradient"
    options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}} if on else {}
    getattr(speaker, f"{kind}_checkpointing_{'enable' if on else 'disable'}")(**options)
    speaker.train(on)  # it is done in train mode only


def learn_from_feedback(
    model: AnomalyGPT, dataset: Dataset, confirmed: Sequence[Confirmed], *, folder: Path, settings: HeadTraining
) -> training.TrainingResult:
    """Train the head on, for some steps, with confirmed pictures among the others, lest it forget them.

    Each other pair starts from a confirmed genuine picture, and half of the anomalies of a painting are its confirmed
    ones, with their cell of the 3 x 3 grid as the mask: it says where, not what shape, so a few steps are enough.

    Args:
        model: the chain; its head is where training starts, and is changed in place.
        dataset: its training pictures keep taking part, its tuning pictures choose the epoch.
        confirmed: what the user has confirmed; never a test picture.
        folder: gets a folder with the new checkpoint for each set of confirmed pictures.
        settings: with few epochs and pairs.
    Raises:
        ValueError: nothing is confirmed, or a test picture is.
    """
    frozen = {files.sha256_file(s.image_path) for s in dataset.select(split="test")}
    leaked = [one.image_path for one in confirmed if files.sha256_file(one.image_path) in frozen]
    if leaked or not confirmed:
        raise ValueError(
            f"{len(leaked)} test pictures among the {len(confirmed)} confirmed ones{': ' if leaked else ''}"
            f"{', '.join(path.name for path in leaked[:3])}. Learn from own pictures that are confirmed."
        )
    place = Path(folder) / files.sha256_json(_taught(confirmed))[:12]
    return train_head(model, dataset, folder=place, settings=settings, confirmed=confirmed)


def example_pairs(dataset: Dataset, settings: HeadTraining, *, n: int = 4) -> list[dict[str, Any]]:
    """Some pairs as pictures with captions: arguments of :class:`helpers.judge.figures.Panel`."""
    kinds = [kind for kind in LOCAL_KINDS if kind not in dataset.kinds_held_out]
    pairs, panels = PairDataset(training_samples(dataset)[0], settings, kinds=kinds), []
    for pair in map(pairs.__getitem__, range(min(n, len(pairs)))):
        answer = conversations.answer(pair.is_anomalous, pair.cells)
        panels.append({"image": pair.normal, "caption": conversations.answer(False)})
        panels.append({"image": pair.anomalous, "mask": pair.mask > MASK_LIMIT, "caption": answer})
    return panels


def losses(result: training.TrainingResult) -> tuple[pd.DataFrame, str]:
    """What happened, as points for :func:`helpers.judge.figures.lines` and as a title: the held-out loss first."""
    held_out = [
        {"panel": "held-out pairs (ring: kept)", "series": "loss", "x": row["epoch"], "value": -row["score"],
         "ring": row["epoch"] == result.best_epoch}
        for row in result.history if "score" in row
    ]  # fmt: skip
    steps = pd.DataFrame([row for row in result.history if "loss" in row])
    learnt = [
        {"panel": "training pairs, mean of the epoch", "series": "loss", "x": epoch, "value": loss, "ring": False}
        for epoch, loss in steps.groupby("epoch")["loss"].mean().items()
    ]
    if not held_out:
        first, last = learnt[0]["value"], learnt[-1]["value"]
        title = f"Too few genuine pictures to keep some back; the training loss goes {first:.2f} → {last:.2f}"
    else:
        before, best = held_out[0]["value"], -result.best_score
        words = "The held-out loss falls" if best < before else "The training did not pay: the held-out loss goes"
        title = f"{words} from {before:.2f} to {best:.2f}; epoch {result.best_epoch} is kept"
    return pd.DataFrame(held_out + learnt), title


class _TuningScore:
    """Minus the mean loss on fixed pairs, seen once: higher is better, and smoother than an AUROC of few pairs."""

    def __init__(self, model: AnomalyGPT, pairs: PairDataset, collate: Collate, size: int) -> None:
        self._model, self._n, chosen = model, len(pairs), [pairs[i] for i in range(len(pairs))]
        self._batches = [collate(chosen[start : start + size]) for start in range(0, self._n, size)]

    @torch.no_grad()
    def __call__(self, head: nn.Module) -> float:
        total = 0.0
        for seen in self._batches:
            batch = {name: tensor.to(self._model.device) for name, tensor in seen.items()}
            total += float(head_loss(self._model, head, batch)["loss"]) * (len(batch["ids"]) // 2)
        return -total / self._n


def _export(
    head: AnomalyHead, folder: Path, settings: HeadTraining, result: training.TrainingResult, n_pairs: int,
    kinds: Sequence[str],
) -> training.TrainingResult:  # fmt: skip
    """``model.safetensors`` in the published layout, and what it came from, written last."""
    from safetensors.torch import save_file

    state = {key: tensor.detach().half().cpu().contiguous() for key, tensor in head.state_dict().items()}
    with files.atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    facts = {
        "settings": asdict(settings), "best_score": result.best_score, "best_epoch": result.best_epoch,
        "n_steps": result.n_steps, "n_train": n_pairs, "reason": result.reason, "kinds": list(kinds),
        "sha256": files.sha256_file(folder / "model.safetensors"), "history": list(result.history),
    }  # fmt: skip
    files.write_json(folder / "training.json", facts)
    return result
